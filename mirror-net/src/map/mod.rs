//! The distribution map: where every slice of every device lives.
//!
//! Plain data. [`DistributionMap`] is changed by [`verbs`] only, checked by [`validate`] on every
//! load, first made by [`layout`].

mod inventory;
pub mod layout;

mod model;
pub mod plan;
pub mod runs;
pub mod validate;
pub mod verbs;
pub mod wanted;

pub use model::{
    Claim, Commit, Device, DevicePolicy, Disk, DistributionMap, Failed, MAP_FORMAT, Node, OnNoQuorum,
    Replica, ReplicaState, SegmentSlots, Span, Topology,
};
