//! Between the nodes' agents, the manager and its store.

use super::operator::OTHER;
use super::{Cluster, Event};
use crate::sim::control::{Control, Word};
use crate::sim::disk::SECTOR;
use crate::sim::node::{DISK_BYTES, Mounted, SLICE};
use crate::sim::scheduler::{MS, Nanos};
use crate::sim::transitions::wrong_with;
use mirror_net::control::{
    DiskContent, DiskInventory, ManagerMessage, NodeMessage, NodeReport, REPORT_MS, Registration,
};
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{AttachId, ClusterId, DeviceId, NodeId, ProcessId};
use mirror_net::manager::{Input, Output, Proposal};
use mirror_net::map::validate::COPIES_MAX;
use mirror_net::map::verbs::{Run, Verb};
use mirror_net::map::{DistributionMap, ReplicaState, Span};
use std::sync::Arc;

impl Cluster {
    // ---- the manager ----

    /// Gives the manager an input and does what it wants.
    pub(super) fn feed(&mut self, input: Input) {
        let now_ms = self.now / MS;
        let Some(core) = &mut self.manager.core else { return };
        core.handle(now_ms, input);
        while let Some(output) = self.manager.core.as_mut().and_then(|core| core.poll()) {
            let life = self.manager.life;
            match output {
                Output::Store(proposal) => {
                    self.manager.storing = true;
                    let at = self.now + self.store_delay();
                    self.queue.push(at, Event::Store { life, proposal: Box::new(proposal) });
                }
                Output::GiveSession { connection } => {
                    let at = self.now + self.store_delay();
                    self.queue.push(at, Event::GiveSession { life, connection: connection.0 });
                }
                Output::Send { connection, message } => {
                    if let Some(link) = self.manager.links.get_mut(&connection.0) {
                        link.down.push_back(message);
                        let delay = self.control_delay();
                        self.queue.push(self.now + delay, Event::FromManager { connection: connection.0 });
                    }
                }
                Output::Close { connection } => self.hang_up(connection.0, 100 * MS),
                Output::Reply { ticket, reply } => {
                    self.say(|| format!("manager: answers {reply:?}"));
                    self.answered(ticket, &reply);
                }
                Output::Event(_, line) | Output::Log(line) => {
                    if line.starts_with("BUG") {
                        self.checker.violations.push(line.clone());
                    }
                    self.say(|| format!("manager: {line}"));
                }
            }
        }
    }

    fn store_delay(&mut self) -> Nanos {
        if self.random.one_in(10) {
            self.random.range(20 * MS, 400 * MS)
        } else {
            self.random.range(MS, 10 * MS)
        }
    }

    fn control_delay(&mut self) -> Nanos {
        if self.random.one_in(20) {
            self.random.range(10 * MS, 300 * MS)
        } else {
            self.random.range(100_000, 5 * MS)
        }
    }

    /// The proposal reaches the store.
    pub(super) fn store(&mut self, life: u64, proposal: Proposal) {
        if life != self.manager.life && self.manager.core.is_some() {
            // The store is locked by who runs now: what the one before had not written is not written.
            return;
        }
        let before = Arc::clone(&self.manager.map);
        let version = proposal.next.version;
        let stored = self.manager.store(proposal.base, *proposal.next);
        if stored {
            let after = Arc::clone(&self.manager.map);
            self.check_drops(&before, &after);
            for line in &proposal.why {
                self.say(|| format!("store: {version}: {line}"));
            }
            self.note_change(&before);
        }
        if life != self.manager.life || self.manager.core.is_none() {
            return;
        }
        self.manager.storing = false;
        self.feed(if stored {
            Input::Stored { version }
        } else {
            Input::Conflict { newest: Some(Box::new((*self.manager.map).clone())) }
        });
    }

    pub(super) fn give_session(&mut self, life: u64, connection: u64) {
        let session = self.manager.exporter_session();
        if life == self.manager.life {
            self.feed(Input::Session { connection: Control::id(connection), session });
        }
    }

