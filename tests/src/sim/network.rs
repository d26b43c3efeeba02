//! Lanes between nodes.
//!
//! The fault model. Frames of one lane and direction arrive in order, after a delay, whole. With the
//! lane they are lost from some frame on, or they linger somewhere and arrive up to two seconds later,
//! still in order, perhaps when the next lane stands and carries frames already. A partition is silence
//! in one direction or in both: frames wait, as TCP would send them again, and arrive when it is over if
//! the lane still stands by then; the end of a lane is not seen through it either. On demand a bit of one
//! frame is flipped.

use crate::sim::scheduler::{Nanos, Random};
use mirror_net::engine::action::BufferRange;
use std::collections::{BTreeMap, BTreeSet};

/// A frame under way.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The session of the lane that it was sent on.
    pub session: u64,
    /// Header, body and trailer as on the wire.
    pub bytes: Vec<u8>,
    /// The sender's buffer that it is sent from, which must not change meanwhile.
    pub borrowed: Option<BufferRange>,
    /// A bit of it was flipped.
    pub damaged: bool,
    /// Its lane is gone, and it arrives all the same.
    pub late: bool,
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
    /// Directions in which the next frame is damaged.
    damaging: BTreeSet<(u16, u16)>,
    /// The last arrival of what lingers of a lane that is gone, by session and direction; `None` if nothing
    /// does.
    lingering: BTreeMap<(u64, bool), Option<Nanos>>,
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

    /// The next frame in that direction will be damaged.
    pub fn damage_next(&mut self, from: u16, to: u16) {
        self.damaging.insert((from, to));
    }

    /// Whether this frame is to be damaged.
    pub fn take_damage(&mut self, from: u16, to: u16) -> bool {
        !self.damaging.is_empty() && self.damaging.remove(&(from, to))
    }

    /// When a frame whose lane is gone arrives all the same, if it does.
    pub fn linger(
        &mut self,
        now: Nanos,
        from: u16,
        to: u16,
        session: u64,
        random: &mut Random,
    ) -> Option<Nanos> {
        let longest = random.range(1, 2_000_000_000);
        let lingers = random.one_in(2);
        let entry = self.lingering.entry((session, from > to)).or_insert(lingers.then_some(now));
        let last = entry.as_mut()?;
        *last = (*last + 1).max(now + random.below(longest));
        Some(*last)
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
