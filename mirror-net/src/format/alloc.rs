//! Choosing slots: which belong to which segment, and which is taken next.

use super::superblock::{SlotOrder, Superblock, ZONE_POINTS, ZoneProfile};
use crate::ids::SlotIndex;
use crate::map::SegmentSlots;
use serde::{Deserialize, Serialize};

/// Rates that differ by less than this, in percent of the disk's fastest, count as equal: within it,
/// neighbours in address matter more than speed.
const EQUAL_WITHIN_PERCENT: u64 = 10;

/// The three parts of a disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// This node's own mirrored data.
    Primary,
    /// The mirrors of other nodes' data.
    Secondary,
    /// Data that nobody mirrors.
    Unmirrored,
}

impl Segment {
    /// All three.
    pub const ALL: [Segment; 3] = [Segment::Primary, Segment::Secondary, Segment::Unmirrored];
}

/// Which slots belong to which segment, and which of them are free.
///
/// The division is computed from the superblock, the same at every start. The primary segment has the
/// fastest slots and gives them out fastest first; the secondary has the slowest, slowest first, so that
/// what is in between stays for whoever grows; the unmirrored one lies between.
pub struct Allocator {
    /// Slots by rank: the primary segment's in order of choice, then the secondary's, then the rest.
    order: Vec<SlotIndex>,
    /// The rank of each slot.
    rank: Vec<u32>,
    free: FreeRanks,
    segments: SegmentSlots,
}

impl Allocator {
    /// All slots of a disk, free but for those that `used` names.
    pub fn new(superblock: &Superblock, used: impl IntoIterator<Item = SlotIndex>) -> Self {
        let classes = match superblock.slot_order {
            SlotOrder::Address => [0; ZONE_POINTS],
            SlotOrder::FastestFirst => speed_classes(&superblock.zone_profile),
        };
        Self::with_classes(superblock.segments, &classes, used)
    }

    fn with_classes(
        segments: SegmentSlots,
        classes: &[u32; ZONE_POINTS],
        used: impl IntoIterator<Item = SlotIndex>,
    ) -> Self {
        let slots = segments.total() as u32;
        let class = |slot: &SlotIndex| classes[zone_point(*slot, slots)];
        let mut by_speed: Vec<SlotIndex> = (0..slots).map(SlotIndex).collect();
        by_speed.sort_by_key(class); // Stable: equal ones stay in address order.
        let (primary, rest) = by_speed.split_at(segments.primary as usize);
        let (unmirrored, secondary) = rest.split_at(segments.unmirrored as usize);
        let mut secondary = secondary.to_vec();
        secondary.sort_by_key(|slot| std::cmp::Reverse(class(slot)));
        let order = [primary, &secondary, unmirrored].concat();
        let mut rank = vec![0; order.len()];
        for (i, slot) in order.iter().enumerate() {
            rank[slot.0 as usize] = i as u32;
        }
        let mut allocator = Self { order, rank, free: FreeRanks::all(slots), segments };
        for slot in used {
            allocator.take(slot);
        }
        allocator
    }

    /// Takes the best free slot of a segment: at most five steps, however full the disk is.
    pub fn allocate(&mut self, segment: Segment) -> Option<SlotIndex> {
        let ranks = self.ranks(segment);
        let rank = self.free.first_from(ranks.start).filter(|rank| *rank < ranks.end)?;
        self.free.remove(rank);
        Some(self.order[rank as usize])
    }

    /// Takes this slot, as one found in use when the disk was opened. `false` if it was taken already.
    pub fn take(&mut self, slot: SlotIndex) -> bool {
        let rank = self.rank[slot.0 as usize];
        let free = self.free.contains(rank);
        if free {
            self.free.remove(rank);
        }
        free
    }

    /// Gives a slot back.
    ///
    /// # Panics
    /// If it is free already.
    pub fn free(&mut self, slot: SlotIndex) {
        let rank = self.rank[slot.0 as usize];
        assert!(!self.free.contains(rank), "{slot} is freed twice");
        self.free.insert(rank);
    }

