use super::next::Begin;
use super::*;
use crate::ids::{
    ClaimGeneration, ClusterId, DeviceId, Incarnation, LossGeneration, MapVersion, NodeId, PlanId,
    SliceEpoch, SliceIndex,
};
use crate::map::plan::Plan;
use crate::map::verbs::{Run, Verb};
use crate::map::{
    Claim, Commit, Device, Disk, Node, OnNoQuorum, Replica, ReplicaState, SegmentSlots, Span,
    layout::tests::pair_map,
};
use proptest::prelude::*;

/// Copies in sync of every slice, in order of device and slice.
fn members(map: &DistributionMap) -> Vec<usize> {
    let spans = map.devices.iter().flat_map(|device| &device.spans);
    spans.flat_map(|span| std::iter::repeat_n(span.members().count(), span.count as usize)).collect()
}

fn begin(map: &DistributionMap, moves: Vec<Move>) -> DistributionMap {
    let id = PlanId(map.version.0 + 1);
    let plan = Plan::new(id, "a test".into(), moves);
    map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap()
}

/// What is syncing or stale becomes in sync.
fn all_in_sync(map: &DistributionMap) -> Vec<Verb> {
    let mut batch = Vec::new();
    for device in &map.devices {
        for span in &device.spans {
            let behind = span.replicas.iter().filter(|copy| copy.state != ReplicaState::InSync);
            batch.extend(behind.map(|copy| Verb::Mark {
                run: Run { device: device.id, first: span.first, count: span.count },
                disk: copy.disk,
                state: ReplicaState::InSync,
                incarnation: None,
            }));
        }
    }
    batch
}

/// What takes the place of what was there.
fn replace(map: &DistributionMap, plan: &Plan) -> Vec<Verb> {
    let mut batch = Vec::new();
    for step in &plan.moves {
        for (span, count) in map.spans_of(step.run) {
            let Some(new) = span.replica_on(step.to) else { continue };
            if new.state != ReplicaState::InSync || step.is_done(span) {
                continue;
            }
            let run = Run { device: step.run.device, first: span.first.max(step.run.first), count };
            let first = span.primary().disk;
            if first != step.to && (step.primary || step.from == Some(first)) {
                batch.push(Verb::Promote { run, disk: step.to });
            }
            if let Some(from) = step.from.filter(|from| span.replica_on(*from).is_some()) {
                batch.push(Verb::DropReplica { run, disk: from });
            }
        }
    }
    batch
}

/// Carries a plan out as the manager does, every new copy being filled at once; checks every map on the way.
fn arrive(map: &DistributionMap, moves: &[Move], wanted: Option<usize>) -> DistributionMap {
    let before = members(map);
    let mut map = begin(map, moves.to_vec());
    for _ in 0..10_000 {
        let plan = map.plans[0].clone();
        let outlook = map.outlook(&plan);
        assert!(!outlook.is_stuck(), "{:?}", plan.moves);
        let add = |begin: &Begin| Verb::AddReplica {
            run: begin.run,
            disk: begin.disk,
            segment: begin.segment,
            incarnation: Incarnation::default(),
        };
        let done = plan.moves.iter().all(|step| map.spans_of(step.run).all(|(span, _)| step.is_done(span)));
        if done {
            return map.apply(&[Verb::EndPlan { plan: plan.id }]).unwrap().unwrap();
        }
        let begun: Vec<Verb> = outlook.begin.iter().map(add).collect();
        for batch in [begun, all_in_sync(&map), replace(&map, &plan)] {
            if let Some(next) = map.apply(&batch).unwrap() {
                map = next;
            }
            for (slice, (before, now)) in before.iter().zip(members(&map)).enumerate() {
                let least = (*before).min(wanted.unwrap_or(usize::MAX));
                assert!(now >= least, "slice {slice} has {now} copies in sync, it had {before}");
            }
        }
    }
    panic!("it does not arrive: {:?}", map.plans[0].moves);
}

fn used(map: &DistributionMap, disk: DiskId) -> u32 {
    let spans = map.devices.iter().flat_map(|device| &device.spans);
    spans.filter(|span| span.replica_on(disk).is_some()).map(|span| span.count).sum()
}

fn disks(map: &DistributionMap) -> BTreeSet<DiskId> {
    map.disks.iter().map(|disk| disk.id).collect()
}

