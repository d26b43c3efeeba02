//! How copies that lag behind are filled, cleared and told, seen from outside.

use super::*;
use crate::map::OnNoQuorum;
use crate::map::verbs::Verb;

/// Rule 1: nobody waits for a copy that is being filled and cannot be reached; what it misses is sent
/// when it is back.
#[test]
fn a_syncing_copy_without_a_session_is_left_out_and_caught_up() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
    rig.lane_down(2);
    let token = rig.write(0, 4096);
    assert_eq!(rig.result(token), Some(Ok(())));
    assert!(rig.reports.is_empty(), "{:?}", rig.reports);
    rig.take(Kind::Write);
    rig.open(2, MapVersion(2));
    assert_eq!(rig.take(Kind::Write).len(), 1, "what it missed");
    let during = rig.write(8192, 4096);
    assert_eq!(rig.result(during), None, "it has a session: it is waited for");
}

/// A plan that is paused keeps its new copies from being filled. Members are compared all the same: reads wait for that.
#[test]
fn what_an_operator_paused_is_not_filled_and_members_are_compared_all_the_same() {
    for member in [true, false] {
        for paused in [true, false] {
            let mut first = map(2, 2, 1);
            let run = Run { device: DEVICE, first: SliceIndex(0), count: 1 };
            let step = Move { run, from: None, to: DiskId(1), segment: Segment::Secondary, primary: false };
            first.plans = vec![Plan { paused, ..Plan::new(PlanId(1), "test".into(), vec![step]) }];
            // The second takes over, and has a write that nobody acknowledged.
            let mut rig = Rig::new(2, &first);
            rig.frame(1, forwarded(Kind::Write, 1, 0), None);
            rig.sent.clear();
            rig.adopted(1, 2);
            rig.adopt(&next(&first, |span| {
                span.replicas.swap(0, 1);
                span.replicas[1].state = if member { ReplicaState::InSync } else { ReplicaState::Syncing };
            }));
            rig.wait(2_000, &[1]);
            let begun = [Kind::Compare, Kind::Write].iter().any(|kind| !rig.take(*kind).is_empty());
            assert_eq!(begun, member || !paused, "{member} {paused}");
        }
    }
}

/// While a host asks again and again, copies go on at the rate that they may, without waiting for a tick.
#[test]
fn copies_keep_to_the_pace_while_a_host_writes() {
    const REGION: u64 = 4096;
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
    rig.lane_down(2);
    for region in 0..60 {
        rig.write(region * REGION, REGION as u32);
    }
    rig.take(Kind::Write);
    let pace = Pace { rate: Some(100 * REGION), floor: 10 * REGION };
    rig.engine.set_policy(NodePolicy { pace, ..NodePolicy::default() });
    rig.open(2, MapVersion(2));
    let mut copied = 0;
    let end = rig.now + 400_000_000;
    while rig.now < end {
        rig.now = rig.engine.next_tick().min(rig.now + 5_000_000);
        rig.tick();
        rig.write(63 * REGION, 512);
        for sent in rig.take(Kind::Write) {
            copied += u32::from(u64::from(sent.header.offset) < 60 * REGION);
            rig.ack(&sent);
        }
    }
    assert!((40..=51).contains(&copied), "{copied}");
}

/// More slices are kept here than the adopted map has, while the map by which the device grows is being adopted.
#[test]
fn a_device_grows_while_a_copy_is_filled() {
    for differs in [false, true] {
        let first = next(&map(2, 2, 1), |span| span.replicas[1].state = ReplicaState::Syncing);
        let mut rig = Rig::new(1, &first);
        rig.lane_down(2);
        if differs {
            rig.write(0, 4096);
        }
        let span = crate::map::Span { first: SliceIndex(1), ..first.devices[0].spans[0].clone() };
        let verb = Verb::GrowDevice { device: DEVICE, spans: vec![span] };
        let grown = first.apply(&[verb]).unwrap().unwrap();
        rig.hold_metadata = true;
        rig.adopt(&grown);
        rig.open(2, first.version);
        rig.wait(1_000, &[2]);
        assert_eq!(
            rig.engine.adopted_version(),
            first.version,
            "the new slice's slot is not on the disk yet"
        );
        let now = rig.now;
        let new = u64::from(crate::engine::testing::SLICE);
        assert!(rig.engine.extents(now, DEVICE, new, new).all(|extent| extent.data), "who knows");
        rig.hold_metadata = false;
        rig.complete_io(Ok(()));
        rig.adopted(2, grown.version.0);
        rig.wait(300, &[2]);
        assert_eq!(rig.engine.adopted_version(), grown.version);
        assert_eq!(rig.take(Kind::Write).len(), usize::from(differs));
    }
}

