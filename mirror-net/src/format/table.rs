//! The slot table in memory: what every slot holds.

use super::log::Record;
use super::page::{ENTRIES_PER_PAGE, PageKind};
use crate::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use crate::region::masks::RegionMasks;
use serde::{Deserialize, Serialize};

/// What a copy was to its slice when the node last adopted a slice epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The first replica in the list.
    Primary,
    /// Any other.
    Secondary,
}

/// What the distribution map said of a copy when the node last adopted a slice epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// A member: has everything that was acknowledged.
    InSync,
    /// Receives new writes while the rest is copied in.
    Syncing,
    /// Out of date, or its masks were lost.
    Stale,
}

/// Which slice a slot holds, and what the copy there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Assignment {
    /// The device whose slice it is.
    pub device: DeviceId,
    /// The slice within the device.
    pub slice: SliceIndex,
    /// The copy's role under `epoch`.
    pub role: Role,
    /// The copy's state under `epoch`.
    pub state: CopyState,
    /// The highest slice epoch that was adopted.
    pub epoch: SliceEpoch,
    /// The loss generation the copy knows of.
    pub loss: LossGeneration,
    /// The slot's generation while it holds this slice; whoever remembers another one is an old user.
    pub slot_generation: u32,
}

/// Everything the table knows about one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotState {
    /// `None` for a free slot.
    pub assignment: Option<Assignment>,
    /// Counts how often the slot was freed; the next assignment carries it.
    pub slot_generation: u32,
    /// The regions' masks.
    pub masks: RegionMasks,
}

impl SlotState {
    /// The masks of a slot whose masks were lost: everything may differ from the other copies, and
    /// every stored byte may be the only one left.
    pub const LOST_MASKS: RegionMasks = RegionMasks { dirty: u64::MAX, valid: u64::MAX, zero: 0 };
}

/// A slot's row, packed: tables hold millions.
#[derive(Clone, Copy)]
struct Row {
    masks: RegionMasks,
    epoch: SliceEpoch,
    device: DeviceId,
    slice: SliceIndex,
    loss: LossGeneration,
    slot_generation: u32,
    copy: Option<(Role, CopyState)>,
}

const _: () = assert!(size_of::<Row>() <= 64, "a row must stay small: there are millions");

/// One version of the slot table.
#[derive(Clone)]
pub(super) struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// A table of free slots, all with the same masks.
    pub(super) fn new(slots: u32, masks: RegionMasks) -> Self {
        let row = Row {
            masks,
            epoch: SliceEpoch(0),
            device: DeviceId(0),
            slice: SliceIndex(0),
            loss: LossGeneration(0),
            slot_generation: 0,
            copy: None,
        };
        Self { rows: vec![row; slots as usize] }
    }

    pub(super) fn len(&self) -> u32 {
        self.rows.len() as u32
    }

    pub(super) fn slot(&self, slot: SlotIndex) -> SlotState {
        let row = &self.rows[slot.0 as usize];
        let assignment = row.copy.map(|(role, state)| Assignment {
            device: row.device,
            slice: row.slice,
            role,
            state,
            epoch: row.epoch,
            loss: row.loss,
            slot_generation: row.slot_generation,
        });
        SlotState { assignment, slot_generation: row.slot_generation, masks: row.masks }
    }

    pub(super) fn masks(&self, slot: SlotIndex) -> RegionMasks {
        self.rows[slot.0 as usize].masks
    }

    pub(super) fn set_masks(&mut self, slot: SlotIndex, masks: RegionMasks) {
        self.rows[slot.0 as usize].masks = masks;
    }

    pub(super) fn assign(&mut self, slot: SlotIndex, assignment: &Assignment) {
        let row = &mut self.rows[slot.0 as usize];
        row.device = assignment.device;
        row.slice = assignment.slice;
        row.epoch = assignment.epoch;
        row.loss = assignment.loss;
        row.slot_generation = assignment.slot_generation;
        row.copy = Some((assignment.role, assignment.state));
    }

    pub(super) fn free(&mut self, slot: SlotIndex, slot_generation: u32) {
        let row = &mut self.rows[slot.0 as usize];
        // A free row equals one that was read from a page, whose entry holds nothing but this.
        *row = Row {
            masks: row.masks,
            epoch: SliceEpoch(0),
            device: DeviceId(0),
            slice: SliceIndex(0),
            loss: LossGeneration(0),
            slot_generation,
            copy: None,
        };
    }

    /// Marks the copy in this slot, if there is one, as out of date.
    pub(super) fn mark_stale(&mut self, slot: SlotIndex) {
        if let Some((_, state)) = &mut self.rows[slot.0 as usize].copy {
            *state = CopyState::Stale;
        }
    }

    /// Does what a log record says.
    pub(super) fn apply(&mut self, record: &Record) {
        self.apply_where(record, |_, _| true);
    }

    /// Does what a log record says to the slots whose page of the kind in question `wants` it.
    pub(super) fn apply_where(&mut self, record: &Record, wants: impl Fn(PageKind, SlotIndex) -> bool) {
        match record {
            Record::Masks { slot, masks } => {
                if wants(PageKind::Masks, *slot) {
                    self.set_masks(*slot, *masks);
                }
            }
            Record::Assign { slot, assignment } => {
                if wants(PageKind::Assignments, *slot) {
                    self.assign(*slot, assignment);
                }
            }
            Record::Free { slot, slot_generation } => {
                if wants(PageKind::Assignments, *slot) {
                    self.free(*slot, *slot_generation);
                }
            }
            Record::EpochRange { first, count, epoch, role, state, loss } => {
                for slot in (first.0..first.0 + count).map(SlotIndex) {
                    let row = &mut self.rows[slot.0 as usize];
                    // Free slots are left alone: recovery may meet one whose assignment was lost.
                    if row.copy.is_some() && wants(PageKind::Assignments, slot) {
                        row.epoch = *epoch;
                        row.loss = *loss;
                        row.copy = Some((*role, *state));
                    }
                }
            }
        }
    }
}

/// The page that holds a slot, of either kind.
pub(super) fn page_of(slot: SlotIndex) -> u32 {
    slot.0 / ENTRIES_PER_PAGE as u32
}
