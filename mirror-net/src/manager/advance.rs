//! A plan goes on: what became in sync takes the place of what was there.
//!
//! The steps are found anew from the map at every look, so nobody's death can lose any of them. A move that is finished
//! leaves its plan in the same change, so it is never made again against whoever decides otherwise afterwards.

use super::regeneration::Situation;
use super::settle::{Judge, Verdict};
use super::{Change, Lines, promotion, retiring};
use crate::control::PlanOrder;
use crate::ids::{DeviceId, DiskId, PlanId};
use crate::map::plan::{Move, Plan};
use crate::map::runs::Runs;
use crate::map::verbs::{Run, Verb};
use crate::map::wanted::next::Begin;
use crate::map::{DistributionMap, ReplicaState, Span};
use std::collections::{BTreeMap, BTreeSet};

/// The next steps of the first plan that has any.
pub fn advance(map: &DistributionMap, now: &Situation<'_>) -> Change {
    if map.plans.is_empty() {
        return Change::default();
    }
    let judge = Judge::new(map, now);
    let mut changes = map.plans.iter().map(|plan| {
        let lost = |step: &Move, _: &Span, _: Run| plan.cancelled || judge.lost.contains_key(&step.to);
        let mut pass = Pass::of(&judge, plan, &lost);
        if !plan.paused && !plan.cancelled {
            pass.begin_copies();
        }
        pass.finish()
    });
    changes.find(|change| !change.is_empty()).unwrap_or_default()
}

/// Gives up what waits for a copy that is lost, and in whose place nothing comes: the new copy takes its place, in the
/// first plan that has such moves. To be asked once there is nothing else to be done.
pub fn give_up_held(map: &DistributionMap, now: &Situation<'_>) -> Change {
    if map.plans.is_empty() {
        return Change::default();
    }
    let judge = Judge::new(map, now);
    let mut changes = map.plans.iter().filter(|plan| !plan.cancelled).map(|plan| {
        let held = |step: &Move, span: &Span, run: Run| judge.is_held(step, span, run);
        Pass::of(&judge, plan, &held).finish()
    });
    changes.find(|change| !change.is_empty()).unwrap_or_default()
}

/// What an operator's order about a plan changes; an error, for people, if it changes nothing.
pub fn ordered(
    map: &DistributionMap,
    now: &Situation<'_>,
    id: PlanId,
    order: PlanOrder,
) -> Result<Change, String> {
    let Some(plan) = map.plan(id) else {
        let there: Vec<String> = map.plans.iter().map(|plan| plan.id.0.to_string()).collect();
        return Err(match there.as_slice() {
            [] => format!("there is no plan {}: nothing is being moved", id.0),
            there => format!("there is no plan {}; there are {}", id.0, there.join(", ")),
        });
    };
    if plan.cancelled {
        return Err(format!(
            "plan {} is cancelled: it is over once one copy too many can go everywhere, see `mirrorctl status`",
            id.0
        ));
    }
    match order {
        PlanOrder::Pause | PlanOrder::Resume => {
            let paused = order == PlanOrder::Pause;
            let state = if paused { "paused" } else { "under way" };
            if plan.paused == paused {
                return Err(format!("plan {} is {state} already", id.0));
            }
            let why = vec![format!("plan {} is {state}, by the operator", id.0)];
            Ok(Change { batch: vec![Verb::PausePlan { plan: id, paused }], why })
        }
        PlanOrder::Cancel => {
            let judge = Judge::new(map, now);
            let plan = Plan { cancelled: true, paused: false, ..plan.clone() };
            Ok(Pass::of(&judge, &plan, &|_, _, _| true).cancel())
        }
    }
}

/// One look at a plan: what becomes of each of its moves.
struct Pass<'a> {
    judge: &'a Judge<'a>,
    plan: &'a Plan,
    change: Change,
    /// What is still to move.
    rest: Vec<Move>,
    /// Slices whose moves are finished.
    finished: u64,
    /// Slices whose moves are given up, and the disks that they were to go to.
    given_up: u64,
    targets: BTreeSet<DiskId>,
    /// It has come to its end with no word about what is left.
    stuck: bool,
}

