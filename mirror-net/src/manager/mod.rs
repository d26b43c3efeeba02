//! The system manager's decisions, without I/O.
//!
//! [`Manager`] owns the distribution map and what it has heard from the nodes. It is called with
//! [`Manager::handle`] and asked with [`Manager::poll`]. It never acts on a map that is not stored:
//! a change is a [`Proposal`], and only [`Input::Stored`] makes it the map that is sent to anybody.
//!
//! Decisions are a function of the map and the registrations of this moment, not of the event that
//! came last. A manager that was restarted therefore decides the same as soon as the nodes have
//! registered with it again; until then it knows nothing about them, and waits.
//!
//! The rules are those of the replication protocol: an incarnation that differs from the map's is
//! not what the map says ([`repair`], rules 3 to 5); only the present primary has its partner
//! recorded stale ([`stale`], rule 1), and has it back ([`join`], rules 3, 6 and 7); a device is exported when every primary knows its claim
//! ([`export`], rule 15).
//!
//! Where copies are to be elsewhere an operator says so ([`redistribution`]).
//!
//! What an operator could do it does by itself where the [policy](crate::config::Policy) says so: a node
//! that failed ([`detector`]) is failed over, copies that are gone for long are made again on a spare
//! ([`regeneration`]), and plans go on ([`advance`]).

pub mod advance;
mod ask;
mod broadcast;
mod copies;
mod core;
mod create;
pub mod detector;
mod devices;
mod enrolment;
mod evening;
pub mod export;
pub mod failover;
pub mod findings;
pub mod force;
pub mod join;
mod making;
mod newcomer;
mod rebuild;
pub mod redistribution;
pub mod regeneration;
pub mod registry;
pub mod repair;
mod retiring;
mod settle;
mod spreading;
pub mod stale;
#[cfg(test)]
mod tests;
pub mod watch;

pub use self::core::Manager;

use self::registry::{Registry, Standing};
use crate::config::ClusterFile;
use crate::control::{
    BroadcastKind, DeviceOrder, EnrolOrder, EventKind, ForceOrder, ManagerMessage, NodeMessage,
    OperatorReply, PlanOrder, RedistributionOrder, Registration,
};
use crate::ids::{ClusterId, DeviceId, DiskId, ExporterSession, MapVersion, PlanId};
use crate::map::verbs::{Run, Verb};
use crate::map::{Device, DistributionMap, Node, Replica, ReplicaState, Span};

/// Names one connection of a node's agent; never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnectionId(pub u64);

