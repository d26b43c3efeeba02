//! The exporter's side: a request is cut into parts, each goes to the primary of its slice.
//!
//! A part that cannot go anywhere is held, and looked at again whenever a map, a session or the
//! peer's adopted version changes. A part that was sent and not answered is sent again under the
//! same identity: the write is the same, and the range lock of whoever is primary orders it.

use super::action::{
    Action, Body, BufferId, BufferRange, FlushKey, Request, RequestError, RequestKind, RequestToken,
};
use super::flush::Flush;
use super::op::{Op, OpKind, Origin};
use super::session::SILENCE;
use super::view::{PeerIndex, Place};
use super::window::Awaited;
use super::{Device, Engine, Nanos};
use crate::ids::{ClaimGeneration, LossGeneration};
use crate::planted::{self, Bug};
use crate::region::masks::covered;
use crate::wire::header::{FLAG_FUA, Header, Kind, PIECE_BYTES_MAX, Status, Trailer};

slotmap::new_key_type! {
    /// A request of a frontend.
    pub(super) struct RequestKey;
    /// A piece of one.
    pub(super) struct PartKey;
    /// A request to flush a whole device.
    pub(super) struct ExportFlushKey;
}

/// A request that has not completed.
#[derive(Debug)]
pub(super) struct Pending {
    pub token: RequestToken,
    pub device: usize,
    asked: Nanos,
    remaining: u32,
    error: Option<RequestError>,
    /// What was done of it so far may be lost: the flush after it has to say so, whatever one before it said.
    lossy: bool,
    /// It changes what is stored.
    stores: bool,
}

