//! What this disk cannot read is taken from another copy and written anew.
//!
//! Every member has what was acknowledged, and one that has not been compared may lack the rest: it is asked if no other
//! can be, and what comes of it may differ from what the others have.

use super::Engine;
use super::action::{Body, BufferId, BufferRange, OpKey};
use super::op::{Local, Op, OpKind, Origin};
use super::view::PeerIndex;
use super::window::Awaited;
use crate::region::masks::touched;
use crate::wire::header::{Header, Kind, Status};

/// Whether a read that failed can be helped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Repair {
    /// It goes on when the repair is done.
    Begun,
    /// Another copy has it and cannot be reached now.
    Later,
    /// No other copy has it, or that was tried.
    No,
}

impl Engine {
    /// A read failed here: its range is fetched from a member.
    pub(super) fn repair_for(&mut self, key: OpKey) -> Repair {
        let op = &self.ops[key];
        if self.untried(op).next().is_none() || self.disks[op.disk].failed {
            return Repair::No;
        }
        if self.repair_source(op).is_none() {
            return Repair::Later;
        }
        let (device, slice, offset, length) = (op.device, op.slice, op.offset, op.length);
        // It gives up its range, and asks for it again behind the repair.
        let op = &mut self.ops[key];
        (op.holds, op.failed, op.local) = (false, false, Local::Idle);
        let lock = &mut self.devices[device].slices[slice as usize].lock;
        lock.release(key);
        while let Some(next) = lock.pop_ready() {
            self.ready.push_back(next);
        }
        self.repair(device, slice, offset..offset + length, Some(key));
        let lock = &mut self.devices[device].slices[slice as usize].lock;
        if lock.acquire(key, offset..offset + length, true) {
            self.ready.push_back(key);
        }
        Repair::Begun
    }

    /// Begins to replace a range by what a member has.
    pub(super) fn repair(
        &mut self,
        device: usize,
        slice: u32,
        range: std::ops::Range<u32>,
        reader: Option<OpKey>,
    ) {
        let sources = reader.map_or_else(Vec::new, |reader| self.ops[reader].sources.clone());
        let epoch = self.devices[device].view.span(slice).epoch;
        let op = Op {
            kind: OpKind::Repair,
            slice,
            offset: range.start,
            length: range.end - range.start,
            reader,
            sources,
            ..Op::primary(Origin::Upkeep, device, epoch)
        };
        self.enqueue(op);
    }

    fn untried(&self, op: &Op) -> impl Iterator<Item = PeerIndex> {
        let members = &self.devices[op.device].view.span(op.slice).members;
        members.iter().copied().filter(|peer| !op.sources.contains(peer))
    }

    /// Rather one that is known to have what was here.
    fn repair_source(&self, op: &Op) -> Option<PeerIndex> {
        let epoch = self.devices[op.device].view.span(op.slice).epoch;
        let reachable = self.untried(op).filter(|peer| {
            let entry = &self.peers[*peer];
            entry.is_open() && entry.lost.is_none() && entry.adopted().0 >= epoch.0
        });
        reachable.min_by_key(|peer| self.may_lack(op, *peer))
    }

    /// Whether that member may not have all that this copy had.
    fn may_lack(&self, op: &Op, peer: PeerIndex) -> bool {
        let regions = touched(op.offset, op.length, self.region_bytes());
        self.may_differ(op.device, op.slice, peer) & regions != 0
    }

    /// It holds its range.
    pub(super) fn start_repair(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let Some(peer) = self.repair_source(op).filter(|_| !self.disks[op.disk].failed) else {
            self.finish(key, Status::Fenced);
            return;
        };
        let header = Header {
            slice_epoch: op.epoch,
            device: self.devices[op.device].view.id.0,
            slice: op.slice,
            offset: op.offset,
            length: op.length,
            loss: self.loss_of(op.device, op.slice),
            ..Header::new(Kind::Fetch)
        };
        if self.send_awaited(peer, header, None, Body::None, Awaited::Fetch(key)) {
            let op = &mut self.ops[key];
            op.asked += 1;
            op.sources.push(peer);
        } else {
            self.finish(key, Status::Fenced);
        }
    }

    /// The data came, or will never come (`None`).
    pub(super) fn on_fetched(&mut self, key: OpKey, answer: Option<&Header>, body: Option<BufferId>) {
        let Some(op) = self.ops.get_mut(key) else {
            self.release(body);
            return;
        };
        op.asked -= 1;
        let status = answer.map_or(Status::Fenced, |header| Status::parse(header.flags));
        let data = body.filter(|_| answer.is_some_and(|header| header.body_bytes == op.length));
        // Nobody has it, if even that copy cannot read it. Otherwise the reader may try again.
        let tried = matches!(status, Status::Done | Status::DiskFailed);
        let (reader, doomed) = (op.reader, op.doomed);
        match data.filter(|_| status == Status::Done && doomed.is_none()) {
            Some(buffer) => {
                let range = BufferRange { buffer, offset: 0, length: op.length };
                (op.buffer, op.owns_buffer) = (Some(range), true);
                let regions = touched(op.offset, op.length, self.region_bytes());
                self.note_repaired(key, regions);
                self.require_dirty(key, regions);
            }
            None => {
                self.release(body);
                if status == Status::DiskFailed && doomed.is_none() && reader.is_none() {
                    self.repair_from_next(key);
                    return;
                }
                self.finish(key, doomed.unwrap_or(if tried { Status::DiskFailed } else { Status::Fenced }));
            }
        }
    }

    /// The read that waits for it need not ask that member again, unless a new map ended the repair: what came then was
    /// not stored.
    pub(super) fn end_repair(&mut self, op: &Op, status: Status) {
        let source = op.sources.last().filter(|_| matches!(status, Status::Done | Status::DiskFailed));
        if let Some(reader) = op.reader.and_then(|reader| self.ops.get_mut(reader)) {
            reader.sources.extend(source);
        }
    }

    /// What is about to be written here is that member's. The others have what was here before, which may be more.
    fn note_repaired(&mut self, key: OpKey, regions: u64) {
        let op = &self.ops[key];
        let (device, slice) = (op.device, op.slice);
        let Some(source) = op.sources.last().copied().filter(|source| self.may_lack(op, *source)) else {
            return;
        };
        let others = self.devices[device].view.span(slice).others.clone();
        for peer in others.into_iter().filter(|peer| *peer != source) {
            self.note_behind(device, slice, peer, regions);
        }
    }

    /// That member cannot read it either. If none can, reads that wait for the region to be equal on all
    /// copies fail: it will not be, before it is written anew.
    fn repair_from_next(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let (device, slice, offset, length) = (op.device, op.slice, op.offset, op.length);
        if self.untried(op).next().is_some() {
            self.start_repair(key);
            return;
        }
        self.finish(key, Status::DiskFailed);
        self.fail_unreconciled_reads(device, slice, touched(offset, length, self.region_bytes()));
    }
}
