//! Evenness without being told: roles after a failover, data after disks came or went.
//!
//! Neither is done for little, nor at once, nor while anything else is to be done: what has been uneven for long enough
//! is made even once. Where the rules keep it uneven nothing is tried again before it has become worse.

use super::redistribution::View;
use super::regeneration::{Situation, lost_disks};
use super::{Change, spreading};
use crate::map::{DistributionMap, ReplicaState};
use std::time::Duration;

/// Milliseconds between two looks: each goes over the whole map.
const LOOK_MS: u64 = 1_000;

/// What was seen of it before.
#[derive(Default, Debug)]
pub(super) struct Evening {
    next_look_ms: u64,
    /// Since when roles could be more even.
    roles_since_ms: Option<u64>,
    /// Since when disks could be.
    disks_since_ms: Option<u64>,
    /// How uneven they were when they were last made even by themselves, in percent.
    left_uneven: Option<u64>,
}

impl Evening {
    /// What is to be made even now.
    pub(super) fn look(&mut self, map: &DistributionMap, now: &Situation<'_>) -> Change {
        if now.now_ms < self.next_look_ms {
            return Change::default();
        }
        self.next_look_ms = now.now_ms + LOOK_MS;
        let change = now.policy.spread_after.map_or_else(Change::default, |_| spreading::spread(map, now));
        if is_due(&mut self.roles_since_ms, !change.is_empty(), now.now_ms, now.policy.spread_after) {
            return change;
        }
        let Some(above) = now.policy.rebalance_above else { return Change::default() };
        let uneven = if is_calm(map, now) { unevenness(map, now) } else { 0 };
        if uneven <= u64::from(above) {
            self.left_uneven = None;
        }
        // What the rules did not let be evener is tried again only once it is clearly worse.
        let bound = self.left_uneven.map_or(0, |left| left + u64::from(above) / 2).max(u64::from(above));
        let after = Some(now.policy.rebalance_after);
        if !is_due(&mut self.disks_since_ms, uneven > bound, now.now_ms, after) {
            return Change::default();
        }
        self.left_uneven = Some(uneven);
        let view = View { map, now, carry_out: false };
        match view.balance(&format!("since one is fuller than another by {uneven} % of its slots")) {
            Ok(change) => change,
            // Something is in the way for the moment: it is looked at again as long as it is uneven.
            Err(_) => {
                self.left_uneven = None;
                Change::default()
            }
        }
    }
}

/// Whether something has been so for long enough.
fn is_due(since_ms: &mut Option<u64>, is_so: bool, now_ms: u64, after: Option<Duration>) -> bool {
    if !is_so {
        *since_ms = None;
        return false;
    }
    let since = *since_ms.get_or_insert(now_ms);
    let due = after.is_some_and(|after| now_ms.saturating_sub(since) >= after.as_millis() as u64);
    if due {
        *since_ms = None;
    }
    due
}

/// Whether nothing moves, nobody is away, nothing is lost, and everything is served where it is at home.
fn is_calm(map: &DistributionMap, now: &Situation<'_>) -> bool {
    let mut replicas = map.devices.iter().flat_map(|device| &device.spans).flat_map(|span| &span.replicas);
    map.plans.is_empty()
        && map.nodes.iter().all(|node| now.registry.is_up(&node.name, now.now_ms))
        && lost_disks(map, now).is_empty()
        && replicas.all(|copy| copy.state == ReplicaState::InSync)
        && spreading::is_at_home(map)
}

/// By how much the fullest disk in use is fuller than the emptiest, in percent of its slots.
fn unevenness(map: &DistributionMap, now: &Situation<'_>) -> u64 {
    let mut used = std::collections::HashMap::new();
    for span in map.devices.iter().flat_map(|device| &device.spans) {
        for copy in &span.replicas {
            *used.entry(copy.disk).or_insert(0u64) += u64::from(span.count);
        }
    }
    let usable = |disk: &&crate::map::Disk| {
        !disk.spare && now.registry.usable(map, disk.id, now.now_ms).is_some() && disk.slots.total() > 0
    };
    let fills = map.disks.iter().filter(usable);
    let fills: Vec<u64> =
        fills.map(|disk| used.get(&disk.id).copied().unwrap_or(0) * 100 / disk.slots.total()).collect();
    fills.iter().max().unwrap_or(&0) - fills.iter().min().unwrap_or(&0)
}
