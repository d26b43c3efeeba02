//! The shipped manager and the shipped map behind an abstract state.
//!
//! A model holds the map in a few bytes. To learn what the manager makes of it, a real
//! [`DistributionMap`] is built from them, a real [`Manager`] hears the registrations and the
//! question, and the map that it wants stored is what the model goes on with. What follows depends
//! on nothing else (the manager promises that itself), so every model remembers the answers.

use mirror_net::config::Policy;
use mirror_net::control::{DiskContent, DiskInventory, ManagerMessage, NodeMessage, Registration};
use mirror_net::ids::{
    AttachId, ClusterId, DeviceId, DiskId, ExporterSession, Incarnation, MapVersion, NodeId, ProcessId,
    SliceIndex,
};
use mirror_net::manager::{ConnectionId, Input, Manager, Output, Ticket};
use mirror_net::map::verbs::{Run, Verb};
use mirror_net::map::{
    Claim, Commit, Device, Disk, DistributionMap, Node, OnNoQuorum, ReplicaState, SegmentSlots, Span,
};

/// The device that every model is about.
pub const DEVICE: DeviceId = DeviceId(1);

/// What the manager has heard of one node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Heard {
    /// The incarnation of its disk, as registered.
    pub incarnation: Incarnation,
    /// Whether its connection is open.
    pub connected: bool,
    /// The newest map that it said it adopted.
    pub adopted: MapVersion,
}

/// What the manager is asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Question {
    /// Nothing: what does it do by itself?
    Repair,
    /// `asker` wants the copies of `peer` recorded stale.
    Stale {
        /// A primary, index of its node.
        asker: usize,
        /// The other node's index.
        peer: usize,
    },
    /// The operator moves everything away from a node.
    Failover {
        /// Its index.
        node: usize,
    },
    /// The operator hands a slice over to a member, and nobody becomes stale by it.
    HandOver {
        /// The slice.
        slice: u32,
        /// The member's index.
        to: usize,
    },
    /// The claim moves.
    MoveClaim {
        /// The new exporter's index.
        to: usize,
    },
    /// A primary wants a stale copy filled.
    Syncing {
        /// The slice.
        slice: u32,
        /// The copy's node.
        peer: usize,
    },
    /// A primary says that a copy has everything.
    InSync {
        /// The slice.
        slice: u32,
        /// The copy's node.
        peer: usize,
        /// The incarnation in which it has it.
        incarnation: Incarnation,
    },
}

/// The id of the node, and of its disk, with that index.
pub fn node_id(index: usize) -> NodeId {
    NodeId(index as u16 + 1)
}

/// The disk of the node with that index.
pub fn disk_id(index: usize) -> DiskId {
    DiskId(index as u32 + 1)
}

/// The index of the node that has that disk.
pub fn index_of(disk: DiskId) -> usize {
    disk.0 as usize - 1
}

/// A map of `nodes` nodes with a disk each, and one device with those spans.
pub fn map_of(nodes: usize, version: MapVersion, claim: Claim, spans: Vec<Span>) -> DistributionMap {
    let slots = SegmentSlots { primary: 4, secondary: 4, unmirrored: 0 };
    let node = |index| Node {
        id: node_id(index),
        name: format!("n{}", index + 1),
        address: "127.0.0.1:1".into(),
        power: None,
        switch: None,
    };
    let disk = |index| Disk {
        id: disk_id(index),
        node: node_id(index),
        name: "d".into(),
        slots,
        block_bytes: 512,
        spare: false,
        failed: None,
    };
    DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "model".into(),
        version,
        slice_bytes: 64 << 20,
        nodes: (0..nodes).map(node).collect(),
        disks: (0..nodes).map(disk).collect(),
        devices: vec![Device {
            id: DEVICE,
            name: "d".into(),
            slices: spans.iter().map(|span| span.count).sum(),
            block_bytes: 512,
            copies: spans[0].replicas.len() as u8,
            commit: Commit::Immediate,
            on_no_quorum: OnNoQuorum::Wait,
            claim,
            spans,
        }],
        ..DistributionMap::empty()
    }
}

