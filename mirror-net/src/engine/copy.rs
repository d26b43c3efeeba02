//! Copying one region from this node to another's copy of it.
//!
//! The region is locked here from the first read to the last acknowledgement, so that no newer write
//! is overtaken. A piece at a time: it is read here while the other node is asked for the digests of
//! its large blocks; of those that differ the small blocks' digests; what differs then is sent. Where all has
//! differed for a while, pieces are sent as they are ([`Worth`](super::resync::Worth)).

use super::action::{Action, Body, BufferId, BufferRange, OpKey};
use super::op::{Local, Op};
use super::view::PeerIndex;
use super::window::Awaited;
use super::{Engine, Nanos};
use crate::planted::{self, Bug};
use crate::region::digest::{self, COARSE_BYTES, Digest, FINE_BYTES};
use crate::wire::header::{FLAG_FINE, HEADER_BYTES, Header, Kind, PIECE_BYTES_MAX, Status};

/// The state of a copy.
#[derive(Debug)]
pub(super) struct Copy {
    peer: PeerIndex,
    buffer: BufferId,
    /// The piece that is being copied, from the slice's start.
    at: u32,
    /// Its small blocks' digests, once computed.
    fine: Option<Vec<Digest>>,
    /// The other copy's digests of its large blocks.
    coarse: Coarse,
    /// The piece was compared, and what differs is on its way.
    compared: bool,
    /// What differs is found out before anything is sent.
    compares: bool,
    /// There is nothing valid here, and so nothing to read.
    nothing: bool,
    /// When it got its range.
    began: Nanos,
    /// Bytes of frames that were needed.
    moved: u64,
    /// The other copy did not take it, or this one could not be read.
    failed: bool,
}

#[derive(Debug)]
enum Coarse {
    Asked,
    Known(Vec<Digest>),
    /// It has nothing there, or cannot read it: all of the piece is sent.
    Nothing,
}

/// What an answer is to, of the messages of a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CopyMessage {
    /// Digests of the piece's large blocks.
    Coarse,
    /// Digests of small blocks from there on.
    Fine { offset: u32 },
    /// Data, or that there is none.
    Store,
}

impl Engine {
    /// How long the buffers are that the engine copies through.
    pub fn copy_buffer_bytes(&self) -> u32 {
        self.region_bytes().min(PIECE_BYTES_MAX)
    }

    /// Gives the engine buffers to copy through; without any nothing is ever copied.
    pub fn add_copy_buffers(&mut self, buffers: impl IntoIterator<Item = BufferId>) {
        self.copy_buffers.extend(buffers);
    }

    pub(super) fn enqueue_copy(&mut self, op: Op, peer: PeerIndex, buffer: BufferId) {
        let at = op.offset;
        let copy = Copy {
            peer,
            buffer,
            at,
            fine: None,
            coarse: Coarse::Nothing,
            compared: false,
            compares: false,
            nothing: false,
            began: self.now,
            moved: 0,
            failed: false,
        };
        match self.enqueue(op) {
            Some(key) => drop(self.copies.insert(key, copy)),
            None => {
                self.copy_buffers.push(buffer);
                self.pacer.ended(self.now, 0);
            }
        }
    }

    /// It holds its region.
    pub(super) fn start_copy_op(&mut self, key: OpKey) {
        self.copies[key].began = self.now;
        let op = &self.ops[key];
        let peer = self.copies[key].peer;
        let region = op.offset / self.region_bytes();
        let readable = self.content(op.device, op.slice);
        let behind = self.devices[op.device].slices[op.slice as usize].behind.iter();
        let behind = behind.into_iter().find(|behind| behind.peer == peer);
        let theirs = behind.is_none_or(|behind| behind.readable >> region & 1 == 1);
        let perhaps = behind.is_none_or(|behind| (behind.readable | behind.noted) >> region & 1 == 1);
        if self.disks[op.disk].failed || behind.is_none() {
            self.copies[key].failed = true;
        } else if readable >> region & 1 == 1 {
            let device = op.device;
            let compares =
                theirs && self.find_resync(device, peer).is_none_or(|resync| resync.worth.compares());
            self.copies[key].compares = compares;
            self.start_piece(key, compares);
            return;
        } else if perhaps && !planted::is(Bug::InvalidNotCopied) {
            // Nothing is valid here: nothing is valid there either (rule 11).
            let header = self.copy_header(key, Kind::Discard, op.offset, op.length);
            self.send_for_copy(key, header, Body::None, CopyMessage::Store);
        }
        (self.copies[key].compared, self.copies[key].nothing) = (true, true);
        self.ops[key].local = Local::Done;
        self.copy_progress(key);
    }

