//! Crashes, restarts and partitions.

use super::Replication;
use super::state::{NODES, NONE, SlowRead, State, Work, work};
use crate::model::checker::Steps;
use crate::model::rules::Rule;

impl Replication {
    /// A daemon dies, or its machine loses power.
    pub(super) fn crashes(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if state.spent.crashes >= self.bounds.crashes {
            return;
        }
        for power in [false, true] {
            if !(if power { self.bounds.power_cuts } else { self.bounds.kills }) {
                continue;
            }
            let mut outcomes = vec![*state];
            for region in self.regions() {
                outcomes =
                    outcomes.iter().flat_map(|outcome| left_by(outcome, node, region, power)).collect();
            }
            for mut next in outcomes {
                next.spent.crashes += 1;
                self.die(&mut next, node, power);
                let what = if power { "loses power" } else { "is killed" };
                let disk = next.nodes[node].durable;
                steps.fault(self.settle(next), || format!("n{node} {what}; its disk keeps {disk:?}"));
            }
        }
    }

    fn die(&self, next: &mut State, node: usize, power: bool) {
        if !self.has(Rule::LeaseAfterStart) {
            next.nodes[node].forgot = next.granted(node, NODES);
        }
        for peer in self.nodes() {
            next.end_session(node, peer);
        }
        next.close_accepted(node);
        if next.read.node as usize == node + 1 {
            next.read = SlowRead::default();
        }
        let own = &mut next.nodes[node];
        own.work = [Work::default(); _];
        own.step_down();
        own.dirty_soft = 0;
        own.up = 0;
        // Another than any that somebody remembers; the normal form gives it a small number.
        own.process = 15;
        if power {
            own.attach = 15;
        }
    }

    /// A node starts again.
    pub(super) fn restart(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let mut next = *state;
        next.nodes[node].up = 1;
        steps.step(self.settle(next), || format!("n{node} starts again"));
    }

    /// A node is cut off, and comes back.
    pub(super) fn partitions(&self, state: &State, steps: &mut Steps<State>) {
        if state.cut != 0 {
            let mut next = *state;
            next.cut = 0;
            steps.step(self.settle(next), || "the partition ends".into());
        } else if state.spent.partitions < self.bounds.partitions {
            for cut in (0..2 * NODES).filter(|cut| cut % NODES < self.bounds.nodes) {
                let mut next = *state;
                next.spent.partitions += 1;
                next.cut = cut as u8 + 1;
                let whom = if cut < NODES { "the other nodes" } else { "everybody" };
                steps.fault(self.settle(next), || format!("n{} is cut off from {whom}", cut % NODES));
            }
        }
    }
}

/// What may be left of a region: of a write under way, and after a power cut of what was in the cache.
fn left_by(state: &State, node: usize, region: usize, power: bool) -> Vec<State> {
    let job = state.nodes[node].work[region];
    let under_way = job.kind == work::LATE || job.kind == work::WRITE && job.done == 0;
    let mut outcomes = vec![*state];
    if under_way {
        let mut landed = *state;
        landed.nodes[node].store(region, job.value);
        outcomes.push(landed);
    }
    if power {
        for outcome in std::mem::take(&mut outcomes) {
            let own = &outcome.nodes[node];
            for content in [own.durable[region], own.content(region)] {
                let mut left = outcome;
                left.nodes[node].durable[region] = content;
                left.nodes[node].cached[region] = NONE;
                if !outcomes.contains(&left) {
                    outcomes.push(left);
                }
            }
        }
    }
    outcomes
}