impl<'a> Pass<'a> {
    /// Finishes what can be, and gives up what `gone` chooses.
    fn of(judge: &'a Judge<'a>, plan: &'a Plan, gone: &dyn Fn(&Move, &Span, Run) -> bool) -> Self {
        let mut pass = Self {
            judge,
            plan,
            change: Change::default(),
            rest: Vec::new(),
            finished: plan.finished,
            given_up: 0,
            targets: BTreeSet::new(),
            stuck: false,
        };
        let map = judge.map;
        // Slices that something earlier in the plan has to do with still.
        let mut busy: BTreeMap<DeviceId, Runs> = BTreeMap::new();
        for step in &plan.moves {
            let mut lines = Lines::default();
            let mut left = Vec::new();
            let busy = busy.entry(step.run.device).or_default();
            for (span, run) in step.pieces(map) {
                if step.is_done(span) {
                    pass.finished += u64::from(run.count);
                    continue;
                }
                let end = run.first.0 + run.count;
                if busy.overlaps(run.first.0, end) {
                    left.push(run);
                    continue;
                }
                let gone = gone(step, span, run);
                let verdict = match (gone, plan.paused) {
                    (true, _) => judge.given_up(plan, step, span, run),
                    (false, true) => Verdict::Wait,
                    (false, false) => judge.finished(step, span, run),
                };
                match verdict {
                    Verdict::Wait => left.push(run),
                    Verdict::Leave => {}
                    Verdict::Settle { promote, drop } => {
                        pass.settle(step, &as_run(span, run), promote, drop, !gone, &mut lines)
                    }
                }
                if verdict != Verdict::Leave {
                    busy.add(run.first.0, end);
                }
                if verdict != Verdict::Wait {
                    let counter = if gone { &mut pass.given_up } else { &mut pass.finished };
                    *counter += u64::from(run.count);
                    pass.targets.extend(gone.then_some(step.to));
                }
            }
            pass.rest.extend(joined(left).map(|run| Move { run, ..*step }));
            if let Some(device) = map.device(step.run.device) {
                pass.change.why.extend(lines.finish(&device.name, device.slices));
            }
        }
        pass
    }

    fn settle(
        &mut self,
        step: &Move,
        span: &Span,
        promote: bool,
        drop: Option<DiskId>,
        finished: bool,
        lines: &mut Lines,
    ) {
        let Judge { map, now, .. } = *self.judge;
        let run = Run { device: step.run.device, first: span.first, count: span.count };
        let name = map.disk_name(step.to);
        if promote {
            self.change.batch.extend(promotion(map, now.registry, now.now_ms, span, run, step.to));
            lines.add(span, format!("served by {name} from now on"));
        }
        let Some(disk) = drop else { return };
        self.change.batch.push(Verb::DropReplica { run, disk });
        let in_sync = span.replica_on(step.to).is_some_and(|copy| copy.state == ReplicaState::InSync);
        let dropped = map.disk_name(disk);
        let line = match disk == step.to {
            _ if finished => format!("{name} is in sync and takes the place of {dropped}"),
            true => format!("the copy on {name} is given up"),
            false if in_sync && step.from != Some(disk) => {
                format!("{name} is in sync and takes the place of {dropped}, which is lost")
            }
            false => format!("{name} is in sync and stays, the copy on {dropped} is given up"),
        };
        lines.add(span, line);
    }

    /// Begins the copies that have room by now, and gives up a plan of which nothing can be done any more.
    fn begin_copies(&mut self) {
        let Judge { map, now, .. } = *self.judge;
        let plan = self.plan;
        if self.rest.is_empty() {
            return;
        }
        let outlook = map.outlook(plan);
        // Another plan may still make room, but not one that rests or has none itself.
        let waits = |other: &Plan| other.paused || map.outlook(other).is_stuck();
        let alone = || map.plans.iter().all(|other| other.id == plan.id || waits(other));
        if outlook.is_stuck() && self.change.is_empty() && self.rest == plan.moves && alone() {
            self.rest.clear();
            self.stuck = true;
            return;
        }
        let mut slices = 0;
        let mut disks = BTreeSet::new();
        for Begin { run, disk, segment } in outlook.begin {
            // One that is away for a moment is waited for.
            if let Some(incarnation) = now.registry.usable(map, disk, now.now_ms) {
                self.change.batch.push(Verb::AddReplica { run, disk, segment, incarnation });
                slices += u64::from(run.count);
                disks.insert(disk);
            }
        }
        if slices > 0 {
            let onto = match disks.len() {
                1..=4 => disks.iter().map(|disk| map.disk_name(*disk)).collect::<Vec<_>>().join(", "),
                count => format!("{count} disks"),
            };
            self.change.why.push(format!("{}: {slices} slices begin to be copied onto {onto}", plan.id));
        }
    }

