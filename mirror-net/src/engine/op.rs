//! One operation on this node's copy of one slice, as primary or as secondary.

use super::Nanos;
use super::action::{BufferRange, DiskIndex, FlushKey, OpKey};
use super::exporter::PartKey;
use super::view::{LEGS_MAX, PeerIndex};
use crate::ids::SliceEpoch;
use crate::wire::header::Status;

/// What is done to the range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OpKind {
    Read,
    Write {
        fua: bool,
    },
    Zero {
        fua: bool,
    },
    Discard,
    /// Make a region of another copy like this one (`copy`).
    Copy,
    /// Replace what this disk cannot read by what another copy has (`repair`).
    Repair,
    /// Regions that are equal everywhere are dirty no longer; those in `readable` hold data (`clear`).
    Clear {
        readable: u64,
    },
    /// As secondary: take over the primary's dirty bits.
    Unite {
        dirty: u64,
    },
    /// As secondary: tell the digests of what is stored.
    Compare {
        fine: bool,
    },
}

impl OpKind {
    /// Whether it changes what is stored here.
    pub fn stores(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Discard)
    }

    /// Whether others of its kind may use the range at the same time.
    pub fn shares(self) -> bool {
        matches!(self, Self::Read | Self::Compare { .. })
    }

    /// Whether it is the engine's own work for a copy, which a new epoch ends.
    pub fn is_upkeep(self) -> bool {
        matches!(self, Self::Copy | Self::Repair | Self::Clear { .. })
    }
}

/// Whom an operation answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// A piece of a request of this node's frontends.
    Part(PartKey),
    /// A message of another node, on that session.
    Peer(Sender),
    /// A broadcast of the manager's (`survey`).
    Survey,
    /// Nobody: the engine's own upkeep.
    Upkeep,
}

/// Where a message came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sender {
    pub peer: PeerIndex,
    pub session: u64,
    pub sequence: u64,
}

/// In which part this node acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Primary,
    Secondary,
}

/// How far the operation is on this node's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Local {
    /// Waits for its range, for leases, or for a wait after a start.
    Idle,
    /// Regions of unknown content are being zeroed before data enters them.
    Zeroing { ios: u32, regions: u64 },
    /// They are zeroed; the disk's cache is being flushed.
    ZeroFlush { regions: u64 },
    /// The masks are on their way to the log.
    Intent,
    /// Data is on its way, in so many I/Os.
    Data { ios: u32 },
    /// The disk has it.
    Done,
    /// The disk refused.
    Failed,
}

impl Local {
    /// No I/O of the operation's is under way on the disk.
    pub fn is_quiet(self) -> bool {
        matches!(self, Self::Idle | Self::Done | Self::Failed)
    }
}

/// One other copy that a write goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leg {
    pub peer: PeerIndex,
    pub state: LegState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LegState {
    Unsent,
    Sent,
    Acknowledged,
    /// Sent, but the map does not count on that copy any more, or counts on it anew: only the end of
    /// the message matters, since it may still be on its way out of the operation's buffer.
    Leaving,
    /// Not counted on, and nothing is under way.
    Gone,
}

/// Other copies, and those that left while a message to them was under way.
const PLACES: usize = 2 * LEGS_MAX;

/// The other copies of a write; no allocation on the way of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Legs {
    legs: [Leg; PLACES],
    count: usize,
}

impl Legs {
    pub const NONE: Self = Self { legs: [Leg { peer: 0, state: LegState::Unsent }; PLACES], count: 0 };

    /// Legs to these peers. Those that are and were members keep what they have, whatever epoch it
    /// came under: nobody else wrote in between, and a message sent twice could overtake a later one.
    pub fn new(peers: &[PeerIndex], members: &[PeerIndex], before: &Self) -> Self {
        let mut legs = Self::NONE;
        for peer in peers {
            let state = match before.iter().find(|leg| leg.peer == *peer).map(|leg| leg.state) {
                Some(state @ (LegState::Acknowledged | LegState::Sent)) if members.contains(peer) => state,
                Some(LegState::Sent | LegState::Leaving) => LegState::Leaving,
                _ => LegState::Unsent,
            };
            legs.push(*peer, state);
        }
        for leg in before.iter().filter(|leg| leg.is_in_flight() && !peers.contains(&leg.peer)) {
            if legs.count < PLACES {
                legs.push(leg.peer, LegState::Leaving);
            }
        }
        legs
    }

