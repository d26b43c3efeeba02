//! A primary goes on without a partner (rules 1 and 3): the only way in which a copy of a node that
//! is merely unreachable becomes stale.

use super::registry::{Registry, Standing};
use super::{Change, Lines, run_of};
use crate::ids::NodeId;
use crate::map::verbs::Verb;
use crate::map::{DistributionMap, ReplicaState};

/// Marks `peer`'s copies stale wherever `asker` is the present primary, in the incarnation that
/// the map names; empty if that is nowhere.
///
/// Never takes the last member: the asker is one itself.
pub fn ask_stale(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    asker: NodeId,
    peer: NodeId,
) -> Change {
    let mut change = Change::default();
    for device in &map.devices {
        let mut lines = Lines::default();
        for span in &device.spans {
            if map.node_of(span.primary().disk) != Some(asker)
                || registry.standing(map, span.primary(), now_ms) != Standing::Intact
            {
                continue;
            }
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
