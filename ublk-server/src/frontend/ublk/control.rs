//! The control channel: devices are added, started, stopped and deleted here, one blocking call each.
//!
//! For a control thread, never for an I/O thread: START_DEV and END_USER_RECOVERY wait until the I/O threads have
//! fetched every tag, and STOP_DEV waits until they have completed what is in flight. Every call has a deadline;
//! [`ControlError::TimedOut`] says whether the kernel goes on without us.

use std::io;
use std::process::{self, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kmod::abi::{
    CtrlCmd, DEV_ID_ANY, DevInfo, Features, IO_BUFFER_BYTES_MAX, PARAM_BASIC, Params, QUEUE_DEPTH_MAX,
    QUEUES_MAX, SECTOR_BYTES, control_op,
};
use kmod::command::{CommandError, CommandRing, OpenError};
use nix::errno::Errno;
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

use super::params::{DeviceParams, ParamsError};
use super::{Cookie, DeviceInfo, UblkId};

/// Tags of a queue, unless configured.
pub const DEPTH_DEFAULT: u16 = 64;
/// Bytes of a tag's buffer, unless configured.
pub const BUFFER_BYTES_DEFAULT: u32 = 256 << 10;

/// For commands that only wait for the driver's locks. They are held while another device is being removed.
const QUICK_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two attempts at a device that is still busy dying.
const BUSY_RETRY: Duration = Duration::from_millis(20);
/// Bytes of a processor mask: 8192 processors, as many as Linux can be built for.
const AFFINITY_BYTES: usize = 1024;

/// The commands, by the kernel's names; what each does stands at the method of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ControlOp {
    GetFeatures,
    AddDev,
    SetParams,
    GetParams,
    GetDevInfo,
    GetQueueAffinity,
    StartDev,
    StopDev,
    TryStopDev,
    DelDev,
    DelDevAsync,
    UpdateSize,
    StartUserRecovery,
    EndUserRecovery,
}

impl ControlOp {
    fn opcode(self) -> u32 {
        match self {
            ControlOp::GetFeatures => control_op::GET_FEATURES,
            ControlOp::AddDev => control_op::ADD_DEV,
            ControlOp::SetParams => control_op::SET_PARAMS,
            ControlOp::GetParams => control_op::GET_PARAMS,
            ControlOp::GetDevInfo => control_op::GET_DEV_INFO,
            ControlOp::GetQueueAffinity => control_op::GET_QUEUE_AFFINITY,
            ControlOp::StartDev => control_op::START_DEV,
            ControlOp::StopDev => control_op::STOP_DEV,
            ControlOp::TryStopDev => control_op::TRY_STOP_DEV,
            ControlOp::DelDev => control_op::DEL_DEV,
            ControlOp::DelDevAsync => control_op::DEL_DEV_ASYNC,
            ControlOp::UpdateSize => control_op::UPDATE_SIZE,
            ControlOp::StartUserRecovery => control_op::START_USER_RECOVERY,
            ControlOp::EndUserRecovery => control_op::END_USER_RECOVERY,
        }
    }
}

