//! Flushes: one disk's, coalesced; one device's slices here with their secondaries.

use super::action::{Action, Body, DiskIndex, FlushKey, Io};
use super::exporter::ExportFlushKey;
use super::op::{FlushWaiter, LegState, Sender};
use super::view::{PeerIndex, Place};
use super::window::Awaited;
use super::{Engine, Nanos};
use crate::ids::{DeviceId, SliceEpoch};
use crate::planted::{self, Bug};
use crate::wire::header::{BadFrame, Header, Kind, Status, Trailer};

/// Flushes of one disk: at most one runs, whoever comes meanwhile shares the next.
#[derive(Default, Debug)]
pub(super) struct DiskFlusher {
    running: Vec<FlushWaiter>,
    next: Vec<FlushWaiter>,
}

/// Whom a flush answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FlushOrigin {
    /// A flush of a device that this node exports.
    Export(ExportFlushKey),
    /// An exporter on another node asks its primary.
    Exporter(Sender, u64),
    /// A primary asks its secondary.
    Primary(Sender),
    /// Dirty bits of what is idle are to be cleared.
    Clearing,
    /// A broadcast of the manager's.
    Survey,
    /// A copy becomes a member: only it flushes.
    Joining(PeerIndex),
}

/// A flush of one device's slices on this node and, as primary, on its secondaries.
#[derive(Debug)]
pub(super) struct Flush {
    pub origin: FlushOrigin,
    pub device: usize,
    pub since: Nanos,
    disks_pending: usize,
    legs: Vec<(PeerIndex, LegState)>,
    failed: bool,
}

impl Flush {
    /// Whether it waits for a copy that it could not ask, or for another copy to take over from a failed disk.
    pub fn waits(&self) -> bool {
        self.legs.iter().any(|(_, state)| *state == LegState::Unsent) || (self.failed && self.is_over())
    }

    /// Whether all have answered that were to.
    fn is_over(&self) -> bool {
        let ended = |state: &LegState| matches!(state, LegState::Acknowledged | LegState::Gone);
        self.disks_pending == 0 && self.legs.iter().all(|(_, state)| ended(state))
    }
}

impl Engine {
    /// Flushes that disk; a waiter that joins now is covered by a flush that begins later.
    pub(super) fn flush_disk(&mut self, disk: DiskIndex, waiter: FlushWaiter) {
        if self.disks[disk].failed {
            // A second flush may well succeed: it says nothing about what the first one lost.
            self.flush_waiter_done(waiter, false);
            return;
        }
        let flusher = &mut self.disks[disk].flusher;
        if flusher.running.is_empty() {
            flusher.running.push(waiter);
            self.actions.push_back(Action::Flush { io: Io::Flush(disk), disk });
        } else {
            flusher.next.push(waiter);
        }
    }

    pub(super) fn disk_flushed(&mut self, disk: DiskIndex, result: Result<(), String>) {
        if let Err(reason) = &result {
            // After a failed flush nobody knows what the disk holds.
            self.fail_disk(disk, &format!("flush: {reason}"));
        }
        let failed = self.disks[disk].failed;
        let flusher = &mut self.disks[disk].flusher;
        let mut done = std::mem::take(&mut flusher.running);
        if failed {
            done.append(&mut flusher.next);
        } else {
            flusher.running = std::mem::take(&mut flusher.next);
            if !flusher.running.is_empty() {
                self.actions.push_back(Action::Flush { io: Io::Flush(disk), disk });
            }
        }
        for waiter in done {
            self.flush_waiter_done(waiter, !failed);
        }
    }

    fn flush_waiter_done(&mut self, waiter: FlushWaiter, flushed: bool) {
        match waiter {
            FlushWaiter::Op(key) => self.zeroes_flushed(key, flushed),
            FlushWaiter::Flush(key) => {
                if let Some(flush) = self.flushes.get_mut(key) {
                    flush.disks_pending -= 1;
                    flush.failed |= !flushed;
                    self.flush_progress(key);
                }
            }
        }
    }

