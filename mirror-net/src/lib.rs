//! What the nodes of a mirror must agree on.
//!
//! Pure code: no clock, no socket, no thread, no randomness, no `unsafe`. Time and random numbers
//! are arguments, so that the daemon, the simulator and the tests drive the same code.
#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod engine;
pub mod format;
pub mod ids;
pub mod manager;
pub mod map;
pub mod planted;
pub mod region;
pub mod risk;
pub mod wire;
