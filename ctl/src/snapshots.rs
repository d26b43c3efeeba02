//! What people and programs read, word for word: a change here is a change for them.
//!
//! `UPDATE_SNAPSHOTS=1 cargo test -p ctl` writes the files anew.

use crate::broadcast::{self, BroadcastJson};
use crate::json::{BalanceJson, DeviceJson, MapJson, StatusJson};
use crate::{device, map, output, risk, status};
use clap::Parser;
use mirror_net::control::{
    BroadcastKind, BroadcastRow, BroadcastStatus, ClusterStatus, ContentSum, DiskContent, DiskInventory,
    DiskLoad, ExportReport, Finding, NodeReport, NodeStatus, ResyncReport, SessionReport, Severity, Unserved,
};
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{AttachId, ClusterId, Incarnation, MapVersion, NodeId, ProcessId};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
use mirror_net::map::verbs::{Run, Verb};
use mirror_net::map::{DistributionMap, ReplicaState, SegmentSlots};
use std::path::Path;

fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots").join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(wanted == text, "{} says\n{wanted}\nand now it is\n{text}", path.display());
}

pub(crate) fn first_map() -> DistributionMap {
    let node = |index: u64| NodeSpec {
        name: format!("n{index}"),
        address: format!("10.0.0.{index}:7301"),
        power: Some(format!("feed-{index}")),
        switch: None,
        disks: vec![DiskSpec {
            name: "d1".into(),
            slots: SegmentSlots { primary: 7, secondary: 7, unmirrored: 1 },
            block_bytes: 512,
            incarnation: Incarnation { attach: AttachId(index), process: ProcessId(index) },
        }],
        spare: false,
        devices: Default::default(),
    };
    pairs(ClusterId(uuid::Uuid::from_u128(1)), "lab", 64 << 20, &[node(1), node(2)]).unwrap()
}

/// n1 is gone and was failed over.
fn failed_over() -> ClusterStatus {
    let map = first_map();
    let device = &map.devices[0];
    let run = Run { device: device.id, first: device.spans[0].first, count: device.slices };
    let [old, new] = [map.disks[0].id, map.disks[1].id];
    let map = map
        .apply(&[
            Verb::Promote { run, disk: new },
            Verb::Mark { run, disk: old, state: ReplicaState::Stale, incarnation: None },
            Verb::MoveClaim { device: device.id, node: NodeId(2) },
        ])
        .unwrap()
        .unwrap();
    let exports =
        map.devices.iter().filter(|device| device.claim.node == NodeId(2)).map(|device| ExportReport {
            device: device.id,
            path: (device.id.0 == 1).then(|| "/dev/ublkb0".to_owned()),
            uri: (device.id.0 != 1).then(|| format!("nbd+unix:///{}?socket=/run/x.sock", device.name)),
            error: None,
            in_use: None,
            requests: 17,
            pending: 0,
        });
    let load = DiskLoad {
        disk: new,
        reads: 20,
        writes: 310,
        read_bytes: 80 << 10,
        written_bytes: 5 << 20,
        busy_percent: 41,
    };
    let report = NodeReport {
        adopted: map.version,
        sessions: vec![SessionReport {
            peer: NodeId(1),
            open: false,
            last_error: Some("no answer".into()),
            slow_ms: None,
            held_ms: None,
        }],
        exports: exports.collect(),
        loads: vec![load],
        ..NodeReport::default()
    };
    let disk = DiskInventory {
        name: "d1".into(),
        path: "/dev/disk/by-id/two".into(),
        bytes: 1 << 30,
        block_bytes: 512,
        attach: AttachId(2),
        content: DiskContent::Ours { cluster: map.cluster, disk: new },
    };
    let finding = |severity, device: Option<&str>, node: Option<&str>, what: &str, todo: &str| Finding {
        severity,
        device: device.map(str::to_owned),
        node: node.map(str::to_owned),
        what: what.into(),
        todo: todo.into(),
    };
    let findings = vec![
        finding(
            Severity::Unavailable,
            Some("n1-d1-unmirrored"),
            Some("n1"),
            "n1-d1-unmirrored: cannot be read or written: n1/d1 is not connected",
            "start ublk-server on n1",
        ),
        finding(Severity::Degraded, Some("n1-d1"), None, "n1-d1: 1 of 2 copies in sync: n1/d1 is stale", ""),
        finding(Severity::Note, None, Some("n2"), "node n2 has not adopted map v3 yet, it has v2", ""),
    ];
    let node = |name: &str, up: bool, adopted: u64, disks, report| NodeStatus {
        name: name.into(),
        up,
        process: Some(ProcessId(1)),
        adopted: MapVersion(adopted),
        disks,
        report,
    };
    let nodes = vec![node("n1", false, 1, Vec::new(), None), node("n2", true, 2, vec![disk], Some(report))];
    ClusterStatus { map: Some(map), nodes, findings }
}

