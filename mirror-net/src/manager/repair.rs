//! Copies that are not what the map says of them: who goes on (rules 3 to 5).

use super::registry::{Registry, Standing};
use super::{Change, Lines, promotion, run_of};
use crate::ids::{DiskId, Incarnation};
use crate::map::verbs::Verb;
use crate::map::{Device, DistributionMap, Replica, ReplicaState, Span};
use crate::planted::{self, Bug};

/// What is to be done about a span.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpanPlan {
    /// Its primary is what the map says and up.
    Served,
    /// Its primary is another incarnation, or its disk is gone: this intact member goes first.
    Promote {
        /// The disk of the member.
        disk: DiskId,
    },
    /// No member is what the map says: this one goes on alone.
    Readmit {
        /// The disk of the member.
        disk: DiskId,
        /// Its incarnation now.
        incarnation: Incarnation,
        /// What was only in caches, or in memory, is gone on every member.
        lost: bool,
    },
    /// Somebody must come back, or the operator decide.
    Wait,
}

/// Decides about one span.
pub fn plan_span(
    map: &DistributionMap,
    device: &Device,
    span: &Span,
    registry: &Registry,
    now_ms: u64,
) -> SpanPlan {
    let standing = |replica: &Replica| registry.standing(map, device, span, replica, now_ms);
    let members: Vec<(DiskId, Standing)> =
        span.members().map(|replica| (replica.disk, standing(replica))).collect();
    // Validation holds a primary in sync, so it is the first member.
    match members[0].1 {
        Standing::Intact => return SpanPlan::Served,
        // The machine may be well and only the cable out: failing it over is the operator's decision.
        Standing::Unknown | Standing::Away => return SpanPlan::Wait,
        Standing::Changed { up: true, now, .. } if planted::is(Bug::RebootBelieved) => {
            return SpanPlan::Readmit { disk: members[0].0, incarnation: now, lost: false };
        }
        Standing::Changed { .. } | Standing::Gone => {}
    }
    if planted::is(Bug::StalePromoted)
        && let Some(stale) = span.replicas[1..]
            .iter()
            .find(|replica| replica.state == ReplicaState::Stale && standing(replica) == Standing::Intact)
    {
        return SpanPlan::Promote { disk: stale.disk };
    }
    if let Some((disk, _)) = members.iter().find(|(_, standing)| *standing == Standing::Intact) {
        return SpanPlan::Promote { disk: *disk };
    }
    readmission(&members)
}

/// Rule 5: all are known and none is what the map says.
fn readmission(members: &[(DiskId, Standing)]) -> SpanPlan {
    let mut candidates = Vec::new();
    let mut gone = false;
    for (disk, standing) in members {
        match standing {
            Standing::Changed { up: true, now, whole, .. } => candidates.push((*disk, *now, *whole)),
            Standing::Gone => gone = true,
            _ if planted::is(Bug::ReadmittedEarly) => {}
            // One that is not here may have what the others lost.
            Standing::Changed { up: false, .. } | Standing::Unknown | Standing::Away | Standing::Intact => {
                return SpanPlan::Wait;
            }
        }
    }
    // In the order of the list: the map's primary, unless it lost something and another did not.
    let whole = candidates.iter().find(|(_, _, whole)| *whole);
    match (whole, candidates.first()) {
        (Some((disk, incarnation, _)), _) => {
            SpanPlan::Readmit { disk: *disk, incarnation: *incarnation, lost: false }
        }
        // A disk that is gone may come back, with what this one lost: not for us to give up.
        (None, Some((disk, incarnation, _))) if !gone => {
            SpanPlan::Readmit { disk: *disk, incarnation: *incarnation, lost: true }
        }
        _ => SpanPlan::Wait,
    }
}

/// Everything that can be repaired at this moment, as one batch.
pub fn repair(map: &DistributionMap, registry: &Registry, now_ms: u64) -> Change {
    let mut change = Change::default();
    for (disk, reason) in registry.failed() {
        if map.disk(*disk).is_some_and(|disk| disk.failed.is_none()) {
            change.batch.push(Verb::FailDisk { disk: *disk, reason: reason.clone() });
            change.why.push(format!("{} failed: {reason}", map.disk_name(*disk)));
        }
    }
    for device in &map.devices {
        let mut lines = Lines::default();
        for span in &device.spans {
            let run = run_of(device.id, span);
            let old = span.primary().disk;
            match plan_span(map, device, span, registry, now_ms) {
                SpanPlan::Wait => {}
                SpanPlan::Served => give_up_failed(map, registry, span, run, &mut change, &mut lines),
                SpanPlan::Promote { disk } => {
                    change.batch.extend(promotion(map, registry, now_ms, span, run, disk));
                    let why = match registry.standing(map, device, span, span.primary(), now_ms) {
                        Standing::Gone => "is gone",
                        _ => "is another incarnation",
                    };
                    lines.add(
                        span,
                        format!("{} is primary now, since {} {why}", map.disk_name(disk), map.disk_name(old))
                            + &super::left_behind_text(map, registry, now_ms, device, span, disk),
                    );
                }
                SpanPlan::Readmit { disk, incarnation, lost } => {
                    change.batch.push(Verb::Readmit { run, disk, incarnation, lost });
                    let lost = if lost { "; writes that were not flushed may be lost" } else { "" };
                    lines.add(
                        span,
                        format!("{} goes on alone, no member is as it was{lost}", map.disk_name(disk)),
                    );
                }
            }
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    change
}

/// Secondaries on failed disks are stale, now that a primary is there that has everything.
fn give_up_failed(
    map: &DistributionMap,
    registry: &Registry,
    span: &Span,
    run: crate::map::verbs::Run,
    change: &mut Change,
    lines: &mut Lines,
) {
    for replica in &span.replicas[1..] {
        if registry.has_failed(map, replica.disk) && replica.state != ReplicaState::Stale {
            let state = ReplicaState::Stale;
            change.batch.push(Verb::Mark { run, disk: replica.disk, state, incarnation: None });
            lines.add(span, format!("{} is stale, its disk failed", map.disk_name(replica.disk)));
        }
    }
}
