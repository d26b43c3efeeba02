//! Who mirrors whom.

use super::room::Room;
use super::{NoPlan, Topology};
use crate::ids::NodeId;
use crate::map::DistributionMap;
use std::collections::{BTreeMap, BTreeSet};

/// Which nodes may have the mirrors of what a node is primary of.
#[derive(Clone, Debug)]
pub(super) enum Relation {
    /// Any that the map allows.
    Any,
    /// These only.
    Listed(BTreeMap<NodeId, Vec<NodeId>>),
}

impl Relation {
    /// What a topology makes of the nodes that take part, in order of id.
    pub(super) fn of(
        map: &DistributionMap,
        room: &Room,
        topology: Option<Topology>,
        copies: u8,
    ) -> Result<Self, NoPlan> {
        let mut nodes: Vec<NodeId> =
            room.spots.iter().filter(|spot| spot.taker).map(|spot| spot.node).collect();
        nodes.dedup();
        let members: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let nodes: Vec<NodeId> = members.into_iter().collect();
        let copies = usize::from(copies);
        let Some(topology) = topology else { return Ok(Self::Any) };
        if nodes.len() < copies {
            return Err(NoPlan::TooFewNodes { nodes: nodes.len(), copies });
        }
        match topology {
            Topology::Pair if copies > 2 => Err(NoPlan::PairOfThree),
            Topology::Pair => pairs(map, &nodes),
            Topology::Chain => {
                let after = |position: usize, step: usize| nodes[(position + step) % nodes.len()];
                let mirrors = |position| (1..copies).map(|step| after(position, step)).collect();
                let listed = (0..nodes.len()).map(|position| (nodes[position], mirrors(position)));
                Ok(Self::Listed(listed.collect()))
            }
            Topology::Sets => {
                let nameless = nodes
                    .iter()
                    .filter_map(|id| map.node(*id))
                    .find(|node| node.power.is_none() && node.switch.is_none());
                match nameless {
                    Some(node) => Err(NoPlan::NoSet { node: node.name.clone() }),
                    // That copies lie in different sets is what the map demands of named ones anyway.
                    None => Ok(Self::Any),
                }
            }
        }
    }

    /// Whether `mirror` may have the mirrors of what `home` is primary of.
    pub(super) fn holds(&self, home: NodeId, mirror: NodeId) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(mirrors) => mirrors.get(&home).is_some_and(|mirrors| mirrors.contains(&mirror)),
        }
    }

    /// Whether `home` takes part.
    pub(super) fn knows(&self, home: NodeId) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(mirrors) => mirrors.contains_key(&home),
        }
    }
}

/// Two by two; of an odd number the last three form a ring. Nodes of one failure set are not paired.
fn pairs(map: &DistributionMap, nodes: &[NodeId]) -> Result<Relation, NoPlan> {
    let apart = |a: NodeId, b: NodeId| map.other_set(a, b);
    let mut left: Vec<NodeId> = nodes.to_vec();
    let mut mirrors: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    let ring = !left.len().is_multiple_of(2);
    while left.len() > if ring { 3 } else { 0 } {
        let first = left.remove(0);
        let Some(position) = left.iter().position(|other| apart(first, *other)) else {
            return Err(NoPlan::NoPartner { node: map.node_name(first) });
        };
        let second = left.remove(position);
        mirrors.insert(first, vec![second]);
        mirrors.insert(second, vec![first]);
    }
    for (position, node) in left.iter().enumerate() {
        let next = left[(position + 1) % left.len()];
        if !apart(*node, next) {
            return Err(NoPlan::NoPartner { node: map.node_name(*node) });
        }
        mirrors.insert(*node, vec![next]);
    }
    Ok(Relation::Listed(mirrors))
}
