//! The slice's replica list, and who decides about it.

use super::state::{NODES, NONE};
use crate::model::manager::{self, Heard, Question, decide, disk_id, index_of};
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{ClaimGeneration, LossGeneration, MapVersion, NodeId, SliceEpoch, SliceIndex};
use mirror_net::map::{Claim, Replica, ReplicaState, Span};
use std::cell::RefCell;
use std::collections::HashMap;
use zerocopy::{Immutable, IntoBytes};

/// A node that is not in the list.
pub const ABSENT: u8 = 0;
/// [`ReplicaState::InSync`].
pub const IN_SYNC: u8 = 1;
/// [`ReplicaState::Syncing`].
pub const SYNCING: u8 = 2;
/// [`ReplicaState::Stale`].
pub const STALE: u8 = 3;

/// One span of the map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct Roster {
    /// Nodes in the order of the list; [`NONE`] after its end.
    pub order: [u8; NODES],
    /// By node.
    pub state: [u8; NODES],
    /// By node: the incarnation under which it became so.
    pub attach: [u8; NODES],
    /// By node.
    pub process: [u8; NODES],
    /// The loss generation, as a bit: it is compared with the one before only.
    pub loss: u8,
}

impl Roster {
    /// Its first.
    pub fn primary(&self) -> usize {
        self.order[0] as usize
    }

    /// All but `node` that get every write, as a mask: members and syncing ones.
    pub fn others(&self, node: usize) -> u8 {
        self.mask(|state| state == IN_SYNC || state == SYNCING) & !(1 << node)
    }

    /// The members, as a mask.
    pub fn members(&self) -> u8 {
        self.mask(|state| state == IN_SYNC)
    }

    fn mask(&self, wanted: impl Fn(u8) -> bool) -> u8 {
        (0..NODES).filter(|node| wanted(self.state[*node])).fold(0, |mask, node| mask | 1 << node)
    }
}

/// What the manager has registered of a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Registered {
    pub attach: u8,
    pub process: u8,
    pub connected: u8,
}

type Asked = (Roster, [Registered; NODES], Question);

/// The shipped manager, and what it has been asked already.
#[derive(Default)]
pub struct Answers(RefCell<HashMap<Asked, Option<Roster>>>);

/// The version at which every question is asked: the epochs of a model are relative.
const BASE: u64 = 10;

impl Answers {
    /// What becomes of the list.
    pub fn ask(&self, roster: &Roster, registered: &[Registered], question: Question) -> Option<Roster> {
        let mut key = [Registered::default(); NODES];
        key[..registered.len()].copy_from_slice(registered);
        let asked = (*roster, key, question);
        if let Some(answer) = self.0.borrow().get(&asked) {
            return *answer;
        }
        let answer = ask(roster, registered, question);
        self.0.borrow_mut().insert(asked, answer);
        answer
    }
}

fn ask(roster: &Roster, registered: &[Registered], question: Question) -> Option<Roster> {
    let claim = Claim { node: NodeId(1), generation: ClaimGeneration(1), since: MapVersion(1) };
    let map = manager::map_of(registered.len(), MapVersion(BASE), claim, vec![span_of(roster)]);
    let heard: Vec<Heard> = registered
        .iter()
        .map(|node| Heard {
            incarnation: manager::incarnation(node.attach, node.process),
            connected: node.connected == 1,
            adopted: MapVersion(BASE),
        })
        .collect();
    let next = decide(&map, &heard, question)?;
    let span = &next.devices[0].spans[0];
    (span.epoch != SliceEpoch(BASE)).then(|| roster_of(span))
}

fn span_of(roster: &Roster) -> Span {
    let listed = roster.order.iter().filter(|node| **node != NONE).map(|node| *node as usize);
    let replica = |node: usize| Replica {
        disk: disk_id(node),
        segment: Segment::Primary,
        added: MapVersion(BASE),
        state: match roster.state[node] {
            IN_SYNC => ReplicaState::InSync,
            SYNCING => ReplicaState::Syncing,
            _ => ReplicaState::Stale,
        },
        incarnation: manager::incarnation(roster.attach[node], roster.process[node]),
    };
    Span {
        first: SliceIndex(0),
        count: 1,
        epoch: SliceEpoch(BASE),
        loss: LossGeneration(roster.loss.into()),
        primary_since: MapVersion(0),
        replicas: listed.map(replica).collect(),
    }
}

fn roster_of(span: &Span) -> Roster {
    let mut roster = Roster { order: [NONE; NODES], ..Roster::default() };
    for (place, replica) in span.replicas.iter().enumerate() {
        let node = index_of(replica.disk);
        roster.order[place] = node as u8;
        roster.state[node] = match replica.state {
            ReplicaState::InSync => IN_SYNC,
            ReplicaState::Syncing => SYNCING,
            ReplicaState::Stale => STALE,
        };
        roster.attach[node] = replica.incarnation.attach.0 as u8;
        roster.process[node] = replica.incarnation.process.0 as u8;
    }
    roster.loss = span.loss.0 as u8;
    roster
}
