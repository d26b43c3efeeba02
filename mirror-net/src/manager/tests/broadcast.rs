//! Every slice is counted once, whoever is asked in the end.

use super::bench::{Bench, incarnation, map_of};
use crate::control::{
    BroadcastKind, BroadcastStatus, ContentSum, ManagerMessage, NodeMessage, OperatorReply, SurveyAnswer,
    SurveyResult, SurveyRun,
};
use crate::format::alloc::Segment;
use crate::manager::{ConnectionId, Input, Ticket};

const ORDER: u64 = 77;

impl Bench {
    fn broadcast(&mut self, begins: bool) -> BroadcastStatus {
        let kind = BroadcastKind::Checksum;
        self.input(Input::Broadcast { ticket: Ticket(9), kind, id: ORDER, begins });
        match self.replies.pop() {
            Some((Ticket(9), OperatorReply::Broadcast(status))) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// What nodes were asked since the last call.
    fn orders(&mut self) -> Vec<(ConnectionId, Vec<SurveyRun>)> {
        let sent = std::mem::take(&mut self.sent);
        let order = |(connection, message)| match message {
            ManagerMessage::Survey { order: ORDER, kind: BroadcastKind::Checksum, runs } => {
                Some((connection, runs))
            }
            _ => None,
        };
        sent.into_iter().filter_map(order).collect()
    }

    fn answer(&mut self, connection: ConnectionId, run: SurveyRun, result: SurveyResult) {
        let answers = vec![SurveyAnswer { run, result }];
        let message = NodeMessage::Surveyed { order: ORDER, answers };
        self.input(Input::Message { connection, message });
    }

    fn pass_ms(&mut self, ms: u64) {
        self.now_ms += ms;
        self.input(Input::Tick);
    }
}

/// An answer for whole slices, each with the sum 1.
fn counted(run: SurveyRun, segment: Segment) -> SurveyResult {
    let sum = ContentSum(run.count.into());
    SurveyResult::Answered { segment, bytes: 0, sum }
}

#[test]
fn each_primary_answers_once_and_the_parts_add_up() {
    let mut bench = Bench::up(&map_of(2));
    let slices: u64 = bench.map().devices.iter().map(|device| u64::from(device.slices)).sum();
    let begun = bench.broadcast(true);
    assert_eq!((begun.slices, begun.answered, begun.done), (slices, 0, false));
    for (connection, runs) in bench.orders() {
        for run in runs {
            // In two parts, and each told twice.
            let head = SurveyRun { count: 1, ..run };
            let rest = SurveyRun { first: run.first + 1, count: run.count - 1, ..run };
            for part in [head, rest, head, rest] {
                bench.answer(connection, part, counted(part, Segment::Primary));
            }
        }
    }
    let done = bench.broadcast(false);
    assert!(done.done && done.unserved.is_empty());
    assert_eq!(done.rows.len(), bench.map().devices.len());
    assert_eq!(done.rows.iter().map(|row| row.slices).sum::<u64>(), slices);
    assert!(done.rows.iter().all(|row| row.sum == ContentSum(row.slices.into())));
    // It was told, and is forgotten.
    let kind = BroadcastKind::Checksum;
    bench.input(Input::Broadcast { ticket: Ticket(9), kind, id: ORDER, begins: false });
    assert!(matches!(bench.replies.pop(), Some((_, OperatorReply::Refused { .. }))));
}

#[test]
fn after_a_failover_the_new_primary_is_asked_for_what_is_left_and_the_old_is_not_heard() {
    let mut bench = Bench::up(&map_of(2));
    bench.broadcast(true);
    let [n1, n2] = ["n1", "n2"].map(|name| bench.connections[name]);
    let orders = bench.orders();
    let of = |connection| orders.iter().find(|(other, _)| *other == connection).unwrap().1.clone();
    let device = bench.map().device_named("n1-d1").unwrap().id;
    let run = *of(n1).iter().find(|run| run.device == device).unwrap();
    let head = SurveyRun { count: 2, ..run };
    bench.answer(n1, head, counted(head, Segment::Primary));
    for run in of(n2) {
        bench.answer(n2, run, counted(run, Segment::Primary));
    }

    bench.pass_ms(100);
    bench.input(Input::Failover { ticket: Ticket(3), node: "n1".into() });
    assert!(bench.map().device(device).unwrap().spans[0].epoch > run.epoch);
    let orders = bench.orders();
    let [(asked, runs)] = &orders[..] else { panic!("{orders:?}") };
    assert_eq!((*asked, runs.len()), (n2, 1));
    let left = runs[0];
    assert_eq!((left.first, left.count, left.epoch > run.epoch), (2, run.count - 2, true));
    // The old primary was nearly done.
    let late = SurveyRun { first: 2, count: run.count - 2, ..run };
    bench.answer(n1, late, counted(late, Segment::Primary));
    assert!(!bench.broadcast(false).done);
    // The new one has not heard of its role, and is asked again.
    bench.answer(n2, left, SurveyResult::Refused);
    assert!(bench.orders().is_empty());
    bench.pass_ms(300);
    assert_eq!(bench.orders(), [(n2, vec![left])]);
    bench.answer(n2, left, counted(left, Segment::Secondary));

    // What was not failed over is answered by the one that still has it.
    for run in of(n1).into_iter().filter(|run| run.device != device) {
        bench.answer(n1, run, counted(run, Segment::Unmirrored));
    }
    let done = bench.broadcast(false);
    assert!(done.done && done.unserved.is_empty(), "{done:?}");
    let rows: Vec<_> = done.rows.iter().filter(|row| row.device == "n1-d1").collect();
    let told: Vec<_> = rows.iter().map(|row| (row.node.as_str(), row.segment, row.slices)).collect();
    let rest = u64::from(run.count - 2);
    assert_eq!(told, [("n1", Segment::Primary, 2), ("n2", Segment::Secondary, rest)]);
}

#[test]
fn what_nobody_serves_is_named() {
    let mut bench = Bench::up(&map_of(2));
    bench.broadcast(true);
    let [n1, n2] = ["n1", "n2"].map(|name| bench.connections[name]);
    let orders = bench.orders();
    for (connection, runs) in orders.clone() {
        for run in runs.into_iter().filter(|_| connection == n2) {
            bench.answer(n2, run, counted(run, Segment::Primary));
        }
    }
    bench.input(Input::Disconnected { connection: n1 });
    bench.pass_ms(3_000);
    assert!(!bench.broadcast(false).done, "it may be back, or be failed over");
    // Back for a moment: asked again, and it refuses again and again.
    let n1 = bench.register(1, incarnation(1));
    bench.pass_ms(100);
    let [(_, runs)] = &bench.orders()[..] else { panic!() };
    let (refused, broken) = (runs[0], runs[1]);
    bench.answer(n1, broken, SurveyResult::Failed { why: "no medium".into() });
    for _ in 0..20 {
        bench.answer(n1, refused, SurveyResult::Refused);
        let report = NodeMessage::Report(Default::default());
        bench.input(Input::Message { connection: n1, message: report });
        bench.pass_ms(300);
    }
    let done = bench.broadcast(false);
    assert!(done.done);
    let whys: Vec<&str> = done.unserved.iter().map(|unserved| unserved.why.as_str()).collect();
    assert_eq!(whys.len(), 2, "{done:?}");
    assert!(whys.iter().any(|why| why.starts_with("it does not serve them now")), "{whys:?}");
    assert!(whys.contains(&"no medium"), "{whys:?}");
    assert!(done.unserved.iter().all(|unserved| unserved.node == "n1"));

    bench.broadcast(true);
    bench.input(Input::Disconnected { connection: n1 });
    bench.pass_ms(5_000);
    let whys: Vec<String> =
        bench.broadcast(false).unserved.into_iter().map(|unserved| unserved.why).collect();
    assert!(!whys.is_empty() && whys.iter().all(|why| why == "it is not connected"), "{whys:?}");
}
