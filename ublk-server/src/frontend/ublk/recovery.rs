//! Taking over devices whose server died.
//!
//! A device outlives its server: its users' I/O waits, for ever if nobody comes. The next server finds its devices
//! by the records of the last one, and for each follows this order, which the types enforce:
//!
//! 1. [`survey`] reads the records and asks the kernel: an [`Orphan`] is to be recovered or discarded.
//! 2. **Ask the map** whether this node still has the claim. Without it: [`discard`]. Reattaching issues again what
//!    was in flight, and an old exporter must not write.
//! 3. [`Orphan::start`] with that [`ClaimConfirmed`]: START_USER_RECOVERY, tried again while the old server is
//!    still being cleaned up. Then `/dev/ublkcN` is open: a [`Reattaching`].
//! 4. Each I/O thread makes its [`super::queue::Queue`]s and submits a fetch of every tag.
//! 5. [`Reattaching::end`] from the control thread: END_USER_RECOVERY waits for 4. I/O goes on; what was in flight
//!    comes again, so writes may be done twice.
//!
//! SET_PARAMS is not part of it: the parameters live in the kernel with the device.
//!
//! Death in the middle of a recovery: from 6.16 on the next server recovers again. Older kernels refuse
//! START_USER_RECOVERY when no queue had been fetched completely, and **crash** on it when some had been and some
//! not (seen on 6.12). So the record says that a recovery has begun before the kernel hears of it, and there such a
//! device is [`RecoveryError::Unrecoverable`] without asking: all that is left is [`discard`], which fails the I/O
//! that waits.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kmod::abi::Features;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::control::{Control, ControlError};
use super::params::DeviceParams;
use super::queue::{CharDevice, QueueError};
use super::{Cookie, DeviceInfo, DeviceState, UblkId};

/// Where records lie: gone with a reboot, as the devices are.
pub const RECORD_DIRECTORY: &str = "/run/ublk-mirror";

/// The format of a record.
const RECORD_FORMAT: u32 = 1;

/// What a server leaves for its successor about one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Version of this structure, 1.
    pub format: u32,
    /// The device's name in the map.
    pub device: String,
    /// Whose the kernel's device is. Written before the device is added, so that it is found in any case.
    pub cookie: Cookie,
    /// The kernel's number; `None` until it is known.
    pub id: Option<UblkId>,
    /// What the device promised when it was started: size and blocks must be the same after a recovery.
    pub params: DeviceParams,
    /// A recovery was begun and has not ended: kernels before 6.16 do not survive a second one.
    pub reattaching: bool,
    /// What its users know of lost writes: [`Engine::loss_told`](mirror_net::engine::Engine::loss_told). `None` in
    /// records of a server that did not keep it.
    #[serde(default)]
    pub loss_told: Option<u64>,
}

impl DeviceRecord {
    /// A record to be saved before the device is added.
    pub fn new(device: &str, cookie: Cookie, params: DeviceParams) -> DeviceRecord {
        DeviceRecord {
            format: RECORD_FORMAT,
            device: device.to_owned(),
            cookie,
            id: None,
            params,
            reattaching: false,
            loss_told: None,
        }
    }
}

