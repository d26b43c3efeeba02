//! The JSON that commands print: names instead of ids, documented in `docs/mirrorctl-json.md`.
//!
//! Fields are added here, never renamed or removed.

use mirror_net::control::{ClusterStatus, DiskContent, DiskLoad, Finding, NodeStatus, Severity};
use mirror_net::format::alloc::Segment;
use mirror_net::ids::DiskId;
use mirror_net::map::{Commit, Device, DistributionMap, OnNoQuorum, ReplicaState, SegmentSlots};
use serde::Serialize;
use std::collections::HashMap;

/// How a copy's state is written.
pub fn state_name(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::InSync => "in_sync",
        ReplicaState::Syncing => "syncing",
        ReplicaState::Stale => "stale",
    }
}

/// How the worst of some findings is written; `healthy` if nothing is wrong.
pub fn verdict_name<'a>(findings: impl Iterator<Item = &'a Finding>) -> &'static str {
    match findings.map(|finding| finding.severity).max() {
        Some(Severity::Unavailable) => "unavailable",
        Some(Severity::Degraded) => "degraded",
        Some(Severity::Note) | None => "healthy",
    }
}

/// `map show --json`.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct MapJson {
    pub cluster: String,
    pub id: String,
    pub version: u64,
    pub slice_bytes: u32,
    pub nodes: Vec<MapNodeJson>,
    pub disks: Vec<MapDiskJson>,
    pub devices: Vec<MapDeviceJson>,
    pub plans: Vec<MapPlanJson>,
}

/// How full a disk is: one of `map balance --json`.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct BalanceJson {
    pub node: String,
    pub disk: String,
    pub state: &'static str,
    pub bytes: u64,
    pub used_bytes: u64,
    pub primary_bytes: u64,
    pub slots: SegmentSlots,
    pub used: SegmentSlots,
    pub load: Option<LoadJson>,
}

/// What a disk has to do, in a second: of one of `map balance --json`.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct LoadJson {
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub busy_percent: u8,
}

impl BalanceJson {
    /// Every disk of a map, in order of id, with what those nodes say of their disks.
    pub fn of(map: &DistributionMap, nodes: &[NodeStatus]) -> Vec<Self> {
        let reports = nodes.iter().filter(|node| node.up).filter_map(|node| node.report.as_ref());
        let loads: HashMap<DiskId, &DiskLoad> =
            reports.flat_map(|report| &report.loads).map(|load| (load.disk, load)).collect();
        let mut used: HashMap<DiskId, (SegmentSlots, u64)> = HashMap::new();
        for span in map.devices.iter().flat_map(|device| &device.spans) {
            for (position, copy) in span.replicas.iter().enumerate() {
                let (used, served) = used.entry(copy.disk).or_default();
                *match copy.segment {
                    Segment::Primary => &mut used.primary,
                    Segment::Secondary => &mut used.secondary,
                    Segment::Unmirrored => &mut used.unmirrored,
                } += span.count;
                if position == 0 {
                    *served += u64::from(span.count);
                }
            }
        }
        let bytes = |slices: u64| slices * u64::from(map.slice_bytes);
        let disks = map.disks.iter().map(|disk| {
            let (used, served) = used.get(&disk.id).copied().unwrap_or_default();
            Self {
                node: map.node_name(disk.node),
                disk: disk.name.clone(),
                state: match (&disk.failed, disk.spare) {
                    (Some(_), _) => "failed",
                    (None, true) => "spare",
                    (None, false) => "in_use",
                },
                bytes: bytes(disk.slots.total()),
                used_bytes: bytes(used.total()),
                primary_bytes: bytes(served),
                slots: disk.slots,
                used,
                load: loads.get(&disk.id).map(|load| LoadJson {
                    reads: load.reads,
                    writes: load.writes,
                    read_bytes: load.read_bytes,
                    written_bytes: load.written_bytes,
                    busy_percent: load.busy_percent,
                }),
            }
        });
        disks.collect()
    }
}

/// What is being moved.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct MapPlanJson {
    pub plan: u64,
    pub cause: String,
    pub paused: bool,
    pub cancelled: bool,
}

/// A node in the map.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct MapNodeJson {
    pub name: String,
    pub address: String,
    pub power: Option<String>,
    pub switch: Option<String>,
}

/// A disk in the map.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct MapDiskJson {
    pub node: String,
    pub name: String,
    pub slots: SegmentSlots,
    pub block_bytes: u32,
    pub spare: bool,
    pub failed: Option<String>,
}

