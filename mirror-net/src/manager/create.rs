//! A cluster is made of the registered nodes: check every disk, format them, store map 1.
//!
//! Nothing is formatted before every disk of every node has passed the check, and no map exists
//! before every disk is formatted.

use super::newcomer::{self, CHECK_MS_MAX, FORMAT_MS_MAX};
use super::registry::Registry;
use super::{ConnectionId, Output, Proposal, Ticket};
use crate::config::ClusterFile;
use crate::control::{FormatDisk, FormatOrder, ManagerMessage};
use crate::ids::{AttachId, ClusterId, DiskId, Incarnation, NodeId, ProcessId};
use crate::map::DistributionMap;
use crate::map::layout::{DiskSpec, Layout, NodeSpec};
use std::collections::BTreeMap;

/// A creation under way.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) ticket: Ticket,
    name: String,
    slice_bytes: u32,
    layout: Layout,
    cluster: ClusterId,
    force: bool,
    members: Vec<Member>,
    /// Formatting, no longer checking.
    formatting: bool,
    deadline_ms: u64,
    errors: Vec<String>,
}

#[derive(Debug)]
struct Member {
    connection: ConnectionId,
    process: ProcessId,
    id: NodeId,
    spec: NodeSpec,
    disks: Vec<DiskId>,
    /// Its answer to the present phase is outstanding.
    waiting: bool,
}

/// Where a creation has got to.
pub(super) enum Progress {
    /// Answers are outstanding.
    Waiting,
    /// Every disk is formatted: store this map.
    Done(Proposal),
    /// It failed; these connections owe an answer that would be taken for one to a later question.
    Failed { reason: String, close: Vec<ConnectionId> },
}

impl Creation {
    /// Checks what can be known without asking, then asks every node to check its disks.
    pub(super) fn start(
        now_ms: u64,
        (ticket, file, cluster, force): (Ticket, &ClusterFile, ClusterId, bool),
        registry: &Registry,
        outputs: &mut impl FnMut(Output),
    ) -> Result<Self, String> {
        let absent: Vec<&str> = file
            .nodes
            .iter()
            .map(|node| node.name.as_str())
            .filter(|name| !registry.is_up(name, now_ms))
            .collect();
        if !absent.is_empty() {
            return Err(format!(
                "not connected: {}; start ublk-server on every node of the cluster file, then repeat",
                absent.join(", ")
            ));
        }
        let mut creation = Self {
            ticket,
            name: file.name.clone(),
            slice_bytes: file.slice_bytes,
            layout: file.layout,
            cluster,
            force,
            members: Vec::new(),
            formatting: false,
            deadline_ms: 0,
            errors: Vec::new(),
        };
        for node in &file.nodes {
            let Some(entry) = registry.get(&node.name) else { continue };
            newcomer::check_address(&node.name, entry, &node.address)?;
            let mut disks = Vec::new();
            for disk in &node.disks {
                let inventory =
                    newcomer::find_disk(&node.name, entry, &disk.name, &disk.path.to_string_lossy())?;
                newcomer::check_content(&node.name, inventory, force)?;
                let slots = newcomer::slots_of(&node.name, inventory, file.slice_bytes, disk.segments)?;
                let incarnation = Incarnation { attach: inventory.attach, process: entry.process };
                let (name, block_bytes) = (disk.name.clone(), inventory.block_bytes);
                disks.push(DiskSpec { name, slots, block_bytes, incarnation });
            }
            creation.members.push(Member {
                connection: entry.connection,
                process: entry.process,
                id: NodeId::default(),
                spec: NodeSpec {
                    name: node.name.clone(),
                    address: node.address.clone(),
                    power: node.power.clone(),
                    switch: node.switch.clone(),
                    disks,
                    spare: node.spare,
                    devices: node.devices,
                },
                disks: Vec::new(),
                waiting: false,
            });
        }
        creation.number()?;
        creation.ask(now_ms, outputs);
        Ok(creation)
    }

    fn layout(&self) -> Result<DistributionMap, String> {
        let specs: Vec<NodeSpec> = self.members.iter().map(|member| member.spec.clone()).collect();
        let map = self.layout.of(self.cluster, &self.name, self.slice_bytes, &specs);
        map.map_err(|error| error.to_string())
    }

    /// Takes the ids from the layout, which also shows that there is one before anything is formatted.
    fn number(&mut self) -> Result<(), String> {
        let map = self.layout()?;
        for member in &mut self.members {
            let node = map.node_named(&member.spec.name).ok_or("the layout lost a node")?;
            member.id = node.id;
            member.disks = map.disks.iter().filter(|disk| disk.node == node.id).map(|disk| disk.id).collect();
        }
        Ok(())
    }

