//! The store in an etcd: who may write, what survives, and what is refused.

mod common;

use common::{random, runtime};
use ctl::manager::store::{Candidate, EtcdStore, Seat, Store, StoreError, Swapped, Tenure};
use mirror_net::config::EtcdFile;
use mirror_net::control::{Event, EventKind};
use mirror_net::ids::{AttachId, ClusterId, Incarnation, MapVersion, ProcessId, SliceEpoch, SliceIndex};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
use mirror_net::map::{DistributionMap, SegmentSlots, Span};
use mirror_net::wire::handshake::ClusterKey;
use mirror_tests::etcd::Etcd;
use std::time::Duration;

const LEADER_KEY: &str = "/ublk-mirror/lab/leader";

fn file(etcd: &Etcd) -> EtcdFile {
    let prefix = "/ublk-mirror/lab/".into();
    EtcdFile { endpoints: etcd.endpoints(), prefix, user: None, tls: None }
}

fn candidate(etcd: &Etcd, name: &str, key: u8, address: &str) -> Candidate {
    Candidate::new(&file(etcd), name, &ClusterKey::new([key; 32]), address, ProcessId(random()))
}

/// Looks until it leads.
async fn elected(candidate: &mut Candidate) -> (Box<EtcdStore>, Tenure) {
    for _ in 0..300 {
        match candidate.look().await {
            Ok(Seat::Ours(store, tenure)) => return (store, tenure),
            Ok(Seat::Theirs(_) | Seat::Empty) => {}
            Err(error @ StoreError::OtherCluster { .. }) => panic!("{error}"),
            Err(error) => println!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("it is not elected");
}

/// A map of two nodes with that many slices in a device, each a span of its own.
fn map(version: u64, slices: u32) -> DistributionMap {
    let slots = SegmentSlots { primary: slices, secondary: slices, unmirrored: 1 };
    let node = |index: u64| NodeSpec {
        name: format!("n{index}"),
        address: format!("10.0.0.{index}:7301"),
        power: None,
        switch: None,
        disks: vec![DiskSpec {
            name: "d1".into(),
            slots,
            block_bytes: 512,
            incarnation: Incarnation { attach: AttachId(index), process: ProcessId(index) },
        }],
        spare: false,
        devices: Default::default(),
    };
    let mut map = pairs(ClusterId::default(), "lab", 1 << 20, &[node(1), node(2)]).unwrap();
    map.version = MapVersion(version);
    for device in &mut map.devices {
        let whole = device.spans[0].clone();
        let one = |slice: u32| Span {
            first: SliceIndex(slice),
            count: 1,
            epoch: SliceEpoch(if slice.is_multiple_of(2) { 1 } else { version }),
            ..whole.clone()
        };
        device.spans = (0..device.slices).map(one).collect();
    }
    map
}

async fn swap(store: &mut EtcdStore, base: Option<u64>, next: &DistributionMap) -> Swapped {
    store.swap(base.map(MapVersion), next, &["because".into()], &[]).await.unwrap()
}

/// Stores the next map, and tidies up. A busy machine may let a lease run out: then it is elected anew, and goes on from
/// what is stored.
async fn stored(
    candidate: &mut Candidate,
    mut seat: (Box<EtcdStore>, Tenure),
    next: &DistributionMap,
) -> (Box<EtcdStore>, Tenure) {
    while seat.0.map().await.unwrap().is_some_and(|map| map.version < next.version) {
        let base = Some(MapVersion(next.version.0 - 1));
        match seat.0.swap(base, next, &["because".into()], &[]).await {
            Ok(swapped) => assert!(matches!(swapped, Swapped::Stored { .. })),
            Err(StoreError::Deposed(_)) => {
                drop(seat);
                seat = elected(candidate).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
    seat.0.tidy().await;
    seat
}

#[test]
fn a_leader_that_was_deposed_without_knowing_stores_nothing() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let (mut first, mut second) = (candidate(&etcd, "lab", 1, "a:1"), candidate(&etcd, "lab", 1, "b:1"));
        let (mut old, old_tenure) = elected(&mut first).await;
        assert!(matches!(second.look().await, Ok(Seat::Theirs(address)) if address == "a:1"));
        assert_eq!(old.map().await.unwrap(), None);
        assert!(matches!(swap(&mut old, None, &map(1, 3)).await, Swapped::Stored { .. }));
        let session = old.exporter_session().await.unwrap();

        // What its lease's end does; it has not noticed.
        etcd.client().await.delete(LEADER_KEY, None).await.unwrap();
        let (mut new, _tenure) = elected(&mut second).await;
        assert_eq!(new.map().await.unwrap(), Some(map(1, 3)));
        assert!(old_tenure.holds(), "it believes that it leads");
        let refused = old.swap(Some(MapVersion(1)), &map(2, 3), &[], &[]).await;
        assert!(matches!(refused, Err(StoreError::Deposed(_))), "{refused:?}");
        let refused = old.exporter_session().await;
        assert!(matches!(refused, Err(StoreError::Deposed(_))), "{refused:?}");

        assert!(matches!(swap(&mut new, Some(1), &map(2, 3)).await, Swapped::Stored { .. }));
        assert!(new.exporter_session().await.unwrap() > session);
        let conflict = swap(&mut new, Some(1), &map(2, 3)).await;
        assert!(matches!(conflict, Swapped::Conflict(Some(newest)) if *newest == map(2, 3)));
        // Under its old address but with a new lease it may lead again, and finds what is there.
        drop((new, _tenure));
        let (mut again, _tenure) = elected(&mut first).await;
        assert_eq!(again.map().await.unwrap(), Some(map(2, 3)));
    });
}

fn event(number: u64) -> Event {
    let (at, map) = ("2026-01-01T00:00:00.000Z".into(), None);
    Event { number, at, kind: EventKind::Node, map, text: format!("event {number}") }
}

fn numbers(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.number).collect()
}

#[test]
fn events_go_from_leader_to_leader_and_a_deposed_one_adds_none() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let (mut first, mut second) = (candidate(&etcd, "lab", 1, "a:1"), candidate(&etcd, "lab", 1, "b:1"));
        let (mut old, _old_tenure) = elected(&mut first).await;
        assert_eq!(old.events().await.unwrap(), []);
        assert_eq!(old.keep_events(&[event(1)]).await.unwrap(), 1);
        // An answer was lost: the same again changes nothing.
        assert_eq!(old.keep_events(&[event(1), event(2)]).await.unwrap(), 2);
        // With a map, and not without it.
        let (map, because) = (map(1, 3), ["because".into()]);
        let stored = old.swap(None, &map, &because, &[event(3)]).await.unwrap();
        assert!(matches!(stored, Swapped::Stored { events: 1 }), "{stored:?}");
        let conflict = old.swap(None, &map, &because, &[event(4)]).await.unwrap();
        assert!(matches!(conflict, Swapped::Conflict(_)), "{conflict:?}");

        etcd.client().await.delete(LEADER_KEY, None).await.unwrap();
        let (mut new, _tenure) = elected(&mut second).await;
        let refused = old.keep_events(&[event(4)]).await;
        assert!(matches!(refused, Err(StoreError::Deposed(_))), "{refused:?}");
        assert_eq!(new.events().await.unwrap(), [event(1), event(2), event(3)]);
        // One that nobody can read is left out; nothing is decided by it.
        etcd.client().await.put("/ublk-mirror/lab/event/000000000002", "{", None).await.unwrap();
        assert_eq!(numbers(&new.events().await.unwrap()), [1, 3]);
    });
}

