//! A random world around the manager: nodes that crash, lose power, adopt maps late, write through
//! whatever they hold for the present truth, and fill each other's copies; questions that arrive
//! late, twice or never; a manager that is restarted at any point.
//!
//! What is checked after every stored map: no promotion of a copy that is not in sync, or not the
//! one that the map means, or not there; no copy counted as in sync that lacks anything; no
//! acknowledged write lost, unless the loss is counted, and never a flushed one. And at the end, with
//! everybody back: every slice is served again, and every copy of it in sync.

mod rejoin;

use self::rejoin::{Joined, Said};
use super::bench::{incarnation, map_of};
use crate::config::Policy;
use crate::control::{DiskContent, DiskInventory, ManagerMessage, NodeMessage, NodeReport, Registration};
use crate::ids::{AttachId, DeviceId, DiskId, ExporterSession, Incarnation, MapVersion, NodeId, ProcessId};
use crate::manager::repair::{SpanPlan, plan_span};
use crate::manager::{ConnectionId, Input, Manager, Output, Proposal, Ticket};
use crate::map::verbs::Verb;
use crate::map::{DistributionMap, ReplicaState, Span};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Range, RangeInclusive};

/// SplitMix64: the same seed gives the same world on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    fn within(&mut self, range: RangeInclusive<u32>) -> u32 {
        self.below(u64::from(*range.start())..u64::from(*range.end()) + 1) as u32
    }

    /// True once in so many times.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(0..times) == 0
    }
}

struct Node {
    id: NodeId,
    disk: DiskId,
    alive: bool,
    incarnation: Incarnation,
    connection: Option<ConnectionId>,
    session: ExporterSession,
    /// Maps on their way to it.
    arriving: VecDeque<DistributionMap>,
    /// Durably adopted.
    adopted: DistributionMap,
    /// For each slice: the newest write on its disk or in its caches, and the newest flushed.
    has: BTreeMap<(DeviceId, u32), (u64, u64)>,
    disk_works: bool,
    /// In its process's memory: copies that it waits for as for members, having asked for that.
    joined: BTreeSet<Joined>,
}

struct World {
    random: Random,
    now_ms: u64,
    next: u64,
    store: DistributionMap,
    sessions: u64,
    manager: Manager,
    nodes: Vec<Node>,
    /// For each slice: the newest acknowledged write, and the newest acknowledged and flushed.
    acknowledged: BTreeMap<(DeviceId, u32), (u64, u64)>,
    disks_may_fail: bool,
    /// Processes live long enough for a late question to find everything else changed.
    long_lived: bool,
    /// Questions that may arrive, or arrive again.
    said: Vec<Said>,
    /// Nothing fails any more.
    calm: bool,
    seen: Seen,
}

/// What has happened, so that a test knows that it did.
#[derive(Clone, Copy, Default, Debug)]
struct Seen {
    failovers: u32,
    /// Slices that became in sync again.
    rejoined: u32,
    /// Promotions of secondaries whose process had restarted.
    promoted_anew: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let map = map_of(3);
        let nodes = map
            .nodes
            .iter()
            .zip(&map.disks)
            .map(|(node, disk)| Node {
                id: node.id,
                disk: disk.id,
                alive: true,
                incarnation: incarnation(node.id.0.into()),
                connection: None,
                session: ExporterSession(0),
                arriving: VecDeque::new(),
                adopted: map.clone(),
                has: BTreeMap::new(),
                disk_works: true,
                joined: BTreeSet::new(),
            })
            .collect();
        Self {
            random: Random(seed),
            now_ms: 1_000,
            next: 10_000,
            manager: Manager::new(Some(map.clone()), Policy::MANUAL),
            store: map,
            sessions: 0,
            nodes,
            acknowledged: BTreeMap::new(),
            disks_may_fail: seed.is_multiple_of(4),
            long_lived: seed % 4 >= 2,
            said: Vec::new(),
            calm: false,
            seen: Seen::default(),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[usize::from(id.0) - 1]
    }

