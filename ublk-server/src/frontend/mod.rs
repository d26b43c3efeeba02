//! Where requests come from.

pub mod ublk;
