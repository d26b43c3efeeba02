//! What may differ between this node's copies and others', and the reads that wait for it.
//!
//! For every slice that this node is primary of and every other copy that gets its writes: none, once
//! they have been compared, but what a write did here that was not acknowledged there. It starts from
//! not knowing, whenever this node's role or that copy's place in the list is new, or the copy's disk
//! was attached again; then the two masks are united (docs/protocol.md rule 11) and the union is compared.
//!
//! What is known outlives a lost session, since every write that was not acknowledged there is
//! noted when it ends here: the same primary process and the same attachment go on where they were.

use super::Engine;
use super::action::OpKey;
use super::op::{Local, Op, Part};
use super::view::{PeerIndex, SpanView};
use crate::planted::{self, Bug};
use crate::region::masks::touched;
use crate::wire::header::Status;

/// What may differ between this node's copy of a slice and another's.
#[derive(Debug)]
pub(super) struct Behind {
    pub peer: PeerIndex,
    /// Its masks were asked for and are united with ours; until then all may differ.
    pub known: bool,
    pub asked: bool,
    /// Regions that may differ, if that is known.
    pub regions: u64,
    /// Those that are being copied.
    pub copying: u64,
    /// Those that could not be copied, and are tried again later.
    pub failed: u64,
    /// Those that could not be read here when they were to be copied.
    pub unreadable: u64,
    /// What it had readable when it was asked.
    pub readable: u64,
    /// Regions noted since: what it has readable of them may be more by now.
    pub noted: u64,
    /// Dirty bits of ours that it has taken over durably.
    pub united: u64,
}

impl Behind {
    pub fn unknown(peer: PeerIndex) -> Self {
        Self {
            peer,
            known: false,
            asked: false,
            regions: 0,
            copying: 0,
            failed: 0,
            unreadable: 0,
            readable: 0,
            noted: 0,
            united: 0,
        }
    }

    pub fn may_differ(&self) -> u64 {
        if self.known { self.regions } else { u64::MAX }
    }
}

impl Engine {
    /// Regions of a slice that may differ on that copy.
    pub(super) fn may_differ(&self, device: usize, slice: u32, peer: PeerIndex) -> u64 {
        let behind = &self.devices[device].slices[slice as usize].behind;
        behind.iter().find(|behind| behind.peer == peer).map_or(0, Behind::may_differ)
    }

    /// Regions that may not be read yet: not known to be equal on every copy that is counted on (rule 11).
    pub(super) fn unreconciled(&self, device: usize, slice: u32) -> u64 {
        let entry = &self.devices[device];
        let behind = &entry.slices[slice as usize].behind;
        if behind.is_empty() {
            return 0;
        }
        let span = entry.view.span(slice);
        let counted = behind.iter().filter(|behind| self.counts(device, span, behind.peer));
        counted.fold(0, |regions, behind| regions | behind.may_differ())
    }

    /// What may differ there, if anything may.
    pub(super) fn behind_mut(&mut self, device: usize, slice: u32, peer: PeerIndex) -> Option<&mut Behind> {
        let slice = self.devices[device].slices.get_mut(slice as usize)?;
        slice.behind.iter_mut().find(|behind| behind.peer == peer)
    }

    /// Something was done here that is not known to have been done there.
    pub(super) fn note_behind(&mut self, device: usize, slice: u32, peer: PeerIndex, regions: u64) {
        self.resync_due = true;
        let index = self.resync_of(device, peer);
        let entries = &mut self.devices[device].slices[slice as usize].behind;
        let resync = &mut self.resyncs[index];
        match entries.iter_mut().find(|behind| behind.peer == peer) {
            Some(behind) if behind.known => {
                let new = u64::from((regions & !behind.regions).count_ones());
                behind.regions |= regions;
                behind.noted |= regions;
                resync.left += new;
                resync.total += new;
            }
            // All of it may differ already; of this it is not asked later whether it does.
            Some(behind) => behind.noted |= regions,
            None => {
                let new = u64::from(regions.count_ones());
                // What it has readable is unknown: comparing finds out.
                let behind = Behind { known: true, regions, readable: u64::MAX, ..Behind::unknown(peer) };
                entries.push(behind);
                resync.left += new;
                resync.total += new;
            }
        }
    }

