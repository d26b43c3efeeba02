//! Control traffic: what nodes' agents, the manager and `mirrorctl` say to each other.
//!
//! JSON in length-prefixed frames ([`crate::wire::transport`]), after a handshake for
//! [`Purpose::Control`](crate::wire::handshake::Purpose::Control). A node's agent and `mirrorctl`
//! connect to the manager; the first message names which of the two it is by its type.

mod operator;

pub use operator::*;

use crate::config::NodePolicy;
use crate::format::alloc::Segment;
use crate::ids::{
    AttachId, ClaimGeneration, ClusterId, DeviceId, DiskId, ExporterSession, MapVersion, NodeId, ProcessId,
    SliceEpoch,
};
use crate::map::{DistributionMap, SegmentSlots};
use crate::region::digest::{Digest, placed};
use serde::{Deserialize, Serialize};

/// What a node's agent says to the manager.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum NodeMessage {
    /// The first message: who is there, and with which disks.
    Register(Registration),
    /// This map version is durably adopted, and older claims' writes are finished or aborted.
    Adopted {
        /// The version.
        version: MapVersion,
    },
    /// As primary: the peer's copies miss writes, or cannot be reached; record them stale.
    AskStale {
        /// The node whose copies are meant.
        peer: NodeId,
        /// The map version on which the asker acts.
        version: MapVersion,
        /// What was observed, for people.
        cause: String,
    },
    /// As primary: the peer's node lives, and owes the answer to a write for so long that its disks count as hanging:
    /// record its copies stale, and let this node go first where it has a copy in sync of what the peer is primary of.
    AskSlow {
        /// The node whose copies are meant.
        peer: NodeId,
        /// The map version on which the asker acts.
        version: MapVersion,
        /// What was observed, for people.
        cause: String,
    },
    /// As primary: the peer is reachable and has adopted this version; its stale copies are to get
    /// every new write again, and to be made equal. Said only while a session with it is open.
    AskSyncing {
        /// The node whose copies are meant.
        peer: NodeId,
        /// The map version on which the asker acts.
        version: MapVersion,
    },
    /// As primary: every syncing copy of this device at the peer has all data, flushed, and the
    /// primary's dirty mask; the asker already waits for it as for a member (docs/protocol.md rules 6
    /// and 7).
    AskInSync {
        /// The node whose copies are meant.
        peer: NodeId,
        /// The device.
        device: DeviceId,
        /// The map version on which the asker acts: copies that began after it are not meant.
        version: MapVersion,
    },
    /// A disk of this node does not take writes any more.
    DiskFailed {
        /// The disk.
        disk: DiskId,
        /// What the kernel said.
        reason: String,
    },
    /// A disk that has left the map is not held by this node's process any more.
    DiskReleased {
        /// The disk.
        disk: DiskId,
    },
    /// Sent every [`REPORT_MS`]: also the heartbeat.
    Report(NodeReport),
    /// The answer to [`ManagerMessage::Format`].
    Formatted {
        /// The first error; nothing was formatted if the check of any disk failed.
        error: Option<String>,
        /// The disks' attachments, in the order of the request.
        attach: Vec<AttachId>,
    },
    /// The answer to [`ManagerMessage::Look`].
    Looked {
        /// What is there; the reason in words if it cannot be used.
        found: Result<DiskInventory, String>,
    },
    /// The answer to [`ManagerMessage::TellMap`]: the newest map that this node was ever sent and kept.
    KeptMap {
        /// `None` if it has none.
        map: Option<Box<DistributionMap>>,
    },
    /// Answers to [`ManagerMessage::Survey`], as they are found.
    Surveyed {
        /// The number of the order.
        order: u64,
        /// Each for slices that were asked for and not yet answered.
        answers: Vec<SurveyAnswer>,
    },
}

/// Milliseconds between two reports of a node.
pub const REPORT_MS: u64 = 500;
/// A node that has said nothing for so many milliseconds is taken for unreachable.
pub const SILENCE_MS: u64 = 2_000;

/// How a node introduces itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Registration {
    /// Its name in the cluster file.
    pub node: String,
    /// Its process.
    pub process: ProcessId,
    /// The version of the newest map that it adopted.
    pub adopted: MapVersion,
    /// Where it listens for other nodes.
    pub address: String,
    /// Its disks, in the order of its cluster file.
    pub disks: Vec<DiskInventory>,
    /// What processes of this node adopted, this one and some before: with it everything was stored that they had
    /// acknowledged from memory as secondaries.
    #[serde(default)]
    pub lives: Vec<Life>,
}

/// The newest map that a process adopted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Life {
    /// The process.
    pub process: ProcessId,
    /// The map's version.
    pub adopted: MapVersion,
}

impl Life {
    /// So many processes of a node are remembered. Of one that is not, the worst is assumed.
    pub const KEPT: usize = 16;

