//! An operation's way: range lock, the legs to the other copies, the end.

use super::action::{Action, Body, OpKey};
use super::local::LocalStart;
use super::op::{LegState, Legs, Local, Op, OpKind, Origin, Part, Sender};
use super::repair::Repair;
use super::view::{PeerIndex, SpanView};
use super::window::Awaited;
use super::{Engine, Nanos};
use crate::ids::{ExporterSession, SliceEpoch};
use crate::planted::{self, Bug};
use crate::region::masks::{covered, touched};
use crate::wire::header::{BadFrame, FLAG_FUA, Header, Kind, Status, Trailer};

use super::action::{BufferId, BufferRange, Report};

impl Op {
    /// A primary's operation with nothing done; the rest is filled in by the caller.
    pub(super) fn primary(origin: Origin, device: usize, epoch: SliceEpoch) -> Self {
        Self {
            origin,
            part: Part::Primary,
            kind: OpKind::Read,
            device,
            slice: 0,
            offset: 0,
            length: 0,
            epoch,
            since: 0,
            claim: 0,
            buffer: None,
            owns_buffer: false,
            disk: 0,
            slot: 0,
            local: Local::Idle,
            legs: Legs::NONE,
            holds: false,
            failed: false,
            doomed: None,
            asked: 0,
            staged: None,
            reply: Vec::new(),
            sources: Vec::new(),
            reader: None,
        }
    }
}

impl Engine {
    /// A new operation asks for its range; `None` if it was answered at once: there is no copy here to run it on, or
    /// it took a staged one's place.
    pub(super) fn enqueue(&mut self, mut op: Op) -> Option<OpKey> {
        let slice = &mut self.devices[op.device].slices[op.slice as usize];
        let Some((disk, slot)) = slice.place else {
            // The map gives us a copy that no slot holds: adoption would have assigned one.
            self.refuse(op, Status::Fenced);
            return None;
        };
        if op.part == Part::Secondary && self.supersede(&op) {
            return None;
        }
        self.begin_serving(&op);
        (op.disk, op.slot, op.since) = (disk, slot, self.now);
        if op.part == Part::Primary && !op.kind.is_upkeep() && op.origin != Origin::Survey {
            self.pacer.hosts_ask(self.now);
        }
        let mut range = op.offset..op.offset + op.length;
        if planted::is(Bug::ReadEarly) && op.kind == OpKind::Read
            || planted::is(Bug::CopyUnlocked) && op.kind == OpKind::Copy
        {
            range = 0..0;
        }
        let (device, slice, shared) = (op.device, op.slice as usize, op.kind.shares());
        let key = self.ops.insert(op);
        if self.devices[device].slices[slice].lock.acquire(key, range, shared) {
            self.ready.push_back(key);
        } else {
            self.store_slice(device, slice as u32);
        }
        Some(key)
    }

    /// A secondary's operations hold up the next session (rule 10). A primary's do not: one that has begun
    /// keeps its range until all copies have it, for which that very session may be needed.
    fn begin_serving(&mut self, op: &Op) {
        if let (Origin::Peer(sender), Part::Secondary) = (op.origin, op.part) {
            self.peers[sender.peer].serving += 1;
        }
    }

    /// Like [`Engine::enqueue`], but only if nobody uses the range.
    pub(super) fn enqueue_unless_busy(&mut self, mut op: Op) -> bool {
        let Some((disk, slot)) = self.devices[op.device].slices[op.slice as usize].place else {
            return false;
        };
        (op.disk, op.slot) = (disk, slot);
        let range = op.offset..op.offset + op.length;
        let (device, slice) = (op.device, op.slice as usize);
        let key = self.ops.insert(op);
        if !self.devices[device].slices[slice].lock.try_acquire(key, range, false) {
            self.ops.remove(key);
            return false;
        }
        self.ready.push_back(key);
        true
    }

    /// Answers an operation that does not begin.
    pub(super) fn refuse(&mut self, op: Op, status: Status) {
        self.begin_serving(&op);
        let key = self.ops.insert(op);
        self.finish(key, status);
    }

