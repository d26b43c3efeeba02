//! What one engine does, seen from outside.

mod copying;

use super::action::{BufferId, Report, RequestError, RequestKind};
use super::testing::{DEVICE, Rig, claimed, map, next};
use crate::config::{NodePolicy, Pace};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, ExporterSession, MapVersion, PlanId, SliceEpoch, SliceIndex};
use crate::map::ReplicaState;
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Run;
use crate::wire::header::{Header, Kind, Status, Trailer};

/// What somebody gave arrives in it.
const BUFFER: BufferId = BufferId(900);

fn promote_second(span: &mut crate::map::Span) {
    span.replicas.swap(0, 1);
    span.replicas[1].state = ReplicaState::Stale;
}

#[test]
fn a_write_completes_when_every_copy_has_it() {
    let mut rig = Rig::new(1, &map(2, 2, 1));
    let token = rig.write(0, 4096);
    assert_eq!(rig.result(token), None);
    let legs = rig.take(Kind::Write);
    rig.ack(&legs[0]);
    assert_eq!(rig.result(token), Some(Ok(())));
}

#[test]
fn a_part_that_went_elsewhere_is_not_sent_again_when_its_old_session_ends() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(3, &first);
    let token = rig.request(RequestKind::WriteZeroes { fua: false }, 0, 4096);
    assert_eq!(rig.take(Kind::ForwardZero).len(), 1);
    let second = next(&first, promote_second);
    rig.adopted(2, 2);
    rig.adopt(&second);
    let again = rig.take(Kind::ForwardZero);
    assert_eq!((again.len(), again[0].to), (1, 2));
    rig.lane_down(1);
    rig.wait(100, &[2]);
    assert!(rig.take(Kind::ForwardZero).is_empty(), "it is at its new primary already");
    rig.answer(&again[0], Kind::Reply, Status::Done);
    assert_eq!(rig.result(token), Some(Ok(())));
}

#[test]
fn a_writes_buffer_is_not_given_back_while_its_old_primary_has_not_answered() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(3, &first);
    let token = rig.write(0, 4096);
    let old = rig.take(Kind::ForwardWrite);
    rig.adopted(2, 2);
    rig.adopt(&next(&first, promote_second));
    rig.wait(100, &[1, 2]);
    assert!(rig.take(Kind::ForwardWrite).is_empty(), "the frame to node 1 may still be in the buffer");
    rig.answer(&old[0], Kind::Reply, Status::Fenced);
    rig.wait(100, &[1, 2]);
    let new = rig.take(Kind::ForwardWrite);
    assert_eq!(new[0].to, 2);
    rig.answer(&new[0], Kind::Reply, Status::Done);
    assert_eq!(rig.result(token), Some(Ok(())));
}

#[test]
fn an_old_primary_that_never_answers_is_given_up() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(3, &first);
    rig.write(0, 4096);
    rig.take(Kind::ForwardWrite);
    rig.adopted(2, 2);
    rig.adopt(&next(&first, promote_second));
    rig.wait(1_200, &[1, 2]);
    assert_eq!(rig.closed, [1]);
    assert_eq!(rig.take(Kind::ForwardWrite)[0].to, 2);
}

#[test]
fn what_was_held_under_an_older_claim_is_never_sent_under_a_newer_one() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(3, &first);
    rig.lane_down(1);
    let (write, flush) = (rig.write(0, 4096), rig.flush());
    // The claim went to node 2 and came back; this node saw the end of it only.
    let back = claimed(&claimed(&first, 2), 3);
    rig.adopt(&back);
    rig.open(1, back.version);
    assert!(rig.take(Kind::ForwardWrite).is_empty());
    assert_eq!(rig.result(write), Some(Err(RequestError::ClaimLost)));
    assert_eq!(rig.result(flush), Some(Err(RequestError::ClaimLost)));
}

fn forwarded(kind: Kind, epoch: u64, offset: u32) -> Header {
    Header { slice_epoch: SliceEpoch(epoch), device: DEVICE.0, offset, length: 4096, ..Header::new(kind) }
}

fn trailer(claim: u64, exporter_session: u64, origin: u16) -> Option<Trailer> {
    Some(Trailer { claim, exporter_session, exporter_sequence: 1, origin })
}

