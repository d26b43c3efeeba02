//! How fast copies are made equal, beside what hosts ask for.
//!
//! While hosts are idle regions are copied as fast as there are buffers to copy through. While they are not, one region
//! at a time, and after each a rest of three times as long as it took: a disk or a link that hosts keep busy takes longer
//! for a region, and is then left alone for longer. Two bounds hold whatever hosts do ([`Pace`]): copies that never become
//! equal protect nobody, and a link that others share may have to be spared.
//!
//! What a host waits for is copied at once, and counted.

use super::Nanos;
use crate::config::Pace;

/// Hosts count as busy for so long after a request.
const BUSY: Nanos = 20_000_000;
/// While hosts are busy, a rest is so many times as long as what it follows.
const REST: Nanos = 3;
/// No rest is longer, however long a region took.
const REST_MAX: Nanos = 2_000_000_000;
/// So much of either bound may be made up for when something began late.
const LATE_MAX: Nanos = 100_000_000;

/// Says when the next region may be copied.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    pace: Pace,
    busy_until: Nanos,
    /// Regions being copied.
    under_way: u32,
    rest_until: Nanos,
    /// By the upper bound nothing may begin before.
    most_due: Nanos,
    /// By the lower bound something has to begin from then on.
    least_due: Nanos,
    /// When somebody who was told to wait is to be told again.
    wake: Option<Nanos>,
}

/// How long so many bytes take at so many bytes a second.
fn time_of(bytes: u32, rate: u64) -> Nanos {
    (u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1))).min(u128::from(u64::MAX)) as Nanos
}

impl Pacer {
    pub fn set(&mut self, pace: Pace) {
        // What was waited for under other bounds means nothing under these.
        (self.most_due, self.least_due) = (0, 0);
        self.pace = pace;
    }

    /// A request of a host came.
    pub fn hosts_ask(&mut self, now: Nanos) {
        self.busy_until = now + BUSY;
    }

    pub fn hosts_are_busy(&self, now: Nanos) -> bool {
        now < self.busy_until
    }

    /// Whether a region may be copied now that nobody waits for; the error is when to ask again.
    pub fn may_begin(&self, now: Nanos) -> Result<(), Nanos> {
        if self.most_due > now {
            return Err(self.most_due);
        }
        if !self.hosts_are_busy(now) || (self.pace.floor > 0 && self.least_due <= now) {
            return Ok(());
        }
        let floor = if self.pace.floor > 0 { self.least_due } else { Nanos::MAX };
        if self.under_way > 0 {
            // Its end is asked about by itself.
            return Err(floor.min(self.busy_until));
        }
        if self.rest_until > now {
            return Err(floor.min(self.busy_until).min(self.rest_until));
        }
        Ok(())
    }

    /// A region of so many bytes is being copied from now on.
    pub fn began(&mut self, now: Nanos, bytes: u32) {
        self.under_way += 1;
        let late = now.saturating_sub(LATE_MAX);
        if let Some(rate) = self.pace.rate {
            self.most_due = self.most_due.max(late).saturating_add(time_of(bytes, rate));
        }
        // What was copied faster, while hosts were idle, buys them no rest from it later.
        self.least_due = self.least_due.clamp(late, now).saturating_add(time_of(bytes, self.pace.floor));
    }

    /// The copy of a region came to its end; it took so long once it had its range.
    pub fn ended(&mut self, now: Nanos, took: Nanos) {
        self.under_way = self.under_way.saturating_sub(1);
        self.rest_until = self.rest_until.max(now + took.saturating_mul(REST).min(REST_MAX));
    }

    /// Somebody waits until that time to ask again.
    pub fn wait(&mut self, until: Nanos) {
        self.wake = Some(self.wake.map_or(until, |wake| wake.min(until)));
    }

    /// When [`Self::take_wake`] says yes.
    pub fn next_wake(&self) -> Option<Nanos> {
        self.wake
    }

    /// Whether somebody waits who may ask again now.
    pub fn take_wake(&mut self, now: Nanos) -> bool {
        self.wake.take_if(|wake| *wake <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;
    const MS: Nanos = 1_000_000;

    /// Regions of a MiB copied in so many seconds, each of which takes `took`, by somebody who asks whenever he is told to.
    fn copied(pace: Pace, busy: bool, took: Nanos, seconds: u64) -> u64 {
        let mut pacer = Pacer::default();
        pacer.set(pace);
        let (mut now, mut count) = (1_000 * MS, 0);
        let end = now + seconds * 1_000 * MS;
        let mut ends: Vec<Nanos> = Vec::new();
        while now < end {
            if busy {
                pacer.hosts_ask(now);
            }
            let done: Vec<Nanos> = ends.extract_if(.., |at| *at <= now).collect();
            done.iter().for_each(|_| pacer.ended(now, took));
            // As many buffers as a node has.
            let again = match pacer.may_begin(now) {
                Ok(()) if ends.len() < 8 => {
                    pacer.began(now, MIB);
                    ends.push(now + took);
                    count += 1;
                    continue;
                }
                Ok(()) => Nanos::MAX,
                Err(again) => again,
            };
            assert!(again > now, "asked to ask again at once");
            now = ends.iter().copied().chain([again, now + 10 * MS]).min().unwrap_or(now);
        }
        count
    }

    #[test]
    fn idle_hosts_leave_all_buffers_and_busy_ones_a_quarter_of_one() {
        let pace = Pace { rate: None, floor: 0 };
        // Eight at a time, 10 ms each.
        assert_eq!(copied(pace, false, 10 * MS, 10), 8_000);
        assert_eq!(copied(pace, true, 10 * MS, 10), 250);
    }

    #[test]
    fn hosts_never_press_it_below_the_floor() {
        let pace = Pace { rate: None, floor: 100 << 20 };
        let count = copied(pace, true, 50 * MS, 10);
        assert!((1_000..=1_020).contains(&count), "{count}");
        // Not even where one after the other would be too slow.
        let slow = copied(Pace { rate: None, floor: 10 << 20 }, true, 500 * MS, 10);
        assert!((95..=105).contains(&slow), "{slow}");
    }

    #[test]
    fn what_was_copied_while_hosts_were_idle_is_not_held_against_the_floor() {
        let mut pacer = Pacer::default();
        pacer.set(Pace { rate: None, floor: 10 << 20 });
        let now = 1_000 * MS;
        for _ in 0..10_000 {
            assert_eq!(pacer.may_begin(now), Ok(()));
            pacer.began(now, MIB);
            pacer.ended(now, 1_000 * MS);
        }
        pacer.hosts_ask(now);
        let again = pacer.may_begin(now).expect_err("a rest");
        assert!(again <= now + 100 * MS, "{again}");
        pacer.hosts_ask(now + 100 * MS);
        assert_eq!(pacer.may_begin(now + 100 * MS), Ok(()));
    }

    #[test]
    fn it_is_never_faster_than_the_rate() {
        let pace = Pace { rate: Some(20 << 20), floor: 10 << 20 };
        for busy in [false, true] {
            let count = copied(pace, busy, MS, 10);
            assert!((198..=205).contains(&count), "{count}, busy: {busy}");
        }
    }

    #[test]
    fn one_that_is_told_to_wait_is_woken_once() {
        let mut pacer = Pacer::default();
        pacer.wait(50);
        pacer.wait(40);
        assert_eq!(pacer.next_wake(), Some(40));
        assert!(!pacer.take_wake(39));
        assert!(pacer.take_wake(40));
        assert!(!pacer.take_wake(60));
    }
}