    fn feed(&mut self, input: Input) {
        self.manager.handle(self.now_ms, input);
        while let Some(output) = self.manager.poll() {
            match output {
                Output::Store(proposal) => {
                    self.check(&proposal);
                    self.store = (*proposal.next).clone();
                    if self.random.once_in(20) {
                        // It dies between the store and the word that it is stored.
                        self.restart_manager();
                        return;
                    }
                    let version = self.store.version;
                    self.manager.handle(self.now_ms, Input::Stored { version });
                }
                Output::GiveSession { connection } => {
                    self.sessions += 1;
                    let session = ExporterSession(self.sessions);
                    self.manager.handle(self.now_ms, Input::Session { connection, session });
                }
                Output::Send { connection, message } => self.deliver(connection, message),
                Output::Close { connection } => self.hang_up(connection),
                Output::Reply { .. } => self.seen.failovers += 1,
                Output::Event(_, line) | Output::Log(line) => assert!(!line.starts_with("BUG"), "{line}"),
            }
        }
    }

    fn deliver(&mut self, connection: ConnectionId, message: ManagerMessage) {
        let store = self.store.version;
        let Some(node) = self.nodes.iter_mut().find(|node| node.connection == Some(connection)) else {
            return;
        };
        match message {
            ManagerMessage::Registered { exporter_session, .. } => {
                assert!(exporter_session > node.session, "exporter sessions grow");
                node.session = exporter_session;
            }
            ManagerMessage::Map { map } => {
                assert!(map.version <= store, "a map was sent that is not stored");
                node.arriving.push_back(*map);
            }
            ManagerMessage::Export { device, generation } => {
                let (id, device) = (node.id, self.store.device(device).unwrap());
                if device.claim.generation != generation {
                    return;
                }
                assert_eq!(device.claim.node, id, "only the claim's node exports");
                for span in &device.spans {
                    let primary = self.node(self.store.node_of(span.primary().disk).unwrap());
                    assert!(
                        primary.adopted.version >= device.claim.since,
                        "a primary does not know the claim"
                    );
                }
            }
            // It came back with a dead disk before the manager noticed that it had gone; it will retry.
            ManagerMessage::Refused { reason } => {
                assert!(reason.contains("a second ublk-server"), "{reason}")
            }
            ManagerMessage::Format(_) => panic!("nobody asked for a cluster"),
            ManagerMessage::Look { .. } | ManagerMessage::Waiting { .. } => {
                panic!("nothing enters this cluster")
            }
            ManagerMessage::TellMap => panic!("nobody asked for the map"),
            ManagerMessage::Survey { .. } => panic!("nobody asked for a broadcast"),
            ManagerMessage::NotLeader { .. } => panic!("the core does not know of other managers"),
        }
    }

    fn hang_up(&mut self, connection: ConnectionId) {
        for node in self.nodes.iter_mut().filter(|node| node.connection == Some(connection)) {
            node.connection = None;
            node.arriving.clear();
        }
    }