#[test]
fn a_process_keeps_its_first_number_as_an_exporter() {
    let mut rig = Rig::new(3, &map(3, 2, 3));
    rig.engine.set_exporter_session(ExporterSession(9));
    rig.write(0, 4096);
    assert_eq!(rig.trailers, [1], "the number under which others may be under way still");
}

#[test]
fn exporter_sessions_are_compared_within_one_claim_only() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(1, &first);
    rig.frame(3, forwarded(Kind::ForwardZero, 1, 0), trailer(1, 7, 3));
    assert_eq!(rig.take(Kind::Zero).len(), 1);
    let second = claimed(&first, 2);
    rig.adopt(&second);
    // Node 2 registered before node 3 did, and so has a smaller number.
    rig.frame(2, forwarded(Kind::ForwardZero, 1, 8192), trailer(2, 5, 2));
    assert_eq!(rig.take(Kind::Zero).len(), 1);
    rig.frame(2, forwarded(Kind::ForwardZero, 1, 8192), trailer(2, 4, 2));
    let replies = rig.take(Kind::Reply);
    assert_eq!(replies[0].header.flags, Status::ClaimLost as u8);
}

#[test]
fn adoption_of_a_claim_is_reported_when_older_writes_are_done() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(1, &first);
    rig.frame(3, forwarded(Kind::ForwardWrite, 1, 0), trailer(1, 1, 3));
    let leg = rig.take(Kind::Write);
    rig.adopt(&claimed(&first, 2));
    assert_eq!(rig.reports, []);
    rig.ack(&leg[0]);
    assert_eq!(rig.reports, [Report::Adopted { version: MapVersion(2) }]);
}

#[test]
fn a_write_whose_exporter_is_gone_is_not_read_before_every_copy_has_it() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(1, &first);
    rig.frame(3, forwarded(Kind::ForwardWrite, 1, 0), trailer(1, 1, 3));
    let leg = rig.take(Kind::Write);
    rig.lane_down(3);
    rig.open(3, first.version);
    rig.frame(3, forwarded(Kind::ForwardRead, 1, 0), trailer(1, 1, 3));
    assert!(rig.take(Kind::Reply).is_empty(), "the write keeps its range");
    rig.ack(&leg[0]);
    assert_eq!(rig.take(Kind::Reply).len(), 1, "of the read; nobody waits for the write's");
}

/// The exporter is the other copy too: the write that its session's end left behind needs the next session.
#[test]
fn a_write_of_an_exporter_that_is_also_the_secondary_outlives_their_session() {
    let first = map(2, 2, 2);
    let mut rig = Rig::new(1, &first);
    rig.frame(2, forwarded(Kind::ForwardWrite, 1, 0), trailer(1, 1, 2));
    assert_eq!(rig.take(Kind::Write).len(), 1);
    rig.lane_down(2);
    rig.open(2, first.version);
    let again = rig.take(Kind::Write);
    assert_eq!(again.len(), 1, "it is sent again");
    rig.ack(&again[0]);
    let read = rig.frame(2, forwarded(Kind::ForwardRead, 1, 0), trailer(1, 1, 2));
    assert_eq!(rig.take(Kind::Reply).iter().filter(|reply| reply.header.sequence == read).count(), 1);
}

/// Only a role that comes here is waited for: the partner's end costs no more than the manager's word.
#[test]
fn a_primary_whose_partner_is_gone_goes_on_at_once() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.frame(2, Header::new(Kind::Ping), None);
    rig.lane_down(2);
    let write = rig.write(0, 4096);
    assert_eq!(rig.result(write), None);
    rig.adopt(&next(&first, second_stale));
    assert_eq!(rig.result(write), Some(Ok(())));
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), Some(Ok(())));
}

/// Rule 12: a primary that adopts the map which deposes it gives its leases back with that.
#[test]
fn a_hand_over_does_not_wait_for_the_lease_of_a_primary_that_knows() {
    let first = map(2, 2, 2);
    let mut rig = Rig::new(2, &first);
    rig.frame(1, Header::new(Kind::Ping), None);
    rig.adopt(&next(&first, |span| span.replicas.swap(0, 1)));
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "node 1 may still be reading");
    rig.adopted(1, 2);
    rig.wait(100, &[1]);
    assert_eq!(rig.result(read), Some(Ok(())));
}

