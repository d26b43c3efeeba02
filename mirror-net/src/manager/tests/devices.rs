//! Devices made, deleted, grown and set by an operator.

use super::bench::incarnation;
use super::redistribution::{ALL, roomy, spare};
use super::{Bench, map_of};
use crate::control::{DeviceChange, DeviceOrder, ExportReport, NodeMessage, NodeReport, OperatorReply};
use crate::format::alloc::Segment;
use crate::ids::DeviceId;
use crate::manager::{Input, Ticket};
use crate::map::{Commit, DistributionMap, OnNoQuorum, Topology};

const SLICE: u64 = 64 << 20;

impl Bench {
    pub(super) fn device_order(&mut self, name: &str, change: DeviceChange) -> Result<Vec<String>, String> {
        let order = DeviceOrder { name: name.into(), change, carry_out: true };
        self.input(Input::Device { ticket: Ticket(9), order });
        match self.replies.pop().unwrap().1 {
            OperatorReply::Done { lines } => Ok(lines),
            OperatorReply::Refused { reason } => Err(reason),
            reply => panic!("{reply:?}"),
        }
    }

    /// Its exporter tells that it exports it, and who uses it.
    fn exported(&mut self, name: &str, in_use: Option<&str>) {
        let device = device(self.map(), name);
        let export = ExportReport {
            device: device.id,
            path: Some("/dev/ublkb0".into()),
            uri: None,
            error: None,
            in_use: in_use.map(str::to_owned),
            requests: 1,
            pending: 0,
        };
        let exporter = u64::from(device.claim.node.0);
        let report = NodeReport { exports: vec![export], ..NodeReport::default() };
        self.say(exporter, NodeMessage::Report(report));
    }

    fn device_refused(&mut self, name: &str, change: DeviceChange) -> String {
        let version = self.map().version;
        let reason = self.device_order(name, change).unwrap_err();
        assert_eq!(self.map().version, version, "nothing changed");
        assert!(!reason.contains('\n'), "{reason}");
        reason
    }
}

fn create(node: &str, slices: u64, copies: u8) -> DeviceChange {
    DeviceChange::Create {
        bytes: slices * SLICE,
        node: node.into(),
        copies,
        commit: Commit::Immediate,
        on_no_quorum: OnNoQuorum::Wait,
    }
}

const DELETE: DeviceChange = DeviceChange::Delete { force: false };

fn grow(slices: u64) -> DeviceChange {
    DeviceChange::Grow { bytes: slices * SLICE }
}

fn set(commit: Option<Commit>) -> DeviceChange {
    DeviceChange::Set { commit, on_no_quorum: None }
}

fn device<'a>(map: &'a DistributionMap, name: &str) -> &'a crate::map::Device {
    map.device_named(name).unwrap()
}

#[test]
fn a_new_device_is_at_home_on_its_node_in_sync_and_exported_once_all_know_it() {
    let mut bench = Bench::up(&roomy());
    let lines = bench.device_order("db", create("n1", 6, 2)).unwrap();
    assert_eq!(lines[0], "db: 384 MiB, 2 copies, exported by n1");
    let (map, version) = (bench.map().clone(), bench.map().version);
    let db = device(&map, "db");
    assert_eq!((db.slices, db.claim.since, db.id.0), (6, version, map.devices.len() as u32));
    for span in &db.spans {
        assert_eq!((span.replicas[0].disk.0, span.replicas[0].segment), (1, Segment::Primary));
        assert!(span.replicas.iter().all(|copy| copy.added == version && copy.incarnation.process.0 > 100));
    }
    bench.all_have_their_copies();
    assert!(!bench.exports(1).contains(&"db".to_owned()));
    for node in ALL {
        bench.adopt(node);
    }
    assert!(bench.exports(1).contains(&"db".to_owned()));
}

#[test]
fn an_id_is_never_given_twice() {
    let mut bench = Bench::up(&roomy());
    bench.device_order("a", create("n1", 1, 2)).unwrap();
    let first = device(bench.map(), "a").id;
    bench.exported("a", None);
    assert_eq!(bench.device_order("a", DELETE).unwrap(), ["a and its 64 MiB are gone; the slots are free"]);
    bench.device_order("a", create("n1", 1, 2)).unwrap();
    assert_eq!(device(bench.map(), "a").id, DeviceId(first.0 + 1));
    bench.exported("a", None);
    bench.device_order("a", DELETE).unwrap();
    let read: DistributionMap = serde_json::from_str(&serde_json::to_string(bench.map()).unwrap()).unwrap();
    assert_eq!(read.next_device(), DeviceId(first.0 + 2));
}

#[test]
fn copies_keep_to_the_rules_and_to_the_topology() {
    let mut map = roomy();
    map.topology = Some(Topology::Pair);
    for disk in &mut map.disks {
        disk.slots.secondary = 40;
    }
    let mut bench = Bench::up(&map);
    bench.device_order("pair", create("n3", 6, 2)).unwrap();
    assert_eq!(bench.copies("pair"), "n3+ n4+");
    let reason = bench.device_refused("three", create("n3", 6, 3));
    assert!(reason.starts_with("a pair has two nodes"), "{reason}");
    map.topology = None;
    let mut bench = Bench::up(&map);
    bench.device_order("three", create("n3", 6, 3)).unwrap();
    bench.device_order("one", create("n3", 2, 1)).unwrap();
    assert_eq!(bench.span("one").replicas[0].segment, Segment::Unmirrored);
    bench.all_have_their_copies();
}