/// A piece within one slice.
#[derive(Debug)]
pub(super) struct RequestPart {
    request: RequestKey,
    device: usize,
    slice: u32,
    offset: u32,
    length: u32,
    kind: OpKind,
    buffer: Option<BufferRange>,
    /// The claim under which the request came: under a later one it is never sent (docs/protocol.md rule 15).
    claim: ClaimGeneration,
    /// The exporter's number for it, the same however often it is sent.
    sequence: u64,
    /// Counts how often it was sent: answers to earlier ones mean nothing any more.
    attempt: u32,
    place: PartPlace,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PartPlace {
    Held,
    Here,
    Forwarded(PeerIndex),
}

/// A write that was sent to a node which is not its primary any more.
#[derive(Debug)]
pub(super) struct Recalled {
    part: PartKey,
    attempt: u32,
    peer: PeerIndex,
    /// Until when its answer is waited for.
    patience: Nanos,
}

/// A flush of a device on its way to every primary.
#[derive(Debug)]
pub(super) struct ExportFlush {
    request: RequestKey,
    pub device: usize,
    claim: ClaimGeneration,
    /// It covers what was acknowledged up to here.
    since: u64,
    /// Some of what it covers may be lost: it fails.
    lossy: bool,
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Target {
    place: Place,
    state: TargetState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TargetState {
    Waiting,
    Asked(Option<FlushKey>),
    Done,
}

impl Engine {
    /// Takes a request; it is answered by [`Action::Complete`].
    pub fn handle_request(&mut self, now: Nanos, request: &Request) {
        self.now = now;
        match self.begin(request) {
            Ok(()) => self.settle(),
            Err(error) => {
                self.actions.push_back(Action::Complete { token: request.token, result: Err(error) })
            }
        }
    }

    fn begin(&mut self, request: &Request) -> Result<(), RequestError> {
        let device = *self.by_device.get(&request.device).ok_or(RequestError::Invalid)?;
        let view = &self.devices[device].view;
        if view.claim.node != self.me {
            return Err(RequestError::ClaimLost);
        }
        let block = u64::from(view.block_bytes);
        let end = request.offset.checked_add(u64::from(request.length)).ok_or(RequestError::Invalid)?;
        if end > u64::from(view.slices) * u64::from(self.slice_bytes)
            || !request.offset.is_multiple_of(block)
            || !u64::from(request.length).is_multiple_of(block)
        {
            return Err(RequestError::Invalid);
        }
        let stores = !matches!(request.kind, RequestKind::Read | RequestKind::Flush);
        let pending = Pending {
            token: request.token,
            device,
            asked: self.now,
            remaining: 0,
            error: None,
            lossy: false,
            stores,
        };
        let key = self.requests.insert(pending);
        if request.kind == RequestKind::Flush {
            let lossy = self.devices[device].unflushed.is_owed();
            self.start_export_flush(key, device, lossy);
        } else {
            self.cut(key, device, request);
        }
        self.complete_if_done(key);
        Ok(())
    }

    fn cut(&mut self, key: RequestKey, device: usize, request: &Request) {
        let slice_bytes = u64::from(self.slice_bytes);
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { fua } => OpKind::Write { fua },
            RequestKind::WriteZeroes { fua } => OpKind::Zero { fua },
            RequestKind::Discard => OpKind::Discard,
            RequestKind::Flush => return,
        };
        // Only bodies are bounded by the wire; the rest goes in whole slices.
        let longest = if request.buffer.is_some() { PIECE_BYTES_MAX } else { self.slice_bytes };
        let claim = self.devices[device].view.claim.generation;
        let mut done = 0;
        // Counted first, so that a part that completes at once does not complete the request.
        self.requests[key].remaining += 1;
        while done < request.length {
            let at = request.offset + u64::from(done);
            let offset = (at % slice_bytes) as u32;
            let length = (request.length - done).min(longest).min(self.slice_bytes - offset);
            let ignored = kind == OpKind::Discard && covered(offset, length, self.region_bytes()) == 0;
            if !ignored {
                self.exporter_sequence += 1;
                let part = self.parts.insert(RequestPart {
                    request: key,
                    device,
                    slice: (at / slice_bytes) as u32,
                    offset,
                    length,
                    kind,
                    buffer: request.buffer.map(|buffer| buffer.slice(done, length)),
                    claim,
                    sequence: self.exporter_sequence,
                    attempt: 0,
                    place: PartPlace::Held,
                });
                self.requests[key].remaining += 1;
                self.route(part);
            }
            done += length;
        }
        self.requests[key].remaining -= 1;
    }

    /// Sends a part to where it belongs now, or holds it.
    fn route(&mut self, key: PartKey) {
        let part = &self.parts[key];
        let view = &self.devices[part.device].view;
        if view.claim.generation != part.claim && !planted::is(Bug::QueuedSent) {
            let loss = self.loss_of(self.parts[key].device, self.parts[key].slice);
            self.part_done(key, Status::ClaimLost, loss);
            return;
        }
        let span = view.span(part.slice);
        let (primary, serves, fence) = (span.primary, span.serves(), view.fence(span));
        let place = match primary {
            Place::Here if serves => PartPlace::Here,
            Place::Peer(peer) if self.peers[peer].adopted() >= fence && self.forward(key, peer) => {
                PartPlace::Forwarded(peer)
            }
            Place::Here | Place::Peer(_) => {
                self.held.push(key);
                PartPlace::Held
            }
        };
        self.parts[key].place = place;
        if place == PartPlace::Here {
            self.run_here(key);
        }
    }

    fn run_here(&mut self, key: PartKey) {
        let part = &self.parts[key];
        let view = &self.devices[part.device].view;
        let (epoch, claim) = (view.span(part.slice).epoch, view.claim.generation.0);
        let op = Op {
            kind: part.kind,
            slice: part.slice,
            offset: part.offset,
            length: part.length,
            buffer: part.buffer,
            claim,
            ..Op::primary(Origin::Part(key), part.device, epoch)
        };
        self.enqueue(op);
    }

    fn forward(&mut self, key: PartKey, peer: PeerIndex) -> bool {
        let part = &self.parts[key];
        let view = &self.devices[part.device].view;
        let span = view.span(part.slice);
        let (kind, flags) = match part.kind {
            OpKind::Read => (Kind::ForwardRead, 0),
            OpKind::Write { fua } => (Kind::ForwardWrite, u8::from(fua) * FLAG_FUA),
            OpKind::Zero { fua } => (Kind::ForwardZero, u8::from(fua) * FLAG_FUA),
            OpKind::Discard => (Kind::ForwardDiscard, 0),
            // Nothing else is ever a piece of a request.
            _ => return false,
        };
        let body = match part.buffer {
            Some(buffer) if matches!(part.kind, OpKind::Write { .. }) => Body::Buffer(buffer),
            _ => Body::None,
        };
        let header = Header {
            flags,
            slice_epoch: span.epoch,
            device: view.id.0,
            slice: part.slice,
            offset: part.offset,
            length: part.length,
            loss: span.loss,
            ..Header::new(kind)
        };
        let trailer = self.trailer(view.claim.generation.0, part.sequence);
        let attempt = part.attempt + 1;
        let sent = self.send_awaited(peer, header, Some(trailer), body, Awaited::Part(key, attempt));
        if sent {
            self.parts[key].attempt = attempt;
        }
        sent
    }

    fn trailer(&self, claim: u64, sequence: u64) -> Trailer {
        Trailer {
            claim,
            exporter_session: self.exporter_session.0,
            exporter_sequence: sequence,
            origin: self.me.0,
        }
    }

    /// The session ended on which a part was sent: it looks for its primary again, unless it went
    /// elsewhere already.
    pub(super) fn part_unanswered(&mut self, key: PartKey, attempt: u32, peer: PeerIndex) {
        if self.is_current(key, attempt, peer) {
            self.hold_part(key);
        }
    }

    fn is_current(&self, key: PartKey, attempt: u32, peer: PeerIndex) -> bool {
        self.parts
            .get(key)
            .is_some_and(|part| part.place == PartPlace::Forwarded(peer) && part.attempt == attempt)
    }

    /// A part has to look for its primary again.
    fn hold_part(&mut self, key: PartKey) {
        if let Some(part) = self.parts.get_mut(key) {
            part.place = PartPlace::Held;
            self.held.push(key);
        }
    }

    /// Looks at every held part again.
    pub(super) fn route_held(&mut self) {
        for key in std::mem::take(&mut self.held) {
            if self.parts.get(key).is_some_and(|part| part.place == PartPlace::Held) {
                self.route(key);
            }
        }
    }

    /// After a new map: parts that went to a node that is no longer their primary are sent again.
    ///
    /// A write's data may still be on its way out of the request's buffer, which the frontend gets
    /// back with the completion: a write goes elsewhere only when the old primary has answered (it
    /// learns of the same map), or the session with it is over.
    pub(super) fn reroute_forwarded(&mut self) {
        let mut moved = Vec::new();
        for (key, part) in &self.parts {
            let PartPlace::Forwarded(peer) = part.place else { continue };
            let view = &self.devices[part.device].view;
            if view.span(part.slice).primary == Place::Peer(peer) && view.claim.generation == part.claim {
                continue;
            }
            if !matches!(part.kind, OpKind::Write { .. }) {
                moved.push(key);
            } else if !self
                .recalled
                .iter()
                .any(|recalled| (recalled.part, recalled.attempt) == (key, part.attempt))
            {
                let patience = self.now + SILENCE;
                self.recalled.push(Recalled { part: key, attempt: part.attempt, peer, patience });
            }
        }
        for key in moved {
            self.hold_part(key);
        }
        self.route_held();
    }

    /// Time passed: a peer that does not answer for what moved away from it is given up.
    pub(super) fn tick_recalled(&mut self) {
        let mut recalled = std::mem::take(&mut self.recalled);
        recalled.retain(|recalled| self.is_current(recalled.part, recalled.attempt, recalled.peer));
        self.recalled = recalled;
        while let Some(late) = self.recalled.iter().find(|recalled| recalled.patience <= self.now) {
            let peer = late.peer;
            self.recalled.retain(|recalled| recalled.peer != peer);
            self.end_session(peer, "no answer to writes that it is no longer primary of".into(), true);
        }
    }

    /// The answer to a forwarded part.
    pub(super) fn on_part_reply(
        &mut self,
        peer: PeerIndex,
        key: PartKey,
        attempt: u32,
        header: &Header,
        body: Option<BufferId>,
    ) {
        if !self.is_current(key, attempt, peer) {
            return;
        }
        let part = &self.parts[key];
        let mut status = Status::parse(header.flags);
        if let (OpKind::Read, Status::Done, Some(to)) = (part.kind, status, part.buffer) {
            match body.filter(|_| header.body_bytes == part.length) {
                Some(buffer) => {
                    let from = BufferRange { buffer, offset: 0, length: part.length };
                    self.actions.push_back(Action::Copy { from, to });
                }
                None => status = Status::Invalid,
            }
        }
        if part.kind != OpKind::Read && header.loss < self.loss_of(part.device, part.slice) {
            // It was acknowledged, and then perhaps lost, before we heard of it: it is sent again.
            status = Status::Fenced;
        }
        self.part_done(key, status, header.loss);
    }

    /// A part has its answer, from here or from another node.
    pub(super) fn part_done(&mut self, key: PartKey, status: Status, loss: LossGeneration) {
        let error = match status {
            Status::Done => None,
            Status::Fenced => {
                self.hold_part(key);
                return;
            }
            Status::DiskFailed => Some(RequestError::Io),
            Status::Invalid => Some(RequestError::Invalid),
            Status::ClaimLost => Some(RequestError::ClaimLost),
            Status::NoQuorum => Some(RequestError::NoQuorum),
        };
        let Some(part) = self.parts.remove(key) else { return };
        if error.is_none() && matches!(part.kind, OpKind::Write { fua: false } | OpKind::Zero { fua: false })
        {
            self.devices[part.device].unflushed.note(part.slice, loss);
        }
        self.request_part_done(part.request, error);
    }

    fn request_part_done(&mut self, key: RequestKey, error: Option<RequestError>) {
        let Some(request) = self.requests.get_mut(key) else { return };
        request.remaining -= 1;
        request.error = request.error.or(error);
        self.complete_if_done(key);
    }

    fn complete_if_done(&mut self, key: RequestKey) {
        if self.requests.get(key).is_some_and(|request| request.remaining == 0)
            && let Some(request) = self.requests.remove(key)
        {
            if request.lossy && request.stores {
                self.devices[request.device].unflushed.owe();
            }
            let result = request.error.map_or(Ok(()), Err);
            self.actions.push_back(Action::Complete { token: request.token, result });
        }
    }

    // ---- flush ----

    fn start_export_flush(&mut self, request: RequestKey, device: usize, lossy: bool) {
        self.requests[request].remaining += 1;
        let claim = self.devices[device].view.claim.generation;
        let since = self.devices[device].unflushed.now();
        let targets = self.devices[device].view.primaries.iter();
        let targets = targets.map(|place| Target { place: *place, state: TargetState::Waiting }).collect();
        let key = self.export_flushes.insert(ExportFlush { request, device, claim, since, lossy, targets });
        self.ask_targets(key);
    }

    /// Asks those primaries that have not been asked and can be.
    fn ask_targets(&mut self, key: ExportFlushKey) {
        let count = self.export_flushes.get(key).map_or(0, |flush| flush.targets.len());
        for index in 0..count {
            let Some(flush) = self.export_flushes.get(key) else { return };
            if flush.targets[index].state != TargetState::Waiting {
                continue;
            }
            let device = flush.device;
            let view = &self.devices[device].view;
            let state = match flush.targets[index].place {
                Place::Here if !view.can_flush() => continue,
                // Finishing at once removes the flush; nothing is left to note then.
                Place::Here => TargetState::Asked(Some(self.start_flush_here(key, device))),
                Place::Peer(peer) => {
                    let fence = view.spans.iter().map(|span| view.fence(span)).max().unwrap_or_default();
                    let header = Header { device: view.id.0, ..Header::new(Kind::ForwardFlush) };
                    let claim = view.claim.generation.0;
                    self.exporter_sequence += 1;
                    let trailer = self.trailer(claim, self.exporter_sequence);
                    if self.peers[peer].adopted() < fence
                        || !self.send_awaited(
                            peer,
                            header,
                            Some(trailer),
                            Body::None,
                            Awaited::ExportFlush(key),
                        )
                    {
                        continue;
                    }
                    TargetState::Asked(None)
                }
            };
            if let Some(flush) = self.export_flushes.get_mut(key)
                && flush.targets[index].state == TargetState::Waiting
            {
                flush.targets[index].state = state;
            }
        }
    }

    /// Sessions or maps changed: asks again whoever could not be asked.
    pub(super) fn resume_export_flushes(&mut self) {
        let keys: Vec<ExportFlushKey> = self.export_flushes.keys().collect();
        for key in keys {
            self.ask_targets(key);
        }
    }

    /// The primaries of a device changed: its flushes begin anew, answers to the old ones are ignored.
    pub(super) fn restart_export_flushes(&mut self, device: usize) {
        let keys: Vec<ExportFlushKey> = self
            .export_flushes
            .iter()
            .filter(|(_, flush)| flush.device == device)
            .map(|(key, _)| key)
            .collect();
        for key in keys {
            let Some(flush) = self.export_flushes.remove(key) else { continue };
            if self.devices[device].view.claim.generation == flush.claim {
                self.start_export_flush(flush.request, device, flush.lossy);
                // The new flush counts anew.
                self.request_part_done(flush.request, None);
            } else {
                self.request_part_done(flush.request, Some(RequestError::ClaimLost));
            }
        }
    }

    pub(super) fn export_flush_unsent(&mut self, key: ExportFlushKey, peer: PeerIndex) {
        if let Some(flush) = self.export_flushes.get_mut(key) {
            for target in flush.targets.iter_mut().filter(|target| target.place == Place::Peer(peer)) {
                if target.state != TargetState::Done {
                    target.state = TargetState::Waiting;
                }
            }
        }
    }

    /// One primary has flushed, or could not.
    pub(super) fn export_flush_answer(&mut self, key: ExportFlushKey, place: Place, status: Status) {
        let Some(flush) = self.export_flushes.get_mut(key) else { return };
        let Some(target) = flush.targets.iter_mut().find(|target| target.place == place) else { return };
        let error = match status {
            Status::Done => None,
            // It is not what we took it for; the next map says who is.
            Status::Fenced => {
                target.state = TargetState::Waiting;
                return;
            }
            Status::ClaimLost => Some(RequestError::ClaimLost),
            Status::DiskFailed | Status::Invalid => Some(RequestError::Io),
            Status::NoQuorum => Some(RequestError::NoQuorum),
        };
        target.state = TargetState::Done;
        let finished =
            error.is_some() || flush.targets.iter().all(|target| target.state == TargetState::Done);
        if !finished {
            return;
        }
        let Some(flush) = self.export_flushes.remove(key) else { return };
        let unflushed = &mut self.devices[flush.device].unflushed;
        if error.is_none() {
            unflushed.flushed(flush.since);
        }
        if flush.lossy {
            unflushed.told(flush.since);
        }
        let lost = flush.lossy.then_some(RequestError::Io);
        self.request_part_done(flush.request, error.or(lost));
    }

    // ---- what cannot be served ----

    /// Parts that have nowhere to go now, of requests that were asked for too long ago; wherever they have been meanwhile.
    pub(super) fn overdue_parts(&self) -> impl Iterator<Item = PartKey> {
        let held = self.parts.iter().filter(|(_, part)| part.place == PartPlace::Held);
        held.filter(|(_, part)| self.is_late(part.request)).map(|(key, _)| key)
    }

    fn is_late(&self, request: RequestKey) -> bool {
        let request = self.requests.get(request);
        request.is_some_and(|request| self.is_overdue(request.device, request.asked))
    }

    /// Flushes that wait for a primary, or here for a copy, for too long.
    pub(super) fn overdue_export_flushes(&self) -> impl Iterator<Item = ExportFlushKey> {
        let waits = |target: &Target| match target.state {
            TargetState::Waiting => true,
            TargetState::Asked(Some(key)) => self.flushes.get(key).is_some_and(Flush::waits),
            // It gives up by itself.
            TargetState::Asked(None) | TargetState::Done => false,
        };
        let late = move |flush: &ExportFlush| self.is_late(flush.request) && flush.targets.iter().any(waits);
        self.export_flushes.iter().filter(move |(_, flush)| late(flush)).map(|(key, _)| key)
    }

    pub(super) fn give_up_part(&mut self, key: PartKey) {
        let Some(part) = self.parts.get(key) else { return };
        let loss = self.loss_of(part.device, part.slice);
        self.part_done(key, Status::NoQuorum, loss);
    }

    /// What comes of it elsewhere is heard by nobody.
    pub(super) fn give_up_export_flush(&mut self, key: ExportFlushKey) {
        let Some(flush) = self.export_flushes.remove(key) else { return };
        for target in &flush.targets {
            if let TargetState::Asked(Some(here)) = target.state {
                self.flushes.remove(here);
            }
        }
        self.request_part_done(flush.request, Some(RequestError::NoQuorum));
    }

    /// A new map: if acknowledged writes may be lost, every flush fails until its caller knows.
    /// Those that run begin anew with the map, and so cover everything acknowledged until now.
    pub(super) fn note_losses(&mut self, device: usize) {
        let sum = self.loss_sum(device);
        let Device { view, unflushed, .. } = &mut self.devices[device];
        if !unflushed.forget_lost(|slice| view.span(slice).loss, sum) || planted::is(Bug::LossUnreported) {
            return;
        }
        unflushed.owe();
        for flush in self.export_flushes.values_mut().filter(|flush| flush.device == device) {
            flush.lossy = true;
        }
        for request in self.requests.values_mut().filter(|request| request.device == device) {
            request.lossy = true;
        }
    }

    /// A device that outlived the process which exported it is served again; before any request. `told` is what
    /// [`Self::loss_told`] said in that process last.
    pub fn resume_export(&mut self, device: crate::ids::DeviceId, told: u64) {
        if let Some(index) = self.by_device.get(&device).copied() {
            self.devices[index].unflushed.inherit(told);
            self.note_losses(index);
        }
    }

    /// The sum of the generations of all slices of a device, as its users know of it; `None` while they have still to
    /// be told.
    pub fn loss_told(&self, device: crate::ids::DeviceId) -> Option<u64> {
        let index = *self.by_device.get(&device)?;
        (!self.devices[index].unflushed.is_owed()).then(|| self.loss_sum(index))
    }

    fn loss_sum(&self, device: usize) -> u64 {
        let spans = self.devices[device].view.spans.iter();
        spans.map(|span| u64::from(span.loss.0) * u64::from(span.end - span.first)).sum()
    }

    /// Requests of a device that have not completed.
    pub fn pending_requests(&self, device: crate::ids::DeviceId) -> usize {
        let Some(index) = self.by_device.get(&device) else { return 0 };
        self.requests.values().filter(|request| request.device == *index).count()
    }

    /// What is held, and for which node, for people: (device index, slice, primary).
    pub(super) fn held_parts(&self) -> impl Iterator<Item = (usize, u32, Place)> {
        self.parts.values().filter(|part| part.place == PartPlace::Held).map(|part| {
            let primary = self.devices[part.device].view.span(part.slice).primary;
            (part.device, part.slice, primary)
        })
    }

    pub(super) fn loss_of(&self, device: usize, slice: u32) -> LossGeneration {
        self.devices[device].view.span(slice).loss
    }
}
