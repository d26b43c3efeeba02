//! The store in an etcd that managers on several machines share.
//!
//! ```text
//! PREFIX identity                       whose it is: the cluster's name, and a mark of its key
//! PREFIX leader                         who leads, and where; it goes with the leader's lease
//! PREFIX exporter-session               the largest number that was given
//! PREFIX head                           names the newest map
//! PREFIX base@VERSION/CHUNK             a map without its devices' spans; the last hundred are kept
//! PREFIX device/ID@VERSION/CHUNK        the spans of a device, written under that version
//! PREFIX event/NUMBER                   something that happened; the last 2,000 are kept
//! ```
//!
//! Whatever is written is a transaction that compares the revision at which the leader's key was
//! made: a manager that was deposed, whether it knows that or not, can write nothing. The pieces of a
//! map are written first; the transaction on `head` makes them valid, and compares that as well.

mod access;
mod client;
mod election;
mod events;
mod handshake;
mod records;

pub use election::{Candidate, Seat};
pub use records::EtcdStore;