    /// Flushes what this node is primary of, for an export of its own.
    pub(super) fn start_flush_here(&mut self, export: ExportFlushKey, device: usize) -> FlushKey {
        self.start_flush(FlushOrigin::Export(export), device)
    }

    /// A primary wants its secondary's part of a device flushed.
    pub(super) fn flush_for_primary(&mut self, sender: Sender, header: &Header) -> Result<(), BadFrame> {
        let device = self.flush_device(header)?;
        self.peers[sender.peer].serving += 1;
        self.start_flush(FlushOrigin::Primary(sender), device);
        Ok(())
    }

    /// An exporter wants flushed what this node is primary of.
    pub(super) fn flush_for_exporter(
        &mut self,
        sender: Sender,
        header: &Header,
        trailer: &Trailer,
    ) -> Result<(), BadFrame> {
        let device = self.flush_device(header)?;
        let status = match self.judge_exporter(sender, device, trailer) {
            Status::Done if !self.devices[device].view.can_flush() => Status::Fenced,
            status => status,
        };
        if status == Status::Done {
            self.peers[sender.peer].serving += 1;
            self.start_flush(FlushOrigin::Exporter(sender, trailer.claim), device);
        } else {
            self.answer_flush(Kind::Reply, sender, device, status);
        }
        Ok(())
    }

    fn flush_device(&self, header: &Header) -> Result<usize, BadFrame> {
        let device = self.by_device.get(&DeviceId(header.device));
        device.copied().ok_or(BadFrame::Content("a device that is not in the map"))
    }

    /// Rule 7: what was copied must be on that copy's stable storage before it is a member.
    pub(super) fn flush_joining(&mut self, device: usize, peer: PeerIndex) {
        self.start_flush(FlushOrigin::Joining(peer), device);
    }

    pub(super) fn start_flush(&mut self, origin: FlushOrigin, device: usize) -> FlushKey {
        let view = &self.devices[device].view;
        let counts = |peer: &PeerIndex| self.counted_spans(device, *peer).next().is_some();
        let legs = match origin {
            FlushOrigin::Primary(_) => Vec::new(),
            FlushOrigin::Export(_) | FlushOrigin::Exporter(..) if planted::is(Bug::FlushLocal) => Vec::new(),
            FlushOrigin::Joining(peer) => vec![(peer, LegState::Unsent)],
            // Syncing copies are flushed before they become members.
            FlushOrigin::Export(_)
            | FlushOrigin::Exporter(..)
            | FlushOrigin::Clearing
            | FlushOrigin::Survey => {
                view.secondaries.iter().copied().filter(counts).map(|peer| (peer, LegState::Unsent)).collect()
            }
        };
        let disks = match origin {
            // Whatever may hold something of that primary's, under its map or ours; a copy that our map
            // calls stale is counted on by nobody, and its disk may be broken.
            FlushOrigin::Primary(_) => view.live_disks.clone(),
            FlushOrigin::Joining(_) => Vec::new(),
            _ => view.serving_disks.clone(),
        };
        // One more is pending until all have been asked, so that it cannot end before.
        let flush =
            Flush { origin, device, since: self.now, disks_pending: disks.len() + 1, legs, failed: false };
        let key = self.flushes.insert(flush);
        self.send_flush_legs(key);
        if matches!(origin, FlushOrigin::Primary(_)) {
            self.flush_staged(key, device, disks);
        } else {
            disks.into_iter().for_each(|disk| self.flush_disk(disk, FlushWaiter::Flush(key)));
        }
        if let Some(flush) = self.flushes.get_mut(key) {
            flush.disks_pending -= 1;
            self.flush_progress(key);
        }
        key
    }

