//! An operator wants copies elsewhere: a node or a disk emptied, so that it is a spare, or all disks equally full.
//!
//! What is to move is computed once ([`wanted`](crate::map::wanted)) and becomes a plan, which goes on by itself
//! ([`advance`](super::advance)). Everything that could be in its way is looked at before anything moves.

use super::regeneration::Situation;
use super::repair::{SpanPlan, plan_span};
use super::{Change, Lines, node_named};
use crate::config::format_bytes;
use crate::control::{Redistribution, RedistributionOrder};
use crate::ids::{DeviceId, DiskId, NodeId, PlanId};
use crate::map::plan::{Move, Plan};
use crate::map::runs::Runs;
use crate::map::verbs::Verb;
use crate::map::wanted::{NoPlan, Wanted, Wish, copies_of_all};
use crate::map::{Disk, DistributionMap, Topology};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// Disks that a line names; more would not make it clearer.
const NAMED_MAX: usize = 6;

/// What would be done, a line for each thing, and the change; an error, for people, if it cannot be done.
pub fn plan(
    map: &DistributionMap,
    now: &Situation<'_>,
    order: &RedistributionOrder,
) -> Result<Change, String> {
    let view = View { map, now, carry_out: order.carry_out };
    match &order.wish {
        Redistribution::Spare { emptied, onto } => view.make_spare(emptied, onto),
        Redistribution::Balance => view.balance("by the operator"),
        Redistribution::Topology { topology, copies } => view.topology(*topology, *copies),
        Redistribution::Copies { device, copies } => view.copies(device, *copies),
        Redistribution::RemoveDisk { disk, onto } => view.remove_disk(disk, onto),
        Redistribution::RemoveNode { node, onto, force } => view.remove_node(node, onto, *force),
    }
}

/// What the decision is made from.
pub(super) struct View<'a> {
    pub(super) map: &'a DistributionMap,
    pub(super) now: &'a Situation<'a>,
    /// An operator is told what to type next.
    pub(super) carry_out: bool,
}