    /// What an operator's word changes: whatever can be decided now; the rest once it can be.
    fn cancel(mut self) -> Change {
        let plan = self.plan;
        let waits: u64 = self.rest.iter().map(|step| u64::from(step.run.count)).sum();
        let later = match waits {
            0 => String::new(),
            waits => format!("; {waits} slices have a copy too many until it is certain which of two can go"),
        };
        let line = format!(
            "plan {} is cancelled, by the operator: what has not taken its new place is given up{later}",
            plan.id.0
        );
        self.change.why.insert(0, line);
        self.conclude();
        self.change
    }

    fn finish(mut self) -> Change {
        let plan = self.plan;
        if self.rest == plan.moves && !self.is_over() {
            return self.change;
        }
        if self.stuck {
            self.change.why.push(format!(
                "{} is given up: what is left of it has no room any more, since copies have gone elsewhere meanwhile; \
                 what it has moved stays",
                plan.id
            ));
        } else if self.given_up > 0 && !plan.cancelled {
            let what = if self.rest.is_empty() { "is given up" } else { "goes on without what is given up" };
            let named = self.targets.iter().map(|disk| {
                let name = self.judge.map.disk_name(*disk);
                match self.judge.lost.get(disk) {
                    Some(why) => format!("{name}, where it goes to: {why}"),
                    None => {
                        format!("what is on {name} by now takes the place of another copy, which is lost")
                    }
                }
            });
            let named = named.collect::<Vec<_>>().join("; ");
            self.change.why.push(format!("{} {what}: {named}", plan.id));
        }
        self.conclude();
        if !self.is_over() {
            return self.change;
        }
        if !self.stuck && self.given_up == 0 {
            let (id, cause) = (plan.id, &plan.cause);
            self.change.why.push(match plan.cancelled {
                true => format!("{id} is over: no slice has a copy too many any more"),
                false => format!("{id} is done: {cause}"),
            });
        } else if plan.cancelled {
            self.change.why.push(format!("{} is over: no slice has a copy too many any more", plan.id));
        }
        self.change
    }

    /// Nothing is left to be done, nor to be waited for before its disks can leave the map.
    fn is_over(&self) -> bool {
        let others = self.judge.map.plans.iter().filter(|other| other.id != self.plan.id);
        self.rest.is_empty() && (self.plan.cancelled || !retiring::is_awaited(self.plan, others))
    }

    /// The plan goes on with what is left and no more; without anything it is at its end.
    fn conclude(&mut self) {
        let plan = self.plan;
        self.change.batch.push(Verb::EndPlan { plan: plan.id });
        let over = self.is_over();
        if !over {
            let plan = Plan { moves: self.rest.clone(), finished: self.finished, ..plan.clone() };
            self.change.batch.push(Verb::BeginPlan { plan });
        }
        if !over && self.given_up == 0 {
            return;
        }
        // What was replaced comes back as the spare, never as the owner; and what was taken for nothing is one again.
        let others = self.judge.map.plans.iter().filter(|other| other.id != plan.id);
        let others = others.flat_map(|other| &other.moves);
        let needed: BTreeSet<DiskId> = self.rest.iter().chain(others).map(|step| step.to).collect();
        let spares = plan.spares.iter().copied().filter(|disk| !needed.contains(disk)).collect();
        for verb in spares_after(self.judge.map, &self.change.batch, spares) {
            if let Verb::SetSpare { disk, .. } = verb {
                self.change.why.push(format!("{} is a spare from now on", self.judge.map.disk_name(disk)));
            }
            self.change.batch.push(verb);
        }
        if over && !plan.cancelled {
            retiring::retire(self.judge.map, plan, &mut self.change);
        }
    }
}

/// Makes spares of those disks that work and hold no copies any more once a batch is applied.
fn spares_after(map: &DistributionMap, batch: &[Verb], disks: BTreeSet<DiskId>) -> Vec<Verb> {
    let after = map.apply(batch).ok().flatten();
    let after = after.as_ref().unwrap_or(map);
    let works = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.failed.is_none() && !disk.spare);
    let in_use = after.disks_in_use();
    let emptied = disks.into_iter().filter(|disk| works(disk) && !in_use.contains(disk));
    emptied.map(|disk| Verb::SetSpare { disk, spare: true }).collect()
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

/// The part of a span that a run covers.
fn as_run(span: &Span, run: Run) -> Span {
    Span { first: run.first, count: run.count, ..span.clone() }
}
