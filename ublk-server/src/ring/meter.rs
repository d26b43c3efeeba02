//! How much a disk has to do.

use mirror_net::engine::Nanos;

/// What a disk has done since this process has it, its metadata included.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DiskWork {
    /// Reads that ended.
    pub reads: u64,
    /// Writes that ended.
    pub writes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Time in which something was under way, flushes and zeroing too, in nanoseconds.
    pub busy: Nanos,
}

/// Keeps count of it.
#[derive(Default)]
pub(super) struct Meter {
    work: DiskWork,
    under_way: u32,
    /// When the first of those that are under way began.
    since: Nanos,
}

impl Meter {
    pub fn began(&mut self, now: Nanos) {
        if self.under_way == 0 {
            self.since = now;
        }
        self.under_way += 1;
    }

    pub fn ended(&mut self, now: Nanos) {
        self.under_way -= 1;
        if self.under_way == 0 {
            self.work.busy += now.saturating_sub(self.since);
        }
    }

    /// A part of a read or write, which may be all of it.
    pub fn transferred(&mut self, write: bool, bytes: u32, whole: bool) {
        let (count, sum) = match write {
            true => (&mut self.work.writes, &mut self.work.written_bytes),
            false => (&mut self.work.reads, &mut self.work.read_bytes),
        };
        *sum += u64::from(bytes);
        *count += u64::from(whole);
    }

    /// So far.
    pub fn work(&self, now: Nanos) -> DiskWork {
        let running = if self.under_way > 0 { now.saturating_sub(self.since) } else { 0 };
        DiskWork { busy: self.work.busy + running, ..self.work }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_counts_once_whatever_is_under_way_at_once() {
        let mut meter = Meter::default();
        meter.began(100);
        meter.began(150);
        assert_eq!(meter.work(160).busy, 60, "it is at work");
        meter.ended(200);
        meter.ended(250);
        assert_eq!(meter.work(1_000).busy, 150, "and then it is not");
        meter.began(2_000);
        meter.ended(2_001);
        assert_eq!(meter.work(2_500).busy, 151);
    }

    #[test]
    fn a_write_in_two_parts_is_one() {
        let mut meter = Meter::default();
        meter.transferred(true, 3_072, false);
        meter.transferred(true, 1_024, true);
        meter.transferred(false, 512, true);
        let expected = DiskWork { reads: 1, writes: 1, read_bytes: 512, written_bytes: 4_096, busy: 0 };
        assert_eq!(meter.work(0), expected);
    }
}
