//! A disk of the cluster file, opened for this process alone and looked at.

use super::foreign;
use mirror_net::config;
use mirror_net::control::{DiskContent, DiskInventory};
use mirror_net::format::recovery::{OpenError, Opened};
use mirror_net::format::{ReadFailed, open};
use mirror_net::ids::AttachId;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a disk may stay in use. A process that was killed is gone before its I/O is, and the kernel keeps
/// its disks open until then.
const FREE_WITHIN: Duration = Duration::from_secs(5);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DiskError {
    #[error("disk {name}: {path}: {source}")]
    Open { name: String, path: PathBuf, source: io::Error },
    #[error("disk {name}: {path} does not exist; give its `size` in the cluster file to have a file created")]
    Missing { name: String, path: PathBuf },
    #[error("disk {name}: {path} is in use (mounted, or another ublk-server has it)")]
    InUse { name: String, path: PathBuf },
    #[error("disk {name}: {path} is neither a block device nor a file")]
    NotADisk { name: String, path: PathBuf },
    #[error("disk {name}: the file {path} has {found} bytes, the cluster file says {wanted}")]
    OtherSize { name: String, path: PathBuf, found: u64, wanted: u64 },
    #[error("disk {name}: {path}: {source}")]
    Format { name: String, path: PathBuf, source: OpenError },
    #[error("disk {name}: {path}: {what}")]
    Unsuitable { name: String, path: PathBuf, what: String },
    #[error("disk {name}: {path} holds {what}; formatting would destroy it: give --force if that is meant")]
    Foreign { name: String, path: PathBuf, what: String },
}

/// A disk that is open and belongs to this process alone.
pub struct Candidate {
    /// Its name in the cluster file.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// The smallest direct write, in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Its attachment.
    pub attach: AttachId,
    /// On a file system on which io_uring would hand every write to a worker.
    pub in_memory: bool,
    /// A regular file, which can be made to read as zeros at once.
    pub is_file: bool,
    file: Flock<File>,
}

impl Candidate {
    /// Opens the disk, creating a file that is missing.
    pub fn open(disk: &config::DiskFile) -> Result<Self, DiskError> {
        let (name, path) = (disk.name.clone(), disk.path.clone());
        let failed = |source: io::Error| DiskError::Open { name: name.clone(), path: path.clone(), source };
        if !path.exists() {
            let Some(bytes) = disk.bytes else { return Err(DiskError::Missing { name, path }) };
            create(&path, bytes).map_err(failed)?;
        }
        let kind = std::fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(DiskError::NotADisk { name, path });
        }
        // On a block device O_EXCL means: nobody else who asks for it alone, no mounted file system.
        let exclusive = if kind.is_block_device() { libc::O_EXCL } else { 0 };
        let file = open_alone(&path, exclusive).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => DiskError::InUse { name: name.clone(), path: path.clone() },
            _ => failed(error),
        })?;
        let metadata = file.metadata().map_err(failed)?;
        let in_memory = in_memory(&file, &metadata);
        let bytes = if kind.is_file() { metadata.len() } else { device_bytes(&file).map_err(failed)? };
        if let Some(wanted) = disk.bytes.filter(|wanted| kind.is_file() && *wanted != bytes) {
            return Err(DiskError::OtherSize { name, path, found: bytes, wanted });
        }
        let block_bytes = block_bytes(&file, bytes);
        let attach = attach_id(&metadata).map_err(failed)?;
        Ok(Self { name, path, bytes, block_bytes, attach, in_memory, is_file: kind.is_file(), file })
    }

    /// Whether the path still leads to this disk.
    pub fn is_at(&self, path: &Path) -> bool {
        std::fs::metadata(path)
            .and_then(|metadata| attach_id(&metadata))
            .is_ok_and(|attach| attach == self.attach)
    }

    /// A further descriptor of the same open disk.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The open disk.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads the metadata, whatever is there.
    pub fn read_metadata(&self) -> Result<Opened, OpenError> {
        let mut read =
            |offset, buffer: &mut [u8]| self.file.read_exact_at(buffer, offset).map_err(|_| ReadFailed);
        open(&mut read, self.bytes)
    }

    /// Says what is on the disk.
    pub fn inventory(&self) -> DiskInventory {
        let content = match self.read_metadata() {
            // Nobody knows which regions hold data: such a copy serves nothing.
            Ok(opened) if opened.report.is_loss() => DiskContent::Unusable {
                why: "its slot tables are lost: replace the disk, or format it again".into(),
            },
            Ok(opened) => {
                DiskContent::Ours { cluster: opened.superblock.cluster, disk: opened.superblock.disk }
            }
            Err(OpenError::NotOurs) => match foreign::identify(&self.path, &self.file, self.bytes) {
                Ok(None) => DiskContent::Blank,
                Ok(Some(what)) => DiskContent::Foreign { what },
                Err(error) => DiskContent::Unusable { why: error.to_string() },
            },
            Err(OpenError::FormatInterrupted) => DiskContent::Blank,
            Err(error) => DiskContent::Unusable { why: error.to_string() },
        };
        DiskInventory {
            name: self.name.clone(),
            path: self.path.to_string_lossy().into_owned(),
            bytes: self.bytes,
            block_bytes: self.block_bytes,
            attach: self.attach,
            content,
        }
    }
}

