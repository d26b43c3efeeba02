//! What is not as it should be, and what to type about it.

use super::registry::{Registered, Registry};
use super::{export, failover};
use crate::control::{DiskContent, DiskInventory, Finding, SessionReport, Severity};
use crate::map::{Commit, Device, DistributionMap, Node};
use std::collections::BTreeMap;

/// Everything worth telling an operator, the worst first.
pub fn findings(
    map: Option<&DistributionMap>,
    registry: &Registry,
    outdated: &BTreeMap<String, String>,
    now_ms: u64,
) -> Vec<Finding> {
    let mut found: Vec<Finding> = outdated
        .iter()
        .map(|(node, what)| Finding {
            severity: Severity::Unavailable,
            device: None,
            node: Some(node.clone()),
            what: what.clone(),
            todo: "this manager's map is an old one: start it with the newest, or with an empty store and type: mirrorctl \
                   map rebuild --from-nodes (or, if the node's state directory is of an earlier cluster, empty that)"
                .into(),
        })
        .collect();
    let Some(map) = map else {
        let lost: Vec<Finding> =
            registry.iter().filter_map(|(name, entry)| member_of_another(name, entry)).collect();
        if !lost.is_empty() {
            found.extend(lost);
            return found;
        }
        found.push(Finding {
            severity: Severity::Unavailable,
            device: None,
            node: None,
            what: "no cluster has been created yet".into(),
            todo: "start ublk-server on every node, then type: mirrorctl cluster create --file FILE".into(),
        });
        return found;
    };
    for device in &map.devices {
        let view = View { map, registry, now_ms };
        view.copies(device, &mut found);
        view.exporter(device, &mut found);
    }
    for node in &map.nodes {
        View { map, registry, now_ms }.node(node, &mut found);
    }
    let strangers =
        registry.iter().filter(|(name, entry)| map.node_named(name).is_none() && entry.is_up(now_ms));
    found.extend(strangers.map(|(name, _)| Finding {
        severity: Severity::Note,
        device: None,
        node: Some(name.to_owned()),
        what: format!("{name} is connected, and no part of the cluster"),
        todo: format!(
            "mirrorctl node add {name}   (--dry-run shows what it would bring), or stop ublk-server there"
        ),
    }));
    for (name, entry) in
        registry.iter().filter(|(name, entry)| map.node_named(name).is_some() && entry.is_up(now_ms))
    {
        found.extend(entry.disks.iter().filter_map(|disk| removed_disk(map, name, disk)));
    }
    found.extend(map.plans.iter().filter(|plan| plan.cancelled).map(|plan| {
        let slices: u64 = plan.moves.iter().map(|step| u64::from(step.run.count)).sum();
        let what = format!(
            "plan {} is cancelled: {slices} slices have a copy too many until it is certain which of two can go",
            plan.id.0
        );
        let todo = "nothing if all nodes are there; else start those that are not".to_owned();
        Finding { severity: Severity::Note, device: None, node: None, what, todo }
    }));
    let settling = map.devices.iter().filter(|device| device.commit == Commit::Settling);
    found.extend(settling.map(|device| Finding {
        severity: Severity::Note,
        device: Some(device.name.clone()),
        node: None,
        what: format!(
            "{} commits immediately once its mirrors have stored what they hold in memory",
            device.name
        ),
        todo: "nothing if all nodes are there; else start those that are not".into(),
    }));
    if let Some(topology) = map.topology.filter(|_| map.plans.is_empty())
        && let Some(what) = map.deviation(topology)
    {
        found.push(Finding {
            severity: Severity::Note,
            device: None,
            node: None,
            what: format!("topology {} is not kept: {what}", topology.name()),
            todo: "mirrorctl rebalance   (--dry-run shows what it would move)".into(),
        });
    }
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

/// A disk that its node still has, and the map has not any more.
fn removed_disk(map: &DistributionMap, node: &str, disk: &DiskInventory) -> Option<Finding> {
    let DiskContent::Ours { cluster, disk: id } = disk.content else { return None };
    (cluster == map.cluster && map.has_left(id)).then(|| Finding {
        severity: Severity::Note,
        device: None,
        node: Some(node.to_owned()),
        what: format!("{node}/{} ({}) is no part of the cluster any more", disk.name, disk.path),
        todo: format!(
            "take it out of the cluster file of {node}, if it is there; or let it enter again: mirrorctl disk add {node}/{} \
             {} --force",
            disk.name, disk.path
        ),
    })
}

/// A manager that lost its state looks like a new one, but the nodes' disks tell.
fn member_of_another(name: &str, entry: &Registered) -> Option<Finding> {
    let cluster = entry.disks.iter().find_map(|disk| match disk.content {
        DiskContent::Ours { cluster, .. } => Some(cluster),
        _ => None,
    })?;
    Some(Finding {
        severity: Severity::Unavailable,
        device: None,
        node: Some(name.to_owned()),
        what: format!("the disks of {name} belong to cluster {cluster}, which this manager does not know"),
        todo: "start the manager on the store that has its map; if there is none, or this one is to have it from now on: \
               mirrorctl map rebuild --from-nodes; only if that cluster is history: mirrorctl cluster create --force"
            .into(),
    })
}

/// `3.4 s`.
pub(super) fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1_000, ms % 1_000 / 100)
}

