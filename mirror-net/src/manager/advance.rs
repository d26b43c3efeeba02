//! A plan goes on: what became in sync takes the place of what was there.
//!
//! The steps are found anew from the map at every look, so nobody's death can lose any of them.

use super::regeneration::Situation;
use super::registry::Standing;
use super::{Change, Lines, promotion};
use crate::control::PlanOrder;
use crate::ids::{DiskId, PlanId};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::{Run, Verb};
use crate::map::{DistributionMap, ReplicaState, Span};
use std::collections::BTreeSet;

/// The next steps of the first plan that has any.
pub fn advance(map: &DistributionMap, now: &Situation<'_>) -> Change {
    for plan in map.plans.iter().filter(|plan| !plan.paused) {
        let change = advance_plan(map, now, plan);
        if !change.is_empty() {
            return change;
        }
    }
    Change::default()
}

/// What an operator's order about a plan changes; an error, for people, if it changes nothing.
pub fn ordered(map: &DistributionMap, id: PlanId, order: PlanOrder) -> Result<Change, String> {
    let Some(plan) = map.plan(id) else {
        let there: Vec<String> = map.plans.iter().map(|plan| plan.id.0.to_string()).collect();
        return Err(match there.as_slice() {
            [] => format!("there is no plan {}: nothing is being moved", id.0),
            there => format!("there is no plan {}; there are {}", id.0, there.join(", ")),
        });
    };
    let (batch, what) = match order {
        PlanOrder::Pause | PlanOrder::Resume => {
            let paused = order == PlanOrder::Pause;
            let state = if paused { "paused" } else { "under way" };
            if plan.paused == paused {
                return Err(format!("plan {} is {state} already", id.0));
            }
            (vec![Verb::PausePlan { plan: id, paused }], format!("plan {} is {state}", id.0))
        }
        // What is in sync stays, and counts: nothing is less protected than before.
        PlanOrder::Cancel => {
            let mut batch = give_up(map, plan, |_| true);
            batch.push(Verb::EndPlan { plan: id });
            (batch, format!("plan {} is cancelled: copies that were not in sync yet are given up", id.0))
        }
    };
    Ok(Change { batch, why: vec![format!("{what}, by the operator")] })
}

/// Drops new copies that are not in sync, of moves that `wanted` chooses. Their disks are spares again
/// if nothing is left on them.
fn give_up(map: &DistributionMap, plan: &Plan, wanted: impl Fn(&Move) -> bool) -> Vec<Verb> {
    let mut batch = Vec::new();
    let mut targets = BTreeSet::new();
    for step in plan.moves.iter().filter(|step| wanted(step)) {
        targets.insert(step.to);
        for (span, run) in pieces(map, step) {
            let there = span.replica_on(step.to).is_some_and(|copy| copy.state != ReplicaState::InSync);
            if there && span.primary().disk != step.to {
                batch.push(Verb::DropReplica { run, disk: step.to });
            }
        }
    }
    batch.extend(spares_after(map, &batch, targets));
    batch
}

/// Makes spares of those disks that work and hold no copies any more once a batch is applied.
fn spares_after(map: &DistributionMap, batch: &[Verb], disks: BTreeSet<DiskId>) -> Vec<Verb> {
    let after = map.apply(batch).ok().flatten();
    let after = after.as_ref().unwrap_or(map);
    let works = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.failed.is_none() && !disk.spare);
    let emptied = disks.into_iter().filter(|disk| works(disk) && !after.is_in_use(*disk));
    emptied.map(|disk| Verb::SetSpare { disk, spare: true }).collect()
}

/// The spans of a move, each with the part of it that moves.
fn pieces<'a>(map: &'a DistributionMap, step: &Move) -> impl Iterator<Item = (&'a Span, Run)> {
    let run = step.run;
    map.spans_of(run).map(move |(span, count)| {
        let first = span.first.max(run.first);
        (span, Run { device: run.device, first, count })
    })
}

fn advance_plan(map: &DistributionMap, now: &Situation<'_>, plan: &Plan) -> Change {
    let lost = super::regeneration::lost_disks(map, now);
    let is_lost = |disk: DiskId| lost.iter().find(|lost| lost.disk == disk);
    if let Some(lost) = plan.moves.iter().find_map(|step| is_lost(step.to)) {
        // Another spare is found for what it was to take, as if nothing had been begun.
        let mut batch = give_up(map, plan, |step| is_lost(step.to).is_some());
        batch.push(Verb::EndPlan { plan: plan.id });
        let why = vec![format!(
            "{} is given up: {}, where it goes to: {}",
            plan.id,
            map.disk_name(lost.disk),
            lost.why
        )];
        return Change { batch, why };
    }
    let mut change = Change::default();
    let mut done = true;
    for step in &plan.moves {
        let mut lines = Lines::default();
        let name = map.disk_name(step.to);
        for (span, run) in pieces(map, step) {
            let in_sync = span.replica_on(step.to).is_some_and(|copy| copy.state == ReplicaState::InSync);
            let old = step.from.and_then(|from| span.replica_on(from));
            // The new copy had taken the old one's place, and was dropped since: not for this plan to bring back.
            let over = step.from.is_some() && old.is_none() && span.replica_on(step.to).is_none();
            done &= in_sync || over;
            if !in_sync {
                continue;
            }
            let (Some(copy), Some(device)) = (span.replica_on(step.to), map.device(run.device)) else {
                continue;
            };
            let is_primary = span.primary().disk == step.to;
            let old_is_primary = step.from == Some(span.primary().disk);
            // A copy that is not what the map says is another matter first.
            let intact = now.registry.standing(map, device, span, copy, now.now_ms) == Standing::Intact;
            let goes_first = (step.primary || old_is_primary) && !is_primary;
            if goes_first && !intact {
                done = false;
                continue;
            }
            if goes_first {
                change.batch.extend(promotion(
                    map,
                    now.registry,
                    now.now_ms,
                    &as_run(span, run),
                    run,
                    step.to,
                ));
                lines.add(&as_run(span, run), format!("served by {name} from now on"));
            }
            if let Some(old) = old {
                change.batch.push(Verb::DropReplica { run, disk: old.disk });
                lines.add(
                    &as_run(span, run),
                    format!("{name} is in sync and takes the place of {}", map.disk_name(old.disk)),
                );
            }
        }
        if let Some(device) = map.device(step.run.device) {
            change.why.extend(lines.finish(&device.name, device.slices));
        }
    }
    if done {
        change.batch.push(Verb::EndPlan { plan: plan.id });
        // What was replaced comes back as the spare, never as the owner.
        let spares = spares_after(map, &change.batch, plan.sources());
        for verb in &spares {
            if let Verb::SetSpare { disk, .. } = verb {
                change.why.push(format!("{} is a spare from now on", map.disk_name(*disk)));
            }
        }
        change.batch.extend(spares);
        change.why.push(format!("{} is done: {}", plan.id, plan.cause));
    }
    change
}

/// The part of a span that a run covers.
fn as_run(span: &Span, run: Run) -> Span {
    Span { first: run.first, count: run.count, ..span.clone() }
}
