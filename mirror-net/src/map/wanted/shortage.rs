//! Why something has no place, for people.

use super::NoPlan;
use super::placement::{Placement, Work, segments};
use crate::ids::NodeId;
use std::collections::BTreeMap;

/// Nodes that are named; more would not make it clearer.
const NAMED_MAX: usize = 6;

/// How much room is missing for what is left, and what stands in the way where.
pub(super) fn shortage(placement: &Placement<'_>, left: &[Work]) -> NoPlan {
    let Placement { map, room, pieces, .. } = placement;
    let first = &left[0];
    let need = first.needs[0];
    let piece = &pieces[first.piece];
    let kinds = segments(need.segment);
    let slices = |work: &Work| {
        let needs = work.needs.iter().filter(|other| kinds.contains(&other.segment)).count() as u64;
        needs * u64::from(pieces[work.piece].count)
    };
    let slices: u64 = left.iter().map(slices).sum();
    let free_at = |at: usize| kinds.iter().map(|kind| u64::from(room.free(at, *kind))).sum::<u64>();
    let mut nodes: BTreeMap<NodeId, (u64, &str)> = BTreeMap::new();
    for at in room.takers() {
        let why = if piece.copies.iter().any(|copy| !room.other_node(copy.at, at)) {
            " but has a copy of them itself"
        } else if piece.copies.iter().any(|copy| Some(copy.at) != need.from && !room.other_set(copy.at, at)) {
            " but shares its power or switch with a node that has one"
        } else if room.spots[at].block_bytes > map.devices[piece.device].block_bytes {
            " but its blocks are larger than the device's"
        } else if !placement.judge().may_take(piece, first.home, need, at) {
            " but is not to mirror that node, or has just been left"
        } else {
            ""
        };
        let entry = nodes.entry(room.spots[at].node).or_insert((0, why));
        entry.0 += free_at(at);
    }
    let free: u64 = nodes.values().map(|(free, _)| free).sum();
    let mut wheres: Vec<String> = nodes
        .iter()
        .take(NAMED_MAX)
        .map(|(node, (free, why))| {
            let why = if *free > 0 { *why } else { "" };
            format!("{} has {free} free{why}", map.node_name(*node))
        })
        .collect();
    if nodes.len() > NAMED_MAX {
        wheres.push(format!("{} more nodes", nodes.len() - NAMED_MAX));
    }
    NoPlan::NoRoom {
        slices,
        missing: slices.saturating_sub(free),
        segment: need.segment,
        device: map.devices[piece.device].name.clone(),
        from: need.from.map(|at| map.disk_name(room.spots[at].id)),
        wheres,
    }
}
