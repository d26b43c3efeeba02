//! Questions of primaries that wait for their turn, since one change is stored at a time.

use super::join::{ask_in_sync, ask_syncing};
use super::registry::Registry;
use super::stale::{ask_slow, ask_stale};
use super::{Change, ConnectionId};
use crate::ids::{DeviceId, MapVersion, NodeId};
use crate::map::DistributionMap;
use std::collections::VecDeque;

/// What a primary asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// To go on without the peer, and why.
    Stale { cause: String },
    /// To go on without the peer, whose disks hang, and why.
    Slow { cause: String },
    /// To have the peer's stale copies back.
    Syncing,
    /// To count the peer's copies of a device as members.
    InSync { device: DeviceId },
}

/// A question of a primary about the copies of one peer.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) connection: ConnectionId,
    pub(super) peer: NodeId,
    /// The map on which the asker acts.
    pub(super) version: MapVersion,
    pub(super) wish: Wish,
}

impl Ask {
    /// Whether it is the same question, asked again.
    fn repeats(&self, other: &Self) -> bool {
        let same = match (&self.wish, &other.wish) {
            (Wish::Stale { .. }, Wish::Stale { .. }) | (Wish::Slow { .. }, Wish::Slow { .. }) => true,
            (wish, other) => wish == other,
        };
        same && (self.connection, self.peer) == (other.connection, other.peer)
    }

    /// What is to be done; empty if there is nothing.
    pub(super) fn change(
        &self,
        map: &DistributionMap,
        registry: &Registry,
        now_ms: u64,
        asker: NodeId,
    ) -> Change {
        let (peer, version) = (self.peer, self.version);
        match &self.wish {
            Wish::Stale { .. } => ask_stale(map, registry, now_ms, asker, peer, version),
            Wish::Slow { .. } => ask_slow(map, registry, now_ms, asker, peer, version),
            Wish::Syncing => ask_syncing(map, registry, now_ms, asker, peer, version),
            Wish::InSync { device } => ask_in_sync(map, registry, now_ms, asker, (peer, *device), version),
        }
    }

    /// `to have n2's copies recorded stale: no answer`, for the log.
    pub(super) fn text(&self, map: &DistributionMap) -> String {
        let peer = map.node_name(self.peer);
        match &self.wish {
            Wish::Stale { cause } => format!("to have {peer}'s copies recorded stale: {cause}"),
            Wish::Slow { cause } => format!("to go on without {peer}: {cause}"),
            Wish::Syncing => format!("to have {peer}'s stale copies synced"),
            Wish::InSync { device } => {
                let device = map.device(*device).map_or_else(|| device.to_string(), |it| it.name.clone());
                format!("to have {peer}'s copies of {device} in sync")
            }
        }
    }
}

/// The questions that have not been decided, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Asks {
    waiting: VecDeque<Ask>,
}

impl Asks {
    /// Adds a question; asked again before it was decided, it is the same one.
    pub(super) fn push(&mut self, ask: Ask) {
        self.waiting.retain(|other| !other.repeats(&ask));
        self.waiting.push_back(ask);
    }

    /// Takes the next one.
    pub(super) fn pop(&mut self) -> Option<Ask> {
        self.waiting.pop_front()
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}