#[test]
fn a_device_grows_and_does_not_shrink() {
    let mut bench = Bench::up(&roomy());
    bench.device_order("db", create("n1", 2, 2)).unwrap();
    let lines = bench.device_order("db", grow(5)).unwrap();
    assert_eq!(lines[0], "db: 320 MiB instead of 128 MiB");
    assert_eq!(device(bench.map(), "db").slices, 5);
    bench.all_have_their_copies();
    let reason = bench.device_refused("db", grow(3));
    assert!(reason.starts_with("db has 320 MiB: it does not shrink"), "{reason}");
    assert_eq!(bench.device_order("db", grow(5)).unwrap(), ["db has 320 MiB already"]);
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let mut bench = Bench::up(&roomy());
    let reason = bench.device_refused("db", create("n1", 60, 2));
    assert_eq!(
        reason,
        "n1 has 16 free slots in primary or secondary segments of its disks that are in use, 60 are needed: 44 more; \
         choose another node, a smaller size, or add a disk"
    );
    assert!(bench.device_refused("n1-d1", create("n1", 1, 2)).contains("already"));
    assert!(bench.device_refused("a/b", create("n1", 1, 2)).contains("is no name of a device"));
    assert!(bench.device_refused("db", create("n9", 1, 2)).contains("there is no node"));
    assert!(bench.device_refused("db", create("n1", 0, 2)).contains("is no size"));
    assert!(
        bench.device_refused("db", DELETE).starts_with("there is no device \"db\"; the devices are n1-d1,")
    );
    // Only home has room.
    let mut full = map_of(4);
    full.disks[0].slots.primary += 4;
    let reason = Bench::up(&full).device_refused("db", create("n1", 2, 2));
    assert!(reason.starts_with("there is no place for 2 slices, the first of db"), "{reason}");

    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &[], true)).unwrap();
    let reason = bench.device_refused("n1-d1", DELETE);
    assert!(reason.contains("mirrorctl plan watch"), "{reason}");
    let reason = bench.device_refused("db", create("n3", 1, 2));
    assert!(reason.contains("mirrorctl plan watch"), "{reason}");
}

#[test]
fn a_device_in_use_is_deleted_by_force_only() {
    let mut bench = Bench::up(&roomy());
    bench.exported("n1-d1", Some("it is mounted on /srv"));
    let reason = bench.device_refused("n1-d1", DELETE);
    assert!(reason.starts_with("n1-d1 is in use: it is mounted on /srv on n1; end that first"), "{reason}");
    bench.device_order("n1-d1", DeviceChange::Delete { force: true }).unwrap();
    assert!(bench.map().device_named("n1-d1").is_none());
    bench.map().validate().unwrap();
}

#[test]
fn a_device_of_which_nobody_can_tell_is_deleted_by_force_only() {
    let mut bench = Bench::up(&roomy());
    let refused = |bench: &mut Bench, why: &str| {
        let reason = bench.device_refused("n1-d1", DELETE);
        let begin = format!("nobody can tell whether n1-d1 is in use: {why}; see `mirrorctl status`");
        assert!(reason.starts_with(&begin) && reason.contains("--force"), "{reason}");
    };
    // Its daemon was restarted, and has not taken up yet what was mounted before.
    bench.register(1, incarnation(1));
    refused(&mut bench, "its exporter n1 has not told yet");
    bench.heartbeat(1);
    refused(&mut bench, "n1 does not export it now");
    bench.exported("n1-d1", None);
    bench.disconnect(1);
    refused(&mut bench, "its exporter n1 is not connected");
    bench.device_order("n1-d1", DeviceChange::Delete { force: true }).unwrap();
    assert!(bench.map().device_named("n1-d1").is_none());
}

#[test]
fn from_deferred_to_immediate_commit_the_way_leads_over_everybodys_memory() {
    let mut map = roomy();
    map.devices[0].commit = Commit::Deferred;
    let mut bench = Bench::up(&map);
    let epoch = bench.span("n1-d1").epoch;
    bench.device_order("n1-d1", set(Some(Commit::Immediate))).unwrap();
    assert_eq!(device(bench.map(), "n1-d1").commit, Commit::Settling);
    let told = bench.manager.status(bench.now_ms).findings;
    assert!(
        told.iter().any(|finding| finding.what.starts_with("n1-d1 commits immediately once")),
        "{told:#?}"
    );
    assert!(bench.span("n1-d1").epoch > epoch, "nobody acknowledges under what held before");
    bench.adopt(1);
    bench.pass(100);
    assert_eq!(device(bench.map(), "n1-d1").commit, Commit::Settling);
    // Its mirror was restarted before it had stored what it held: it is compared on its process still.
    bench.disconnect(2);
    let other = crate::ids::Incarnation { process: crate::ids::ProcessId(999), ..incarnation(2) };
    bench.register(2, other);
    bench.adopt(2);
    bench.pass(100);
    assert_eq!(device(bench.map(), "n1-d1").commit, Commit::Settling);
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    bench.copy_once(&ALL);
    bench.copy_once(&ALL);
    bench.copy_once(&ALL);
    assert_eq!(device(bench.map(), "n1-d1").commit, Commit::Immediate);
    // And back, in one step; its mirror was restarted meanwhile, which did not matter.
    bench.disconnect(2);
    let third = crate::ids::Incarnation { process: crate::ids::ProcessId(1_000), ..incarnation(2) };
    bench.register(2, third);
    bench.device_order("n1-d1", set(Some(Commit::Deferred))).unwrap();
    assert_eq!(device(bench.map(), "n1-d1").commit, Commit::Deferred);
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation.process.0, 1_000);
    let told = bench.device_order("n1-d1", set(Some(Commit::Deferred))).unwrap();
    assert_eq!(told, ["n1-d1 is set like that already"]);
}
