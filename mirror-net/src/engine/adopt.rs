//! Adopting a map: what it takes away is left first, then slots and epochs become durable, then everything
//! in flight is fitted to it.
//!
//! A copy that the map drops is left before the map is adopted as a whole, since its slot may be the only
//! one for a copy that the map adds. To stop early is always safe: nobody counts on the copy any more.

use super::action::{Action, OpKey, Report};
use super::loss::Unflushed;
use super::op::{Legs, Local, Part};
use super::session::Peer;
use super::view::{DeviceView, PeerIndex, SpanView, Viewer};
use super::{Engine, Nanos};
use crate::format::alloc::Segment;
use crate::format::journal::Ticket;
use crate::ids::{DiskId, ExporterSession, Incarnation, MapVersion, SliceIndex};
use crate::map::DistributionMap;
use crate::planted::{self, Bug};
use crate::wire::header::Status;
use std::sync::Arc;

/// A map whose slots and epochs are on their way to the disks.
#[derive(Debug)]
pub(super) struct Adoption {
    map: Arc<DistributionMap>,
    views: Vec<DeviceView>,
    /// For each disk, what must be durable; `None` while slots are awaited that are still in use.
    tickets: Option<Vec<Ticket>>,
}

impl Adoption {
    pub fn map(&self) -> &Arc<DistributionMap> {
        &self.map
    }
}

/// Whether a peer that was lost before this change of a device's view still has to be recorded stale.
///
/// A member that joins now was stale in between, in a map that this node need not have seen. One that
/// was joining before may be joining still.
fn still_counts_on(peer: PeerIndex, before: &DeviceView, after: &DeviceView) -> bool {
    after.spans.iter().filter(|span| span.serves() && span.others.contains(&peer)).any(|span| {
        let overlaps = |old: &&SpanView| old.first < span.end && span.first < old.end;
        let mut old = before.spans.iter().filter(overlaps);
        let joined_before = |old: &SpanView| old.others.contains(&peer) && !old.members.contains(&peer);
        span.members.contains(&peer) || old.any(|old| old.serves() && joined_before(old))
    })
}

/// Why a map is not adopted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AdoptError {
    #[error("the map is of another cluster")]
    OtherCluster,
    #[error("{disk} has no free slot in its {segment:?} segment for {device} {slice}")]
    NoSlot { disk: DiskId, segment: Segment, device: crate::ids::DeviceId, slice: SliceIndex },
    #[error("the map is invalid: {0}")]
    Invalid(#[from] crate::map::validate::InvalidMap),
}

impl Engine {
    /// Begins to adopt a map. Older ones than the newest are ignored; when it is done, peers and
    /// the manager are told ([`Report::Adopted`]).
    ///
    /// # Errors
    /// The map is refused and the one before stays, if this node cannot store what it says.
    pub fn handle_map(&mut self, now: Nanos, map: Arc<DistributionMap>) -> Result<(), AdoptError> {
        self.now = now;
        map.validate()?;
        if self.map.as_ref().is_some_and(|mine| mine.cluster != map.cluster) {
            return Err(AdoptError::OtherCluster);
        }
        let newest = self
            .next_map
            .as_ref()
            .or(self.adopting.as_ref().map(|adoption| &adoption.map))
            .or(self.map.as_ref());
        if newest.is_none_or(|newest| newest.version < map.version) {
            if self.adopting.is_some() {
                // One at a time: their epochs share the slots' records.
                self.next_map = Some(map);
            } else {
                self.begin_adoption(map)?;
            }
        }
        self.settle();
        Ok(())
    }

    /// The version that this node acts on.
    pub fn adopted_version(&self) -> MapVersion {
        self.map.as_ref().map_or(MapVersion(0), |map| map.version)
    }

    /// The newest map version by which anything is left out here: that of the map being adopted, if one is.
    pub(super) fn fitted_version(&self) -> MapVersion {
        self.adopting.as_ref().map_or_else(|| self.adopted_version(), |adoption| adoption.map.version)
    }

