//! An export: what a client is told about a device.

use super::PAYLOAD_BYTES_MAX;

const FLAG_HAS_FLAGS: u16 = 1 << 0;
const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_ROTATIONAL: u16 = 1 << 4;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// The preferred block size is never less: page caches, and most disks, work in these.
const BLOCK_BYTES_PREFERRED_MIN: u32 = 4096;
/// The largest minimum block size that the protocol lets a server advertise.
const BLOCK_BYTES_MIN_MAX: u32 = 1 << 16;

/// One export: a device as an NBD client sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// The canonical name; at most [`STRING_BYTES_MAX`](super::STRING_BYTES_MAX) bytes, without NUL.
    pub name: String,
    /// For people; may be empty, limited like the name.
    pub description: String,
    /// In bytes; a multiple of `block_size_min`, or else the last bytes cannot be reached.
    pub size: u64,
    /// In bytes: offsets and lengths of requests must be multiples of it. A power of two, at most
    /// 64 KiB; the device's logical block size.
    pub block_size_min: u32,
    /// In bytes: the smallest request without a read-modify-write behind it.
    pub block_size_preferred: u32,
    /// Every command that would change data is refused.
    pub read_only: bool,
    /// The device has seek times, so clients should sort their requests.
    pub rotational: bool,
    /// Zeroing may be quicker than writing zeros. The device is then asked with the flag set and may
    /// still refuse with `NotSupported`; without it, such requests are refused here.
    pub fast_zero: bool,
}

impl ExportInfo {
    /// The transmission flags of this export. `CAN_MULTI_CONN` holds for every export, as a FLUSH
    /// covers the writes of the device, not of the connection. `SEND_FAST_ZERO` is set even where no
    /// zeroing is fast: being told so quickly is what the client wants to know.
    pub fn transmission_flags(&self) -> u16 {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN;
        if self.read_only {
            flags |= FLAG_READ_ONLY;
        } else {
            flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
        }
        if self.rotational {
            flags |= FLAG_ROTATIONAL;
        }
        flags
    }

    /// What `NBD_INFO_BLOCK_SIZE` says: minimum, preferred, maximum payload; brought into the
    /// bounds of the protocol, because clients hang up on a server that leaves them.
    pub(super) fn size_constraints(&self) -> [u32; 3] {
        debug_assert!(self.block_size_min.is_power_of_two() && self.block_size_min <= BLOCK_BYTES_MIN_MAX);
        let preferred = self
            .block_size_preferred
            .max(self.block_size_min)
            .clamp(BLOCK_BYTES_PREFERRED_MIN, PAYLOAD_BYTES_MAX)
            .next_power_of_two();
        [self.block_size_min, preferred, PAYLOAD_BYTES_MAX]
    }
}

/// What there is to export, as the negotiation asks for it.
pub trait Exports {
    /// The names of all exports, in the order in which they are shown.
    fn list(&self) -> Vec<String>;
    /// The export of that name. Never asked for the empty name.
    fn get(&self, name: &str) -> Option<ExportInfo>;
}

/// Finds the export that a client means. The empty name is the only export, if there is exactly one:
/// with several, a client that did not choose must not be given somebody's disk.
pub(super) fn resolve(exports: &dyn Exports, name: &str) -> Option<ExportInfo> {
    if !name.is_empty() {
        return exports.get(name);
    }
    match exports.list().as_slice() {
        [only] => exports.get(only),
        _ => None,
    }
}
