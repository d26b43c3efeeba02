//! What a primary does: sessions and reconciling, writes, copies, flushes, clearing, reads, and what
//! it asks the manager.

use super::roster::{IN_SYNC, STALE, SYNCING};
use super::state::{Ask, NONE, SlowRead, State, Work, bit, broken, message, work};
use super::{Replication, listed};
use crate::model::checker::Steps;
use crate::model::manager::{Question, incarnation};
use crate::model::rules::Rule;

impl Replication {
    /// Sessions open, and over a partition end.
    pub(super) fn sessions(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[node];
        for peer in Self::each(state.roster(node).others(node)) {
            if own.sessions >> peer & 1 == 1 {
                if !state.connected(node, peer) {
                    let mut next = *state;
                    next.end_session(node, peer);
                    steps.step(self.settle(next), || format!("n{node} gives up its session with n{peer}"));
                }
            } else if self.can_open(state, node, peer) {
                let next = self.opened(state, node, peer);
                steps.step(self.settle(next), || {
                    format!(
                        "n{node} opens a session with n{peer}, to copy: {:b}",
                        next.nodes[node].to_copy[peer]
                    )
                });
            }
        }
    }

    fn can_open(&self, state: &State, node: usize, peer: usize) -> bool {
        let other = &state.nodes[peer];
        let same_attach = other.attach == state.roster(node).attach[peer];
        state.connected(node, peer)
            && other.up == 1
            && other.adopted == state.nodes[node].adopted
            && (same_attach || !self.has(Rule::MemberIncarnation))
            && (!other.has_late_writes() || !self.has(Rule::Drain))
    }

    /// The masks are exchanged and united; what is dirty on either side has to be copied (rule 11).
    fn opened(&self, state: &State, node: usize, peer: usize) -> State {
        let mut next = *state;
        next.close_accepted(peer);
        next.end_session(node, peer);
        let (own, other) = (state.nodes[node], state.nodes[peer]);
        let member = state.roster(node).state[peer] == IN_SYNC;
        let united = own.all_dirty() | other.all_dirty();
        let everything = if other.blank == 1 { bit(self.bounds.regions) - 1 } else { 0 };
        // Only with a rule switched off is a session one that continues.
        let continued = own.reconciled >> peer & 1 == 1 && own.known_attach[peer] == other.attach;
        next.nodes[peer].accepted = node as u8 + 1;
        let primary = &mut next.nodes[node];
        primary.sessions |= bit(peer);
        if !continued {
            let skipped = member && !self.has(Rule::Reconcile);
            primary.to_copy[peer] = if skipped { 0 } else { united | everything };
            primary.reconciled |= bit(peer);
            primary.dirty |= united;
            let remembered = if member {
                !self.has(Rule::ReconcileReopened) || !self.has(Rule::ReconcileContinuous)
            } else {
                !self.has(Rule::ReconcileSyncing)
            };
            primary.known_attach[peer] = if remembered { other.attach } else { 0 };
            if self.has(Rule::InheritMask) {
                next.nodes[peer].dirty |= own.all_dirty();
            }
        }
        if !self.bounds.leases {
            next.nodes[node].leases[peer] = 1 + next.nodes[peer].adopted;
        }
        for region in self.regions() {
            let job = next.nodes[node].work[region];
            if job.kind == work::WRITE && job.acks & bit(peer) == 0 {
                next.send(message::WRITE, node, peer, region, job.value);
            }
        }
        if own.flush != 0 && own.flush_acks & bit(peer) == 0 {
            next.send(message::FLUSH, node, peer, 0, 0);
        }
        next
    }

    /// Everything that a primary does once it may serve.
    pub(super) fn serving(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        for region in self.regions() {
            self.writes(state, node, region, steps);
            self.copies(state, node, region, steps);
            self.reads(state, node, region, steps);
        }
        self.flushes(state, node, steps);
        self.asks_in_sync(state, node, steps);
    }

    fn writes(&self, state: &State, node: usize, region: usize, steps: &mut Steps<State>) {
        if state.spent.writes >= self.bounds.writes || state.nodes[node].work[region].kind != work::IDLE {
            return;
        }
        let mut next = *state;
        next.spent.writes += 1;
        let value = next.spent.writes;
        next.registers[region].begin(value);
        let own = &mut next.nodes[node];
        if self.has(Rule::IntentPrimary) {
            own.dirty |= bit(region);
        } else {
            own.dirty_soft |= bit(region);
        }
        own.work[region] = Work { kind: work::WRITE, value, ..Work::default() };
        own.flush_busy |= if own.flush != 0 { bit(region) } else { 0 };
        for peer in Self::each(own.sessions) {
            next.send(message::WRITE, node, peer, region, value);
        }
        steps.fault(self.settle(next), || format!("write {value} to region {region} begins at n{node}"));
    }

