//! The 64 bytes before every message on a lane.
//!
//! Little-endian. Both checksums are CRC32C seeded with the cluster's id, so that a frame of
//! another cluster is not mistaken for one of ours even if it arrives.

use crate::ids::{ClusterId, LossGeneration, SliceEpoch};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// Longest body: the largest piece of a request, plus the trailer of a forwarded one.
pub const BODY_BYTES_MAX: u32 = PIECE_BYTES_MAX + TRAILER_BYTES as u32;
/// Requests are cut into pieces of at most so many bytes.
pub const PIECE_BYTES_MAX: u32 = 1 << 20;
/// Bytes of the trailer that ends the body of a forwarded request.
pub const TRAILER_BYTES: usize = 32;

const MAGIC: u32 = u32::from_le_bytes(*b"UBMW");
const WIRE_VERSION: u16 = 1;

/// What a message is. The numbers are the wire's; never give one a new meaning.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// First on a lane: who speaks, with which disks; nothing else is valid before it.
    Open = 1,
    /// `slice_epoch` is the map version that the sender has durably adopted.
    Adopted = 2,
    /// Asks for a read lease; answered with [`Kind::Pong`] of the same sequence.
    Ping = 3,
    /// Grants the lease; `slice_epoch` is the grantor's map version.
    Pong = 4,
    /// The sender has further disks since it sent [`Kind::Open`].
    Attached = 5,
    /// Primary to secondary: store the body.
    Write = 10,
    /// Primary to secondary: the range reads as zeros from now on.
    Zero = 11,
    /// Primary to secondary: the whole regions in the range need not be kept.
    Discard = 12,
    /// Primary to secondary: make everything acknowledged for this device durable.
    Flush = 13,
    /// Primary to secondary: here is my dirty mask of the slice, unite it with yours; the body is that mask.
    /// Answered with [`Kind::Masks`].
    Unite = 14,
    /// Primary to secondary: the digests of the range, one for each block; with [`FLAG_FINE`] of the small
    /// blocks. Answered with [`Kind::Digests`].
    Compare = 15,
    /// Primary to secondary: the regions in the range are equal on all copies, they are dirty no longer. The
    /// body is the mask of the regions that hold data.
    Clear = 16,
    /// Primary to member: what you have in the range. The answer's body is the data.
    Fetch = 17,
    /// Answers a message of the kinds above; the sequence is that of the message.
    Ack = 20,
    /// Answers [`Kind::Unite`]: what was dirty, and what is readable.
    Masks = 21,
    /// Answers [`Kind::Compare`].
    Digests = 22,
    /// Exporter to primary: read.
    ForwardRead = 30,
    /// Exporter to primary: write the body.
    ForwardWrite = 31,
    /// Exporter to primary: zero.
    ForwardZero = 32,
    /// Exporter to primary: discard.
    ForwardDiscard = 33,
    /// Exporter to primary: flush the device's slices that you are primary of.
    ForwardFlush = 34,
    /// Answers a forwarded request; a read's body is the data.
    Reply = 40,
}

impl Kind {
    fn parse(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Open,
            2 => Self::Adopted,
            3 => Self::Ping,
            4 => Self::Pong,
            5 => Self::Attached,
            10 => Self::Write,
            11 => Self::Zero,
            12 => Self::Discard,
            13 => Self::Flush,
            14 => Self::Unite,
            15 => Self::Compare,
            16 => Self::Clear,
            17 => Self::Fetch,
            20 => Self::Ack,
            21 => Self::Masks,
            22 => Self::Digests,
            30 => Self::ForwardRead,
            31 => Self::ForwardWrite,
            32 => Self::ForwardZero,
            33 => Self::ForwardDiscard,
            34 => Self::ForwardFlush,
            40 => Self::Reply,
            _ => return None,
        })
    }

    /// Whether the body ends in a [`Trailer`].
    pub fn is_forwarded(self) -> bool {
        (Self::ForwardRead as u8..=Self::ForwardFlush as u8).contains(&(self as u8))
    }

    /// Whether the body, if there is one, is data of a device: it belongs into a buffer. The bodies of
    /// other kinds are small and the engine looks into them.
    pub fn carries_data(self) -> bool {
        matches!(self, Self::Write | Self::ForwardWrite | Self::Ack | Self::Reply)
    }

    /// Whether the receiver needs room for as many bytes as the header's `length` says: to read into.
    pub fn asks_for_data(self) -> bool {
        matches!(self, Self::ForwardRead | Self::Fetch | Self::Compare)
    }
}

