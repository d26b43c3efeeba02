//! What goes wrong, or is done by an operator.
//!
//! The fault model is that of the parts, see [`node`](crate::sim::node), [`disk`](crate::sim::disk),
//! [`network`](crate::sim::network) and [`control`](crate::sim::control). Here is who hears of what when.
//! A daemon that is killed leaves closed connections, which the others see within milliseconds. A machine
//! that loses power says no goodbye: its lanes are found broken half a second to a second and a half later,
//! its connection to the manager up to three seconds later, or not before it is back and connects again.

use super::{Cluster, Event};
use crate::sim::node::position;
use crate::sim::operator::Wish;
use crate::sim::scheduler::{MS, Nanos};
use mirror_net::control::PlanOrder;

/// What goes wrong, or is done by an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Fault {
    Kill { node: u16 },
    PowerCut { node: u16 },
    Start { node: u16 },
    Pause { node: u16, ms: u64 },
    CutLane { a: u16, b: u16 },
    Damage { from: u16, to: u16 },
    Silence { from: u16, to: u16, on: bool },
    NoManager { node: u16, on: bool },
    Disk { node: u16, disk: usize, wrong: Wrong },
    BadSector { node: u16, disk: usize, slot: u32, offset: u32 },
    BadMetadata { node: u16, disk: usize },
    FailOver { node: u16 },
    KillManager,
    StartManager,
    CutControl { node: u16 },
    MoveClaim { device: usize, node: u16 },
    AddCopy { device: usize, node: u16, disk: usize },
    DropCopy { device: usize, node: u16 },
    Redistribute { wish: Wish },
    Order { order: PlanOrder, nth: usize },
}

/// What becomes wrong with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Wrong {
    Writes,
    OneWrite,
    Flush,
    Metadata,
    Dead,
    Hung(bool),
    Slow(u64),
}

impl Cluster {
    pub(super) fn cut(&mut self, a: u16, b: u16, session: u64, known_to: Option<u16>) {
        if !self.network.cut(a, b, session) {
            return;
        }
        for (node, peer) in [(a, b), (b, a)] {
            if known_to != Some(node) {
                let process = self.node(node).process_id;
                let at = self.now + self.random.range(10_000, 5 * MS);
                self.queue.push(at, Event::LaneDown { node, process, peer, session });
            }
        }
    }

    pub(super) fn stop(&mut self, node: u16, power: bool) {
        self.check_members();
        let mut random = self.random.clone();
        self.lose_memory(node);
        self.node_mut(node).stop(power, &mut random);
        self.random = random;
        for disk in &mut self.node_mut(node).disks {
            // Whoever opens a disk finds it quiet.
            disk.media.faults.hung = false;
        }
        self.compare_copies(false);
        for peer in 1..=self.nodes.len() as u16 {
            if let Some(session) = self.network.session(node, peer).filter(|_| peer != node) {
                if power {
                    // Nobody says goodbye; it comes to light by silence, or at the next connection.
                    self.network.cut(node, peer, session);
                    let process = self.node(peer).process_id;
                    let at = self.now + self.random.range(500 * MS, 1_500 * MS);
                    self.queue.push(at, Event::LaneDown { node: peer, process, peer: node, session });
                } else {
                    self.cut(node, peer, session, Some(node));
                }
            }
        }
        if let Some(connection) = self.agents[usize::from(node) - 1].connection {
            if power && let Some(link) = self.manager.links.get_mut(&connection) {
                // Nobody sends again what had not arrived yet.
                link.up.clear();
            }
            let later = if power { 3_000 * MS } else { 20 * MS };
            let at = self.now + self.random.range(100_000, later);
            self.queue.push(at, Event::NodeGone { life: self.manager.life, connection });
        }
        self.agents[usize::from(node) - 1].restart();
        self.next_process += 1;
        let process = self.next_process;
        let node = self.node_mut(node);
        node.process_id = process;
        if power {
            node.reattach(process);
        }
        node.paused_until = 0;
    }

