//! The negotiation of a connection, fixed newstyle.
//!
//! Driven as `send(pending) -> sent`, `receive -> handle`, until [`Negotiation::outcome`] is not
//! [`Outcome::Continue`]. What is pending then is still to be sent, also before closing.

use super::BASE_ALLOCATION;
use super::export::{ExportInfo, Exports, resolve};
use super::options::{self, Answer};
use thiserror::Error;

/// `NBDMAGIC`, the first bytes of every connection.
const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// `IHAVEOPT`, the second magic of the greeting and the first of every option.
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");

const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;

const CLIENT_FLAGS_BYTES: usize = 4;
const OPTION_HEADER_BYTES: usize = 16;

/// The longest data of an option that is read, in bytes; a longer one is skipped and refused.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// The longest data of an option that is skipped, in bytes; at a longer one we hang up, as at any
/// attempt to keep us busy.
pub const OPTION_SKIPPED_BYTES_MAX: u32 = 1 << 20;
/// The most options on one connection. `qemu-nbd --list` sends two for every export.
pub const OPTIONS_MAX: u32 = 1024;
/// While more than this is waiting to be sent, in bytes, no option is read: a client that does not
/// read its replies must not fill our memory with them.
const PENDING_BYTES_MAX: usize = 64 << 10;

/// What was agreed on, and holds for the rest of the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Session {
    /// What the client sees.
    pub export: ExportInfo,
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// `base:allocation` was chosen, so BLOCK_STATUS is allowed.
    pub base_allocation: bool,
}

/// Why a negotiation ended without a session.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CloseReason {
    /// The regular end.
    #[error("the client ended the negotiation")]
    Aborted,
    /// It must not set what it does not know the server to know.
    #[error("the client set unknown flags, {0:#x}: is it newer than the protocol we speak?")]
    UnknownClientFlags(u32),
    /// Not an NBD client, or one that has lost step.
    #[error("the client sent {0:#018x} where an option should begin: not an NBD client?")]
    BadOptionMagic(u64),
    /// Without fixed newstyle, there is no way to refuse but this one.
    #[error("a client without fixed newstyle sent option {0}: use a newer client")]
    NotFixedNewstyle(u32),
    /// More data than we would even skip.
    #[error("option {option} with {length} bytes of data: refused as an attack")]
    OptionTooLong {
        /// Its number.
        option: u32,
        /// In bytes.
        length: u32,
    },
    /// More options than a client can need.
    #[error("more than {OPTIONS_MAX} options: refused as an attack")]
    TooManyOptions,
    /// `EXPORT_NAME` has no other way to refuse.
    #[error("the client asked for an export that does not exist: {0:?}")]
    UnknownExport(String),
    /// The name breaks the protocol's rules for strings.
    #[error("the client asked for an export by a name that is not a legal string")]
    BadExportName,
}

/// How far a negotiation is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// More to send or to receive.
    Continue,
    /// Send what is pending; requests follow.
    Transmit(Session),
    /// Send what is pending and close.
    Closed(CloseReason),
}

enum State {
    ClientFlags,
    Header,
    Data { option: u32, length: usize },
    Skip { option: u32, left: u32, refusal: options::Refused },
}

/// One connection's negotiation, from the greeting to the session.
pub struct Negotiation {
    state: State,
    /// What has been received of a header or of an option's data.
    partial: Vec<u8>,
    pending: Vec<u8>,
    pending_sent: usize,
    options: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    structured: bool,
    /// The canonical name of the export for which `base:allocation` was chosen.
    base_allocation_of: Option<String>,
    outcome: Outcome,
}

impl Default for Negotiation {
    fn default() -> Self {
        Self::new()
    }
}

impl Negotiation {
    /// Begins, with the greeting pending.
    pub fn new() -> Negotiation {
        let mut pending = Vec::with_capacity(256);
        pending.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
        pending.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        pending.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Negotiation {
            state: State::ClientFlags,
            partial: Vec::new(),
            pending,
            pending_sent: 0,
            options: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            structured: false,
            base_allocation_of: None,
            outcome: Outcome::Continue,
        }
    }

    /// Takes received bytes and says how many it used. What it leaves is either to be handed in again
    /// after more was sent, or, once the outcome is [`Outcome::Transmit`], belongs to the first
    /// request.
    pub fn handle(&mut self, bytes: &[u8], exports: &dyn Exports) -> usize {
        let mut rest = bytes;
        while self.outcome == Outcome::Continue && self.pending().len() <= PENDING_BYTES_MAX {
            if !self.gather(&mut rest) {
                break;
            }
            self.step(exports);
        }
        bytes.len() - rest.len()
    }

    /// What is to be sent now; in order, and before anything of the session.
    pub fn pending(&self) -> &[u8] {
        &self.pending[self.pending_sent..]
    }

    /// The first `bytes` of what is pending have been sent.
    pub fn sent(&mut self, bytes: usize) {
        assert!(bytes <= self.pending().len(), "more was sent than there was");
        self.pending_sent += bytes;
        if self.pending_sent == self.pending.len() {
            self.pending.clear();
            self.pending_sent = 0;
        }
    }

