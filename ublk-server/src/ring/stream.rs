//! A connected stream socket on the ring: frames go out gathered, come in cut.
//!
//! A send is tried at once, without waiting; only what the socket has no room for is left to the ring. So a
//! send that succeeds, as nearly all do, needs no completion of its own. One send and one receive are under way
//! at most. What is queued while a send runs goes out together with the next one: the batch grows with the
//! load. Lanes to peers and NBD connections are both this, with another parser.
//!
//! Where large payloads follow each other, each is received straight into its buffer, together with no more
//! than the next header.

use super::buffers::{AlignedBlock, Buffers};
use super::reassembly::{Filled, FrameParser, Need, Reassembly};
use super::{Ring, check};
use io_uring::{opcode, types};
use mirror_net::engine::action::BufferRange;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Bytes received at once, at most, where they are not a large payload.
const STAGING_BYTES: usize = 256 << 10;
/// Frames in one send; each takes up to three pieces of the kernel's 1,024.
const FRAMES_PER_SEND: usize = 256;
/// Longest head of a frame.
pub const HEAD_BYTES_MAX: usize = 128;

/// A short run of bytes, inline.
#[derive(Clone, Copy)]
pub struct Short<const N: usize> {
    bytes: [u8; N],
    length: u8,
}

impl<const N: usize> Short<N> {
    /// A copy of `bytes`, which must fit.
    pub fn new(bytes: &[u8]) -> Self {
        let mut short = Self { bytes: [0; N], length: bytes.len() as u8 };
        short.bytes[..bytes.len()].copy_from_slice(bytes);
        short
    }
}

/// A frame to be sent.
pub struct Outgoing {
    /// What comes first.
    pub head: Short<HEAD_BYTES_MAX>,
    /// Then this.
    pub body: OutgoingBody,
    /// Then this.
    pub tail: Short<32>,
}

/// The middle of a frame to be sent.
pub enum OutgoingBody {
    /// Nothing.
    None,
    /// From a buffer that somebody keeps; it is pinned as long as the frame waits.
    Keep(BufferRange),
    /// From a buffer that is released when it is sent.
    Release(BufferRange),
    /// Owned bytes.
    Bytes(Vec<u8>),
}

impl Outgoing {
    /// A frame of a head only.
    pub fn head(bytes: &[u8]) -> Self {
        Self { head: Short::new(bytes), body: OutgoingBody::None, tail: Short::new(&[]) }
    }

    /// Returns the size of what was released, in bytes.
    fn release(self, buffers: &mut Buffers) -> usize {
        match self.body {
            OutgoingBody::Release(range) => {
                let bytes = buffers.size(range.buffer);
                buffers.release(range.buffer);
                return bytes;
            }
            OutgoingBody::Keep(range) => buffers.unpin(range.buffer),
            OutgoingBody::None | OutgoingBody::Bytes(_) => {}
        }
        0
    }
}

/// Where the payload of the frame that is being received goes.
#[derive(Clone, Copy)]
enum Destination {
    Buffer(BufferRange),
    Small { length: usize },
    Skip,
}

/// What became of what was queued.
pub enum Sent {
    /// Nothing went out: there was nothing, or a send is under way already.
    Nothing,
    /// Some, or all of it.
    Some,
    /// The connection is of no use any more.
    Failed(io::Error),
}

/// What the owner of the stream has to decide or do next.
pub enum Incoming<H> {
    /// A header whose payload needs a place: answer with [`Stream::accept`], or leave it and ask again later.
    Header(H, usize),
    /// A frame is complete; its payload is in the buffer that was named, or in [`Stream::small`].
    Frame(H),
    /// More has to be received.
    Starved,
}

