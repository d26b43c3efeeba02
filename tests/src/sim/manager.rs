//! A minimal manager: pure decisions over what the nodes said, one map version at a time.
//!
//! It does what the system does before there is resync: a copy that was away becomes stale and
//! stays so, an intact member is promoted, of members that all restarted one goes on alone.

use crate::sim::scheduler::{MS, Nanos};
use mirror_net::ids::{DiskId, ExporterSession, Incarnation, MapVersion, NodeId, SliceIndex};
use mirror_net::map::verbs::{Run, Verb};
use mirror_net::map::{DistributionMap, Replica, ReplicaState, Span};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// Without a word for so long a node is taken for dead.
pub const SILENCE: Nanos = 2_000 * MS;

/// What a node says all the time.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// Who.
    pub node: NodeId,
    /// As what.
    pub incarnation: Incarnation,
    /// Reported as adopted by this process.
    pub adopted: MapVersion,
    /// Its disk does not take writes.
    pub disk_failed: bool,
}

/// The manager.
pub struct Manager {
    /// The newest map.
    pub map: Arc<DistributionMap>,
    /// Every map there was, by version.
    pub history: BTreeMap<u64, Arc<DistributionMap>>,
    nodes: BTreeMap<NodeId, (Nanos, Heartbeat)>,
    failed: HashSet<DiskId>,
    sessions: u64,
}

impl Manager {
    /// Begins with that map.
    pub fn new(map: DistributionMap) -> Self {
        let map = Arc::new(map);
        Self {
            history: BTreeMap::from([(map.version.0, Arc::clone(&map))]),
            map,
            nodes: BTreeMap::new(),
            failed: HashSet::new(),
            sessions: 0,
        }
    }

    /// A number for an exporter, larger than every one before.
    pub fn exporter_session(&mut self) -> ExporterSession {
        self.sessions += 1;
        ExporterSession(self.sessions)
    }

    /// A node said something.
    pub fn heard(&mut self, now: Nanos, beat: Heartbeat) {
        if beat.disk_failed {
            let disks = self.map.disks.iter().filter(|disk| disk.node == beat.node);
            self.failed.extend(disks.map(|disk| disk.id));
        }
        // A late word of a process before says nothing.
        let newer = |(_, known): &(Nanos, Heartbeat)| known.incarnation.process <= beat.incarnation.process;
        if self.nodes.get(&beat.node).is_none_or(newer) {
            self.nodes.insert(beat.node, (now, beat));
        }
    }

    /// What that node's present process has adopted.
    pub fn adopted(&self, node: NodeId) -> MapVersion {
        self.nodes.get(&node).map_or(MapVersion(0), |(_, beat)| beat.adopted)
    }

    /// The node's last known process.
    pub fn process(&self, node: NodeId) -> Option<u64> {
        self.nodes.get(&node).map(|(_, beat)| beat.incarnation.process.0)
    }