/// Why a control call failed, and what to do next.
#[derive(Debug, Error)]
pub enum ControlError {
    /// There is no channel to the driver.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The process may not.
    #[error("{op:?} of {id}: not permitted; run the server as root (it needs CAP_SYS_ADMIN)")]
    NotPermitted {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
    },
    /// The device does not exist (any more).
    #[error("{op:?}: the kernel has no {id}; it was deleted: forget its record and add the device anew")]
    NoSuchDevice {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
    },
    /// The number is taken, or the device was started before.
    #[error(
        "{op:?}: {id} exists or runs already; take another number, or recover the device instead of starting it"
    )]
    Exists {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
    },
    /// Somebody uses the device, or its last server is not gone yet.
    #[error("{op:?}: {id} is busy (waited {} ms): unmount it, or end the server that still holds it", waited.as_millis())]
    Busy {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
        /// How long it was tried.
        waited: Duration,
    },
    /// The parameters of a started device are fixed.
    #[error("{op:?}: {id} was started before, its parameters are fixed; stop and delete it to change them")]
    Started {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
    },
    /// This kernel's driver does not know the command, or it does not apply to this device.
    #[error("{op:?}: this kernel's ublk cannot do that; ublk-probe lists what it can")]
    Unsupported {
        /// The command.
        op: ControlOp,
    },
    /// The kernel found the arguments wrong or the device in the wrong state.
    #[error("{op:?} of {id}: refused as invalid; {hint}")]
    Invalid {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
        /// What that means for this command.
        hint: &'static str,
    },
    /// The deadline passed.
    #[error(
        "{op:?} of {id}: no answer within {} ms; {}",
        waited.as_millis(),
        if *still_running { "the kernel goes on with it and cannot be stopped" } else { "it was withdrawn" }
    )]
    TimedOut {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
        /// How long it was waited for.
        waited: Duration,
        /// Whether it may yet succeed.
        still_running: bool,
    },
    /// A device was added, and the kernel left out what we need. It was deleted again.
    #[error("the kernel added {id} without {missing}; boot a newer kernel, ublk-probe says which")]
    FeaturesRefused {
        /// The device.
        id: UblkId,
        /// What is missing.
        missing: Features,
    },
    /// What was asked for is out of the driver's range.
    #[error(
        "a device with {queues} queues of {depth} tags with {buffer_bytes} bytes each: choose 1 to {QUEUES_MAX} queues, 1 to {QUEUE_DEPTH_MAX} tags, and buffers of whole pages up to {IO_BUFFER_BYTES_MAX} bytes"
    )]
    OutOfRange {
        /// Hardware queues.
        queues: u16,
        /// Tags.
        depth: u16,
        /// Bytes.
        buffer_bytes: u32,
    },
    /// The parameters are not valid.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// The command failed in another way.
    #[error("{op:?} of {id} failed: {source}")]
    Other {
        /// The command.
        op: ControlOp,
        /// The device.
        id: IdOrNew,
        /// What the ring or the kernel said.
        source: CommandError,
    },
}

/// The device of a failed command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdOrNew {
    /// This one.
    Id(UblkId),
    /// One that was to be added, with a number of the kernel's choice, or no particular one.
    New,
}

impl std::fmt::Display for IdOrNew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IdOrNew::Id(id) => id.fmt(f),
            IdOrNew::New => f.write_str("a device"),
        }
    }
}

/// A device to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDevice {
    /// The wanted number; the kernel chooses without.
    pub id: Option<UblkId>,
    /// Hardware queues; the kernel lowers it to the number of processors.
    pub queues: u16,
    /// Tags of each queue: what can be in flight.
    pub depth: u16,
    /// Bytes of a tag's buffer, whole pages.
    pub buffer_bytes: u32,
    /// Whose it is.
    pub cookie: Cookie,
    /// Partitions on it are found at start (they always are before 7.0).
    pub partition_scan: bool,
}

impl NewDevice {
    /// One with the default depth and buffers.
    pub fn new(queues: u16, cookie: Cookie) -> NewDevice {
        NewDevice {
            id: None,
            queues,
            depth: DEPTH_DEFAULT,
            buffer_bytes: BUFFER_BYTES_DEFAULT,
            cookie,
            partition_scan: true,
        }
    }

    fn features(&self) -> Features {
        // QUIESCE is no use to us: an orderly restart is a recovery too. It costs nothing to not ask.
        match self.partition_scan {
            true => Features::REQUIRED,
            false => Features::REQUIRED.with(Features::NO_AUTO_PART_SCAN),
        }
    }
}

/// The blocking control channel. One for each control thread.
pub struct Control {
    ring: CommandRing,
}

impl Control {
    /// Opens `/dev/ublk-control`.
    ///
    /// # Errors
    /// [`ControlError::Open`], which points to the probe.
    pub fn open() -> Result<Control, ControlError> {
        Ok(Control { ring: CommandRing::open()? })
    }

    /// Commands that outlived their deadline and still run in the kernel.
    pub fn commands_adrift(&mut self) -> usize {
        self.ring.commands_adrift()
    }

    /// What this kernel's driver can do.
    ///
    /// # Errors
    /// [`ControlError::Unsupported`] before 6.5.
    pub fn features(&mut self) -> Result<Features, ControlError> {
        let mut features = Features::NONE;
        self.call(ControlOp::GetFeatures, IdOrNew::New, 0, features.as_mut_bytes(), QUICK_TIMEOUT)?;
        Ok(features)
    }

