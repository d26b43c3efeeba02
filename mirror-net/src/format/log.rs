//! Log blocks: up to 126 records that become durable together.
//!
//! A block is atomic: its checksum holds or none of its records ever happened. In the room it has
//! left it repeats the records of the block before, so that a single unreadable block in the log,
//! the newest apart, loses nothing.

use super::block::{BLOCK_BYTES, Block, BlockFault, SEQUENCE_MAX};
use super::page::{decode_role, decode_state, role_code, state_code};
use super::table::{Assignment, CopyState, Role};
use crate::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use crate::region::masks::RegionMasks;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Records in a block.
pub const RECORDS_PER_BLOCK: usize = 126;

const MAGIC: [u8; 4] = *b"UMLG";
const VERSION: u16 = 1;
/// The block repeats *all* records of the one before.
const FLAG_REPEATS_PREVIOUS: u8 = 1;

const KIND_MASKS: u8 = 1;
const KIND_ASSIGN: u8 = 2;
const KIND_EPOCH_RANGE: u8 = 3;
const KIND_FREE: u8 = 4;

/// One change of the slot table. Absolute values throughout: to apply one twice does no harm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// The slot's masks are now these.
    Masks {
        /// Whose.
        slot: SlotIndex,
        /// All three.
        masks: RegionMasks,
    },
    /// The slot now holds this. A `Masks` record of the same block follows and resets its masks.
    Assign {
        /// Which slot.
        slot: SlotIndex,
        /// What it holds.
        assignment: Assignment,
    },
    /// A whole run of slots adopted an epoch.
    EpochRange {
        /// The first slot of the run.
        first: SlotIndex,
        /// Its length in slots.
        count: u32,
        /// The epoch that was adopted.
        epoch: SliceEpoch,
        /// The copies' role under it.
        role: Role,
        /// The copies' state under it.
        state: CopyState,
        /// The slices' loss generation.
        loss: LossGeneration,
    },
    /// The slot holds nothing any more. A `Masks` record of the same block follows.
    Free {
        /// Which slot.
        slot: SlotIndex,
        /// Its generation from now on.
        slot_generation: u32,
    },
}

impl Record {
    /// The slots it concerns.
    pub fn slots(&self) -> std::ops::Range<u32> {
        match self {
            Record::Masks { slot, .. } | Record::Assign { slot, .. } | Record::Free { slot, .. } => {
                slot.0..slot.0.saturating_add(1)
            }
            Record::EpochRange { first, count, .. } => first.0..first.0.saturating_add(*count),
        }
    }

