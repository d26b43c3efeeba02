//! Lanes between nodes.
//!
//! The fault model. Frames of one lane and direction arrive in order, after a delay, whole; with the
//! lane they are lost from some frame on. A partition is silence in one direction: frames wait, as
//! TCP would send them again, and arrive when it is over if the lane still stands by then; the end of
//! a lane is not seen through it either.

use crate::sim::scheduler::{Nanos, Random};
use std::collections::{BTreeMap, BTreeSet};

/// A frame under way.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Header, body and trailer as on the wire.
    pub bytes: Vec<u8>,
    /// The sender's buffer that it is sent from, with the offset; it must not change meanwhile.
    pub borrowed: Option<(u32, u32, u32)>,
}

#[derive(Clone, Debug, Default)]
struct Lane {
    session: u64,
    /// The arrival of the last frame of each direction (from the lower node, from the higher).
    last: [Nanos; 2],
}

/// The network.
#[derive(Default)]
pub struct Network {
    lanes: BTreeMap<(u16, u16), Lane>,
    silent: BTreeSet<(u16, u16)>,
    next_session: u64,
}

fn pair(a: u16, b: u16) -> (u16, u16) {
    (a.min(b), a.max(b))
}

impl Network {
    /// Whether frames from `from` do not reach `to`.
    pub fn is_silent(&self, from: u16, to: u16) -> bool {
        self.silent.contains(&(from, to))
    }

    /// Begins or ends silence in one direction.
    pub fn set_silent(&mut self, from: u16, to: u16, silent: bool) {
        if silent {
            self.silent.insert((from, to));
        } else {
            self.silent.remove(&(from, to));
        }
    }

    /// The session of the lane between two nodes.
    pub fn session(&self, a: u16, b: u16) -> Option<u64> {
        self.lanes.get(&pair(a, b)).map(|lane| lane.session)
    }

    /// Makes a lane, unless there is one.
    pub fn connect(&mut self, a: u16, b: u16) -> Option<u64> {
        if self.lanes.contains_key(&pair(a, b)) || self.is_silent(a, b) || self.is_silent(b, a) {
            return None;
        }
        self.next_session += 1;
        self.lanes.insert(pair(a, b), Lane { session: self.next_session, last: [0; 2] });
        Some(self.next_session)
    }

    /// Ends that lane; false if it is gone.
    pub fn cut(&mut self, a: u16, b: u16, session: u64) -> bool {
        if self.session(a, b) != Some(session) {
            return false;
        }
        self.lanes.remove(&pair(a, b));
        true
    }

    /// When a frame that is sent now arrives; `None` if there is no such lane any more.
    pub fn arrival(
        &mut self,
        now: Nanos,
        from: u16,
        to: u16,
        session: u64,
        random: &mut Random,
    ) -> Option<Nanos> {
        let lane = self.lanes.get_mut(&pair(from, to)).filter(|lane| lane.session == session)?;
        let delay =
            if random.one_in(50) { random.range(200_000, 20_000_000) } else { random.range(10_000, 200_000) };
        let last = &mut lane.last[usize::from(from > to)];
        *last = (now + delay).max(*last + 1);
        Some(*last)
    }
}
