//! The on-disk format, as pure code: bytes in, bytes out.
//!
//! A disk holds two [`superblock`]s, two copies of the [`page`]s of its slot [`table`], one circular
//! [`log`] and the data slots; [`geometry`] says where. A [`journal`] owns table, log and
//! checkpoint and tells its driver what to write; [`recovery`] makes a journal out of a disk;
//! [`inspect`] describes a disk to people, damaged or not; [`create`] formats one; [`alloc`] chooses
//! slots. `docs/disk-format.md` draws it and argues every crash point.
//!
//! Every metadata write is one aligned 4 KiB [`block::Block`] with a CRC32C over all but itself.

pub mod alloc;
pub mod block;
mod checkpoint;
pub mod create;
pub mod geometry;
pub mod inspect;
pub mod journal;
pub mod log;
pub mod page;
pub mod plan;
pub mod recovery;
pub mod scan;
pub mod superblock;
pub mod table;

pub use block::{BLOCK_BYTES, Block, BlockFault};
pub use geometry::{Geometry, GeometryError};
pub use journal::{Change, IoFailed, IoId, Journal, MetadataIo, Ticket};
pub use plan::{Plan, PlanStep};
pub use recovery::{OpenError, Opened, open};
pub use scan::ReadFailed;
pub use superblock::{DiskState, SlotOrder, Superblock, ZoneProfile};
pub use table::{Assignment, CopyState, Role, SlotState};
