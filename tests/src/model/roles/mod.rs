//! Two slices of one device without data: roles, epochs, leases and claims.
//!
//! What is here and not in the model with data: map versions that are not slice epochs, one lease a
//! pair of nodes for all slices, one wait a node, a claim on a device whose slices have different
//! primaries, and requests that are forwarded. Instead of data there is what a node *could* do: nobody
//! may be able to read a slice that somebody else can acknowledge writes to.

mod answers;
mod state;

use super::checker::{Model, Steps};
use super::manager::{Question, incarnation};
use super::rules::{Rule, Rules};
use answers::Answers;
use state::{Ask, Copy, MAPS, Map, NODES, Registered, Request, SLICES, Slice, State};

/// How often what may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Nodes, each with a copy of both slices.
    pub nodes: usize,
    /// Daemons that die.
    pub crashes: u8,
    /// Nodes that are cut off from everybody.
    pub partitions: u8,
    /// The operator moves roles or the claim.
    pub moves: u8,
    /// Writes that exporters send.
    pub requests: u8,
}

/// The model.
pub struct Roles {
    bounds: Bounds,
    rules: Rules,
    manager: Answers,
}

const TWO_EXPORTERS: u8 = 1;
const LATE_WRITE: u8 = 2;
const BOUND: u8 = 3;

impl Roles {
    /// With these bounds and rules.
    pub fn new(bounds: Bounds, rules: Rules) -> Self {
        Self { bounds, rules, manager: Answers::default() }
    }

    fn nodes(&self) -> std::ops::Range<usize> {
        0..self.bounds.nodes
    }

    fn settle(&self, mut state: State) -> State {
        for node in self.nodes() {
            let reached = state.reachable(node);
            let known = &mut state.registered[node];
            known.connected = reached.into();
            if reached && known.incarnation != state.nodes[node].incarnation {
                known.incarnation = state.nodes[node].incarnation;
                known.adopted = 0;
            }
            // It tells the manager, once no write of an older claim is under way (rule 15). At once: an exporter
            // that starts later meets fewer writes.
            let own = &state.nodes[node];
            let map = &state.maps[own.adopted as usize];
            let older = own.writing.iter().any(|claim| *claim != 0 && *claim < map.claim);
            if reached && !(older && self.rules.has(Rule::ClaimDrain)) {
                known.adopted = map.version;
            }
        }
        state.normalise(self.rules);
        state
    }

    fn serves(&self, state: &State, node: usize, slice: usize) -> bool {
        let (own, view) = (&state.nodes[node], &state.map(node).slices[slice]);
        let intact = view.copies[0].incarnation == own.incarnation;
        own.up == 1 && view.primary() == node && (intact || !self.rules.has(Rule::PrimaryIncarnation))
    }

    fn ready(&self, state: &State, node: usize, slice: usize) -> bool {
        let waits = state.nodes[node].waits != 0 && self.rules.has(Rule::LeaseTakeover);
        self.serves(state, node, slice) && !waits
    }

    fn needs(&self, state: &State, node: usize, slice: usize) -> impl Iterator<Item = usize> + use<> {
        let mask = state.map(node).slices[slice].members() | state.nodes[node].joining[slice];
        (0..NODES).filter(move |other| *other != node && mask >> other & 1 == 1)
    }

    fn may_read(&self, state: &State, node: usize, slice: usize) -> bool {
        let map = state.map(node);
        let usable = |grantor: usize| {
            let Some(version) = state.nodes[node].leases[grantor].checked_sub(1) else { return false };
            (version <= map.version || !self.rules.has(Rule::LeaseVersion))
                && (version >= map.slices[slice].epoch || !self.rules.has(Rule::LeaseEpoch))
        };
        self.ready(state, node, slice)
            && (!self.rules.has(Rule::ReadLease) || self.needs(state, node, slice).all(usable))
    }

    /// Whether everybody whom a write needs would take it from this node.
    fn may_acknowledge(&self, state: &State, node: usize, slice: usize) -> bool {
        let epoch = state.map(node).slices[slice].epoch;
        let takes = |other: usize| {
            let view = &state.map(other).slices[slice];
            let as_mapped = view.copy_of(other).incarnation == state.nodes[other].incarnation;
            let fenced = view.epoch != epoch && self.rules.has(Rule::EpochFence);
            let listens = view.primary() == node || !self.rules.has(Rule::EpochFence);
            state.reachable(other) && state.reachable(node) && as_mapped && !fenced && listens
        };
        self.ready(state, node, slice)
            && (!self.rules.has(Rule::AckAll) || self.needs(state, node, slice).all(takes))
    }

