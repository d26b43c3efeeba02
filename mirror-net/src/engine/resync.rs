//! Resync: which regions of which copies may differ from this node's, and how they become equal again.
//!
//! For every slice that this node is primary of and every other copy that gets its writes, the engine
//! knows which regions may differ ([`Behind`]): none, once they have been compared, but what a write
//! did here that was not acknowledged there. It starts from not knowing, whenever this node's role or
//! that copy's place in the list is new, or the copy's disk was attached again; then the two masks are
//! united (PROTOCOL.md rule 11) and the union is compared, region by region (`copy`).
//!
//! What is known outlives a lost session, since every write that was not acknowledged there is
//! noted when it ends here: the same primary process and the same attachment go on where they were.
//!
//! A syncing copy with nothing left is made a member (rules 6 and 7): it takes over the dirty bits, is
//! counted on from then on, flushes, and the manager is asked.

use super::action::{Action, Body, OpKey, Report};
use super::op::{Op, OpKind, Origin, Part};
use super::session::Awaited;
use super::view::{DeviceView, PeerIndex, SpanView};
use super::{Engine, Nanos};
use crate::control::ResyncReport;
use crate::format::journal::Change;
use crate::ids::{MapVersion, SliceEpoch, SlotIndex};
use crate::planted::{self, Bug};
use crate::region::masks::{RegionMasks, touched};
use crate::wire::header::{BadFrame, Header, Kind, Status};
use std::collections::VecDeque;

/// Exchanges of masks under way with one copy of a device, at most.
const EXCHANGES: u32 = 32;
/// Between two requests to the manager for the same thing.
const ASK_AGAIN: Nanos = 1_000_000_000;
/// Regions that could not be copied are tried again after so long.
const TRY_AGAIN: Nanos = 1_000_000_000;
/// While hosts' requests were seen within so long, regions are copied one at a time.
const YIELD: Nanos = 20_000_000;

/// What may differ between this node's copy of a slice and another's.
#[derive(Debug)]
pub(super) struct Behind {
    pub peer: PeerIndex,
    /// Its masks were asked for and are united with ours; until then all may differ.
    known: bool,
    asked: bool,
    /// Regions that may differ, if that is known.
    regions: u64,
    /// Those that are being copied.
    copying: u64,
    /// Those that could not be copied, and are tried again later.
    failed: u64,
    /// What it had readable when it was asked.
    pub readable: u64,
    /// Dirty bits of ours that it has taken over durably.
    united: u64,
}

impl Behind {
    fn unknown(peer: PeerIndex) -> Self {
        Self { peer, known: false, asked: false, regions: 0, copying: 0, failed: 0, readable: 0, united: 0 }
    }

    fn may_differ(&self) -> u64 {
        if self.known { self.regions } else { u64::MAX }
    }
}

/// How far another node's copies of a device are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Masks are exchanged, regions compared.
    Comparing,
    /// Nothing differs; the syncing copies take over our dirty bits, slice by slice. So many answers are
    /// awaited.
    Uniting { next: u32, pending: u32 },
    /// They are counted on, and flush.
    Flushing,
    /// The manager is asked, last at that time.
    Joining { asked: Nanos },
}

/// One device's copies on one other node, being made equal.
#[derive(Debug)]
pub(super) struct Resync {
    pub device: usize,
    pub peer: PeerIndex,
    stage: Stage,
    /// Slices whose masks are not known, and exchanges under way.
    unknown: u32,
    exchanges: u32,
    /// Regions that may differ, of slices whose masks are known.
    left: u64,
    /// Where to look for the next slice to exchange masks of, and to copy.
    next_exchange: u32,
    next_copy: u32,
    /// Slices and regions that somebody waits for.
    urgent: VecDeque<(u32, u32)>,
    copies: u32,
    /// Nothing is tried before.
    not_before: Nanos,
    /// When regions that failed are tried again.
    retry_at: Option<Nanos>,
    /// Regions found to be compared, and compared since.
    total: u64,
    compared: u64,
    /// Bytes sent because they differed.
    pub moved: u64,
    rate: Rate,
}

/// Regions a second over the last while.
#[derive(Default, Debug)]
struct Rate {
    since: Nanos,
    compared: u64,
    per_second: f64,
}

