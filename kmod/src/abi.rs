//! The interface of Linux's ublk driver: opcodes, feature flags and the structures that cross it.
//!
//! Written from the facts in the kernel's `linux/ublk_cmd.h` (up to 7.3). Structures only ever grow at their end
//! or into what was padding, and the driver copies the smaller of two sizes, so one definition serves every
//! kernel; a feature flag says whether a newer field means anything. All integers are of the host's byte order.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device that takes control commands; it appears with the module.
pub const CONTROL_DEVICE: &str = "/dev/ublk-control";

/// Bytes of a sector, the unit of every block number that crosses the interface, whatever the block size is.
pub const SECTOR_BYTES: u64 = 512;

/// The most requests that one hardware queue may have in flight.
pub const QUEUE_DEPTH_MAX: u16 = 4096;

/// The most hardware queues of a device.
pub const QUEUES_MAX: u16 = 4096;

/// The largest buffer of one request: 25 bits of offset.
pub const IO_BUFFER_BYTES_MAX: u32 = 32 << 20;

/// `dev_id` of an ADD_DEV that leaves the choice to the kernel.
pub const DEV_ID_ANY: u32 = u32::MAX;

/// `queue_id` of a command that is not about one queue.
pub const QUEUE_ID_NONE: u16 = u16::MAX;

/// Control commands, encoded as ioctls (the plain numbers of 6.0 to 6.3 are not used).
pub mod control_op {
    use super::CtrlCmd;

    /// Which processors feed a queue; `data` is the queue, the buffer receives a bit mask.
    pub const GET_QUEUE_AFFINITY: u32 = ioctl_read(0x01);
    /// The device's [`super::DevInfo`].
    pub const GET_DEV_INFO: u32 = ioctl_read(0x02);
    /// Creates `/dev/ublkcN` from a [`super::DevInfo`] and returns what was agreed in the same buffer.
    pub const ADD_DEV: u32 = ioctl_read_write(0x04);
    /// Removes a device and waits until its number is free again, that is until nobody has it open.
    pub const DEL_DEV: u32 = ioctl_read_write(0x05);
    /// Makes `/dev/ublkbN` appear; waits until every tag of every queue was fetched. `data` is the server's pid.
    pub const START_DEV: u32 = ioctl_read_write(0x06);
    /// Takes `/dev/ublkbN` away.
    pub const STOP_DEV: u32 = ioctl_read_write(0x07);
    /// Sets [`super::Params`]; refused once the device was started.
    pub const SET_PARAMS: u32 = ioctl_read_write(0x08);
    /// Reads [`super::Params`].
    pub const GET_PARAMS: u32 = ioctl_read(0x09);
    /// A new server announces itself for a device whose server died.
    pub const START_USER_RECOVERY: u32 = ioctl_read_write(0x10);
    /// The new server has fetched all tags: I/O goes on. Waits for them. `data` is the server's pid.
    pub const END_USER_RECOVERY: u32 = ioctl_read_write(0x11);
    /// What this kernel can do, as a [`super::Features`]; 6.5.
    pub const GET_FEATURES: u32 = ioctl_read(0x13);
    /// As DEL_DEV, without waiting; 6.7.
    pub const DEL_DEV_ASYNC: u32 = ioctl_read(0x14);
    /// Changes the size of a running device; `data` is the number of sectors. Needs UPDATE_SIZE.
    pub const UPDATE_SIZE: u32 = ioctl_read_write(0x15);
    /// Hands a live device over to a new server of the same kind. Needs QUIESCE.
    pub const QUIESCE_DEV: u32 = ioctl_read_write(0x16);
    /// As STOP_DEV, but EBUSY when somebody has the device open. Needs SAFE_STOP_DEV.
    pub const TRY_STOP_DEV: u32 = ioctl_read_write(0x17);

    const fn ioctl_read(number: u32) -> u32 {
        libc::_IOR::<CtrlCmd>(b'u' as u32, number) as u32
    }

