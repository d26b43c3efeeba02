//! A lane: one connection to another node, cut into frames.

use crate::ring::buffers::Buffers;
use crate::ring::reassembly::FrameParser;
use crate::ring::stream::{Incoming, Outgoing, OutgoingBody, Short, Stream};
use mirror_net::engine::action::{Body, BufferId, BufferRange};
use mirror_net::ids::NodeId;
use mirror_net::wire::header::{
    BadFrame, CrcSeed, HEADER_BYTES, Header, Kind, PIECE_BYTES_MAX, TRAILER_BYTES, Trailer,
};
use std::os::fd::OwnedFd;

/// Longest body that is control content: what `Open` says of a node's disks.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// Reads our wire's headers.
pub struct LaneParser {
    seed: CrcSeed,
}

impl LaneParser {
    /// For the lanes of a cluster.
    pub fn new(seed: CrcSeed) -> Self {
        Self { seed }
    }
}

/// Checks a body that arrived, and reads the trailer that ends it where the message was forwarded.
pub fn open_body(header: &Header, body: &[u8], seed: CrcSeed) -> Result<Option<Trailer>, BadFrame> {
    if seed.body([body, &[]]) != header.body_crc {
        return Err(BadFrame::BodyCrc);
    }
    if !header.kind.is_forwarded() {
        return Ok(None);
    }
    let trailer =
        body.last_chunk::<TRAILER_BYTES>().ok_or(BadFrame::Content("forwarded without a trailer"))?;
    Ok(Some(Trailer::decode(trailer)))
}

impl FrameParser for LaneParser {
    const HEADER_BYTES: usize = HEADER_BYTES;
    type Header = Header;
    type Error = BadFrame;

    fn parse(&mut self, header: &[u8]) -> Result<(Header, usize), BadFrame> {
        let header = header.try_into().map_err(|_| BadFrame::Content("half a header"))?;
        let header = Header::decode(header, self.seed)?;
        Ok((header, header.body_bytes as usize))
    }
}

/// One connection to another node.
pub struct Lane {
    /// The node at the other end.
    pub peer: NodeId,
    /// The number that both ends know it by.
    pub session: u64,
    /// The socket.
    pub stream: Stream<LaneParser>,
    seed: CrcSeed,
    /// Where the data of a forwarded read will go, found when its header came.
    read_buffer: Option<BufferId>,
}

/// A message, checked.
pub struct Message {
    /// Its header.
    pub header: Header,
    /// On whose behalf, if it was forwarded.
    pub trailer: Option<Trailer>,
    /// Its data, or room for the data that it asks for.
    pub buffer: Option<BufferId>,
}

impl Lane {
    /// Takes a connection whose handshake is done.
    pub fn new(peer: NodeId, session: u64, fd: OwnedFd, seed: CrcSeed) -> Self {
        Self::with_unread(peer, session, fd, seed, &[])
    }

    fn with_unread(peer: NodeId, session: u64, fd: OwnedFd, seed: CrcSeed, unread: &[u8]) -> Self {
        Self {
            peer,
            session,
            stream: Stream::new(fd, LaneParser::new(seed), unread),
            seed,
            read_buffer: None,
        }
    }

    /// The next message that is complete; `None` until more was received.
    pub fn next(&mut self, buffers: &mut Buffers) -> Result<Option<Message>, BadFrame> {
        loop {
            match self.stream.next(buffers)? {
                Incoming::Starved => return Ok(None),
                Incoming::Header(header, length) => self.place(&header, length, buffers)?,
                Incoming::Frame(header) => return self.complete(header, buffers).map(Some),
            }
        }
    }

    /// Finds the place of a body.
    fn place(&mut self, header: &Header, length: usize, buffers: &mut Buffers) -> Result<(), BadFrame> {
        // A lane carries one session: whatever else comes on it ends this one, not the one it names. The
        // engine forgives a message that was on its way when its session ended; here there never was another.
        if header.session != self.session {
            return Err(BadFrame::Session);
        }
        // A write's body that is missing is for the engine to refuse, and takes a place until then.
        let is_write = matches!(header.kind, Kind::Write | Kind::ForwardWrite);
        if header.kind.carries_data() && (is_write || length > 0) {
            let buffer = buffers.allocate_for_peer(length.max(1));
            self.stream.accept(BufferRange { buffer, offset: 0, length: length as u32 });
            return Ok(());
        }
        if length > SMALL_BYTES_MAX {
            return Err(BadFrame::BodyTooLong(length as u32));
        }
        if header.kind.asks_for_data() {
            if header.length > PIECE_BYTES_MAX {
                return Err(BadFrame::Content("a read longer than a piece"));
            }
            self.read_buffer = Some(buffers.allocate_for_peer(header.length.max(1) as usize));
        }
        self.stream.accept_small(length);
        Ok(())
    }

    fn complete(&mut self, header: Header, buffers: &mut Buffers) -> Result<Message, BadFrame> {
        let in_buffer = self.stream.taken();
        let body = match in_buffer {
            Some(range) => buffers.bytes(range),
            None => self.stream.small(),
        };
        let result = open_body(&header, body, self.seed);
        let buffer = in_buffer.map(|range| range.buffer).or(self.read_buffer.take());
        match result {
            Ok(trailer) => Ok(Message { header, trailer, buffer }),
            Err(error) => {
                if let Some(buffer) = buffer {
                    buffers.release(buffer);
                }
                Err(error)
            }
        }
    }

    /// Queues a message of the engine's.
    pub fn send(&mut self, mut header: Header, trailer: Option<Trailer>, body: Body, buffers: &mut Buffers) {
        let tail = trailer.map(|trailer| trailer.encode());
        let tail = tail.as_ref().map_or(&[][..], |tail| &tail[..]);
        let body = match body {
            Body::None => OutgoingBody::None,
            Body::Buffer(range) => OutgoingBody::Keep(range),
            Body::Release(range) => OutgoingBody::Release(range),
            Body::Bytes(bytes) => OutgoingBody::Bytes(bytes),
        };
        let bytes = match &body {
            OutgoingBody::None => &[][..],
            OutgoingBody::Keep(range) | OutgoingBody::Release(range) => buffers.bytes(*range),
            OutgoingBody::Bytes(bytes) => bytes,
        };
        header.body_bytes = (bytes.len() + tail.len()) as u32;
        header.body_crc = self.seed.body([bytes, tail]);
        let head = Short::new(&header.encode(self.seed));
        self.stream.queue(Outgoing { head, body, tail: Short::new(tail) }, buffers);
    }

    /// Gives back every buffer that the lane still holds; only once its stream is idle.
    pub fn release_all(&mut self, buffers: &mut Buffers) {
        if let Some(range) = self.stream.unfinished() {
            buffers.release(range.buffer);
        }
        if let Some(buffer) = self.read_buffer.take() {
            buffers.release(buffer);
        }
        self.stream.release_all(buffers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::ids::ClusterId;

    #[test]
    fn a_lane_carries_its_own_session_only() {
        let seed = CrcSeed::new(&ClusterId::default());
        let frame = |session| {
            let mut header = Header::new(Kind::Ping);
            (header.session, header.body_crc) = (session, seed.body([&[], &[]]));
            header.encode(seed)
        };
        let mut buffers = Buffers::new(1 << 20);
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let frames = [frame(7), frame(8)].concat();
        let mut lane = Lane::with_unread(NodeId(2), 7, socket.into(), seed, &frames);
        let message = lane.next(&mut buffers).unwrap().unwrap();
        assert_eq!(message.header.session, 7);
        assert!(matches!(lane.next(&mut buffers), Err(BadFrame::Session)));
    }
}
