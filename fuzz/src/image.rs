//! A small disk in memory, in use, and what an input does to its metadata.

use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::page::PageKind;
use mirror_net::format::{
    Assignment, BLOCK_BYTES, Block, Change, CopyState, Geometry, Journal, MetadataIo, OpenError, Opened,
    Plan, PlanStep, ReadFailed, Role, SlotOrder, SlotState, Superblock, ZoneProfile, open,
};
use mirror_net::ids::{
    ClusterId, DeviceId, DiskId, LossGeneration, NodeId, SliceEpoch, SliceIndex, SlotIndex,
};
use mirror_net::map::SegmentSlots;
use mirror_net::region::masks::RegionMasks;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// The smallest slice there is: many slots on a small disk.
pub const SLICE_BYTES: u32 = 256 << 10;
/// Of the whole disk.
pub const DISK_BYTES: u64 = 40 << 20;
const LOG_BLOCKS: u32 = 16;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Blocks of a disk; those that are absent read as zeros.
#[derive(Clone, Default)]
pub struct Image {
    blocks: BTreeMap<u64, [u8; BLOCK_BYTES]>,
    unreadable: BTreeSet<u64>,
}

impl Image {
    /// What stands there.
    pub fn block(&self, offset: u64) -> [u8; BLOCK_BYTES] {
        self.blocks.get(&offset).copied().unwrap_or([0; BLOCK_BYTES])
    }

    /// Writes one block; that heals one that could not be read.
    pub fn put(&mut self, offset: u64, block: [u8; BLOCK_BYTES]) {
        assert!(offset % BLOCK == 0 && offset + BLOCK <= DISK_BYTES, "a write at {offset}");
        self.unreadable.remove(&offset);
        self.blocks.insert(offset, block);
    }

    /// From now on reading it is an error.
    pub fn spoil(&mut self, offset: u64) {
        self.unreadable.insert(offset);
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        assert!(offset % BLOCK == 0 && offset + buffer.len() as u64 <= DISK_BYTES, "a read at {offset}");
        for (index, piece) in buffer.chunks_mut(BLOCK_BYTES).enumerate() {
            let offset = offset + index as u64 * BLOCK;
            if self.unreadable.contains(&offset) {
                return Err(ReadFailed);
            }
            piece.copy_from_slice(&self.block(offset));
        }
        Ok(())
    }

    /// Opens the disk; what it plans is not carried out.
    pub fn open(&self) -> Result<Opened, OpenError> {
        open(&mut |offset, buffer| self.read(offset, buffer), DISK_BYTES)
    }

    /// What `mirrorctl disk inspect` would print.
    pub fn inspect(&self) -> String {
        let mut read = |offset: u64, buffer: &mut [u8]| self.read(offset, buffer);
        mirror_net::format::inspect::inspect(&mut read, DISK_BYTES, true).to_string()
    }

    /// Carries out a plan, or its first steps.
    pub fn run(&mut self, plan: Plan, steps: usize) {
        for step in plan.take(steps) {
            if let PlanStep::Write { offset, .. } = &step {
                for (index, piece) in step.bytes().chunks(BLOCK_BYTES).enumerate() {
                    let mut block = [0; BLOCK_BYTES];
                    block.copy_from_slice(piece);
                    self.put(offset + index as u64 * BLOCK, block);
                }
            }
        }
    }

    /// Carries out all that a journal wants.
    pub fn drive(&mut self, journal: &mut Journal) {
        while let Some(io) = journal.poll_io() {
            if let MetadataIo::Write { offset, block, .. } = &io {
                self.put(*offset, block.0);
            }
            journal.handle_io(io.id(), Ok(()));
        }
    }
}

/// A disk in use.
pub struct Base {
    /// Its blocks.
    pub image: Image,
    /// Its superblock.
    pub superblock: Superblock,
    /// Every slot, as it is durable.
    pub slots: Vec<SlotState>,
    /// Every slot as it was before the newest log block was written.
    pub slots_before: Vec<SlotState>,
    /// Where the newest log block is.
    pub newest_log: u64,
    /// Where metadata stands: superblocks, log, pages.
    pub metadata: Vec<u64>,
}

