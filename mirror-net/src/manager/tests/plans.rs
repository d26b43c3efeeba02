use super::bench::incarnation;
use super::{Bench, map_of};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, PlanId};
use crate::manager::run_of;
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Verb;

/// Somebody dropped the copy that had taken the place already: the plan has nothing left to do there.
#[test]
fn a_move_whose_old_and_new_copy_are_both_gone_is_over() {
    let map = map_of(4);
    let device = map.device_named("n1-d1").unwrap();
    let [from, to] = [DiskId(3), DiskId(4)];
    assert!([from, to].iter().all(|disk| device.spans[0].replica_on(*disk).is_none()));
    let step = Move {
        run: run_of(device.id, &device.spans[0]),
        from: Some(from),
        to,
        segment: Segment::Secondary,
        primary: false,
    };
    let plan = Plan::new(PlanId(2), "n3 is away".into(), vec![step]);
    let map = map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap();
    let mut bench = Bench::new(Some(map));
    for node in 1..=4 {
        bench.register(node, incarnation(node));
    }
    bench.pass(1_000);
    assert!(bench.map().plans.is_empty(), "{:?}", bench.map().plans);
}