    const fn ioctl_read_write(number: u32) -> u32 {
        libc::_IOWR::<CtrlCmd>(b'u' as u32, number) as u32
    }

    const _: () = assert!(ADD_DEV & 0xffff == 0x7504 && (ADD_DEV >> 16) & 0x3fff == 32);
    const _: () = assert!(GET_FEATURES != ADD_DEV);
}

/// I/O commands on `/dev/ublkcN`, encoded as ioctls.
pub mod io_op {
    use super::IoCmd;

    /// Lends a tag and its buffer to the kernel, before the device runs.
    pub const FETCH: u32 = libc::_IOWR::<IoCmd>(b'u' as u32, 0x20) as u32;
    /// Returns the result of a tag's request and lends the tag again.
    pub const COMMIT_AND_FETCH: u32 = libc::_IOWR::<IoCmd>(b'u' as u32, 0x21) as u32;

    const _: () = assert!(FETCH & 0xffff == 0x7520 && (FETCH >> 16) & 0x3fff == 16);
}

/// The result of a fetch that brought a request.
pub const IO_RESULT_OK: i32 = 0;
/// The result of a fetch that the kernel gave up: the tag will bring no more requests.
pub const IO_RESULT_ABORT: i32 = -libc::ENODEV;

/// A set of feature flags, as GET_FEATURES and a device's `flags` carry them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Features(pub u64);

impl Features {
    /// Nothing.
    pub const NONE: Features = Features(0);
    /// Requests' pages as registered buffers (defined in 6.0, usable from 6.15).
    pub const ZERO_COPY: Features = Features(1 << 0);
    /// Completions are always run in the server's task (6.0).
    pub const COMPLETE_IN_TASK: Features = Features(1 << 1);
    /// The data of a write is asked for by a command of its own (6.0).
    pub const NEED_GET_DATA: Features = Features(1 << 2);
    /// The device outlives its server (6.1).
    pub const USER_RECOVERY: Features = Features(1 << 3);
    /// What was in flight when the server died is issued again (6.1).
    pub const USER_RECOVERY_REISSUE: Features = Features(1 << 4);
    /// Devices of ordinary users (6.3).
    pub const UNPRIVILEGED_DEV: Features = Features(1 << 5);
    /// Commands are encoded as ioctls (6.4).
    pub const CMD_IOCTL_ENCODE: Features = Features(1 << 6);
    /// Data is copied by read and write on `/dev/ublkcN` (6.5).
    pub const USER_COPY: Features = Features(1 << 7);
    /// Zoned devices (6.6).
    pub const ZONED: Features = Features(1 << 8);
    /// Without a server, I/O fails at once and the device still outlives it (6.13).
    pub const USER_RECOVERY_FAIL_IO: Features = Features(1 << 9);
    /// The size of a running device can change (6.16).
    pub const UPDATE_SIZE: Features = Features(1 << 10);
    /// Requests' pages are registered as buffers by the fetch itself (6.16).
    pub const AUTO_BUF_REG: Features = Features(1 << 11);
    /// A live device can be handed to a new server (6.16).
    pub const QUIESCE: Features = Features(1 << 12);
    /// Every tag may have a task of its own (6.16).
    pub const PER_IO_DAEMON: Features = Features(1 << 13);
    /// Buffers may be registered from any task (6.17).
    pub const BUF_REG_OFF_DAEMON: Features = Features(1 << 14);
    /// Many tags in one command (7.0).
    pub const BATCH_IO: Features = Features(1 << 15);
    /// Integrity data (7.0).
    pub const INTEGRITY: Features = Features(1 << 16);
    /// Stop only if nobody has the device open (7.0).
    pub const SAFE_STOP_DEV: Features = Features(1 << 17);
    /// Partitions are not looked for at start (7.0).
    pub const NO_AUTO_PART_SCAN: Features = Features(1 << 18);
    /// Pages of a shared memory file are passed by reference (7.1).
    pub const SHMEM_ZC: Features = Features(1 << 19);
    /// The size of an I/O descriptor is negotiable (7.3).
    pub const IO_DESC_SIZE: Features = Features(1 << 20);

