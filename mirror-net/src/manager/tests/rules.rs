use super::bench::incarnation;
use super::{Bench, map_of};
use crate::control::{DiskContent, ManagerMessage, NodeMessage, OperatorReply, SILENCE_MS};
use crate::ids::{AttachId, ClusterId, DiskId, Incarnation, MapVersion, ProcessId};
use crate::manager::{ConnectionId, Input};

/// The node's process started anew, its disks stayed attached.
pub(super) fn restarted(index: u64) -> Incarnation {
    Incarnation { process: ProcessId(900 + index), ..incarnation(index) }
}

/// The node's machine lost power.
pub(super) fn rebooted(index: u64) -> Incarnation {
    Incarnation { attach: AttachId(800 + index), process: ProcessId(900 + index) }
}

fn refusal(bench: &Bench) -> &str {
    match bench.sent.last() {
        Some((_, ManagerMessage::Refused { reason })) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_registration_is_answered_with_a_larger_session_then_the_map_then_exports() {
    let map = map_of(2);
    let mut bench = Bench::new(Some(map));
    bench.register(2, incarnation(2));
    bench.sent.clear();
    let first = bench.register(1, incarnation(1));
    let sent: Vec<_> = bench.sent.iter().filter(|(to, _)| *to == first).map(|(_, message)| message).collect();
    let [ManagerMessage::Registered { exporter_session: one, .. }, ManagerMessage::Map { .. }, rest @ ..] =
        &sent[..]
    else {
        panic!("{sent:?}")
    };
    assert_eq!(rest.len(), 2, "its two devices");
    let one = *one;
    bench.sent.clear();
    bench.register(1, incarnation(1));
    assert_eq!(bench.closed, [first], "the newer connection replaces the older");
    let ManagerMessage::Registered { exporter_session, .. } = bench.sent[0].1 else { panic!() };
    assert!(exporter_session > one);
    assert_eq!(bench.exports(1), ["n1-d1", "n1-d1-unmirrored"], "said again to the new connection");
}

#[test]
fn what_an_older_connection_says_is_ignored() {
    let mut bench = Bench::up(&map_of(2));
    let old = bench.connections["n1"];
    bench.register(1, incarnation(1));
    let peer = bench.map().nodes[1].id;
    let message = NodeMessage::AskStale { peer, version: MapVersion(1), cause: String::new() };
    bench.input(Input::Message { connection: old, message });
    bench.input(Input::Disconnected { connection: old });
    assert!(bench.stored.is_empty());
    assert!(bench.manager.registry().is_up("n1", bench.now_ms));
}

#[test]
fn a_primary_has_its_partner_recorded_stale_in_one_batch() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(2);
    bench.sent.clear();
    bench.ask_stale(1, 2);
    assert_eq!(bench.stored.len(), 1);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.copies("n2-d1"), "n2+ n1+", "n1 is not the primary there");
    assert!(matches!(&bench.sent[0].1, ManagerMessage::Map { map } if map.version == MapVersion(2)));
    bench.ask_stale(1, 2);
    assert_eq!(bench.stored.len(), 1, "asked again, nothing changes");
}

#[test]
fn nobody_but_the_present_primary_is_granted_that() {
    let mut bench = Bench::up(&map_of(3));
    // n1 is mirrored by n2, n2 by n3, n3 by n1: n2 is not the primary of anything that n1 mirrors.
    bench.ask_stale(2, 1);
    assert!(bench.stored.is_empty());
    assert!(matches!(bench.sent.last(), Some((_, ManagerMessage::Map { .. }))), "it is sent the newest map");
    // A deposed primary asks for what it was promised under the old map.
    assert!(matches!(bench.failover_while_away(1), OperatorReply::FailedOver { .. }));
    let version = bench.map().version;
    bench.ask_stale(1, 2);
    assert_eq!(bench.map().version, version);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}

#[test]
fn a_primary_that_restarted_is_replaced_by_an_intact_member() {
    let mut bench = Bench::up(&map_of(2));
    let claim = bench.map().device_named("n1-d1").unwrap().claim;
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.copies("n2-d1"), "n2+ n1+", "a secondary's restart is the primary's business");
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim, claim, "it goes on exporting");
    // The unmirrored device has nobody else: it is readmitted with nothing lost.
    let span = bench.span("n1-d1-unmirrored");
    assert_eq!((span.primary().incarnation, span.loss.0), (restarted(1), 0));
    assert_eq!(bench.stored.len(), 1, "all in one batch");
}