    fn send_flush_legs(&mut self, key: FlushKey) {
        let count = self.flushes[key].legs.len();
        for index in 0..count {
            let flush = &self.flushes[key];
            let (peer, state) = flush.legs[index];
            if state != LegState::Unsent {
                continue;
            }
            let Some(epoch) = self.counted_epoch(flush.device, peer) else {
                // It was about to become a member, and will flush before it does: nobody waits for it.
                if !matches!(flush.origin, FlushOrigin::Joining(_)) {
                    self.flushes[key].legs[index].1 = LegState::Gone;
                }
                continue;
            };
            // As with a write: what the peer does not know yet it cannot flush.
            if self.peers[peer].lost.is_some() || self.peers[peer].adopted().0 < epoch.0 {
                continue;
            }
            let header = Header { device: self.devices[flush.device].view.id.0, ..Header::new(Kind::Flush) };
            if self.send_awaited(peer, header, None, Body::None, Awaited::FlushLeg(key)) {
                self.flushes[key].legs[index].1 = LegState::Sent;
            }
        }
    }

    /// The newest epoch under which that peer's copies of what this node serves of a device count; `None` if none does.
    fn counted_epoch(&self, device: usize, peer: PeerIndex) -> Option<SliceEpoch> {
        self.counted_spans(device, peer).map(|span| span.epoch).max()
    }

    /// Sessions changed: flushes that waited for one go on, or need not wait any more.
    pub(super) fn resume_flushes(&mut self) {
        if self.refitting {
            // A flush that began under a view before ends or begins anew first.
            return;
        }
        let keys: Vec<FlushKey> = self.flushes.keys().collect();
        for key in keys {
            // What one of them leads to may have ended another.
            if self.flushes.contains_key(key) {
                self.send_flush_legs(key);
                self.flush_progress(key);
            }
        }
        self.resume_export_flushes();
    }

    pub(super) fn flush_leg_unsent(&mut self, key: FlushKey, peer: PeerIndex) {
        if self.flushes.get(key).is_some_and(|flush| matches!(flush.origin, FlushOrigin::Joining(_))) {
            if let Some(flush) = self.flushes.remove(key) {
                self.joining_flushed(flush.device, peer, false);
            }
            return;
        }
        if let Some(flush) = self.flushes.get_mut(key) {
            for leg in flush.legs.iter_mut().filter(|leg| leg.0 == peer) {
                leg.1 = LegState::Unsent;
            }
        }
    }

    /// Nobody waits any more for the flushes of that session.
    pub(super) fn drop_flushes_of(&mut self, peer: PeerIndex, session: u64) {
        let theirs = |flush: &Flush| match flush.origin {
            FlushOrigin::Exporter(sender, _) | FlushOrigin::Primary(sender) => {
                sender.peer == peer && sender.session == session
            }
            FlushOrigin::Export(_)
            | FlushOrigin::Clearing
            | FlushOrigin::Survey
            | FlushOrigin::Joining(_) => false,
        };
        let before = self.flushes.len();
        self.flushes.retain(|_, flush| !theirs(flush));
        for _ in self.flushes.len()..before {
            self.served(peer);
        }
    }

    /// A secondary has flushed.
    pub(super) fn on_flush_ack(&mut self, peer: PeerIndex, key: FlushKey, header: &Header) {
        let Some(flush) = self.flushes.get_mut(key) else { return };
        if Status::parse(header.flags) == Status::Done {
            for leg in flush.legs.iter_mut().filter(|leg| leg.0 == peer) {
                leg.1 = LegState::Acknowledged;
            }
            self.flush_progress(key);
        } else {
            if matches!(flush.origin, FlushOrigin::Joining(_)) {
                self.flush_leg_unsent(key, peer);
            }
            self.lose(peer, "its disk failed a flush".into());
        }
    }

