//! Slices of one device, as runs.

use std::collections::BTreeMap;

/// Slices of one device: runs that do not touch, by first slice, with their ends.
#[derive(Clone, Default, Debug)]
pub struct Runs(BTreeMap<u32, u32>);

impl Runs {
    /// Whether any slice of `first..end` is among them.
    pub fn overlaps(&self, first: u32, end: u32) -> bool {
        self.0.range(..end).next_back().is_some_and(|(_, other)| *other > first)
    }

    /// Adds the slices `first..end`.
    pub fn add(&mut self, mut first: u32, mut end: u32) {
        while let Some((start, other)) =
            self.0.range(..=end).next_back().filter(|(_, other)| **other >= first)
        {
            (first, end) = (first.min(*start), end.max(*other));
            let start = *start;
            self.0.remove(&start);
        }
        self.0.insert(first, end);
    }

    /// What of `first..end` is not among them, as pairs of first slice and end.
    pub fn missing(&self, first: u32, end: u32) -> Vec<(u32, u32)> {
        let before = self.0.range(..first).next_back();
        let (mut next, mut missing) = (first, Vec::new());
        for (start, other) in before.into_iter().chain(self.0.range(first..end)) {
            if *start > next {
                missing.push((next, *start));
            }
            next = next.max(*other);
        }
        if next < end {
            missing.push((next, end));
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn they_hold_what_was_added(
            added in prop::collection::vec((0u32..40, 1u32..8), 0..12), first in 0u32..40, count in 1u32..20
        ) {
            let (mut runs, mut slices) = (Runs::default(), BTreeSet::new());
            for (first, count) in added {
                runs.add(first, first + count);
                slices.extend(first..first + count);
            }
            let asked = first..first + count;
            prop_assert_eq!(runs.overlaps(first, first + count), asked.clone().any(|it| slices.contains(&it)));
            let missing: Vec<u32> =
                runs.missing(first, first + count).into_iter().flat_map(|(first, end)| first..end).collect();
            prop_assert_eq!(missing, asked.filter(|it| !slices.contains(it)).collect::<Vec<_>>());
        }
    }
}
