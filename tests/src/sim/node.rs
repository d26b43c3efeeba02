//! A node: its disks, its clock, and the daemon, if it runs.
//!
//! The fault model. SIGKILL ends the process: what it had under way on the disks happened or did not,
//! the caches survive. A power cut loses a subset of the caches too. A paused node does nothing, then
//! everything that came meanwhile. Its clock has nothing in common with the others' and runs up to
//! 4 % faster or slower. A disk that is dead when the daemon starts is left out by it.

use crate::sim::disk::{PAGE, SECTOR, SimDisk};
use crate::sim::process::{Content, DiskIo, Process, Started};
use crate::sim::scheduler::Random;
use mirror_net::engine::action::BufferRange;
use mirror_net::engine::{Engine, LocalDisk, Me};
use mirror_net::format::alloc::Allocator;
use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::page::PageKind;
use mirror_net::format::{Geometry, Opened, Plan, PlanStep, ReadFailed, SlotOrder, ZoneProfile, open};
use mirror_net::ids::{AttachId, ClusterId, DiskId, Incarnation, NodeId, ProcessId, SlotIndex};
use mirror_net::map::SegmentSlots;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::OnceLock;

/// Bytes of a slice in the simulator.
pub const SLICE: u32 = 256 << 10;
/// Bytes of a disk.
pub const DISK_BYTES: u64 = 4 << 20;
/// Disks of a cluster, at most.
pub const DISKS_MAX: usize = 15;

/// Between two rounds of clearing: often, for schedules are short.
const CLEAR_EVERY: u64 = 300_000_000;

/// Fills what was punched out.
pub const PUNCH: u8 = 0x77;
static ZEROS: [u8; SLICE as usize] = [0; SLICE as usize];
static PUNCHED: [u8; SLICE as usize] = [PUNCH; SLICE as usize];

/// A disk in its place.
pub struct Mounted {
    /// Its id in the map.
    pub id: DiskId,
    /// What is on it.
    pub media: SimDisk,
    /// Its attachment.
    pub attach: u64,
    /// What was found when it was last opened to look at, and after how many changes of its metadata.
    seen: RefCell<Option<(u64, Rc<Opened>)>>,
}

/// A node.
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its disks.
    pub disks: Vec<Mounted>,
    /// Numbers its processes over all nodes' lives.
    pub process_id: u64,
    /// The daemon, if it runs.
    pub process: Option<Process>,
    /// It does nothing before this time.
    pub paused_until: u64,
    /// How much faster its clock runs, in millionths.
    pub drift_ppm: i64,
}

fn geometry() -> &'static Geometry {
    static GEOMETRY: OnceLock<Geometry> = OnceLock::new();
    GEOMETRY.get_or_init(|| Geometry::with_log_blocks(DISK_BYTES, SLICE, 512, 8).expect("it fits"))
}

/// How a disk's slots are divided.
pub fn segments() -> SegmentSlots {
    let slots = geometry().slots;
    let half = slots / 2;
    SegmentSlots { primary: slots - half - 2, secondary: half, unmirrored: 2 }
}

/// Where a slot's byte lies on a disk.
pub fn position(slot: u32, offset: u32) -> u64 {
    geometry().slot_offset(SlotIndex(slot)) + u64::from(offset)
}

/// A disk as it comes out of formatting. Every third is not known to be zero, and full of garbage.
fn formatted(id: DiskId) -> SimDisk {
    // Formatting is the same every time, and costs more than many a schedule.
    static DISKS: [OnceLock<SimDisk>; DISKS_MAX] = [const { OnceLock::new() }; DISKS_MAX];
    let make = || {
        let geometry = geometry();
        let known_zero = id.0 % 3 != 2;
        let options = FormatOptions {
            cluster: ClusterId::default(),
            disk: id,
            node: NodeId(1),
            format: Default::default(),
            node_name: "n1".into(),
            disk_name: "d1".into(),
            geometry: geometry.clone(),
            segments: segments(),
            slot_order: SlotOrder::Address,
            zone_profile: ZoneProfile::default(),
            known_zero,
        };
        let (_, plan) = format(options).expect("it can be formatted");
        let data = position(0, 0)..position(geometry.slots - 1, SLICE);
        let mut disk = SimDisk::filled(DISK_BYTES, if known_zero { 0 } else { 0xe5 });
        disk.set_data(data);
        carry_out(&mut disk, plan);
        disk.flushed(disk.flush_mark());
        disk
    };
    DISKS[id.0 as usize - 1].get_or_init(make).clone()
}

fn carry_out(disk: &mut SimDisk, plan: Plan) {
    for step in plan {
        match &step {
            PlanStep::Write { offset, .. } => disk.write(*offset, step.bytes(), false),
            PlanStep::Flush => disk.flushed(disk.flush_mark()),
        }
    }
}

impl Mounted {
    /// Reads everything that the format knows of the disk.
    pub fn open(&self) -> Result<Opened, String> {
        let mut read = |offset: u64, into: &mut [u8]| match self.media.read_checked(offset, into) {
            true => Ok(()),
            false => Err(ReadFailed),
        };
        open(&mut read, DISK_BYTES).map_err(|error| error.to_string())
    }