    fn adopt(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if state.nodes[node].adopted == state.newest || !state.reachable(node) {
            return;
        }
        let mut next = *state;
        next.nodes[node].adopted = next.newest;
        let took_over =
            (0..SLICES).any(|slice| self.serves(&next, node, slice) && !self.serves(state, node, slice));
        let granted = next.granted(node);
        let own = &mut next.nodes[node];
        if took_over {
            own.waits |= granted & !own.forgot;
        }
        for slice in 0..SLICES {
            let changed =
                next.maps[next.newest as usize].slices[slice].epoch != state.map(node).slices[slice].epoch;
            if changed {
                next.nodes[node].joining[slice] = 0;
            }
            if !self.serves(&next, node, slice) {
                next.nodes[node].writing[slice] = 0;
            }
        }
        let version = next.newest_map().version;
        steps.step(self.settle(next), || format!("n{node} adopts map {version}"));
    }

    fn leases(&self, state: &State, holder: usize, steps: &mut Steps<State>) {
        for grantor in self.nodes().filter(|grantor| *grantor != holder) {
            let lease = state.nodes[holder].leases[grantor];
            if lease != 0 && state.nodes[grantor].waits >> holder & 1 == 1 {
                let mut next = *state;
                next.nodes[holder].leases[grantor] = 0;
                steps.step(self.settle(next), || format!("n{holder}'s lease from n{grantor} runs out"));
            }
            let version = state.map(grantor).version;
            let serves = (0..SLICES).any(|slice| self.serves(state, holder, slice));
            let talks = state.reachable(holder) && state.reachable(grantor);
            if talks && serves && lease < version + 1 {
                let mut next = *state;
                next.nodes[holder].leases[grantor] = version + 1;
                steps.step(self.settle(next), || {
                    format!("n{grantor} (map {version}) grants n{holder} a lease")
                });
            }
        }
    }

    /// The exporter sends; primaries begin, and end.
    fn requests(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let (own, map) = (&state.nodes[node], *state.map(node));
        let claimed = map.exporter as usize == node;
        let started = own.exports == map.claim || !self.rules.has(Rule::ClaimAdopted);
        for slice in 0..SLICES {
            let sent = own.sent[slice];
            let view = map.slices[slice];
            if sent.to == 0 && own.up == 1 && claimed && started && state.requests < self.bounds.requests {
                let mut next = *state;
                next.requests += 1;
                next.nodes[node].exports = map.claim;
                let to = view.primary();
                next.nodes[node].sent[slice] =
                    Request { to: to as u8 + 1, claim: map.claim, epoch: view.epoch };
                steps.fault(self.settle(next), || {
                    format!("exporter n{node} sends a write of slice {slice} to n{to}")
                });
            }
            if let Some(to) = (sent.to as usize).checked_sub(1).filter(|to| state.nodes[*to].up == 1) {
                let mut next = *state;
                next.nodes[node].sent[slice] = Request::default();
                let there = *state.map(to);
                let fenced = there.claim != sent.claim && self.rules.has(Rule::ClaimFence);
                let old = there.slices[slice].epoch != sent.epoch;
                let begins = !fenced && !old && self.serves(state, to, slice);
                if begins && state.nodes[to].writing[slice] == 0 {
                    next.nodes[to].writing[slice] = sent.claim;
                }
                let what = if begins { "begins" } else { "refuses" };
                steps.step(self.settle(next), || format!("n{to} {what} n{node}'s write of slice {slice}"));
            }
            if own.writing[slice] != 0 && self.may_acknowledge(state, node, slice) {
                let mut next = *state;
                next.nodes[node].writing[slice] = 0;
                let claim = own.writing[slice];
                if state.nodes.iter().any(|exporter| exporter.exports > claim) {
                    next.broken = LATE_WRITE;
                }
                steps.step(self.settle(next), || {
                    format!("n{node} acknowledges a write of slice {slice}, claim {claim}")
                });
            }
        }
    }