impl Rate {
    const PERIOD: Nanos = 1_000_000_000;

    fn tick(&mut self, now: Nanos, compared: u64) {
        if self.since == 0 || compared < self.compared {
            (self.since, self.compared) = (now, compared);
        } else if now >= self.since + Self::PERIOD {
            let seconds = (now - self.since) as f64 / 1e9;
            let recent = (compared - self.compared) as f64 / seconds;
            // Half of it is what was before: a rate that jumps is of no use to people.
            self.per_second = if self.per_second == 0.0 { recent } else { (self.per_second + recent) / 2.0 };
            (self.since, self.compared) = (now, compared);
        }
    }
}

/// A question for a copy's masks of one slice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Exchange {
    device: usize,
    slice: u32,
    epoch: SliceEpoch,
    /// The bits sent.
    dirty: u64,
    /// Only to make it take over our bits.
    again: bool,
}

/// A node whose copies become members: counted on, for spans up to that version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Joining {
    pub peer: PeerIndex,
    version: MapVersion,
    /// The manager was asked: only a later epoch takes it back (rule 6).
    asked: bool,
}

impl Engine {
    // ---- what may differ ----

    /// Regions of a slice that may differ on that copy.
    fn may_differ(&self, device: usize, slice: u32, peer: PeerIndex) -> u64 {
        let behind = &self.devices[device].slices[slice as usize].behind;
        behind.iter().find(|behind| behind.peer == peer).map_or(0, Behind::may_differ)
    }

    /// Regions that may not be read yet: not known to be equal on every copy that is counted on (rule 11).
    pub(super) fn unreconciled(&self, device: usize, slice: u32) -> u64 {
        let entry = &self.devices[device];
        let behind = &entry.slices[slice as usize].behind;
        if behind.is_empty() {
            return 0;
        }
        let span = entry.view.span(slice);
        let counted = behind.iter().filter(|behind| self.counts(device, span, behind.peer));
        counted.fold(0, |regions, behind| regions | behind.may_differ())
    }

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

    /// Something was done here that is not known to have been done there.
    pub(super) fn note_behind(&mut self, device: usize, slice: u32, peer: PeerIndex, regions: u64) {
        self.resync_due = true;
        let index = self.resync_of(device, peer);
        let entries = &mut self.devices[device].slices[slice as usize].behind;
        let resync = &mut self.resyncs[index];
        match entries.iter_mut().find(|behind| behind.peer == peer) {
            Some(behind) if behind.known => {
                let new = u64::from((regions & !behind.regions).count_ones());
                behind.regions |= regions;
                resync.left += new;
                resync.total += new;
            }
            // All of it may differ already.
            Some(_) => {}
            None => {
                let new = u64::from(regions.count_ones());
                // What it has readable is unknown: comparing finds out.
                let behind = Behind { known: true, regions, readable: u64::MAX, ..Behind::unknown(peer) };
                entries.push(behind);
                resync.left += new;
                resync.total += new;
            }
        }
    }

    /// A primary's or an earlier secondary's operation ends: copies that do not have it are behind.
    pub(super) fn note_missed(&mut self, op: &Op) {
        let view = &self.devices[op.device].view;
        if op.slice >= view.slices || !op.kind.stores() || !op.begun() || planted::is(Bug::MissedUnnoted) {
            return;
        }
        let span = view.span(op.slice);
        let mine = match op.part {
            Part::Primary => true,
            // What an earlier primary sent was perhaps sent to nobody else.
            Part::Secondary => span.epoch != op.epoch,
        };
        if !mine || !span.serves() || span.others.iter().all(|peer| op.legs.is_acknowledged(*peer)) {
            return;
        }
        let missed: Vec<PeerIndex> =
            span.others.iter().copied().filter(|peer| !op.legs.is_acknowledged(*peer)).collect();
        let regions = touched(op.offset, op.length, self.region_bytes());
        for peer in missed {
            self.note_behind(op.device, op.slice, peer, regions);
        }
    }

