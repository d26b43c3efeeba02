//! The map from what the nodes have kept: the newest, and nothing that may be stale in it.

use super::bench::{Bench, incarnation, map_of};
use crate::config::ClusterFile;
use crate::control::{Life, ManagerMessage, NodeMessage, OperatorReply};
use crate::ids::SliceEpoch;
use crate::manager::{Input, Ticket};
use crate::map::{DistributionMap, ReplicaState};

fn file(nodes: usize) -> Box<ClusterFile> {
    let mut text = "[cluster]\nname = \"lab\"\nkey_file = \"/key\"\nmanager = \"10.0.0.9:7300\"\n".to_owned();
    for index in 1..=nodes {
        text += &format!(
            "[[node]]\nname = \"n{index}\"\naddress = \"10.0.0.{index}:7301\"\n[[node.disk]]\npath = \"/dev/sda\"\n"
        );
    }
    Box::new(ClusterFile::parse(&text, "c.toml").unwrap())
}

/// A manager without a map, and nodes that have kept these.
fn rebuild(
    kept: &[Option<DistributionMap>],
    without: &[&str],
    install: bool,
) -> (Bench, Result<Vec<String>, String>) {
    let mut bench = Bench::new(None);
    for (index, map) in (1u64..).zip(kept) {
        if map.is_some() || !without.contains(&format!("n{index}").as_str()) {
            bench.register(index, incarnation(index));
        }
    }
    let without = without.iter().map(|name| (*name).to_owned()).collect();
    bench.sent.clear();
    bench.input(Input::Rebuild { ticket: Ticket(5), file: file(kept.len()), without, install });
    for (connection, message) in std::mem::take(&mut bench.sent) {
        assert_eq!(message, ManagerMessage::TellMap);
        let name = bench.connections.iter().find(|(_, other)| **other == connection).unwrap().0;
        let index: usize = name[1..].parse().unwrap();
        let map = kept[index - 1].clone().map(Box::new);
        bench.input(Input::Message { connection, message: NodeMessage::KeptMap { map } });
    }
    let reply = match bench.replies.pop() {
        Some((Ticket(5), OperatorReply::Done { lines })) => Ok(lines),
        Some((Ticket(5), OperatorReply::Refused { reason })) => Err(reason),
        other => panic!("{other:?}"),
    };
    (bench, reply)
}

/// A later version, with a device's first copy alone.
fn alone(map: &DistributionMap, device: usize) -> DistributionMap {
    let mut next = map.clone();
    next.version.0 += 3;
    for span in &mut next.devices[device].spans {
        span.epoch = SliceEpoch(next.version.0);
        span.replicas[1].state = ReplicaState::Stale;
    }
    next
}

#[test]
fn the_newest_that_any_node_has_kept_is_installed_as_it_stands() {
    let old = map_of(2);
    let new = alone(&old, 0);
    let kept = [Some(new.clone()), Some(old)];
    let (bench, reply) = rebuild(&kept, &[], false);
    let lines = reply.unwrap();
    assert!(bench.manager.map().is_none() && bench.stored.is_empty(), "it was only to be shown");
    let (bench, reply) = rebuild(&kept, &[], true);
    assert_eq!(reply.unwrap(), lines);
    let map = bench.manager.map().unwrap();
    assert_eq!(*map, DistributionMap { version: map.version, ..new.clone() });
    assert!(map.version.0 > new.version.0 + 1000, "an old store that comes back is turned away by all");
    // All of them are sent it, and the manager goes on with it.
    let sent = bench.sent.iter().filter(|(_, message)| matches!(message, ManagerMessage::Map { .. }));
    assert_eq!(sent.count(), 2);
    // There is a map now.
    let mut bench = bench;
    bench.input(Input::Rebuild { ticket: Ticket(6), file: file(2), without: Vec::new(), install: true });
    let Some((_, OperatorReply::Refused { reason })) = bench.replies.pop() else { panic!() };
    assert!(reason.contains("the manager has a map"), "{reason}");
}