fn create(path: &Path, bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let made = nix::fcntl::fallocate(&file, FallocateFlags::empty(), 0, bytes as i64);
    if let Err(error) = made {
        // Half a disk would be found, and taken for a whole one, next time.
        std::fs::remove_file(path)?;
        return Err(error.into());
    }
    file.sync_all()?;
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Opens and locks it, once nobody else has it: EBUSY if that does not come to be. The lock is held until the
/// process has ended and its I/O with it: whoever gets it finds the disk quiet.
fn open_alone(path: &Path, flags: i32) -> io::Result<Flock<File>> {
    let until = Instant::now() + FREE_WITHIN;
    loop {
        let taken = open_direct(path, flags).and_then(|file| {
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
                Errno::EWOULDBLOCK => Errno::EBUSY.into(),
                _ => error.into(),
            })
        });
        match taken {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            taken => return taken,
        }
    }
}

fn open_direct(path: &Path, flags: i32) -> io::Result<File> {
    let open =
        |flags| OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC).open(path);
    // Some file systems know no direct I/O; what they promise about a flush holds all the same.
    match open(flags | libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(flags),
        other => other,
    }
}

fn device_bytes(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

/// The smallest aligned direct read that works.
fn block_bytes(file: &File, bytes: u64) -> u32 {
    let mut block = crate::ring::buffers::AlignedBlock::new(4096);
    if bytes >= 512 && file.read_exact_at(&mut block[..512], 0).is_ok() { 512 } else { 4096 }
}

/// Whether it is a file in memory, which has no cache to flush. A device's node lies on a tmpfs as well (devtmpfs is one),
/// and that says nothing of the device.
fn in_memory(file: &File, metadata: &std::fs::Metadata) -> bool {
    use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
    metadata.is_file() && fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
}

/// New at every boot, and for another disk at the same path.
fn attach_id(metadata: &std::fs::Metadata) -> io::Result<AttachId> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let mut hasher = DefaultHasher::new();
    boot.hash(&mut hasher);
    if metadata.file_type().is_block_device() {
        metadata.rdev().hash(&mut hasher);
        // Counts the disks that the kernel has seen: a disk pulled and plugged in again has another. A
        // partition has its disk's.
        let device = udev::Device::from_devnum(udev::DeviceType::Block, metadata.rdev())?;
        let sequence =
            |device: &udev::Device| device.attribute_value("diskseq").map(|value| value.to_owned());
        sequence(&device).or_else(|| sequence(&device.parent()?)).hash(&mut hasher);
    } else {
        (metadata.dev(), metadata.ino()).hash(&mut hasher);
    }
    Ok(AttachId(hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_whose_node_lies_in_memory_is_flushed_all_the_same() {
        let judge = |file: &File| in_memory(file, &file.metadata().unwrap());
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        assert!(judge(&nix::sys::memfd::memfd_create("disk", flags).unwrap().into()));
        let null = File::open("/dev/null").unwrap();
        let lies_on = nix::sys::statfs::fstatfs(&null).unwrap().filesystem_type();
        assert_eq!(lies_on, nix::sys::statfs::TMPFS_MAGIC, "this machine's /dev is no test of that");
        assert!(!judge(&null));
    }

    #[test]
    fn a_disk_that_was_just_left_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let disk = config::DiskFile {
            name: "d1".into(),
            path: dir.path().join("d1"),
            bytes: Some(1 << 20),
            segments: config::Segments::default(),
        };
        let first = Candidate::open(&disk).unwrap();
        let leaving = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        let second = Candidate::open(&disk).unwrap();
        leaving.join().unwrap();
        // For what is not left the wait ends.
        assert!(matches!(Candidate::open(&disk), Err(DiskError::InUse { .. })));
        drop(second);
    }
}