/// A device in the map.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct MapDeviceJson {
    pub name: String,
    pub slices: u32,
    pub bytes: u64,
    pub copies: u8,
    pub commit: Commit,
    pub on_no_quorum: OnNoQuorum,
    pub exporter: String,
    pub claim_generation: u64,
    pub spans: Vec<SpanJson>,
}

/// A run of slices with the same copies.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct SpanJson {
    pub first: u32,
    pub count: u32,
    pub epoch: u64,
    pub loss: u32,
    pub replicas: Vec<ReplicaJson>,
}

/// A copy; the first of a span is its primary.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct ReplicaJson {
    pub node: String,
    pub disk: String,
    pub state: &'static str,
    pub segment: Segment,
}

impl MapJson {
    /// With names in place of ids.
    pub fn of(map: &DistributionMap) -> Self {
        let nodes = map.nodes.iter().map(|node| MapNodeJson {
            name: node.name.clone(),
            address: node.address.clone(),
            power: node.power.clone(),
            switch: node.switch.clone(),
        });
        let disks = map.disks.iter().map(|disk| MapDiskJson {
            node: map.node_name(disk.node),
            name: disk.name.clone(),
            slots: disk.slots,
            block_bytes: disk.block_bytes,
            spare: disk.spare,
            failed: disk.failed.as_ref().map(|failed| failed.reason.clone()),
        });
        let replica = |replica: &mirror_net::map::Replica| ReplicaJson {
            node: map.node_of(replica.disk).map_or_else(String::new, |node| map.node_name(node)),
            disk: map.disk(replica.disk).map_or_else(String::new, |disk| disk.name.clone()),
            state: state_name(replica.state),
            segment: replica.segment,
        };
        let plans = map.plans.iter().map(|plan| MapPlanJson {
            plan: plan.id.0,
            cause: plan.cause.clone(),
            paused: plan.paused,
            cancelled: plan.cancelled,
        });
        let devices = map.devices.iter().map(|device| MapDeviceJson {
            name: device.name.clone(),
            slices: device.slices,
            bytes: device.bytes(map.slice_bytes),
            copies: device.copies,
            commit: device.commit,
            on_no_quorum: device.on_no_quorum,
            exporter: map.node_name(device.claim.node),
            claim_generation: device.claim.generation.0,
            spans: device
                .spans
                .iter()
                .map(|span| SpanJson {
                    first: span.first.0,
                    count: span.count,
                    epoch: span.epoch.0,
                    loss: span.loss.0,
                    replicas: span.replicas.iter().map(replica).collect(),
                })
                .collect(),
        });
        Self {
            cluster: map.cluster_name.clone(),
            id: map.cluster.to_string(),
            version: map.version.0,
            slice_bytes: map.slice_bytes,
            nodes: nodes.collect(),
            disks: disks.collect(),
            devices: devices.collect(),
            plans: plans.collect(),
        }
    }
}

/// A device as it is now: `device list --json`, and part of `status --json`.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct DeviceJson {
    pub name: String,
    pub bytes: u64,
    pub exporter: String,
    pub path: Option<String>,
    pub uri: Option<String>,
    pub state: &'static str,
    pub copies: u8,
    pub copies_in_sync: usize,
    pub resyncs: Vec<ResyncJson>,
}

/// A primary making another node's copies of a device equal to its own.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct ResyncJson {
    pub primary: String,
    pub peer: String,
    pub joining: bool,
    pub behind_bytes: u64,
    pub total_bytes: u64,
    pub moved_bytes: u64,
    pub bytes_per_second: u64,
    pub seconds_left: Option<u64>,
}

impl DeviceJson {
    /// Every device of the map.
    pub fn of_status(status: &ClusterStatus) -> Vec<Self> {
        let Some(map) = &status.map else { return Vec::new() };
        let devices = map.devices.iter().map(|device| {
            let exporter = map.node_name(device.claim.node);
            let node = status.nodes.iter().find(|node| node.name == exporter && node.up);
            let export = node
                .and_then(|node| node.report.as_ref())
                .and_then(|report| report.exports.iter().find(|export| export.device == device.id));
            let name = Some(device.name.as_str());
            let about = status.findings.iter().filter(|finding| finding.device.as_deref() == name);
            Self {
                name: device.name.clone(),
                bytes: device.bytes(map.slice_bytes),
                path: export.and_then(|export| export.path.clone()),
                uri: export.and_then(|export| export.uri.clone()),
                state: verdict_name(about),
                copies: device.copies,
                copies_in_sync: device.spans.iter().map(|span| span.members().count()).min().unwrap_or(0),
                resyncs: resyncs(status, map, device),
                exporter,
            }
        });
        devices.collect()
    }
}