    fn copies(&self, state: &State, node: usize, region: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[node];
        let locked = own.work[region].kind != work::IDLE;
        if locked && self.has(Rule::CopyLock) {
            return;
        }
        for peer in Self::each(own.sessions).filter(|peer| own.to_copy[*peer] & bit(region) != 0) {
            let mut next = *state;
            let value = own.content(region);
            let target = peer as u8;
            if !locked && self.has(Rule::CopyLock) {
                next.nodes[node].work[region] = Work { kind: work::COPY, value, target, ..Work::default() };
            }
            if own.flush != 0 {
                next.nodes[node].flush_busy |= bit(region);
            }
            next.send(message::COPY, node, peer, region, value);
            if next != *state {
                steps.step(self.settle(next), || {
                    format!("n{node} copies region {region} ({value}) to n{peer}")
                });
            }
        }
    }

    fn reads(&self, state: &State, node: usize, region: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[node];
        let value = own.content(region);
        let may_read = self.may_read(state, node, region);
        if may_read && state.spent.reads < self.bounds.reads {
            let mut next = *state;
            next.spent.reads += 1;
            if !next.registers[region].read(value) {
                next.broken = broken::READ;
            }
            steps
                .fault(self.settle(next), || format!("a read of region {region} at n{node} returns {value}"));
        }
        if may_read && state.spent.slow_reads < self.bounds.slow_reads && state.read.node == 0 {
            let mut next = *state;
            next.spent.slow_reads += 1;
            next.read = SlowRead { node: node as u8 + 1, region: region as u8, value: NONE, allowed: 0 };
            steps.fault(self.settle(next), || format!("a read of region {region} at n{node} begins"));
        }
    }

    /// The disk's part of a read, and its answer.
    pub(super) fn slow_read(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let read = state.read;
        let region = read.region as usize;
        if read.node as usize != node + 1 {
            return;
        }
        let mut next = *state;
        if read.value == NONE {
            next.read.value = state.nodes[node].content(region);
            let value = next.read.value;
            steps.fault(self.settle(next), || format!("it finds {value} on n{node}'s disk"));
        } else if self.may_read(state, node, region) || !self.has(Rule::ReadRecheck) {
            let current = state.registers[region].contents() >> read.value & 1 == 1;
            if current {
                next.registers[region].read(read.value);
            } else if read.allowed >> read.value & 1 == 0 {
                next.broken = broken::SLOW_READ;
            }
            next.read = SlowRead::default();
            steps.fault(self.settle(next), || format!("it is answered: {}", read.value));
        }
    }

    fn flushes(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[node];
        if own.flush != 0 {
            return;
        }
        if state.spent.flushes < self.bounds.flushes {
            let mut next = *state;
            next.spent.flushes += 1;
            next.registers.iter_mut().for_each(super::register::Register::begin_flush);
            self.begin_flush(&mut next, node, 1);
            steps.fault(self.settle(next), || format!("a FLUSH begins at n{node}"));
        }
        let listed = self.nodes().filter(|peer| listed(state.roster(node), *peer));
        let dirty = listed.fold(0, |mask, peer| mask | state.nodes[peer].all_dirty());
        if dirty != 0 && state.spent.clears < self.bounds.clears && self.may_clear(state, node) {
            let mut next = *state;
            next.spent.clears += 1;
            self.begin_flush(&mut next, node, 2);
            steps.step(self.settle(next), || format!("n{node} flushes everything to clear dirty bits"));
        }
    }

    fn begin_flush(&self, next: &mut State, node: usize, kind: u8) {
        let own = &mut next.nodes[node];
        if kind == 1 || self.has(Rule::ClearFlush) {
            own.flush_disk();
        }
        own.flush = kind;
        own.flush_acks = 0;
        own.flush_busy = 0;
        for region in self.regions() {
            own.flush_busy |= if own.work[region].kind == work::IDLE { 0 } else { bit(region) };
        }
        for peer in Self::each(own.sessions) {
            let value = u8::from(kind == 2 && !self.has(Rule::ClearFlush));
            next.send(message::FLUSH, node, peer, 0, value);
        }
    }

    /// Rule 9 (a).
    fn may_clear(&self, state: &State, node: usize) -> bool {
        let roster = state.roster(node);
        let all = self.nodes().all(|peer| roster.state[peer] == IN_SYNC);
        all || !self.has(Rule::ClearAllMembers)
    }

    /// Ends writes and flushes that wait for nobody any more. Returns whether any did.
    pub(super) fn complete(&self, state: &mut State, node: usize) -> bool {
        if !self.serves(state, node) {
            return false;
        }
        let mut completed = false;
        let own = &state.nodes[node];
        let syncing = Self::each(own.sessions).filter(|peer| state.roster(node).state[*peer] == SYNCING);
        let present = syncing.fold(0, |mask, peer| mask | bit(peer));
        let needs = self.needs(state, node);
        let waits_for = if self.has(Rule::AckAll) { needs | present } else { needs & own.sessions | present };
        for region in self.regions() {
            let job = state.nodes[node].work[region];
            if job.kind == work::WRITE && job.done == 1 && waits_for & !job.acks == 0 {
                state.nodes[node].work[region] = Work::default();
                state.registers[region].acknowledge(job.value);
                completed = true;
            }
        }
        let own = &state.nodes[node];
        if own.flush != 0 && needs & !own.flush_acks == 0 {
            self.flushed(state, node);
            completed = true;
        }
        completed
    }