    /// Creates a device: `/dev/ublkcN` appears. What comes back may differ from what was asked: fewer queues,
    /// smaller buffers, more features.
    ///
    /// # Errors
    /// [`ControlError::Exists`] if the wanted number is taken; [`ControlError::FeaturesRefused`] if the kernel
    /// left out what recovery needs (it does so in silence; the device is deleted again).
    pub fn add_dev(&mut self, new: &NewDevice) -> Result<DeviceInfo, ControlError> {
        let page_bytes = page_bytes();
        let in_range = (1..=QUEUES_MAX).contains(&new.queues)
            && (1..=QUEUE_DEPTH_MAX).contains(&new.depth)
            && (page_bytes..=IO_BUFFER_BYTES_MAX).contains(&new.buffer_bytes)
            && new.buffer_bytes.is_multiple_of(page_bytes);
        if !in_range {
            let NewDevice { queues, depth, buffer_bytes, .. } = *new;
            return Err(ControlError::OutOfRange { queues, depth, buffer_bytes });
        }
        assert_ne!(new.cookie.0, 0, "a cookie of 0 means nobody's");

        let mut info = DevInfo::new_zeroed();
        info.nr_hw_queues = new.queues;
        info.queue_depth = new.depth;
        info.max_io_buf_bytes = new.buffer_bytes;
        info.dev_id = new.id.map_or(DEV_ID_ANY, |id| id.0);
        info.ublksrv_pid = -1;
        info.flags = new.features().0;
        info.ublksrv_flags = new.cookie.0;
        let id = new.id.map_or(IdOrNew::New, IdOrNew::Id);
        self.call(ControlOp::AddDev, id, 0, info.as_mut_bytes(), QUICK_TIMEOUT)?;

        let added = DeviceInfo::from(info);
        assert_eq!(added.cookie, Some(new.cookie), "the kernel keeps what it is given");
        assert!(added.queues >= 1 && added.queues <= new.queues && added.depth == new.depth);
        let missing = Features::REQUIRED.without(added.features);
        if !missing.is_empty() {
            // A device that dies with its server is worse than none.
            self.del_dev(added.id, QUICK_TIMEOUT)?;
            return Err(ControlError::FeaturesRefused { id: added.id, missing });
        }
        Ok(added)
    }

    /// Sets the parameters of a device that was not started yet.
    ///
    /// # Errors
    /// [`ControlError::Params`] before the kernel is asked; [`ControlError::Started`] when it is too late.
    pub fn set_params(&mut self, device: &DeviceInfo, params: &DeviceParams) -> Result<(), ControlError> {
        params.validate(device.buffer_bytes)?;
        let mut abi = params.to_abi();
        self.call(ControlOp::SetParams, IdOrNew::Id(device.id), 0, abi.as_mut_bytes(), QUICK_TIMEOUT)?;
        Ok(())
    }

    /// Reads a device's parameters.
    ///
    /// # Errors
    /// [`ControlError::Invalid`] if none were ever set.
    pub fn get_params(&mut self, id: UblkId) -> Result<DeviceParams, ControlError> {
        let mut abi = Params::new_zeroed();
        abi.len = size_of::<Params>() as u32;
        self.call(ControlOp::GetParams, IdOrNew::Id(id), 0, abi.as_mut_bytes(), QUICK_TIMEOUT)?;
        if abi.types & PARAM_BASIC == 0 {
            let hint = "it has no parameters: its server died before it set them; delete it";
            return Err(ControlError::Invalid { op: ControlOp::GetParams, id: IdOrNew::Id(id), hint });
        }
        Ok(DeviceParams::from_abi(&abi))
    }

    /// What the kernel knows of a device.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDevice`].
    pub fn get_dev_info(&mut self, id: UblkId) -> Result<DeviceInfo, ControlError> {
        let mut info = DevInfo::new_zeroed();
        self.call(ControlOp::GetDevInfo, IdOrNew::Id(id), 0, info.as_mut_bytes(), QUICK_TIMEOUT)?;
        Ok(DeviceInfo::from(info))
    }

    /// The processors whose requests arrive on a queue, in ascending order.
    ///
    /// # Errors
    /// [`ControlError::Invalid`] if there is no such queue.
    pub fn get_queue_affinity(&mut self, id: UblkId, queue: u16) -> Result<Vec<usize>, ControlError> {
        let mut words = [0u64; AFFINITY_BYTES / 8];
        let (op, data) = (ControlOp::GetQueueAffinity, u64::from(queue));
        self.call(op, IdOrNew::Id(id), data, words.as_mut_bytes(), QUICK_TIMEOUT)?;
        // The kernel's mask is of its own words, 64 bits each.
        let set = |processor: &usize| words[processor / 64] & (1 << (processor % 64)) != 0;
        Ok((0..AFFINITY_BYTES * 8).filter(set).collect())
    }

