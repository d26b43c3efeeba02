//! Requests of the transmission phase: parsing and judging them.

use super::handshake::Session;
use super::{NbdError, PAYLOAD_BYTES_MAX};
use crate::ring::reassembly::FrameParser;
use thiserror::Error;

const REQUEST_MAGIC: u32 = 0x2560_9513;

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read `length` bytes.
    Read,
    /// Write the `length` bytes that follow the header.
    Write,
    /// No more requests; there is no reply.
    Disconnect,
    /// Make permanent what has been acknowledged.
    Flush,
    /// The data is no longer needed.
    Trim,
    /// Fill a cache; refused.
    Cache,
    /// Write zeros, without payload.
    WriteZeroes,
    /// Say which parts are holes or zeros.
    BlockStatus,
    /// Anything else; refused.
    Unknown(u16),
}

impl Command {
    fn from_wire(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }

    /// Whether it changes data, and so is refused by a read-only export.
    pub fn changes_data(self) -> bool {
        matches!(self, Command::Write | Command::Trim | Command::WriteZeroes)
    }

    fn allowed_flags(self) -> u16 {
        // FUA is valid on every command: clients are known to set it where nothing is written.
        CommandFlags::FUA
            | match self {
                Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
                Command::BlockStatus => CommandFlags::REQ_ONE,
                _ => 0,
            }
    }
}

/// The flags of a request.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CommandFlags(pub u16);

impl CommandFlags {
    const FUA: u16 = 1 << 0;
    const NO_HOLE: u16 = 1 << 1;
    const REQ_ONE: u16 = 1 << 3;
    const FAST_ZERO: u16 = 1 << 4;

    /// What the command writes is permanent before the reply.
    pub fn fua(self) -> bool {
        self.0 & Self::FUA != 0
    }

    /// Zeroing must leave the range allocated.
    pub fn no_hole(self) -> bool {
        self.0 & Self::NO_HOLE != 0
    }

    /// One extent is enough as the answer to a block status.
    pub fn req_one(self) -> bool {
        self.0 & Self::REQ_ONE != 0
    }

    /// Zero only if that is quicker than writing; otherwise refuse with `NotSupported`.
    pub fn fast_zero(self) -> bool {
        self.0 & Self::FAST_ZERO != 0
    }
}

/// A request of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The client's name for it, sent back as it came.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// How to do it.
    pub flags: CommandFlags,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
}

/// The stream cannot be read any further, so the connection must be closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Bad {
    /// Where a request should begin there is something else.
    #[error("an NBD client sent {0:#010x} where a request should begin: not an NBD client, or out of step")]
    Magic(u32),
}

/// A request that is answered without asking the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The number in the reply.
    pub error: NbdError,
    /// What structured replies carry for people.
    pub message: &'static str,
}

/// The fixed 28 bytes before every request.
pub struct RequestHeader;

impl RequestHeader {
    /// In bytes.
    pub const LENGTH: usize = 28;

    /// Reads a header. Only a wrong magic is an error here: everything else leaves the stream in
    /// step, and [`Request::check`] judges it.
    pub fn parse(bytes: &[u8; Self::LENGTH]) -> Result<Request, Bad> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(Bad::Magic(magic));
        }
        let [k0, k1, k2, k3, k4, k5, k6, k7, rest @ ..] = rest;
        let [o0, o1, o2, o3, o4, o5, o6, o7, rest @ ..] = rest;
        Ok(Request {
            cookie: u64::from_be_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            command: Command::from_wire(u16::from_be_bytes([c0, c1])),
            flags: CommandFlags(u16::from_be_bytes([f0, f1])),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes(rest),
        })
    }
}

/// Cuts requests out of a stream.
#[derive(Clone, Copy, Default, Debug)]
pub struct RequestParser;

impl FrameParser for RequestParser {
    const HEADER_BYTES: usize = RequestHeader::LENGTH;
    type Header = Request;
    type Error = Bad;

    fn parse(&mut self, header: &[u8]) -> Result<(Request, usize), Bad> {
        let bytes = header.first_chunk().expect("a reassembly hands over whole headers");
        let request = RequestHeader::parse(bytes)?;
        Ok((request, request.payload_bytes() as usize))
    }
}

