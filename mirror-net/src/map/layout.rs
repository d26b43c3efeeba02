//! The first map of a cluster: who mirrors whom.
//!
//! Every disk yields one mirrored device and, if it has such a segment, an unmirrored one. Unless another layout is chosen,
//! nodes mirror each other two by two, in the order of the cluster file; of an odd number the last three form a ring. What a
//! disk has is spread over the secondary segments of the partner's disks. Any other layout is the [planner](super::wanted)'s.

use super::plan::Move;
use super::wanted::{NoPlan, Wish, copies_of_all};
use super::{
    Claim, Commit, Device, DevicePolicy, Disk, DistributionMap, Node, Replica, ReplicaState, SegmentSlots,
    Span, Topology,
};
use crate::format::alloc::Segment;
use crate::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId,
    SliceEpoch, SliceIndex,
};
use std::collections::{BTreeMap, BTreeSet};

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
    #[error(
        "the secondary segments hold {room} slices in all, which is too little where it is needed: enlarge `secondary`, or \
         choose fewer copies or another layout"
    )]
    Crowded { room: u64 },
    #[error("{why}; {}", remedy(why))]
    Planned { why: NoPlan },
    #[error(transparent)]
    Invalid(#[from] super::validate::InvalidMap),
}

fn remedy(why: &NoPlan) -> &'static str {
    match why {
        NoPlan::NoRoom { .. } => "enlarge `secondary`, or choose fewer `copies` or another `layout`",
        NoPlan::Copies { .. } | NoPlan::TooFewNodes { .. } => "choose fewer `copies`",
        NoPlan::PairOfThree | NoPlan::NoPartner { .. } | NoPlan::NoSet { .. } => {
            "choose another `layout`, or correct `power` and `switch`"
        }
    }
}

/// For each node, the index of the node that mirrors it.
fn partners(count: usize) -> Vec<usize> {
    let paired = if count.is_multiple_of(2) { count } else { count - 3 };
    (0..count).map(|node| if node < paired { node ^ 1 } else { paired + (node - paired + 1) % 3 }).collect()
}

/// Who is to mirror whom, and how often, when a cluster is created.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The topology that was chosen, of which `None` leaves it to the map's own rules; the outer `None` if nothing was
    /// chosen: pairs, where two copies are wanted, without a word in the map that it is to stay so.
    pub topology: Option<Option<Topology>>,
    /// Copies of what nodes have in their primary segments, 1 to 3.
    pub copies: u8,
}

impl Default for Layout {
    fn default() -> Self {
        Self { topology: None, copies: 2 }
    }
}

impl Layout {
    /// Makes the first map, version 1: all copies in sync, since nothing was ever written.
    ///
    /// # Errors
    /// Says what is missing for it.
    pub fn of(
        self,
        cluster: ClusterId,
        cluster_name: &str,
        slice_bytes: u32,
        nodes: &[NodeSpec],
    ) -> Result<DistributionMap, LayoutError> {
        let mut map = match (self.copies, self.topology) {
            (2, None | Some(Some(Topology::Pair))) => {
                match pairs(cluster, cluster_name, slice_bytes, nodes) {
                    // In the order of the file two would be paired that share power or switch, or are too unlike.
                    Err(error @ (LayoutError::Invalid(_) | LayoutError::NoRoom { .. })) => {
                        let pair = Some(Topology::Pair);
                        let planned = self.planned(cluster, cluster_name, slice_bytes, nodes, pair);
                        planned.map_err(|other| match error {
                            LayoutError::NoRoom { .. } => error,
                            _ => other,
                        })
                    }
                    made => made,
                }
            }
            (_, topology) => {
                self.planned(cluster, cluster_name, slice_bytes, nodes, topology.unwrap_or_default())
            }
        }?;
        map.topology = self.topology.unwrap_or_default();
        map.validate()?;
        Ok(map)
    }