/// Names one request of an operator, so that its answer finds the way back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// What happens to a manager.
#[derive(Clone, Debug)]
pub enum Input {
    /// A node introduces itself.
    Register {
        /// Its connection.
        connection: ConnectionId,
        /// The cluster that it says it belongs to, from the handshake.
        cluster: Option<ClusterId>,
        /// What it says.
        registration: Registration,
    },
    /// The answer to [`Output::GiveSession`]: this number is stored and will not be given again.
    Session {
        /// The connection it is for.
        connection: ConnectionId,
        /// Larger than every one before.
        session: ExporterSession,
    },
    /// Any message of a node but its registration.
    Message {
        /// Its connection.
        connection: ConnectionId,
        /// What it says.
        message: NodeMessage,
    },
    /// A node's connection is gone.
    Disconnected {
        /// The connection.
        connection: ConnectionId,
    },
    /// An operator wants a cluster made.
    Create {
        /// Where the answer goes.
        ticket: Ticket,
        /// The cluster file.
        file: Box<ClusterFile>,
        /// Drawn at random for this request.
        cluster: ClusterId,
        /// Format over foreign data.
        force: bool,
    },
    /// An operator wants everything moved away from a node.
    Failover {
        /// Where the answer goes.
        ticket: Ticket,
        /// The node's name.
        node: String,
    },
    /// An operator wants slices that nobody serves to go on from copies that are not in sync.
    Force {
        /// Where the answer goes.
        ticket: Ticket,
        /// What exactly.
        order: ForceOrder,
    },
    /// An operator wants a plan paused, resumed or given up.
    Plan {
        /// Where the answer goes.
        ticket: Ticket,
        /// The plan.
        plan: PlanId,
        /// What is to become of it.
        order: PlanOrder,
    },
    /// An operator wants copies to be elsewhere.
    Redistribute {
        /// Where the answer goes.
        ticket: Ticket,
        /// Where exactly.
        order: RedistributionOrder,
    },
    /// An operator wants a device made, deleted or changed.
    Device {
        /// Where the answer goes.
        ticket: Ticket,
        /// What exactly.
        order: DeviceOrder,
    },
    /// An operator wants a disk or a node to enter the cluster.
    Enrol {
        /// Where the answer goes.
        ticket: Ticket,
        /// What exactly.
        order: EnrolOrder,
    },
    /// An operator wants the map made again from what the nodes have kept.
    Rebuild {
        /// Where the answer goes.
        ticket: Ticket,
        /// The cluster file.
        file: Box<ClusterFile>,
        /// Nodes that are gone.
        without: Vec<String>,
        /// Store it; else only tell what would be stored.
        install: bool,
    },
    /// An operator wants all primaries asked, or asks how far that is.
    Broadcast {
        /// Where the answer goes.
        ticket: Ticket,
        /// What they are asked for.
        kind: BroadcastKind,
        /// Its number; drawn at random for one that begins.
        id: u64,
        /// Whether it begins.
        begins: bool,
    },
    /// The proposal is stored.
    Stored {
        /// Its version.
        version: MapVersion,
    },
    /// The proposal was not stored: the store holds another map, which is now ours.
    Conflict {
        /// What the store holds.
        newest: Option<Box<DistributionMap>>,
    },
    /// Time passed: to be fed several times a second.
    Tick,
}

/// What a manager wants done, in this order.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// Store this if the store still holds its base; answered with [`Input::Stored`] or
    /// [`Input::Conflict`]. There is never more than one outstanding.
    Store(Proposal),
    /// Make an exporter session larger than any before durable, then feed [`Input::Session`].
    GiveSession {
        /// For this connection.
        connection: ConnectionId,
    },
    /// Send to a node.
    Send {
        /// Its connection.
        connection: ConnectionId,
        /// What.
        message: ManagerMessage,
    },
    /// Close the connection once what was sent before is out.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Answer an operator.
    Reply {
        /// Whose request.
        ticket: Ticket,
        /// The answer.
        reply: OperatorReply,
    },
    /// Something that belongs into the log.
    Log(String),
    /// Something that belongs into the log, and that an operator may want to know later. What a
    /// proposal changes is told by [`Proposal::why`] and not here.
    Event(EventKind, String),
}

/// A change of the map, to be stored by compare-and-swap on the version.
#[derive(Clone, PartialEq, Debug)]
pub struct Proposal {
    /// The version it replaces; `None` for a cluster's first map.
    pub base: Option<MapVersion>,
    /// The steps; empty for a cluster's first map.
    pub batch: Vec<Verb>,
    /// The map after them.
    pub next: Box<DistributionMap>,
    /// One line for each thing that changes and why, for the log and the history.
    pub why: Vec<String>,
}

/// A batch of verbs with the reasons for them.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Change {
    /// The steps.
    pub batch: Vec<Verb>,
    /// One line each.
    pub why: Vec<String>,
}

impl Change {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }
}

/// The run of slices that a span covers.
fn run_of(device: DeviceId, span: &Span) -> Run {
    Run { device, first: span.first, count: span.count }
}

