//! What was promised, held against what was seen: a history for each sector of each device.
//!
//! A read may return a write that began before the read ended, unless a later write is known to have
//! taken effect before the read began. A write is known to have taken effect when it is
//! acknowledged, or when a read returned it. One that failed, or whose exporter died, may have
//! taken effect at any time until its end, which is when the next exporter starts.

use crate::sim::scheduler::Nanos;

/// What a sector holds: a write's stamp, 0 for zeros.
pub type Stamp = u64;
/// Names a write.
pub type WriteId = usize;

#[derive(Clone, Debug)]
struct Write {
    stamp: Stamp,
    began: Nanos,
    /// It takes no effect later than this.
    end: Nanos,
    /// It is known to have taken effect, on all its sectors, at this time.
    effective: Option<Nanos>,
    acknowledged: Option<Nanos>,
    durable: bool,
    /// Gone with a cache although acknowledged, as the loss generation says.
    lost: bool,
    /// Some of it may be gone, since it went to several slices and was under way when one of them lost its
    /// caches: it counts as effective only once a flush says so.
    uncertain: bool,
    /// An exporter heard of its loss.
    reported: bool,
    /// It was acknowledged while a flush ran that succeeded: one that begins anew on its way, for a new map, covers it.
    during_flush: bool,
    sectors: (usize, usize),
    device: usize,
}

/// A write in one sector's history.
#[derive(Clone, Copy, Debug)]
struct Entry {
    write: WriteId,
    /// When a read first returned it here: without an acknowledgement it may be torn.
    seen: Option<Nanos>,
}

/// The histories.
pub struct Checker {
    writes: Vec<Write>,
    /// For each device and sector its writes, in the order in which they began.
    sectors: Vec<Vec<Vec<Entry>>>,
    slice_sectors: usize,
    /// For each device what was acknowledged and no flush has covered yet.
    unflushed: Vec<Vec<WriteId>>,
    /// For each device and slice who acted as its primary, by epoch.
    primaries: Vec<Vec<Vec<(u64, u16)>>>,
    /// What is wrong.
    pub violations: Vec<String>,
    /// Reads that were compared.
    pub reads: u64,
}

impl Checker {
    /// For so many devices of that length in slices, and slices of that length in sectors.
    pub fn new(devices: usize, slices: usize, sectors: usize) -> Self {
        Self {
            writes: Vec::new(),
            sectors: vec![vec![Vec::new(); slices * sectors]; devices],
            slice_sectors: sectors,
            unflushed: vec![Vec::new(); devices],
            primaries: vec![vec![Vec::new(); slices]; devices],
            violations: Vec::new(),
            reads: 0,
        }
    }

    /// A write (or zeroing) is asked for; sectors count from the device's start.
    pub fn begin_write(
        &mut self,
        now: Nanos,
        device: usize,
        first: usize,
        count: usize,
        stamp: Stamp,
    ) -> WriteId {
        let id = self.writes.len();
        self.writes.push(Write {
            stamp,
            began: now,
            end: Nanos::MAX,
            effective: None,
            acknowledged: None,
            durable: false,
            lost: false,
            uncertain: false,
            reported: false,
            during_flush: false,
            sectors: (first, count),
            device,
        });
        for entries in &mut self.sectors[device][first..first + count] {
            entries.push(Entry { write: id, seen: None });
        }
        id
    }

    /// It completed.
    pub fn acknowledge(&mut self, now: Nanos, id: WriteId, fua: bool, lost: bool) {
        let write = &mut self.writes[id];
        // The end of one whose exporter was replaced came before: it took effect by then.
        write.end = write.end.min(now);
        write.acknowledged = Some(now);
        write.durable = fua;
        write.lost = lost && !fua;
        if !write.lost && (fua || !write.uncertain) {
            write.effective = Some(write.effective.map_or(now, |at| at.min(now)));
        }
        if !fua {
            self.unflushed[write.device].push(id);
        }
    }

    /// Nothing of it can happen later than now.
    pub fn end(&mut self, now: Nanos, id: WriteId) {
        let write = &mut self.writes[id];
        write.end = write.end.min(now);
    }

    /// A flush that was asked for at `began` succeeded.
    pub fn flushed(&mut self, device: usize, began: Nanos, now: Nanos) {
        let Self { writes, unflushed, violations, .. } = self;
        unflushed[device].retain(|id| {
            let write = &mut writes[*id];
            if write.acknowledged.is_none_or(|at| at >= began) {
                write.during_flush = true;
                return true;
            }
            if write.lost && !write.reported {
                violations.push(format!(
                    "{}: a flush succeeded although write {:x} was lost",
                    crate::sim::cluster::clock(now),
                    write.stamp
                ));
            }
            if write.uncertain && !write.lost {
                write.effective.get_or_insert(now);
            }
            write.durable = true;
            false
        });
    }