/// Nodes 1 to 3, whose first mirrored device has a third copy on node 3.
fn three_copies() -> crate::map::DistributionMap {
    let mut map = map_of(3);
    let third = map.disks[2].id;
    map.disks[2].slots.secondary *= 4;
    let device = map.devices.iter_mut().find(|device| device.name == "n1-d1").unwrap();
    device.copies = 3;
    for span in &mut device.spans {
        let replica = crate::map::Replica { disk: third, incarnation: incarnation(3), ..span.replicas[1] };
        span.replicas.push(replica);
    }
    map.validate().unwrap();
    map
}

#[test]
fn a_promotion_keeps_the_members_that_are_there() {
    let mut bench = Bench::up(&three_copies());
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1- n3+");
    let mut bench = Bench::up(&three_copies());
    bench.disconnect(3);
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1- n3-", "nobody waits for one that is away");
    let mut bench = Bench::up(&three_copies());
    bench.disconnect(1);
    let OperatorReply::FailedOver { moved, .. } = bench.failover("n1") else { panic!() };
    assert_eq!(bench.copies("n1-d1"), "n2+ n1- n3+");
    assert!(moved[0].contains("n1/d1 -> n2/d1; stale until resynced: n1/d1"), "{moved:?}");
}

#[test]
fn the_exporter_waits_for_the_new_primary_to_know_its_claim() {
    let mut bench = Bench::up(&map_of(2));
    bench.failover("n1");
    assert_eq!(bench.exports(2), ["n2-d1", "n2-d1-unmirrored"], "not before n2 has adopted the claim");
    bench.adopt(2);
    assert_eq!(
        bench.exports(2),
        ["n2-d1", "n2-d1-unmirrored"],
        "what n1 takes for its exporter meanwhile would be there if it were promoted again"
    );
    bench.adopt(1);
    assert_eq!(bench.exports(2), ["n2-d1", "n2-d1-unmirrored", "n1-d1"]);
    bench.adopt(2);
    bench.pass(100);
    assert_eq!(bench.exports(2).len(), 3, "said once");
}

#[test]
fn the_exporter_does_not_wait_for_an_old_primary_that_is_away() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(1);
    bench.failover("n1");
    bench.adopt(2);
    assert_eq!(bench.exports(2), ["n2-d1", "n2-d1-unmirrored", "n1-d1"]);
    // One that goes away only then is soon recorded stale.
    let mut bench = Bench::up(&map_of(2));
    bench.failover("n1");
    bench.adopt(2);
    bench.disconnect(1);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1+");
    bench.ask_stale(2, 1);
    bench.adopt(2);
    assert_eq!(bench.exports(2), ["n2-d1", "n2-d1-unmirrored", "n1-d1"]);
}

#[test]
fn an_exporter_that_restarted_waits_for_its_primaries() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(2);
    bench.ask_stale(1, 2);
    // n2 is not here, and n1-d1 has its primary on n1: exported. n2-d1 is not n1's.
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-", "readmitted alone");
    assert_eq!(bench.exports(1), [""; 0], "not before it knows that it is primary in this incarnation");
    bench.adopt(1);
    assert_eq!(bench.exports(1), ["n1-d1", "n1-d1-unmirrored"]);
}

#[test]
fn a_power_cut_of_the_primary_before_anybody_noticed_does_not_serve_old_data() {
    let mut bench = Bench::up(&map_of(2));
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.span("n1-d1").loss.0, 0);
    bench.ask_stale(1, 2);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-", "the returned one cannot have the good copy given up");
}

#[test]
fn when_all_daemons_restarted_the_secondary_is_still_a_member_and_goes_first() {
    let mut bench = Bench::new(Some(map_of(2)));
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+", "n2 is not known yet");
    bench.register(2, restarted(2));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!((bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0), (restarted(2), 0));
    assert_eq!(bench.copies("n2-d1"), "n1+ n2-");
    assert_eq!(bench.span("n2-d1").primary().incarnation, restarted(1));
}