    fn copy_header(&self, key: OpKey, kind: Kind, offset: u32, length: u32) -> Header {
        let op = &self.ops[key];
        Header {
            slice_epoch: op.epoch,
            device: self.devices[op.device].view.id.0,
            slice: op.slice,
            offset,
            length,
            loss: self.loss_of(op.device, op.slice),
            ..Header::new(kind)
        }
    }

    fn piece(&self, key: OpKey) -> BufferRange {
        let (op, copy) = (&self.ops[key], &self.copies[key]);
        let length = (op.offset + op.length - copy.at).min(self.copy_buffer_bytes());
        BufferRange { buffer: copy.buffer, offset: 0, length }
    }

    fn start_piece(&mut self, key: OpKey, compare: bool) {
        let buffer = self.piece(key);
        let at = self.copies[key].at;
        if compare {
            let header = self.copy_header(key, Kind::Compare, at, buffer.length);
            self.copies[key].coarse = Coarse::Asked;
            self.send_for_copy(key, header, Body::None, CopyMessage::Coarse);
        } else {
            self.copies[key].coarse = Coarse::Nothing;
        }
        self.copies[key].compared = false;
        self.copies[key].fine = None;
        self.read_piece(key, at, buffer);
    }

    fn send_for_copy(&mut self, key: OpKey, header: Header, body: Body, message: CopyMessage) {
        let peer = self.copies[key].peer;
        let bytes = match &body {
            Body::Buffer(range) => u64::from(range.length),
            _ => 0,
        };
        if self.send_awaited(peer, header, None, body, Awaited::Copy(key, message)) {
            self.ops[key].asked += 1;
            self.copies[key].moved += HEADER_BYTES as u64 + bytes;
        } else {
            self.copies[key].failed = true;
        }
    }

    /// The piece was read here.
    pub(super) fn copy_piece_read(&mut self, key: OpKey) {
        let wants_digests = !matches!(self.copies[key].coarse, Coarse::Nothing);
        if wants_digests && !self.copies[key].failed && self.ops[key].doomed.is_none() {
            let buffer = self.piece(key);
            self.ops[key].local = Local::Data { ios: 1 };
            self.actions.push_back(Action::Digest { op: key, buffer });
            return;
        }
        self.copy_progress(key);
    }

    /// The piece cannot be read here. A member may have it, whole or block by block: what this disk cannot
    /// read need not be what that one cannot. The region is tried again later.
    pub(super) fn copy_piece_unreadable(&mut self, key: OpKey) {
        let length = self.piece(key).length;
        let (op, copy) = (&self.ops[key], &mut self.copies[key]);
        copy.failed = true;
        let (device, slice, at) = (op.device, op.slice, copy.at);
        let region = at / self.region_bytes();
        let peer = self.copies[key].peer;
        if let Some(behind) = self.behind_mut(device, slice, peer) {
            behind.unreadable |= 1 << region;
        }
        for block in (at..at + length).step_by(FINE_BYTES as usize) {
            self.repair(device, slice, block..(block + FINE_BYTES).min(at + length), None);
        }
    }

    /// Its digests were computed.
    pub(super) fn copy_digested(&mut self, key: OpKey, fine: Vec<Digest>) {
        self.copies[key].fine = Some(fine);
        self.ops[key].local = Local::Done;
        self.copy_progress(key);
    }

    /// An answer to a message of a copy; `None` if the session ended without. Digests that are none count as
    /// different from everything.
    pub(super) fn on_copy_answer(
        &mut self,
        key: OpKey,
        message: CopyMessage,
        answer: Option<(&Header, &[u8])>,
    ) {
        let (Some(op), Some(copy)) = (self.ops.get_mut(key), self.copies.get_mut(key)) else { return };
        op.asked -= 1;
        copy.failed |= self.disks[op.disk].failed;
        let status = answer.map(|(header, _)| Status::parse(header.flags));
        let body = answer.map_or(&[][..], |(_, body)| body);
        copy.moved += body.len() as u64;
        match (message, status) {
            _ if op.doomed.is_some() || copy.failed => {}
            (CopyMessage::Store, Some(Status::Done)) => {}
            (CopyMessage::Coarse, Some(Status::Done)) => {
                copy.coarse = Coarse::Known(digest::parse(body).unwrap_or_default());
            }
            (CopyMessage::Fine { offset }, Some(Status::Done)) => {
                let theirs = digest::parse(body).unwrap_or_default();
                self.send_differing(key, offset, &theirs);
            }
            // It cannot read its sectors: writing them anew is what helps.
            (CopyMessage::Coarse, Some(Status::DiskFailed)) => copy.coarse = Coarse::Nothing,
            (CopyMessage::Fine { offset }, Some(Status::DiskFailed)) => {
                self.send_differing(key, offset, &[]);
            }
            (CopyMessage::Store, Some(Status::DiskFailed)) => {
                copy.failed = true;
                let peer = copy.peer;
                self.lose(peer, "its disk failed a write".into());
            }
            (_, None | Some(Status::Fenced | Status::Invalid | Status::ClaimLost | Status::NoQuorum)) => {
                copy.failed = true
            }
        }
        self.copy_progress(key);
    }

