//! What the manager decides becomes known.

use super::{Cluster, Event};
use crate::sim::disk::SECTOR;
use crate::sim::node::SLICE;
use crate::sim::scheduler::MS;
use mirror_net::map::{DistributionMap, ReplicaState};
use std::sync::Arc;

impl Cluster {
    /// The manager's map changed.
    pub(super) fn publish(&mut self, before: &DistributionMap) {
        let map = Arc::clone(&self.manager.map);
        for (device, (old, new)) in before.devices.iter().zip(&map.devices).enumerate() {
            for span in &new.spans {
                let was = old.span(span.first).map(|old| old.loss);
                if was != Some(span.loss) {
                    let sectors = (SLICE as usize) / SECTOR;
                    self.checker.lose(device, span.first.0 as usize * sectors, span.count as usize * sectors);
                    self.say(|| format!("manager: {} may have lost unflushed writes", new.name));
                }
            }
            if self.trace && old != new {
                let list: Vec<String> = new
                    .spans
                    .iter()
                    .map(|span| {
                        let copies = span.replicas.iter().map(|r| {
                            let state = match r.state {
                                ReplicaState::InSync => "",
                                ReplicaState::Syncing => "+",
                                ReplicaState::Stale => "-",
                            };
                            format!("{state}n{}", r.disk.0)
                        });
                        format!(
                            "[{}] e{} loss {}",
                            copies.collect::<Vec<_>>().join(" "),
                            span.epoch.0,
                            span.loss.0
                        )
                    })
                    .collect();
                self.say(|| {
                    format!(
                        "manager: {} {}: {} claim n{}#{}",
                        map.version,
                        new.name,
                        list.join(" "),
                        new.claim.node.0,
                        new.claim.generation.0
                    )
                });
            }
        }
        for index in 0..self.nodes.len() {
            if self.cut_off[index] || self.nodes[index].process.is_none() {
                continue;
            }
            let (node, process) = (index as u16 + 1, self.nodes[index].process_id);
            let at = self.now + self.random.range(100_000, 20 * MS);
            self.queue.push(at, Event::Map { node, process, map: Arc::clone(&map) });
        }
        for device in 0..self.shape.devices {
            self.export(device);
        }
    }
}
