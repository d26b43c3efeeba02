//! What travels between nodes, manager and `mirrorctl`.

pub mod handshake;
#[cfg(feature = "transport")]
pub mod transport;