/// n1 has come back, and n2 fills its copy of n1-d1.
fn rejoining() -> ClusterStatus {
    let mut status = failed_over();
    let map = status.map.take().unwrap();
    let device = map.devices[0].id;
    let run = Run { device, first: map.devices[0].spans[0].first, count: map.devices[0].slices };
    let (disk, state) = (map.disks[0].id, ReplicaState::Syncing);
    let incarnation = Some(Incarnation { attach: AttachId(1), process: ProcessId(9) });
    let map = map.apply(&[Verb::Mark { run, disk, state, incarnation }]).unwrap().unwrap();
    for (node, peer) in status.nodes.iter_mut().zip([NodeId(2), NodeId(1)]) {
        node.up = true;
        node.adopted = map.version;
        let report = node.report.get_or_insert_with(NodeReport::default);
        report.adopted = map.version;
        report.sessions =
            vec![SessionReport { peer, open: true, last_error: None, slow_ms: None, held_ms: None }];
    }
    let resync = ResyncReport {
        device,
        peer: NodeId(1),
        behind_bytes: 100 << 20,
        total_bytes: 448 << 20,
        moved_bytes: 3 << 20,
        bytes_per_second: 20 << 20,
        joining: true,
    };
    // What a deposed primary reported before it knew is not shown.
    for node in &mut status.nodes {
        node.report.as_mut().unwrap().resyncs = vec![resync.clone()];
    }
    let what = "n1-d1: 1 of 2 copies in sync: n1 catches up: 100 MiB of 448 MiB left, 20 MiB/s, about 5 s";
    status.findings = vec![Finding {
        severity: Severity::Degraded,
        device: Some("n1-d1".into()),
        node: Some("n1".into()),
        what: what.into(),
        todo: String::new(),
    }];
    ClusterStatus { map: Some(map), ..status }
}

/// n1 has died in the middle of a checksum: n2 went on with its device.
fn surveyed() -> BroadcastStatus {
    let row = |device: &str, node: &str, segment, slices, sum| BroadcastRow {
        device: device.into(),
        node: node.into(),
        segment,
        slices,
        bytes: slices << 26,
        sum: ContentSum(sum),
    };
    let unserved = Unserved {
        device: "n1-d1-unmirrored".into(),
        first: 0,
        count: 1,
        node: "n1".into(),
        why: "it is not connected".into(),
    };
    BroadcastStatus {
        id: 1,
        slices: 16,
        answered: 16,
        done: true,
        rows: vec![
            row("n1-d1", "n1", Segment::Primary, 2, 0x1234 << 96),
            row("n1-d1", "n2", Segment::Secondary, 5, 0x4321),
            row("n2-d1", "n2", Segment::Primary, 7, 7),
        ],
        unserved: vec![unserved],
    }
}

#[test]
fn what_the_risk_is() {
    let arguments = crate::cli::Cli::try_parse_from(["mirrorctl", "risk"]).unwrap().command;
    let crate::cli::Command::Risk(arguments) = arguments else { panic!("{arguments:?}") };
    let found = risk::of(&first_map(), &arguments, std::time::Duration::from_secs(60));
    check("risk.txt", &risk::text(&found));
    let mut together = first_map();
    together.nodes.iter_mut().for_each(|node| node.power = Some("feed-1".into()));
    assert!(risk::text(&risk::of(&together, &arguments, arguments.replace_after)).contains("warning: "));
}

#[test]
fn pictures_of_the_map() {
    let status = failed_over();
    let map = status.map.as_ref().unwrap();
    check("map.svg", &crate::picture::svg(map));
    check("map.dot", &crate::picture::dot(map));
}

#[test]
fn how_full_disks_are() {
    let status = failed_over();
    let disks = BalanceJson::of(status.map.as_ref().unwrap(), &status.nodes);
    check("balance.txt", &map::balance_text(&disks));
    check("balance.json", &output::to_json(&disks).unwrap());
}

#[test]
fn json() {
    let status = failed_over();
    let map = status.map.as_ref().unwrap();
    check("map.json", &output::to_json(&MapJson::of(map)).unwrap());
    check("status.json", &output::to_json(&StatusJson::of(&status)).unwrap());
    check("status-rejoining.json", &output::to_json(&StatusJson::of(&rejoining())).unwrap());
    check("devices.json", &output::to_json(&DeviceJson::of_status(&status)).unwrap());
    let checksum = BroadcastJson::new(BroadcastKind::Checksum, &surveyed());
    check("broadcast.json", &output::to_json(&checksum).unwrap());
    let none = ClusterStatus { map: None, nodes: Vec::new(), findings: Vec::new() };
    check("status-none.json", &output::to_json(&StatusJson::of(&none)).unwrap());
}

#[test]
fn tables() {
    let status = failed_over();
    check("map.txt", &map::text(status.map.as_ref().unwrap()));
    check("status.txt", &status::text(&status));
    check("status-rejoining.txt", &status::text(&rejoining()));
    check("checksum.txt", &broadcast::text(BroadcastKind::Checksum, &surveyed()));
    check("usage.txt", &broadcast::text(BroadcastKind::Usage, &surveyed()));
    check("devices.txt", &device::text(&DeviceJson::of_status(&status)));
}
