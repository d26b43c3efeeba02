//! A manager with a store that never fails and nodes that say what a test tells them to.

use crate::config::Policy;
use crate::control::{
    DiskContent, DiskInventory, ManagerMessage, NodeMessage, NodeReport, OperatorReply, Registration,
};
use crate::ids::{AttachId, DiskId, ExporterSession, Incarnation, MapVersion, NodeId, ProcessId};
use crate::manager::{ConnectionId, Input, Manager, Output, Proposal, Ticket};
use crate::map::layout::tests::pair_map;
use crate::map::{DistributionMap, ReplicaState, Span};
use std::collections::BTreeMap;

/// What node `index` (from 1) is in the map: attachment 10 + index, process 100 + index.
pub(super) fn incarnation(index: u64) -> Incarnation {
    Incarnation { attach: AttachId(10 + index), process: ProcessId(100 + index) }
}

/// `count` nodes, one disk each, in pairs.
pub(super) fn map_of(count: usize) -> DistributionMap {
    let mut map = pair_map(count);
    let nodes: BTreeMap<DiskId, NodeId> = map.disks.iter().map(|disk| (disk.id, disk.node)).collect();
    for replica in
        map.devices.iter_mut().flat_map(|device| &mut device.spans).flat_map(|span| &mut span.replicas)
    {
        replica.incarnation = incarnation(nodes[&replica.disk].0.into());
    }
    map
}

pub(super) struct Bench {
    pub(super) manager: Manager,
    pub(super) now_ms: u64,
    pub(super) connections: BTreeMap<String, ConnectionId>,
    next: u64,
    pub(super) sent: Vec<(ConnectionId, ManagerMessage)>,
    pub(super) closed: Vec<ConnectionId>,
    pub(super) log: Vec<String>,
    pub(super) replies: Vec<(Ticket, OperatorReply)>,
    pub(super) stored: Vec<Proposal>,
}

impl Bench {
    pub(super) fn new(map: Option<DistributionMap>) -> Self {
        Self::with(map, Policy::MANUAL)
    }

    pub(super) fn with(map: Option<DistributionMap>, policy: Policy) -> Self {
        Self {
            manager: Manager::new(map, policy),
            now_ms: 1_000_000,
            connections: BTreeMap::new(),
            next: 0,
            sent: Vec::new(),
            closed: Vec::new(),
            log: Vec::new(),
            replies: Vec::new(),
            stored: Vec::new(),
        }
    }

    /// With all nodes of `map` registered as the map has them, having adopted it.
    pub(super) fn up(map: &DistributionMap) -> Self {
        let mut bench = Self::new(Some(map.clone()));
        for index in 1..=map.nodes.len() as u64 {
            bench.register(index, incarnation(index));
        }
        assert!(bench.stored.is_empty(), "nothing is to be repaired: {:?}", bench.stored);
        bench
    }

    /// The manager dies, and another begins with what is stored; nobody has registered with it.
    pub(super) fn restart(&mut self, policy: Policy) {
        self.manager = Manager::new(Some(self.map().clone()), policy);
        self.connections.clear();
    }

    pub(super) fn input(&mut self, input: Input) {
        self.manager.handle(self.now_ms, input);
        while let Some(output) = self.manager.poll() {
            match output {
                Output::Store(proposal) => {
                    let version = proposal.next.version;
                    self.stored.push(proposal);
                    self.manager.handle(self.now_ms, Input::Stored { version });
                }
                Output::GiveSession { connection } => {
                    self.next += 1;
                    let session = ExporterSession(self.next);
                    self.manager.handle(self.now_ms, Input::Session { connection, session });
                }
                Output::Send { connection, message } => self.sent.push((connection, message)),
                Output::Close { connection } => self.closed.push(connection),
                Output::Reply { ticket, reply } => self.replies.push((ticket, reply)),
                Output::Event(_, line) | Output::Log(line) => {
                    assert!(!line.starts_with("BUG"), "{line}");
                    self.log.push(line);
                }
            }
        }
    }

    pub(super) fn map(&self) -> &DistributionMap {
        self.manager.map().unwrap()
    }

    pub(super) fn registration(&self, index: u64, incarnation: Incarnation) -> Registration {
        let map = self.manager.map();
        let disk = map.and_then(|map| map.disks.iter().find(|disk| u64::from(disk.node.0) == index));
        let content = match (map, disk) {
            (Some(map), Some(disk)) => DiskContent::Ours { cluster: map.cluster, disk: disk.id },
            _ => DiskContent::Blank,
        };
        Registration {
            lives: Vec::new(),
            node: format!("n{index}"),
            process: incarnation.process,
            adopted: map.map_or(MapVersion(0), |map| map.version),
            address: format!("10.0.0.{index}:7301"),
            disks: vec![DiskInventory {
                name: "d1".into(),
                path: "/dev/sda".into(),
                bytes: 16 << 26,
                block_bytes: 512,
                attach: incarnation.attach,
                content,
            }],
        }
    }