#[test]
fn the_last_two_thousand_events_are_kept() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let mut first = candidate(&etcd, "lab", 1, "a:1");
        let (mut store, mut tenure) = elected(&mut first).await;
        let all: Vec<Event> = (1..=2345).map(event).collect();
        let mut left = &all[..];
        while !left.is_empty() {
            // A busy machine may let a lease run out.
            match store.keep_events(left).await {
                Ok(count) => left = &left[count..],
                Err(StoreError::Deposed(_)) => {
                    drop((store, tenure));
                    (store, tenure) = elected(&mut first).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        drop((store, tenure));
        let (mut store, _tenure) = elected(&mut candidate(&etcd, "lab", 1, "b:1")).await;
        assert_eq!(store.events().await.unwrap(), all[345..]);
    });
}

#[test]
fn a_large_map_and_a_long_history_are_kept() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let mut first = candidate(&etcd, "lab", 1, "a:1");
        let mut seat = elected(&mut first).await;
        // Some four megabytes, in spans of every slice.
        let mut newest = map(1, 5000);
        assert!(matches!(swap(&mut seat.0, None, &newest).await, Swapped::Stored { .. }));
        for version in 2..=105u64 {
            newest.version = MapVersion(version);
            newest.devices[0].spans[1].epoch = SliceEpoch(version);
            if version > 3 {
                newest.devices[0].spans.truncate(3);
                newest.devices[0].slices = 3;
            }
            seat = stored(&mut first, seat, &newest).await;
        }
        drop(seat);
        let (mut store, _tenure) = elected(&mut candidate(&etcd, "lab", 1, "b:1")).await;
        assert_eq!(store.map().await.unwrap(), Some(newest));
        let mut client = etcd.client().await;
        let mut keys = async |part: &str| {
            let options = Some(etcd_client::GetOptions::new().with_prefix().with_keys_only());
            let answer = client.get(format!("/ublk-mirror/lab/{part}"), options).await.unwrap();
            answer.kvs().iter().map(|kv| kv.key_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let bases = keys("base@").await;
        assert_eq!((bases.len(), bases[0].as_str()), (100, "/ublk-mirror/lab/base@000000000006/0000"));
        // One for each map that is kept; of the long ones nothing is left.
        assert_eq!(keys("device/00000001@").await.len(), 100);
        let other = keys("device/00000003@").await;
        assert!(!other.is_empty() && other.iter().all(|key| key.contains("@000000000001/")), "{other:?}");
    });
}

