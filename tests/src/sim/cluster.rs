//! The world: nodes, network, manager and users on one queue of events.

use crate::sim::checker::Checker;
use crate::sim::disk::{Faults, SECTOR};
use crate::sim::manager::{Heartbeat, Manager};
use crate::sim::network::{Frame, Network};
use crate::sim::node::{DiskIo, Node, Process, SLICE};
use crate::sim::scheduler::{MS, Nanos, Queue, Random};
use crate::sim::workload::{Asked, SLICES, Wish, fill, stamp, wish};
use mirror_net::engine::action::{Action, Body, Io, Report, Request, RequestKind, RequestToken};
use mirror_net::format::MetadataIo;
use mirror_net::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, LossGeneration, MapVersion, NodeId, ProcessId, SliceEpoch,
    SliceIndex,
};
use mirror_net::map::{
    Claim, Device, Disk, DistributionMap, MAP_FORMAT, Node as MapNode, Replica, ReplicaState, SegmentSlots,
    Span,
};
use mirror_net::wire::header::{CrcSeed, HEADER_BYTES, Header, Kind, Status, TRAILER_BYTES, Trailer};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Between two words of a node to the manager.
const HEARTBEAT: Nanos = 100 * MS;

/// A time, for people.
pub fn clock(now: Nanos) -> String {
    format!("{}.{:06} s", now / 1_000_000_000, now / 1_000 % 1_000_000)
}

/// What happens. Those of a node name its process: they are void if it is another one by then.
#[derive(Debug)]
enum Event {
    Tick { node: u16, process: u64 },
    Io { node: u16, process: u64, number: u64 },
    Frame { from: u16, to: u16, process: u64, session: u64, frame: Frame },
    LaneUp { node: u16, process: u64, peer: u16, session: u64, of: u64 },
    LaneDown { node: u16, process: u64, peer: u16, session: u64 },
    Map { node: u16, process: u64, map: Arc<DistributionMap> },
    Heartbeat(Heartbeat),
    AskStale { node: u16, incarnation: mirror_net::ids::Incarnation, peer: NodeId },
    Housekeeping,
    Ask { device: usize },
    Fault(Fault),
}

/// What goes wrong, or is done by an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Fault {
    Kill { node: u16 },
    PowerCut { node: u16 },
    Start { node: u16 },
    Pause { node: u16, ms: u64 },
    CutLane { a: u16, b: u16 },
    Silence { from: u16, to: u16, on: bool },
    NoManager { node: u16, on: bool },
    DiskWrites { node: u16 },
    DiskFlush { node: u16 },
    DiskMetadata { node: u16 },
    HandOver { device: usize },
    MoveClaim { device: usize, node: u16 },
}

/// How large and how busy.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes.
    pub nodes: u16,
    /// Copies of every device.
    pub copies: u16,
    /// Devices.
    pub devices: usize,
    /// Requests at a time, of each device's user.
    pub depth: usize,
    /// Whether users discard.
    pub discards: bool,
}

/// The world.
pub struct Cluster {
    /// Virtual time.
    pub now: Nanos,
    /// The only source of chance.
    pub random: Random,
    /// What is wrong.
    pub checker: Checker,
    /// The manager.
    pub manager: Manager,
    /// The network.
    pub network: Network,
    /// Requests that completed.
    pub completed: u64,
    /// A hash over everything that happened.
    pub hash: u64,
    /// Print the story.
    pub trace: bool,
    /// Whether users go on asking.
    pub busy: bool,
    /// No slower I/O, no waits between requests.
    nodes: Vec<Node>,
    queue: Queue<Event>,
    cut_off: Vec<bool>,
    asked: BTreeMap<u64, Asked>,
    /// Requests of exporters that are gone, by device.
    orphans: Vec<Vec<usize>>,
    exporting: Vec<Option<(u16, u64)>>,
    /// Exporters before, by device: they may not know it yet, and their users go on reading.
    former: Vec<(usize, (u16, u64))>,
    shape: Shape,
    next_token: u64,
    next_process: u64,
    next_stamp: u64,
    seed: CrcSeed,
    /// Results by token, for scenarios.
    pub results: BTreeMap<u64, Result<Vec<u64>, String>>,
    /// A disk lost acknowledged data by itself: a read may return anything.
    pub tainted: bool,
}

