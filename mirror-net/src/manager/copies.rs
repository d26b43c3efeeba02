//! What the copies of a device are worth at this moment, and what the missing ones wait for.

use super::Lines;
use super::findings::View;
use super::registry::Standing;
use super::repair::{SpanPlan, plan_span};
use crate::config::format_bytes;
use crate::control::{Finding, ResyncReport, Severity};
use crate::ids::{DiskId, NodeId};
use crate::map::plan::{Move, Plan};
use crate::map::{Device, Replica, ReplicaState, Span};

/// Whether a plan makes a copy of a span in the place of none.
fn makes_more(plan: &Plan, device: &Device, span: &Span) -> bool {
    let meets = |step: &Move| {
        let end = step.run.first.0.saturating_add(step.run.count);
        step.run.device == device.id && step.run.first.0 < span.end() && span.first.0 < end
    };
    !plan.cancelled && plan.moves.iter().any(|step| step.from.is_none() && !step.primary && meets(step))
}

/// A copy that is not in sync, for people.
struct Missing {
    what: String,
    /// The node that has it.
    node: Option<String>,
    /// What it waits for; empty if for nothing but time.
    todo: String,
}

impl View<'_> {
    /// What of a device cannot be read or written, has fewer copies than wanted, or is being made
    /// equal again.
    pub(super) fn copies(&self, device: &Device, found: &mut Vec<Finding>) {
        let mut unserved = Lines::default();
        // Spans that wait for the same are said together.
        let mut degraded: Vec<((Option<String>, String), Lines)> = Vec::new();
        for span in &device.spans {
            if plan_span(self.map, device, span, self.registry, self.now_ms) != SpanPlan::Served {
                unserved.add(span, format!("cannot be read or written: {}", self.members(device, span)));
                continue;
            }
            let members = span.members().count();
            if members >= usize::from(device.copies) {
                continue;
            }
            let missing: Vec<Missing> = span
                .replicas
                .iter()
                .filter(|replica| replica.state != ReplicaState::InSync)
                .map(|replica| self.missing(device, span, replica))
                .collect();
            let mut todo: Vec<String> = Vec::new();
            for copy in missing.iter().filter(|copy| !copy.todo.is_empty()) {
                if !todo.contains(&copy.todo) {
                    todo.push(copy.todo.clone());
                }
            }
            if span.replicas.len() < usize::from(device.copies) {
                let todo_now = match self.map.plans.iter().find(|plan| makes_more(plan, device, span)) {
                    Some(plan) => format!("nothing: it is made by now: mirrorctl plan watch {}", plan.id.0),
                    None => "mirrorctl rebalance   (makes the missing copy if there is room)".to_owned(),
                };
                todo.push(todo_now);
            }
            let key = (missing.first().and_then(|copy| copy.node.clone()), todo.join("; "));
            let why: Vec<&str> = missing.iter().map(|copy| copy.what.as_str()).collect();
            let why = if why.is_empty() { String::new() } else { format!(": {}", why.join(", ")) };
            let what = format!("{members} of {} copies in sync{why}", device.copies);
            let index = degraded.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
                degraded.push((key, Lines::default()));
                degraded.len() - 1
            });
            degraded[index].1.add(span, what);
        }
        let name = Some(device.name.clone());
        for what in unserved.finish(&device.name, device.slices) {
            let (node, todo) = self.unserved_todo(device);
            found.push(Finding { severity: Severity::Unavailable, device: name.clone(), node, what, todo });
        }
        for ((node, todo), lines) in degraded {
            found.extend(lines.finish(&device.name, device.slices).map(|what| Finding {
                severity: Severity::Degraded,
                device: name.clone(),
                node: node.clone(),
                what,
                todo: todo.clone(),
            }));
        }
        self.reconciled(device, found);
    }

    /// The plan that makes a copy again elsewhere.
    fn plan_that_replaces(&self, device: &Device, span: &Span, disk: DiskId) -> Option<&Plan> {
        let end = |step: &Move| step.run.first.0.saturating_add(step.run.count);
        let replaces = |step: &Move| {
            let meets = step.run.first.0 < span.end() && span.first.0 < end(step);
            step.from == Some(disk) && step.run.device == device.id && meets
        };
        self.map.plans.iter().find(|plan| !plan.cancelled && plan.moves.iter().any(replaces))
    }

    /// What becomes of what a disk held that is gone, and what to type about it.
    pub(super) fn replacement(&self, disk: DiskId) -> String {
        let mut plans = self.map.plans.iter().filter(|plan| !plan.cancelled);
        let Some(plan) = plans.find(|plan| plan.moves.iter().any(|step| step.from == Some(disk))) else {
            return self.without_replacement(disk);
        };
        let spans =
            self.map.devices.iter().flat_map(|device| device.spans.iter().map(move |span| (device, span)));
        let mut left = spans.filter(|(_, span)| span.replica_on(disk).is_some());
        let watch = format!("mirrorctl plan watch {}", plan.id.0);
        match left.any(|(device, span)| self.plan_that_replaces(device, span, disk).is_none()) {
            false => format!("its copies are made again elsewhere: {watch}"),
            true => {
                let others = self.without_replacement(disk);
                format!("some of its copies are made again elsewhere: {watch}; of the others: {others}")
            }
        }
    }

    fn without_replacement(&self, disk: DiskId) -> String {
        if !self.map.is_in_use(disk) {
            return "nothing: what it held is elsewhere by now".to_owned();
        }
        if self.map.disks.iter().any(|disk| disk.spare && disk.failed.is_none()) {
            return "mirrorctl events   (says why its copies are not made again on a spare yet)".to_owned();
        }
        "keep its partners running: there is no spare on which its copies could be made again. `mirrorctl events` says \
         why none is made by itself, `mirrorctl spare make` makes one"
            .to_owned()
    }

    /// A copy that is not in sync: how far it is, or what it waits for.
    fn missing(&self, device: &Device, span: &Span, replica: &Replica) -> Missing {
        let disk = self.map.disk_name(replica.disk);
        let peer = self.map.node_of(replica.disk);
        let node = peer.map(|id| self.map.node_name(id));
        let name = node.clone().unwrap_or_default();
        let primary = self.map.node_of(span.primary().disk);
        let up = self.is_up(replica.disk);
        let usable = self.registry.usable(self.map, replica.disk, self.now_ms).is_some();
        let failed = self.registry.has_failed(self.map, replica.disk);
        let plan = self.plan_that_replaces(device, span, replica.disk).filter(|_| failed || !up);
        let todo = if let Some(plan) = plan {
            format!("its copies are made again elsewhere: mirrorctl plan watch {}", plan.id.0)
        } else if failed {
            self.without_replacement(replica.disk)
        } else if !up {
            format!("start ublk-server on {name}; its copies are resynced by themselves")
        } else if !usable {
            format!("bring back the disk {disk}; its copies are resynced by themselves")
        } else if replica.state == ReplicaState::Stale {
            let primary = primary.map_or_else(String::new, |id| self.map.node_name(id));
            format!("resync begins when its primary {primary} reaches it")
        } else {
            String::new()
        };
        let what = match replica.state {
            ReplicaState::Syncing => {
                let resync = self
                    .resyncs(device)
                    .find(|(by, resync)| resync.joining && Some(*by) == primary && Some(resync.peer) == peer);
                match resync.filter(|_| usable) {
                    Some((_, resync)) => format!("{name} catches up: {}", progress(resync)),
                    None => format!("{disk} is syncing"),
                }
            }
            _ => format!("{disk} is stale"),
        };
        Missing { what, node, todo }
    }

    /// Members that are made equal after a session ended: nothing is missing, but reads of what is
    /// left wait for it.
    fn reconciled(&self, device: &Device, found: &mut Vec<Finding>) {
        for (primary, resync) in self.resyncs(device).filter(|(_, resync)| !resync.joining) {
            let (primary, peer) = (self.map.node_name(primary), self.map.node_name(resync.peer));
            found.push(Finding {
                severity: Severity::Note,
                device: Some(device.name.clone()),
                node: Some(peer.clone()),
                what: format!(
                    "{}: {primary} compares its copy with {peer}: {}",
                    device.name,
                    progress(resync)
                ),
                todo: String::new(),
            });
        }
    }

    /// What the present primaries of a device report of making other copies equal, with who reports
    /// it.
    fn resyncs(&self, device: &Device) -> impl Iterator<Item = (NodeId, &ResyncReport)> {
        let (device, spans) = (device.id, device.spans.clone());
        let is_primary =
            move |id: NodeId| spans.iter().any(|span| self.map.node_of(span.primary().disk) == Some(id));
        let reports = self.map.nodes.iter().filter(move |node| is_primary(node.id)).filter_map(|node| {
            let entry = self.registry.get(&node.name).filter(|entry| entry.is_up(self.now_ms))?;
            Some((node.id, entry.report.as_ref()?))
        });
        reports.flat_map(move |(id, report)| {
            report
                .resyncs
                .iter()
                .filter(move |resync| resync.device == device)
                .map(move |resync| (id, resync))
        })
    }

    /// How each member stands, for people.
    fn members(&self, device: &Device, span: &Span) -> String {
        let lines: Vec<String> = span
            .members()
            .map(|replica| {
                let disk = self.map.disk_name(replica.disk);
                match self.registry.standing(self.map, device, span, replica, self.now_ms) {
                    Standing::Unknown => format!("{disk} has not registered since the manager started"),
                    Standing::Away => format!("{disk} is not connected"),
                    Standing::Intact => format!("{disk} is well"),
                    Standing::Changed { up: false, .. } => {
                        format!("{disk} was restarted and is not connected")
                    }
                    Standing::Changed { power_lost: true, .. } => {
                        format!("{disk} was attached anew and may lack what was not flushed")
                    }
                    Standing::Changed { whole: false, .. } => {
                        format!("{disk} was restarted and may lack what was not flushed")
                    }
                    Standing::Changed { .. } => format!("{disk} was restarted"),
                    Standing::Gone => format!("{disk} is gone"),
                }
            })
            .collect();
        lines.join(", ")
    }

    /// For the first span that is not served: whom to wait for, and what to type.
    fn unserved_todo(&self, device: &Device) -> (Option<String>, String) {
        let unserved = device
            .spans
            .iter()
            .find(|span| plan_span(self.map, device, span, self.registry, self.now_ms) != SpanPlan::Served);
        let Some(span) = unserved else { return (None, String::new()) };
        if plan_span(self.map, device, span, self.registry, self.now_ms) != SpanPlan::Wait {
            return (None, String::new());
        }
        let primary = span.primary().disk;
        let node = self.map.node_of(primary).map_or_else(String::new, |id| self.map.node_name(id));
        let movable = span.members().skip(1).any(|replica| {
            self.registry.standing(self.map, device, span, replica, self.now_ms) == Standing::Intact
        });
        let todo = match self.registry.standing(self.map, device, span, span.primary(), self.now_ms) {
            _ if movable => format!("mirrorctl node failover {node}   (or start ublk-server on {node})"),
            Standing::Gone => format!("bring the disk {} back, or its partner", self.map.disk_name(primary)),
            _ => match span.members().find(|replica| !self.is_up(replica.disk)) {
                Some(replica) => {
                    let away =
                        self.map.node_of(replica.disk).map_or_else(String::new, |id| self.map.node_name(id));
                    let behind = span.replicas.iter().find(|replica| {
                        replica.state == ReplicaState::Stale
                            && self.registry.usable(self.map, replica.disk, self.now_ms).is_some()
                    });
                    let behind = behind.and_then(|replica| self.map.node_of(replica.disk));
                    let last_resort = behind.map_or_else(String::new, |id| {
                        format!(
                            "   (if it is lost for good: mirrorctl node force {})",
                            self.map.node_name(id)
                        )
                    });
                    return (Some(away.clone()), format!("start ublk-server on {away}{last_resort}"));
                }
                None => "bring back the disk that is gone".into(),
            },
        };
        (Some(node), todo)
    }

    fn is_up(&self, disk: DiskId) -> bool {
        let node = self.map.node_of(disk).and_then(|id| self.map.node(id));
        node.is_some_and(|node| self.registry.is_up(&node.name, self.now_ms))
    }
}

