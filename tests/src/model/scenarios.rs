//! What is searched: scenarios in which every rule holds, and for each rule one in which it is missed.

use super::checker::{Outcome, search};
use super::exporters::{self, Exporters};
use super::replication::{self, Replication};
use super::roles::{self, Roles};
use super::rules::{Rule, Rules};

/// A model with its bounds.
#[derive(Clone, Copy, Debug)]
pub enum Scene {
    /// One slice with data.
    Replication(replication::Bounds),
    /// Two slices with roles, epochs, leases and claims.
    Roles(roles::Bounds),
    /// Claims, sessions and repeated requests.
    Exporters(exporters::Bounds),
}

impl Scene {
    /// Searches it all, up to `limit` states.
    pub fn search(&self, rules: Rules, limit: usize) -> Outcome {
        match *self {
            Self::Replication(bounds) => search(&Replication::new(bounds, rules), limit),
            Self::Roles(bounds) => search(&Roles::new(bounds, rules), limit),
            Self::Exporters(bounds) => search(&Exporters::new(bounds, rules), limit),
        }
    }
}

/// Something in which all rules hold, and so nothing may break.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Only with `--long`: it takes minutes.
    pub long: bool,
    /// What is searched.
    pub scene: Scene,
}

const NONE: replication::Bounds = replication::Bounds::NONE;

const fn held(name: &'static str, bounds: replication::Bounds) -> Scenario {
    Scenario { name, long: false, scene: Scene::Replication(bounds) }
}

const fn long(name: &'static str, bounds: replication::Bounds) -> Scenario {
    Scenario { name, long: true, scene: Scene::Replication(bounds) }
}

const fn roles(name: &'static str, long: bool, bounds: roles::Bounds) -> Scenario {
    Scenario { name, long, scene: Scene::Roles(bounds) }
}

const fn claims(name: &'static str, bounds: exporters::Bounds) -> Scenario {
    Scenario { name, long: false, scene: Scene::Exporters(bounds) }
}

/// Crashes, a partition and moves among two nodes with two slices.
const fn pair_of_roles(crashes: u8, partitions: u8, moves: u8, requests: u8) -> roles::Bounds {
    roles::Bounds { nodes: 2, crashes, partitions, moves, requests }
}

const CLAIM_MOVE: exporters::Bounds =
    exporters::Bounds { writes: 3, reconnects: 2, claim_moves: true, losses: 0, replay: false };
const LOSS: exporters::Bounds =
    exporters::Bounds { writes: 3, reconnects: 0, claim_moves: false, losses: 1, replay: false };
const REPLAY: exporters::Bounds = exporters::Bounds { reconnects: 1, replay: true, ..LOSS };

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    held("pair", replication::Bounds { writes: 2, crashes: 1, partitions: 1, reads: 1, ..NONE }),
    held("pair-crashes", replication::Bounds { writes: 2, crashes: 2, reads: 1, ..NONE }),
    held("pair-clearing", replication::Bounds { writes: 2, crashes: 2, clears: 1, ..NONE }),
    held("pair-flush", replication::Bounds { writes: 2, crashes: 2, flushes: 1, kills: false, ..NONE }),
    held("pair-newcomer", replication::Bounds { writes: 2, crashes: 2, newcomer: true, ..NONE }),
    held("pair-regions", replication::Bounds { regions: 2, writes: 2, crashes: 1, ..NONE }),
    held(
        "pair-leases",
        replication::Bounds { writes: 1, moves: 2, partitions: 1, leases: true, slow_reads: 1, ..NONE },
    ),
    held("pair-late-manager", replication::Bounds { writes: 1, crashes: 2, late_manager: true, ..NONE }),
    held("three-crashes", replication::Bounds { nodes: 3, writes: 1, crashes: 2, power_cuts: false, ..NONE }),
    held(
        "three-partition",
        replication::Bounds { nodes: 3, writes: 1, crashes: 1, partitions: 1, power_cuts: false, ..NONE },
    ),
    roles("roles-partition", false, pair_of_roles(1, 1, 1, 0)),
    roles("roles-claims", false, pair_of_roles(0, 0, 2, 2)),
    claims("claim-move", CLAIM_MOVE),
    claims("loss", LOSS),
    claims("replay", REPLAY),
    long("pair-all", replication::Bounds { writes: 2, crashes: 2, partitions: 1, moves: 1, ..NONE }),
    long(
        "pair-moves",
        replication::Bounds { writes: 2, crashes: 1, moves: 1, flushes: 1, clears: 1, reads: 1, ..NONE },
    ),
    long(
        "pair-newcomer-partition",
        replication::Bounds { writes: 2, crashes: 2, partitions: 1, newcomer: true, ..NONE },
    ),
    long("three-power", replication::Bounds { nodes: 3, writes: 1, crashes: 2, ..NONE }),
    long("three-newcomer", replication::Bounds { nodes: 3, writes: 2, crashes: 2, newcomer: true, ..NONE }),
    long(
        "three-all",
        replication::Bounds { nodes: 3, writes: 1, crashes: 2, partitions: 1, power_cuts: false, ..NONE },
    ),
    roles("roles-requests", true, pair_of_roles(1, 0, 1, 1)),
    roles("roles-three", true, roles::Bounds { nodes: 3, ..pair_of_roles(0, 0, 1, 0) }),
];

