//! When a device's exporter may start (rules 14 and 15).

use super::registry::{Registry, Standing};
use crate::ids::MapVersion;
use crate::map::{Device, DistributionMap};
use crate::planted::{self, Bug};

/// Why a device may not be exported yet; one line for each thing that is missing, none if it may.
///
/// The present primary of every slice must be what the map says and have adopted the claim, and that
/// it is primary: only then is every older exporter's write finished or refused. One that knows the
/// claim but not yet its role still takes the writes of the primary before it. The same holds of every
/// other member, since an old primary may be one: what it took for an older exporter meanwhile would be
/// there if it were promoted again. A member that is not heard of is soon stale.
pub fn hindrances(map: &DistributionMap, device: &Device, registry: &Registry, now_ms: u64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for span in &device.spans {
        let fence = MapVersion(device.claim.since.0.max(span.epoch.0));
        for (position, replica) in span.members().enumerate() {
            let Some(node) = map.node_of(replica.disk).and_then(|id| map.node(id)) else { continue };
            let adopted = registry.get(&node.name).map_or_else(Default::default, |node| node.adopted);
            let late = (adopted < fence && !planted::is(Bug::ExportedEarly))
                .then(|| format!("{} has not adopted map {fence} yet", node.name));
            let line = match registry.standing(map, device, span, replica, now_ms) {
                _ if position > 0 => late,
                Standing::Intact => late,
                Standing::Unknown => Some(format!("its primary {} has not registered", node.name)),
                Standing::Away => Some(format!("its primary {} is not connected", node.name)),
                Standing::Changed { .. } => Some(format!("its primary {} was restarted", node.name)),
                Standing::Gone => {
                    Some(format!("its primary {} has lost its disk", map.disk_name(replica.disk)))
                }
            };
            lines.extend(line.filter(|line| !lines.contains(line)));
        }
    }
    lines
}