/// Nodes with disks of the same slots, devices with copies at random places.
fn random_map(
    nodes: usize,
    disks_each: usize,
    slots: SegmentSlots,
    sets: usize,
    mut random: impl FnMut(usize) -> usize,
) -> DistributionMap {
    let node = |index: usize| Node {
        id: NodeId(index as u16 + 1),
        name: format!("n{}", index + 1),
        address: "127.0.0.1:1".into(),
        power: (sets > 0).then(|| format!("p{}", index % sets)),
        switch: None,
    };
    let disk = |index: usize| Disk {
        id: DiskId(index as u32 + 1),
        node: NodeId((index / disks_each) as u16 + 1),
        name: format!("d{}", index % disks_each + 1),
        slots,
        block_bytes: 512,
        spare: false,
        failed: None,
    };
    let mut map = DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "random".into(),
        version: MapVersion(1),
        slice_bytes: 1 << 26,
        nodes: (0..nodes).map(node).collect(),
        disks: (0..nodes * disks_each).map(disk).collect(),
        devices: Vec::new(),
        ..DistributionMap::empty()
    };
    for index in 0..1 + random(2 * nodes) {
        let unmirrored = random(5) == 0;
        let claim =
            Claim { node: map.nodes[random(nodes)].id, generation: ClaimGeneration(1), since: MapVersion(1) };
        let id = DeviceId(index as u32 + 1);
        let copies = if unmirrored { 1 } else { 2 };
        let mut device = Device {
            id,
            name: format!("v{index}"),
            slices: 0,
            block_bytes: 512,
            copies,
            commit: Commit::Immediate,
            on_no_quorum: OnNoQuorum::Wait,
            claim,
            spans: Vec::new(),
        };
        for _ in 0..1 + random(4) {
            let wanted = if unmirrored { 1 } else { 1 + random(3) };
            let count = 1 + random(4) as u32;
            let mut replicas: Vec<Replica> = Vec::new();
            for copy in 0..wanted {
                let state = match random(4) {
                    0 if copy > 0 => ReplicaState::Stale,
                    _ => ReplicaState::InSync,
                };
                let segment = if unmirrored {
                    Segment::Unmirrored
                } else if copy == 0 {
                    Segment::Primary
                } else {
                    Segment::Secondary
                };
                let disk = DiskId(random(map.disks.len()) as u32 + 1);
                let (added, incarnation) = (MapVersion(1), Incarnation::default());
                replicas.push(Replica { disk, segment, added, state, incarnation });
            }
            let (first, epoch, loss) = (SliceIndex(device.slices), SliceEpoch(1), LossGeneration(0));
            device.spans.push(Span { first, count, epoch, loss, primary_since: MapVersion(1), replicas });
            device.slices += count;
            // What breaks a rule is not there.
            let mut tried = map.clone();
            tried.devices.push(device.clone());
            if tried.validate().is_err() {
                device.spans.pop();
                device.slices -= count;
            }
        }
        if device.slices > 0 {
            map.devices.push(device);
        }
    }
    map.validate().unwrap();
    map
}

fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    }
}

/// Whether a wish for a topology holds: of pairs each node is mirrored by one, which it mirrors, but for a ring of three
/// of an odd number; of a chain each by those after it in one ring of all.
fn holds(map: &DistributionMap, topology: Topology, copies: usize) -> bool {
    let mut mirrors: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
    let node = |copy: &Replica| map.node_of(copy.disk).unwrap();
    let spans = map.devices.iter().filter(|device| device.is_mirrored()).flat_map(|device| &device.spans);
    for span in spans.filter(|span| span.replicas.len() > 1) {
        let of = mirrors.entry(node(span.primary())).or_default();
        of.extend(span.replicas[1..].iter().map(node));
        if topology == Topology::Sets
            && !span.replicas[1..].iter().all(|it| map.other_set(node(&span.replicas[0]), node(it)))
        {
            return false;
        }
    }
    if topology == Topology::Sets {
        return true;
    }
    let nodes: BTreeSet<NodeId> = map.nodes.iter().map(|node| node.id).collect();
    orders(&nodes, topology).into_iter().any(|rings| {
        mirrors.iter().all(|(home, of)| {
            let ring = rings.iter().find(|ring| ring.contains(home)).unwrap();
            let at = ring.iter().position(|node| node == home).unwrap();
            let after: Vec<NodeId> = (1..copies.max(2)).map(|step| ring[(at + step) % ring.len()]).collect();
            of.iter().all(|mirror| after.contains(mirror))
        })
    })
}