/// A rule, where it is missed, and, if it is one that an earlier draft lacked, what happened then.
pub struct KnockOut {
    /// What is switched off.
    pub rule: Rule,
    /// Where.
    pub scene: Scene,
    /// Whether it is missed there: a second fence is not.
    pub missed: bool,
    /// The trace that docs/protocol.md tells.
    pub trace: &'static str,
}

const fn missed(rule: Rule, bounds: replication::Bounds, trace: &'static str) -> KnockOut {
    KnockOut { rule, scene: Scene::Replication(bounds), missed: true, trace }
}

const fn missed_by_roles(rule: Rule, bounds: roles::Bounds) -> KnockOut {
    KnockOut { rule, scene: Scene::Roles(bounds), missed: true, trace: "" }
}

const fn missed_by_exporters(rule: Rule, bounds: exporters::Bounds, trace: &'static str) -> KnockOut {
    KnockOut { rule, scene: Scene::Exporters(bounds), missed: true, trace }
}

const fn spare(rule: Rule, bounds: replication::Bounds) -> KnockOut {
    KnockOut { rule, scene: Scene::Replication(bounds), missed: false, trace: "" }
}

const PAIR: replication::Bounds =
    replication::Bounds { writes: 2, crashes: 1, partitions: 1, reads: 1, ..NONE };
const CRASHES: replication::Bounds = replication::Bounds { writes: 2, crashes: 2, ..NONE };
const THREE: replication::Bounds =
    replication::Bounds { nodes: 3, writes: 1, crashes: 2, power_cuts: false, ..NONE };
const THREE_PARTITION: replication::Bounds = replication::Bounds { crashes: 1, partitions: 1, ..THREE };
const MOVED: replication::Bounds = replication::Bounds { writes: 1, crashes: 1, moves: 1, ..NONE };
/// A partition besides, so that an old primary may be left behind alive: one that is heard of stays a member.
const MOVED_APART: replication::Bounds = replication::Bounds { partitions: 1, ..MOVED };
const CLEARED: replication::Bounds = replication::Bounds { writes: 2, crashes: 2, clears: 1, ..NONE };
const NEW: replication::Bounds = replication::Bounds { writes: 2, crashes: 2, newcomer: true, ..NONE };

