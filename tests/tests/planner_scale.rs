//! The planner at the size that it is made for. It prints what it took; nothing is asserted about time.

use mirror_net::config::Policy;
use mirror_net::control::{
    DiskContent, DiskInventory, OperatorReply, Redistribution, RedistributionOrder, Registration,
};
use mirror_net::engine::action::Action;
use mirror_net::engine::{Engine, LocalDisk, Me};
use mirror_net::format::alloc::Allocator;
use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::{Geometry, PlanStep, SlotOrder, ZoneProfile, open};
use mirror_net::ids::{AttachId, ClusterId, DiskId, Incarnation, MapVersion, PlanId, ProcessId};
use mirror_net::manager::{ConnectionId, Input, Manager, Output, Ticket};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
use mirror_net::map::plan::Plan;
use mirror_net::map::verbs::Verb;
use mirror_net::map::wanted::{Wanted, Wish};
use mirror_net::map::{DevicePolicy, Disk, DistributionMap, SegmentSlots};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// 20 TB in slices of 1 GiB are some 18,600; what is missing here is free.
const SLOTS: SegmentSlots = SegmentSlots { primary: 8_000, secondary: 8_000, unmirrored: 0 };

/// One of a node's, and as long as it is in truth.
fn process_of(node: u16) -> ProcessId {
    ProcessId(u64::from(node).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn cluster(nodes: u16, disks: u16) -> DistributionMap {
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let mut incarnation = |node: u16| {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Incarnation { attach: AttachId(number), process: process_of(node) }
    };
    let node = |index: u16| NodeSpec {
        name: format!("node-{index:04}"),
        address: format!("10.0.{}.{}:7301", index / 250, index % 250),
        power: None,
        switch: None,
        spare: false,
        devices: DevicePolicy::default(),
        disks: (1..=disks)
            .map(|disk| DiskSpec {
                name: format!("d{disk}"),
                slots: SLOTS,
                block_bytes: 4096,
                incarnation: incarnation(index),
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

/// As what each disk holds its copies.
fn incarnations(map: &DistributionMap) -> HashMap<DiskId, Incarnation> {
    let spans = map.devices.iter().flat_map(|device| &device.spans);
    spans.flat_map(|span| &span.replicas).map(|copy| (copy.disk, copy.incarnation)).collect()
}

/// The plan that empties the first node's disks.
fn first_node_emptied(map: &DistributionMap) -> (Wanted, Plan) {
    let emptied: BTreeSet<DiskId> = map.disks[..12].iter().map(|disk| disk.id).collect();
    let takers = map.disks[12..].iter().map(|disk| disk.id).collect();
    let wanted = map.wanted(&Wish { emptied, takers, ..Wish::default() }).unwrap();
    let plan = Plan::new(PlanId(2), "a node died".into(), wanted.moves.clone());
    (wanted, plan)
}

#[test]
#[ignore = "a measurement: cargo test --release -p mirror-tests --test planner_scale -- --ignored --nocapture"]
fn a_thousand_nodes_lose_one() {
    let map = cluster(1_000, 12);
    let begun = Instant::now();
    let (wanted, plan) = first_node_emptied(&map);
    let planned = begun.elapsed();
    let json = |map: &DistributionMap| serde_json::to_vec(map).unwrap().len();
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

/// Feeds a manager, stores what it wants stored; how long it took it, and what it answered. Nodes get no session, so
/// nobody is sent a map, which is another matter.
fn feed(manager: &mut Manager, now_ms: u64, input: Input) -> (Duration, Vec<OperatorReply>) {
    let begun = Instant::now();
    let (mut replies, mut inputs) = (Vec::new(), vec![input]);
    while let Some(input) = inputs.pop() {
        manager.handle(now_ms, input);
        while let Some(output) = manager.poll() {
            match output {
                Output::Store(proposal) => inputs.push(Input::Stored { version: proposal.next.version }),
                Output::Reply { reply, .. } => replies.push(reply),
                _ => {}
            }
        }
    }
    (begun.elapsed(), replies)
}

/// The same as the manager does it: decided, begun and looked at again.
#[test]
#[ignore = "a measurement: cargo test --release -p mirror-tests --test planner_scale -- --ignored --nocapture"]
fn a_manager_of_a_thousand_nodes_empties_one() {
    let map = cluster(1_000, 12);
    let mut manager = Manager::new(
        Some(map.clone()),
        Policy { auto_failover: true, auto_spare: true, ..Policy::default() },
    );
    let now_ms = 1_000_000;
    let incarnations = incarnations(&map);
    for node in &map.nodes {
        let disks = map.disks.iter().filter(|disk| disk.node == node.id).map(|disk| DiskInventory {
            name: disk.name.clone(),
            path: String::new(),
            bytes: 0,
            block_bytes: 4096,
            attach: incarnations[&disk.id].attach,
            content: DiskContent::Ours { cluster: map.cluster, disk: disk.id },
        });
        let registration = Registration {
            node: node.name.clone(),
            process: process_of(node.id.0),
            adopted: MapVersion(1),
            address: String::new(),
            disks: disks.collect(),
            lives: Vec::new(),
        };
        let connection = ConnectionId(node.id.0.into());
        feed(&mut manager, now_ms, Input::Register { connection, cluster: Some(map.cluster), registration });
    }
    let (idle, _) = feed(&mut manager, now_ms, Input::Tick);
    let wish = Redistribution::Spare { emptied: "node-0001".into(), onto: Vec::new() };
    let order = RedistributionOrder { wish, carry_out: true };
    let (decided, replies) = feed(&mut manager, now_ms, Input::Redistribute { ticket: Ticket(1), order });
    assert!(matches!(replies[..], [OperatorReply::Done { .. }]), "{replies:?}");
    let (begun, _) = feed(&mut manager, now_ms, Input::Tick);
    let (looked, _) = feed(&mut manager, now_ms, Input::Tick);
    println!(
        "a look without a plan {idle:?}; decided and begun in {decided:?}, looked at in {begun:?}, {looked:?}"
    );
}

/// A disk of 20 TB, as its node opens it.
fn formatted(disk: &Disk, attach: AttachId) -> LocalDisk {
    const BYTES: u64 = 20_000_000_000_000;
    const BLOCK: usize = 4096;
    let geometry = Geometry::new(BYTES, 1 << 30, BLOCK as u32).unwrap();
    let options = FormatOptions {
        cluster: ClusterId::default(),
        disk: disk.id,
        node: disk.node,
        format: Default::default(),
        node_name: "n".into(),
        disk_name: disk.name.clone(),
        segments: SegmentSlots { unmirrored: geometry.slots - 2 * 9_300, primary: 9_300, secondary: 9_300 },
        geometry,
        slot_order: SlotOrder::Address,
        zone_profile: ZoneProfile::default(),
        known_zero: true,
    };
    // What is not there is zero.
    let mut blocks: HashMap<u64, Vec<u8>> = HashMap::new();
    for step in format(options).unwrap().1 {
        if let PlanStep::Write { offset, .. } = &step {
            for (index, block) in step.bytes().chunks(BLOCK).enumerate() {
                blocks.insert(offset + (index * BLOCK) as u64, block.to_vec());
            }
        }
    }
    let mut read = |offset: u64, buffer: &mut [u8]| {
        for (index, block) in buffer.chunks_mut(BLOCK).enumerate() {
            match blocks.get(&(offset + (index * BLOCK) as u64)) {
                Some(found) => block.copy_from_slice(&found[..block.len()]),
                None => block.fill(0),
            }
        }
        Ok(())
    };
    let opened = open(&mut read, BYTES).unwrap();
    let allocator = Allocator::new(&opened.superblock, Vec::new());
    LocalDisk { id: disk.id, attach, allocator, journal: opened.journal }
}

/// Has an engine adopt a map, on disks that do everything at once.
fn adopt(engine: &mut Engine, now: u64, map: &Arc<DistributionMap>) -> Duration {
    let begun = Instant::now();
    engine.handle_map(now, Arc::clone(map)).unwrap();
    while let Some(action) = engine.poll_action() {
        if let Action::Metadata { io, .. } | Action::Flush { io, .. } = action {
            engine.handle_io(now, io, Ok(()));
        }
    }
    assert_eq!(engine.adopted_version(), map.version);
    begun.elapsed()
}

/// What a change of the map costs a node that it gives something to.
#[test]
#[ignore = "a measurement: cargo test --release -p mirror-tests --test planner_scale -- --ignored --nocapture"]
fn a_node_of_a_thousand_applies_a_map() {
    let map = cluster(1_000, 12);
    let (_, plan) = first_node_emptied(&map);
    let planned = map.apply(&[Verb::BeginPlan { plan: plan.clone() }]).unwrap().unwrap();
    let incarnations = incarnations(&map);
    let begin = planned.outlook(&plan).begin;
    let adds: Vec<Verb> = begin
        .iter()
        .map(|add| {
            let incarnation = incarnations[&add.disk];
            Verb::AddReplica { run: add.run, disk: add.disk, segment: add.segment, incarnation }
        })
        .collect();
    let copying = planned.apply(&adds).unwrap().unwrap();
    let node = map.disks.iter().find(|disk| disk.id == begin[0].disk).unwrap().node;
    let disks = map.disks.iter().filter(|disk| disk.node == node);
    let disks = disks.map(|disk| formatted(disk, incarnations[&disk.id].attach)).collect();
    let me = Me { node, process: process_of(node.0) };
    let mut engine = Engine::new(me, 1 << 30, disks, 0);
    for (what, map) in [("the first", map), ("with a plan", planned), ("with copies to be filled", copying)] {
        let text = serde_json::to_vec(&map).unwrap();
        let begun = Instant::now();
        let read: DistributionMap = serde_json::from_slice(&text).unwrap();
        let parsed = begun.elapsed();
        let begun = Instant::now();
        read.validate().unwrap();
        let validated = begun.elapsed();
        let adopted = adopt(&mut engine, 1_000, &Arc::new(read));
        println!(
            "{what}: {} bytes read in {parsed:?}, checked in {validated:?}, adopted in {adopted:?}",
            text.len()
        );
    }
}
