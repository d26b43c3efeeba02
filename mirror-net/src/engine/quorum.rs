//! Requests that cannot be served: no copy may, or not all that count can take a write.
//!
//! They wait, and `status` says for what, unless the device is set to fail instead (`on_no_quorum`): then each end
//! gives up by its own clock. An exporter gives up what it holds, a primary what it was asked for. What is under way
//! on a disk or a lane is in use and is waited for first.
//!
//! A write that failed so may have reached some copies. They are not read before they are equal again: what a copy
//! that counts does not have is noted when the operation ends (`behind`), as with every other.

use super::action::OpKey;
use super::exporter::{ExportFlushKey, PartKey};
use super::op::{Origin, Part};
use super::{Engine, Nanos};
use crate::wire::header::Status;

impl Engine {
    /// Time passed.
    pub(super) fn tick_quorum(&mut self) {
        if !self.devices.iter().any(|device| device.view.fails) {
            return;
        }
        let overdue = |since: Nanos| since + self.no_quorum_after <= self.now;
        let parts: Vec<PartKey> = self.overdue_parts(overdue).collect();
        let flushes: Vec<ExportFlushKey> = self.overdue_flushes(overdue).collect();
        let ops: Vec<OpKey> = self
            .ops
            .iter()
            .filter(|(_, op)| {
                let asked =
                    op.part == Part::Primary && matches!(op.origin, Origin::Part(_) | Origin::Peer(_));
                asked && op.doomed.is_none() && self.devices[op.device].view.fails && overdue(op.since)
            })
            .map(|(key, _)| key)
            .collect();
        for key in parts {
            self.give_up_part(key);
        }
        for key in flushes {
            self.give_up_flush(key);
        }
        for key in ops {
            self.doom(key, Status::NoQuorum);
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
        let trailer = Trailer { claim: 1, exporter_session: 1, exporter_sequence: 1, origin: 3 };
        rig.frame(3, write, Some(trailer));
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
}