    /// Notes that a process adopted a map.
    pub fn note(lives: &mut Vec<Self>, process: ProcessId, adopted: MapVersion) {
        match lives.iter_mut().find(|life| life.process == process) {
            Some(life) => life.adopted = life.adopted.max(adopted),
            None => lives.push(Self { process, adopted }),
        }
        lives.drain(..lives.len().saturating_sub(Self::KEPT));
    }
}

/// A disk as the node sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DiskInventory {
    /// Its name in the cluster file.
    pub name: String,
    /// Its path on the node.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The smallest direct write, in bytes.
    pub block_bytes: u32,
    /// Its attachment.
    pub attach: AttachId,
    /// What is on it.
    pub content: DiskContent,
}

/// What a node found on a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum DiskContent {
    /// Nothing: it may be formatted.
    Blank,
    /// Something that is not ours, named for people.
    Foreign {
        /// Such as `ext4 file system labelled "home"`.
        what: String,
    },
    /// A superblock of ours.
    Ours {
        /// The cluster it belongs to.
        cluster: ClusterId,
        /// Its id there.
        disk: DiskId,
    },
    /// It cannot be used, and why.
    Unusable {
        /// For people.
        why: String,
    },
}

/// What the manager says to a node's agent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ManagerMessage {
    /// The answer to a registration.
    Registered {
        /// Larger than in any registration before; fences requests of earlier processes.
        exporter_session: ExporterSession,
        /// What the node is to carry out of the manager's policy.
        #[serde(default)]
        policy: NodePolicy,
    },
    /// Check all named disks, then format them; answered with [`NodeMessage::Formatted`].
    Format(FormatOrder),
    /// Open a disk that this node does not have yet, say what is there, and let go of it; answered with
    /// [`NodeMessage::Looked`].
    Look {
        /// The name that it is to have.
        name: String,
        /// Its path.
        path: String,
    },
    /// This node has no place in the cluster, and waits for one.
    Waiting {
        /// What to do about it, for people.
        why: String,
    },
    /// The newest map.
    Map {
        /// All of it.
        map: Box<DistributionMap>,
    },
    /// Every primary of the device has adopted this claim: its exporter may start.
    Export {
        /// The device.
        device: DeviceId,
        /// The generation of the claim that this holds for.
        generation: ClaimGeneration,
    },
    /// The manager has no map: send the newest that was kept, answered with [`NodeMessage::KeptMap`].
    TellMap,
    /// Answer for what this node serves now of these slices; answered with [`NodeMessage::Surveyed`].
    Survey {
        /// Names the order; drawn at random.
        order: u64,
        /// What is wanted.
        kind: BroadcastKind,
        /// Of which slices; none to withdraw the order.
        runs: Vec<SurveyRun>,
    },
    /// The registration is refused; the connection closes.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// This manager decides nothing at this moment; the connection closes.
    NotLeader {
        /// `host:port` of the one that does, if it is known.
        leader: Option<String>,
        /// Why not, for people.
        why: String,
    },
}

/// The disks of one node to be formatted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FormatOrder {
    /// Their cluster.
    pub cluster: ClusterId,
    /// The node's id in it.
    pub node: NodeId,
    /// Bytes in a slice.
    pub slice_bytes: u32,
    /// The disks.
    pub disks: Vec<FormatDisk>,
    /// Format over foreign data.
    pub force: bool,
    /// Only check whether it would work.
    pub check_only: bool,
}

/// One disk to be formatted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FormatDisk {
    /// Its name in the cluster file.
    pub name: String,
    /// Its path, of a disk that the node does not have yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its id in the map.
    pub disk: DiskId,
    /// Its slots, by segment.
    pub slots: SegmentSlots,
}

/// A node's state, for `mirrorctl status`.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeReport {
    /// The map version it has adopted.
    pub adopted: MapVersion,
    /// Its sessions with other nodes.
    pub sessions: Vec<SessionReport>,
    /// The devices it exports.
    pub exports: Vec<ExportReport>,
    /// What its requests wait for, one line each; empty when nothing waits.
    pub waiting: Vec<String>,
    /// The copies that it is making equal to its own, as primary.
    #[serde(default)]
    pub resyncs: Vec<ResyncReport>,
    /// What its disks have to do.
    #[serde(default)]
    pub loads: Vec<DiskLoad>,
}

/// What a disk has to do for its node, an average over about the last ten seconds. Metadata count as well.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskLoad {
    /// The disk.
    pub disk: DiskId,
    /// Reads in a second.
    pub reads: u64,
    /// Writes in a second.
    pub writes: u64,
    /// Bytes read in a second.
    pub read_bytes: u64,
    /// Bytes written in a second.
    pub written_bytes: u64,
    /// The part of the time in which it had something to do, 0 to 100.
    pub busy_percent: u8,
}