    pub(super) fn manager_tick(&mut self) {
        self.feed(Input::Tick);
        self.queue.push(self.now + 200 * MS, Event::ManagerTick);
    }

    /// Its connections go with it.
    pub(super) fn kill_manager(&mut self) {
        for (connection, link) in self.manager.kill() {
            let at = self.now + self.random.range(100_000, 50 * MS);
            self.queue.push(at, Event::ControlDown { node: link.node, process: link.process, connection });
        }
    }

    pub(super) fn fail_over(&mut self, node: u16) {
        self.feed(Input::Failover { ticket: OTHER, node: format!("n{node}") });
    }

    /// Somebody changes the map in the store; a manager that is storing finds out by itself.
    pub(super) fn change_map(&mut self, batch: &[Verb]) {
        let before = Arc::clone(&self.manager.map);
        if self.manager.change(batch) {
            self.note_change(&before);
            if !self.manager.storing {
                let newest = Some(Box::new((*self.manager.map).clone()));
                self.feed(Input::Conflict { newest });
            }
        }
    }

    /// A connection ends; the node notices within that time.
    fn hang_up(&mut self, connection: u64, within: Nanos) {
        if let Some(link) = self.manager.links.remove(&connection) {
            let at = self.now + self.random.range(100_000, within);
            self.queue.push(at, Event::ControlDown { node: link.node, process: link.process, connection });
        }
    }

    /// The connection ends for both.
    pub(super) fn cut_control(&mut self, node: u16) {
        if let Some(connection) = self.agents[usize::from(node) - 1].connection {
            self.hang_up(connection, 500 * MS);
            let at = self.now + self.random.range(100_000, 2_500 * MS);
            self.queue.push(at, Event::NodeGone { life: self.manager.life, connection });
        }
    }

    pub(super) fn node_gone(&mut self, life: u64, connection: u64) {
        self.manager.links.remove(&connection);
        if life == self.manager.life {
            self.feed(Input::Disconnected { connection: Control::id(connection) });
        }
    }

    pub(super) fn manager_hears(&mut self, connection: u64) {
        let Some(link) = self.manager.links.get_mut(&connection) else { return };
        if self.cut_off[usize::from(link.node) - 1] {
            self.queue.push(self.now + 10 * MS, Event::ToManager { connection });
            return;
        }
        let Some(word) = link.up.pop_front() else { return };
        let connection = Control::id(connection);
        self.feed(match word {
            Word::Register(registration) => {
                Input::Register { connection, cluster: Some(ClusterId::default()), registration }
            }
            Word::Message(message) => Input::Message { connection, message },
        });
    }

    // ---- the agents ----

    /// Says something to the manager, if there is a connection.
    fn tell(&mut self, node: u16, word: Word) {
        let Some(connection) = self.agents[usize::from(node) - 1].connection else { return };
        let Some(link) = self.manager.links.get_mut(&connection) else { return };
        link.up.push_back(word);
        let delay = self.control_delay();
        self.queue.push(self.now + delay, Event::ToManager { connection });
    }

    pub(super) fn tell_manager(&mut self, node: u16, message: NodeMessage) {
        if let NodeMessage::DiskFailed { disk, reason } = &message {
            self.agents[usize::from(node) - 1].failed.push((*disk, reason.clone()));
        }
        self.tell(node, Word::Message(message));
    }

    /// Connects, and reports.
    pub(super) fn agent_tick(&mut self, node: u16) {
        let index = usize::from(node) - 1;
        let process = self.node(node).process_id;
        if self.agents[index].connection.is_none() {
            if self.cut_off[index] || self.manager.core.is_none() {
                return;
            }
            let connection = self.manager.connect(node, process);
            self.agents[index].connection = Some(connection);
            let registration = self.registration(node);
            self.tell(node, Word::Register(registration));
        } else if (self.now / MS / 100 + u64::from(node)).is_multiple_of(REPORT_MS / 100) {
            let adopted = self.adopted(node);
            self.tell(node, Word::Message(NodeMessage::Report(NodeReport { adopted, ..Default::default() })));
        }
    }

