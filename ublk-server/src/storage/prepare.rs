//! Formatting disks, and opening formatted ones for service.

use super::{Candidate, DiskError, profile};
use crate::ring::disk::DiskFile;
use mirror_net::control::{DiskContent, FormatDisk, FormatOrder};
use mirror_net::engine::LocalDisk;
use mirror_net::format::alloc::Allocator;
use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::{Geometry, Journal, Plan, PlanStep, SlotOrder, Superblock};
use mirror_net::ids::{ClusterId, SlotIndex};
use nix::fcntl::FallocateFlags;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

/// Checks that every disk of an order may be formatted; nothing is changed.
pub fn check(order: &FormatOrder, disks: &[Arc<Candidate>]) -> Result<(), DiskError> {
    for wanted in &order.disks {
        let disk = find(wanted, disks)?;
        let (name, path) = (disk.name.clone(), disk.path.clone());
        let geometry = geometry(order, disk)?;
        if u64::from(geometry.slots) != wanted.slots.total() {
            let what = format!(
                "it has room for {} slices, the manager counted {}",
                geometry.slots,
                wanted.slots.total()
            );
            return Err(DiskError::Unsuitable { name, path, what });
        }
        let what = match disk.inventory().content {
            DiskContent::Blank => continue,
            DiskContent::Unusable { why } => why,
            DiskContent::Ours { cluster, .. } => format!("a disk of the ublk-mirror cluster {cluster}"),
            DiskContent::Foreign { what } => what,
        };
        if !order.force {
            return Err(DiskError::Foreign { name, path, what });
        }
    }
    Ok(())
}

/// Formats every disk of an order, which has been checked.
pub fn format_all(order: &FormatOrder, node_name: &str, disks: &[Arc<Candidate>]) -> Result<(), DiskError> {
    check(order, disks)?;
    order.disks.iter().try_for_each(|wanted| format_one(order, wanted, node_name, find(wanted, disks)?))
}

fn format_one(
    order: &FormatOrder,
    wanted: &FormatDisk,
    node_name: &str,
    disk: &Candidate,
) -> Result<(), DiskError> {
    let unsuitable =
        |what: String| DiskError::Unsuitable { name: disk.name.clone(), path: disk.path.clone(), what };
    let geometry = geometry(order, disk)?;
    let known_zero = disk.is_file && zero_file(disk, &geometry).is_ok();
    let options = FormatOptions {
        cluster: order.cluster,
        disk: wanted.disk,
        node: order.node,
        format: uuid::Uuid::new_v4(),
        node_name: node_name.to_owned(),
        disk_name: disk.name.clone(),
        geometry,
        segments: wanted.slots,
        slot_order: SlotOrder::FastestFirst,
        zone_profile: profile::measure(disk),
        known_zero,
    };
    let (_, plan) = format(options).map_err(|error| unsuitable(error.to_string()))?;
    carry_out(plan, disk).map_err(|error| unsuitable(format!("formatting failed: {error}")))
}

/// A file's data area can be made zero at once; a block device's regions are zeroed before their first use.
fn zero_file(disk: &Candidate, geometry: &Geometry) -> nix::Result<()> {
    let (offset, length) = (geometry.data.offset as i64, geometry.data.length as i64);
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let with = |flags| nix::fcntl::fallocate(disk.file(), flags | keep, offset, length);
    let hole = || with(FallocateFlags::FALLOC_FL_PUNCH_HOLE);
    let allocated = disk.file().metadata().map_or(0, |metadata| metadata.blocks() * 512);
    // Who gave us a sparse file wants it sparse: giving it its space now could fill the whole file system.
    if allocated < disk.bytes {
        return hole();
    }
    // Space stays allocated where it can be: writes into a hole are slower.
    with(FallocateFlags::FALLOC_FL_ZERO_RANGE)
        .or_else(|_| hole().and_then(|()| with(FallocateFlags::empty())))
}

fn carry_out(plan: Plan, disk: &Candidate) -> io::Result<()> {
    for step in plan {
        match &step {
            PlanStep::Write { offset, .. } => disk.file().write_all_at(step.bytes(), *offset)?,
            PlanStep::Flush => disk.file().sync_data()?,
        }
    }
    Ok(())
}

fn find<'a>(wanted: &FormatDisk, disks: &'a [Arc<Candidate>]) -> Result<&'a Candidate, DiskError> {
    disks
        .iter()
        .map(AsRef::as_ref)
        .find(|disk: &&Candidate| disk.name == wanted.name)
        .ok_or_else(|| DiskError::Missing { name: wanted.name.clone(), path: std::path::PathBuf::new() })
}

fn geometry(order: &FormatOrder, disk: &Candidate) -> Result<Geometry, DiskError> {
    Geometry::new(disk.bytes, order.slice_bytes, disk.block_bytes).map_err(|error| DiskError::Unsuitable {
        name: disk.name.clone(),
        path: disk.path.clone(),
        what: error.to_string(),
    })
}

/// Opens a formatted disk for service: recovery's repairs are carried out first.
pub fn open_for_service(disk: &Candidate, cluster: ClusterId) -> Result<(LocalDisk, DiskFile), DiskError> {
    let (superblock, journal) = recover(disk, cluster)?;
    let used = (0..journal.slots())
        .map(SlotIndex)
        .filter(|slot| journal.slot(*slot).assignment.is_some())
        .collect::<Vec<_>>();
    let allocator = Allocator::new(&superblock, used);
    let descriptor = disk.descriptor().map_err(|error| DiskError::Unsuitable {
        name: disk.name.clone(),
        path: disk.path.clone(),
        what: error.to_string(),
    })?;
    let file = DiskFile::new(descriptor, superblock.geometry.clone(), disk.in_memory);
    Ok((LocalDisk { id: superblock.disk, attach: disk.attach, journal, allocator }, file))
}

/// Carries out recovery's repairs of the metadata of a disk of this cluster. Nothing is left to do if it is called again.
pub fn recover(disk: &Candidate, cluster: ClusterId) -> Result<(Superblock, Journal), DiskError> {
    let (name, path) = (disk.name.clone(), disk.path.clone());
    let unsuitable = |what: String| DiskError::Unsuitable { name: name.clone(), path: path.clone(), what };
    let opened = disk.read_metadata().map_err(|source| DiskError::Format {
        name: name.clone(),
        path: path.clone(),
        source,
    })?;
    if opened.superblock.cluster != cluster {
        return Err(unsuitable(format!(
            "it belongs to the cluster {}, this node to {cluster}: attach the right disk, or format it with \
             `mirrorctl cluster create --force` as part of a new cluster",
            opened.superblock.cluster
        )));
    }
    if opened.report.is_loss() {
        return Err(unsuitable("its slot tables are lost: replace the disk, or format it again".into()));
    }
    if !opened.report.page_faults.is_empty() || !opened.report.superblocks_rewritten.is_empty() {
        tracing::warn!(disk = name, report = ?opened.report, "the disk's metadata was damaged and has been repaired");
    }
    carry_out(opened.plan, disk)
        .map_err(|error| unsuitable(format!("repairing its metadata failed: {error}")))?;
    Ok((opened.superblock, opened.journal))
}
