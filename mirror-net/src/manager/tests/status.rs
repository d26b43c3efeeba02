use super::bench::incarnation;
use super::{Bench, map_of};
use crate::control::{ExportReport, Finding, NodeMessage, NodeReport, ResyncReport, SessionReport, Severity};
use crate::ids::NodeId;

fn findings(bench: &Bench) -> Vec<Finding> {
    bench.manager.status(bench.now_ms).findings
}

/// The nodes report their exports as the map has them.
fn report(bench: &mut Bench, index: u64, open: bool) {
    let map = bench.map();
    let node = NodeId(index as u16);
    let exports = map
        .devices
        .iter()
        .filter(|device| device.claim.node == node)
        .map(|device| ExportReport {
            device: device.id,
            path: None,
            uri: None,
            error: None,
            in_use: None,
            requests: 0,
            pending: 0,
        })
        .collect();
    let peer = NodeId(3 - index as u16);
    let last_error = (!open).then(|| "connection refused".to_owned());
    let sessions = vec![SessionReport { peer, open, last_error, slow_ms: None, held_ms: None }];
    let report = NodeReport { adopted: map.version, sessions, exports, ..NodeReport::default() };
    bench.say(index, NodeMessage::Report(report));
}

#[test]
fn a_cluster_that_is_well_has_no_findings() {
    let mut bench = Bench::up(&map_of(2));
    report(&mut bench, 1, true);
    report(&mut bench, 2, true);
    assert_eq!(findings(&bench), []);
}

#[test]
fn a_lost_node_is_unavailable_until_failed_over_and_degraded_after() {
    let mut bench = Bench::up(&map_of(2));
    report(&mut bench, 1, true);
    report(&mut bench, 2, true);
    bench.disconnect(1);
    let found = findings(&bench);
    assert_eq!(found[0].severity, Severity::Unavailable);
    assert_eq!(found[0].what, "n1-d1: cannot be read or written: n1/d1 is not connected, n2/d1 is well");
    assert_eq!(found[0].todo, "mirrorctl node failover n1   (or start ublk-server on n1)");
    bench.failover("n1");
    bench.adopt(2);
    report(&mut bench, 2, false);
    let found = findings(&bench);
    let mirrored: Vec<&Finding> =
        found.iter().filter(|finding| finding.device.as_deref() == Some("n1-d1")).collect();
    assert_eq!(mirrored.len(), 1, "{found:?}");
    assert_eq!(mirrored[0].severity, Severity::Degraded);
    assert_eq!(mirrored[0].what, "n1-d1: 1 of 2 copies in sync: n1/d1 is stale");
    assert_eq!(mirrored[0].node.as_deref(), Some("n1"));
    assert_eq!(mirrored[0].todo, "start ublk-server on n1; its copies are resynced by themselves");
    assert!(
        !found.iter().any(|finding| finding.what.contains("session")),
        "n1 is down, that says it: {found:?}"
    );
}

#[test]
fn after_a_restart_of_the_manager_unknown_is_not_down() {
    let bench = Bench::new(Some(map_of(2)));
    let found = findings(&bench);
    assert!(found[0].what.contains("has not registered since the manager started"), "{found:?}");
    assert_eq!(found[0].todo, "start ublk-server on n1");
}

/// An event when it begins and one when it is over, and no word in between; the verdict stays as it is.
#[test]
fn a_slow_partner_is_told_of_once_and_makes_nothing_worse() {
    let mut bench = Bench::up(&map_of(2));
    report(&mut bench, 1, true);
    report(&mut bench, 2, true);
    let say = |bench: &mut Bench, slow_ms, held_ms| {
        let sessions =
            vec![SessionReport { peer: NodeId(2), open: true, last_error: None, slow_ms, held_ms }];
        let before = bench.manager.registry().get("n1").and_then(|node| node.report.clone()).unwrap();
        bench.log.clear();
        bench.say(1, NodeMessage::Report(NodeReport { sessions, ..before }));
        (std::mem::take(&mut bench.log), findings(bench))
    };
    let (events, found) = say(&mut bench, Some(3_400), None);
    assert_eq!(events, ["node n2 is slow: it owes n1 the answer to a write for 3.4 s"]);
    assert_eq!((found.len(), found[0].severity), (1, Severity::Note));
    assert_eq!(found[0].todo, "look at the disks of n2, and at the network to it");
    assert_eq!(say(&mut bench, Some(3_900), None).0, [""; 0]);
    let (events, found) = say(&mut bench, None, Some((8_000, 5)));
    let held = "node n1 leaves the copies of n2 out for 8.0 s: it was lost 5 times of late";
    assert_eq!(events, ["node n2 answers n1 in time again", held]);
    assert_eq!(found[0].what, "node n1 takes the copies of n2 back in 8.0 s: it was lost 5 times of late");
    assert_eq!(say(&mut bench, None, Some((7_500, 5))).0, [""; 0]);
}

#[test]
fn sessions_and_waiting_requests_are_told() {
    let mut bench = Bench::up(&map_of(2));
    report(&mut bench, 1, false);
    report(&mut bench, 2, true);
    let found = findings(&bench);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].what, "node n1 has no session with n2: connection refused");
    let waiting = vec!["n1-d1: 3 writes wait for n2".to_owned()];
    bench.say(1, NodeMessage::Report(NodeReport { waiting, ..NodeReport::default() }));
    assert!(
        findings(&bench).iter().any(|finding| finding.what == "node n1 waits: n1-d1: 3 writes wait for n2")
    );
}