    fn begin_adoption(&mut self, map: Arc<DistributionMap>) -> Result<(), AdoptError> {
        for node in &map.nodes {
            if node.id != self.me && self.peer_index(node.id).is_none() {
                let id = usize::from(node.id.0);
                self.by_node.resize(self.by_node.len().max(id + 1), None);
                self.by_node[id] = Some(self.peers.len());
                self.peers.push(Peer::new(node.id, self.now));
            }
        }
        let disks: Vec<(DiskId, Incarnation)> = self
            .disks
            .iter()
            .map(|disk| (disk.id, Incarnation { attach: disk.attach, process: self.process }))
            .collect();
        let viewer = Viewer { me: self.me, disks: &disks, peers: &self.by_node };
        let listed = map.devices.iter().map(|device| viewer.device(&map, device));
        let views: Vec<DeviceView> = listed.chain(self.buried(&map)).collect();
        self.find_devices(&views);
        self.check_room(&views)?;
        if self.map.is_none() {
            self.leave_forgotten_slots(map.version);
        }
        self.store_all();
        self.withdraw(&views);
        self.adopting = Some(Adoption { map, views, tickets: None });
        self.place_adopted();
        Ok(())
    }

    /// Views of devices that a map does not list any more: nobody serves them, nobody exports them.
    fn buried(&self, map: &DistributionMap) -> Vec<DeviceView> {
        let gone = self.devices.iter().filter(|device| map.device(device.view.id).is_none());
        gone.filter(|device| !device.view.gone).map(|device| device.view.buried(map.version)).collect()
    }

    /// Gives copies that are new here their slots, if all that are needed are free by now.
    pub(super) fn place_adopted(&mut self) {
        let Some(mut adoption) = self.adopting.take_if(|adoption| adoption.tickets.is_none()) else { return };
        if self.is_room(&adoption.views) {
            adoption.views.iter().for_each(|view| self.place_device(view));
            adoption.tickets = Some(self.disks.iter().map(|disk| disk.journal.last_ticket()).collect());
        }
        self.adopting = Some(adoption);
        self.adoption_durable();
    }

    /// Leaves the copies that new views do not list here any more: they are fitted to those already.
    fn withdraw(&mut self, views: &[DeviceView]) {
        self.refitting = true;
        let mut changed = Vec::new();
        for view in views {
            let Some(index) = self.by_device.get(&view.id).copied() else { continue };
            let Some(reduced) = self.devices[index].view.without_copies_left_by(view) else { continue };
            let before = std::mem::replace(&mut self.devices[index].view, reduced);
            self.note_losses(index);
            self.restart_clearing(index);
            self.fit_resync(index, &before, false);
            changed.push(index);
        }
        if changed.is_empty() {
            self.refitting = false;
            return;
        }
        self.leave_slots(&changed);
        self.fit_operations();
        self.resume_under_new_views(&changed);
    }

    /// What waited under the views before may go on, or ends.
    fn resume_under_new_views(&mut self, changed: &[usize]) {
        for device in changed {
            self.restart_flushes(*device);
            self.restart_export_flushes(*device);
        }
        self.refitting = false;
        self.reroute_forwarded();
        for peer in 0..self.peers.len() {
            self.resume_after(peer);
        }
        self.retry_parked();
        self.retry_unreconciled();
    }

    /// Makes the map effective once everything it needs is durable.
    pub(super) fn adoption_durable(&mut self) {
        let durable = |adoption: &mut Adoption| {
            let Some(tickets) = &adoption.tickets else { return false };
            // Nor does what cannot be stored: that copy serves nothing either.
            let staged = |op: &super::op::Op| op.staged.is_some() && !self.disks[op.disk].failed;
            if !self.staging.is_empty() && self.ops.values().any(staged) {
                return false;
            }
            let mut disks = self.disks.iter().zip(tickets);
            // A failed disk's copies serve nothing; it holds up nobody else.
            disks.all(|(disk, ticket)| disk.journal.durable_ticket() >= *ticket || disk.failed)
                || planted::is(Bug::EpochVolatile)
        };
        let Some(adoption) = self.adopting.take_if(durable) else { return };
        self.make_effective(adoption);
        if let Some(next) = self.next_map.take()
            && let Err(error) = self.begin_adoption(next)
        {
            self.refused_map = Some(error);
        }
    }

