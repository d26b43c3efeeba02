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
