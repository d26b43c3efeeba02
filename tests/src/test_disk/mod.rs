//! The simulator's disk for real machines: served over NBD, so that QEMU takes it for a disk, with the faults of
//! [`SimDisk`] at a word.
//!
//! The fault model is the simulated disk's; here it gets time. There is one head: requests are carried out one
//! after the other, each takes its length at the speed of its place. A cache that is full is written out, as a
//! disk's is. When the machine loses power ([`TestDisk::cut`]) its connections end, what had not been carried out
//! by then is never carried out, and of what was written and not flushed a subset is kept, chosen by the seed.

pub mod command;
mod serve;

use crate::sim::disk::{SECTOR, SimDisk};
use crate::sim::scheduler::Random;
use command::{Fault, Order};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a disk's cache holds at most; then all of it is written out.
const CACHE_BYTES_MAX: usize = 16 << 20;
const MIB: f64 = (1 << 20) as f64;

/// A request was not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failed {
    /// The disk says so: the medium, or all of it.
    Io,
    /// Its machine has no power any more: there is nobody to be told.
    Power,
}

/// What was asked of a disk, and what was done to it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Requests that were carried out.
    pub reads: u64,
    /// Writes, with those that only write zeros.
    pub writes: u64,
    /// Flushes, and writes that went through to the medium.
    pub flushes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Losses of power.
    pub cuts: u64,
    /// Bytes that were in the cache at those.
    pub cache_bytes_at_cuts: u64,
}

/// MiB per second at the first byte and at the last.
type Speed = (f64, f64);

struct State {
    disk: SimDisk,
    random: Random,
    speed: Option<Speed>,
    /// When the head has done what it was given.
    busy_until: Instant,
    /// Counts the losses of power: a connection ends with the power it was made under.
    power: u64,
    counts: Counts,
}

/// A disk, and a power cord to pull.
pub struct TestDisk {
    name: String,
    state: Mutex<State>,
    changed: Condvar,
}

