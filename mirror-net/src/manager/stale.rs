//! A primary goes on without a partner (rules 1 and 3): the only way in which a copy of a node that
//! is merely unreachable becomes stale.

use super::registry::{Registry, Standing};
use super::{Change, Lines, promotion, run_of};
use crate::ids::{MapVersion, NodeId};
use crate::map::verbs::Verb;
use crate::map::{Device, DistributionMap, ReplicaState, Span};

/// The spans of a device that `asker` may speak about when it acts on map `version`: it is their
/// primary, in the incarnation that the map names, and knows their present copies.
///
/// A question that comes late is about copies that are no more what they were: a copy that has
/// joined since, or left and come back, is not meant by it. The primary asks again under the map
/// that tells it so.
pub(super) fn spoken_for<'a>(
    map: &'a DistributionMap,
    registry: &'a Registry,
    now_ms: u64,
    device: &'a Device,
    asker: NodeId,
    version: MapVersion,
) -> impl Iterator<Item = &'a Span> {
    device.spans.iter().filter(move |span| {
        span.epoch.0 <= version.0
            && map.node_of(span.primary().disk) == Some(asker)
            && registry.standing(map, device, span, span.primary(), now_ms) == Standing::Intact
    })
}

/// Marks `peer`'s copies stale wherever `asker` may speak (`spoken_for`); empty if that is
/// nowhere.
///
/// Never takes the last member: the asker is one itself.
pub fn ask_stale(
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
            for replica in &span.replicas[1..] {
                if map.node_of(replica.disk) == Some(peer) && replica.state != ReplicaState::Stale {
                    change.batch.push(Verb::Mark {
                        run: run_of(device.id, span),
                        disk: replica.disk,
                        state: ReplicaState::Stale,
                        incarnation: None,
                    });
                    lines.add(
                        span,
                        format!("{} goes on without {}", map.node_name(asker), map.disk_name(replica.disk)),
                    );
                }
            }
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    change
}

/// The same for a peer whose node lives and whose disks hang. What it is primary of hangs as well, and it may yet come to
/// report a copy as lost that is well: so another member goes first wherever one is well, the asker's or not. Exporters
/// stay.
///
/// A question that comes late moves no role: either copies become stale by it, or the asker acts on the newest map.
pub fn ask_slow(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    asker: NodeId,
    peer: NodeId,
    version: MapVersion,
) -> Change {
    let mut change = ask_stale(map, registry, now_ms, asker, peer, version);
    if change.is_empty() && version != map.version {
        return change;
    }
    for device in &map.devices {
        let mut lines = Lines::default();
        for span in device.spans.iter().filter(|span| map.node_of(span.primary().disk) == Some(peer)) {
            let well = span.replicas[1..].iter().find(|replica| {
                replica.state == ReplicaState::InSync
                    && registry.standing(map, device, span, replica, now_ms) == Standing::Intact
            });
            let Some(well) = well else { continue };
            let (run, old) = (run_of(device.id, span), span.primary().disk);
            change.batch.extend(promotion(map, registry, now_ms, span, run, well.disk));
            let state = ReplicaState::Stale;
            change.batch.push(Verb::Mark { run, disk: old, state, incarnation: None });
            lines.add(span, format!("primary {} -> {}", map.disk_name(old), map.disk_name(well.disk)));
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    change
}