    fn resync_of(&mut self, device: usize, peer: PeerIndex) -> usize {
        let found = self.resyncs.iter().position(|resync| resync.device == device && resync.peer == peer);
        found.unwrap_or_else(|| {
            self.resyncs.push(Resync {
                device,
                peer,
                stage: Stage::Comparing,
                unknown: 0,
                exchanges: 0,
                left: 0,
                next_exchange: 0,
                next_copy: 0,
                urgent: VecDeque::new(),
                copies: 0,
                not_before: 0,
                retry_at: None,
                total: 0,
                compared: 0,
                moved: 0,
                rate: Rate::default(),
            });
            self.resyncs.len() - 1
        })
    }

    fn find_resync(&mut self, device: usize, peer: PeerIndex) -> Option<&mut Resync> {
        self.resyncs.iter_mut().find(|resync| resync.device == device && resync.peer == peer)
    }

    // ---- a new map ----

    /// Fits what is known to a new view of a device. Knowledge about a copy is kept if its epoch is the
    /// same, or if this is the very next map and neither we nor it changed place: with a map left out
    /// in between, somebody else may have been primary.
    pub(super) fn fit_resync(&mut self, device: usize, before: &DeviceView, consecutive: bool) {
        if self.devices[device].slices.is_empty() {
            return;
        }
        let spans = self.devices[device].view.spans.clone();
        for span in &spans {
            for old in &before.spans {
                let (first, end) = (span.first.max(old.first), span.end.min(old.end));
                if first < end && (old.epoch != span.epoch || old.serves() != span.serves()) {
                    self.fit_run(device, first..end, span, Some(old), consecutive);
                }
            }
            let known = before.spans.last().map_or(0, |last| last.end);
            if span.end > known {
                self.fit_run(device, span.first.max(known)..span.end, span, None, false);
            }
        }
        self.fit_joining(device);
        self.recount(device);
    }

    fn fit_run(
        &mut self,
        device: usize,
        slices: std::ops::Range<u32>,
        span: &SpanView,
        old: Option<&SpanView>,
        consecutive: bool,
    ) {
        let keeps = |peer: PeerIndex| {
            old.is_some_and(|old| {
                old.serves()
                    && (consecutive || old.epoch == span.epoch)
                    && old.attached(peer).is_some()
                    && old.attached(peer) == span.attached(peer)
            })
        };
        let others: &[PeerIndex] = if span.serves() { &span.others } else { &[] };
        for slice in slices {
            let entries = &mut self.devices[device].slices[slice as usize].behind;
            entries.retain(|behind| others.contains(&behind.peer) && keeps(behind.peer));
            for peer in others.iter().copied().filter(|peer| !keeps(*peer)) {
                entries.push(Behind::unknown(peer));
            }
            if entries.is_empty() {
                *entries = Vec::new();
            }
        }
    }

    /// A node stays counted on as long as a span of before is still syncing there.
    fn fit_joining(&mut self, device: usize) {
        let Self { devices, .. } = self;
        let super::Device { view, joining, .. } = &mut devices[device];
        joining.retain(|joining| {
            view.spans.iter().any(|span| {
                span.serves()
                    && span.epoch.0 <= joining.version.0
                    && span.others.contains(&joining.peer)
                    && !span.members.contains(&joining.peer)
            })
        });
    }

    /// Counts again what a device's resyncs have to do; those with nothing to do end.
    fn recount(&mut self, device: usize) {
        let peers: Vec<PeerIndex> = self.devices[device].view.secondaries.clone();
        for peer in peers {
            let mut unknown = 0;
            let mut left = 0;
            for slice in &mut self.devices[device].slices {
                for behind in slice.behind.iter_mut().filter(|behind| behind.peer == peer) {
                    if behind.known {
                        left += u64::from(behind.regions.count_ones());
                    } else {
                        unknown += 1;
                    }
                }
            }
            let syncing = self.has_syncing(device, peer);
            if unknown == 0 && left == 0 && !syncing && self.find_resync(device, peer).is_none() {
                continue;
            }
            let index = self.resync_of(device, peer);
            let joining = self.devices[device].joining.iter().any(|joining| joining.peer == peer);
            let resync = &mut self.resyncs[index];
            if (unknown, left) != (resync.unknown, resync.left) {
                resync.total = left;
                resync.compared = 0;
            }
            (resync.unknown, resync.left) = (unknown, left);
            resync.not_before = 0;
            if !joining {
                resync.stage = Stage::Comparing;
            }
        }
        self.resync_due = true;
        let Self { devices, resyncs, .. } = self;
        let view = &devices[device].view;
        resyncs.retain(|resync| resync.device != device || view.secondaries.contains(&resync.peer));
    }