/// What the present primaries of a device report; a node that is down, or has been deposed, resyncs
/// nothing.
fn resyncs(status: &ClusterStatus, map: &DistributionMap, device: &Device) -> Vec<ResyncJson> {
    let is_primary = |name: &str| {
        let node = map.node_named(name).map(|node| node.id);
        device.spans.iter().any(|span| map.node_of(span.primary().disk) == node)
    };
    let primaries = status.nodes.iter().filter(|node| node.up && is_primary(&node.name));
    let reported = primaries.flat_map(|node| {
        let resyncs = node.report.iter().flat_map(|report| &report.resyncs);
        resyncs.filter(|resync| resync.device == device.id).map(|resync| ResyncJson {
            primary: node.name.clone(),
            peer: map.node_name(resync.peer),
            joining: resync.joining,
            behind_bytes: resync.behind_bytes,
            total_bytes: resync.total_bytes,
            moved_bytes: resync.moved_bytes,
            bytes_per_second: resync.bytes_per_second,
            seconds_left: resync.seconds_left(),
        })
    });
    reported.collect()
}

/// `status --json`.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct StatusJson {
    pub verdict: &'static str,
    pub summary: String,
    pub cluster: Option<String>,
    pub version: Option<u64>,
    pub nodes: Vec<NodeJson>,
    pub devices: Vec<DeviceJson>,
    pub findings: Vec<Finding>,
}

/// A node as it is now.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct NodeJson {
    pub name: String,
    pub up: bool,
    pub adopted: Option<u64>,
    pub disks: Vec<DiskJson>,
    pub sessions: Vec<SessionJson>,
}

/// A disk as its node found it.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct DiskJson {
    pub name: String,
    pub path: String,
    pub bytes: u64,
    pub state: &'static str,
    pub detail: Option<String>,
}

/// A session of a node with another one.
#[derive(Serialize, Debug)]
#[allow(missing_docs)]
pub struct SessionJson {
    pub peer: String,
    pub open: bool,
    pub last_error: Option<String>,
}

impl StatusJson {
    /// With names in place of ids.
    pub fn of(status: &ClusterStatus) -> Self {
        let map = status.map.as_ref();
        Self {
            verdict: verdict_name(status.findings.iter()),
            summary: summary(&status.findings),
            cluster: map.map(|map| map.cluster_name.clone()),
            version: map.map(|map| map.version.0),
            nodes: status.nodes.iter().map(|node| NodeJson::of(map, node)).collect(),
            devices: DeviceJson::of_status(status),
            findings: status.findings.clone(),
        }
    }
}

/// The verdict in one line.
pub fn summary(findings: &[Finding]) -> String {
    let verdict = verdict_name(findings.iter());
    let counted: Vec<&Finding> =
        findings.iter().filter(|finding| finding.severity != Severity::Note).collect();
    match counted.as_slice() {
        [] => verdict.to_owned(),
        [only] => format!("{verdict}: {}", only.what),
        [first, rest @ ..] => format!("{verdict}: {} (and {} more)", first.what, rest.len()),
    }
}

impl NodeJson {
    fn of(map: Option<&DistributionMap>, node: &NodeStatus) -> Self {
        let disks = node.disks.iter().map(|disk| {
            let in_map = match (&disk.content, map) {
                (DiskContent::Ours { cluster, disk }, Some(map)) if *cluster == map.cluster => {
                    map.disk(*disk)
                }
                _ => None,
            };
            let (state, detail) = match (&disk.content, in_map) {
                (_, Some(in_map)) => match &in_map.failed {
                    Some(failed) => ("failed", Some(failed.reason.clone())),
                    None => ("ok", None),
                },
                (DiskContent::Blank, _) => ("blank", None),
                (DiskContent::Foreign { what }, _) => ("foreign", Some(what.clone())),
                (DiskContent::Ours { cluster, disk }, _)
                    if map.is_some_and(|map| *cluster == map.cluster) =>
                {
                    ("removed", Some(format!("it was {disk}")))
                }
                (DiskContent::Ours { cluster, .. }, _) => ("other_cluster", Some(cluster.to_string())),
                (DiskContent::Unusable { why }, _) => ("unusable", Some(why.clone())),
            };
            let (name, path) = (disk.name.clone(), disk.path.clone());
            DiskJson { name, path, bytes: disk.bytes, state, detail }
        });
        // Of a node that is down, what it said last says nothing any more.
        let report = node.report.as_ref().filter(|_| node.up);
        let sessions = report.into_iter().flat_map(|report| &report.sessions).map(|session| SessionJson {
            peer: map.map_or_else(|| session.peer.to_string(), |map| map.node_name(session.peer)),
            open: session.open,
            last_error: session.last_error.clone(),
        });
        Self {
            name: node.name.clone(),
            up: node.up,
            adopted: node.process.map(|_| node.adopted.0),
            disks: disks.collect(),
            sessions: sessions.collect(),
        }
    }
}

