//! What goes wrong, or is done by an operator.

use super::{Cluster, Event};
use crate::sim::disk::Faults;
use crate::sim::scheduler::{MS, Nanos};

/// What goes wrong, or is done by an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Fault {
    Kill { node: u16 },
    PowerCut { node: u16 },
    Start { node: u16 },
    Pause { node: u16, ms: u64 },
    CutLane { a: u16, b: u16 },
    Silence { from: u16, to: u16, on: bool },
    NoManager { node: u16, on: bool },
    DiskWrites { node: u16 },
    DiskFlush { node: u16 },
    DiskMetadata { node: u16 },
    BadSector { node: u16, slot: u32, offset: u32 },
    FailOver { node: u16 },
    KillManager,
    StartManager,
    CutControl { node: u16 },
    MoveClaim { device: usize, node: u16 },
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
        let mut random = self.random.clone();
        self.node_mut(node).stop(power, &mut random);
        self.random = random;
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
            node.attach = process + 1_000;
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
                self.node_mut(node).disk.lose_cache(&mut random);
                self.random = random;
                self.next_process += 1;
                let process = self.next_process;
                self.node_mut(node).process_id = process;
                self.node_mut(node).attach = process + 1_000;
            }
            Fault::Start { node } if self.node(node).process.is_none() => self.launch(node),
            Fault::Kill { .. } | Fault::Start { .. } => {}
            Fault::Pause { node, ms } => self.node_mut(node).paused_until = now + ms * MS,
            Fault::CutLane { a, b } => {
                if let Some(session) = self.network.session(a, b) {
                    self.cut(a, b, session, None);
                }
            }
            Fault::Silence { from, to, on } => self.network.set_silent(from, to, on),
            Fault::NoManager { node, on } => self.cut_off[usize::from(node) - 1] = on,
            Fault::DiskWrites { node } => self.fail_disk(node, |faults| faults.write = true),
            Fault::DiskFlush { node } => self.fail_disk(node, |faults| faults.flush = true),
            Fault::DiskMetadata { node } => self.fail_disk(node, |faults| faults.metadata = true),
            Fault::BadSector { node, slot, offset } => {
                let at = self.node(node).offset(slot, offset);
                self.node_mut(node).disk.spoil(at);
            }
            Fault::FailOver { node } => self.fail_over(node),
            Fault::KillManager => self.kill_manager(),
            Fault::StartManager => self.manager.start(),
            Fault::CutControl { node } => self.cut_control(node),
            Fault::MoveClaim { device, node } => self.move_claim(device, node),
        }
    }

    pub(super) fn fail_disk(&mut self, node: u16, set: impl FnOnce(&mut Faults)) {
        set(&mut self.node_mut(node).disk.faults);
    }

    /// Everything works again, and everybody is there.
    pub fn heal(&mut self) {
        self.manager.start();
        for a in 1..=self.nodes.len() as u16 {
            for b in 1..=self.nodes.len() as u16 {
                self.network.set_silent(a, b, false);
            }
            self.cut_off[usize::from(a) - 1] = false;
            let now = self.now;
            self.node_mut(a).paused_until = now;
            if self.node(a).process.is_none() {
                self.launch(a);
            }
        }
    }

    /// Plans a fault.
    pub fn plan(&mut self, at: Nanos, fault: Fault) {
        self.queue.push(at, Event::Fault(fault));
    }
}
