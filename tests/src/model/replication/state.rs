//! One state of the replication model, and its normal form.
//!
//! Epochs, incarnations and messages have no numbers of their own: epochs are places among the maps
//! that somebody still acts on, incarnations are told apart and nothing else, messages are a sorted
//! bag. So the space closes although epochs grow without bound.

use super::register::Register;
use super::roster::{Registered, Roster};
use crate::model::rules::{Rule, Rules};
use zerocopy::{Immutable, IntoBytes};

/// Nodes at most.
pub const NODES: usize = 3;
/// Regions of the slice at most.
pub const REGIONS: usize = 2;
/// Maps at most that somebody acts on or asks about.
pub const ROSTERS: usize = 8;
/// Messages on their way at most.
pub const MESSAGES: usize = 10;
/// No value, no node.
pub const NONE: u8 = 255;

/// What a primary's range lock is held for.
pub mod work {
    /// Nothing.
    pub const IDLE: u8 = 0;
    /// A write; `done` once its own disk has it, `acks` of the others.
    pub const WRITE: u8 = 1;
    /// A copy to the node `target`.
    pub const COPY: u8 = 2;
    /// A CLEAR, until all of `acks` have answered.
    pub const CLEAR: u8 = 3;
    /// A disk write of a role that is over.
    pub const LATE: u8 = 4;
}

/// What a node does in one region.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Work {
    pub kind: u8,
    pub value: u8,
    pub done: u8,
    pub acks: u8,
    pub target: u8,
}

/// A node.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Node {
    pub up: u8,
    /// Its disk's attachment, and its process: equal or not to others of the node, nothing more.
    pub attach: u8,
    pub process: u8,
    /// The map that it acts on: an index into the rosters.
    pub adopted: u8,
    /// On the platter.
    pub durable: [u8; REGIONS],
    /// In the disk's volatile cache, or [`NONE`].
    pub cached: [u8; REGIONS],
    /// The dirty mask.
    pub dirty: u8,
    /// Dirty bits that are not durable: only while a rule of intents is switched off.
    pub dirty_soft: u8,
    /// It has no mask of the time since it left.
    pub blank: u8,
    pub work: [Work; REGIONS],
    /// As primary: open sessions, as a mask.
    pub sessions: u8,
    /// With whom masks were exchanged in this epoch.
    pub reconciled: u8,
    /// What is to be copied to each.
    pub to_copy: [u8; NODES],
    /// Their attachments at that time: only while a rule of reconciling is switched off.
    pub known_attach: [u8; NODES],
    /// Asked for as members (rule 6).
    pub joining: u8,
    /// A flush that runs: 1 a host's, 2 its own.
    pub flush: u8,
    pub flush_acks: u8,
    /// Regions with a write or copy since that flush began.
    pub flush_busy: u8,
    /// As secondary: 1 + the node whose session is open.
    pub accepted: u8,
    /// Leases that it holds, by grantor: 1 + the map that the grantor had adopted.
    pub leases: [u8; NODES],
    /// Holders of leases that it granted and waits for before it serves.
    pub waits: u8,
    /// Holders of leases of which it has lost its memory: only with the rule switched off.
    pub forgot: u8,
}

/// What a message says.
pub mod message {
    /// No message.
    pub const NOTHING: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const COPY: u8 = 2;
    pub const FLUSH: u8 = 3;
    pub const CLEAR: u8 = 4;
    /// Added to the above: its acknowledgement.
    pub const ACK: u8 = 4;
}

/// A message on its way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Message {
    pub kind: u8,
    pub from: u8,
    pub to: u8,
    pub region: u8,
    pub value: u8,
    /// Of a session, or an epoch, that is over at its receiver.
    pub old_session: u8,
    pub old_epoch: u8,
}

/// A request to make a copy a member, on its way to the manager.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Ask {
    pub active: u8,
    pub peer: u8,
    pub asker: u8,
    pub attach: u8,
    pub process: u8,
    pub epoch: u8,
}

/// A read that takes time: judged, then the disk is read, then it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct SlowRead {
    /// 1 + its node.
    pub node: u8,
    pub region: u8,
    /// What the disk had; [`NONE`] before.
    pub value: u8,
    /// Everything that the region may have contained since it began.
    pub allowed: u8,
}

/// How often what has happened.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Spent {
    pub writes: u8,
    pub crashes: u8,
    pub partitions: u8,
    pub moves: u8,
    pub flushes: u8,
    pub clears: u8,
    pub reads: u8,
    pub slow_reads: u8,
}

/// What went wrong within a step.
pub mod broken {
    pub const PROMOTED: u8 = 1;
    pub const READ: u8 = 2;
    pub const SLOW_READ: u8 = 3;
    pub const BOUND: u8 = 4;
}