    /// The segment that a slot belongs to.
    pub fn segment_of(&self, slot: SlotIndex) -> Segment {
        let rank = self.rank[slot.0 as usize];
        let segment = Segment::ALL.into_iter().find(|segment| self.ranks(*segment).contains(&rank));
        segment.expect("the segments cover all ranks")
    }

    /// How many slots of a segment are free. Counts them: for reports, not for every request.
    pub fn free_slots(&self, segment: Segment) -> u32 {
        self.ranks(segment).filter(|rank| self.free.contains(*rank)).count() as u32
    }

    /// A segment's slots in the order in which they are chosen.
    pub fn order(&self, segment: Segment) -> &[SlotIndex] {
        let ranks = self.ranks(segment);
        &self.order[ranks.start as usize..ranks.end as usize]
    }

    fn ranks(&self, segment: Segment) -> std::ops::Range<u32> {
        let SegmentSlots { primary, secondary, unmirrored } = self.segments;
        match segment {
            Segment::Primary => 0..primary,
            Segment::Secondary => primary..primary + secondary,
            Segment::Unmirrored => primary + secondary..primary + secondary + unmirrored,
        }
    }
}

/// The point of the zone profile that a slot lies at.
fn zone_point(slot: SlotIndex, slots: u32) -> usize {
    (u64::from(slot.0) * ZONE_POINTS as u64 / u64::from(slots)) as usize
}

/// Groups the points of a profile by speed, 0 being the fastest. A group reaches from its fastest point to
/// less than 10 % of the disk's fastest below it, so that equality within a group is transitive.
fn speed_classes(profile: &ZoneProfile) -> [u32; ZONE_POINTS] {
    let mut points: Vec<usize> = (0..ZONE_POINTS).collect();
    points.sort_by_key(|point| std::cmp::Reverse(profile.0[*point]));
    let fastest = u64::from(profile.0[points[0]]);
    let mut classes = [0; ZONE_POINTS];
    let (mut class, mut head) = (0, fastest);
    for point in points {
        let rate = u64::from(profile.0[point]);
        // With a profile of zeros nothing was measured, and all are equal.
        if (head - rate) * 100 >= fastest * EQUAL_WITHIN_PERCENT && head != rate {
            (class, head) = (class + 1, rate);
        }
        classes[point] = class;
    }
    classes
}

/// A set of ranks: a bit each, and above every 64 words one more level that says which are not empty.
struct FreeRanks {
    /// `levels[0]` has a bit a rank; a bit of `levels[n + 1]` stands for a word of `levels[n]`.
    levels: Vec<Vec<u64>>,
}

impl FreeRanks {
    fn all(count: u32) -> Self {
        let mut levels = Vec::new();
        let mut bits = count as usize;
        loop {
            let words = bits.div_ceil(64).max(1);
            let mut level = vec![u64::MAX; words];
            let used = bits - (words - 1) * 64;
            level[words - 1] = if used == 0 { 0 } else { u64::MAX >> (64 - used) };
            levels.push(level);
            if words == 1 {
                return Self { levels };
            }
            bits = words;
        }
    }

    fn contains(&self, rank: u32) -> bool {
        self.levels[0][rank as usize / 64] & (1 << (rank % 64)) != 0
    }

    fn insert(&mut self, rank: u32) {
        let mut at = rank as usize;
        for level in &mut self.levels {
            level[at / 64] |= 1 << (at % 64);
            at /= 64;
        }
    }

    fn remove(&mut self, rank: u32) {
        let mut at = rank as usize;
        for level in &mut self.levels {
            level[at / 64] &= !(1 << (at % 64));
            if level[at / 64] != 0 {
                return;
            }
            at /= 64;
        }
    }

