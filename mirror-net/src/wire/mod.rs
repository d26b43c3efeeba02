//! What travels between nodes, manager and `mirrorctl`.

pub mod handshake;
pub mod header;
#[cfg(feature = "transport")]
pub mod transport;