impl Request {
    /// How many bytes follow the header in the stream. They must be received, or received and thrown
    /// away, whether the request is refused or not.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Judges a request against the session it came in. What passes lies within the export, is
    /// aligned, and has a length that is not 0 (unless it is a flush or a disconnect); reads and
    /// writes are no longer than [`PAYLOAD_BYTES_MAX`].
    pub fn check(&self, session: &Session) -> Result<(), Refusal> {
        match self.command {
            // The client is leaving and gets no reply, so there is nothing to refuse.
            Command::Disconnect => return Ok(()),
            Command::Cache => return refuse(NbdError::Invalid, "caching is not supported"),
            Command::Unknown(_) => return refuse(NbdError::Invalid, "unknown command"),
            _ => {}
        }
        if self.flags.0 & !self.command.allowed_flags() != 0 {
            return refuse(NbdError::Invalid, "a flag that this command does not have");
        }
        if self.command == Command::Flush {
            return match (self.offset, self.length) {
                (0, 0) => Ok(()),
                _ => refuse(NbdError::Invalid, "a flush has neither offset nor length"),
            };
        }
        if session.export.read_only && self.command.changes_data() {
            return refuse(NbdError::NotPermitted, "the export is read-only");
        }
        self.check_range(session)?;
        self.check_length(session)?;
        if self.command == Command::BlockStatus && !session.base_allocation {
            return refuse(NbdError::Invalid, "no metadata context was negotiated");
        }
        if self.flags.fast_zero() && !session.export.fast_zero {
            return refuse(NbdError::NotSupported, "zeroing is not faster than writing here");
        }
        Ok(())
    }

    fn check_range(&self, session: &Session) -> Result<(), Refusal> {
        // What an empty request does is unspecified. Refused, it needs no special case anywhere else.
        if self.length == 0 {
            return refuse(NbdError::Invalid, "a length of 0");
        }
        let end = self.offset.checked_add(u64::from(self.length));
        if end.is_none_or(|end| end > session.export.size) {
            return match self.command {
                Command::Write | Command::WriteZeroes => {
                    refuse(NbdError::NoSpace, "beyond the end of the export")
                }
                _ => refuse(NbdError::Invalid, "beyond the end of the export"),
            };
        }
        let mask = u64::from(session.export.block_size_min) - 1;
        if (self.offset | u64::from(self.length)) & mask != 0 {
            return refuse(NbdError::Invalid, "not aligned to the minimum block size");
        }
        Ok(())
    }

    fn check_length(&self, session: &Session) -> Result<(), Refusal> {
        if self.length <= PAYLOAD_BYTES_MAX {
            return Ok(());
        }
        match self.command {
            // A structured reply could be cut into chunks, and the client is told to ask for less.
            Command::Read if session.structured => {
                refuse(NbdError::Overflow, "longer than the maximum payload")
            }
            Command::Read | Command::Write => refuse(NbdError::Invalid, "longer than the maximum payload"),
            // Without a payload there is no limit but the end of the export.
            _ => Ok(()),
        }
    }
}

fn refuse(error: NbdError, message: &'static str) -> Result<(), Refusal> {
    Err(Refusal { error, message })
}

#[cfg(test)]
mod tests {
    use super::super::handshake_tests::export;
    use super::*;
    use crate::frontend::nbd::ExportInfo;
    use proptest::prelude::*;