    fn ask(&mut self, now_ms: u64, outputs: &mut impl FnMut(Output)) {
        self.deadline_ms = now_ms + if self.formatting { FORMAT_MS_MAX } else { CHECK_MS_MAX };
        for member in &mut self.members {
            member.waiting = true;
            let disks = member
                .spec
                .disks
                .iter()
                .zip(&member.disks)
                .map(|(spec, disk)| FormatDisk {
                    name: spec.name.clone(),
                    path: None,
                    disk: *disk,
                    slots: spec.slots,
                })
                .collect();
            let order = FormatOrder {
                cluster: self.cluster,
                node: member.id,
                slice_bytes: self.slice_bytes,
                disks,
                force: self.force,
                check_only: !self.formatting,
            };
            let (connection, message) = (member.connection, ManagerMessage::Format(order));
            outputs(Output::Send { connection, message });
        }
    }

    /// A node's answer.
    pub(super) fn formatted(&mut self, connection: ConnectionId, error: Option<String>, attach: &[AttachId]) {
        let formatting = self.formatting;
        let Some(member) =
            self.members.iter_mut().find(|member| member.connection == connection && member.waiting)
        else {
            return;
        };
        member.waiting = false;
        if let Some(error) = error {
            self.errors.push(format!("node {}: {error}", member.spec.name));
        } else if formatting {
            if attach.len() != member.spec.disks.len() {
                self.errors.push(format!(
                    "node {} formatted {} disks, it was asked for {}: install the same release everywhere",
                    member.spec.name,
                    attach.len(),
                    member.spec.disks.len()
                ));
                return;
            }
            for (spec, attach) in member.spec.disks.iter_mut().zip(attach) {
                spec.incarnation.attach = *attach;
            }
        }
    }

    /// A node's connection is gone or was replaced.
    pub(super) fn disconnected(&mut self, connection: ConnectionId) {
        for member in self.members.iter_mut().filter(|member| member.connection == connection) {
            member.waiting = false;
            self.errors.push(format!("node {} disconnected meanwhile", member.spec.name));
        }
    }

    /// Goes on if every answer of the present phase is there.
    pub(super) fn progress(&mut self, now_ms: u64, outputs: &mut impl FnMut(Output)) -> Progress {
        let late: Vec<&Member> = self.members.iter().filter(|member| member.waiting).collect();
        if !late.is_empty() {
            if now_ms < self.deadline_ms {
                return Progress::Waiting;
            }
            let close = late.iter().map(|member| member.connection).collect();
            let names: Vec<&str> = late.iter().map(|member| member.spec.name.as_str()).collect();
            self.errors.push(format!("no answer from {}", names.join(", ")));
            return Progress::Failed { reason: self.failure(), close };
        }
        if !self.errors.is_empty() {
            return Progress::Failed { reason: self.failure(), close: Vec::new() };
        }
        if !self.formatting {
            self.formatting = true;
            self.ask(now_ms, outputs);
            return Progress::Waiting;
        }
        match self.layout() {
            Ok(next) => Progress::Done(Proposal {
                base: None,
                batch: Vec::new(),
                why: vec![format!("cluster {} created", self.name)],
                next: Box::new(next),
            }),
            Err(error) => {
                self.errors.push(error);
                Progress::Failed { reason: self.failure(), close: Vec::new() }
            }
        }
    }

    fn failure(&self) -> String {
        let errors = self.errors.join("; ");
        if self.formatting {
            format!(
                "{errors}. There is no cluster, but some disks are formatted: repair what is named here, then repeat \
                 with --force"
            )
        } else {
            format!("{errors}. Nothing was formatted")
        }
    }

    /// What the registrations must say once the map is stored: process and attachments by node and disk.
    pub(super) fn formatted_disks(&self) -> BTreeMap<&str, Vec<(&str, DiskId, AttachId)>> {
        self.members
            .iter()
            .map(|member| {
                let disks = member.spec.disks.iter().zip(&member.disks);
                let disks =
                    disks.map(|(spec, id)| (spec.name.as_str(), *id, spec.incarnation.attach)).collect();
                (member.spec.name.as_str(), disks)
            })
            .collect()
    }

    /// The process that formatted a node's disks.
    pub(super) fn process_of(&self, node: &str) -> Option<ProcessId> {
        self.members.iter().find(|member| member.spec.name == node).map(|member| member.process)
    }
}