    /// Writes that a flush asked for at `began` would be wrong to vouch for, as far as is known here: the first
    /// sector of each, and how many.
    pub fn lost_before(&self, device: usize, began: Nanos) -> Vec<(WriteId, (usize, usize))> {
        let lost = self.unflushed[device].iter().filter(|id| {
            let write = &self.writes[**id];
            write.lost && !write.reported && write.acknowledged.is_some_and(|at| at < began)
        });
        lost.map(|id| (*id, self.writes[*id].sectors)).collect()
    }

    /// Whether what was found in a sector is what that write left there, or a newer one.
    pub fn is_as_new(&self, device: usize, sector: usize, found: Stamp, id: WriteId) -> bool {
        let newer = self.sectors[device][sector].iter().filter(|entry| entry.write >= id);
        newer.map(|entry| self.writes[entry.write].stamp).any(|stamp| stamp == found)
    }

    /// Whether an earlier flush may have covered it although it was acknowledged after that one was asked for.
    pub fn may_be_covered(&self, id: WriteId) -> bool {
        self.writes[id].during_flush
    }

    /// It was called lost with a cache, and had left it before.
    pub fn found(&mut self, id: WriteId) {
        self.writes[id].lost = false;
    }

    /// A flush that was asked for at `began` failed: the exporter knows that whatever was acknowledged before
    /// it may be gone, now or later. No flush speaks of that any more.
    pub fn flush_failed(&mut self, device: usize, began: Nanos) {
        for id in &self.unflushed[device] {
            let write = &mut self.writes[*id];
            let told = write.acknowledged.is_some_and(|at| at < began);
            // Of one that may be gone in part this was the word: a later flush does not speak of it.
            write.lost |= told && write.uncertain;
            write.reported |= write.lost || told;
        }
    }

    /// The exporter is another process: nobody waits for news of its predecessor's writes.
    pub fn exporter_changed(&mut self, device: usize) {
        for write in self.writes.iter_mut().filter(|write| write.device == device) {
            write.reported = true;
        }
    }

    /// The loss generation of these sectors was raised.
    pub fn lose(&mut self, device: usize, first: usize, count: usize) {
        for write in self.writes.iter_mut().filter(|write| write.device == device && !write.durable) {
            if write.sectors.0 < first + count && first < write.sectors.0 + write.sectors.1 {
                write.effective = None;
                write.lost |= write.acknowledged.is_some();
                let slices = [write.sectors.0, write.sectors.0 + write.sectors.1 - 1]
                    .map(|sector| sector / self.slice_sectors);
                write.uncertain |= write.acknowledged.is_none() && slices[0] != slices[1];
            }
        }
        // What was read from a cache may be gone as well; what was flushed is not.
        for entry in self.sectors.get_mut(device).into_iter().flatten().flatten() {
            if !self.writes[entry.write].durable {
                entry.seen = None;
            }
        }
    }

    /// Whether a copy that is in sync may hold that: it could be read now. `durable` is what a loss of power
    /// would leave of it: nothing older than what a flush covered.
    pub fn may_hold(&self, now: Nanos, device: usize, sector: usize, stamp: Stamp, durable: Stamp) -> bool {
        let any = |stamp: Stamp, newer: &dyn Fn(Nanos) -> bool| {
            let history = self.of_sector(device, sector).iter().rev().map(|entry| &self.writes[entry.write]);
            let mut same = history.filter(|write| write.stamp == stamp);
            same.any(|write| !newer(write.end)) || (stamp == 0 && !newer(0))
        };
        let flushed_since = |end: Nanos| {
            let newer = self.of_sector(device, sector).iter().rev().map(|entry| &self.writes[entry.write]);
            newer.take_while(|write| write.began > end).any(|write| write.durable && !write.lost)
        };
        any(stamp, &|end| self.overwritten(device, sector, end, now).is_some())
            && any(durable, &flushed_since)
    }

    /// What was written there, the oldest first; to what an operator made nothing ever is.
    fn of_sector(&self, device: usize, sector: usize) -> &[Entry] {
        self.sectors.get(device).and_then(|sectors| sectors.get(sector)).map_or(&[], Vec::as_slice)
    }

    /// Sectors of a device that somebody wrote.
    pub fn written(&self, device: usize) -> impl Iterator<Item = usize> {
        let sectors = self.sectors.get(device).into_iter().flatten().enumerate();
        sectors.filter(|(_, entries)| !entries.is_empty()).map(|(sector, _)| sector)
    }

    /// The newest write of a sector that is known to have taken effect before `by`, and began after `end`.
    fn overwritten(&self, device: usize, sector: usize, end: Nanos, by: Nanos) -> Option<&Write> {
        let newer = self.of_sector(device, sector).iter().rev();
        newer
            .map(|entry| (entry, &self.writes[entry.write]))
            .take_while(|(_, write)| write.began > end)
            .find(|(entry, write)| {
                write.effective.is_some_and(|at| at < by) || entry.seen.is_some_and(|at| at < by)
            })
            .map(|(_, write)| write)
    }

