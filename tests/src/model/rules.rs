//! The protocol's rules, one switch each. A rule that can be switched off without a counterexample
//! is either superfluous or not explored.

/// A rule that a model can do without, to see what breaks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Rule {
    AckAll,
    EpochFence,
    SessionFence,
    LeaseVersion,
    LeaseEpoch,
    PrimaryIncarnation,
    MemberIncarnation,
    PromoteMember,
    Readmit,
    Joining,
    AskVersion,
    AskIncarnation,
    CopyFlush,
    InheritMask,
    IntentPrimary,
    IntentSecondary,
    ClearAllMembers,
    ClearFlush,
    ClearBusy,
    ClearLock,
    Drain,
    Reconcile,
    ReconcileSyncing,
    ReconcileReopened,
    ReconcileContinuous,
    ReconcileReads,
    CopyLock,
    ReadWaits,
    ReadLease,
    ReadRecheck,
    LeaseAfterStart,
    LeaseTakeover,
    ClaimFence,
    ClaimAdopted,
    ClaimDrain,
    ExporterSession,
    ExporterDrain,
    LossGeneration,
    ReplayNewest,
}

use Rule::*;

/// Every rule: its name on the command line, the number in the protocol, and what it says.
pub const RULES: [(Rule, &str, u8, &str); 39] = [
    (AckAll, "ack-all", 1, "a write is acknowledged when every member has it, present or not"),
    (EpochFence, "epoch-fence", 2, "messages of an older slice epoch are refused"),
    (SessionFence, "session-fence", 2, "messages of an older session are refused"),
    (LeaseVersion, "lease-version", 2, "a lease counts only once its grantor's map version is applied"),
    (LeaseEpoch, "lease-epoch", 2, "a lease counts only if its grantor had adopted the slice's epoch"),
    (PrimaryIncarnation, "primary-incarnation", 3, "a primary of another incarnation serves nothing"),
    (MemberIncarnation, "member-incarnation", 3, "a member that was attached anew is no member"),
    (PromoteMember, "promote-member", 4, "only a member is promoted"),
    (Readmit, "readmit", 5, "when all members are another incarnation, one goes on alone"),
    (Joining, "joining", 6, "from before it is asked for as a member, a copy is treated as one"),
    (AskVersion, "ask-version", 6, "a request to make a copy a member is void once the epoch has changed"),
    (AskIncarnation, "ask-incarnation", 6, "such a request names the incarnation that has everything"),
    (CopyFlush, "copy-flush", 7, "what was copied is flushed before the copy becomes a member"),
    (InheritMask, "inherit-mask", 7, "a copy takes over its primary's dirty mask"),
    (IntentPrimary, "intent-primary", 8, "the primary's dirty bit is durable before its data"),
    (IntentSecondary, "intent-secondary", 8, "a secondary's dirty bit is durable before its data"),
    (ClearAllMembers, "clear-all-members", 9, "(a) bits are cleared only while every copy is a member"),
    (ClearFlush, "clear-flush", 9, "(b) all copies are flushed before bits are cleared"),
    (ClearBusy, "clear-busy", 9, "(c) a region written during that flush keeps its bit"),
    (ClearLock, "clear-lock", 9, "the region is locked until everybody has acknowledged the CLEAR"),
    (Drain, "drain", 10, "disk writes of an earlier role are over before a session or serving begins"),
    (Reconcile, "reconcile", 11, "members too are made equal where a mask is set, on every new session"),
    (
        ReconcileSyncing,
        "reconcile-syncing",
        11,
        "a copy that is filled, also on a session reopened in the same epoch",
    ),
    (ReconcileReopened, "reconcile-reopened", 11, "a member, also on a session reopened in the same epoch"),
    (
        ReconcileContinuous,
        "reconcile-continuous",
        11,
        "a member, also if its primary never saw itself without the role",
    ),
    (ReconcileReads, "reconcile-reads", 11, "what may differ from a member is not read"),
    (CopyLock, "copy-lock", 11, "a region is locked while it is copied"),
    (ReadWaits, "read-waits", 12, "a read waits for a write in flight on its range"),
    (ReadLease, "read-lease", 12, "a primary reads only under every member's lease"),
    (ReadRecheck, "read-recheck", 12, "a read that takes time is judged again at its end"),
    (LeaseAfterStart, "lease-after-start", 13, "after a start a node assumes that it had granted leases"),
    (LeaseTakeover, "lease-takeover", 13, "a new primary waits for the leases that it had granted"),
    (ClaimFence, "claim-fence", 14, "requests under an older claim are refused"),
    (ClaimAdopted, "claim-adopted", 15, "an exporter starts once every primary has adopted its claim"),
    (ClaimDrain, "claim-drain", 15, "a claim is adopted when older writes are over"),
    (ExporterSession, "exporter-session", 14, "requests of an older exporter session are refused"),
    (ExporterDrain, "exporter-drain", 14, "a new exporter session ends the old one's queue first"),
    (LossGeneration, "loss-generation", 16, "a FLUSH that covers a write of an older loss generation fails"),
    (ReplayNewest, "replay-newest", 16, "only the newest write of a range is replayed, before anything new"),
];

/// The rules that hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules(u64);

impl Rules {
    /// All of them.
    pub const ALL: Self = Self(u64::MAX);

    /// All but that one.
    pub fn without(rule: Rule) -> Self {
        Self(!(1 << rule as u8))
    }

    /// Whether it holds.
    pub fn has(self, rule: Rule) -> bool {
        self.0 >> rule as u8 & 1 == 1
    }
}

/// The rule with that name.
pub fn named(name: &str) -> Option<Rule> {
    RULES.iter().find(|rule| rule.1 == name).map(|rule| rule.0)
}

/// The name of a rule.
pub fn name(rule: Rule) -> &'static str {
    RULES.iter().find(|other| other.0 == rule).map_or("", |rule| rule.1)
}
