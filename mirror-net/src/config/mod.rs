//! The cluster file `cluster.toml`: one identical file on every machine.
//!
//! It says who the nodes are and which disks they bring; the distribution map, made from it once,
//! says where the data is. Every mistake is refused with its line and field, so that nobody has to
//! guess what a default made of a typing error.

mod error;
mod parse;
mod policy;
mod size;
mod store;
#[cfg(test)]
mod tests;

pub use error::ConfigError;
pub use policy::{NodePolicy, Pace, Policy, Tolerance};
pub use size::{format_bytes, parse_bytes};
pub use store::{EtcdFile, StoreFile, TlsFile};

use crate::map::layout::Layout;
use crate::map::{DevicePolicy, SegmentSlots};
use core::net::SocketAddr;
use std::fmt;
use std::path::PathBuf;

/// Bytes in a slice unless the file says otherwise.
pub const SLICE_BYTES_DEFAULT: u32 = 64 << 20;
/// Longest name of a cluster, node or disk.
pub const NAME_BYTES_MAX: usize = 32;

/// Whether a text can be the name of a cluster, node or disk.
pub fn check_name(text: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fits = !text.is_empty() && text.len() <= NAME_BYTES_MAX;
    if fits && text.chars().all(plain) && !text.starts_with('-') {
        return Ok(());
    }
    Err(format!("{text:?} is not a name: 1 to {NAME_BYTES_MAX} of a-z, 0-9 and -, not beginning with -"))
}

/// A cluster file that has passed every check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterFile {
    /// The cluster's name, for people.
    pub name: String,
    /// Bytes in a slice; a power of two.
    pub slice_bytes: u32,
    /// The secret that all parts of the cluster share.
    pub key_file: PathBuf,
    /// `host:port` where the managers listen, one for each machine that runs one. Of several, one leads.
    pub managers: Vec<String>,
    /// Where the manager keeps the map.
    pub store: StoreFile,
    /// What the manager does by itself.
    pub policy: Policy,
    /// Who mirrors whom when it is created.
    pub layout: Layout,
    /// The nodes, in the order of the file, which decides who mirrors whom among equals.
    pub nodes: Vec<NodeFile>,
}

/// A node as the cluster file describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFile {
    /// Its name; unique.
    pub name: String,
    /// `host:port` where it listens for other nodes.
    pub address: String,
    /// Its power feed: nodes that share one never mirror each other.
    pub power: Option<String>,
    /// Its switch: nodes that share one never mirror each other.
    pub switch: Option<String>,
    /// Whether it holds no data until it is activated.
    pub spare: bool,
    /// How it exports its devices.
    pub frontend: Frontend,
    /// Where its NBD server listens, if that is the frontend.
    pub nbd: NbdListen,
    /// What its devices are made with.
    pub devices: DevicePolicy,
    /// Its disks.
    pub disks: Vec<DiskFile>,
}

/// A disk as the cluster file describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskFile {
    /// Its name; unique within the node.
    pub name: String,
    /// A block device, or a file.
    pub path: PathBuf,
    /// For files: created with so many bytes if it is missing.
    pub bytes: Option<u64>,
    /// How it is divided.
    pub segments: Segments,
}

/// How a node exports its devices.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Frontend {
    /// ublk where the kernel has it, NBD where it does not.
    #[default]
    Auto,
    /// `/dev/ublkbN`.
    Ublk,
    /// An NBD server.
    Nbd,
}

impl Frontend {
    /// As the cluster file and the command line spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        }
    }

    /// The reverse of [`Self::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Auto, Self::Ublk, Self::Nbd].into_iter().find(|frontend| frontend.as_str() == text)
    }
}

/// Where a node's NBD server listens.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum NbdListen {
    /// On a unix socket in the node's run directory, `nbd.sock`, that serves all its devices by name.
    #[default]
    Unix,
    /// On a TCP address: loopback, unless the file says `nbd_allow_remote = true`.
    Tcp(SocketAddr),
}

/// What part of a disk belongs to each segment, in percent; the three add up to 100.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segments {
    /// The node's own mirrored data.
    pub primary: u8,
    /// Mirrors of other nodes' primary segments.
    pub secondary: u8,
    /// Data that nobody mirrors.
    pub unmirrored: u8,
}