    /// Whether it changes masks, or else assignments.
    pub fn is_masks(&self) -> bool {
        matches!(self, Record::Masks { .. })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    crc: U32,
    magic: [u8; 4],
    format_tag: U64,
    lsn: U64,
    tail_lsn: U64,
    attach_generation: U64,
    version: U16,
    /// Records of the block itself; they come first.
    count: u8,
    /// Records of the block before; they follow.
    repeated: u8,
    flags: u8,
    reserved: [u8; 19],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawBlock {
    header: RawHeader,
    records: [[u8; 32]; RECORDS_PER_BLOCK],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawMasks {
    kind: u8,
    reserved: [u8; 3],
    slot: U32,
    dirty: U64,
    valid: U64,
    zero: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawAssign {
    kind: u8,
    role: u8,
    state: u8,
    reserved: u8,
    slot: U32,
    device: U32,
    slice: U32,
    loss: U32,
    slot_generation: U32,
    epoch: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawEpochRange {
    kind: u8,
    role: u8,
    state: u8,
    reserved: u8,
    first: U32,
    count: U32,
    loss: U32,
    epoch: U64,
    reserved_too: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawFree {
    kind: u8,
    reserved: [u8; 3],
    slot: U32,
    slot_generation: U32,
    reserved_too: [u8; 20],
}

const _: () = assert!(size_of::<RawHeader>() == 64);
const _: () = assert!(size_of::<RawBlock>() == BLOCK_BYTES);
const _: () = assert!(size_of::<RawMasks>() == 32);
const _: () = assert!(size_of::<RawAssign>() == 32);
const _: () = assert!(size_of::<RawEpochRange>() == 32);
const _: () = assert!(size_of::<RawFree>() == 32);

/// A log block, outside of its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogBlock {
    /// Its log sequence number: 1 for the first block of a disk, then one more for each.
    pub lsn: u64,
    /// The oldest block that recovery still needs; `lsn` itself if that is this one.
    pub tail_lsn: u64,
    /// The disk's attach generation when it was written; for people.
    pub attach_generation: u64,
    /// What it makes durable.
    pub records: Vec<Record>,
    /// The records of block `lsn - 1`, if they all fitted.
    pub previous: Option<Vec<Record>>,
}

/// Makes the bytes of a block, which carries as much of `previous` as it has to: all or nothing.
pub fn encode(block: &LogBlock, format_tag: u64) -> Box<Block> {
    assert!(block.records.len() <= RECORDS_PER_BLOCK);
    assert!(block.tail_lsn <= block.lsn);
    let room = RECORDS_PER_BLOCK - block.records.len();
    let repeated = block.previous.as_deref().filter(|previous| previous.len() <= room);
    let mut raw = RawBlock {
        header: RawHeader {
            crc: 0.into(),
            magic: MAGIC,
            format_tag: format_tag.into(),
            lsn: block.lsn.into(),
            tail_lsn: block.tail_lsn.into(),
            attach_generation: block.attach_generation.into(),
            version: VERSION.into(),
            count: block.records.len() as u8,
            repeated: repeated.map_or(0, |records| records.len() as u8),
            flags: repeated.map_or(0, |_| FLAG_REPEATS_PREVIOUS),
            reserved: [0; 19],
        },
        records: [[0; 32]; RECORDS_PER_BLOCK],
    };
    let all = block.records.iter().chain(repeated.into_iter().flatten());
    for (raw, record) in raw.records.iter_mut().zip(all) {
        *raw = encode_record(record);
    }
    let mut bytes = Block::zeroed();
    bytes.0.copy_from_slice(raw.as_bytes());
    bytes.seal();
    bytes
}

/// Reads a block that should stand at place `position` of a log of `log_blocks`, on a disk of `slots`.
pub fn decode(
    block: &Block,
    position: u64,
    log_blocks: u64,
    slots: u32,
    format_tag: u64,
) -> Result<LogBlock, BlockFault> {
    if block.is_blank() {
        return Err(BlockFault::Blank);
    }
    let raw = RawBlock::ref_from_bytes(&block.0).expect("a log block is as large as a block and unaligned");
    let header = &raw.header;
    if header.magic != MAGIC {
        return Err(BlockFault::Magic);
    }
    if !block.is_sealed() {
        return Err(BlockFault::Checksum);
    }
    if header.version.get() != VERSION {
        return Err(BlockFault::Version(header.version.get()));
    }
    if header.format_tag.get() != format_tag {
        return Err(BlockFault::OtherFormat);
    }
    let (lsn, tail_lsn) = (header.lsn.get(), header.tail_lsn.get());
    if lsn > SEQUENCE_MAX {
        return Err(BlockFault::Content("lsn"));
    }
    if lsn % log_blocks != position {
        return Err(BlockFault::Misplaced);
    }
    if tail_lsn == 0 || tail_lsn > lsn || lsn - tail_lsn >= log_blocks {
        return Err(BlockFault::Content("tail_lsn"));
    }
    let (count, repeated) = (usize::from(header.count), usize::from(header.repeated));
    if count + repeated > RECORDS_PER_BLOCK {
        return Err(BlockFault::Content("count"));
    }
    let decode_all =
        |raw: &[[u8; 32]]| raw.iter().map(|raw| decode_record(raw, slots)).collect::<Result<Vec<_>, _>>();
    let records = decode_all(&raw.records[..count])?;
    let previous = decode_all(&raw.records[count..count + repeated])?;
    let repeats = header.flags & FLAG_REPEATS_PREVIOUS != 0;
    Ok(LogBlock {
        lsn,
        tail_lsn,
        attach_generation: header.attach_generation.get(),
        records,
        previous: repeats.then_some(previous),
    })
}

fn encode_record(record: &Record) -> [u8; 32] {
    match *record {
        Record::Masks { slot, masks } => zerocopy::transmute!(RawMasks {
            kind: KIND_MASKS,
            reserved: [0; 3],
            slot: slot.0.into(),
            dirty: masks.dirty.into(),
            valid: masks.valid.into(),
            zero: masks.zero.into(),
        }),
        Record::Assign { slot, assignment } => zerocopy::transmute!(RawAssign {
            kind: KIND_ASSIGN,
            role: role_code(assignment.role),
            state: state_code(assignment.state),
            reserved: 0,
            slot: slot.0.into(),
            device: assignment.device.0.into(),
            slice: assignment.slice.0.into(),
            loss: assignment.loss.0.into(),
            slot_generation: assignment.slot_generation.into(),
            epoch: assignment.epoch.0.into(),
        }),
        Record::EpochRange { first, count, epoch, role, state, loss } => {
            zerocopy::transmute!(RawEpochRange {
                kind: KIND_EPOCH_RANGE,
                role: role_code(role),
                state: state_code(state),
                reserved: 0,
                first: first.0.into(),
                count: count.into(),
                loss: loss.0.into(),
                epoch: epoch.0.into(),
                reserved_too: [0; 8],
            })
        }
        Record::Free { slot, slot_generation } => zerocopy::transmute!(RawFree {
            kind: KIND_FREE,
            reserved: [0; 3],
            slot: slot.0.into(),
            slot_generation: slot_generation.into(),
            reserved_too: [0; 20],
        }),
    }
}

fn decode_record(bytes: &[u8; 32], slots: u32) -> Result<Record, BlockFault> {
    let record = match bytes[0] {
        KIND_MASKS => {
            let raw: &RawMasks = zerocopy::transmute_ref!(bytes);
            let masks = RegionMasks { dirty: raw.dirty.get(), valid: raw.valid.get(), zero: raw.zero.get() };
            Record::Masks { slot: SlotIndex(raw.slot.get()), masks }
        }
        KIND_ASSIGN => {
            let raw: &RawAssign = zerocopy::transmute_ref!(bytes);
            let assignment = Assignment {
                device: DeviceId(raw.device.get()),
                slice: SliceIndex(raw.slice.get()),
                role: decode_role(raw.role)?,
                state: decode_state(raw.state)?,
                epoch: SliceEpoch(raw.epoch.get()),
                loss: LossGeneration(raw.loss.get()),
                slot_generation: raw.slot_generation.get(),
            };
            Record::Assign { slot: SlotIndex(raw.slot.get()), assignment }
        }
        KIND_EPOCH_RANGE => {
            let raw: &RawEpochRange = zerocopy::transmute_ref!(bytes);
            Record::EpochRange {
                first: SlotIndex(raw.first.get()),
                count: raw.count.get(),
                epoch: SliceEpoch(raw.epoch.get()),
                role: decode_role(raw.role)?,
                state: decode_state(raw.state)?,
                loss: LossGeneration(raw.loss.get()),
            }
        }
        KIND_FREE => {
            let raw: &RawFree = zerocopy::transmute_ref!(bytes);
            Record::Free { slot: SlotIndex(raw.slot.get()), slot_generation: raw.slot_generation.get() }
        }
        _ => return Err(BlockFault::Content("record kind")),
    };
    let range = record.slots();
    if range.is_empty() || range.end > slots {
        return Err(BlockFault::Content("record slot"));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOTS: u32 = 1000;
    const LOG_BLOCKS: u64 = 256;

    fn record() -> impl Strategy<Value = Record> {
        let role = prop_oneof![Just(Role::Primary), Just(Role::Secondary)];
        let state = prop_oneof![Just(CopyState::InSync), Just(CopyState::Syncing), Just(CopyState::Stale)];
        let numbers = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>());
        (0..4, 0..SLOTS, role, state, numbers, any::<[u64; 3]>()).prop_map(
            |(kind, slot, role, state, small, large)| {
                let slot = SlotIndex(slot);
                let (epoch, loss) = (SliceEpoch(large[0]), LossGeneration(small.0));
                match kind {
                    0 => Record::Masks {
                        slot,
                        masks: RegionMasks { dirty: large[0], valid: large[1], zero: large[2] },
                    },
                    1 => {
                        let (device, slice) = (DeviceId(small.1), SliceIndex(small.2));
                        let slot_generation = small.3;
                        let assignment =
                            Assignment { device, slice, role, state, epoch, loss, slot_generation };
                        Record::Assign { slot, assignment }
                    }
                    2 => {
                        let count = 1 + small.1 % (SLOTS - slot.0);
                        Record::EpochRange { first: slot, count, epoch, role, state, loss }
                    }
                    _ => Record::Free { slot, slot_generation: small.0 },
                }
            },
        )
    }

    fn block() -> impl Strategy<Value = LogBlock> {
        let records = || prop::collection::vec(record(), 0..=RECORDS_PER_BLOCK);
        (1..1u64 << 60, 0..LOG_BLOCKS, any::<u64>(), records(), prop::option::of(records())).prop_map(
            |(lsn, used, attach_generation, records, previous)| LogBlock {
                lsn,
                tail_lsn: lsn.saturating_sub(used).max(1),
                attach_generation,
                records,
                previous,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_block_survives_its_bytes(block in block(), tag: u64) {
            let bytes = encode(&block, tag);
            let mut expected = block.clone();
            let room = RECORDS_PER_BLOCK - block.records.len();
            expected.previous = block.previous.filter(|previous| previous.len() <= room);
            let position = block.lsn % LOG_BLOCKS;
            prop_assert_eq!(decode(&bytes, position, LOG_BLOCKS, SLOTS, tag), Ok(expected));
            prop_assert_eq!(decode(&bytes, position, LOG_BLOCKS, SLOTS, !tag), Err(BlockFault::OtherFormat));
            let elsewhere = (position + 1) % LOG_BLOCKS;
            prop_assert_eq!(decode(&bytes, elsewhere, LOG_BLOCKS, SLOTS, tag), Err(BlockFault::Misplaced));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let masks = RegionMasks { dirty: 1, valid: 2, zero: 3 };
        let records = vec![Record::Masks { slot: SlotIndex(1), masks }; 60];
        let block = LogBlock {
            lsn: 9,
            tail_lsn: 3,
            attach_generation: 1,
            records: records.clone(),
            previous: Some(records),
        };
        let mut bytes = encode(&block, 5);
        for bit in 0..BLOCK_BYTES * 8 {
            bytes.0[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, 9, LOG_BLOCKS, SLOTS, 5).is_err(), "bit {bit}");
            bytes.0[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn impossible_contents_are_refused() {
        let good = LogBlock { lsn: 9, tail_lsn: 3, attach_generation: 1, records: vec![], previous: None };
        let tampered = |change: &dyn Fn(&mut Block)| {
            let mut bytes = encode(&good, 5);
            change(&mut bytes);
            bytes.seal();
            decode(&bytes, 9, LOG_BLOCKS, SLOTS, 5).unwrap_err()
        };
        assert_eq!(tampered(&|bytes| bytes.0[24] = 10), BlockFault::Content("tail_lsn"));
        assert_eq!(tampered(&|bytes| bytes.0[42] = 127), BlockFault::Content("count"));
        assert_eq!(tampered(&|bytes| bytes.0[42] = 1), BlockFault::Content("record kind"));
        assert_eq!(tampered(&|bytes| bytes.0[40] = 2), BlockFault::Version(2));
        let beyond = |bytes: &mut Block| {
            bytes.0[42] = 1;
            bytes.0[64] = KIND_FREE;
            bytes.0[68..72].copy_from_slice(&SLOTS.to_le_bytes());
        };
        assert_eq!(tampered(&beyond), BlockFault::Content("record slot"));
        assert_eq!(decode(&Block::zeroed(), 9, LOG_BLOCKS, SLOTS, 5), Err(BlockFault::Blank));
    }
}
