//! Table pages: 126 slots' assignments, or their masks, in one block.
//!
//! Assignments and masks have pages of their own, so that I/O, which changes masks, never rewrites
//! an assignment. The two copies of a page hold the same bytes.

use super::block::{BLOCK_BYTES, Block, BlockFault, SEQUENCE_MAX};
use super::table::{Assignment, CopyState, Role, SlotState, Table};
use crate::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use crate::region::masks::RegionMasks;
use serde::Serialize;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Slots in a page of either kind.
pub const ENTRIES_PER_PAGE: usize = 126;

const MAGIC: [u8; 4] = *b"UMPG";
const VERSION: u16 = 1;

/// What a page's entries are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PageKind {
    /// Which slice each slot holds.
    Assignments,
    /// The region masks of each slot.
    Masks,
}

impl PageKind {
    /// Both kinds, in the order in which they are written.
    pub const ALL: [PageKind; 2] = [PageKind::Assignments, PageKind::Masks];

    fn code(self) -> u8 {
        match self {
            PageKind::Assignments => 1,
            PageKind::Masks => 2,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    crc: U32,
    magic: [u8; 4],
    format_tag: U64,
    sequence: U64,
    index: U32,
    count: U16,
    version: U16,
    applied_lsn: U64,
    attach_generation: U64,
    kind: u8,
    reserved: [u8; 15],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawPage {
    header: RawHeader,
    entries: [[u8; 32]; ENTRIES_PER_PAGE],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawAssignment {
    device: U32,
    slice: U32,
    loss: U32,
    slot_generation: U32,
    epoch: U64,
    /// 0 for a free slot.
    role: u8,
    state: u8,
    flags: u8,
    reserved: [u8; 5],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawMasks {
    dirty: U64,
    valid: U64,
    zero: U64,
    /// Where the slot's fine masks lie; 0 for none, and always 0 until a feature says otherwise.
    fine: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 64);
const _: () = assert!(size_of::<RawPage>() == BLOCK_BYTES);
const _: () = assert!(size_of::<RawAssignment>() == 32);
const _: () = assert!(size_of::<RawMasks>() == 32);

/// What a page's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHeader {
    /// Assignments or masks.
    pub kind: PageKind,
    /// The page's number: its first slot is `index * 126`.
    pub index: u32,
    /// Of two valid copies the one with the higher sequence is newer.
    pub sequence: u64,
    /// Every log record up to this log sequence number is in the page.
    pub applied_lsn: u64,
    /// The disk's attach generation when the page was written; for people.
    pub attach_generation: u64,
}

/// The slots of page `index` on a disk of `slots`.
pub fn page_slots(index: u32, slots: u32) -> std::ops::Range<u32> {
    let first = index * ENTRIES_PER_PAGE as u32;
    first..slots.min(first + ENTRIES_PER_PAGE as u32)
}

/// Makes the image of a page from the table.
pub(super) fn encode(header: &PageHeader, format_tag: u64, table: &Table) -> Block {
    encode_with(header, format_tag, table.len(), |slot| match header.kind {
        PageKind::Assignments => encode_assignment(&table.slot(slot)),
        PageKind::Masks => encode_masks(table.masks(slot)),
    })
}

/// Makes the image of a page of free slots.
pub(super) fn encode_free(header: &PageHeader, format_tag: u64, slots: u32, masks: RegionMasks) -> Block {
    let free = SlotState { assignment: None, slot_generation: 0, masks };
    encode_with(header, format_tag, slots, |_| match header.kind {
        PageKind::Assignments => encode_assignment(&free),
        PageKind::Masks => encode_masks(masks),
    })
}

fn encode_with(
    header: &PageHeader,
    format_tag: u64,
    slots: u32,
    encode_entry: impl Fn(SlotIndex) -> [u8; 32],
) -> Block {
    let slots = page_slots(header.index, slots);
    let mut raw = RawPage {
        header: RawHeader {
            crc: 0.into(),
            magic: MAGIC,
            format_tag: format_tag.into(),
            sequence: header.sequence.into(),
            index: header.index.into(),
            count: (slots.len() as u16).into(),
            version: VERSION.into(),
            applied_lsn: header.applied_lsn.into(),
            attach_generation: header.attach_generation.into(),
            kind: header.kind.code(),
            reserved: [0; 15],
        },
        entries: [[0; 32]; ENTRIES_PER_PAGE],
    };
    for (entry, slot) in raw.entries.iter_mut().zip(slots.map(SlotIndex)) {
        *entry = encode_entry(slot);
    }
    let mut block = Block([0; BLOCK_BYTES]);
    block.0.copy_from_slice(raw.as_bytes());
    block.seal();
    block
}

/// A page found on a disk, not yet believed to be the newest.
#[derive(Debug)]
pub(super) struct Page<'a> {
    pub(super) header: PageHeader,
    raw: &'a RawPage,
}

impl std::fmt::Debug for RawPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RawPage")
    }
}

/// Reads a page that should be number `index` of its kind on a disk of `slots`.
pub(super) fn decode<'a>(
    block: &'a Block,
    kind: PageKind,
    index: u32,
    slots: u32,
    format_tag: u64,
) -> Result<Page<'a>, BlockFault> {
    if block.is_blank() {
        return Err(BlockFault::Blank);
    }
    let raw = RawPage::ref_from_bytes(&block.0).expect("a page is as large as a block and unaligned");
    let found = &raw.header;
    if found.magic != MAGIC {
        return Err(BlockFault::Magic);
    }
    if !block.is_sealed() {
        return Err(BlockFault::Checksum);
    }
    if found.version.get() != VERSION {
        return Err(BlockFault::Version(found.version.get()));
    }
    if found.format_tag.get() != format_tag {
        return Err(BlockFault::OtherFormat);
    }
    if found.kind != kind.code() || found.index.get() != index {
        return Err(BlockFault::Misplaced);
    }
    if found.sequence.get() > SEQUENCE_MAX || found.applied_lsn.get() > SEQUENCE_MAX {
        return Err(BlockFault::Content("sequence"));
    }
    if usize::from(found.count.get()) != page_slots(index, slots).len() {
        return Err(BlockFault::Content("count"));
    }
    let header = PageHeader {
        kind,
        index,
        sequence: found.sequence.get(),
        applied_lsn: found.applied_lsn.get(),
        attach_generation: found.attach_generation.get(),
    };
    let page = Page { header, raw };
    page.check_entries()?;
    Ok(page)
}