/// All of it.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct State {
    pub rosters: [Roster; ROSTERS],
    pub newest: u8,
    pub registered: [Registered; NODES],
    pub nodes: [Node; NODES],
    pub net: [Message; MESSAGES],
    pub registers: [Register; REGIONS],
    pub ask: Ask,
    pub read: SlowRead,
    /// 0: none; 1 + node: cut off from the others; 1 + [`NODES`] + node: and from the manager.
    pub cut: u8,
    pub spent: Spent,
    /// A loss is in the map, and the primary that it left has yet to serve.
    pub lost: u8,
    pub broken: u8,
}

/// A set bit for each region.
pub fn bit(region: usize) -> u8 {
    1 << region
}

impl Node {
    /// What a read of its disk returns.
    pub fn content(&self, region: usize) -> u8 {
        if self.cached[region] == NONE { self.durable[region] } else { self.cached[region] }
    }

    /// Everything it knows to be dirty.
    pub fn all_dirty(&self) -> u8 {
        self.dirty | self.dirty_soft
    }

    /// Stores in the disk's cache.
    pub fn store(&mut self, region: usize, value: u8) {
        self.cached[region] = value;
    }

    /// Flushes the disk.
    pub fn flush_disk(&mut self) {
        for region in 0..REGIONS {
            self.durable[region] = self.content(region);
        }
        self.cached = [NONE; REGIONS];
        self.dirty |= std::mem::take(&mut self.dirty_soft);
    }

    /// Whether disk writes of an earlier role are under way.
    pub fn has_late_writes(&self) -> bool {
        self.work.iter().any(|work| work.kind == work::LATE)
    }

    /// Forgets everything that a primary keeps in memory; disk writes under way become late ones.
    pub fn step_down(&mut self) {
        for slot in &mut self.work {
            let late = slot.kind == work::LATE || slot.kind == work::WRITE && slot.done == 0;
            *slot = if late {
                Work { kind: work::LATE, value: slot.value, ..Work::default() }
            } else {
                Work::default()
            };
        }
        self.sessions = 0;
        self.reconciled = 0;
        self.to_copy = [0; NODES];
        self.known_attach = [0; NODES];
        self.joining = 0;
        self.flush = 0;
        self.flush_acks = 0;
        self.flush_busy = 0;
        self.leases = [0; NODES];
        self.waits = 0;
    }
}

impl State {
    /// The replica list that a node acts on.
    pub fn roster(&self, node: usize) -> &Roster {
        &self.rosters[self.nodes[node].adopted as usize]
    }

    /// The newest.
    pub fn newest_roster(&self) -> &Roster {
        &self.rosters[self.newest as usize]
    }

    /// Whether two nodes can talk.
    pub fn connected(&self, a: usize, b: usize) -> bool {
        let cut = if self.cut == 0 { NONE } else { (self.cut - 1) % NODES as u8 };
        a as u8 != cut && b as u8 != cut
    }

    /// Whether a node and the manager can talk.
    pub fn manages(&self, node: usize) -> bool {
        self.cut != (1 + NODES + node) as u8
    }

    /// Sends; the same message twice is one.
    pub fn send(&mut self, kind: u8, from: usize, to: usize, region: usize, value: u8) {
        let (from, to, region) = (from as u8, to as u8, region as u8);
        let message = Message { kind, from, to, region, value, ..Message::default() };
        if self.net.contains(&message) {
            return;
        }
        match self.net.iter_mut().find(|place| place.kind == message::NOTHING) {
            Some(place) => *place = message,
            None => self.broken = broken::BOUND,
        }
    }

    /// The messages to `node`, those that it takes as secondary or those as primary.
    pub fn messages_to(&mut self, node: usize, acks: bool) -> impl Iterator<Item = &mut Message> {
        self.net
            .iter_mut()
            .filter(move |message| message.kind != message::NOTHING && message.to as usize == node)
            .filter(move |message| (message.kind > message::ACK) == acks)
    }

    /// Ends a primary's session, as far as the primary is concerned.
    pub fn end_session(&mut self, primary: usize, peer: usize) {
        let node = &mut self.nodes[primary];
        node.sessions &= !(1 << peer);
        for slot in &mut node.work {
            if slot.kind == work::COPY && slot.target as usize == peer {
                *slot = Work::default();
            }
            if slot.kind == work::CLEAR {
                slot.acks &= !(1 << peer);
                if slot.acks == 0 {
                    *slot = Work::default();
                }
            }
        }
        for message in self.messages_to(primary, true).filter(|message| message.from as usize == peer) {
            message.old_session = 1;
        }
    }

    /// Ends what a secondary has accepted.
    pub fn close_accepted(&mut self, node: usize) {
        self.nodes[node].accepted = 0;
        for message in self.messages_to(node, false) {
            message.old_session = 1;
        }
    }