    /// What the agent says that it has adopted.
    fn adopted(&self, node: u16) -> mirror_net::ids::MapVersion {
        let reported = self.node(node).process.as_ref().map(|process| process.adopted);
        match reported {
            Some(version) if version.0 > 0 => version,
            _ => self.agents[usize::from(node) - 1].kept,
        }
    }

    fn registration(&self, node: u16) -> Registration {
        let at = self.node(node);
        Registration {
            node: format!("n{node}"),
            process: ProcessId(at.process_id),
            adopted: self.adopted(node),
            lives: self.agents[usize::from(node) - 1].lives.clone(),
            address: String::new(),
            disks: (1..).zip(&at.disks).map(|(index, disk)| inventory(index, disk)).collect(),
        }
    }

    pub(super) fn control_down(&mut self, node: u16, connection: u64) {
        let agent = &mut self.agents[usize::from(node) - 1];
        if agent.connection == Some(connection) {
            agent.connection = None;
        }
    }

    pub(super) fn agent_hears(&mut self, connection: u64) {
        let Some(link) = self.manager.links.get_mut(&connection) else { return };
        let (node, process) = (link.node, link.process);
        let index = usize::from(node) - 1;
        let again = if self.cut_off[index] { self.now + 10 * MS } else { self.nodes[index].paused_until };
        if again > self.now {
            self.queue.push(again, Event::FromManager { connection });
            return;
        }
        let Some(message) = link.down.pop_front() else { return };
        if !self.alive(node, process) || self.agents[index].connection != Some(connection) {
            return;
        }
        match message {
            ManagerMessage::Registered { exporter_session, policy } => {
                if let Some(process) = self.process(node) {
                    process.engine.set_exporter_session(exporter_session);
                    process.engine.set_policy(policy);
                }
                for (disk, reason) in self.agents[index].failed.clone() {
                    self.tell(node, Word::Message(NodeMessage::DiskFailed { disk, reason }));
                }
            }
            ManagerMessage::Map { map } => {
                self.say(|| format!("n{node}: gets map {}", map.version));
                self.agents[index].kept = self.agents[index].kept.max(map.version);
                let clock = self.node(node).clock(self.now);
                let Some(process) = self.process(node) else { return };
                if let Err(error) = process.engine.handle_map(clock, Arc::new(*map)) {
                    self.checker.violations.push(format!("n{node} refuses a map: {error}"));
                }
                self.drain(node);
            }
            ManagerMessage::Export { device, generation } => {
                self.agents[index].allowed.insert(device.0, generation);
                self.export(node, device.0 as usize - 1);
            }
            ManagerMessage::Refused { reason } => {
                self.checker.violations.push(format!("n{node} is refused: {reason}"));
            }
            ManagerMessage::Format(_) => self.checker.violations.push("nobody asked for a cluster".into()),
            ManagerMessage::Look { .. } | ManagerMessage::Waiting { .. } => {
                self.checker.violations.push("nothing enters this cluster".into());
            }
            ManagerMessage::TellMap => self.checker.violations.push("nobody asked for the map".into()),
            ManagerMessage::Survey { .. } => {
                self.checker.violations.push("nobody asked for a broadcast".into())
            }
            ManagerMessage::NotLeader { .. } => {
                self.checker.violations.push("the core does not know of other managers".into());
            }
        }
    }

    // ---- the store ----

