//! What a primary asks of this node's copies.

use super::Engine;
use super::action::{BufferId, OpKey};
use super::op::{Local, Op, OpKind, Origin, Part, Sender};
use super::primary::data_buffer;
use crate::format::journal::Change;
use crate::ids::SlotIndex;
use crate::planted::{self, Bug};
use crate::region::digest::{self, Digest};
use crate::region::masks::{RegionMasks, touched};
use crate::wire::header::{BadFrame, FLAG_FINE, Header, Kind, Status};

impl Engine {
    /// From the primary: store it, tell what is there, or note what is equal.
    pub(super) fn on_replicate(
        &mut self,
        sender: Sender,
        header: &Header,
        small_body: &[u8],
        buffer: Option<BufferId>,
    ) -> Result<(), BadFrame> {
        let word = || -> Result<u64, BadFrame> {
            let bytes = small_body.try_into().map_err(|_| BadFrame::Content("not one mask"))?;
            Ok(u64::from_le_bytes(bytes))
        };
        let (device, kind) = match header.kind {
            Kind::Unite => (self.device_of(header)?, OpKind::Unite { dirty: word()? }),
            Kind::Compare => {
                (self.operation(header)?.0, OpKind::Compare { fine: header.flags & FLAG_FINE != 0 })
            }
            Kind::Clear => (self.operation(header)?.0, OpKind::Clear { readable: word()? }),
            _ => self.operation(header)?,
        };
        if header.kind == Kind::Unite && header.length != 0 {
            return Err(BadFrame::Content("masks of a range"));
        }
        let buffer = data_buffer(header, kind, buffer, header.body_bytes)?;
        let span = self.devices[device].view.span(header.slice);
        let op = Op {
            part: Part::Secondary,
            kind,
            slice: header.slice,
            offset: header.offset,
            length: header.length,
            buffer,
            owns_buffer: buffer.is_some(),
            ..Op::primary(Origin::Peer(sender), device, header.slice_epoch)
        };
        // Rule 2: an older epoch is refused, and so is whoever we do not know as its primary.
        let fenced = span.epoch != header.slice_epoch || !span.mirrors(sender.peer);
        if fenced && !planted::is(Bug::OldEpoch) {
            self.refuse(op, Status::Fenced);
            return Ok(());
        }
        self.enqueue(op);
        Ok(())
    }

    fn device_of(&self, header: &Header) -> Result<usize, BadFrame> {
        let device = self.by_device.get(&crate::ids::DeviceId(header.device)).copied();
        let device = device.filter(|device| header.slice < self.devices[*device].view.slices);
        device.ok_or(BadFrame::Content("a slice that is not in the map"))
    }

    /// Holds its range.
    pub(super) fn start_secondary(&mut self, key: OpKey) {
        match self.ops[key].kind {
            OpKind::Unite { dirty } => self.start_unite(key, dirty),
            OpKind::Read | OpKind::Compare { .. } if self.disks[self.ops[key].disk].failed => {
                self.finish(key, Status::DiskFailed);
            }
            OpKind::Read | OpKind::Compare { .. } => {
                self.read_local(key);
                if self.ops[key].local == Local::Done {
                    self.read_done(key);
                }
            }
            OpKind::Clear { .. } => self.start_clear_here(key),
            OpKind::Write { .. } if self.may_stage(key) => self.stage(key),
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Discard => self.store_now(key),
            OpKind::Copy | OpKind::Repair => {}
        }
    }

    /// Takes over the primary's dirty bits; answered once they are durable.
    fn start_unite(&mut self, key: OpKey, dirty: u64) {
        let op = &self.ops[key];
        if self.disks[op.disk].failed {
            self.finish(key, Status::DiskFailed);
            return;
        }
        let dirty = if planted::is(Bug::MaskNotInherited) { 0 } else { dirty };
        let slot = SlotIndex(op.slot);
        let (disk, device, slice) = (op.disk, op.device, op.slice as usize);
        // What an earlier primary began here is not undone, and may not be in the masks yet (rule 10).
        let under_way = self.stores_under_way(device, op.slice);
        let content = self.content(device, op.slice) | under_way;
        let journal = &mut self.disks[disk].journal;
        let masks = journal.masks(slot);
        self.ops[key].reply = [masks.dirty | under_way, content].map(u64::to_le_bytes).concat();
        if dirty & !masks.dirty != 0 {
            let masks = RegionMasks { dirty: masks.dirty | dirty, ..masks };
            let ticket = journal.submit(Change::Masks { slot, masks });
            self.devices[device].slices[slice].intent = ticket;
        } else if dirty & !journal.dirty_durable(slot) == 0 {
            self.ops[key].local = Local::Done;
            self.progress(key);
            return;
        }
        let ticket = self.devices[device].slices[slice].intent;
        self.await_ticket(key, ticket);
    }

    /// Regions of a slice that something is being stored in for another node.
    fn stores_under_way(&self, device: usize, slice: u32) -> u64 {
        let stores = self.ops.values().filter(|op| {
            (op.part, op.device, op.slice) == (Part::Secondary, device, slice)
                && op.kind.stores()
                && (op.local != Local::Idle || op.staged.is_some())
        });
        stores.fold(0, |regions, op| regions | touched(op.offset, op.length, self.region_bytes()))
    }

    /// What was asked for was read into the operation's buffer.
    pub(super) fn read_done(&mut self, key: OpKey) {
        let op = &self.ops[key];
        match (op.kind, op.buffer) {
            (OpKind::Copy, _) => self.copy_piece_read(key),
            (OpKind::Compare { .. }, Some(buffer)) if op.doomed.is_none() => {
                self.ops[key].local = Local::Data { ios: 1 };
                self.actions.push_back(super::action::Action::Digest { op: key, buffer });
            }
            _ => self.progress(key),
        }
    }

    /// The digests of the small blocks of what an operation asked for.
    pub fn handle_digests(&mut self, now: super::Nanos, key: OpKey, fine: Vec<Digest>) {
        self.now = now;
        if self.survey_digested(key, &fine) {
            return self.settle();
        }
        match self.ops.get(key).map(|op| op.kind) {
            Some(OpKind::Copy) => self.copy_digested(key, fine),
            Some(OpKind::Compare { fine: wants_fine }) => {
                let digests = if wants_fine { fine } else { digest::coarse(&fine) };
                let op = &mut self.ops[key];
                op.reply = digests.as_flattened().to_vec();
                op.local = Local::Done;
                self.progress(key);
            }
            _ => {}
        }
        self.settle();
    }
}