/// The copy that the map drops may be the one whose node reads under a lease, and has not heard of it.
#[test]
fn whoever_is_alone_waits_for_the_lease_of_the_copy_that_was_dropped() {
    let first = map(2, 2, 2);
    let mut rig = Rig::new(2, &first);
    rig.frame(1, Header::new(Kind::Ping), None);
    rig.adopt(&next(&first, |span| {
        span.replicas.remove(0);
    }));
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "node 1 may still be reading");
    rig.wait(1_200, &[]);
    assert_eq!(rig.result(read), Some(Ok(())));
}

#[test]
fn the_lease_of_a_dropped_copy_is_waited_for_although_the_device_is_not_mirrored_any_more() {
    let first = map(2, 2, 2);
    let mut rig = Rig::new(2, &first);
    rig.frame(1, Header::new(Kind::Ping), None);
    let mut alone = next(&first, |span| {
        span.replicas.remove(0);
    });
    alone.devices[0].copies = 1;
    rig.adopt(&alone);
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "node 1 may still be reading");
    rig.wait(1_200, &[]);
    assert_eq!(rig.result(read), Some(Ok(())));
}

#[test]
fn a_flush_of_an_ended_session_does_not_hold_up_the_next() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(1, &first);
    rig.frame(3, forwarded(Kind::ForwardFlush, 0, 0), trailer(1, 1, 3));
    assert_eq!(rig.take(Kind::Flush).len(), 1);
    rig.lane_down(3);
    rig.open(3, first.version);
    assert_eq!(rig.take(Kind::Open)[0].to, 3);
}

fn second_stale(span: &mut crate::map::Span) {
    span.replicas[1].state = ReplicaState::Stale;
}

#[test]
fn a_leg_under_way_is_not_sent_twice_when_the_epoch_changes() {
    let first = map(3, 3, 1);
    let mut rig = Rig::new(1, &first);
    let token = rig.write(0, 4096);
    let legs = rig.take(Kind::Write);
    assert_eq!(legs.len(), 2);
    rig.adopt(&next(&first, second_stale));
    rig.adopted(3, 2);
    assert!(rig.take(Kind::Write).is_empty());
    rig.ack(&legs[1]);
    assert_eq!(rig.result(token), None, "the frame to node 2 may still be in the buffer");
    rig.answer(&legs[0], Kind::Ack, Status::Fenced);
    assert_eq!(rig.result(token), Some(Ok(())));
}

#[test]
fn a_refused_leg_is_sent_again_under_the_new_epoch() {
    let first = map(3, 3, 1);
    let mut rig = Rig::new(1, &first);
    let token = rig.write(0, 4096);
    let legs = rig.take(Kind::Write);
    rig.answer(&legs[0], Kind::Ack, Status::Fenced);
    rig.adopted(3, 2);
    rig.adopt(&next(&first, second_stale));
    // It refused the old epoch, and we hear of it when we have adopted the new one already.
    rig.answer(&legs[1], Kind::Ack, Status::Fenced);
    let again: Vec<_> =
        rig.take(Kind::Write).into_iter().filter(|leg| leg.header.slice_epoch.0 == 2).collect();
    assert_eq!(again.iter().map(|leg| (leg.to, leg.header.slice_epoch.0)).collect::<Vec<_>>(), [(3, 2)]);
    rig.ack(&again[0]);
    assert_eq!(rig.result(token), Some(Ok(())));
}

#[test]
fn a_deposed_write_ends_when_its_messages_have() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.write(0, 4096);
    let leg = rig.take(Kind::Write);
    rig.adopted(2, 2);
    rig.adopt(&next(&first, promote_second));
    rig.wait(100, &[2]);
    assert!(rig.take(Kind::ForwardWrite).is_empty());
    rig.answer(&leg[0], Kind::Ack, Status::Fenced);
    rig.wait(100, &[2]);
    assert_eq!(rig.take(Kind::ForwardWrite).len(), 1);
}

#[test]
fn a_member_that_was_attached_again_is_noticed_under_a_new_map_too() {
    let first = map(3, 2, 1);
    // Node 2 is the primary; node 1 meets it with its disk attached anew before it takes over with node 2 as a member.
    let mut before = first.clone();
    before.devices[0].spans[0].replicas.swap(0, 1);
    let mut rig = Rig::new(1, &before);
    rig.lane_down(2);
    rig.open_as(2, before.version, 2, 22);
    assert!(rig.reports.is_empty());
    rig.adopt(&next(&before, |span| span.replicas.swap(0, 1)));
    assert!(rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })), "{:?}", rig.reports);
}

