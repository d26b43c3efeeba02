//! Builders of replies: fixed small arrays, sent before (or instead of) the data of a read.
//!
//! Where structured replies were negotiated a READ must be answered with them, even when it fails;
//! everything else may have the simple reply, which is shorter, and gets the structured one only for
//! an error, since that has room for a message. Without negotiation all replies are simple.

use super::handshake::Session;
use super::transmission::{Command, Refusal, Request};
use super::{BASE_ALLOCATION_ID, NbdError};

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

const FLAG_DONE: u16 = 1 << 0;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = (1 << 15) + 1;

const CHUNK_HEADER_BYTES: usize = 20;
const EXTENT_BYTES: usize = 8;

/// A simple reply without data, or the head of one with data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// The longest message of an error chunk; a longer one is cut.
pub const MESSAGE_BYTES_MAX: usize = 102;
/// The most extents in one block status reply. A client that wants more asks again where it ended.
pub const EXTENTS_MAX: usize = 64;

/// Whether more chunks of the same reply follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum More {
    /// This chunk is the last one. Set it only if what the chunk announces cannot fail any more.
    Done,
    /// Others follow.
    Follows,
}

/// Bytes of a reply, stored inline.
#[derive(Clone, Copy)]
pub struct Bytes<const CAPACITY: usize> {
    bytes: [u8; CAPACITY],
    length: usize,
}

/// A reply without data: a simple one, or an error chunk.
pub type StatusReply = Bytes<{ CHUNK_HEADER_BYTES + 6 + MESSAGE_BYTES_MAX }>;
/// What goes before the data of a read.
pub type ReadHead = Bytes<{ CHUNK_HEADER_BYTES + 8 }>;
/// A whole block status reply.
pub type BlockStatusReply = Bytes<{ CHUNK_HEADER_BYTES + 4 + EXTENTS_MAX * EXTENT_BYTES }>;

impl<const CAPACITY: usize> Bytes<CAPACITY> {
    fn new() -> Self {
        Bytes { bytes: [0; CAPACITY], length: 0 }
    }

    fn put(&mut self, part: &[u8]) -> &mut Self {
        self.bytes[self.length..][..part.len()].copy_from_slice(part);
        self.length += part.len();
        self
    }
}

impl<const CAPACITY: usize> std::ops::Deref for Bytes<CAPACITY> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A simple reply. With no error, and as the reply to a read, the data follows it.
pub fn simple_reply(cookie: u64, error: Option<NbdError>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, NbdError::code).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

fn chunk_header(cookie: u64, kind: u16, more: More, payload_bytes: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let flags = if more == More::Done { FLAG_DONE } else { 0 };
    let mut bytes = [0; CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_bytes.to_be_bytes());
    bytes
}

/// The chunk that ends a reply without saying anything more.
pub fn none_chunk(cookie: u64) -> [u8; CHUNK_HEADER_BYTES] {
    chunk_header(cookie, TYPE_NONE, More::Done, 0)
}

