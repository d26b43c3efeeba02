//! Mistakes put in on purpose, to see that the simulator notices them.
//!
//! They exist with the feature `planted-bugs` only, which no build of the product has; without it
//! [`is`] is `false` before the program runs, and the code behind it is gone. Which one is active
//! belongs to the thread, as the simulator runs one cluster a thread.
//!
//! Where two fences stand behind each other, both are down for the mistake: it says so.

#[cfg(feature = "planted-bugs")]
use std::cell::Cell;

/// Declares the mistakes once: what is said of each is its documentation and its description.
macro_rules! bugs {
    ($($(#[doc = $text:literal])+ $bug:ident $name:literal,)+) => {
        /// A mistake. The numbers are those of the rules in the protocol's description.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Bug {
            $($(#[doc = $text])+ $bug,)+
        }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$bug,)+];

            /// Its name on the command line and in the list of seeds.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$bug => $name,)+
                }
            }

            /// What it is, for people.
            pub fn description(self) -> &'static str {
                match self {
                    $(Self::$bug => concat!($($text,)+).trim_ascii(),)+
                }
            }
        }
    };
}

bugs! {
    /// 1: a primary acknowledges a write before the other copies have it.
    AckedEarly "acked-early",
    /// 1: a primary goes on without a member before the map says so.
    WentAlone "went-alone",
    /// 1: what a syncing copy missed is not noted.
    MissedUnnoted "missed-unnoted",
    /// 1, 16: a flush is answered once this node has flushed, the others not.
    FlushLocal "flush-local",
    /// 2: a copy takes writes of an older epoch, and of a node that is not its primary any more.
    OldEpoch "old-epoch",
    /// 2: an adopted epoch is acted on and reported before it is on the disks.
    EpochVolatile "epoch-volatile",
    /// 2: a lease is used although its grantor knows a newer map.
    LeaseOfNewerMap "lease-of-newer-map",
    /// 3: a primary that rebooted before anybody noticed stays primary.
    RebootBelieved "reboot-believed",
    /// 3: a primary does not notice that a copy's machine rebooted.
    SecondaryRebootBelieved "secondary-reboot-believed",
    /// 4: a stale copy is promoted when its primary fails.
    StalePromoted "stale-promoted",
    /// 5: a readmission after a loss of power raises no loss generation.
    LossUntold "loss-untold",
    /// 5: one member is readmitted while another is away, which may have everything.
    ReadmittedEarly "readmitted-early",
    /// 6: a replica is not counted on between the request to make it a member and the next map.
    JoiningUncounted "joining-uncounted",
    /// 7: a replica joins without a flush.
    JoinedUnflushed "joined-unflushed",
    /// 7: a replica joins without its primary's dirty bits, which speak of what third copies missed; nor does
    /// what it is filled with set bits of its own, which would say the same.
    MaskNotInherited "mask-not-inherited",
    /// 8: a write goes to the disk without its dirty bit.
    DirtySkipped "dirty-skipped",
    /// 8: data goes to the disk while the dirty bit is still on its way.
    DataBeforeIntent "data-before-intent",
    /// 8: log writes stay in the disk's volatile cache.
    IntentVolatile "intent-volatile",
    /// 8: the log's tail moves on before the pages that replace it are flushed.
    TailEarly "tail-early",
    /// 8: a region of unknown content is not zeroed before its first data.
    Unzeroed "unzeroed",
    /// 9a: dirty bits are cleared while a replica is stale.
    ClearedAlone "cleared-alone",
    /// 9b: dirty bits are cleared without a flush.
    ClearedUnflushed "cleared-unflushed",
    /// 9c: dirty bits are cleared of what was written since the flush.
    ClearedEarly "cleared-early",
    /// 10: what a lost session had begun on the disk is not waited for.
    Undrained "undrained",
    /// 10: a frame of a lane that is gone is taken for one of the present lane.
    OldLane "old-lane",
    /// 11: a region is read before it is reconciled with all members.
    UnreconciledRead "unreconciled-read",
    /// 11: a copy does not lock its region: it overtakes newer writes.
    CopyUnlocked "copy-unlocked",
    /// 11: a region that is not valid here stays as it is on the other copy.
    InvalidNotCopied "invalid-not-copied",
    /// 12: a write is read before every copy has it.
    ReadEarly "read-early",
    /// 12: reads need no lease.
    LeaseIgnored "lease-ignored",
    /// 12: a lease counts from its answer's arrival by the holder's clock.
    LeaseFromAnswer "lease-from-answer",
    /// 12: a node that takes over does not wait for the leases that it granted.
    LeaseNotAwaited "lease-not-awaited",
    /// 13: after a start a node has granted nothing.
    LeaseForgotten "lease-forgotten",
    /// 14: a primary takes requests of an older claim.
    OldClaim "old-claim",
    /// 14: a primary takes requests of an older exporter session; the check of the lane, which stands
    /// before that, lets them pass as well.
    OldExporter "old-exporter",
    /// 15: what was queued under a claim is sent under the next.
    QueuedSent "queued-sent",
    /// 15: a claim is adopted while writes of the one before are under way.
    ClaimUndrained "claim-undrained",
    /// 15: an exporter may start before every primary knows its claim.
    ExportedEarly "exported-early",
    /// 16: an exporter does not fail a flush although the map tells of a loss.
    LossUnreported "loss-unreported",
    /// 1: a flush does not store what a secondary acknowledged from memory.
    StagedUnflushed "staged-unflushed",
    /// 3: a primary does not notice that a secondary lost what it had acknowledged from memory.
    StagedRestartBelieved "staged-restart-believed",
    /// 10: what a secondary acknowledged from memory is dropped at the end of its session.
    StagedDropped "staged-dropped",
    /// The manager sends a map out before it is stored.
    SentBeforeStored "sent-before-stored",
}

impl Bug {
    /// The one with that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|bug| bug.name() == name)
    }
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static ACTIVE: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Makes a mistake active on this thread, in place of any other.
#[cfg(feature = "planted-bugs")]
pub fn set(bug: Option<Bug>) {
    ACTIVE.set(bug);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn is(bug: Bug) -> bool {
    ACTIVE.get() == Some(bug)
}

/// Whether this mistake is to be made: never, in this build.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is(_: Bug) -> bool {
    false
}