#[test]
fn a_member_without_a_session_is_reported_by_a_primary_that_took_over() {
    let first = map(3, 3, 1);
    let mut rig = Rig::new(2, &first);
    rig.lane_down(3);
    rig.lane_down(1);
    let second = next(&first, |span| {
        span.replicas.rotate_left(1);
        span.replicas[2].state = ReplicaState::Stale;
    });
    rig.adopt(&second);
    rig.reports.clear();
    rig.wait(6_000, &[]);
    assert!(matches!(&rig.reports[0], Report::AskStale { peer, .. } if peer.0 == 3), "{:?}", rig.reports);
}

#[test]
fn more_requests_than_the_window_holds_all_complete() {
    let mut rig = Rig::new(1, &map(2, 2, 1));
    let offset = |index: u32| u64::from(index % 64) * 4096 + u64::from(index / 64 % 8) * 512;
    // Of every 512 places one write is at the secondary; zeroing what was never written has no range
    // in common either.
    for index in 0..512 {
        rig.request(RequestKind::WriteZeroes { fua: false }, offset(index), 512);
    }
    assert_eq!(rig.take(Kind::Zero).len(), 512);
    for _ in 0..super::window::WINDOW {
        rig.flush();
    }
    let write = rig.flush();
    let mut guard = 0;
    while rig.result(write).is_none() {
        let flushes = rig.take(Kind::Flush);
        assert!(!flushes.is_empty() && guard < 10_000, "nothing is sent any more");
        guard += 1;
        flushes.iter().for_each(|flush| rig.ack(flush));
    }
}

/// A map that takes a slice from this node is being adopted: this node does not flush the slice's copies any more, and an
/// exporter that knows nothing of it must not take the answer for theirs.
#[test]
fn a_flush_that_leaves_out_what_the_next_map_takes_away_says_so() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(1, &first);
    rig.hold_metadata = true;
    rig.adopt(&next(&first, |span| {
        span.replicas.swap(0, 1);
        span.replicas.truncate(1);
    }));
    assert_eq!(rig.engine.adopted_version(), first.version, "its own copy's slot is being freed");
    let flush = Header { device: DEVICE.0, ..Header::new(Kind::ForwardFlush) };
    rig.frame(3, flush, trailer(1, 1, 3));
    let answers = rig.take(Kind::Reply);
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].header.slice_epoch.0, 2, "{:?}", answers[0].header);
}

#[test]
fn a_failed_flush_is_not_made_good_by_the_next() {
    let first = map(2, 2, 1);
    let alone = next(&first, second_stale);
    let mut rig = Rig::new(1, &alone);
    rig.fail_flush = true;
    let failed = rig.flush();
    rig.fail_flush = false;
    let again = rig.flush();
    assert_eq!(rig.result(failed), Some(Err(RequestError::Io)));
    assert_eq!(rig.result(again), Some(Err(RequestError::Io)), "nobody knows what the disk holds");
}

#[test]
fn a_primary_whose_disk_fails_a_flush_waits_for_the_other_copy_to_take_over() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.fail_flush = true;
    let flush = rig.flush();
    let leg = rig.take(Kind::Flush);
    rig.ack(&leg[0]);
    assert_eq!(rig.result(flush), None);
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "the disk may have lost what was acknowledged");
    rig.adopted(2, 2);
    rig.adopt(&next(&first, promote_second));
    rig.wait(100, &[2]);
    assert_eq!((rig.take(Kind::ForwardFlush).len(), rig.take(Kind::ForwardRead).len()), (1, 1));
}

#[test]
fn a_map_is_adopted_though_a_disk_fails_meanwhile() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.fail_metadata = true;
    rig.adopt(&next(&first, promote_second));
    assert_eq!(rig.engine.adopted_version().0, 2);
}

#[test]
fn an_exporter_that_survives_hears_of_lost_writes_from_one_flush() {
    let first = map(3, 2, 3);
    let lossy = |span: &mut crate::map::Span| {
        second_stale(span);
        span.loss.0 += 1;
    };
    let mut rig = Rig::new(3, &first);
    let flush = |rig: &mut Rig| {
        let token = rig.flush();
        let sent = rig.take(Kind::ForwardFlush);
        rig.answer(&sent[0], Kind::Reply, Status::Done);
        rig.result(token)
    };
    rig.write(0, 4096);
    let sent = rig.take(Kind::ForwardWrite);
    rig.answer(&sent[0], Kind::Reply, Status::Done);
    rig.adopted(1, 2);
    let second = next(&first, lossy);
    rig.adopt(&second);
    assert_eq!(flush(&mut rig), Some(Err(RequestError::Io)));
    assert_eq!(flush(&mut rig), Some(Ok(())));
    // What a flush covered is not lost.
    rig.adopted(1, 3);
    rig.adopt(&next(&second, lossy));
    assert_eq!(flush(&mut rig), Some(Ok(())));
}

