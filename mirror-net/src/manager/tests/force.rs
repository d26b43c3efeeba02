use super::bench::incarnation;
use super::rules::{rebooted, restarted};
use super::{Bench, map_of};
use crate::control::{ForceOrder, OperatorReply};
use crate::format::alloc::Segment;
use crate::manager::{Input, Ticket};
use crate::map::ReplicaState;
use crate::map::verbs::Verb;

fn order(bench: &mut Bench, off: &[&str], carry_out: bool) -> OperatorReply {
    let order = ForceOrder {
        node: "n1".into(),
        devices: Vec::new(),
        confirmed_off: off.iter().map(|name| (*name).into()).collect(),
        carry_out,
    };
    bench.input(Input::Force { ticket: Ticket(7), order });
    bench.replies.pop().unwrap().1
}

fn refused(reply: &OperatorReply) -> &str {
    match reply {
        OperatorReply::Refused { reason } => reason,
        other => panic!("{other:?}"),
    }
}

/// n2 was alone and is away; n1 is there and behind.
fn behind() -> Bench {
    let mut bench = Bench::up(&map_of(2));
    bench.failover("n1");
    bench.disconnect(1);
    bench.ask_stale(2, 1);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    bench.disconnect(2);
    bench.pass(10_000);
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-", "it waits");
    bench
}

#[test]
fn a_stale_copy_goes_on_by_force_only_when_the_other_is_off_by_the_operators_word() {
    let mut bench = behind();
    let stored = bench.stored.len();
    let reply = order(&mut bench, &[], true);
    assert!(refused(&reply).contains("--confirmed-off n2"), "{reply:?}");
    let reply = order(&mut bench, &["n9"], true);
    assert!(refused(&reply).contains("there is no node \"n9\""), "{reply:?}");
    let OperatorReply::Done { lines } = order(&mut bench, &["n2"], false) else { panic!() };
    assert!(lines.iter().any(|line| line.starts_with("n1-d1: ") && line.contains("is lost")), "{lines:?}");
    assert_eq!(bench.stored.len(), stored, "nothing was asked for but what it would be");

    let loss = bench.span("n1-d1").loss;
    let OperatorReply::Done { lines: done } = order(&mut bench, &["n2"], true) else { panic!() };
    assert_eq!(done, lines);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.span("n1-d1").primary().incarnation, restarted(1));
    assert_eq!(bench.span("n1-d1").loss.0, loss.0 + 1);
    let node = bench.map().nodes[0].id;
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, node, "who exported it is gone");
    let why = &bench.stored.last().unwrap().why;
    assert_eq!(why[0], "forced onto n1 by the operator", "it is in the events");

    // Again: it is served now.
    let reply = order(&mut bench, &["n2"], true);
    assert!(refused(&reply).contains("nothing to force"), "{reply:?}");
    // Whoever was alone comes back as a copy that is to be filled.
    bench.register(2, rebooted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
}

#[test]
fn what_can_be_had_without_force_is_not_forced() {
    let mut bench = Bench::up(&map_of(2));
    let reply = order(&mut bench, &[], true);
    assert!(refused(&reply).contains("nothing to force"), "all is served: {reply:?}");
    let reply = order(&mut bench, &["n2"], true);
    assert!(refused(&reply).contains("n2 is not off"), "{reply:?}");
    // The primary is away and this member is whole: a failover loses nothing.
    bench.disconnect(2);
    bench.pass(10_000);
    bench.heartbeat(1);
    let reply = order(&mut bench, &["n2"], true);
    assert!(refused(&reply).contains("node failover n2"), "{reply:?}");
    assert_eq!(bench.copies("n2-d1"), "n2+ n1+");
    assert!(bench.stored.is_empty());
}

#[test]
fn of_members_that_all_lost_power_one_goes_on_by_force_when_the_other_is_gone() {
    let mut bench = Bench::up(&map_of(2));
    for node in [1, 2] {
        bench.disconnect(node);
    }
    bench.pass(10_000);
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+", "the other may have what this one lost");
    let OperatorReply::Done { lines } = order(&mut bench, &["n2"], true) else { panic!() };
    assert!(lines.iter().any(|line| line.contains("not flushed may be lost")), "{lines:?}");
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.copies("n2-d1"), "n1+ n2-");
    bench.register(2, incarnation(2));
    assert_eq!(bench.copies("n2-d1"), "n1+ n2-", "it comes back as what it is called now");
}

/// Of three copies one is gone for good, one lost power, and n3's is stale.
#[test]
fn a_member_that_is_there_goes_on_before_a_stale_copy() {
    let mut map = map_of(3);
    map.disks.iter_mut().for_each(|disk| disk.slots.secondary *= 2);
    let run = crate::manager::run_of(map.devices[0].id, &map.devices[0].spans[0]);
    let missing =
        map.disks.iter().map(|disk| disk.id).find(|disk| map.devices[0].spans[0].replica_on(*disk).is_none());
    let disk = missing.unwrap();
    let third = u64::from(map.node_of(disk).unwrap().0);
    let add = Verb::AddReplica { run, disk, segment: Segment::Secondary, incarnation: incarnation(third) };
    let stale = Verb::Mark { run, disk, state: ReplicaState::Stale, incarnation: None };
    map = map.apply(&[add]).unwrap().unwrap().apply(&[stale]).unwrap().unwrap();
    let holders: Vec<u64> = map.devices[0].spans[0]
        .replicas
        .iter()
        .map(|replica| u64::from(map.node_of(replica.disk).unwrap().0))
        .collect();
    let [gone, rebooted_one, behind] = holders[..] else { panic!("{holders:?}") };
    let mut bench = Bench::new(Some(map.clone()));
    bench.register(behind, incarnation(behind));
    bench.register(rebooted_one, rebooted(rebooted_one));
    let device = map.devices[0].name.clone();
    let order = ForceOrder {
        node: format!("n{behind}"),
        devices: vec![device],
        confirmed_off: vec![format!("n{gone}")],
        carry_out: true,
    };
    let stored = bench.stored.len();
    bench.input(Input::Force { ticket: Ticket(7), order });
    let reply = bench.replies.pop().unwrap().1;
    assert!(refused(&reply).contains(&format!("node force n{rebooted_one}` loses less")), "{reply:?}");
    assert_eq!(bench.stored.len(), stored);
}