/// `1.2 GiB of 3 GiB left, 85 MiB/s, about 22 s`.
fn progress(resync: &ResyncReport) -> String {
    if resync.behind_bytes == 0 {
        return "everything is compared, what was sent is being flushed".to_owned();
    }
    let mut text =
        format!("{} of {} left", format_bytes(resync.behind_bytes), format_bytes(resync.total_bytes));
    if let Some(seconds) = resync.seconds_left() {
        text += &format!(", {}/s, about {}", format_bytes(resync.bytes_per_second), duration(seconds));
    }
    text
}

/// A time to come, no more exact than it can be.
fn duration(seconds: u64) -> String {
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6_000 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3_600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::DeviceId;

    #[test]
    fn progress_is_told_in_units_for_people() {
        let mut resync = ResyncReport {
            device: DeviceId(1),
            peer: NodeId(2),
            behind_bytes: 6 << 28,
            total_bytes: 3 << 30,
            moved_bytes: 1 << 20,
            bytes_per_second: 85 << 20,
            joining: true,
        };
        assert_eq!(progress(&resync), "1.5 GiB of 3 GiB left, 85 MiB/s, about 19 s");
        resync.bytes_per_second = 1 << 20;
        assert_eq!(progress(&resync), "1.5 GiB of 3 GiB left, 1 MiB/s, about 26 min");
        resync.bytes_per_second = 100_000;
        assert!(progress(&resync).ends_with("97.7 KiB/s, about 5 h"), "{}", progress(&resync));
        resync.bytes_per_second = 0;
        assert_eq!(progress(&resync), "1.5 GiB of 3 GiB left", "it does not move: nobody knows how long");
        resync.behind_bytes = 0;
        assert_eq!(progress(&resync), "everything is compared, what was sent is being flushed");
    }
}
