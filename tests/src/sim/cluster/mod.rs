//! The world: nodes, network, manager and users on one queue of events.

mod control;
mod copies;
mod driver;
mod faults;
mod first_map;
mod operator;
mod users;

pub use self::faults::{Fault, Wrong};

use crate::sim::checker::Checker;
use crate::sim::control::{Agent, Control};
use crate::sim::disk::SECTOR;
use crate::sim::network::{Frame, Network};
use crate::sim::node::{Mounted, Node, SLICE};
use crate::sim::operator::Deed;
use crate::sim::process::Process;
use crate::sim::scheduler::{MS, Nanos, Queue, Random};
use crate::sim::workload::{Asked, SLICES};
use mirror_net::ids::{ClusterId, DeviceId, DiskId, NodeId, ProcessId};
use mirror_net::manager::Proposal;
use mirror_net::map::DevicePolicy;
use mirror_net::wire::header::CrcSeed;
use std::collections::{BTreeMap, BTreeSet};

/// Between two looks at what is not connected.
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
    Frame { from: u16, to: u16, process: u64, frame: Box<Frame> },
    LaneUp { node: u16, process: u64, peer: u16, session: u64, of: u64 },
    LaneDown { node: u16, process: u64, peer: u16, session: u64 },
    ToManager { connection: u64 },
    FromManager { connection: u64 },
    ControlDown { node: u16, process: u64, connection: u64 },
    NodeGone { life: u64, connection: u64 },
    Store { life: u64, proposal: Box<Proposal> },
    GiveSession { life: u64, connection: u64 },
    ManagerTick,
    Housekeeping,
    Ask { device: usize },
    Fault(Fault),
}

/// How large and how busy.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes, 2 to 5, spares included.
    pub nodes: u16,
    /// The last so many of them are spares.
    pub spares: u16,
    /// Disks of each node, 1 to 3.
    pub disks: u16,
    /// The layout is the product's own for a new cluster, which makes two copies.
    pub pairs: bool,
    /// Copies of the first two devices in any other layout.
    pub copies: u16,
    /// Devices that have users.
    pub devices: usize,
    /// None of those is mirrored by nobody.
    pub mirrored_only: bool,
    /// Requests at a time, of each device's user.
    pub depth: usize,
    /// Whether the nodes' clocks run at different speeds.
    pub drift: bool,
    /// Whether users move from place to place.
    pub wanders: bool,
    /// Whether users discard.
    pub discards: bool,
    /// Of the mirrored devices, and what becomes of requests that cannot be served.
    pub policy: DevicePolicy,
    /// Whether an [operator](crate::sim::operator) has copies moved.
    pub operator: bool,
}

/// An exporter that another replaced.
#[derive(Clone, Copy, Debug)]
struct Former {
    device: usize,
    /// The node and its process.
    exporter: (u16, u64),
    /// Of its claim.
    generation: u64,
    /// When another took its place.
    until: Nanos,
}

/// The world.
pub struct Cluster {
    /// Virtual time.
    pub now: Nanos,
    /// The only source of chance.
    pub random: Random,
    /// What is wrong.
    pub checker: Checker,
    /// The manager and its store.
    pub manager: Control,
    agents: Vec<Agent>,
    /// The network.
    pub network: Network,
    /// Frames that arrived after the end of their lane.
    pub late_frames: u64,
    /// Regenerations that came to their end.
    pub plans_done: u64,
    /// What an operator did, as in [`Deed::ALL`].
    pub deeds: [u64; Deed::ALL.len()],
    /// Requests that completed.
    pub completed: u64,
    /// A hash over everything that happened.
    pub hash: u64,
    /// Print the story.
    pub trace: bool,
    /// Whether users go on asking.
    pub busy: bool,
    nodes: Vec<Node>,
    queue: Queue<Event>,
    /// When something goes wrong: users are busiest then.
    planned: Vec<Nanos>,
    cut_off: Vec<bool>,
    asked: BTreeMap<u64, Asked>,
    /// Requests of exporters that are gone, by device.
    orphans: Vec<Vec<usize>>,
    /// By process that ended: of which devices and disks it held something in memory only.
    memory_lost: BTreeMap<u64, BTreeSet<(DeviceId, DiskId)>>,
    /// Who exports, and under which claim's generation.
    exporting: Vec<Option<(u16, u64)>>,
    exported: Vec<u64>,
    /// Exporters before, by device: they may not know it yet, and their users go on reading.
    former: Vec<Former>,
    shape: Shape,
    /// Devices that have users.
    pub users: Vec<usize>,
    next_token: u64,
    next_process: u64,
    next_stamp: u64,
    seed: CrcSeed,
    /// Results by token, for scenarios.
    pub results: BTreeMap<u64, Result<Vec<u64>, String>>,
}

