//! Disks and nodes leave the cluster: all that they hold is moved elsewhere by a plan, which takes them out of the map
//! at its end.

use super::redistribution::View;
use super::{Change, devices, node_named};
use crate::ids::{DeviceId, DiskId, NodeId};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Verb;
use crate::map::wanted::{Wanted, Wish};
use crate::map::{Device, DistributionMap, Node};
use std::collections::{BTreeMap, BTreeSet};

/// Whether another plan still takes something away from a disk that this one is to remove.
pub(super) fn is_awaited<'a>(plan: &Plan, mut others: impl Iterator<Item = &'a Plan>) -> bool {
    others.any(|other| {
        other.moves.iter().any(|step| step.from.is_some_and(|from| plan.retires.contains(&from)))
    })
}

/// What a plan removes at its end: whatever of it holds nothing once the change so far is made. Of the rest the change
/// says why it stays.
pub(super) fn retire(map: &DistributionMap, plan: &Plan, change: &mut Change) {
    let mut stays = false;
    for disk in plan.retires.iter().filter(|disk| map.disk(**disk).is_some()) {
        let name = map.disk_name(*disk);
        change.batch.push(Verb::RemoveDisk { disk: *disk });
        match map.apply(&change.batch) {
            Ok(_) => change.why.push(format!("{name} is no part of the cluster any more")),
            Err(error) => {
                change.batch.pop();
                stays = true;
                change.why.push(format!(
                    "{name} stays in the cluster, {error}: `mirrorctl disk remove {name}` tries it again"
                ));
            }
        }
    }
    let Some(node) = plan.retires_node.and_then(|node| map.node(node)) else { return };
    if stays {
        let name = &node.name;
        change.why.push(format!(
            "{name} stays in the cluster with what is left on it: `mirrorctl node remove {name}` tries it again"
        ));
        return;
    }
    change.batch.push(Verb::RemoveNode { node: node.id });
    match map.apply(&change.batch) {
        Ok(_) => change.why.push(format!("{} is no part of the cluster any more", node.name)),
        Err(error) => {
            change.batch.pop();
            let name = &node.name;
            change.why.push(format!(
                "{name} stays in the cluster, {error}: `mirrorctl node remove {name}` tries it again"
            ));
        }
    }
}

