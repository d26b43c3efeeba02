//! The superblock: whose disk it is, how it is laid out, and in which state.

use super::block::{BLOCK_BYTES, Block, BlockFault, SEQUENCE_MAX};
use super::geometry::{Area, Geometry};
use super::plan::{Plan, PlanStep};
use crate::ids::{ClusterId, DiskId, NodeId};
use crate::map::SegmentSlots;
use serde::Serialize;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"UBLKMIRR";
const VERSION: u16 = 1;

/// Points of a zone profile.
pub const ZONE_POINTS: usize = 64;
/// The longest name of a node or disk, in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 64;

/// Compatible features we know: a disk with others can still be used.
pub const COMPAT_KNOWN: u64 = 0;
/// Features we know of those that forbid others to write.
pub const RO_COMPAT_KNOWN: u64 = 0;
/// Features we know of those that forbid others even to read.
pub const INCOMPAT_KNOWN: u64 = 0;

/// What state a disk is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// Formatting has begun and did not end: there is nothing on it yet.
    Formatting,
    /// In use.
    Ok,
    /// All masks were found lost, and marking every copy as stale did not end yet.
    MaskLost,
}

/// In which order slots are given to segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotOrder {
    /// By address, whatever the zone profile says.
    Address,
    /// The fastest for the primary segment, the slowest for the secondary.
    FastestFirst,
}

/// Transfer rate in MB/s (10^6 bytes a second) at 64 points spread evenly over the data slots; all zero
/// when it was not measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZoneProfile(pub [u32; ZONE_POINTS]);

impl Default for ZoneProfile {
    fn default() -> Self {
        Self([0; ZONE_POINTS])
    }
}

impl Serialize for ZoneProfile {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.as_slice().serialize(serializer)
    }
}

/// Feature words, as in many file systems.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Features {
    /// May be ignored by who does not know them.
    pub compat: u64,
    /// Who does not know them may read, not write.
    pub ro_compat: u64,
    /// Who does not know them may not touch the disk.
    pub incompat: u64,
}

