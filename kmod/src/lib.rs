//! The kernel side of the mirror: what Linux's ublk driver is told, and what it can do.
//!
//! - [`abi`]: the driver's interface, in our own words;
//! - [`command`]: control commands over a small io_uring of their own;
//! - [`probe`]: whether this machine's kernel can carry a device, and what to do if not.

pub mod abi;
pub mod command;
pub mod probe;
