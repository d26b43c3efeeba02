//! What a process must do to itself before it serves block devices of its own machine: nothing in it
//! may wait for a device that waits for it.

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::mman::MlockAllFlags;
use std::fs;

/// From linux/prctl.h, since 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Prepares the whole process; on its first thread, before there are others. What fails is told: the
/// devices work all the same, until memory is short or the process ends at the wrong moment.
pub fn prepare_process() -> Vec<String> {
    let mut troubles = Vec::new();
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            troubles.push(format!("{what}: {error}"));
        }
    };
    // The last reference to a mounted file system on our own device would be dropped by our own end, and
    // that would wait for us. Mounts and unmounts of the machine still reach us.
    let apart = nix::sched::unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
    });
    note("a mount namespace of its own", apart.map_err(|error| error.to_string()));
    if apart.is_ok() {
        note("letting go of mounted devices", detach_ublk_mounts().map_err(|error| error.to_string()));
    }
    // A page fault could have to write to our device to find room.
    let locked = nix::sys::mman::mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    note("locking its memory", locked.map_err(|error| error.to_string()));
    let spared = fs::write("/proc/self/oom_score_adj", "-1000");
    note("being spared when memory is short", spared.map_err(|error| error.to_string()));
    troubles
}

/// The new namespace begins with a copy of every mount. Copies of those on ublk devices are let go of: where
/// the machine's unmounts do not reach us they would be the last, and our end would wait for our own device.
fn detach_ublk_mounts() -> std::io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        let Some((place, source)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(device)) = (place.split(' ').nth(4), source.split(' ').nth(1)) else {
            continue;
        };
        if device.starts_with("/dev/ublkb") {
            let point = point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
            nix::mount::umount2(point.as_str(), MntFlags::MNT_DETACH)?;
        }
    }
    Ok(())
}

/// Prepares a thread that requests wait for: its allocations never wait for writeback to a device of
/// its own.
pub fn prepare_thread() -> nix::Result<()> {
    // SAFETY: takes no pointers.
    nix::errno::Errno::result(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(drop)
}
