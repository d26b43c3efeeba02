//! What the nodes have said to this manager since it started.

use super::ConnectionId;
use crate::control::{DiskContent, DiskInventory, Life, NodeReport, Registration, SILENCE_MS};
use crate::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, ExporterSession, Incarnation, MapVersion, ProcessId,
};
use crate::map::{Commit, Device, DistributionMap, Replica, Span};
use std::collections::{BTreeMap, BTreeSet};

/// A node that has registered; kept when its connection goes, since what it said of its
/// incarnation stays true.
#[derive(Clone, Debug)]
pub struct Registered {
    /// Its newest connection.
    pub connection: ConnectionId,
    /// Whether that is open.
    pub connected: bool,
    /// When it last said anything.
    pub heard_ms: u64,
    /// Its process.
    pub process: ProcessId,
    /// The newest map version that it has durably adopted.
    pub adopted: MapVersion,
    /// Where it listens for other nodes.
    pub address: String,
    /// Its disks.
    pub disks: Vec<DiskInventory>,
    /// What its processes had adopted when it registered.
    pub lives: Vec<Life>,
    /// Since when it has had those of ours, and no others, whatever it was connected by.
    pub disks_since_ms: u64,
    /// Given once stored; before that the node is sent nothing.
    pub session: Option<ExporterSession>,
    /// Its last report.
    pub report: Option<NodeReport>,
    /// The claims that it has been told to export under.
    pub exported: BTreeMap<DeviceId, ClaimGeneration>,
}

impl Registered {
    /// Whether it is connected and has been heard of lately.
    pub fn is_up(&self, now_ms: u64) -> bool {
        self.connected && now_ms.saturating_sub(self.heard_ms) <= SILENCE_MS
    }

    /// The incarnation of one of its disks; `None` if it does not have that disk.
    pub fn incarnation(&self, cluster: ClusterId, disk: DiskId) -> Option<Incarnation> {
        let ours = DiskContent::Ours { cluster, disk };
        let mut found = self.disks.iter().filter(|inventory| inventory.content == ours);
        let first = found.next()?;
        // Two disks that carry the same id are copies of each other: nobody knows which one is it.
        found.next().is_none().then_some(Incarnation { attach: first.attach, process: self.process })
    }
}

/// How a copy stands compared to what the map says of it (rule 3).
///
/// A primary is compared on attachment and process, since its process's memory is what orders
/// writes; a secondary on its attachment alone, where what it acknowledged is on its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Its node has not registered since the manager started: nothing is known.
    Unknown,
    /// It was what the map says when last heard of; its node is silent or not connected.
    Away,
    /// It is what the map says, and its node is up.
    Intact,
    /// It has another incarnation.
    Changed {
        /// Whether its node is up.
        up: bool,
        /// The incarnation it has now.
        now: Incarnation,
        /// Its attachment differs: what was only in caches is gone.
        power_lost: bool,
        /// Its disk has all that it ever acknowledged.
        whole: bool,
    },
    /// Its disk has failed, or its node registered without it.
    Gone,
}

/// All nodes that have registered, by name.
#[derive(Clone, Default, Debug)]
pub struct Registry {
    nodes: BTreeMap<String, Registered>,
    /// Failures reported and perhaps not yet in the map.
    failed: BTreeMap<DiskId, String>,
}

impl Registry {
    /// The node with that name.
    pub fn get(&self, name: &str) -> Option<&Registered> {
        self.nodes.get(name)
    }

