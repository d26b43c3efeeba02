//! Requests that cannot be served: no copy may, or not all that count can take a write.
//!
//! They wait, and `status` says for what, unless the device is set to fail instead (`on_no_quorum`): then each end
//! gives up by its own clock. An exporter gives up what it holds, a primary what it was asked for. What is under way
//! on a disk or a lane is in use and is waited for first.
//!
//! A write that failed so may have reached some copies. They are not read before they are equal again: what a copy
//! that counts does not have is noted when the operation ends (`behind`), as with every other.

use super::action::{FlushKey, OpKey};
use super::exporter::{ExportFlushKey, PartKey};
use super::flush::{Flush, FlushOrigin};
use super::op::{Local, Op, OpKind, Origin, Part};
use super::{Engine, Nanos};
use crate::wire::header::Status;

impl Engine {
    /// Time passed.
    pub(super) fn tick_quorum(&mut self) {
        if !self.devices.iter().any(|device| device.view.fails) {
            return;
        }
        let parts: Vec<PartKey> = self.overdue_parts().collect();
        let export_flushes: Vec<ExportFlushKey> = self.overdue_export_flushes().collect();
        let flushes: Vec<FlushKey> = self.overdue_flushes().collect();
        let ops: Vec<OpKey> = self
            .ops
            .iter()
            .filter(|(_, op)| {
                let asked =
                    op.part == Part::Primary && matches!(op.origin, Origin::Part(_) | Origin::Peer(_));
                asked && op.doomed.is_none() && self.is_overdue(op.device, op.since)
            })
            .map(|(key, _)| key)
            .collect();
        parts.into_iter().for_each(|key| self.give_up_part(key));
        export_flushes.into_iter().for_each(|key| self.give_up_export_flush(key));
        flushes.into_iter().for_each(|key| self.give_up_flush(key));
        ops.into_iter().for_each(|key| self.doom(key, Status::NoQuorum));
    }

    /// Whether something of that device that waits since then is to be given up.
    pub(super) fn is_overdue(&self, device: usize, since: Nanos) -> bool {
        let since = since.max(self.woken);
        self.devices[device].view.fails && since + self.no_quorum_after <= self.now
    }

    /// How an operation that may go no further ends: what was given up and is done nevertheless, is done.
    pub(super) fn doomed_end(&self, op: &Op, status: Status) -> Status {
        let done = status == Status::NoQuorum
            && op.local == Local::Done
            && match op.kind {
                OpKind::Read => self.may_read(op) && !self.may_move_op(op),
                _ => op.legs.all_acknowledged(),
            };
        if done { Status::Done } else { status }
    }

    /// Flushes that another node's exporter asked for and that wait for a copy, or for the role to move.
    fn overdue_flushes(&self) -> impl Iterator<Item = FlushKey> {
        let overdue = |flush: &Flush| {
            matches!(flush.origin, FlushOrigin::Exporter(..))
                && flush.waits()
                && self.is_overdue(flush.device, flush.since)
        };
        self.flushes.iter().filter(move |(_, flush)| overdue(flush)).map(|(key, _)| key)
    }

