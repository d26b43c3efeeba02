//! Identifiers: one newtype for each, so that a slice is never mistaken for a slot.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($repr:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A machine running `ublk-server`; unique in its cluster, never used again.
    NodeId(u16),
    "node#"
);
id!(
    /// A block device or a file given to a node; unique in the cluster, never used again.
    DiskId(u32),
    "disk#"
);
id!(
    /// What is exported: a logical address space, mirrored or unmirrored.
    DeviceId(u32),
    "device#"
);
id!(
    /// The number of a slice within its device.
    SliceIndex(u32),
    "slice#"
);
id!(
    /// A slice-sized piece of a disk, counted from the start of the disk's data area.
    SlotIndex(u32),
    "slot#"
);
id!(
    /// Counts every change of the distribution map; the store's compare-and-swap is on it.
    MapVersion(u64),
    "v"
);
id!(
    /// The map version at which a slice's replica list last changed; fences old writers of this slice.
    SliceEpoch(u64),
    "e"
);
id!(
    /// Something that is being moved: the map version that began it.
    PlanId(u64),
    "plan#"
);
id!(
    /// Counts the moves of a device's claim; fences old exporters.
    ClaimGeneration(u64),
    "claim#"
);
id!(
    /// Given by the manager at every registration of a daemon, strictly increasing; fences the
    /// requests that an earlier process of the same exporter left behind.
    ExporterSession(u64),
    "exporter#"
);
id!(
    /// New at every start of a daemon: what was only in its memory is gone, what its disks had is not.
    ProcessId(u64),
    "process#"
);
id!(
    /// New at every boot of a machine and every (re)attach of a disk: what was only in caches is gone.
    AttachId(u64),
    "attach#"
);
id!(
    /// Counts the times that acknowledged, unflushed data of a slice may have been lost.
    LossGeneration(u32),
    "loss#"
);

/// Names one cluster; drawn at random when it is created and written into every superblock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub uuid::Uuid);

impl ClusterId {
    /// The 16 bytes that stand in superblocks and handshakes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// Nil until a cluster has been created.
    pub fn is_nil(&self) -> bool {
        self.0.is_nil()
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a copy's contents in caches and memory depend on: the disk's attachment and the daemon's
/// process. A copy whose incarnation differs from the one in the map is not what the map says
/// (docs/protocol.md rule 3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Incarnation {
    /// The disk's attachment (kernel boot id and disk sequence or inode).
    pub attach: AttachId,
    /// The daemon's process.
    pub process: ProcessId,
}
