//! One slice with data: writes, flushes and reads, sessions and reconciling, dirty masks, copies that
//! become members, leases, crashes and partitions.

mod events;
mod failures;
mod primary;
pub mod register;
mod roster;
mod state;

use super::checker::{Model, Steps};
use super::rules::{Rule, Rules};
use roster::{ABSENT, Answers, IN_SYNC, Registered, Roster, STALE};
use state::{NODES, NONE, Node, REGIONS, State, bit, broken, message, work};

/// How large the model is, and how often what may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Nodes, each with a copy.
    pub nodes: usize,
    /// Regions.
    pub regions: usize,
    /// Writes; where a copy is new, the first of them is what the others begin with.
    pub writes: u8,
    /// Crashes of any node, of the kinds below.
    pub crashes: u8,
    /// Daemons die.
    pub kills: bool,
    /// Machines lose power.
    pub power_cuts: bool,
    /// One node is cut off from the others, or from everybody, and comes back.
    pub partitions: u8,
    /// The operator fails a node over, or hands over to a member.
    pub moves: u8,
    /// FLUSH requests.
    pub flushes: u8,
    /// Rounds in which dirty bits are cleared.
    pub clears: u8,
    /// Reads, each of which binds what later ones may return.
    pub reads: u8,
    /// Reads that take time.
    pub slow_reads: u8,
    /// The last node's copy is a new one, and has nothing.
    pub newcomer: bool,
    /// Every region is dirty to begin with.
    pub dirty: bool,
    /// Leases are granted and run out at any time; otherwise a session brings them, and they run out when
    /// somebody waits for it.
    pub leases: bool,
    /// The manager notices nodes that come and go late.
    pub late_manager: bool,
}

impl Bounds {
    /// Nothing happens.
    pub const NONE: Self = Self {
        nodes: 2,
        regions: 1,
        writes: 0,
        crashes: 0,
        kills: true,
        power_cuts: true,
        partitions: 0,
        moves: 0,
        flushes: 0,
        clears: 0,
        reads: 0,
        slow_reads: 0,
        newcomer: false,
        dirty: false,
        leases: false,
        late_manager: false,
    };
}

/// The model.
pub struct Replication {
    bounds: Bounds,
    rules: Rules,
    manager: Answers,
}

impl Replication {
    /// With these bounds and rules.
    pub fn new(bounds: Bounds, rules: Rules) -> Self {
        assert!((2..=NODES).contains(&bounds.nodes) && (1..=REGIONS).contains(&bounds.regions));
        assert!(bounds.writes + u8::from(bounds.newcomer) <= register::WRITES_MAX);
        Self { bounds, rules, manager: Answers::default() }
    }

    fn has(&self, rule: Rule) -> bool {
        self.rules.has(rule)
    }

    fn nodes(&self) -> std::ops::Range<usize> {
        0..self.bounds.nodes
    }

    fn regions(&self) -> std::ops::Range<usize> {
        0..self.bounds.regions
    }

    /// The nodes of a mask.
    fn each(mask: u8) -> impl Iterator<Item = usize> {
        (0..NODES).filter(move |node| mask >> node & 1 == 1)
    }

    /// Whether a node is primary, by the map that it adopted (rule 3).
    fn serves(&self, state: &State, node: usize) -> bool {
        let (own, roster) = (&state.nodes[node], state.roster(node));
        let intact = (own.attach, own.process) == (roster.attach[node], roster.process[node]);
        own.up == 1 && roster.primary() == node && (intact || !self.has(Rule::PrimaryIncarnation))
    }

    /// Whether it is done with waiting (rules 10 and 13).
    fn ready(&self, state: &State, node: usize) -> bool {
        let own = &state.nodes[node];
        self.serves(state, node)
            && (own.waits == 0 || !self.has(Rule::LeaseTakeover))
            && (!own.has_late_writes() || !self.has(Rule::Drain))
    }

    /// Whose acknowledgement and lease a primary cannot do without (rules 1 and 6).
    fn needs(&self, state: &State, node: usize) -> u8 {
        (state.roster(node).members() | state.nodes[node].joining) & !bit(node)
    }

    /// Whether a lease of `grantor` lets `holder` read now.
    fn may_use_lease(&self, state: &State, holder: usize, grantor: usize) -> bool {
        let own = &state.nodes[holder];
        let Some(version) = own.leases[grantor].checked_sub(1) else { return false };
        (version <= own.adopted || !self.has(Rule::LeaseVersion))
            && (version >= own.adopted || !self.has(Rule::LeaseEpoch))
    }

    /// Whether a node answers a read (rules 11 and 12).
    fn may_read(&self, state: &State, node: usize, region: usize) -> bool {
        let own = &state.nodes[node];
        self.ready(state, node)
            && (own.work[region].kind != work::WRITE || !self.has(Rule::ReadWaits))
            && Self::each(self.needs(state, node)).all(|peer| {
                let leased = self.may_use_lease(state, node, peer) || !self.has(Rule::ReadLease);
                let equal = own.reconciled >> peer & 1 == 1 && own.to_copy[peer] & bit(region) == 0;
                leased && (equal || !self.has(Rule::ReconcileReads))
            })
    }

