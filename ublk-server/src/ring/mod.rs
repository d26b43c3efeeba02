//! What stands between io_uring and the rest of the daemon.

pub mod reassembly;