    /// How far it is.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Moves bytes from `rest` to where the state wants them; false if there are too few.
    fn gather(&mut self, rest: &mut &[u8]) -> bool {
        let want = match &mut self.state {
            State::ClientFlags => CLIENT_FLAGS_BYTES,
            State::Header => OPTION_HEADER_BYTES,
            State::Data { length, .. } => *length,
            State::Skip { left, .. } => {
                let skipped = rest.len().min(*left as usize);
                *rest = &rest[skipped..];
                *left -= skipped as u32;
                return *left == 0;
            }
        };
        // Grows with what has come, not with what was announced.
        let (taken, others) = rest.split_at(rest.len().min(want - self.partial.len()));
        self.partial.extend_from_slice(taken);
        *rest = others;
        self.partial.len() == want
    }

    fn step(&mut self, exports: &dyn Exports) {
        let bytes = std::mem::take(&mut self.partial);
        match std::mem::replace(&mut self.state, State::Header) {
            State::ClientFlags => self.client_flags(&bytes),
            State::Header => self.header(&bytes),
            State::Data { option, .. } => self.option(option, &bytes, exports),
            State::Skip { option, refusal, .. } => options::put_refusal(&mut self.pending, option, refusal),
        }
        // Keeps the buffer, so that a client going byte by byte does not cost an allocation each.
        self.partial = bytes;
        self.partial.clear();
    }

    fn client_flags(&mut self, bytes: &[u8]) {
        let flags = options::Fields(bytes).u32().unwrap_or_default();
        let unknown = flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if unknown != 0 {
            self.outcome = Outcome::Closed(CloseReason::UnknownClientFlags(unknown));
        }
        self.fixed_newstyle = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
    }

    fn header(&mut self, bytes: &[u8]) {
        let mut fields = options::Fields(bytes);
        let (Some(magic), Some(option), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            unreachable!("gathered before");
        };
        self.options += 1;
        let closed = if magic != OPTION_MAGIC {
            Some(CloseReason::BadOptionMagic(magic))
        } else if !self.fixed_newstyle && option != options::EXPORT_NAME {
            Some(CloseReason::NotFixedNewstyle(option))
        } else if self.options > OPTIONS_MAX {
            Some(CloseReason::TooManyOptions)
        } else if option == options::EXPORT_NAME && length as usize > super::STRING_BYTES_MAX {
            Some(CloseReason::BadExportName)
        } else if length > OPTION_SKIPPED_BYTES_MAX {
            Some(CloseReason::OptionTooLong { option, length })
        } else {
            None
        };
        if let Some(reason) = closed {
            self.outcome = Outcome::Closed(reason);
            return;
        }
        self.state = if !options::is_known(option) {
            State::Skip { option, left: length, refusal: options::UNKNOWN_OPTION }
        } else if length > OPTION_BYTES_MAX {
            State::Skip { option, left: length, refusal: options::TOO_LONG }
        } else {
            State::Data { option, length: length as usize }
        };
    }

    fn option(&mut self, option: u32, data: &[u8], exports: &dyn Exports) {
        if option == options::EXPORT_NAME {
            return self.export_name(data, exports);
        }
        if option == options::SET_META_CONTEXT {
            // Replaces what was chosen before, also when it fails.
            self.base_allocation_of = None;
        }
        match options::answer(&mut self.pending, option, data, self.structured, exports) {
            Ok(Answer::Done) => {}
            Ok(Answer::Structured) => self.structured = true,
            Ok(Answer::BaseAllocation(export)) => self.base_allocation_of = Some(export),
            Ok(Answer::Go(export)) => self.transmit(export),
            Ok(Answer::Abort) => self.outcome = Outcome::Closed(CloseReason::Aborted),
            Err(refusal) => options::put_refusal(&mut self.pending, option, refusal),
        }
    }

    fn export_name(&mut self, data: &[u8], exports: &dyn Exports) {
        let Some(name) = options::string(data) else {
            self.outcome = Outcome::Closed(CloseReason::BadExportName);
            return;
        };
        let Some(export) = resolve(exports, name) else {
            self.outcome = Outcome::Closed(CloseReason::UnknownExport(name.to_owned()));
            return;
        };
        self.pending.extend_from_slice(&export.size.to_be_bytes());
        self.pending.extend_from_slice(&export.transmission_flags().to_be_bytes());
        if !self.no_zeroes {
            self.pending.extend_from_slice(&[0; 124]);
        }
        self.transmit(export);
    }

    fn transmit(&mut self, export: ExportInfo) {
        let base_allocation = self.base_allocation_of.as_ref() == Some(&export.name);
        debug_assert!(!base_allocation || self.structured, "{BASE_ALLOCATION} needs structured replies");
        self.outcome = Outcome::Transmit(Session { export, structured: self.structured, base_allocation });
    }
}