/// Set in a write's `flags`: through to stable storage on every copy (FUA).
pub const FLAG_FUA: u8 = 1;
/// Set in the `flags` of [`Kind::Compare`]: digests of the small blocks instead of the large.
pub const FLAG_FINE: u8 = 1;

/// How a message ended, in the `flags` of an ack or reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Done = 0,
    /// The sender's epoch or claim is not the receiver's: look at the map again.
    Fenced = 1,
    /// The receiver's disk failed.
    DiskFailed = 2,
    /// The request itself is wrong.
    Invalid = 3,
    /// The exporter lost its claim for good.
    ClaimLost = 4,
    /// It could not be served for so long that the device is set to fail.
    NoQuorum = 5,
}

impl Status {
    /// Unknown numbers count as [`Status::Invalid`].
    pub fn parse(byte: u8) -> Self {
        match byte {
            0 => Self::Done,
            1 => Self::Fenced,
            2 => Self::DiskFailed,
            4 => Self::ClaimLost,
            5 => Self::NoQuorum,
            _ => Self::Invalid,
        }
    }
}

/// A header, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the message is.
    pub kind: Kind,
    /// [`FLAG_FUA`] in requests, a [`Status`] in answers.
    pub flags: u8,
    /// The lane's session, the same for both directions.
    pub session: u64,
    /// Counts the sender's messages on this lane; an answer carries the number of what it answers.
    pub sequence: u64,
    /// The slice's epoch; see the kinds that use it otherwise.
    pub slice_epoch: SliceEpoch,
    /// The device.
    pub device: u32,
    /// The slice within it.
    pub slice: u32,
    /// Byte offset within the slice.
    pub offset: u32,
    /// Bytes that are meant, also where no body carries them.
    pub length: u32,
    /// Bytes that follow.
    pub body_bytes: u32,
    /// CRC of the body.
    pub body_crc: u32,
    /// The slice's loss generation at the sender.
    pub loss: LossGeneration,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: U32,
    version: U16,
    kind: u8,
    flags: u8,
    header_crc: U32,
    body_crc: U32,
    session: U64,
    sequence: U64,
    slice_epoch: U64,
    device: U32,
    slice: U32,
    offset: U32,
    length: U32,
    body_bytes: U32,
    loss: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

/// What is wrong with a header or body; ends the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BadFrame {
    #[error("bad magic {0:#010x}")]
    Magic(u32),
    #[error("wire version {0}, this program speaks {WIRE_VERSION}")]
    Version(u16),
    #[error("header checksum")]
    HeaderCrc,
    #[error("body checksum")]
    BodyCrc,
    #[error("unknown kind {0}")]
    Kind(u8),
    #[error("a body of {0} bytes is larger than {BODY_BYTES_MAX}")]
    BodyTooLong(u32),
    #[error("a frame of another session")]
    Session,
    #[error("{0}")]
    Content(&'static str),
}

/// The CRC seed of a cluster.
#[derive(Clone, Copy, Debug)]
pub struct CrcSeed(u32);

impl CrcSeed {
    /// Of that cluster.
    pub fn new(cluster: &ClusterId) -> Self {
        Self(crc32c::crc32c(cluster.as_bytes()))
    }

    /// The checksum of a body that may lie in two pieces.
    pub fn body(self, pieces: [&[u8]; 2]) -> u32 {
        pieces.iter().fold(self.0, |crc, piece| crc32c::crc32c_append(crc, piece))
    }
}

