//! Exporters and what they sent: claims, exporter sessions, repeated and replayed writes, the loss
//! generation (rules 14 to 16).
//!
//! All copies together are one disk here, with a queue in front of it: that a primary and its secondaries
//! behave like one is what the replication model is about.

use super::checker::{Model, Steps};
use super::replication::register::{Register, WRITES_MAX};
use super::rules::{Rule, Rules};
use zerocopy::{Immutable, IntoBytes};

const QUEUE: usize = 4;

/// A write, on its way or queued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Write {
    /// Its number; 0: none.
    number: u8,
    exporter: u8,
    session: u8,
    /// Whether it is the acknowledgement.
    ack: u8,
}

/// An exporter; the first has claim 1, the second claim 2.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Exporter {
    exports: u8,
    session: u8,
    /// The write that has not been answered.
    open: u8,
    /// Acknowledged and not flushed, bits by number.
    unflushed: u8,
    /// Some of those are lost.
    lost: u8,
    /// It learned of a loss: what it has yet to replay, bits by number.
    replays: u8,
    /// The loss generation of what it has not flushed.
    loss: u8,
}

/// All of it.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct State {
    /// The claim in the map, and the one that the primary has adopted.
    claim: u8,
    adopted: u8,
    /// The primary's newest session of each exporter.
    sessions: [u8; 2],
    queue: [Write; QUEUE],
    net: [Write; QUEUE],
    content: u8,
    flushed: u8,
    loss: u8,
    exporters: [Exporter; 2],
    register: Register,
    writes: u8,
    reconnects: u8,
    late: u8,
    false_flush: u8,
    full: u8,
}

/// How often what may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Writes.
    pub writes: u8,
    /// Times that an exporter's session is replaced, its daemon restarted or not.
    pub reconnects: u8,
    /// Whether the claim moves.
    pub claim_moves: bool,
    /// Times that everything that was not flushed is lost.
    pub losses: u8,
    /// Whether exporters replay what a loss took.
    pub replay: bool,
}

/// The model.
pub struct Exporters {
    bounds: Bounds,
    rules: Rules,
}

impl Exporters {
    /// With these bounds and rules.
    pub fn new(bounds: Bounds, rules: Rules) -> Self {
        assert!(bounds.writes <= WRITES_MAX);
        Self { bounds, rules }
    }

    fn send(next: &mut State, write: Write) {
        match next.net.iter_mut().find(|place| place.number == 0) {
            Some(place) => *place = write,
            None => next.full = 1,
        }
    }

    fn settle(&self, mut state: State) -> State {
        let (exporters, sessions, adopted) = (state.exporters, state.sessions, state.adopted);
        for sent in &mut state.net {
            let exporter = sent.exporter as usize;
            let unanswerable = sent.ack == 1 && exporters[exporter].session != sent.session;
            let refused = sent.ack == 0
                && (self.rules.has(Rule::ExporterSession) && sessions[exporter] > sent.session
                    || self.rules.has(Rule::ClaimFence) && adopted > sent.exporter + 1);
            if unanswerable || refused {
                *sent = Write::default();
            }
        }
        state.net.sort_unstable_by(|a, b| b.cmp(a));
        state.queue.sort_unstable_by(|a, b| b.cmp(a));
        state
    }

    fn arrivals(&self, state: &State, steps: &mut Steps<State>) {
        for (index, sent) in state.net.iter().enumerate().filter(|(_, sent)| sent.number != 0) {
            let mut next = *state;
            next.net[index] = Write::default();
            let x = sent.exporter as usize;
            if sent.ack == 1 {
                let own = &mut next.exporters[x];
                if own.open == sent.number {
                    own.open = 0;
                    if own.unflushed == 0 {
                        own.loss = next.loss;
                    }
                    own.unflushed |= 1 << sent.number;
                    own.replays &= !(1 << sent.number);
                    next.register.acknowledge(sent.number);
                }
                steps.step(self.settle(next), || {
                    format!("exporter {x} learns that write {} is done", sent.number)
                });
                continue;
            }
            if sent.session > next.sessions[x] {
                next.sessions[x] = sent.session;
                if self.rules.has(Rule::ExporterDrain) {
                    next.queue.iter_mut().filter(|queued| queued.exporter == sent.exporter).for_each(
                        |queued| {
                            *queued = Write::default();
                        },
                    );
                }
            }
            match next.queue.iter_mut().find(|place| place.number == 0) {
                Some(place) => *place = *sent,
                None => next.full = 1,
            }
            steps.step(self.settle(next), || {
                format!("the primary queues write {} of exporter {x}, session {}", sent.number, sent.session)
            });
        }
        for (index, queued) in state.queue.iter().enumerate().filter(|(_, queued)| queued.number != 0) {
            let mut next = *state;
            next.queue[index] = Write::default();
            next.content = queued.number;
            next.late |= u8::from(queued.exporter == 0 && state.exporters[1].exports == 1);
            Self::send(&mut next, Write { ack: 1, ..*queued });
            steps.step(self.settle(next), || format!("write {} lands on all copies", queued.number));
        }
    }

