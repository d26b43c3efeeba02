//! What this node's disks have to do, of late.

use crate::ring::meter::DiskWork;
use mirror_net::control::DiskLoad;
use mirror_net::ids::DiskId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What happened so long ago counts a third of what happens now.
const WINDOW: Duration = Duration::from_secs(10);

/// Averages in which the past fades.
#[derive(Default)]
pub(super) struct Loads {
    at: Option<Instant>,
    disks: BTreeMap<DiskId, Fading>,
}

/// Sums of what a disk did, and of the time in which it did it.
#[derive(Clone, Copy, Default)]
struct Fading {
    last: DiskWork,
    seconds: f64,
    reads: f64,
    writes: f64,
    read_bytes: f64,
    written_bytes: f64,
    busy_seconds: f64,
}

impl Fading {
    fn add(&mut self, work: DiskWork, seconds: f64) {
        let window = WINDOW.as_secs_f64();
        let kept = (-seconds / window).exp();
        // The past fades within this interval as well.
        let weight = window * (1.0 - kept) / seconds;
        let last = std::mem::replace(&mut self.last, work);
        let fade = |sum: &mut f64, new: f64| *sum = *sum * kept + new * weight;
        let done = |before: u64, now: u64| now.saturating_sub(before) as f64;
        fade(&mut self.reads, done(last.reads, work.reads));
        fade(&mut self.writes, done(last.writes, work.writes));
        fade(&mut self.read_bytes, done(last.read_bytes, work.read_bytes));
        fade(&mut self.written_bytes, done(last.written_bytes, work.written_bytes));
        fade(&mut self.busy_seconds, done(last.busy, work.busy) / 1e9);
        fade(&mut self.seconds, seconds);
    }

    fn load(&self, disk: DiskId) -> DiskLoad {
        let per_second = |sum: f64| (sum / self.seconds).round() as u64;
        DiskLoad {
            disk,
            reads: per_second(self.reads),
            writes: per_second(self.writes),
            read_bytes: per_second(self.read_bytes),
            written_bytes: per_second(self.written_bytes),
            busy_percent: (100.0 * self.busy_seconds / self.seconds).round().min(100.0) as u8,
        }
    }
}

impl Loads {
    /// Adds what the disks have done by now; those of which something can be said.
    pub fn observe(&mut self, now: Instant, disks: &[(DiskId, DiskWork)]) -> Vec<DiskLoad> {
        let passed = self.at.replace(now).map(|at| now.saturating_duration_since(at).as_secs_f64());
        let Some(seconds) = passed.filter(|seconds| *seconds > 0.0) else {
            let known =
                |(disk, work): &(DiskId, DiskWork)| (*disk, Fading { last: *work, ..Fading::default() });
            self.disks.extend(disks.iter().map(known));
            return Vec::new();
        };
        let mut loads = Vec::with_capacity(disks.len());
        for (disk, work) in disks {
            let fading = self.disks.entry(*disk).or_default();
            fading.add(*work, seconds);
            loads.push(fading.load(*disk));
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId(7);

    fn work(writes: u64) -> [(DiskId, DiskWork); 1] {
        let busy = writes * 1_000_000;
        [(DISK, DiskWork { writes, written_bytes: writes * 4096, busy, ..DiskWork::default() })]
    }

    #[test]
    fn a_steady_load_is_told_at_once_and_fades_when_it_ends() {
        let (begun, mut loads) = (Instant::now(), Loads::default());
        let at = |half_seconds: u64| begun + Duration::from_millis(500 * half_seconds);
        assert_eq!(loads.observe(at(0), &work(1_000)), [], "what was before is not of late");
        for half in 1..=40 {
            let expected = DiskLoad {
                disk: DISK,
                writes: 200,
                written_bytes: 819_200,
                busy_percent: 20,
                ..DiskLoad::default()
            };
            assert_eq!(loads.observe(at(half), &work(1_000 + 100 * half)), [expected]);
        }
        let after = loads.observe(at(60), &work(5_000))[0].writes;
        assert!((60..90).contains(&after), "a third is left after ten seconds: {after}");
        let end = loads.observe(at(400), &work(5_000));
        assert_eq!(end, [DiskLoad { disk: DISK, ..DiskLoad::default() }]);
    }

    #[test]
    fn looking_twice_at_once_is_no_division_by_nothing() {
        let (now, mut loads) = (Instant::now(), Loads::default());
        loads.observe(now, &work(1));
        assert_eq!(loads.observe(now, &work(2)), []);
    }
}
