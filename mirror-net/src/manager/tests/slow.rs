use super::{Bench, map_of};
use crate::control::NodeMessage;
use crate::ids::{MapVersion, NodeId};

fn ask_slow(bench: &mut Bench, asker: u64, peer: u16, version: MapVersion) {
    let cause = "it has not answered a write for 30 s".into();
    bench.say(asker, NodeMessage::AskSlow { peer: NodeId(peer), version, cause });
}

/// Its own data goes on from the partner's copies, and is exported where it was: there it is mounted.
#[test]
fn a_node_whose_disks_hang_is_gone_on_without_in_both_roles() {
    let mut bench = Bench::up(&map_of(2));
    let version = bench.map().version;
    ask_slow(&mut bench, 2, 1, version);
    assert_eq!(bench.copies("n2-d1"), "n2+ n1-");
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    let exporter = |bench: &Bench, name: &str| {
        bench.map().devices.iter().find(|device| device.name == name).map(|device| device.claim.node)
    };
    assert_eq!(exporter(&bench, "n1-d1"), Some(NodeId(1)));
    // What it asks for itself, as the primary that it was, comes too late.
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.stored.len(), 1);
}

#[test]
fn of_two_that_accuse_each_other_the_first_is_believed() {
    let mut bench = Bench::up(&map_of(2));
    let version = bench.map().version;
    ask_slow(&mut bench, 1, 2, version);
    ask_slow(&mut bench, 2, 1, version);
    assert_eq!((&*bench.copies("n1-d1"), &*bench.copies("n2-d1")), ("n1+ n2-", "n1+ n2-"));
}

#[test]
fn a_copy_that_is_not_in_sync_never_goes_first() {
    let mut bench = Bench::up(&map_of(2));
    bench.ask_stale(1, 2);
    let version = bench.map().version;
    ask_slow(&mut bench, 2, 1, version);
    assert_eq!((&*bench.copies("n1-d1"), &*bench.copies("n2-d1")), ("n1+ n2-", "n2+ n1-"));
}

/// Its copies are stale already, so it may only be a matter of what it is primary of; but not by a question that comes late.
#[test]
fn what_it_is_primary_of_moves_though_its_copies_are_stale() {
    let mut bench = Bench::up(&map_of(2));
    let old = bench.map().version;
    bench.ask_stale(2, 1);
    assert_eq!((&*bench.copies("n1-d1"), &*bench.copies("n2-d1")), ("n1+ n2+", "n2+ n1-"));
    ask_slow(&mut bench, 2, 1, old);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    let version = bench.map().version;
    ask_slow(&mut bench, 2, 1, version);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}