    fn failures(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        let own = &state.nodes[node];
        if own.up == 0 {
            let mut next = *state;
            next.nodes[node].up = 1;
            steps.step(self.settle(next), || format!("n{node} starts again"));
        } else if state.crashes < self.bounds.crashes {
            let mut next = *state;
            next.crashes += 1;
            let forgot = if self.rules.has(Rule::LeaseAfterStart) { 0 } else { state.granted(node) };
            // What it sent may arrive after its death.
            let (adopted, sent) = (own.adopted, own.sent);
            next.nodes[node] =
                state::Node { incarnation: 15, adopted, sent, forgot, ..state::Node::default() };
            steps.fault(self.settle(next), || format!("n{node} is killed"));
        }
        if state.cut == 0 && state.cuts < self.bounds.partitions {
            let mut next = *state;
            next.cuts += 1;
            next.cut = node as u8 + 1;
            steps.fault(self.settle(next), || format!("n{node} is cut off"));
        }
    }

    /// What primaries ask for.
    fn questions(&self, state: &State, node: usize, steps: &mut Steps<State>) {
        if !state.reachable(node) {
            return;
        }
        for peer in self.nodes().filter(|peer| *peer != node) {
            let counts = |slice: &usize| {
                let copy = state.map(node).slices[*slice].copy_of(peer);
                let lost = !state.reachable(peer) || copy.incarnation != state.nodes[peer].incarnation;
                self.serves(state, node, *slice) && copy.state != 3 && lost
            };
            if (0..SLICES).any(|slice| counts(&slice)) {
                let question = Question::Stale { asker: node, peer };
                self.decided(state, question, false, steps, || format!("n{node} has n{peer} recorded stale"));
            }
            for slice in 0..SLICES {
                let (view, newest) = (state.map(node).slices[slice], state.newest_map().slices[slice]);
                let same = view.epoch == newest.epoch && state.map(peer).slices[slice].epoch == newest.epoch;
                let copy = view.copy_of(peer);
                if !self.serves(state, node, slice) || !state.reachable(peer) || !same {
                    continue;
                }
                if copy.state == 3 {
                    let question = Question::Syncing { slice: slice as u32, peer };
                    self.decided(state, question, false, steps, || format!("n{node} has n{peer} filled"));
                }
                if copy.state == 2 && state.ask.active == 0 {
                    let mut next = *state;
                    next.ask = Ask {
                        active: 1,
                        asker: node as u8,
                        slice: slice as u8,
                        peer: peer as u8,
                        incarnation: state.nodes[peer].incarnation,
                        epoch: view.epoch,
                    };
                    if self.rules.has(Rule::Joining) {
                        next.nodes[node].joining[slice] |= 1 << peer;
                    }
                    steps.step(self.settle(next), || {
                        format!("n{node} asks for n{peer} as a member of slice {slice}")
                    });
                }
            }
        }
    }

    fn manager(&self, state: &State, steps: &mut Steps<State>) {
        let ask = state.ask;
        if ask.active == 1 {
            let mut next = *state;
            next.ask = Ask::default();
            let (peer, slice) = (ask.peer as usize, ask.slice.into());
            let view = state.newest_map().slices[ask.slice as usize];
            let known = state.registered[peer].incarnation == ask.incarnation;
            let first = view.copies[0];
            let asker = first.node == ask.asker
                && state.registered[first.node as usize].incarnation == first.incarnation;
            if known && asker {
                let question = Question::InSync { slice, peer, incarnation: incarnation(0, ask.incarnation) };
                self.decided(&next, question, false, steps, || format!("n{peer} is recorded in sync"));
            } else {
                steps.step(self.settle(next), || format!("the manager does not make n{peer} a member"));
            }
        }
        self.decided(state, Question::Repair, false, steps, || "the manager repairs".into());
        let exporter = state.newest_map().exporter as usize;
        let claim = state.newest_map().claim;
        if state.nodes[exporter].exports != claim
            && state.nodes[exporter].up == 1
            && self.manager.may_export(state.newest_map(), &state.registered[..self.bounds.nodes])
        {
            let mut next = *state;
            if state.nodes.iter().any(|node| node.exports == claim) {
                next.broken = TWO_EXPORTERS;
            }
            next.nodes[exporter].exports = claim;
            steps.step(self.settle(next), || format!("exporter n{exporter} starts, claim {claim}"));
        }
        if state.moves < self.bounds.moves {
            let mut moved = *state;
            moved.moves += 1;
            for node in self.nodes() {
                self.decided(&moved, Question::Failover { node }, true, steps, || {
                    format!("failover of n{node}")
                });
                self.decided(&moved, Question::MoveClaim { to: node }, true, steps, || {
                    format!("the claim goes to n{node}")
                });
                for (slice, view) in state.newest_map().slices.iter().enumerate() {
                    let copy = view.copy_of(node);
                    let intact = state.registered[node];
                    if copy.state == 1 && intact.connected == 1 && intact.incarnation == copy.incarnation {
                        let question = Question::HandOver { slice: slice as u32, to: node };
                        self.decided(&moved, question, true, steps, || {
                            format!("hand-over of slice {slice} to n{node}")
                        });
                    }
                }
            }
        }
    }

