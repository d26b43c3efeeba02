//! A deterministic simulator of whole clusters: the engine and the disk format of the daemon, on
//! simulated disks and a simulated network, in virtual time, ordered by one seed.

pub mod checker;
pub mod cluster;
pub mod control;
pub mod disk;
pub mod network;
pub mod node;
pub mod numbered;
pub mod operator;
pub mod process;
pub mod schedule;
pub mod scheduler;
pub mod transitions;
pub mod workload;
