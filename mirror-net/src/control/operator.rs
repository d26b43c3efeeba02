//! What operators ask the manager, and what it answers.

use super::{BroadcastKind, BroadcastStatus, DiskInventory, NodeReport};
use crate::ids::{MapVersion, PlanId, ProcessId};
use crate::map::{Commit, DistributionMap, OnNoQuorum, Topology};
use serde::{Deserialize, Serialize};

/// What `mirrorctl` asks the manager.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OperatorRequest {
    /// Make a cluster of the registered nodes.
    CreateCluster {
        /// The text of the cluster file.
        file: String,
        /// Format over foreign data.
        force: bool,
    },
    /// The map.
    Map,
    /// Everything that `mirrorctl status` shows.
    Status,
    /// Move every role and claim of a node to its partners.
    Failover {
        /// The node's name.
        node: String,
    },
    /// Slices that nobody serves go on from a node's copies that are not in sync.
    Force(ForceOrder),
    /// Pause, resume or cancel a plan.
    Plan {
        /// The plan.
        plan: PlanId,
        /// What is to become of it.
        order: PlanOrder,
    },
    /// Copies are to be elsewhere.
    Redistribute(RedistributionOrder),
    /// A device is made, deleted or changed.
    Device(DeviceOrder),
    /// A disk or a node enters the cluster.
    Enrol(EnrolOrder),
    /// Every store is lost: make the map again from what the nodes have kept.
    Rebuild {
        /// The text of the cluster file.
        file: String,
        /// Nodes that are gone and need not be asked.
        without: Vec<String>,
        /// Store it; else only tell what would be stored.
        install: bool,
    },
    /// Ask all primaries for something.
    Broadcast {
        /// What is wanted.
        kind: BroadcastKind,
        /// `None` to begin; then the number that came with the answer, until it is done.
        id: Option<u64>,
    },
    /// What happened, the oldest first.
    Events {
        /// Only what has a larger number; 0 for all that is remembered.
        after: u64,
    },
}

/// What is to go on by force (docs/protocol.md rule 17).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForceOrder {
    /// The name of the node whose copies are to go on.
    pub node: String,
    /// Names of devices; all that wait if there are none.
    pub devices: Vec<String>,
    /// Names of nodes that are off, by the operator's word.
    pub confirmed_off: Vec<String>,
    /// Do it; else only tell what would be done.
    pub carry_out: bool,
}

/// What enters the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EnrolOrder {
    /// What exactly.
    pub what: Entrant,
    /// Format over foreign data.
    pub force: bool,
    /// Do it; else only tell what would be done.
    pub carry_out: bool,
}

/// A disk or a node that enters.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entrant {
    /// A disk of a node that is there already.
    Disk {
        /// `NODE/DISK`: its node, and the name that it is to have.
        disk: String,
        /// Its path on that node.
        path: String,
        /// Percent of it for the primary, the secondary and the unmirrored segment.
        segments: [u8; 3],
        /// It is to hold nothing until it takes the place of another.
        spare: bool,
    },
    /// A node with all its disks.
    Node {
        /// The text of the cluster file.
        file: String,
        /// Its name there.
        node: String,
    },
}

/// What is to become of a device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceOrder {
    /// Its name.
    pub name: String,
    /// What exactly.
    pub change: DeviceChange,
    /// Do it; else only tell what would be done.
    pub carry_out: bool,
}

/// A change of a device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChange {
    /// It is made.
    Create {
        /// Its size; rounded up to whole slices.
        bytes: u64,
        /// The name of the node that exports it, and on whose disks it is at home.
        node: String,
        /// Copies in all, 1 to 3.
        copies: u8,
        /// When a mirror acknowledges a write.
        commit: Commit,
        /// What becomes of a request that cannot be served.
        on_no_quorum: OnNoQuorum,
    },
    /// It is deleted.
    Delete {
        /// Whoever uses it.
        force: bool,
    },
    /// It is made longer.
    Grow {
        /// Its size from now on; rounded up to whole slices.
        bytes: u64,
    },
    /// What it promises is changed; `None` leaves it.
    Set {
        /// When a mirror acknowledges a write.
        commit: Option<Commit>,
        /// What becomes of a request that cannot be served.
        on_no_quorum: Option<OnNoQuorum>,
    },
}

/// Copies that are to be elsewhere, by a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RedistributionOrder {
    /// What is wished.
    pub wish: Redistribution,
    /// Begin with it; else only tell what would be done.
    pub carry_out: bool,
}