/// What has changed about partners that are slow, or left out for having come and gone, for people: of what a node says
/// now, as against what it said before.
pub(super) fn slow_lines(
    map: &DistributionMap,
    name: &str,
    before: &[SessionReport],
    now: &[SessionReport],
) -> Vec<String> {
    let mut lines = Vec::new();
    for session in now {
        let earlier = before.iter().find(|earlier| earlier.peer == session.peer);
        let peer = map.node_name(session.peer);
        match (earlier.and_then(|earlier| earlier.slow_ms), session.slow_ms) {
            (None, Some(owed)) => {
                lines.push(format!(
                    "node {peer} is slow: it owes {name} the answer to a write for {}",
                    seconds(owed)
                ));
            }
            (Some(_), None) if session.open => {
                lines.push(format!("node {peer} answers {name} in time again"))
            }
            _ => {}
        }
        if let (None, Some((left, losses))) = (earlier.and_then(|earlier| earlier.held_ms), session.held_ms) {
            lines.push(format!(
                "node {name} leaves the copies of {peer} out for {}: it was lost {losses} times of late",
                seconds(left)
            ));
        }
    }
    lines
}

/// What findings are made from.
pub(super) struct View<'a> {
    pub(super) map: &'a DistributionMap,
    pub(super) registry: &'a Registry,
    pub(super) now_ms: u64,
}

