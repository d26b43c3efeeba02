//! Where requests come from.

pub mod nbd;
pub mod ublk;

/// What became of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It is on its way to whoever asked.
    Given,
    /// It has to wait: frames are still to be sent from the request's buffer.
    Later,
    /// Nobody asked for it (any more).
    Unknown,
}
