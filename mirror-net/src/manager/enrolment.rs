//! A disk or a node enters a cluster that is there: look at its disks, reserve their ids, format them, store the map that
//! has them.
//!
//! Nothing is formatted before every disk has passed the check, nor under an id that is not stored: whatever fails after
//! that leaves a disk that names an id which no other ever gets.

use super::newcomer::{self, CHECK_MS_MAX, FORMAT_MS_MAX};
use super::redistribution;
use super::regeneration::Situation;
use super::registry::{Registered, Registry};
use super::{Change, ConnectionId, Output, Ticket};
use crate::config::{ClusterFile, Segments, check_name, format_bytes};
use crate::control::{
    DiskContent, DiskInventory, EnrolOrder, Entrant, FormatDisk, FormatOrder, ManagerMessage, Redistribution,
    RedistributionOrder,
};
use crate::ids::{AttachId, DiskId, NodeId, ProcessId};
use crate::map::verbs::Verb;
use crate::map::{Disk, DistributionMap, Node};

/// An enrolment under way.
#[derive(Debug)]
pub(super) struct Enrolment {
    pub(super) ticket: Ticket,
    node: Joining,
    connection: ConnectionId,
    process: ProcessId,
    disks: Vec<Newcomer>,
    spare: bool,
    force: bool,
    carry_out: bool,
    step: Step,
    deadline_ms: u64,
    failure: Option<String>,
}

/// Whose disks enter.
#[derive(Debug)]
enum Joining {
    /// A node's of the map.
    Member { id: NodeId, name: String },
    /// They enter with their node; its id counts from the moment that it is reserved.
    Stranger(Node),
}

#[derive(Debug)]
struct Newcomer {
    name: String,
    path: String,
    segments: Segments,
    id: DiskId,
    /// What its node said of it.
    found: Option<DiskInventory>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// The node looks at the disk, or checks its disks.
    Looking,
    /// It has; ids are to be reserved.
    Looked,
    /// The node formats.
    Formatting,
    /// It has; the map is to have them.
    Formatted,
}

/// Where an enrolment has got to.
pub(super) enum Progress {
    /// An answer is outstanding.
    Waiting,
    /// Store this, then ask again.
    Reserve(Change),
    /// It was a dry run: this would be done.
    Shown(Vec<String>),
    /// Store this: it is done then.
    Enter(Change),
    /// It failed; that connection owes an answer that would be taken for one to a later question.
    Failed { reason: String, close: Option<ConnectionId> },
}

impl Joining {
    fn name(&self) -> &str {
        match self {
            Self::Member { name, .. } => name,
            Self::Stranger(node) => &node.name,
        }
    }

    fn id(&self) -> NodeId {
        match self {
            Self::Member { id, .. } => *id,
            Self::Stranger(node) => node.id,
        }
    }
}

impl Enrolment {
    /// Checks what can be known without asking, then has the node look.
    pub(super) fn start(
        now_ms: u64,
        (ticket, order): (Ticket, &EnrolOrder),
        map: &DistributionMap,
        registry: &Registry,
        outputs: &mut impl FnMut(Output),
    ) -> Result<Self, String> {
        let (node, disks, spare) = match &order.what {
            Entrant::Disk { disk, path, segments, spare } => {
                let (node, newcomer) = disk_of_member(map, disk, path, *segments)?;
                (node, vec![newcomer], *spare)
            }
            Entrant::Node { file, node } => stranger(map, file, node)?,
        };
        let name = node.name();
        let Some(entry) = registry.get(name).filter(|entry| entry.is_up(now_ms)) else {
            return Err(format!("{name} is not connected: start ublk-server there, then repeat"));
        };
        let mut enrolment = Self {
            ticket,
            connection: entry.connection,
            process: entry.process,
            disks,
            spare,
            force: order.force,
            carry_out: order.carry_out,
            step: Step::Looking,
            deadline_ms: now_ms + CHECK_MS_MAX,
            failure: None,
            node,
        };
        match &enrolment.node {
            Joining::Member { .. } => {
                let newcomer = &enrolment.disks[0];
                let (name, path) = (newcomer.name.clone(), newcomer.path.clone());
                let message = ManagerMessage::Look { name, path };
                outputs(Output::Send { connection: enrolment.connection, message });
            }
            Joining::Stranger(_) => {
                enrolment.find_disks(map, entry)?;
                enrolment.order(map, true, outputs);
            }
        }
        Ok(enrolment)
    }

