//! Which nodes have failed.
//!
//! Two witnesses are asked. The manager itself, which hears a report of every node twice a second;
//! and the other nodes, which say in theirs with whom they have a session. A node whose way to the
//! manager alone is cut goes on serving its partners, so it is left where it is.
//!
//! Nothing here is needed for safety: a node that is failed over by mistake acknowledges nothing any
//! more (docs/protocol.md rules 1 and 2). It is needed so that a link that comes and goes does not move
//! everything with it.

use super::findings::seconds;
use super::registry::Registry;
use crate::config::Policy;
use crate::map::{DistributionMap, Node};

/// A node that has not registered since the manager started is not taken for failed before so
/// long: everybody has to find the manager first.
const REGISTER_MS_MAX: u64 = 10_000;

/// For how long a node has been away: not connected, or silent. `None` if it is up.
///
/// `started_ms` is when this manager began to listen.
pub fn away_ms(registry: &Registry, name: &str, started_ms: u64, now_ms: u64) -> Option<u64> {
    match registry.get(name) {
        Some(entry) if entry.is_up(now_ms) => None,
        Some(entry) => Some(now_ms.saturating_sub(entry.heard_ms)),
        None => Some(now_ms.saturating_sub(started_ms)),
    }
}

/// Why a node counts as failed now, for people; `None` if it does not.
pub fn failed(
    map: &DistributionMap,
    registry: &Registry,
    policy: &Policy,
    node: &Node,
    started_ms: u64,
    now_ms: u64,
) -> Option<String> {
    let fail_after = policy.fail_after.as_millis() as u64;
    let why = match registry.get(&node.name) {
        Some(entry) => {
            let silent = now_ms.saturating_sub(entry.heard_ms);
            if silent < fail_after {
                return None;
            }
            format!("it was not heard of for {}", seconds(silent))
        }
        None => {
            let since = now_ms.saturating_sub(started_ms);
            if since < fail_after.max(REGISTER_MS_MAX) {
                return None;
            }
            format!("it has not registered in the {} since the manager started", seconds(since))
        }
    };
    witness(map, registry, node, now_ms)
        .is_none()
        .then(|| format!("{why}, and no node has a session with it"))
}

/// A node that is up and has a session with that one.
pub fn witness<'a>(
    map: &DistributionMap,
    registry: &'a Registry,
    node: &Node,
    now_ms: u64,
) -> Option<&'a str> {
    registry.iter().find_map(|(name, entry)| {
        let sees = entry.report.as_ref().is_some_and(|report| {
            report.sessions.iter().any(|session| session.peer == node.id && session.open)
        });
        (sees && name != node.name && map.node_named(name).is_some() && entry.is_up(now_ms)).then_some(name)
    })
}
