//! The ways a host reaches a device.

pub mod nbd;