/// A disk of the map or of a node that is connected, for `disk list`.
#[derive(Serialize, Debug)]
pub struct ListedDiskJson {
    /// Its node's name.
    pub node: String,
    /// Its name.
    pub disk: String,
    /// Its path there, if its node has said so.
    pub path: Option<String>,
    /// Its size, if its node has said so.
    pub bytes: Option<u64>,
    /// The size of its primary segment; none if it is not in the map, as with the other segments.
    pub primary_bytes: Option<u64>,
    /// The size of its secondary segment.
    pub secondary_bytes: Option<u64>,
    /// The size of its unmirrored segment.
    pub unmirrored_bytes: Option<u64>,
    /// Bytes of slices that have a copy on it.
    pub used_bytes: Option<u64>,
    /// `ok`, `spare`, `failed`, `absent`, `node_down`; of one that is not in the map what is on it.
    pub state: String,
    /// Of what its state does not say all, for people.
    pub detail: Option<String>,
}

impl ListedDiskJson {
    /// Those of the map, then those that are in no cluster, or in another.
    pub fn of(status: &ClusterStatus) -> Vec<Self> {
        let mut disks = Vec::new();
        let map = status.map.as_ref();
        let balance = map.map_or_else(Vec::new, |map| BalanceJson::of(map, &status.nodes));
        for (disk, balance) in map.into_iter().flat_map(|map| &map.disks).zip(balance) {
            let Some(map) = map else { continue };
            let node = map.node_name(disk.node);
            let found = status.nodes.iter().find(|entry| entry.name == node);
            let ours = DiskContent::Ours { cluster: map.cluster, disk: disk.id };
            let inventory =
                found.and_then(|entry| entry.disks.iter().find(|inventory| inventory.content == ours));
            let up = found.is_some_and(|entry| entry.up);
            let state = match (&disk.failed, inventory) {
                (Some(_), _) => "failed",
                (None, _) if !up => "node_down",
                (None, None) => "absent",
                (None, Some(_)) if disk.spare => "spare",
                (None, Some(_)) => "ok",
            };
            let slice = u64::from(map.slice_bytes);
            let of = |slots: u32| Some(u64::from(slots) * slice);
            disks.push(Self {
                node,
                disk: disk.name.clone(),
                path: inventory.map(|inventory| inventory.path.clone()),
                bytes: inventory.map(|inventory| inventory.bytes),
                primary_bytes: of(disk.slots.primary),
                secondary_bytes: of(disk.slots.secondary),
                unmirrored_bytes: of(disk.slots.unmirrored),
                used_bytes: Some(balance.used_bytes),
                state: state.to_owned(),
                detail: disk.failed.as_ref().map(|failed| failed.reason.clone()),
            });
        }
        for node in &status.nodes {
            let json = NodeJson::of(map, node);
            let in_map = |content: &DiskContent| match (content, map) {
                (DiskContent::Ours { cluster, disk }, Some(map)) => {
                    *cluster == map.cluster && map.disk(*disk).is_some()
                }
                _ => false,
            };
            for (found, json) in
                node.disks.iter().zip(json.disks).filter(|(found, _)| !in_map(&found.content))
            {
                disks.push(Self {
                    node: node.name.clone(),
                    disk: found.name.clone(),
                    path: Some(found.path.clone()),
                    bytes: Some(found.bytes),
                    primary_bytes: None,
                    secondary_bytes: None,
                    unmirrored_bytes: None,
                    used_bytes: None,
                    state: json.state.to_owned(),
                    detail: json.detail,
                });
            }
        }
        disks
    }
}