    /// The disks of a node that registered with them.
    fn find_disks(&mut self, map: &DistributionMap, entry: &Registered) -> Result<(), String> {
        let Joining::Stranger(node) = &self.node else { return Ok(()) };
        newcomer::check_address(&node.name, entry, &node.address)?;
        for disk in &mut self.disks {
            let found = newcomer::find_disk(&node.name, entry, &disk.name, &disk.path)?;
            may_be_formatted(map, &node.name, found, self.force)?;
            disk.found = Some(found.clone());
        }
        for newcomer in &self.disks {
            newcomer.entry(map, &self.node, self.spare)?;
        }
        Ok(())
    }

    /// Has the node check its disks, or format them.
    fn order(&mut self, map: &DistributionMap, check_only: bool, outputs: &mut impl FnMut(Output)) {
        let added = matches!(self.node, Joining::Member { .. });
        let mut disks = Vec::new();
        for newcomer in &self.disks {
            match newcomer.entry(map, &self.node, self.spare) {
                Ok(disk) => disks.push(FormatDisk {
                    name: disk.name,
                    path: added.then(|| newcomer.path.clone()),
                    disk: disk.id,
                    slots: disk.slots,
                }),
                Err(error) => self.failure = Some(error),
            }
        }
        let order = FormatOrder {
            cluster: map.cluster,
            node: self.node.id(),
            slice_bytes: map.slice_bytes,
            disks,
            force: self.force,
            check_only,
        };
        outputs(Output::Send { connection: self.connection, message: ManagerMessage::Format(order) });
    }

    /// What a node found where it was told to look.
    pub(super) fn looked(
        &mut self,
        map: &DistributionMap,
        connection: ConnectionId,
        found: Result<DiskInventory, String>,
    ) {
        if connection != self.connection || self.step != Step::Looking {
            return;
        }
        let name = self.node.name();
        match found.and_then(|found| may_be_formatted(map, name, &found, self.force).map(|()| found)) {
            Ok(found) => self.disks[0].found = Some(found),
            Err(error) => self.failure = Some(error),
        }
        self.step = Step::Looked;
    }

    /// The node has checked its disks, or formatted them.
    pub(super) fn formatted(&mut self, connection: ConnectionId, error: Option<String>, attach: &[AttachId]) {
        if connection != self.connection || !matches!(self.step, Step::Looking | Step::Formatting) {
            return;
        }
        let formatting = self.step == Step::Formatting;
        if let Some(error) = error {
            self.failure = Some(format!("node {}: {error}", self.node.name()));
        } else if formatting {
            if attach.len() != self.disks.len() {
                self.failure = Some(format!("node {} runs another release: update it", self.node.name()));
            }
            for (newcomer, attach) in self.disks.iter_mut().zip(attach) {
                newcomer.found.iter_mut().for_each(|found| found.attach = *attach);
            }
        }
        self.step = if formatting { Step::Formatted } else { Step::Looked };
    }

    /// A node's connection is gone or was replaced.
    pub(super) fn disconnected(&mut self, connection: ConnectionId) {
        if connection == self.connection && self.step != Step::Formatted {
            self.failure = Some(format!("node {} disconnected meanwhile", self.node.name()));
        }
    }

    /// Goes on if nothing is outstanding and nothing is being stored.
    pub(super) fn progress(&mut self, map: &DistributionMap, now: &Situation) -> Progress {
        if let Some(reason) = self.failure.take() {
            return Progress::Failed { reason: self.failed(&reason), close: None };
        }
        match self.step {
            Step::Looking | Step::Formatting if now.now_ms < self.deadline_ms => Progress::Waiting,
            Step::Looking | Step::Formatting => {
                let reason = self.failed(&format!("no answer from {}", self.node.name()));
                Progress::Failed { reason, close: Some(self.connection) }
            }
            Step::Looked => self
                .reserve(map, now)
                .unwrap_or_else(|reason| Progress::Failed { reason: self.failed(&reason), close: None }),
            Step::Formatted => {
                let entered = self.enter(map);
                match entered.and_then(|change| self.applied(map, &change).map(|_| change)) {
                    Ok(change) => Progress::Enter(change),
                    Err(reason) => Progress::Failed { reason: self.failed(&reason), close: None },
                }
            }
        }
    }