    fn has_syncing(&self, device: usize, peer: PeerIndex) -> bool {
        self.devices[device].view.spans.iter().any(|span| is_syncing(span, peer))
    }

    // ---- the work ----

    /// Goes on with every resync as far as it can go now.
    pub(super) fn pump_resyncs(&mut self) {
        let mut index = 0;
        while index < self.resyncs.len() {
            let (device, peer) = (self.resyncs[index].device, self.resyncs[index].peer);
            self.pump(device, peer);
            // It may have ended.
            let there = self.resyncs.get(index);
            index += usize::from(there.is_some_and(|next| (next.device, next.peer) == (device, peer)));
        }
    }

    fn pump(&mut self, device: usize, peer: PeerIndex) {
        if !self.peers[peer].is_open() || self.peers[peer].lost.is_some() {
            return;
        }
        self.exchange_masks(device, peer);
        self.start_copies(device, peer);
        let Some(resync) = self.find_resync(device, peer) else { return };
        if resync.unknown > 0 || resync.left > 0 || resync.exchanges > 0 || resync.copies > 0 {
            return;
        }
        if self.has_syncing(device, peer) {
            self.advance(device, peer);
        } else {
            self.resyncs.retain(|resync| (resync.device, resync.peer) != (device, peer));
            for slice in &mut self.devices[device].slices {
                slice.behind.retain(|behind| behind.peer != peer);
            }
        }
    }

    fn exchange_masks(&mut self, device: usize, peer: PeerIndex) {
        let slices = self.devices[device].slices.len() as u32;
        let now = self.now;
        loop {
            let Some(resync) = self.find_resync(device, peer) else { return };
            if resync.exchanges >= EXCHANGES || resync.unknown <= resync.exchanges || now < resync.not_before
            {
                return;
            }
            let start = resync.next_exchange;
            let urgent = resync.urgent.front().map(|(slice, _)| *slice);
            let wanted = |engine: &Self, slice: u32| {
                let behind = &engine.devices[device].slices[slice as usize].behind;
                behind.iter().any(|behind| behind.peer == peer && !behind.known && !behind.asked)
                    && engine.peers[peer].adopted().0 >= engine.devices[device].view.span(slice).epoch.0
            };
            let next = urgent
                .into_iter()
                .chain((0..slices).map(|step| (start + step) % slices))
                .find(|slice| wanted(self, *slice));
            let Some(slice) = next else { return };
            if !self.send_unite(device, slice, peer, false) {
                return;
            }
            if let Some(behind) = self.behind_mut(device, slice, peer) {
                behind.asked = true;
            }
            if let Some(resync) = self.find_resync(device, peer) {
                resync.exchanges += 1;
                resync.next_exchange = slice + 1;
            }
        }
    }

    /// Sends our dirty mask; `again` if it is not the first time, to learn theirs.
    fn send_unite(&mut self, device: usize, slice: u32, peer: PeerIndex, again: bool) -> bool {
        let Some((disk, slot)) = self.devices[device].slices[slice as usize].place else { return false };
        let dirty = self.disks[disk].journal.masks(SlotIndex(slot)).dirty;
        let view = &self.devices[device].view;
        let header = Header {
            slice_epoch: view.span(slice).epoch,
            device: view.id.0,
            slice,
            loss: self.loss_of(device, slice),
            ..Header::new(Kind::Unite)
        };
        let awaited = Exchange { device, slice, epoch: header.slice_epoch, dirty, again };
        let body = Body::Bytes(dirty.to_le_bytes().to_vec());
        self.send_awaited(peer, header, None, body, Awaited::Unite(awaited))
    }

