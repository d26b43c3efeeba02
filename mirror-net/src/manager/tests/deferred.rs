//! Secondaries that acknowledge from memory.

use super::bench::incarnation;
use super::rules::{rebooted, restarted};
use super::{Bench, map_of};
use crate::control::{Life, NodeMessage, OperatorReply};
use crate::ids::MapVersion;
use crate::map::{Commit, DistributionMap};

fn deferred() -> DistributionMap {
    let mut map = map_of(2);
    for device in map.devices.iter_mut().filter(|device| device.copies > 1) {
        device.commit = Commit::Deferred;
    }
    map
}

/// A node whose process is another; the one before had adopted that map.
fn restart(bench: &mut Bench, index: u64, adopted: u64) {
    let mut registration = bench.registration(index, restarted(index));
    registration.lives = vec![Life { process: incarnation(index).process, adopted: MapVersion(adopted) }];
    bench.register_as(registration);
}

#[test]
fn a_deferred_secondary_that_restarted_is_not_promoted() {
    let mut bench = Bench::up(&deferred());
    bench.disconnect(1);
    bench.register(2, restarted(2));
    let OperatorReply::Refused { reason } = bench.failover("n1") else { panic!("it was promoted") };
    assert!(
        reason.contains("ublk-server on n2 was restarted with acknowledged writes in its memory"),
        "{reason}"
    );
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-", "what n2 had in memory only, n1 has on its disk");
}

#[test]
fn of_deferred_members_that_all_restarted_the_primary_has_everything_once_it_adopted() {
    for (remembered, loss) in [(true, 0), (false, 1)] {
        let mut bench = Bench::new(Some(deferred()));
        restart(&mut bench, 2, 1);
        if remembered {
            restart(&mut bench, 1, 1);
        } else {
            bench.register(1, restarted(1));
        }
        assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
        assert_eq!(
            (bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0),
            (restarted(1), loss)
        );
    }
}

/// What it acknowledged as a primary it stored, whatever became of the other copies since.
#[test]
fn a_primary_that_ends_before_it_hears_that_another_copy_is_stale_has_everything() {
    let mut bench = Bench::up(&deferred());
    bench.disconnect(2);
    let peer = bench.map().nodes[1].id;
    let cause = String::new();
    bench.say(1, NodeMessage::AskStale { peer, version: MapVersion(1), cause });
    assert_eq!((bench.copies("n1-d1"), bench.map().version.0), ("n1+ n2-".to_owned(), 2));
    restart(&mut bench, 1, 1);
    assert_eq!((bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0), (restarted(1), 0));
}

/// But one that was promoted may not have.
#[test]
fn a_promoted_copy_that_ends_before_it_adopts_that_is_a_loss() {
    for (adopted, loss) in [(1, 1), (2, 0)] {
        let mut bench = Bench::up(&deferred());
        bench.disconnect(1);
        assert!(matches!(bench.failover("n1"), OperatorReply::FailedOver { .. }));
        assert_eq!((bench.copies("n1-d1"), bench.span("n1-d1").primary_since.0), ("n2+ n1-".to_owned(), 2));
        restart(&mut bench, 2, adopted);
        assert_eq!(
            (bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0),
            (restarted(2), loss)
        );
    }
}

#[test]
fn a_power_cut_of_the_primary_and_a_restart_of_a_deferred_secondary_are_a_loss() {
    let mut bench = Bench::up(&deferred());
    restart(&mut bench, 2, 1);
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.span("n1-d1").loss.0, 1);
}
