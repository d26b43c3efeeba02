//! What is asked of every node and disk that is to become part of a cluster, be it one to be made or one that runs.

use super::registry::Registered;
use crate::config::{Segments, format_bytes, segment_slots};
use crate::control::{DiskContent, DiskInventory};
use crate::format::Geometry;
use crate::map::SegmentSlots;

/// How long a node may look at its disks before it is given up.
pub(super) const CHECK_MS_MAX: u64 = 30_000;
/// How long formatting may take: large disks are measured and their tables written.
pub(super) const FORMAT_MS_MAX: u64 = 600_000;

/// Whether a node listens where the cluster file says.
pub(super) fn check_address(node: &str, entry: &Registered, address: &str) -> Result<(), String> {
    if entry.address == address {
        return Ok(());
    }
    Err(format!(
        "node {node} listens on {}, the cluster file says {address}: copy the same file to every machine and restart \
         ublk-server there",
        entry.address
    ))
}

/// A disk of the cluster file, as its node registered with it.
pub(super) fn find_disk<'a>(
    node: &str,
    entry: &'a Registered,
    name: &str,
    path: &str,
) -> Result<&'a DiskInventory, String> {
    let found = entry.disks.iter().find(|found| found.name == name && found.path == path);
    found.ok_or_else(|| {
        format!(
            "node {node} does not know disk {name} ({path}): copy the same cluster file to every machine and restart \
             ublk-server there"
        )
    })
}

/// The slots that a disk has, by segment.
pub(super) fn slots_of(
    node: &str,
    disk: &DiskInventory,
    slice_bytes: u32,
    segments: Segments,
) -> Result<SegmentSlots, String> {
    let named = |error: String| format!("node {node} disk {}: {error}", disk.name);
    let geometry =
        Geometry::new(disk.bytes, slice_bytes, disk.block_bytes).map_err(|error| named(error.to_string()))?;
    segment_slots(disk.bytes, slice_bytes, geometry.slots.into(), segments)
        .map_err(|error| named(error.to_string()))
}

/// Whether a disk may be formatted, before its node is asked.
pub(super) fn check_content(node: &str, disk: &DiskInventory, force: bool) -> Result<(), String> {
    let at = format!("node {node} disk {} ({}, {})", disk.name, disk.path, format_bytes(disk.bytes));
    let what = match &disk.content {
        DiskContent::Unusable { why } => return Err(format!("{at} cannot be used: {why}")),
        DiskContent::Blank => return Ok(()),
        _ if force => return Ok(()),
        DiskContent::Foreign { what } => format!("holds {what}"),
        DiskContent::Ours { cluster, .. } => format!("already belongs to cluster {cluster}"),
    };
    Err(format!("{at} {what}: nothing was formatted; --force would destroy what is on it"))
}