    /// The smallest member from `rank` on: up the levels until there is one, then down again.
    fn first_from(&self, rank: u32) -> Option<u32> {
        let mut at = rank as usize;
        for (height, level) in self.levels.iter().enumerate() {
            let word = level.get(at / 64).copied().unwrap_or(0) & (u64::MAX << (at % 64));
            if word != 0 {
                let mut found = at / 64 * 64 + word.trailing_zeros() as usize;
                for level in self.levels[..height].iter().rev() {
                    found = found * 64 + level[found].trailing_zeros() as usize;
                }
                return Some(found as u32);
            }
            at = at / 64 + 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn profile(rate: impl Fn(usize) -> u32) -> ZoneProfile {
        ZoneProfile(std::array::from_fn(rate))
    }

    fn allocator(slots: u32, classes: &[u32; ZONE_POINTS]) -> Allocator {
        let segments =
            SegmentSlots { primary: slots * 45 / 100, secondary: slots * 45 / 100, unmirrored: slots / 10 };
        Allocator::with_classes(segments, classes, [])
    }

    #[test]
    fn a_uniform_disk_is_divided_by_address() {
        for rates in [profile(|_| 0), profile(|point| 500 + (point as u32 % 5) * 10)] {
            let allocator = allocator(1000, &speed_classes(&rates));
            let numbers = |segment| allocator.order(segment).iter().map(|slot| slot.0).collect::<Vec<_>>();
            assert_eq!(numbers(Segment::Primary), (0..450).collect::<Vec<_>>());
            assert_eq!(numbers(Segment::Unmirrored), (450..550).collect::<Vec<_>>());
            assert_eq!(numbers(Segment::Secondary), (550..1000).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_primary_gets_the_fastest_and_the_secondary_the_slowest() {
        // A rotating disk that was laid out backwards: the end is fastest.
        let rates = profile(|point| 100 + 2 * point as u32);
        let classes = speed_classes(&rates);
        let mut allocator = allocator(6400, &classes);
        let class = |slot: SlotIndex| classes[zone_point(slot, 6400)];
        let slowest_primary =
            allocator.order(Segment::Primary).iter().map(|slot| class(*slot)).max().unwrap();
        let fastest_secondary =
            allocator.order(Segment::Secondary).iter().map(|slot| class(*slot)).min().unwrap();
        assert!(slowest_primary <= fastest_secondary);
        let primary = allocator.allocate(Segment::Primary).unwrap();
        let secondary = allocator.allocate(Segment::Secondary).unwrap();
        assert_eq!(class(primary), 0);
        assert_eq!(Some(class(secondary)), classes.iter().max().copied());
    }

    #[test]
    fn rates_within_ten_percent_are_equal() {
        let classes = speed_classes(&profile(|point| [200, 181, 180, 161][point % 4]));
        assert_eq!(&classes[..4], &[0, 0, 1, 1]);
    }

    #[test]
    fn every_slot_of_a_segment_is_given_once() {
        let mut allocator = allocator(1000, &[0; ZONE_POINTS]);
        let mut seen = BTreeSet::new();
        for segment in Segment::ALL {
            while let Some(slot) = allocator.allocate(segment) {
                assert_eq!(allocator.segment_of(slot), segment);
                assert!(seen.insert(slot));
            }
            assert_eq!(allocator.free_slots(segment), 0);
        }
        assert_eq!(seen.len(), 1000);
        allocator.free(SlotIndex(7));
        assert_eq!(allocator.allocate(Segment::Primary), Some(SlotIndex(7)));
        assert!(!allocator.take(SlotIndex(7)));
    }

    proptest! {
        #[test]
        fn free_ranks_behave_as_a_set(count in 1u32..6_000, operations in prop::collection::vec((any::<bool>(), any::<u32>()), 1..40)) {
            let mut ranks = FreeRanks::all(count);
            let mut model: BTreeSet<u32> = (0..count).collect();
            for (insert, at) in operations {
                let at = at % count;
                if insert {
                    ranks.insert(at);
                    model.insert(at);
                } else {
                    // Whole runs, so that words and upper levels become empty.
                    for rank in at..count.min(at + 2000) {
                        ranks.remove(rank);
                        model.remove(&rank);
                    }
                }
                for from in [0, at, at.saturating_sub(64), count - 1] {
                    prop_assert_eq!(ranks.first_from(from), model.range(from..).next().copied());
                }
            }
        }
    }
}