    /// Whether the node speaks.
    pub fn in_contact(&self, now: Nanos, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|(heard, _)| heard + SILENCE > now)
    }

    fn node_of(&self, replica: &Replica) -> NodeId {
        self.map.node_of(replica.disk).unwrap_or_default()
    }

    fn incarnation(&self, replica: &Replica) -> Option<Incarnation> {
        self.nodes.get(&self.node_of(replica)).map(|(_, beat)| beat.incarnation)
    }

    fn intact(&self, replica: &Replica) -> bool {
        self.incarnation(replica) == Some(replica.incarnation) && !self.failed.contains(&replica.disk)
    }

    fn apply(&mut self, batch: &[Verb]) -> bool {
        match self.map.apply(batch) {
            Ok(Some(next)) => {
                let next = Arc::new(next);
                self.history.insert(next.version.0, Arc::clone(&next));
                self.map = next;
                true
            }
            Ok(None) | Err(_) => false,
        }
    }

    /// Looks at everything again; true if the map changed.
    pub fn tick(&mut self, now: Nanos) -> bool {
        let mut batch = Vec::new();
        for device in &self.map.devices {
            for span in &device.spans {
                let run = Run { device: device.id, first: span.first, count: span.count };
                self.judge(now, run, span, &mut batch);
            }
        }
        // A dead exporter's devices go where their data is.
        let mut claims = Vec::new();
        for device in &self.map.devices {
            let owner = device.claim.node;
            let dead = self.nodes.get(&owner).is_some_and(|(heard, _)| heard + SILENCE + 1_000 * MS <= now);
            let primary = self.node_of(device.spans[0].primary());
            if dead && primary != owner && self.in_contact(now, primary) {
                claims.push(Verb::MoveClaim { device: device.id, node: primary });
            }
        }
        batch.extend(claims);
        !batch.is_empty() && self.apply(&batch)
    }

    fn judge(&self, now: Nanos, run: Run, span: &Span, batch: &mut Vec<Verb>) {
        let up = |replica: &Replica| self.in_contact(now, self.node_of(replica));
        let stale = |replica: &Replica| Verb::Mark {
            run,
            disk: replica.disk,
            state: ReplicaState::Stale,
            incarnation: None,
        };
        let primary = span.primary();
        if self.intact(primary) && up(primary) {
            let gone = span.members().skip(1).filter(|replica| {
                self.incarnation(replica).is_some_and(|known| known != replica.incarnation)
                    || self.failed.contains(&replica.disk)
            });
            batch.extend(gone.map(stale));
            return;
        }
        if self.nodes.len() < self.map.nodes.len() {
            return;
        }
        if let Some(next) = span.members().skip(1).find(|replica| self.intact(replica) && up(replica)) {
            batch.push(Verb::Promote { run, disk: next.disk });
            // Without reconciliation nobody knows what the others have of the old primary's last writes.
            batch.extend(span.members().filter(|other| other.disk != next.disk).map(stale));
            return;
        }
        let back = |replica: &Replica| {
            up(replica)
                && self.incarnation(replica).is_some_and(|known| known != replica.incarnation)
                && !self.failed.contains(&replica.disk)
        };
        if !span.members().all(back) {
            return;
        }
        let kept_cache = |replica: &&Replica| {
            self.incarnation(replica).is_some_and(|known| known.attach == replica.incarnation.attach)
        };
        let chosen = span.members().find(kept_cache);
        let lost = chosen.is_none();
        let chosen = chosen.unwrap_or(primary);
        if let Some(incarnation) = self.incarnation(chosen) {
            batch.push(Verb::Readmit { run, disk: chosen.disk, incarnation, lost });
        }
    }

    /// A primary cannot go on with that node's copies.
    pub fn ask_stale(&mut self, asker: NodeId, incarnation: Incarnation, peer: NodeId) -> bool {
        let mut batch = Vec::new();
        for device in &self.map.devices {
            for span in &device.spans {
                let run = Run { device: device.id, first: span.first, count: span.count };
                let primary = span.primary();
                if self.node_of(primary) != asker || primary.incarnation != incarnation {
                    continue;
                }
                let theirs = span.replicas[1..]
                    .iter()
                    .filter(|replica| self.node_of(replica) == peer && replica.state != ReplicaState::Stale);
                batch.extend(theirs.map(|replica| Verb::Mark {
                    run,
                    disk: replica.disk,
                    state: ReplicaState::Stale,
                    incarnation: None,
                }));
            }
        }
        !batch.is_empty() && self.apply(&batch)
    }

    /// By an operator's word another member becomes primary, the old one stale.
    pub fn hand_over(&mut self, now: Nanos, device: usize) -> bool {
        let device = &self.map.devices[device];
        let span = &device.spans[0];
        let run = Run { device: device.id, first: SliceIndex(0), count: span.count };
        let Some(next) = span
            .members()
            .skip(1)
            .find(|replica| self.intact(replica) && self.in_contact(now, self.node_of(replica)))
        else {
            return false;
        };
        let mut batch = vec![Verb::Promote { run, disk: next.disk }];
        batch.extend(span.members().filter(|other| other.disk != next.disk).map(|other| Verb::Mark {
            run,
            disk: other.disk,
            state: ReplicaState::Stale,
            incarnation: None,
        }));
        self.apply(&batch)
    }

    /// Another node exports the device.
    pub fn move_claim(&mut self, device: usize, node: NodeId) -> bool {
        let device = self.map.devices[device].id;
        self.apply(&[Verb::MoveClaim { device, node }])
    }

    /// Whether the device's exporter may start: every primary has adopted the claim.
    pub fn may_export(&self, device: usize) -> Option<(NodeId, u64)> {
        let device = &self.map.devices[device];
        let ready = device.spans.iter().all(|span| {
            self.intact(span.primary()) && self.adopted(self.node_of(span.primary())) >= device.claim.since
        });
        let process = self.process(device.claim.node)?;
        let own = self.adopted(device.claim.node) >= device.claim.since;
        (ready && own).then_some((device.claim.node, process))
    }
}
