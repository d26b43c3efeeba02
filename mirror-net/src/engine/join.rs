//! Becoming a member: a copy on which nothing is left that differs (docs/protocol.md rules 6 and 7).
//!
//! It takes over the dirty bits, is counted on from then on, flushes, and the manager is asked; before,
//! the manager was asked to let it get the writes at all.

use super::action::{Action, Report};
use super::op::Part;
use super::resync::{EXCHANGES, Stage, TRY_AGAIN};
use super::session::ASK_AGAIN;
use super::view::{PeerIndex, SpanView};
use super::{Device, Engine};
use crate::ids::{MapVersion, SlotIndex};
use crate::planted::{self, Bug};

/// A node whose copies become members: counted on, for spans up to that version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Joining {
    pub peer: PeerIndex,
    pub version: MapVersion,
    /// The manager was asked: only a later epoch takes it back (rule 6).
    pub asked: bool,
}

impl Engine {
    /// Whether that copy's acknowledgement, flush and lease are needed: it is a member, or may be made
    /// one at any moment (rule 6).
    pub(super) fn counts(&self, device: usize, span: &SpanView, peer: PeerIndex) -> bool {
        span.members.contains(&peer)
            || self.devices[device].joining.iter().any(|joining| {
                joining.peer == peer
                    && span.epoch.0 <= joining.version.0
                    && span.others.contains(&peer)
                    && !planted::is(Bug::JoiningUncounted)
            })
    }

    /// Those of a device's spans that this node serves and for which that peer's copy is needed.
    pub(super) fn counted_spans(&self, device: usize, peer: PeerIndex) -> impl Iterator<Item = &SpanView> {
        let spans = self.devices[device].view.spans.iter();
        spans.filter(move |span| span.serves() && self.counts(device, span, peer))
    }

    /// Whether that peer holds a syncing copy of some of what this node serves of a device.
    pub(super) fn has_syncing(&self, device: usize, peer: PeerIndex) -> bool {
        self.devices[device].view.spans.iter().any(|span| is_syncing(span, peer))
    }

    /// A node came back whose copies lack writes: the manager is asked to let them be filled. Only with
    /// a session, so that a copy which cannot be reached does not change its state over and over.
    pub(super) fn ask_syncing_if_due(&mut self, peer: PeerIndex) {
        let version = self.adopted_version();
        // If nothing is sent to it, what it owes is of before it was left behind.
        let hung_after = match self.gets_writes(peer) {
            true => self.tolerance.hung_after(),
            false => self.tolerance.slow_after,
        };
        let entry = &self.peers[peer];
        if !entry.is_open()
            || entry.lost.is_some()
            || entry.adopted() < version
            || entry.ask_syncing_after > self.now
            || entry.hold.left(self.now) > 0
            || entry.slow_for(self.now, hung_after).is_some()
        {
            return;
        }
        if self.leaves_out(peer) {
            self.peers[peer].ask_syncing_after = self.now + ASK_AGAIN;
            let peer = self.peers[peer].node;
            self.actions.push_back(Action::Report(Report::AskSyncing { peer, version }));
        }
    }

    /// Whether this node is primary of something that the peer has a stale copy of.
    fn leaves_out(&self, peer: PeerIndex) -> bool {
        let mut spans = self.devices.iter().flat_map(|device| &device.view.spans);
        spans.any(|span| span.serves() && span.stale.contains(&peer))
    }

    /// The losses of a peer that is there, and is left out for having been lost so often.
    pub(super) fn is_held_out(&self, peer: PeerIndex) -> Option<super::hold::Hold> {
        let entry = &self.peers[peer];
        let held = entry.is_open() && entry.hold.left(self.now) > 0 && self.leaves_out(peer);
        held.then_some(entry.hold)
    }

    /// Nothing is left that differs on that peer's copies of a device: on to the next stage.
    pub(super) fn advance(&mut self, device: usize, peer: PeerIndex) {
        let now = self.now;
        let Some(resync) = self.find_resync(device, peer) else { return };
        match resync.stage {
            Stage::Comparing if now >= resync.not_before => {
                // Writes that go on without that copy leave it behind when they end: it is too early.
                if !self.writes_without(device, peer) && self.has_adopted_all(device, peer) {
                    self.unite_again(device, peer, 0, 0);
                }
            }
            Stage::Uniting { next, pending } => self.unite_again(device, peer, next, pending),
            Stage::Joining { asked } if now >= asked + ASK_AGAIN => self.ask_in_sync(device, peer),
            Stage::Comparing | Stage::Flushing | Stage::Joining { .. } => {}
        }
    }

