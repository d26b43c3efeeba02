//! A spare is made where there is none: a third disk is emptied onto others that have room, becomes the spare, and
//! what is gone is made again on it.
//!
//! Only disks are emptied that hold no other copy of what is gone, and on nodes that hold none: what they had is
//! moved once, and nothing that has lost a copy is moved at all. Of those that will do it is the one with the least
//! on it.

use super::Change;
use super::detector;
use super::redistribution::View;
use super::regeneration::{Hindered, Situation, lost_disks, short};
use crate::ids::DiskId;
use crate::map::{Disk, DistributionMap};
use std::collections::{BTreeMap, BTreeSet};

/// So many disks are looked at closely, those with the least on them: each look is a plan.
const LOOKED_AT_MAX: usize = 8;

/// Empties a disk for the first of those that have no spare and can have one; with why not for the others. An operator
/// does not want it for those in `not_for`.
pub(super) fn begin(
    map: &DistributionMap,
    now: &Situation<'_>,
    hindered: &[Hindered],
    not_for: &BTreeSet<DiskId>,
) -> (Change, Vec<String>) {
    let lost: BTreeSet<DiskId> = lost_disks(map, now).into_iter().map(|lost| lost.disk).collect();
    let mut reasons = Vec::new();
    let mut promised = BTreeSet::new();
    for hindered in hindered {
        if not_for.contains(&hindered.disk) {
            reasons.push(format!("{}; an operator cancelled making one", hindered.why));
            continue;
        }
        if let Some((plan, disk)) = being_made(map, &lost, &promised, hindered) {
            promised.insert(disk);
            reasons.push(format!("{}; {} becomes a spare by plan {plan}", hindered.why, map.disk_name(disk)));
            continue;
        }
        if let Some(spare) = is_awaited(map, now, hindered) {
            reasons.push(format!("{}; {} is waited for", hindered.why, map.disk_name(spare)));
            continue;
        }
        match empty_one(map, now, &lost, hindered) {
            Ok(change) => return (change, reasons),
            Err(reason) => reasons.push(format!("{}; {reason}", hindered.why)),
        }
    }
    (Change::default(), reasons)
}

/// The plan that makes a spare on which this can be made again, and the disk.
fn being_made(
    map: &DistributionMap,
    lost: &BTreeSet<DiskId>,
    promised: &BTreeSet<DiskId>,
    hindered: &Hindered,
) -> Option<(u64, DiskId)> {
    let mut made = map.plans.iter().filter(|plan| !plan.cancelled).flat_map(|plan| {
        let disks = plan.spares.iter().filter_map(|disk| map.disk(*disk));
        disks.map(move |disk| (plan.id.0, disk))
    });
    let found = made.find(|(_, disk)| {
        let free = !lost.contains(&disk.id) && !promised.contains(&disk.id);
        let stays = !map.plans.iter().flat_map(|plan| &plan.moves).any(|step| step.to == disk.id);
        free && stays && fits(map, disk, hindered)
    });
    found.map(|(plan, disk)| (plan, disk.id))
}

/// A spare on which this could be made again, and whose node is away for a moment only.
fn is_awaited(map: &DistributionMap, now: &Situation<'_>, hindered: &Hindered) -> Option<DiskId> {
    let spare_after = now.policy.spare_after.as_millis() as u64;
    let mut spares = map.disks.iter().filter(|disk| disk.spare && disk.failed.is_none());
    let found = spares.find(|disk| {
        let node = map.node(disk.node);
        let away = node
            .and_then(|node| detector::away_ms(now.registry, &node.name, now.started_ms, now.now_ms))
            .is_some_and(|away| away < spare_after);
        away && fits(map, disk, hindered)
    });
    found.map(|disk| disk.id)
}

fn empty_one(
    map: &DistributionMap,
    now: &Situation<'_>,
    lost: &BTreeSet<DiskId>,
    hindered: &Hindered,
) -> Result<Change, String> {
    let view = View { map, now, carry_out: false };
    let (takers, _) = view.takers(lost);
    let used = used_slots(map);
    let used = |disk: DiskId| used.get(&disk).copied().unwrap_or(0);
    let mut candidates: Vec<&Disk> = map.disks.iter().filter(|disk| takers.contains(&disk.id)).collect();
    candidates.retain(|disk| fits(map, disk, hindered));
    candidates.sort_by_key(|disk| (used(disk.id), disk.id));
    let name = map.disk_name(hindered.disk);
    let mut first_reason = None;
    for disk in candidates.into_iter().take(LOOKED_AT_MAX) {
        let mut takers = takers.clone();
        takers.remove(&disk.id);
        let emptied = map.disk_name(disk.id);
        let cause = format!("{emptied} becomes a spare: there is none for what {name} had");
        match view.empty(BTreeSet::from([disk.id]), takers, cause) {
            Ok(mut change) => {
                change.why.insert(0, format!("{emptied} is emptied: there is no spare for what {name} had"));
                return Ok(change);
            }
            Err(reason) => {
                first_reason.get_or_insert(format!("{emptied} cannot be emptied to become one: {reason}"));
            }
        }
    }
    Err(first_reason.unwrap_or_else(|| {
        "no other disk can become one: none is there that is large enough and shares neither node nor failure set with \
         the other copies"
            .to_owned()
    }))
}

fn used_slots(map: &DistributionMap) -> BTreeMap<DiskId, u64> {
    let mut used = BTreeMap::new();
    for span in map.devices.iter().flat_map(|device| &device.spans) {
        for copy in &span.replicas {
            *used.entry(copy.disk).or_default() += u64::from(span.count);
        }
    }
    used
}

/// Whether all that is gone could be made again on that disk, were it empty.
fn fits(map: &DistributionMap, disk: &Disk, hindered: &Hindered) -> bool {
    let apart = |other: DiskId| {
        let other = map.node_of(other).unwrap_or_default();
        disk.node != other && map.other_set(disk.node, other)
    };
    let may_have = hindered.gone.iter().all(|gone| {
        let blocks = map.device(gone.run.device).is_some_and(|device| disk.block_bytes <= device.block_bytes);
        let mut others = map
            .spans_of(gone.run)
            .flat_map(|(span, _)| &span.replicas)
            .filter(|copy| copy.disk != hindered.disk);
        blocks && others.all(|copy| apart(copy.disk))
    });
    may_have && short(disk, &hindered.gone).is_none()
}