/// Why records cannot be kept or read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// A name that cannot be a file's.
    #[error(
        "{name:?} cannot name a record: use letters, digits, '-', '_' and '.', at most 64, not beginning with '.'"
    )]
    Name {
        /// The node's or device's name.
        name: String,
    },
    /// The file system said no.
    #[error("{}: {source}; devices cannot be found again after a crash without it", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A file that is no record of ours.
    #[error("{}: not a record of this version ({reason}); look for its device with ublk-probe and /dev/ublkb*, then remove the file", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The records of one node's devices.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Those of `node` in the usual place.
    ///
    /// # Errors
    /// [`RecordError`] if the directory cannot be made.
    pub fn of_node(node: &str) -> Result<Records, RecordError> {
        Records::open(Path::new(RECORD_DIRECTORY), node)
    }

    /// Those of `node` below another directory.
    ///
    /// # Errors
    /// [`RecordError`] if the directory cannot be made.
    pub fn open(base: &Path, node: &str) -> Result<Records, RecordError> {
        let directory = base.join(file_name(node)?);
        fs::create_dir_all(&directory).map_err(io_error(&directory))?;
        Ok(Records { directory })
    }

    /// Writes a record in place of the old one, never half.
    ///
    /// # Errors
    /// [`RecordError`]: do not start the device then.
    pub fn save(&self, record: &DeviceRecord) -> Result<(), RecordError> {
        let path = self.path(&record.device)?;
        let text = serde_json::to_vec_pretty(record).expect("a record has no maps with odd keys");
        // A name that `load` passes over.
        let draft = path.with_extension("json.new");
        let write = || {
            let mut file = fs::File::create(&draft)?;
            file.write_all(&text)?;
            // Only matters where the directory is not in memory, as it should be.
            file.sync_all()?;
            fs::rename(&draft, &path)
        };
        write().map_err(io_error(&path))
    }

    /// Removes a device's record, if there is one. To be done after the device was deleted.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove(&self, device: &str) -> Result<(), RecordError> {
        let path = self.path(device)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path)(error)),
            _ => Ok(()),
        }
    }

    /// Reads all records, by name; a file that is none is an error of its own and does not hide the others.
    ///
    /// # Errors
    /// [`RecordError`] if the directory cannot be read.
    pub fn load(&self) -> Result<Vec<Result<DeviceRecord, RecordError>>, RecordError> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(io_error(&self.directory))? {
            let path = entry.map_err(io_error(&self.directory))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths.iter().map(|path| self.load_one(path)).collect())
    }

    fn load_one(&self, path: &Path) -> Result<DeviceRecord, RecordError> {
        let unreadable = |reason: String| RecordError::Unreadable { path: path.to_owned(), reason };
        let text = fs::read(path).map_err(io_error(path))?;
        let record: DeviceRecord =
            serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        if record.format != RECORD_FORMAT {
            return Err(unreadable(format!("format {}", record.format)));
        }
        if self.path(&record.device)? != path {
            return Err(unreadable(format!("it is about {:?}", record.device)));
        }
        Ok(record)
    }

    fn path(&self, device: &str) -> Result<PathBuf, RecordError> {
        Ok(self.directory.join(format!("{}.json", file_name(device)?)))
    }
}

fn file_name(name: &str) -> Result<&str, RecordError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(good) {
        return Err(RecordError::Name { name: name.to_owned() });
    }
    Ok(name)
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> RecordError + '_ {
    move |source| RecordError::Io { path: path.to_owned(), source }
}

/// Why a recovery does not go on.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// A control command failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// `/dev/ublkcN` cannot be served.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The record cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The kernel will never give this device to a new server.
    #[error(
        "{device} ({id}) cannot be recovered: its last server died in the middle of a recovery, which this kernel does not survive, or it was added without recovery; discard it (its waiting I/O fails) and add it anew"
    )]
    Unrecoverable {
        /// The device's name.
        device: String,
        /// Its number.
        id: UblkId,
    },
}

/// What became of a recorded device.
#[derive(Debug)]
pub enum Survivor {
    /// It waits for a server, or soon will.
    Orphan(Orphan),
    /// It was added and never started, or was stopped and not deleted: nobody can be using it. [`discard`] it,
    /// then add it anew.
    NotStarted {
        /// Its record.
        record: DeviceRecord,
        /// What the kernel says.
        info: DeviceInfo,
    },
    /// The record is stale: the kernel has no such device (any more). Remove the record, add the device anew.
    Stale {
        /// The record.
        record: DeviceRecord,
    },
}

/// Finds out what became of every recorded device. Devices of others are left alone.
///
/// # Errors
/// [`ControlError`] if the kernel cannot be asked.
pub fn survey(control: &mut Control, records: Vec<DeviceRecord>) -> Result<Vec<Survivor>, ControlError> {
    records.into_iter().map(|record| survey_one(control, record)).collect()
}

fn survey_one(control: &mut Control, record: DeviceRecord) -> Result<Survivor, ControlError> {
    let Some(info) = find(control, &record)? else {
        return Ok(Survivor::Stale { record });
    };
    Ok(match info.state {
        DeviceState::Dead => Survivor::NotStarted { record, info },
        _ => Survivor::Orphan(Orphan { record, info }),
    })
}

