//! One state of the roles model: maps, nodes, leases and requests, and its normal form.

use crate::model::rules::{Rule, Rules};
use zerocopy::{Immutable, IntoBytes};

/// Nodes at most, each with a copy of both slices.
pub const NODES: usize = 3;
/// Slices of the device.
pub const SLICES: usize = 2;
/// Maps at most that somebody acts on.
pub const MAPS: usize = 6;

/// A copy in the list.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct Copy {
    pub node: u8,
    /// 1 in sync, 2 syncing, 3 stale.
    pub state: u8,
    pub incarnation: u8,
}

/// A slice in a map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct Slice {
    pub epoch: u8,
    pub copies: [Copy; NODES],
}

/// A map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct Map {
    pub version: u8,
    pub slices: [Slice; SLICES],
    pub exporter: u8,
    pub claim: u8,
    pub claim_since: u8,
}

/// A request of an exporter on its way.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Request {
    /// 1 + the node that it goes to; 0: there is none.
    pub to: u8,
    pub claim: u8,
    pub epoch: u8,
}

/// A node.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Node {
    pub up: u8,
    pub incarnation: u8,
    /// An index into the maps.
    pub adopted: u8,
    /// By grantor: 1 + the version that it had adopted.
    pub leases: [u8; NODES],
    /// Whose leases it waits for.
    pub waits: u8,
    pub forgot: u8,
    /// By slice: copies asked for as members.
    pub joining: [u8; SLICES],
    /// By slice: the claim of a write that has begun here.
    pub writing: [u8; SLICES],
    /// The claim under which the manager let it export.
    pub exports: u8,
    /// By slice: what it sent.
    pub sent: [Request; SLICES],
}

/// What the manager knows of a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Registered {
    pub incarnation: u8,
    pub connected: u8,
    pub adopted: u8,
}

/// A request to make a copy a member, on its way.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Ask {
    pub active: u8,
    pub asker: u8,
    pub slice: u8,
    pub peer: u8,
    pub incarnation: u8,
    pub epoch: u8,
}

/// All of it.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct State {
    pub maps: [Map; MAPS],
    pub newest: u8,
    /// How many nodes there are.
    pub count: u8,
    pub nodes: [Node; NODES],
    pub registered: [Registered; NODES],
    pub ask: Ask,
    /// 0: none; 1 + node: cut off from everybody.
    pub cut: u8,
    pub crashes: u8,
    pub cuts: u8,
    pub moves: u8,
    pub requests: u8,
    pub broken: u8,
}

impl Slice {
    /// The node that is primary.
    pub fn primary(&self) -> usize {
        self.copies[0].node as usize
    }

    /// The copy of that node.
    pub fn copy_of(&self, node: usize) -> Copy {
        self.copies.into_iter().find(|copy| copy.node as usize == node && copy.state != 0).unwrap_or_default()
    }

    /// The members, as a mask.
    pub fn members(&self) -> u8 {
        self.copies.iter().filter(|copy| copy.state == 1).fold(0, |mask, copy| mask | 1 << copy.node)
    }
}

impl State {
    /// The map that a node acts on.
    pub fn map(&self, node: usize) -> &Map {
        &self.maps[self.nodes[node].adopted as usize]
    }

    /// The newest.
    pub fn newest_map(&self) -> &Map {
        &self.maps[self.newest as usize]
    }

    /// Whether a node can talk to others and to the manager.
    pub fn reachable(&self, node: usize) -> bool {
        self.nodes[node].up == 1 && self.cut as usize != node + 1
    }

    /// Who holds a lease of `node`, as a mask.
    pub fn granted(&self, node: usize) -> u8 {
        (0..self.count.into())
            .filter(|holder: &usize| self.nodes[*holder].leases[node] != 0)
            .fold(0, |mask, holder| mask | 1 << holder)
    }

    /// Brings it into its normal form.
    pub fn normalise(&mut self, rules: Rules) {
        for node in 0..self.count.into() {
            let map = *self.map(node);
            let primary_of: Vec<Slice> =
                map.slices.into_iter().filter(|slice| slice.primary() == node).collect();
            let own = &mut self.nodes[node];
            for lease in own.leases.iter_mut().filter(|lease| **lease != 0) {
                // Older than every epoch that it could be used for.
                let dead = primary_of.iter().all(|slice| *lease - 1 < slice.epoch);
                if primary_of.is_empty() || dead && rules.has(Rule::LeaseEpoch) {
                    *lease = 0;
                }
            }
        }
        for node in 0..self.count.into() {
            let granted = self.granted(node);
            self.nodes[node].waits &= granted;
            self.nodes[node].forgot &= granted;
        }
        self.settle_ask(rules);
        self.drop_unused_maps();
        self.renumber_versions();
        self.renumber_incarnations();
    }

    fn settle_ask(&mut self, rules: Rules) {
        let slice = self.newest_map().slices[self.ask.slice as usize];
        let over = rules.has(Rule::AskVersion) && slice.epoch != self.ask.epoch;
        if self.ask.active == 1 && (over || slice.copy_of(self.ask.peer as usize).state != 2) {
            self.ask = Ask::default();
        }
    }

    fn drop_unused_maps(&mut self) {
        let mut kept = 0;
        for index in 0..=self.newest {
            let used = index == self.newest
                || self.nodes[..self.count as usize].iter().any(|node| node.adopted == index);
            if !used {
                continue;
            }
            self.maps[kept] = self.maps[index as usize];
            for node in self.nodes.iter_mut().filter(|node| node.adopted == index) {
                node.adopted = kept as u8;
            }
            kept += 1;
        }
        self.newest = kept as u8 - 1;
        self.maps[kept..].fill(Map::default());
    }

    /// Versions that anybody knows, by rank: only their order means anything.
    fn renumber_versions(&mut self) {
        let mut known = 1u64;
        self.each_version(|version| known |= 1 << *version);
        self.each_version(|version| *version = (known & ((1 << *version) - 1)).count_ones() as u8);
    }

    fn each_version(&mut self, mut visit: impl FnMut(&mut u8)) {
        for map in &mut self.maps[..=self.newest as usize] {
            visit(&mut map.version);
            visit(&mut map.claim_since);
            map.slices.iter_mut().for_each(|slice| visit(&mut slice.epoch));
        }
        for node in &mut self.nodes {
            for lease in node.leases.iter_mut().filter(|lease| **lease != 0) {
                let mut version = *lease - 1;
                visit(&mut version);
                *lease = version + 1;
            }
            node.sent.iter_mut().filter(|sent| sent.to != 0).for_each(|sent| visit(&mut sent.epoch));
        }
        self.registered.iter_mut().for_each(|known| visit(&mut known.adopted));
        if self.ask.active == 1 {
            visit(&mut self.ask.epoch);
        }
    }

    fn renumber_incarnations(&mut self) {
        for node in 0..self.count.into() {
            let mut met = vec![self.nodes[node].incarnation];
            let mut number = |value: &mut u8| {
                let index = met.iter().position(|other| other == value).unwrap_or_else(|| {
                    met.push(*value);
                    met.len() - 1
                });
                *value = index as u8;
            };
            number(&mut self.nodes[node].incarnation);
            number(&mut self.registered[node].incarnation);
            let maps = self.maps[..=self.newest as usize].iter_mut();
            for copy in maps.flat_map(|map| &mut map.slices).flat_map(|slice| &mut slice.copies) {
                if copy.node as usize == node && copy.state != 0 {
                    number(&mut copy.incarnation);
                }
            }
            if self.ask.active == 1 && self.ask.peer as usize == node {
                number(&mut self.ask.incarnation);
            }
        }
    }
}