    /// Brings it into its normal form. Returns whether sessions ended: somebody may be waiting less.
    pub fn normalise(&mut self, rules: Rules, nodes: usize) {
        for primary in 0..nodes {
            for peer in 0..nodes {
                let open = self.nodes[primary].sessions >> peer & 1 == 1;
                if open && self.nodes[peer].accepted as usize != primary + 1 {
                    self.end_session(primary, peer);
                }
            }
        }
        for index in 0..MESSAGES {
            let message = self.net[index];
            let refused = message.old_session == 1 && rules.has(Rule::SessionFence)
                || message.old_epoch == 1 && rules.has(Rule::EpochFence);
            if message.kind != message::NOTHING && (refused || self.nodes[message.to as usize].up == 0) {
                self.net[index] = Message::default();
            }
        }
        self.net.sort_unstable_by(|a, b| b.cmp(a));
        self.settle_leases(rules, nodes);
        let epoch_over = rules.has(Rule::AskVersion) && self.ask.epoch != self.newest;
        let peer = self.ask.peer as usize;
        if self.ask.active == 1 && (epoch_over || self.newest_roster().state[peer] != super::roster::SYNCING)
        {
            self.ask = Ask::default();
        }
        self.renumber_epochs(nodes);
        self.renumber_incarnations(nodes);
        if self.read.node != 0 {
            self.read.allowed |= self.registers[self.read.region as usize].contents();
        }
    }

    /// Drops leases that nobody can use any more, and the waiting for them.
    fn settle_leases(&mut self, rules: Rules, nodes: usize) {
        for holder in 0..nodes {
            let adopted = self.nodes[holder].adopted + 1;
            let useless = self.roster(holder).primary() != holder;
            for lease in &mut self.nodes[holder].leases {
                if useless || rules.has(Rule::LeaseEpoch) && *lease < adopted {
                    *lease = 0;
                }
            }
        }
        for node in 0..nodes {
            let granted = self.granted(node, nodes);
            self.nodes[node].waits &= granted;
            self.nodes[node].forgot &= granted;
        }
    }

    /// Who holds a lease of `node`, as a mask.
    pub fn granted(&self, node: usize, nodes: usize) -> u8 {
        (0..nodes)
            .filter(|holder| self.nodes[*holder].leases[node] != 0)
            .fold(0, |mask, holder| mask | 1 << holder)
    }

    fn renumber_epochs(&mut self, nodes: usize) {
        let mut used = [false; ROSTERS];
        used[self.newest as usize] = true;
        for node in &self.nodes[..nodes] {
            used[node.adopted as usize] = true;
            node.leases
                .iter()
                .filter(|lease| **lease != 0)
                .for_each(|lease| used[*lease as usize - 1] = true);
        }
        if self.ask.active == 1 {
            used[self.ask.epoch as usize] = true;
        }
        let mut to = [0u8; ROSTERS];
        let mut count = 0;
        for epoch in 0..ROSTERS {
            to[epoch] = count as u8;
            if used[epoch] {
                self.rosters[count] = self.rosters[epoch];
                count += 1;
            }
        }
        self.rosters[count..].fill(Roster::default());
        self.newest = to[self.newest as usize];
        for node in &mut self.nodes[..nodes] {
            node.adopted = to[node.adopted as usize];
            for lease in node.leases.iter_mut().filter(|lease| **lease != 0) {
                *lease = 1 + to[*lease as usize - 1];
            }
        }
        if self.ask.active == 1 {
            self.ask.epoch = to[self.ask.epoch as usize];
        }
        // Contents of a map that nobody acts on say nothing: only its place does.
        for epoch in 0..count {
            let acted_on = self.nodes[..nodes].iter().any(|node| node.adopted as usize == epoch);
            if !acted_on && epoch != self.newest as usize {
                self.rosters[epoch] = Roster::default();
            }
        }
    }

    fn renumber_incarnations(&mut self, nodes: usize) {
        for node in 0..nodes {
            let mut attach = Numbers::default();
            let mut process = Numbers::default();
            attach.number(&mut self.nodes[node].attach);
            process.number(&mut self.nodes[node].process);
            attach.number(&mut self.registered[node].attach);
            process.number(&mut self.registered[node].process);
            for roster in self.rosters.iter_mut().filter(|roster| roster.state[node] != super::roster::ABSENT)
            {
                attach.number(&mut roster.attach[node]);
                process.number(&mut roster.process[node]);
            }
            if self.ask.active == 1 && self.ask.peer as usize == node {
                attach.number(&mut self.ask.attach);
                process.number(&mut self.ask.process);
            }
            for other in &mut self.nodes[..nodes] {
                if other.known_attach[node] != 0 {
                    attach.number(&mut other.known_attach[node]);
                }
            }
        }
    }
}

/// Numbers things in the order in which they are met, from 1.
#[derive(Default)]
struct Numbers {
    met: [u8; 16],
    count: usize,
}

impl Numbers {
    fn number(&mut self, value: &mut u8) {
        let index = self.met[..self.count].iter().position(|met| met == value).unwrap_or_else(|| {
            self.met[self.count] = *value;
            self.count += 1;
            self.count - 1
        });
        *value = index as u8 + 1;
    }
}