    /// Numbers everything by ids that nothing had, and shows that the map could have it.
    fn reserve(&mut self, map: &DistributionMap, now: &Situation) -> Result<Progress, String> {
        let mut next = map.next_disk();
        for newcomer in &mut self.disks {
            newcomer.id = next;
            next.0 += 1;
        }
        let mut last_node = NodeId(map.last_node);
        if let Joining::Stranger(node) = &mut self.node {
            node.id = map.next_node().ok_or("all numbers for nodes are used up")?;
            last_node = node.id;
        }
        let reserve = Verb::Reserve { disk: DiskId(next.0 - 1), node: last_node };
        let mut change = self.enter(map)?;
        change.batch.insert(0, reserve.clone());
        let after = self.applied(map, &change)?;
        if !self.carry_out {
            return Ok(Progress::Shown(self.shown(change.why, &after, now)));
        }
        let why = format!("ids are reserved for {}", self.names().join(", "));
        Ok(Progress::Reserve(Change { batch: vec![reserve], why: vec![why] }))
    }

    /// The ids are stored: the node formats.
    pub(super) fn reserved(&mut self, now_ms: u64, map: &DistributionMap, outputs: &mut impl FnMut(Output)) {
        self.step = Step::Formatting;
        self.deadline_ms = now_ms + FORMAT_MS_MAX;
        self.order(map, false, outputs);
    }

    fn applied(&self, map: &DistributionMap, change: &Change) -> Result<DistributionMap, String> {
        let after = map.apply(&change.batch).map_err(|error| error.to_string())?;
        after.ok_or_else(|| format!("{} is in the cluster already", self.names().join(", ")))
    }

    fn names(&self) -> Vec<String> {
        let node = self.node.name();
        self.disks.iter().map(|disk| format!("{node}/{}", disk.name)).collect()
    }

    fn enter(&self, map: &DistributionMap) -> Result<Change, String> {
        let mut change = Change::default();
        if let Joining::Stranger(node) = &self.node {
            change.batch.push(Verb::AddNode { node: node.clone() });
            change.why.push(format!("node {} enters the cluster", node.name));
        }
        for newcomer in &self.disks {
            let disk = newcomer.entry(map, &self.node, self.spare)?;
            let slots = disk.slots;
            change.why.push(format!(
                "{}/{} ({}, {}) {}: {} slices for primaries, {} for mirrors, {} not mirrored",
                self.node.name(),
                disk.name,
                newcomer.path,
                format_bytes(newcomer.found.as_ref().map_or(0, |found| found.bytes)),
                if disk.spare { "enters the cluster as a spare" } else { "enters the cluster" },
                slots.primary,
                slots.secondary,
                slots.unmirrored
            ));
            change.batch.push(Verb::AddDisk { disk });
        }
        Ok(change)
    }

    /// What a dry run tells, with what a `rebalance` would do then.
    fn shown(&self, mut lines: Vec<String>, after: &DistributionMap, now: &Situation) -> Vec<String> {
        if self.spare {
            return lines;
        }
        let mut registry = now.registry.clone();
        self.enter_registry(after, &mut registry);
        let then = Situation { registry: &registry, ..*now };
        let order = RedistributionOrder { wish: Redistribution::Balance, carry_out: false };
        lines.push("then `mirrorctl rebalance` spreads data onto it:".to_owned());
        match redistribution::plan(after, &then, &order) {
            Ok(plan) => lines.extend(plan.why),
            Err(reason) => lines.push(reason),
        }
        lines
    }

    /// What the registration must say once the map has the disks: their node registered before it had them.
    pub(super) fn enter_registry(&self, map: &DistributionMap, registry: &mut Registry) {
        let name = self.node.name().to_owned();
        let Some((_, entry)) = registry.iter_mut().find(|(other, _)| *other == name) else { return };
        // One that restarted since has registered with what is on its disks now.
        if entry.process != self.process {
            return;
        }
        for newcomer in &self.disks {
            let Some(mut inventory) = newcomer.found.clone() else { continue };
            inventory.content = DiskContent::Ours { cluster: map.cluster, disk: newcomer.id };
            entry.disks.retain(|other| other.name != newcomer.name);
            entry.disks.push(inventory);
        }
    }

    /// The name of a node that was none before, and is to have its session and the map.
    pub(super) fn newcomer(&self) -> Option<&str> {
        match &self.node {
            Joining::Member { .. } => None,
            Joining::Stranger(node) => Some(&node.name),
        }
    }

