//! The map made again from what the nodes have kept, after the loss of every store.
//!
//! A node keeps every map that it is sent before it acts on it. So the newest map that any node has kept is the
//! newest that anybody acted on: of what the manager stored after it nobody knows, and nobody has
//! acknowledged anything under it. With all nodes asked it is therefore the map, as it stands.
//!
//! A node that is not asked may have kept a newer one. What can that say? A copy comes back only at the
//! word of its primary, which has the map before; so of a slice whose members were all asked nothing that
//! matters is missing. Where the missing node has a member, it may have been recorded to be alone,
//! and have acknowledged what the others lack. So the others are stale there, and wait for it. Whatever it
//! kept, that is right: had another been preferred to it, that one would have had to act on it, and would
//! have kept that map. Two missing nodes may have handed such a slice to each other, and nobody can tell
//! which of them is right: that is refused.
//!
//! The new version is far beyond the newest: should an old store come back, its manager is older than
//! every node, and is turned away by them all.

use super::registry::Registry;
use super::{ConnectionId, Output, Proposal, Ticket};
use crate::config::ClusterFile;
use crate::control::ManagerMessage;
use crate::ids::{DiskId, MapVersion, NodeId, SliceEpoch};
use crate::map::{DistributionMap, Replica, ReplicaState};
use std::collections::{BTreeMap, BTreeSet};

/// How many versions are left out: more than a lost manager can have stored that no node was sent.
const GAP: u64 = 1_000_000;
/// How long the nodes may take to answer.
const ANSWER_MS_MAX: u64 = 10_000;

/// A rebuilding under way.
#[derive(Debug)]
pub(super) struct Rebuild {
    pub(super) ticket: Ticket,
    install: bool,
    without: BTreeSet<String>,
    deadline_ms: u64,
    /// What each node has kept, once it has told.
    kept: BTreeMap<String, (ConnectionId, Option<Option<DistributionMap>>)>,
}

/// What a rebuilding came to.
#[derive(Debug)]
pub(super) struct Rebuilt {
    /// To be stored, if that was asked for.
    pub(super) proposal: Option<Proposal>,
    /// For people.
    pub(super) lines: Vec<String>,
}

impl Rebuild {
    /// Asks every node of the cluster file but those that are gone.
    pub(super) fn begin(
        now_ms: u64,
        (ticket, file, without, install): (Ticket, &ClusterFile, &[String], bool),
        (map, registry): (Option<&DistributionMap>, &Registry),
        output: &mut impl FnMut(Output),
    ) -> Result<Self, String> {
        if let Some(map) = map {
            return Err(format!(
                "the manager has a map, of cluster {}, version {}: nothing is to be rebuilt; if the nodes have a newer one, \
                 start the manager with an empty store",
                map.cluster_name, map.version
            ));
        }
        if let Some(unknown) = without.iter().find(|name| file.node(name).is_none()) {
            return Err(format!("there is no node {unknown:?} in the cluster file"));
        }
        let mut kept = BTreeMap::new();
        let mut absent = Vec::new();
        for node in file.nodes.iter().filter(|node| !without.contains(&node.name)) {
            let there =
                registry.get(&node.name).filter(|entry| entry.session.is_some() && entry.is_up(now_ms));
            match there {
                Some(entry) => drop(kept.insert(node.name.clone(), (entry.connection, None))),
                None => absent.push(node.name.as_str()),
            }
        }
        if !absent.is_empty() {
            return Err(format!(
                "not connected: {}; a node that is missing may have a newer map than the others: start ublk-server \
                 there, or go on without it with --force-without NODE",
                absent.join(", ")
            ));
        }
        for (connection, _) in kept.values() {
            output(Output::Send { connection: *connection, message: ManagerMessage::TellMap });
        }
        let without = without.iter().cloned().collect();
        Ok(Self { ticket, install, without, deadline_ms: now_ms + ANSWER_MS_MAX, kept })
    }

    /// A node has told what it kept.
    pub(super) fn answered(&mut self, connection: ConnectionId, map: Option<DistributionMap>) {
        let mut kept = self.kept.values_mut();
        if let Some((_, answer)) = kept.find(|(asked, _)| *asked == connection) {
            answer.get_or_insert(map);
        }
    }

    /// What it comes to, once all have answered or time is up.
    pub(super) fn outcome(&self, now_ms: u64) -> Option<Result<Rebuilt, String>> {
        let silent: Vec<&str> =
            self.kept.iter().filter(|(_, (_, map))| map.is_none()).map(|(name, _)| name.as_str()).collect();
        if silent.is_empty() {
            return Some(self.rebuilt());
        }
        (now_ms >= self.deadline_ms).then(|| {
            Err(format!("no answer within {} s: {}; repeat it", ANSWER_MS_MAX / 1000, silent.join(", ")))
        })
    }

