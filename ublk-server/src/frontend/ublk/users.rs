//! Who uses a block device: asked before it is stopped in good order.
//!
//! The kernel tells of those that have it for themselves (a mount, device-mapper, swap) by refusing to open
//! it that way. Programs that just opened it are found by looking at what every process has open, which
//! needs root. What the kernel itself has open without claiming it is not found, but for loop devices.

use super::UblkId;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// A user of a block device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum User {
    /// It is mounted, or part of another block device, or swap.
    Claimed,
    /// A process has it open.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// It is behind that loop device.
    Loop(String),
}

impl User {
    /// Whether it is only udev, which looks at a device when it appears or somebody who wrote to it has closed it.
    pub fn is_udev(&self) -> bool {
        matches!(self, Self::Process { name, .. } if name == "(udev-worker)" || name == "systemd-udevd")
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claimed => f.write_str("a mount, or another block device"),
            Self::Process { pid, name } => write!(f, "{name} (process {pid})"),
            Self::Loop(name) => f.write_str(name),
        }
    }
}

/// Major and minor number of a device.
type Number = (u32, u32);

/// Who uses a device or one of its partitions; nobody, if it is not there.
///
/// # Errors
/// Not being able to look.
pub fn users_of(id: UblkId) -> io::Result<Vec<User>> {
    // Closed again at once: we are no user.
    let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(id.block_path()).map(drop);
    let mut users = match exclusive {
        Ok(()) => Vec::new(),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => vec![User::Claimed],
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let numbers = numbers(&id.sysfs_path())?;
    users.extend(processes_with(libc::S_IFBLK, &numbers)?);
    users.extend(loops_over(&numbers));
    Ok(users)
}

/// The numbers of a disk and of its partitions.
fn numbers(disk: &Path) -> io::Result<Vec<Number>> {
    let mut found = Vec::new();
    let partitions = fs::read_dir(disk)?.flatten().map(|entry| entry.path());
    for place in std::iter::once(disk.to_owned()).chain(partitions) {
        // Whatever is in there and has no number is no partition.
        if let Ok(text) = fs::read_to_string(place.join("dev")) {
            found.extend(number(&text));
        }
    }
    Ok(found)
}

fn number(text: &str) -> Option<Number> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The processes that have one of those devices or a partition of it open, udev's aside. None of them is opened, so a
/// device that hangs hangs nobody who asks.
///
/// # Errors
/// Not being able to look.
pub fn processes_of(ids: &[UblkId]) -> io::Result<Vec<(UblkId, User)>> {
    // One that is not there any more has no numbers.
    let of = |id: UblkId| {
        numbers(&id.sysfs_path()).unwrap_or_default().into_iter().map(move |number| (number, id))
    };
    let ids: BTreeMap<Number, UblkId> = ids.iter().copied().flat_map(of).collect();
    let numbers: Vec<Number> = ids.keys().copied().collect();
    let users = openers(libc::S_IFBLK, &numbers)?.into_iter();
    Ok(users.filter(|(_, user)| !user.is_udev()).map(|(number, user)| (ids[&number], user)).collect())
}

/// The processes that have one of these devices open. Those that end meanwhile are left out.
fn processes_with(kind: libc::mode_t, numbers: &[Number]) -> io::Result<Vec<User>> {
    let mut users: Vec<User> = openers(kind, numbers)?.into_iter().map(|(_, user)| user).collect();
    // One that has two partitions open is one; they come in the order of their processes.
    users.dedup();
    Ok(users)
}

/// Which of these devices each process has open.
fn openers(kind: libc::mode_t, numbers: &[Number]) -> io::Result<Vec<(Number, User)>> {
    let mut found = Vec::new();
    if numbers.is_empty() {
        return Ok(found);
    }
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(open) = fs::read_dir(process.path().join("fd")) else { continue };
        let files = open.flatten().filter_map(|file| device(&file.path()));
        let has: BTreeSet<Number> = files
            .filter(|(is, number)| *is == kind && numbers.contains(number))
            .map(|(_, number)| number)
            .collect();
        if has.is_empty() {
            continue;
        }
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        let user = User::Process { pid, name: name.trim_end().to_owned() };
        found.extend(has.into_iter().map(|number| (number, user.clone())));
    }
    Ok(found)
}

