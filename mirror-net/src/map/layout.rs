//! The first map of a cluster: who mirrors whom.
//!
//! The layout is `pair`: nodes mirror each other two by two, in the order of the cluster file; of
//! an odd number the last three form a ring. Every disk yields one mirrored device, spread over
//! the secondary segments of the partner's disks, and one unmirrored device if it has such a segment.

use super::{
    Claim, Commit, Device, DevicePolicy, Disk, DistributionMap, Node, Replica, ReplicaState, SegmentSlots,
    Span,
};
use crate::format::alloc::Segment;
use crate::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId,
    SliceEpoch, SliceIndex,
};

/// A node of the cluster to be, with its disks.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its name.
    pub name: String,
    /// `host:port` where it listens for other nodes.
    pub address: String,
    /// Its power feed.
    pub power: Option<String>,
    /// Its switch.
    pub switch: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// A spare holds no data until it is activated.
    pub spare: bool,
    /// What its devices promise besides.
    pub devices: DevicePolicy,
}

/// A disk of the cluster to be.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Its name; unique within the node.
    pub name: String,
    /// Its slots, by segment.
    pub slots: SegmentSlots,
    /// 512 or 4096.
    pub block_bytes: u32,
    /// Its incarnation when the cluster is created.
    pub incarnation: Incarnation,
}

/// Why no layout can be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LayoutError {
    #[error("a mirror needs at least two nodes with disks that are not spares; the cluster file has {0}")]
    TooFewNodes(usize),
    #[error(
        "node {node}: the secondary segments of its partner {partner} hold {room} slices, its primary segments need \
         {wanted}: enlarge `secondary` on {partner} or reduce `primary` on {node}"
    )]
    NoRoom { node: String, partner: String, room: u64, wanted: u64 },
    #[error("node {node} disk {disk} has no primary segment at all: it is too small for one slice")]
    NoPrimary { node: String, disk: String },
    #[error(transparent)]
    Invalid(#[from] super::validate::InvalidMap),
}

/// For each node, the index of the node that mirrors it.
fn partners(count: usize) -> Vec<usize> {
    let paired = if count.is_multiple_of(2) { count } else { count - 3 };
    (0..count).map(|node| if node < paired { node ^ 1 } else { paired + (node - paired + 1) % 3 }).collect()
}

/// Makes the first map, version 1: all copies in sync, since nothing was ever written.
pub fn pairs(
    cluster: ClusterId,
    cluster_name: &str,
    slice_bytes: u32,
    nodes: &[NodeSpec],
) -> Result<DistributionMap, LayoutError> {
    let version = MapVersion(1);
    let mut map = DistributionMap {
        cluster,
        cluster_name: cluster_name.to_owned(),
        version,
        slice_bytes,
        nodes: Vec::new(),
        disks: Vec::new(),
        devices: Vec::new(),
        ..DistributionMap::empty()
    };
    let mut disks_of: Vec<Vec<(DiskId, &DiskSpec)>> = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let id = NodeId(index as u16 + 1);
        map.nodes.push(Node {
            id,
            name: node.name.clone(),
            address: node.address.clone(),
            power: node.power.clone(),
            switch: node.switch.clone(),
        });
        let mut disks = Vec::new();
        for disk in &node.disks {
            let disk_id = DiskId(map.disks.len() as u32 + 1);
            map.disks.push(Disk {
                id: disk_id,
                node: id,
                name: disk.name.clone(),
                slots: disk.slots,
                block_bytes: disk.block_bytes,
                spare: node.spare,
                failed: None,
            });
            disks.push((disk_id, disk));
        }
        disks_of.push(disks);
    }
    let active: Vec<usize> =
        (0..nodes.len()).filter(|index| !nodes[*index].spare && !nodes[*index].disks.is_empty()).collect();
    if active.len() < 2 {
        return Err(LayoutError::TooFewNodes(active.len()));
    }
    let block_bytes =
        nodes.iter().flat_map(|node| &node.disks).map(|disk| disk.block_bytes).max().unwrap_or(512);
    for (position, partner) in partners(active.len()).into_iter().enumerate() {
        let (node, partner) = (active[position], active[partner]);
        let mut room: Vec<(DiskId, u32, Incarnation)> = disks_of[partner]
            .iter()
            .map(|(id, spec)| (*id, spec.slots.secondary, spec.incarnation))
            .collect();
        let wanted: u64 = disks_of[node].iter().map(|(_, spec)| u64::from(spec.slots.primary)).sum();
        let available: u64 = room.iter().map(|(_, slots, _)| u64::from(*slots)).sum();
        if wanted > available {
            return Err(LayoutError::NoRoom {
                node: nodes[node].name.clone(),
                partner: nodes[partner].name.clone(),
                room: available,
                wanted,
            });
        }
        for (disk, spec) in &disks_of[node] {
            if spec.slots.primary == 0 {
                return Err(LayoutError::NoPrimary {
                    node: nodes[node].name.clone(),
                    disk: spec.name.clone(),
                });
            }
            let own = |segment| in_sync(*disk, segment, spec.incarnation);
            let claim =
                Claim { node: NodeId(node as u16 + 1), generation: ClaimGeneration(1), since: version };
            let mut device = |name: String, slices: u32, copies: u8, spans: Vec<Span>| {
                let id = DeviceId(map.devices.len() as u32 + 1);
                map.devices.push(Device {
                    id,
                    name,
                    slices,
                    block_bytes,
                    copies,
                    // Where nobody mirrors, nobody holds anything in memory for others.
                    commit: if copies > 1 { nodes[node].devices.commit } else { Commit::Immediate },
                    on_no_quorum: nodes[node].devices.on_no_quorum,
                    claim,
                    spans,
                });
            };
            let spans = mirror_spans(spec.slots.primary, &own(Segment::Primary), &mut room);
            device(format!("{}-{}", nodes[node].name, spec.name), spec.slots.primary, 2, spans);
            if spec.slots.unmirrored > 0 {
                let span = span(0, spec.slots.unmirrored, vec![own(Segment::Unmirrored)]);
                device(
                    format!("{}-{}-unmirrored", nodes[node].name, spec.name),
                    spec.slots.unmirrored,
                    1,
                    vec![span],
                );
            }
        }
    }
    map.validate()?;
    Ok(map)
}