    /// What the mirror cannot do without: devices that outlive the server and repeat what was in flight.
    pub const REQUIRED: Features =
        Features(Self::USER_RECOVERY.0 | Self::USER_RECOVERY_REISSUE.0 | Self::CMD_IOCTL_ENCODE.0);

    /// Every flag known here, with its name and the kernel that brought it.
    pub const TABLE: [(Features, &'static str, &'static str); 21] = [
        (Self::ZERO_COPY, "ZERO_COPY", "6.15"),
        (Self::COMPLETE_IN_TASK, "COMPLETE_IN_TASK", "6.0"),
        (Self::NEED_GET_DATA, "NEED_GET_DATA", "6.0"),
        (Self::USER_RECOVERY, "USER_RECOVERY", "6.1"),
        (Self::USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE", "6.1"),
        (Self::UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV", "6.3"),
        (Self::CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE", "6.4"),
        (Self::USER_COPY, "USER_COPY", "6.5"),
        (Self::ZONED, "ZONED", "6.6"),
        (Self::USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO", "6.13"),
        (Self::UPDATE_SIZE, "UPDATE_SIZE", "6.16"),
        (Self::AUTO_BUF_REG, "AUTO_BUF_REG", "6.16"),
        (Self::QUIESCE, "QUIESCE", "6.16"),
        (Self::PER_IO_DAEMON, "PER_IO_DAEMON", "6.16"),
        (Self::BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON", "6.17"),
        (Self::BATCH_IO, "BATCH_IO", "7.0"),
        (Self::INTEGRITY, "INTEGRITY", "7.0"),
        (Self::SAFE_STOP_DEV, "SAFE_STOP_DEV", "7.0"),
        (Self::NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN", "7.0"),
        (Self::SHMEM_ZC, "SHMEM_ZC", "7.1"),
        (Self::IO_DESC_SIZE, "IO_DESC_SIZE", "7.3"),
    ];

    /// Whether all of `other` is here.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// What is in both sets.
    pub const fn common(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// What is here and not in `other`.
    pub const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// Whether nothing is here.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The names of the flags, lowest bit first; a bit unknown here as `bit N`.
    pub fn names(self) -> Vec<String> {
        (0..64)
            .filter(|bit| self.0 & (1 << bit) != 0)
            .map(|bit| match Self::TABLE.iter().find(|(flag, ..)| flag.0 == 1 << bit) {
                Some((_, name, _)) => (*name).to_owned(),
                None => format!("bit {bit}"),
            })
            .collect()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&self.names().join(", "))
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({:#x})", self.0)
    }
}

/// `state` of a device: added, not started, or stopped.
pub const STATE_DEAD: u16 = 0;
/// `state` of a device: `/dev/ublkbN` is there and served.
pub const STATE_LIVE: u16 = 1;
/// `state` of a device: its server died, I/O waits for the next one.
pub const STATE_QUIESCED: u16 = 2;
/// `state` of a device: its server died, I/O fails until the next one (USER_RECOVERY_FAIL_IO).
pub const STATE_FAIL_IO: u16 = 3;

/// A control command (`ublksrv_ctrl_cmd`), at the start of the 80 command bytes of an SQE128.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtrlCmd {
    /// The device, or [`DEV_ID_ANY`].
    pub dev_id: u32,
    /// The queue, or [`QUEUE_ID_NONE`].
    pub queue_id: u16,
    /// Bytes at `addr`.
    pub len: u16,
    /// The command's buffer, in or out or both.
    pub addr: u64,
    /// The command's inline argument.
    pub data: u64,
    /// Only for unprivileged devices: 0.
    pub dev_path_len: u16,
    /// 0.
    pub pad: u16,
    /// 0.
    pub reserved: u32,
}

impl CtrlCmd {
    /// A command about a whole device, without a buffer.
    pub const fn for_device(dev_id: u32, data: u64) -> CtrlCmd {
        CtrlCmd {
            dev_id,
            queue_id: QUEUE_ID_NONE,
            len: 0,
            addr: 0,
            data,
            dev_path_len: 0,
            pad: 0,
            reserved: 0,
        }
    }
}

/// What a device is (`ublksrv_ctrl_dev_info`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevInfo {
    /// Hardware queues; the kernel lowers it to the number of processors.
    pub nr_hw_queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// One of the `STATE_` constants; set by the kernel.
    pub state: u16,
    /// Size of an I/O descriptor (7.3, with IO_DESC_SIZE; padding before).
    pub io_desc_size: u16,
    /// Bytes of a tag's buffer; the kernel rounds down to a page.
    pub max_io_buf_bytes: u32,
    /// The device's number.
    pub dev_id: u32,
    /// The server's process, -1 if there is none.
    pub ublksrv_pid: i32,
    /// 0.
    pub pad1: u32,
    /// Wanted features; the kernel clears what it does not know, in silence.
    pub flags: u64,
    /// Ours: the kernel keeps it and never looks.
    pub ublksrv_flags: u64,
    /// The owner, set by the kernel.
    pub owner_uid: u32,
    /// The owner's group, set by the kernel.
    pub owner_gid: u32,
    /// 0.
    pub reserved1: u64,
    /// 0.
    pub reserved2: u64,
}

/// `attrs`: writes are refused.
pub const ATTR_READ_ONLY: u32 = 1 << 0;
/// `attrs`: seeks cost.
pub const ATTR_ROTATIONAL: u32 = 1 << 1;
/// `attrs`: there is a volatile cache; without it no FLUSH is ever sent.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// `attrs`: a write can be forced through the cache; only with VOLATILE_CACHE.
pub const ATTR_FUA: u32 = 1 << 3;

/// The part of [`Params`] that every device must set (`ublk_param_basic`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamBasic {
    /// The `ATTR_` constants.
    pub attrs: u32,
    /// Logarithm of the logical block's bytes, 9 up to a page.
    pub logical_bs_shift: u8,
    /// Logarithm of the physical block's bytes, not below the logical one.
    pub physical_bs_shift: u8,
    /// Logarithm of the best request's bytes.
    pub io_opt_shift: u8,
    /// Logarithm of the smallest good request's bytes.
    pub io_min_shift: u8,
    /// Largest request; not above the buffer.
    pub max_sectors: u32,
    /// Requests never cross a multiple of it; 0 for none.
    pub chunk_sectors: u32,
    /// The size of the device.
    pub dev_sectors: u64,
    /// 0.
    pub virt_boundary_mask: u64,
}

/// Discard and write zeroes (`ublk_param_discard`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamDiscard {
    /// Bytes by which the first granule is off; 0.
    pub discard_alignment: u32,
    /// Bytes of a granule; must not be 0.
    pub discard_granularity: u32,
    /// Largest discard; 0 for none.
    pub max_discard_sectors: u32,
    /// Largest write zeroes; 0 for none.
    pub max_write_zeroes_sectors: u32,
    /// Must be 1 where discard is offered.
    pub max_discard_segments: u16,
    /// 0.
    pub reserved0: u16,
}

/// The device numbers, filled in by the kernel (`ublk_param_devt`, 6.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamDevt {
    /// Major of `/dev/ublkcN`.
    pub char_major: u32,
    /// Minor of `/dev/ublkcN`.
    pub char_minor: u32,
    /// Major of `/dev/ublkbN`, 0 before its start.
    pub disk_major: u32,
    /// Minor of `/dev/ublkbN`.
    pub disk_minor: u32,
}

/// `types`: [`ParamBasic`] is set.
pub const PARAM_BASIC: u32 = 1 << 0;
/// `types`: [`ParamDiscard`] is set.
pub const PARAM_DISCARD: u32 = 1 << 1;
/// `types`: [`ParamDevt`] is set; by the kernel only.
pub const PARAM_DEVT: u32 = 1 << 2;

/// A device's parameters (`ublk_params`), as far as we use them; the kernel's own goes on with zoned devices,
/// alignment, segments and integrity, and takes `len` for what we know of.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// Bytes of this structure.
    pub len: u32,
    /// The `PARAM_` constants that hold.
    pub types: u32,
    /// Must be set.
    pub basic: ParamBasic,
    /// Discard and write zeroes.
    pub discard: ParamDiscard,
    /// Read only.
    pub devt: ParamDevt,
    /// 0.
    pub pad: u32,
}

/// The operation of a request: the low byte of `op_flags`.
pub mod request_op {
    /// Read.
    pub const READ: u8 = 0;
    /// Write.
    pub const WRITE: u8 = 1;
    /// Flush the volatile cache.
    pub const FLUSH: u8 = 2;
    /// The range's content is no longer wanted.
    pub const DISCARD: u8 = 3;
    /// The range must read as zeros.
    pub const WRITE_ZEROES: u8 = 5;
}

/// `op_flags`: the write must be on stable storage when it completes.
pub const REQUEST_FUA: u32 = 1 << 13;
/// `op_flags`: WRITE_ZEROES must not give space back.
pub const REQUEST_NOUNMAP: u32 = 1 << 15;

/// One request, as the kernel describes it in the shared array (`ublksrv_io_desc`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoDesc {
    /// Operation (bits 0 to 7) and flags.
    pub op_flags: u32,
    /// Length.
    pub nr_sectors: u32,
    /// First sector.
    pub start_sector: u64,
    /// The buffer that was lent with the tag.
    pub addr: u64,
}

/// An I/O command (`ublksrv_io_cmd`), the 16 command bytes of an ordinary SQE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoCmd {
    /// The queue.
    pub q_id: u16,
    /// The tag.
    pub tag: u16,
    /// The result that a commit returns: bytes, 0, or a negative errno.
    pub result: i32,
    /// The tag's buffer.
    pub addr: u64,
}