#[test]
fn a_secondary_that_restarted_on_its_disk_is_promoted_as_what_it_is_now() {
    let mut bench = Bench::up(&map_of(2));
    bench.register(2, restarted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+", "its disk has what it acknowledged");
    assert_eq!(bench.span("n1-d1").replicas[1].incarnation, incarnation(2));
    bench.disconnect(1);
    assert!(matches!(bench.failover("n1"), OperatorReply::FailedOver { .. }));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.span("n1-d1").primary().incarnation, restarted(2));
    let stored = bench.stored.len();
    bench.pass(100);
    assert_eq!(bench.stored.len(), stored, "it is what the map says: nothing is left to be repaired");
}

#[test]
fn a_power_cut_of_the_primary_and_a_restart_of_the_secondarys_daemon_lose_nothing() {
    let mut bench = Bench::up(&map_of(2));
    bench.register(2, restarted(2));
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!((bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0), (restarted(2), 0));
}

#[test]
fn a_primary_that_kept_its_caches_goes_on_when_its_secondary_lost_power() {
    let mut bench = Bench::new(Some(map_of(2)));
    bench.register(1, restarted(1));
    bench.register(2, rebooted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!((bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0), (restarted(1), 0));
}

#[test]
fn a_member_that_kept_its_caches_goes_before_a_primary_that_lost_power() {
    let mut bench = Bench::new(Some(map_of(2)));
    bench.register(1, rebooted(1));
    bench.register(2, restarted(2));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!((bench.span("n1-d1").primary().incarnation, bench.span("n1-d1").loss.0), (restarted(2), 0));
}

#[test]
fn a_common_power_cut_counts_a_loss() {
    let mut bench = Bench::new(Some(map_of(2)));
    bench.register(1, rebooted(1));
    bench.register(2, rebooted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.span("n1-d1").loss.0, 1);
    assert_eq!(bench.span("n1-d1-unmirrored").loss.0, 1);
}

#[test]
fn the_one_recorded_alone_is_waited_for() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(2);
    bench.ask_stale(1, 2);
    bench.disconnect(1);
    bench.register(2, restarted(2));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-", "n2 lacks writes");
    let reason = bench.refusal("n1");
    assert!(
        reason.contains(
            "n1-d1: the copy on n2/d1 is stale, it lacks writes that only n1/d1 has; bring n1 back"
        ),
        "{reason}"
    );
    bench.register(1, rebooted(1));
    assert_eq!(bench.copies("n1-d1"), "n1+ n2-");
    assert_eq!(bench.span("n1-d1").loss.0, 1, "it lost power alone");
}

#[test]
fn a_failed_disk_gives_its_roles_away_and_is_recorded() {
    let mut bench = Bench::up(&map_of(2));
    let disk = bench.map().disks[0].id;
    bench.say(1, NodeMessage::DiskFailed { disk, reason: "I/O error".into() });
    assert_eq!(bench.stored.len(), 1);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.copies("n2-d1"), "n2+ n1-");
    assert_eq!(bench.copies("n1-d1-unmirrored"), "n1+", "the last copy is never given up");
    assert_eq!(bench.map().disks[0].failed.as_ref().unwrap().reason, "I/O error");
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, bench.map().nodes[0].id);
    bench.say(1, NodeMessage::DiskFailed { disk, reason: "I/O error".into() });
    assert_eq!(bench.stored.len(), 1);
}

#[test]
fn a_failed_disk_whose_partner_is_away_waits_for_the_partner() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(2);
    let disk = bench.map().disks[0].id;
    bench.say(1, NodeMessage::DiskFailed { disk, reason: "dead".into() });
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
    bench.register(2, incarnation(2));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}

#[test]
fn a_disk_failure_is_believed_of_its_own_node_only() {
    let mut bench = Bench::up(&map_of(2));
    let disk = bench.map().disks[0].id;
    bench.say(2, NodeMessage::DiskFailed { disk, reason: "jealousy".into() });
    bench.say(2, NodeMessage::DiskFailed { disk: DiskId(99), reason: "jealousy".into() });
    assert!(bench.stored.is_empty());
}