    /// As the planner would have it. Nothing is moved: what it wants copied is there from the beginning.
    fn planned(
        self,
        cluster: ClusterId,
        cluster_name: &str,
        slice_bytes: u32,
        nodes: &[NodeSpec],
        topology: Option<Topology>,
    ) -> Result<DistributionMap, LayoutError> {
        let mut map = unmirrored(cluster, cluster_name, slice_bytes, nodes)?;
        let takers = map.disks.iter().filter(|disk| !disk.spare).map(|disk| disk.id).collect();
        let copies = copies_of_all(&map, self.copies);
        let laid_out: BTreeSet<DeviceId> = copies.keys().copied().collect();
        let wanted = map.wanted(&Wish { takers, copies, topology, ..Wish::default() });
        let wanted = wanted.map_err(|why| LayoutError::Planned { why })?;
        let incarnations: BTreeMap<DiskId, Incarnation> = map
            .disks
            .iter()
            .zip(nodes.iter().flat_map(|node| &node.disks))
            .map(|(disk, spec)| (disk.id, spec.incarnation))
            .collect();
        let mut moves: BTreeMap<DeviceId, Vec<&Move>> = BTreeMap::new();
        for step in &wanted.moves {
            // Something would have to make room first, and there is nothing yet.
            if step.from.is_some() || step.primary {
                let all = map.disks.iter().filter(|disk| !disk.spare);
                return Err(LayoutError::Crowded {
                    room: all.map(|disk| u64::from(disk.slots.secondary)).sum(),
                });
            }
            moves.entry(step.run.device).or_default().push(step);
        }
        for device in map.devices.iter_mut().filter(|device| laid_out.contains(&device.id)) {
            device.copies = self.copies;
            device.commit = if self.copies > 1 { commit_at(nodes, device) } else { Commit::Immediate };
            let moves = moves.get(&device.id).map_or(&[][..], Vec::as_slice);
            let end = |step: &Move| step.run.first.0 + step.run.count;
            let cuts = moves.iter().flat_map(|step| [step.run.first.0, end(step)]).chain([0, device.slices]);
            let cuts: Vec<u32> = cuts.collect::<BTreeSet<u32>>().into_iter().collect();
            let own = device.spans[0].replicas[0].clone();
            let spans = cuts.windows(2).map(|cut| {
                let mirrors = moves.iter().filter(|step| step.run.first.0 <= cut[0] && cut[1] <= end(step));
                let mirror = |step: &&Move| in_sync(step.to, step.segment, incarnations[&step.to]);
                span(cut[0], cut[1] - cut[0], [own.clone()].into_iter().chain(mirrors.map(mirror)).collect())
            });
            device.spans = spans.collect();
        }
        Ok(map)
    }
}

fn commit_at(nodes: &[NodeSpec], device: &Device) -> Commit {
    nodes[usize::from(device.claim.node.0) - 1].devices.commit
}

/// A map of pairs: what a node has is mirrored by its partner, disk after disk.
pub fn pairs(
    cluster: ClusterId,
    cluster_name: &str,
    slice_bytes: u32,
    nodes: &[NodeSpec],
) -> Result<DistributionMap, LayoutError> {
    let mut map = unmirrored(cluster, cluster_name, slice_bytes, nodes)?;
    let active: Vec<usize> = active(nodes).collect();
    for (position, partner) in partners(active.len()).into_iter().enumerate() {
        let (node, partner) = (active[position], active[partner]);
        let mut room: Vec<(DiskId, u32, Incarnation)> = disks_at(&map, partner)
            .into_iter()
            .zip(&nodes[partner].disks)
            .map(|(id, spec)| (id, spec.slots.secondary, spec.incarnation))
            .collect();
        let wanted: u64 = nodes[node].disks.iter().map(|spec| u64::from(spec.slots.primary)).sum();
        let available: u64 = room.iter().map(|(_, slots, _)| u64::from(*slots)).sum();
        if wanted > available {
            return Err(LayoutError::NoRoom {
                node: nodes[node].name.clone(),
                partner: nodes[partner].name.clone(),
                room: available,
                wanted,
            });
        }
        let id = node_id(node);
        let laid_out = |device: &&mut Device| {
            device.claim.node == id && device.spans[0].replicas[0].segment == Segment::Primary
        };
        for device in map.devices.iter_mut().filter(laid_out) {
            (device.copies, device.commit) = (2, nodes[node].devices.commit);
            let own = device.spans[0].replicas[0].clone();
            device.spans = mirror_spans(device.slices, &own, &mut room);
        }
    }
    map.validate()?;
    Ok(map)
}

/// Indices of the nodes that hold something from the beginning.
fn active(nodes: &[NodeSpec]) -> impl Iterator<Item = usize> {
    (0..nodes.len()).filter(|index| !nodes[*index].spare && !nodes[*index].disks.is_empty())
}

fn node_id(index: usize) -> NodeId {
    NodeId(index as u16 + 1)
}

