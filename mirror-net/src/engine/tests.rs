//! What one engine does, seen from outside.

use super::action::{Report, RequestError};
use super::testing::{Rig, claimed, map, next};
use crate::map::ReplicaState;
use crate::wire::header::{Header, Kind, Status, Trailer};

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