const _: () = {
    assert!(size_of::<CtrlCmd>() == 32);
    assert!(size_of::<DevInfo>() == 64);
    assert!(size_of::<ParamBasic>() == 32);
    assert!(size_of::<ParamDiscard>() == 20);
    assert!(size_of::<ParamDevt>() == 16);
    assert!(size_of::<Params>() == 80);
    assert!(std::mem::offset_of!(Params, discard) == 40);
    assert!(std::mem::offset_of!(Params, devt) == 60);
    assert!(size_of::<IoDesc>() == 24);
    assert!(size_of::<IoCmd>() == 16);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_are_those_of_the_kernel() {
        // The encoding of x86, arm64 and riscv; spelled out once, so that a slip in a number shows.
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")) {
            assert_eq!(control_op::GET_DEV_INFO, 0x8020_7502);
            assert_eq!(control_op::ADD_DEV, 0xc020_7504);
            assert_eq!(control_op::GET_FEATURES, 0x8020_7513);
            assert_eq!(io_op::FETCH, 0xc010_7520);
            assert_eq!(io_op::COMMIT_AND_FETCH, 0xc010_7521);
        }
    }

    #[test]
    fn the_table_has_every_flag_once_in_order() {
        for (bit, (flag, name, since)) in Features::TABLE.iter().enumerate() {
            assert_eq!(flag.0, 1 << bit, "{name}");
            assert!(since.contains('.'));
        }
    }

    #[test]
    fn names_of_known_and_unknown_flags() {
        let features = Features::USER_RECOVERY.with(Features(1 << 40));
        assert_eq!(features.names(), ["USER_RECOVERY", "bit 40"]);
        assert_eq!(Features::NONE.to_string(), "none");
        assert_eq!(Features::REQUIRED.without(Features(0x1fe)), Features::NONE);
    }
}
