//! What this disk cannot read is taken from another copy and written anew.

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
        let span = self.devices[op.device].view.span(op.slice);
        if usize::from(op.repairs) >= span.members.len() || self.disks[op.disk].failed {
            return Repair::No;
        }
        if self.repair_source(op).is_none() {
            return Repair::Later;
        }
        let (device, slice, offset, length, repairs) =
            (op.device, op.slice, op.offset, op.length, op.repairs);
        // It gives up its range, and asks for it again behind the repair.
        let op = &mut self.ops[key];
        (op.holds, op.failed, op.local) = (false, false, Local::Idle);
        let lock = &mut self.devices[device].slices[slice as usize].lock;
        lock.release(key);
        while let Some(next) = lock.pop_ready() {
            self.ready.push_back(next);
        }
        self.repair(device, slice, offset..offset + length, Some((key, repairs)));
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
        reader: Option<(OpKey, u8)>,
    ) {
        let epoch = self.devices[device].view.span(slice).epoch;
        let op = Op {
            kind: OpKind::Repair,
            slice,
            offset: range.start,
            length: range.end - range.start,
            reader: reader.map(|(reader, _)| reader),
            repairs: reader.map_or(0, |(_, repairs)| repairs),
            ..Op::primary(Origin::Upkeep, device, epoch)
        };
        self.enqueue(op);
    }

    fn repair_source(&self, op: &Op) -> Option<PeerIndex> {
        let span = self.devices[op.device].view.span(op.slice);
        span.members.iter().copied().skip(op.repairs.into()).find(|peer| {
            let entry = &self.peers[*peer];
            entry.is_open() && entry.lost.is_none() && entry.adopted().0 >= span.epoch.0
        })
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
            self.ops[key].asked += 1;
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
        if let Some(reader) = reader.and_then(|reader| self.ops.get_mut(reader)) {
            reader.repairs += u8::from(tried);
        }
    }

    /// That member cannot read it either. If none can, reads that wait for the region to be equal on all
    /// copies fail: it will not be, before it is written anew.
    fn repair_from_next(&mut self, key: OpKey) {
        let op = &mut self.ops[key];
        op.repairs += 1;
        let (device, slice, offset, length, asked) = (op.device, op.slice, op.offset, op.length, op.repairs);
        if usize::from(asked) < self.devices[device].view.span(slice).members.len() {
            self.start_repair(key);
            return;
        }
        self.finish(key, Status::DiskFailed);
        self.fail_unreconciled_reads(device, slice, touched(offset, length, self.region_bytes()));
    }
}
