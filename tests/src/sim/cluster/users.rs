//! The users of the devices: they follow the claims, ask, and tell the checker what they see.

use super::{Cluster, Event, Former};
use crate::sim::disk::SECTOR;
use crate::sim::node::SLICE;
use crate::sim::scheduler::{MS, Nanos};
use crate::sim::workload::{Asked, Wish, fill, stamp, wish};
use mirror_net::engine::action::{BufferRange, Request, RequestKind, RequestToken};
use mirror_net::ids::{DeviceId, MapVersion, SliceEpoch, SliceIndex};
use mirror_net::map::{DistributionMap, Span};

/// How long users stay where they are.
const WANDER: Nanos = 500 * MS;
/// So long before something goes wrong users begin to ask more.
const BEFORE: Nanos = 200 * MS;
/// And so long after it they go on.
const AFTER: Nanos = 1_000 * MS;

impl Cluster {
    /// Users follow the claim, once its holder was allowed to export and has adopted it.
    pub(super) fn export(&mut self, node: u16, device: usize) {
        // What an operator made has no users.
        if device >= self.exported.len() {
            return;
        }
        let process = self.node(node).process_id;
        let exporter = (node, process);
        let Some(allowed) = self.agents[usize::from(node) - 1].allowed.get(&(device as u32 + 1)).copied()
        else {
            return;
        };
        let adopted =
            self.node(node).process.as_ref().map_or(0, |process| process.engine.adopted_version().0);
        let claim = self.manager.history.get(&adopted).map(|map| map.devices[device].claim);
        if allowed.0 < self.exported[device]
            || claim.is_none_or(|claim| claim.node.0 != node || claim.generation != allowed)
        {
            return;
        }
        if self.exporting[device] == Some(exporter) {
            // The claim went away and came back before it heard of that: it goes on under the newer one, and
            // who starts late under one in between is not its successor. Its device is another for all that: whoever had the
            // old one saw it go, and nobody waits for news of what was written there.
            if std::mem::replace(&mut self.exported[device], allowed.0) != allowed.0 {
                self.checker.exporter_changed(device);
            }
            return;
        }
        let before = std::mem::replace(&mut self.exported[device], allowed.0);
        self.check_primaries_know(device, claim.map_or_else(Default::default, |claim| claim.since));
        self.say(|| format!("n{node}: exports dev{}", device + 1));
        let now = self.now;
        if let Some(old) = self.exporting[device].replace(exporter) {
            self.former.push(Former { device, exporter: old, generation: before, until: now });
            // Whatever the one before left behind has happened by now, or never will.
            let left: Vec<u64> = self
                .asked
                .iter()
                .filter(|(_, asked)| asked.device == device && asked.exporter == old)
                // Its claim went away and came back: it is older than nobody who starts late in between.
                .filter(|(_, asked)| asked.adopted_claim < allowed.0)
                .map(|(token, _)| *token)
                .collect();
            for token in left {
                if let Some(asked) = self.asked.get_mut(&token) {
                    asked.replaced = true;
                    self.orphans[device].extend(&asked.writes);
                }
                if !self.alive(old.0, old.1) {
                    self.asked.remove(&token);
                }
                self.queue.push(now + MS, Event::Ask { device });
            }
        }
        for write in std::mem::take(&mut self.orphans[device]) {
            self.checker.end(now, write);
        }
        self.checker.exporter_changed(device);
    }