impl TestDisk {
    /// A disk of zeros; the seed chooses what its losses of power take.
    pub fn new(name: &str, bytes: u64, seed: u64) -> Self {
        let state = State {
            disk: SimDisk::new(bytes),
            random: Random::new(seed),
            speed: None,
            busy_until: Instant::now(),
            power: 0,
            counts: Counts::default(),
        };
        Self { name: name.to_owned(), state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.lock().disk.bytes()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// The power that is on now; requests name the one they came under.
    pub fn power(&self) -> u64 {
        self.lock().power
    }

    /// Reads.
    pub fn read(&self, power: u64, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        let mut state = self.turn(power, offset, into.len())?;
        state.counts.reads += 1;
        if state.disk.read_checked(offset, into) { Ok(()) } else { Err(state.failed()) }
    }

    /// Writes; through to the medium if it is to be `durable`.
    pub fn write(&self, power: u64, offset: u64, data: &[u8], durable: bool) -> Result<(), Failed> {
        let mut state = self.turn(power, offset, data.len())?;
        if state.disk.faults.write || std::mem::take(&mut state.disk.faults.write_once) {
            return Err(state.failed());
        }
        state.counts.writes += 1;
        state.counts.flushes += u64::from(durable);
        state.disk.write(offset, data, durable);
        if state.disk.unflushed_bytes() > CACHE_BYTES_MAX {
            let mark = state.disk.flush_mark();
            state.disk.flushed(mark);
        }
        Ok(())
    }

    /// Makes durable what was written. One that fails has lost a subset of it, for good.
    pub fn flush(&self, power: u64) -> Result<(), Failed> {
        let mut state = self.turn(power, 0, 0)?;
        let State { disk, random, .. } = &mut *state;
        if std::mem::take(&mut disk.faults.flush) {
            disk.lose_cache(random);
            return Err(state.failed());
        }
        let mark = disk.flush_mark();
        disk.flushed(mark);
        state.counts.flushes += 1;
        Ok(())
    }

    /// Waits until the head is free and has come to the end of this request.
    fn turn(&self, power: u64, offset: u64, bytes: usize) -> Result<MutexGuard<'_, State>, Failed> {
        let mut state = self.lock();
        let mut done = None;
        loop {
            if state.power != power {
                return Err(Failed::Power);
            }
            if state.disk.faults.hung {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.disk.faults.dead {
                return Err(state.failed());
            }
            let at = *done.get_or_insert_with(|| state.occupy(offset, bytes));
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(state);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The machine loses power. Its connections end; what the seed leaves of the cache is on the medium.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.power += 1;
        state.counts.cuts += 1;
        state.counts.cache_bytes_at_cuts += state.disk.unflushed_bytes() as u64;
        let State { disk, random, .. } = &mut *state;
        disk.lose_cache(random);
        state.busy_until = Instant::now();
        self.changed.notify_all();
    }

    /// Does something to the disk, and says what in words; or says what is wrong with the order.
    pub fn obey(&self, order: Order) -> Result<String, String> {
        let mut state = self.lock();
        let said = match order {
            Order::Cut => {
                drop(state);
                self.cut();
                return Ok("the cache is lost, but for a subset".into());
            }
            Order::Fault(fault) => {
                let faults = &mut state.disk.faults;
                match fault {
                    Fault::All => faults.dead = true,
                    Fault::Writes => faults.write = true,
                    Fault::NextWrite => faults.write_once = true,
                    Fault::NextFlush => faults.flush = true,
                    Fault::Hang => faults.hung = true,
                }
                fault.to_string()
            }
            Order::BadSector { lba, count } => {
                let sectors = state.disk.bytes() / SECTOR as u64;
                if lba.checked_add(count).is_none_or(|end| end > sectors) {
                    return Err(format!("the disk has {sectors} sectors of {SECTOR} bytes"));
                }
                (lba..lba + count).for_each(|lba| state.disk.spoil(lba * SECTOR as u64));
                format!("sectors {lba} to {} cannot be read until they are written", lba + count - 1)
            }
            Order::Slow { first, last } => {
                state.speed = Some((first, last));
                format!("{first} MiB/s at the beginning, {last} MiB/s at the end")
            }
            Order::Heal => {
                state.disk.faults = Default::default();
                state.disk.unspoil();
                state.speed = None;
                "all is well".into()
            }
            Order::Status => state.describe(),
        };
        self.changed.notify_all();
        Ok(said)
    }
}

impl State {
    fn failed(&mut self) -> Failed {
        self.counts.failed += 1;
        Failed::Io
    }

    /// When the head will have done this, after everything that it was given before.
    fn occupy(&mut self, offset: u64, bytes: usize) -> Instant {
        let now = Instant::now();
        let takes = self.speed.map_or(Duration::ZERO, |speed| takes(speed, offset, bytes, self.disk.bytes()));
        self.busy_until = self.busy_until.max(now) + takes;
        self.busy_until
    }

    fn describe(&self) -> String {
        let Counts { reads, writes, flushes, failed, cuts, cache_bytes_at_cuts } = self.counts;
        let faults = self.disk.faults;
        let bad = if self.disk.has_unreadable() { "some" } else { "no" };
        format!(
            "{reads} reads, {writes} writes, {flushes} flushes, {failed} failed, {cuts} cuts with \
             {cache_bytes_at_cuts} bytes in the cache, {} there now; {bad} bad sectors, {faults:?}, speed {:?}",
            self.disk.unflushed_bytes(),
            self.speed
        )
    }
}

/// How long a transfer takes where the speed falls from the first byte to the last.
fn takes((first, last): Speed, offset: u64, bytes: usize, size: u64) -> Duration {
    let place = offset as f64 / size as f64;
    let speed = first + (last - first) * place;
    Duration::from_secs_f64(bytes as f64 / (speed * MIB))
}

#[cfg(test)]
mod tests;
