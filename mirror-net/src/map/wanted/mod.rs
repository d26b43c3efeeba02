//! Where copies should be: the moves that lead from a map to what is wished of it.
//!
//! The result is a [plan](super::plan)'s moves, in an order in which each of them finds what it needs once those
//! before it are done: a free slot at its target, and a node that has no copy of these slices yet. What may begin
//! at a moment is [`next`]. Nothing is dropped before its successor is in sync, so there are never fewer copies in
//! sync than before.
//!
//! Runs are kept as long as they can be: what one disk has goes to many, in one run for each.

pub mod next;
mod placement;
mod quotas;
mod room;
mod shortage;
#[cfg(test)]
mod tests;
mod topology;

use super::plan::Move;
use super::validate::COPIES_MAX;
use super::{Device, DistributionMap, Topology};
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, DiskId};
use placement::Placement;
use room::Room;
use std::collections::{BTreeMap, BTreeSet};
use topology::Relation;

/// What is wished of a map.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Disks that are to hold nothing any more, whatever the segment.
    pub emptied: BTreeSet<DiskId>,
    /// Disks that may take copies. None of [`emptied`](Self::emptied) is among them.
    pub takers: BTreeSet<DiskId>,
    /// Copies of every slice of a device, 1 to [`COPIES_MAX`]; of those that are not named what is listed is left.
    pub copies: BTreeMap<DeviceId, u8>,
    /// Only of these devices anything is moved; of all if there are none.
    pub only: BTreeSet<DeviceId>,
    /// Who mirrors whom; `None` leaves it to the map's own rules.
    pub topology: Option<Topology>,
    /// The takers end equally full, within one slice where they have the slots, and primaries are at home: where a
    /// copy takes up a slot of the primary segment.
    pub even: bool,
}

/// What leads to what is wished.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The moves, in the order in which they can be made.
    pub moves: Vec<Move>,
    /// Slices that are copied, each as often as it is.
    pub copied: u64,
    /// Slices that have to be copied, however it is done.
    pub copied_min: u64,
}

/// Why nothing leads there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum NoPlan {
    #[error("{copies} copies of a slice were wished for; 1 to {COPIES_MAX} can be had")]
    Copies { copies: u8 },
    #[error("there are {nodes} nodes for {copies} copies of every slice: each copy needs a node of its own")]
    TooFewNodes { nodes: usize, copies: usize },
    #[error("a pair has two nodes and can have two copies of a slice, not three: choose chain or sets")]
    PairOfThree,
    #[error("node {node} shares its power or its switch with all that it could be paired with")]
    NoPartner { node: String },
    #[error("node {node} names neither power nor switch, so it belongs to no failure set")]
    NoSet { node: String },
    #[error("{}", no_room(.slices, .missing, .segment, .device, .from, .wheres))]
    NoRoom {
        /// Slices that have no place, of all devices.
        slices: u64,
        /// How many of those lack a free slot anywhere; the others lack one where the rules let them be.
        missing: u64,
        segment: Segment,
        /// The first device that has such slices.
        device: String,
        /// Where a copy of them is now, if there is one that is to go.
        from: Option<String>,
        /// What stands in the way where.
        wheres: Vec<String>,
    },
}

/// One line: how much room is missing, and where.
fn no_room(
    slices: &u64,
    missing: &u64,
    segment: &Segment,
    device: &str,
    from: &Option<String>,
    wheres: &[String],
) -> String {
    let kinds = match segment {
        Segment::Primary | Segment::Secondary => "primary or secondary",
        Segment::Unmirrored => "unmirrored",
    };
    let from = from.as_ref().map_or_else(String::new, |from| format!(" on {from}"));
    let slices = if *slices == 1 { "1 slice".to_owned() } else { format!("{slices} slices, the first") };
    let missing = match missing {
        0 => "there are free slots, but".to_owned(),
        1 => format!("1 more slot is needed in {kinds} segments:"),
        missing => format!("{missing} more slots are needed in {kinds} segments:"),
    };
    let wheres = if wheres.is_empty() { "no disk may take any".to_owned() } else { wheres.join(", ") };
    format!("there is no place for {slices} of {device}{from}: {missing} {wheres}")
}

/// So many copies of every device that is not laid out where data lie that nobody mirrors.
pub fn copies_of_all(map: &DistributionMap, copies: u8) -> BTreeMap<DeviceId, u8> {
    let laid_out = |device: &&Device| {
        let mut replicas = device.spans.iter().flat_map(|span| &span.replicas);
        device.is_mirrored() || replicas.any(|copy| copy.segment != Segment::Unmirrored)
    };
    map.devices.iter().filter(laid_out).map(|device| (device.id, copies)).collect()
}

impl DistributionMap {
    /// The moves that make a map as it is wished.
    ///
    /// # Errors
    /// Says how much room is missing and where, or why the topology cannot be had; nothing is left half planned.
    pub fn wanted(&self, wish: &Wish) -> Result<Wanted, NoPlan> {
        if let Some(copies) =
            wish.copies.values().find(|copies| !(1..=COPIES_MAX).contains(&usize::from(**copies)))
        {
            return Err(NoPlan::Copies { copies: *copies });
        }
        let copies: Vec<usize> = self
            .devices
            .iter()
            .map(|device| wish.copies.get(&device.id).copied().unwrap_or(device.copies).into())
            .collect();
        let room = Room::of(self, &wish.takers);
        let relation = Relation::of(self, &room, wish.topology, copies.iter().copied().max().unwrap_or(1))?;
        let mut placement = Placement::new(self, room, relation, wish, copies);
        placement.find_places()?;
        if wish.even {
            placement.make_even();
        }
        Ok(placement.finish())
    }
}