impl View<'_> {
    fn exporter(&self, device: &Device, found: &mut Vec<Finding>) {
        let exporter = self.map.node_name(device.claim.node);
        let mut push = |severity, what: String, todo: String| {
            let what = format!("{}: {what}", device.name);
            let (device, node) = (Some(device.name.clone()), Some(exporter.clone()));
            found.push(Finding { severity, device, node, what, todo });
        };
        let entry = self.registry.get(&exporter).filter(|entry| entry.is_up(self.now_ms));
        let Some(entry) = entry else {
            let movable = failover::plan(self.map, self.registry, self.now_ms, &exporter).is_ok_and(|plan| {
                plan.batch.iter().any(|verb| {
                    matches!(verb, crate::map::verbs::Verb::MoveClaim { device: moved, .. } if *moved == device.id)
                })
            });
            let todo = if movable {
                format!("mirrorctl node failover {exporter}   (or start ublk-server on {exporter})")
            } else {
                format!("start ublk-server on {exporter}")
            };
            push(Severity::Unavailable, format!("its exporter {exporter} is not connected"), todo);
            return;
        };
        let report = entry
            .report
            .as_ref()
            .and_then(|report| report.exports.iter().find(|export| export.device == device.id));
        match report {
            Some(export) => {
                if let Some(error) = &export.error {
                    let todo = format!("see the log of ublk-server on {exporter}");
                    push(Severity::Unavailable, format!("{exporter} cannot export it: {error}"), todo);
                }
            }
            None => {
                let hindrances = export::hindrances(self.map, device, self.registry, self.now_ms);
                let what = if hindrances.is_empty() {
                    format!("{exporter} has not started to export it yet")
                } else {
                    format!("not exported yet: {}", hindrances.join(", "))
                };
                push(Severity::Unavailable, what, String::new());
            }
        }
    }

    fn node(&self, node: &Node, found: &mut Vec<Finding>) {
        let mut push = |severity, what: String, todo: String| {
            found.push(Finding { severity, device: None, node: Some(node.name.clone()), what, todo });
        };
        let name = &node.name;
        let entry = self.registry.get(name);
        match entry {
            Some(entry) if entry.is_up(self.now_ms) => self.node_up(node, entry, &mut push),
            Some(entry) if entry.connected => push(
                Severity::Degraded,
                format!("node {name} is connected but silent"),
                format!("look at ublk-server on {name}"),
            ),
            Some(_) => push(
                Severity::Degraded,
                format!("node {name} is not connected"),
                format!("start ublk-server on {name}"),
            ),
            None => push(
                Severity::Degraded,
                format!("node {name} has not registered since the manager started"),
                format!("start ublk-server on {name}"),
            ),
        }
        for disk in self.map.disks.iter().filter(|disk| disk.node == node.id) {
            if let Some(failed) = &disk.failed {
                push(
                    Severity::Degraded,
                    format!("disk {name}/{} failed: {}", disk.name, failed.reason),
                    self.replacement(disk.id),
                );
            }
        }
    }

    fn node_up(&self, node: &Node, entry: &Registered, push: &mut impl FnMut(Severity, String, String)) {
        let name = &node.name;
        if entry.adopted < self.map.version {
            let what =
                format!("node {name} has not adopted map {} yet, it has {}", self.map.version, entry.adopted);
            push(Severity::Note, what, String::new());
        }
        let missing = self.map.disks.iter().filter(|disk| {
            disk.node == node.id
                && disk.failed.is_none()
                && entry.incarnation(self.map.cluster, disk.id).is_none()
        });
        for disk in missing {
            let found = entry.disks.iter().find(|inventory| inventory.name == disk.name);
            let (what, todo) = match found.map(|inventory| (inventory, &inventory.content)) {
                None => (
                    "is not in the cluster file that the node reads".to_owned(),
                    "copy the same cluster file to every machine".to_owned(),
                ),
                Some((at, DiskContent::Blank)) => {
                    (format!("is blank ({})", at.path), "check the path in the cluster file".into())
                }
                Some((at, DiskContent::Foreign { what })) => (
                    format!("holds something else ({}): {what}", at.path),
                    "check the path in the cluster file".into(),
                ),
                Some((at, DiskContent::Unusable { why })) => (
                    format!("cannot be used ({}): {why}", at.path),
                    format!("repair it and restart ublk-server on {name}"),
                ),
                Some((at, DiskContent::Ours { cluster, disk })) => {
                    let whose = if *cluster == self.map.cluster {
                        format!("carries the id of {}", self.map.disk_name(*disk))
                    } else {
                        format!("belongs to cluster {cluster}")
                    };
                    (format!("{whose} ({})", at.path), "check the paths in the cluster file".into())
                }
            };
            push(Severity::Degraded, format!("disk {name}/{} {what}", disk.name), todo);
        }
        let Some(report) = &entry.report else { return };
        for session in report.sessions.iter().filter(|session| !session.open) {
            let peer = self.map.node_name(session.peer);
            // Of a node that is down this is said already.
            if self.registry.is_up(&peer, self.now_ms) {
                let why = session.last_error.as_deref().map_or_else(String::new, |why| format!(": {why}"));
                let todo = format!("check the network between {name} and {peer}");
                push(Severity::Degraded, format!("node {name} has no session with {peer}{why}"), todo);
            }
        }
        for session in &report.sessions {
            let peer = self.map.node_name(session.peer);
            if let Some(owed) = session.slow_ms {
                let what = format!(
                    "node {peer} is slow: it owes {name} the answer to a write for {}",
                    seconds(owed)
                );
                push(Severity::Note, what, format!("look at the disks of {peer}, and at the network to it"));
            }
            if let Some((left, losses)) = session.held_ms {
                let what = format!(
                    "node {name} takes the copies of {peer} back in {}: it was lost {losses} times of late",
                    seconds(left)
                );
                push(Severity::Note, what, format!("check the network between {name} and {peer}"));
            }
        }
        for line in &report.waiting {
            push(Severity::Degraded, format!("node {name} waits: {line}"), String::new());
        }
    }
}
