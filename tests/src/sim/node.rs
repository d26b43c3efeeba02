//! A node: the engine, its disk and its buffers, driven as a daemon would.
//!
//! The fault model. SIGKILL ends the process: what it had under way on the disk happened or did not,
//! the cache survives. A power cut loses a subset of the cache too. A paused node does nothing, then
//! everything that came meanwhile. Buffers are poisoned when they are given back, and compared at the
//! end of everything that was using them.

use crate::sim::disk::SimDisk;
use crate::sim::scheduler::Random;
use mirror_net::engine::action::{BufferId, BufferRange, OpKey};
use mirror_net::engine::{Engine, LocalDisk, Me};
use mirror_net::format::alloc::Allocator;
use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::{Geometry, Plan, PlanStep, SlotOrder, ZoneProfile, open};
use mirror_net::ids::{AttachId, ClusterId, DiskId, Incarnation, MapVersion, NodeId, ProcessId, SlotIndex};
use mirror_net::map::SegmentSlots;
use mirror_net::region::digest::Digest;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Bytes of a slice in the simulator.
pub const SLICE: u32 = 256 << 10;
/// Bytes of a disk.
pub const DISK_BYTES: u64 = 4 << 20;
/// Often, for schedules are short.
const CLEAR_EVERY: u64 = 300_000_000;
const POISON: u8 = 0xdb;

/// A disk I/O under way.
#[derive(Clone, Debug)]
pub enum DiskIo {
    /// Into a buffer.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffer: BufferRange,
    },
    /// What was in the buffer when it began; the buffer must still hold it at the end.
    Write {
        /// Where on the disk.
        offset: u64,
        /// The data.
        data: Vec<u8>,
        /// Where it is from; none for zeros and metadata.
        buffer: Option<BufferRange>,
        /// Through the cache.
        durable: bool,
        /// Metadata.
        metadata: bool,
    },
    /// A flush that covers this many of the cache's writes.
    Flush(usize),
}

/// A running daemon.
pub struct Process {
    /// The engine.
    pub engine: Engine,
    /// Its buffers.
    pub buffers: HashMap<u32, Vec<u8>>,
    /// Disk I/O under way, by number.
    pub ios: HashMap<u64, (mirror_net::engine::action::Io, DiskIo)>,
    /// Digests that were computed and that the engine has not got yet.
    pub digests: Vec<(OpKey, Vec<Digest>)>,
    /// What it told the manager as adopted.
    pub adopted: MapVersion,
    next_buffer: u32,
    next_io: u64,
}

/// A node.
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its disk.
    pub disk: SimDisk,
    /// The disk's attachment.
    pub attach: u64,
    /// Numbers its processes over all nodes' lives.
    pub process_id: u64,
    /// The daemon, if it runs.
    pub process: Option<Process>,
    /// It does nothing before this time.
    pub paused_until: u64,
    /// How much faster its clock runs, in millionths.
    pub drift_ppm: i64,
    geometry: Geometry,
}

fn carry_out(disk: &mut SimDisk, plan: Plan) {
    for step in plan {
        match &step {
            PlanStep::Write { offset, .. } => disk.write(*offset, step.bytes(), false),
            PlanStep::Flush => disk.flushed(disk.flush_mark()),
        }
    }
}

fn geometry() -> Geometry {
    Geometry::with_log_blocks(DISK_BYTES, SLICE, 512, 16).expect("it fits")
}

/// The disk of node 2 is not known to be zero, and full of garbage.
fn formatted(id: u16, geometry: &Geometry) -> SimDisk {
    let half = geometry.slots / 2;
    let options = FormatOptions {
        cluster: ClusterId::default(),
        disk: DiskId(u32::from(id)),
        node: NodeId(id),
        format: Default::default(),
        node_name: format!("n{id}"),
        disk_name: "d1".into(),
        geometry: geometry.clone(),
        segments: SegmentSlots { primary: geometry.slots - half - 2, secondary: half, unmirrored: 2 },
        slot_order: SlotOrder::Address,
        zone_profile: ZoneProfile::default(),
        known_zero: id != 2,
    };
    let (_, plan) = format(options).expect("it can be formatted");
    let mut disk = SimDisk::new(DISK_BYTES);
    carry_out(&mut disk, plan);
    if id == 2 {
        let pages = u64::from(geometry.slots) * u64::from(SLICE) / 4096;
        for page in 0..pages {
            disk.write(geometry.data.offset + page * 4096, &[0xe5; 4096], false);
        }
    }
    disk.flushed(disk.flush_mark());
    disk
}

impl Node {
    /// A node with a formatted disk, not running.
    pub fn new(id: u16) -> Self {
        // Formatting is the same every time, and costs more than many a schedule.
        static DISKS: [OnceLock<SimDisk>; 4] = [const { OnceLock::new() }; 4];
        let geometry = geometry();
        let disk = DISKS[usize::from(id)].get_or_init(|| formatted(id, &geometry)).clone();
        Self {
            id: NodeId(id),
            disk,
            attach: u64::from(id),
            process_id: u64::from(id),
            process: None,
            paused_until: 0,
            drift_ppm: 0,
            geometry,
        }
    }

    /// What its clock shows: clocks of nodes have nothing in common, and run at different speeds.
    pub fn clock(&self, now: u64) -> u64 {
        let drift = now as i64 / 1_000 * self.drift_ppm / 1_000;
        u64::from(self.id.0) * 1_000_000_000 + now.saturating_add_signed(drift)
    }