#[test]
fn without_a_node_nothing_that_it_may_have_left_behind_is_a_member() {
    let map = map_of(2);
    let kept = [None, Some(map.clone())];
    let reason = rebuild(&[Some(map.clone()), None], &[], true).1.unwrap_err();
    assert!(reason.contains("n2 is in the map and has kept none"), "{reason}");
    let (bench, reply) = rebuild(&kept, &["n1"], true);
    let lines = reply.unwrap();
    let rebuilt = bench.manager.map().unwrap();
    let n1 = rebuilt.node_named("n1").unwrap().id;
    for device in &rebuilt.devices {
        let had = map.device(device.id).unwrap();
        for (span, before) in device.spans.iter().zip(&had.spans) {
            let theirs = before.replicas.iter().any(|replica| map.node_of(replica.disk) == Some(n1));
            if !theirs {
                assert_eq!(span, before, "of this n1 has no copy");
                continue;
            }
            assert_eq!(rebuilt.node_of(span.primary().disk), Some(n1));
            assert_eq!(span.members().count(), 1);
            let named =
                lines.iter().any(|line| line.starts_with(&device.name) && line.ends_with("wait for n1/d1"));
            assert!(named, "{lines:?}");
        }
    }
    // Where it was stale, its partner goes on.
    let map = alone(&map_of(2), 0);
    let stale = map.node_of(map.devices[0].spans[0].replicas[1].disk).unwrap();
    let name = map.node_name(stale);
    let kept: Vec<_> = map.nodes.iter().map(|node| (node.id != stale).then(|| map.clone())).collect();
    let (bench, reply) = rebuild(&kept, &[&name], true);
    reply.unwrap();
    assert_eq!(bench.manager.map().unwrap().devices[0].spans, map.devices[0].spans);
}

/// What it held in memory when it was no primary yet nobody has stored.
#[test]
fn a_deferred_secondary_that_is_waited_for_and_was_restarted_is_a_loss() {
    let mut map = map_of(2);
    for device in map.devices.iter_mut().filter(|device| device.copies > 1) {
        device.commit = crate::map::Commit::Deferred;
    }
    let (mut bench, reply) = rebuild(&[Some(map.clone()), None], &["n2"], true);
    reply.unwrap();
    assert_eq!((bench.copies("n1-d1"), bench.span("n1-d1").loss.0), ("n2+ n1-".to_owned(), 0));
    let mut registration = bench.registration(2, super::rules::restarted(2));
    let before = Life { process: incarnation(2).process, adopted: map.version };
    registration.lives = vec![before];
    bench.register_as(registration);
    assert_eq!(bench.span("n1-d1").loss.0, 1);
}

#[test]
fn what_nobody_can_tell_is_refused() {
    let map = map_of(4);
    let some = || Some(map.clone());
    for (kept, without, expected) in [
        ([some(), some(), None, None], &["n3", "n4"][..], "more than one node is missing"),
        ([None, None, None, None], &[], "no node has kept a map"),
        ([some(), some(), some(), some()], &["n9"], "there is no node \"n9\" in the cluster file"),
    ] {
        let (bench, reply) = rebuild(&kept, without, true);
        let reason = reply.unwrap_err();
        assert!(reason.contains(expected), "{reason}");
        assert!(bench.manager.map().is_none());
    }
    let mut other = map.clone();
    other.cluster_name = "another".into();
    let reason = rebuild(&[some(), Some(other.clone()), some(), some()], &[], true).1.unwrap_err();
    assert!(reason.contains("have kept different maps of version"), "{reason}");
    other.cluster.0 = uuid::Uuid::from_u128(99);
    let reason = rebuild(&[some(), Some(other), some(), some()], &[], true).1.unwrap_err();
    assert!(reason.contains("do not belong together"), "{reason}");

    let mut bench = Bench::new(None);
    bench.register(1, incarnation(1));
    bench.input(Input::Rebuild { ticket: Ticket(5), file: file(2), without: Vec::new(), install: true });
    let Some((_, OperatorReply::Refused { reason })) = bench.replies.pop() else { panic!() };
    assert!(reason.starts_with("not connected: n2; a node that is missing may have a newer map"), "{reason}");
}
