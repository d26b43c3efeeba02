//! The engine: everything a node decides about its data, as pure code.
//!
//! The driver calls `handle_*` with the time and what happened, then takes [`Engine::poll_action`]
//! until it is empty and carries the actions out in that order; it calls [`Engine::handle_tick`]
//! by [`Engine::next_tick`]. No input may be given while actions are left.
//!
//! One write through the files: a request enters in `exporter` and is cut into parts; a part whose
//! slice this node is primary of becomes an operation (`op`) in `primary`, takes its range, is sent
//! to the secondaries and stored by `local`; otherwise it is forwarded to the primary and enters
//! *its* `primary` as a frame. At a secondary it enters through `secondary`, and may
//! be acknowledged before it is stored (`staging`). `session` keeps the lanes,
//! leases and what is in flight; `flush` flushes; `adopt` brings in a new map.
//!
//! Behind the requests: `behind` knows which regions of which copies may differ, `resync` chooses what to
//! compare next, `copy` makes a region equal, `join` makes a copy that lacks nothing a member, `clear`
//! forgets what is equal everywhere, `repair` replaces what this disk cannot read. `survey` answers broadcasts.
//! `quorum` gives up what cannot be served, where that is wanted.

pub mod action;
mod adopt;
mod behind;
mod clear;
mod copy;
mod exporter;
mod extents;
mod flush;
mod hold;
mod join;
mod local;
mod loss;
mod op;
mod pace;
mod primary;
mod quorum;
mod repair;
mod resync;
mod secondary;
pub mod session;
mod slots;
mod staging;
mod survey;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod view;
mod window;

pub use adopt::AdoptError;
pub use extents::Extent;
pub use staging::StagedWrite;

use crate::config::{NodePolicy, Tolerance};
use crate::control::SessionReport;
use crate::format::alloc::Allocator;
use crate::format::journal::{Journal, Ticket};
use crate::ids::{AttachId, DeviceId, DiskId, ExporterSession, MapVersion, NodeId, ProcessId, SlotIndex};
use crate::map::DistributionMap;
use action::{Action, DiskIndex, FlushKey, OpKey};
use exporter::{ExportFlush, ExportFlushKey, PartKey, Pending, Recalled, RequestKey, RequestPart};
use op::Op;
use session::Peer;
use slotmap::{SecondaryMap, SlotMap};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use view::{DeviceView, PeerIndex, Place};

/// Nanoseconds of a clock that goes on during suspend (`CLOCK_BOOTTIME`).
pub type Nanos = u64;

/// A log that had nothing to do for so long is emptied into the pages: opening the disk is quicker then.
const CHECKPOINT_IDLE: Nanos = 1_000_000_000;

/// Between two rounds of clearing dirty bits, unless set otherwise.
pub const CLEAR_EVERY: Nanos = 5_000_000_000;

/// A tick that comes so late tells more of this process than of others.
const STALL: Nanos = 500_000_000;

/// Between two ticks.
pub const TICK: Nanos = 50_000_000;

fn nanos(time: Duration) -> Nanos {
    time.as_nanos().min(Nanos::MAX.into()) as Nanos
}

/// One of the node's disks, opened.
pub struct LocalDisk {
    /// Its id.
    pub id: DiskId,
    /// Its attachment.
    pub attach: AttachId,
    /// Its slot table.
    pub journal: Journal,
    /// Its free slots.
    pub allocator: Allocator,
}

/// Who this node is.
#[derive(Clone, Copy, Debug)]
pub struct Me {
    /// Its id in the map.
    pub node: NodeId,
    /// Its process.
    pub process: ProcessId,
}

struct Disk {
    id: DiskId,
    attach: AttachId,
    journal: Journal,
    allocator: Allocator,
    flusher: flush::DiskFlusher,
    /// Operations that wait for a ticket, in the tickets' order.
    intents: VecDeque<(Ticket, OpKey)>,
    failed: bool,
    /// Since when its log has nothing to do.
    idle_since: Option<Nanos>,
}

impl Disk {
    fn new(disk: LocalDisk) -> Self {
        Self {
            id: disk.id,
            attach: disk.attach,
            journal: disk.journal,
            allocator: disk.allocator,
            flusher: flush::DiskFlusher::default(),
            intents: VecDeque::new(),
            failed: false,
            idle_since: None,
        }
    }
}

