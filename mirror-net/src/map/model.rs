//! The map as data, and the questions it answers.

use crate::format::alloc::Segment;
use crate::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId,
    SliceEpoch, SliceIndex,
};
use crate::map::plan::Plan;
use serde::{Deserialize, Serialize, Serializer};
use std::collections::HashSet;

/// The version of the map's JSON form; a reader refuses any other.
pub const MAP_FORMAT: u32 = 2;

/// Where every slice of every device lives, and who may export each device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistributionMap {
    /// [`MAP_FORMAT`].
    pub format: u32,
    /// The cluster that this map belongs to.
    pub cluster: ClusterId,
    /// Its name, for people.
    pub cluster_name: String,
    /// Counts the changes; 1 when the cluster is created.
    pub version: MapVersion,
    /// Bytes in a slice; a power of two.
    pub slice_bytes: u32,
    /// Every node, in order of id.
    pub nodes: Vec<Node>,
    /// Every disk, in order of id.
    pub disks: Vec<Disk>,
    /// Every device, in order of id.
    pub devices: Vec<Device>,
    /// What an operator wants kept of who mirrors whom; `None` for whatever the rules of the map allow. Copies that are
    /// made again on a spare, or moved off a disk, need not keep it; `rebalance` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// The largest id that a device ever had, if that is larger than those there are: none is given twice, since a node
    /// that was away may still hold what a deleted one had.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub last_device: u32,
    /// The same for disks: a superblock names the id of its disk for as long as nobody formats it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub last_disk: u32,
    /// The same for nodes.
    #[serde(default, skip_serializing_if = "is_none_yet")]
    pub last_node: u16,
    /// What is being moved, in order of id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plans: Vec<Plan>,
}

/// Who mirrors whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// Nodes mirror each other two by two; of an odd number three form a ring.
    Pair,
    /// All nodes form a ring: what a node is primary of is mirrored by the one after it, or the two.
    Chain,
    /// The copies of a slice are on nodes that share neither power nor switch, any of them.
    Sets,
}

impl Topology {
    /// As the command line spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Chain => "chain",
            Self::Sets => "sets",
        }
    }

    /// From how the command line and the cluster file spell it.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Pair, Self::Chain, Self::Sets].into_iter().find(|topology| topology.name() == text)
    }
}

/// A machine running `ublk-server`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its name in the cluster file.
    pub name: String,
    /// `host:port` where it listens for other nodes.
    pub address: String,
    /// The power feed it hangs on, if named: one half of its failure set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<String>,
    /// The switch it hangs on, if named: the other half of its failure set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<String>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_none_yet(number: &u16) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// How many slots of a disk belong to each segment.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentSlots {
    /// The node's own mirrored data.
    pub primary: u32,
    /// Mirrors of other nodes' primary segments.
    pub secondary: u32,
    /// Data that nobody mirrors.
    pub unmirrored: u32,
}

impl SegmentSlots {
    /// The slots of one segment.
    pub fn of(&self, segment: Segment) -> u32 {
        match segment {
            Segment::Primary => self.primary,
            Segment::Secondary => self.secondary,
            Segment::Unmirrored => self.unmirrored,
        }
    }

    /// All slots together.
    pub fn total(&self) -> u64 {
        u64::from(self.primary) + u64::from(self.secondary) + u64::from(self.unmirrored)
    }
}

/// A block device or a file given to a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// The node that has it.
    pub node: NodeId,
    /// Its name in the cluster file; unique within the node.
    pub name: String,
    /// Its slots, by segment.
    pub slots: SegmentSlots,
    /// The smallest write it takes, in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Its primary and secondary segments hold nothing until it is activated, in place of a disk that is
    /// gone. It may have been in use before, and still hold data that nobody mirrors.
    #[serde(default, skip_serializing_if = "is_false")]
    pub spare: bool,
    /// Set when the disk stopped working; nothing is placed on it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
}

/// Why a disk is out of use.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failed {
    /// What the node reported.
    pub reason: String,
}

/// A logical address space that is exported.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its id.
    pub id: DeviceId,
    /// Its name; unique in the cluster.
    pub name: String,
    /// Its length in slices.
    pub slices: u32,
    /// Logical block size in bytes: the largest of the disks it may lie on.
    pub block_bytes: u32,
    /// Copies of every slice that the layout wants: 1 for an unmirrored device.
    pub copies: u8,
    /// When a secondary acknowledges a write.
    #[serde(default, skip_serializing_if = "Commit::is_default")]
    pub commit: Commit,
    /// What becomes of a request that cannot be served.
    #[serde(default, skip_serializing_if = "OnNoQuorum::is_default")]
    pub on_no_quorum: OnNoQuorum,
    /// Who may export it now.
    pub claim: Claim,
    /// Runs of slices with the same replica list, in order, without gap or overlap.
    pub spans: Vec<Span>,
}

