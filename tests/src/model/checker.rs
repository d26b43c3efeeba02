//! The search: every state that a model can reach, breadth first, until there is none left.
//!
//! Breadth first makes a counterexample a shortest one. The graph's edges are kept, so that afterwards
//! a backward search from the goal tells from which states it cannot be reached any more. That
//! question (of every state: is there still a way?) is the one that a mirror's recovery asks, and
//! the reason why the search is our own: checkers that follow paths forward and forget the edges
//! answer only whether a path ends without having been at the goal.
//!
//! Visited states are told apart by 128 bits of their hash. With ten million states two of them
//! fall together with a probability of about 10⁻²⁵.

use std::collections::VecDeque;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};
use zerocopy::{Immutable, IntoBytes};

/// Something to be searched.
pub trait Model {
    /// Plain bytes: two states are the same if their bytes are.
    type State: Copy + IntoBytes + Immutable;

    /// Where it begins.
    fn initial(&self) -> Self::State;

    /// Everything that can happen next.
    fn steps(&self, state: &Self::State, steps: &mut Steps<Self::State>);

    /// What must never be so in any state.
    fn violation(&self, state: &Self::State) -> Option<&'static str>;

    /// What must stay reachable, by steps that are no faults, from every state.
    fn goal(&self, state: &Self::State) -> bool;
}

/// Takes the steps out of one state.
pub struct Steps<S> {
    found: Vec<Step<S>>,
    told: bool,
}

struct Step<S> {
    next: S,
    fault: bool,
    text: String,
}

impl<S> Steps<S> {
    fn new(told: bool) -> Self {
        Self { found: Vec::new(), told }
    }

    /// Something that the system does by itself.
    pub fn step(&mut self, next: S, text: impl FnOnce() -> String) {
        self.push(next, false, text);
    }

    /// Something that is done to it: recovery must not depend on it.
    pub fn fault(&mut self, next: S, text: impl FnOnce() -> String) {
        self.push(next, true, text);
    }

    fn push(&mut self, next: S, fault: bool, text: impl FnOnce() -> String) {
        // Most steps are never told; their words cost more than the search.
        let text = if self.told { text() } else { String::new() };
        self.found.push(Step { next, fault, text });
    }
}

/// How a search ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Every reachable state was seen; none is bad, and from each the goal can be reached.
    Holds,
    /// A bad state, and a shortest way to it.
    Violated {
        /// What must not be.
        what: &'static str,
        /// One line a step.
        trace: Vec<String>,
    },
    /// States without a way to the goal, and a shortest way to the first of them.
    Stuck {
        /// How many there are.
        states: usize,
        /// One line a step.
        trace: Vec<String>,
    },
    /// More states than allowed; what was seen is no proof.
    TooMany,
}

/// The figures of a search.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Different states.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
    /// How long it took.
    pub time: Duration,
    /// What came out.
    pub verdict: Verdict,
}

/// Searches all of `model`, unless it has more than `limit` states.
pub fn search<M: Model>(model: &M, limit: usize) -> Outcome {
    let began = Instant::now();
    let mut search = Search { model, seen: Seen::default(), edges: Vec::new(), goals: Vec::new(), steps: 0 };
    let (verdict, depth) = search.run(limit);
    Outcome { states: search.seen.prints.len(), steps: search.steps, depth, time: began.elapsed(), verdict }
}

struct Search<'a, M: Model> {
    model: &'a M,
    seen: Seen,
    /// To, from: steps that are no faults.
    edges: Vec<(u32, u32)>,
    goals: Vec<bool>,
    steps: usize,
}

