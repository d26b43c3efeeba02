//! What the manager does by itself, and after how long.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Thresholds of the system manager, from the cluster file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Whether a node that failed is failed over without an operator.
    pub auto_failover: bool,
    /// A node that was not heard of for so long, and with which no other node has a session, has failed.
    pub fail_after: Duration,
    /// Whether spares are activated without an operator.
    pub auto_spare: bool,
    /// A disk is made again on a spare once it, or its node, has been gone for so long: long enough that
    /// a reboot starts nothing.
    pub spare_after: Duration,
    /// How fast each node makes copies equal.
    pub pace: Pace,
}

/// How fast one node makes other nodes' copies equal to its own: bytes looked at in a second, of all copies together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pace {
    /// Never more; `None` for as much as there is.
    pub rate: Option<u64>,
    /// While hosts are busy, copies are made equal in the gaps that they leave; but never less than so many if disks and
    /// links can do it at all. 0 for none.
    pub floor: u64,
}

impl Pace {
    /// A terabyte in 28 hours, which a rotating disk can do besides what hosts ask of it.
    pub const FLOOR_DEFAULT: u64 = 10 << 20;
}

impl Default for Pace {
    fn default() -> Self {
        Policy::MANUAL.pace
    }
}

impl Policy {
    /// The shortest `fail_after`: twice the time between two reports of a node.
    pub const FAIL_AFTER_MIN: Duration = Duration::from_millis(2 * crate::control::REPORT_MS);

    /// A manager that does nothing without being told.
    pub const MANUAL: Self = Self {
        auto_failover: false,
        auto_spare: false,
        fail_after: Duration::from_secs(2),
        spare_after: Duration::from_secs(60),
        pace: Pace { rate: None, floor: Pace::FLOOR_DEFAULT },
    };
}

impl Default for Policy {
    fn default() -> Self {
        Self { auto_failover: true, auto_spare: true, ..Self::MANUAL }
    }
}
