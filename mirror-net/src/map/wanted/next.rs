//! What of a plan may begin now.

use crate::format::alloc::Segment;
use crate::ids::{DeviceId, DiskId, SliceIndex};
use crate::map::plan::{Move, Plan};
use crate::map::runs::Runs;
use crate::map::validate::REPLICAS_MAX;
use crate::map::verbs::Run;
use crate::map::{DistributionMap, ReplicaState, Span};
use std::collections::{HashMap, HashSet};

/// A copy that is to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Begin {
    /// Where in the address space.
    pub run: Run,
    /// The disk that takes it.
    pub disk: DiskId,
    /// The segment whose slots it takes up.
    pub segment: Segment,
}

/// How a plan stands under a map.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Outlook {
    /// What may begin, all at the same time: the slots are there.
    pub begin: Vec<Begin>,
    /// Something has begun and is not at its end.
    pub under_way: bool,
    /// Something waits: for a slot, or until a copy elsewhere is gone.
    pub waits: bool,
}

impl Outlook {
    /// Nothing is left to wait for, and yet it is not done: the map has changed under it.
    pub fn is_stuck(&self) -> bool {
        self.waits && !self.under_way && self.begin.is_empty()
    }
}

impl Move {
    /// Whether nothing of this move is left to be done for a span: the new copy is in sync, in the role that it is
    /// to have, and the old one gone; or both are gone, or the one whose role was to change, and it is not for this
    /// plan to bring them back.
    pub fn is_done(&self, span: &Span) -> bool {
        let old = self.from.and_then(|from| span.replica_on(from));
        match span.replica_on(self.to) {
            Some(new) => {
                let role = !self.primary || span.primary().disk == self.to;
                new.state == ReplicaState::InSync && old.is_none() && role
            }
            None => old.is_none() && (self.from.is_some() || self.primary),
        }
    }
}

impl DistributionMap {
    /// What of a plan may begin now, in the plan's order.
    ///
    /// What is earlier in the plan goes first where both want the same slots or the same slices, so no two moves
    /// can wait for each other.
    pub fn outlook(&self, plan: &Plan) -> Outlook {
        let mut outlook = Outlook::default();
        let mut free = self.free_slots();
        // What an earlier move waits for.
        let mut reserved: HashSet<(DiskId, Segment)> = HashSet::new();
        let mut busy: HashMap<DeviceId, Runs> = HashMap::new();
        for step in &plan.moves {
            let slot = (step.to, step.segment);
            let mut unfinished = Vec::new();
            for (span, count) in self.spans_of(step.run) {
                if step.is_done(span) {
                    continue;
                }
                let first = span.first.max(step.run.first);
                let end = first.0 + count;
                unfinished.push((first.0, end));
                if span.replica_on(step.to).is_some() {
                    outlook.under_way = true;
                    continue;
                }
                let later = busy.get(&step.run.device).is_some_and(|runs| runs.overlaps(first.0, end));
                let free = free.entry(slot).or_default();
                let count = if later || reserved.contains(&slot) || !self.may_begin(span, step) {
                    0
                } else {
                    count.min(*free)
                };
                if count > 0 {
                    *free -= count;
                    let run = Run { device: step.run.device, first: SliceIndex(first.0), count };
                    outlook.begin.push(Begin { run, disk: step.to, segment: step.segment });
                }
                if first.0 + count < end {
                    outlook.waits = true;
                    reserved.insert(slot);
                }
            }
            let runs = busy.entry(step.run.device).or_default();
            unfinished.into_iter().for_each(|(first, end)| runs.add(first, end));
        }
        outlook
    }

    /// Slots that nothing lies in.
    fn free_slots(&self) -> HashMap<(DiskId, Segment), u32> {
        let slots = self
            .disks
            .iter()
            .flat_map(|disk| Segment::ALL.map(|segment| ((disk.id, segment), disk.slots.of(segment))));
        let mut free: HashMap<(DiskId, Segment), u32> = slots.collect();
        for span in self.devices.iter().flat_map(|device| &device.spans) {
            for copy in &span.replicas {
                let free = free.entry((copy.disk, copy.segment)).or_default();
                *free = free.saturating_sub(span.count);
            }
        }
        free
    }

    /// Whether the rules of the map let a move's new copy begin beside those that there are.
    fn may_begin(&self, span: &Span, step: &Move) -> bool {
        let Some(node) = self.node_of(step.to) else { return false };
        span.replicas.len() < REPLICAS_MAX
            && span.replicas.iter().all(|copy| {
                let other = self.node_of(copy.disk).unwrap_or_default();
                node != other && (step.from == Some(copy.disk) || self.other_set(node, other))
            })
    }
}