fn first_map(shape: Shape, nodes: &[Node]) -> DistributionMap {
    let replica = |node: usize| Replica {
        disk: DiskId(u32::from(nodes[node].id.0)),
        state: ReplicaState::InSync,
        incarnation: nodes[node].incarnation(),
    };
    let count = nodes.len();
    DistributionMap {
        format: MAP_FORMAT,
        cluster: ClusterId::default(),
        cluster_name: "sim".into(),
        version: MapVersion(1),
        slice_bytes: SLICE,
        nodes: nodes
            .iter()
            .map(|node| MapNode {
                id: node.id,
                name: format!("n{}", node.id.0),
                address: String::new(),
                power: None,
                switch: None,
            })
            .collect(),
        disks: nodes
            .iter()
            .map(|node| Disk {
                id: DiskId(u32::from(node.id.0)),
                node: node.id,
                name: "d1".into(),
                slots: SegmentSlots { primary: 5, secondary: 5, unmirrored: 0 },
                block_bytes: 512,
                failed: None,
            })
            .collect(),
        devices: (0..shape.devices)
            .map(|device| Device {
                id: DeviceId(device as u32 + 1),
                name: format!("dev{}", device + 1),
                slices: SLICES,
                block_bytes: 512,
                copies: shape.copies as u8,
                claim: Claim {
                    // With three nodes and two copies the last device's exporter holds no copy.
                    node: nodes[if device == 1 { count - 1 } else { device % count }].id,
                    generation: ClaimGeneration(1),
                    since: MapVersion(1),
                },
                spans: vec![Span {
                    first: SliceIndex(0),
                    count: SLICES,
                    epoch: SliceEpoch(1),
                    loss: LossGeneration(0),
                    replicas: (0..usize::from(shape.copies))
                        .map(|copy| replica((device * (count - 1) + copy) % count))
                        .collect(),
                }],
            })
            .collect(),
    }
}

impl Cluster {
    /// A cluster that has just been created, all nodes running.
    pub fn new(seed: u64, shape: Shape, trace: bool) -> Self {
        let nodes: Vec<Node> = (1..=shape.nodes).map(Node::new).collect();
        let map = first_map(shape, &nodes);
        map.validate().expect("the first map is valid");
        let mut cluster = Self {
            now: 0,
            random: Random::new(seed),
            checker: Checker::default(),
            manager: Manager::new(map),
            network: Network::default(),
            completed: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            trace,
            busy: true,
            cut_off: vec![false; nodes.len()],
            next_process: nodes.len() as u64,
            nodes,
            queue: Queue::default(),
            asked: BTreeMap::new(),
            orphans: vec![Vec::new(); shape.devices],
            exporting: vec![None; shape.devices],
            former: Vec::new(),
            shape,
            next_token: 0,
            next_stamp: 0,
            seed: CrcSeed::new(&ClusterId::default()),
            results: BTreeMap::new(),
            tainted: false,
        };
        for node in 1..=shape.nodes {
            cluster.launch(node);
        }
        cluster.queue.push(MS, Event::Housekeeping);
        for device in 0..shape.devices {
            for _ in 0..shape.depth {
                cluster.queue.push(1_000 * MS, Event::Ask { device });
            }
        }
        cluster
    }