/// Rule 16, for a ublk device whose process was killed: nobody knows what it had acknowledged and not flushed.
#[test]
fn a_device_that_outlived_its_process_hears_of_a_loss_meanwhile_or_later() {
    let flush = |rig: &mut Rig| {
        let token = rig.flush();
        let sent = rig.take(Kind::ForwardFlush);
        rig.answer(&sent[0], Kind::Reply, Status::Done);
        rig.result(token)
    };
    let first = next(&map(3, 2, 3), |span| span.loss.0 = 4);
    let told = Rig::new(3, &first).engine.loss_told(DEVICE);
    assert_eq!(told, Some(4));

    // Meanwhile.
    let second = next(&first, |span| span.loss.0 += 1);
    let mut rig = Rig::new(3, &second);
    rig.engine.resume_export(DEVICE, 4);
    assert_eq!(rig.engine.loss_told(DEVICE), None, "the next process has to know that it was not told");
    assert_eq!(flush(&mut rig), Some(Err(RequestError::Io)));
    assert_eq!((flush(&mut rig), rig.engine.loss_told(DEVICE)), (Some(Ok(())), Some(5)));

    // Later; but not once a flush has covered everything.
    for flushed in [false, true] {
        let mut rig = Rig::new(3, &first);
        rig.engine.resume_export(DEVICE, 4);
        if flushed {
            assert_eq!(flush(&mut rig), Some(Ok(())));
        }
        rig.adopted(1, second.version.0);
        rig.adopt(&second);
        assert_eq!(flush(&mut rig).unwrap().is_ok(), flushed);
    }
}

#[test]
fn an_acknowledgement_that_arrives_after_the_loss_is_none() {
    let first = map(3, 2, 3);
    let mut rig = Rig::new(3, &first);
    let token = rig.write(0, 4096);
    let sent = rig.take(Kind::ForwardWrite);
    rig.adopted(1, 2);
    rig.adopt(&next(&first, |span| span.loss.0 += 1));
    rig.answer(&sent[0], Kind::Reply, Status::Done);
    assert_eq!(rig.result(token), None);
    rig.wait(100, &[1, 2]);
    assert_eq!(rig.take(Kind::ForwardWrite)[0].header.loss.0, 1);
}

#[test]
fn a_restarted_primary_does_not_answer_a_flush_for_what_it_lost() {
    let mut first = map(3, 2, 3);
    second_stale(&mut first.devices[0].spans[0]);
    first.devices[0].spans[0].replicas[0].incarnation.attach.0 = 77;
    let mut rig = Rig::new(1, &first);
    rig.frame(3, forwarded(Kind::ForwardFlush, 0, 0), trailer(1, 1, 3));
    assert_eq!(rig.take(Kind::Reply)[0].header.flags, Status::Fenced as u8);
    // Nor if it exports the device itself.
    let mut own = first.clone();
    own.devices[0].claim.node.0 = 1;
    let mut rig = Rig::new(1, &own);
    let flush = rig.flush();
    assert_eq!(rig.result(flush), None);
    rig.adopt(&next(&own, |span| span.replicas[0].incarnation.attach.0 = 1));
    assert_eq!(rig.result(flush), Some(Ok(())));
}

#[test]
fn writes_that_both_need_a_whole_region_do_not_wait_for_each_other() {
    let mut rig = Rig::new(1, &next(&map(2, 2, 1), second_stale));
    rig.hold = true;
    let discard = rig.request(RequestKind::Discard, 0, 4096);
    let (a, b) = (rig.write(1024, 512), rig.write(2048, 512));
    for _ in 0..20 {
        rig.complete_io(Ok(()));
    }
    assert_eq!([discard, a, b].map(|token| rig.result(token)), [Some(Ok(())); 3]);
}