    /// Nobody acts as primary of a device whose exporter starts without knowing its claim (rule 15).
    fn check_primaries_know(&mut self, device: usize, since: MapVersion) {
        if self.manager.map.devices[device].claim.since != since {
            // It has lost the claim already and will hear of it: who is primary under the next is not its matter.
            return;
        }
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            let adopted = node.process.as_ref().map(|process| process.engine.adopted_version());
            let Some(adopted) = adopted.filter(|adopted| *adopted < since) else { continue };
            let Some(map) = self.manager.history.get(&adopted.0) else { continue };
            let is_primary = |span: &Span| {
                let newest = self.manager.map.devices[device].span(span.first);
                let (of, disk) = self.locate(span.primary().disk);
                newest.is_some_and(|newest| newest.primary() == span.primary())
                    && of == node.id.0
                    && span.primary().incarnation == node.incarnation(disk)
            };
            if map.devices[device].spans.iter().any(is_primary) {
                let wrong = format!(
                    "dev{} is exported under a claim of {since}, {} serves it and knows {adopted}",
                    device + 1,
                    node.id
                );
                self.checker.violations.push(wrong);
            }
        }
    }

    /// Whether a former exporter lives and still takes its claim for the present one.
    fn knows_no_better(&self, former: &Former) -> bool {
        let (node, process) = former.exporter;
        let adopted =
            self.node(node).process.as_ref().map_or(0, |process| process.engine.adopted_version().0);
        let claim = self.manager.history.get(&adopted).map(|map| map.devices[former.device].claim);
        self.alive(node, process) && claim.is_some_and(|claim| claim.generation.0 == former.generation)
    }

    pub(super) fn ask(&mut self, device: usize) {
        if !self.busy {
            return;
        }
        let place = if self.shape.wanders { self.now / WANDER } else { 0 };
        let wish = wish(&mut self.random, self.shape.discards, place);
        let late = if wish.kind == RequestKind::Read { 2 } else { 8 };
        if self.random.one_in(late) {
            let theirs = |former: &&Former| former.device == device && self.knows_no_better(former);
            if let Some(former) = self.former.iter().rev().find(theirs).map(|former| former.exporter) {
                self.submit_to(device, former, wish, false);
                return;
            }
        }
        let exporter = self.exporter(device);
        if exporter.and_then(|exporter| self.submit_to(device, exporter, wish, false)).is_none() {
            self.queue.push(self.now + 50 * MS, Event::Ask { device });
        }
    }

    /// Gives a request to the device's exporter; its token for the results, or `None` if nobody exports.
    pub fn submit(&mut self, device: usize, wish: Wish) -> Option<u64> {
        let exporter = self.exporter(device)?;
        self.submit_to(device, exporter, wish, true)
    }

    fn exporter(&self, device: usize) -> Option<(u16, u64)> {
        self.exporting[device].filter(|(node, process)| {
            self.alive(*node, *process) && self.node(*node).paused_until <= self.now
        })
    }

    pub(super) fn submit_to(
        &mut self,
        device: usize,
        (node, process): (u16, u64),
        wish: Wish,
        wanted: bool,
    ) -> Option<u64> {
        let now = self.now;
        self.next_token += 1;
        let token = self.next_token;
        let (first, count) = ((wish.offset / SECTOR as u64) as usize, wish.length as usize / SECTOR);
        let exports = self.exporting[device] == Some((node, process));
        let mut writes = Vec::new();
        let data = match wish.kind {
            RequestKind::Read => Some(vec![0xee; wish.length as usize]),
            RequestKind::Write { .. } => {
                self.next_stamp += 1;
                // What a former exporter writes nobody may ever see.
                if exports {
                    writes.push(self.checker.begin_write(now, device, first, count, self.next_stamp));
                }
                Some(fill(self.next_stamp, wish.length))
            }
            RequestKind::WriteZeroes { .. } if !exports => None,
            RequestKind::WriteZeroes { .. } => {
                writes.push(self.checker.begin_write(now, device, first, count, 0));
                None
            }
            RequestKind::Discard => {
                // Whole regions may become zeros.
                let region = SLICE as usize / 64 / SECTOR;
                let start = first.div_ceil(region) * region;
                let end = (first + count) / region * region;
                if start < end && exports {
                    writes.push(self.checker.begin_write(now, device, start, end - start, 0));
                }
                None
            }
            RequestKind::Flush => None,
        };
        self.say(|| {
            format!("n{node}: request {token} dev{} {wish:?} stamp {:x}", device + 1, self.next_stamp)
        });
        let clock = self.node(node).clock(now);
        let running = self.process(node)?;
        let buffer = data.map(|data| running.allocate(data));
        let length = wish.length;
        let request = Request {
            token: RequestToken(token),
            device: DeviceId(device as u32 + 1),
            kind: wish.kind,
            offset: wish.offset,
            length,
            buffer: buffer.map(|buffer| BufferRange { buffer, offset: 0, length }),
        };
        running.engine.handle_request(clock, &request);
        let adopted = running.engine.adopted_version().0;
        let adopted_claim =
            self.manager.history.get(&adopted).map_or(0, |map| map.devices[device].claim.generation.0);
        let here = self.serves(node, device, wish.offset, length);
        let marks = match wish.kind {
            RequestKind::Flush => self.disks().map(|disk| disk.media.flush_mark()).collect(),
            _ => Vec::new(),
        };
        self.asked.insert(
            token,
            Asked {
                device,
                kind: wish.kind,
                offset: wish.offset,
                length,
                buffer,
                began: now,
                writes,
                exporter: (node, process),
                claim: if exports { self.exported[device] } else { 0 },
                adopted,
                adopted_claim,
                marks,
                here,
                replaced: false,
                wanted,
            },
        );
        self.drain(node);
        Some(token)
    }

    /// Requests without an answer, at exporters that live.
    pub fn unanswered(&self) -> Vec<String> {
        self.asked
            .iter()
            .filter(|(_, asked)| self.alive(asked.exporter.0, asked.exporter.1))
            .map(|(token, asked)| format!("request {token}: {asked:?}"))
            .collect()
    }

    /// What every node's requests wait for.
    pub fn waiting(&self) -> Vec<String> {
        let lines = self.nodes.iter().filter_map(|node| {
            let process = node.process.as_ref()?;
            Some(format!(
                "n{}: {:?} {:?}",
                node.id.0,
                process.engine.waiting(),
                process.engine.session_reports()
            ))
        });
        lines.collect()
    }

    pub(super) fn complete(&mut self, node: u16, token: u64, result: Result<(), String>) {
        let now = self.now;
        let Some(asked) = self.asked.remove(&token) else {
            self.checker.violations.push(format!("n{node}: request {token} completed twice, or never asked"));
            return;
        };
        self.say(|| format!("n{node}: request {token} {result:?}"));
        self.note(token);
        self.completed += 1;
        let claim = self.manager.map.devices[asked.device].claim;
        if result == Err("ClaimLost".into()) && claim.node.0 == node && claim.generation.0 == asked.claim {
            self.checker
                .violations
                .push(format!("n{node}: request {token} is refused under the present claim"));
        }
        let (device, first) = (asked.device, (asked.offset / SECTOR as u64) as usize);
        let stores = !matches!(asked.kind, RequestKind::Read | RequestKind::Flush);
        let here = self.serves(node, device, asked.offset, asked.length);
        if stores && asked.replaced && result.is_ok() && asked.here.is_some() && asked.here == here {
            let wrong = format!("n{node}: request {token} is done here after another exporter started");
            self.checker.violations.push(wrong);
        }
        let freed = asked.buffer.and_then(|buffer| Some(self.process(node)?.free(buffer))).transpose();
        let buffer = freed.unwrap_or_else(|wrong| {
            self.checker.violations.push(format!("n{node}: request {token}: {wrong}"));
            None
        });
        let mut stamps = Vec::new();
        let mut early = false;
        if let (RequestKind::Read, Ok(()), Some(buffer)) = (asked.kind, &result, buffer) {
            stamps.reserve(buffer.bytes().len() / SECTOR);
            // Under a lease from before a loss, what was lost may be read once more: that is before the loss.
            let lasts = !self.loss_around(node, &asked);
            for (index, sector) in buffer.bytes().chunks(SECTOR).enumerate() {
                match stamp(sector) {
                    Some(stamp) => {
                        stamps.push(stamp);
                        early |= self.checker.read(asked.began, now, device, first + index, stamp, lasts);
                    }
                    None => self
                        .checker
                        .violations
                        .push(format!("request {token}: a torn sector {:x?}", &sector[..32])),
                }
            }
        }
        match (&result, asked.kind) {
            (Ok(()), RequestKind::Flush) => {
                // One whose claim has moved speaks of its own writes only: who joined since got them flushed.
                if asked.claim > 0 && !asked.replaced && asked.adopted_claim == claim.generation.0 {
                    self.check_flushed(device, &asked.marks);
                }
                // Of what another exporter acknowledged since it speaks as little.
                let former = |former: &&Former| former.device == device && former.exporter == asked.exporter;
                let until = match self.exporting[device] == Some(asked.exporter) {
                    true => asked.began,
                    false => self.former.iter().rev().find(former).map_or(asked.began, |former| former.until),
                };
                let began = asked.began.min(until);
                self.find_lost(node, device, began);
                self.checker.flushed(device, began, now);
            }
            (Ok(()), RequestKind::Write { .. } | RequestKind::WriteZeroes { .. }) if asked.claim == 0 => {
                self.checker
                    .violations
                    .push(format!("n{node}: request {token} of a former exporter is done"));
            }
            (Err(_), RequestKind::Flush) => self.checker.flush_failed(device, asked.began),
            (Ok(()), RequestKind::Discard) => {
                for id in &asked.writes {
                    self.checker.end(now, *id);
                }
            }
            (Ok(()), kind) => {
                let fua =
                    matches!(kind, RequestKind::Write { fua: true } | RequestKind::WriteZeroes { fua: true });
                let ends = [asked.offset, asked.offset + u64::from(asked.length) - 1];
                let slices = ends.map(|at| (at / u64::from(SLICE)) as u32);
                let lost = slices.into_iter().any(|slice| self.loss_unseen(node, device, slice));
                for id in &asked.writes {
                    self.checker.acknowledge(now, *id, fua, lost);
                }
            }
            // It was given up: it may have taken effect, but nothing that is asked for later gives way to it.
            (Err(error), _) if error == "NoQuorum" => {
                for id in &asked.writes {
                    self.checker.end(now, *id);
                }
            }
            (Err(_), _) => self.orphans[device].extend(&asked.writes),
        }
        if early {
            self.check_device(device);
        }
        if !stamps.is_empty() {
            self.say(|| format!("n{node}: request {token} read {stamps:x?}"));
        }
        if asked.wanted {
            self.results.insert(token, result.map(|()| stamps));
        }
        // Bursts, and silence between them; a longer one where nothing goes wrong.
        let longest = match self.random.one_in(3) {
            true => MS,
            false if self.is_eventful() => 250 * MS,
            false => 1_500 * MS,
        };
        let pause = self.random.range(10_000, longest);
        if !asked.replaced {
            self.queue.push(now + pause, Event::Ask { device });
        }
    }

    /// Whether something went wrong a moment ago, or is about to.
    fn is_eventful(&self) -> bool {
        self.planned.iter().any(|at| (at.saturating_sub(BEFORE)..at + AFTER).contains(&self.now))
    }

    /// The epoch under which a node is primary of a range, in the map that it has adopted and in the newest;
    /// `None` if it is not, or if that is of several slices.
    fn serves(&self, node: u16, device: usize, offset: u64, length: u32) -> Option<SliceEpoch> {
        let slice = SliceIndex((offset / u64::from(SLICE)) as u32);
        let last = (offset + u64::from(length.max(1)) - 1) / u64::from(SLICE);
        let version = self.node(node).process.as_ref()?.engine.adopted_version();
        let span = self.manager.history.get(&version.0)?.devices[device].span(slice)?;
        let newest = self.manager.map.devices[device].span(slice)?;
        let present = newest.epoch == span.epoch && self.locate(span.primary().disk).0 == node;
        (present && last == u64::from(slice.0)).then_some(span.epoch)
    }

    /// Whether what a read saw may be lost by the time it is done: its exporter has not heard of that, or of two slices one
    /// was read before a loss there, and the other after it.
    fn loss_around(&mut self, node: u16, asked: &Asked) -> bool {
        let ends = [asked.offset, asked.offset + u64::from(asked.length) - 1];
        let slices = ends.map(|at| (at / u64::from(SLICE)) as u32);
        slices.into_iter().any(|slice| {
            self.loss_unseen(node, asked.device, slice)
                || (slices[0] != slices[1] && self.loss_seen_since(asked.adopted, node, asked.device, slice))
        })
    }

    /// Whether the exporter has heard of a loss in that slice since it acted on that map.
    fn loss_seen_since(&mut self, version: u64, node: u16, device: usize, slice: u32) -> bool {
        let Some(process) = self.process(node) else { return false };
        let adopted = process.engine.adopted_version().0;
        let loss = |version: u64| {
            let map = self.manager.history.get(&version);
            map.and_then(|map| map.devices[device].span(SliceIndex(slice))).map(|span| span.loss)
        };
        loss(version) != loss(adopted)
    }

    /// Whether the manager knows of a loss in that slice which the exporter has not heard of.
    pub(super) fn loss_unseen(&mut self, node: u16, device: usize, slice: u32) -> bool {
        let Some(process) = self.process(node) else { return false };
        let version = process.engine.adopted_version();
        let loss = |map: &DistributionMap| map.devices[device].span(SliceIndex(slice)).map(|span| span.loss);
        let seen = self.manager.history.get(&version.0).and_then(|map| loss(map));
        seen != loss(&self.manager.map)
    }
}