    fn flush_progress(&mut self, key: FlushKey) {
        let Some(flush) = self.flushes.get(key) else { return };
        if !flush.is_over() {
            return;
        }
        let waits = matches!(flush.origin, FlushOrigin::Export(_) | FlushOrigin::Exporter(..));
        if flush.failed && waits && self.may_move(flush.device) {
            // As with a write: the manager moves the primary role, and the flush begins anew.
            return;
        }
        let Some(flush) = self.flushes.remove(key) else { return };
        let status = if flush.failed { Status::DiskFailed } else { Status::Done };
        self.end_flush(&flush, status);
    }

    /// Whether another copy can take over what this node serves from a failed disk.
    pub(super) fn may_move(&self, device: usize) -> bool {
        self.devices[device].view.spans.iter().any(|span| {
            let failed = span.mine.is_some_and(|mine| self.disks[mine.disk].failed);
            span.serves() && failed && !span.others.is_empty()
        })
    }

    pub(super) fn end_flush(&mut self, flush: &Flush, status: Status) {
        match flush.origin {
            FlushOrigin::Export(export) => self.export_flush_answer(export, Place::Here, status),
            FlushOrigin::Exporter(sender, _) => {
                self.answer_flush(Kind::Reply, sender, flush.device, status);
                self.served(sender.peer);
            }
            FlushOrigin::Primary(sender) => {
                self.answer_flush(Kind::Ack, sender, flush.device, status);
                self.served(sender.peer);
            }
            FlushOrigin::Clearing => self.clearing_flushed(flush.device, status == Status::Done),
            FlushOrigin::Survey => self.survey_flushed(flush.device, status),
            FlushOrigin::Joining(peer) => {
                self.joining_flushed(flush.device, peer, status == Status::Done);
            }
        }
    }

    /// Answers carry the map version: an exporter with an older map first learns what is new in it. That is the version of a
    /// map that is still being adopted, too: what it takes from this node is not served here any more, and was not flushed.
    fn answer_flush(&mut self, kind: Kind, sender: Sender, device: usize, status: Status) {
        let header = Header {
            flags: status as u8,
            slice_epoch: SliceEpoch(self.fitted_version().0),
            device: self.devices[device].view.id.0,
            ..Header::new(kind)
        };
        self.answer(sender, header, Body::None);
    }

    /// The answer of another node's primary to an export's flush.
    pub(super) fn on_export_flush_reply(&mut self, peer: PeerIndex, key: ExportFlushKey, header: &Header) {
        let mut status = Status::parse(header.flags);
        if header.slice_epoch.0 > self.adopted_version().0 && status == Status::Done {
            // Data may have been lost between our map and its: our own next map will say.
            status = Status::Fenced;
        }
        self.export_flush_answer(key, Place::Peer(peer), status);
    }

    /// A new map: flushes of these devices that run here as primary begin anew.
    pub(super) fn restart_flushes(&mut self, device: usize) {
        let keys: Vec<FlushKey> = self
            .flushes
            .iter()
            .filter(|(_, flush)| flush.device == device && !matches!(flush.origin, FlushOrigin::Primary(_)))
            .map(|(key, _)| key)
            .collect();
        for key in keys {
            let Some(flush) = self.flushes.remove(key) else { continue };
            let view = &self.devices[device].view;
            match flush.origin {
                // The export's own flush is begun anew by its caller.
                FlushOrigin::Export(_) | FlushOrigin::Primary(_) => {}
                FlushOrigin::Clearing | FlushOrigin::Survey | FlushOrigin::Joining(_) => {
                    self.end_flush(&flush, Status::Fenced);
                }
                FlushOrigin::Exporter(_, claim) if claim != view.claim.generation.0 => {
                    self.end_flush(&flush, Status::ClaimLost);
                }
                FlushOrigin::Exporter(..) if !view.can_flush() => {
                    self.end_flush(&flush, Status::Fenced);
                }
                origin @ FlushOrigin::Exporter(..) => {
                    self.start_flush(origin, device);
                }
            }
        }
    }
}