/// The kernel's device with the record's cookie: under the recorded number, or under any.
fn find(control: &mut Control, record: &DeviceRecord) -> Result<Option<DeviceInfo>, ControlError> {
    let ours = |info: &DeviceInfo| info.cookie == Some(record.cookie);
    if let Some(info) = record.id.map(|id| ask(control, id)).transpose()?.flatten().filter(ours) {
        return Ok(Some(info));
    }
    // The server died between adding the device and recording its number, or somebody else has that number now.
    for id in existing_devices() {
        if let Some(info) = ask(control, id)?.filter(ours) {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

fn ask(control: &mut Control, id: UblkId) -> Result<Option<DeviceInfo>, ControlError> {
    match control.get_dev_info(id) {
        Ok(info) => Ok(Some(info)),
        Err(ControlError::NoSuchDevice { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Every ublk device of this machine, whoever it belongs to.
pub fn existing_devices() -> Vec<UblkId> {
    let number = |entry: io::Result<fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok().map(UblkId)
    };
    let mut ids: Vec<UblkId> =
        fs::read_dir("/sys/class/ublk-char").into_iter().flatten().filter_map(number).collect();
    ids.sort_unstable();
    ids
}

/// The caller's word that it asked the map, after the old server's end, and that this node has the device's claim.
#[derive(Clone, Copy, Debug)]
pub struct ClaimConfirmed {
    /// The claim's generation.
    pub generation: u64,
}

/// A device without a server.
#[derive(Debug)]
pub struct Orphan {
    record: DeviceRecord,
    info: DeviceInfo,
}

impl Orphan {
    /// What the last server recorded.
    pub fn record(&self) -> &DeviceRecord {
        &self.record
    }

    /// What the kernel says; queues, depth and buffers are as they were.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Whether the kernel can be asked to give this device to a new server, without it crashing.
    pub fn is_recoverable(&self) -> bool {
        // The flag stands for the kernel that brought it, which resets a device when its server is gone, not when
        // the next one comes. It is set whether it was asked for or not.
        let recovers_twice = self.info.features.contains(Features::PER_IO_DAEMON);
        // A single queue is fetched or not: the older kernels then know what to answer.
        let safe_to_ask = recovers_twice || self.info.queues == 1 || !self.record.reattaching;
        self.info.features.contains(Features::REQUIRED) && safe_to_ask
    }

    /// Announces this process as the new server and opens the device. `patience` is for the old server's end,
    /// which takes the kernel up to a request's timeout (30 s unless shortened) on kernels before 6.16.
    ///
    /// # Errors
    /// [`RecoveryError::Unrecoverable`], or a busy device when `patience` ran out. The device can still be
    /// surveyed again or discarded.
    pub fn start(
        mut self,
        control: &mut Control,
        records: &Records,
        _claim: ClaimConfirmed,
        patience: Duration,
    ) -> Result<Reattaching, RecoveryError> {
        let id = self.info.id;
        let unrecoverable =
            |record: &DeviceRecord| RecoveryError::Unrecoverable { device: record.device.clone(), id };
        if !self.is_recoverable() {
            return Err(unrecoverable(&self.record));
        }
        self.record.id = Some(id);
        self.record.reattaching = true;
        records.save(&self.record)?;
        match control.start_user_recovery(id, patience) {
            Ok(()) => {}
            Err(ControlError::Invalid { .. }) => return Err(unrecoverable(&self.record)),
            Err(error) => {
                // Refused for now, so nothing has begun. A command without an answer may have.
                if matches!(error, ControlError::Busy { .. } | ControlError::NotPermitted { .. }) {
                    self.record.reattaching = false;
                    records.save(&self.record)?;
                }
                return Err(error.into());
            }
        }
        let device = CharDevice::open(&self.info, patience)?;
        Ok(Reattaching { record: self.record, device })
    }
}

/// A device that this process is taking over. Its I/O waits until [`Reattaching::end`].
#[derive(Debug)]
pub struct Reattaching {
    record: DeviceRecord,
    device: Arc<CharDevice>,
}

impl Reattaching {
    /// What the last server recorded.
    pub fn record(&self) -> &DeviceRecord {
        &self.record
    }

    /// The open device, for the queues.
    pub fn device(&self) -> &Arc<CharDevice> {
        &self.device
    }

    /// Waits until all tags of all queues were fetched, and lets I/O go on. Returns the record as it is now.
    ///
    /// # Errors
    /// [`ControlError::TimedOut`] if an I/O thread did not fetch yet: call it again. The device cannot be started to be
    /// recovered once more by this process, which holds it.
    pub fn end(
        &mut self,
        control: &mut Control,
        records: &Records,
        timeout: Duration,
    ) -> Result<DeviceRecord, RecoveryError> {
        control.end_user_recovery(self.device.info().id, timeout)?;
        self.record.reattaching = false;
        records.save(&self.record)?;
        Ok(self.record.clone())
    }
}

/// Stops and deletes a device that is not to be recovered; its waiting I/O fails. Does not wait for its users: the
/// number becomes free when they are gone. Before 6.16 it takes as long as [`Orphan::start`] would, if the server
/// died a moment ago.
///
/// # Errors
/// [`ControlError`]; that there is no such device (any more) is none.
pub fn discard(control: &mut Control, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
    let gone = |result| match result {
        Err(ControlError::NoSuchDevice { .. }) => Ok(()),
        other => other,
    };
    gone(control.stop_dev(id, timeout))?;
    gone(control.del_dev_async(id, timeout))
}

/// Makes the kernel look after `timeout` at requests that a dead server had taken (30 s otherwise). Before 6.16 that
/// is how it notices a server that died with all tags of a queue in flight; a server that lives is never bothered,
/// since a privileged one's requests do not time out. To be called when the device was started.
///
/// # Errors
/// What writing to sysfs says.
pub fn shorten_io_timeout(id: UblkId, timeout: Duration) -> io::Result<()> {
    fs::write(id.sysfs_path().join("queue/io_timeout"), timeout.as_millis().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(device: &str) -> DeviceRecord {
        DeviceRecord::new(device, Cookie(0xfeed), DeviceParams::new(1 << 30, 256 << 10))
    }

    #[test]
    fn records_are_found_again() {
        let base = tempfile::tempdir().unwrap();
        let records = Records::open(base.path(), "n1").unwrap();
        let mut vm1 = record("vm1");
        records.save(&vm1).unwrap();
        vm1.id = Some(UblkId(4));
        records.save(&vm1).unwrap();
        records.save(&record("vm2")).unwrap();

        let again = Records::open(base.path(), "n1").unwrap();
        let found: Vec<DeviceRecord> = again.load().unwrap().into_iter().map(Result::unwrap).collect();
        assert_eq!(found, [vm1, record("vm2")]);
        assert!(Records::open(base.path(), "n2").unwrap().load().unwrap().is_empty());

        again.remove("vm1").unwrap();
        again.remove("vm1").unwrap();
        assert_eq!(again.load().unwrap().len(), 1);
    }

    #[test]
    fn a_bad_record_does_not_hide_the_others() {
        let base = tempfile::tempdir().unwrap();
        let records = Records::open(base.path(), "n1").unwrap();
        records.save(&record("vm2")).unwrap();
        fs::write(base.path().join("n1/vm1.json"), "{").unwrap();
        fs::write(base.path().join("n1/vm3.json.new"), "half").unwrap();
        fs::copy(base.path().join("n1/vm2.json"), base.path().join("n1/vm4.json")).unwrap();
        let found = records.load().unwrap();
        assert_eq!(found.len(), 3);
        assert!(matches!(found[0], Err(RecordError::Unreadable { .. })));
        assert!(found[1].is_ok());
        assert!(matches!(&found[2], Err(RecordError::Unreadable { reason, .. }) if reason.contains("vm2")));
    }

    #[test]
    fn an_old_kernel_is_not_asked_twice() {
        let orphan = |features: Features, queues: u16, reattaching: bool| Orphan {
            record: DeviceRecord { reattaching, ..record("vm1") },
            info: DeviceInfo {
                id: UblkId(0),
                queues,
                depth: 64,
                buffer_bytes: 256 << 10,
                state: DeviceState::Quiesced,
                server_pid: None,
                features,
                cookie: Some(Cookie(0xfeed)),
            },
        };
        let (old, new) = (Features::REQUIRED, Features::REQUIRED.with(Features::PER_IO_DAEMON));
        assert!(orphan(old, 2, false).is_recoverable());
        assert!(!orphan(old, 2, true).is_recoverable());
        assert!(orphan(old, 1, true).is_recoverable());
        assert!(orphan(new, 2, true).is_recoverable());
        assert!(!orphan(Features::USER_RECOVERY, 1, false).is_recoverable());
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let base = tempfile::tempdir().unwrap();
        for name in ["", "..", "a/b", ".hidden", "a b"] {
            assert!(matches!(Records::open(base.path(), name), Err(RecordError::Name { .. })), "{name:?}");
        }
        let records = Records::open(base.path(), "n1").unwrap();
        assert!(matches!(records.save(&record("../x")), Err(RecordError::Name { .. })));
        assert!(matches!(records.remove("a/b"), Err(RecordError::Name { .. })));
    }
}