    fn give_up_flush(&mut self, key: FlushKey) {
        if let Some(flush) = self.flushes.remove(key) {
            self.end_flush(&flush, Status::NoQuorum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::action::{RequestError, RequestKind};
    use super::super::testing::{DEVICE, Rig, map, next};
    use crate::ids::SliceEpoch;
    use crate::map::{DistributionMap, OnNoQuorum, ReplicaState};
    use crate::wire::header::{Header, Kind, Status, Trailer};

    fn failing(nodes: u16, exporter: u16) -> DistributionMap {
        let mut map = map(nodes, 2, exporter);
        map.devices[0].on_no_quorum = OnNoQuorum::Error;
        map
    }

    const AFTER_MS: u64 = 10_100;

    /// What node 3 says with what it forwards.
    const TRAILER: Trailer = Trailer { claim: 1, exporter_session: 1, exporter_sequence: 1, origin: 3 };

    #[test]
    fn what_cannot_be_served_fails_where_it_is_to_and_waits_otherwise() {
        for fails in [false, true] {
            let map = if fails { failing(2, 1) } else { map(2, 2, 1) };
            let mut rig = Rig::new(1, &map);
            rig.lane_down(2);
            // No lease is left.
            rig.wait(1_200, &[]);
            let tokens = [rig.write(0, 4096), rig.request(RequestKind::Read, 65536, 4096), rig.flush()];
            rig.wait(AFTER_MS - 1_000, &[]);
            assert!(tokens.iter().all(|token| rig.result(*token).is_none()));
            rig.wait(1_200, &[]);
            let expected = fails.then_some(Err(RequestError::NoQuorum));
            assert!(tokens.iter().all(|token| rig.result(*token) == expected), "{:?}", rig.done);
        }
    }

    #[test]
    fn a_write_that_was_given_up_is_not_read_before_the_copies_are_equal() {
        let first = failing(2, 1);
        let mut rig = Rig::new(1, &first);
        rig.lane_down(2);
        let write = rig.write(0, 4096);
        rig.wait(AFTER_MS, &[]);
        assert_eq!(rig.result(write), Some(Err(RequestError::NoQuorum)));
        // The other copy comes back as it was.
        rig.open(2, first.version);
        let read = rig.request(RequestKind::Read, 0, 4096);
        assert_eq!(rig.result(read), None, "it has not been compared");
        let differing = rig.engine.devices[0].slices[0].behind.iter().map(|behind| behind.may_differ());
        assert_eq!(differing.collect::<Vec<_>>(), [1]);
        // Or the map goes on without it.
        rig.lane_down(2);
        rig.adopt(&next(&first, |span| span.replicas[1].state = ReplicaState::Stale));
        assert_eq!(rig.result(read), Some(Ok(())));
    }

    #[test]
    fn one_that_reached_the_others_only_is_noted_as_well() {
        let mut rig = Rig::new(1, &failing(2, 1));
        rig.hold = true;
        let write = rig.write(0, 4096);
        let leg = rig.take(Kind::Write);
        rig.ack(&leg[0]);
        rig.wait(AFTER_MS, &[2]);
        assert_eq!(rig.result(write), None, "its buffer is in use");
        rig.complete_io(Err("broken".into()));
        assert_eq!(rig.result(write), Some(Err(RequestError::NoQuorum)));
        let behind = &rig.engine.devices[0].slices[0].behind;
        assert_eq!(behind.iter().map(|behind| behind.may_differ()).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn an_exporter_on_another_node_is_told() {
        let mut rig = Rig::new(1, &failing(3, 3));
        rig.lane_down(2);
        let write = Header {
            slice_epoch: SliceEpoch(1),
            device: DEVICE.0,
            length: 4096,
            ..Header::new(Kind::ForwardWrite)
        };
        rig.frame(3, write, Some(TRAILER));
        rig.wait(AFTER_MS, &[3]);
        let replies = rig.take(Kind::Reply);
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].header.flags, Status::NoQuorum as u8);
        // And gives up by itself what it cannot even send.
        let mut rig = Rig::new(3, &failing(3, 3));
        rig.lane_down(1);
        let token = rig.write(0, 4096);
        rig.wait(AFTER_MS, &[]);
        assert_eq!(rig.result(token), Some(Err(RequestError::NoQuorum)));
    }

    /// The exporter does not hear of the map that its primary acts on.
    #[test]
    fn what_is_refused_again_and_again_is_given_up() {
        let mut rig = Rig::new(3, &failing(3, 3));
        let token = rig.write(0, 4096);
        for _ in 0..AFTER_MS / 50 {
            for sent in rig.take(Kind::ForwardWrite) {
                rig.answer(&sent, Kind::Reply, Status::Fenced);
            }
            rig.wait(50, &[1, 2]);
        }
        assert_eq!(rig.result(token), Some(Err(RequestError::NoQuorum)));
    }

    #[test]
    fn what_is_slow_is_not_given_up_when_it_is_done() {
        let mut rig = Rig::new(1, &failing(2, 1));
        rig.hold = true;
        let write = rig.write(0, 4096);
        let leg = rig.take(Kind::Write);
        rig.ack(&leg[0]);
        rig.wait(AFTER_MS, &[2]);
        rig.complete_io(Ok(()));
        assert_eq!(rig.result(write), Some(Ok(())));
    }

    #[test]
    fn a_process_that_was_stopped_gives_nothing_up_at_once() {
        let mut rig = Rig::new(1, &failing(2, 1));
        rig.lane_down(2);
        let write = rig.write(0, 4096);
        rig.now += 20_000_000_000;
        rig.tick();
        rig.wait(AFTER_MS - 1_000, &[]);
        assert_eq!(rig.result(write), None);
        rig.wait(1_200, &[]);
        assert_eq!(rig.result(write), Some(Err(RequestError::NoQuorum)));
    }

    #[test]
    fn a_flush_is_given_up_where_a_copy_is_missing_only() {
        let flush = Header { device: DEVICE.0, ..Header::new(Kind::ForwardFlush) };
        for missing in [true, false] {
            let mut rig = Rig::new(1, &failing(3, 3));
            if missing {
                rig.lane_down(2);
            }
            rig.frame(3, flush, Some(TRAILER));
            let peers: &[u16] = if missing { &[3] } else { &[2, 3] };
            rig.wait(AFTER_MS, peers);
            let replies: Vec<u8> = rig.take(Kind::Reply).iter().map(|sent| sent.header.flags).collect();
            let expected: &[u8] = if missing { &[Status::NoQuorum as u8] } else { &[] };
            assert_eq!(replies, expected);
            assert_eq!(rig.engine.flushes.len(), usize::from(!missing));
        }
        // Of this node's own, nothing is left either.
        let mut rig = Rig::new(1, &failing(2, 1));
        rig.lane_down(2);
        let token = rig.flush();
        rig.wait(AFTER_MS, &[]);
        assert_eq!(rig.result(token), Some(Err(RequestError::NoQuorum)));
        assert_eq!(rig.engine.flushes.len(), 0);
    }

    /// The manager could move the role to no other copy: the one there is lags behind.
    #[test]
    fn a_flush_of_a_failed_disk_is_given_up_where_no_copy_takes_over() {
        let syncing = |map| next(&map, |span| span.replicas[1].state = ReplicaState::Syncing);
        let mut rig = Rig::new(1, &syncing(failing(2, 1)));
        rig.lane_down(2);
        rig.fail_flush = true;
        let token = rig.flush();
        rig.wait(AFTER_MS - 1_000, &[]);
        assert_eq!(rig.result(token), None, "another copy might take over");
        rig.wait(2_000, &[]);
        assert_eq!(rig.result(token), Some(Err(RequestError::NoQuorum)));
        // For an exporter on another node, too.
        let mut rig = Rig::new(1, &syncing(failing(3, 3)));
        rig.lane_down(2);
        rig.fail_flush = true;
        rig.frame(3, Header { device: DEVICE.0, ..Header::new(Kind::ForwardFlush) }, Some(TRAILER));
        rig.wait(AFTER_MS, &[3]);
        let replies: Vec<u8> = rig.take(Kind::Reply).iter().map(|sent| sent.header.flags).collect();
        assert_eq!(replies, [Status::NoQuorum as u8]);
        assert_eq!(rig.engine.flushes.len(), 0);
    }
}