#[test]
fn failover_moves_roles_and_claims_and_names_what_stays() {
    let mut bench = Bench::up(&map_of(2));
    bench.disconnect(1);
    let OperatorReply::FailedOver { version, moved, stayed } = bench.failover("n1") else { panic!() };
    assert_eq!(version, MapVersion(2));
    assert_eq!(
        moved,
        ["n1-d1: primary n1/d1 -> n2/d1; stale until resynced: n1/d1", "n1-d1: exporter n1 -> n2"]
    );
    assert_eq!(stayed, ["n1-d1-unmirrored: n1/d1 holds the only copy; bring n1 back"]);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.generation.0, 2);
    let reason = bench.refusal("n1");
    assert_eq!(
        reason,
        "nothing of node n1 can move: n1-d1-unmirrored: n1/d1 holds the only copy; bring n1 back"
    );
}

#[test]
fn failover_of_a_node_that_is_well_is_a_hand_over() {
    let mut bench = Bench::up(&map_of(2));
    let OperatorReply::FailedOver { moved, .. } = bench.failover("n1") else { panic!() };
    assert_eq!(moved, ["n1-d1: primary n1/d1 -> n2/d1", "n1-d1: exporter n1 -> n2"]);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1+");
}

#[test]
fn failover_refuses_with_a_sentence_for_each_case() {
    let mut bench = Bench::up(&map_of(2));
    assert_eq!(bench.refusal("n9"), "there is no node \"n9\"; the nodes are n1, n2");
    bench.disconnect(2);
    let reason = bench.refusal("n1");
    assert!(
        reason.contains("n1-d1: n2, which has the other copy, is not connected; start it first"),
        "{reason}"
    );
    bench.register(2, rebooted(2));
    let reason = bench.refusal("n1");
    assert!(
        reason.contains("n1-d1: n2/d1 was attached anew or n2 lost power, and only n1/d1 can tell"),
        "{reason}"
    );
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, bench.map().nodes[0].id);
    assert_eq!(bench.copies("n1-d1"), "n1+ n2+");
}

#[test]
fn the_claim_of_a_device_whose_primary_moved_before_follows_it() {
    let mut bench = Bench::up(&map_of(2));
    bench.register(1, restarted(1));
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
    bench.disconnect(1);
    let OperatorReply::FailedOver { moved, .. } = bench.failover("n1") else { panic!() };
    assert_eq!(moved, ["n1-d1: exporter n1 -> n2"]);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}

#[test]
fn a_claim_is_not_given_to_a_node_that_is_away() {
    let mut bench = Bench::up(&map_of(2));
    bench.register(1, restarted(1));
    bench.disconnect(2);
    let reason = bench.refusal("n1");
    assert!(reason.contains("its exporter cannot move: the primary n2/d1 does not work either"), "{reason}");
}

#[test]
fn a_silent_node_is_not_promoted() {
    let mut bench = Bench::up(&map_of(2));
    bench.now_ms += SILENCE_MS + 1;
    bench.heartbeat(1);
    assert!(bench.refusal("n1").contains("is not connected"));
    bench.heartbeat(2);
    assert!(matches!(bench.failover("n1"), OperatorReply::FailedOver { .. }));
}

#[test]
fn unknown_nodes_and_wrong_disks_are_turned_away_with_a_sentence() {
    let mut bench = Bench::new(Some(map_of(2)));
    let mut registration = bench.registration(1, incarnation(1));
    registration.node = "n7".into();
    bench.register_as(registration);
    let told = refusal(&bench);
    assert!(told.contains("is n1/d1, and no disk of n7 is there: check --node"), "{told}");

    let mut registration = bench.registration(1, incarnation(1));
    let foreign = ClusterId(uuid::Uuid::from_u128(7));
    registration.disks[0].content = DiskContent::Ours { cluster: foreign, disk: DiskId(1) };
    bench.register_as(registration);
    assert!(
        refusal(&bench).contains("disk d1 (/dev/sda) belongs to cluster 00000000"),
        "{}",
        refusal(&bench)
    );

    let mut registration = bench.registration(2, incarnation(1));
    registration.node = "n1".into();
    bench.register_as(registration);
    assert!(refusal(&bench).contains("disk d1 (/dev/sda) is n2/d1"), "{}", refusal(&bench));

    let registration = bench.registration(1, incarnation(1));
    let connection = ConnectionId(99);
    bench.input(Input::Register { connection, cluster: Some(foreign), registration });
    assert!(refusal(&bench).starts_with("node n1 belongs to cluster 00000000"), "{}", refusal(&bench));
    assert!(bench.manager.registry().get("n1").is_none());
}