    /// Runs everything that became ready; every entry point of the engine ends here.
    pub(super) fn settle(&mut self) {
        loop {
            while let Some(key) = self.ready.pop_front() {
                if let Some(op) = self.ops.get_mut(key) {
                    op.holds = true;
                    self.start(key);
                }
            }
            if std::mem::take(&mut self.resync_due) {
                self.pump_resyncs();
            }
            if std::mem::take(&mut self.surveys.due) {
                self.pump_surveys();
            }
            let drained = self.drain_journals();
            let stored = self.staging.take_emptied();
            if self.adopting.is_some() && (stored || self.disks.iter().any(|disk| disk.failed)) {
                // A failed disk's tickets never become durable, and it holds up no adoption.
                self.adoption_durable();
            }
            if !drained && self.ready.is_empty() && !self.resync_due && !self.surveys.due {
                break;
            }
        }
        self.report_adoption_if_drained();
    }

    /// The operation holds its range, now or again.
    fn start(&mut self, key: OpKey) {
        let op = &self.ops[key];
        if let Some(status) = op.doomed {
            self.finish(key, status);
            return;
        }
        if op.part == Part::Secondary {
            self.start_secondary(key);
            return;
        }
        if self.now < self.serve_after {
            self.parked.push(key);
            return;
        }
        match op.kind {
            OpKind::Read => self.start_read(key),
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Discard => self.start_store(key),
            OpKind::Copy => self.start_copy_op(key),
            OpKind::Repair => self.start_repair(key),
            OpKind::Clear { .. } => self.start_clear(key),
            OpKind::Unite { .. } | OpKind::Compare { .. } => {}
        }
    }

    fn start_store(&mut self, key: OpKey) {
        if self.prepare_local(key) == LocalStart::WaitForRange {
            return;
        }
        let op = &self.ops[key];
        let span = self.devices[op.device].view.span(op.slice);
        let legs = Legs::new(&span.others, &span.members, &op.legs);
        self.ops[key].legs = legs;
        // The partner's way is the longer one: it goes first.
        self.send_legs(key);
        self.start_local(key);
        self.progress(key);
    }

    /// Whether every copy that counts lets this node read (rule 12).
    pub(super) fn may_read(&self, op: &Op) -> bool {
        self.holds_leases(op.device, self.devices[op.device].view.span(op.slice))
    }

    /// Whether every copy of the span that counts lets this node read.
    pub(super) fn holds_leases(&self, device: usize, span: &SpanView) -> bool {
        span.others.iter().all(|peer| {
            self.peers[*peer].leases_until(span.epoch) > self.now
                || !self.counts(device, span, *peer)
                || planted::is(Bug::LeaseIgnored)
        })
    }

    fn start_read(&mut self, key: OpKey) {
        let op = &self.ops[key];
        if !self.may_read(op) {
            self.parked.push(key);
            return;
        }
        let regions = touched(op.offset, op.length, self.region_bytes());
        let unreconciled = self.unreconciled(op.device, op.slice) & regions;
        if op.local == Local::Idle && unreconciled != 0 && !planted::is(Bug::UnreconciledRead) {
            self.await_reconciled(key, unreconciled);
            return;
        }
        if op.local == Local::Idle {
            if self.may_move_op(op) {
                self.ops[key].local = Local::Failed;
            } else {
                self.read_local(key);
            }
        }
        self.progress(key);
    }

    /// Leases or waits may have changed: parked operations try again.
    pub(super) fn retry_parked(&mut self) {
        for key in std::mem::take(&mut self.parked) {
            if self.ops.contains_key(key) {
                self.ready.push_back(key);
            }
        }
    }