fn disks_at(map: &DistributionMap, index: usize) -> Vec<DiskId> {
    map.disks.iter().filter(|disk| disk.node == node_id(index)).map(|disk| disk.id).collect()
}

/// All nodes and disks, and the devices of those that are no spares, each with one copy.
fn unmirrored(
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
    for (index, node) in nodes.iter().enumerate() {
        let id = node_id(index);
        map.nodes.push(Node {
            id,
            name: node.name.clone(),
            address: node.address.clone(),
            power: node.power.clone(),
            switch: node.switch.clone(),
        });
        for disk in &node.disks {
            map.disks.push(Disk {
                id: DiskId(map.disks.len() as u32 + 1),
                node: id,
                name: disk.name.clone(),
                slots: disk.slots,
                block_bytes: disk.block_bytes,
                spare: node.spare,
                failed: None,
            });
        }
    }
    if active(nodes).count() < 2 {
        return Err(LayoutError::TooFewNodes(active(nodes).count()));
    }
    let block_bytes =
        nodes.iter().flat_map(|node| &node.disks).map(|disk| disk.block_bytes).max().unwrap_or(512);
    for index in active(nodes) {
        let node = &nodes[index];
        for (disk, spec) in disks_at(&map, index).into_iter().zip(&node.disks) {
            if spec.slots.primary == 0 {
                return Err(LayoutError::NoPrimary { node: node.name.clone(), disk: spec.name.clone() });
            }
            let mut device = |name: String, slices: u32, segment: Segment| {
                map.devices.push(Device {
                    id: DeviceId(map.devices.len() as u32 + 1),
                    name,
                    slices,
                    block_bytes,
                    copies: 1,
                    // Where nobody mirrors, nobody holds anything in memory for others.
                    commit: Commit::Immediate,
                    on_no_quorum: node.devices.on_no_quorum,
                    claim: Claim { node: node_id(index), generation: ClaimGeneration(1), since: version },
                    spans: vec![span(0, slices, vec![in_sync(disk, segment, spec.incarnation)])],
                });
            };
            device(format!("{}-{}", node.name, spec.name), spec.slots.primary, Segment::Primary);
            if spec.slots.unmirrored > 0 {
                let name = format!("{}-{}-unmirrored", node.name, spec.name);
                device(name, spec.slots.unmirrored, Segment::Unmirrored);
            }
        }
    }
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

    fn laid_out(layout: Layout, nodes: &[NodeSpec]) -> Result<DistributionMap, LayoutError> {
        layout.of(ClusterId::default(), "t", 64 << 20, nodes)
    }

    fn with_sets(sets: &[&str], slots: SegmentSlots) -> Vec<NodeSpec> {
        let named = sets.iter().enumerate();
        named
            .map(|(index, power)| NodeSpec {
                power: (!power.is_empty()).then(|| (*power).to_owned()),
                ..node(&format!("n{}", index + 1), &[slots, slots])
            })
            .collect()
    }

    const ROOMY: SegmentSlots = SegmentSlots { primary: 6, secondary: 12, unmirrored: 2 };

    #[test]
    fn a_chain_of_two_and_of_three_copies() {
        let home = |device: &Device| device.claim.node.0 - 1;
        for copies in 2..=3u8 {
            let layout = Layout { topology: Some(Some(Topology::Chain)), copies };
            let map = laid_out(layout, &with_sets(&["", "", "", ""], ROOMY)).unwrap();
            assert_eq!((map.version, map.topology), (MapVersion(1), Some(Topology::Chain)));
            assert_eq!(map.deviation(Topology::Chain), None);
            for device in map.devices.iter().filter(|device| !device.name.ends_with("unmirrored")) {
                assert_eq!(device.copies, copies);
                for span in &device.spans {
                    let mut nodes: Vec<u16> =
                        span.replicas.iter().map(|copy| map.node_of(copy.disk).unwrap().0 - 1).collect();
                    // Which mirror comes first is a matter of room.
                    nodes[1..].sort_by_key(|node| (node + 4 - home(device)) % 4);
                    let expected: Vec<u16> =
                        (0..u16::from(copies)).map(|step| (home(device) + step) % 4).collect();
                    assert_eq!(nodes, expected, "{}", device.name);
                }
            }
        }
    }

    #[test]
    fn copies_are_in_different_sets_whatever_the_order_of_the_file() {
        for topology in [None, Some(Some(Topology::Pair)), Some(Some(Topology::Sets)), Some(None)] {
            let map =
                laid_out(Layout { topology, copies: 2 }, &with_sets(&["a", "a", "b", "b"], ROOMY)).unwrap();
            assert_eq!(map.topology, topology.flatten());
            assert!(map.devices.iter().all(|device| device.spans.iter().all(|span| {
                let nodes: Vec<NodeId> =
                    span.replicas.iter().filter_map(|copy| map.node_of(copy.disk)).collect();
                nodes.len() < 2 || map.other_set(nodes[0], nodes[1])
            })));
        }
    }

    #[test]
    fn who_is_too_large_for_the_next_is_paired_with_another() {
        let mut nodes = with_sets(&["a", "a", "b", "b"], ROOMY);
        for index in [1, 3] {
            for disk in &mut nodes[index].disks {
                (disk.slots.primary, disk.slots.secondary) = (3, 3);
            }
        }
        let map = laid_out(Layout::default(), &nodes).unwrap();
        let mirror = &map.devices[0].spans[0].replicas[1];
        assert_eq!(map.node_of(mirror.disk), Some(NodeId(3)));
        nodes.iter_mut().for_each(|node| node.power = Some("a".into()));
        let error = laid_out(Layout::default(), &nodes).unwrap_err().to_string();
        assert!(error.contains("enlarge `secondary` on n2"), "{error}");
        nodes.truncate(2);
        nodes[1] = NodeSpec { name: "n2".into(), ..nodes[0].clone() };
        let error = laid_out(Layout::default(), &nodes).unwrap_err().to_string();
        assert!(error.ends_with("; choose another `layout`, or correct `power` and `switch`"), "{error}");
    }

    #[test]
    fn one_copy_is_no_mirror_and_too_many_have_no_room() {
        let map = laid_out(Layout { topology: None, copies: 1 }, &with_sets(&["", ""], ROOMY)).unwrap();
        assert!(map.devices.iter().all(|device| device.copies == 1 && device.spans.len() == 1));
        let narrow = SegmentSlots { secondary: 6, ..ROOMY };
        let layout = Layout { topology: Some(Some(Topology::Chain)), copies: 3 };
        let error = laid_out(layout, &with_sets(&["", "", ""], narrow)).unwrap_err().to_string();
        assert!(error.starts_with("there is no place for "), "{error}");
        assert!(
            error.ends_with("; enlarge `secondary`, or choose fewer `copies` or another `layout`"),
            "{error}"
        );
        let error =
            laid_out(Layout { copies: 3, ..layout }, &with_sets(&["", ""], ROOMY)).unwrap_err().to_string();
        assert!(error.starts_with("there are 2 nodes for 3 copies"), "{error}");
    }

    proptest::proptest! {
        /// Any layout that is made is a whole one, without copies that are missing or out of place.
        #[test]
        fn what_is_laid_out_is_as_it_was_chosen(
            nodes in 2usize..8,
            secondary in 4u32..20,
            sets in proptest::sample::select(vec![0usize, 2, 3]),
            topology in proptest::sample::select(vec![None, Some(None), Some(Some(Topology::Pair)), Some(Some(Topology::Chain)), Some(Some(Topology::Sets))]),
            copies in 1u8..=3,
        ) {
            let names = ["a", "b", "c"];
            let power: Vec<&str> = (0..nodes).map(|node| if sets > 0 { names[node % sets] } else { "" }).collect();
            let slots = SegmentSlots { primary: 4, secondary, unmirrored: 1 };
            if let Ok(map) = laid_out(Layout { topology, copies }, &with_sets(&power, slots)) {
                proptest::prop_assert_eq!(map.validate(), Ok(()));
                let wanted = |device: &Device| if device.name.ends_with("unmirrored") { 1 } else { usize::from(copies) };
                for device in &map.devices {
                    proptest::prop_assert!(device.spans.iter().all(|span| span.replicas.len() == wanted(device)));
                    proptest::prop_assert!(device.spans.iter().all(|span| span.primary().segment != Segment::Secondary));
                }
                proptest::prop_assert_eq!(map.topology.and_then(|topology| map.deviation(topology)), None);
            } else {
                // There is room for pairs, wherever they can be had.
                proptest::prop_assert!(sets > 0 || copies > 2 || topology == Some(Some(Topology::Sets)));
            }
        }
    }
}