    /// The stored map changed.
    fn note_change(&mut self, before: &DistributionMap) {
        let map = Arc::clone(&self.manager.map);
        self.checker.violations.extend(wrong_with(before, &map));
        self.note_plans(before, &map);
        for new in &map.devices {
            let Some(old) = before.device(new.id) else { continue };
            let device = new.id.0 as usize - 1;
            for span in &new.spans {
                let was = old.span(span.first);
                if let Some(was) = was.filter(|was| was.loss != span.loss) {
                    self.check_loss(old, was);
                    let sectors = (SLICE as usize) / SECTOR;
                    self.checker.lose(device, span.first.0 as usize * sectors, span.count as usize * sectors);
                    self.say(|| format!("store: {} may have lost unflushed writes", new.name));
                }
            }
            if old != new {
                self.check_device(device);
                self.say(|| format!("store: {} {}", map.version, device_text(new)));
            }
        }
    }

    /// Moves the claim of a device.
    pub(super) fn move_claim(&mut self, device: usize, node: u16) {
        let device = DeviceId(device as u32 + 1);
        self.change_map(&[Verb::MoveClaim { device, node: NodeId(node) }]);
    }

    /// Gives a mirrored device another copy, on a node that has none of it.
    pub(super) fn add_copy(&mut self, device: usize, node: u16, disk: usize) {
        let (map, segment) = (Arc::clone(&self.manager.map), Segment::Secondary);
        let incarnation = self.node(node).incarnation(disk);
        let disk = self.node(node).disks[disk].id;
        let new = |span: &&Span| {
            let there = span.replicas.iter().any(|copy| self.locate(copy.disk).0 == node);
            !there && span.replicas.len() < COPIES_MAX
        };
        let spans = map.devices[device].spans.iter().filter(new);
        let batch: Vec<Verb> = spans
            .map(|span| {
                let run = Run { device: DeviceId(device as u32 + 1), first: span.first, count: span.count };
                Verb::AddReplica { run, disk, segment, incarnation }
            })
            .collect();
        if map.devices[device].is_mirrored() && !batch.is_empty() {
            self.change_map(&batch);
        }
    }

    /// Node and disk of each copy of a device's first slice, its primary's first.
    pub fn copies_of(&self, device: usize) -> Vec<(u16, usize)> {
        let span = &self.manager.map.devices[device].spans[0];
        span.replicas.iter().map(|copy| self.locate(copy.disk)).collect()
    }

    /// Gives up a node's copies of a device where it is not the primary.
    pub(super) fn drop_copy(&mut self, device: usize, node: u16) {
        let map = Arc::clone(&self.manager.map);
        let mut batch = Vec::new();
        for span in &map.devices[device].spans {
            for copy in span.replicas[1..].iter().filter(|copy| self.locate(copy.disk).0 == node) {
                let run = Run { device: DeviceId(device as u32 + 1), first: span.first, count: span.count };
                batch.push(Verb::DropReplica { run, disk: copy.disk });
            }
        }
        if !batch.is_empty() {
            self.change_map(&batch);
        }
    }
}

/// What the agent finds on a disk.
fn inventory(index: usize, disk: &Mounted) -> DiskInventory {
    DiskInventory {
        name: format!("d{index}"),
        path: format!("/dev/d{index}"),
        bytes: DISK_BYTES,
        block_bytes: 512,
        attach: AttachId(disk.attach),
        content: if disk.media.is_dead() {
            DiskContent::Unusable { why: "input/output error".into() }
        } else {
            DiskContent::Ours { cluster: ClusterId::default(), disk: disk.id }
        },
    }
}

/// A device's copies and claim.
fn device_text(device: &mirror_net::map::Device) -> String {
    let spans = device.spans.iter().map(|span| {
        let copies = span.replicas.iter().map(|replica| {
            let state = match replica.state {
                ReplicaState::InSync => "",
                ReplicaState::Syncing => "+",
                ReplicaState::Stale => "-",
            };
            format!("{state}{}", replica.disk)
        });
        let copies: Vec<String> = copies.collect();
        format!("[{}] e{} loss {}", copies.join(" "), span.epoch.0, span.loss.0)
    });
    let spans: Vec<String> = spans.collect();
    let claim = device.claim;
    format!("{}: {} claim n{}#{}", device.name, spans.join(" "), claim.node.0, claim.generation.0)
}