    /// That copy's masks came, or will never come (`None`).
    pub(super) fn on_masks(
        &mut self,
        peer: PeerIndex,
        exchange: Exchange,
        answer: Option<(&Header, &[u8])>,
    ) -> Result<(), BadFrame> {
        let Exchange { device, slice, .. } = exchange;
        let theirs = match answer {
            Some((header, body)) if Status::parse(header.flags) == Status::Done => {
                let ([dirty, readable], []) = body.as_chunks::<8>() else {
                    return Err(BadFrame::Content("masks: not two words"));
                };
                Some((u64::from_le_bytes(*dirty), u64::from_le_bytes(*readable)))
            }
            _ => None,
        };
        // A new epoch began everything anew.
        let current = self.devices[device].view.span(slice).epoch == exchange.epoch;
        let not_before = self.now + TRY_AGAIN;
        self.resync_due = true;
        let Some(resync) = self.find_resync(device, peer) else { return Ok(()) };
        match &mut resync.stage {
            Stage::Uniting { pending, .. } if exchange.again => *pending = pending.saturating_sub(1),
            _ if exchange.again => {}
            _ => resync.exchanges = resync.exchanges.saturating_sub(1),
        }
        let Some((dirty, readable)) = theirs.filter(|_| current) else {
            resync.not_before = not_before;
            if exchange.again && matches!(resync.stage, Stage::Uniting { .. }) {
                resync.stage = Stage::Comparing;
            }
            if let Some(behind) = self.behind_mut(device, slice, peer)
                && !exchange.again
            {
                behind.asked = false;
            }
            return Ok(());
        };
        let Some((disk, slot)) = self.devices[device].slices[slice as usize].place else { return Ok(()) };
        let mine = self.disks[disk].journal.masks(SlotIndex(slot));
        let Some(behind) = self.behind_mut(device, slice, peer) else { return Ok(()) };
        behind.united |= exchange.dirty | dirty;
        if exchange.again || behind.known {
            return Ok(());
        }
        behind.asked = false;
        behind.known = true;
        behind.readable = readable;
        // What is readable on one only differs too, whatever its bits say. Operations in flight without
        // a leg to that copy are noted when they end.
        behind.regions = mine.dirty | dirty | (mine.readable() ^ readable);
        let regions = u64::from(behind.regions.count_ones());
        if dirty & !mine.dirty != 0 {
            let masks = RegionMasks { dirty: mine.dirty | dirty, ..mine };
            let ticket = self.disks[disk].journal.submit(Change::Masks { slot: SlotIndex(slot), masks });
            self.devices[device].slices[slice as usize].intent = ticket;
        }
        if let Some(resync) = self.find_resync(device, peer) {
            resync.unknown -= 1;
            resync.left += regions;
            resync.total += regions;
        }
        self.retry_unreconciled();
        Ok(())
    }

    fn behind_mut(&mut self, device: usize, slice: u32, peer: PeerIndex) -> Option<&mut Behind> {
        let slice = self.devices[device].slices.get_mut(slice as usize)?;
        slice.behind.iter_mut().find(|behind| behind.peer == peer)
    }

    /// How many regions may be copied at a time now.
    fn copy_limit(&self) -> usize {
        if self.now < self.foreground_at + YIELD { 1 } else { usize::MAX }
    }

    fn start_copies(&mut self, device: usize, peer: PeerIndex) {
        loop {
            let under_way: u32 = self.resyncs.iter().map(|resync| resync.copies).sum();
            let limit = self.copy_limit();
            let no_buffer = self.copy_buffers.is_empty();
            let now = self.now;
            let Some(resync) = self.find_resync(device, peer) else { return };
            let urgent = resync.urgent.pop_front();
            if urgent.is_none()
                && (resync.left == 0 || under_way as usize >= limit || no_buffer || now < resync.not_before)
            {
                return;
            }
            if no_buffer {
                resync.urgent.extend(urgent);
                return;
            }
            let next = match urgent {
                Some((slice, region)) => match self.is_copyable(device, slice, peer) >> region & 1 {
                    1 => Some((slice, region)),
                    _ if self.awaits_masks(device, slice, peer) => {
                        // Its masks come first, and are asked for before others.
                        if let Some(resync) = self.find_resync(device, peer) {
                            resync.urgent.push_front((slice, region));
                        }
                        return;
                    }
                    _ => continue,
                },
                None => self.next_to_copy(device, peer),
            };
            let Some((slice, region)) = next else { return };
            self.start_copy(device, slice, region, peer);
        }
    }

    fn awaits_masks(&self, device: usize, slice: u32, peer: PeerIndex) -> bool {
        let behind = &self.devices[device].slices[slice as usize].behind;
        behind.iter().any(|behind| behind.peer == peer && !behind.known)
    }