    /// Sends every leg that is unsent and can be. A syncing copy that cannot be reached is not waited
    /// for: what it misses is noted at the end (rule 1).
    pub(super) fn send_legs(&mut self, key: OpKey) {
        for index in 0..self.ops[key].legs.len() {
            let op = &self.ops[key];
            let leg = op.legs.get(index);
            let peer = &self.peers[leg.peer];
            // A peer that may have missed writes gets no more: it is recorded stale first.
            let able = peer.is_open() && peer.lost.is_none() && peer.adopted().0 >= op.epoch.0;
            if leg.state != LegState::Unsent {
                continue;
            }
            if !able {
                if !self.counts(op.device, self.devices[op.device].view.span(op.slice), leg.peer)
                    || planted::is(Bug::WentAlone)
                {
                    self.ops[key].legs.set(index, LegState::Gone);
                }
                continue;
            }
            let (kind, flags) = match op.kind {
                OpKind::Write { fua } => (Kind::Write, u8::from(fua) * FLAG_FUA),
                OpKind::Zero { fua } => (Kind::Zero, u8::from(fua) * FLAG_FUA),
                OpKind::Discard => (Kind::Discard, 0),
                OpKind::Clear { .. } => (Kind::Clear, 0),
                OpKind::Read
                | OpKind::Copy
                | OpKind::Repair
                | OpKind::Unite { .. }
                | OpKind::Compare { .. } => continue,
            };
            let header = Header {
                flags,
                slice_epoch: op.epoch,
                device: self.devices[op.device].view.id.0,
                slice: op.slice,
                offset: op.offset,
                length: op.length,
                loss: self.loss_of(op.device, op.slice),
                ..Header::new(kind)
            };
            let body = match (op.kind, op.buffer) {
                (OpKind::Write { .. }, Some(buffer)) => Body::Buffer(buffer),
                (OpKind::Clear { readable }, _) => Body::Bytes(readable.to_le_bytes().to_vec()),
                _ => Body::None,
            };
            if self.send_awaited(leg.peer, header, None, body, Awaited::Leg(key)) {
                self.ops[key].legs.set(index, LegState::Sent);
            }
        }
    }

    /// A secondary has it, or refused it.
    pub(super) fn on_leg_ack(&mut self, peer: PeerIndex, key: OpKey, header: &Header) {
        let status = Status::parse(header.flags);
        self.leg_ended(peer, key, status == Status::Done);
        match status {
            Status::Done => {}
            // It knows another map. If we do too by now, the leg goes again under that epoch; if not,
            // the next map that we adopt decides.
            Status::Fenced => {
                let moved_on = |op: &Op| op.doomed.is_none() && op.epoch != header.slice_epoch;
                if self.ops.get(key).is_some_and(moved_on) {
                    self.send_legs(key);
                }
            }
            Status::DiskFailed => self.lose(peer, "its disk failed a write".into()),
            status @ (Status::Invalid | Status::ClaimLost | Status::NoQuorum) => {
                self.end_session(peer, format!("a write was refused as {status:?}"), true);
            }
        }
    }

    /// A leg's message was answered, or will never be.
    pub(super) fn leg_ended(&mut self, peer: PeerIndex, key: OpKey, done: bool) {
        let Some(op) = self.ops.get_mut(key) else { return };
        let Some(index) = op.legs.position(peer) else { return };
        let counted = self.devices[op.device].view.span(op.slice).others.contains(&peer);
        let state = match op.legs.get(index).state {
            LegState::Sent if done => LegState::Acknowledged,
            LegState::Sent => LegState::Unsent,
            LegState::Leaving if counted => LegState::Unsent,
            LegState::Leaving => LegState::Gone,
            other => other,
        };
        let came_back = op.legs.get(index).state == LegState::Leaving && state == LegState::Unsent;
        let lost = state == LegState::Unsent && !self.peers[peer].is_open();
        op.legs.set(index, state);
        if (came_back || lost) && op.doomed.is_none() {
            self.send_legs(key);
        }
        self.progress(key);
    }

    /// Ends the operation if nothing is left to wait for.
    pub(super) fn progress(&mut self, key: OpKey) {
        let Some(op) = self.ops.get(key) else { return };
        if let Some(status) = op.doomed {
            if op.is_quiet() {
                let status = self.doomed_end(op, status);
                self.finish(key, status);
            }
            return;
        }
        let early = planted::is(Bug::AckedEarly) && op.kind.stores();
        if (op.legs.in_flight() && !early) || op.asked > 0 {
            return;
        }
        match (op.kind, op.local) {
            (OpKind::Copy, _) => self.copy_progress(key),
            // Nobody knows what a failed disk still has: with another copy the role moves there.
            (OpKind::Read, Local::Done | Local::Failed) if self.may_move_op(op) => {}
            (OpKind::Read, Local::Done) => {
                // A read takes time: it counts only if it was still ours to do at its end (rule 12).
                if op.part == Part::Secondary || self.may_read(op) {
                    self.finish(key, Status::Done);
                } else {
                    self.parked.push(key);
                }
            }
            (_, Local::Done) if op.legs.all_acknowledged() || early => self.finish(key, Status::Done),
            (OpKind::Read, Local::Failed) if op.part == Part::Primary => match self.repair_for(key) {
                Repair::Begun => {}
                Repair::Later => self.parked.push(key),
                Repair::No => self.finish(key, Status::DiskFailed),
            },
            (_, Local::Failed) if op.part == Part::Secondary || !self.may_move_op(op) => {
                self.finish(key, Status::DiskFailed);
            }
            _ => {}
        }
    }