    fn flushed(&self, state: &mut State, node: usize) {
        let own = &mut state.nodes[node];
        let kind = std::mem::take(&mut own.flush);
        let busy = std::mem::take(&mut own.flush_busy);
        own.flush_acks = 0;
        if kind == 1 {
            state.registers.iter_mut().for_each(super::register::Register::flushed);
            return;
        }
        if !self.may_clear(state, node) {
            return;
        }
        for region in self.regions() {
            let own = &state.nodes[node];
            let to_copy = own.to_copy.iter().any(|mask| mask & bit(region) != 0);
            let busy = busy & bit(region) != 0 && self.has(Rule::ClearBusy);
            if own.work[region].kind != work::IDLE && self.has(Rule::ClearBusy) || busy || to_copy {
                continue;
            }
            let asked = own.sessions;
            let own = &mut state.nodes[node];
            own.dirty &= !bit(region);
            own.dirty_soft &= !bit(region);
            if self.has(Rule::ClearLock) && asked != 0 {
                own.work[region] = Work { kind: work::CLEAR, acks: asked, ..Work::default() };
            }
            for peer in Self::each(asked) {
                state.send(message::CLEAR, node, peer, region, 0);
            }
        }
    }

    /// What a primary has the manager record: who is stale, who is to be filled.
    pub(super) fn questions(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if !state.manages(node) {
            return;
        }
        let (own, roster) = (&state.nodes[node], state.roster(node));
        for peer in self.nodes().filter(|peer| *peer != node && listed(roster, *peer)) {
            let other = &state.nodes[peer];
            let reachable = other.up == 1 && state.connected(node, peer);
            let attached_anew = other.attach != roster.attach[peer];
            let noticed = attached_anew && self.has(Rule::MemberIncarnation);
            let lost = own.sessions >> peer & 1 == 0 && (!reachable || noticed);
            if roster.state[peer] != STALE && lost {
                let question = Question::Stale { asker: node, peer };
                self.decided(state, question, false, steps, || format!("n{node} has n{peer} recorded stale"));
            }
            if roster.state[peer] == STALE
                && reachable
                && own.adopted == state.newest
                && other.adopted == state.newest
                && state.registered[peer].connected == 1
                && self.intact(state, node)
            {
                let question = Question::Syncing { slice: 0, peer };
                self.decided(state, question, false, steps, || {
                    format!("n{node} has n{peer} filled: syncing")
                });
            }
        }
    }

    /// Rules 6 and 7: from now on it is treated as a member.
    fn asks_in_sync(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if state.ask.active == 1 || !state.manages(node) {
            return;
        }
        let own = &state.nodes[node];
        for peer in Self::each(own.sessions & own.reconciled) {
            let copying = own.work.iter().any(|job| job.kind == work::COPY && job.target as usize == peer);
            if state.roster(node).state[peer] != SYNCING || own.to_copy[peer] != 0 || copying {
                continue;
            }
            let mut next = *state;
            let other = &mut next.nodes[peer];
            if self.has(Rule::CopyFlush) {
                other.flush_disk();
            }
            next.ask = Ask {
                active: 1,
                peer: peer as u8,
                asker: node as u8,
                attach: other.attach,
                process: other.process,
                epoch: own.adopted,
            };
            if self.has(Rule::Joining) {
                next.nodes[node].joining |= bit(peer);
            }
            steps.step(self.settle(next), || format!("n{node} asks for n{peer} as a member"));
        }
    }

    /// The request to make a copy a member arrives at the manager, which does it or refuses.
    pub(super) fn asked_in_sync(&self, state: &State, steps: &mut Steps<State>) {
        let ask = state.ask;
        if ask.active == 0 {
            return;
        }
        let (peer, asker) = (ask.peer as usize, ask.asker as usize);
        let known = state.registered[peer];
        let same = (known.attach, known.process) == (ask.attach, ask.process);
        let mut answered = *state;
        answered.ask = Ask::default();
        let meant = if self.has(Rule::AskIncarnation) {
            (ask.attach, ask.process)
        } else {
            (known.attach, known.process)
        };
        let refused = !same && self.has(Rule::AskIncarnation);
        if refused || state.newest_roster().primary() != asker || !self.intact(state, asker) {
            steps.step(self.settle(answered), || format!("the manager does not make n{peer} a member"));
            return;
        }
        let question = Question::InSync { slice: 0, peer, incarnation: incarnation(meant.0, meant.1) };
        self.decided(&answered, question, false, steps, || format!("the manager records n{peer} in sync"));
    }
}