/// Spans that did not change are shared by all maps, also by one whose own part cannot be read any more.
#[test]
fn nothing_that_an_unreadable_map_may_share_is_removed_with_the_oldest() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let mut first = candidate(&etcd, "lab", 1, "a:1");
        let mut seat = elected(&mut first).await;
        let mut newest = map(1, 3);
        assert!(matches!(swap(&mut seat.0, None, &newest).await, Swapped::Stored { .. }));
        for version in 2..=103u64 {
            newest.version = MapVersion(version);
            newest.devices[0].spans[1].epoch = SliceEpoch(version);
            seat = stored(&mut first, seat, &newest).await;
            if version == 3 {
                let key = "/ublk-mirror/lab/base@000000000002/0000";
                etcd.client().await.put(key, "no map", None).await.unwrap();
            }
        }
        drop(seat);
        let (mut store, _tenure) = elected(&mut candidate(&etcd, "lab", 1, "b:1")).await;
        assert_eq!(store.map().await.unwrap(), Some(newest));
    });
}

#[test]
fn what_a_leader_left_half_written_is_removed() {
    let etcd = Etcd::start(1);
    runtime().block_on(async {
        let (mut store, tenure) = elected(&mut candidate(&etcd, "lab", 1, "a:1")).await;
        assert!(matches!(swap(&mut store, None, &map(1, 3)).await, Swapped::Stored { .. }));
        drop((store, tenure));
        let mut client = etcd.client().await;
        for key in ["base@000000000002/0000", "device/00000001@000000000002/0000"] {
            client.put(format!("/ublk-mirror/lab/{key}"), "half a ma", None).await.unwrap();
        }
        let (mut store, _tenure) = elected(&mut candidate(&etcd, "lab", 1, "b:1")).await;
        assert_eq!(store.map().await.unwrap(), Some(map(1, 3)));
        let left = client.get("/ublk-mirror/lab/base@000000000002/0000", None).await.unwrap();
        assert!(left.kvs().is_empty());
        client.put("/ublk-mirror/lab/device/00000001@000000000001/0000", "[]", None).await.unwrap();
        let error = store.map().await.unwrap_err().to_string();
        assert!(error.contains("the checksum of the spans of device n1-d1 does not match"), "{error}");
    });
}

#[test]
fn the_etcd_of_another_cluster_is_refused_and_left_as_it_is() {
    let (etcd, other) = (Etcd::start(1), Etcd::start(1));
    runtime().block_on(async {
        let (store, tenure) = elected(&mut candidate(&etcd, "lab", 1, "a:1")).await;
        drop((store, tenure));
        let mut client = etcd.client().await;
        let options = || Some(etcd_client::GetOptions::new().with_prefix());
        let identity = client.get("/ublk-mirror/lab/identity", options()).await.unwrap().kvs()[0].clone();
        for (name, key, expected) in [
            ("lab", 2, "another cluster of the same name, with another key, keeps its map there"),
            ("farm", 1, "cluster lab keeps its map there under /ublk-mirror/lab/"),
        ] {
            let Err(error) = candidate(&etcd, name, key, "b:1").look().await else { panic!("{name}") };
            assert!(matches!(error, StoreError::OtherCluster { .. }));
            assert!(error.to_string().contains(expected), "{error}");
        }
        let same = client.get("/ublk-mirror/lab/identity", options()).await.unwrap().kvs()[0].clone();
        assert_eq!(identity.mod_revision(), same.mod_revision());
        // Two etcds in one list would be two truths.
        let mut mixed = file(&etcd);
        mixed.endpoints.extend(other.endpoints());
        let key = ClusterKey::new([1; 32]);
        let mut mixed = Candidate::new(&mixed, "lab", &key, "c:1", ProcessId(random()));
        let Err(error) = mixed.look().await else { panic!("mixed") };
        assert!(error.to_string().contains("belong to different etcds"), "{error}");
    });
}