    /// What must hold of a change at the moment in which it is stored.
    fn check(&mut self, proposal: &Proposal) {
        assert_eq!(proposal.base, Some(self.store.version), "it is made from what is stored");
        proposal.next.validate().unwrap();
        for verb in &proposal.batch {
            match verb {
                Verb::Promote { run, disk } => {
                    let span = self.store.device(run.device).unwrap().span(run.first).unwrap();
                    let replica = span.replica_on(*disk).unwrap();
                    let node = self.store.node_of(*disk).unwrap();
                    let attached = self.node(node).incarnation.attach;
                    assert_eq!(replica.state, ReplicaState::InSync, "a stale copy is promoted");
                    let known = self.manager.registry().get(&format!("n{}", node.0)).unwrap();
                    assert!(known.is_up(self.now_ms), "a copy that is not there is promoted");
                    let believed = known.incarnation(self.store.cluster, *disk);
                    let attach = believed.map(|believed| believed.attach);
                    assert_eq!(attach, Some(replica.incarnation.attach), "another attachment is promoted");
                    let next = proposal.next.device(run.device).unwrap().span(run.first).unwrap();
                    assert_eq!(Some(next.primary().incarnation), believed, "a primary is what it is now");
                    let anew = believed != Some(replica.incarnation);
                    // One that lost power a moment ago is found out when it registers, and readmitted.
                    if attached == replica.incarnation.attach {
                        self.keeps(run.device, span, *disk, false);
                    }
                    self.seen.promoted_anew += u32::from(anew);
                }
                Verb::Readmit { run, disk, incarnation, lost } => {
                    let span = self.store.device(run.device).unwrap().span(run.first).unwrap().clone();
                    let node = self.node(self.store.node_of(*disk).unwrap());
                    let known = self.manager.registry().get(&format!("n{}", node.id.0)).unwrap();
                    assert!(known.is_up(self.now_ms), "a copy that is not there is readmitted");
                    assert_eq!(known.incarnation(self.store.cluster, *disk), Some(*incarnation));
                    if node.incarnation.attach == incarnation.attach {
                        self.keeps(run.device, &span, *disk, *lost);
                    }
                    if *lost {
                        // Only if nobody can have what it lacks.
                        for member in span.members() {
                            let id = self.store.node_of(member.disk).unwrap();
                            let known = self.manager.registry().get(&format!("n{}", id.0)).unwrap();
                            let attach = known.incarnation(self.store.cluster, member.disk).unwrap().attach;
                            assert_ne!(attach, member.incarnation.attach, "{id} may have what {disk} lost");
                        }
                        let has = self.node(self.store.node_of(*disk).unwrap()).has.clone();
                        for slice in span.first.0..span.end() {
                            let key = (run.device, slice);
                            let (newest, _) = has.get(&key).copied().unwrap_or_default();
                            if let Some(acknowledged) = self.acknowledged.get_mut(&key) {
                                acknowledged.0 = acknowledged.0.min(newest);
                            }
                        }
                    }
                }
                Verb::Mark { run, disk, state, incarnation } => {
                    self.check_mark(*run, *disk, *state, *incarnation)
                }
                _ => {}
            }
        }
    }

    /// The copy that goes on has what was acknowledged, or at least what was flushed.
    fn keeps(&self, device: DeviceId, span: &Span, disk: DiskId, lost: bool) {
        let node = self.node(self.store.node_of(disk).unwrap());
        for slice in span.first.0..span.end() {
            let (has, _) = node.has.get(&(device, slice)).copied().unwrap_or_default();
            let (acknowledged, flushed) =
                self.acknowledged.get(&(device, slice)).copied().unwrap_or_default();
            let wanted = if lost { flushed } else { acknowledged };
            assert!(has >= wanted, "{} has write {has} of {device} {slice}, {wanted} was promised", node.id);
        }
    }

    fn restart_manager(&mut self) {
        self.manager = Manager::new(Some(self.store.clone()), Policy::MANUAL);
        for node in &mut self.nodes {
            node.connection = None;
            node.arriving.clear();
        }
    }

    fn register(&mut self, index: usize) {
        let connection = ConnectionId(self.fresh());
        let cluster = self.store.cluster;
        let node = &mut self.nodes[index];
        node.connection = Some(connection);
        node.arriving.clear();
        let content = if node.disk_works {
            DiskContent::Ours { cluster, disk: node.disk }
        } else {
            DiskContent::Unusable { why: "dead".into() }
        };
        let disk = DiskInventory {
            name: "d1".into(),
            path: "/dev/sda".into(),
            bytes: 1 << 30,
            block_bytes: 512,
            attach: node.incarnation.attach,
            content,
        };
        let registration = Registration {
            lives: Vec::new(),
            node: format!("n{}", index + 1),
            process: node.incarnation.process,
            adopted: node.adopted.version,
            address: String::new(),
            disks: vec![disk],
        };
        self.feed(Input::Register { connection, cluster: Some(cluster), registration });
    }