/// The map that the manager stores in answer to `question`; `None` if it changes nothing.
pub fn decide(map: &DistributionMap, heard: &[Heard], question: Question) -> Option<DistributionMap> {
    let apply = |batch: &[Verb]| map.apply(batch).expect("only what is allowed is asked for");
    let run = |slice| Run { device: DEVICE, first: SliceIndex(slice), count: 1 };
    let mark = |slice, peer, state, incarnation| Verb::Mark {
        run: run(slice),
        disk: disk_id(peer),
        state,
        incarnation: Some(incarnation),
    };
    match question {
        Question::HandOver { slice, to } => apply(&[Verb::Promote { run: run(slice), disk: disk_id(to) }]),
        Question::MoveClaim { to } => apply(&[Verb::MoveClaim { device: DEVICE, node: node_id(to) }]),
        Question::Syncing { slice, peer } => {
            apply(&[mark(slice, peer, ReplicaState::Syncing, heard[peer].incarnation)])
        }
        Question::InSync { slice, peer, incarnation } => {
            apply(&[mark(slice, peer, ReplicaState::InSync, incarnation)])
        }
        Question::Repair => stored(&mut manager(map, heard)),
        Question::Stale { asker, peer } => {
            let mut manager = manager(map, heard);
            let message =
                NodeMessage::AskStale { peer: node_id(peer), version: map.version, cause: "lost".into() };
            manager.handle(0, Input::Message { connection: connection(asker), message });
            stored(&mut manager)
        }
        Question::Failover { node } => {
            let mut manager = manager(map, heard);
            manager.handle(0, Input::Failover { ticket: Ticket(0), node: format!("n{}", node + 1) });
            stored(&mut manager)
        }
    }
}

/// Whether the manager lets the holder of the claim export the device.
pub fn may_export(map: &DistributionMap, heard: &[Heard]) -> bool {
    let mut manager = manager(map, heard);
    let granted =
        |output: Output| matches!(output, Output::Send { message: ManagerMessage::Export { .. }, .. });
    std::iter::from_fn(|| manager.poll()).any(granted)
}

fn connection(index: usize) -> ConnectionId {
    ConnectionId(index as u64)
}

/// A manager that has heard all that, and has the map last: it decides about the whole of it at once.
fn manager(map: &DistributionMap, heard: &[Heard]) -> Manager {
    let mut manager = Manager::new(None, Policy::MANUAL);
    for (index, node) in heard.iter().enumerate() {
        let disk = DiskInventory {
            name: "d".into(),
            path: "/dev/null".into(),
            bytes: 1 << 30,
            block_bytes: 512,
            attach: node.incarnation.attach,
            content: DiskContent::Ours { cluster: map.cluster, disk: disk_id(index) },
        };
        let registration = Registration {
            lives: Vec::new(),
            node: format!("n{}", index + 1),
            process: node.incarnation.process,
            adopted: MapVersion(0),
            address: "127.0.0.1:1".into(),
            disks: vec![disk],
        };
        let connection = connection(index);
        manager.handle(0, Input::Register { connection, cluster: Some(map.cluster), registration });
        manager.handle(0, Input::Session { connection, session: ExporterSession(index as u64 + 1) });
        if !node.connected {
            manager.handle(0, Input::Disconnected { connection });
        }
    }
    while manager.poll().is_some() {}
    manager.handle(0, Input::Conflict { newest: Some(Box::new(map.clone())) });
    for (index, node) in heard.iter().enumerate().filter(|(_, node)| node.connected) {
        let message = NodeMessage::Adopted { version: node.adopted };
        manager.handle(0, Input::Message { connection: connection(index), message });
    }
    manager
}

fn stored(manager: &mut Manager) -> Option<DistributionMap> {
    std::iter::from_fn(|| manager.poll()).find_map(|output| match output {
        Output::Store(proposal) => Some(*proposal.next),
        _ => None,
    })
}

/// An incarnation of small numbers.
pub fn incarnation(attach: u8, process: u8) -> Incarnation {
    Incarnation { attach: AttachId(attach.into()), process: ProcessId(process.into()) }
}