    /// For whoever asked, when it is done.
    pub(super) fn farewell(&self) -> String {
        if self.spare {
            "it holds nothing until it takes the place of another disk".to_owned()
        } else {
            "it holds nothing yet: `mirrorctl rebalance` spreads data onto it, or whatever does so by itself later".to_owned()
        }
    }

    fn failed(&self, reason: &str) -> String {
        match self.step {
            Step::Looking | Step::Looked => format!("{reason}. Nothing was formatted"),
            Step::Formatting | Step::Formatted => {
                format!(
                    "{reason}. Disks may be formatted, and are in no cluster: repair that, then repeat with --force"
                )
            }
        }
    }
}

impl Newcomer {
    /// As the map is to have it.
    fn entry(&self, map: &DistributionMap, node: &Joining, spare: bool) -> Result<Disk, String> {
        let found = self.found.as_ref();
        let found = found.ok_or_else(|| format!("nobody has looked at {}/{}", node.name(), self.name))?;
        let slots = newcomer::slots_of(node.name(), found, map.slice_bytes, self.segments)?;
        Ok(Disk {
            id: self.id,
            node: node.id(),
            name: self.name.clone(),
            slots,
            block_bytes: found.block_bytes,
            spare,
            failed: None,
        })
    }
}

/// Whether a disk is none that counts. What is in the map goes out of it first, whatever anybody forces.
fn may_be_formatted(
    map: &DistributionMap,
    node: &str,
    found: &DiskInventory,
    force: bool,
) -> Result<(), String> {
    if let DiskContent::Ours { cluster, disk } = found.content
        && cluster == map.cluster
        && map.disk(disk).is_some()
    {
        let name = map.disk_name(disk);
        return Err(format!(
            "node {node}: {} is {name} of this cluster: restart ublk-server where it was if it is to be used again, or type \
             `mirrorctl disk remove {name}` first",
            found.path
        ));
    }
    newcomer::check_content(node, found, force)
}

fn disk_of_member(
    map: &DistributionMap,
    disk: &str,
    path: &str,
    segments: [u8; 3],
) -> Result<(Joining, Newcomer), String> {
    let Some((node, name)) = disk.split_once('/') else {
        return Err(format!("{disk:?} is no NODE/DISK"));
    };
    let Some(node) = map.node_named(node) else {
        let names: Vec<&str> = map.nodes.iter().map(|node| node.name.as_str()).collect();
        return Err(format!("there is no node {node:?}, only {}", names.join(", ")));
    };
    check_name(name)?;
    if map.disks.iter().any(|other| other.node == node.id && other.name == name) {
        return Err(format!("{} has a disk {name} already: see `mirrorctl disk list`", node.name));
    }
    let Some(segments) = Segments::of(segments) else {
        return Err("the percentages of the three segments must add up to 100".to_owned());
    };
    let newcomer =
        Newcomer { name: name.to_owned(), path: path.to_owned(), segments, id: DiskId(0), found: None };
    Ok((Joining::Member { id: node.id, name: node.name.clone() }, newcomer))
}

fn stranger(map: &DistributionMap, file: &str, name: &str) -> Result<(Joining, Vec<Newcomer>, bool), String> {
    let file = ClusterFile::parse(file, "the cluster file").map_err(|error| error.to_string())?;
    if file.name != map.cluster_name {
        return Err(format!(
            "the cluster file is of cluster {}, this one is {}: give its own",
            file.name, map.cluster_name
        ));
    }
    if map.node_named(name).is_some() {
        return Err(format!("{name} is in the cluster already: `mirrorctl disk add` adds a disk to it"));
    }
    let Some(node) = file.node(name) else {
        return Err(format!(
            "the cluster file has no node {name}: add it there, copy the file to its machine, start ublk-server, repeat"
        ));
    };
    let disks = node.disks.iter().map(|disk| Newcomer {
        name: disk.name.clone(),
        path: disk.path.to_string_lossy().into_owned(),
        segments: disk.segments,
        id: DiskId(0),
        found: None,
    });
    let entry = Node {
        id: NodeId(0),
        name: node.name.clone(),
        address: node.address.clone(),
        power: node.power.clone(),
        switch: node.switch.clone(),
    };
    Ok((Joining::Stranger(entry), disks.collect(), node.spare))
}