    /// Takes a step's outcome: what follows from it at once, and its normal form.
    fn settle(&self, mut state: State) -> State {
        state.normalise(self.rules, self.bounds.nodes);
        let mut completed = false;
        for node in self.nodes() {
            completed |= self.complete(&mut state, node);
        }
        if !self.bounds.late_manager {
            for node in self.nodes() {
                completed |= self.notice(&mut state, node);
            }
        }
        if completed {
            state.normalise(self.rules, self.bounds.nodes);
        }
        let primary = state.newest_roster().primary();
        if state.lost == 1 && state.nodes[primary].adopted == state.newest && self.ready(&state, primary) {
            // Until now a deposed primary may have read, under its lease, what is lost.
            state.registers.iter_mut().for_each(register::Register::lose);
            state.lost = 0;
        }
        state
    }

    /// In-sync copies, and whatever else the newest map lists, differ only where a mask says so.
    fn covered(&self, state: &State) -> bool {
        let roster = state.newest_roster();
        self.regions().all(|region| {
            let busy = self
                .nodes()
                .any(|node| matches!(state.nodes[node].work[region].kind, work::WRITE | work::LATE))
                || state.net.iter().any(|sent| {
                    matches!(sent.kind, message::WRITE | message::COPY) && sent.region as usize == region
                });
            let pairs = self.nodes().flat_map(|a| (0..a).map(move |b| (a, b)));
            busy || pairs
                .filter(|(a, b)| {
                    let counts = |node: usize| roster.state[node] == IN_SYNC;
                    counts(*a) && state.nodes[*b].blank == 0 || counts(*b) && state.nodes[*a].blank == 0
                })
                .filter(|(a, b)| state.nodes[*a].blank == 0 && state.nodes[*b].blank == 0)
                .all(|(a, b)| {
                    let (a, b) = (&state.nodes[a], &state.nodes[b]);
                    a.content(region) == b.content(region)
                        || (a.all_dirty() | b.all_dirty()) & bit(region) != 0
                })
        })
    }

    /// Who could acknowledge a write now: ready, and everybody whom it needs listens to it.
    fn acknowledgers(&self, state: &State) -> usize {
        self.nodes()
            .filter(|node| {
                self.ready(state, *node) && self.needs(state, *node) & !state.nodes[*node].sessions == 0
            })
            .count()
    }
}

impl Model for Replication {
    type State = State;

    fn initial(&self) -> State {
        let last = self.bounds.nodes - 1;
        let mut state = State::default();
        let roster = &mut state.rosters[0];
        roster.order = [NONE; NODES];
        for node in 0..self.bounds.nodes {
            let new = self.bounds.newcomer && node == last;
            roster.order[node] = node as u8;
            roster.state[node] = if new { STALE } else { IN_SYNC };
            state.nodes[node] = Node { up: 1, blank: new.into(), cached: [NONE; REGIONS], ..Node::default() };
            if self.bounds.dirty {
                state.nodes[node].dirty = bit(self.bounds.regions) - 1;
            }
            if self.bounds.newcomer && !new {
                state.nodes[node].durable = [1; REGIONS];
            }
            state.registered[node] = Registered { connected: 1, ..Registered::default() };
        }
        let begin = u8::from(self.bounds.newcomer);
        state.registers = [register::Register::containing(begin); REGIONS];
        state.spent.writes = begin;
        self.settle(state)
    }

    fn steps(&self, state: &State, steps: &mut Steps<State>) {
        if state.broken != 0 {
            return;
        }
        self.deliveries(state, steps);
        for node in self.nodes() {
            if state.nodes[node].up == 0 {
                self.restart(state, node, steps);
                continue;
            }
            self.disk_steps(state, node, steps);
            self.adoption(state, node, steps);
            self.lease_steps(state, node, steps);
            self.slow_read(state, node, steps);
            self.crashes(state, node, steps);
            if self.serves(state, node) {
                self.sessions(state, node, steps);
                self.questions(state, node, steps);
            }
            if self.ready(state, node) {
                self.serving(state, node, steps);
            }
        }
        self.partitions(state, steps);
        self.manager_steps(state, steps);
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        match state.broken {
            broken::PROMOTED => return Some("a copy was promoted that is not a member with its incarnation"),
            broken::READ => return Some("a read went back, or returned what was never written"),
            broken::SLOW_READ => return Some("a read returned what was not so at any time of it"),
            broken::BOUND => return Some("the model is too small: no room for a message or a map"),
            _ => {}
        }
        let lost = self.nodes().any(|node| {
            self.regions().any(|region| {
                self.may_read(state, node, region)
                    && state.registers[region].contents() >> state.nodes[node].content(region) & 1 == 0
            })
        });
        if lost {
            return Some("an acknowledged write is lost, or a read goes back");
        }
        if self.acknowledgers(state) > 1 {
            return Some("two primaries can acknowledge");
        }
        (!self.covered(state)).then_some("copies differ and no dirty mask says so")
    }

    fn goal(&self, state: &State) -> bool {
        let roster = state.newest_roster();
        let primary = roster.primary();
        let own = &state.nodes[primary];
        let healthy = |node: usize| {
            let other = &state.nodes[node];
            other.up == 1
                && other.adopted == state.newest
                && roster.state[node] == IN_SYNC
                && (node == primary || own.sessions >> node & 1 == 1)
                && self.regions().all(|region| other.content(region) == own.content(region))
        };
        state.cut == 0
            && self.nodes().all(healthy)
            && self
                .regions()
                .all(|region| own.work[region].kind == work::IDLE && self.may_read(state, primary, region))
    }
}

/// Whether a node is in a list.
pub fn listed(roster: &Roster, node: usize) -> bool {
    roster.state[node] != ABSENT
}