/// What kind of device an open file is, and its number. Nobody is waited for: what a process has open may be
/// on a file server that does not answer.
fn device(file: &Path) -> Option<(libc::mode_t, Number)> {
    let path = CString::new(file.as_os_str().as_bytes()).ok()?;
    // SAFETY: all zeros is a value of this type.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero byte, and `found` outlives the call.
    let result = unsafe {
        libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE, &raw mut found)
    };
    let kind = libc::mode_t::from(found.stx_mode) & libc::S_IFMT;
    (result == 0).then_some((kind, (found.stx_rdev_major, found.stx_rdev_minor)))
}

/// Loop devices have their file open where no process is seen to.
fn loops_over(numbers: &[Number]) -> Vec<User> {
    let behind = |entry: &fs::DirEntry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let found = fs::metadata(file.trim_end()).ok()?;
        let number = (libc::major(found.rdev()), libc::minor(found.rdev()));
        (numbers.contains(&number)).then(|| User::Loop(entry.file_name().to_string_lossy().into_owned()))
    };
    fs::read_dir("/sys/block").into_iter().flatten().flatten().filter_map(|entry| behind(&entry)).collect()
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// `/dev/zero` stands for the block device, which an unprivileged test does not have.
    #[test]
    fn whoever_has_a_device_open_is_found() {
        let zero = [(1, 5)];
        let own = |users: &[User]| {
            let is_own =
                |user: &&User| matches!(user, User::Process { pid, .. } if *pid == std::process::id());
            users.iter().find(is_own).cloned()
        };
        assert_eq!(own(&processes_with(libc::S_IFCHR, &zero).unwrap()), None);
        let open = File::open("/dev/zero").unwrap();
        let found = own(&processes_with(libc::S_IFCHR, &zero).unwrap()).expect("it is open");
        assert!(!found.to_string().starts_with(' '), "{found} has a name");
        assert_eq!(own(&processes_with(libc::S_IFBLK, &zero).unwrap()), None, "another kind of device");
        drop(open);
        assert_eq!(own(&processes_with(libc::S_IFCHR, &zero).unwrap()), None);
    }

    #[test]
    fn partitions_count() {
        let disk = tempfile::tempdir().unwrap();
        fs::write(disk.path().join("dev"), "259:8\n").unwrap();
        fs::write(disk.path().join("size"), "1024\n").unwrap();
        for (name, dev) in [("ublkb0p1", "259:9\n"), ("ublkb0p2", "259:1048575\n")] {
            fs::create_dir(disk.path().join(name)).unwrap();
            fs::write(disk.path().join(name).join("dev"), dev).unwrap();
        }
        fs::create_dir(disk.path().join("queue")).unwrap();
        let mut found = numbers(disk.path()).unwrap();
        found.sort_unstable();
        assert_eq!(found, [(259, 8), (259, 9), (259, 1_048_575)]);
    }

    #[test]
    fn of_several_devices_each_has_its_own_users() {
        let (zero, null) = ((1, 5), (1, 3));
        let opened = File::open("/dev/zero").unwrap();
        let again = File::open("/dev/zero").unwrap();
        let mine = |numbers: &[Number]| {
            let found = openers(libc::S_IFCHR, numbers).unwrap().into_iter();
            let is_own =
                |user: &User| matches!(user, User::Process { pid, .. } if *pid == std::process::id());
            found.filter(|(_, user)| is_own(user)).map(|(number, _)| number).collect::<Vec<_>>()
        };
        // Whether a test has /dev/null open depends on who runs it.
        assert_eq!(mine(&[zero, null]).iter().filter(|number| **number == zero).count(), 1, "once a process");
        assert_eq!(mine(&[]), []);
        drop((opened, again));
        assert_eq!(mine(&[zero]), []);
    }

    #[test]
    fn a_device_that_is_gone_is_used_by_nobody() {
        assert_eq!(users_of(UblkId(4_000_000)).unwrap(), []);
        assert_eq!(processes_of(&[UblkId(4_000_000)]).unwrap(), []);
    }
}