/// A copy of the first map: nothing was ever written, so it is like the others.
fn in_sync(disk: DiskId, segment: Segment, incarnation: Incarnation) -> Replica {
    Replica { disk, segment, added: MapVersion(1), state: ReplicaState::InSync, incarnation }
}

fn span(first: u32, count: u32, replicas: Vec<Replica>) -> Span {
    Span {
        first: SliceIndex(first),
        count,
        epoch: SliceEpoch(1),
        loss: LossGeneration(0),
        primary_since: MapVersion(0),
        replicas,
    }
}

/// Takes `slices` slots from the partner's disks, in order.
fn mirror_spans(slices: u32, own: &Replica, room: &mut [(DiskId, u32, Incarnation)]) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut first = 0;
    for (disk, free, incarnation) in room.iter_mut() {
        let count = (*free).min(slices - first);
        if count > 0 {
            let mirror = in_sync(*disk, Segment::Secondary, *incarnation);
            spans.push(span(first, count, vec![own.clone(), mirror]));
            first += count;
            *free -= count;
        }
    }
    spans
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `count` nodes with one disk of 8 primary, 8 secondary and 2 unmirrored slots each.
    pub(crate) fn pair_map(count: usize) -> DistributionMap {
        let slots = SegmentSlots { primary: 8, secondary: 8, unmirrored: 2 };
        let nodes: Vec<NodeSpec> = (1..=count).map(|index| node(&format!("n{index}"), &[slots])).collect();
        pairs(ClusterId::default(), "test", 64 << 20, &nodes).unwrap()
    }

    fn node(name: &str, disks: &[SegmentSlots]) -> NodeSpec {
        NodeSpec {
            name: name.into(),
            address: "127.0.0.1:1".into(),
            power: None,
            switch: None,
            disks: disks
                .iter()
                .enumerate()
                .map(|(index, slots)| DiskSpec {
                    name: format!("d{}", index + 1),
                    slots: *slots,
                    block_bytes: 512,
                    incarnation: Incarnation::default(),
                })
                .collect(),
            spare: false,
            devices: Default::default(),
        }
    }

    #[test]
    fn nodes_are_paired_and_an_odd_one_makes_a_ring_of_three() {
        assert_eq!(partners(2), [1, 0]);
        assert_eq!(partners(4), [1, 0, 3, 2]);
        assert_eq!(partners(3), [1, 2, 0]);
        assert_eq!(partners(5), [1, 0, 3, 4, 2]);
    }

    #[test]
    fn every_disk_yields_a_mirrored_and_an_unmirrored_device() {
        let map = pair_map(2);
        let names: Vec<&str> = map.devices.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["n1-d1", "n1-d1-unmirrored", "n2-d1", "n2-d1-unmirrored"]);
        assert_eq!(map.devices[0].copies, 2);
        assert_eq!(map.devices[1].copies, 1);
        assert_eq!(map.validate(), Ok(()));
    }

    #[test]
    fn a_large_disk_is_mirrored_over_several_disks_of_the_partner() {
        let big = SegmentSlots { primary: 12, secondary: 12, unmirrored: 0 };
        let small = SegmentSlots { primary: 6, secondary: 6, unmirrored: 0 };
        let map =
            pairs(ClusterId::default(), "t", 64 << 20, &[node("a", &[big]), node("b", &[small, small])])
                .unwrap();
        assert_eq!(map.devices[0].spans.len(), 2);
        assert_eq!(map.devices[0].spans[1].first, SliceIndex(6));
    }

    #[test]
    fn too_little_room_at_the_partner_is_said_with_both_names() {
        let big = SegmentSlots { primary: 12, secondary: 12, unmirrored: 0 };
        let small = SegmentSlots { primary: 6, secondary: 6, unmirrored: 0 };
        let error = pairs(ClusterId::default(), "t", 64 << 20, &[node("a", &[big]), node("b", &[small])])
            .unwrap_err();
        assert!(matches!(error, LayoutError::NoRoom { room: 6, wanted: 12, .. }), "{error}");
    }
}
