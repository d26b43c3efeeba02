//! The map of a cluster that has just been created.

use super::Shape;
use crate::sim::node::{Node, SLICE};
use crate::sim::workload::SLICES;
use mirror_net::ids::{
    ClaimGeneration, ClusterId, DeviceId, DiskId, LossGeneration, MapVersion, SliceEpoch, SliceIndex,
};
use mirror_net::map::{
    Claim, Device, Disk, DistributionMap, MAP_FORMAT, Node as MapNode, Replica, ReplicaState, SegmentSlots,
    Span,
};

/// The devices with their copies spread over the nodes, everything in sync.
pub(super) fn first_map(shape: Shape, nodes: &[Node]) -> DistributionMap {
    let replica = |node: usize| Replica {
        disk: DiskId(u32::from(nodes[node].id.0)),
        state: ReplicaState::InSync,
        incarnation: nodes[node].incarnation(),
    };
    let count = nodes.len();
    // Those after the first two are mirrored by nobody.
    let copies = |device: usize| if device < 2 { shape.copies } else { 1 };
    DistributionMap {
        format: MAP_FORMAT,
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
            .map(|node| Disk {
                id: DiskId(u32::from(node.id.0)),
                node: node.id,
                name: "d1".into(),
                slots: SegmentSlots { primary: 4, secondary: 4, unmirrored: 2 },
                block_bytes: 512,
                failed: None,
            })
            .collect(),
        devices: (0..shape.devices)
            .map(|device| Device {
                id: DeviceId(device as u32 + 1),
                name: format!("dev{}", device + 1),
                slices: SLICES,
                block_bytes: 512,
                copies: copies(device) as u8,
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
                    replicas: (0..usize::from(copies(device)))
                        .map(|copy| replica((device * (count - 1) + copy) % count))
                        .collect(),
                }],
            })
            .collect(),
    }
}
