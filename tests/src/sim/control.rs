//! The system manager as it is in the product, its store, and the control connections to it.
//!
//! The fault model. The manager's process dies at any time and forgets everything; the store keeps
//! every map that was stored and the numbers given to exporters. A write to the store is a
//! compare-and-swap on the version that takes a while; one that was under way when the manager died
//! still happens. Somebody else may change the map in the store. Messages of one connection and
//! direction arrive in order, after a delay; in silence they wait; with the connection they are lost.

use mirror_net::config::{NodePolicy, Pace, Policy, Tolerance};
use mirror_net::control::{Life, ManagerMessage, NodeMessage, Registration};
use mirror_net::ids::{ClaimGeneration, DiskId, ExporterSession, MapVersion};
use mirror_net::manager::{ConnectionId, Manager};
use mirror_net::map::DistributionMap;
use mirror_net::map::verbs::Verb;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// What a node's agent says.
#[derive(Debug)]
pub enum Word {
    /// At first.
    Register(Registration),
    /// Then.
    Message(NodeMessage),
}

/// One connection of a node's agent.
#[derive(Debug, Default)]
pub struct Link {
    /// Whose.
    pub node: u16,
    /// Of which process.
    pub process: u64,
    /// To the manager.
    pub up: VecDeque<Word>,
    /// From the manager.
    pub down: VecDeque<ManagerMessage>,
}

/// What a node's agent remembers.
#[derive(Debug, Default)]
pub struct Agent {
    /// The newest map that any process of the node was sent; it is kept on stable storage.
    pub kept: MapVersion,
    /// What its processes adopted; on stable storage as well.
    pub lives: Vec<Life>,
    /// Its connection.
    pub connection: Option<u64>,
    /// Disks that failed.
    pub failed: Vec<(DiskId, String)>,
    /// Claims that it was allowed to export under, by device.
    pub allowed: BTreeMap<u32, ClaimGeneration>,
}

impl Agent {
    /// Another process: what was in memory is gone.
    pub fn restart(&mut self) {
        let lives = std::mem::take(&mut self.lives);
        *self = Self { kept: self.kept, lives, ..Self::default() };
    }
}

/// Whether a copy whose disk hangs, or is very slow, is gone on without.
pub fn is_impatient(seed: u64) -> bool {
    (seed / 31).is_multiple_of(2)
}

/// What the manager does by itself: spares are wanted soon, for schedules are short. Of the paces one lets hosts press
/// resyncs as far as they can, one is slow: a device takes half a second.
fn policy(seed: u64) -> Policy {
    let default = Policy::default();
    let pace = match seed / 7 % 4 {
        0 => Pace { rate: Some(1 << 20), floor: 256 << 10 },
        1 => Pace { rate: None, floor: 0 },
        _ => default.node.pace,
    };
    let tolerance = Tolerance {
        slow_after: Duration::from_millis(500),
        stale_after: is_impatient(seed).then_some(Tolerance::STALE_AFTER_MIN),
        hold_max: Duration::from_secs(2),
    };
    let node = NodePolicy { pace, tolerance, no_quorum_after: Duration::from_millis(2_500) };
    // Where nothing else is to be done; and hardly ever in the others.
    let soon = (seed / 3).is_multiple_of(3);
    let after = |ms: u64| if soon { Duration::from_millis(ms) } else { Duration::from_secs(600) };
    Policy {
        spare_after: Duration::from_secs(4),
        spread_after: Some(after(1_000)),
        rebalance_after: after(1_500),
        rebalance_above: Some(10),
        node,
        ..default
    }
}

/// The manager and its store.
pub struct Control {
    /// The newest map in the store.
    pub map: Arc<DistributionMap>,
    /// Every map there was, by version.
    pub history: BTreeMap<u64, Arc<DistributionMap>>,
    /// The manager, if it runs.
    pub core: Option<Manager>,
    /// Counts the manager's processes.
    pub life: u64,
    /// A proposal of this process is on its way to the store.
    pub storing: bool,
    /// Connections to this process.
    pub links: BTreeMap<u64, Link>,
    policy: Policy,
    sessions: u64,
    connections: u64,
}

impl Control {
    /// A manager that has just started on a store with that map; the seed decides on its policy.
    pub fn new(map: DistributionMap, seed: u64) -> Self {
        let mut control = Self {
            history: BTreeMap::from([(map.version.0, Arc::new(map.clone()))]),
            map: Arc::new(map),
            core: None,
            life: 0,
            storing: false,
            links: BTreeMap::new(),
            policy: policy(seed),
            sessions: 0,
            connections: 0,
        };
        control.start();
        control
    }

    /// Starts the manager with what is stored.
    pub fn start(&mut self) {
        if self.core.is_none() {
            self.life += 1;
            self.core = Some(Manager::new(Some((*self.map).clone()), self.policy));
        }
    }

    /// The manager dies; who was connected.
    pub fn kill(&mut self) -> BTreeMap<u64, Link> {
        self.core = None;
        self.storing = false;
        std::mem::take(&mut self.links)
    }

    /// A number for an exporter, larger than every one before.
    pub fn exporter_session(&mut self) -> ExporterSession {
        self.sessions += 1;
        ExporterSession(self.sessions)
    }

    /// A connection of that process.
    pub fn connect(&mut self, node: u16, process: u64) -> u64 {
        self.connections += 1;
        self.links.insert(self.connections, Link { node, process, ..Link::default() });
        self.connections
    }

    /// Stores a map if it follows the one that is stored.
    pub fn store(&mut self, base: Option<MapVersion>, next: DistributionMap) -> bool {
        if base != Some(self.map.version) {
            return false;
        }
        let next = Arc::new(next);
        self.history.insert(next.version.0, Arc::clone(&next));
        self.map = next;
        true
    }

    /// Somebody else changes the stored map.
    pub fn change(&mut self, batch: &[Verb]) -> bool {
        let Ok(Some(next)) = self.map.apply(batch) else { return false };
        self.store(Some(self.map.version), next)
    }

    /// The manager's name for a connection.
    pub fn id(connection: u64) -> ConnectionId {
        ConnectionId(connection)
    }
}
