//! Quotas: how many slices each disk should get, so that all end evenly, given out in long runs.

use super::room::{Room, Share};
use crate::format::alloc::Segment;

/// Shares of fewer slices are not cut in two: long runs count for more then than that every disk gets its part of
/// the primaries.
const WHOLE_BELOW: u64 = 32;

/// What each disk should still get, by segment.
#[derive(Clone, Default, Debug)]
pub(super) struct Quotas {
    left: Vec<[u32; 3]>,
    /// Disks that have something left, by segment, and where to go on among them: what comes next goes where the
    /// last went, so runs stay long.
    open: [Vec<usize>; 3],
    cursor: [usize; 3],
    /// A disk's quota is one for its primary and secondary segment together.
    shared: bool,
}

impl Quotas {
    /// Divides `needs` slices, by segment, over the takers. What one of the mirrored segments has no room for goes
    /// to the other.
    pub(super) fn even(room: &Room, needs: [u64; 3]) -> Self {
        let takers: Vec<usize> = room.takers().collect();
        let mut quotas = Self { left: vec![[0; 3]; room.spots.len()], ..Self::default() };
        let [primary, secondary, unmirrored] = needs;
        if primary + secondary < WHOLE_BELOW * takers.len() as u64 {
            quotas.divide_whole(room, &takers, [primary, secondary]);
        } else {
            let over = quotas.divide(room, &takers, Segment::Primary, primary);
            let over = quotas.divide(room, &takers, Segment::Secondary, secondary + over);
            quotas.divide(room, &takers, Segment::Primary, over);
        }
        quotas.divide(room, &takers, Segment::Unmirrored, unmirrored);
        quotas.open();
        quotas
    }

    /// Divides slices of one segment; how many have no room.
    fn divide(&mut self, room: &Room, takers: &[usize], segment: Segment, slices: u64) -> u64 {
        let kind = segment as usize;
        let vessel = |at: &usize| {
            let given = self.left[*at];
            (room.spots[*at].load + given.iter().sum::<u32>(), room.free(*at, segment) - given[kind])
        };
        let shares = level(&takers.iter().map(vessel).collect::<Vec<_>>(), slices);
        for (at, share) in takers.iter().zip(&shares) {
            self.left[*at][kind] += share;
        }
        slices - shares.iter().map(|share| u64::from(*share)).sum::<u64>()
    }

    /// Divides slices of both mirrored segments at once, each disk's share of one segment as far as can be.
    fn divide_whole(&mut self, room: &Room, takers: &[usize], mut slices: [u64; 2]) {
        let free = |at: usize| [Segment::Primary, Segment::Secondary].map(|segment| room.free(at, segment));
        let vessel = |at: &usize| (room.spots[*at].load, free(*at).iter().sum());
        let shares = level(&takers.iter().map(vessel).collect::<Vec<_>>(), slices.iter().sum());
        for (at, mut share) in takers.iter().copied().zip(shares) {
            let free = free(at);
            // First what is needed of a segment, then what needs a slot of the other, since its own have none left.
            for bound in [slices, [u64::MAX; 2]] {
                for kind in [0, 1] {
                    let given = &mut self.left[at][kind];
                    let count = u64::from(share.min(free[kind] - *given)).min(bound[kind]) as u32;
                    *given += count;
                    share -= count;
                    slices[kind] = slices[kind].saturating_sub(count.into());
                }
            }
        }
    }

    /// What takers lack to those loads, in whatever segment.
    pub(super) fn to_loads(room: &Room, loads: &[(usize, u32)]) -> Self {
        let mut quotas = Self { left: vec![[0; 3]; room.spots.len()], shared: true, ..Self::default() };
        for (at, load) in loads {
            let lacks = load.saturating_sub(room.spots[*at].load);
            quotas.left[*at] = [lacks, lacks, 0];
        }
        quotas.open();
        quotas
    }

    fn open(&mut self) {
        for (kind, open) in self.open.iter_mut().enumerate() {
            *open = (0..self.left.len()).filter(|at| self.left[*at][kind] > 0).collect();
        }
    }

    /// The next disk that has something left for a segment and is allowed, with how many of `count` slices it
    /// takes.
    pub(super) fn next(
        &mut self,
        room: &Room,
        segment: Segment,
        count: u32,
        allowed: impl Fn(usize) -> bool,
    ) -> Option<Share> {
        let kind = segment as usize;
        let mut looked = 0;
        while looked < self.open[kind].len() {
            let position = (self.cursor[kind] + looked) % self.open[kind].len();
            let at = self.open[kind][position];
            if self.left[at][kind] == 0 {
                self.open[kind].swap_remove(position);
                continue;
            }
            let most = self.left[at][kind].min(room.free(at, segment));
            if most > 0 && allowed(at) {
                let count = count.min(most);
                let left = &mut self.left[at];
                left[kind] -= count;
                if self.shared {
                    *left = [left[kind], left[kind], 0];
                }
                self.cursor[kind] = position;
                return Some(Share { at, segment, count });
            }
            looked += 1;
        }
        None
    }

    /// Divides `count` slices over the allowed takers beside what quotas will bring them, so that they end as even as
    /// can be; less than `count` if there is no room for more.
    pub(super) fn beside(
        &self,
        room: &Room,
        segment: Segment,
        count: u32,
        allowed: impl Fn(usize) -> bool,
    ) -> Vec<Share> {
        let takers: Vec<usize> =
            room.takers().filter(|at| room.free(*at, segment) > 0 && allowed(*at)).collect();
        let promised = |at: usize| match self.shared {
            true => self.left[at][0],
            false => self.left[at].iter().sum(),
        };
        let vessel = |at: &usize| (room.spots[*at].load + promised(*at), room.free(*at, segment));
        let shares = level(&takers.iter().map(vessel).collect::<Vec<_>>(), count.into());
        let taken = takers.into_iter().zip(shares).filter(|(_, count)| *count > 0);
        taken.map(|(at, count)| Share { at, segment, count }).collect()
    }
}

/// Divides `total` over vessels of (`load`, `room`) so that the fullest ends as low as can be: what each gets.
/// Those that come first get the odd ones.
pub(super) fn level(vessels: &[(u32, u32)], total: u64) -> Vec<u32> {
    let at = |level: u32| -> u64 {
        vessels.iter().map(|(load, room)| u64::from(level.saturating_sub(*load).min(*room))).sum()
    };
    let (mut low, mut high) =
        (0, vessels.iter().map(|(load, room)| load.saturating_add(*room)).max().unwrap_or(0));
    // The highest level that needs no more than there is.
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if at(middle) <= total { low = middle } else { high = middle - 1 }
    }
    let mut odd = total - at(low).min(total);
    vessels
        .iter()
        .map(|(load, room)| {
            let share = low.saturating_sub(*load).min(*room);
            if odd > 0 && share < *room && *load <= low {
                odd -= 1;
                share + 1
            } else {
                share
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_divided_ends_within_one_where_there_is_room(
            vessels in prop::collection::vec((0u32..50, 0u32..50), 1..12), total in 0u64..300
        ) {
            let shares = level(&vessels, total);
            let room: u64 = vessels.iter().map(|(_, room)| u64::from(*room)).sum();
            prop_assert_eq!(shares.iter().map(|share| u64::from(*share)).sum::<u64>(), total.min(room));
            for ((load, room), share) in vessels.iter().zip(&shares) {
                prop_assert!(share <= room);
                let others = vessels.iter().zip(&shares).filter(|((_, room), share)| *share < room);
                for ((other, _), more) in others {
                    prop_assert!(*share == 0 || load + share <= other + more + 1);
                }
            }
        }
    }
}
