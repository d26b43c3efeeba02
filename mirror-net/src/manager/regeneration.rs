//! Regeneration: copies that are gone are made again on a spare, those of the primary segment from
//! their mirrors and those of the secondary segment from the primaries, all at the same time.
//!
//! What decides is a disk: one that failed, one that its node is there without, or that of a node that is away, for long. All its
//! copies go to one spare disk, in one plan for all disks of a node. The plan's first step
//! adds the new copies, which the primaries then fill; when they are in sync the old ones are dropped,
//! and what had its home there is served from there ([`advance`](super::advance)).
//!
//! A plan that takes copies away from such a disk goes on with those that it has begun to make elsewhere. All others are
//! made again here, those too that it has not come to yet.

use super::registry::Registry;
use super::{Change, Lines, detector, run_of};
use crate::config::Policy;
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, DiskId, Incarnation, NodeId, PlanId, SliceIndex};
use crate::map::plan::{Move, Plan};
use crate::map::runs::Runs;
use crate::map::verbs::{Run, Verb};
use crate::map::{Disk, DistributionMap, Node, ReplicaState};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What the decision depends on besides the map.
pub struct Situation<'a> {
    /// What the nodes have said.
    pub registry: &'a Registry,
    /// The thresholds.
    pub policy: &'a Policy,
    /// When the manager began to listen.
    pub started_ms: u64,
    /// The time.
    pub now_ms: u64,
}

/// A disk that is to be made again, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lost {
    /// The disk.
    pub disk: DiskId,
    /// For people.
    pub why: String,
}

/// Disks whose copies are gone for long, in order of id. Copies on them that the map counts on are no
/// matter of this: they have to be stale first, by a failover or at a primary's request.
pub fn lost_disks(map: &DistributionMap, now: &Situation<'_>) -> Vec<Lost> {
    let spare_after = now.policy.spare_after.as_millis() as u64;
    let mut lost = Vec::new();
    for disk in map.disks.iter().filter(|disk| !disk.spare) {
        let why = match (&disk.failed, map.node(disk.node)) {
            (Some(failed), _) => format!("it failed: {}", failed.reason),
            (None, Some(node)) => {
                match detector::away_ms(now.registry, &node.name, now.started_ms, now.now_ms) {
                    Some(away) if away >= spare_after => {
                        format!("{} has been away for {} s", node.name, away / 1_000)
                    }
                    Some(_) => continue,
                    None => match without_ms(map, now, node, disk.id) {
                        Some(without) if without >= spare_after => {
                            format!("{} has been there without it for {} s", node.name, without / 1_000)
                        }
                        _ => continue,
                    },
                }
            }
            (None, None) => continue,
        };
        lost.push(Lost { disk: disk.id, why });
    }
    lost
}

/// For how long a node that is there has not had one of its disks; `None` if it has it.
fn without_ms(map: &DistributionMap, now: &Situation<'_>, node: &Node, disk: DiskId) -> Option<u64> {
    let entry = now.registry.get(&node.name)?;
    let missing = entry.incarnation(map.cluster, disk).is_none();
    missing.then(|| now.now_ms.saturating_sub(entry.disks_since_ms))
}

/// A disk that gets no spare at this moment.
pub(super) struct Hindered {
    pub(super) disk: DiskId,
    /// What is to be made again.
    pub(super) gone: Vec<Gone>,
    /// For people.
    pub(super) why: String,
}

/// Copies of a run that are gone.
#[derive(Clone, Copy)]
pub(super) struct Gone {
    pub(super) run: Run,
    pub(super) segment: Segment,
    /// A plan moves another copy of these slices.
    beside_a_move: bool,
}

/// What plans have begun, by device.
pub(super) struct Begun<'a> {
    map: &'a DistributionMap,
    /// By the disk that is rid of it as well: what is made again already.
    replaced: HashMap<(DeviceId, DiskId), Runs>,
    moved: HashMap<DeviceId, Runs>,
}

