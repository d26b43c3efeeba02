//! The node daemon: stores its segments, serves its devices over ublk or NBD, and mirrors every
//! write to its partner.

pub mod abort;
pub mod agent;
pub mod driver;
pub mod frontend;
pub mod mirror;
pub mod ring;
pub mod storage;