    /// With another copy the manager moves the primary role away from a failed disk, and the part follows.
    pub(super) fn may_move_op(&self, op: &Op) -> bool {
        op.part == Part::Primary
            && self.disks[op.disk].failed
            && !self.devices[op.device].view.span(op.slice).others.is_empty()
    }

    /// The operation may not go on: answered with `status` once its disk and its messages are.
    pub(super) fn doom(&mut self, key: OpKey, status: Status) {
        let Some(op) = self.ops.get_mut(key) else { return };
        if op.staged.is_some() && !planted::is(Bug::StagedDropped) {
            // It was acknowledged: nothing ends it but being stored.
            return self.store(key);
        }
        op.doomed.get_or_insert(status);
        if op.is_quiet() || planted::is(Bug::Undrained) {
            self.finish(key, status);
        }
    }

    /// Answers and forgets the operation, and lets those behind it go on.
    pub(super) fn finish(&mut self, key: OpKey, status: Status) {
        let Some(op) = self.ops.remove(key) else { return };
        self.note_missed(&op);
        match op.kind {
            OpKind::Copy => self.end_copy(key, &op, status),
            OpKind::Clear { .. } => self.end_clear(&op, status),
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Discard => self.touch(&op),
            OpKind::Repair => self.end_repair(&op, status),
            OpKind::Read | OpKind::Unite { .. } | OpKind::Compare { .. } => {}
        }
        // What is refused may be of a device that this node has no part in.
        if let Some(slice) = self.devices[op.device].slices.get_mut(op.slice as usize) {
            slice.lock.release(key);
            while let Some(next) = slice.lock.pop_ready() {
                self.ready.push_back(next);
            }
        }
        match op.origin {
            Origin::Part(part) => {
                let loss = self.loss_of(op.device, op.slice);
                self.part_done(part, status, loss);
            }
            Origin::Peer(sender) => {
                let holds_up = op.part == Part::Secondary;
                if op.staged.is_some() {
                    self.staged_ended(&op);
                    self.release(op.buffer.map(|buffer| buffer.buffer));
                } else {
                    self.answer_peer(op, sender, status);
                }
                if holds_up {
                    self.served(sender.peer);
                }
            }
            Origin::Survey => self.survey_read(key, &op, status),
            Origin::Upkeep => {
                if let Some(buffer) = op.buffer.filter(|_| op.owns_buffer) {
                    self.release(Some(buffer.buffer));
                }
            }
        }
    }

    /// Answers a secondary's write that goes on.
    pub(super) fn acknowledge(&mut self, key: OpKey) {
        let op = &self.ops[key];
        if let Origin::Peer(sender) = op.origin {
            let header = self.answer_header(op, Status::Done);
            self.answer(sender, header, Body::None);
        }
    }

    pub(super) fn answer_header(&self, op: &Op, status: Status) -> Header {
        let kind = match (op.part, op.kind) {
            (Part::Primary, _) => Kind::Reply,
            (Part::Secondary, OpKind::Unite { .. }) => Kind::Masks,
            (Part::Secondary, OpKind::Compare { .. }) => Kind::Digests,
            (Part::Secondary, _) => Kind::Ack,
        };
        Header {
            flags: status as u8,
            slice_epoch: op.epoch,
            device: self.devices[op.device].view.id.0,
            slice: op.slice,
            loss: self.loss_of(op.device, op.slice),
            ..Header::new(kind)
        }
    }

    fn answer_peer(&mut self, op: Op, sender: Sender, status: Status) {
        let mut header = self.answer_header(&op, status);
        let body = match op.buffer.filter(|_| op.owns_buffer) {
            Some(buffer) if op.kind == OpKind::Read && status == Status::Done => {
                header.length = op.length;
                header.body_bytes = op.length;
                Body::Release(buffer)
            }
            buffer => {
                self.release(buffer.map(|buffer| buffer.buffer));
                match op.reply.is_empty() || status != Status::Done {
                    true => Body::None,
                    false => Body::Bytes(op.reply),
                }
            }
        };
        self.answer(sender, header, body);
    }