impl<'a> Begun<'a> {
    pub(super) fn of(map: &'a DistributionMap) -> Self {
        let mut begun = Self { map, replaced: HashMap::new(), moved: HashMap::new() };
        for step in map.plans.iter().flat_map(|plan| &plan.moves) {
            for (_, run) in step.pieces(map).filter(|(span, _)| span.replica_on(step.to).is_some()) {
                let (first, end) = (run.first.0, run.first.0 + run.count);
                begun.moved.entry(run.device).or_default().add(first, end);
                if let Some(from) = step.from {
                    begun.replaced.entry((run.device, from)).or_default().add(first, end);
                }
            }
        }
        begun
    }

    /// Whether any of a disk's copies of a run is made again elsewhere.
    pub(super) fn replaces(&self, run: Run, disk: DiskId) -> bool {
        let end = run.first.0.saturating_add(run.count);
        self.replaced.get(&(run.device, disk)).is_some_and(|runs| runs.overlaps(run.first.0, end))
    }

    /// The copies on lost disks that can be made again, by disk: stale, with a member elsewhere, and not made again
    /// already. What a plan has not begun to take from there counts as gone: nobody waits for its turn.
    fn gone(&self, lost: &BTreeSet<DiskId>) -> BTreeMap<DiskId, Vec<Gone>> {
        let mut gone: BTreeMap<DiskId, Vec<Gone>> = BTreeMap::new();
        for device in &self.map.devices {
            for span in &device.spans {
                let stale = span.replicas.iter().filter(|copy| copy.state == ReplicaState::Stale);
                for copy in stale.filter(|copy| lost.contains(&copy.disk)) {
                    let replaced = self.replaced.get(&(device.id, copy.disk));
                    let whole = vec![(span.first.0, span.end())];
                    let left = replaced.map_or(whole, |runs| runs.missing(span.first.0, span.end()));
                    gone.entry(copy.disk).or_default().extend(left.into_iter().map(|(first, end)| Gone {
                        run: Run { device: device.id, first: SliceIndex(first), count: end - first },
                        segment: copy.segment,
                        beside_a_move:
                            self.moved.get(&device.id).is_some_and(|runs| runs.overlaps(first, end)),
                    }));
                }
            }
        }
        gone
    }
}

/// What regeneration begins now: one change, and which disks looked at so far get no spare.
///
/// `held` are disks that an operator does not want made again.
pub(super) fn begin(
    map: &DistributionMap,
    now: &Situation<'_>,
    held: &BTreeSet<DiskId>,
) -> (Change, Vec<Hindered>) {
    let mut hindered = Vec::new();
    let lost: BTreeMap<DiskId, String> = lost_disks(map, now)
        .into_iter()
        .filter(|lost| !held.contains(&lost.disk))
        .map(|lost| (lost.disk, lost.why))
        .collect();
    if lost.is_empty() {
        return (Change::default(), hindered);
    }
    let given_up = give_up_unfinished(map, &lost);
    if !given_up.is_empty() {
        return (given_up, hindered);
    }
    let gone = Begun::of(map).gone(&lost.keys().copied().collect());
    let mut by_node: BTreeMap<NodeId, Vec<(DiskId, Vec<Gone>)>> = BTreeMap::new();
    for (disk, gone) in gone.into_iter().filter(|(_, gone)| !gone.is_empty()) {
        by_node.entry(map.node_of(disk).unwrap_or_default()).or_default().push((disk, gone));
    }
    for (node, disks) in by_node {
        let mut taken = BTreeSet::new();
        let mut batch = Vec::new();
        let mut moves = Vec::new();
        let mut spares = BTreeSet::new();
        let mut why = Vec::new();
        for (disk, gone) in disks {
            match replace(map, now, disk, &gone, &mut taken) {
                Ok((to, steps, of_disk)) => {
                    why.push(format!(
                        "{} is made again on {}: {}",
                        map.disk_name(disk),
                        map.disk_name(to),
                        lost[&disk]
                    ));
                    batch.extend(steps);
                    moves.extend(of_disk);
                    spares.extend([disk, to]);
                }
                Err(reason) => {
                    let why = format!("{} cannot be made again: {reason}", map.disk_name(disk));
                    hindered.push(Hindered { disk, gone, why });
                }
            }
        }
        if !moves.is_empty() {
            let id = PlanId(map.version.0 + 1);
            let cause = format!("regeneration of what {} had: {}", map.node_name(node), why.join("; "));
            batch.extend(without(map, &moves));
            batch.push(Verb::BeginPlan { plan: Plan { spares, ..Plan::new(id, cause, moves) } });
            return (Change { batch, why }, hindered);
        }
    }
    (Change::default(), hindered)
}