    fn say(&mut self, index: usize, message: NodeMessage) {
        if let Some(connection) = self.nodes[index].connection {
            self.feed(Input::Message { connection, message });
        }
    }

    fn crash(&mut self, index: usize, power: bool) {
        let (attach, process) = (self.fresh(), self.fresh());
        let keep = self.random.once_in(2);
        let node = &mut self.nodes[index];
        node.alive = false;
        node.joined.clear();
        node.incarnation.process = ProcessId(process);
        if power {
            node.incarnation.attach = AttachId(attach);
            for (newest, flushed) in node.has.values_mut().filter(|_| !keep) {
                *newest = *flushed;
            }
        }
        node.arriving.clear();
        if let Some(connection) = node.connection.take() {
            // The manager may learn of it now, or only from the next registration.
            if !self.random.once_in(3) {
                self.feed(Input::Disconnected { connection });
            }
        }
    }

    fn adopt(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let Some(map) = node.arriving.pop_front().filter(|_| node.alive) else { return };
        if map.version > node.adopted.version {
            node.adopted = map;
        }
        let version = node.adopted.version;
        self.say(index, NodeMessage::Adopted { version });
    }

    /// A write, and perhaps a flush, at a slice of a device through the node that takes itself for
    /// its primary; whom it cannot reach it asks to be recorded stale.
    fn write(&mut self, index: usize, device: DeviceId, slice: u32, flush: bool) {
        let node = &self.nodes[index];
        let map = node.adopted.clone();
        let span = map.device(device).unwrap().span(crate::ids::SliceIndex(slice)).unwrap();
        if !node.alive
            || !node.disk_works
            || span.primary().disk != node.disk
            || span.primary().incarnation != node.incarnation
        {
            return;
        }
        let (mut others, mut syncing) = (Vec::new(), Vec::new());
        for replica in &span.replicas[1..] {
            let other = usize::from(map.node_of(replica.disk).unwrap().0) - 1;
            let joined = node.joined.contains(&(device, slice, replica.disk, span.epoch));
            match replica.state {
                ReplicaState::Stale => {}
                ReplicaState::Syncing if !joined => syncing.push(other),
                ReplicaState::Syncing | ReplicaState::InSync => others.push(other),
            }
        }
        let refusing = others.iter().copied().find(|other| self.refuses(index, *other, device, slice));
        // One that is being filled is not waited for, and is sent what can be sent.
        syncing.retain(|other| !self.refuses(index, *other, device, slice));
        let number = self.fresh();
        let key = (device, slice);
        // On some disks it lands even if it is never acknowledged.
        for other in others.iter().copied().filter(|other| Some(*other) != refusing).chain([index]) {
            let has = self.nodes[other].has.entry(key).or_default();
            has.0 = number;
            if flush && refusing.is_none() {
                has.1 = number;
            }
        }
        for other in syncing {
            self.nodes[other].has.entry(key).or_default().0 = number;
        }
        match refusing {
            None => {
                let acknowledged = self.acknowledged.entry(key).or_default();
                acknowledged.0 = number;
                if flush {
                    acknowledged.1 = number;
                }
            }
            Some(other) => {
                let (peer, version) = (self.nodes[other].id, map.version);
                self.ask(index, NodeMessage::AskStale { peer, version, cause: "no answer".into() });
            }
        }
    }

    /// Whether a write of that primary does not get through to a copy of it, for any reason.
    fn refuses(&mut self, index: usize, other: usize, device: DeviceId, slice: u32) -> bool {
        let (node, peer) = (&self.nodes[index], &self.nodes[other]);
        let slice = crate::ids::SliceIndex(slice);
        let span = node.adopted.device(device).unwrap().span(slice).unwrap();
        let theirs = peer.adopted.device(device).unwrap().span(slice).unwrap();
        let replica = span.replica_on(peer.disk).unwrap();
        !peer.alive
            || !peer.disk_works
            || theirs.epoch != span.epoch
            || rejoin::is_another(replica, peer.incarnation)
            || self.random.once_in(10)
    }

