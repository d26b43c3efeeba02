//! Maps: a small valid one, and what an input makes of it.

use crate::choices::Choices;
use crate::image::SLICE_BYTES;
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{
    AttachId, ClaimGeneration, ClusterId, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId,
    ProcessId, SliceEpoch, SliceIndex,
};
use mirror_net::map::verbs::{Run, Verb};
use mirror_net::map::{
    Claim, Device, Disk, DistributionMap, Node, Replica, ReplicaState, SegmentSlots, Span,
};

/// Nodes of the small map; each has the disk of its number, its process and its attachment.
pub const NODES: u16 = 3;
/// Slices of each of its devices.
pub const SLICES: u32 = 4;

/// As the map knows a node.
pub fn incarnation(node: u16) -> Incarnation {
    Incarnation { attach: AttachId(u64::from(node)), process: ProcessId(u64::from(node)) }
}

fn replica(node: u16) -> Replica {
    Replica {
        disk: DiskId(u32::from(node)),
        segment: Segment::Primary,
        added: MapVersion(1),
        state: ReplicaState::InSync,
        incarnation: incarnation(node),
    }
}

fn device(id: u32, exporter: u16, spans: &[(u32, &[u16])]) -> Device {
    let mut first = 0;
    let spans: Vec<Span> = spans
        .iter()
        .map(|(count, nodes)| {
            let span = Span {
                first: SliceIndex(first),
                count: *count,
                epoch: SliceEpoch(1),
                loss: LossGeneration(0),
                primary_since: MapVersion(0),
                replicas: nodes.iter().map(|node| replica(*node)).collect(),
            };
            first += count;
            span
        })
        .collect();
    Device {
        id: DeviceId(id),
        name: format!("device{id}"),
        slices: first,
        block_bytes: 512,
        copies: spans[0].replicas.len() as u8,
        commit: Default::default(),
        on_no_quorum: Default::default(),
        claim: Claim { node: NodeId(exporter), generation: ClaimGeneration(1), since: MapVersion(1) },
        spans,
    }
}

/// Three nodes with a disk each; devices of two, three and one copies, and one of two spans.
pub fn small() -> DistributionMap {
    DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "small".into(),
        version: MapVersion(1),
        slice_bytes: SLICE_BYTES,
        nodes: (1..=NODES)
            .map(|id| Node {
                id: NodeId(id),
                name: format!("n{id}"),
                address: format!("10.0.0.{id}:7301"),
                power: None,
                switch: None,
            })
            .collect(),
        disks: (1..=NODES)
            .map(|id| Disk {
                id: DiskId(u32::from(id)),
                node: NodeId(id),
                name: "d".into(),
                slots: SegmentSlots { primary: 48, secondary: 48, unmirrored: 48 },
                block_bytes: 512,
                spare: false,
                failed: None,
            })
            .collect(),
        devices: vec![
            device(1, 1, &[(SLICES, &[1, 2])]),
            device(2, 2, &[(SLICES, &[2, 1, 3])]),
            device(3, 1, &[(SLICES, &[1])]),
            device(4, 1, &[(2, &[1, 3]), (2, &[3, 1])]),
        ],
        ..DistributionMap::empty()
    }
}

/// A verb about anything, in the map or not.
pub fn verb(choices: &mut Choices<'_>) -> Verb {
    let run = Run {
        device: DeviceId(choices.below(6)),
        first: SliceIndex(choices.below(SLICES + 1)),
        count: choices.below(SLICES + 2),
    };
    let disk = DiskId(choices.below(u32::from(NODES) + 2));
    let process = choices.below(5);
    let incarnation = Incarnation { attach: AttachId(disk.0.into()), process: ProcessId(process.into()) };
    match choices.below(10) {
        0 => Verb::AddReplica { run, disk, segment: Segment::Secondary, incarnation },
        1 => Verb::Promote { run, disk },
        2 => Verb::DropReplica { run, disk },
        3 => Verb::Mark { run, disk, state: ReplicaState::Stale, incarnation: None },
        4 => Verb::Mark { run, disk, state: ReplicaState::Syncing, incarnation: Some(incarnation) },
        5 => Verb::Mark { run, disk, state: ReplicaState::InSync, incarnation: Some(incarnation) },
        6 => Verb::Readmit { run, disk, incarnation, lost: choices.byte() & 1 == 1 },
        7 => Verb::Force { run, disk, incarnation },
        8 => Verb::MoveClaim { device: run.device, node: NodeId(disk.0 as u16) },
        _ => Verb::FailDisk { disk, reason: "worn out".into() },
    }
}
