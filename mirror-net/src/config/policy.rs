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
    /// Whether a disk that is in use is emptied, and becomes the spare, where none is left for what is gone.
    pub auto_make_spare: bool,
    /// A disk is made again on a spare once it, or its node, has been gone for so long: long enough that
    /// a reboot starts nothing.
    pub spare_after: Duration,
    /// After a failover its load is spread over the survivors once it has been uneven for so long; `None` for never.
    pub spread_after: Option<Duration>,
    /// Disks are made equally full by themselves if one is fuller than another by more than so many percent of its
    /// slots; `None` for never.
    pub rebalance_above: Option<u8>,
    /// That has to be so for so long.
    pub rebalance_after: Duration,
    /// What every node is told of it.
    pub node: NodePolicy,
}

/// The part of the policy that nodes carry out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodePolicy {
    /// How fast a node makes copies equal.
    pub pace: Pace,
    /// How it bears with other nodes.
    pub tolerance: Tolerance,
    /// Where a device is set to fail requests that cannot be served: after so long.
    pub no_quorum_after: Duration,
}

impl Default for NodePolicy {
    fn default() -> Self {
        Policy::MANUAL.node
    }
}

/// How a node bears with a partner that is slow, or that comes and goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tolerance {
    /// A partner that owes the answer to a write or flush for so long is told of as slow.
    pub slow_after: Duration,
    /// One that owes it for so long is gone on without; `None` for never.
    pub stale_after: Option<Duration>,
    /// One that is lost again and again is left out for longer each time, at most for so long.
    pub hold_max: Duration,
}

impl Tolerance {
    /// The shortest `stale_after`: sooner a disk that is busy would be taken for one that hangs.
    pub const STALE_AFTER_MIN: Duration = Duration::from_secs(2);
    /// The shortest `slow_after`.
    pub const SLOW_AFTER_MIN: Duration = Duration::from_millis(500);

    /// A partner that owes an answer for so long is not taken back before it has given it.
    pub fn hung_after(&self) -> Duration {
        self.stale_after.map_or(self.slow_after, |after| self.slow_after.max(after / 2))
    }
}

impl Default for Tolerance {
    fn default() -> Self {
        Policy::MANUAL.node.tolerance
    }
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
        Policy::MANUAL.node.pace
    }
}

impl Policy {
    /// The shortest `fail_after`: twice the time between two reports of a node.
    pub const FAIL_AFTER_MIN: Duration = Duration::from_millis(2 * crate::control::REPORT_MS);

    /// A manager that does nothing without being told.
    pub const MANUAL: Self = Self {
        auto_failover: false,
        auto_spare: false,
        auto_make_spare: false,
        fail_after: Duration::from_secs(2),
        spare_after: Duration::from_secs(60),
        spread_after: None,
        rebalance_above: None,
        rebalance_after: Duration::from_secs(600),
        node: NodePolicy {
            pace: Pace { rate: None, floor: Pace::FLOOR_DEFAULT },
            // What SCSI and NVMe drivers give one command is 30 s as well.
            tolerance: Tolerance {
                slow_after: Duration::from_secs(2),
                stale_after: Some(Duration::from_secs(30)),
                hold_max: Duration::from_secs(60),
            },
            // A failover takes less.
            no_quorum_after: Duration::from_secs(10),
        },
    };
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            auto_failover: true,
            auto_spare: true,
            auto_make_spare: true,
            spread_after: Some(Duration::from_secs(30)),
            rebalance_above: Some(20),
            ..Self::MANUAL
        }
    }
}