    /// Every node that has registered.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Registered)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Registered)> {
        self.nodes.iter_mut().map(|(name, node)| (name.as_str(), node))
    }

    /// The node whose newest connection that is.
    pub fn by_connection(&self, connection: ConnectionId) -> Option<(&str, &Registered)> {
        self.iter().find(|(_, node)| node.connection == connection && node.connected)
    }

    pub(super) fn by_connection_mut(&mut self, connection: ConnectionId) -> Option<(&str, &mut Registered)> {
        self.iter_mut().find(|(_, node)| node.connection == connection && node.connected)
    }

    /// Whether the node is connected and has been heard of lately.
    pub fn is_up(&self, name: &str, now_ms: u64) -> bool {
        self.get(name).is_some_and(|node| node.is_up(now_ms))
    }

    /// Disks that nodes have reported as failed, with the reason.
    pub fn failed(&self) -> &BTreeMap<DiskId, String> {
        &self.failed
    }

    pub(super) fn disk_failed(&mut self, disk: DiskId, reason: String) {
        self.failed.entry(disk).or_insert(reason);
    }

    /// Nobody holds it at that node any more.
    pub(super) fn disk_released(&mut self, node: &str, disk: DiskId) {
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.disks.retain(|inventory| our_disk(inventory) != Some(disk));
        }
    }

    /// Enters a registration, in place of an older one of the same node, whose connection is returned.
    pub(super) fn enter(
        &mut self,
        now_ms: u64,
        connection: ConnectionId,
        registration: Registration,
    ) -> Option<ConnectionId> {
        let Registration { node, process, adopted, address, disks, lives } = registration;
        let ours =
            |disks: &[DiskInventory]| -> BTreeSet<DiskId> { disks.iter().filter_map(our_disk).collect() };
        let same = |old: &&Registered| ours(&old.disks) == ours(&disks);
        let disks_since_ms = self.nodes.get(&node).filter(same).map_or(now_ms, |old| old.disks_since_ms);
        let entry = Registered {
            connection,
            connected: true,
            heard_ms: now_ms,
            process,
            adopted,
            address,
            disks,
            lives,
            disks_since_ms,
            session: None,
            report: None,
            exported: BTreeMap::new(),
        };
        let old = self.nodes.insert(node, entry)?;
        (old.connected && old.connection != connection).then_some(old.connection)
    }

    /// Forgets who is not connected and has no place in the map.
    pub(super) fn forget_strangers(&mut self, map: &DistributionMap) {
        self.nodes.retain(|name, node| node.connected || map.node_named(name).is_some());
    }

    /// How a copy of a span stands at this moment, in the role that the span gives it.
    pub fn standing(
        &self,
        map: &DistributionMap,
        device: &Device,
        span: &Span,
        replica: &Replica,
        now_ms: u64,
    ) -> Standing {
        let Some(disk) = map.disk(replica.disk).filter(|_| !self.has_failed(map, replica.disk)) else {
            return Standing::Gone;
        };
        let Some(node) = map.node(disk.node).and_then(|node| self.get(&node.name)) else {
            return Standing::Unknown;
        };
        let Some(now) = node.incarnation(map.cluster, disk.id) else { return Standing::Gone };
        let up = node.is_up(now_ms);
        let power_lost = now.attach != replica.incarnation.attach;
        let in_memory = device.lives_in_memory(span, replica.disk);
        if power_lost || (in_memory && now != replica.incarnation) {
            return Standing::Changed {
                up,
                now,
                power_lost,
                whole: !power_lost && stored_all(device, span, replica, node),
            };
        }
        if up { Standing::Intact } else { Standing::Away }
    }

    /// The present incarnation of a disk that could take writes now: its node is up and has it, and
    /// it has not failed.
    pub fn usable(&self, map: &DistributionMap, disk: DiskId, now_ms: u64) -> Option<Incarnation> {
        let node = map.node_of(disk).and_then(|id| map.node(id)).and_then(|node| self.get(&node.name))?;
        node.incarnation(map.cluster, disk).filter(|_| node.is_up(now_ms) && !self.has_failed(map, disk))
    }

    /// Whether a disk has failed, whether that is in the map yet or not.
    pub fn has_failed(&self, map: &DistributionMap, disk: DiskId) -> bool {
        self.failed.contains_key(&disk) || map.disk(disk).is_some_and(|disk| disk.failed.is_some())
    }

    /// Judges a registration before it is entered.
    pub fn admit(
        &self,
        map: Option<&DistributionMap>,
        cluster: Option<ClusterId>,
        registration: &Registration,
        now_ms: u64,
    ) -> Result<(), Refusal> {
        let name = &registration.node;
        let Some(map) = map else { return Ok(()) };
        if let Some(other) = cluster.filter(|cluster| *cluster != map.cluster) {
            return Err(Refusal::Wrong(format!(
                "node {name} belongs to cluster {other}, this manager's cluster {} is {}: check `manager` in its \
                 cluster file, or give the node an empty state directory if the other cluster is history",
                map.cluster_name, map.cluster
            )));
        }
        let own = own_disks(map, registration);
        // Of a node without a disk of ours nobody knows which cluster's map it has adopted.
        if registration.adopted > map.version && (cluster.is_some() || own) {
            return Err(Refusal::Outdated(outdated(name, registration.adopted, map.version)));
        }
        if own {
            return Ok(());
        }
        let stranger = map.node_named(name).is_none();
        for disk in &registration.disks {
            if let DiskContent::Ours { cluster, disk: id } = disk.content {
                // A newcomer's may hold what nobody needs: whoever takes it in decides about that.
                if cluster == map.cluster && map.has_left(id) || cluster != map.cluster && stranger {
                    continue;
                }
                let what = if cluster == map.cluster {
                    format!("is {}, and no disk of {name} is there", map.disk_name(id))
                } else {
                    format!(
                        "belongs to cluster {cluster}, not to {} ({}), and no other disk of the node belongs here",
                        map.cluster_name, map.cluster
                    )
                };
                return Err(Refusal::Wrong(format!(
                    "node {name}: disk {} ({}) {what}: check --node and the paths in the cluster file",
                    disk.name, disk.path
                )));
            }
        }
        // A second daemon started by mistake finds the disks in use; it must not push out the first.
        match self.get(name) {
            Some(old) if stranger && old.is_up(now_ms) && old.process != registration.process => {
                Err(Refusal::Wrong(format!(
                    "node {name}, which is no part of the cluster yet, is connected already: a second ublk-server for it seems \
                     to have been started; stop one of the two"
                )))
            }
            Some(old) if old.is_up(now_ms) && old.process != registration.process && old.has_disks(map) => {
                Err(Refusal::Wrong(format!(
                    "node {name} is already connected, with its disks, and the newcomer has none of them: a second \
                     ublk-server for it seems to have been started; stop one of the two"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// What to do about a node that the map does not know.
pub(super) fn waits(map: &DistributionMap, name: &str) -> String {
    let names: Vec<&str> = map.nodes.iter().map(|node| node.name.as_str()).collect();
    format!(
        "node {name} is no part of cluster {}, whose nodes are {}: it waits for `mirrorctl node add {name}`; if it was removed, \
         disable ublk-server there",
        map.cluster_name,
        names.join(", ")
    )
}

fn our_disk(inventory: &DiskInventory) -> Option<DiskId> {
    match inventory.content {
        DiskContent::Ours { disk, .. } => Some(disk),
        _ => None,
    }
}

/// Why a node is not let in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It is not one of ours: it is told so.
    Wrong(String),
    /// It knows a newer map than we do. The fault is ours, so it is not told to stop: it goes on
    /// without us.
    Outdated(String),
}

/// What an operator is told when a node knows a newer map than the manager.
pub(super) fn outdated(node: &str, theirs: MapVersion, ours: MapVersion) -> String {
    format!(
        "node {node} works with map {theirs}, the manager's newest is {ours}: the manager's state directory is older \
         than the cluster"
    )
}

/// Whether any disk of a registration is one that the map has on that node.
pub(super) fn own_disks(map: &DistributionMap, registration: &Registration) -> bool {
    let Some(node) = map.node_named(&registration.node).map(|node| node.id) else { return false };
    registration.disks.iter().any(|disk| match disk.content {
        DiskContent::Ours { cluster, disk } => cluster == map.cluster && map.node_of(disk) == Some(node),
        _ => false,
    })
}

/// Whether a copy whose process ended had stored all that it acknowledged. A primary does; one that was promoted
/// stores what it held in memory before it adopts that map, and until then is a secondary as any other.
fn stored_all(device: &Device, span: &Span, replica: &Replica, node: &Registered) -> bool {
    let adopted =
        |life: &Life| life.process == replica.incarnation.process && life.adopted >= span.primary_since;
    device.commit == Commit::Immediate
        || (span.primary().disk == replica.disk && node.lives.iter().any(adopted))
}

impl Registered {
    fn has_disks(&self, map: &DistributionMap) -> bool {
        map.disks.iter().any(|disk| self.incarnation(map.cluster, disk.id).is_some())
    }
}