impl Page<'_> {
    fn entries(&self) -> &[[u8; 32]] {
        &self.raw.entries[..usize::from(self.raw.header.count.get())]
    }

    /// So that [`Page::load`] cannot fail half-way.
    fn check_entries(&self) -> Result<(), BlockFault> {
        match self.header.kind {
            PageKind::Assignments => {
                self.entries().iter().try_for_each(|entry| decode_assignment(entry).map(drop))
            }
            PageKind::Masks => Ok(()),
        }
    }

    /// Puts the page's entries into the table.
    pub(super) fn load(&self, table: &mut Table) {
        let first = self.header.index * ENTRIES_PER_PAGE as u32;
        for (entry, slot) in self.entries().iter().zip((first..).map(SlotIndex)) {
            match self.header.kind {
                PageKind::Assignments => match decode_assignment(entry).expect("checked when decoded") {
                    (_, Some(assignment)) => table.assign(slot, &assignment),
                    (slot_generation, None) => table.free(slot, slot_generation),
                },
                PageKind::Masks => table.set_masks(slot, decode_masks(entry)),
            }
        }
    }
}

fn encode_assignment(state: &SlotState) -> [u8; 32] {
    let mut raw = RawAssignment::read_from_bytes(&[0; 32]).expect("an entry has 32 bytes");
    raw.slot_generation = state.slot_generation.into();
    if let Some(assignment) = state.assignment {
        raw.device = assignment.device.0.into();
        raw.slice = assignment.slice.0.into();
        raw.loss = assignment.loss.0.into();
        raw.epoch = assignment.epoch.0.into();
        raw.role = role_code(assignment.role);
        raw.state = state_code(assignment.state);
    }
    zerocopy::transmute!(raw)
}

/// The slot generation, and the assignment unless the slot is free.
fn decode_assignment(entry: &[u8; 32]) -> Result<(u32, Option<Assignment>), BlockFault> {
    let raw: &RawAssignment = zerocopy::transmute_ref!(entry);
    let slot_generation = raw.slot_generation.get();
    if raw.role == 0 {
        return Ok((slot_generation, None));
    }
    let assignment = Assignment {
        device: DeviceId(raw.device.get()),
        slice: SliceIndex(raw.slice.get()),
        role: decode_role(raw.role)?,
        state: decode_state(raw.state)?,
        epoch: SliceEpoch(raw.epoch.get()),
        loss: LossGeneration(raw.loss.get()),
        slot_generation,
    };
    Ok((slot_generation, Some(assignment)))
}

