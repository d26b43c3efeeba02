//! What tests share: the simulator of whole clusters, and for tests across real processes a
//! playground or a lab, a small NBD client, fio, a workload that knows what it may lose,
//! an etcd, and the content of disks.

pub mod certificates;
pub mod contents;
pub mod etcd;
pub mod fio;
pub mod lab;
pub mod machines;
pub mod model;
pub use ctl::nbd;
pub mod nbd_server;
pub mod playground;
pub mod sim;
pub mod stamps;
pub mod tenant;
pub mod test_disk;
pub mod usage;
