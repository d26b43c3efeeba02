//! A disk with a volatile cache, and what a crash does to it.
//!
//! A write goes to the cache; a flush makes durable what completed before it; a durable write (FUA) makes
//! durable itself alone. A power cut keeps an arbitrary subset of the writes that are not durable, each
//! whole, not at all, or torn: every 512-byte sector old or new by itself. What a killed daemon alone had
//! submitted may still arrive. Blocks can be made unreadable; writing them anew heals them.
#![allow(dead_code)]

use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::{
    Geometry, Journal, OpenError, Opened, PlanStep, ReadFailed, SlotOrder, SlotState, Superblock,
    ZoneProfile, open,
};
use mirror_net::ids::{ClusterId, DiskId, NodeId, SlotIndex};
use mirror_net::map::SegmentSlots;
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, BTreeSet};

pub const BLOCK: u64 = 4096;
const SECTOR: usize = 512;
/// Small slices, so that a small disk has slots in two pages.
pub const SLICE: u32 = 256 << 10;
pub const DISK_BYTES: u64 = 40 << 20;

#[derive(Clone)]
struct CachedWrite {
    offset: u64,
    block: Box<[u8; 4096]>,
}

#[derive(Clone, Default)]
pub struct SimulatedDisk {
    /// What survives a power cut; blocks that were never written are absent and read as zeros.
    durable: BTreeMap<u64, Box<[u8; 4096]>>,
    /// Written since, oldest first; a read sees the newest.
    cache: Vec<CachedWrite>,
    pub unreadable: BTreeSet<u64>,
}

impl SimulatedDisk {
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!((offset % BLOCK, bytes.len() as u64 % BLOCK), (0, 0));
        for (i, piece) in bytes.chunks(4096).enumerate() {
            let block = Box::new(piece.try_into().unwrap());
            self.cache.push(CachedWrite { offset: offset + i as u64 * BLOCK, block });
        }
    }

    pub fn flush(&mut self) {
        for write in std::mem::take(&mut self.cache) {
            self.store(write);
        }
    }

    pub fn is_flushed(&self) -> bool {
        self.cache.is_empty()
    }

    fn store(&mut self, write: CachedWrite) {
        self.unreadable.remove(&write.offset);
        self.durable.insert(write.offset, write.block);
    }

    pub fn write_durable(&mut self, offset: u64, bytes: &[u8]) {
        // What an older write to the same place left in the cache is overtaken.
        self.cache.retain(|write| write.offset != offset);
        self.store(CachedWrite { offset, block: Box::new(bytes.try_into().unwrap()) });
    }

    pub fn cut_power(&mut self, rng: &mut StdRng) {
        // Some cuts lose nearly everything, some nearly nothing.
        let (keep, tear) = (rng.random_range(0.0..1.0), rng.random_range(0.0..0.5));
        for write in std::mem::take(&mut self.cache) {
            if rng.random_bool(tear) {
                self.tear(rng, write);
            } else if rng.random_bool(keep) {
                self.store(write);
            }
        }
    }

    fn tear(&mut self, rng: &mut StdRng, mut write: CachedWrite) {
        let old = self.durable.get(&write.offset).cloned().unwrap_or(Box::new([0; 4096]));
        for sector in (0..4096).step_by(SECTOR) {
            if rng.random() {
                write.block[sector..sector + SECTOR].copy_from_slice(&old[sector..sector + SECTOR]);
            }
        }
        self.store(write);
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        for (i, piece) in buffer.chunks_mut(4096).enumerate() {
            let offset = offset + i as u64 * BLOCK;
            let cached =
                self.cache.iter().rev().find(|write| write.offset == offset).map(|write| &write.block);
            if self.unreadable.contains(&offset) && cached.is_none() {
                return Err(ReadFailed);
            }
            match cached.or_else(|| self.durable.get(&offset)) {
                Some(block) => piece.copy_from_slice(&block[..]),
                None => piece.fill(0),
            }
        }
        Ok(())
    }

    pub fn block(&self, offset: u64) -> [u8; 4096] {
        let mut block = [0; 4096];
        self.read(offset, &mut block).unwrap();
        block
    }

    /// Inverts one bit of what is stored.
    pub fn flip(&mut self, offset: u64, bit: usize) {
        assert!(self.cache.is_empty());
        self.durable.get_mut(&offset).unwrap()[bit / 8] ^= 1 << (bit % 8);
    }

    pub fn open(&self) -> Result<Opened, OpenError> {
        self.open_sized(DISK_BYTES)
    }

    pub fn open_sized(&self, disk_bytes: u64) -> Result<Opened, OpenError> {
        open(&mut |offset, buffer| self.read(offset, buffer), disk_bytes)
    }

    pub fn run(&mut self, plan: impl Iterator<Item = PlanStep>) {
        plan.for_each(|step| self.step(&step));
    }

    pub fn step(&mut self, step: &PlanStep) {
        match step {
            PlanStep::Write { offset, .. } => self.write(*offset, step.bytes()),
            PlanStep::Flush => self.flush(),
        }
    }
}

pub fn options(log_blocks: u32, disk_bytes: u64) -> FormatOptions {
    let geometry = Geometry::with_log_blocks(disk_bytes, SLICE, 512, log_blocks).unwrap();
    let third = geometry.slots / 3;
    FormatOptions {
        cluster: ClusterId(uuid::Uuid::from_u128(1)),
        disk: DiskId(2),
        node: NodeId(3),
        format: uuid::Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0),
        node_name: "north".into(),
        disk_name: "vdb".into(),
        segments: SegmentSlots { primary: geometry.slots - 2 * third, secondary: third, unmirrored: third },
        geometry,
        slot_order: SlotOrder::FastestFirst,
        zone_profile: ZoneProfile::default(),
        known_zero: true,
    }
}

pub fn formatted(log_blocks: u32) -> (SimulatedDisk, Superblock) {
    let mut disk = SimulatedDisk::default();
    let (superblock, plan) = format(options(log_blocks, DISK_BYTES)).unwrap();
    disk.run(plan);
    (disk, superblock)
}

/// Every slot.
pub type State = Vec<SlotState>;

pub fn state_of(journal: &Journal) -> State {
    (0..journal.slots()).map(|slot| journal.slot(SlotIndex(slot))).collect()
}