    /// A primary's or an earlier secondary's operation ends: copies that do not have it are behind.
    pub(super) fn note_missed(&mut self, op: &Op) {
        let view = &self.devices[op.device].view;
        if op.slice >= view.slices || !op.kind.stores() || !op.begun() || planted::is(Bug::MissedUnnoted) {
            return;
        }
        let span = view.span(op.slice);
        let mine = match op.part {
            Part::Primary => true,
            // What an earlier primary sent was perhaps sent to nobody else.
            Part::Secondary => span.epoch != op.epoch,
        };
        // One that was given up may have reached the others, and not this disk.
        let given_up = op.part == Part::Primary && op.doomed.is_some() && op.local != Local::Done;
        let differs = |peer: PeerIndex| given_up || !op.legs.is_acknowledged(peer);
        if !mine || !span.serves() || !span.others.iter().any(|peer| differs(*peer)) {
            return;
        }
        let missed: Vec<PeerIndex> = span.others.iter().copied().filter(|peer| differs(*peer)).collect();
        let regions = touched(op.offset, op.length, self.region_bytes());
        for peer in missed {
            self.note_behind(op.device, op.slice, peer, regions);
        }
    }

    /// Keeps what is known of a run of slices whose span is new, as far as it holds under the new one.
    pub(super) fn fit_run(
        &mut self,
        device: usize,
        slices: std::ops::Range<u32>,
        span: &SpanView,
        old: Option<&SpanView>,
        consecutive: bool,
    ) {
        let keeps = |peer: PeerIndex| {
            old.is_some_and(|old| {
                old.serves()
                    && (consecutive || old.epoch == span.epoch)
                    && old.attached(peer).is_some()
                    && old.attached(peer) == span.attached(peer)
            })
        };
        let others: &[PeerIndex] = if span.serves() { &span.others } else { &[] };
        for slice in slices {
            let entries = &mut self.devices[device].slices[slice as usize].behind;
            entries.retain(|behind| others.contains(&behind.peer) && keeps(behind.peer));
            for peer in others.iter().copied().filter(|peer| !keeps(*peer)) {
                entries.push(Behind::unknown(peer));
            }
            if entries.is_empty() {
                *entries = Vec::new();
            }
        }
    }

    /// A read holds its range and may not be answered from it yet: it gives the range up, and
    /// what it needs is copied first.
    pub(super) fn await_reconciled(&mut self, key: OpKey, regions: u64) {
        let op = &mut self.ops[key];
        op.holds = false;
        op.local = Local::Idle;
        let (device, slice) = (op.device, op.slice);
        let lock = &mut self.devices[device].slices[slice as usize].lock;
        lock.release(key);
        while let Some(next) = lock.pop_ready() {
            self.ready.push_back(next);
        }
        self.unreconciled_reads.push(key);
        let peers: Vec<PeerIndex> = {
            let entry = &self.devices[device];
            let behind = entry.slices[slice as usize].behind.iter();
            behind
                .map(|behind| behind.peer)
                .filter(|peer| self.counts(device, entry.view.span(slice), *peer))
                .collect()
        };
        for peer in peers {
            let differs = self.may_differ(device, slice, peer) & regions;
            if let Some(resync) = self.find_resync(device, peer) {
                for region in (0..64).filter(|region| differs >> region & 1 == 1) {
                    if !resync.urgent.contains(&(slice, region)) {
                        resync.urgent.push_back((slice, region));
                    }
                }
            }
            self.pump(device, peer);
        }
    }

    /// Those of a slice that touch regions which no copy can give to the others.
    pub(super) fn fail_unreconciled_reads(&mut self, device: usize, slice: u32, regions: u64) {
        let region_bytes = self.region_bytes();
        let (ops, waiting) = (&self.ops, &mut self.unreconciled_reads);
        let hopeless: Vec<OpKey> = waiting
            .extract_if(.., |key| {
                ops.get(*key).is_some_and(|op| {
                    let touches = touched(op.offset, op.length, region_bytes) & regions != 0;
                    (op.device, op.slice) == (device, slice) && touches
                })
            })
            .collect();
        for key in hopeless {
            self.doom(key, Status::DiskFailed);
        }
    }

    /// Reads whose regions are equal everywhere now ask for their range again.
    pub(super) fn retry_unreconciled(&mut self) {
        for key in std::mem::take(&mut self.unreconciled_reads) {
            let Some(op) = self.ops.get(key) else { continue };
            if let Some(status) = op.doomed {
                self.finish(key, status);
                continue;
            }
            let regions = touched(op.offset, op.length, self.region_bytes());
            if self.unreconciled(op.device, op.slice) & regions != 0 {
                self.unreconciled_reads.push(key);
                continue;
            }
            let range = op.offset..op.offset + op.length;
            let (device, slice) = (op.device, op.slice as usize);
            if self.devices[device].slices[slice].lock.acquire(key, range, true) {
                self.ready.push_back(key);
            }
        }
    }
}
