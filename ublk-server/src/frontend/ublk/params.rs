//! What a block device promises its users: size, block sizes, limits, caches.

use kmod::abi::{
    ATTR_FUA, ATTR_READ_ONLY, ATTR_ROTATIONAL, ATTR_VOLATILE_CACHE, PARAM_BASIC, PARAM_DISCARD, ParamBasic,
    ParamDevt, ParamDiscard, Params, SECTOR_BYTES,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The page size that limits a logical block. Larger pages would allow more; nobody needs it.
const LOGICAL_BLOCK_BYTES_MAX: u32 = 4096;

/// The largest limit that the kernel's fields hold, in whole logical blocks.
const LIMIT_SECTORS_MAX: u32 = u32::MAX - (LOGICAL_BLOCK_BYTES_MAX / SECTOR_BYTES as u32 - 1);

/// Discard, as a device offers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardParams {
    /// Bytes of the smallest piece that can be given back; a power of two.
    pub granularity_bytes: u32,
    /// Bytes of the largest discard.
    pub length_bytes_max: u64,
}

/// The parameters of a device. They are fixed when it is started, so size and block sizes are agreed before.
///
/// Not to be chosen: the device always announces a volatile cache and FUA (without the first no FLUSH would ever
/// arrive), and requests may cross any boundary (`chunk_sectors` 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceParams {
    /// Size; a multiple of the logical block.
    pub size_bytes: u64,
    /// Smallest addressable unit: 512 to 4096.
    pub logical_block_bytes: u32,
    /// The unit that is written without reading around it.
    pub physical_block_bytes: u32,
    /// Smallest request without a penalty.
    pub io_min_bytes: u32,
    /// The request that users should aim for.
    pub io_opt_bytes: u32,
    /// Largest request; at most the tag's buffer.
    pub request_bytes_max: u32,
    /// Writes are refused by the kernel.
    pub read_only: bool,
    /// Seeks cost.
    pub rotational: bool,
    /// Discard, if offered.
    pub discard: Option<DiscardParams>,
    /// Bytes of the largest write zeroes, 0 for none. Offer it only if every copy really zeroes.
    pub write_zeroes_bytes_max: u64,
}

/// Why a set of parameters is refused before the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ParamsError {
    /// Block sizes and the like must be powers of two in a range.
    #[error("{field} is {bytes} bytes: choose a power of two from {min} to {max}")]
    NotPowerOfTwo {
        /// Which.
        field: &'static str,
        /// Its value.
        bytes: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A length is not a multiple of the logical block.
    #[error("{field} is {bytes} bytes: choose a multiple of the logical block, {block} bytes, above 0")]
    NotBlocks {
        /// Which.
        field: &'static str,
        /// Its value.
        bytes: u64,
        /// The logical block.
        block: u32,
    },
    /// Requests do not fit the buffers.
    #[error(
        "requests of {request_bytes_max} bytes do not fit the tags' buffers of {buffer_bytes}: lower one or raise the other"
    )]
    RequestsExceedBuffers {
        /// Largest request.
        request_bytes_max: u32,
        /// Bytes of a tag's buffer.
        buffer_bytes: u32,
    },
}

impl DeviceParams {
    /// The usual parameters for a device of `size_bytes`: 512-byte blocks on 4 KiB ones, requests as large as the
    /// buffers, no discard.
    pub fn new(size_bytes: u64, buffer_bytes: u32) -> DeviceParams {
        DeviceParams {
            size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            io_min_bytes: 4096,
            io_opt_bytes: 4096,
            request_bytes_max: buffer_bytes,
            read_only: false,
            rotational: false,
            discard: None,
            write_zeroes_bytes_max: 0,
        }
    }

    /// Checks what the kernel would answer with a bare EINVAL, and what it would not notice.
    ///
    /// # Errors
    /// [`ParamsError`] names the field and what it may be.
    pub fn validate(&self, buffer_bytes: u32) -> Result<(), ParamsError> {
        let block = self.logical_block_bytes;
        power_of_two("the logical block", block, 512, LOGICAL_BLOCK_BYTES_MAX)?;
        power_of_two("the physical block", self.physical_block_bytes, block, 1 << 20)?;
        power_of_two("the smallest good request", self.io_min_bytes, block, 1 << 25)?;
        power_of_two("the best request", self.io_opt_bytes, self.io_min_bytes, 1 << 25)?;
        blocks("the size", self.size_bytes, block)?;
        blocks("the largest request", self.request_bytes_max.into(), block)?;
        if self.request_bytes_max > buffer_bytes {
            return Err(ParamsError::RequestsExceedBuffers {
                request_bytes_max: self.request_bytes_max,
                buffer_bytes,
            });
        }
        if let Some(discard) = self.discard {
            power_of_two("the discard granularity", discard.granularity_bytes, block, 1 << 30)?;
            blocks("the largest discard", discard.length_bytes_max, block)?;
        }
        if self.write_zeroes_bytes_max != 0 {
            blocks("the largest write zeroes", self.write_zeroes_bytes_max, block)?;
        }
        Ok(())
    }