fn encode_masks(masks: RegionMasks) -> [u8; 32] {
    let raw = RawMasks {
        dirty: masks.dirty.into(),
        valid: masks.valid.into(),
        zero: masks.zero.into(),
        fine: 0.into(),
    };
    zerocopy::transmute!(raw)
}

fn decode_masks(entry: &[u8; 32]) -> RegionMasks {
    let raw: &RawMasks = zerocopy::transmute_ref!(entry);
    RegionMasks { dirty: raw.dirty.get(), valid: raw.valid.get(), zero: raw.zero.get() }
}

/// The number of a role in pages and log records; never 0.
pub(super) fn role_code(role: Role) -> u8 {
    match role {
        Role::Primary => 1,
        Role::Secondary => 2,
    }
}

pub(super) fn decode_role(code: u8) -> Result<Role, BlockFault> {
    match code {
        1 => Ok(Role::Primary),
        2 => Ok(Role::Secondary),
        _ => Err(BlockFault::Content("role")),
    }
}

/// The number of a copy's state in pages and log records; never 0.
pub(super) fn state_code(state: CopyState) -> u8 {
    match state {
        CopyState::InSync => 1,
        CopyState::Syncing => 2,
        CopyState::Stale => 3,
    }
}

pub(super) fn decode_state(code: u8) -> Result<CopyState, BlockFault> {
    match code {
        1 => Ok(CopyState::InSync),
        2 => Ok(CopyState::Syncing),
        3 => Ok(CopyState::Stale),
        _ => Err(BlockFault::Content("state")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOTS: u32 = 200;
    const TAG: u64 = 0x1122_3344_5566_7788;

    fn header(kind: PageKind, index: u32) -> PageHeader {
        PageHeader { kind, index, sequence: 7, applied_lsn: 99, attach_generation: 3 }
    }

    /// A table with something different in every slot.
    fn table(seed: u32) -> Table {
        let mut table = Table::new(SLOTS, RegionMasks::ZEROED);
        for slot in 0..SLOTS {
            let n = seed.wrapping_mul(31).wrapping_add(slot);
            let assignment = Assignment {
                device: DeviceId(n),
                slice: SliceIndex(n ^ 5),
                role: if n % 2 == 0 { Role::Primary } else { Role::Secondary },
                state: [CopyState::InSync, CopyState::Syncing, CopyState::Stale][n as usize % 3],
                epoch: SliceEpoch(u64::from(n) << 20),
                loss: LossGeneration(n ^ 9),
                slot_generation: n ^ 17,
            };
            match n % 5 {
                0 => table.free(SlotIndex(slot), n),
                _ => table.assign(SlotIndex(slot), &assignment),
            }
            let wide = u64::from(n) << 13;
            table.set_masks(SlotIndex(slot), RegionMasks { dirty: wide, valid: !wide, zero: wide ^ 0xff });
        }
        table
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn pages_survive_their_bytes(seed: u32) {
            let table = table(seed);
            let mut read = Table::new(SLOTS, RegionMasks::default());
            for kind in PageKind::ALL {
                for index in 0..2 {
                    let image = encode(&header(kind, index), TAG, &table);
                    let page = decode(&image, kind, index, SLOTS, TAG).unwrap();
                    prop_assert_eq!(page.header, header(kind, index));
                    page.load(&mut read);
                }
            }
            for slot in (0..SLOTS).map(SlotIndex) {
                prop_assert_eq!(read.slot(slot), table.slot(slot));
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for kind in PageKind::ALL {
            let mut image = encode(&header(kind, 1), TAG, &table(1));
            for bit in 0..BLOCK_BYTES * 8 {
                image.0[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&image, kind, 1, SLOTS, TAG).is_err(), "bit {bit}");
                image.0[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn a_page_elsewhere_or_of_another_format_is_refused() {
        let image = encode(&header(PageKind::Masks, 1), TAG, &table(1));
        let fault = |kind, index, slots, tag| decode(&image, kind, index, slots, tag).map(drop).unwrap_err();
        assert_eq!(fault(PageKind::Masks, 0, SLOTS, TAG), BlockFault::Misplaced);
        assert_eq!(fault(PageKind::Assignments, 1, SLOTS, TAG), BlockFault::Misplaced);
        assert_eq!(fault(PageKind::Masks, 1, SLOTS, !TAG), BlockFault::OtherFormat);
        assert_eq!(fault(PageKind::Masks, 1, SLOTS + 1, TAG), BlockFault::Content("count"));
    }
}
