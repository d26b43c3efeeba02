//! What goes into the engine and what comes out of it.

use crate::format::journal::MetadataIo;
use crate::ids::{DeviceId, DiskId, MapVersion, NodeId};
use crate::wire::header::{Header, Trailer};

slotmap::new_key_type! {
    /// An operation on one slice's copy here.
    pub struct OpKey;
    /// A flush of one device's slices here.
    pub struct FlushKey;
}

/// A buffer of the driver's; the engine never looks inside.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BufferId(pub u32);

/// A piece of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufferRange {
    /// The buffer.
    pub buffer: BufferId,
    /// Byte offset within it.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

impl BufferRange {
    /// A piece of this piece.
    pub fn slice(self, offset: u32, length: u32) -> Self {
        debug_assert!(offset + length <= self.length);
        Self { buffer: self.buffer, offset: self.offset + offset, length }
    }
}

/// A frontend's name for its request, given back when it completes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RequestToken(pub u64);

/// What a frontend asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Fill the buffer.
    Read,
    /// Store the buffer; `fua`: on stable storage before it completes.
    Write {
        /// Through to stable storage.
        fua: bool,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Through to stable storage.
        fua: bool,
    },
    /// The range need not be kept.
    Discard,
    /// Everything completed so far is on stable storage of every copy afterwards.
    Flush,
}

/// A request of a frontend.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Given back with the completion.
    pub token: RequestToken,
    /// The device.
    pub device: DeviceId,
    /// What to do.
    pub kind: RequestKind,
    /// Byte offset on the device; a multiple of its block size.
    pub offset: u64,
    /// Bytes; a multiple of the block size; 0 for a flush.
    pub length: u32,
    /// Data of a read or write, `length` bytes; it belongs to the engine until the completion.
    pub buffer: Option<BufferRange>,
}

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RequestError {
    #[error("input/output error")]
    Io,
    #[error("outside of the device, or not aligned to its block size")]
    Invalid,
    #[error("this node may not export the device any more")]
    ClaimLost,
    #[error("no copy can be reached, and the device is set to fail instead of waiting")]
    NoQuorum,
}

/// One of the node's disks, counted as they were given to the engine.
pub type DiskIndex = usize;

/// Names an I/O of the driver's; given back with its completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// Data of an operation.
    Op(OpKey),
    /// A flush of a disk.
    Flush(DiskIndex),
    /// A disk's metadata, with the journal's number.
    Metadata(DiskIndex, u64),
}

/// The body of a message to send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// No body.
    None,
    /// From a buffer, which stays as it is until an answer came or the session ended.
    Buffer(BufferRange),
    /// From a buffer that the driver frees once it is sent.
    Release(BufferRange),
    /// Small control content.
    Bytes(Vec<u8>),
}

/// What the driver has to do, in this order.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Action {
    /// Read from a disk's slot into a buffer.
    Read { io: Io, disk: DiskIndex, slot: u32, offset: u32, buffer: BufferRange },
    /// Write to a disk's slot; `fua`: through to stable storage.
    Write { io: Io, disk: DiskIndex, slot: u32, offset: u32, buffer: BufferRange, fua: bool },
    /// Make a range of a slot read as zeros.
    Zero { io: Io, disk: DiskIndex, slot: u32, offset: u32, length: u32, fua: bool },
    /// Give back a range's space, if the disk can; errors do not matter.
    Punch { io: Io, disk: DiskIndex, slot: u32, offset: u32, length: u32 },
    /// Flush a disk's volatile cache.
    Flush { io: Io, disk: DiskIndex },
    /// A metadata write or flush.
    Metadata { io: Io, disk: DiskIndex, work: MetadataIo },
    /// Queue a message on the lane to that node; the driver fills in the checksums.
    Send { peer: NodeId, session: u64, header: Header, trailer: Option<Trailer>, body: Body },
    /// Close the lane to that node.
    CloseLane { peer: NodeId, session: u64, reason: String },
    /// Fill a buffer with zeros.
    FillZero { buffer: BufferRange },
    /// Compute the digests of a buffer's small blocks, given back to [`super::Engine::handle_digests`].
    Digest { op: OpKey, buffer: BufferRange },
    /// Copy between buffers.
    Copy { from: BufferRange, to: BufferRange },
    /// A buffer that came with a frame is free again.
    Release { buffer: BufferId },
    /// A request is done.
    Complete { token: RequestToken, result: Result<(), RequestError> },
    /// Something for the manager.
    Report(Report),
}

/// What the engine has to tell the manager.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Report {
    /// This version is durably adopted, older claims' writes are finished or aborted.
    Adopted { version: MapVersion },
    /// As primary: that node's copies miss writes or cannot be reached.
    AskStale { peer: NodeId, version: MapVersion, cause: String },
    /// As primary: that node lives and owes the answer to a write for too long.
    AskSlow { peer: NodeId, version: MapVersion, cause: String },
    /// As primary: that node's stale copies can be reached, let them be filled.
    AskSyncing { peer: NodeId, version: MapVersion },
    /// As primary: that node's syncing copies of the device are equal to this node's.
    AskInSync { peer: NodeId, device: DeviceId, version: MapVersion },
    /// A disk does not take writes any more.
    DiskFailed { disk: DiskId, reason: String },
}
