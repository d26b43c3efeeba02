//! A plan goes on: what became in sync takes the place of what was there.
//!
//! The steps are found anew from the map at every look, so nobody's death can lose any of them. A move that is finished
//! leaves its plan in the same change, so it is never made again against whoever decides otherwise afterwards.

use super::regeneration::Situation;
use super::registry::Standing;
use super::{Change, Lines, promotion};
use crate::control::PlanOrder;
use crate::ids::{DiskId, PlanId};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::{Run, Verb};
use crate::map::wanted::next::Begin;
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
            let batch = give_up(map, plan, |_| true);
            (batch, format!("plan {} is cancelled: copies that were not in sync yet are given up", id.0))
        }
    };
    Ok(Change { batch, why: vec![format!("{what}, by the operator")] })
}

/// Gives up those moves of a plan that `gone` chooses; it goes on with the rest, if there is any. New copies that are
/// not in sync go, and the spares that it took are spares again if nothing is left on them.
fn give_up(map: &DistributionMap, plan: &Plan, gone: impl Fn(&Move) -> bool) -> Vec<Verb> {
    let mut batch = Vec::new();
    for step in plan.moves.iter().filter(|step| gone(step)) {
        for (span, run) in pieces(map, step) {
            // Without the old copy, the new one is the only one that there is besides: it is resynced, or made again
            // on another spare, like any other.
            if step.from.is_some_and(|from| span.replica_on(from).is_none()) {
                continue;
            }
            // What was there before the plan is not its to give up.
            let Some(new) = span.replica_on(step.to).filter(|copy| copy.added.0 >= plan.id.0) else {
                continue;
            };
            let is_primary = span.primary().disk == step.to;
            // Of two in one failure set one has to go with the plan: as many are in sync as before it, either way.
            let beside = beside(map, span, step);
            if new.state == ReplicaState::InSync && (is_primary || beside != Some(ReplicaState::InSync)) {
                let old = step.from.filter(|_| beside.is_some());
                batch.extend(old.map(|disk| Verb::DropReplica { run, disk }));
            } else if new.state != ReplicaState::InSync || beside.is_some() {
                batch.push(Verb::DropReplica { run, disk: step.to });
            }
        }
    }
    let moves: Vec<Move> = plan.moves.iter().filter(|step| !gone(step)).copied().collect();
    let spares =
        plan.spares.iter().copied().filter(|disk| !moves.iter().any(|step| step.to == *disk)).collect();
    batch.extend(go_on(plan, moves, plan.finished));
    batch.extend(spares_after(map, &batch, spares));
    batch
}

/// A plan goes on with these moves and no others; without any it is at its end.
fn go_on(plan: &Plan, moves: Vec<Move>, finished: u64) -> Vec<Verb> {
    let mut batch = vec![Verb::EndPlan { plan: plan.id }];
    if !moves.is_empty() {
        batch.push(Verb::BeginPlan { plan: Plan { moves, finished, ..plan.clone() } });
    }
    batch
}