    fn decided(
        &self,
        state: &State,
        question: Question,
        fault: bool,
        steps: &mut Steps<State>,
        text: impl FnOnce() -> String,
    ) {
        let Some(map) =
            self.manager.ask(state.newest_map(), &state.registered[..self.bounds.nodes], question)
        else {
            return;
        };
        let mut next = *state;
        if next.newest as usize + 1 == MAPS {
            next.broken = BOUND;
        } else {
            next.newest += 1;
            next.maps[next.newest as usize] = map;
        }
        let text = || format!("{}: {}", text(), described(&map));
        if fault {
            steps.fault(self.settle(next), text);
        } else {
            steps.step(self.settle(next), text);
        }
    }
}

impl Model for Roles {
    type State = State;

    fn initial(&self) -> State {
        let mut state = State { count: self.bounds.nodes as u8, ..State::default() };
        let copies = |first: u8| {
            let mut copies = [Copy::default(); NODES];
            for (node, copy) in copies.iter_mut().enumerate().take(self.bounds.nodes) {
                *copy = Copy { node: node as u8, state: 1, incarnation: 0 };
            }
            copies[..=first as usize].rotate_right(1);
            copies
        };
        let slices = [0, 1].map(|first| Slice { epoch: 1, copies: copies(first) });
        state.maps[0] = Map { version: 1, slices, exporter: 0, claim: 1, claim_since: 1 };
        for node in self.nodes() {
            state.nodes[node].up = 1;
            state.registered[node] = Registered { connected: 1, adopted: 1, ..Registered::default() };
        }
        state.nodes[0].exports = 1;
        self.settle(state)
    }

    fn steps(&self, state: &State, steps: &mut Steps<State>) {
        if state.broken != 0 {
            return;
        }
        for node in self.nodes() {
            self.failures(state, node, steps);
            if self.bounds.requests > 0 {
                self.requests(state, node, steps);
            }
            if state.nodes[node].up == 0 {
                continue;
            }
            self.adopt(state, node, steps);
            self.leases(state, node, steps);
            self.questions(state, node, steps);
        }
        if state.cut != 0 {
            let mut next = *state;
            next.cut = 0;
            steps.step(self.settle(next), || "the partition ends".into());
        }
        self.manager(state, steps);
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        match state.broken {
            TWO_EXPORTERS => return Some("two exporters may export under one claim"),
            LATE_WRITE => {
                return Some("a write of the old exporter is acknowledged after the new one started");
            }
            BOUND => return Some("the model is too small: no room for a map"),
            _ => {}
        }
        for slice in 0..SLICES {
            for one in self.nodes().filter(|one| self.may_acknowledge(state, *one, slice)) {
                for other in self.nodes().filter(|other| *other != one) {
                    if self.may_acknowledge(state, other, slice) {
                        return Some("two primaries can acknowledge");
                    }
                    if self.may_read(state, other, slice) {
                        return Some("one node can acknowledge what another does not see when it reads");
                    }
                }
            }
        }
        None
    }

    fn goal(&self, state: &State) -> bool {
        let map = state.newest_map();
        let exporter = &state.nodes[map.exporter as usize];
        state.cut == 0
            && self.nodes().all(|node| state.nodes[node].up == 1 && state.nodes[node].adopted == state.newest)
            && map.slices.iter().all(|slice| slice.members() == (1 << self.bounds.nodes) - 1)
            && (exporter.exports == map.claim || !self.rules.has(Rule::ClaimAdopted))
            && (0..SLICES).all(|slice| {
                let primary = map.slices[slice].primary();
                self.may_read(state, primary, slice) && self.may_acknowledge(state, primary, slice)
            })
    }
}

fn described(map: &Map) -> String {
    let states = ["", "in sync", "syncing", "stale"];
    let copy = |copy: &Copy| format!("n{} {}", copy.node, states[copy.state as usize]);
    let slice = |slice: &Slice| {
        slice.copies.iter().filter(|copy| copy.state != 0).map(copy).collect::<Vec<_>>().join(", ")
    };
    let slices = map.slices.iter().map(slice).collect::<Vec<_>>().join(" | ");
    format!("{slices}; exporter n{} claim {}", map.exporter, map.claim)
}