    pub(super) fn register(&mut self, index: u64, incarnation: Incarnation) -> ConnectionId {
        let registration = self.registration(index, incarnation);
        self.register_as(registration)
    }

    pub(super) fn register_as(&mut self, registration: Registration) -> ConnectionId {
        self.next += 1;
        let connection = ConnectionId(self.next);
        self.connections.insert(registration.node.clone(), connection);
        let cluster = self.manager.map().map(|map| map.cluster);
        self.input(Input::Register { connection, cluster, registration });
        connection
    }

    pub(super) fn say(&mut self, index: u64, message: NodeMessage) {
        let connection = self.connections[&format!("n{index}")];
        self.input(Input::Message { connection, message });
    }

    pub(super) fn adopt(&mut self, index: u64) {
        let version = self.map().version;
        self.say(index, NodeMessage::Adopted { version });
    }

    pub(super) fn ask_stale(&mut self, asker: u64, peer: u16) {
        let (peer, version) = (NodeId(peer), self.map().version);
        self.say(asker, NodeMessage::AskStale { peer, version, cause: "no answer".into() });
    }

    /// Asks under that version; the newest for `None`.
    pub(super) fn ask_syncing(&mut self, asker: u64, peer: u16, version: Option<MapVersion>) {
        let (peer, version) = (NodeId(peer), version.unwrap_or(self.map().version));
        self.say(asker, NodeMessage::AskSyncing { peer, version });
    }

    /// Asks under that version; the newest for `None`.
    pub(super) fn ask_in_sync(&mut self, asker: u64, peer: u16, device: &str, version: Option<MapVersion>) {
        let device = self.map().device_named(device).unwrap().id;
        let (peer, version) = (NodeId(peer), version.unwrap_or(self.map().version));
        self.say(asker, NodeMessage::AskInSync { peer, device, version });
    }

    pub(super) fn disconnect(&mut self, index: u64) {
        let connection = self.connections[&format!("n{index}")];
        self.input(Input::Disconnected { connection });
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.input(Input::Tick);
    }

    pub(super) fn heartbeat(&mut self, index: u64) {
        self.say(index, NodeMessage::Report(NodeReport::default()));
    }

    pub(super) fn failover(&mut self, node: &str) -> OperatorReply {
        self.input(Input::Failover { ticket: Ticket(1), node: node.into() });
        self.replies.pop().unwrap().1
    }

    /// A failover of a node that is away for a moment, and comes back as it was: its copies are stale.
    pub(super) fn failover_while_away(&mut self, index: u64) -> OperatorReply {
        self.disconnect(index);
        let reply = self.failover(&format!("n{index}"));
        self.register(index, incarnation(index));
        reply
    }

    pub(super) fn refusal(&mut self, node: &str) -> String {
        match self.failover(node) {
            OperatorReply::Refused { reason } => reason,
            reply => panic!("{reply:?}"),
        }
    }

    /// The span of a device's first slice.
    pub(super) fn span(&self, device: &str) -> &Span {
        &self.map().device_named(device).unwrap().spans[0]
    }

    /// `n1+ n2-`: the copies of a device's first slice in order, `+` in sync, `~` syncing, `-` stale.
    pub(super) fn copies(&self, device: &str) -> String {
        let parts: Vec<String> = self
            .span(device)
            .replicas
            .iter()
            .map(|replica| {
                let node = self.map().node_name(self.map().node_of(replica.disk).unwrap());
                let state = match replica.state {
                    ReplicaState::InSync => '+',
                    ReplicaState::Syncing => '~',
                    ReplicaState::Stale => '-',
                };
                format!("{node}{state}")
            })
            .collect();
        parts.join(" ")
    }

    /// The devices that a node's present connection was told to export, in order.
    pub(super) fn exports(&self, index: u64) -> Vec<String> {
        let connection = self.connections[&format!("n{index}")];
        self.sent
            .iter()
            .filter(|(to, _)| *to == connection)
            .filter_map(|(_, message)| match message {
                ManagerMessage::Export { device, .. } => Some(self.map().device(*device)?.name.clone()),
                _ => None,
            })
            .collect()
    }
}
