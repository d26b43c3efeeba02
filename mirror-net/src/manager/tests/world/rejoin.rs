//! Primaries that fill the copies of others, and say so to the manager: late, twice or never.

use super::World;
use crate::control::NodeMessage;
use crate::ids::{DeviceId, DiskId, Incarnation, ProcessId, SliceEpoch};
use crate::manager::{ConnectionId, Input};
use crate::map::verbs::Run;
use crate::map::{Replica, ReplicaState};

/// Device, slice, disk of the copy, and the epoch under which its primary asked for it.
pub(super) type Joined = (DeviceId, u32, DiskId, SliceEpoch);

/// A question on its way.
pub(super) struct Said {
    index: usize,
    connection: ConnectionId,
    process: ProcessId,
    message: NodeMessage,
}

/// Whether a primary that meets the copy takes it for another one than the map's (rule 3): what is
/// being filled is compared on its process too, an immediate secondary on its attachment alone.
pub(super) fn is_another(replica: &Replica, now: Incarnation) -> bool {
    match replica.state {
        ReplicaState::InSync => now.attach != replica.incarnation.attach,
        ReplicaState::Syncing => now != replica.incarnation,
        ReplicaState::Stale => false,
    }
}

impl World {
    /// Asks the manager; the question may come late, and may come again.
    pub(super) fn ask(&mut self, index: usize, message: NodeMessage) {
        let node = &self.nodes[index];
        let Some(connection) = node.connection else { return };
        let process = node.incarnation.process;
        self.said.push(Said { index, connection, process, message: message.clone() });
        if self.calm || !self.random.once_in(4) {
            self.say(index, message);
        }
    }

    /// Something that was said arrives (again): over the connection over which it was said, whatever
    /// has become of the node, or said by the same process over its next one.
    pub(super) fn say_again(&mut self) {
        if self.said.is_empty() {
            return;
        }
        // One of the last ones; sometimes a very old one.
        let count = self.said.len() as u64;
        let from = if self.random.once_in(4) { 0 } else { count.saturating_sub(5) };
        let said = &self.said[self.random.below(from..count) as usize];
        let (index, process, message) = (said.index, said.process, said.message.clone());
        let node = &self.nodes[index];
        let connection = match node.connection {
            Some(connection) if node.incarnation.process == process => connection,
            _ => said.connection,
        };
        self.feed(Input::Message { connection, message });
    }

    /// A session between two nodes is open: the first one, as primary, does what it can for the
    /// copies of the other.
    pub(super) fn meet(&mut self, index: usize, other: usize) {
        let (node, peer) = (&self.nodes[index], &self.nodes[other]);
        let linked = index != other && node.alive && node.disk_works && peer.alive && peer.disk_works;
        if !linked || peer.adopted.version < node.adopted.version {
            return;
        }
        let (map, theirs) = (node.adopted.clone(), peer.adopted.clone());
        let (id, disk, now) = (peer.id, peer.disk, peer.incarnation);
        let version = map.version;
        let mut stale = false;
        let mut filled = Vec::new();
        for device in &map.devices {
            let mut syncing = Vec::new();
            for span in &device.spans {
                let primary = span.primary();
                if primary.disk != node.disk || primary.incarnation != node.incarnation {
                    continue;
                }
                let Some(replica) = span.replica_on(disk) else { continue };
                if is_another(replica, now) {
                    self.ask(index, NodeMessage::AskStale { peer: id, version, cause: "restarted".into() });
                    return;
                }
                match replica.state {
                    ReplicaState::Stale => stale = true,
                    ReplicaState::Syncing => syncing.push(span),
                    ReplicaState::InSync => {}
                }
            }
            let knows = |span: &&crate::map::Span| {
                theirs.device(device.id).unwrap().span(span.first).unwrap().epoch == span.epoch
            };
            if !syncing.is_empty() && syncing.iter().all(knows) {
                filled.push((device.id, syncing));
            }
        }
        if stale {
            self.ask(index, NodeMessage::AskSyncing { peer: id, version });
        }
        for (device, spans) in filled {
            let slices = spans.iter().flat_map(|span| (span.first.0..span.end()).map(|at| (at, span.epoch)));
            let slices: Vec<(u32, SliceEpoch)> = slices.collect();
            for (slice, _) in &slices {
                let (newest, _) = self.nodes[index].has.get(&(device, *slice)).copied().unwrap_or_default();
                self.nodes[other].has.entry((device, *slice)).or_default().0 = newest;
                if !self.calm && self.random.once_in(30) {
                    // The session ends.
                    return;
                }
            }
            // Rule 7: all of it is flushed there. Rule 6: from here on it is waited for.
            for (slice, epoch) in slices {
                let has = self.nodes[other].has.entry((device, slice)).or_default();
                has.1 = has.0;
                self.nodes[index].joined.insert((device, slice, disk, epoch));
            }
            self.ask(index, NodeMessage::AskInSync { peer: id, device, version });
        }
    }

    /// What must hold of a mark at the moment in which it is stored.
    pub(super) fn check_mark(
        &mut self,
        run: Run,
        disk: DiskId,
        state: ReplicaState,
        incarnation: Option<Incarnation>,
    ) {
        let span = self.store.device(run.device).unwrap().span(run.first).unwrap();
        let replica = span.replica_on(disk).unwrap();
        let node = self.node(self.store.node_of(disk).unwrap());
        let known = self.manager.registry().get(&format!("n{}", node.id.0));
        let known = known.and_then(|known| known.incarnation(self.store.cluster, disk).zip(Some(known)));
        match (replica.state, state) {
            (ReplicaState::InSync, ReplicaState::Syncing) => panic!("a member is not filled"),
            (ReplicaState::Stale, ReplicaState::InSync) => panic!("a stale copy is in sync at one stroke"),
            (_, ReplicaState::Stale) => assert_eq!(incarnation, None),
            (ReplicaState::Stale | ReplicaState::Syncing, ReplicaState::Syncing) => {
                let (believed, known) = known.unwrap();
                assert!(known.is_up(self.now_ms), "a copy that is not there is filled");
                assert_eq!(incarnation, Some(believed), "it is filled as what it is now");
                assert!(!self.manager.registry().has_failed(&self.store, disk), "{disk} has failed");
                assert!(
                    (replica.state, Some(replica.incarnation)) != (ReplicaState::Syncing, incarnation),
                    "it is being filled already"
                );
            }
            // In the same change as its promotion, where it is checked.
            (ReplicaState::InSync, ReplicaState::InSync) => {
                assert_eq!(incarnation.map(|now| now.attach), Some(replica.incarnation.attach));
            }
            (ReplicaState::Syncing, ReplicaState::InSync) => {
                assert_eq!(incarnation, None);
                let (believed, _) = known.unwrap();
                assert_eq!(believed, replica.incarnation, "what was filled is not what is there");
                // One that lost power a moment ago is found out when it registers.
                if node.incarnation.attach == replica.incarnation.attach {
                    self.keeps(run.device, span, disk, false);
                }
                for slice in span.first.0..span.end() {
                    let (_, flushed) = node.has.get(&(run.device, slice)).copied().unwrap_or_default();
                    let (_, wanted) =
                        self.acknowledged.get(&(run.device, slice)).copied().unwrap_or_default();
                    assert!(flushed >= wanted, "{disk} in sync without what was flushed before");
                }
                self.seen.rejoined += span.count;
            }
        }
    }
}
