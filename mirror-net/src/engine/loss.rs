//! What an exporter remembers of acknowledged writes that no flush has covered (docs/protocol.md rule 16).
//!
//! When the map says that unflushed data of a slice may be gone, whoever wrote it must hear of it
//! from a FLUSH, once, as from a disk that lost its cache.

use crate::ids::LossGeneration;
use std::collections::BTreeMap;

/// The unflushed writes of one exported device.
#[derive(Default, Debug)]
pub(super) struct Unflushed {
    slices: BTreeMap<u32, Entry>,
    /// Counts acknowledgements and losses.
    clock: u64,
    /// Since when a flush that begins later has to fail, so that whoever wrote hears of a loss.
    owed: Option<u64>,
    inherited: Option<Inherited>,
}

/// What the process before this one acknowledged on a device that outlived it: nobody knows what of it was flushed.
#[derive(Debug)]
struct Inherited {
    /// The sum of all slices' generations as it was last told of, or found when the device was made.
    told: u64,
    /// When it was taken over.
    at: u64,
}

#[derive(Debug)]
struct Entry {
    /// The lowest generation of any.
    loss: LossGeneration,
    /// When the last one was acknowledged.
    last: u64,
}

impl Unflushed {
    /// A write was acknowledged under that generation.
    pub fn note(&mut self, slice: u32, loss: LossGeneration) {
        self.clock += 1;
        let last = self.clock;
        let entry = self.slices.entry(slice).or_insert(Entry { loss, last });
        entry.loss = entry.loss.min(loss);
        entry.last = last;
    }

    /// The device outlived its process, which knew of losses up to that sum of generations.
    pub fn inherit(&mut self, told: u64) {
        self.clock += 1;
        self.inherited = Some(Inherited { told, at: self.clock });
    }

    /// A flush that begins now covers everything up to here.
    pub fn now(&self) -> u64 {
        self.clock
    }

    /// Something acknowledged before this moment is lost.
    pub fn owe(&mut self) {
        self.clock += 1;
        self.owed = Some(self.clock);
    }

    /// Whether a flush that begins now has to fail.
    pub fn is_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// A flush that began at `since` failed and said so. It says nothing of what was acknowledged after
    /// it began.
    pub fn told(&mut self, since: u64) {
        self.owed = self.owed.filter(|owed| *owed > since);
    }

    /// A flush that began at `since` succeeded.
    pub fn flushed(&mut self, since: u64) {
        self.slices.retain(|_, entry| entry.last > since);
        self.inherited.take_if(|inherited| inherited.at <= since);
    }

    /// Whether a slice's generation passed that of its unflushed writes, or `sum`, that of all slices, what the process
    /// before knew; they are forgotten.
    pub fn forget_lost(&mut self, loss_of: impl Fn(u32) -> LossGeneration, sum: u64) -> bool {
        let before = self.slices.len();
        self.slices.retain(|slice, entry| entry.loss >= loss_of(*slice));
        let inherited = self.inherited.take_if(|inherited| inherited.told < sum).is_some();
        self.slices.len() < before || inherited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_told_by_a_flush_that_began_after_it() {
        let mut unflushed = Unflushed::default();
        let before = unflushed.now();
        unflushed.owe();
        unflushed.told(before);
        assert!(unflushed.is_owed());
        unflushed.told(unflushed.now());
        assert!(!unflushed.is_owed());
    }

    #[test]
    fn a_write_is_lost_only_if_no_flush_covered_it() {
        let mut unflushed = Unflushed::default();
        unflushed.note(1, LossGeneration(0));
        let since = unflushed.now();
        unflushed.note(2, LossGeneration(0));
        unflushed.flushed(since);
        let loss_of = |lost: u32| move |slice: u32| LossGeneration(u32::from(slice == lost));
        assert!(!unflushed.forget_lost(loss_of(1), 1));
        assert!(unflushed.forget_lost(loss_of(2), 1));
        assert!(!unflushed.forget_lost(loss_of(2), 1), "once");
    }

    #[test]
    fn a_write_during_the_flush_is_not_covered_by_it() {
        let mut unflushed = Unflushed::default();
        unflushed.note(1, LossGeneration(0));
        let since = unflushed.now();
        unflushed.note(1, LossGeneration(0));
        unflushed.flushed(since);
        assert!(unflushed.forget_lost(|_| LossGeneration(1), 1));
    }

    #[test]
    fn what_an_earlier_process_acknowledged_is_lost_with_any_slice_until_a_flush() {
        let lost = |unflushed: &mut Unflushed, sum| unflushed.forget_lost(|_| LossGeneration(0), sum);
        let mut unflushed = Unflushed::default();
        unflushed.inherit(3);
        assert!(!lost(&mut unflushed, 3));
        assert!(lost(&mut unflushed, 4));
        assert!(!lost(&mut unflushed, 5), "once");
        let before = unflushed.now();
        unflushed.inherit(5);
        unflushed.flushed(before);
        assert!(lost(&mut unflushed, 6), "the flush began before");
        unflushed.inherit(6);
        unflushed.flushed(unflushed.now());
        assert!(!lost(&mut unflushed, 7));
    }
}
