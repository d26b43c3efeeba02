//! The map of a cluster that has just been created.

use super::Shape;
use crate::sim::node::{Node, SLICE};
use crate::sim::workload::SLICES;
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{
    ClaimGeneration, ClusterId, DeviceId, LossGeneration, MapVersion, SliceEpoch, SliceIndex,
};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
use mirror_net::map::{
    Claim, Commit, Device, Disk, DistributionMap, Node as MapNode, Replica, ReplicaState, SegmentSlots, Span,
};

/// What the map says of every disk's slots. A partner with three disks holds some devices on two of them.
const SLOTS: SegmentSlots = SegmentSlots { primary: SLICES, secondary: 2 * SLICES + 1, unmirrored: SLICES };

/// The map, with everything in sync, and the devices that have users.
pub(super) fn first_map(shape: Shape, nodes: &[Node]) -> (DistributionMap, Vec<usize>) {
    let used = nodes.len() - usize::from(shape.spares);
    if !shape.pairs {
        let map = spread(shape, nodes, used);
        let users = (0..map.devices.len()).collect();
        return (map, users);
    }
    let nodes: Vec<NodeSpec> =
        nodes.iter().enumerate().map(|(index, node)| spec(node, index >= used, shape)).collect();
    let map = pairs(ClusterId::default(), "sim", SLICE, &nodes).expect("there is room");
    // As far from each other as can be; mirrored ones first.
    let mut users: Vec<usize> = (0..map.devices.len()).collect();
    users.sort_by_key(|device| (map.devices[*device].copies == 1, device % 3, *device));
    if shape.mirrored_only {
        users.retain(|device| map.devices[*device].is_mirrored());
    }
    users.truncate(shape.devices);
    (map, users)
}

fn spec(node: &Node, spare: bool, shape: Shape) -> NodeSpec {
    let disk = |index: usize| DiskSpec {
        name: format!("d{}", index + 1),
        slots: SLOTS,
        block_bytes: 512,
        incarnation: node.incarnation(index),
    };
    NodeSpec {
        name: format!("n{}", node.id.0),
        address: String::new(),
        power: None,
        switch: None,
        disks: (0..node.disks.len()).map(disk).collect(),
        spare,
        devices: shape.policy,
    }
}

/// Devices with any number of copies, spread over the first `count` nodes; the others are spares.
fn spread(shape: Shape, nodes: &[Node], count: usize) -> DistributionMap {
    let replica = |device: usize, copy: usize| {
        let node = &nodes[(device * (count - 1) + copy) % count];
        let disk = (device + copy) % node.disks.len();
        Replica {
            disk: node.disks[disk].id,
            segment: match (device < 2, copy) {
                (false, _) => Segment::Unmirrored,
                (true, 0) => Segment::Primary,
                (true, _) => Segment::Secondary,
            },
            added: MapVersion(1),
            state: ReplicaState::InSync,
            incarnation: node.incarnation(disk),
        }
    };
    // Those after the first two are mirrored by nobody.
    let copies = |device: usize| if device < 2 { shape.copies } else { 1 };
    let devices = if shape.mirrored_only { shape.devices.min(2) } else { shape.devices };
    DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "sim".into(),
        version: MapVersion(1),
        slice_bytes: SLICE,
        nodes: nodes
            .iter()
            .map(|node| MapNode {
                id: node.id,
                name: format!("n{}", node.id.0),
                address: String::new(),
                power: None,
                switch: None,
            })
            .collect(),
        disks: nodes
            .iter()
            .flat_map(|node| (1..).zip(&node.disks).map(move |disk| (node, disk)))
            .map(|(node, (index, disk))| Disk {
                id: disk.id,
                node: node.id,
                name: format!("d{index}"),
                slots: SegmentSlots { primary: 4, secondary: 4, unmirrored: 2 },
                block_bytes: 512,
                spare: usize::from(node.id.0) > count,
                failed: None,
            })
            .collect(),
        devices: (0..devices)
            .map(|device| Device {
                id: DeviceId(device as u32 + 1),
                name: format!("dev{}", device + 1),
                slices: SLICES,
                block_bytes: 512,
                copies: copies(device) as u8,
                commit: if copies(device) > 1 { shape.policy.commit } else { Commit::Immediate },
                on_no_quorum: shape.policy.on_no_quorum,
                claim: Claim {
                    // With three nodes and two copies the last device's exporter holds no copy.
                    node: nodes[if device == 1 { count - 1 } else { device % count }].id,
                    generation: ClaimGeneration(1),
                    since: MapVersion(1),
                },
                spans: vec![Span {
                    first: SliceIndex(0),
                    count: SLICES,
                    epoch: SliceEpoch(1),
                    loss: LossGeneration(0),
                    primary_since: MapVersion(0),
                    replicas: (0..usize::from(copies(device))).map(|copy| replica(device, copy)).collect(),
                }],
            })
            .collect(),
        ..DistributionMap::empty()
    }
}