    fn exporter(&self, state: &State, x: usize, steps: &mut Steps<State>) {
        let own = state.exporters[x];
        let replays_first = own.replays != 0 && self.rules.has(Rule::ReplayNewest);
        let request = |number, session| Write { number, exporter: x as u8, session, ack: 0 };
        if own.open == 0 && state.writes < self.bounds.writes && !replays_first {
            let mut next = *state;
            next.writes += 1;
            next.exporters[x].open = next.writes;
            next.register.begin(next.writes);
            Self::send(&mut next, request(state.writes + 1, own.session));
            steps.fault(self.settle(next), || format!("exporter {x} sends write {}", state.writes + 1));
        }
        if own.open != 0 && state.reconnects < self.bounds.reconnects {
            let mut next = *state;
            next.reconnects += 1;
            next.exporters[x].session += 1;
            Self::send(&mut next, request(own.open, own.session + 1));
            steps.fault(self.settle(next), || {
                format!("exporter {x} begins a new session and repeats write {}", own.open)
            });
        }
        if own.open == 0 && own.replays != 0 {
            let newest = 7 - own.replays.leading_zeros() as u8;
            for number in (1..=newest).filter(|number| own.replays >> number & 1 == 1) {
                if number != newest && self.rules.has(Rule::ReplayNewest) {
                    continue;
                }
                let mut next = *state;
                next.exporters[x].open = number;
                // Older ones are covered by it.
                if self.rules.has(Rule::ReplayNewest) {
                    next.exporters[x].replays = 1 << number;
                }
                Self::send(&mut next, request(number, own.session));
                steps.step(self.settle(next), || format!("exporter {x} replays write {number}"));
            }
        }
        if own.open == 0 && own.unflushed != 0 && own.replays == 0 && state.adopted == x as u8 + 1 {
            let mut next = *state;
            let knows = own.loss < state.loss && self.rules.has(Rule::LossGeneration);
            let exporter = &mut next.exporters[x];
            if knows {
                exporter.loss = state.loss;
                exporter.replays = if self.bounds.replay { own.unflushed } else { 0 };
                exporter.unflushed = 0;
                exporter.lost = 0;
                steps.fault(self.settle(next), || {
                    format!("exporter {x}'s FLUSH fails: it is told of the loss")
                });
            } else {
                next.false_flush |= own.lost;
                next.exporters[x].unflushed = 0;
                next.flushed = state.content;
                next.register.begin_flush();
                next.register.flushed();
                steps.fault(self.settle(next), || format!("exporter {x}'s FLUSH succeeds"));
            }
        }
    }

    fn claim(&self, state: &State, steps: &mut Steps<State>) {
        if self.bounds.claim_moves && state.claim == 1 {
            let mut next = *state;
            next.claim = 2;
            steps.fault(self.settle(next), || "the claim moves to exporter 1".into());
        }
        let older = state.queue.iter().any(|queued| queued.number != 0 && queued.exporter == 0);
        if state.adopted < state.claim {
            let mut next = *state;
            next.adopted = state.claim;
            if self.rules.has(Rule::ClaimDrain) {
                next.queue = [Write::default(); QUEUE];
            }
            steps.step(self.settle(next), || {
                format!("the primary adopts the claim; older writes queued: {older}")
            });
        }
        let adopted = state.adopted == 2 || !self.rules.has(Rule::ClaimAdopted);
        if state.claim == 2 && state.exporters[1].exports == 0 && adopted {
            let mut next = *state;
            next.exporters[1] = Exporter { exports: 1, loss: state.loss, ..Exporter::default() };
            steps.step(self.settle(next), || "exporter 1 starts".into());
        }
        if state.claim == 2 && state.exporters[0].exports == 1 {
            let mut next = *state;
            next.exporters[0] = Exporter::default();
            steps
                .step(self.settle(next), || "exporter 0 learns that it has lost the claim, and stops".into());
        }
    }
}

impl Model for Exporters {
    type State = State;

    fn initial(&self) -> State {
        let mut state = State { claim: 1, adopted: 1, register: Register::containing(0), ..State::default() };
        state.exporters[0].exports = 1;
        state
    }

    fn steps(&self, state: &State, steps: &mut Steps<State>) {
        if self.violation(state).is_some() {
            return;
        }
        self.arrivals(state, steps);
        for x in (0..2).filter(|x| state.exporters[*x].exports == 1) {
            self.exporter(state, x, steps);
        }
        self.claim(state, steps);
        if state.loss < self.bounds.losses {
            let mut next = *state;
            next.loss += 1;
            for exporter in &mut next.exporters {
                exporter.lost |=
                    u8::from(exporter.unflushed >> state.content & 1 == 1 && state.content != state.flushed);
            }
            next.content = state.flushed;
            next.queue = [Write::default(); QUEUE];
            next.net = [Write::default(); QUEUE];
            next.register.lose();
            // What was under way is sent again, over new sessions.
            for x in 0..2 {
                let own = &mut next.exporters[x];
                if own.open != 0 {
                    own.session += 1;
                    let again = Write { number: own.open, exporter: x as u8, session: own.session, ack: 0 };
                    Self::send(&mut next, again);
                }
            }
            steps.fault(self.settle(next), || {
                format!("every copy loses power: it contains {} again", state.flushed)
            });
        }
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        if state.full != 0 {
            return Some("the model is too small: no room for a request");
        }
        if state.late != 0 {
            return Some("a write of the old exporter lands after the new one started");
        }
        if state.false_flush != 0 {
            return Some("a FLUSH succeeds although what it covers is lost");
        }
        let explained = state.register.contents() >> state.content & 1 == 1;
        (!explained).then_some("an old write lands on a newer one that was acknowledged")
    }

    fn goal(&self, state: &State) -> bool {
        let idle = |exporter: &Exporter| exporter.open == 0 && exporter.replays == 0;
        state.exporters.iter().all(idle) && state.adopted == state.claim
    }
}
