//! A copy that was away comes back (rules 3, 6 and 7): only the present primary asks for it.
//!
//! Stale becomes syncing when the primary reaches the peer: from then on the copy gets every new
//! write, and the primary makes the rest of it equal. Syncing becomes in sync when the primary says
//! that nothing is left; it waits for the copy as for a member from before it says so, so nothing is
//! acknowledged without the copy while the word is on its way.
//!
//! Nothing here makes a copy swing between the two: a primary asks only while its session with the
//! peer is open, the peer has to be up and registered, and what is syncing already under the disk's
//! present attachment is left alone.

use super::registry::Registry;
use super::stale::spoken_for;
use super::{Change, Lines, run_of};
use crate::ids::{DeviceId, Incarnation, MapVersion, NodeId};
use crate::map::verbs::Verb;
use crate::map::{Commit, Device, DistributionMap, Replica, ReplicaState};

/// Marks `peer`'s stale copies syncing wherever `asker` may speak, under the incarnations that the
/// peer is registered with now; empty if there are none, or the peer is not there.
///
/// A copy that was syncing under another attachment begins anew under the present one.
pub fn ask_syncing(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    asker: NodeId,
    peer: NodeId,
    version: MapVersion,
) -> Change {
    let mut change = Change::default();
    for device in &map.devices {
        let mut lines = Lines::default();
        for span in spoken_for(map, registry, now_ms, device, asker, version) {
            for replica in span.replicas[1..].iter().filter(|copy| map.node_of(copy.disk) == Some(peer)) {
                let Some(now) = registry.usable(map, replica.disk, now_ms) else { continue };
                let begins = match replica.state {
                    ReplicaState::InSync => false,
                    ReplicaState::Syncing => !is_as_filled(device, replica, now),
                    ReplicaState::Stale => true,
                };
                if begins {
                    change.batch.push(Verb::Mark {
                        run: run_of(device.id, span),
                        disk: replica.disk,
                        state: ReplicaState::Syncing,
                        incarnation: Some(now),
                    });
                    let (to, from) = (map.disk_name(replica.disk), map.node_name(asker));
                    lines.add(span, format!("{to} is syncing, {from} reaches it again"));
                }
            }
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    change
}

/// Marks `peer`'s syncing copies of a device in sync wherever `asker` may speak; empty if there are
/// none.
///
/// The disk must be attached as when it was filled: of one that lost what was in its caches meanwhile
/// the primary learns when it meets it, and begins anew. That the peer is up is not asked for: the
/// primary waits for it already, and has it recorded stale if it is gone.
pub fn ask_in_sync(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    asker: NodeId,
    (peer, device): (NodeId, DeviceId),
    version: MapVersion,
) -> Change {
    let mut change = Change::default();
    let registered = map.node(peer).and_then(|node| registry.get(&node.name));
    let (Some(device), Some(registered)) = (map.device(device), registered) else { return change };
    let mut lines = Lines::default();
    for span in spoken_for(map, registry, now_ms, device, asker, version) {
        for replica in span.replicas[1..].iter().filter(|copy| map.node_of(copy.disk) == Some(peer)) {
            if replica.state == ReplicaState::Syncing
                && registered
                    .incarnation(map.cluster, replica.disk)
                    .is_some_and(|now| is_as_filled(device, replica, now))
                && !registry.has_failed(map, replica.disk)
            {
                change.batch.push(Verb::Mark {
                    run: run_of(device.id, span),
                    disk: replica.disk,
                    state: ReplicaState::InSync,
                    incarnation: None,
                });
                lines.add(span, format!("{} is in sync", map.disk_name(replica.disk)));
            }
        }
    }
    change.why.extend(lines.finish(&device.name, device.slices));
    change
}

/// Whether a syncing copy still has what was sent to it: in its memory, where that counts.
fn is_as_filled(device: &Device, replica: &Replica, now: Incarnation) -> bool {
    now.attach == replica.incarnation.attach
        && (device.commit == Commit::Immediate || now == replica.incarnation)
}