    /// Regions that differ and are not being copied.
    fn is_copyable(&self, device: usize, slice: u32, peer: PeerIndex) -> u64 {
        let behind = &self.devices[device].slices[slice as usize].behind;
        let entry = behind.iter().find(|behind| behind.peer == peer && behind.known);
        let adopted = self.peers[peer].adopted().0 >= self.devices[device].view.span(slice).epoch.0;
        entry.filter(|_| adopted).map_or(0, |behind| behind.regions & !behind.copying & !behind.failed)
    }

    fn next_to_copy(&mut self, device: usize, peer: PeerIndex) -> Option<(u32, u32)> {
        let slices = self.devices[device].slices.len() as u32;
        let start = self.find_resync(device, peer)?.next_copy;
        for step in 0..slices {
            let slice = (start + step) % slices;
            let regions = self.is_copyable(device, slice, peer);
            if regions != 0 {
                self.find_resync(device, peer)?.next_copy = slice;
                return Some((slice, regions.trailing_zeros()));
            }
        }
        None
    }

    fn start_copy(&mut self, device: usize, slice: u32, region: u32, peer: PeerIndex) {
        let Some(buffer) =
            self.copy_buffers.pop_if(|_| self.devices[device].slices[slice as usize].place.is_some())
        else {
            return;
        };
        let bytes = self.region_bytes();
        if let Some(behind) = self.behind_mut(device, slice, peer) {
            behind.copying |= 1 << region;
        }
        if let Some(resync) = self.find_resync(device, peer) {
            resync.copies += 1;
        }
        let epoch = self.devices[device].view.span(slice).epoch;
        let op = Op {
            kind: OpKind::Copy,
            slice,
            offset: region * bytes,
            length: bytes,
            ..Op::primary(Origin::Upkeep, device, epoch)
        };
        self.enqueue_copy(op, peer, buffer);
    }

    /// A copy of a region ended; `equal` if nothing differs there now.
    pub(super) fn copy_ended(&mut self, op: &Op, peer: PeerIndex, equal: bool, moved: u64) {
        let region = op.offset / self.region_bytes();
        let now = self.now;
        let mut done = 0;
        if let Some(behind) = self.behind_mut(op.device, op.slice, peer) {
            behind.copying &= !(1 << region);
            behind.failed |= u64::from(!equal) << region;
            if equal && behind.known && behind.regions >> region & 1 == 1 {
                behind.regions &= !(1 << region);
                done = 1;
            }
        }
        if let Some(resync) = self.find_resync(op.device, peer) {
            resync.copies = resync.copies.saturating_sub(1);
            resync.moved += moved;
            resync.left -= done;
            resync.compared += done;
            if !equal {
                resync.retry_at.get_or_insert(now + TRY_AGAIN);
            }
        }
        if equal {
            self.retry_unreconciled();
        }
    }

    // ---- becoming a member ----