/// What stands before `length` bytes of data of a structured read; `offset` counts from the start
/// of the export.
pub fn data_chunk(cookie: u64, offset: u64, length: u32, more: More) -> [u8; CHUNK_HEADER_BYTES + 8] {
    debug_assert!(length > 0, "a chunk describes at least one byte");
    let mut bytes = [0; CHUNK_HEADER_BYTES + 8];
    bytes[..20].copy_from_slice(&chunk_header(cookie, TYPE_OFFSET_DATA, more, length + 8));
    bytes[20..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// Says that `length` bytes of a structured read are zeros.
pub fn hole_chunk(cookie: u64, offset: u64, length: u32, more: More) -> [u8; CHUNK_HEADER_BYTES + 12] {
    debug_assert!(length > 0, "a chunk describes at least one byte");
    let mut bytes = [0; CHUNK_HEADER_BYTES + 12];
    bytes[..20].copy_from_slice(&chunk_header(cookie, TYPE_OFFSET_HOLE, more, 12));
    bytes[20..28].copy_from_slice(&offset.to_be_bytes());
    bytes[28..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Says that a request failed; always the end of its reply. `message` is for people.
pub fn error_chunk(cookie: u64, error: NbdError, message: &str) -> StatusReply {
    let message = cut(message, MESSAGE_BYTES_MAX);
    let mut reply = StatusReply::new();
    reply
        .put(&chunk_header(cookie, TYPE_ERROR, More::Done, 6 + message.len() as u32))
        .put(&error.code().to_be_bytes())
        .put(&(message.len() as u16).to_be_bytes())
        .put(message.as_bytes());
    reply
}

/// The longest beginning of `text` that has at most `bytes_max` bytes and whole characters.
fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The reply to a request that succeeded and is neither a READ nor a BLOCK_STATUS.
pub fn success(request: &Request) -> [u8; SIMPLE_REPLY_BYTES] {
    debug_assert!(!matches!(request.command, Command::Read | Command::BlockStatus));
    simple_reply(request.cookie, None)
}

/// The reply to a request, of whatever command, that failed.
pub fn failure(session: &Session, request: &Request, error: NbdError, message: &str) -> StatusReply {
    if session.structured {
        return error_chunk(request.cookie, error, message);
    }
    let mut reply = StatusReply::new();
    reply.put(&simple_reply(request.cookie, Some(error)));
    reply
}

/// The reply to a request that was refused by [`Request::check`].
pub fn refusal(session: &Session, request: &Request, refusal: Refusal) -> StatusReply {
    failure(session, request, refusal.error, refusal.message)
}

/// What stands before the data of a READ whose data is all there. It claims success, so nothing may
/// fail after it was sent: a reply without its data can only be ended by closing the connection.
pub fn read_head(session: &Session, request: &Request) -> ReadHead {
    debug_assert!(request.command == Command::Read);
    let mut head = ReadHead::new();
    if session.structured {
        head.put(&data_chunk(request.cookie, request.offset, request.length, More::Done));
    } else {
        head.put(&simple_reply(request.cookie, None));
    }
    head
}

/// A part of the export, for a block status reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// In bytes.
    pub length: u64,
    /// Nothing is stored there.
    pub hole: bool,
    /// It reads as zeros.
    pub zero: bool,
}

impl Extent {
    fn status(self) -> u32 {
        u32::from(self.hole) | u32::from(self.zero) << 1
    }
}

/// The reply to a BLOCK_STATUS. The extents begin at the request's offset, one behind the other;
/// neighbours that are alike become one, and what lies beyond the request is cut. No more are
/// taken from the iterator than fit, so it may be lazy and without end.
pub fn block_status(request: &Request, extents: impl IntoIterator<Item = Extent>) -> BlockStatusReply {
    debug_assert!(request.command == Command::BlockStatus && request.length > 0);
    let extents_max = if request.flags.req_one() { 1 } else { EXTENTS_MAX };
    let mut found = [(0u32, 0u32); EXTENTS_MAX];
    let mut count = 0;
    let mut left = request.length;
    for extent in extents {
        if left == 0 {
            break;
        }
        let length = extent.length.min(u64::from(left)) as u32;
        if length == 0 {
            continue;
        }
        if count > 0 && found[count - 1].1 == extent.status() {
            found[count - 1].0 += length;
        } else if count < extents_max {
            found[count] = (length, extent.status());
            count += 1;
        } else {
            break;
        }
        left -= length;
    }
    if count == 0 {
        // A reply has at least one extent, and "allocated, contents unknown" is always true enough.
        found[0] = (request.length, 0);
        count = 1;
    }

    let payload_bytes = 4 + count * EXTENT_BYTES;
    let mut reply = BlockStatusReply::new();
    reply
        .put(&chunk_header(request.cookie, TYPE_BLOCK_STATUS, More::Done, payload_bytes as u32))
        .put(&BASE_ALLOCATION_ID.to_be_bytes());
    for (length, status) in &found[..count] {
        reply.put(&length.to_be_bytes()).put(&status.to_be_bytes());
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::super::handshake_tests::export;
    use super::super::transmission::CommandFlags;
    use super::*;
    use proptest::prelude::*;

    fn session(structured: bool) -> Session {
        Session { export: export("disk"), structured, base_allocation: structured }
    }

    fn request(command: Command, flags: u16) -> Request {
        Request {
            cookie: 0x0102_0304_0506_0708,
            command,
            flags: CommandFlags(flags),
            offset: 0x1_0000,
            length: 0x4000,
        }
    }

    const COOKIE: &[u8] = b"\x01\x02\x03\x04\x05\x06\x07\x08";

    #[test]
    fn simple_replies() {
        let expected = [b"\x67\x44\x66\x98\0\0\0\0", COOKIE].concat();
        assert_eq!(success(&request(Command::Write, 0))[..], expected);
        assert_eq!(read_head(&session(false), &request(Command::Read, 0))[..], expected);
        let expected = [b"\x67\x44\x66\x98\0\0\0\x1c", COOKIE].concat();
        let write = request(Command::Write, 0);
        assert_eq!(failure(&session(false), &write, NbdError::NoSpace, "ignored")[..], expected);
    }

    #[test]
    fn chunks() {
        let data = [b"\x66\x8e\x33\xef\0\x01\0\x01", COOKIE, b"\0\0\x40\x08", b"\0\0\0\0\0\x01\0\0"].concat();
        assert_eq!(read_head(&session(true), &request(Command::Read, 0))[..], data);
        let mut first = data.clone();
        first[5] = 0;
        assert_eq!(data_chunk(0x0102_0304_0506_0708, 0x1_0000, 0x4000, More::Follows)[..], first);
        let hole =
            [b"\x66\x8e\x33\xef\0\0\0\x02", COOKIE, b"\0\0\0\x0c", b"\0\0\0\0\0\x01\0\0\0\0\x20\0"].concat();
        assert_eq!(hole_chunk(0x0102_0304_0506_0708, 0x1_0000, 0x2000, More::Follows)[..], hole);
        let none = [b"\x66\x8e\x33\xef\0\x01\0\0", COOKIE, b"\0\0\0\0"].concat();
        assert_eq!(none_chunk(0x0102_0304_0506_0708)[..], none);
    }

    #[test]
    fn error_chunks_carry_a_message() {
        let read = request(Command::Read, 0);
        let refused = Refusal { error: NbdError::Invalid, message: "why" };
        let expected =
            [b"\x66\x8e\x33\xef\0\x01\x80\x01", COOKIE, b"\0\0\0\x09", b"\0\0\0\x16\0\x03why"].concat();
        assert_eq!(refusal(&session(true), &read, refused)[..], expected);
        // Cut to whole characters: 101 bytes of the 102.
        let long = format!("a{}", "\u{fc}".repeat(100));
        let chunk = error_chunk(0, NbdError::Io, &long);
        assert_eq!(chunk.len(), 26 + 101);
        assert_eq!(std::str::from_utf8(&chunk[26..]).unwrap(), &long[..101]);
        assert_eq!(chunk[24..26], 101u16.to_be_bytes());
        assert_eq!(error_chunk(0, NbdError::Io, "").len(), 26);
    }

    fn extent(length: u64, status: u32) -> Extent {
        Extent { length, hole: status & 1 != 0, zero: status & 2 != 0 }
    }

    /// Checks the frame and returns lengths and flags.
    fn extents_of(reply: &[u8]) -> Vec<(u32, u32)> {
        assert_eq!(reply[..16], [b"\x66\x8e\x33\xef\0\x01\0\x05", COOKIE].concat());
        assert_eq!(reply[16..20], (reply.len() as u32 - 20).to_be_bytes());
        assert_eq!(reply[20..24], BASE_ALLOCATION_ID.to_be_bytes());
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        reply[24..].chunks(8).map(|extent| (word(&extent[..4]), word(&extent[4..]))).collect()
    }

    #[test]
    fn block_status_joins_and_cuts() {
        let plain = request(Command::BlockStatus, 0);
        let one = request(Command::BlockStatus, 1 << 3);
        let extents =
            [extent(0, 0), extent(0x1000, 0), extent(0x1000, 0), extent(0x200, 3), extent(1 << 40, 2)];
        assert_eq!(extents_of(&block_status(&plain, extents)), [(0x2000, 0), (0x200, 3), (0x1e00, 2)]);
        assert_eq!(extents_of(&block_status(&one, extents)), [(0x2000, 0)]);
        assert_eq!(extents_of(&block_status(&one, [extent(1 << 40, 3)])), [(0x4000, 3)]);
        assert_eq!(extents_of(&block_status(&plain, [])), [(0x4000, 0)]);
        assert_eq!(extents_of(&block_status(&plain, [extent(0x200, 1)])), [(0x200, 1)]);
    }

    #[test]
    fn block_status_ends_when_it_is_full() {
        let request = Request { length: u32::MAX, ..request(Command::BlockStatus, 0) };
        let endless = (0..).map(|i| extent(512, (i / 2) % 2 * 3));
        let extents = extents_of(&block_status(&request, endless));
        assert_eq!(extents.len(), EXTENTS_MAX);
        assert!(extents.iter().all(|extent| extent.0 == 1024));
    }

    proptest! {
        #[test]
        fn block_status_keeps_the_protocols_rules(
            list in prop::collection::vec((prop_oneof![0..9000u64, any::<u64>()], 0..4u32), 0..100),
            length in 1..=u32::MAX,
            one: bool,
        ) {
            let request = Request { length, ..request(Command::BlockStatus, u16::from(one) << 3) };
            let list = list.into_iter().map(|(length, status)| extent(length, status));
            let extents = extents_of(&block_status(&request, list));
            prop_assert!(!extents.is_empty() && (!one || extents.len() == 1));
            prop_assert!(extents.iter().all(|extent| extent.0 > 0));
            prop_assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1));
            prop_assert!(extents.iter().map(|extent| u64::from(extent.0)).sum::<u64>() <= u64::from(length));
        }
    }
}