    /// As the kernel takes them. The parameters must be valid.
    pub fn to_abi(&self) -> Params {
        assert!(self.validate(u32::MAX).is_ok(), "parameters are validated before they are used");
        let mut attrs = ATTR_VOLATILE_CACHE | ATTR_FUA;
        if self.read_only {
            attrs |= ATTR_READ_ONLY;
        }
        if self.rotational {
            attrs |= ATTR_ROTATIONAL;
        }
        // A limit that the field cannot hold is lowered; the kernel splits at what is said here.
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_BYTES).unwrap_or(LIMIT_SECTORS_MAX);
        Params {
            len: size_of::<Params>() as u32,
            types: PARAM_BASIC | PARAM_DISCARD,
            basic: ParamBasic {
                attrs,
                logical_bs_shift: shift(self.logical_block_bytes),
                physical_bs_shift: shift(self.physical_block_bytes),
                io_opt_shift: shift(self.io_opt_bytes),
                io_min_shift: shift(self.io_min_bytes),
                max_sectors: sectors(self.request_bytes_max.into()),
                chunk_sectors: 0,
                dev_sectors: self.size_bytes / SECTOR_BYTES,
                virt_boundary_mask: 0,
            },
            discard: ParamDiscard {
                discard_alignment: 0,
                // Must not be 0, even where only write zeroes is offered.
                discard_granularity: self
                    .discard
                    .map_or(self.logical_block_bytes, |discard| discard.granularity_bytes),
                max_discard_sectors: self.discard.map_or(0, |discard| sectors(discard.length_bytes_max)),
                max_write_zeroes_sectors: sectors(self.write_zeroes_bytes_max),
                max_discard_segments: 1,
                reserved0: 0,
            },
            devt: ParamDevt { char_major: 0, char_minor: 0, disk_major: 0, disk_minor: 0 },
            pad: 0,
        }
    }

    /// From what the kernel answers. Fields it has not been given read as 0 and would not pass
    /// [`DeviceParams::validate`].
    pub fn from_abi(params: &Params) -> DeviceParams {
        let bytes = |shift: u8| 1u32.checked_shl(shift.into()).unwrap_or(0);
        let discard = (params.types & PARAM_DISCARD != 0).then_some(params.discard);
        DeviceParams {
            size_bytes: params.basic.dev_sectors * SECTOR_BYTES,
            logical_block_bytes: bytes(params.basic.logical_bs_shift),
            physical_block_bytes: bytes(params.basic.physical_bs_shift),
            io_min_bytes: bytes(params.basic.io_min_shift),
            io_opt_bytes: bytes(params.basic.io_opt_shift),
            request_bytes_max: u32::try_from(u64::from(params.basic.max_sectors) * SECTOR_BYTES)
                .unwrap_or(u32::MAX),
            read_only: params.basic.attrs & ATTR_READ_ONLY != 0,
            rotational: params.basic.attrs & ATTR_ROTATIONAL != 0,
            discard: discard.filter(|discard| discard.max_discard_sectors != 0).map(|discard| {
                DiscardParams {
                    granularity_bytes: discard.discard_granularity,
                    length_bytes_max: u64::from(discard.max_discard_sectors) * SECTOR_BYTES,
                }
            }),
            write_zeroes_bytes_max: discard
                .map_or(0, |discard| u64::from(discard.max_write_zeroes_sectors) * SECTOR_BYTES),
        }
    }
}

fn power_of_two(field: &'static str, bytes: u32, min: u32, max: u32) -> Result<(), ParamsError> {
    if bytes.is_power_of_two() && (min..=max).contains(&bytes) {
        return Ok(());
    }
    Err(ParamsError::NotPowerOfTwo { field, bytes: bytes.into(), min: min.into(), max: max.into() })
}

fn blocks(field: &'static str, bytes: u64, block: u32) -> Result<(), ParamsError> {
    if bytes != 0 && bytes.is_multiple_of(u64::from(block)) {
        return Ok(());
    }
    Err(ParamsError::NotBlocks { field, bytes, block })
}

fn shift(bytes: u32) -> u8 {
    assert!(bytes.is_power_of_two());
    bytes.trailing_zeros() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUFFER_BYTES: u32 = 256 << 10;

    fn usual() -> DeviceParams {
        DeviceParams {
            discard: Some(DiscardParams { granularity_bytes: 1 << 20, length_bytes_max: 64 << 20 }),
            write_zeroes_bytes_max: 32 << 20,
            ..DeviceParams::new(1 << 30, BUFFER_BYTES)
        }
    }

    #[test]
    fn the_kernels_form_and_back() {
        let params = usual();
        params.validate(BUFFER_BYTES).unwrap();
        let abi = params.to_abi();
        assert_eq!(abi.basic.dev_sectors, 2 << 20);
        assert_eq!(abi.basic.attrs, ATTR_VOLATILE_CACHE | ATTR_FUA);
        assert_eq!(abi.discard.max_discard_segments, 1);
        assert_eq!(DeviceParams::from_abi(&abi), params);
    }

    #[test]
    fn granularity_is_set_without_discard() {
        let abi = DeviceParams::new(1 << 20, BUFFER_BYTES).to_abi();
        assert_eq!(abi.discard.discard_granularity, 512);
        assert_eq!(abi.discard.max_discard_sectors, 0);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_named() {
        let refused = |params: DeviceParams| params.validate(BUFFER_BYTES).unwrap_err();
        assert!(matches!(
            refused(DeviceParams { logical_block_bytes: 8192, ..usual() }),
            ParamsError::NotPowerOfTwo { field: "the logical block", .. }
        ));
        assert!(matches!(
            refused(DeviceParams { physical_block_bytes: 256, ..usual() }),
            ParamsError::NotPowerOfTwo { field: "the physical block", .. }
        ));
        assert!(matches!(
            refused(DeviceParams { size_bytes: 1000, ..usual() }),
            ParamsError::NotBlocks { field: "the size", .. }
        ));
        assert!(matches!(
            refused(DeviceParams { request_bytes_max: BUFFER_BYTES * 2, ..usual() }),
            ParamsError::RequestsExceedBuffers { .. }
        ));
        assert!(matches!(
            refused(DeviceParams { size_bytes: 0, ..usual() }),
            ParamsError::NotBlocks { field: "the size", bytes: 0, .. }
        ));
    }
}