#[derive(Debug)]
struct Device {
    view: DeviceView,
    slices: Vec<Slice>,
    /// The newest exporter session that sent a request here under the present claim.
    exporter_session: ExporterSession,
    /// What was acknowledged to this node's frontends under the present claim.
    unflushed: loss::Unflushed,
    /// Copies that are about to become members.
    joining: Vec<join::Joining>,
    clearing: clear::Clearing,
}

impl Device {
    fn new(view: DeviceView) -> Self {
        Self {
            view,
            slices: Vec::new(),
            exporter_session: ExporterSession(0),
            unflushed: loss::Unflushed::default(),
            joining: Vec::new(),
            clearing: clear::Clearing::default(),
        }
    }

    /// How many slices are kept here, of those that the adopted map has. More are kept already while a map by which
    /// the device grows is being adopted; none where nothing of it concerns this node.
    fn adopted_slices(&self) -> u32 {
        self.view.slices.min(self.slices.len() as u32)
    }
}

/// What is kept for each slice of a device that concerns this node.
#[derive(Default, Debug)]
struct Slice {
    lock: crate::region::range_lock::RangeLock<OpKey>,
    /// Disk and slot of this node's copy.
    place: Option<(DiskIndex, u32)>,
    /// The last change of its masks that was submitted.
    intent: Ticket,
    /// As primary: what may differ on other copies; none of it where there is no entry.
    behind: Vec<behind::Behind>,
    /// Regions written in this round of clearing, and in the one before.
    recent: u64,
    before: u64,
    staged: staging::StagedSlice,
    /// Regions without content whose dirty bits this process set, in a slot that it assigned or for another
    /// copy's sake, and that nobody wrote since. Known to be zeros they would count as readable.
    untouched: u64,
}

/// Everything a node decides about its data.
pub struct Engine {
    me: NodeId,
    process: ProcessId,
    now: Nanos,
    slice_bytes: u32,
    disks: Vec<Disk>,
    peers: Vec<Peer>,
    /// Where each node is among them, by its id.
    by_node: Vec<Option<PeerIndex>>,
    devices: Vec<Device>,
    by_device: HashMap<DeviceId, usize>,
    /// Slots of copies that the map lists no more, which operations may still be using.
    leaving: Vec<(DiskIndex, SlotIndex)>,
    map: Option<Arc<DistributionMap>>,
    adopting: Option<adopt::Adoption>,
    next_map: Option<Arc<DistributionMap>>,
    /// Views are new, and what began under those before is not fitted to them yet.
    refitting: bool,
    refused_map: Option<AdoptError>,
    unreported: Option<MapVersion>,
    /// The map that last made this node primary of something.
    took_over: MapVersion,
    /// Nothing is served as primary before this time.
    serve_after: Nanos,
    exporter_session: ExporterSession,
    exporter_sequence: u64,
    requests: SlotMap<RequestKey, Pending>,
    parts: SlotMap<PartKey, RequestPart>,
    export_flushes: SlotMap<ExportFlushKey, ExportFlush>,
    ops: SlotMap<OpKey, Op>,
    flushes: SlotMap<FlushKey, flush::Flush>,
    /// Parts that have nowhere to go now.
    held: Vec<PartKey>,
    /// Writes whose old primary has to answer before they go to the new one.
    recalled: Vec<Recalled>,
    /// Operations that hold their range and wait for a lease or a wait's end.
    parked: Vec<OpKey>,
    /// Reads that hold nothing and wait until their regions are equal on all copies.
    unreconciled_reads: Vec<OpKey>,
    /// Operations that just got their range.
    ready: VecDeque<OpKey>,
    copies: SecondaryMap<OpKey, copy::Copy>,
    copy_buffers: Vec<action::BufferId>,
    resyncs: Vec<resync::Resync>,
    /// Those that ended and that nobody was told of; one at most for a device and peer.
    ended_resyncs: Vec<crate::control::ResyncReport>,
    /// Some resync may go on.
    resync_due: bool,
    surveys: survey::Surveys,
    staging: staging::Staging,
    pacer: pace::Pacer,
    tolerance: Tolerance,
    no_quorum_after: Nanos,
    /// When this process last ran again after it had not for a while: nothing waits since before that.
    woken: Nanos,
    clear_every: Nanos,
    next_clear: Nanos,
    actions: VecDeque<Action>,
    next_tick: Nanos,
}

