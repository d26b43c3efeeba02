//! An NBD connection after its negotiation, on the ring.

use super::reply;
use super::transmission::{Bad, Command, Refusal, Request, RequestParser};
use super::{NbdError, Session};
use crate::frontend::Answer;
use crate::ring::buffers::Buffers;
use crate::ring::stream::{Incoming, Outgoing, OutgoingBody, Short, Stream};
use mirror_net::engine::Extent;
use mirror_net::engine::action::{BufferRange, RequestError, RequestKind};
use mirror_net::ids::DeviceId;
use slab::Slab;
use std::os::fd::OwnedFd;

/// Requests of one connection under way, and replies that it has not taken, at most; beyond that
/// nothing is received.
const REQUESTS_MAX: usize = 1024;

struct Pending {
    request: Request,
    buffer: Option<BufferRange>,
}

/// One client.
pub struct Connection {
    /// The device it uses.
    pub device: DeviceId,
    /// The socket.
    pub stream: Stream<RequestParser>,
    session: Session,
    pending: Slab<Pending>,
    /// The sizes of the buffers of requests that are not answered yet, in bytes.
    request_bytes: usize,
    refused: Option<Refusal>,
    /// Room for the data of the read whose header was just seen.
    read_room: Option<BufferRange>,
    /// The client said that it is leaving.
    leaving: bool,
}

/// What a client wants.
pub enum Wanted {
    /// Something that the engine does.
    Request(Ask),
    /// Which parts hold data: answered with [`Connection::status`].
    Status(Request),
}

/// What to ask the engine for, on behalf of a client.
pub struct Ask {
    /// Names the request within its connection.
    pub slot: usize,
    /// What to do.
    pub kind: RequestKind,
    /// Byte offset on the device.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Its data, or room for it.
    pub buffer: Option<BufferRange>,
}

impl Connection {
    /// Takes a connection; `unread` came with the end of its negotiation.
    pub fn new(device: DeviceId, fd: OwnedFd, session: Session, unread: &[u8]) -> Self {
        Self {
            device,
            stream: Stream::new(fd, RequestParser, unread),
            session,
            pending: Slab::new(),
            request_bytes: 0,
            refused: None,
            read_room: None,
            leaving: false,
        }
    }

    /// The next request for the engine; `None` until something was received, completed or released.
    pub fn next(&mut self, buffers: &mut Buffers) -> Result<Option<Wanted>, Bad> {
        loop {
            if self.leaving || self.pending.len() + self.stream.backlog() >= REQUESTS_MAX {
                self.stream.hold();
                return Ok(None);
            }
            match self.stream.next(buffers)? {
                Incoming::Starved => return Ok(None),
                Incoming::Header(request, length) => {
                    if !self.place(&request, length, buffers) {
                        return Ok(None);
                    }
                }
                Incoming::Frame(request) => match self.refused.take() {
                    Some(refusal) => self.answer(&reply::refusal(&self.session, &request, refusal), buffers),
                    None => {
                        if let Some(wanted) = self.begin(request) {
                            return Ok(Some(wanted));
                        }
                    }
                },
            }
        }
    }

    /// Finds a place for a request's data; false while the connection may have no buffer more.
    fn place(&mut self, request: &Request, payload: usize, buffers: &mut Buffers) -> bool {
        if let Err(refusal) = request.check(&self.session) {
            self.refused = Some(refusal);
            self.stream.skip();
            return true;
        }
        if !matches!(request.command, Command::Read | Command::Write) {
            self.stream.accept_small(payload);
            return true;
        }
        // What it was answered and has not taken counts as well.
        let held = self.request_bytes + self.stream.unsent_bytes();
        let Some(buffer) = buffers.allocate(request.length as usize, held) else { return false };
        self.request_bytes += buffers.size(buffer);
        let range = BufferRange { buffer, offset: 0, length: request.length };
        if request.command == Command::Write {
            self.stream.accept(range);
        } else {
            // Room for the answer is found before the request is taken.
            self.stream.accept_small(payload);
            self.read_room = Some(range);
        }
        true
    }

    fn begin(&mut self, request: Request) -> Option<Wanted> {
        let fua = request.flags.fua();
        let (kind, buffer) = match request.command {
            Command::Read => (RequestKind::Read, self.read_room.take()),
            Command::Write => (RequestKind::Write { fua }, self.stream.taken()),
            Command::WriteZeroes => (RequestKind::WriteZeroes { fua }, None),
            Command::Trim => (RequestKind::Discard, None),
            Command::Flush => (RequestKind::Flush, None),
            Command::BlockStatus => return Some(Wanted::Status(request)),
            Command::Disconnect => {
                self.leaving = true;
                return None;
            }
            // Refused by the check before.
            _ => return None,
        };
        let (offset, length) =
            if kind == RequestKind::Flush { (0, 0) } else { (request.offset, request.length) };
        let slot = self.pending.insert(Pending { request, buffer });
        Some(Wanted::Request(Ask { slot, kind, offset, length, buffer }))
    }