impl<M: Model> Search<'_, M> {
    fn run(&mut self, limit: usize) -> (Verdict, usize) {
        let initial = self.model.initial();
        let mut frontier = VecDeque::from([initial]);
        self.seen.enter(print(&initial), u32::MAX);
        let (mut index, mut depth, mut layer_end) = (0u32, 0, 1);
        let mut steps = Steps::new(false);
        while let Some(state) = frontier.pop_front() {
            if index == layer_end {
                depth += 1;
                layer_end = self.seen.prints.len() as u32;
            }
            if let Some(what) = self.model.violation(&state) {
                return (Verdict::Violated { what, trace: self.trace(index) }, depth);
            }
            if self.seen.prints.len() > limit {
                return (Verdict::TooMany, depth);
            }
            self.goals.push(self.model.goal(&state));
            self.model.steps(&state, &mut steps);
            self.steps += steps.found.len();
            for step in steps.found.drain(..) {
                let (next, new) = self.seen.enter(print(&step.next), index);
                if new {
                    frontier.push_back(step.next);
                }
                if !step.fault && next != index {
                    self.edges.push((next, index));
                }
            }
            index += 1;
        }
        (self.recovery(), depth)
    }

    /// Backwards from the goals: who has no way there?
    fn recovery(&mut self) -> Verdict {
        self.edges.sort_unstable();
        self.edges.dedup();
        let mut reaches = std::mem::take(&mut self.goals);
        let mut open: Vec<u32> = (0..reaches.len() as u32).filter(|index| reaches[*index as usize]).collect();
        while let Some(index) = open.pop() {
            let first = self.edges.partition_point(|edge| edge.0 < index);
            for (_, from) in self.edges[first..].iter().take_while(|edge| edge.0 == index) {
                if !std::mem::replace(&mut reaches[*from as usize], true) {
                    open.push(*from);
                }
            }
        }
        let states = reaches.iter().filter(|reaches| !**reaches).count();
        match reaches.iter().position(|reaches| !reaches) {
            Some(first) => Verdict::Stuck { states, trace: self.trace(first as u32) },
            None => Verdict::Holds,
        }
    }

    /// A shortest way to a state, told by walking it again.
    fn trace(&self, index: u32) -> Vec<String> {
        let mut way = vec![index];
        while let Some(parent) = self.seen.parent(*way.last().unwrap_or(&0)) {
            way.push(parent);
        }
        way.reverse();
        let mut state = self.model.initial();
        let mut lines = Vec::new();
        for index in &way[1..] {
            let mut steps = Steps::new(true);
            self.model.steps(&state, &mut steps);
            let wanted = self.seen.prints[*index as usize];
            let step = steps.found.into_iter().find(|step| print(&step.next) == wanted);
            let step = step.expect("a model's steps depend on nothing but the state");
            lines.push(step.text);
            state = step.next;
        }
        lines
    }
}

/// Every state found, in the order of its finding.
#[derive(Default)]
struct Seen {
    prints: Vec<u128>,
    parents: Vec<u32>,
    index: std::collections::HashMap<u128, u32, BuildHasherDefault<Folded>>,
}

impl Seen {
    /// Its index, and whether it is new.
    fn enter(&mut self, print: u128, parent: u32) -> (u32, bool) {
        let next = self.prints.len() as u32;
        let index = *self.index.entry(print).or_insert(next);
        if index == next {
            self.prints.push(print);
            self.parents.push(parent);
        }
        (index, index == next)
    }

    fn parent(&self, index: u32) -> Option<u32> {
        Some(self.parents[index as usize]).filter(|parent| *parent != u32::MAX)
    }
}

/// A fingerprint is a hash already.
#[derive(Default)]
struct Folded(u64);

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, print: u128) {
        self.0 = print as u64;
    }
}

fn print<S: IntoBytes + Immutable>(state: &S) -> u128 {
    let (mut low, mut high) = (0x9e37_79b9_7f4a_7c15_u64, 0xd6e8_feb8_6659_fd93_u64);
    for chunk in state.as_bytes().chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let word = u64::from_le_bytes(word);
        low = (low ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        low ^= low >> 31;
        high = (high.rotate_left(23) ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        high ^= high >> 29;
    }
    u128::from(mixed(high)) << 64 | u128::from(mixed(low))
}

fn mixed(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts to `end`; from `trap` on there is no way back to 0 but by a fault.
    struct Counter {
        end: u8,
        trap: u8,
        bad: u8,
    }

    impl Model for Counter {
        type State = [u8; 1];

        fn initial(&self) -> [u8; 1] {
            [0]
        }

        fn steps(&self, state: &[u8; 1], steps: &mut Steps<[u8; 1]>) {
            if state[0] < self.end {
                steps.step([state[0] + 1], || format!("to {}", state[0] + 1));
            }
            if state[0] < self.trap {
                steps.step([0], || "back".into());
            }
            steps.fault([0], || "reset".into());
        }

        fn violation(&self, state: &[u8; 1]) -> Option<&'static str> {
            (state[0] == self.bad).then_some("bad")
        }

        fn goal(&self, state: &[u8; 1]) -> bool {
            state[0] == 0
        }
    }

    #[test]
    fn a_shortest_way_to_a_bad_state_is_told() {
        let outcome = search(&Counter { end: 9, trap: 20, bad: 3 }, 100);
        let trace = ["to 1", "to 2", "to 3"].map(String::from).to_vec();
        assert_eq!(outcome.verdict, Verdict::Violated { what: "bad", trace });
    }

    #[test]
    fn the_goal_must_be_reachable_without_faults() {
        assert_eq!(search(&Counter { end: 9, trap: 20, bad: 99 }, 100).verdict, Verdict::Holds);
        let outcome = search(&Counter { end: 4, trap: 3, bad: 99 }, 100);
        let trace = ["to 1", "to 2", "to 3"].map(String::from).to_vec();
        assert_eq!(outcome.verdict, Verdict::Stuck { states: 2, trace });
        assert_eq!((outcome.states, outcome.depth), (5, 4));
    }

    #[test]
    fn too_many_states_are_no_proof() {
        assert_eq!(search(&Counter { end: 200, trap: 250, bad: 255 }, 100).verdict, Verdict::TooMany);
    }
}