    /// Makes `/dev/ublkbN` appear, served by this process. Waits until every tag of every queue was fetched.
    ///
    /// # Errors
    /// [`ControlError::TimedOut`] if they are not: an I/O thread is missing.
    pub fn start_dev(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        let pid = u64::from(process::id());
        self.call(ControlOp::StartDev, IdOrNew::Id(id), pid, &mut [], timeout)?;
        Ok(())
    }

    /// Takes `/dev/ublkbN` away, even from under its users. The I/O threads must go on completing requests until
    /// then; after it their tags come back as [`super::queue::Arrival::Gone`].
    ///
    /// For devices with recovery the kernel **fails** every request that arrives after this call, the write-back
    /// of the page cache included: see [`sync_block_device`].
    ///
    /// # Errors
    /// [`ControlError::TimedOut`] when requests in flight are not completed: complete them, with an error if
    /// nothing else is possible; the command then goes on in the kernel.
    pub fn stop_dev(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        self.call(ControlOp::StopDev, IdOrNew::Id(id), 0, &mut [], timeout)?;
        Ok(())
    }

    /// As [`Control::stop_dev`], unless somebody has the device open. Needs SAFE_STOP_DEV (7.0).
    ///
    /// # Errors
    /// [`ControlError::Busy`] if it is open, [`ControlError::Unsupported`] on older kernels.
    pub fn try_stop_dev(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        self.call(ControlOp::TryStopDev, IdOrNew::Id(id), 0, &mut [], timeout)?;
        Ok(())
    }

    /// Removes a device, stopping it if it runs, and waits until its number is free: that is when the last user
    /// of `/dev/ublkbN` and the server have closed it. A caller that has still a [`super::queue::CharDevice`]
    /// open waits for itself.
    ///
    /// # Errors
    /// [`ControlError::TimedOut`] with `still_running` false means: the device is removed, its number is not
    /// free yet.
    pub fn del_dev(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        self.call(ControlOp::DelDev, IdOrNew::Id(id), 0, &mut [], timeout)?;
        Ok(())
    }

    /// Removes a device, stopping it if it runs, without waiting for its users. The number becomes free when
    /// they are gone.
    ///
    /// # Errors
    /// As [`Control::stop_dev`], since it stops first.
    pub fn del_dev_async(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        self.call(ControlOp::DelDevAsync, IdOrNew::Id(id), 0, &mut [], timeout)?;
        Ok(())
    }

    /// Changes the size of a running device. Needs UPDATE_SIZE (6.16).
    ///
    /// # Errors
    /// [`ControlError::Unsupported`] on older kernels.
    pub fn update_size(&mut self, id: UblkId, size_bytes: u64) -> Result<(), ControlError> {
        let sectors = size_bytes / SECTOR_BYTES;
        self.call(ControlOp::UpdateSize, IdOrNew::Id(id), sectors, &mut [], QUICK_TIMEOUT)?;
        Ok(())
    }

    /// Announces a new server for a device whose server died. Tries again while the kernel is still cleaning up
    /// after the old one: on 6.12, with every tag in flight, that is when the requests' timeout fires
    /// (see [`super::recovery::shorten_io_timeout`]).
    ///
    /// # Errors
    /// [`ControlError::Busy`] when `patience` ran out: the old server still lives. [`ControlError::Invalid`] if
    /// the device cannot be recovered at all.
    pub fn start_user_recovery(&mut self, id: UblkId, patience: Duration) -> Result<(), ControlError> {
        let start = Instant::now();
        loop {
            match self.call(ControlOp::StartUserRecovery, IdOrNew::Id(id), 0, &mut [], QUICK_TIMEOUT) {
                Ok(_) => return Ok(()),
                Err(ControlError::Busy { op, id, .. }) if start.elapsed() >= patience => {
                    return Err(ControlError::Busy { op, id, waited: start.elapsed() });
                }
                Err(ControlError::Busy { .. }) => thread::sleep(BUSY_RETRY),
                Err(error) => return Err(error),
            }
        }
    }

    /// Lets I/O go on with this process as the server. Waits until every tag of every queue was fetched.
    ///
    /// # Errors
    /// [`ControlError::TimedOut`] if they are not.
    pub fn end_user_recovery(&mut self, id: UblkId, timeout: Duration) -> Result<(), ControlError> {
        let pid = u64::from(process::id());
        self.call(ControlOp::EndUserRecovery, IdOrNew::Id(id), pid, &mut [], timeout)?;
        Ok(())
    }

