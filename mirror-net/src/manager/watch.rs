//! The time during which a manager was there to listen.
//!
//! A process that was stopped, paged out or whose machine was suspended finds, once it goes on, that it has not
//! heard of anybody for long: so it says of everybody, and none of it is a sign of a failure. What nodes have said
//! meanwhile waits unread, and a timer may well be looked at before it. So the manager's clock goes on only while it
//! is looked at.

/// A clock that stands still while nobody looks at it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct WatchClock {
    looked_ms: u64,
    watched_ms: u64,
}

impl WatchClock {
    /// What passes between two looks counts for so many milliseconds at most: the time between two looks of a manager
    /// that runs, so that even the shortest `fail_after` is not over after one long gap.
    pub const GAP_MS_MAX: u64 = 250;

    /// The time now, in milliseconds; `real_ms` is that of a monotonic clock which began with this one.
    pub fn look(&mut self, real_ms: u64) -> u64 {
        let passed = real_ms.saturating_sub(self.looked_ms);
        self.looked_ms = self.looked_ms.max(real_ms);
        self.watched_ms += passed.min(Self::GAP_MS_MAX);
        self.watched_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;
    use crate::control::REPORT_MS;

    #[test]
    fn it_goes_as_time_does_while_somebody_looks_and_stands_still_while_nobody_does() {
        let mut clock = WatchClock::default();
        for real in (0..=10_000).step_by(250) {
            assert_eq!(clock.look(real), real);
        }
        assert_eq!(clock.look(70_000), 10_000 + WatchClock::GAP_MS_MAX);
        assert_eq!(clock.look(70_250), 10_250 + WatchClock::GAP_MS_MAX);
        assert_eq!(clock.look(70_000), 10_250 + WatchClock::GAP_MS_MAX, "a clock that went back");
    }

    #[test]
    fn no_node_has_failed_by_a_gap_alone() {
        assert!(REPORT_MS + WatchClock::GAP_MS_MAX < Policy::FAIL_AFTER_MIN.as_millis() as u64);
    }
}