/// A flush waits for a copy that is about to become a member, until it turns out that it does not yet.
#[test]
fn a_flush_does_not_wait_for_a_copy_that_did_not_join() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
    rig.lane_down(2);
    rig.open(2, MapVersion(2));
    assert_eq!(rig.take(Kind::Flush).len(), 1, "the copy joins");
    let flush = rig.flush();
    assert_eq!(rig.take(Kind::Flush).len(), 1);
    rig.lane_down(2);
    assert_eq!(rig.result(flush), Some(Ok(())));
    assert!(rig.reports.is_empty(), "{:?}", rig.reports);
}

/// A map moves the role for one device away and brings that for another, of which a copy is another incarnation: that
/// peer is lost while what runs is being fitted to the map.
#[test]
fn a_flush_that_began_as_primary_does_not_end_as_one_that_is_none() {
    let mut first = map(3, 2, 1);
    let mut other = first.devices[0].clone();
    (other.id, other.name) = (crate::ids::DeviceId(2), "other".into());
    other.spans[0].replicas[1].disk = DiskId(3);
    other.spans[0].replicas[1].incarnation.attach.0 = 3;
    other.spans[0].replicas.swap(0, 1);
    first.devices.push(other);
    first.validate().unwrap();
    let mut rig = Rig::new(1, &first);
    rig.lane_down(2);
    let flush = rig.flush();
    let mut second = next(&first, promote_second);
    let span = &mut second.devices[1].spans[0];
    span.epoch = SliceEpoch(second.version.0);
    span.replicas.swap(0, 1);
    span.replicas[1].incarnation.attach.0 = 99;
    rig.adopt(&second);
    assert!(rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })), "{:?}", rig.reports);
    assert_eq!(rig.result(flush), None, "node 2 is primary now, and has not flushed");
}

/// A peer may be cut off from the manager, and not know of a device that is flushed here.
#[test]
fn a_flush_is_not_sent_to_a_peer_that_does_not_know_the_device() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    let mut device = first.devices[0].clone();
    (device.id, device.name) = (first.next_device(), "other".into());
    let made = first.apply(&[Verb::CreateDevice { device: Box::new(device) }]).unwrap().unwrap();
    rig.adopt(&made);
    rig.engine.start_flush(crate::engine::flush::FlushOrigin::Survey, 1);
    rig.run();
    assert_eq!(rig.take(Kind::Flush).len(), 0);
    rig.adopted(2, made.version.0);
    assert_eq!(rig.take(Kind::Flush).len(), 1);
}

/// For the log, which is to say what a resync cost.
#[test]
fn the_end_of_a_resync_is_told_once() {
    let mut rig = Rig::new(1, &map(2, 2, 1));
    let opened = rig.engine.take_ended_resyncs();
    assert_eq!(opened.len(), 1, "the copies were reconciled when the session began: {opened:?}");
    assert_eq!((opened[0].peer.0, opened[0].moved_bytes, opened[0].behind_bytes), (2, 0, 0));
    assert!(!opened[0].joining);
    assert_eq!(rig.engine.take_ended_resyncs(), []);
}

/// Rule 11: what is invalid here becomes invalid there, also where the copy had nothing when its masks
/// came and was written since. Left alone it would bring back what was discarded.
#[test]
fn a_discard_that_a_syncing_copy_missed_is_made_up_for() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
    let (region, length) = (3 * 4096, 4096);
    rig.write(region, length);
    let leg = rig.take(Kind::Write);
    rig.ack(&leg[0]);
    rig.lane_down(2);
    let discard = rig.request(RequestKind::Discard, region, length);
    assert_eq!(rig.result(discard), Some(Ok(())));
    rig.open(2, MapVersion(2));
    let missed: Vec<u32> = rig.take(Kind::Discard).iter().map(|sent| sent.header.offset).collect();
    assert_eq!(missed, [region as u32]);
}

/// The same for one that is another incarnation than the one that joins.
#[test]
fn a_joining_copy_of_another_incarnation_is_lost_anew() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.lane_down(2);
    let joining = next(&next(&first, second_stale), |span| span.replicas[1].state = ReplicaState::Syncing);
    rig.open_as(2, joining.version, 2, 22);
    rig.reports.clear();
    rig.adopt(&joining);
    assert!(rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })), "{:?}", rig.reports);
}