/// When a secondary acknowledges a write that need not be on stable storage yet. Both keep every promise.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Commit {
    /// Once its disk has it.
    #[default]
    Immediate,
    /// Once its memory has it; its disk gets it with the next flush, or soon.
    Deferred,
    /// Once its disk has it, and all that is in its memory still: on the way from deferred to immediate. It is compared
    /// as with deferred commit until every copy's node is known to have adopted this.
    Settling,
}

/// What becomes of a request that no copy can serve, or that cannot be stored on all that count.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNoQuorum {
    /// It waits until it can be served.
    #[default]
    Wait,
    /// It fails after a while.
    Error,
}

/// What is chosen for a device when it is made.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DevicePolicy {
    /// When a secondary acknowledges a write.
    pub commit: Commit,
    /// What becomes of a request that cannot be served.
    pub on_no_quorum: OnNoQuorum,
}

impl Commit {
    /// As the cluster file spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Immediate => "immediate",
            Self::Deferred => "deferred",
            Self::Settling => "settling",
        }
    }

    /// The reverse of [`Self::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Immediate, Self::Deferred].into_iter().find(|commit| commit.as_str() == text)
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl OnNoQuorum {
    /// As the cluster file spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Error => "error",
        }
    }

    /// The reverse of [`Self::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Wait, Self::Error].into_iter().find(|choice| choice.as_str() == text)
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Who may export a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The exporter.
    pub node: NodeId,
    /// Grows with every move.
    pub generation: ClaimGeneration,
    /// The map version that made this claim: the exporter starts when every primary has adopted it.
    pub since: MapVersion,
}

/// A run of consecutive slices with the same replica list.
///
/// Written as an array of its fields in this order, as replicas and moves are: they are most of a map. Read as an object as
/// well, which it once was.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The first slice.
    pub first: SliceIndex,
    /// How many.
    pub count: u32,
    /// The map version at which this replica list last changed.
    pub epoch: SliceEpoch,
    /// Grows when acknowledged, unflushed data may have been lost.
    #[serde(default)]
    pub loss: LossGeneration,
    /// The map version that made a copy primary which was not before; what it then held in memory for the one before
    /// it stored before it adopted that map. 0: since the beginning.
    #[serde(default)]
    pub primary_since: MapVersion,
    /// The copies; the first is the primary, the rest are secondaries.
    pub replicas: Vec<Replica>,
}

/// One copy of a slice.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replica {
    /// The disk it is on.
    pub disk: DiskId,
    /// The segment whose slots it takes up there. A failover changes roles and moves nothing, so this
    /// need not be the replica's present role.
    pub segment: Segment,
    /// The map version that put it there: what the disk may hold of the slice from before is no copy.
    pub added: MapVersion,
    /// What it is worth.
    pub state: ReplicaState,
    /// The incarnation under which it became so.
    pub incarnation: Incarnation,
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { first, count, epoch, loss, primary_since, replicas } = self;
        (first, count, epoch, loss, primary_since, replicas).serialize(serializer)
    }
}

impl Serialize for Replica {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { disk, segment, added, state, incarnation: Incarnation { attach, process } } = self;
        (disk, segment, added, state, (attach, process)).serialize(serializer)
    }
}

/// What a copy is worth.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// A member: has every acknowledged write; the only state that is ever promoted.
    InSync,
    /// Receives new writes and is being filled.
    Syncing,
    /// Lacks writes; serves nothing.
    Stale,
}

impl Span {
    /// One past the last slice.
    pub fn end(&self) -> u32 {
        self.first.0 + self.count
    }

    /// The first of the list.
    pub fn primary(&self) -> &Replica {
        &self.replicas[0]
    }

    /// The copies that are in sync.
    pub fn members(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync)
    }

    /// The copy on that disk.
    pub fn replica_on(&self, disk: DiskId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.disk == disk)
    }
}

impl Device {
    /// Its length in bytes.
    pub fn bytes(&self, slice_bytes: u32) -> u64 {
        u64::from(self.slices) * u64::from(slice_bytes)
    }

    /// Whether a copy in that place of a slice's list is one only as long as its process lives: a primary's
    /// memory orders writes, a deferred secondary's holds some.
    pub fn lives_in_memory(&self, span: &Span, disk: DiskId) -> bool {
        self.commit != Commit::Immediate || span.primary().disk == disk
    }

    /// Whether it has more than one copy by design.
    pub fn is_mirrored(&self) -> bool {
        self.copies > 1
    }