/// A copy whose node went away for good while it was being filled is as good as one that was never begun. Its primary
/// does not count on it, and so never asks. What a plan makes on such a disk is for the plan to give up.
fn give_up_unfinished(map: &DistributionMap, lost: &BTreeMap<DiskId, String>) -> Change {
    let mut change = Change::default();
    for device in &map.devices {
        let mut lines = Lines::default();
        for span in &device.spans {
            let run = run_of(device.id, span);
            let is_target = |disk: DiskId| {
                let mut steps = map.plans.iter().flat_map(|plan| &plan.moves).filter(|step| step.to == disk);
                steps.any(|step| step.run.overlaps(&run))
            };
            let unfinished = span.replicas.iter().filter(|copy| copy.state == ReplicaState::Syncing);
            for copy in unfinished.filter(|copy| lost.contains_key(&copy.disk) && !is_target(copy.disk)) {
                let state = ReplicaState::Stale;
                change.batch.push(Verb::Mark { run, disk: copy.disk, state, incarnation: None });
                let (disk, why) = (map.disk_name(copy.disk), &lost[&copy.disk]);
                lines.add(span, format!("{disk} is stale, it was being filled when it was lost: {why}"));
            }
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    change
}

/// The plans that were to take the same copies elsewhere and have not begun to do so go on without them.
fn without(map: &DistributionMap, moves: &[Move]) -> Vec<Verb> {
    let mut made_again: HashMap<(DeviceId, DiskId), Runs> = HashMap::new();
    for step in moves {
        let Some(from) = step.from else { continue };
        let runs = made_again.entry((step.run.device, from)).or_default();
        runs.add(step.run.first.0, step.run.first.0 + step.run.count);
    }
    let mut batch = Vec::new();
    for plan in &map.plans {
        let mut rest = Vec::new();
        for step in &plan.moves {
            let Some(runs) = step.from.and_then(|from| made_again.get(&(step.run.device, from))) else {
                rest.push(*step);
                continue;
            };
            // What has begun was not made again otherwise.
            let left = runs.missing(step.run.first.0, step.run.first.0 + step.run.count);
            rest.extend(left.into_iter().map(|(first, end)| Move {
                run: Run { first: SliceIndex(first), count: end - first, ..step.run },
                ..*step
            }));
        }
        if rest != plan.moves {
            batch.push(Verb::EndPlan { plan: plan.id });
            batch.push(Verb::BeginPlan { plan: Plan { moves: rest, ..plan.clone() } });
        }
    }
    batch
}

/// Finds a spare for all that is gone with a disk, or at least for what no plan has to do with; the steps that add the
/// copies, and the moves.
fn replace(
    map: &DistributionMap,
    now: &Situation<'_>,
    from: DiskId,
    gone: &[Gone],
    taken: &mut BTreeSet<DiskId>,
) -> Result<(DiskId, Vec<Verb>, Vec<Move>), String> {
    let mut reasons = Vec::new();
    let apart: Vec<Gone> = gone.iter().filter(|gone| !gone.beside_a_move).copied().collect();
    for (spare, taken_over) in candidates(map, from) {
        let name = map.disk_name(spare.id);
        let Some(incarnation) = now.registry.usable(map, spare.id, now.now_ms) else {
            reasons.push(format!("the spare {name} is not there"));
            continue;
        };
        let is_taken = || map.plans.iter().any(|plan| plan.concerns(spare.id));
        if taken.contains(&spare.id) || (!taken_over && is_taken()) {
            reasons.push(format!("the spare {name} is taken"));
            continue;
        }
        // What has a copy there already needs another spare.
        let is_new =
            |gone: &&Gone| map.spans_of(gone.run).all(|(span, _)| span.replica_on(spare.id).is_none());
        let [gone, apart] =
            [gone, &apart].map(|gone| gone.iter().filter(is_new).copied().collect::<Vec<_>>());
        let mut reason = format!("the spare {name} has the other copy");
        for gone in [&gone, &apart] {
            if gone.is_empty() {
                continue;
            }
            if let Some((segment, needs)) = short(spare, gone) {
                let has = spare.slots.of(segment);
                reason = format!(
                    "the spare {name} has {has} slots in its {segment:?} segment, {needs} are needed"
                );
                continue;
            }
            // What the map allows decides. The old copies stay until the new ones are in sync, unless they
            // stand in the way: on the same node, in the same failure set, or one copy too many.
            for drop_first in [false, true] {
                let steps = steps(from, spare.id, incarnation, gone, drop_first);
                match map.apply(&steps) {
                    Ok(_) => {
                        taken.insert(spare.id);
                        let moves = gone.iter().map(|gone| Move {
                            run: gone.run,
                            from: Some(from),
                            to: spare.id,
                            segment: gone.segment,
                            primary: gone.segment == Segment::Primary,
                        });
                        return Ok((spare.id, steps, moves.collect()));
                    }
                    Err(error) => reason = format!("the spare {name} cannot take it: {error}"),
                }
            }
        }
        reasons.push(reason);
    }
    if reasons.is_empty() {
        reasons.push("there is no spare".to_owned());
    }
    Err(reasons.join("; "))
}

/// The segment in which an empty disk has too few slots for what is gone, with how many are needed.
pub(super) fn short(disk: &Disk, gone: &[Gone]) -> Option<(Segment, u32)> {
    let needs =
        |segment| gone.iter().filter(|gone| gone.segment == segment).map(|gone| gone.run.count).sum::<u32>();
    let mut segments = [Segment::Primary, Segment::Secondary].into_iter().map(|it| (it, needs(it)));
    segments.find(|(segment, needs)| *needs > disk.slots.of(*segment))
}

/// Disks on which what a disk had may be made again, the best first, and whether they are spares no more: those on which
/// other copies of it are made again already.
fn candidates(map: &DistributionMap, from: DiskId) -> Vec<(&Disk, bool)> {
    let mut candidates: Vec<(&Disk, bool)> = Vec::new();
    for plan in map.plans.iter().filter(|plan| !plan.cancelled && plan.spares.contains(&from)) {
        let onto = plan.moves.iter().filter(|step| step.from == Some(from)).map(|step| step.to);
        let onto: BTreeSet<DiskId> = onto.filter(|disk| plan.spares.contains(disk)).collect();
        candidates.extend(onto.into_iter().filter_map(|disk| Some((map.disk(disk)?, true))));
    }
    let mut spares: Vec<&Disk> = map.disks.iter().filter(|disk| disk.spare).collect();
    // The smallest that will do: a larger one may be needed for a larger disk.
    spares.sort_by_key(|disk| (disk.slots.total(), disk.id));
    candidates.extend(spares.into_iter().map(|disk| (disk, false)));
    candidates
}

fn steps(from: DiskId, to: DiskId, incarnation: Incarnation, gone: &[Gone], drop_first: bool) -> Vec<Verb> {
    let mut steps = vec![Verb::SetSpare { disk: to, spare: false }];
    for Gone { run, segment, .. } in gone.iter().copied() {
        if drop_first {
            steps.push(Verb::DropReplica { run, disk: from });
        }
        steps.push(Verb::AddReplica { run, disk: to, segment, incarnation });
    }
    steps
}
