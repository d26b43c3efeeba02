//! Messages arriving, disks, maps and leases.

use super::Replication;
use super::register::Register;
use super::roster::{IN_SYNC, Roster};
use super::state::{Message, NODES, ROSTERS, SlowRead, State, Work, bit, broken, message, work};
use crate::model::checker::Steps;
use crate::model::manager::Question;
use crate::model::rules::Rule;

impl Replication {
    /// One message arrives.
    pub(super) fn deliveries(&self, state: &State, steps: &mut Steps<State>) {
        for index in 0..state.net.len() {
            let sent = state.net[index];
            let (from, to) = (sent.from as usize, sent.to as usize);
            if sent.kind == message::NOTHING {
                break;
            }
            if !state.connected(from, to) {
                continue;
            }
            let mut next = *state;
            next.net[index] = Message::default();
            if sent.kind > message::ACK {
                self.acknowledged(&mut next, to, from, sent);
            } else {
                self.received(&mut next, to, from, sent);
            }
            steps.step(self.settle(next), || {
                let names = ["", "write", "copy", "flush", "CLEAR", "write", "copy", "flush", "CLEAR"];
                let ack = if sent.kind > message::ACK { "the acknowledgement of " } else { "" };
                let old = ["", " of an older session"][usize::from(sent.old_session | sent.old_epoch)];
                let what = names[sent.kind as usize];
                format!(
                    "n{to} receives {ack}{what} {} (region {}) from n{from}{old}",
                    sent.value, sent.region
                )
            });
        }
    }

    /// A secondary does what it is told, and says so.
    fn received(&self, next: &mut State, to: usize, from: usize, sent: Message) {
        let region = sent.region as usize;
        let node = &mut next.nodes[to];
        match sent.kind {
            message::WRITE => {
                if self.has(Rule::IntentSecondary) {
                    node.dirty |= bit(region);
                } else {
                    node.dirty_soft |= bit(region);
                }
                node.store(region, sent.value);
            }
            message::COPY => node.store(region, sent.value),
            // 1: a flush that does not, while the rule is switched off.
            message::FLUSH if sent.value == 0 => node.flush_disk(),
            message::CLEAR => {
                node.dirty &= !bit(region);
                node.dirty_soft &= !bit(region);
            }
            _ => {}
        }
        next.send(sent.kind + message::ACK, to, from, region, sent.value);
        // The acknowledgement goes on the session of the request.
        if sent.old_session == 1 || next.nodes[from].sessions >> to & 1 == 0 {
            let ack = Message {
                kind: sent.kind + message::ACK,
                from: to as u8,
                to: from as u8,
                old_session: 0,
                old_epoch: 0,
                ..sent
            };
            for other in next.net.iter_mut().filter(|other| **other == ack) {
                other.old_session = 1;
            }
        }
    }

    fn acknowledged(&self, next: &mut State, node: usize, from: usize, sent: Message) {
        let region = sent.region as usize;
        let own = &mut next.nodes[node];
        let job = &mut own.work[region];
        match sent.kind - message::ACK {
            message::WRITE if job.kind == work::WRITE && job.value == sent.value => job.acks |= bit(from),
            message::COPY => {
                own.to_copy[from] &= !bit(region);
                if job.kind == work::COPY && job.target as usize == from {
                    *job = Work::default();
                }
            }
            message::FLUSH if own.flush != 0 => own.flush_acks |= bit(from),
            message::CLEAR if job.kind == work::CLEAR => {
                job.acks &= !bit(from);
                if job.acks == 0 {
                    *job = Work::default();
                }
            }
            _ => {}
        }
    }

    /// A node's own disk writes land; those of an earlier role may also be cancelled.
    pub(super) fn disk_steps(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        for region in self.regions() {
            let job = state.nodes[node].work[region];
            let late = job.kind == work::LATE;
            if !late && (job.kind != work::WRITE || job.done == 1) {
                continue;
            }
            let mut next = *state;
            next.nodes[node].store(region, job.value);
            if late {
                next.nodes[node].work[region] = Work::default();
            } else {
                next.nodes[node].work[region].done = 1;
            }
            let which = if late { "late " } else { "" };
            steps.step(self.settle(next), || format!("{which}write {} lands on n{node}'s disk", job.value));
            if late {
                let mut next = *state;
                next.nodes[node].work[region] = Work::default();
                steps.step(self.settle(next), || format!("n{node} cancels its late write {}", job.value));
            }
        }
    }