/// The kernel's view of a send or a receive, at an address of its own.
struct Message {
    pieces: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Message {
    fn new() -> Box<Self> {
        // SAFETY: a msghdr of zeros is one without any pieces.
        Box::new(Self { pieces: Vec::new(), header: unsafe { std::mem::zeroed() } })
    }

    /// The pieces as they are now.
    fn header(&mut self) -> *mut libc::msghdr {
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len();
        &raw mut self.header
    }
}

/// A connected stream socket on the ring.
pub struct Stream<P: FrameParser> {
    fd: OwnedFd,
    reassembly: Reassembly<P>,
    staging: AlignedBlock,
    small: Vec<u8>,
    current: Option<(P::Header, Destination)>,
    waiting: Option<(P::Header, usize)>,
    /// Where the payload of the last complete frame is.
    taken: Option<BufferRange>,
    /// Where in the destination the payload that is received straight into it begins, and how much it lacks.
    direct: Option<(usize, usize)>,
    /// The last payload was received straight into its destination.
    large: bool,
    /// Of the receive that is under way.
    wanted: Box<Message>,
    receiving: bool,
    starved: bool,
    queue: VecDeque<Outgoing>,
    sending: Vec<Outgoing>,
    /// In buffers that are released with their frames.
    unsent_bytes: usize,
    message: Box<Message>,
    send_under_way: bool,
    closed: bool,
}

// SAFETY: the pointers in `message` point into this value's own heap memory or into the buffers of
// the same I/O thread, and are only used while that thread submits them.
unsafe impl<P: FrameParser + Send> Send for Stream<P> where P::Header: Send {}

impl<P: FrameParser> Stream<P>
where
    P::Header: Copy,
{
    /// Takes a connected socket; `unread` are bytes that were received with its handshake.
    ///
    /// # Panics
    /// If there are more of them than a handshake can leave.
    pub fn new(fd: OwnedFd, parser: P, unread: &[u8]) -> Self {
        let mut staging = AlignedBlock::new(STAGING_BYTES);
        assert!(unread.len() <= STAGING_BYTES);
        staging[..unread.len()].copy_from_slice(unread);
        Self {
            fd,
            reassembly: Reassembly::with_unread(parser, 0..unread.len()),
            staging,
            small: Vec::new(),
            current: None,
            waiting: None,
            taken: None,
            direct: None,
            large: false,
            wanted: Message::new(),
            receiving: false,
            starved: false,
            queue: VecDeque::new(),
            sending: Vec::new(),
            unsent_bytes: 0,
            message: Message::new(),
            send_under_way: false,
            closed: false,
        }
    }

    // ---- receiving ----

    /// Goes on with what was received. Call until it is [`Incoming::Starved`].
    pub fn next(&mut self, buffers: &mut Buffers) -> Result<Incoming<P::Header>, P::Error> {
        self.starved = false;
        if self.receiving {
            return Ok(Incoming::Starved);
        }
        if let Some((header, length)) = self.waiting {
            return Ok(Incoming::Header(header, length));
        }
        if let Some((header, destination)) = self.current {
            let filled = match destination {
                Destination::Buffer(range) => self.reassembly.fill(&self.staging, buffers.bytes_mut(range)),
                Destination::Small { length } => {
                    self.reassembly.fill(&self.staging, &mut self.small[..length])
                }
                Destination::Skip => self.reassembly.skip(),
            };
            match filled {
                Filled::Done => {
                    self.current = None;
                    self.taken = match destination {
                        Destination::Buffer(range) => Some(range),
                        Destination::Small { .. } | Destination::Skip => None,
                    };
                    return Ok(Incoming::Frame(header));
                }
                Filled::Need(need) => {
                    self.direct = match (need, destination) {
                        (Need::Direct { offset, missing }, Destination::Buffer(_)) => Some((offset, missing)),
                        _ => None,
                    };
                    self.starved = true;
                    return Ok(Incoming::Starved);
                }
            }
        }
        match self.reassembly.next_header(&self.staging)? {
            Some((header, length)) => {
                self.waiting = Some((header, length));
                Ok(Incoming::Header(header, length))
            }
            None => {
                self.direct = None;
                self.starved = true;
                Ok(Incoming::Starved)
            }
        }
    }

    /// Nothing more is received until [`Stream::next`] was called again: without it, what nobody takes
    /// would fill the staging buffer.
    pub fn hold(&mut self) {
        self.starved = false;
    }

    /// Names the buffer for the payload of the header that was just seen.
    pub fn accept(&mut self, range: BufferRange) {
        self.place(Destination::Buffer(range));
    }

    /// The payload goes to [`Stream::small`].
    pub fn accept_small(&mut self, length: usize) {
        self.small.resize(length, 0);
        self.place(Destination::Small { length });
    }

    /// The payload is thrown away.
    pub fn skip(&mut self) {
        self.place(Destination::Skip);
    }

    fn place(&mut self, destination: Destination) {
        if let Some((header, _)) = self.waiting.take() {
            self.current = Some((header, destination));
        }
    }

    /// The buffer of the last complete frame's payload, if it went to one.
    pub fn taken(&self) -> Option<BufferRange> {
        self.taken
    }

    /// The payload of the last small frame.
    pub fn small(&self) -> &[u8] {
        &self.small
    }

    /// Where an unfinished frame's payload goes, so that it can be released with the stream.
    pub fn unfinished(&self) -> Option<BufferRange> {
        match self.current {
            Some((_, Destination::Buffer(range))) => Some(range),
            _ => None,
        }
    }

    /// Begins to receive, if more is needed and nothing is under way.
    pub fn receive(&mut self, ring: &mut Ring, buffers: &mut Buffers, token: u64) -> io::Result<()> {
        if self.receiving || !self.starved || self.closed {
            return Ok(());
        }
        let window = self.reassembly.window(&mut self.staging);
        let entry = match (self.current, self.direct) {
            (Some((_, Destination::Buffer(range))), Some((offset, missing))) => {
                let rest = BufferRange {
                    buffer: range.buffer,
                    offset: range.offset + offset as u32,
                    length: missing as u32,
                };
                self.large = true;
                let header = &mut self.staging[window][..P::HEADER_BYTES];
                let pieces = [(buffers.pointer(rest).as_ptr(), missing), (header.as_mut_ptr(), header.len())];
                self.wanted.pieces.clear();
                self.wanted
                    .pieces
                    .extend(pieces.map(|(base, iov_len)| libc::iovec { iov_base: base.cast(), iov_len }));
                opcode::RecvMsg::new(types::Fd(self.fd.as_raw_fd()), self.wanted.header()).build()
            }
            _ => {
                // After a large payload another is likely: whatever is received before its place is known has
                // to be copied there.
                let lacks = P::HEADER_BYTES.saturating_sub(self.reassembly.unread_bytes());
                let length = if self.large && lacks > 0 { lacks } else { window.len() };
                self.large = false;
                let window = &mut self.staging[window][..length];
                opcode::Recv::new(types::Fd(self.fd.as_raw_fd()), window.as_mut_ptr(), length as u32).build()
            }
        };
        // SAFETY: the staging block, the message and the buffer live until the stream is dropped, which its
        // owner does only after `is_idle`.
        unsafe { ring.push(&entry.user_data(token))? };
        self.receiving = true;
        Ok(())
    }

    /// A receive has completed; an error or the end of the stream is returned.
    pub fn received(&mut self, result: i32) -> io::Result<()> {
        self.receiving = false;
        match check(result) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                let bytes = bytes as usize;
                let direct = self.direct.map_or(0, |(_, missing)| missing.min(bytes));
                if direct > 0 {
                    self.reassembly.received_direct(direct);
                }
                self.reassembly.received(bytes - direct);
                Ok(())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    // ---- sending ----

    /// Queues a frame; it goes out with the next [`Stream::send`].
    pub fn queue(&mut self, frame: Outgoing, buffers: &mut Buffers) {
        match &frame.body {
            OutgoingBody::Keep(range) => buffers.pin(range.buffer),
            OutgoingBody::Release(range) => self.unsent_bytes += buffers.size(range.buffer),
            OutgoingBody::None | OutgoingBody::Bytes(_) => {}
        }
        self.queue.push_back(frame);
    }

    /// The sizes of the buffers that frames will release once they are sent, in bytes.
    pub fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// Frames that have not been handed to the kernel completely.
    pub fn backlog(&self) -> usize {
        self.queue.len() + self.sending.len()
    }

    /// Sends all that is queued, if nothing is under way; what the socket has no room for is left to the ring.
    pub fn send(&mut self, ring: &mut Ring, buffers: &mut Buffers, token: u64) -> io::Result<Sent> {
        let mut outcome = Sent::Nothing;
        while !self.send_under_way && !self.closed && self.gather(buffers) {
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: what the pieces point at stays where it is: the frames are not touched before `sent`.
            let bytes = unsafe { libc::sendmsg(self.fd.as_raw_fd(), self.message.header(), flags) };
            if bytes >= 0 {
                self.taken_out(bytes as usize, buffers);
                outcome = Sent::Some;
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => self.send_later(ring, token)?,
                _ => return Ok(Sent::Failed(error)),
            }
        }
        Ok(outcome)
    }

    /// Makes a message of the frames that go next, unless one is begun; false if there are none.
    fn gather(&mut self, buffers: &Buffers) -> bool {
        if self.message.pieces.is_empty() {
            let count = self.queue.len().min(FRAMES_PER_SEND);
            self.sending.extend(self.queue.drain(..count));
            // The frames do not move any more: their inline bytes may be pointed at.
            for frame in &self.sending {
                let body = match &frame.body {
                    OutgoingBody::None => &[][..],
                    OutgoingBody::Keep(range) | OutgoingBody::Release(range) => buffers.bytes(*range),
                    OutgoingBody::Bytes(bytes) => bytes,
                };
                let head = &frame.head.bytes[..usize::from(frame.head.length)];
                let tail = &frame.tail.bytes[..usize::from(frame.tail.length)];
                for piece in [head, body, tail].into_iter().filter(|piece| !piece.is_empty()) {
                    let iov_base = piece.as_ptr().cast_mut().cast();
                    self.message.pieces.push(libc::iovec { iov_base, iov_len: piece.len() });
                }
            }
        }
        !self.message.pieces.is_empty()
    }

    fn send_later(&mut self, ring: &mut Ring, token: u64) -> io::Result<()> {
        let entry = opcode::SendMsg::new(types::Fd(self.fd.as_raw_fd()), self.message.header())
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build()
            .user_data(token);
        // SAFETY: `message` is boxed, `sending` is not touched and buffers are kept until the
        // completion was taken.
        unsafe { ring.push(&entry)? };
        self.send_under_way = true;
        Ok(())
    }

    /// A send has completed. What it did not take goes first next time.
    pub fn sent(&mut self, result: i32, buffers: &mut Buffers) -> io::Result<()> {
        self.send_under_way = false;
        match check(result) {
            Ok(bytes) => self.taken_out(bytes as usize, buffers),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The socket took so many bytes of the message.
    fn taken_out(&mut self, mut bytes: usize, buffers: &mut Buffers) {
        let done = self.message.pieces.iter().take_while(|piece| {
            let whole = piece.iov_len <= bytes;
            bytes -= if whole { piece.iov_len } else { 0 };
            whole
        });
        let done = done.count();
        self.message.pieces.drain(..done);
        if let Some(piece) = self.message.pieces.first_mut() {
            // SAFETY: fewer bytes than the piece has.
            piece.iov_base = unsafe { piece.iov_base.cast::<u8>().add(bytes).cast() };
            piece.iov_len -= bytes;
        } else {
            for frame in self.sending.drain(..) {
                self.unsent_bytes -= frame.release(buffers);
            }
        }
    }

    // ---- the end ----

    /// Ends the connection: what is under way completes soon, nothing more begins.
    pub fn close(&mut self) {
        if !self.closed {
            self.closed = true;
            // An error means that the connection is gone already.
            let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }

    /// Whether the other side has closed its end, received or not.
    pub fn has_hung_up(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.fd.as_fd(), closed)];
        // Nothing else was asked for, but for what is always told: an error or a hang-up.
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    /// Whether it was closed from this side.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Nothing is under way: the stream may be dropped.
    pub fn is_idle(&self) -> bool {
        !self.receiving && !self.send_under_way
    }

    /// Gives back every buffer that frames still hold; call before dropping.
    pub fn release_all(&mut self, buffers: &mut Buffers) {
        debug_assert!(self.is_idle());
        for frame in self.sending.drain(..).chain(self.queue.drain(..)) {
            self.unsent_bytes -= frame.release(buffers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::nbd::RequestParser;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_hang_up_is_seen_behind_unread_bytes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let stream = Stream::new(ours.into(), RequestParser, &[]);
        theirs.write_all(b"half a request").unwrap();
        assert!(!stream.has_hung_up());
        drop(theirs);
        assert!(stream.has_hung_up());
    }
}
