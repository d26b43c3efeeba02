use super::bench::incarnation;
use super::rules::{rebooted, restarted};
use super::{Bench, map_of};
use crate::config::Policy;
use crate::control::{ManagerMessage, NodeMessage, OperatorReply, SILENCE_MS};
use crate::ids::MapVersion;
use crate::manager::{Input, Manager};

/// Two nodes; n2 was away, and n1 went on without it as the primary of n1-d1.
fn n2_is_back() -> Bench {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(2);
    bench.ask_stale(1, 2);
    bench.register(2, restarted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    bench
}

/// The same, with n2 being filled since map version 3 at the latest.
fn n2_is_syncing() -> Bench {
    let mut bench = n2_is_back();
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
    bench
}

fn maps_sent(bench: &Bench) -> usize {
    bench.sent.iter().filter(|(_, message)| matches!(message, ManagerMessage::Map { .. })).count()
}

#[test]
fn a_copy_comes_back_as_syncing_then_in_sync_under_its_present_incarnation() {
    let mut bench = n2_is_back();
    let before = bench.stored.len();
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation, restarted(2));
    assert_eq!(bench.span("n1-d1").epoch.0, bench.map().version.0);
    assert_eq!(
        bench.stored.last().unwrap().why,
        [
            "n1 asks to have n2's stale copies synced",
            "n1-d1: n2/d1 is syncing, n1 reaches it again",
            "n2-d1: n2/d1 is syncing, n1 reaches it again",
        ],
        "its own device went to n1 when it restarted"
    );
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation, restarted(2));
    assert_eq!(
        bench.stored.last().unwrap().why,
        ["n1 asks to have n2's copies of n1-d1 in sync", "n1-d1: n2/d1 is in sync"]
    );
    assert_eq!(bench.stored.len(), before + 2);
}

#[test]
fn a_question_that_is_asked_again_changes_nothing() {
    let mut bench = n2_is_syncing();
    let (stored, version) = (bench.stored.len(), bench.map().version);
    bench.ask_syncing(1, 2, None);
    bench.ask_syncing(1, 2, None);
    assert_eq!((bench.stored.len(), bench.map().version), (stored, version), "it is not begun over and over");
    bench.ask_in_sync(1, 2, "n1-d1", None);
    bench.sent.clear();
    bench.log.clear();
    for _ in 0..3 {
        bench.ask_in_sync(1, 2, "n1-d1", None);
        bench.ask_syncing(1, 2, None);
        bench.ask_syncing(1, 2, None);
    }
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    assert_eq!(maps_sent(&bench), 0, "it knows the newest map: sending that again tells it nothing");
    bench.ask_syncing(1, 2, Some(MapVersion(1)));
    assert_eq!(maps_sent(&bench), 1, "it acts on an old map");
}

#[test]
fn a_question_that_leads_to_nothing_is_logged_once() {
    let mut bench = n2_is_syncing();
    bench.log.clear();
    for _ in 0..5 {
        bench.ask_syncing(1, 2, None);
    }
    assert_eq!(
        bench.log,
        ["node n1 asks under map v4 to have n2's stale copies synced: there is nothing to do"]
    );
}

#[test]
fn nobody_but_the_present_primary_is_heard() {
    // n1 is mirrored by n2, n2 by n3, n3 by n1.
    let mut bench = Bench::up(&map_of(3));
    bench.ask_stale(1, 2);
    let version = bench.map().version;
    bench.ask_syncing(3, 2, None);
    bench.ask_syncing(2, 2, None);
    assert_eq!(bench.map().version, version);
    bench.ask_syncing(1, 2, None);
    let version = bench.map().version;
    bench.ask_in_sync(3, 2, "n1-d1", None);
    bench.ask_in_sync(2, 2, "n1-d1", None);
    bench.ask_in_sync(1, 3, "n1-d1", None);
    bench.ask_in_sync(1, 2, "n2-d1", None);
    assert_eq!(bench.map().version, version);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
}

#[test]
fn a_deposed_primary_is_not_heard() {
    let mut bench = Bench::up(&map_of(2));
    bench.failover_while_away(1);
    bench.ask_syncing(2, 1, None);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1~");
    // It believes itself primary still, or again, of what it asked for long ago.
    bench.ask_syncing(1, 2, Some(MapVersion(1)));
    bench.ask_in_sync(1, 2, "n1-d1", Some(MapVersion(1)));
    bench.ask_in_sync(1, 1, "n1-d1", None);
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1~");
}

#[test]
fn a_primary_of_another_incarnation_is_not_heard() {
    // n1 is alone in the map. It restarts, and its old connection's questions come late.
    let mut bench = n2_is_syncing();
    let (old, version) = (bench.connections["n1"], bench.map().version);
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-", "readmitted: what it was filling begins anew");
    let after = bench.map().version;
    let (peer, device) = (bench.map().nodes[1].id, bench.map().device_named("n1-d1").unwrap().id);
    for message in
        [NodeMessage::AskSyncing { peer, version }, NodeMessage::AskInSync { peer, device, version }]
    {
        bench.input(Input::Message { connection: old, message: message.clone() });
        // Nor if the new process says what the old one had in its queue.
        bench.say(1, message);
    }
    assert_eq!(bench.map().version, after);
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
}