    /// Rule 7: the copy takes over what is dirty here, durably. One pass is enough: bits that are set
    /// behind it belong to writes that the copy gets too, and sets bits for.
    fn unite_again(&mut self, device: usize, peer: PeerIndex, mut next: u32, mut pending: u32) {
        let slices = self.devices[device].adopted_slices();
        while pending < EXCHANGES && next < slices {
            let slice = next;
            let entry = &self.devices[device].slices[slice as usize];
            if is_syncing(self.devices[device].view.span(slice), peer)
                && let Some((disk, slot)) = entry.place
            {
                let behind = entry.behind.iter().find(|behind| behind.peer == peer);
                let united = behind.map_or(0, |behind| behind.united);
                if self.disks[disk].journal.masks(SlotIndex(slot)).dirty & !united != 0 {
                    if !self.send_unite(device, slice, peer, true) {
                        break;
                    }
                    pending += 1;
                }
            }
            next += 1;
        }
        let whole = next >= slices;
        if let Some(resync) = self.find_resync(device, peer) {
            resync.stage = Stage::Uniting { next, pending };
        }
        if whole && pending == 0 {
            self.count_on(device, peer);
        }
    }

    /// Whether the peer knows every span of the device that it is syncing.
    fn has_adopted_all(&self, device: usize, peer: PeerIndex) -> bool {
        let adopted = self.peers[peer].adopted().0;
        let mut syncing = self.devices[device].view.spans.iter().filter(|span| is_syncing(span, peer));
        syncing.all(|span| span.epoch.0 <= adopted)
    }

    /// Whether a write is in flight that this copy does not get: it would be behind when that ends.
    fn writes_without(&self, device: usize, peer: PeerIndex) -> bool {
        self.ops.values().any(|op| {
            op.device == device
                && op.kind.stores()
                && op.begun()
                && is_syncing(self.devices[device].view.span(op.slice), peer)
                && !(op.part == Part::Primary && op.legs.includes(peer))
        })
    }

    /// From here on the copy is treated as a member.
    fn count_on(&mut self, device: usize, peer: PeerIndex) {
        let version = self.adopted_version();
        self.devices[device].joining.retain(|joining| joining.peer != peer);
        self.devices[device].joining.push(Joining { peer, version, asked: false });
        if let Some(resync) = self.find_resync(device, peer) {
            resync.stage = Stage::Flushing;
        }
        if planted::is(Bug::JoinedUnflushed) {
            self.joining_flushed(device, peer, true);
        } else {
            self.flush_joining(device, peer);
        }
    }

    /// Its flush ended.
    pub(super) fn joining_flushed(&mut self, device: usize, peer: PeerIndex, flushed: bool) {
        let now = self.now;
        let Some(resync) = self.find_resync(device, peer).filter(|resync| resync.stage == Stage::Flushing)
        else {
            return;
        };
        if flushed && resync.left == 0 && resync.unknown == 0 {
            self.ask_in_sync(device, peer);
        } else {
            resync.stage = Stage::Comparing;
            resync.not_before = now + TRY_AGAIN;
            self.devices[device].joining.retain(|joining| joining.peer != peer || joining.asked);
        }
    }

    fn ask_in_sync(&mut self, device: usize, peer: PeerIndex) {
        let now = self.now;
        if let Some(resync) = self.find_resync(device, peer) {
            resync.stage = Stage::Joining { asked: now };
        }
        let entry = &mut self.devices[device];
        let Some(joining) = entry.joining.iter_mut().find(|joining| joining.peer == peer) else { return };
        joining.asked = true;
        let (version, id) = (joining.version, entry.view.id);
        let node = self.peers[peer].node;
        self.actions.push_back(Action::Report(Report::AskInSync { peer: node, device: id, version }));
    }

    /// A node stays counted on as long as a span of before is still syncing there.
    pub(super) fn fit_joining(&mut self, device: usize) {
        let Self { devices, .. } = self;
        let Device { view, joining, .. } = &mut devices[device];
        joining.retain(|joining| {
            view.spans.iter().any(|span| {
                span.serves()
                    && span.epoch.0 <= joining.version.0
                    && span.others.contains(&joining.peer)
                    && !span.members.contains(&joining.peer)
            })
        });
    }
}

/// Whether that peer holds a syncing copy of what this node serves.
pub(super) fn is_syncing(span: &SpanView, peer: PeerIndex) -> bool {
    span.serves() && span.others.contains(&peer) && !span.members.contains(&peer)
}
