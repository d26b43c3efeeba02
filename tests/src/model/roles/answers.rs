//! The shipped manager, asked about a map of the roles model.

use super::state::{Copy, Map, NODES, Registered, Slice};
use crate::model::manager::{self, Heard, Question, decide, disk_id, index_of, node_id};
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{ClaimGeneration, LossGeneration, MapVersion, SliceEpoch, SliceIndex};
use mirror_net::map::{Claim, DistributionMap, Replica, ReplicaState, Span};
use std::cell::RefCell;
use std::collections::HashMap;

type Asked = (Map, [Registered; NODES], Question);

/// Remembers what it answered.
#[derive(Default)]
pub struct Answers {
    changes: RefCell<HashMap<Asked, Option<Map>>>,
    exports: RefCell<HashMap<(Map, [Registered; NODES]), bool>>,
}

impl Answers {
    /// What becomes of the map.
    pub fn ask(&self, map: &Map, registered: &[Registered], question: Question) -> Option<Map> {
        let asked = (*map, keyed(registered), question);
        if let Some(answer) = self.changes.borrow().get(&asked) {
            return *answer;
        }
        let answer = decide(&shipped(map, registered.len()), &heard(registered), question)
            .map(|next| abstracted(&next));
        self.changes.borrow_mut().insert(asked, answer);
        answer
    }

    /// Whether the holder of the claim may export.
    pub fn may_export(&self, map: &Map, registered: &[Registered]) -> bool {
        let asked = (*map, keyed(registered));
        if let Some(answer) = self.exports.borrow().get(&asked) {
            return *answer;
        }
        let answer = manager::may_export(&shipped(map, registered.len()), &heard(registered));
        self.exports.borrow_mut().insert(asked, answer);
        answer
    }
}

fn keyed(registered: &[Registered]) -> [Registered; NODES] {
    let mut key = [Registered::default(); NODES];
    key[..registered.len()].copy_from_slice(registered);
    key
}

fn heard(registered: &[Registered]) -> Vec<Heard> {
    registered
        .iter()
        .map(|node| Heard {
            incarnation: manager::incarnation(0, node.incarnation),
            connected: node.connected == 1,
            adopted: MapVersion(node.adopted.into()),
        })
        .collect()
}

fn shipped(map: &Map, nodes: usize) -> DistributionMap {
    let replica = |copy: &Copy| Replica {
        disk: disk_id(copy.node.into()),
        segment: Segment::Primary,
        added: MapVersion(1),
        state: [ReplicaState::InSync, ReplicaState::Syncing, ReplicaState::Stale][copy.state as usize - 1],
        incarnation: manager::incarnation(0, copy.incarnation),
    };
    let span = |(index, slice): (usize, &Slice)| Span {
        first: SliceIndex(index as u32),
        count: 1,
        epoch: SliceEpoch(slice.epoch.into()),
        loss: LossGeneration(0),
        primary_since: MapVersion(0),
        replicas: slice.copies.iter().filter(|copy| copy.state != 0).map(replica).collect(),
    };
    let claim = Claim {
        node: node_id(map.exporter.into()),
        generation: ClaimGeneration(map.claim.into()),
        since: MapVersion(map.claim_since.into()),
    };
    let spans = map.slices.iter().enumerate().map(span).collect();
    manager::map_of(nodes, MapVersion(map.version.into()), claim, spans)
}

fn abstracted(map: &DistributionMap) -> Map {
    let device = &map.devices[0];
    let mut result = Map {
        version: map.version.0 as u8,
        exporter: (device.claim.node.0 - 1) as u8,
        claim: device.claim.generation.0 as u8,
        claim_since: device.claim.since.0 as u8,
        ..Map::default()
    };
    for (index, slice) in result.slices.iter_mut().enumerate() {
        // Spans that became equal are one.
        let span = device.span(SliceIndex(index as u32)).expect("every slice has a span");
        slice.epoch = span.epoch.0 as u8;
        for (copy, replica) in slice.copies.iter_mut().zip(&span.replicas) {
            *copy = Copy {
                node: index_of(replica.disk) as u8,
                state: match replica.state {
                    ReplicaState::InSync => 1,
                    ReplicaState::Syncing => 2,
                    ReplicaState::Stale => 3,
                },
                incarnation: replica.incarnation.process.0 as u8,
            };
        }
    }
    result
}