    fn push(&mut self, peer: PeerIndex, state: LegState) {
        self.legs[self.count] = Leg { peer, state };
        self.count += 1;
    }

    /// Whether a message may still be on its way.
    pub fn in_flight(&self) -> bool {
        self.iter().any(Leg::is_in_flight)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Leg> {
        self.legs[..self.count].iter()
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn get(&self, index: usize) -> Leg {
        self.legs[..self.count][index]
    }

    pub fn set(&mut self, index: usize, state: LegState) {
        self.legs[..self.count][index].state = state;
    }

    pub fn position(&self, peer: PeerIndex) -> Option<usize> {
        self.iter().position(|leg| leg.peer == peer)
    }

    pub fn all_acknowledged(&self) -> bool {
        self.iter().all(|leg| matches!(leg.state, LegState::Acknowledged | LegState::Gone))
    }

    /// Whether that copy has it.
    pub fn is_acknowledged(&self, peer: PeerIndex) -> bool {
        self.iter().any(|leg| leg.peer == peer && leg.state == LegState::Acknowledged)
    }

    /// Whether that copy has it, or will have it before the operation ends.
    pub fn includes(&self, peer: PeerIndex) -> bool {
        self.iter().any(|leg| leg.peer == peer && !matches!(leg.state, LegState::Gone | LegState::Leaving))
    }
}

impl Leg {
    fn is_in_flight(&self) -> bool {
        matches!(self.state, LegState::Sent | LegState::Leaving)
    }
}

/// An operation.
#[derive(Debug)]
pub(super) struct Op {
    pub origin: Origin,
    pub part: Part,
    pub kind: OpKind,
    /// Index of the device.
    pub device: usize,
    pub slice: u32,
    pub offset: u32,
    pub length: u32,
    /// Under which it runs; follows the map as long as this node stays what it is for the slice.
    pub epoch: SliceEpoch,
    /// When it was asked for.
    pub since: Nanos,
    /// The claim under which it was asked for.
    pub claim: u64,
    pub buffer: Option<BufferRange>,
    /// The buffer came with a frame and is given back when the operation ends.
    pub owns_buffer: bool,
    pub disk: DiskIndex,
    pub slot: u32,
    pub local: Local,
    pub legs: Legs,
    /// Holds its range.
    pub holds: bool,
    /// An I/O of its local leg failed.
    pub failed: bool,
    /// Runs no further; this is its answer once the disk is quiet (docs/protocol.md rule 10).
    pub doomed: Option<Status>,
    /// Messages under way that are not legs.
    pub asked: u32,
    /// As secondary: it was acknowledged from memory, as the how-many-th (`staging`).
    pub staged: Option<u64>,
    /// What it answers to `Unite` and `Compare`.
    pub reply: Vec<u8>,
    /// Members that were asked for what could not be read here, by a read's repairs or by one repair; of a repair the
    /// last is the one that is being asked.
    pub sources: Vec<PeerIndex>,
    /// The read that waits for a repair.
    pub reader: Option<OpKey>,
}

impl Op {
    /// Neither the disk nor a message uses its range or buffer any more.
    pub fn is_quiet(&self) -> bool {
        self.local.is_quiet() && !self.legs.in_flight() && self.asked == 0
    }

    /// Whether anything of it may have reached a disk or another copy.
    pub fn begun(&self) -> bool {
        self.local != Local::Idle || self.legs.len() > 0
    }
}

/// Who waits for a disk's flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FlushWaiter {
    Op(OpKey),
    Flush(FlushKey),
}
