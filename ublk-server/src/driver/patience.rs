//! Whether to look for what comes next, or to sleep until it is there.
//!
//! Falling asleep and waking up cost more than a request itself does, where one is under way at a time. So
//! the I/O thread looks for a short while before it sleeps, if what it waited for lately came as soon, if too
//! little is under way for the next wake-up to bring much at once, and if nobody else needs the cores. An idle
//! daemon sleeps.

use crate::ring::{Looked, Ring};
use std::io;
use std::time::{Duration, Instant};

/// How long it looks at most.
const LOOK: Duration = Duration::from_micros(50);
/// With more than so much under way it sleeps: the next wake-up will bring several things together.
const DEPTH_MAX: usize = 2;
/// So many more short waits than long ones make it likely that the next will be short.
const SHORT_WAITS: u32 = 8;
/// A long wait outweighs so many short ones.
const LONG_WAIT: u32 = 4;
/// How long it only sleeps after it found the cores busy, at first and at most.
const REST: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(640)];
/// So many successes in a row show that the cores are not busy any more.
const CALM: u32 = 1_000;

/// What is known of the waits before.
pub(super) struct Patience {
    /// Short waits, less the long ones.
    short_waits: u32,
    /// It only sleeps until then.
    rest_until: Option<Instant>,
    rest: Duration,
    /// Successes since the cores were last busy.
    found: u32,
}

impl Patience {
    pub fn new() -> Self {
        Self { short_waits: 0, rest_until: None, rest: REST[0], found: 0 }
    }

    /// Submits, and waits until something completed or the time is over; `depth` is how much is under way.
    pub fn wait(&mut self, ring: &mut Ring, depth: usize, timeout: Duration) -> io::Result<()> {
        let began = Instant::now();
        if self.looks(began, depth) {
            match ring.look(LOOK.min(timeout))? {
                Looked::Found => self.found(),
                Looked::Nothing => {}
                Looked::Crowded => self.crowded(Instant::now()),
            }
        }
        ring.wait(timeout)?;
        self.waited(began.elapsed());
        Ok(())
    }

    fn looks(&mut self, now: Instant, depth: usize) -> bool {
        if self.rest_until.is_some_and(|until| until <= now) {
            self.rest_until = None;
        }
        depth <= DEPTH_MAX && self.short_waits >= SHORT_WAITS && self.rest_until.is_none()
    }

    fn found(&mut self) {
        self.found += 1;
        if self.found >= CALM {
            (self.found, self.rest) = (0, REST[0]);
        }
    }

    fn crowded(&mut self, now: Instant) {
        self.found = 0;
        self.rest_until = Some(now + self.rest);
        self.rest = (self.rest * 2).min(REST[1]);
    }

    fn waited(&mut self, time: Duration) {
        self.short_waits = match time <= LOOK {
            true => (self.short_waits + 1).min(2 * SHORT_WAITS),
            false => self.short_waits.saturating_sub(LONG_WAIT),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(10);
    const LONG: Duration = Duration::from_millis(1);

    fn busy() -> Patience {
        let mut patience = Patience::new();
        (0..SHORT_WAITS).for_each(|_| patience.waited(SHORT));
        patience
    }

    #[test]
    fn it_looks_only_while_waits_are_short_and_little_is_under_way() {
        let now = Instant::now();
        assert!(!Patience::new().looks(now, 0));
        assert!(busy().looks(now, DEPTH_MAX));
        assert!(!busy().looks(now, DEPTH_MAX + 1));
        let mut idle = busy();
        idle.waited(LONG);
        assert!(!idle.looks(now, 0));
    }

    #[test]
    fn it_rests_longer_each_time_the_cores_are_busy_until_they_are_not() {
        let mut patience = busy();
        let now = Instant::now();
        patience.crowded(now);
        assert!(!patience.looks(now + REST[0] / 2, 0));
        assert!(patience.looks(now + REST[0], 0));
        patience.crowded(now);
        assert!(!patience.looks(now + REST[0], 0));
        assert!(patience.looks(now + 2 * REST[0], 0));
        (0..CALM).for_each(|_| patience.found());
        patience.crowded(now);
        assert!(patience.looks(now + REST[0], 0));
    }
}