impl View<'_> {
    /// Moves everything away from disks, which are spares then.
    pub(super) fn empty(
        &self,
        emptied: BTreeSet<DiskId>,
        takers: BTreeSet<DiskId>,
        cause: String,
    ) -> Result<Change, String> {
        self.readable(&emptied)?;
        let wish = Wish { emptied: emptied.clone(), takers, ..Wish::default() };
        let wanted = self.map.wanted(&wish).map_err(|error| error.to_string())?;
        let lines = self.lines(&wanted);
        let batch = self.idle(&emptied, &wanted);
        self.begin(batch, wanted, emptied, cause, lines)
    }

    /// What the plan does not empty is empty already, and may be a spare already.
    fn idle(&self, emptied: &BTreeSet<DiskId>, wanted: &Wanted) -> Vec<Verb> {
        let idle = emptied.iter().filter(|id| {
            let moved = || wanted.moves.iter().any(|step| step.from == Some(**id));
            let disk = self.map.disk(**id);
            let works = disk.is_some_and(|disk| disk.failed.is_none() && !disk.spare);
            works && !self.map.is_in_use(**id) && !moved()
        });
        idle.map(|disk| Verb::SetSpare { disk: *disk, spare: true }).collect()
    }

    fn make_spare(&self, name: &str, onto: &[String]) -> Result<Change, String> {
        let map = self.map;
        let emptied = self.disks_named(name)?;
        if emptied.iter().all(|disk| disk.spare) {
            return Err(format!("{name} is a spare already"));
        }
        let emptied: BTreeSet<DiskId> = emptied.iter().map(|disk| disk.id).collect();
        emptied.iter().try_for_each(|disk| self.not_concerned(*disk))?;
        self.readable(&emptied)?;
        let (takers, left_out) = match onto {
            [] => self.takers(&emptied),
            onto => (self.chosen(onto, &emptied)?, Vec::new()),
        };
        let wish = Wish { emptied: emptied.clone(), takers, ..Wish::default() };
        let wanted = map.wanted(&wish).map_err(|error| {
            let spare = || map.disks.iter().any(|disk| disk.spare && disk.failed.is_none());
            let todo = if onto.is_empty() && spare() { "; --onto may name a spare" } else { "" };
            self.no_room(&error, &left_out) + todo
        })?;
        let mut lines = match wanted.moves.as_slice() {
            [] => vec![format!("{name} holds nothing")],
            _ => self.lines(&wanted),
        };
        let works = |disk: &&DiskId| map.disk(**disk).is_some_and(|disk| disk.failed.is_none());
        let spares: Vec<String> = emptied.iter().filter(works).map(|disk| map.disk_name(*disk)).collect();
        let exported = map
            .devices
            .iter()
            .filter(|device| emptied.iter().any(|disk| map.node_of(*disk) == Some(device.claim.node)));
        let exported: Vec<&str> = exported.map(|device| device.name.as_str()).collect();
        if !exported.is_empty() && !wanted.moves.is_empty() {
            lines.push(format!("{} stay exported where they are", exported.join(", ")));
        }
        if !spares.is_empty() {
            let (verb, when) =
                if spares.len() == 1 { ("is a spare", "then") } else { ("are spares", "then") };
            lines.push(format!("{when} {} {verb}", spares.join(", ")));
        }
        let batch = self.idle(&emptied, &wanted);
        self.begin(batch, wanted, emptied, format!("{name} becomes a spare, by the operator"), lines)
    }

    /// Makes all disks equally full. `whose` wish it is, for people.
    pub(super) fn balance(&self, whose: &str) -> Result<Change, String> {
        let map = self.map;
        self.nothing_moves()?;
        self.all_there(map.topology)?;
        let (takers, _) = self.takers(&BTreeSet::new());
        // What was taken back half way, or was never made: as many as each device is to have.
        let copies = map.devices.iter().filter(|device| {
            device.spans.iter().any(|span| span.replicas.len() != usize::from(device.copies))
        });
        let copies = copies.map(|device| (device.id, device.copies)).collect();
        let wish = Wish { takers, even: true, topology: map.topology, copies, ..Wish::default() };
        let wanted = map.wanted(&wish).map_err(|error| error.to_string())?;
        if wanted.moves.is_empty() {
            return Ok(Change {
                batch: Vec::new(),
                why: vec!["nothing is to be moved: it is as even as the rules allow".to_owned()],
            });
        }
        self.all_readable(&wanted)?;
        let lines = self.lines(&wanted);
        self.begin(Vec::new(), wanted, BTreeSet::new(), format!("disks become equally full, {whose}"), lines)
    }

    fn topology(&self, topology: Option<Topology>, copies: Option<u8>) -> Result<Change, String> {
        let map = self.map;
        self.nothing_moves()?;
        self.all_there(topology)?;
        let (takers, left_out) = self.takers(&BTreeSet::new());
        let copies = copies.map_or_else(BTreeMap::new, |copies| copies_of_all(map, copies));
        let wish = Wish { takers, even: true, topology, copies: copies.clone(), ..Wish::default() };
        let wanted = map.wanted(&wish).map_err(|error| self.no_room(&error, &left_out))?;
        self.all_readable(&wanted)?;
        let mut batch = Vec::new();
        if topology != map.topology {
            batch.push(Verb::SetTopology { topology });
        }
        batch.extend(self.set_copies(&copies));
        let named = topology.map_or("any that the rules allow", Topology::name);
        let mut lines = vec![match wanted.moves.as_slice() {
            [] => format!("topology {named}: nothing is to be moved, it lies like that already"),
            _ => format!("topology {named}"),
        }];
        lines.extend(self.copies_lines(&copies));
        if !wanted.moves.is_empty() {
            lines.extend(self.lines(&wanted));
        }
        self.begin(batch, wanted, BTreeSet::new(), format!("topology {named}, by the operator"), lines)
    }

    fn copies(&self, name: &str, copies: u8) -> Result<Change, String> {
        let map = self.map;
        let Some(device) = map.device_named(name) else {
            let names: Vec<&str> = map.devices.iter().map(|device| device.name.as_str()).collect();
            return Err(format!("there is no device {name:?}; the devices are {}", names.join(", ")));
        };
        let moves = |plan: &&Plan| plan.moves.iter().any(|step| step.run.device == device.id);
        if let Some(plan) = map.plans.iter().find(moves) {
            return Err(already(plan, &device.name));
        }
        let (takers, left_out) = self.takers(&BTreeSet::new());
        let (id, topology) = (device.id, map.topology);
        self.all_there(topology)?;
        let copies_of = BTreeMap::from([(id, copies)]);
        let only = BTreeSet::from([id]);
        let wish = Wish { takers, topology, copies: copies_of.clone(), only, ..Wish::default() };
        let wanted = map.wanted(&wish).map_err(|error| self.no_room(&error, &left_out))?;
        self.all_readable(&wanted)?;
        let batch = self.set_copies(&copies_of);
        let mut lines = self.copies_lines(&copies_of);
        if wanted.moves.is_empty() && batch.is_empty() {
            lines.push(format!("{name} has {} already", copies_text(copies)));
        } else if !wanted.moves.is_empty() {
            lines.extend(self.lines(&wanted));
        }
        let cause = format!("{name} is to have {}, by the operator", copies_text(copies));
        self.begin(batch, wanted, BTreeSet::new(), cause, lines)
    }

    fn set_copies(&self, copies: &BTreeMap<DeviceId, u8>) -> Vec<Verb> {
        let others = |(id, copies): &(&DeviceId, &u8)| {
            self.map.device(**id).is_some_and(|device| device.copies != **copies)
        };
        let changed = copies.iter().filter(others);
        changed.map(|(device, copies)| Verb::SetCopies { device: *device, copies: *copies }).collect()
    }

    fn copies_lines(&self, copies: &BTreeMap<DeviceId, u8>) -> Vec<String> {
        let changed = copies.iter().filter_map(|(id, copies)| {
            let device = self.map.device(*id).filter(|device| device.copies != *copies)?;
            let alone = if *copies == 1 { "; what is on it is lost with the disk that has it" } else { "" };
            Some(format!("{}: {} instead of {}{alone}", device.name, copies_text(*copies), device.copies))
        });
        changed.collect()
    }

    /// That nobody is away whose place in a ring, or whose partner, would be another's for the time being.
    fn all_there(&self, topology: Option<Topology>) -> Result<(), String> {
        if !matches!(topology, Some(Topology::Pair | Topology::Chain)) {
            return Ok(());
        }
        let in_use = self.map.disks_in_use();
        let usable = |disk: DiskId| self.now.registry.usable(self.map, disk, self.now.now_ms).is_some();
        let Some(disk) = self.map.disks.iter().find(|disk| in_use.contains(&disk.id) && !usable(disk.id))
        else {
            return Ok(());
        };
        let name = self.map.disk_name(disk.id);
        Err(match disk.failed {
            Some(_) => format!(
                "{name} has failed and has its place still, which would be given to others: `mirrorctl disk remove {name}` \
                 makes its data again elsewhere, whoever is there then"
            ),
            None => format!(
                "{name} holds data and is not there, so its place would be given to others: start it, or wait until its data \
                 is made again elsewhere, see `mirrorctl status`"
            ),
        })
    }

    /// That no plan is under way.
    fn nothing_moves(&self) -> Result<(), String> {
        self.map.plans.first().map_or(Ok(()), |plan| Err(already(plan, "something")))
    }

    /// That somebody serves everything that is to be copied.
    fn all_readable(&self, wanted: &Wanted) -> Result<(), String> {
        let moved = moved(wanted.moves.iter());
        let unserved = self.unserved(|device, first, count| {
            moved.get(&device).is_some_and(|runs| runs.overlaps(first, first + count))
        });
        if unserved.is_empty() {
            return Ok(());
        }
        Err(format!("nobody could read what is to move: {}; see `mirrorctl status`", unserved.join("; ")))
    }

    /// The disks that an operator means by `NODE` or `NODE/DISK`.
    pub(super) fn disks_named(&self, name: &str) -> Result<Vec<&Disk>, String> {
        let (node, disk) = match name.split_once('/') {
            Some((node, disk)) => (node, Some(disk)),
            None => (name, None),
        };
        let node = node_named(self.map, node)?;
        let of_node: Vec<&Disk> = self.map.disks.iter().filter(|disk| disk.node == node.id).collect();
        let names = || of_node.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        match disk {
            Some(wanted) => match of_node.iter().find(|disk| disk.name == wanted) {
                Some(disk) => Ok(vec![disk]),
                None => Err(format!("node {} has no disk {wanted:?}; its disks are {}", node.name, names())),
            },
            None if of_node.is_empty() => Err(format!("node {} has no disks in the map", node.name)),
            None => Ok(of_node),
        }
    }

    /// That no plan takes anything to or from a disk.
    pub(super) fn not_concerned(&self, disk: DiskId) -> Result<(), String> {
        let plan = self.map.plans.iter().find(|plan| plan.concerns(disk));
        plan.map_or(Ok(()), |plan| Err(already(plan, &self.map.disk_name(disk))))
    }

    /// That somebody serves everything that lies on these disks.
    pub(super) fn readable(&self, emptied: &BTreeSet<DiskId>) -> Result<(), String> {
        let unserved = self.unserved(|device, first, _| {
            let span = self.map.device(device).and_then(|device| device.span(crate::ids::SliceIndex(first)));
            span.is_some_and(|span| span.replicas.iter().any(|copy| emptied.contains(&copy.disk)))
        });
        if unserved.is_empty() {
            return Ok(());
        }
        Err(format!("nobody could read what is to move: {}; see `mirrorctl status`", unserved.join("; ")))
    }

    /// Slices that nobody serves now, of those that `about` chooses by device, first slice and count.
    fn unserved(&self, about: impl Fn(DeviceId, u32, u32) -> bool) -> Vec<String> {
        let mut unserved = Vec::new();
        for device in &self.map.devices {
            let mut lines = Lines::default();
            for span in device.spans.iter().filter(|span| about(device.id, span.first.0, span.count)) {
                if plan_span(self.map, device, span, self.now.registry, self.now.now_ms) != SpanPlan::Served {
                    let (disk, name) = (self.map.disk_name(span.primary().disk), &device.name);
                    let has_failed = |disk| self.map.disk(disk).is_some_and(|disk| disk.failed.is_some());
                    lines.add(
                        span,
                        match span.members().all(|copy| has_failed(copy.disk)) {
                            true => format!(
                                "they are on {disk}, which has failed, and nowhere else: `mirrorctl device delete {name}` \
                                 gives up all of it"
                            ),
                            false => format!("their primary {disk} does not serve them"),
                        },
                    );
                }
            }
            unserved.extend(lines.finish(&device.name, device.slices));
        }
        unserved
    }

    /// Disks that may take something unless an operator chooses others, and why some may not.
    pub(super) fn takers(&self, emptied: &BTreeSet<DiskId>) -> (BTreeSet<DiskId>, Vec<String>) {
        let (mut takers, mut left_out) = (BTreeSet::new(), Vec::new());
        let mut concerned: HashMap<DiskId, PlanId> = HashMap::new();
        for plan in &self.map.plans {
            let disks = plan.moves.iter().flat_map(|step| [Some(step.to), step.from]).flatten();
            for disk in disks.chain(plan.spares.iter().chain(&plan.retires).copied()) {
                concerned.entry(disk).or_insert(plan.id);
            }
        }
        for disk in self.map.disks.iter().filter(|disk| !emptied.contains(&disk.id)) {
            let name = || self.map.disk_name(disk.id);
            if disk.failed.is_some() {
                left_out.push(format!("{} has failed", name()));
            } else if disk.spare {
                left_out.push(format!("{} is a spare", name()));
            } else if self.now.registry.usable(self.map, disk.id, self.now.now_ms).is_none() {
                left_out.push(format!("{} is not there", name()));
            } else if let Some(plan) = concerned.get(&disk.id) {
                left_out.push(format!("{} belongs to plan {}", name(), plan.0));
            } else {
                takers.insert(disk.id);
            }
        }
        (takers, left_out)
    }

    /// Disks that an operator chose.
    pub(super) fn chosen(
        &self,
        onto: &[String],
        emptied: &BTreeSet<DiskId>,
    ) -> Result<BTreeSet<DiskId>, String> {
        let mut chosen = BTreeSet::new();
        for name in onto {
            for disk in self.disks_named(name)? {
                let disk_name = self.map.disk_name(disk.id);
                if emptied.contains(&disk.id) {
                    return Err(format!("{disk_name} is to be emptied, it cannot take anything"));
                }
                self.not_concerned(disk.id)?;
                if self.now.registry.usable(self.map, disk.id, self.now.now_ms).is_none() {
                    return Err(format!(
                        "{disk_name} cannot take anything, it is not there or has failed: see `mirrorctl status`"
                    ));
                }
                chosen.insert(disk.id);
            }
        }
        Ok(chosen)
    }

    /// Why nothing leads there, with the disks that might have had room.
    pub(super) fn no_room(&self, error: &NoPlan, left_out: &[String]) -> String {
        let text = error.to_string();
        if left_out.is_empty() || !matches!(error, NoPlan::NoRoom { .. }) {
            return text;
        }
        let more = left_out.len().saturating_sub(NAMED_MAX);
        let mut named = left_out[..left_out.len() - more].join(", ");
        if more > 0 {
            named += &format!(", and {more} more");
        }
        format!("{text}; left out: {named}")
    }

    /// What a plan does, for people.
    pub(super) fn lines(&self, wanted: &Wanted) -> Vec<String> {
        let map = self.map;
        let bytes = |slices: u64| format_bytes(slices * u64::from(map.slice_bytes));
        let mut by_disk: BTreeMap<DiskId, u64> = BTreeMap::new();
        let mut by_device: BTreeMap<DeviceId, (u64, usize, u64)> = BTreeMap::new();
        for step in &wanted.moves {
            let copies = map.spans_of(step.run).filter(|(span, _)| span.replica_on(step.to).is_none());
            let copied: u64 = copies.map(|(_, count)| u64::from(count)).sum();
            if copied > 0 {
                *by_disk.entry(step.to).or_default() += copied;
            }
            let entry = by_device.entry(step.run.device).or_default();
            entry.0 += copied;
            entry.1 += 1;
            entry.2 += if step.primary { u64::from(step.run.count) } else { 0 };
        }
        let mut disks: Vec<String> = by_disk
            .iter()
            .take(NAMED_MAX)
            .map(|(disk, slices)| format!("{} ({})", map.disk_name(*disk), bytes(*slices)))
            .collect();
        if by_disk.len() > NAMED_MAX {
            disks.push(format!("{} more disks", by_disk.len() - NAMED_MAX));
        }
        let onto = if disks.is_empty() { String::new() } else { format!(", onto {}", disks.join(", ")) };
        let mut lines =
            vec![format!("{} to copy, {}{onto}", bytes(wanted.copied), runs_text(wanted.moves.len()))];
        for (device, (copied, runs, primaries)) in by_device {
            let name = map.device(device).map_or_else(|| device.to_string(), |device| device.name.clone());
            let roles = if primaries > 0 {
                format!(", {} change their primary", bytes(primaries))
            } else {
                String::new()
            };
            lines.push(format!("{name}: {} to copy, {}{roles}", bytes(copied), runs_text(runs)));
        }
        lines.extend(self.longest(wanted));
        lines.push(self.at_risk(wanted));
        lines
    }

    /// How long it takes at most, as far as that can be known: while hosts leave no gaps, and no disk or link is slower.
    fn longest(&self, wanted: &Wanted) -> Option<String> {
        let pace = self.now.policy.node.pace;
        let slowest = if pace.floor > 0 { pace.floor } else { pace.rate? };
        let mut by_primary: BTreeMap<NodeId, u64> = BTreeMap::new();
        for step in &wanted.moves {
            let copied = self.map.spans_of(step.run).filter(|(span, _)| span.replica_on(step.to).is_none());
            for (span, count) in copied {
                let node = self.map.node_of(span.primary().disk).unwrap_or_default();
                *by_primary.entry(node).or_default() += u64::from(count);
            }
        }
        let most = by_primary.into_values().max()? * u64::from(self.map.slice_bytes);
        let seconds = most.div_ceil(slowest);
        let time = humantime::format_duration(Duration::from_secs(seconds));
        Some(match pace.floor {
            0 => format!("at least {time}, since regen_rate is {}/s a node", format_bytes(slowest)),
            _ => format!(
                "at most {time} where disks and links can do {}/s a node while hosts are busy (regen_floor), less where \
                 hosts leave gaps",
                format_bytes(slowest)
            ),
        })
    }

    /// What a failure could take meanwhile: no more than now, but that may be something.
    fn at_risk(&self, wanted: &Wanted) -> String {
        let mut alone = Vec::new();
        let moved = moved(wanted.moves.iter());
        for device in &self.map.devices {
            let mut lines = Lines::default();
            let Some(runs) = moved.get(&device.id) else { continue };
            for span in device.spans.iter().filter(|span| runs.overlaps(span.first.0, span.end())) {
                let members = span.members().count();
                if members < usize::from(device.copies) {
                    lines.add(span, format!("{members} of {} copies in sync", device.copies));
                }
            }
            alone.extend(lines.finish(&device.name, device.slices));
        }
        match alone.as_slice() {
            [] => "at risk meanwhile: nothing; a copy goes when its successor is in sync".to_owned(),
            alone => format!("at risk meanwhile, as it is now: {}", alone.join("; ")),
        }
    }

    pub(super) fn begin(
        &self,
        mut batch: Vec<Verb>,
        wanted: Wanted,
        mut spares: BTreeSet<DiskId>,
        cause: String,
        mut lines: Vec<String>,
    ) -> Result<Change, String> {
        let map = self.map;
        if wanted.moves.is_empty() {
            return Ok(Change { batch, why: lines });
        }
        let new = moved(wanted.moves.iter());
        let overlaps = |step: &Move| {
            let end = step.run.first.0.saturating_add(step.run.count);
            new.get(&step.run.device).is_some_and(|runs| runs.overlaps(step.run.first.0, end))
        };
        if let Some(plan) = map.plans.iter().find(|plan| plan.moves.iter().any(overlaps)) {
            return Err(already(plan, "some of these slices"));
        }
        let targets: BTreeSet<DiskId> = wanted.moves.iter().map(|step| step.to).collect();
        for disk in targets.into_iter().filter(|disk| map.disk(*disk).is_some_and(|disk| disk.spare)) {
            batch.push(Verb::SetSpare { disk, spare: false });
            spares.insert(disk);
        }
        let id = PlanId(map.version.0 + 1);
        if self.carry_out {
            lines.push(format!("plan {} does it: mirrorctl plan watch {}", id.0, id.0));
        }
        batch.push(Verb::BeginPlan { plan: Plan { spares, ..Plan::new(id, cause, wanted.moves) } });
        Ok(Change { batch, why: lines })
    }
}

fn copies_text(copies: u8) -> String {
    if copies == 1 { "1 copy".to_owned() } else { format!("{copies} copies") }
}

/// The slices that are moved, by device.
fn moved<'a>(moves: impl Iterator<Item = &'a Move>) -> HashMap<DeviceId, Runs> {
    let mut moved: HashMap<DeviceId, Runs> = HashMap::new();
    for Move { run, .. } in moves {
        moved.entry(run.device).or_default().add(run.first.0, run.first.0.saturating_add(run.count));
    }
    moved
}

fn runs_text(runs: usize) -> String {
    if runs == 1 { "1 run".to_owned() } else { format!("{runs} runs") }
}

pub(super) fn already(plan: &Plan, what: &str) -> String {
    if plan.cancelled {
        return format!(
            "plan {} moved {what}, is cancelled and not over: a slice has a copy too many until it is certain which can \
             go, see `mirrorctl status`",
            plan.id.0
        );
    }
    format!(
        "plan {0} moves {what} at this moment: wait for its end with `mirrorctl plan watch {0}`, or give it up with \
         `mirrorctl plan cancel {0}`",
        plan.id.0
    )
}
