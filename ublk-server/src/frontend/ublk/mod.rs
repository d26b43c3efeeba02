//! Devices as `/dev/ublkbN`.
//!
//! - [`control`]: adding, starting, stopping and deleting devices, for a control thread;
//! - [`queue`]: one hardware queue of a device, for the I/O thread that serves it;
//! - [`recovery`]: taking over devices whose server died;
//! - [`users`]: who uses a device;
//! - [`names`]: what a device is called in the map.
//!
//! Life of a device: [`control::Control::add_dev`], [`control::Control::set_params`],
//! [`queue::CharDevice::open`]; each I/O thread makes its [`queue::Queue`] and submits a fetch of every tag;
//! [`control::Control::start_dev`] waits for these. In the end [`control::sync_block_device`],
//! [`control::Control::stop_dev`], the queues run dry, the [`queue::CharDevice`] is closed, and
//! [`control::Control::del_dev`].

use std::fmt;
use std::path::PathBuf;

use kmod::abi::{self, DevInfo, Features};
use rand::TryRngCore;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};

pub mod control;
pub mod export;
pub mod names;
pub mod params;
pub mod process;
pub mod queue;
pub mod recovery;
pub mod removal;
pub mod users;

/// The number of a device in the kernel: the N of `/dev/ublkbN`. It says nothing about whose device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UblkId(pub u32);

impl UblkId {
    /// The character device through which the server serves it.
    pub fn char_path(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkc{}", self.0))
    }

    /// The block device that users see.
    pub fn block_path(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.0))
    }

    /// The block device's directory in sysfs.
    pub fn sysfs_path(self) -> PathBuf {
        PathBuf::from(format!("/sys/block/ublkb{}", self.0))
    }
}

impl fmt::Display for UblkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ublk{}", self.0)
    }
}

/// Who a device belongs to: kept by the kernel for us, never looked at by it. Chosen at random when a device is
/// added first, and never 0, so that a number reused by other software is not mistaken for ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cookie(pub u64);

impl Cookie {
    /// A new one.
    pub fn random() -> Cookie {
        loop {
            let value = OsRng.try_next_u64().expect("the kernel has random numbers");
            if value != 0 {
                return Cookie(value);
            }
        }
    }
}

/// What the kernel says a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Added and not started, or stopped: there is no `/dev/ublkbN`.
    Dead,
    /// Served, or its server died this moment.
    Live,
    /// Without a server; I/O waits for one.
    Quiesced,
    /// Without a server; I/O fails.
    FailIo,
    /// A state that this program does not know.
    Unknown(u16),
}

/// A device as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub id: UblkId,
    /// Hardware queues.
    pub queues: u16,
    /// Tags of each queue.
    pub depth: u16,
    /// Bytes of a tag's buffer.
    pub buffer_bytes: u32,
    /// What it is doing.
    pub state: DeviceState,
    /// Its server, as seen from our pid namespace. 7.x names only a living process, 6.12 also a dead one.
    pub server_pid: Option<i32>,
    /// What was agreed when it was added.
    pub features: Features,
    /// Whose it is; `None` for devices that do not say.
    pub cookie: Option<Cookie>,
}

impl From<DevInfo> for DeviceInfo {
    fn from(info: DevInfo) -> DeviceInfo {
        DeviceInfo {
            id: UblkId(info.dev_id),
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            buffer_bytes: info.max_io_buf_bytes,
            state: match info.state {
                abi::STATE_DEAD => DeviceState::Dead,
                abi::STATE_LIVE => DeviceState::Live,
                abi::STATE_QUIESCED => DeviceState::Quiesced,
                abi::STATE_FAIL_IO => DeviceState::FailIo,
                other => DeviceState::Unknown(other),
            },
            server_pid: (info.ublksrv_pid > 0).then_some(info.ublksrv_pid),
            features: Features(info.flags),
            cookie: (info.ublksrv_flags != 0).then_some(Cookie(info.ublksrv_flags)),
        }
    }
}