/// All ways to make rings of nodes: of a chain one, of pairs many, of an odd number one of which has three.
fn orders(nodes: &BTreeSet<NodeId>, topology: Topology) -> Vec<Vec<Vec<NodeId>>> {
    let Some(first) = nodes.first().copied() else { return vec![Vec::new()] };
    let rest: Vec<NodeId> = nodes.iter().skip(1).copied().collect();
    let permutations = |count: usize| {
        let mut all: Vec<Vec<NodeId>> = vec![vec![first]];
        for _ in 0..count {
            let longer = |ring: &Vec<NodeId>| {
                let free = rest.iter().filter(|node| !ring.contains(node));
                free.map(|node| ring.iter().copied().chain([*node]).collect()).collect::<Vec<Vec<NodeId>>>()
            };
            all = all.iter().flat_map(longer).collect();
        }
        all
    };
    if topology == Topology::Chain {
        return permutations(rest.len()).into_iter().map(|ring| vec![ring]).collect();
    }
    let odd = nodes.len() % 2 == 1;
    let mut found = Vec::new();
    for ring in permutations(1).into_iter().chain(if odd { permutations(2) } else { Vec::new() }) {
        let left: BTreeSet<NodeId> = nodes.iter().filter(|node| !ring.contains(node)).copied().collect();
        if left.len() == 1 {
            continue;
        }
        let with = orders(&left, topology).into_iter().map(|mut rings| {
            rings.push(ring.clone());
            rings
        });
        found.extend(
            with.filter(|rings| rings.iter().filter(|ring| ring.len() == 3).count() <= usize::from(odd)),
        );
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn from_any_map_any_wish_is_reached_or_there_is_no_room(
        seed: u64,
        nodes in 2usize..7,
        disks_each in 1usize..4,
        slots in (2u32..12, 2u32..12, 0u32..6),
        sets in prop::sample::select(vec![0usize, 0, 2, 3]),
        emptied in 0usize..4,
        copies in prop::option::of(1u8..4),
        topology in prop::sample::select(vec![None, None, Some(Topology::Pair), Some(Topology::Chain), Some(Topology::Sets)]),
        even: bool,
    ) {
        let mut random = random(seed);
        let slots = SegmentSlots { primary: slots.0, secondary: slots.1, unmirrored: slots.2 };
        let map = random_map(nodes, disks_each, slots, sets, &mut random);
        let emptied: BTreeSet<DiskId> =
            (0..emptied).map(|_| map.disks[random(map.disks.len())].id).collect();
        let takers = disks(&map).difference(&emptied).copied().collect();
        let copies_of_each = copies.map_or_else(BTreeMap::new, |copies| copies_of_all(&map, copies));
        let wish = Wish { emptied: emptied.clone(), takers, copies: copies_of_each, topology, even, ..Wish::default() };
        let Ok(wanted) = map.wanted(&wish) else { return Ok(()) };
        prop_assert!(wanted.copied >= wanted.copied_min || even);
        let end = arrive(&map, &wanted.moves, copies.map(usize::from));
        for disk in &emptied {
            prop_assert_eq!(used(&end, *disk), 0);
        }
        for (before, device) in map.devices.iter().zip(&end.devices).filter(|(_, device)| device.is_mirrored()) {
            for slice in 0..device.slices {
                let [before, now] = [before, device].map(|device| device.span(SliceIndex(slice)).unwrap());
                prop_assert_eq!(now.replicas.len(), copies.map_or(before.replicas.len(), usize::from));
            }
        }
        let participants: BTreeSet<_> = wish.takers.iter().filter_map(|disk| map.node_of(*disk)).collect();
        if let Some(topology) = topology.filter(|_| participants.len() == nodes && sets == 0) {
            prop_assert!(holds(&end, topology, copies.unwrap_or(2).into()), "{:?}", end.devices);
        }
    }

    /// Without sets and with a node to spare, free slots are enough: they are found, and the lower bound is met.
    #[test]
    fn where_there_is_room_it_is_found_and_nothing_moves_twice(seed: u64, nodes in 4usize..8, each in 1usize..4) {
        let mut random = random(seed);
        let slots = SegmentSlots { primary: 200, secondary: 200, unmirrored: 100 };
        let map = random_map(nodes, each, slots, 0, &mut random);
        let gone = map.nodes[random(nodes)].id;
        let emptied: BTreeSet<DiskId> =
            map.disks.iter().filter(|disk| disk.node == gone).map(|disk| disk.id).collect();
        let takers: BTreeSet<DiskId> = disks(&map).difference(&emptied).copied().collect();
        let wish = Wish { emptied: emptied.clone(), takers: takers.clone(), ..Wish::default() };
        let wanted = map.wanted(&wish).unwrap();
        let lost: u64 = emptied.iter().map(|disk| u64::from(used(&map, *disk))).sum();
        prop_assert_eq!((wanted.copied, wanted.copied_min), (lost, lost));
        let end = arrive(&map, &wanted.moves, None);
        // Whoever got something is at most a slice above anybody else who might have taken it.
        let moved: Vec<&Span> = map
            .devices
            .iter()
            .flat_map(|device| &device.spans)
            .filter(|span| span.replicas.iter().any(|copy| emptied.contains(&copy.disk)))
            .collect();
        let may_take = |disk: &&DiskId| {
            let node = map.node_of(**disk);
            !moved.iter().any(|span| span.replicas.iter().any(|copy| map.node_of(copy.disk) == node))
        };
        for a in takers.iter().filter(|disk| used(&end, **disk) > used(&map, **disk)) {
            for b in takers.iter().filter(may_take) {
                prop_assert!(used(&end, *a) <= used(&end, *b) + 1, "{} is above {}", a, b);
            }
        }
    }
}

#[test]
fn a_node_is_emptied_evenly_and_what_was_at_home_stays_primary() {
    // Eight slices of its own and eight mirrors, each of one device; six disks elsewhere.
    let mut map = pair_map(8);
    for disk in &mut map.disks {
        disk.slots = SegmentSlots { primary: 16, secondary: 16, unmirrored: 4 };
    }
    let emptied = BTreeSet::from([map.disks[0].id]);
    let takers: BTreeSet<DiskId> = map.disks[1..].iter().map(|disk| disk.id).collect();
    let wish = Wish { emptied, takers: takers.clone(), ..Wish::default() };
    let wanted = map.wanted(&wish).unwrap();
    assert_eq!((wanted.copied, wanted.copied_min), (18, 18));
    let end = arrive(&map, &wanted.moves, None);
    // The partner has the other copies already, so it takes none of those that are mirrored.
    assert!(used(&end, DiskId(2)) <= 18 + 2);
    let loads: Vec<u32> = (3..=8).map(|disk| used(&end, DiskId(disk))).collect();
    assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{loads:?}");
    let device = &end.devices[0];
    assert!(
        device.spans.iter().all(|span| span.replicas[1].disk == DiskId(2)),
        "the primaries moved as such"
    );
}

#[test]
fn a_full_neighbour_makes_room_by_moving_something_that_may_lie_elsewhere() {
    // n1 and n2 mirror each other, n3 and n4 too. n5 has free slots but shares its power with n2; n3 and n4 are full.
    let mut map = pair_map(4);
    map.nodes.push(Node { id: NodeId(5), name: "n5".into(), ..map.nodes[0].clone() });
    map.disks.push(Disk { id: DiskId(5), node: NodeId(5), ..map.disks[0].clone() });
    for (node, power) in map.nodes.iter_mut().zip(["a", "b", "c", "d", "b"]) {
        node.power = Some(power.into());
    }
    map.validate().unwrap();
    let emptied = BTreeSet::from([DiskId(1)]);
    let takers = (2..=5).map(DiskId).collect();
    let wanted = map.wanted(&Wish { emptied, takers, ..Wish::default() }).unwrap();
    let end = arrive(&map, &wanted.moves, None);
    assert_eq!(used(&end, DiskId(1)), 0);
    assert_eq!((wanted.copied, wanted.copied_min), (34, 18), "sixteen slices went out of the way");
}

#[test]
fn what_has_a_full_neighbour_is_served_by_a_copy_whose_neighbour_has_room() {
    let chain = |map: &DistributionMap| Wish {
        takers: disks(map),
        topology: Some(Topology::Chain),
        ..Wish::default()
    };
    let mut map = pair_map(4);
    for disk in &mut map.disks {
        disk.slots.secondary += 8;
    }
    let mut map = arrive(&map, &map.wanted(&chain(&map)).unwrap().moves, None);
    // A device of n1 has found refuge at n4 and n2, which are not neighbours; n1, the neighbour of n4, is full.
    let refuge = [DiskId(4), DiskId(2)];
    for (copy, disk) in map.devices[0].spans[0].replicas.iter_mut().zip(refuge) {
        (copy.disk, copy.segment) = (disk, Segment::Secondary);
    }
    map.disks[0].slots.primary = 0;
    map.disks[0].slots.secondary = 8;
    map.validate().unwrap();
    let wanted = map.wanted(&chain(&map)).unwrap();
    assert_eq!(wanted.copied, 8);
    let end = arrive(&map, &wanted.moves, None);
    let copies: Vec<DiskId> = end.devices[0].spans[0].replicas.iter().map(|copy| copy.disk).collect();
    assert_eq!(copies, [DiskId(2), DiskId(3)]);
    assert!(holds(&end, Topology::Chain, 2));
}

#[test]
fn within_a_failure_set_a_copy_is_at_both_ends_for_a_while() {
    let mut map = pair_map(2);
    map.nodes.push(Node { id: NodeId(3), name: "n3".into(), ..map.nodes[0].clone() });
    map.disks.push(Disk { id: DiskId(3), node: NodeId(3), ..map.disks[0].clone() });
    for (node, power) in map.nodes.iter_mut().zip(["a", "b", "a"]) {
        node.power = Some(power.into());
    }
    let wish =
        Wish { emptied: BTreeSet::from([DiskId(1)]), takers: BTreeSet::from([DiskId(3)]), ..Wish::default() };
    let wanted = map.wanted(&wish).unwrap();
    let end = arrive(&map, &wanted.moves, None);
    assert_eq!((used(&end, DiskId(1)), used(&end, DiskId(3))), (0, 18));
    // The moves of one span may be several, in any order; if one of them is missing it is not moved as a whole.
    let parts = |first: u32, count| Move {
        run: Run { device: DeviceId(1), first: SliceIndex(first), count },
        from: Some(DiskId(1)),
        to: DiskId(3),
        segment: Segment::Primary,
        primary: true,
    };
    for (moves, allowed) in [(vec![parts(5, 3), parts(0, 5)], true), (vec![parts(5, 3), parts(0, 4)], false)]
    {
        let begun = begin(&map, moves);
        let (disk, segment, incarnation) = (DiskId(3), Segment::Primary, Incarnation::default());
        let run = parts(0, 8).run;
        assert_eq!(begun.apply(&[Verb::AddReplica { run, disk, segment, incarnation }]).is_ok(), allowed);
    }
    // Only a plan may do that.
    let run = Run { device: DeviceId(1), first: SliceIndex(0), count: 8 };
    let (disk, segment, incarnation) = (DiskId(3), Segment::Primary, Incarnation::default());
    let error = map.apply(&[Verb::AddReplica { run, disk, segment, incarnation }]).unwrap_err();
    assert!(error.to_string().contains("same failure set"), "{error}");
}

#[test]
fn what_is_missing_is_told_with_its_number_and_place() {
    let map = pair_map(3);
    let emptied = BTreeSet::from([DiskId(1)]);
    let takers = BTreeSet::from([DiskId(2), DiskId(3)]);
    let text = map.wanted(&Wish { emptied, takers, ..Wish::default() }).unwrap_err().to_string();
    assert_eq!(
        text,
        "there is no place for 16 slices, the first of n1-d1 on n1/d1: 16 more slots are needed in primary or secondary \
         segments: n2 has 0 free, n3 has 0 free"
    );
}

#[test]
fn topologies_that_cannot_be_are_refused() {
    let map = pair_map(4);
    let wish = |topology, copies| Wish {
        takers: disks(&map),
        topology: Some(topology),
        copies: copies_of_all(&map, copies),
        ..Wish::default()
    };
    let refused = |wish: Wish| map.wanted(&wish).unwrap_err();
    assert_eq!(refused(wish(Topology::Pair, 3)), NoPlan::PairOfThree);
    assert_eq!(refused(wish(Topology::Chain, 4)), NoPlan::Copies { copies: 4 });
    assert_eq!(refused(wish(Topology::Sets, 2)), NoPlan::NoSet { node: "n1".into() });
    let few = Wish { takers: BTreeSet::from([DiskId(1)]), ..wish(Topology::Chain, 2) };
    assert_eq!(refused(few), NoPlan::TooFewNodes { nodes: 1, copies: 2 });
}

#[test]
fn pairs_become_a_chain_and_a_chain_pairs_with_one_free_slot_a_disk() {
    let mut map = pair_map(4);
    for disk in &mut map.disks {
        disk.slots.secondary += 1;
    }
    let wish = |topology| Wish { takers: disks(&map), topology: Some(topology), ..Wish::default() };
    let there = map.wanted(&wish(Topology::Chain)).unwrap();
    let chain = arrive(&map, &there.moves, None);
    assert!(holds(&chain, Topology::Chain, 2) && !holds(&map, Topology::Chain, 2));
    assert!(map.deviation(Topology::Pair).is_none() && chain.deviation(Topology::Chain).is_none());
    let back = chain.wanted(&wish(Topology::Pair)).unwrap();
    assert!(holds(&arrive(&chain, &back.moves, None), Topology::Pair, 2));
}

#[test]
fn an_uneven_cluster_becomes_even_with_no_move_too_many() {
    let mut map = pair_map(4);
    for index in 5..=6u16 {
        map.nodes.push(Node { id: NodeId(index), name: format!("n{index}"), ..map.nodes[0].clone() });
        map.disks.push(Disk { id: DiskId(index.into()), node: NodeId(index), ..map.disks[0].clone() });
    }
    let wish = Wish { takers: disks(&map), even: true, ..Wish::default() };
    let wanted = map.wanted(&wish).unwrap();
    let end = arrive(&map, &wanted.moves, None);
    let loads: Vec<u32> = end.disks.iter().map(|disk| used(&end, disk.id)).collect();
    assert_eq!(loads.iter().sum::<u32>(), 72);
    assert_eq!(loads, [12; 6]);
    assert_eq!((wanted.copied, wanted.copied_min), (24, 24));
    assert_eq!(end.wanted(&wish).unwrap().moves, [], "and it stays as it is");
}

#[test]
fn primaries_that_a_failover_moved_are_brought_home() {
    let map = pair_map(2);
    let run = Run { device: DeviceId(1), first: SliceIndex(0), count: 8 };
    let over = map.apply(&[Verb::Promote { run, disk: DiskId(2) }]).unwrap().unwrap();
    let wanted = over.wanted(&Wish { takers: disks(&map), even: true, ..Wish::default() }).unwrap();
    assert_eq!(wanted.copied, 0);
    let end = arrive(&over, &wanted.moves, None);
    assert_eq!(end.devices[0].spans[0].primary().disk, DiskId(1));
}

#[test]
fn a_ring_in_which_a_spare_took_a_place_stays_as_it_is() {
    let map = pair_map(5);
    let mut chain = Wish { takers: disks(&map), topology: Some(Topology::Chain), ..Wish::default() };
    let mut map = map;
    for disk in &mut map.disks {
        disk.slots.secondary += 4;
    }
    let ring = arrive(&map, &map.wanted(&chain).unwrap().moves, None);
    // n2's place is taken by n6.
    let mut ring = ring;
    ring.nodes.push(Node { id: NodeId(6), name: "n6".into(), ..ring.nodes[0].clone() });
    ring.disks.push(Disk { id: DiskId(6), node: NodeId(6), ..ring.disks[0].clone() });
    let empty =
        Wish { emptied: BTreeSet::from([DiskId(2)]), takers: BTreeSet::from([DiskId(6)]), ..Wish::default() };
    let ring = arrive(&ring, &ring.wanted(&empty).unwrap().moves, None);
    chain.takers = [1, 3, 4, 5, 6].map(DiskId).into();
    assert_eq!(ring.wanted(&chain).unwrap().moves, []);
}

#[test]
fn who_cannot_be_paired_in_order_is_paired_otherwise() {
    // n3 and n4 share their power: in order n1 would have n2, and they each other.
    let mut map = pair_map(4);
    for disk in &mut map.disks {
        disk.slots.secondary += 8;
    }
    map.devices.retain(|device| device.copies == 1);
    for (node, power) in map.nodes.iter_mut().zip(["a", "b", "c", "c"]) {
        node.power = Some(power.into());
    }
    let takers = disks(&map);
    let wish = |topology| Wish { takers: takers.clone(), topology: Some(topology), ..Wish::default() };
    assert!(map.wanted(&wish(Topology::Pair)).is_ok());
    assert!(map.wanted(&wish(Topology::Chain)).is_ok());
    map.nodes[1].power = Some("c".into());
    assert!(matches!(map.wanted(&wish(Topology::Pair)), Err(NoPlan::NoPartner { .. })));
    assert!(matches!(map.wanted(&wish(Topology::Chain)), Err(NoPlan::NoPartner { .. })));
}