impl Cluster {
    /// A cluster that has just been created, all nodes running.
    pub fn new(seed: u64, shape: Shape, trace: bool) -> Self {
        let disks = |node: u16| u32::from((node - 1) * shape.disks + 1)..u32::from(node * shape.disks + 1);
        let mut nodes: Vec<Node> = (1..=shape.nodes).map(|node| Node::new(node, disks(node))).collect();
        for node in &mut nodes {
            // Two clocks differ by less than the margin over one lease.
            let step = (seed >> (8 * node.id.0)) as i64 ^ seed as i64;
            node.drift_ppm = if shape.drift { step.rem_euclid(9) * 10_000 - 40_000 } else { 0 };
        }
        let (map, users) = first_map::first_map(shape, &nodes);
        map.validate().expect("the first map is valid");
        let devices = map.devices.len();
        let sectors = SLICE as usize / SECTOR;
        let mut cluster = Self {
            now: 0,
            random: Random::new(seed),
            checker: Checker::new(devices, SLICES as usize, sectors),
            manager: Control::new(map, seed),
            agents: nodes.iter().map(|_| Agent::default()).collect(),
            network: Network::default(),
            late_frames: 0,
            plans_done: 0,
            deeds: [0; Deed::ALL.len()],
            completed: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            trace,
            busy: true,
            cut_off: vec![false; nodes.len()],
            next_process: nodes.len() as u64,
            nodes,
            planned: Vec::new(),
            queue: Queue::default(),
            asked: BTreeMap::new(),
            orphans: vec![Vec::new(); devices],
            memory_lost: BTreeMap::new(),
            exporting: vec![None; devices],
            exported: vec![0; devices],
            former: Vec::new(),
            shape,
            users,
            next_token: 0,
            next_stamp: 0,
            seed: CrcSeed::new(&ClusterId::default()),
            results: BTreeMap::new(),
        };
        for node in 1..=shape.nodes {
            cluster.launch(node);
        }
        cluster.queue.push(MS, Event::Housekeeping);
        cluster.queue.push(MS, Event::ManagerTick);
        for device in cluster.users.clone() {
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

    /// The node that has that disk, and which of its disks it is.
    pub fn locate(&self, disk: DiskId) -> (u16, usize) {
        let index = disk.0 as u16 - 1;
        (index / self.shape.disks + 1, usize::from(index % self.shape.disks))
    }

    /// All disks, in the order of their ids.
    fn disks(&self) -> impl Iterator<Item = &Mounted> {
        self.nodes.iter().flat_map(|node| &node.disks)
    }

    fn node_mut(&mut self, id: u16) -> &mut Node {
        &mut self.nodes[usize::from(id) - 1]
    }

    fn process(&mut self, id: u16) -> Option<&mut Process> {
        self.node_mut(id).process.as_mut()
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
            | Event::ControlDown { node, process, .. } => Some((*node, *process)),
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
                let clock = self.node(node).clock(now);
                let Some(running) = self.process(node) else { return };
                running.engine.handle_tick(clock);
                let next = running.engine.next_tick();
                let next = now + self.node(node).wait_for(now, next).max(MS);
                self.queue.push(next, Event::Tick { node, process });
                self.drain(node);
            }
            Event::Io { node, number, .. } => self.io_done(node, number),
            Event::Frame { from, to, frame, process } => self.arrive(from, to, process, frame),
            Event::LaneUp { node, peer, session, of, .. } => {
                self.say(|| format!("n{node}: lane {session} to n{peer}"));
                let clock = self.node(node).clock(now);
                let Some(running) = self.process(node) else { return };
                running.engine.handle_lane_up(clock, NodeId(peer), session, ProcessId(of));
                self.drain(node);
            }
            Event::LaneDown { node, peer, session, process } => {
                if self.network.is_silent(peer, node) {
                    self.queue.push(now + 10 * MS, Event::LaneDown { node, peer, session, process });
                    return;
                }
                let clock = self.node(node).clock(now);
                let Some(running) = self.process(node) else { return };
                running.engine.handle_lane_down(clock, NodeId(peer), session, "reset");
                self.drain(node);
            }
            Event::ToManager { connection } => self.manager_hears(connection),
            Event::FromManager { connection } => self.agent_hears(connection),
            Event::ControlDown { node, connection, .. } => self.control_down(node, connection),
            Event::NodeGone { life, connection } => self.node_gone(life, connection),
            Event::Store { life, proposal } => self.store(life, *proposal),
            Event::GiveSession { life, connection } => self.give_session(life, connection),
            Event::ManagerTick => self.manager_tick(),
            Event::Housekeeping => self.housekeeping(),
            Event::Ask { device } => self.ask(device),
            Event::Fault(fault) => self.fault(fault),
        }
    }

    fn launch(&mut self, node: u16) {
        let now = self.now;
        let process = self.node(node).process_id;
        let clock = self.node(node).clock(now);
        if let Err(error) = self.node_mut(node).start(clock) {
            self.checker.violations.push(error);
            return;
        }
        self.queue.push(now, Event::Tick { node, process });
    }

    fn housekeeping(&mut self) {
        let now = self.now;
        for node in 1..=self.nodes.len() as u16 {
            if self.node(node).process.is_some() && self.node(node).paused_until <= now {
                self.agent_tick(node);
            }
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
        self.queue.push(now + HEARTBEAT, Event::Housekeeping);
    }
}
