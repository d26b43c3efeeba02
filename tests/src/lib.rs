//! What tests across processes share: a playground, a small NBD client, the content of disks.

pub mod contents;
pub mod nbd;
pub mod playground;