    fn advance(&mut self, device: usize, peer: PeerIndex) {
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
        while pending < EXCHANGES && next < self.devices[device].slices.len() as u32 {
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
        let whole = next as usize == self.devices[device].slices.len();
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

    /// The session with that node ended: what was under way on it begins anew with the next.
    pub(super) fn resync_interrupted(&mut self, peer: PeerIndex) {
        for resync in self.resyncs.iter_mut().filter(|resync| resync.peer == peer) {
            resync.exchanges = 0;
            resync.not_before = 0;
            let joining = &mut self.devices[resync.device].joining;
            joining.retain(|joining| joining.peer != peer || joining.asked);
            if !joining.iter().any(|joining| joining.peer == peer) {
                resync.stage = Stage::Comparing;
            }
            for slice in &mut self.devices[resync.device].slices {
                for behind in slice.behind.iter_mut().filter(|behind| behind.peer == peer) {
                    behind.asked = false;
                    behind.failed = 0;
                }
            }
        }
    }

    /// A node came back whose copies lack writes: the manager is asked to let them be filled. Only with
    /// a session, so that a copy which cannot be reached does not change its state over and over.
    pub(super) fn ask_syncing_if_due(&mut self, peer: PeerIndex) {
        let version = self.adopted_version();
        let entry = &self.peers[peer];
        if !entry.is_open()
            || entry.lost.is_some()
            || entry.adopted() < version
            || entry.ask_syncing_after > self.now
        {
            return;
        }
        let stale = self.devices.iter().any(|device| {
            let mut spans = device.view.spans.iter();
            spans.any(|span| span.serves() && span.stale.contains(&peer))
        });
        if stale {
            self.peers[peer].ask_syncing_after = self.now + ASK_AGAIN;
            let peer = self.peers[peer].node;
            self.actions.push_back(Action::Report(Report::AskSyncing { peer, version }));
        }
    }

    // ---- reads of what is not reconciled ----

    /// A read holds its range and may not be answered from it yet: it gives the range up, and
    /// what it needs is copied first.
    pub(super) fn await_reconciled(&mut self, key: OpKey, regions: u64) {
        let op = &mut self.ops[key];
        op.holds = false;
        op.local = super::op::Local::Idle;
        let (device, slice) = (op.device, op.slice);
        let lock = &mut self.devices[device].slices[slice as usize].lock;
        lock.release(key);
        while let Some(next) = lock.pop_ready() {
            self.ready.push_back(next);
        }
        self.unreconciled_reads.push(key);
        let peers: Vec<PeerIndex> = {
            let entry = &self.devices[device];
            let behind = entry.slices[slice as usize].behind.iter();
            behind
                .map(|behind| behind.peer)
                .filter(|peer| self.counts(device, entry.view.span(slice), *peer))
                .collect()
        };
        for peer in peers {
            let differs = self.may_differ(device, slice, peer) & regions;
            if let Some(resync) = self.find_resync(device, peer) {
                for region in (0..64).filter(|region| differs >> region & 1 == 1) {
                    if !resync.urgent.contains(&(slice, region)) {
                        resync.urgent.push_back((slice, region));
                    }
                }
            }
            self.pump(device, peer);
        }
    }

    /// Reads whose regions are equal everywhere now ask for their range again.
    pub(super) fn retry_unreconciled(&mut self) {
        for key in std::mem::take(&mut self.unreconciled_reads) {
            let Some(op) = self.ops.get(key) else { continue };
            if let Some(status) = op.doomed {
                self.finish(key, status);
                continue;
            }
            let regions = touched(op.offset, op.length, self.region_bytes());
            if self.unreconciled(op.device, op.slice) & regions != 0 {
                self.unreconciled_reads.push(key);
                continue;
            }
            let range = op.offset..op.offset + op.length;
            let (device, slice) = (op.device, op.slice as usize);
            if self.devices[device].slices[slice].lock.acquire(key, range, true) {
                self.ready.push_back(key);
            }
        }
    }

    // ---- for people ----

    pub(super) fn tick_resyncs(&mut self) {
        let Self { devices, resyncs, now, .. } = self;
        for resync in resyncs {
            resync.rate.tick(*now, resync.compared);
            if resync.retry_at.take_if(|at| *at <= *now).is_some() {
                let entries = devices[resync.device].slices.iter_mut().flat_map(|slice| &mut slice.behind);
                entries.filter(|behind| behind.peer == resync.peer).for_each(|behind| behind.failed = 0);
            }
        }
        self.pump_resyncs();
    }

    /// How far copies are that are being made equal, for `status`.
    pub fn resync_reports(&self) -> Vec<ResyncReport> {
        let region = u64::from(self.region_bytes());
        let whole = |slices: u32| u64::from(slices) * u64::from(self.slice_bytes);
        let report = |resync: &Resync| {
            let device = &self.devices[resync.device];
            ResyncReport {
                device: device.view.id,
                peer: self.peers[resync.peer].node,
                behind_bytes: resync.left * region + whole(resync.unknown),
                total_bytes: resync.total * region + whole(resync.unknown),
                moved_bytes: resync.moved,
                bytes_per_second: (resync.rate.per_second * region as f64) as u64,
                joining: self.has_syncing(resync.device, resync.peer),
            }
        };
        self.resyncs.iter().map(report).collect()
    }
}

/// Whether that peer holds a syncing copy of what this node serves.
fn is_syncing(span: &SpanView, peer: PeerIndex) -> bool {
    span.serves() && span.others.contains(&peer) && !span.members.contains(&peer)
}