/// Node 2 is the primary of map 1 again in map 3; it saw nothing of map 2 and waits for no lease.
#[test]
fn a_lease_of_a_grantor_that_lacks_the_slices_epoch_is_none() {
    let mut first = map(2, 2, 1);
    first.devices[0].spans[0].replicas.swap(0, 1);
    let mut rig = Rig::new(1, &first);
    rig.adopt(&next(&first, |span| span.replicas.swap(0, 1)));
    rig.wait(600, &[]);
    let pings = rig.take(Kind::Ping);
    let pong = |rig: &mut Rig, ping: &Header, version: u64| {
        let slice_epoch = SliceEpoch(version);
        rig.frame(2, Header { sequence: ping.sequence, slice_epoch, ..Header::new(Kind::Pong) }, None);
    };
    assert!(pings.len() >= 2, "{pings:?}");
    let latest = &pings[pings.len() - 2..];
    pong(&mut rig, &latest[0].header, 1);
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "node 2 may serve under map 3 without a wait");
    pong(&mut rig, &latest[1].header, 2);
    assert_eq!(rig.result(read), Some(Ok(())));
}

#[test]
fn leases_are_renewed_at_once_when_a_map_is_adopted_here_or_there() {
    let first = map(3, 3, 1);
    let mut rig = Rig::new(1, &first);
    rig.wait(100, &[2, 3]);
    rig.adopt(&next(&first, second_stale));
    rig.pong(2);
    rig.take(Kind::Ping);
    rig.adopted(3, 2);
    let to: Vec<u16> = rig.take(Kind::Ping).iter().map(|ping| ping.to).collect();
    assert_eq!(to, [3]);
}

/// The versions between need not be seen: what the map says now is that it was away and joins.
#[test]
fn a_lost_member_that_joins_again_in_the_next_map_seen_is_not_lost() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.lane_down(2);
    assert!(matches!(rig.reports[..], [Report::AskStale { .. }]), "{:?}", rig.reports);
    let stale = next(&first, second_stale);
    let joining = next(&stale, |span| span.replicas[1].state = ReplicaState::Syncing);
    rig.open(2, joining.version);
    rig.reports.clear();
    rig.adopt(&joining);
    rig.wait(2_000, &[2]);
    assert!(rig.reports.iter().all(|report| matches!(report, Report::Adopted { .. })), "{:?}", rig.reports);
    rig.write(0, 4096);
    assert_eq!(rig.take(Kind::Write).len(), 1);
}

#[test]
fn what_comes_for_a_device_that_is_not_ours_is_refused() {
    let mut rig = Rig::new(3, &map(3, 2, 1));
    rig.frame(1, forwarded(Kind::ForwardZero, 1, 0), trailer(1, 7, 1));
    rig.frame(1, Header { kind: Kind::Zero, ..forwarded(Kind::Zero, 1, 0) }, None);
    let statuses: Vec<Status> =
        rig.sent.iter().filter(|sent| sent.to == 1).map(|sent| Status::parse(sent.header.flags)).collect();
    assert_eq!(statuses, [Status::Fenced; 2]);
}

#[test]
fn a_discard_that_covers_no_region_ends_its_session() {
    for kind in [Kind::ForwardDiscard, Kind::Discard] {
        let (me, peer) = if kind == Kind::Discard { (2, 1) } else { (1, 2) };
        let mut rig = Rig::new(me, &map(2, 2, 2));
        let trailer = (kind == Kind::ForwardDiscard).then(|| trailer(1, 7, 2)).flatten();
        rig.frame(peer, Header { length: 512, ..forwarded(kind, 1, 512) }, trailer);
        assert_eq!(rig.closed, [peer]);
    }
}

/// After a failed flush nobody knows what a disk holds: neither a repair nor a comparison may take it.
#[test]
fn a_failed_disk_is_not_read_for_its_primary() {
    for kind in [Kind::Fetch, Kind::Compare] {
        let mut rig = Rig::new(2, &map(2, 2, 1));
        rig.frame(1, forwarded(Kind::Write, 1, 0), None);
        rig.fail_flush = true;
        rig.frame(1, Header { device: 1, ..Header::new(Kind::Flush) }, None);
        rig.sent.clear();
        rig.frame(1, forwarded(kind, 1, 0), None);
        let answers: Vec<Status> = rig.sent.iter().map(|sent| Status::parse(sent.header.flags)).collect();
        assert_eq!(answers, [Status::DiskFailed], "{kind:?}");
    }
}