/// The same of what is copied from it: the other copy may have what this one has lost.
#[test]
fn nothing_is_copied_from_a_disk_that_failed_meanwhile() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
    rig.lane_down(2);
    rig.write(0, 4096);
    rig.hold = true;
    rig.open(2, MapVersion(2));
    assert_eq!(rig.held.len(), 1, "the region is being read");
    rig.fail_flush = true;
    rig.flush();
    rig.complete_io(Ok(()));
    assert!(rig.take(Kind::Write).is_empty());
}

#[test]
fn space_that_was_never_written_is_not_sent_to_a_new_copy() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &next(&first, second_stale));
    rig.clean_peers = false;
    let syncing = next(&next(&first, second_stale), |span| span.replicas[1].state = ReplicaState::Syncing);
    rig.adopt(&syncing);
    rig.adopted(2, syncing.version.0);
    rig.wait(300, &[2]);
    let unite = rig.take(Kind::Unite);
    assert_eq!(unite.len(), 1, "its slice");
    // All of the new copy is dirty, and nothing of it content.
    let body = [u64::MAX, 0].map(u64::to_le_bytes).concat();
    let masks = Header { sequence: unite[0].header.sequence, ..Header::new(Kind::Masks) };
    rig.frame_with(2, masks, &body);
    rig.wait(300, &[2]);
    for kind in [Kind::Write, Kind::Compare, Kind::Discard] {
        assert_eq!(rig.take(kind).len(), 0, "{kind:?}");
    }
    // What is written from now on is content.
    rig.write_to_both(0, 4096);
    let data = |extents: &mut dyn Iterator<Item = crate::engine::Extent>| {
        extents.filter(|extent| extent.data).count()
    };
    let now = rig.now;
    assert_eq!(data(&mut rig.engine.extents(now, DEVICE, 0, u64::from(crate::engine::testing::SLICE))), 1);
}

/// Node 2 gets another disk, which the map's next version has a copy on.
fn with_disk_added(first: &crate::map::DistributionMap, state: ReplicaState) -> crate::map::DistributionMap {
    let mut second = next(first, |span| {
        span.replicas[1].disk = DiskId(9);
        span.replicas[1].added = MapVersion(2);
        span.replicas[1].incarnation.attach.0 = 99;
        span.replicas[1].state = state;
    });
    second.disks.push(crate::map::Disk { id: DiskId(9), name: "e".into(), ..first.disks[1].clone() });
    second
}

/// The map may be here before the peer has told of its disk: that is no reason to take the disk for lost.
#[test]
fn a_disk_that_a_peer_got_meanwhile_is_not_missed() {
    for state in [ReplicaState::Syncing, ReplicaState::InSync] {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(1, &first);
        rig.adopt(&with_disk_added(&first, state));
        let token = rig.write(0, 4096);
        assert!(
            rig.reports.iter().all(|report| !matches!(report, Report::AskStale { .. })),
            "{:?}",
            rig.reports
        );
        assert!(rig.take(Kind::Write).is_empty(), "the peer has not adopted the map");
        // A member is waited for; what a copy that is being filled misses is sent later.
        let waited = (state == ReplicaState::Syncing).then_some(Ok(()));
        assert_eq!(rig.result(token), waited);
        let body: Vec<u8> = [9u64, 99].iter().flat_map(|word| word.to_le_bytes()).collect();
        rig.frame_with(2, Header::new(Kind::Attached), &body);
        rig.adopted(2, 2);
        let legs = rig.take(Kind::Write);
        rig.ack(&legs[0]);
        assert_eq!(rig.result(token), Some(Ok(())));
        assert!(
            rig.reports.iter().all(|report| !matches!(report, Report::AskStale { .. })),
            "{:?}",
            rig.reports
        );
        // Again it is a peer that errs.
        rig.frame_with(2, Header::new(Kind::Attached), &body);
        assert_eq!(rig.closed, [2]);
    }
}

#[test]
fn a_disk_that_a_peer_does_not_have_by_the_map_that_needs_it_is_lost() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.adopt(&with_disk_added(&first, ReplicaState::InSync));
    let token = rig.write(0, 4096);
    rig.adopted(2, 2);
    assert!(rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })), "{:?}", rig.reports);
    assert_eq!(rig.result(token), None, "one copy is not enough");
}