    /// A node adopts the newest map; it may never have seen those in between.
    pub(super) fn adoption(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if state.nodes[node].adopted == state.newest || !state.manages(node) {
            return;
        }
        let served = self.serves(state, node);
        let before = *state.roster(node);
        let mut next = *state;
        next.nodes[node].adopted = next.newest;
        let serves = self.serves(&next, node);
        next.close_accepted(node);
        next.messages_to(node, false).for_each(|sent| sent.old_epoch = 1);
        for peer in self.nodes() {
            next.end_session(node, peer);
        }
        next.messages_to(node, true).for_each(|sent| sent.old_epoch = 1);
        let after = *next.roster(node);
        let granted = next.granted(node, NODES);
        let own = &mut next.nodes[node];
        if after.state[node] == IN_SYNC {
            own.blank = 0;
        }
        if !serves {
            own.step_down();
            if next.read.node as usize == node + 1 && self.has(Rule::ReadRecheck) {
                next.read = SlowRead::default();
            }
        } else if served {
            own.joining = 0;
            own.flush_acks = 0;
            let kept =
                if self.has(Rule::ReconcileContinuous) { 0 } else { before.members() & after.members() };
            own.reconciled &= kept;
            for peer in (0..NODES).filter(|peer| kept >> peer & 1 == 0) {
                own.to_copy[peer] = 0;
                own.known_attach[peer] = 0;
            }
            own.work.iter_mut().filter(|job| matches!(job.kind, work::COPY | work::CLEAR)).for_each(|job| {
                *job = Work::default();
            });
        } else {
            own.waits = granted & !own.forgot;
        }
        let epoch = next.newest;
        steps.step(self.settle(next), || format!("n{node} adopts the map, epoch {epoch}"));
    }

    /// Leases are granted, and run out.
    pub(super) fn lease_steps(&self, state: &State, holder: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[holder];
        for grantor in self.nodes().filter(|grantor| *grantor != holder) {
            let awaited = state.nodes[grantor].waits >> holder & 1 == 1;
            if own.leases[grantor] != 0 && (awaited || self.bounds.leases) {
                let mut next = *state;
                next.nodes[holder].leases[grantor] = 0;
                steps.step(self.settle(next), || format!("n{holder}'s lease from n{grantor} runs out"));
            }
            let other = &state.nodes[grantor];
            let lease = 1 + other.adopted;
            let talks = other.up == 1 && state.connected(holder, grantor);
            // Without a free choice of leases they come with the session, and again when they ran out.
            let open = own.sessions >> grantor & 1 == 1 || self.bounds.leases && self.serves(state, holder);
            if talks && open && own.leases[grantor] < lease {
                let mut next = *state;
                next.nodes[holder].leases[grantor] = lease;
                steps.step(self.settle(next), || {
                    format!("n{grantor} (epoch {}) grants n{holder} a lease", other.adopted)
                });
            }
        }
    }

