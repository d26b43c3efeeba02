//! Devices made, deleted, grown and set by an operator.
//!
//! A new device lies at home on the disks of the node that exports it, and its other copies where the planner puts
//! them. Nothing was ever written to it, so all its copies are in sync at once: a slot that is free reads as zeros,
//! whatever was in it before.

use super::redistribution::{View, already};
use super::registry::{Registry, Standing};
use super::{Change, node_named, run_of};
use crate::config::format_bytes;
use crate::control::{DeviceChange, DeviceOrder};
use crate::format::alloc::Segment;
use crate::ids::{ClaimGeneration, DeviceId, DiskId, LossGeneration, MapVersion, SliceEpoch, SliceIndex};
use crate::map::plan::Plan;
use crate::map::verbs::Verb;
use crate::map::wanted::Wish;
use crate::map::{Claim, Commit, Device, DistributionMap, Node, OnNoQuorum, Replica, ReplicaState, Span};
use std::collections::{BTreeMap, BTreeSet};

/// Longest name of a device: it is part of paths and URIs.
const NAME_MAX: usize = 64;

/// What is done, a line for each thing, and the change; an error, for people, if it cannot be done.
pub(super) fn plan(view: &View<'_>, order: &DeviceOrder) -> Result<Change, String> {
    let makes = Makes { view, name: &order.name };
    match &order.change {
        DeviceChange::Create { bytes, node, copies, commit, on_no_quorum } => {
            makes.create(*bytes, node, *copies, *commit, *on_no_quorum)
        }
        DeviceChange::Delete { force } => makes.delete(*force),
        DeviceChange::Grow { bytes } => makes.grow(*bytes),
        DeviceChange::Set { commit, on_no_quorum } => makes.set(*commit, *on_no_quorum),
    }
}

/// Devices whose secondaries have stored what they held in memory, all of them: they commit immediately from now on.
pub(super) fn settle(map: &DistributionMap, registry: &Registry) -> Change {
    let mut change = Change::default();
    for device in map.devices.iter().filter(|device| device.commit == Commit::Settling) {
        let has_adopted = |span: &Span, copy: &Replica| {
            let node = map.node_of(copy.disk).and_then(|id| map.node(id));
            let entry = node.and_then(|node| registry.get(&node.name));
            // Another process has adopted it without what the one before it held.
            entry.is_some_and(|entry| {
                entry.process == copy.incarnation.process && entry.adopted.0 >= span.epoch.0
            })
        };
        let counts = |copy: &&Replica| copy.state != ReplicaState::Stale;
        let is_settled = device
            .spans
            .iter()
            .all(|span| span.replicas.iter().filter(counts).all(|copy| has_adopted(span, copy)));
        if is_settled {
            change.batch.push(Verb::SetCommit { device: device.id, commit: Commit::Immediate });
            change
                .why
                .push(format!("{}: mirrors have stored what they held, and commit immediately", device.name));
        }
    }
    change
}

/// Who uses a device, as far as its exporter says.
pub(super) fn user(view: &View<'_>, device: &Device) -> Option<String> {
    let exporter = view.map.node(device.claim.node)?;
    let entry = view.now.registry.get(&exporter.name)?;
    let exports = &entry.report.as_ref()?.exports;
    let export = exports.iter().find(|export| export.device == device.id)?;
    Some(format!("{} on {}", export.in_use.as_ref()?, exporter.name))
}

/// Why nobody can tell whether a device is in use: of one that is not exported now somebody may wait who had it mounted.
fn untold(view: &View<'_>, device: &Device) -> Option<String> {
    let name = view.map.node_name(device.claim.node);
    let now = view.now;
    let Some(entry) = now.registry.get(&name).filter(|entry| entry.is_up(now.now_ms)) else {
        return Some(format!("its exporter {name} is not connected"));
    };
    let Some(report) = &entry.report else {
        return Some(format!("its exporter {name} has not told yet"));
    };
    let export = report.exports.iter().find(|export| export.device == device.id);
    match export {
        Some(export) if export.path.is_some() || export.uri.is_some() => None,
        _ => Some(format!("{name} does not export it now")),
    }
}

struct Makes<'a> {
    view: &'a View<'a>,
    name: &'a str,
}

