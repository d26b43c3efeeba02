//! The planner at the size that it is made for. It prints what it took; nothing is asserted about time.

use mirror_net::ids::{AttachId, ClusterId, DiskId, Incarnation, PlanId, ProcessId};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
use mirror_net::map::plan::Plan;
use mirror_net::map::verbs::Verb;
use mirror_net::map::wanted::Wish;
use mirror_net::map::{DistributionMap, SegmentSlots};
use std::collections::BTreeSet;
use std::time::Instant;

/// 20 TB in slices of 1 GiB are some 18,600; what is missing here is free.
const SLOTS: SegmentSlots = SegmentSlots { primary: 8_000, secondary: 8_000, unmirrored: 0 };

fn cluster(nodes: u16, disks: u16) -> DistributionMap {
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let mut incarnation = || {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Incarnation { attach: AttachId(number), process: ProcessId(number.rotate_left(17)) }
    };
    let node = |index: u16| NodeSpec {
        name: format!("node-{index:04}"),
        address: format!("10.0.{}.{}:7301", index / 250, index % 250),
        power: None,
        switch: None,
        spare: false,
        disks: (1..=disks)
            .map(|disk| DiskSpec {
                name: format!("d{disk}"),
                slots: SLOTS,
                block_bytes: 4096,
                incarnation: incarnation(),
            })
            .collect(),
    };
    let nodes: Vec<NodeSpec> = (1..=nodes).map(node).collect();
    let mut map = pairs(ClusterId::default(), "large", 1 << 30, &nodes).unwrap();
    // A layout fills what there is; this is the eighth that is free.
    for disk in &mut map.disks {
        disk.slots.primary += 1_300;
        disk.slots.secondary += 1_300;
    }
    map
}

#[test]
#[ignore = "a measurement: cargo test --release -p mirror-tests --test planner_scale -- --ignored --nocapture"]
fn a_thousand_nodes_lose_one() {
    let map = cluster(1_000, 12);
    let emptied: BTreeSet<DiskId> = map.disks[..12].iter().map(|disk| disk.id).collect();
    let takers = map.disks[12..].iter().map(|disk| disk.id).collect();
    let wish = Wish { emptied, takers, ..Wish::default() };
    let begun = Instant::now();
    let wanted = map.wanted(&wish).unwrap();
    let planned = begun.elapsed();
    let json = |map: &DistributionMap| serde_json::to_vec(map).unwrap().len();
    let plan = Plan::new(PlanId(2), "a node died".into(), wanted.moves.clone());
    let begun_map = map.apply(&[Verb::BeginPlan { plan: plan.clone() }]).unwrap().unwrap();
    let begun = Instant::now();
    let outlook = begun_map.outlook(&plan);
    let looked = begun.elapsed();
    let adds: Vec<Verb> = outlook
        .begin
        .iter()
        .map(|add| Verb::AddReplica {
            run: add.run,
            disk: add.disk,
            segment: add.segment,
            incarnation: map.devices[0].spans[0].replicas[0].incarnation,
        })
        .collect();
    let begun = Instant::now();
    let copying = begun_map.apply(&adds).unwrap().unwrap();
    println!(
        "planned in {planned:?}: {} moves of {} slices (at least {}); looked at in {looked:?}; begun in {:?}; JSON: {} \
         bytes before, {} with the plan, {} while all is copied",
        wanted.moves.len(),
        wanted.copied,
        wanted.copied_min,
        begun.elapsed(),
        json(&map),
        json(&begun_map),
        json(&copying)
    );
    assert_eq!((wanted.copied, wanted.copied_min), (12 * 16_000, 12 * 16_000));
}