/// Every rule is here, some twice.
pub const KNOCK_OUTS: &[KnockOut] = &[
    missed(Rule::AckAll, PAIR, ""),
    spare(Rule::EpochFence, PAIR),
    missed_by_roles(Rule::EpochFence, pair_of_roles(0, 0, 2, 0)),
    missed(Rule::SessionFence, PAIR, ""),
    missed_by_roles(Rule::LeaseVersion, pair_of_roles(0, 1, 2, 0)),
    missed_by_roles(Rule::LeaseEpoch, pair_of_roles(0, 1, 3, 0)),
    missed(
        Rule::PrimaryIncarnation,
        CRASHES,
        "the primary loses power, is back before anyone notices, and serves old data",
    ),
    spare(Rule::MemberIncarnation, replication::Bounds { reads: 1, ..NEW }),
    missed(Rule::PromoteMember, MOVED, ""),
    missed(Rule::Readmit, CRASHES, "all members restart: nobody may be promoted"),
    missed(
        Rule::Joining,
        CRASHES,
        "a copy is asked for, its session breaks, the primary goes on alone, the request commits",
    ),
    // Whatever makes the epoch another makes the copy another too, or its bits say so.
    spare(Rule::AskVersion, replication::Bounds { partitions: 1, leases: true, power_cuts: false, ..MOVED }),
    missed(Rule::AskIncarnation, NEW, ""),
    missed(Rule::CopyFlush, NEW, "the copied data sat in the new member's volatile cache"),
    missed(Rule::InheritMask, THREE, "three copies: the promoted one knows nothing of another's gaps"),
    missed(Rule::IntentPrimary, CRASHES, ""),
    missed(Rule::IntentSecondary, THREE, ""),
    missed(
        Rule::ClearAllMembers,
        CLEARED,
        "one writes alone, a FLUSH clears its bits, the other becomes a member",
    ),
    missed(Rule::ClearFlush, CLEARED, ""),
    missed(Rule::ClearBusy, CLEARED, "a write is in flight when the FLUSH starts that clears its region"),
    missed(
        Rule::ClearLock,
        replication::Bounds { crashes: 1, clears: 1, dirty: true, kills: false, power_cuts: true, ..THREE },
        "",
    ),
    missed(
        Rule::Drain,
        replication::Bounds { writes: 2, moves: 2, ..NONE },
        "a deposed primary's own queued write lands on a newer one that it stored as secondary",
    ),
    missed(Rule::Reconcile, MOVED, ""),
    missed(Rule::ReconcileSyncing, replication::Bounds { partitions: 1, ..CRASHES }, ""),
    spare(Rule::ReconcileReopened, PAIR),
    spare(Rule::ReconcileReopened, THREE_PARTITION),
    missed(Rule::ReconcileContinuous, replication::Bounds { writes: 1, moves: 2, clears: 1, ..NONE }, ""),
    missed(
        Rule::ReconcileReads,
        replication::Bounds { reads: 1, ..MOVED },
        "the same across a promotion with copies that are not reconciled",
    ),
    missed(Rule::CopyLock, CRASHES, ""),
    missed(
        Rule::ReadWaits,
        replication::Bounds { reads: 1, ..CRASHES },
        "a write is read before everybody has it",
    ),
    missed(Rule::ReadLease, MOVED_APART, ""),
    missed(Rule::ReadRecheck, replication::Bounds { slow_reads: 1, ..MOVED_APART }, ""),
    missed(Rule::LeaseAfterStart, MOVED_APART, "a node grants a lease, restarts, is promoted and serves"),
    missed(Rule::LeaseTakeover, MOVED_APART, ""),
    missed_by_exporters(Rule::ClaimFence, CLAIM_MOVE, ""),
    missed_by_roles(Rule::ClaimFence, pair_of_roles(0, 0, 1, 1)),
    missed_by_exporters(
        Rule::ClaimAdopted,
        CLAIM_MOVE,
        "the claim moved, the new exporter starts, the old one's queued write commits",
    ),
    missed_by_exporters(Rule::ClaimDrain, CLAIM_MOVE, ""),
    missed_by_roles(Rule::ClaimDrain, pair_of_roles(0, 0, 1, 1)),
    missed_by_exporters(
        Rule::ExporterSession,
        CLAIM_MOVE,
        "a write is repeated over a new session, then the old session's copy of it lands",
    ),
    missed_by_exporters(Rule::ExporterDrain, CLAIM_MOVE, ""),
    missed_by_exporters(
        Rule::LossGeneration,
        LOSS,
        "acknowledged, all copies lose power, the exporter survives and its FLUSH succeeds",
    ),
    missed_by_exporters(
        Rule::ReplayNewest,
        REPLAY,
        "a replayed write lands on a newer one that was acknowledged",
    ),
];
