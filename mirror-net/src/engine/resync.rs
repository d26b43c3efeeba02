//! Resync: how copies become equal again of which regions may differ ([`behind`](super::behind)).
//!
//! For each device and each other node with copies of it: masks are exchanged with the copies that may
//! differ anywhere, and what is found is compared and copied region by region ([`copy`](super::copy)),
//! what somebody waits for first. When nothing is left, syncing copies become members
//! ([`join`](super::join)).

use super::action::Body;
use super::join::is_syncing;
use super::op::{Op, OpKind, Origin};
use super::view::{DeviceView, PeerIndex};
use super::window::Awaited;
use super::{Engine, Nanos};
use crate::control::ResyncReport;
use crate::format::journal::Change;
use crate::ids::{SliceEpoch, SlotIndex};
use crate::map::runs::Runs;
use crate::region::masks::{RegionMasks, touched};
use crate::wire::header::{Header, Kind, Status};
use std::collections::VecDeque;

/// Exchanges of masks under way with one copy of a device, at most.
pub(super) const EXCHANGES: u32 = 32;
/// Regions that could not be copied are tried again after so long.
pub(super) const TRY_AGAIN: Nanos = 1_000_000_000;

/// How far another node's copies of a device are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
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
    pub stage: Stage,
    /// Slices whose masks are not known.
    pub unknown: u32,
    /// Exchanges under way.
    exchanges: u32,
    /// Regions that may differ, of slices whose masks are known.
    pub left: u64,
    /// Where to look for the next slice to exchange masks of, and to copy.
    next_exchange: u32,
    next_copy: u32,
    /// Slices and regions that somebody waits for.
    pub urgent: VecDeque<(u32, u32)>,
    copies: u32,
    /// Nothing is tried before.
    pub not_before: Nanos,
    /// When regions that failed are tried again.
    retry_at: Option<Nanos>,
    /// Regions found to be compared, and compared since.
    pub total: u64,
    compared: u64,
    /// Bytes sent because they differed.
    pub moved: u64,
    rate: Rate,
    /// Whether comparing pays.
    pub worth: Worth,
}

/// Whether to compare before sending. Where everything differs comparing takes longer than sending: both copies
/// are read and digested in vain.
#[derive(Default, Debug)]
pub(super) struct Worth {
    /// Bytes in a row that were compared and differed altogether.
    differed: u64,
    /// Regions that were sent since without a comparison.
    unseen: u32,
}

impl Worth {
    /// So much in a row makes it likely that the rest differs as well.
    const ALL_DIFFERS: u64 = 16 << 20;
    /// Every so many regions it is looked whether that has changed.
    const LOOK_EVERY: u32 = 16;

    /// Whether the next region is compared first.
    pub fn compares(&mut self) -> bool {
        if self.differed < Self::ALL_DIFFERS {
            return true;
        }
        self.unseen = (self.unseen + 1) % Self::LOOK_EVERY;
        self.unseen == 0
    }

    /// Of so many bytes that were compared so many were sent, what goes with them included.
    fn compared(&mut self, length: u64, sent: u64) {
        self.differed = if sent >= length { self.differed.saturating_add(length) } else { 0 };
    }
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

impl Engine {
    // ---- what there is to do ----

