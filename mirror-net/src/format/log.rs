//! Log blocks: up to 126 records that become durable together.
//!
//! A block is atomic: its checksum holds or none of its records ever happened. In the room it has
//! left it repeats the records of the block before, so that a single unreadable block in the log,
//! the newest apart, loses nothing.

use super::block::{BLOCK_BYTES, Block, BlockFault};
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