    /// How long to wait until its clock shows that.
    pub fn wait_for(&self, now: u64, shown: u64) -> u64 {
        let wait = shown.saturating_sub(self.clock(now));
        wait.saturating_add_signed(-(wait as i64 / 1_000 * self.drift_ppm / 1_000))
    }

    /// What the map would say of it now.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation { attach: AttachId(self.attach), process: ProcessId(self.process_id) }
    }

    /// Starts the daemon: opens the disk as it is.
    pub fn start(&mut self, now: u64) -> Result<(), String> {
        let disk = &self.disk;
        let mut read = |offset: u64, into: &mut [u8]| {
            disk.read(offset, into);
            Ok(())
        };
        let opened = open(&mut read, DISK_BYTES).map_err(|error| format!("node {}: {error}", self.id.0))?;
        if opened.report.is_loss() {
            return Err(format!("node {}: the masks are lost: {:?}", self.id.0, opened.report));
        }
        carry_out(&mut self.disk, opened.plan);
        let slots = (0..opened.journal.slots()).map(SlotIndex);
        let used: Vec<_> = slots.filter(|slot| opened.journal.slot(*slot).assignment.is_some()).collect();
        let local = LocalDisk {
            id: DiskId(u32::from(self.id.0)),
            attach: AttachId(self.attach),
            allocator: Allocator::new(&opened.superblock, used),
            journal: opened.journal,
        };
        let me = Me { node: self.id, process: ProcessId(self.process_id) };
        self.process = Some(Process {
            engine: Engine::new(me, SLICE, vec![local], now),
            buffers: HashMap::new(),
            ios: HashMap::new(),
            digests: Vec::new(),
            adopted: MapVersion(0),
            next_buffer: 0,
            next_io: 0,
        });
        if let Some(process) = &mut self.process {
            let bytes = process.engine.copy_buffer_bytes() as usize;
            let buffers = [(); 2].map(|()| process.allocate(vec![POISON; bytes]));
            process.engine.add_copy_buffers(buffers);
            process.engine.set_clear_every(CLEAR_EVERY);
        }
        Ok(())
    }

    /// The daemon dies; with `power` the machine does.
    pub fn stop(&mut self, power: bool, random: &mut Random) {
        let Some(process) = self.process.take() else { return };
        let mut ios: Vec<_> = process.ios.into_iter().collect();
        ios.sort_by_key(|(number, _)| *number);
        for (_, (_, io)) in ios {
            if let DiskIo::Write { offset, data, durable, .. } = io
                && random.one_in(2)
            {
                self.disk.write(offset, &data, durable && random.one_in(2));
            }
        }
        if power {
            self.disk.lose_cache(random);
        }
    }

    /// Where a slot's byte lies on the disk.
    pub fn offset(&self, slot: u32, offset: u32) -> u64 {
        self.geometry.slot_offset(SlotIndex(slot)) + u64::from(offset)
    }

    /// The logical content of the slot that holds a slice, if any does, and its dirty mask.
    pub fn slice(&self, device: u32, slice: u32) -> Option<(Vec<u8>, u64)> {
        let disk = &self.disk;
        let mut read = |offset: u64, into: &mut [u8]| {
            disk.read(offset, into);
            Ok(())
        };
        let opened = open(&mut read, DISK_BYTES).ok()?;
        let slot = (0..opened.journal.slots()).map(SlotIndex).find(|slot| {
            let held = opened.journal.slot(*slot).assignment;
            held.is_some_and(|held| held.device.0 == device && held.slice.0 == slice)
        })?;
        let masks = opened.journal.masks(slot);
        let mut bytes = vec![0; SLICE as usize];
        disk.read(self.offset(slot.0, 0), &mut bytes);
        let region = bytes.len() / 64;
        for index in 0..64 {
            if masks.readable() >> index & 1 == 0 {
                bytes[index * region..(index + 1) * region].fill(0);
            }
        }
        Some((bytes, masks.dirty))
    }
}

impl Process {
    /// A buffer with that content.
    pub fn allocate(&mut self, data: Vec<u8>) -> BufferId {
        self.next_buffer += 1;
        self.buffers.insert(self.next_buffer, data);
        BufferId(self.next_buffer)
    }

    /// Gives a buffer back; what is wrong with that.
    pub fn free(&mut self, buffer: BufferId) -> Option<String> {
        let Some(mut data) = self.buffers.remove(&buffer.0) else {
            return Some(format!("{buffer:?} is given back twice"));
        };
        let busy = self.ios.values().find(|(_, io)| match io {
            DiskIo::Read { buffer: range, .. } => range.buffer == buffer,
            DiskIo::Write { buffer: range, .. } => range.is_some_and(|range| range.buffer == buffer),
            DiskIo::Flush(_) => false,
        });
        data.fill(POISON);
        busy.map(|(_, io)| {
            format!("{buffer:?} is given back while a disk uses it: {io:?}").chars().take(160).collect()
        })
    }

    /// A piece of a buffer, if it was not given back.
    pub fn bytes(&self, range: BufferRange) -> Option<&[u8]> {
        self.buffers.get(&range.buffer.0)?.get(range.offset as usize..(range.offset + range.length) as usize)
    }

    /// To write into.
    pub fn bytes_mut(&mut self, range: BufferRange) -> Option<&mut [u8]> {
        self.buffers
            .get_mut(&range.buffer.0)?
            .get_mut(range.offset as usize..(range.offset + range.length) as usize)
    }

    /// Notes an I/O; its number.
    pub fn begin(&mut self, id: mirror_net::engine::action::Io, io: DiskIo) -> u64 {
        self.next_io += 1;
        self.ios.insert(self.next_io, (id, io));
        self.next_io
    }
}