/// A peer that comes back without a disk and with an older map answers a flush for what it has: for nothing of that copy.
#[test]
fn a_disk_that_a_peer_had_is_missed_whatever_map_the_peer_has() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.write_to_both(0, 4096);
    rig.lane_down(2);
    rig.adopt(&next(&first, |_| {}));
    rig.reports.clear();
    // Its session names no disk.
    let session = rig.session_of(2) + 700;
    rig.engine.handle_lane_up(rig.now, crate::ids::NodeId(2), session, crate::ids::ProcessId(2));
    let body: Vec<u8> = [2u64, 1].iter().flat_map(|word| word.to_le_bytes()).collect();
    rig.run();
    rig.frame_with(2, Header { sequence: 1, ..Header::new(Kind::Open) }, &body);
    let flush = rig.flush();
    assert!(rig.take(Kind::Flush).is_empty(), "it is not asked: it is no member");
    assert_eq!(rig.result(flush), None);
    assert!(rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })), "{:?}", rig.reports);
}

#[test]
fn peers_are_told_of_a_disk_once_in_a_session() {
    let mut rig = Rig::new(2, &map(2, 2, 1));
    let words = |sent: &crate::engine::testing::Sent| sent.body.clone();
    rig.engine.add_disk(rig.now, crate::engine::testing::formatted(9, true));
    rig.run();
    let told = rig.take(Kind::Attached);
    let of = |disk: u64| [disk, disk].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    assert_eq!(told.iter().map(words).collect::<Vec<_>>(), [of(9)]);
    rig.lane_down(1);
    rig.open(1, MapVersion(1));
    assert!(rig.take(Kind::Attached).is_empty());
    let open = rig.take(Kind::Open);
    assert_eq!(words(&open[0])[16..], [of(2), of(9)].concat());
}

/// What this disk cannot read is rather taken from a copy that is known to have it than from one that is being compared. If
/// only that one can be asked, what comes of it may be older than what the others have.
#[test]
fn what_a_copy_that_lags_behind_has_is_not_taken_for_what_all_have() {
    for reachable in [true, false] {
        let mut first = map(3, 3, 1);
        first.devices[0].on_no_quorum = OnNoQuorum::Error;
        let mut rig = Rig::new(1, &first);
        rig.lane_down(2);
        let write = rig.write(0, 4096);
        let leg = rig.take(Kind::Write);
        assert_eq!((leg.len(), leg[0].to), (1, 3));
        rig.ack(&leg[0]);
        // Nobody hears of the write that it is done; here and on node 3 it is.
        rig.wait(10_100, &[3]);
        assert_eq!(rig.result(write), Some(Err(RequestError::NoQuorum)));
        if !reachable {
            rig.lane_down(3);
        }
        rig.hold = true;
        rig.open(2, first.version);
        assert_eq!(rig.held.len(), 1, "the region is being read, to be compared");
        rig.complete_io(Err("medium error".into()));
        let compare = rig.take(Kind::Compare);
        rig.answer(&compare[0], Kind::Digests, Status::Done);
        let fetch = rig.take(Kind::Fetch);
        assert_eq!(fetch.iter().map(|sent| sent.to).collect::<Vec<_>>(), [if reachable { 3 } else { 2 }]);
        rig.hold = false;
        rig.give(&fetch[0], 4096, BUFFER);
        let behind = rig.engine.devices[0].slices[0].behind.iter();
        let mut differ: Vec<_> =
            behind.filter(|behind| behind.may_differ() == 1).map(|behind| behind.peer).collect();
        differ.sort_unstable();
        let peers = [2, 3].map(|node| rig.engine.peer_index(crate::ids::NodeId(node)).unwrap());
        assert_eq!(differ, if reachable { &peers[..1] } else { &peers[..] });
    }
}

/// A new map ends a repair whose data have not been stored: the member that sent them is asked again, and the read does
/// not fail.
#[test]
fn a_repair_that_a_new_map_ended_is_begun_anew() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.write_to_both(0, 4096);
    rig.hold = true;
    let read = rig.request(RequestKind::Read, 0, 4096);
    rig.complete_io(Err("medium error".into()));
    let fetch = rig.take(Kind::Fetch);
    assert_eq!(fetch.len(), 1);
    rig.adopt(&next(&first, |span| span.loss.0 += 1));
    rig.give(&fetch[0], 4096, BUFFER);
    rig.adopted(2, 2);
    rig.wait(100, &[2]);
    assert_eq!(rig.held.len(), 1, "it is read again");
    rig.complete_io(Err("medium error".into()));
    assert_eq!(rig.result(read), None, "the member has it");
    assert_eq!(rig.take(Kind::Fetch).len(), 1);
}