#[test]
fn an_answer_of_another_kind_ends_the_session_and_the_write_goes_on_in_the_next() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    let write = rig.write(0, 4096);
    let leg = rig.take(Kind::Write);
    rig.answer(&leg[0], Kind::Masks, Status::Done);
    assert_eq!(rig.closed, [2]);
    rig.open(2, first.version);
    let again = rig.take(Kind::Write);
    assert_eq!(again.len(), 1, "nobody has it");
    rig.ack(&again[0]);
    assert_eq!(rig.result(write), Some(Ok(())));
}

#[test]
fn nothing_is_called_empty_under_a_lease_that_ran_out_unnoticed() {
    let mut rig = Rig::new(1, &map(2, 2, 1));
    let mut data = |now| rig.engine.extents(now, DEVICE, 0, 4096).any(|extent| extent.data);
    let now = 2_000_000_000;
    assert!(!data(now), "nothing was ever written");
    // It slept: no tick came in between.
    assert!(data(now + super::session::LEASE + 1));
}

#[test]
fn a_read_of_what_no_copy_can_read_fails_though_the_copies_were_not_compared() {
    let first = map(2, 2, 2);
    let mut rig = Rig::new(2, &first);
    let write = Header {
        slice_epoch: first.devices[0].spans[0].epoch,
        device: DEVICE.0,
        length: 4096,
        ..Header::new(Kind::Write)
    };
    rig.frame(1, write, None);
    // It takes over from a primary that stays a member, and may have written more than what came here.
    rig.hold = true;
    rig.adopt(&next(&first, |span| span.replicas.swap(0, 1)));
    rig.adopted(1, 2);
    rig.wait(300, &[1]);
    let read = rig.request(RequestKind::Read, 0, 4096);
    assert_eq!(rig.result(read), None, "it may differ");
    rig.complete_io(Err("medium error".into()));
    let fetch = rig.take(Kind::Fetch);
    assert_eq!(fetch.len(), 1, "the other member is asked");
    rig.answer(&fetch[0], Kind::Ack, Status::DiskFailed);
    assert_eq!(rig.result(read), Some(Err(RequestError::Io)));
}

/// What was asked for arrives after the disk's tables cannot be written any more: the repair must not keep its range, which
/// another disk of this node may need for the next copy.
#[test]
fn a_repair_whose_data_comes_after_its_disk_failed_ends() {
    let first = map(2, 2, 1);
    let mut rig = Rig::new(1, &first);
    rig.write_to_both(4096, 4096);
    rig.hold = true;
    // Half of what is read was never written: repairing it needs an intent.
    rig.request(RequestKind::Read, 0, 8192);
    rig.complete_io(Err("medium error".into()));
    let fetch = rig.take(Kind::Fetch);
    assert_eq!(fetch.len(), 1);
    rig.fail_metadata = true;
    rig.write(65_536, 4096);
    assert!(
        rig.reports.iter().any(|report| matches!(report, Report::DiskFailed { .. })),
        "{:?}",
        rig.reports
    );
    rig.give(&fetch[0], 8192, BUFFER);
    for leg in rig.take(Kind::Write) {
        rig.ack(&leg);
    }
    rig.adopt(&next(&first, promote_second));
    rig.adopted(2, 2);
    assert!(rig.released.contains(&BUFFER), "{:?}", rig.released);
    assert!(rig.engine.ops.is_empty(), "{} operations are left", rig.engine.ops.len());
}

/// What an earlier primary began on a copy goes on there, and may not be in its masks yet: the new primary has to
/// hear of it, or the copies differ for as long as nobody asks.
#[test]
fn what_an_earlier_primary_has_under_way_here_may_differ() {
    let first = map(3, 3, 1);
    let mut rig = Rig::on(3, &first, false);
    rig.hold = true;
    rig.frame(1, forwarded(Kind::Write, 1, 4096), None);
    assert_eq!(rig.held.len(), 1, "its region is being zeroed");
    let second = next(&first, |span| span.replicas.swap(0, 1));
    rig.adopt(&second);
    rig.adopted(2, 2);
    let unite =
        Header { device: DEVICE.0, slice_epoch: SliceEpoch(2), sequence: 9, ..Header::new(Kind::Unite) };
    rig.frame_with(2, unite, &0u64.to_le_bytes());
    let masks = rig.take(Kind::Masks);
    let word = |at: usize| u64::from_le_bytes(masks[0].body[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8)), (0b10, 0b10), "dirty and readable: {masks:?}");
}