    fn make_effective(&mut self, adoption: Adoption) {
        self.refitting = true;
        let consecutive = self.adopted_version().0 + 1 == adoption.map.version.0;
        let mut took_over = false;
        let mut changed = Vec::new();
        let mut counted = vec![false; self.peers.len()];
        for view in adoption.views {
            let Some(index) = self.by_device.get(&view.id).copied() else { continue };
            let before = std::mem::replace(&mut self.devices[index].view, view);
            if before.claim.generation != self.devices[index].view.claim.generation {
                // Sessions are compared among those of one claim: another exporter's may be older.
                self.devices[index].exporter_session = ExporterSession(0);
                self.devices[index].unflushed = Unflushed::default();
            }
            self.note_losses(index);
            let view = &self.devices[index].view;
            for peer in view.spans.iter().filter(|span| span.serves()).flat_map(|span| &span.others) {
                counted[*peer] = counted[*peer] || still_counts_on(*peer, &before, view);
            }
            let serves_more = view.spans.iter().filter(|span| span.serves()).any(|span| {
                // A slice that was not ours to serve until now may be under somebody's read lease.
                let mut old = before.spans.iter().filter(|old| old.first < span.end && span.first < old.end);
                before.spans.is_empty() || old.any(|old| !old.serves())
            });
            took_over |= serves_more && (before.mirrored || view.mirrored);
            let same =
                before.spans.iter().map(|span| span.epoch).eq(view.spans.iter().map(|span| span.epoch));
            if !same || before.claim != view.claim {
                changed.push(index);
            }
            if !same {
                self.restart_clearing(index);
            }
            self.fit_resync(index, &before, consecutive);
        }
        self.map = Some(adoption.map);
        if took_over {
            self.await_leases();
        }
        self.fit_operations();
        for (peer, counted) in counted.into_iter().enumerate() {
            // The map does not count any more on what it had then: its absence is on record.
            if !counted {
                self.peers[peer].lost = None;
            }
            self.check_incarnation(peer);
            self.open_if_quiet(peer);
            self.send_adopted(peer);
            self.ping_soon(peer);
        }
        self.resume_under_new_views(&changed);
        self.unreported = Some(self.adopted_version());
    }

    /// Rule 13: whoever we granted a lease to may still be reading what came to us, unless it has adopted the
    /// map that took it away; with that it gave the lease back (rule 12).
    fn await_leases(&mut self) {
        self.took_over = self.adopted_version();
        self.serve_after = self.leases_end();
    }

    /// A peer may have given its lease back. A wait only ever becomes shorter: what was granted since is
    /// for what that peer serves itself.
    pub(super) fn shorten_wait(&mut self) {
        self.serve_after = self.serve_after.min(self.leases_end());
    }

    fn leases_end(&self) -> Nanos {
        if planted::is(Bug::LeaseNotAwaited) {
            return 0;
        }
        let reading = self.peers.iter().filter(|peer| peer.adopted() < self.took_over);
        reading.map(Peer::granted_until).max().unwrap_or(0)
    }

    /// Operations in flight go on under the new epoch, or end because they are not ours any more.
    fn fit_operations(&mut self) {
        let keys: Vec<OpKey> = self.ops.keys().collect();
        for key in keys {
            let Some(op) = self.ops.get(key) else { continue };
            let view = &self.devices[op.device].view;
            let span = view.span(op.slice);
            if op.part == Part::Secondary {
                let ours = span.epoch == op.epoch;
                if !ours && op.local == Local::Idle {
                    self.doom(key, Status::Fenced);
                }
                continue;
            }
            if op.kind.is_upkeep() {
                if span.epoch != op.epoch || !span.serves() {
                    self.doom(key, Status::Fenced);
                }
                continue;
            }
            let begun = op.begun();
            if op.claim != view.claim.generation.0 && !begun {
                self.doom(key, Status::ClaimLost);
                continue;
            }
            if span.epoch == op.epoch {
                continue;
            }
            if !span.serves() {
                self.doom(key, Status::Fenced);
                continue;
            }
            let legs = if begun { Legs::new(&span.others, &span.members, &op.legs) } else { Legs::NONE };
            let epoch = span.epoch;
            let op = &mut self.ops[key];
            op.epoch = epoch;
            op.legs = legs;
            self.progress(key);
        }
    }

    /// Tells the manager, once no write of an older claim is under way (rule 15).
    pub(super) fn report_adoption_if_drained(&mut self) {
        let Some(version) = self.unreported else { return };
        let older = self.ops.values().any(|op| {
            let claim = self.devices[op.device].view.claim.generation.0;
            op.part == Part::Primary && !op.kind.is_upkeep() && op.claim < claim
        });
        if !older || planted::is(Bug::ClaimUndrained) {
            self.unreported = None;
            self.actions.push_back(Action::Report(Report::Adopted { version }));
        }
    }
}