    fn header(flags: u16, command: u16, offset: u64, length: u32) -> [u8; RequestHeader::LENGTH] {
        let mut bytes = [0; RequestHeader::LENGTH];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&0x0123_4567_89ab_cdef_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    fn request(flags: u16, command: u16, offset: u64, length: u32) -> Request {
        RequestHeader::parse(&header(flags, command, offset, length)).unwrap()
    }

    /// 8 GiB in blocks of 4096, everything negotiated.
    fn session() -> Session {
        let export = ExportInfo { size: 8 << 30, block_size_min: 4096, fast_zero: true, ..export("disk") };
        Session { export, structured: true, base_allocation: true }
    }

    fn error(session: &Session, flags: u16, command: u16, offset: u64, length: u32) -> Option<NbdError> {
        request(flags, command, offset, length).check(session).err().map(|refusal| refusal.error)
    }

    #[test]
    fn headers() {
        let parsed = request(1, 1, 0x1000, 0x2000);
        let flags = CommandFlags(1);
        let expected = Request {
            cookie: 0x0123_4567_89ab_cdef,
            command: Command::Write,
            flags,
            offset: 0x1000,
            length: 0x2000,
        };
        assert_eq!(parsed, expected);
        assert!(flags.fua() && !flags.no_hole() && !flags.req_one() && !flags.fast_zero());
        assert_eq!(RequestHeader::parse(&[0x25; 28]), Err(Bad::Magic(0x2525_2525)));
        assert_eq!(request(0, 8, 0, 0).command, Command::Unknown(8));
    }

    #[test]
    fn only_writes_have_a_payload_refused_or_not() {
        for command in 0..10 {
            let request = request(0xffff, command, u64::MAX, u32::MAX);
            assert_eq!(request.payload_bytes(), if command == 1 { u32::MAX } else { 0 });
        }
    }

    #[test]
    fn what_is_right_passes() {
        let session = session();
        for (flags, command) in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 4), (1, 4), (0b1_0011, 6), (0b1000, 7)] {
            assert_eq!(error(&session, flags, command, 4096, 8192), None, "{command}");
            assert_eq!(error(&session, flags, command, (8 << 30) - 4096, 4096), None, "{command}");
            assert_eq!(error(&session, flags, command, 0, PAYLOAD_BYTES_MAX), None, "{command}");
        }
        assert_eq!(error(&session, 1, 3, 0, 0), None);
        assert_eq!(error(&session, 0, 2, 0, 0), None);
        // A disconnect has no reply, so it is never refused.
        assert_eq!(error(&session, 0xffff, 2, 1, 1), None);
    }

    #[test]
    fn beyond_the_end() {
        let session = session();
        for (command, expected) in [
            (0, NbdError::Invalid),
            (1, NbdError::NoSpace),
            (4, NbdError::Invalid),
            (6, NbdError::NoSpace),
            (7, NbdError::Invalid),
        ] {
            assert_eq!(error(&session, 0, command, 8 << 30, 4096), Some(expected));
            assert_eq!(error(&session, 0, command, (8 << 30) - 4096, 8192), Some(expected));
            assert_eq!(error(&session, 0, command, u64::MAX - 4095, 4096), Some(expected));
        }
    }

    #[test]
    fn unaligned_or_empty() {
        let session = session();
        for command in [0, 1, 4, 6, 7] {
            assert_eq!(error(&session, 0, command, 512, 4096), Some(NbdError::Invalid));
            assert_eq!(error(&session, 0, command, 4096, 512), Some(NbdError::Invalid));
            assert_eq!(error(&session, 0, command, 4096, 0), Some(NbdError::Invalid));
        }
        assert_eq!(error(&session, 0, 3, 4096, 0), Some(NbdError::Invalid));
        assert_eq!(error(&session, 0, 3, 0, 4096), Some(NbdError::Invalid));
    }

    #[test]
    fn too_long() {
        let mut session = session();
        let length = PAYLOAD_BYTES_MAX + 4096;
        assert_eq!(error(&session, 0, 0, 0, length), Some(NbdError::Overflow));
        assert_eq!(error(&session, 0, 1, 0, length), Some(NbdError::Invalid));
        for command in [4, 6, 7] {
            assert_eq!(error(&session, 0, command, 0, !4095), None);
        }
        session.structured = false;
        assert_eq!(error(&session, 0, 0, 0, length), Some(NbdError::Invalid));
    }

    #[test]
    fn read_only() {
        let mut session = session();
        session.export.read_only = true;
        for command in [1, 4, 6] {
            assert_eq!(error(&session, 0, command, 0, 4096), Some(NbdError::NotPermitted));
        }
        for command in [0, 7] {
            assert_eq!(error(&session, 0, command, 0, 4096), None);
        }
        assert_eq!(error(&session, 0, 3, 0, 0), None);
    }

    #[test]
    fn flags_belong_to_commands() {
        let session = session();
        for (command, allowed) in [(0, 0b1), (1, 0b1), (3, 0b1), (4, 0b1), (6, 0b1_0011), (7, 0b1001)] {
            for bit in 0..16 {
                let (offset, length) = if command == 3 { (0, 0) } else { (0, 4096) };
                let expected = if allowed >> bit & 1 == 1 { None } else { Some(NbdError::Invalid) };
                assert_eq!(error(&session, 1 << bit, command, offset, length), expected, "{command} {bit}");
            }
        }
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let mut session = session();
        session.base_allocation = false;
        session.export.fast_zero = false;
        assert_eq!(error(&session, 0, 7, 0, 4096), Some(NbdError::Invalid));
        assert_eq!(error(&session, 0b1_0000, 6, 0, 4096), Some(NbdError::NotSupported));
        assert_eq!(error(&session, 0, 6, 0, 4096), None);
        for command in [5, 8, 0xffff] {
            assert_eq!(error(&session, 0, command, 0, 4096), Some(NbdError::Invalid));
        }
    }

    proptest! {
        /// Whatever passes can be done without looking at it again.
        #[test]
        fn what_passes_is_harmless(
            flags in 0..64u16, command in 0..9u16, offset: u64, length: u32, near: bool, structured: bool,
        ) {
            let mut session = session();
            session.structured = structured;
            let (offset, length) = if near { ((offset % (9 << 30)) & !4095, length & !511) } else { (offset, length) };
            let request = request(flags, command, offset, length);
            if request.check(&session).is_ok() && command != 2 && command != 3 {
                prop_assert!(length > 0 && offset + u64::from(length) <= session.export.size);
                prop_assert_eq!((offset | u64::from(length)) % 4096, 0);
                prop_assert!(command > 1 || length <= PAYLOAD_BYTES_MAX);
            }
        }

        #[test]
        fn garbage_parses_or_is_refused(bytes: [u8; 28], magic: bool) {
            let mut bytes = bytes;
            if magic {
                bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            }
            let _ = RequestHeader::parse(&bytes).map(|request| request.check(&session()));
        }
    }
}