/// What the old copy of a move is worth if it may be beside the new one for as long as the plan lasts only.
fn beside(map: &DistributionMap, span: &Span, step: &Move) -> Option<ReplicaState> {
    let old = step.from.and_then(|from| span.replica_on(from))?;
    let (a, b) = (map.node_of(old.disk)?, map.node_of(step.to)?);
    (!map.other_set(a, b)).then_some(old.state)
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
        // One in whose place the old copy cannot be now, since it has what that lacks: somebody goes first or comes back.
        let needed = |step: &Move| {
            let newer =
                |span: &Span| span.replica_on(step.to).is_some_and(|copy| copy.state == ReplicaState::InSync);
            let first = |span: &Span| span.primary().disk == step.to;
            pieces(map, step).any(|(span, _)| match beside(map, span, step) {
                Some(old) => newer(span) && (first(span) || old != ReplicaState::InSync),
                None => false,
            })
        };
        if plan.moves.iter().any(|step| is_lost(step.to).is_some() && needed(step)) {
            return Change::default();
        }
        // Another place is found for what it was to take, as if nothing had been begun.
        let batch = give_up(map, plan, |step| is_lost(step.to).is_some());
        let name = map.disk_name(lost.disk);
        let what = match plan.moves.iter().all(|step| is_lost(step.to).is_some()) {
            true => "is given up",
            false => "goes on without what is given up",
        };
        let why = vec![format!("{} {what}: {name}, where it goes to: {}", plan.id, lost.why)];
        return Change { batch, why };
    }
    let mut change = Change::default();
    let mut rest: Vec<Move> = Vec::new();
    for step in &plan.moves {
        let mut lines = Lines::default();
        let name = map.disk_name(step.to);
        let mut left = Vec::new();
        for (span, run) in pieces(map, step) {
            if step.is_done(span) {
                continue;
            }
            // What the map says of one that is not here may be untrue by now; until it is back the old copy stays.
            let mut members = span.members().filter(|copy| copy.disk == step.to);
            if !members.any(|new| now.registry.standing(map, span, new, now.now_ms) == Standing::Intact) {
                left.push(run);
                continue;
            }
            let first = span.primary().disk;
            if first != step.to && (step.primary || step.from == Some(first)) {
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
            if let Some(old) = step.from.and_then(|from| span.replica_on(from)) {
                change.batch.push(Verb::DropReplica { run, disk: old.disk });
                lines.add(
                    &as_run(span, run),
                    format!("{name} is in sync and takes the place of {}", map.disk_name(old.disk)),
                );
            }
        }
        rest.extend(joined(left).map(|run| Move { run, ..*step }));
        if let Some(device) = map.device(step.run.device) {
            change.why.extend(lines.finish(&device.name, device.slices));
        }
    }
    let done = rest.is_empty();
    if rest != plan.moves {
        let slices = |moves: &[Move]| -> u64 { moves.iter().map(|step| u64::from(step.run.count)).sum() };
        let finished = plan.finished + slices(&plan.moves) - slices(&rest);
        change.batch.extend(go_on(plan, rest, finished));
    }
    if !done {
        begin_copies(map, now, plan, &mut change);
    }
    if done {
        // What was replaced comes back as the spare, never as the owner.
        let spares = spares_after(map, &change.batch, plan.spares.clone());
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

/// Runs of one device in their order, those that touch as one.
fn joined(runs: Vec<Run>) -> impl Iterator<Item = Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.first.0 + last.count == run.first.0 => last.count += run.count,
            _ => joined.push(run),
        }
    }
    joined.into_iter()
}

/// Begins the copies that have room by now, and gives up a plan of which nothing can be done any more.
fn begin_copies(map: &DistributionMap, now: &Situation<'_>, plan: &Plan, change: &mut Change) {
    let outlook = map.outlook(plan);
    // Another plan may still make room, but not one that rests or has none itself.
    let waits = |other: &Plan| other.paused || map.outlook(other).is_stuck();
    let alone = || map.plans.iter().all(|other| other.id == plan.id || waits(other));
    if outlook.is_stuck() && change.is_empty() && alone() {
        change.batch = give_up(map, plan, |_| true);
        change.why.push(format!(
            "{} is given up: what is left of it has no room any more, since copies have gone elsewhere meanwhile; what \
             it has moved stays",
            plan.id
        ));
        return;
    }
    let mut slices = 0;
    let mut disks = BTreeSet::new();
    for Begin { run, disk, segment } in outlook.begin {
        // One that is away for a moment is waited for.
        if let Some(incarnation) = now.registry.usable(map, disk, now.now_ms) {
            change.batch.push(Verb::AddReplica { run, disk, segment, incarnation });
            slices += u64::from(run.count);
            disks.insert(disk);
        }
    }
    if slices > 0 {
        let onto = match disks.len() {
            1..=4 => disks.iter().map(|disk| map.disk_name(*disk)).collect::<Vec<_>>().join(", "),
            count => format!("{count} disks"),
        };
        change.why.push(format!("{}: {slices} slices begin to be copied onto {onto}", plan.id));
    }
}

/// The part of a span that a run covers.
fn as_run(span: &Span, run: Run) -> Span {
    Span { first: run.first, count: run.count, ..span.clone() }
}
