//! Something that failed and is tried again, less and less often.

use std::time::{Duration, Instant};

/// Before the second attempt; doubled for each after it.
const FIRST: Duration = Duration::from_secs(1);
/// Between two attempts, at most.
const LONGEST: Duration = Duration::from_secs(60);

/// What failed, how often in a row, and when to try again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Retry {
    reason: String,
    failures: u32,
    after: Instant,
}

impl Retry {
    /// It failed; `before` is the failure before, if the attempt was a repetition.
    pub fn new(before: Option<Self>, now: Instant, reason: String) -> Self {
        let failures = before.map_or(1, |before| before.failures.saturating_add(1));
        let wait = FIRST.saturating_mul(1 << (failures - 1).min(10)).min(LONGEST);
        Self { reason, failures, after: now + wait }
    }

    /// Whether it is time for another attempt.
    pub fn is_due(&self, now: Instant) -> bool {
        self.after <= now
    }

    /// For people.
    pub fn describe(&self, now: Instant) -> String {
        let wait = self.after.saturating_duration_since(now).as_secs_f32().ceil();
        match self.failures {
            1 => format!("{}; trying again in {wait} s", self.reason),
            failures => format!("{}; tried {failures} times, again in {wait} s", self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_but_never_end() {
        let now = Instant::now();
        let (mut retry, mut waits) = (None, Vec::new());
        for _ in 0..40 {
            let next = Retry::new(retry.take(), now, "no memory".into());
            waits.push((next.after - now).as_secs());
            retry = Some(next);
        }
        assert_eq!(waits[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(waits[39], 60);
        let retry = retry.unwrap();
        assert!(!retry.is_due(now) && retry.is_due(now + LONGEST));
        assert_eq!(retry.describe(now), "no memory; tried 40 times, again in 60 s");
        assert_eq!(Retry::new(None, now, "busy".into()).describe(now), "busy; trying again in 1 s");
    }
}