#[test]
fn late_words_about_a_copy_that_left_since_do_not_bring_it_back() {
    // In sync is asked for; the session breaks, and n1 goes on alone; then the word arrives.
    let mut bench = n2_is_syncing();
    let asked = bench.map().version;
    bench.ask_stale(1, 2);
    bench.ask_in_sync(1, 2, "n1-d1", Some(asked));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    bench.ask_syncing(1, 2, None);
    bench.ask_in_sync(1, 2, "n1-d1", Some(asked));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~", "it was said of the copy as it was before it left");
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
}

#[test]
fn a_late_word_that_a_copy_is_lost_does_not_undo_its_return() {
    let mut bench = n2_is_syncing();
    let say_late = |bench: &mut Bench| {
        let peer = bench.map().nodes[1].id;
        let message = NodeMessage::AskStale { peer, version: MapVersion(1), cause: "no answer".into() };
        bench.say(1, message);
    };
    say_late(&mut bench);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
    bench.ask_in_sync(1, 2, "n1-d1", None);
    say_late(&mut bench);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
}

#[test]
fn a_copy_whose_machine_restarted_while_it_was_filled_begins_anew_and_one_whose_daemon_did_goes_on() {
    let mut bench = n2_is_syncing();
    let again = crate::ids::Incarnation { process: crate::ids::ProcessId(7), ..incarnation(2) };
    bench.register(2, again);
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+", "its disk has what it was filled with");
    let mut bench = n2_is_syncing();
    bench.register(2, rebooted(2));
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
    bench.ask_syncing(1, 2, None);
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation, rebooted(2));
}

#[test]
fn a_node_that_is_not_there_is_not_filled() {
    let mut bench = n2_is_back();
    let stored = bench.stored.len();
    bench.now_ms += SILENCE_MS + 1;
    bench.heartbeat(1);
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.stored.len(), stored, "it is silent");
    bench.disconnect(2);
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.stored.len(), stored, "it is not connected");
    // A manager that was restarted knows nothing of it, and begins with the same as soon as it does.
    bench.manager = Manager::new(Some(bench.map().clone()), Policy::MANUAL);
    bench.register(1, incarnation(1));
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.stored.len(), stored, "it has not registered");
    bench.register(2, rebooted(2));
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2~");
}

#[test]
fn a_copy_on_a_failed_disk_is_neither_filled_nor_counted() {
    let mut bench = n2_is_syncing();
    let disk = bench.map().disks[1].id;
    bench.say(2, NodeMessage::DiskFailed { disk, reason: "I/O error".into() });
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    bench.ask_in_sync(1, 2, "n1-d1", None);
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
}

#[test]
fn what_is_syncing_is_never_promoted() {
    let mut bench = n2_is_syncing();
    let reason = bench.refusal("n1");
    assert!(reason.contains("n1-d1: the copy on n2/d1 is not complete yet"), "{reason}");
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-", "it goes on alone, whatever was filled");
    assert_eq!(bench.span("n1-d1").loss.0, 1);
}

#[test]
fn a_syncing_copy_can_be_given_up_at_any_time() {
    let mut bench = n2_is_syncing();
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation, restarted(2));
}

#[test]
fn after_a_failover_the_old_primary_rejoins_and_takes_over_again_when_told() {
    let mut bench = Bench::up(&map_of(2));
    assert!(matches!(bench.failover_while_away(1), OperatorReply::FailedOver { .. }));
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n2+ n1-".into(), "n2+ n1+".into()));
    bench.ask_syncing(2, 1, None);
    bench.ask_in_sync(2, 1, "n1-d1", None);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1+");
    bench.pass(60);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1+", "nothing is failed back by itself");

    assert!(matches!(bench.failover_while_away(2), OperatorReply::FailedOver { .. }));
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n1+ n2-".into(), "n1+ n2-".into()));
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, bench.map().nodes[0].id);
    bench.ask_syncing(1, 2, None);
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n1+ n2~".into(), "n1+ n2~".into()));
    bench.ask_in_sync(1, 2, "n1-d1", None);
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n1+ n2+".into(), "n1+ n2~".into()));
    bench.ask_in_sync(1, 2, "n2-d1", None);
    assert_eq!(bench.copies("n2-d1"), "n1+ n2+");
}

#[test]
fn a_dead_primary_comes_back_as_a_copy_that_is_filled() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(1);
    bench.failover("n1");
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    bench.ask_syncing(2, 1, None);
    // n2-d1 has n1 as a member of before the power cut: its primary has to give it up first.
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n2+ n1~".into(), "n2+ n1+".into()));
    bench.ask_stale(2, 1);
    bench.ask_syncing(2, 1, None);
    bench.ask_in_sync(2, 1, "n1-d1", None);
    bench.ask_in_sync(2, 1, "n2-d1", None);
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n2+ n1+".into(), "n2+ n1+".into()));
    // Now the other one dies.
    bench.register(2, rebooted(2));
    assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n1+ n2-".into(), "n1+ n2-".into()));
    assert_eq!(bench.span("n1-d1").loss.0, 0);
}

#[test]
fn one_who_acts_on_a_map_that_the_manager_does_not_know_is_turned_away() {
    let mut bench = n2_is_back();
    let stored = bench.stored.len();
    bench.ask_syncing(1, 2, Some(MapVersion(99)));
    assert_eq!(bench.stored.len(), stored);
    assert_eq!(bench.closed.last(), Some(&bench.connections["n1"]));
    let status = bench.manager.status(bench.now_ms);
    assert!(status.findings[0].what.starts_with("node n1 works with map v99"), "{:?}", status.findings);
}