impl Header {
    /// A header with everything zero but its kind.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            flags: 0,
            session: 0,
            sequence: 0,
            slice_epoch: SliceEpoch(0),
            device: 0,
            slice: 0,
            offset: 0,
            length: 0,
            body_bytes: 0,
            body_crc: 0,
            loss: LossGeneration(0),
        }
    }

    /// The bytes of the wire.
    pub fn encode(&self, seed: CrcSeed) -> [u8; HEADER_BYTES] {
        let mut raw = Raw {
            magic: MAGIC.into(),
            version: WIRE_VERSION.into(),
            kind: self.kind as u8,
            flags: self.flags,
            header_crc: 0.into(),
            body_crc: self.body_crc.into(),
            session: self.session.into(),
            sequence: self.sequence.into(),
            slice_epoch: self.slice_epoch.0.into(),
            device: self.device.into(),
            slice: self.slice.into(),
            offset: self.offset.into(),
            length: self.length.into(),
            body_bytes: self.body_bytes.into(),
            loss: self.loss.0.into(),
        };
        raw.header_crc = crc32c::crc32c_append(seed.0, raw.as_bytes()).into();
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Checks and reads the bytes of the wire.
    pub fn decode(bytes: &[u8; HEADER_BYTES], seed: CrcSeed) -> Result<Self, BadFrame> {
        let mut raw = Raw::read_from_bytes(bytes).map_err(|_| BadFrame::HeaderCrc)?;
        if raw.magic.get() != MAGIC {
            return Err(BadFrame::Magic(raw.magic.get()));
        }
        if raw.version.get() != WIRE_VERSION {
            return Err(BadFrame::Version(raw.version.get()));
        }
        let crc = std::mem::replace(&mut raw.header_crc, 0.into());
        if crc.get() != crc32c::crc32c_append(seed.0, raw.as_bytes()) {
            return Err(BadFrame::HeaderCrc);
        }
        let kind = Kind::parse(raw.kind).ok_or(BadFrame::Kind(raw.kind))?;
        if raw.body_bytes.get() > BODY_BYTES_MAX {
            return Err(BadFrame::BodyTooLong(raw.body_bytes.get()));
        }
        Ok(Self {
            kind,
            flags: raw.flags,
            session: raw.session.get(),
            sequence: raw.sequence.get(),
            slice_epoch: SliceEpoch(raw.slice_epoch.get()),
            device: raw.device.get(),
            slice: raw.slice.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
            body_bytes: raw.body_bytes.get(),
            body_crc: raw.body_crc.get(),
            loss: LossGeneration(raw.loss.get()),
        })
    }
}

/// Ends the body of a forwarded request: on whose behalf it comes (docs/protocol.md rule 14).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// The exporter's claim.
    pub claim: u64,
    /// The exporter's session.
    pub exporter_session: u64,
    /// Counts the exporter's requests.
    pub exporter_sequence: u64,
    /// The exporter.
    pub origin: u16,
}

impl Trailer {
    /// The bytes of the wire.
    pub fn encode(&self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..8].copy_from_slice(&self.claim.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.exporter_session.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.exporter_sequence.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.origin.to_le_bytes());
        bytes
    }

    /// Reads the last bytes of a body.
    pub fn decode(bytes: &[u8; TRAILER_BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]));
        Self {
            claim: word(0),
            exporter_session: word(8),
            exporter_sequence: word(16),
            origin: u16::from_le_bytes([bytes[24], bytes[25]]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        Header {
            flags: FLAG_FUA,
            session: 1,
            sequence: 2,
            slice_epoch: SliceEpoch(3),
            device: 4,
            slice: 5,
            offset: 6,
            length: 7,
            body_bytes: 8,
            body_crc: 9,
            loss: LossGeneration(10),
            ..Header::new(Kind::Write)
        }
    }

    fn seed() -> CrcSeed {
        CrcSeed::new(&ClusterId::default())
    }

    #[test]
    fn a_header_round_trips() {
        assert_eq!(Header::decode(&sample().encode(seed()), seed()), Ok(sample()));
    }

    #[test]
    fn another_clusters_header_is_refused() {
        let other = CrcSeed::new(&ClusterId(uuid::Uuid::from_u128(1)));
        assert_eq!(Header::decode(&sample().encode(other), seed()), Err(BadFrame::HeaderCrc));
    }

    #[test]
    fn a_trailer_round_trips() {
        let trailer = Trailer { claim: 1, exporter_session: 2, exporter_sequence: 3, origin: 4 };
        assert_eq!(Trailer::decode(&trailer.encode()), trailer);
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(bit in 0usize..HEADER_BYTES * 8) {
            let mut bytes = sample().encode(seed());
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes, seed()).is_err());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform32(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            prop_assert!(Header::decode(&all, seed()).is_err());
        }
    }
}