    fn rebuilt(&self) -> Result<Rebuilt, String> {
        let told: Vec<(&str, Option<&DistributionMap>)> = self
            .kept
            .iter()
            .map(|(name, (_, map))| (name.as_str(), map.as_ref().and_then(Option::as_ref)))
            .collect();
        let maps = told.iter().filter_map(|(name, map)| map.map(|map| (*name, map)));
        let newest = maps.clone().max_by_key(|(_, map)| map.version);
        let (from, newest) = newest.ok_or("no node has kept a map: there is nothing to rebuild from")?;
        if let Some((name, other)) = maps.clone().find(|(_, map)| map.cluster != newest.cluster) {
            return Err(format!(
                "{from} has kept a map of cluster {}, {name} of cluster {}: they do not belong together",
                newest.cluster, other.cluster
            ));
        }
        if let Some((name, _)) = maps.clone().find(|(_, map)| map.version == newest.version && *map != newest)
        {
            return Err(format!(
                "{from} and {name} have kept different maps of version {}: they come from different stores",
                newest.version
            ));
        }
        let mut lines = Vec::new();
        for (name, map) in &told {
            lines.push(match map {
                Some(map) => format!("{name} has kept map {}", map.version),
                None => format!("{name} has kept no map"),
            });
        }
        newest.validate().map_err(|error| format!("the map that {from} has kept is damaged: {error}"))?;
        let missing = self.missing(newest, &told)?;
        let mut next = newest.clone();
        next.version = MapVersion(newest.version.0 + GAP);
        lines.push(format!("map {} becomes map {}", newest.version, next.version));
        lines.extend(distrust(&mut next, &missing)?);
        next.validate().map_err(|error| format!("the map of {from} cannot be used: {error}"))?;
        let why = std::iter::once("rebuilt from the nodes by the operator".to_owned()).chain(lines.clone());
        let why = why.collect();
        let proposal = Proposal { base: None, batch: Vec::new(), next: Box::new(next), why };
        Ok(Rebuilt { proposal: self.install.then_some(proposal), lines })
    }

    /// The nodes of that map that have told nothing; all of them must have been named.
    fn missing(
        &self,
        newest: &DistributionMap,
        told: &[(&str, Option<&DistributionMap>)],
    ) -> Result<BTreeSet<NodeId>, String> {
        let has_told = |name: &str| told.iter().any(|(other, map)| *other == name && map.is_some());
        // Whoever is in the map was sent one: a node without has lost it.
        let missing: Vec<_> = newest.nodes.iter().filter(|node| !has_told(&node.name)).collect();
        let unnamed: Vec<&str> = missing
            .iter()
            .map(|node| node.name.as_str())
            .filter(|name| !self.without.contains(*name))
            .collect();
        if !unnamed.is_empty() {
            return Err(format!(
                "{} is in the map and has kept none: it may have had a newer one; go on without its word with \
                 --force-without NODE",
                unnamed.join(", ")
            ));
        }
        Ok(missing.into_iter().map(|node| node.id).collect())
    }
}

/// Where the missing node has a member, that one alone counts.
fn distrust(map: &mut DistributionMap, missing: &BTreeSet<NodeId>) -> Result<Vec<String>, String> {
    let nodes: BTreeMap<DiskId, NodeId> = map.disks.iter().map(|disk| (disk.id, disk.node)).collect();
    let version = map.version;
    let mut waiting = Vec::new();
    for device in &mut map.devices {
        for span in &mut device.spans {
            let is_missing = |disk| nodes.get(&disk).is_some_and(|node| missing.contains(node));
            let member =
                |replica: &Replica| replica.state == ReplicaState::InSync && is_missing(replica.disk);
            let Some(at) = span.replicas.iter().position(member) else { continue };
            if missing.len() > 1 {
                return Err(format!(
                    "more than one node is missing, and one of them has a copy in sync of {}: nobody can tell which \
                     of them is right; start ublk-server on all of them but one",
                    device.name
                ));
            }
            let mut changed = at != 0;
            span.replicas[..=at].rotate_right(1);
            if changed {
                // As with every change of the primary: what it held in memory before is not stored by that.
                span.primary_since = version;
            }
            for replica in &mut span.replicas[1..] {
                changed |= replica.state != ReplicaState::Stale;
                replica.state = ReplicaState::Stale;
            }
            if changed {
                span.epoch = SliceEpoch(version.0);
            }
            waiting.push((device.name.clone(), span.first.0, span.end(), span.replicas[0].disk));
        }
    }
    let text = |(device, first, end, disk): (String, u32, u32, DiskId)| {
        format!("{device} slices {first} to {}: wait for {}", end - 1, map.disk_name(disk))
    };
    Ok(waiting.into_iter().map(text).collect())
}