    // ---- messages that make operations ----

    /// A frame from that node. Its body, or the empty buffer for a forwarded read's data, is the
    /// engine's until it releases it.
    pub fn handle_frame(
        &mut self,
        now: Nanos,
        node: crate::ids::NodeId,
        header: &Header,
        trailer: Option<Trailer>,
        small_body: &[u8],
        buffer: Option<BufferId>,
    ) {
        self.now = now;
        let Some(peer) = self.peer_index(node) else {
            self.release(buffer);
            return;
        };
        if let Err(error) = self.on_frame(peer, header, trailer, small_body, buffer) {
            self.release(buffer);
            // A frame of a session that is over was on its way when it ended: nothing to end now.
            if self.peers[peer].session_id() == Some(header.session) {
                self.end_session(peer, format!("protocol error: {error}"), true);
            }
        }
        self.settle();
    }

    fn on_frame(
        &mut self,
        peer: PeerIndex,
        header: &Header,
        trailer: Option<Trailer>,
        small_body: &[u8],
        buffer: Option<BufferId>,
    ) -> Result<(), BadFrame> {
        self.heard(peer, header)?;
        let session = header.session;
        let sender = Sender { peer, session, sequence: header.sequence };
        match header.kind {
            Kind::Open => self.on_open(peer, small_body)?,
            Kind::Adopted => self.on_adopted(peer, crate::ids::MapVersion(header.slice_epoch.0)),
            Kind::Attached => self.on_attached(peer, small_body)?,
            Kind::Ping => self.on_ping(peer, header),
            Kind::Pong => self.on_pong(peer, header),
            Kind::Write
            | Kind::Zero
            | Kind::Discard
            | Kind::Unite
            | Kind::Compare
            | Kind::Clear
            | Kind::Fetch => return self.on_replicate(sender, header, small_body, buffer),
            Kind::Flush => self.flush_for_primary(sender, header)?,
            Kind::Ack | Kind::Masks | Kind::Digests | Kind::Reply => {
                return self.on_answer(peer, header, small_body, buffer);
            }
            Kind::ForwardFlush => {
                let trailer = trailer.ok_or(BadFrame::Content("forwarded without a trailer"))?;
                self.flush_for_exporter(sender, header, &trailer)?;
            }
            Kind::ForwardRead | Kind::ForwardWrite | Kind::ForwardZero | Kind::ForwardDiscard => {
                let trailer = trailer.ok_or(BadFrame::Content("forwarded without a trailer"))?;
                return self.on_forwarded(sender, header, &trailer, buffer);
            }
        }
        self.release(buffer);
        self.resume_starved(peer);
        Ok(())
    }

    fn on_answer(
        &mut self,
        peer: PeerIndex,
        header: &Header,
        body: &[u8],
        mut buffer: Option<BufferId>,
    ) -> Result<(), BadFrame> {
        match self.take_answered(peer, header, body)? {
            Awaited::Leg(key) => self.on_leg_ack(peer, key, header),
            Awaited::FlushLeg(key) => self.on_flush_ack(peer, key, header),
            Awaited::Copy(key, message) => self.on_copy_answer(key, message, Some((header, body))),
            Awaited::Unite(exchange) => self.on_masks(peer, exchange, Some((header, body))),
            Awaited::Part(key, attempt) => self.on_part_reply(peer, key, attempt, header, buffer),
            Awaited::ExportFlush(key) => self.on_export_flush_reply(peer, key, header),
            // It keeps the data.
            Awaited::Fetch(key) => self.on_fetched(key, Some(header), buffer.take()),
        }
        self.release(buffer);
        self.resume_starved(peer);
        Ok(())
    }

