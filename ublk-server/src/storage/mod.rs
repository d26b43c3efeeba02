//! The storage manager's side of a disk: finding out what is on it, formatting it, opening it.

pub mod candidate;
pub mod foreign;
pub mod prepare;
pub mod profile;

pub use candidate::{Candidate, DiskError};