impl Engine {
    /// An engine that serves nothing until it gets its first map.
    pub fn new(me: Me, slice_bytes: u32, disks: Vec<LocalDisk>, now: Nanos) -> Self {
        Self {
            me: me.node,
            process: me.process,
            now,
            slice_bytes,
            disks: disks.into_iter().map(Disk::new).collect(),
            peers: Vec::new(),
            devices: Vec::new(),
            by_node: Vec::new(),
            by_device: HashMap::new(),
            leaving: Vec::new(),
            map: None,
            adopting: None,
            next_map: None,
            refitting: false,
            refused_map: None,
            unreported: None,
            took_over: MapVersion(0),
            serve_after: 0,
            exporter_session: ExporterSession(0),
            exporter_sequence: 0,
            requests: SlotMap::with_key(),
            parts: SlotMap::with_key(),
            export_flushes: SlotMap::with_key(),
            ops: SlotMap::with_key(),
            flushes: SlotMap::with_key(),
            held: Vec::new(),
            recalled: Vec::new(),
            parked: Vec::new(),
            unreconciled_reads: Vec::new(),
            ready: VecDeque::new(),
            copies: SecondaryMap::new(),
            copy_buffers: Vec::new(),
            resyncs: Vec::new(),
            ended_resyncs: Vec::new(),
            resync_due: false,
            surveys: survey::Surveys::default(),
            staging: staging::Staging::default(),
            pacer: pace::Pacer::default(),
            tolerance: Tolerance::default(),
            no_quorum_after: nanos(NodePolicy::default().no_quorum_after),
            woken: 0,
            clear_every: CLEAR_EVERY,
            next_clear: now + CLEAR_EVERY,
            actions: VecDeque::new(),
            next_tick: now,
        }
    }

    /// The manager's number for this process as an exporter; before any request. The first is kept: whoever comes
    /// after this process gets a larger one than that as well, and what is under way under it must not be
    /// taken for another process's.
    pub fn set_exporter_session(&mut self, session: ExporterSession) {
        if self.exporter_session == ExporterSession(0) {
            self.exporter_session = session;
        }
    }

    /// A further disk, before any map that has copies on it. A map that is being adopted has none, so it need not wait for
    /// anything on this disk.
    pub fn add_disk(&mut self, now: Nanos, disk: LocalDisk) {
        self.now = now;
        self.disks.push(Disk::new(disk));
        for peer in 0..self.peers.len() {
            self.tell_disks(peer);
        }
        self.settle();
    }

    /// Whether nothing of a disk that has left the map is under way any more: then nothing is ever asked of it again.
    pub fn release_disk(&mut self, id: DiskId) -> bool {
        let is_listed = |map: &Arc<DistributionMap>| map.disk(id).is_some();
        let adopting = self.adopting.as_ref().map(|adoption| adoption.map());
        let Some(index) = self.disks.iter().position(|disk| disk.id == id) else { return true };
        let in_use = self.map.as_ref().is_none_or(is_listed)
            || adopting.into_iter().chain(&self.next_map).any(is_listed)
            || self.ops.values().any(|op| op.disk == index)
            || self.leaving.iter().any(|(disk, _)| *disk == index)
            // What a map that was refused found there.
            || self.devices.iter().flat_map(|device| &device.slices).any(|slice| {
                slice.place.is_some_and(|(disk, _)| disk == index)
            });
        if !in_use {
            // As good as one that has failed, of which the manager need not hear.
            self.disks[index].failed = true;
        }
        !in_use
    }

    /// Its disks, in the order of their indices.
    pub fn disk_ids(&self) -> impl Iterator<Item = DiskId> {
        self.disks.iter().map(|disk| disk.id)
    }

    /// The process is about to end: nothing is held in memory for other nodes any more.
    pub fn handle_stop(&mut self, now: Nanos) {
        self.now = now;
        self.staging.stop();
        self.store_all();
        self.settle();
    }