    pub(super) fn operation(&self, header: &Header) -> Result<(usize, OpKind), BadFrame> {
        let device = *self
            .by_device
            .get(&crate::ids::DeviceId(header.device))
            .ok_or(BadFrame::Content("a device that is not in the map"))?;
        let end = header.offset.checked_add(header.length);
        let view = &self.devices[device].view;
        let aligned = (header.offset | header.length).is_multiple_of(view.block_bytes);
        if header.slice >= view.slices
            || header.length == 0
            || end.is_none_or(|end| end > self.slice_bytes)
            || !aligned
        {
            return Err(BadFrame::Content("a range outside of the slice"));
        }
        let fua = header.flags & FLAG_FUA != 0;
        let kind = match header.kind {
            Kind::Write | Kind::ForwardWrite => OpKind::Write { fua },
            Kind::Zero | Kind::ForwardZero => OpKind::Zero { fua },
            Kind::Discard | Kind::ForwardDiscard => OpKind::Discard,
            // Reads, and whatever else names a range.
            _ => OpKind::Read,
        };
        if kind == OpKind::Discard && covered(header.offset, header.length, self.region_bytes()) == 0 {
            return Err(BadFrame::Content("a discard of no whole region"));
        }
        Ok((device, kind))
    }

    /// From an exporter: run it here as primary.
    fn on_forwarded(
        &mut self,
        sender: Sender,
        header: &Header,
        trailer: &Trailer,
        buffer: Option<BufferId>,
    ) -> Result<(), BadFrame> {
        let (device, kind) = self.operation(header)?;
        let data = if kind == OpKind::Read { header.length } else { header.body_bytes.saturating_sub(32) };
        let buffer = data_buffer(header, kind, buffer, data)?;
        let status = self.judge_exporter(sender, device, trailer);
        let span = self.devices[device].view.span(header.slice);
        let op = Op {
            kind,
            slice: header.slice,
            offset: header.offset,
            length: header.length,
            buffer,
            owns_buffer: buffer.is_some(),
            claim: trailer.claim,
            ..Op::primary(Origin::Peer(sender), device, header.slice_epoch)
        };
        let status = match status {
            Status::Done if span.epoch != header.slice_epoch || !span.serves() => Status::Fenced,
            status => status,
        };
        if status != Status::Done {
            self.refuse(op, status);
            return Ok(());
        }
        self.enqueue(op);
        Ok(())
    }

    /// Rule 14: an older claim or exporter session is refused; what we do not know yet has to wait.
    pub(super) fn judge_exporter(&mut self, sender: Sender, device: usize, trailer: &Trailer) -> Status {
        let claim = self.devices[device].view.claim;
        if trailer.claim < claim.generation.0 && planted::is(Bug::OldClaim) {
            return Status::Done;
        }
        if trailer.claim < claim.generation.0 {
            return Status::ClaimLost;
        }
        if trailer.claim > claim.generation.0 || claim.node != self.peers[sender.peer].node {
            return Status::Fenced;
        }
        let newest = &mut self.devices[device].exporter_session;
        if trailer.exporter_session < newest.0 && !planted::is(Bug::OldExporter) {
            return Status::ClaimLost;
        }
        // The sessions of the process before ended with their lanes, and this one opened only after
        // their operations had come to their end.
        *newest = ExporterSession(trailer.exporter_session);
        Status::Done
    }

    /// A disk does not take writes any more.
    pub(super) fn fail_disk(&mut self, disk: super::action::DiskIndex, reason: &str) {
        if std::mem::replace(&mut self.disks[disk].failed, true) {
            return;
        }
        let report = Report::DiskFailed { disk: self.disks[disk].id, reason: reason.to_owned() };
        self.actions.push_back(Action::Report(report));
    }
}

/// The part of a frame's buffer that holds data, `bytes` of it.
pub(super) fn data_buffer(
    header: &Header,
    kind: OpKind,
    buffer: Option<BufferId>,
    bytes: u32,
) -> Result<Option<BufferRange>, BadFrame> {
    if !matches!(kind, OpKind::Read | OpKind::Write { .. } | OpKind::Compare { .. }) {
        return match buffer {
            None => Ok(None),
            Some(_) => Err(BadFrame::Content("a body where none belongs")),
        };
    }
    let buffer = buffer.ok_or(BadFrame::Content("no body"))?;
    // What is asked for comes without a body, and has room for as much as the header says.
    let bytes = if header.kind.asks_for_data() { header.length } else { bytes };
    if bytes != header.length {
        return Err(BadFrame::Content("length and body differ"));
    }
    Ok(Some(BufferRange { buffer, offset: 0, length: header.length }))
}