/// Where copies are to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Redistribution {
    /// Not there, so that it is a spare.
    Spare {
        /// `NODE`, for all its disks, or `NODE/DISK`.
        emptied: String,
        /// `NODE` or `NODE/DISK`: where copies may go; all disks that are in use if there are none.
        onto: Vec<String>,
    },
    /// On all disks that are in use, evenly, with primaries at home, as many as each device is to have, and as the
    /// topology has them that was chosen.
    Balance,
    /// As that topology has them.
    Topology {
        /// `None` for whatever the rules of the map allow.
        topology: Option<Topology>,
        /// Copies of every mirrored device from now on; `None` leaves them.
        copies: Option<u8>,
    },
    /// Not on that disk, which leaves the map then.
    RemoveDisk {
        /// `NODE/DISK`.
        disk: String,
        /// `NODE` or `NODE/DISK`: where copies may go; all disks that are in use if there are none.
        onto: Vec<String>,
    },
    /// Not on that node, which leaves the map then with all its disks.
    RemoveNode {
        /// Its name.
        node: String,
        /// As with [`RemoveDisk`](Self::RemoveDisk).
        onto: Vec<String>,
        /// What it exports is exported elsewhere though somebody uses it here.
        force: bool,
    },
    /// So many of one device.
    Copies {
        /// Its name.
        device: String,
        /// 1 to 3, in all.
        copies: u8,
    },
}

/// What an operator wants of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanOrder {
    /// Copy nothing until it is resumed. New writes still reach the new copies.
    Pause,
    /// Go on.
    Resume,
    /// Take back what has not taken its new place yet.
    Cancel,
}

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A node came, went, counts as failed or is back.
    Node,
    /// The map changed.
    Map,
    /// Copies are gone, and there is nowhere to make them again.
    Spare,
}

impl EventKind {
    /// As it is spelt in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Map => "map",
            Self::Spare => "spare",
        }
    }
}

/// Something that happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Larger than that of every event before.
    pub number: u64,
    /// When, by the clock of the manager's machine, as RFC 3339 in UTC.
    pub at: String,
    /// What it is about.
    pub kind: EventKind,
    /// The map that it made, if it made one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<MapVersion>,
    /// What happened, and why; one line.
    pub text: String,
}

/// What the manager answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OperatorReply {
    /// The cluster has been created.
    Created {
        /// Its map.
        map: Box<DistributionMap>,
    },
    /// The map.
    Map {
        /// All of it; `None` before a cluster has been created.
        map: Option<Box<DistributionMap>>,
    },
    /// The cluster's state.
    Status(Box<ClusterStatus>),
    /// The failover is in the map, and which nodes have adopted it.
    FailedOver {
        /// The map version that made it.
        version: MapVersion,
        /// One line for each thing that moved.
        moved: Vec<String>,
        /// What could not move, and why; empty when all went over.
        stayed: Vec<String>,
    },
    /// It is done; one line for each thing.
    Done {
        /// For people.
        lines: Vec<String>,
    },
    /// How far a broadcast is.
    Broadcast(Box<BroadcastStatus>),
    /// What happened.
    Events {
        /// The oldest first.
        events: Vec<Event>,
    },
    /// It was refused; nothing changed.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// This manager decides nothing at this moment, and has not begun with what was asked for.
    NotLeader {
        /// `host:port` of the one that does, if it is known.
        leader: Option<String>,
        /// Why not, for people.
        why: String,
    },
}

/// All that the manager knows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The map; `None` before a cluster has been created.
    pub map: Option<DistributionMap>,
    /// Every node that is in the map or has registered.
    pub nodes: Vec<NodeStatus>,
    /// What is not as it should be, the worst first.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It passes by itself.
    Note,
    /// Everything can be read and written, with less protection than wanted.
    Degraded,
    /// Some data cannot be read or written now.
    Unavailable,
}

/// Something that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The device that it is about, if it is about one.
    pub device: Option<String>,
    /// The node that it is about or that it waits for, if it is one.
    pub node: Option<String>,
    /// What is the matter, for people.
    pub what: String,
    /// What to do or to type; empty if nothing helps but time.
    pub todo: String,
}

/// A node as the manager sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Whether it is connected and heard of within [`SILENCE_MS`](super::SILENCE_MS).
    pub up: bool,
    /// Its process, if it has registered since the manager started.
    pub process: Option<ProcessId>,
    /// The newest map version that it has durably adopted, if it has registered.
    #[serde(default)]
    pub adopted: MapVersion,
    /// Its disks, if it has registered.
    pub disks: Vec<DiskInventory>,
    /// Its last report.
    pub report: Option<NodeReport>,
}