    /// A read of one sector, asked for at `began`, returned `stamp`, and no later one may return something
    /// older if it `lasts`. True if that is of a write which is not acknowledged and was not read before.
    pub fn read(
        &mut self,
        began: Nanos,
        now: Nanos,
        device: usize,
        sector: usize,
        stamp: Stamp,
        lasts: bool,
    ) -> bool {
        self.reads += 1;
        // Zeros may be those from before the first write.
        let mut over = (stamp == 0).then(|| self.overwritten(device, sector, 0, began)).flatten();
        if stamp == 0 && over.is_none() {
            return false;
        }
        let mut known = false;
        let mut newest = None;
        for (index, entry) in self.sectors[device][sector].iter().enumerate().rev() {
            let write = &self.writes[entry.write];
            if write.stamp != stamp || write.began > now {
                continue;
            }
            known = true;
            match self.overwritten(device, sector, write.end, began) {
                None => {
                    newest = Some(index);
                    break;
                }
                Some(later) => over = Some(later),
            }
        }
        if let Some(index) = newest {
            let entry = &mut self.sectors[device][sector][index];
            let early = entry.seen.is_none() && self.writes[entry.write].acknowledged.is_none();
            if stamp != 0 && lasts {
                entry.seen.get_or_insert(now);
            }
            return early && stamp != 0;
        }
        let why = match over {
            Some(later) => format!("write {:x} took effect before it began", later.stamp),
            None if known => "?".into(),
            None => "nobody wrote that".into(),
        };
        let entries = self.sectors[device][sector].iter().rev().take(4);
        let recent: Vec<&Write> = entries.map(|entry| &self.writes[entry.write]).collect();
        let sample = format!(
            "{}: device {device} sector {sector}: a read since {} returned {stamp:x}: {why}; the last writes: {recent:x?}",
            crate::sim::cluster::clock(now),
            crate::sim::cluster::clock(began),
        );
        self.violations.push(sample);
        false
    }

    /// That node acted as primary.
    pub fn acts_as_primary(&mut self, device: u32, slice: u32, epoch: u64, node: u16) {
        // An operator may have made a device, or made one longer.
        let (index, slice) = (device as usize - 1, slice as usize);
        self.primaries.resize_with(self.primaries.len().max(index + 1), Vec::new);
        let slices = &mut self.primaries[index];
        slices.resize_with(slices.len().max(slice + 1), Vec::new);
        let known = &mut slices[slice];
        match known.iter().rev().find(|(other, _)| *other == epoch) {
            None => known.push((epoch, node)),
            Some((_, first)) if *first == node => {}
            Some((_, first)) => self.violations.push(format!(
                "device {device} slice {slice} epoch {epoch}: both {first} and {node} act as primary"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Under way to two slices when one of them lost its caches: half of it may be gone, and a failed flush says so.
    #[test]
    fn a_write_that_is_gone_in_part_is_told_of_by_one_flush() {
        for told in [false, true] {
            let mut checker = Checker::new(1, 2, 8);
            let across = checker.begin_write(1, 0, 7, 2, 10);
            checker.lose(0, 8, 8);
            checker.acknowledge(2, across, false, false);
            if told {
                checker.flush_failed(0, 3);
            }
            checker.flushed(0, 4, 5);
            checker.read(6, 7, 0, 7, 10, true);
            checker.read(6, 7, 0, 8, 0, true);
            assert_eq!(checker.violations.is_empty(), told, "{:?}", checker.violations);
        }
    }

    /// A flush that was carried out before the loss, and heard of after it.
    #[test]
    fn what_had_left_the_cache_before_it_was_lost_is_not_lost() {
        for found in [false, true] {
            let mut checker = Checker::new(1, 1, 8);
            let write = checker.begin_write(1, 0, 2, 1, 10);
            checker.acknowledge(2, write, false, false);
            let newer = checker.begin_write(3, 0, 2, 1, 11);
            checker.acknowledge(4, newer, false, false);
            checker.flushed(0, 2, 5);
            assert!(checker.may_be_covered(write) && checker.may_be_covered(newer));
            checker.lose(0, 0, 8);
            assert_eq!(checker.lost_before(0, 4), [(write, (2, 1))], "the newer one was done after it began");
            assert!(checker.is_as_new(0, 2, 11, write) && !checker.is_as_new(0, 2, 0, write));
            if found {
                checker.found(write);
            }
            checker.flushed(0, 4, 6);
            assert_eq!(checker.violations.is_empty(), found, "{:?}", checker.violations);
        }
    }

    #[test]
    fn an_overwritten_value_is_a_violation_and_a_concurrent_one_is_not() {
        let mut checker = Checker::new(1, 1, 1);
        let a = checker.begin_write(1, 0, 0, 1, 10);
        checker.acknowledge(2, a, false, false);
        let b = checker.begin_write(3, 0, 0, 1, 11);
        checker.read(4, 5, 0, 0, 10, true);
        checker.read(4, 6, 0, 0, 11, true);
        assert!(checker.violations.is_empty());
        checker.read(7, 8, 0, 0, 10, true);
        assert_eq!(checker.violations.len(), 1, "11 was seen before");
        checker.acknowledge(9, b, false, false);
        checker.read(10, 11, 0, 0, 0, true);
        assert_eq!(checker.violations.len(), 2);
    }
}