    /// The span that holds a slice.
    pub fn span(&self, slice: SliceIndex) -> Option<&Span> {
        let index = self.spans.partition_point(|span| span.end() <= slice.0);
        self.spans.get(index).filter(|span| span.first <= slice)
    }
}

impl DistributionMap {
    /// One that lists nothing, of no cluster: to be filled.
    pub fn empty() -> Self {
        Self {
            format: MAP_FORMAT,
            cluster: ClusterId::default(),
            cluster_name: String::new(),
            version: MapVersion(0),
            slice_bytes: 0,
            nodes: Vec::new(),
            disks: Vec::new(),
            devices: Vec::new(),
            topology: None,
            last_device: 0,
            last_disk: 0,
            last_node: 0,
            plans: Vec::new(),
        }
    }

    /// The node with that id.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.binary_search_by_key(&id, |node| node.id).ok().map(|index| &self.nodes[index])
    }

    /// The node with that name.
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The disk with that id.
    pub fn disk(&self, id: DiskId) -> Option<&Disk> {
        // Ids are given in order and never used again, so the list is sorted.
        self.disks.binary_search_by_key(&id, |disk| disk.id).ok().map(|index| &self.disks[index])
    }

    /// The device with that id.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.binary_search_by_key(&id, |device| device.id).ok().map(|index| &self.devices[index])
    }

    /// An id that no device has, or had.
    pub fn next_device(&self) -> DeviceId {
        DeviceId(self.last_device.max(self.devices.last().map_or(0, |last| last.id.0)) + 1)
    }

    /// The device with that name.
    pub fn device_named(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// The node that has that disk.
    pub fn node_of(&self, disk: DiskId) -> Option<NodeId> {
        self.disk(disk).map(|disk| disk.node)
    }

    /// Whether anything lies in a disk's primary or secondary segment.
    pub fn is_in_use(&self, disk: DiskId) -> bool {
        let mut replicas =
            self.devices.iter().flat_map(|device| &device.spans).flat_map(|span| &span.replicas);
        replicas.any(|replica| replica.disk == disk && replica.segment != Segment::Unmirrored)
    }

    /// The disks in whose primary or secondary segment anything lies.
    pub fn disks_in_use(&self) -> HashSet<DiskId> {
        let replicas = self.devices.iter().flat_map(|device| &device.spans).flat_map(|span| &span.replicas);
        replicas.filter(|copy| copy.segment != Segment::Unmirrored).map(|copy| copy.disk).collect()
    }

    /// A node's name, or its id where the map does not know it; for messages.
    pub fn node_name(&self, id: NodeId) -> String {
        self.node(id).map_or_else(|| id.to_string(), |node| node.name.clone())
    }

    /// `node/disk`, for messages.
    pub fn disk_name(&self, id: DiskId) -> String {
        self.disk(id)
            .map_or_else(|| id.to_string(), |disk| format!("{}/{}", self.node_name(disk.node), disk.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::layout::tests::pair_map;
    use crate::map::plan::{Move, Plan};
    use crate::map::verbs::Run;

    #[test]
    fn spans_copies_and_moves_are_read_as_they_once_were_written() {
        let mut map = pair_map(2);
        map.devices.truncate(1);
        let span = &map.devices[0].spans[0];
        let run = Run { device: map.devices[0].id, first: span.first, count: span.count };
        let (from, to) = (Some(span.replicas[1].disk), span.replicas[0].disk);
        let step = Move { run, from, to, segment: Segment::Secondary, primary: false };
        map.plans = vec![Plan::new(crate::ids::PlanId(1), "test".into(), vec![step])];
        let now = serde_json::to_value(&map).unwrap();
        let mut then = now.clone();
        let copy = |copy: &serde_json::Value| {
            serde_json::json!({"disk": copy[0], "segment": copy[1], "added": copy[2], "state": copy[3],
                "incarnation": {"attach": copy[4][0], "process": copy[4][1]}})
        };
        for span in then["devices"][0]["spans"].as_array_mut().unwrap() {
            let replicas: Vec<_> = span[5].as_array().unwrap().iter().map(copy).collect();
            *span = serde_json::json!({"first": span[0], "count": span[1], "epoch": span[2], "loss": span[3],
                "replicas": replicas});
        }
        let step = &mut then["plans"][0]["moves"][0];
        *step = serde_json::json!({"run": {"device": step[0][0], "first": step[0][1], "count": step[0][2]},
            "from": step[1], "to": step[2], "segment": step[3], "primary": step[4]});
        assert_eq!(serde_json::from_value::<DistributionMap>(now).unwrap(), map);
        assert_eq!(serde_json::from_value::<DistributionMap>(then).unwrap(), map);
    }
}