    fn call(
        &mut self,
        op: ControlOp,
        id: IdOrNew,
        data: u64,
        payload: &mut [u8],
        timeout: Duration,
    ) -> Result<i32, ControlError> {
        let dev_id = match id {
            IdOrNew::Id(id) => id.0,
            IdOrNew::New => DEV_ID_ANY,
        };
        let start = Instant::now();
        self.ring
            .call(op.opcode(), CtrlCmd::for_device(dev_id, data), payload, timeout)
            .map_err(|error| explain(op, id, start.elapsed(), error))
    }
}

/// What an error means for this command, in terms of what to do next.
fn explain(op: ControlOp, id: IdOrNew, waited: Duration, error: CommandError) -> ControlError {
    let errno = match error {
        CommandError::Refused(errno) => errno,
        CommandError::TimedOut { waited, still_running } => {
            return ControlError::TimedOut { op, id, waited, still_running };
        }
        source => return ControlError::Other { op, id, source },
    };
    match (op, errno) {
        (ControlOp::SetParams, Errno::EACCES) => ControlError::Started { op, id },
        (_, Errno::EPERM | Errno::EACCES) => ControlError::NotPermitted { op, id },
        (_, Errno::ENODEV | Errno::ENOENT) => ControlError::NoSuchDevice { op, id },
        (_, Errno::EEXIST) => ControlError::Exists { op, id },
        (_, Errno::EBUSY) => ControlError::Busy { op, id, waited },
        (_, Errno::EOPNOTSUPP) => ControlError::Unsupported { op },
        (_, Errno::EINVAL) => ControlError::Invalid { op, id, hint: invalid_hint(op) },
        (_, errno) => ControlError::Other { op, id, source: CommandError::Refused(errno) },
    }
}

fn invalid_hint(op: ControlOp) -> &'static str {
    match op {
        ControlOp::StartUserRecovery => {
            "the device does not recover (added without recovery, or its last server died in the middle of a \
             recovery on a kernel before 6.16): stop and delete it, then add it anew"
        }
        ControlOp::EndUserRecovery => "the device left recovery meanwhile, or another process opened it",
        ControlOp::StartDev => "its parameters were not set, or another process opened its /dev/ublkcN",
        ControlOp::GetQueueAffinity => "there is no such queue",
        _ => "this is a mistake in the server: report it with the kernel's version",
    }
}

/// Writes the page cache of `/dev/ublkbN` back and waits for it. To be called before an orderly stop, since
/// STOP_DEV fails what is written back after it.
///
/// A process of its own does it: a flush that nobody answers cannot be interrupted, and a server with a thread in it
/// could not even be killed, since its end waits for that thread, and the flush for the next server.
///
/// # Errors
/// Not being done within `patience`, or what `sync` says. A device that is not started is as good as synced.
pub fn sync_block_device(id: UblkId, patience: Duration) -> io::Result<()> {
    let path = id.block_path();
    if !path.exists() {
        return Ok(());
    }
    let mut sync = process::Command::new("sync").arg(&path).stdin(Stdio::null()).spawn()?;
    let begun = Instant::now();
    loop {
        match sync.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(io::Error::other(format!("sync {}: {status}", path.display()))),
            None if begun.elapsed() > patience => return Err(io::ErrorKind::TimedOut.into()),
            None => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The size of a page.
pub(super) fn page_bytes() -> u32 {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    u32::try_from(bytes.ok().flatten().expect("every Linux knows its page size"))
        .expect("a page is below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(op: ControlOp, errno: Errno) -> ControlError {
        explain(op, IdOrNew::Id(UblkId(3)), Duration::ZERO, CommandError::Refused(errno))
    }

    #[test]
    fn an_errno_becomes_what_to_do_next() {
        assert!(matches!(refused(ControlOp::AddDev, Errno::EPERM), ControlError::NotPermitted { .. }));
        assert!(matches!(refused(ControlOp::AddDev, Errno::EEXIST), ControlError::Exists { .. }));
        assert!(matches!(refused(ControlOp::SetParams, Errno::EACCES), ControlError::Started { .. }));
        assert!(matches!(refused(ControlOp::GetDevInfo, Errno::ENODEV), ControlError::NoSuchDevice { .. }));
        assert!(matches!(refused(ControlOp::StartUserRecovery, Errno::EBUSY), ControlError::Busy { .. }));
        let error = refused(ControlOp::StartUserRecovery, Errno::EINVAL).to_string();
        assert!(error.contains("ublk3") && error.contains("stop and delete"), "{error}");
        let error = refused(ControlOp::DelDev, Errno::ENODEV).to_string();
        assert!(error.contains("DelDev") && error.contains("add the device anew"), "{error}");
    }
}