    fn step(&mut self) {
        self.now_ms += self.random.below(0..200);
        let index = self.random.below(0..self.nodes.len() as u64) as usize;
        let mut event = self.random.below(0..100);
        if self.long_lived && (event < 6 || (55..59).contains(&event)) && !self.random.once_in(20) {
            event = 68;
        }
        match event {
            0..4 => self.crash(index, false),
            4..6 => self.crash(index, true),
            6..20 => self.nodes[index].alive = true,
            20..35 if self.nodes[index].alive && self.nodes[index].connection.is_none() => {
                self.register(index)
            }
            35..55 => self.adopt(index),
            55..57 => self.restart_manager(),
            57..59 => {
                let (ticket, node) = (Ticket(self.fresh()), format!("n{}", index + 1));
                self.feed(Input::Failover { ticket, node });
            }
            59 if self.disks_may_fail => {
                self.nodes[index].disk_works = false;
                let disk = self.nodes[index].disk;
                self.say(index, NodeMessage::DiskFailed { disk, reason: "dead".into() });
                self.disks_may_fail = false;
            }
            60..66 => self.say(index, NodeMessage::Report(NodeReport::default())),
            66..68 => self.feed(Input::Tick),
            68..78 => {
                let other = self.random.below(0..self.nodes.len() as u64) as usize;
                self.meet(index, other);
            }
            78..82 => self.say_again(),
            _ => {
                let device = DeviceId(self.random.within(1..=self.store.devices.len() as u32));
                let slices = self.store.device(device).unwrap().slices;
                let slice = self.random.within(0..=slices.min(3) - 1);
                let flush = self.random.once_in(4);
                self.write(index, device, slice, flush);
            }
        }
    }

    /// Everybody comes back and everything arrives.
    fn settle(&mut self) {
        self.calm = true;
        for _ in 0..20 {
            self.now_ms += 5_000;
            for index in 0..self.nodes.len() {
                self.nodes[index].alive = true;
                if self.nodes[index].connection.is_none() {
                    self.register(index);
                }
                self.say(index, NodeMessage::Report(NodeReport::default()));
            }
            self.feed(Input::Tick);
            for index in 0..self.nodes.len() {
                while !self.nodes[index].arriving.is_empty() {
                    self.adopt(index);
                }
            }
            for index in 0..self.nodes.len() {
                for other in 0..self.nodes.len() {
                    self.meet(index, other);
                }
            }
        }
    }
}

fn run(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for index in 0..3 {
        world.register(index);
    }
    let no_failures = !world.disks_may_fail;
    let steps = if world.long_lived { 1_200 } else { 400 };
    for _ in 0..steps {
        world.step();
    }
    world.settle();
    for device in world.store.devices.iter().filter(|_| no_failures) {
        for span in &device.spans {
            let plan = plan_span(&world.store, device, span, world.manager.registry(), world.now_ms);
            assert_eq!(plan, SpanPlan::Served, "{} {}: {span:?}", device.name, span.first);
            assert_eq!(span.members().count(), usize::from(device.copies), "{}: {span:?}", device.name);
        }
    }
    assert!(world.store.version > MapVersion(1), "something has happened");
    world.seen
}

#[test]
fn whatever_happens_nothing_acknowledged_is_lost_uncounted() {
    let seeds = std::env::var("WORLD_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300);
    let mut all = Seen::default();
    for seed in 0..seeds {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(seen) => {
                all.failovers += seen.failovers;
                all.rejoined += seen.rejoined;
                all.promoted_anew += seen.promoted_anew;
            }
            Err(panic) => {
                eprintln!("seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(all.failovers > 0 && all.rejoined > 0 && all.promoted_anew > 0, "{all:?}");
}