    /// Sends the small blocks of a large one that differ; all of them if theirs are not known.
    fn send_differing(&mut self, key: OpKey, offset: u32, theirs: &[Digest]) {
        let copy = &self.copies[key];
        let first = ((offset - copy.at) / FINE_BYTES) as usize;
        let group = (COARSE_BYTES / FINE_BYTES) as usize;
        let Some(ours) = copy.fine.as_ref().and_then(|fine| fine.get(first..)) else { return };
        let ours = &ours[..ours.len().min(group)];
        let differs: Vec<bool> =
            ours.iter().enumerate().map(|(at, digest)| theirs.get(at) != Some(digest)).collect();
        let end = copy.at + self.piece(key).length;
        for (at, count) in runs(&differs) {
            let from = offset + at * FINE_BYTES;
            self.send_data(key, from, (count * FINE_BYTES).min(end - from));
        }
    }

    fn send_data(&mut self, key: OpKey, offset: u32, length: u32) {
        let range = self.piece(key).slice(offset - self.copies[key].at, length);
        let header = self.copy_header(key, Kind::Write, offset, length);
        self.send_for_copy(key, header, Body::Buffer(range), CopyMessage::Store);
    }

    /// Compares once both sides' digests are there; goes on with the next piece, or ends.
    pub(super) fn copy_progress(&mut self, key: OpKey) {
        let (Some(op), Some(copy)) = (self.ops.get(key), self.copies.get(key)) else { return };
        // Nobody knows what a disk holds that failed meanwhile: the other copy may have what this one lost.
        if op.doomed.is_some() || copy.failed || self.disks[op.disk].failed {
            if op.is_quiet() {
                self.finish(key, op.doomed.unwrap_or(Status::Fenced));
            }
            return;
        }
        if op.local != Local::Done {
            return;
        }
        if !copy.compared {
            match &copy.coarse {
                Coarse::Asked => return,
                Coarse::Nothing => {
                    self.copies[key].compared = true;
                    let (at, length) = (self.copies[key].at, self.piece(key).length);
                    self.send_data(key, at, length);
                }
                Coarse::Known(theirs) => {
                    let Some(fine) = &copy.fine else { return };
                    let ours = digest::coarse(fine);
                    let differs = ours.iter().enumerate().map(|(at, digest)| theirs.get(at) != Some(digest));
                    let differs: Vec<bool> = differs.collect();
                    self.copies[key].compared = true;
                    self.ask_fine(key, &differs);
                }
            }
        }
        let op = &self.ops[key];
        if op.asked > 0 {
            return;
        }
        if self.copies[key].failed {
            self.copy_progress(key);
            return;
        }
        let next = self.copies[key].at + self.copy_buffer_bytes();
        if next >= op.offset + op.length || self.copies[key].nothing {
            self.finish(key, Status::Done);
            return;
        }
        self.copies[key].at = next;
        let compare = !matches!(self.copies[key].coarse, Coarse::Nothing);
        self.start_piece(key, compare);
    }

    fn ask_fine(&mut self, key: OpKey, differs: &[bool]) {
        let (at, length) = (self.copies[key].at, self.piece(key).length);
        for (index, _) in differs.iter().enumerate().filter(|(_, differs)| **differs) {
            let offset = at + index as u32 * COARSE_BYTES;
            let length = COARSE_BYTES.min(at + length - offset);
            let header = Header { flags: FLAG_FINE, ..self.copy_header(key, Kind::Compare, offset, length) };
            self.send_for_copy(key, header, Body::None, CopyMessage::Fine { offset });
        }
    }

    /// The operation is over: its buffer is free, and what it found out is noted.
    pub(super) fn end_copy(&mut self, key: OpKey, op: &Op, status: Status) {
        let Some(copy) = self.copies.remove(key) else { return };
        self.copy_buffers.push(copy.buffer);
        self.pacer.ended(self.now, self.now.saturating_sub(copy.began));
        let equal = status == Status::Done && !copy.failed;
        self.copy_ended(op, copy.peer, equal, copy.moved, copy.compares);
        self.resync_due = true;
    }
}

/// Runs of `true`: (first, count).
fn runs(flags: &[bool]) -> impl Iterator<Item = (u32, u32)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at + flags[at..].iter().position(|flag| *flag)?;
        at = first + flags[first..].iter().position(|flag| !flag).unwrap_or(flags.len() - first);
        Some((first as u32, (at - first) as u32))
    })
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_of_flags() {
        assert_eq!(runs(&[]).collect::<Vec<_>>(), []);
        assert_eq!(runs(&[true, true, false, true]).collect::<Vec<_>>(), [(0, 2), (3, 1)]);
    }
}