    /// One of two copies of its superblock, or of a page of its tables, cannot be read any more, unless a crash
    /// damaged the other one: that would be two failures.
    pub fn spoil_metadata(&mut self, random: &mut Random) {
        let geometry = geometry();
        let copy = random.below(2) as usize;
        let page = random.below(geometry.pages().into()) as u32;
        let at = match random.below(3) {
            0 => geometry.superblocks[copy],
            1 => geometry.page_offset(PageKind::Assignments, page, copy),
            _ => geometry.page_offset(PageKind::Masks, page, copy),
        };
        let before = self.media.clone();
        self.media.spoil(at + random.below(PAGE as u64 / SECTOR as u64) * SECTOR as u64);
        if self.open().map_or(true, |opened| opened.report.is_loss()) {
            self.media = before;
        }
    }

    /// The same for somebody who only looks: nothing is read again that has not changed.
    pub fn look(&self) -> Option<Rc<Opened>> {
        let changes = self.media.metadata_changes();
        if let Some((seen, opened)) = &*self.seen.borrow()
            && *seen == changes
        {
            return Some(Rc::clone(opened));
        }
        let opened = Rc::new(self.open().ok()?);
        *self.seen.borrow_mut() = Some((changes, Rc::clone(&opened)));
        Some(opened)
    }
}

impl Node {
    /// A node with formatted disks, not running. Disks are numbered over all nodes.
    pub fn new(id: u16, disks: std::ops::Range<u32>) -> Self {
        let mounted = |disk: u32| Mounted {
            id: DiskId(disk),
            media: formatted(DiskId(disk)),
            attach: disk.into(),
            seen: RefCell::default(),
        };
        Self {
            id: NodeId(id),
            disks: disks.map(mounted).collect(),
            process_id: u64::from(id),
            process: None,
            paused_until: 0,
            drift_ppm: 0,
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

    /// What the map would say of one of its disks now.
    pub fn incarnation(&self, disk: usize) -> Incarnation {
        Incarnation { attach: AttachId(self.disks[disk].attach), process: ProcessId(self.process_id) }
    }

    /// Starts the daemon: opens the disks as they are.
    pub fn start(&mut self, now: u64) -> Result<(), String> {
        let (mut locals, mut used) = (Vec::new(), Vec::new());
        for (index, disk) in self.disks.iter_mut().enumerate().filter(|(_, disk)| !disk.media.is_dead()) {
            let opened = disk.open().map_err(|error| format!("{}: {error}", disk.id))?;
            if opened.report.is_loss() {
                return Err(format!("{}: the masks are lost: {:?}", disk.id, opened.report));
            }
            carry_out(&mut disk.media, opened.plan);
            if let Some(sector) = disk.media.unreadable_metadata() {
                return Err(format!("{}: sector {sector} is still unreadable after recovery", disk.id));
            }
            let slots = (0..opened.journal.slots()).map(SlotIndex);
            let held: Vec<_> = slots.filter(|slot| opened.journal.slot(*slot).assignment.is_some()).collect();
            locals.push(LocalDisk {
                id: disk.id,
                attach: AttachId(disk.attach),
                allocator: Allocator::new(&opened.superblock, held),
                journal: opened.journal,
            });
            used.push(index);
        }
        let me = Me { node: self.id, process: ProcessId(self.process_id) };
        let mut engine = Engine::new(me, SLICE, locals, now);
        engine.set_clear_every(CLEAR_EVERY);
        self.process = Some(Process::new(engine, used));
        Ok(())
    }

    /// The daemon dies; with `power` the machine does.
    pub fn stop(&mut self, power: bool, random: &mut Random) {
        let Some(process) = self.process.take() else { return };
        for started in process.ios() {
            if let DiskIo::Write { offset, content, durable } = &started.io
                && random.one_in(2)
            {
                let durable = *durable && random.one_in(2);
                let media = &mut self.disks[process.disks[started.disk]].media;
                if let Some(data) = data(&process, content).filter(|_| !media.is_dead()) {
                    media.write(*offset, data, durable);
                }
            }
        }
        if power {
            self.lose_caches(random);
        }
    }

    /// The machine starts: its disks are attached anew.
    pub fn reattach(&mut self, boot: u64) {
        for (disk, index) in self.disks.iter_mut().zip(0..) {
            disk.attach = (boot + 1_000) * 4 + index;
        }
    }

    /// The machine loses power.
    pub fn lose_caches(&mut self, random: &mut Random) {
        for disk in &mut self.disks {
            disk.media.lose_cache(random);
        }
    }

    /// A write reaches a disk's cache.
    pub fn store(&mut self, started: &Started, offset: u64, content: &Content, durable: bool) -> bool {
        let Some(process) = &self.process else { return false };
        let media = &mut self.disks[process.disks[started.disk]].media;
        data(process, content).map(|data| media.write(offset, data, durable)).is_some()
    }

    /// A read's data comes from a disk. `None`: its buffer was given back; `Some(false)`: a sector cannot be
    /// read.
    pub fn load(&mut self, started: &Started, offset: u64, buffer: BufferRange) -> Option<bool> {
        let process = self.process.as_mut()?;
        let media = &self.disks[process.disks[started.disk]].media;
        Some(media.read_checked(offset, process.bytes_mut(buffer)?))
    }

    /// One of the engine's disks.
    pub fn media(&mut self, disk: usize) -> Option<&mut SimDisk> {
        let index = *self.process.as_ref()?.disks.get(disk)?;
        Some(&mut self.disks[index].media)
    }
}

/// The bytes that a write stores; `None` if its buffer was given back.
fn data<'a>(process: &'a Process, content: &'a Content) -> Option<&'a [u8]> {
    match content {
        Content::Buffer(range) => process.bytes(*range),
        Content::Fill(0, length) => ZEROS.get(..*length),
        Content::Fill(_, length) => PUNCHED.get(..*length),
        Content::Metadata(block) => Some(&block.0),
    }
}
