//! `ublk-server`: the node daemon.

fn main() {}