#[test]
fn a_second_daemon_of_a_node_does_not_push_out_the_first() {
    let mut bench = Bench::up(&map_of(2));
    let mut registration = bench.registration(1, restarted(1));
    registration.disks[0].content = DiskContent::Unusable { why: "in use by another process".into() };
    bench.register_as(registration.clone());
    assert!(refusal(&bench).contains("a second ublk-server"), "{}", refusal(&bench));
    assert_eq!(bench.manager.registry().get("n1").unwrap().process, ProcessId(101));
    // With the first one gone it is a node that lost its disk, and may export and forward.
    bench.pass(SILENCE_MS + 1);
    bench.heartbeat(2);
    bench.register_as(registration);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}

#[test]
fn two_disks_with_the_same_id_are_none() {
    let mut bench = Bench::up(&map_of(2));
    let mut registration = bench.registration(1, incarnation(1));
    let mut copy = registration.disks[0].clone();
    copy.name = "d2".into();
    registration.disks.push(copy);
    bench.register_as(registration);
    assert_eq!(bench.copies("n1-d1"), "n2+ n1-");
}

#[test]
fn nothing_is_sent_before_it_is_stored() {
    use crate::manager::Output;
    let mut bench = Bench::up(&map_of(2));
    let connection = bench.connections["n1"];
    let peer = bench.map().nodes[1].id;
    let ask = NodeMessage::AskStale { peer, version: MapVersion(1), cause: String::new() };
    bench.manager.handle(bench.now_ms, Input::Message { connection, message: ask });
    let Some(Output::Store(proposal)) = bench.manager.poll() else { panic!() };
    assert_eq!(proposal.base, Some(MapVersion(1)));
    assert_eq!(bench.manager.poll(), None);
    assert_eq!(bench.map().version, MapVersion(1));
    bench.manager.handle(bench.now_ms, Input::Stored { version: MapVersion(2) });
    assert!(matches!(bench.manager.poll(), Some(Output::Send { message: ManagerMessage::Map { .. }, .. })));
}

#[test]
fn another_managers_map_is_taken_over_and_decided_upon_anew() {
    use crate::manager::{Output, Ticket};
    let mut bench = Bench::up(&map_of(2));
    let mut other = bench.map().clone();
    other.version = MapVersion(5);
    bench.manager.handle(bench.now_ms, Input::Failover { ticket: Ticket(3), node: "n1".into() });
    let Some(Output::Store(_)) = bench.manager.poll() else { panic!() };
    bench.input(Input::Conflict { newest: Some(Box::new(other)) });
    assert!(matches!(bench.replies.pop(), Some((Ticket(3), OperatorReply::Refused { .. }))));
    assert_eq!(bench.map().version, MapVersion(5));
    bench.failover("n1");
    assert_eq!(bench.map().version, MapVersion(6));
}

#[test]
fn a_node_that_knows_more_than_the_manager_goes_on_without_it() {
    let mut bench = Bench::up(&map_of(2));
    let mut registration = bench.registration(1, restarted(1));
    registration.adopted = MapVersion(9);
    bench.sent.clear();
    let connection = bench.register_as(registration);
    assert_eq!(bench.sent, [], "it is not told to stop");
    assert_eq!(bench.closed, [connection]);
    let status = bench.manager.status(bench.now_ms);
    assert!(status.findings[0].what.starts_with("node n1 works with map v9, the manager's newest is v1"));
    // It says so later, having registered before its map was read.
    bench.say(2, NodeMessage::Adopted { version: MapVersion(9) });
    assert!(!bench.manager.registry().is_up("n2", bench.now_ms));
    assert!(bench.stored.is_empty());
    bench.register(1, incarnation(1));
    bench.register(2, incarnation(2));
    let status = bench.manager.status(bench.now_ms);
    assert!(!status.findings.iter().any(|finding| finding.what.contains("works with map")), "{status:?}");
}

#[test]
fn what_was_adopted_counts_for_a_node_that_names_its_cluster_by_its_disks_only() {
    let mut bench = Bench::new(Some(map_of(2)));
    let registration = bench.registration(1, incarnation(1));
    bench.input(Input::Register { connection: ConnectionId(50), cluster: None, registration });
    assert_eq!(bench.manager.registry().get("n1").unwrap().adopted, MapVersion(1));
}