impl View<'_> {
    /// A disk leaves.
    pub(super) fn remove_disk(&self, name: &str, onto: &[String]) -> Result<Change, String> {
        if !name.contains('/') {
            return Err(format!(
                "{name:?} is no NODE/DISK; for a node with all its disks: mirrorctl node remove {name}"
            ));
        }
        let disks = self.disks_named(name)?.iter().map(|disk| disk.id).collect();
        self.remove(name, disks, None, onto, Change::default())
    }

    /// A node leaves with all its disks. What it exports is exported elsewhere first.
    pub(super) fn remove_node(&self, name: &str, onto: &[String], force: bool) -> Result<Change, String> {
        let map = self.map;
        let node = node_named(map, name)?;
        if map.nodes.len() == 1 {
            return Err(format!("{name} is the only node of the cluster: nothing could take what it has"));
        }
        let used = map.devices.iter().filter(|device| device.claim.node == node.id && !force);
        let is_up = self.now.registry.is_up(name, self.now.now_ms);
        for device in used.filter(|_| is_up) {
            if let Some(user) = devices::user(self, device) {
                return Err(format!(
                    "{} is in use: {user}; end that first, it is exported by another node then, or repeat with --force: \
                     whoever uses it gets errors",
                    device.name
                ));
            }
        }
        let disks = map.disks.iter().filter(|disk| disk.node == node.id).map(|disk| disk.id).collect();
        self.remove(name, disks, Some(node), onto, Change::default())
    }

    fn remove(
        &self,
        name: &str,
        disks: BTreeSet<DiskId>,
        node: Option<&Node>,
        onto: &[String],
        mut change: Change,
    ) -> Result<Change, String> {
        let map = self.map;
        let removes = |plan: &&Plan| !plan.cancelled && disks.iter().any(|disk| plan.retires.contains(disk));
        if let Some(plan) = map.plans.iter().find(removes) {
            return Err(format!(
                "plan {0} removes {name} already, or some of it: mirrorctl plan watch {0}",
                plan.id.0
            ));
        }
        disks.iter().try_for_each(|disk| self.not_concerned(*disk))?;
        self.readable(&disks)?;
        let (takers, left_out) = match onto {
            [] => self.takers(&disks),
            onto => (self.chosen(onto, &disks)?, Vec::new()),
        };
        let wish = Wish { emptied: disks.clone(), takers, ..Wish::default() };
        let wanted = map.wanted(&wish).map_err(|error| {
            let spare =
                |disk: &crate::map::Disk| disk.spare && disk.failed.is_none() && !disks.contains(&disk.id);
            let todo =
                if onto.is_empty() && map.disks.iter().any(spare) { "; --onto may name a spare" } else { "" };
            self.no_room(&error, &left_out) + todo
        })?;
        if let Some(node) = node {
            self.move_exports(node, &disks, &wanted, &mut change)?;
        }
        let retired = Plan {
            retires: disks.clone(),
            retires_node: node.map(|node| node.id),
            ..Plan::new(crate::ids::PlanId(0), String::new(), Vec::new())
        };
        if wanted.moves.is_empty() {
            let exports = change.batch.len();
            retire(map, &retired, &mut change);
            let leaves = disks.len() + usize::from(node.is_some());
            if change.batch.len() != exports + leaves {
                return Err(format!("{name} cannot be removed: {}", change.why.join("; ")));
            }
            return Ok(change);
        }
        change.why.extend(self.lines(&wanted));
        let names: Vec<String> = disks.iter().map(|disk| map.disk_name(*disk)).collect();
        change.why.push(match node {
            Some(node) if names.is_empty() => format!("then {} leaves the cluster", node.name),
            Some(node) => format!("then {} leaves the cluster with {}", node.name, names.join(", ")),
            None => format!("then {} leaves the cluster", names.join(", ")),
        });
        if let Some(topology) = map.topology {
            let name = topology.name();
            change
                .why
                .push(format!("topology {name} may not be kept then; `mirrorctl rebalance` makes it again"));
        }
        let cause = format!("{name} leaves the cluster, by the operator");
        let Change { batch, why } = change;
        let mut change = self.begin(batch, wanted, BTreeSet::new(), cause, why)?;
        for verb in &mut change.batch {
            if let Verb::BeginPlan { plan } = verb {
                plan.retires.clone_from(&retired.retires);
                plan.retires_node = retired.retires_node;
            }
        }
        Ok(change)
    }

    /// What a node exports is exported by whoever there is that will have most of it.
    fn move_exports(
        &self,
        node: &Node,
        emptied: &BTreeSet<DiskId>,
        wanted: &Wanted,
        change: &mut Change,
    ) -> Result<(), String> {
        for device in self.map.devices.iter().filter(|device| device.claim.node == node.id) {
            let shares = self.shares(device, emptied, &wanted.moves);
            let is_up = |id: &NodeId| {
                let name = self.map.node(*id).map(|node| &node.name);
                name.is_some_and(|name| self.now.registry.is_up(name, self.now.now_ms))
            };
            let there = shares.iter().filter(|(id, _)| is_up(id));
            let Some((to, slices)) = there.max_by_key(|(id, slices)| (**slices, std::cmp::Reverse(**id)))
            else {
                return Err(format!(
                    "nobody is there who could export {} instead of {}: see `mirrorctl status`",
                    device.name, node.name
                ));
            };
            change.batch.push(Verb::MoveClaim { device: device.id, node: *to });
            change.why.push(format!(
                "{} is exported by {} from the beginning, which then has {slices} of its {} slices",
                device.name,
                self.map.node_name(*to),
                device.slices
            ));
        }
        Ok(())
    }

    /// How many slices of a device each node has once these moves are done.
    fn shares(&self, device: &Device, emptied: &BTreeSet<DiskId>, moves: &[Move]) -> BTreeMap<NodeId, u64> {
        let mut shares: BTreeMap<NodeId, u64> = BTreeMap::new();
        let of = |id: DeviceId| id == device.id;
        for span in &device.spans {
            for copy in span.members().filter(|copy| !emptied.contains(&copy.disk)) {
                let node = self.map.node_of(copy.disk).unwrap_or_default();
                *shares.entry(node).or_default() += u64::from(span.count);
            }
        }
        for step in moves.iter().filter(|step| of(step.run.device)) {
            for (span, count) in self.map.spans_of(step.run) {
                if span.replica_on(step.to).is_none() {
                    let node = self.map.node_of(step.to).unwrap_or_default();
                    *shares.entry(node).or_default() += u64::from(count);
                }
            }
        }
        shares
    }
}