impl Segments {
    /// From percentages for primaries, mirrors and what nobody mirrors; `None` unless they add up to 100.
    pub fn of([primary, secondary, unmirrored]: [u8; 3]) -> Option<Self> {
        let sum = [primary, secondary, unmirrored].into_iter().map(u32::from).sum::<u32>();
        (sum == 100).then_some(Self { primary, secondary, unmirrored })
    }
}

impl Default for Segments {
    fn default() -> Self {
        Self { primary: 45, secondary: 45, unmirrored: 10 }
    }
}

impl fmt::Display for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} % primary, {} % secondary, {} % unmirrored",
            self.primary, self.secondary, self.unmirrored
        )
    }
}

/// A disk that holds too few slices for its segments.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{size} hold {slots} slices of {slice}: too few for {segments}; use a larger disk or a smaller slice_size",
    size = format_bytes(*.bytes), slice = format_bytes(u64::from(*.slice_bytes))
)]
pub struct TooSmall {
    /// The disk's size.
    pub bytes: u64,
    /// Bytes in a slice.
    pub slice_bytes: u32,
    /// Slots that fit.
    pub slots: u64,
    /// What they were to be divided into.
    pub segments: Segments,
}

/// Divides a disk's usable slots among its segments.
///
/// What the percentages leave over goes to the largest remainders, the secondary segment first on a
/// tie: two equal disks with equal shares can then always mirror each other.
pub fn segment_slots(
    bytes: u64,
    slice_bytes: u32,
    usable_slots: u64,
    segments: Segments,
) -> Result<SegmentSlots, TooSmall> {
    let usable = usable_slots.min(u64::from(u32::MAX));
    // In the order in which a tie is decided.
    let shares = [segments.secondary, segments.primary, segments.unmirrored].map(u64::from);
    let mut slots = shares.map(|share| usable * share / 100);
    let mut by_remainder = [0, 1, 2];
    by_remainder.sort_by_key(|index| std::cmp::Reverse(usable * shares[*index] % 100));
    let left = usable - slots.iter().sum::<u64>();
    for index in by_remainder.into_iter().take(left as usize) {
        slots[index] += 1;
    }
    if shares.iter().zip(slots).any(|(share, slots)| *share > 0 && slots == 0) {
        return Err(TooSmall { bytes, slice_bytes, slots: usable_slots, segments });
    }
    let [secondary, primary, unmirrored] = slots.map(|slots| slots as u32);
    Ok(SegmentSlots { primary, secondary, unmirrored })
}

impl ClusterFile {
    /// Reads a cluster file; `path` is only named in errors.
    pub fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        parse::parse(text, path)
    }

    /// The node with that name.
    pub fn node(&self, name: &str) -> Option<&NodeFile> {
        self.nodes.iter().find(|node| node.name == name)
    }
}

#[cfg(test)]
mod slot_tests {
    use super::*;

    #[test]
    fn slots_follow_the_percentages_and_none_is_left_over() {
        let divide = |slots| segment_slots(1 << 30, 1 << 26, slots, Segments::default()).unwrap();
        assert_eq!(divide(15), SegmentSlots { primary: 7, secondary: 7, unmirrored: 1 });
        assert_eq!(divide(12), SegmentSlots { primary: 5, secondary: 6, unmirrored: 1 });
        assert_eq!(divide(100), SegmentSlots { primary: 45, secondary: 45, unmirrored: 10 });
    }

    #[test]
    fn an_equal_disk_can_always_mirror_its_like() {
        for percent in 1..=50 {
            let segments = Segments { primary: percent, secondary: percent, unmirrored: 100 - 2 * percent };
            for slots in 1..500 {
                if let Ok(divided) = segment_slots(0, 1 << 26, slots, segments) {
                    assert!(divided.secondary >= divided.primary, "{slots} {segments:?} {divided:?}");
                    assert_eq!(divided.total(), slots);
                }
            }
        }
    }

    #[test]
    fn a_disk_without_room_for_a_segment_is_refused() {
        let error = segment_slots(100 << 20, 64 << 20, 1, Segments::default()).unwrap_err();
        assert!(error.to_string().starts_with("100 MiB hold 1 slices of 64 MiB: too few"), "{error}");
    }
}