/// The disk that all damage is done to; made once.
pub fn base() -> &'static Base {
    static BASE: LazyLock<Base> = LazyLock::new(Base::new);
    &BASE
}

/// Every slot of a journal.
pub fn slots_of(journal: &Journal) -> Vec<SlotState> {
    (0..journal.slots()).map(|slot| journal.slot(SlotIndex(slot))).collect()
}

/// An empty disk, the first of a node; made once.
pub fn empty(node: u16) -> &'static Image {
    static IMAGES: LazyLock<Vec<Image>> =
        LazyLock::new(|| (0..=8).map(|node| formatted(DiskId(node.into()), NodeId(node)).0).collect());
    &IMAGES[usize::from(node)]
}

fn formatted(disk: DiskId, node: NodeId) -> (Image, Superblock) {
    let geometry = Geometry::with_log_blocks(DISK_BYTES, SLICE_BYTES, 512, LOG_BLOCKS).expect("a layout");
    let third = geometry.slots / 3;
    let (superblock, plan) = format(FormatOptions {
        cluster: ClusterId::default(),
        disk,
        node,
        format: uuid::Uuid::from_u128(1),
        node_name: "north".into(),
        disk_name: "vdb".into(),
        segments: SegmentSlots { primary: geometry.slots - 2 * third, secondary: third, unmirrored: third },
        geometry,
        slot_order: SlotOrder::FastestFirst,
        zone_profile: ZoneProfile::default(),
        known_zero: true,
    })
    .expect("it fits");
    let mut image = Image::default();
    image.run(plan, usize::MAX);
    (image, superblock)
}

impl Base {
    fn new() -> Self {
        let (mut image, superblock) = formatted(DiskId(1), NodeId(1));
        let mut journal = image.open().expect("it was just formatted").journal;
        // Two of three slots hold something, and the pages know it.
        for slot in (0..journal.slots()).filter(|slot| slot % 3 != 2).map(SlotIndex) {
            let assignment = Assignment {
                device: DeviceId(1 + slot.0 % 2),
                slice: SliceIndex(slot.0),
                role: if slot.0 % 2 == 0 { Role::Primary } else { Role::Secondary },
                state: CopyState::InSync,
                epoch: SliceEpoch(1),
                loss: LossGeneration(0),
                slot_generation: 0,
            };
            let masks = RegionMasks { dirty: 0, valid: u64::from(slot.0), zero: u64::MAX };
            journal.submit(Change::Assign { slot, assignment, masks });
        }
        image.drive(&mut journal);
        journal.start_checkpoint();
        image.drive(&mut journal);
        // Then a few log blocks that no page has: intents, an epoch, a slot given up.
        let mut slots_before = Vec::new();
        for slot in [0u32, 1, 3, 4, 6] {
            slots_before = slots_of(&journal);
            let masks = RegionMasks { dirty: 0b1011 << slot, valid: u64::from(slot), zero: u64::MAX };
            journal.submit(Change::Masks { slot: SlotIndex(slot), masks });
            if slot == 3 {
                journal.submit(Change::Epoch {
                    first: SlotIndex(3),
                    count: 2,
                    epoch: SliceEpoch(2),
                    role: Role::Primary,
                    state: CopyState::InSync,
                    loss: LossGeneration(1),
                });
                journal.submit(Change::Free { slot: SlotIndex(9), masks: RegionMasks::default() });
            }
            image.drive(&mut journal);
        }
        let slots = slots_of(&journal);
        let newest = image.open().expect("it is intact").report.newest_lsn;
        let geometry = &superblock.geometry;
        let mut metadata = geometry.superblocks.to_vec();
        metadata.extend((0..geometry.log_blocks()).map(|block| geometry.log.offset + block * BLOCK));
        for kind in PageKind::ALL {
            for index in 0..geometry.pages() {
                metadata.extend([0, 1].map(|copy| geometry.page_offset(kind, index, copy)));
            }
        }
        let newest_log = geometry.log_offset(newest);
        Self { image, superblock, slots, slots_before, newest_log, metadata }
    }
}

/// Seals a block, so that its contents and not only its checksum are judged.
pub fn sealed(bytes: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
    let mut block = Block(bytes);
    block.seal();
    block.0
}
