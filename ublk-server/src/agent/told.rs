//! What was logged lately: the same trouble, met ten times a second, is said once in a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Different lines remembered, at most: whoever causes more is told of again.
const LINES_MAX: usize = 32;
/// After this long a line is worth saying again.
const AGAIN: Duration = Duration::from_secs(600);

/// The lines that were logged lately.
#[derive(Default, Debug)]
pub(super) struct Told(VecDeque<(String, Instant)>);

impl Told {
    /// Whether this has not been said lately; from now on it has.
    pub fn is_news(&mut self, now: Instant, line: &str) -> bool {
        self.0.retain(|(_, said)| now.saturating_duration_since(*said) < AGAIN);
        if self.0.iter().any(|(other, _)| other == line) {
            return false;
        }
        if self.0.len() >= LINES_MAX {
            self.0.pop_front();
        }
        self.0.push_back((line.to_owned(), now));
        true
    }

    /// All is well: whatever comes next is news.
    pub fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_take_turns_are_said_once_each() {
        let (mut told, now) = (Told::default(), Instant::now());
        let said = |told: &mut Told, now| {
            (0..100).filter(|turn| told.is_news(now, ["refused", "no answer", "reset"][turn % 3])).count()
        };
        assert_eq!(said(&mut told, now), 3);
        assert_eq!(said(&mut told, now + AGAIN - Duration::from_secs(1)), 0);
        assert_eq!(said(&mut told, now + AGAIN), 3);
        told.forget();
        assert_eq!(said(&mut told, now + AGAIN), 3);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut told, now) = (Told::default(), Instant::now());
        for line in 0..10 * LINES_MAX {
            assert!(told.is_news(now, &line.to_string()));
            assert!(told.0.len() <= LINES_MAX);
        }
        assert!(!told.is_news(now, &(10 * LINES_MAX - 1).to_string()));
        assert!(told.is_news(now, "0"), "it was long ago");
    }
}