/// A primary making the copies of one device at one peer equal to its own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResyncReport {
    /// The device.
    pub device: DeviceId,
    /// The node whose copies are made equal.
    pub peer: NodeId,
    /// Bytes that have still to be compared.
    pub behind_bytes: u64,
    /// Bytes that were to be compared when it began.
    pub total_bytes: u64,
    /// Bytes that were sent because they differed.
    pub moved_bytes: u64,
    /// Bytes compared in a second, of late.
    pub bytes_per_second: u64,
    /// Whether copies that are syncing become in sync; else members are reconciled after a
    /// session ended.
    pub joining: bool,
}

impl ResyncReport {
    /// Seconds until everything is compared, if it goes on as it went of late; `None` if it does not
    /// move.
    pub fn seconds_left(&self) -> Option<u64> {
        (self.bytes_per_second > 0).then(|| self.behind_bytes.div_ceil(self.bytes_per_second))
    }
}

/// A session with another node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SessionReport {
    /// The other node.
    pub peer: NodeId,
    /// Whether messages flow.
    pub open: bool,
    /// The last reason why it was not open.
    pub last_error: Option<String>,
    /// For how long the peer owes the answer to a write or flush, if that is long, in milliseconds.
    #[serde(default)]
    pub slow_ms: Option<u64>,
    /// It was lost again and again: its copies are not taken back for so long, in milliseconds, and so often of late.
    #[serde(default)]
    pub held_ms: Option<(u64, u32)>,
}

/// A device being exported.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ExportReport {
    /// The device.
    pub device: DeviceId,
    /// `/dev/ublkbN`, for the ublk frontend.
    pub path: Option<String>,
    /// `nbd+unix://…` or `nbd://…`, for the NBD frontend.
    pub uri: Option<String>,
    /// Why it is not exported although it should be.
    pub error: Option<String>,
    /// Who uses it, for people, as far as its node can tell.
    #[serde(default)]
    pub in_use: Option<String>,
    /// Requests completed since the daemon's start.
    pub requests: u64,
    /// Requests that have not been completed.
    pub pending: u64,
}

/// What all primaries are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BroadcastKind {
    /// A checksum of the content.
    Checksum,
    /// How many bytes were ever written and not discarded, in whole regions.
    Usage,
    /// To have everything on stable storage of every copy that counts.
    Flush,
}

/// Slices of a device that have one primary, and the epoch that made it so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SurveyRun {
    /// The device.
    pub device: DeviceId,
    /// The first slice.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Their epoch.
    pub epoch: SliceEpoch,
}

impl SurveyRun {
    /// One past the last slice.
    pub fn end(&self) -> u32 {
        self.first.saturating_add(self.count)
    }
}

/// What a node says of slices that it was asked about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SurveyAnswer {
    /// Which slices, under which epoch.
    pub run: SurveyRun,
    /// What it found.
    pub result: SurveyResult,
}

/// What a node found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum SurveyResult {
    /// It is done.
    Answered {
        /// The segment whose slots they take up there.
        segment: Segment,
        /// Bytes that hold something.
        bytes: u64,
        /// The checksum of their content, for a checksum.
        sum: ContentSum,
    },
    /// It does not serve them now under that epoch: whoever does is to be asked.
    Refused,
    /// It serves them, and could not do it.
    Failed {
        /// Why.
        why: String,
    },
}

/// A checksum of blocks and their places: that of two sets of blocks is the sum of theirs, so it does
/// not matter who computed which part. What reads as zeros adds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ContentSum(pub u128);

impl ContentSum {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// With one more block, at that byte offset of the device.
    pub fn with_block(self, digest: &Digest, offset: u64) -> Self {
        self.plus(Self(placed(digest, offset)))
    }
}

impl std::fmt::Display for ContentSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for ContentSum {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentSum {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u128::from_str_radix(&text, 16).map(Self).map_err(serde::de::Error::custom)
    }
}

/// How far a broadcast is, and what it has found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BroadcastStatus {
    /// Its number.
    pub id: u64,
    /// Slices that are asked about.
    pub slices: u64,
    /// Those that were answered, or given up.
    pub answered: u64,
    /// Whether nothing is outstanding.
    pub done: bool,
    /// One for each device, node and segment.
    pub rows: Vec<BroadcastRow>,
    /// What nobody answered for.
    pub unserved: Vec<Unserved>,
}

/// What one node found in one segment of its disks of one device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BroadcastRow {
    /// The device's name.
    pub device: String,
    /// The node's name.
    pub node: String,
    /// The segment.
    pub segment: Segment,
    /// How many slices it answered for.
    pub slices: u64,
    /// Bytes that hold something.
    pub bytes: u64,
    /// Of their content.
    pub sum: ContentSum,
}

/// Slices that nobody answered for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Unserved {
    /// The device's name.
    pub device: String,
    /// The first slice.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Their primary, by the map.
    pub node: String,
    /// Why.
    pub why: String,
}