impl Makes<'_> {
    fn map(&self) -> &DistributionMap {
        self.view.map
    }

    fn device(&self) -> Result<&Device, String> {
        self.map().device_named(self.name).ok_or_else(|| {
            let names: Vec<&str> = self.map().devices.iter().map(|device| device.name.as_str()).collect();
            format!("there is no device {:?}; the devices are {}", self.name, names.join(", "))
        })
    }

    /// Whole slices that so many bytes take.
    fn slices(&self, bytes: u64) -> Result<u32, String> {
        let slices = bytes.div_ceil(u64::from(self.map().slice_bytes));
        match u32::try_from(slices) {
            Ok(slices) if slices > 0 => Ok(slices),
            _ => Err(format!("{} is no size of a device", format_bytes(bytes))),
        }
    }

    fn create(
        &self,
        bytes: u64,
        node: &str,
        copies: u8,
        commit: Commit,
        on_no_quorum: OnNoQuorum,
    ) -> Result<Change, String> {
        let (map, name) = (self.map(), self.name);
        let may_be = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
        if name.is_empty()
            || name.len() > NAME_MAX
            || !name.chars().all(may_be)
            || name.starts_with(['.', '-'])
        {
            return Err(format!(
                "{name:?} is no name of a device: up to {NAME_MAX} letters, digits, '.', '_' and '-', the first a \
                 letter or a digit"
            ));
        }
        if map.device_named(name).is_some() {
            return Err(format!("there is a device {name} already; see `mirrorctl device list`"));
        }
        let node = node_named(map, node)?;
        let slices = self.slices(bytes)?;
        let block_bytes = map.disks.iter().map(|disk| disk.block_bytes).max().unwrap_or(512);
        let device = Device {
            id: map.next_device(),
            name: name.to_owned(),
            slices: 0,
            block_bytes,
            copies,
            commit: if copies > 1 { commit } else { Commit::Immediate },
            on_no_quorum,
            claim: Claim { node: node.id, generation: ClaimGeneration(1), since: map.version },
            spans: Vec::new(),
        };
        let spans = self.place(&device, node, slices)?;
        let mut lines = self.places(&spans);
        let size = u64::from(slices) * u64::from(map.slice_bytes);
        let rounded =
            if size == bytes { String::new() } else { format!(", rounded up from {}", format_bytes(bytes)) };
        let how = if copies == 1 { "not mirrored".to_owned() } else { format!("{copies} copies") };
        lines.insert(0, format!("{name}: {}{rounded}, {how}, exported by {}", format_bytes(size), node.name));
        let device = Box::new(Device { slices, spans, ..device });
        Ok(Change { batch: vec![Verb::CreateDevice { device }], why: lines })
    }

    /// Where so many more slices of a device lie, from its end on.
    fn place(&self, device: &Device, node: &Node, slices: u32) -> Result<Vec<Span>, String> {
        let map = self.map();
        if let Some(plan) = map.plans.first() {
            return Err(already(plan, "something, and has counted on the slots that are free,"));
        }
        let home = self.home(device, node, slices)?;
        // The planner is asked where the other copies of a device go that has one copy and needs more.
        let mut with = map.clone();
        let begins = device.slices;
        let grown = Device {
            slices: device.slices + slices,
            spans: [&device.spans[..], &home].concat(),
            ..device.clone()
        };
        match with.devices.iter_mut().find(|other| other.id == device.id) {
            Some(other) => *other = grown,
            None => with.devices.push(grown),
        }
        let takers = self.view.takers(&BTreeSet::new());
        let wish = Wish {
            takers: takers.0,
            topology: map.topology,
            copies: BTreeMap::from([(device.id, device.copies)]),
            only: BTreeSet::from([device.id]),
            ..Wish::default()
        };
        let wanted = with.wanted(&wish).map_err(|error| self.view.no_room(&error, &takers.1))?;
        for step in &wanted.moves {
            let incarnation = self.incarnation(step.to)?;
            let verb = Verb::AddReplica { run: step.run, disk: step.to, segment: step.segment, incarnation };
            // Anything else would move what there is.
            if step.from.is_some() || step.run.first.0 < begins {
                return Err(format!(
                    "{} does not lie as topology {} has it: type `mirrorctl rebalance` first",
                    device.name,
                    map.topology.map_or("any", |topology| topology.name())
                ));
            }
            with = with.apply(&[verb]).map_err(|error| error.to_string())?.unwrap_or(with);
        }
        let device = with.device(device.id).ok_or("the device was lost on the way")?;
        Ok(device.spans.iter().filter(|span| span.first.0 >= begins).cloned().collect())
    }

    fn incarnation(&self, disk: DiskId) -> Result<crate::ids::Incarnation, String> {
        let now = self.view.now;
        now.registry
            .usable(self.map(), disk, now.now_ms)
            .ok_or_else(|| format!("{} is not there any more: repeat it", self.map().disk_name(disk)))
    }

    /// The first copies of so many slices: on the node's own disks, evenly, as long as there is room.
    fn home(&self, device: &Device, node: &Node, slices: u32) -> Result<Vec<Span>, String> {
        let map = self.map();
        let kinds: &[Segment] = match device.copies {
            1 => &[Segment::Unmirrored],
            _ => &[Segment::Primary, Segment::Secondary],
        };
        let (takers, _) = self.view.takers(&BTreeSet::new());
        let mut used: BTreeMap<(DiskId, Segment), u32> = BTreeMap::new();
        for span in map.devices.iter().flat_map(|device| &device.spans) {
            for copy in &span.replicas {
                *used.entry((copy.disk, copy.segment)).or_default() += span.count;
            }
        }
        let free = |disk: &crate::map::Disk, segment| {
            disk.slots.of(segment).saturating_sub(used.get(&(disk.id, segment)).copied().unwrap_or(0))
        };
        let own = map.disks.iter().filter(|disk| {
            disk.node == node.id && takers.contains(&disk.id) && disk.block_bytes <= device.block_bytes
        });
        let mut room: Vec<(DiskId, Segment, u32)> = kinds
            .iter()
            .flat_map(|segment| own.clone().map(|disk| (disk.id, *segment, free(disk, *segment))))
            .filter(|(.., free)| *free > 0)
            .collect();
        // The emptiest first; within a segment, since what is at home belongs into the primary segment.
        room.sort_by_key(|(disk, segment, free)| (*segment as u8, std::cmp::Reverse(*free), *disk));
        let all: u32 = room.iter().map(|(.., free)| *free).sum();
        if all < slices {
            let missing = slices - all;
            let what = if device.copies == 1 { "unmirrored" } else { "primary or secondary" };
            return Err(format!(
                "{} has {all} free slots in {what} segments of its disks that are in use, {slices} are needed: {missing} \
                 more; choose another node, a smaller size, or add a disk",
                node.name
            ));
        }
        let mut spans = Vec::new();
        let mut first = device.slices;
        let end = first + slices;
        for (disk, segment, free) in room {
            let count = free.min(end - first);
            if count == 0 {
                break;
            }
            let (added, incarnation) = (map.version, self.incarnation(disk)?);
            spans.push(Span {
                first: SliceIndex(first),
                count,
                epoch: SliceEpoch(map.version.0),
                loss: LossGeneration(0),
                primary_since: MapVersion(0),
                replicas: vec![Replica { disk, segment, added, state: ReplicaState::InSync, incarnation }],
            });
            first += count;
        }
        Ok(spans)
    }

    /// Which disks take how much, for people.
    fn places(&self, spans: &[Span]) -> Vec<String> {
        let map = self.map();
        let mut by_disk: BTreeMap<DiskId, u64> = BTreeMap::new();
        for span in spans {
            for copy in &span.replicas {
                *by_disk.entry(copy.disk).or_default() += u64::from(span.count) * u64::from(map.slice_bytes);
            }
        }
        let named = by_disk
            .iter()
            .map(|(disk, bytes)| format!("{} ({})", map.disk_name(*disk), format_bytes(*bytes)));
        vec![format!("on {}", named.collect::<Vec<_>>().join(", "))]
    }

    fn not_moving(&self, device: DeviceId) -> Result<(), String> {
        let moves = |plan: &&Plan| plan.moves.iter().any(|step| step.run.device == device);
        self.map().plans.iter().find(moves).map_or(Ok(()), |plan| Err(already(plan, self.name)))
    }

    fn delete(&self, force: bool) -> Result<Change, String> {
        let (map, device) = (self.map(), self.device()?);
        self.not_moving(device.id)?;
        if let Some(user) = user(self.view, device).filter(|_| !force) {
            return Err(format!(
                "{} is in use: {user}; end that first, or repeat with --force: whoever uses it gets errors",
                device.name
            ));
        }
        if let Some(why) = untold(self.view, device).filter(|_| !force) {
            return Err(format!(
                "nobody can tell whether {} is in use: {why}; see `mirrorctl status`, or repeat with --force: whoever uses it \
                 gets errors",
                device.name
            ));
        }
        let bytes = u64::from(device.slices) * u64::from(map.slice_bytes);
        let line = format!("{} and its {} are gone; the slots are free", device.name, format_bytes(bytes));
        Ok(Change { batch: vec![Verb::DeleteDevice { device: device.id }], why: vec![line] })
    }

    fn grow(&self, bytes: u64) -> Result<Change, String> {
        let (map, device) = (self.map(), self.device()?);
        let slices = self.slices(bytes)?;
        let size = |slices: u32| format_bytes(u64::from(slices) * u64::from(map.slice_bytes));
        if slices < device.slices {
            return Err(format!(
                "{} has {}: it does not shrink, since what lies behind {} would be lost; create a smaller one, copy, and \
                 delete this one",
                device.name,
                size(device.slices),
                size(slices)
            ));
        }
        if slices == device.slices {
            return Ok(Change {
                batch: Vec::new(),
                why: vec![format!("{} has {} already", device.name, size(slices))],
            });
        }
        self.not_moving(device.id)?;
        let node = map.node(device.claim.node).ok_or("its exporter is not in the map")?;
        let spans = self.place(device, node, slices - device.slices)?;
        let mut lines = vec![format!("{}: {} instead of {}", device.name, size(slices), size(device.slices))];
        lines.extend(self.places(&spans));
        lines.push(
            "a ublk device shows its new size at once from Linux 6.16 on, else once its node exports it anew; an NBD client \
             once it connects anew"
                .to_owned(),
        );
        Ok(Change { batch: vec![Verb::GrowDevice { device: device.id, spans }], why: lines })
    }

    /// Names the processes that hold mirrors now: until now they were compared on their attachments alone, and may have
    /// been restarted since the map last named them.
    fn processes(&self, device: &Device) -> Vec<Verb> {
        let (map, now) = (self.map(), self.view.now);
        let mut batch = Vec::new();
        for span in &device.spans {
            for copy in span.replicas.iter().skip(1).filter(|copy| copy.state != ReplicaState::Stale) {
                let is_intact =
                    now.registry.standing(map, device, span, copy, now.now_ms) == Standing::Intact;
                let incarnation = now.registry.usable(map, copy.disk, now.now_ms);
                if is_intact && incarnation.is_some_and(|incarnation| incarnation != copy.incarnation) {
                    let run = run_of(device.id, span);
                    batch.push(Verb::Mark { run, disk: copy.disk, state: copy.state, incarnation });
                }
            }
        }
        batch
    }

    fn set(&self, commit: Option<Commit>, on_no_quorum: Option<OnNoQuorum>) -> Result<Change, String> {
        let device = self.device()?;
        let mut change = Change::default();
        let id = device.id;
        match commit {
            Some(Commit::Immediate) if device.commit == Commit::Deferred => {
                change.batch.push(Verb::SetCommit { device: id, commit: Commit::Settling });
                change.why.push(format!(
                    "{}: mirrors store what they hold in memory; once all have, they commit immediately",
                    device.name
                ));
            }
            Some(Commit::Deferred) if device.commit != Commit::Deferred => {
                if !device.is_mirrored() {
                    return Err(format!(
                        "{} is not mirrored: nobody would hold anything in memory for it",
                        device.name
                    ));
                }
                change.batch.push(Verb::SetCommit { device: id, commit: Commit::Deferred });
                change.batch.extend(self.processes(device));
                change.why.push(format!("{}: mirrors acknowledge from memory", device.name));
            }
            _ => {}
        }
        if let Some(on_no_quorum) = on_no_quorum.filter(|wanted| *wanted != device.on_no_quorum) {
            change.batch.push(Verb::SetOnNoQuorum { device: id, on_no_quorum });
            let what = match on_no_quorum {
                OnNoQuorum::Wait => "waits",
                OnNoQuorum::Error => "fails after no_quorum_after",
            };
            change.why.push(format!("{}: what cannot be served {what}", device.name));
        }
        if change.is_empty() {
            change.why.push(format!("{} is set like that already", device.name));
        }
        Ok(change)
    }
}