    /// Does it now.
    pub fn fault(&mut self, fault: Fault) {
        self.say(|| format!("*** {fault:?}"));
        let now = self.now;
        match fault {
            Fault::Kill { node } if self.node(node).process.is_some() => self.stop(node, false),
            Fault::PowerCut { node } if self.node(node).process.is_some() => self.stop(node, true),
            Fault::PowerCut { node } => {
                let mut random = self.random.clone();
                self.node_mut(node).lose_caches(&mut random);
                self.random = random;
                self.next_process += 1;
                let process = self.next_process;
                self.node_mut(node).process_id = process;
                self.node_mut(node).reattach(process);
            }
            Fault::Start { node } if self.node(node).process.is_none() => self.launch(node),
            Fault::Kill { .. } | Fault::Start { .. } => {}
            Fault::Pause { node, ms } => self.node_mut(node).paused_until = now + ms * MS,
            Fault::CutLane { a, b } => {
                if let Some(session) = self.network.session(a, b) {
                    self.cut(a, b, session, None);
                }
            }
            Fault::Damage { from, to } => self.network.damage_next(from, to),
            Fault::Silence { from, to, on } => self.network.set_silent(from, to, on),
            Fault::NoManager { node, on } => self.cut_off[usize::from(node) - 1] = on,
            Fault::Disk { node, disk, wrong } => {
                let faults = &mut self.node_mut(node).disks[disk].media.faults;
                match wrong {
                    Wrong::Writes => faults.write = true,
                    Wrong::OneWrite => faults.write_once = true,
                    Wrong::Flush => faults.flush = true,
                    Wrong::Metadata => faults.metadata = true,
                    Wrong::Dead => faults.dead = true,
                    Wrong::Hung(hung) => faults.hung = hung,
                    Wrong::Slow(times) => faults.slow = times,
                }
            }
            Fault::BadSector { node, disk, slot, offset } => {
                self.node_mut(node).disks[disk].media.spoil(position(slot, offset));
            }
            Fault::BadMetadata { node, disk } if self.node(node).process.is_none() => {
                let mut random = self.random.clone();
                self.node_mut(node).disks[disk].spoil_metadata(&mut random);
                self.random = random;
            }
            Fault::BadMetadata { .. } => {}
            Fault::FailOver { node } => self.fail_over(node),
            Fault::KillManager => self.kill_manager(),
            Fault::StartManager => self.manager.start(),
            Fault::CutControl { node } => self.cut_control(node),
            Fault::MoveClaim { device, node } => self.move_claim(device, node),
            Fault::Redistribute { wish } => self.redistribute(wish),
            Fault::Order { order, nth } => self.order(order, nth),
            Fault::AddCopy { .. } | Fault::DropCopy { .. } if self.shape.operator => {}
            Fault::AddCopy { device, node, disk } => self.add_copy(device, node, disk),
            Fault::DropCopy { device, node } => self.drop_copy(device, node),
        }
    }

    /// Everything works again but what is broken for ever, and everybody is there.
    pub fn heal(&mut self) {
        self.manager.start();
        for a in 1..=self.nodes.len() as u16 {
            for b in 1..=self.nodes.len() as u16 {
                self.network.set_silent(a, b, false);
            }
            self.cut_off[usize::from(a) - 1] = false;
            let now = self.now;
            self.node_mut(a).paused_until = now;
            for disk in &mut self.node_mut(a).disks {
                (disk.media.faults.hung, disk.media.faults.slow) = (false, 0);
            }
            if self.node(a).process.is_none() {
                self.launch(a);
            }
        }
    }

    /// When something was planned to go wrong, in the order of planning.
    pub fn planned(&self) -> &[Nanos] {
        &self.planned
    }

    /// Plans a fault.
    pub fn plan(&mut self, at: Nanos, fault: Fault) {
        self.planned.push(at);
        self.queue.push(at, Event::Fault(fault));
    }
}
