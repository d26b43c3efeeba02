//! Overlapping requests of one slice, serialised in the order of their arrival.
//!
//! Writes hold their range exclusively until every leg is done, reads share theirs. Nobody
//! overtakes somebody it conflicts with, so nobody starves.

use std::ops::Range;

/// The lock of one slice. `K` names a holder or waiter and is unique among them.
#[derive(Debug)]
pub struct RangeLock<K> {
    /// In the order of arrival; small, since it is bounded by the requests in flight on one slice.
    entries: Vec<Entry<K>>,
    waiting: usize,
}

#[derive(Debug)]
struct Entry<K> {
    key: K,
    range: Range<u32>,
    shared: bool,
    held: bool,
}

impl<K> Default for RangeLock<K> {
    fn default() -> Self {
        Self { entries: Vec::new(), waiting: 0 }
    }
}

impl<K> Entry<K> {
    fn conflicts(&self, other: &Self) -> bool {
        !(self.shared && other.shared)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

impl<K: Copy + PartialEq> RangeLock<K> {
    /// Asks for a range; true if it is held at once.
    pub fn acquire(&mut self, key: K, range: Range<u32>, shared: bool) -> bool {
        let entry = Entry { key, range, shared, held: false };
        let held = !self.entries.iter().any(|other| other.conflicts(&entry));
        self.waiting += usize::from(!held);
        self.entries.push(Entry { held, ..entry });
        held
    }

    /// Takes a range if nobody holds or waits for any of it; true if it is held.
    pub fn try_acquire(&mut self, key: K, range: Range<u32>, shared: bool) -> bool {
        let entry = Entry { key, range, shared, held: true };
        let free = !self.entries.iter().any(|other| other.conflicts(&entry));
        if free {
            self.entries.push(entry);
        }
        free
    }

    /// A holder needs more than it asked for. True if it holds that at once; otherwise it holds
    /// nothing any more and waits for the wider range at its old place in the order.
    pub fn widen(&mut self, key: K, range: Range<u32>) -> bool {
        let Some(index) = self.position(key) else { return false };
        debug_assert!(self.entries[index].held);
        self.entries[index].range = range;
        if !self.may_hold(index) {
            self.entries[index].held = false;
            self.waiting += 1;
            return false;
        }
        true
    }

    /// Gives up a range that is held or waited for.
    pub fn release(&mut self, key: K) {
        if let Some(index) = self.position(key) {
            let entry = self.entries.remove(index);
            self.waiting -= usize::from(!entry.held);
        }
    }

    /// The next waiter that may hold its range now; it holds it from here on. Ask until `None`
    /// after every release.
    pub fn pop_ready(&mut self) -> Option<K> {
        if self.waiting == 0 {
            return None;
        }
        let index =
            (0..self.entries.len()).find(|index| !self.entries[*index].held && self.may_hold(*index))?;
        self.entries[index].held = true;
        self.waiting -= 1;
        Some(self.entries[index].key)
    }

    /// Whether nobody holds or waits.
    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    /// Free of conflicts with every holder, and with every earlier waiter.
    fn may_hold(&self, index: usize) -> bool {
        let entry = &self.entries[index];
        self.entries.iter().enumerate().all(|(other, candidate)| {
            other == index || !(candidate.held || other < index) || !candidate.conflicts(entry)
        })
    }

    fn position(&self, key: K) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overlapping_writes_wait_in_order_and_reads_share() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, 0..8, false));
        assert!(!lock.acquire(2, 4..12, true));
        assert!(!lock.acquire(3, 4..12, true));
        assert!(lock.acquire(4, 16..20, false));
        assert!(!lock.acquire(5, 10..17, false));
        lock.release(1);
        assert_eq!((lock.pop_ready(), lock.pop_ready(), lock.pop_ready()), (Some(2), Some(3), None));
        lock.release(2);
        lock.release(3);
        assert_eq!(lock.pop_ready(), None, "5 still conflicts with 4");
        lock.release(4);
        assert_eq!(lock.pop_ready(), Some(5));
        lock.release(5);
        assert!(lock.is_idle());
    }

    #[test]
    fn whoever_only_tries_does_not_wait() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, 0..8, false));
        assert!(!lock.try_acquire(2, 4..12, false));
        assert!(lock.try_acquire(3, 8..12, false));
        lock.release(1);
        assert_eq!(lock.pop_ready(), None);
        assert!(lock.try_acquire(2, 4..8, false));
    }

    #[test]
    fn a_reader_does_not_overtake_a_waiting_writer() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, 0..8, true));
        assert!(!lock.acquire(2, 0..8, false));
        assert!(!lock.acquire(3, 0..8, true));
    }

    #[test]
    fn two_that_widen_into_each_other_do_not_deadlock() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, 0..4, false));
        assert!(lock.acquire(2, 4..8, false));
        assert!(!lock.widen(1, 0..8));
        assert!(!lock.widen(2, 0..8));
        assert_eq!(lock.pop_ready(), Some(1));
        assert_eq!(lock.pop_ready(), None);
        lock.release(1);
        assert_eq!(lock.pop_ready(), Some(2));
    }

    proptest! {
        /// No two conflicting holders ever, and everybody gets its turn.
        #[test]
        fn holders_never_conflict_and_all_get_through(
            steps in prop::collection::vec((0u32..16, 1u32..6, any::<bool>(), 0u8..4, any::<prop::sample::Index>()), 1..80)
        ) {
            let mut lock = RangeLock::default();
            let mut held: Vec<(usize, Range<u32>, bool)> = Vec::new();
            let mut waiting: Vec<(usize, Range<u32>, bool)> = Vec::new();
            for (key, (start, length, shared, action, pick)) in steps.into_iter().enumerate() {
                match action {
                    0 if !held.is_empty() => {
                        let (key, ..) = held.swap_remove(pick.index(held.len()));
                        lock.release(key);
                    }
                    1 if !held.is_empty() => {
                        let index = pick.index(held.len());
                        let wide = 0..held[index].1.end;
                        held[index].1 = wide.clone();
                        if !lock.widen(held[index].0, wide) {
                            let entry = held.swap_remove(index);
                            waiting.push(entry);
                        }
                    }
                    _ => {
                        let entry = (key, start..start + length, shared);
                        if lock.acquire(key, entry.1.clone(), shared) { held.push(entry) } else { waiting.push(entry) }
                    }
                }
                while let Some(key) = lock.pop_ready() {
                    let index = waiting.iter().position(|entry| entry.0 == key).unwrap();
                    held.push(waiting.swap_remove(index));
                }
                for (index, a) in held.iter().enumerate() {
                    for b in &held[..index] {
                        prop_assert!((a.2 && b.2) || a.1.end <= b.1.start || b.1.end <= a.1.start);
                    }
                }
            }
            while let Some((key, ..)) = held.pop() {
                lock.release(key);
                while let Some(key) = lock.pop_ready() {
                    let index = waiting.iter().position(|entry| entry.0 == key).unwrap();
                    held.push(waiting.swap_remove(index));
                }
            }
            prop_assert!(waiting.is_empty() && lock.is_idle());
        }
    }
}