    /// What the manager and the operator do by themselves.
    pub(super) fn manager_steps(&self, state: &State, steps: &mut Steps<State>) {
        for node in self.nodes().filter(|_| self.bounds.late_manager) {
            let mut next = *state;
            if self.notice(&mut next, node) {
                steps.step(self.settle(next), || format!("the manager learns how n{node} is"));
            }
        }
        self.asked_in_sync(state, steps);
        let roster = state.newest_roster();
        let all_changed = Self::each(roster.members()).all(|node| !self.is_as_mapped(state, node));
        if self.has(Rule::Readmit) || !all_changed {
            self.decided(state, Question::Repair, false, steps, || "the manager repairs".into());
        }
        if state.spent.moves >= self.bounds.moves {
            return;
        }
        let mut moved = *state;
        moved.spent.moves += 1;
        for node in self.nodes() {
            let question = Question::Failover { node };
            self.decided(&moved, question, true, steps, || format!("the operator fails n{node} over"));
            if node != roster.primary() && roster.state[node] == IN_SYNC && self.intact(state, node) {
                let question = Question::HandOver { slice: 0, to: node };
                self.decided(&moved, question, true, steps, || format!("the operator hands over to n{node}"));
            }
            if !self.has(Rule::PromoteMember) && roster.state[node] != IN_SYNC && node != roster.primary() {
                // The shipped map refuses this, so it is done by hand.
                let mut promoted = *roster;
                let place = promoted.order.iter().position(|other| *other as usize == node).unwrap_or(0);
                promoted.order[..=place].rotate_right(1);
                promoted.state =
                    promoted.state.map(|state| if state == 0 { 0 } else { super::roster::STALE });
                promoted.state[node] = IN_SYNC;
                promoted.attach[node] = state.nodes[node].attach;
                promoted.process[node] = state.nodes[node].process;
                let mut next = moved;
                self.store(&mut next, promoted);
                steps.fault(self.settle(next), || format!("n{node} is promoted, whatever it is"));
            }
        }
    }

    /// What the manager knows of a node becomes what is true. Returns whether that is new.
    pub(super) fn notice(&self, state: &mut State, node: usize) -> bool {
        let own = state.nodes[node];
        let reached = own.up == 1 && state.manages(node);
        let known = &mut state.registered[node];
        let before = *known;
        known.connected = reached.into();
        if reached {
            (known.attach, known.process) = (own.attach, own.process);
        }
        *known != before
    }

    /// Whether the manager takes a node for what the newest map says of it, here or not.
    fn is_as_mapped(&self, state: &State, node: usize) -> bool {
        let (known, roster) = (state.registered[node], state.newest_roster());
        (known.attach, known.process) == (roster.attach[node], roster.process[node])
    }

    /// The same, and it is here.
    pub(super) fn intact(&self, state: &State, node: usize) -> bool {
        state.registered[node].connected == 1 && self.is_as_mapped(state, node)
    }

    /// Asks the manager, and if it changes the map, that is a step.
    pub(super) fn decided(
        &self,
        state: &State,
        question: Question,
        fault: bool,
        steps: &mut Steps<State>,
        text: impl FnOnce() -> String,
    ) {
        let registered = &state.registered[..self.bounds.nodes];
        let Some(roster) = self.manager.ask(state.newest_roster(), registered, question) else { return };
        let mut next = *state;
        self.store(&mut next, roster);
        let text = || format!("{}: {}", text(), described(&roster));
        if fault {
            steps.fault(self.settle(next), text);
        } else {
            steps.step(self.settle(next), text);
        }
    }

    /// The map is stored.
    fn store(&self, next: &mut State, mut roster: Roster) {
        let before = *next.newest_roster();
        let first = roster.primary();
        let known = next.registered[first];
        let member = before.state[first] == IN_SYNC;
        // As a secondary it was what its attachment was (rule 3).
        let kept = roster.attach[first] == before.attach[first];
        let meant = (known.attach, known.process) == (roster.attach[first], roster.process[first]);
        let none_left = Self::each(before.members()).all(|node| !self.is_as_mapped(next, node));
        let lawful = member && meant && (kept || none_left && roster.members() == bit(first));
        if first != before.primary() && !lawful {
            next.broken = broken::PROMOTED;
        }
        if std::mem::take(&mut roster.loss) != 0 {
            next.registers.iter_mut().for_each(Register::lose);
            next.lost = 1;
        }
        if next.newest as usize + 1 == ROSTERS {
            next.broken = broken::BOUND;
            return;
        }
        next.newest += 1;
        next.rosters[next.newest as usize] = roster;
    }
}

/// A replica list for people.
fn described(roster: &Roster) -> String {
    let states = ["absent", "in sync", "syncing", "stale"];
    let listed = roster.order.iter().filter(|node| (**node as usize) < NODES);
    let texts = listed.map(|node| format!("n{node} {}", states[roster.state[*node as usize] as usize]));
    texts.collect::<Vec<_>>().join(", ")
}
