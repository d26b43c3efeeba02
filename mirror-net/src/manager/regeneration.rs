//! Regeneration: copies that are gone are made again on a spare, those of the primary segment from
//! their mirrors and those of the secondary segment from the primaries, all at the same time.
//!
//! What decides is a disk: one that failed, or that of a node that has been away for long. All its
//! copies go to one spare disk, in one plan for all disks of a node. The plan's first step
//! adds the new copies, which the primaries then fill; when they are in sync the old ones are dropped,
//! and what had its home there is served from there ([`advance`](super::advance)).

use super::registry::Registry;
use super::{Change, detector, run_of};
use crate::config::Policy;
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, DiskId, Incarnation, NodeId, PlanId};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::{Run, Verb};
use crate::map::{DistributionMap, ReplicaState};
use std::collections::{BTreeMap, BTreeSet};

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
                    _ => continue,
                }
            }
            (None, None) => continue,
        };
        lost.push(Lost { disk: disk.id, why });
    }
    lost
}

/// One copy that is gone.
#[derive(Clone, Copy)]
struct Gone {
    run: Run,
    segment: Segment,
}

/// The copies of a disk that can be made again: stale, with a member elsewhere.
fn gone_copies(map: &DistributionMap, disk: DiskId) -> Vec<Gone> {
    let mut gone = Vec::new();
    for device in &map.devices {
        for span in &device.spans {
            let copy = span.replica_on(disk).filter(|copy| copy.state == ReplicaState::Stale);
            gone.extend(copy.map(|copy| Gone { run: run_of(device.id, span), segment: copy.segment }));
        }
    }
    gone
}

/// What regeneration begins now: one change, or why the first disk that needs a spare gets none.
///
/// `held` are disks that an operator does not want made again.
pub fn begin(map: &DistributionMap, now: &Situation<'_>, held: &BTreeSet<DiskId>) -> (Change, Vec<String>) {
    let mut hindered = Vec::new();
    let mut by_node: BTreeMap<NodeId, Vec<Lost>> = BTreeMap::new();
    for lost in lost_disks(map, now) {
        let node = map.node_of(lost.disk).unwrap_or_default();
        let planned = map.plans.iter().any(|plan| plan.concerns(lost.disk));
        if !planned && !held.contains(&lost.disk) && !gone_copies(map, lost.disk).is_empty() {
            by_node.entry(node).or_default().push(lost);
        }
    }
    for (node, lost) in by_node {
        let mut taken = BTreeSet::new();
        let mut batch = Vec::new();
        let mut moves = Vec::new();
        let mut spares = BTreeSet::new();
        let mut why = Vec::new();
        for Lost { disk, why: cause } in lost {
            match replace(map, now, disk, &mut taken) {
                Ok((to, steps, of_disk)) => {
                    why.push(format!(
                        "{} is made again on {}: {cause}",
                        map.disk_name(disk),
                        map.disk_name(to)
                    ));
                    batch.extend(steps);
                    moves.extend(of_disk);
                    spares.extend([disk, to]);
                }
                Err(reason) => {
                    hindered.push(format!("{} cannot be made again: {reason}", map.disk_name(disk)));
                }
            }
        }
        if !moves.is_empty() {
            let id = PlanId(map.version.0 + 1);
            let cause = format!("regeneration of what {} had: {}", map.node_name(node), why.join("; "));
            batch.push(Verb::BeginPlan { plan: Plan { spares, ..Plan::new(id, cause, moves) } });
            return (Change { batch, why }, hindered);
        }
    }
    (Change::default(), hindered)
}

/// Finds a spare for all copies of a disk; the steps that add them, and the moves.
fn replace(
    map: &DistributionMap,
    now: &Situation<'_>,
    from: DiskId,
    taken: &mut BTreeSet<DiskId>,
) -> Result<(DiskId, Vec<Verb>, Vec<Move>), String> {
    let gone = gone_copies(map, from);
    let mut spares: Vec<_> = map.disks.iter().filter(|disk| disk.spare).collect();
    // The smallest that will do: a larger one may be needed for a larger disk.
    spares.sort_by_key(|disk| (disk.slots.total(), disk.id));
    let mut reasons = Vec::new();
    for spare in spares {
        let name = map.disk_name(spare.id);
        let Some(incarnation) = now.registry.usable(map, spare.id, now.now_ms) else {
            reasons.push(format!("the spare {name} is not there"));
            continue;
        };
        if taken.contains(&spare.id) || map.plans.iter().any(|plan| plan.concerns(spare.id)) {
            reasons.push(format!("the spare {name} is taken"));
            continue;
        }
        let needs =
            |segment| gone.iter().filter(|gone| gone.segment == segment).map(|gone| gone.run.count).sum();
        let short = [Segment::Primary, Segment::Secondary].into_iter().find_map(|segment| {
            let (needs, has): (u32, u32) = (needs(segment), spare.slots.of(segment));
            (needs > has).then(|| {
                format!("the spare {name} has {has} slots in its {segment:?} segment, {needs} are needed")
            })
        });
        if let Some(short) = short {
            reasons.push(short);
            continue;
        }
        // What the map allows decides. The old copies stay until the new ones are in sync, unless they
        // stand in the way: on the same node, in the same failure set, or one copy too many.
        let attempts = [false, true].map(|drop_first| steps(from, spare.id, incarnation, &gone, drop_first));
        let outcomes = attempts.map(|steps| map.apply(&steps).map(|_| steps));
        match outcomes {
            [Ok(steps), _] | [Err(_), Ok(steps)] => {
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
            [_, Err(error)] => reasons.push(format!("the spare {name} cannot take it: {error}")),
        }
    }
    if reasons.is_empty() {
        reasons.push("there is no spare".to_owned());
    }
    Err(reasons.join("; "))
}

fn steps(from: DiskId, to: DiskId, incarnation: Incarnation, gone: &[Gone], drop_first: bool) -> Vec<Verb> {
    let mut steps = vec![Verb::SetSpare { disk: to, spare: false }];
    for Gone { run, segment } in gone.iter().copied() {
        if drop_first {
            steps.push(Verb::DropReplica { run, disk: from });
        }
        steps.push(Verb::AddReplica { run, disk: to, segment, incarnation });
    }
    steps
}

/// The devices that a plan is about, each once.
pub fn devices_of(plan: &Plan) -> BTreeSet<DeviceId> {
    plan.moves.iter().map(|step| step.run.device).collect()
}