/// The steps that make `disk` the primary of a span.
///
/// The map then names the incarnation that it has now: as a secondary it was compared on its
/// attachment alone, as a primary it is compared on its process too (rule 3).
///
/// Members that are there stay members, the old primary too if it is alive: what they may have of its
/// last writes the new primary makes equal before anybody reads it (rule 11). Writes of an exporter that
/// lost its claim are not among them once another begins, for that waits until every member has adopted
/// the claim ([`export`], rule 15). The rest becomes stale, and the new primary has it back as soon as it
/// reaches it ([`join`]).
fn promotion(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    span: &Span,
    run: Run,
    disk: DiskId,
) -> Vec<Verb> {
    let mut batch = vec![Verb::Promote { run, disk }];
    let listed = span.replica_on(disk).map(|replica| replica.incarnation);
    let node = map.node_of(disk).and_then(|id| map.node(id)).and_then(|node| registry.get(&node.name));
    let incarnation = node.and_then(|node| node.incarnation(map.cluster, disk));
    if incarnation.is_some() && incarnation != listed {
        batch.push(Verb::Mark { run, disk, state: ReplicaState::InSync, incarnation });
    }
    let state = ReplicaState::Stale;
    let left = map
        .device(run.device)
        .into_iter()
        .flat_map(|device| left_behind(map, registry, now_ms, device, span, disk));
    batch.extend(left.map(|other| Verb::Mark { run, disk: other.disk, state, incarnation: None }));
    batch
}

/// The node that an operator names, or a sentence with those that there are.
fn node_named<'a>(map: &'a DistributionMap, name: &str) -> Result<&'a Node, String> {
    map.node_named(name).ok_or_else(|| {
        let names: Vec<&str> = map.nodes.iter().map(|node| node.name.as_str()).collect();
        format!("there is no node {name:?}; the nodes are {}", names.join(", "))
    })
}

/// The copies that become stale when `disk` is promoted.
fn left_behind<'a>(
    map: &'a DistributionMap,
    registry: &'a Registry,
    now_ms: u64,
    device: &'a Device,
    span: &'a Span,
    disk: DiskId,
) -> impl Iterator<Item = &'a Replica> {
    span.replicas.iter().filter(move |other| {
        let stays = other.state == ReplicaState::InSync
            && registry.standing(map, device, span, other, now_ms) == Standing::Intact;
        other.disk != disk && other.state != ReplicaState::Stale && !stays
    })
}

/// The copies that a promotion makes stale, for people; nothing if there are none.
fn left_behind_text(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    device: &Device,
    span: &Span,
    disk: DiskId,
) -> String {
    let left = left_behind(map, registry, now_ms, device, span, disk);
    let names: Vec<String> = left.map(|other| map.disk_name(other.disk)).collect();
    if names.is_empty() {
        return String::new();
    }
    format!("; stale until resynced: {}", names.join(", "))
}

/// Runs of slices of one device for people: `slices 0-7, 12`; nothing for the whole of it.
fn slices_text(runs: &[(u32, u32)], slices: u32) -> String {
    let mut joined: Vec<(u32, u32)> = Vec::new();
    for (first, end) in runs {
        match joined.last_mut() {
            Some(last) if last.1 == *first => last.1 = *end,
            _ => joined.push((*first, *end)),
        }
    }
    if joined == [(0, slices)] {
        return String::new();
    }
    let parts: Vec<String> = joined
        .into_iter()
        .map(|(first, end)| if end == first + 1 { first.to_string() } else { format!("{first}-{}", end - 1) })
        .collect();
    format!(" slices {}", parts.join(", "))
}

/// Collects what happens to the spans of a device, and says it once for equal ones.
#[derive(Default)]
struct Lines {
    /// By text, in the order of its first occurrence.
    entries: Vec<(String, Vec<(u32, u32)>)>,
}

impl Lines {
    fn add(&mut self, span: &Span, text: String) {
        let range = (span.first.0, span.end());
        match self.entries.iter_mut().find(|(other, _)| *other == text) {
            Some((_, runs)) => runs.push(range),
            None => self.entries.push((text, vec![range])),
        }
    }

    /// `NAME slices 0-7: TEXT`.
    fn finish(self, name: &str, slices: u32) -> impl Iterator<Item = String> {
        let name = name.to_owned();
        self.entries
            .into_iter()
            .map(move |(text, runs)| format!("{name}{}: {text}", slices_text(&runs, slices)))
    }
}
