//! What was promised, held against what was seen: a history for each sector of each device.
//!
//! A read may return a write that began before the read ended, unless a later write is known to have
//! taken effect before the read began. A write is known to have taken effect when it is
//! acknowledged, or when a read returned it. One that failed, or whose exporter died, may have
//! taken effect at any time until its end, which is when the next exporter starts.

use crate::sim::scheduler::Nanos;
use std::collections::{BTreeMap, HashMap};

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
    /// An exporter heard of its loss.
    reported: bool,
    sectors: (usize, usize),
    device: usize,
}

/// The histories.
#[derive(Default)]
pub struct Checker {
    writes: Vec<Write>,
    sectors: HashMap<(usize, usize), Vec<WriteId>>,
    /// When a read first returned that write in that sector: without an acknowledgement it may be torn.
    seen: BTreeMap<(WriteId, usize), Nanos>,
    /// Which node acted as primary of (device, slice) under an epoch.
    primaries: HashMap<(u32, u32, u64), u16>,
    /// What is wrong.
    pub violations: Vec<String>,
    /// Reads that were compared.
    pub reads: u64,
}

impl Checker {
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
            reported: false,
            sectors: (first, count),
            device,
        });
        for sector in first..first + count {
            self.sectors.entry((device, sector)).or_default().push(id);
        }
        id
    }

    /// It completed.
    pub fn acknowledge(&mut self, now: Nanos, id: WriteId, fua: bool, lost: bool) {
        let write = &mut self.writes[id];
        write.end = now;
        write.acknowledged = Some(now);
        write.durable = fua;
        write.lost = lost && !fua;
        if !write.lost {
            write.effective = Some(write.effective.map_or(now, |at| at.min(now)));
        }
    }

    /// Nothing of it can happen later than now.
    pub fn end(&mut self, now: Nanos, id: WriteId) {
        let write = &mut self.writes[id];
        write.end = write.end.min(now);
    }

    /// A flush that was asked for at `began` succeeded.
    pub fn flushed(&mut self, device: usize, began: Nanos, now: Nanos) {
        for write in self.writes.iter_mut().filter(|write| write.device == device) {
            if write.acknowledged.is_some_and(|at| at < began) {
                if write.lost && !write.reported {
                    self.violations.push(format!(
                        "{}: a flush succeeded although write {:x} was lost",
                        crate::sim::cluster::clock(now),
                        write.stamp
                    ));
                }
                write.durable = true;
            }
        }
    }

    /// A flush failed: the exporter knows.
    pub fn flush_failed(&mut self, device: usize) {
        for write in self.writes.iter_mut().filter(|write| write.device == device && write.lost) {
            write.reported = true;
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
            }
        }
        // What was read from a cache may be gone as well; what was flushed is not.
        let writes = &self.writes;
        self.seen.retain(|(id, _), _| writes[*id].device != device || writes[*id].durable);
    }

    /// A read of one sector, asked for at `began`, returned `stamp`.
    pub fn read(&mut self, began: Nanos, now: Nanos, device: usize, sector: usize, stamp: Stamp) {
        self.reads += 1;
        let none = Vec::new();
        let writes = self.sectors.get(&(device, sector)).unwrap_or(&none);
        let overwritten = |end: Nanos| {
            writes
                .iter()
                .find(|id| {
                    let later = &self.writes[**id];
                    let seen = || self.seen.get(&(**id, sector)).is_some_and(|at| *at < began);
                    later.began > end && (later.effective.is_some_and(|at| at < began) || seen())
                })
                .map(|id| &self.writes[*id])
        };
        let mut over = None;
        if stamp == 0 {
            // Zeros may be those from before the first write.
            over = overwritten(0);
            if over.is_none() {
                return;
            }
        }
        let mut known = false;
        let mut newest = None;
        for id in writes.iter().rev() {
            let write = &self.writes[*id];
            if write.stamp != stamp || write.began > now {
                continue;
            }
            known = true;
            match overwritten(write.end) {
                None => {
                    newest = Some(*id);
                    break;
                }
                Some(later) => over = Some(later),
            }
        }
        match newest {
            Some(id) if stamp != 0 => {
                self.seen.entry((id, sector)).or_insert(now);
            }
            Some(_) => {}
            None => {
                let why = match over {
                    Some(later) => {
                        format!("write {:x} took effect before it began", later.stamp)
                    }
                    None if known => "?".into(),
                    None => "nobody wrote that".into(),
                };
                let recent: Vec<&Write> = writes.iter().rev().take(4).map(|id| &self.writes[*id]).collect();
                let sample = format!(
                    "{}: device {device} sector {sector}: a read since {} returned {stamp:x}: {why}; the last writes: {recent:x?}",
                    crate::sim::cluster::clock(now),
                    crate::sim::cluster::clock(began),
                );
                self.violations.push(sample);
            }
        }
    }

    /// That node acted as primary.
    pub fn acts_as_primary(&mut self, device: u32, slice: u32, epoch: u64, node: u16) {
        let first = *self.primaries.entry((device, slice, epoch)).or_insert(node);
        if first != node {
            self.violations.push(format!(
                "device {device} slice {slice} epoch {epoch}: both {first} and {node} act as primary"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overwritten_value_is_a_violation_and_a_concurrent_one_is_not() {
        let mut checker = Checker::default();
        let a = checker.begin_write(1, 0, 0, 1, 10);
        checker.acknowledge(2, a, false, false);
        let b = checker.begin_write(3, 0, 0, 1, 11);
        checker.read(4, 5, 0, 0, 10);
        checker.read(4, 6, 0, 0, 11);
        assert!(checker.violations.is_empty());
        checker.read(7, 8, 0, 0, 10);
        assert_eq!(checker.violations.len(), 1, "11 was seen before");
        checker.acknowledge(9, b, false, false);
        checker.read(10, 11, 0, 0, 0);
        assert_eq!(checker.violations.len(), 2);
    }
}
