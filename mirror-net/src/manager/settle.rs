//! Of the two copies of a move one goes: the old one when the move is finished, either when it is given up.
//!
//! A span has as many copies at the end of a move as it had before. Which of the two goes is decided by who is there:
//! never a copy that is in sync for one that is not, or that nobody can reach. And none that is in sync goes while, of
//! those that are there, fewer would be left in sync than are wanted; what cannot be decided yet waits until somebody
//! is back, or is recorded stale, or is made again elsewhere.

use super::left_behind;
use super::regeneration::{Begun, Situation, lost_disks};
use super::registry::Standing;
use crate::ids::DiskId;
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Run;
use crate::map::{DistributionMap, Replica, ReplicaState, Span};
use std::cell::OnceCell;
use std::collections::BTreeMap;

/// What becomes of a piece of a move now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It cannot be said yet.
    Wait,
    /// Nothing is to be changed, and nothing is left to be done.
    Leave,
    /// That copy goes, after the new one became the primary if it is to be.
    Settle {
        /// The new copy becomes the primary.
        promote: bool,
        /// The copy that goes.
        drop: Option<DiskId>,
    },
}

impl Verdict {
    const fn drop(disk: DiskId) -> Self {
        Self::Settle { promote: false, drop: Some(disk) }
    }
}

/// What decides.
pub(super) struct Judge<'a> {
    pub(super) map: &'a DistributionMap,
    pub(super) now: &'a Situation<'a>,
    /// Disks that are lost, with the reason.
    pub(super) lost: BTreeMap<DiskId, String>,
    /// Looked at only if something is lost.
    begun: OnceCell<Begun<'a>>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(map: &'a DistributionMap, now: &'a Situation<'a>) -> Self {
        let lost = lost_disks(map, now).into_iter().map(|lost| (lost.disk, lost.why)).collect();
        Self { map, now, lost, begun: OnceCell::new() }
    }

    /// Whether a copy is what the map says, and its node is there.
    fn is_there(&self, run: Run, span: &Span, copy: &Replica) -> bool {
        self.map.device(run.device).is_some_and(|device| {
            self.now.registry.standing(self.map, device, span, copy, self.now.now_ms) == Standing::Intact
        })
    }

    /// Whether enough copies that are in sync and there are left without that one. With one copy for two while a move
    /// lasts, enough is what there would be without it, if that is not more than the device wants.
    fn can_spare(&self, run: Run, span: &Span, without: DiskId) -> bool {
        let wanted = self.map.device(run.device).map_or(1, |device| usize::from(device.copies));
        let enough = wanted.min(span.replicas.len() - 1);
        let left = span.members().filter(|copy| copy.disk != without && self.is_there(run, span, copy));
        left.count() >= enough
    }

    /// What of a move that goes on can be finished.
    pub(super) fn finished(&self, step: &Move, span: &Span, run: Run) -> Verdict {
        let new = span.members().find(|copy| copy.disk == step.to);
        // What the map says of one that is not here may be untrue by now; until it is back the old copy stays.
        if !new.is_some_and(|new| self.is_there(run, span, new)) {
            return Verdict::Wait;
        }
        let first = span.primary().disk;
        let promote = first != step.to && (step.primary || step.from == Some(first));
        // Whoever is away is failed over, or recorded stale, for a reason of its own.
        let (registry, now_ms) = (self.now.registry, self.now.now_ms);
        let Some(device) = self.map.device(run.device) else { return Verdict::Leave };
        let mut left = left_behind(self.map, registry, now_ms, device, span, step.to);
        if promote && left.any(|copy| copy.state == ReplicaState::InSync && step.from != Some(copy.disk)) {
            return Verdict::Wait;
        }
        let old = step.from.and_then(|from| span.replica_on(from));
        if old.is_some_and(|old| old.state == ReplicaState::InSync && !self.can_spare(run, span, old.disk)) {
            return Verdict::Wait;
        }
        Verdict::Settle { promote, drop: old.map(|old| old.disk) }
    }

    /// Which copy goes when a move is given up. Copies that its plan did not begin are not its to give up.
    pub(super) fn given_up(&self, plan: &Plan, step: &Move, span: &Span, run: Run) -> Verdict {
        let Some(new) = span.replica_on(step.to).filter(|copy| copy.added.0 >= plan.id.0) else {
            return Verdict::Leave;
        };
        let is_member = |copy: &Replica| copy.state == ReplicaState::InSync;
        let Some(old) = step.from.and_then(|from| span.replica_on(from)) else {
            let wanted = self.map.device(run.device).map_or(1, |device| usize::from(device.copies));
            return match span.replicas.len() > wanted && step.from.is_none() {
                true if !is_member(new) => Verdict::drop(new.disk),
                true if span.primary().disk != new.disk => self.spared(run, span, new.disk),
                // In the place of the old copy, which is gone, it is the only one that there is besides: it is resynced,
                // or made again on another spare, like any other.
                _ => Verdict::Leave,
            };
        };
        if !is_member(new) {
            return Verdict::drop(new.disk);
        }
        if !is_member(old) {
            // The one that has it all, if it is there; else it soon is not in sync either, or is the last that was.
            return if self.is_there(run, span, new) { Verdict::drop(old.disk) } else { Verdict::Wait };
        }
        // Two in one failure set cannot both stay when the plan is over, and are worth one as long as it lasts.
        let nodes = [old, new].map(|copy| self.map.node_of(copy.disk).unwrap_or_default());
        let in_one_set = !self.map.other_set(nodes[0], nodes[1]);
        for (goes, stays) in [(new, old), (old, new)] {
            let may_go = goes.disk != span.primary().disk && self.is_there(run, span, stays);
            if may_go && (in_one_set || self.can_spare(run, span, goes.disk)) {
                return Verdict::drop(goes.disk);
            }
        }
        match self.replaceable(span, run) {
            Some(other) if !in_one_set && [old, new].iter().all(|copy| self.is_there(run, span, copy)) => {
                Verdict::drop(other)
            }
            _ => Verdict::Wait,
        }
    }

    fn spared(&self, run: Run, span: &Span, disk: DiskId) -> Verdict {
        if self.can_spare(run, span, disk) { Verdict::drop(disk) } else { Verdict::Wait }
    }

    /// A copy on a disk that is lost, and in whose place nothing comes: two that are in sync may both stay instead.
    fn replaceable(&self, span: &Span, run: Run) -> Option<DiskId> {
        let gone = |copy: &&Replica| copy.state != ReplicaState::InSync && self.lost.contains_key(&copy.disk);
        // What waits for its turn may wait for this very move.
        let comes = |disk: DiskId| self.begun.get_or_init(|| Begun::of(self.map)).replaces(run, disk);
        span.replicas.iter().find(|copy| gone(copy) && !comes(copy.disk)).map(|copy| copy.disk)
    }

    /// Whether a move waits only for a copy that is lost, and in whose place nothing comes.
    pub(super) fn is_held(&self, step: &Move, span: &Span, run: Run) -> bool {
        let both = [step.from, Some(step.to)].map(|disk| {
            let copy = disk.and_then(|disk| span.members().find(|copy| copy.disk == disk));
            copy.is_some_and(|copy| self.is_there(run, span, copy))
        });
        both == [true; 2]
            && !step.from.is_some_and(|from| self.can_spare(run, span, from))
            && self.replaceable(span, run).is_some()
    }
}