    /// Index of the resync of that copy, which begins if there is none.
    pub(super) fn resync_of(&mut self, device: usize, peer: PeerIndex) -> usize {
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
                worth: Worth::default(),
            });
            self.resyncs.len() - 1
        })
    }

    /// The resync of that copy, if there is one.
    pub(super) fn find_resync(&mut self, device: usize, peer: PeerIndex) -> Option<&mut Resync> {
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

    /// Goes on with one as far as it can go now.
    pub(super) fn pump(&mut self, device: usize, peer: PeerIndex) {
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
            let ended = |resync: &Resync| (resync.device, resync.peer) == (device, peer);
            if let Some(index) = self.resyncs.iter().position(ended) {
                let resync = self.resyncs.remove(index);
                let report = self.resync_report(&resync);
                self.ended_resyncs.retain(|other| (other.device, other.peer) != (report.device, report.peer));
                self.ended_resyncs.push(report);
            }
            for slice in &mut self.devices[device].slices {
                slice.behind.retain(|behind| behind.peer != peer);
            }
        }
    }

    fn exchange_masks(&mut self, device: usize, peer: PeerIndex) {
        let slices = self.devices[device].adopted_slices();
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
    pub(super) fn send_unite(&mut self, device: usize, slice: u32, peer: PeerIndex, again: bool) -> bool {
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
    pub(super) fn on_masks(&mut self, peer: PeerIndex, exchange: Exchange, answer: Option<(&Header, &[u8])>) {
        let Exchange { device, slice, .. } = exchange;
        let body = answer.filter(|(header, _)| Status::parse(header.flags) == Status::Done);
        let theirs = body.and_then(|(_, body)| match body.as_chunks::<8>() {
            ([dirty, readable], []) => Some((u64::from_le_bytes(*dirty), u64::from_le_bytes(*readable))),
            _ => None,
        });
        // A new epoch began everything anew.
        let current = self.devices[device].view.span(slice).epoch == exchange.epoch;
        let not_before = self.now + TRY_AGAIN;
        self.resync_due = true;
        let Some(resync) = self.find_resync(device, peer) else { return };
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
            return;
        };
        let Some((disk, slot)) = self.devices[device].slices[slice as usize].place else { return };
        let mine = self.disks[disk].journal.masks(SlotIndex(slot));
        let content = self.content(device, slice);
        let here = self.ops.values().filter(|op| (op.device, op.slice) == (device, slice));
        let under_way = here.fold(0, |all, op| all | touched(op.offset, op.length, self.region_bytes()));
        let Some(behind) = self.behind_mut(device, slice, peer) else { return };
        behind.united |= exchange.dirty | dirty;
        if exchange.again || behind.known {
            return;
        }
        behind.asked = false;
        behind.known = true;
        behind.readable = readable;
        // What is readable on one only differs too, whatever its bits say. Operations in flight without
        // a leg to that copy are noted when they end.
        behind.regions = mine.dirty | dirty | (content ^ readable) | behind.noted;
        let regions = u64::from(behind.regions.count_ones());
        if dirty & !mine.dirty != 0 {
            let masks = RegionMasks { dirty: mine.dirty | dirty, ..mine };
            let ticket = self.disks[disk].journal.submit(Change::Masks { slot: SlotIndex(slot), masks });
            let entry = &mut self.devices[device].slices[slice as usize];
            entry.intent = ticket;
            // A write under way may have looked at its region before, and set its bit only when it is zeroed.
            entry.untouched |= dirty & !mine.dirty & !content & mine.zero & !under_way;
        }
        if let Some(resync) = self.find_resync(device, peer) {
            resync.unknown -= 1;
            resync.left += regions;
            resync.total += regions;
        }
        self.retry_unreconciled();
    }

    /// Whether all copies of a device that are being filled on that peer are those of plans that an operator paused.
    /// They become members together, so if one has to be filled all are.
    fn is_paused(&self, device: usize, peer: PeerIndex) -> bool {
        let Some(map) = self.map.as_deref().filter(|map| map.plans.iter().any(|plan| plan.paused)) else {
            return false;
        };
        let view = &self.devices[device].view;
        let node = self.peers[peer].node;
        let mut resting = Runs::default();
        let moves = map.plans.iter().filter(|plan| plan.paused).flat_map(|plan| &plan.moves);
        for step in moves.filter(|it| it.run.device == view.id && map.node_of(it.to) == Some(node)) {
            resting.add(step.run.first.0, step.run.first.0.saturating_add(step.run.count));
        }
        let mut filled = view.spans.iter().filter(|span| is_syncing(span, peer)).peekable();
        filled.peek().is_some() && filled.all(|span| resting.missing(span.first, span.end).is_empty())
    }

    fn start_copies(&mut self, device: usize, peer: PeerIndex) {
        let paused = self.is_paused(device, peer);
        loop {
            let no_buffer = self.copy_buffers.is_empty();
            let now = self.now;
            let pace = self.pacer.may_begin(now);
            let Some(resync) = self.find_resync(device, peer) else { return };
            let urgent = resync.urgent.pop_front();
            if urgent.is_none() {
                if resync.left == 0 || no_buffer || now < resync.not_before {
                    return;
                }
                if let Err(again) = pace {
                    self.pacer.wait(again);
                    return;
                }
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
                None => self.next_to_copy(device, peer, paused),
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

    /// What to copy next; if a plan is `paused`, only what members have to be compared for.
    fn next_to_copy(&mut self, device: usize, peer: PeerIndex, paused: bool) -> Option<(u32, u32)> {
        let slices = self.devices[device].adopted_slices();
        let start = self.find_resync(device, peer)?.next_copy;
        for step in 0..slices {
            let slice = (start + step) % slices;
            let regions = self.is_copyable(device, slice, peer);
            if regions != 0 && !(paused && is_syncing(self.devices[device].view.span(slice), peer)) {
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
        self.pacer.began(self.now, bytes);
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

    /// A copy of a region ended; `equal` if nothing differs there now, `compared` if that was found out before
    /// anything was sent.
    pub(super) fn copy_ended(&mut self, op: &Op, peer: PeerIndex, equal: bool, moved: u64, compared: bool) {
        let region = op.offset / self.region_bytes();
        let now = self.now;
        let mut done = 0;
        if let Some(behind) = self.behind_mut(op.device, op.slice, peer) {
            behind.copying &= !(1 << region);
            behind.failed |= u64::from(!equal) << region;
            if equal && behind.known && behind.regions >> region & 1 == 1 {
                behind.regions &= !(1 << region);
                behind.unreadable &= !(1 << region);
                done = 1;
            }
        }
        if let Some(resync) = self.find_resync(op.device, peer) {
            resync.copies = resync.copies.saturating_sub(1);
            resync.moved += moved;
            resync.left -= done;
            resync.compared += done;
            if compared && equal {
                resync.worth.compared(op.length.into(), moved);
            }
            if !equal {
                resync.retry_at.get_or_insert(now + TRY_AGAIN);
            }
        }
        if equal {
            self.retry_unreconciled();
        }
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

    /// Regions that nobody can copy.
    pub(super) fn unreadable_regions(&self, resync: &Resync) -> u32 {
        let slices = &self.devices[resync.device].slices;
        let behind = slices.iter().flat_map(|slice| &slice.behind);
        let of_peer = behind.filter(|behind| behind.peer == resync.peer);
        of_peer.map(|behind| (behind.unreadable & behind.regions).count_ones()).sum()
    }

    /// How far copies are that are being made equal, for `status`.
    pub fn resync_reports(&self) -> Vec<ResyncReport> {
        self.resyncs.iter().map(|resync| self.resync_report(resync)).collect()
    }

    /// Those that ended since the last call: everything was compared, and what differed was sent.
    pub fn take_ended_resyncs(&mut self) -> Vec<ResyncReport> {
        std::mem::take(&mut self.ended_resyncs)
    }

    fn resync_report(&self, resync: &Resync) -> ResyncReport {
        let region = u64::from(self.region_bytes());
        let whole = |slices: u32| u64::from(slices) * u64::from(self.slice_bytes);
        ResyncReport {
            device: self.devices[resync.device].view.id,
            peer: self.peers[resync.peer].node,
            behind_bytes: resync.left * region + whole(resync.unknown),
            total_bytes: resync.total * region + whole(resync.unknown),
            moved_bytes: resync.moved,
            bytes_per_second: (resync.rate.per_second * region as f64) as u64,
            joining: self.has_syncing(resync.device, resync.peer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Worth;

    #[test]
    fn comparing_ends_where_all_differs_and_begins_again_where_it_does_not() {
        const REGION: u64 = 1 << 20;
        let mut worth = Worth::default();
        for _ in 0..Worth::ALL_DIFFERS / REGION {
            assert!(worth.compares());
            worth.compared(REGION, REGION + 100);
        }
        let looks = (0..4 * Worth::LOOK_EVERY).filter(|_| worth.compares()).count();
        assert_eq!(looks, 4);
        worth.compared(REGION, REGION / 2);
        assert!(worth.compares() && worth.compares());
    }
}
