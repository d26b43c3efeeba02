//! Who mirrors whom, so that as much as can be stays where it is.

use super::NoPlan;
use super::room::Room;
use crate::format::alloc::Segment;
use crate::ids::NodeId;
use crate::map::{Device, DistributionMap, Topology};
use std::collections::{BTreeMap, BTreeSet};

/// Which nodes may have the mirrors of what a node is primary of.
#[derive(Clone, Debug)]
pub(super) enum Relation {
    /// Any that the map allows.
    Any,
    /// These only: of a device with `n` copies the first `n - 1`.
    Listed(BTreeMap<NodeId, Vec<NodeId>>),
}

impl Relation {
    /// What a topology makes of the nodes that take part. `copies` is the most that any device is to have.
    pub(super) fn of(
        map: &DistributionMap,
        room: &Room,
        topology: Option<Topology>,
        copies: usize,
    ) -> Result<Self, NoPlan> {
        let members: BTreeSet<NodeId> =
            room.spots.iter().filter(|spot| spot.taker).map(|spot| spot.node).collect();
        let nodes: Vec<NodeId> = members.into_iter().collect();
        let Some(topology) = topology else { return Ok(Self::Any) };
        if nodes.len() < copies {
            return Err(NoPlan::TooFewNodes { nodes: nodes.len(), copies });
        }
        let order = Order { map, weights: weights(map, map.devices.iter()) };
        match topology {
            Topology::Pair if copies > 2 => Err(NoPlan::PairOfThree),
            Topology::Pair => Ok(Self::Listed(order.pairs(&nodes)?)),
            Topology::Chain => {
                let ring = order.ring(&nodes, copies.max(2))?;
                let after = |position: usize, step: usize| ring[(position + step) % ring.len()];
                let mirrors = |position| (1..copies.max(2)).map(|step| after(position, step)).collect();
                let listed = (0..ring.len()).map(|position| (ring[position], mirrors(position)));
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

    /// Whether `mirror` may have a mirror of what `home` is primary of, of a device with so many copies.
    pub(super) fn holds(&self, home: NodeId, mirror: NodeId, copies: usize) -> bool {
        match self {
            Self::Any => true,
            Self::Listed(mirrors) => mirrors
                .get(&home)
                .is_some_and(|listed| listed.iter().take(copies - 1).any(|it| *it == mirror)),
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

/// Slices that one node mirrors of another, the home first.
type Weights = BTreeMap<(NodeId, NodeId), u64>;

/// The home is where a copy takes up a slot of the primary segment, whoever serves it now.
fn weights<'a>(map: &DistributionMap, devices: impl Iterator<Item = &'a Device>) -> Weights {
    let mut weights = Weights::new();
    for span in devices.filter(|device| device.is_mirrored()).flat_map(|device| &device.spans) {
        let at_home = span.replicas.iter().find(|copy| copy.segment == Segment::Primary);
        let home = at_home.unwrap_or(span.primary()).disk;
        for copy in span.replicas.iter().filter(|copy| copy.disk != home) {
            if let (Some(home), Some(mirror)) = (map.node_of(home), map.node_of(copy.disk)) {
                *weights.entry((home, mirror)).or_default() += u64::from(span.count);
            }
        }
    }
    weights
}

/// Finds orders that keep most of what there is; where there is nothing, nodes follow each other by id.
struct Order<'a> {
    map: &'a DistributionMap,
    weights: Weights,
}

impl Order<'_> {
    fn weight(&self, home: NodeId, mirror: NodeId) -> u64 {
        self.weights.get(&(home, mirror)).copied().unwrap_or(0)
    }

    fn apart(&self, a: NodeId, b: NodeId) -> bool {
        self.map.other_set(a, b)
    }

    fn no_partner(&self, node: NodeId) -> NoPlan {
        NoPlan::NoPartner { node: self.map.node_name(node) }
    }

    /// Two by two; of an odd number three form a ring. Nodes of one failure set are not paired.
    fn pairs(&self, nodes: &[NodeId]) -> Result<BTreeMap<NodeId, Vec<NodeId>>, NoPlan> {
        let mut ties: Vec<(u64, NodeId, NodeId)> = Vec::new();
        for (position, a) in nodes.iter().enumerate() {
            for b in &nodes[position + 1..] {
                let weight = self.weight(*a, *b) + self.weight(*b, *a);
                if weight > 0 && self.apart(*a, *b) {
                    ties.push((weight, *a, *b));
                }
            }
        }
        ties.sort_by_key(|(weight, a, b)| (std::cmp::Reverse(*weight), *a, *b));
        let mut pairs: Vec<(NodeId, NodeId)> = Vec::new();
        let mut left: Vec<NodeId> = nodes.to_vec();
        for (_, a, b) in ties {
            if left.contains(&a) && left.contains(&b) {
                left.retain(|node| *node != a && *node != b);
                pairs.push((a, b));
            }
        }
        let mut alone = Vec::new();
        while !left.is_empty() {
            let first = left.remove(0);
            match left.iter().position(|other| self.apart(first, *other)) {
                Some(position) => pairs.push((first, left.remove(position))),
                None => alone.push(first),
            }
        }
        // Two that cannot be paired with each other change partners with a pair that can.
        while alone.len() > 1 {
            let (x, y) = (alone[0], alone[1]);
            let fits = |(a, b): (NodeId, NodeId)| self.apart(x, a) && self.apart(y, b);
            let found = pairs.iter().enumerate().find_map(|(index, (a, b))| {
                [(*a, *b), (*b, *a)].into_iter().find(|pair| fits(*pair)).map(|pair| (index, pair))
            });
            let Some((index, (a, b))) = found else { return Err(self.no_partner(x)) };
            pairs[index] = (x, a);
            pairs.push((y, b));
            alone.drain(..2);
        }
        let mut mirrors: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
        if let Some(third) = alone.first().copied() {
            let ring = |(a, b): (NodeId, NodeId)| [(a, b), (b, third), (third, a)];
            let kept =
                |pair| ring(pair).iter().map(|(home, mirror)| self.weight(*home, *mirror)).sum::<u64>();
            let rings =
                pairs.iter().enumerate().flat_map(|(index, (a, b))| [(index, (*a, *b)), (index, (*b, *a))]);
            let whole = rings.filter(|(_, pair)| ring(*pair).iter().all(|(a, b)| self.apart(*a, *b)));
            // Of equal ones the last, as a cluster is laid out when it is created.
            let best = whole.max_by_key(|(index, pair)| (kept(*pair), *index, pair.0 < pair.1));
            let Some((index, pair)) = best else { return Err(self.no_partner(third)) };
            pairs.remove(index);
            mirrors.extend(ring(pair).map(|(home, mirror)| (home, vec![mirror])));
        }
        for (a, b) in pairs {
            mirrors.insert(a, vec![b]);
            mirrors.insert(b, vec![a]);
        }
        Ok(mirrors)
    }

    /// All nodes in a ring in which any `copies` that follow each other share no failure set.
    fn ring(&self, nodes: &[NodeId], copies: usize) -> Result<Vec<NodeId>, NoPlan> {
        let kept = self.fragments(nodes);
        let single: Vec<Vec<NodeId>> = nodes.iter().map(|node| vec![*node]).collect();
        self.joined(kept, copies).or_else(|_| self.joined(single, copies))
    }

    /// Parts of a ring: the ties that carry most, none that would close it early.
    fn fragments(&self, nodes: &[NodeId]) -> Vec<Vec<NodeId>> {
        let mut ties: Vec<(u64, NodeId, NodeId)> =
            self.weights.iter().map(|((home, mirror), weight)| (*weight, *home, *mirror)).collect();
        ties.sort_by_key(|(weight, a, b)| (std::cmp::Reverse(*weight), *a, *b));
        let mut parts: Vec<Vec<NodeId>> = nodes.iter().map(|node| vec![*node]).collect();
        for (_, home, mirror) in ties {
            let ends = parts.iter().position(|part| part.last() == Some(&home));
            let begins = parts.iter().position(|part| part.first() == Some(&mirror));
            if let (Some(from), Some(to)) = (ends, begins)
                && from != to
                && self.apart(home, mirror)
            {
                let tail = std::mem::take(&mut parts[to]);
                parts[from].extend(tail);
                parts.remove(to);
            }
        }
        parts
    }

    /// One ring of all parts, the first part first.
    fn joined(&self, mut parts: Vec<Vec<NodeId>>, copies: usize) -> Result<Vec<NodeId>, NoPlan> {
        let mut ring = parts.remove(0);
        while !parts.is_empty() {
            let follows = |part: &Vec<NodeId>| {
                let last = ring.iter().rev().take(copies - 1);
                last.clone().all(|node| self.apart(*node, part[0]))
            };
            // What there is most of comes first, lest it be left over at the end.
            let alike =
                |part: &Vec<NodeId>| parts.iter().filter(|other| !self.apart(part[0], other[0])).count();
            let best = parts.iter().enumerate().filter(|(_, part)| follows(part));
            let best = best.max_by_key(|(index, part)| (alike(part), std::cmp::Reverse(*index)));
            let Some((index, _)) = best else { return Err(self.no_partner(parts[0][0])) };
            ring.extend(parts.remove(index));
        }
        let closed = (0..ring.len()).all(|position| {
            (1..copies).all(|step| {
                let other = ring[(position + step) % ring.len()];
                other == ring[position] || self.apart(ring[position], other)
            })
        });
        if closed { Ok(ring) } else { Err(self.no_partner(ring[0])) }
    }
}

impl DistributionMap {
    /// What does not lie as a topology has it, for people: the first that is found.
    pub fn deviation(&self, topology: Topology) -> Option<String> {
        let mut partners: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
        for device in self.devices.iter().filter(|device| device.is_mirrored()) {
            let most = match topology {
                // The map keeps sets that have names, whatever is wished.
                Topology::Sets => return None,
                Topology::Pair => 1,
                Topology::Chain => usize::from(device.copies) - 1,
            };
            for (home, mirror) in weights(self, std::iter::once(device)).into_keys() {
                let known = partners.entry(home).or_default();
                known.insert(mirror);
                if known.len() > most {
                    let names: Vec<String> = known.iter().map(|node| self.node_name(*node)).collect();
                    return Some(format!(
                        "what {} has of its own is mirrored by {}",
                        self.node_name(home),
                        names.join(" and ")
                    ));
                }
            }
        }
        None
    }
}
