//! Plans: what is being moved, as data.
//!
//! A plan names the places that copies are to have. What is left of it is the difference between
//! that and today's map, computed anew at every look; so it is resumable whoever dies, and there
//! is no progress to be lost. Its steps are the map's [verbs](super::verbs) and nothing else.

use super::verbs::Run;
use super::{DistributionMap, ReplicaState, Span};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, NodeId, PlanId};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeSet;

/// Copies that are to be somewhere else.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The map version that began it.
    pub id: PlanId,
    /// Why, for people.
    pub cause: String,
    /// Begins nothing new; copies that are being filled go on.
    #[serde(default)]
    pub paused: bool,
    /// It is taken back: nothing begins any more, and of what has begun one copy goes, the new one or the old, once it
    /// is certain which of them can (`manager::settle`).
    #[serde(default, skip_serializing_if = "is_false")]
    pub cancelled: bool,
    /// Disks that are spares at its end if they hold no copies then: those that it is to empty, and the spares that it
    /// takes.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub spares: BTreeSet<DiskId>,
    /// Disks that leave the map at its end, if nothing at all lies on them then. A plan that is cancelled keeps them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub retires: BTreeSet<DiskId>,
    /// The node that leaves the map with the last of its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retires_node: Option<NodeId>,
    /// Slices whose moves are finished. They are not among [`moves`](Self::moves) any more: what becomes of a copy
    /// afterwards is no matter of this plan.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub finished: u64,
    /// What is still to move, in an order in which each can be made once those before it are done
    /// ([`outlook`](DistributionMap::outlook)). No two of them bring the same slice to the same disk.
    pub moves: Vec<Move>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One copy of a run of slices gets another place. Written as an array, as a [`Span`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// Where in the address space.
    pub run: Run,
    /// The disk that is rid of it once the copy at `to` is in sync; `None` if a copy was missing, or only its role
    /// changes.
    #[serde(default)]
    pub from: Option<DiskId>,
    /// The disk that takes it, or has it already.
    pub to: DiskId,
    /// The segment whose slots it takes up there.
    pub segment: Segment,
    /// Whether the new copy becomes the primary at the end.
    pub primary: bool,
}

impl Serialize for Move {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { run: Run { device, first, count }, from, to, segment, primary } = self;
        ((device, first, count), from, to, segment, primary).serialize(serializer)
    }
}

/// How far a plan is, in slices.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct PlanProgress {
    /// All that it moves.
    pub slices: u64,
    /// Those whose new copy is in sync.
    pub in_sync: u64,
    /// Those whose new copy is being filled.
    pub syncing: u64,
}

impl Move {
    /// The spans that it reaches into, each with the part of it that it moves.
    pub fn pieces<'a>(&self, map: &'a DistributionMap) -> impl Iterator<Item = (&'a Span, Run)> + use<'a> {
        let run = self.run;
        map.spans_of(run).map(move |(span, count)| {
            let first = span.first.max(run.first);
            (span, Run { device: run.device, first, count })
        })
    }

    /// How far it is under that map.
    pub fn progress(&self, map: &DistributionMap) -> PlanProgress {
        let mut progress = PlanProgress { slices: u64::from(self.run.count), ..PlanProgress::default() };
        for (span, count) in map.spans_of(self.run) {
            match span.replica_on(self.to).map(|replica| replica.state) {
                Some(ReplicaState::InSync) => progress.in_sync += u64::from(count),
                Some(_) => progress.syncing += u64::from(count),
                None => {}
            }
        }
        progress
    }
}

impl Plan {
    /// One of which nothing is done yet.
    pub fn new(id: PlanId, cause: String, moves: Vec<Move>) -> Self {
        Self {
            id,
            cause,
            paused: false,
            cancelled: false,
            spares: BTreeSet::new(),
            retires: BTreeSet::new(),
            retires_node: None,
            finished: 0,
            moves,
        }
    }

    /// How far it is under that map.
    pub fn progress(&self, map: &DistributionMap) -> PlanProgress {
        let finished =
            PlanProgress { slices: self.finished, in_sync: self.finished, ..PlanProgress::default() };
        self.moves.iter().map(|step| step.progress(map)).fold(finished, |sum, step| PlanProgress {
            slices: sum.slices + step.slices,
            in_sync: sum.in_sync + step.in_sync,
            syncing: sum.syncing + step.syncing,
        })
    }

    /// The disks that are rid of something by what is still to move, each once.
    pub fn sources(&self) -> BTreeSet<DiskId> {
        self.moves.iter().filter_map(|step| step.from).collect()
    }

    /// Whether it takes something to that disk, or from it, or makes a spare of it, or removes it.
    pub fn concerns(&self, disk: DiskId) -> bool {
        self.spares.contains(&disk)
            || self.retires.contains(&disk)
            || self.moves.iter().any(|step| step.to == disk || step.from == Some(disk))
    }
}

impl DistributionMap {
    /// The plan with that id.
    pub fn plan(&self, id: PlanId) -> Option<&Plan> {
        self.plans.iter().find(|plan| plan.id == id)
    }

    /// The spans that a run reaches into, each with how many of its slices lie in the run.
    pub fn spans_of(&self, run: Run) -> impl Iterator<Item = (&Span, u32)> {
        let end = run.first.0.saturating_add(run.count);
        self.device(run.device).into_iter().flat_map(move |device| {
            let first = device.spans.partition_point(|span| span.end() <= run.first.0);
            let spans = device.spans[first..].iter().take_while(move |span| span.first.0 < end);
            spans.map(move |span| (span, span.end().min(end) - span.first.0.max(run.first.0)))
        })
    }
}