/// What a superblock says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Superblock {
    /// The cluster the disk belongs to.
    pub cluster: ClusterId,
    /// The disk's id in the cluster.
    pub disk: DiskId,
    /// The node it was given to.
    pub node: NodeId,
    /// Random, new at every format; what an earlier format left behind is told apart by it.
    pub format: Uuid,
    /// The node's name, for messages to people only; at most [`NAME_BYTES_MAX`] bytes.
    pub node_name: String,
    /// The disk's name, likewise.
    pub disk_name: String,
    /// Where everything lies.
    pub geometry: Geometry,
    /// Slots of each segment.
    pub segments: SegmentSlots,
    /// How slots are given to segments.
    pub slot_order: SlotOrder,
    /// How fast the disk is where.
    pub zone_profile: ZoneProfile,
    /// Whether it can be used.
    pub state: DiskState,
    /// Raised at every attach of the disk: what was only in caches before is gone.
    pub attach_generation: u64,
    /// How often the masks of the whole disk were lost since the format.
    pub mask_losses: u32,
    /// What one has to know to use the disk.
    pub features: Features,
    /// Raised at every update; the valid superblock with the highest one counts.
    pub sequence: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawArea {
    kind: U32,
    flags: U32,
    offset: U64,
    length: U64,
    reserved: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSuperblock {
    crc: U32,
    version: U16,
    reserved: U16,
    magic: [u8; 8],
    sequence: U64,
    compat: U64,
    ro_compat: U64,
    incompat: U64,
    cluster: [u8; 16],
    format: [u8; 16],
    disk: U32,
    node: U16,
    state: u8,
    slot_order: u8,
    attach_generation: U64,
    disk_bytes: U64,
    slice_bytes: U32,
    block_bytes: U32,
    slots: U32,
    primary: U32,
    secondary: U32,
    unmirrored: U32,
    mask_losses: U32,
    areas_used: U32,
    node_name: [u8; NAME_BYTES_MAX],
    disk_name: [u8; NAME_BYTES_MAX],
    zone_profile: [U32; ZONE_POINTS],
    areas: [RawArea; 16],
    unused: [u8; 3064],
}

const _: () = assert!(size_of::<RawArea>() == 32);
const _: () = assert!(size_of::<RawSuperblock>() == BLOCK_BYTES);

/// Area kinds, in the order of [`Geometry::areas`]: superblocks, log, assignments, masks, fine masks, data.
const AREA_KINDS: [u32; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

impl Superblock {
    /// Tells blocks of this format from those of an earlier one.
    pub fn format_tag(&self) -> u64 {
        self.format.as_u64_pair().0
    }

    /// The bytes on the disk.
    ///
    /// # Panics
    /// If a name is longer than [`NAME_BYTES_MAX`].
    pub fn encode(&self) -> Block {
        let mut raw = RawSuperblock::read_from_bytes(&[0; BLOCK_BYTES]).expect("it has the size of a block");
        raw.version = VERSION.into();
        raw.magic = MAGIC;
        raw.sequence = self.sequence.into();
        raw.compat = self.features.compat.into();
        raw.ro_compat = self.features.ro_compat.into();
        raw.incompat = self.features.incompat.into();
        raw.cluster = *self.cluster.as_bytes();
        raw.format = *self.format.as_bytes();
        raw.disk = self.disk.0.into();
        raw.node = self.node.0.into();
        raw.state = match self.state {
            DiskState::Formatting => 1,
            DiskState::Ok => 2,
            DiskState::MaskLost => 3,
        };
        raw.slot_order = match self.slot_order {
            SlotOrder::Address => 1,
            SlotOrder::FastestFirst => 2,
        };
        raw.attach_generation = self.attach_generation.into();
        raw.disk_bytes = self.geometry.disk_bytes.into();
        raw.slice_bytes = self.geometry.slice_bytes.into();
        raw.block_bytes = self.geometry.block_bytes.into();
        raw.slots = self.geometry.slots.into();
        raw.primary = self.segments.primary.into();
        raw.secondary = self.segments.secondary.into();
        raw.unmirrored = self.segments.unmirrored.into();
        raw.mask_losses = self.mask_losses.into();
        raw.node_name[..self.node_name.len()].copy_from_slice(self.node_name.as_bytes());
        raw.disk_name[..self.disk_name.len()].copy_from_slice(self.disk_name.as_bytes());
        raw.zone_profile = self.zone_profile.0.map(U32::new);
        let areas = self.geometry.areas();
        raw.areas_used = (areas.len() as u32).into();
        for ((raw, kind), (_, area)) in raw.areas.iter_mut().zip(AREA_KINDS).zip(areas) {
            raw.kind = kind.into();
            raw.offset = area.offset.into();
            raw.length = area.length.into();
        }
        let mut block = Block([0; BLOCK_BYTES]);
        block.0.copy_from_slice(raw.as_bytes());
        block.seal();
        block
    }

    /// Reads a superblock that stands at byte `offset` of a disk.
    pub fn decode(block: &Block, offset: u64) -> Result<Self, BlockFault> {
        if block.is_blank() {
            return Err(BlockFault::Blank);
        }
        let raw = RawSuperblock::ref_from_bytes(&block.0)
            .expect("a superblock is as large as a block and unaligned");
        if raw.magic != MAGIC {
            return Err(BlockFault::Magic);
        }
        if !block.is_sealed() {
            return Err(BlockFault::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(BlockFault::Version(raw.version.get()));
        }
        let superblock = Self {
            cluster: ClusterId(Uuid::from_bytes(raw.cluster)),
            disk: DiskId(raw.disk.get()),
            node: NodeId(raw.node.get()),
            format: Uuid::from_bytes(raw.format),
            node_name: decode_name(&raw.node_name)?,
            disk_name: decode_name(&raw.disk_name)?,
            geometry: decode_geometry(raw)?,
            segments: SegmentSlots {
                primary: raw.primary.get(),
                secondary: raw.secondary.get(),
                unmirrored: raw.unmirrored.get(),
            },
            slot_order: match raw.slot_order {
                1 => SlotOrder::Address,
                2 => SlotOrder::FastestFirst,
                _ => return Err(BlockFault::Content("slot order")),
            },
            zone_profile: ZoneProfile(raw.zone_profile.map(|point| point.get())),
            state: match raw.state {
                1 => DiskState::Formatting,
                2 => DiskState::Ok,
                3 => DiskState::MaskLost,
                _ => return Err(BlockFault::Content("state")),
            },
            attach_generation: raw.attach_generation.get(),
            mask_losses: raw.mask_losses.get(),
            features: Features {
                compat: raw.compat.get(),
                ro_compat: raw.ro_compat.get(),
                incompat: raw.incompat.get(),
            },
            sequence: raw.sequence.get(),
        };
        if superblock.sequence > SEQUENCE_MAX {
            return Err(BlockFault::Content("sequence"));
        }
        if superblock.segments.total() != u64::from(superblock.geometry.slots) {
            return Err(BlockFault::Content("segments"));
        }
        if !superblock.geometry.superblocks.contains(&offset) {
            return Err(BlockFault::Misplaced);
        }
        Ok(superblock)
    }

    /// The same superblock with a higher sequence, to be changed and then written with
    /// [`Superblock::write_plan`].
    pub fn next(&self) -> Self {
        Self { sequence: self.sequence + 1, ..self.clone() }
    }

    /// Writes it in both places: one, a flush, the other, a flush. A crash leaves the old or the new one.
    ///
    /// Both copies must be intact before, as they are after [`super::open`]'s plan has run.
    pub fn write_plan(&self) -> Plan {
        let block = self.encode();
        let [first, second] = self.geometry.superblocks;
        Plan::new(
            [
                PlanStep::block(first, block.clone()),
                PlanStep::Flush,
                PlanStep::block(second, block),
                PlanStep::Flush,
            ]
            .into_iter(),
        )
    }
}

fn decode_name(bytes: &[u8; NAME_BYTES_MAX]) -> Result<String, BlockFault> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES_MAX);
    std::str::from_utf8(&bytes[..end]).map(str::to_owned).map_err(|_| BlockFault::Content("name"))
}

fn decode_geometry(raw: &RawSuperblock) -> Result<Geometry, BlockFault> {
    let used = raw.areas.get(..raw.areas_used.get() as usize).ok_or(BlockFault::Content("area table"))?;
    let area = |kind: u32| {
        let found =
            used.iter().find(|area| area.kind.get() == kind).ok_or(BlockFault::Content("area table"))?;
        Ok(Area { offset: found.offset.get(), length: found.length.get() })
    };
    let geometry = Geometry {
        disk_bytes: raw.disk_bytes.get(),
        slice_bytes: raw.slice_bytes.get(),
        block_bytes: raw.block_bytes.get(),
        slots: raw.slots.get(),
        superblocks: [area(1)?.offset, area(2)?.offset],
        log: area(3)?,
        assignments: [area(4)?, area(5)?],
        masks: [area(6)?, area(7)?],
        fine_masks: area(8)?,
        data: area(9)?,
    };
    geometry.validate().map_err(|_| BlockFault::Content("geometry"))?;
    Ok(geometry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        let geometry = Geometry::new(1 << 40, 64 << 20, 4096).unwrap();
        Superblock {
            cluster: ClusterId(Uuid::from_u128(0x0102)),
            disk: DiskId(0x0304_0506),
            node: NodeId(0x0708),
            format: Uuid::from_u128(u128::MAX / 3),
            node_name: "n".repeat(NAME_BYTES_MAX),
            disk_name: "wwn-0x5000c500a1b2c3d4".into(),
            segments: SegmentSlots { primary: geometry.slots, secondary: 0, unmirrored: 0 },
            geometry,
            slot_order: SlotOrder::FastestFirst,
            zone_profile: ZoneProfile(std::array::from_fn(|point| 250 - point as u32)),
            state: DiskState::MaskLost,
            attach_generation: 77,
            mask_losses: 3,
            features: Features { compat: 1 << 63, ro_compat: 2, incompat: 3 },
            sequence: 99,
        }
    }

    #[test]
    fn it_survives_its_bytes_in_both_places() {
        let superblock = superblock();
        let block = superblock.encode();
        for offset in superblock.geometry.superblocks {
            assert_eq!(Superblock::decode(&block, offset), Ok(superblock.clone()));
        }
        assert_eq!(Superblock::decode(&block, 0), Err(BlockFault::Misplaced));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut block = superblock().encode();
        for bit in 0..BLOCK_BYTES * 8 {
            block.0[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&block, 4096).is_err(), "bit {bit}");
            block.0[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn an_impossible_layout_is_refused() {
        let mut overlapping = superblock();
        overlapping.geometry.data.offset = overlapping.geometry.log.offset;
        assert_eq!(Superblock::decode(&overlapping.encode(), 4096), Err(BlockFault::Content("geometry")));
        let mut segments = superblock();
        segments.segments.primary += 1;
        assert_eq!(Superblock::decode(&segments.encode(), 4096), Err(BlockFault::Content("segments")));
    }
}
