//! Whether to look for what comes next, or to sleep until it is there.
//!
//! Falling asleep and waking up cost more than a request itself does, where one is under way at a time. So
//! the I/O thread looks for a short while before it sleeps, if what it waited for lately came as soon, if too
//! little is under way for the next wake-up to bring much at once, and if nobody else needs the cores. It never
//! looks for a disk: that ends with an interrupt whether somebody looks or not, and in a virtual machine whoever
//! does the disk's work may need the very core. An idle daemon sleeps.

use crate::ring::{Looked, Ring};
use std::io;
use std::time::{Duration, Instant};

/// How long it looks at most, and what counts as a short wait.
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

    /// Submits, and waits until something completed or the time is over. `depth` is how much is under way;
    /// `on_disk`: a disk is at work.
    pub fn wait(
        &mut self,
        ring: &mut Ring,
        depth: usize,
        on_disk: bool,
        timeout: Duration,
    ) -> io::Result<()> {
        if on_disk || depth > DEPTH_MAX {
            return ring.wait(timeout);
        }
        let began = Instant::now();
        if self.looks(began) {
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

    fn looks(&mut self, now: Instant) -> bool {
        if self.rest_until.is_some_and(|until| until <= now) {
            self.rest_until = None;
        }
        self.short_waits >= SHORT_WAITS && self.rest_until.is_none()
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

    fn busy() -> Patience {
        let mut patience = Patience::new();
        (0..SHORT_WAITS).for_each(|_| patience.waited(LOOK / 2));
        patience
    }

    #[test]
    fn it_looks_only_while_waits_are_short() {
        let now = Instant::now();
        assert!(!Patience::new().looks(now));
        let mut patience = busy();
        assert!(patience.looks(now));
        patience.waited(2 * LOOK);
        assert!(!patience.looks(now));
    }

    #[test]
    fn it_rests_longer_each_time_the_cores_are_busy_until_they_are_not() {
        let mut patience = busy();
        let now = Instant::now();
        patience.crowded(now);
        assert!(!patience.looks(now + REST[0] / 2));
        assert!(patience.looks(now + REST[0]));
        patience.crowded(now);
        assert!(!patience.looks(now + REST[0]));
        assert!(patience.looks(now + 2 * REST[0]));
        (0..CALM).for_each(|_| patience.found());
        patience.crowded(now);
        assert!(patience.looks(now + REST[0]));
    }
}
