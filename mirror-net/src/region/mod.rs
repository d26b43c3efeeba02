//! What is tracked for each 1/64 of a slice.

pub mod digest;
pub mod masks;
pub mod range_lock;
