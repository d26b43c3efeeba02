//! The server's half of the NBD protocol as pure code: bytes in, bytes out, no socket and no clock.
//!
//! A connection begins with a [`Negotiation`], which ends in a [`Session`]. From then on every
//! request is a header of 28 bytes, cut out of the stream by
//! [`Reassembly`](crate::ring::reassembly::Reassembly) with [`RequestParser`], judged by
//! [`Request::check`] and answered with the builders of [`reply`]. Nothing allocates after the
//! negotiation.
//!
//! The rules are those of the official protocol description (`doc/proto.md` of
//! NetworkBlockDevice/nbd), fixed newstyle. Deliberately absent: the old style, TLS (the socket is
//! local unless configured otherwise), extended headers, unfragmented reads (`DF`, never
//! advertised) and `CACHE`.

pub mod connection;
pub mod error;
pub mod export;
pub mod handshake;
mod options;
pub mod reply;
pub mod transmission;

#[cfg(test)]
mod handshake_tests;

pub use error::NbdError;
pub use export::{ExportInfo, Exports};
pub use handshake::{CloseReason, Negotiation, Outcome, Session};
pub use transmission::{Bad, Command, CommandFlags, Refusal, Request, RequestHeader, RequestParser};

/// The largest payload of a request or of a reply's data, in bytes; advertised to the client. The
/// protocol calls 32 MiB what every server should take.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Connections of one daemon, at most: each is owed the memory for one request, whatever else is under way.
pub const CONNECTIONS_MAX: usize = 256;

/// The longest string (an export's name, a description, a message) the protocol allows, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// The only metadata context there is here; which parts of the export are holes or zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The id by which `base:allocation` goes in this server's replies. The choice is the server's.
pub const BASE_ALLOCATION_ID: u32 = 1;