    /// Says something, if a story is wanted.
    fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12}  {}", clock(self.now), text());
        }
    }

    fn note(&mut self, what: u64) {
        for word in [self.now, what] {
            self.hash = (self.hash ^ word).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// That node.
    pub fn node(&self, id: u16) -> &Node {
        &self.nodes[usize::from(id) - 1]
    }

    fn node_mut(&mut self, id: u16) -> &mut Node {
        &mut self.nodes[usize::from(id) - 1]
    }

    fn process(&mut self, id: u16) -> Option<&mut Process> {
        self.node_mut(id).process.as_mut()
    }

    /// Plans a fault.
    pub fn plan(&mut self, at: Nanos, fault: Fault) {
        self.queue.push(at, Event::Fault(fault));
    }

    /// Goes on until that time.
    pub fn run_until(&mut self, end: Nanos) {
        while self.now < end && self.checker.violations.is_empty() {
            let Some((at, event)) = self.queue.pop() else { return };
            self.now = at.max(self.now);
            self.handle(event);
        }
    }

    fn alive(&self, node: u16, process: u64) -> bool {
        let node = self.node(node);
        node.process.is_some() && node.process_id == process
    }

    fn handle(&mut self, event: Event) {
        let owner = match &event {
            Event::Tick { node, process }
            | Event::Io { node, process, .. }
            | Event::LaneUp { node, process, .. }
            | Event::LaneDown { node, process, .. }
            | Event::Map { node, process, .. } => Some((*node, *process)),
            Event::Frame { to, process, .. } => Some((*to, *process)),
            _ => None,
        };
        if let Some((node, process)) = owner {
            if !self.alive(node, process) {
                return;
            }
            let paused = self.node(node).paused_until;
            if paused > self.now {
                self.queue.push(paused, event);
                return;
            }
        }
        let now = self.now;
        match event {
            Event::Tick { node, process } => {
                let Some(running) = self.process(node) else { return };
                running.engine.handle_tick(now);
                let next = running.engine.next_tick().max(now + MS);
                self.queue.push(next, Event::Tick { node, process });
                self.drain(node);
            }
            Event::Io { node, number, .. } => self.io_done(node, number),
            Event::Frame { from, to, session, frame, process } => {
                if self.network.is_silent(from, to) {
                    let again = Event::Frame { from, to, session, frame, process };
                    // Kept in order: they all wait for the same moments.
                    self.queue.push(now / (10 * MS) * (10 * MS) + 10 * MS, again);
                    return;
                }
                if self.network.session(from, to) == Some(session) {
                    self.deliver(from, to, session, frame);
                }
            }
            Event::LaneUp { node, peer, session, of, .. } => {
                self.say(|| format!("n{node}: lane {session} to n{peer}"));
                let Some(running) = self.process(node) else { return };
                running.engine.handle_lane_up(now, NodeId(peer), session, ProcessId(of));
                self.drain(node);
            }
            Event::LaneDown { node, peer, session, process } => {
                if self.network.is_silent(peer, node) {
                    self.queue.push(now + 10 * MS, Event::LaneDown { node, peer, session, process });
                    return;
                }
                let Some(running) = self.process(node) else { return };
                running.engine.handle_lane_down(now, NodeId(peer), session, "reset");
                self.drain(node);
            }
            Event::Map { node, map, .. } => {
                self.say(|| format!("n{node}: gets map {}", map.version));
                let Some(running) = self.process(node) else { return };
                if let Err(error) = running.engine.handle_map(now, map) {
                    self.checker.violations.push(format!("n{node} refuses a map: {error}"));
                }
                self.drain(node);
            }
            Event::Heartbeat(beat) => {
                let node = beat.node.0;
                let (adopted, process) = (beat.adopted, beat.incarnation.process.0);
                self.manager.heard(now, beat);
                if adopted < self.manager.map.version
                    && self.alive(node, process)
                    && !self.cut_off[usize::from(node) - 1]
                {
                    let map = Arc::clone(&self.manager.map);
                    let at = now + self.random.range(100_000, 3 * MS);
                    self.queue.push(at, Event::Map { node, process, map });
                }
            }
            Event::AskStale { node, incarnation, peer } => {
                let before = Arc::clone(&self.manager.map);
                if self.manager.ask_stale(NodeId(node), incarnation, peer) {
                    self.publish(&before);
                }
            }
            Event::Housekeeping => self.housekeeping(),
            Event::Ask { device } => self.ask(device),
            Event::Fault(fault) => self.fault(fault),
        }
    }

    fn launch(&mut self, node: u16) {
        let now = self.now;
        let process = self.node(node).process_id;
        if let Err(error) = self.node_mut(node).start(now) {
            self.checker.violations.push(error);
            return;
        }
        let session = self.manager.exporter_session();
        let adopted_before = Arc::clone(&self.manager.map);
        if let Some(running) = self.process(node) {
            running.engine.set_exporter_session(session);
        }
        let _ = adopted_before;
        self.queue.push(now, Event::Tick { node, process });
    }

    fn housekeeping(&mut self) {
        let now = self.now;
        let before = Arc::clone(&self.manager.map);
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            let Some(process) = &node.process else { continue };
            if self.cut_off[index] || node.paused_until > now {
                continue;
            }
            let beat = Heartbeat {
                node: node.id,
                incarnation: node.incarnation(),
                adopted: process.adopted,
                disk_failed: process.disk_failed,
            };
            let at = now + self.random.range(100_000, 5 * MS);
            self.queue.push(at, Event::Heartbeat(beat));
        }
        if self.manager.tick(now) {
            self.publish(&before);
        }
        for a in 1..=self.nodes.len() as u16 {
            for b in a + 1..=self.nodes.len() as u16 {
                let up = self.node(a).process.is_some() && self.node(b).process.is_some();
                if !up {
                    continue;
                }
                let Some(session) = self.network.connect(a, b) else { continue };
                for (node, peer) in [(a, b), (b, a)] {
                    let at = self.network.arrival(now, peer, node, session, &mut self.random).unwrap_or(now);
                    let (process, of) = (self.node(node).process_id, self.node(peer).process_id);
                    self.queue.push(at, Event::LaneUp { node, process, peer, session, of });
                }
            }
        }
        for device in 0..self.shape.devices {
            self.export(device);
        }
        self.queue.push(now + HEARTBEAT, Event::Housekeeping);
    }

    /// The manager's map changed.
    fn publish(&mut self, before: &DistributionMap) {
        let map = Arc::clone(&self.manager.map);
        for (device, (old, new)) in before.devices.iter().zip(&map.devices).enumerate() {
            for span in &new.spans {
                let was = old.span(span.first).map(|old| old.loss);
                if was != Some(span.loss) {
                    let sectors = (SLICE as usize) / SECTOR;
                    self.checker.lose(device, span.first.0 as usize * sectors, span.count as usize * sectors);
                    self.say(|| format!("manager: {} may have lost unflushed writes", new.name));
                }
            }
            if self.trace && old != new {
                let list: Vec<String> = new
                    .spans
                    .iter()
                    .map(|span| {
                        let copies = span.replicas.iter().map(|r| {
                            let state = match r.state {
                                ReplicaState::InSync => "",
                                ReplicaState::Syncing => "+",
                                ReplicaState::Stale => "-",
                            };
                            format!("{state}n{}", r.disk.0)
                        });
                        format!(
                            "[{}] e{} loss {}",
                            copies.collect::<Vec<_>>().join(" "),
                            span.epoch.0,
                            span.loss.0
                        )
                    })
                    .collect();
                self.say(|| {
                    format!(
                        "manager: {} {}: {} claim n{}#{}",
                        map.version,
                        new.name,
                        list.join(" "),
                        new.claim.node.0,
                        new.claim.generation.0
                    )
                });
            }
        }
        for index in 0..self.nodes.len() {
            if self.cut_off[index] || self.nodes[index].process.is_none() {
                continue;
            }
            let (node, process) = (index as u16 + 1, self.nodes[index].process_id);
            let at = self.now + self.random.range(100_000, 20 * MS);
            self.queue.push(at, Event::Map { node, process, map: Arc::clone(&map) });
        }
        for device in 0..self.shape.devices {
            self.export(device);
        }
    }

    /// Users follow the claim, when the manager lets its holder start.
    fn export(&mut self, device: usize) {
        let Some((node, process)) = self.manager.may_export(device) else { return };
        let exporter = (node.0, process);
        if self.exporting[device] == Some(exporter) || !self.alive(node.0, process) {
            return;
        }
        self.say(|| format!("n{}: exports dev{}", node.0, device + 1));
        let now = self.now;
        if let Some(old) = self.exporting[device].replace(exporter) {
            self.former.push((device, old));
            // Whatever the one before left behind has happened by now, or never will.
            let left: Vec<u64> = self
                .asked
                .iter()
                .filter(|(_, asked)| asked.device == device && asked.exporter == old)
                .map(|(token, _)| *token)
                .collect();
            for token in left {
                if let Some(asked) = self.asked.get_mut(&token) {
                    asked.replaced = true;
                    self.orphans[device].extend(&asked.writes);
                }
                if !self.alive(old.0, old.1) {
                    self.asked.remove(&token);
                }
                self.queue.push(now + MS, Event::Ask { device });
            }
        }
        for write in std::mem::take(&mut self.orphans[device]) {
            self.checker.end(now, write);
        }
        self.checker.exporter_changed(device);
    }

    fn ask(&mut self, device: usize) {
        if !self.busy {
            return;
        }
        let wish = wish(&mut self.random, self.shape.discards);
        if wish.kind == RequestKind::Read && self.random.one_in(2) {
            let former = self.former.iter().rev().find(|(of, old)| *of == device && self.alive(old.0, old.1));
            if let Some((_, old)) = former.copied() {
                self.submit_to(device, old, wish);
                return;
            }
        }
        if self.submit(device, wish).is_none() {
            self.queue.push(self.now + 50 * MS, Event::Ask { device });
        }
    }

    /// Gives a request to the device's exporter; its token, or `None` if nobody exports.
    pub fn submit(&mut self, device: usize, wish: Wish) -> Option<u64> {
        let exporter = self.exporting[device].filter(|(node, process)| {
            self.alive(*node, *process) && self.node(*node).paused_until <= self.now
        })?;
        self.submit_to(device, exporter, wish)
    }

    fn submit_to(&mut self, device: usize, (node, process): (u16, u64), wish: Wish) -> Option<u64> {
        let now = self.now;
        self.next_token += 1;
        let token = self.next_token;
        let (first, count) = ((wish.offset / SECTOR as u64) as usize, wish.length as usize / SECTOR);
        let mut writes = Vec::new();
        let data = match wish.kind {
            RequestKind::Read => Some(vec![0xee; wish.length as usize]),
            RequestKind::Write { .. } => {
                self.next_stamp += 1;
                writes.push(self.checker.begin_write(now, device, first, count, self.next_stamp));
                Some(fill(self.next_stamp, wish.length))
            }
            RequestKind::WriteZeroes { .. } => {
                writes.push(self.checker.begin_write(now, device, first, count, 0));
                None
            }
            RequestKind::Discard => {
                // Whole regions may become zeros.
                let region = SLICE as usize / 64 / SECTOR;
                let start = first.div_ceil(region) * region;
                let end = (first + count) / region * region;
                if start < end {
                    writes.push(self.checker.begin_write(now, device, start, end - start, 0));
                }
                None
            }
            RequestKind::Flush => None,
        };
        self.say(|| {
            format!("n{node}: request {token} dev{} {wish:?} stamp {:x}", device + 1, self.next_stamp)
        });
        let running = self.process(node)?;
        let buffer = data.map(|data| running.allocate(data));
        let length = wish.length;
        let request = Request {
            token: RequestToken(token),
            device: DeviceId(device as u32 + 1),
            kind: wish.kind,
            offset: wish.offset,
            length,
            buffer: buffer.map(|buffer| mirror_net::engine::action::BufferRange {
                buffer,
                offset: 0,
                length,
            }),
        };
        running.engine.handle_request(now, &request);
        self.asked.insert(
            token,
            Asked {
                device,
                kind: wish.kind,
                offset: wish.offset,
                length,
                buffer: buffer.map(|buffer| buffer.0),
                began: now,
                writes,
                exporter: (node, process),
                replaced: false,
            },
        );
        self.drain(node);
        Some(token)
    }

    /// Requests without an answer, at exporters that live.
    pub fn unanswered(&self) -> Vec<String> {
        self.asked
            .iter()
            .filter(|(_, asked)| self.alive(asked.exporter.0, asked.exporter.1))
            .map(|(token, asked)| format!("request {token}: {asked:?}"))
            .collect()
    }

    /// What every node's requests wait for.
    pub fn waiting(&self) -> Vec<String> {
        let lines = self.nodes.iter().filter_map(|node| {
            let process = node.process.as_ref()?;
            Some(format!(
                "n{}: {:?} {:?}",
                node.id.0,
                process.engine.waiting(),
                process.engine.session_reports()
            ))
        });
        lines.collect()
    }

    // ---- what an engine wants ----

    fn drain(&mut self, node: u16) {
        loop {
            let Some(running) = self.process(node) else { return };
            let Some(action) = running.engine.poll_action() else { return };
            self.carry_out(node, action);
        }
    }

    fn begin_io(&mut self, node: u16, id: Io, io: DiskIo) {
        let now = self.now;
        let latency = if self.random.one_in(40) {
            self.random.range(MS, 30 * MS)
        } else {
            self.random.range(20_000, 300_000)
        };
        let process = self.node(node).process_id;
        let Some(running) = self.process(node) else { return };
        let number = running.begin(id, io);
        self.queue.push(now + latency, Event::Io { node, process, number });
    }

    fn carry_out(&mut self, node: u16, action: Action) {
        let Some(process) = self.process(node) else { return };
        match action {
            Action::Read { io, slot, offset, buffer, .. } => {
                let offset = self.node(node).offset(slot, offset);
                self.begin_io(node, io, DiskIo::Read { offset, buffer });
            }
            Action::Write { io, slot, offset, buffer, fua, .. } => {
                let Some(data) = process.bytes(buffer).map(<[u8]>::to_vec) else {
                    self.checker
                        .violations
                        .push(format!("n{node} writes from {buffer:?}, which it gave back"));
                    return;
                };
                let offset = self.node(node).offset(slot, offset);
                let io_work =
                    DiskIo::Write { offset, data, buffer: Some(buffer), durable: fua, metadata: false };
                self.begin_io(node, io, io_work);
            }
            Action::Zero { io, slot, offset, length, fua, .. } => {
                let offset = self.node(node).offset(slot, offset);
                let data = vec![0; length as usize];
                self.begin_io(
                    node,
                    io,
                    DiskIo::Write { offset, data, buffer: None, durable: fua, metadata: false },
                );
            }
            Action::Punch { io, slot, offset, length, .. } => {
                let offset = self.node(node).offset(slot, offset);
                // Punched space may hold anything.
                let data = vec![0x77; length as usize];
                self.begin_io(
                    node,
                    io,
                    DiskIo::Write { offset, data, buffer: None, durable: false, metadata: false },
                );
            }
            Action::Flush { io, .. } => {
                let mark = self.node(node).disk.flush_mark();
                self.begin_io(node, io, DiskIo::Flush(mark));
            }
            Action::Metadata { io, work, .. } => {
                let work = match work {
                    MetadataIo::Write { offset, block, durable, .. } => DiskIo::Write {
                        offset,
                        data: block.0.to_vec(),
                        buffer: None,
                        durable,
                        metadata: true,
                    },
                    MetadataIo::Flush { .. } => DiskIo::Flush(self.node(node).disk.flush_mark()),
                };
                self.begin_io(node, io, work);
            }
            Action::Send { peer, session, header, trailer, body } => {
                self.send(node, peer.0, session, header, trailer, body);
            }
            Action::CloseLane { peer, session, reason } => {
                self.say(|| format!("n{node}: closes lane {session} to n{}: {reason}", peer.0));
                self.cut(node, peer.0, session, Some(node));
            }
            Action::FillZero { buffer } => match process.bytes_mut(buffer) {
                Some(bytes) => bytes.fill(0),
                None => self.checker.violations.push(format!("n{node} fills {buffer:?}, which it gave back")),
            },
            Action::Copy { from, to } => {
                let data = process.bytes(from).map(<[u8]>::to_vec);
                match (data, process.bytes_mut(to)) {
                    (Some(data), Some(bytes)) => bytes.copy_from_slice(&data),
                    _ => self.checker.violations.push(format!("n{node} copies {from:?} to {to:?}")),
                }
            }
            Action::Release { buffer } => {
                if let Some(wrong) = process.free(buffer) {
                    self.checker.violations.push(format!("n{node}: {wrong}"));
                }
            }
            Action::Complete { token, result } => {
                self.complete(node, token.0, result.map_err(|e| format!("{e:?}")))
            }
            Action::Report(report) => {
                match &report {
                    Report::Adopted { version } => process.adopted = *version,
                    Report::DiskFailed { .. } => process.disk_failed = true,
                    Report::AskStale { .. } => {}
                }
                self.say(|| format!("n{node}: {report:?}"));
                match report {
                    Report::Adopted { .. } | Report::DiskFailed { .. } => {}
                    Report::AskStale { peer, .. } => {
                        let incarnation = self.node(node).incarnation();
                        if !self.cut_off[usize::from(node) - 1] {
                            let at = self.now + self.random.range(100_000, 10 * MS);
                            self.queue.push(at, Event::AskStale { node, incarnation, peer });
                        }
                    }
                }
            }
        }
    }

    fn send(
        &mut self,
        node: u16,
        peer: u16,
        session: u64,
        mut header: Header,
        trailer: Option<Trailer>,
        body: Body,
    ) {
        let Some(process) = self.process(node) else { return };
        let mut borrowed = None;
        let mut content = Vec::new();
        match &body {
            Body::None => {}
            Body::Bytes(bytes) => content.extend(bytes),
            Body::Buffer(range) | Body::Release(range) => match process.bytes(*range) {
                Some(bytes) => {
                    content.extend(bytes);
                    if matches!(body, Body::Buffer(_)) {
                        borrowed = Some((range.buffer.0, range.offset, range.length));
                    }
                }
                None => self.checker.violations.push(format!("n{node} sends {range:?}, which it gave back")),
            },
        }
        if let Body::Release(range) = body
            && let Some(wrong) = self.process(node).and_then(|process| process.free(range.buffer))
        {
            self.checker.violations.push(format!("n{node}: {wrong}"));
        }
        if let Some(trailer) = trailer {
            content.extend(trailer.encode());
        }
        match header.kind {
            Kind::Write | Kind::Zero | Kind::Discard => {
                self.checker.acts_as_primary(header.device, header.slice, header.slice_epoch.0, node);
            }
            Kind::Reply
                if header.flags == Status::Done as u8
                    && header.slice_epoch.0 > 0
                    && header.body_bytes > 0 =>
            {
                self.checker.acts_as_primary(header.device, header.slice, header.slice_epoch.0, node);
            }
            _ => {}
        }
        header.body_bytes = content.len() as u32;
        header.body_crc = self.seed.body([&content, &[]]);
        let mut bytes = header.encode(self.seed).to_vec();
        bytes.extend(content);
        let Some(at) = self.network.arrival(self.now, node, peer, session, &mut self.random) else { return };
        let process = self.node(peer).process_id;
        let frame = Frame { bytes, borrowed };
        self.queue.push(at, Event::Frame { from: node, to: peer, process, session, frame });
    }

    fn deliver(&mut self, from: u16, to: u16, session: u64, frame: Frame) {
        let now = self.now;
        if let (Some((buffer, offset, length)), Some(sender)) = (frame.borrowed, &self.node(from).process) {
            let range = mirror_net::engine::action::BufferRange {
                buffer: mirror_net::engine::action::BufferId(buffer),
                offset,
                length,
            };
            let sent = &frame.bytes[HEADER_BYTES..HEADER_BYTES + length as usize];
            if sender.bytes(range) != Some(sent) {
                self.checker
                    .violations
                    .push(format!("n{from}: {range:?} was given back while it was being sent"));
            }
        }
        let Ok(head) = <&[u8; HEADER_BYTES]>::try_from(&frame.bytes[..HEADER_BYTES]) else { return };
        let header = match Header::decode(head, self.seed) {
            Ok(header) => header,
            Err(error) => {
                self.checker.violations.push(format!("a frame from n{from}: {error}"));
                return;
            }
        };
        let mut body = &frame.bytes[HEADER_BYTES..];
        if self.seed.body([body, &[]]) != header.body_crc {
            self.checker.violations.push(format!("a frame from n{from}: body checksum"));
        }
        self.note(u64::from(to) << 8 | header.kind as u64);
        if !matches!(header.kind, Kind::Ping | Kind::Pong) {
            self.say(|| format!("n{from} -> n{to}: {header:?}"));
        }
        let mut trailer = None;
        if header.kind.is_forwarded() {
            let (data, tail) = body.split_at(body.len() - TRAILER_BYTES);
            trailer = tail.try_into().ok().map(Trailer::decode);
            body = data;
        }
        let Some(process) = self.process(to) else { return };
        let (small, data) = match header.kind {
            Kind::Open => (body.to_vec(), None),
            Kind::ForwardRead => (Vec::new(), Some(vec![0xcc; header.length as usize])),
            _ if !body.is_empty() => (Vec::new(), Some(body.to_vec())),
            _ => (Vec::new(), None),
        };
        let buffer = data.map(|data| process.allocate(data));
        let _ = session;
        process.engine.handle_frame(now, NodeId(from), &header, trailer, &small, buffer);
        self.drain(to);
    }

    fn io_done(&mut self, node: u16, number: u64) {
        let now = self.now;
        let faults = self.node(node).disk.faults;
        let Some(process) = self.process(node) else { return };
        let Some((id, io)) = process.ios.remove(&number) else { return };
        self.note(u64::from(node) << 16 | number);
        let mut result = Ok(());
        match io {
            DiskIo::Read { offset, buffer } => {
                let mut data = vec![0; buffer.length as usize];
                self.node(node).disk.read(offset, &mut data);
                match self.process(node).and_then(|process| process.bytes_mut(buffer)) {
                    Some(bytes) => bytes.copy_from_slice(&data),
                    None => self
                        .checker
                        .violations
                        .push(format!("n{node} reads into {buffer:?}, which it gave back")),
                }
            }
            DiskIo::Write { offset, data, buffer, durable, metadata } => {
                if let Some(range) = buffer
                    && self.process(node).and_then(|process| process.bytes(range)) != Some(&data[..])
                {
                    self.checker.violations.push(format!("n{node}: {range:?} changed while it was written"));
                }
                if if metadata { faults.metadata } else { faults.write } {
                    result = Err("input/output error".to_owned());
                } else {
                    self.node_mut(node).disk.write(offset, &data, durable);
                }
            }
            DiskIo::Flush(mark) => {
                if faults.flush {
                    result = Err("flush failed".to_owned());
                    let mut random = self.random.clone();
                    let disk = &mut self.node_mut(node).disk;
                    disk.faults.flush = false;
                    disk.lose_cache(&mut random);
                    self.random = random;
                } else {
                    self.node_mut(node).disk.flushed(mark);
                }
            }
        }
        if let Err(error) = &result {
            self.say(|| format!("n{node}: disk: {error}"));
        }
        if let Some(process) = self.process(node) {
            process.engine.handle_io(now, id, result);
        }
        self.drain(node);
    }

    fn complete(&mut self, node: u16, token: u64, result: Result<(), String>) {
        let now = self.now;
        let Some(asked) = self.asked.remove(&token) else {
            self.checker.violations.push(format!("n{node}: request {token} completed twice, or never asked"));
            return;
        };
        self.say(|| format!("n{node}: request {token} {result:?}"));
        self.note(token);
        self.completed += 1;
        let (device, first) = (asked.device, (asked.offset / SECTOR as u64) as usize);
        let mut stamps = Vec::new();
        if let (RequestKind::Read, Ok(()), Some(buffer)) = (asked.kind, &result, asked.buffer) {
            let data = self
                .process(node)
                .and_then(|process| process.buffers.get(&buffer))
                .cloned()
                .unwrap_or_default();
            for (index, sector) in data.chunks(SECTOR).enumerate() {
                match stamp(sector) {
                    Some(stamp) => {
                        stamps.push(stamp);
                        if !self.tainted {
                            self.checker.read(asked.began, now, device, first + index, stamp);
                        }
                    }
                    None => self
                        .checker
                        .violations
                        .push(format!("request {token}: a torn sector {:x?}", &sector[..32])),
                }
            }
        }
        if let Some(buffer) = asked.buffer {
            let freed = self
                .process(node)
                .and_then(|process| process.free(mirror_net::engine::action::BufferId(buffer)));
            if let Some(wrong) = freed {
                self.checker.violations.push(format!("n{node}: request {token}: {wrong}"));
            }
        }
        match (&result, asked.kind) {
            (Ok(()), RequestKind::Flush) => self.checker.flushed(device, asked.began, now),
            (Err(_), RequestKind::Flush) => self.checker.flush_failed(device),
            (Ok(()), RequestKind::Discard) => {
                for id in &asked.writes {
                    self.checker.end(now, *id);
                }
            }
            (Ok(()), kind) => {
                let fua =
                    matches!(kind, RequestKind::Write { fua: true } | RequestKind::WriteZeroes { fua: true });
                let slice = (asked.offset / u64::from(SLICE)) as u32;
                let lost = self.loss_unseen(node, device, slice)
                    || self.loss_unseen(
                        node,
                        device,
                        ((asked.offset + u64::from(asked.length) - 1) / u64::from(SLICE)) as u32,
                    );
                for id in &asked.writes {
                    self.checker.acknowledge(now, *id, fua, lost);
                }
            }
            (Err(_), _) => self.orphans[device].extend(&asked.writes),
        }
        if !stamps.is_empty() {
            self.say(|| format!("n{node}: request {token} read {stamps:x?}"));
        }
        self.results.insert(token, result.map(|()| stamps));
        // Bursts, and silence between them.
        let longest = if self.random.one_in(3) { MS } else { 250 * MS };
        let pause = self.random.range(10_000, longest);
        if !asked.replaced {
            self.queue.push(now + pause, Event::Ask { device });
        }
    }

    /// Whether the manager knows of a loss in that slice which the exporter has not heard of.
    fn loss_unseen(&mut self, node: u16, device: usize, slice: u32) -> bool {
        let Some(process) = self.process(node) else { return false };
        let version = process.engine.adopted_version();
        let loss = |map: &DistributionMap| map.devices[device].span(SliceIndex(slice)).map(|span| span.loss);
        let seen = self.manager.history.get(&version.0).and_then(|map| loss(map));
        seen != loss(&self.manager.map)
    }

    fn cut(&mut self, a: u16, b: u16, session: u64, known_to: Option<u16>) {
        if !self.network.cut(a, b, session) {
            return;
        }
        for (node, peer) in [(a, b), (b, a)] {
            if known_to != Some(node) {
                let process = self.node(node).process_id;
                let at = self.now + self.random.range(10_000, 5 * MS);
                self.queue.push(at, Event::LaneDown { node, process, peer, session });
            }
        }
    }

    // ---- faults ----

    fn stop(&mut self, node: u16, power: bool) {
        let mut random = self.random.clone();
        self.node_mut(node).stop(power, &mut random);
        self.random = random;
        for peer in 1..=self.nodes.len() as u16 {
            if let Some(session) = self.network.session(node, peer).filter(|_| peer != node) {
                if power {
                    // Nobody says goodbye; it comes to light by silence, or at the next connection.
                    self.network.cut(node, peer, session);
                    let process = self.node(peer).process_id;
                    let at = self.now + self.random.range(500 * MS, 1_500 * MS);
                    self.queue.push(at, Event::LaneDown { node: peer, process, peer: node, session });
                } else {
                    self.cut(node, peer, session, Some(node));
                }
            }
        }
        self.next_process += 1;
        let process = self.next_process;
        let node = self.node_mut(node);
        node.process_id = process;
        if power {
            node.attach = process + 1_000;
        }
        node.paused_until = 0;
    }

    /// Does it now.
    pub fn fault(&mut self, fault: Fault) {
        self.say(|| format!("*** {fault:?}"));
        let now = self.now;
        match fault {
            Fault::Kill { node } if self.node(node).process.is_some() => self.stop(node, false),
            Fault::PowerCut { node } if self.node(node).process.is_some() => self.stop(node, true),
            Fault::PowerCut { node } => {
                let mut random = self.random.clone();
                self.node_mut(node).disk.lose_cache(&mut random);
                self.random = random;
                self.next_process += 1;
                let process = self.next_process;
                self.node_mut(node).process_id = process;
                self.node_mut(node).attach = process + 1_000;
            }
            Fault::Start { node } if self.node(node).process.is_none() => self.launch(node),
            Fault::Kill { .. } | Fault::Start { .. } => {}
            Fault::Pause { node, ms } => self.node_mut(node).paused_until = now + ms * MS,
            Fault::CutLane { a, b } => {
                if let Some(session) = self.network.session(a, b) {
                    self.cut(a, b, session, None);
                }
            }
            Fault::Silence { from, to, on } => self.network.set_silent(from, to, on),
            Fault::NoManager { node, on } => self.cut_off[usize::from(node) - 1] = on,
            Fault::DiskWrites { node } => self.fail_disk(node, |faults| faults.write = true),
            Fault::DiskFlush { node } => self.fail_disk(node, |faults| faults.flush = true),
            Fault::DiskMetadata { node } => self.fail_disk(node, |faults| faults.metadata = true),
            Fault::HandOver { device } => {
                let before = Arc::clone(&self.manager.map);
                if self.manager.hand_over(now, device) {
                    self.publish(&before);
                }
            }
            Fault::MoveClaim { device, node } => {
                let before = Arc::clone(&self.manager.map);
                if self.manager.move_claim(device, NodeId(node)) {
                    self.publish(&before);
                }
            }
        }
    }

    fn fail_disk(&mut self, node: u16, set: impl FnOnce(&mut Faults)) {
        set(&mut self.node_mut(node).disk.faults);
    }

    /// Everything works again, and everybody is there.
    pub fn heal(&mut self) {
        for a in 1..=self.nodes.len() as u16 {
            for b in 1..=self.nodes.len() as u16 {
                self.network.set_silent(a, b, false);
            }
            self.cut_off[usize::from(a) - 1] = false;
            let now = self.now;
            self.node_mut(a).paused_until = now;
            if self.node(a).process.is_none() {
                self.launch(a);
            }
        }
    }

    /// Compares the members' contents; for a cluster at rest.
    pub fn compare_copies(&mut self) {
        let map = Arc::clone(&self.manager.map);
        for device in &map.devices {
            for span in &device.spans {
                let members: Vec<u16> = span.members().map(|member| member.disk.0 as u16).collect();
                for slice in span.first.0..span.end() {
                    let copies: Vec<_> =
                        members.iter().map(|node| self.node(*node).slice(device.id.0, slice)).collect();
                    let Some(Some((first, _))) = copies.first() else { continue };
                    for (node, copy) in members.iter().zip(&copies).skip(1) {
                        let same = copy.as_ref().is_some_and(|(bytes, _)| bytes == first);
                        if !same {
                            self.checker.violations.push(format!(
                                "{} slice {slice}: n{} and n{node} are in sync and differ",
                                device.name, members[0]
                            ));
                        }
                    }
                }
            }
        }
    }
}