    /// Answers a question for extents, which begin where it does.
    pub fn status(
        &mut self,
        request: &Request,
        extents: impl Iterator<Item = Extent>,
        buffers: &mut Buffers,
    ) {
        let extents = extents.map(|extent| reply::Extent {
            length: extent.length,
            hole: !extent.data,
            zero: !extent.data,
        });
        let bytes = reply::block_status(request, extents).to_vec();
        let (head, tail) = (Short::new(&[]), Short::new(&[]));
        self.stream.queue(Outgoing { head, body: OutgoingBody::Bytes(bytes), tail }, buffers);
    }

    fn answer(&mut self, head: &[u8], buffers: &mut Buffers) {
        self.stream.queue(Outgoing::head(head), buffers);
    }

    /// The engine is done with a request.
    pub fn complete(
        &mut self,
        slot: usize,
        result: Result<(), RequestError>,
        buffers: &mut Buffers,
    ) -> Answer {
        let Some(Pending { request, buffer }) = self.pending.try_remove(slot) else { return Answer::Unknown };
        self.request_bytes -= buffer.map_or(0, |range| buffers.size(range.buffer));
        if let (Ok(()), Command::Read, Some(range)) = (&result, request.command, buffer) {
            let head = Short::new(&reply::read_head(&self.session, &request));
            self.stream
                .queue(Outgoing { head, body: OutgoingBody::Release(range), tail: Short::new(&[]) }, buffers);
            return Answer::Given;
        }
        if let Some(range) = buffer {
            buffers.release(range.buffer);
        }
        match result {
            Ok(()) => self.answer(&reply::success(&request), buffers),
            Err(error) => {
                let code = match error {
                    RequestError::Invalid => NbdError::Invalid,
                    RequestError::Io | RequestError::NoQuorum => NbdError::Io,
                    RequestError::ClaimLost => NbdError::Shutdown,
                };
                self.answer(&reply::failure(&self.session, &request, code, &error.to_string()), buffers);
            }
        }
        Answer::Given
    }

    /// Whether the client left and everything it asked for is answered and sent.
    pub fn is_finished(&self) -> bool {
        self.leaving && self.pending.is_empty() && self.stream.backlog() == 0
    }

    /// Whether it will send no more requests; what it asked for may still be under way.
    pub fn is_leaving(&self) -> bool {
        self.leaving || self.stream.is_closed()
    }

    /// Requests that the engine has not completed.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Gives back every buffer; only once the stream is idle and nothing is pending.
    pub fn release_all(&mut self, buffers: &mut Buffers) {
        if let Some(range) = self.stream.unfinished().or(self.read_room.take()) {
            buffers.release(range.buffer);
        }
        self.stream.release_all(buffers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::nbd::ExportInfo;
    use std::os::unix::net::UnixStream;

    const PIECE: u32 = 64 << 10;

    /// A client that has sent `count` reads of a piece each, and its end of the socket.
    fn reader(count: u64) -> (Connection, UnixStream) {
        let export = ExportInfo {
            name: "device".into(),
            description: String::new(),
            size: 1 << 30,
            block_size_min: 512,
            block_size_preferred: 4096,
            read_only: false,
            rotational: false,
            fast_zero: false,
        };
        let session = Session { export, structured: false, base_allocation: false };
        let request = |cookie: u64| {
            let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
            // Neither flags nor another command than READ.
            bytes.extend([0; 4]);
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(0u64.to_be_bytes());
            bytes.extend(PIECE.to_be_bytes());
            bytes
        };
        let requests: Vec<u8> = (0..count).flat_map(request).collect();
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(DeviceId(1), ours.into(), session, &requests), theirs)
    }

    /// Takes and answers all requests that there is memory for.
    fn answer_all(client: &mut Connection, buffers: &mut Buffers) -> usize {
        let mut count = 0;
        while let Some(wanted) = client.next(buffers).unwrap() {
            let Wanted::Request(ask) = wanted else { panic!("not a read") };
            assert_eq!(client.complete(ask.slot, Ok(()), buffers), Answer::Given);
            count += 1;
        }
        count
    }

    #[test]
    fn what_a_client_does_not_take_is_its_own_loss() {
        let mut buffers = Buffers::new(16 * PIECE as usize);
        // Nothing is ever sent: the replies stay where they are.
        let (mut slow, _slow) = reader(100);
        assert_eq!(answer_all(&mut slow, &mut buffers), 8);
        let (mut other, _other) = reader(100);
        assert_eq!(answer_all(&mut other, &mut buffers), 4);
        // What is left is never nothing.
        let (mut late, _late) = reader(100);
        buffers.allocate(4 * PIECE as usize, 0).unwrap();
        assert_eq!(answer_all(&mut late, &mut buffers), 1);
        for client in [&mut slow, &mut other, &mut late] {
            client.release_all(&mut buffers);
            assert_eq!((client.request_bytes, client.stream.unsent_bytes()), (0, 0));
        }
        assert_eq!(buffers.used_bytes(), 4 * PIECE as usize);
    }

    #[test]
    fn a_failed_request_gives_its_memory_back() {
        let mut buffers = Buffers::new(16 * PIECE as usize);
        let (mut client, _socket) = reader(100);
        for _ in 0..100 {
            let Some(Wanted::Request(ask)) = client.next(&mut buffers).unwrap() else { panic!("held up") };
            client.complete(ask.slot, Err(RequestError::Io), &mut buffers);
        }
        assert_eq!((client.request_bytes, buffers.used_bytes()), (0, 0));
    }
}