    /// How to treat other nodes' copies from now on.
    pub fn set_policy(&mut self, policy: NodePolicy) {
        self.pacer.set(policy.pace);
        self.tolerance = policy.tolerance;
        self.no_quorum_after = nanos(policy.no_quorum_after);
        self.resync_due = true;
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// How much is under way: requests of this node's frontends, or operations on its copies.
    pub fn under_way(&self) -> usize {
        self.requests.len().max(self.ops.len())
    }

    /// Why the newest map could not be adopted, if that came out after it was accepted.
    pub fn take_refused_map(&mut self) -> Option<AdoptError> {
        self.refused_map.take()
    }

    /// When [`Engine::handle_tick`] wants to be called.
    pub fn next_tick(&self) -> Nanos {
        self.pacer.next_wake().map_or(self.next_tick, |wake| wake.min(self.next_tick))
    }

    /// Time passed: heartbeats, silence, leases, and what has to be tried again.
    pub fn handle_tick(&mut self, now: Nanos) {
        self.now = now;
        if self.pacer.take_wake(now) {
            self.resync_due = true;
            self.settle();
        }
        if now < self.next_tick {
            return;
        }
        let stalled = now > self.next_tick + STALL;
        self.next_tick = now + TICK;
        self.tick_sessions(stalled);
        self.tick_staging();
        if stalled {
            self.woken = now;
        }
        self.tick_quorum();
        self.free_left_slots();
        self.place_adopted();
        self.checkpoint_idle_disks();
        self.tick_recalled();
        self.tick_clearing();
        self.tick_resyncs();
        self.surveys.due = true;
        self.route_held();
        self.resume_export_flushes();
        self.retry_parked();
        self.settle();
    }

    /// The regions of this node's copy of a slice that hold something; the rest reads as zeros.
    fn content(&self, device: usize, slice: u32) -> u64 {
        let Some(entry) = self.devices[device].slices.get(slice as usize) else { return 0 };
        let readable =
            |(disk, slot): (DiskIndex, u32)| self.disks[disk].journal.masks(SlotIndex(slot)).readable();
        entry.place.map_or(0, readable) & !entry.untouched
    }

    fn peer_index(&self, node: NodeId) -> Option<PeerIndex> {
        self.by_node.get(usize::from(node.0)).copied().flatten()
    }

    /// This node's sessions, for `status`.
    pub fn session_reports(&self) -> Vec<SessionReport> {
        self.peers
            .iter()
            .enumerate()
            .map(|(index, peer)| SessionReport {
                peer: peer.node,
                open: peer.is_open(),
                last_error: peer
                    .lost
                    .as_ref()
                    .map(|lost| lost.cause.clone())
                    .or_else(|| peer.last_error().map(str::to_owned)),
                slow_ms: peer.slow_for(self.now, self.tolerance.slow_after).map(|slow| slow / 1_000_000),
                held_ms: self.is_held_out(index).map(|hold| (hold.left(self.now) / 1_000_000, hold.losses)),
            })
            .collect()
    }

    /// What requests wait for, one line each, for `status`.
    pub fn waiting(&self) -> Vec<String> {
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        let Some(map) = self.map.as_deref() else { return Vec::new() };
        let name = |device: usize| {
            let id = self.devices[device].view.id;
            map.device(id).map_or_else(|| id.to_string(), |device| device.name.clone())
        };
        for (device, slice, primary) in self.held_parts() {
            let device = name(device);
            let line = match primary {
                Place::Here => {
                    format!("{device}: waits for the manager's word on this node's copy of slice {slice}")
                }
                Place::Peer(peer) => {
                    format!("{device}: waits for {}, its primary", map.node_name(self.peers[peer].node))
                }
            };
            *lines.entry(line).or_default() += 1;
        }
        for op in self.ops.values() {
            for leg in op.legs.iter().filter(|leg| leg.state == op::LegState::Unsent) {
                let peer = &self.peers[leg.peer];
                if peer.is_open() && peer.lost.is_none() && peer.adopted().0 >= op.epoch.0 {
                    // A full window empties by itself.
                    continue;
                }
                let node = map.node_name(peer.node);
                let line = match &peer.lost {
                    Some(lost) => format!(
                        "{}: waits for the manager to record {node} stale ({})",
                        name(op.device),
                        lost.cause
                    ),
                    None => format!("{}: waits for its secondary on {node}", name(op.device)),
                };
                *lines.entry(line).or_default() += 1;
            }
        }
        for key in &self.parked {
            let Some(op) = self.ops.get(*key) else { continue };
            *lines.entry(format!("{}: waits for read leases", name(op.device))).or_default() += 1;
        }
        for resync in &self.resyncs {
            let regions = self.unreadable_regions(resync);
            if regions > 0 {
                let node = map.node_name(self.peers[resync.peer].node);
                lines.insert(
                    format!(
                        "{}: {regions} regions cannot be copied to {node}: they cannot be read here, and no other \
                         copy in sync has them; write them anew, or restore them",
                        name(resync.device)
                    ),
                    0,
                );
            }
        }
        for key in &self.unreconciled_reads {
            let Some(op) = self.ops.get(*key) else { continue };
            *lines
                .entry(format!("{}: waits until its copies were compared", name(op.device)))
                .or_default() += 1;
        }
        let text = |(line, count)| match count {
            0 => line,
            count => format!("{line} ({count} requests)"),
        };
        lines.into_iter().map(text).collect()
    }
}