/// What is said of a device.
fn about(bench: &Bench, device: &str) -> Vec<Finding> {
    findings(bench).into_iter().filter(|finding| finding.device.as_deref() == Some(device)).collect()
}

/// Both nodes report all is well, and `index` that it makes the copies of a device at `peer` equal.
fn report_resync(bench: &mut Bench, index: u64, device: &str, peer: u16, joining: bool) {
    report(bench, 1, true);
    report(bench, 2, true);
    let name = bench.connections.keys().nth(index as usize - 1).unwrap();
    let mut report = bench.manager.registry().get(name).unwrap().report.clone().unwrap();
    report.resyncs.push(ResyncReport {
        device: bench.map().device_named(device).unwrap().id,
        peer: NodeId(peer),
        behind_bytes: 5 << 28,
        total_bytes: 3 << 30,
        moved_bytes: 1 << 20,
        bytes_per_second: 64 << 20,
        joining,
    });
    bench.say(index, NodeMessage::Report(report));
}

#[test]
fn a_copy_that_comes_back_is_told_from_stale_to_in_sync() {
    let mut bench = Bench::up(&map_of(2));
    bench.failover_while_away(1);
    for index in 1..=2 {
        bench.adopt(index);
        report(&mut bench, index, true);
    }
    let found = about(&bench, "n1-d1");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Degraded);
    assert_eq!(found[0].what, "n1-d1: 1 of 2 copies in sync: n1/d1 is stale");
    assert_eq!(found[0].todo, "resync begins when its primary n2 reaches it");

    bench.ask_syncing(2, 1, None);
    report(&mut bench, 2, true);
    let found = about(&bench, "n1-d1");
    assert_eq!(found[0].what, "n1-d1: 1 of 2 copies in sync: n1/d1 is syncing", "nothing is reported yet");
    assert_eq!(found[0].todo, "");
    report_resync(&mut bench, 2, "n1-d1", 1, true);
    let found = about(&bench, "n1-d1");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Degraded);
    assert_eq!(
        found[0].what,
        "n1-d1: 1 of 2 copies in sync: n1 catches up: 1.2 GiB of 3 GiB left, 64 MiB/s, about 20 s"
    );
    assert_eq!((found[0].node.as_deref(), found[0].todo.as_str()), (Some("n1"), ""));

    bench.disconnect(1);
    let found = about(&bench, "n1-d1");
    assert_eq!(found[0].what, "n1-d1: 1 of 2 copies in sync: n1/d1 is syncing", "it does not catch up now");
    assert_eq!(found[0].todo, "start ublk-server on n1; its copies are resynced by themselves");

    bench.register(1, incarnation(1));
    bench.ask_in_sync(2, 1, "n1-d1", None);
    for index in 1..=2 {
        bench.adopt(index);
        report(&mut bench, index, true);
    }
    assert_eq!(findings(&bench), []);
}

#[test]
fn progress_is_believed_of_the_present_primary_only() {
    let mut bench = Bench::up(&map_of(2));
    bench.failover_while_away(1);
    bench.ask_syncing(2, 1, None);
    report_resync(&mut bench, 1, "n1-d1", 1, true);
    assert_eq!(about(&bench, "n1-d1")[0].what, "n1-d1: 1 of 2 copies in sync: n1/d1 is syncing");
}

#[test]
fn members_that_are_compared_are_a_note() {
    let mut bench = Bench::up(&map_of(2));
    report_resync(&mut bench, 1, "n1-d1", 2, false);
    let found = findings(&bench);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Note);
    assert_eq!(
        found[0].what,
        "n1-d1: n1 compares its copy with n2: 1.2 GiB of 3 GiB left, 64 MiB/s, about 20 s"
    );
}

#[test]
fn a_stale_copy_without_its_disk_waits_for_the_disk() {
    let mut bench = Bench::up(&map_of(2));
    bench.failover_while_away(1);
    let mut registration = bench.registration(1, incarnation(1));
    registration.disks.clear();
    bench.register_as(registration);
    let degraded = |bench: &Bench| {
        let found = about(bench, "n1-d1");
        found.into_iter().find(|finding| finding.severity == Severity::Degraded).unwrap()
    };
    assert_eq!(degraded(&bench).todo, "bring back the disk n1/d1; its copies are resynced by themselves");
    bench.register(1, incarnation(1));
    let disk = bench.map().disks[0].id;
    bench.say(1, NodeMessage::DiskFailed { disk, reason: "I/O error".into() });
    report(&mut bench, 2, true);
    assert!(degraded(&bench).todo.starts_with("keep its partners running: there is no spare"));
}

#[test]
fn nothing_is_known_before_a_cluster_was_created() {
    let mut bench = Bench::new(None);
    bench.register(1, incarnation(1));
    let status = bench.manager.status(bench.now_ms);
    assert_eq!(status.findings.len(), 1);
    assert_eq!(status.nodes[0].name, "n1");
}

#[test]
fn a_manager_that_lost_its_state_is_told_from_a_new_one() {
    let cluster = Bench::new(Some(map_of(2)));
    let registration = cluster.registration(1, incarnation(1));
    let mut bench = Bench::new(None);
    bench.register_as(registration);
    let found = findings(&bench);
    assert_eq!(found.len(), 1, "there is a cluster, even if this manager does not know it: {found:?}");
    assert!(found[0].what.starts_with("the disks of n1 belong to cluster 00000000"), "{found:?}");
    assert!(found[0].todo.contains("mirrorctl map rebuild --from-nodes"), "{found:?}");
}
