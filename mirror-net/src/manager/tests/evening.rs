//! After a failover the survivors share the load; disks that are uneven for long become even.

use super::Bench;
use super::redistribution::{ALL, roomy};
use crate::config::Policy;
use crate::control::{OperatorReply, Redistribution, RedistributionOrder};
use crate::map::{DistributionMap, SegmentSlots, Topology};
use std::collections::BTreeMap;
use std::time::Duration;

const SPREAD: Policy = Policy { spread_after: Some(Duration::from_secs(3)), ..Policy::MANUAL };

/// Four nodes in a chain, with as much on each.
fn chain() -> DistributionMap {
    let mut map = roomy();
    map.nodes.truncate(4);
    map.disks.truncate(4);
    for disk in &mut map.disks {
        disk.slots = SegmentSlots { primary: 8, secondary: 9, unmirrored: 4 };
    }
    let mut bench = Bench::up(&map);
    let wish = Redistribution::Topology { topology: Some(Topology::Chain), copies: None };
    bench.redistribute(RedistributionOrder { wish, carry_out: true }).unwrap();
    bench.copy_on(&[1, 2, 3, 4]);
    bench.map().clone()
}

impl Bench {
    /// Mirrored slices that each node serves.
    fn served(&self) -> BTreeMap<String, u32> {
        let mut served = BTreeMap::new();
        for span in
            self.map().devices.iter().filter(|device| device.is_mirrored()).flat_map(|device| &device.spans)
        {
            let node = self.map().node_of(span.primary().disk).unwrap();
            *served.entry(self.map().node_name(node)).or_default() += span.count;
        }
        served
    }

    /// So many milliseconds, in which those nodes are heard of.
    fn live(&mut self, ms: u64, up: &[u64]) {
        for _ in 0..ms / 500 {
            for node in up {
                self.adopt(*node);
                self.heartbeat(*node);
            }
            self.pass(500);
        }
    }
}

fn counts(served: &BTreeMap<String, u32>) -> Vec<u32> {
    served.values().copied().collect()
}

#[test]
fn in_a_chain_three_survivors_share_what_the_fourth_served() {
    let mut bench = Bench::up_with(&chain(), SPREAD);
    assert_eq!(counts(&bench.served()), [8, 8, 8, 8]);
    bench.disconnect(2);
    assert!(matches!(bench.failover("n2"), OperatorReply::FailedOver { .. }));
    assert_eq!(counts(&bench.served()), [8, 16, 8], "the next node serves both");
    let up = [1, 3, 4];
    bench.live(2_000, &up);
    assert_eq!(counts(&bench.served()), [8, 16, 8], "not at once");
    bench.live(4_000, &up);
    let served = counts(&bench.served());
    assert_eq!(served.iter().sum::<u32>(), 32);
    assert!(served.iter().all(|count| (10..=11).contains(count)), "{:?}", bench.served());
    // No data moved, and that is all.
    let version = bench.map().version;
    bench.live(10_000, &up);
    assert_eq!(bench.map().version, version);
    for (before, now) in chain().devices.iter().zip(&bench.map().devices) {
        for slice in (0..now.slices).map(crate::ids::SliceIndex) {
            let disks = |device: &crate::map::Device| {
                let mut disks: Vec<_> =
                    device.span(slice).unwrap().replicas.iter().map(|copy| copy.disk).collect();
                disks.sort();
                disks
            };
            assert_eq!(disks(before), disks(now));
        }
    }
}

#[test]
fn when_it_is_back_its_roles_wait_for_a_word_and_then_all_go_home() {
    let mut bench = Bench::up_with(&chain(), SPREAD);
    bench.failover_while_away(2);
    bench.live(10_000, &[1, 2, 3, 4]);
    bench.copy_once(&[1, 2, 3, 4]);
    bench.copy_once(&[1, 2, 3, 4]);
    bench.all_have_their_copies();
    let served = bench.served();
    assert!(!served.contains_key("n2"), "{served:?}");
    assert!(served.values().all(|count| *count <= 11), "{served:?}");
    let order = RedistributionOrder { wish: Redistribution::Balance, carry_out: true };
    bench.redistribute(order).unwrap();
    bench.copy_on(&[1, 2, 3, 4]);
    bench.live(10_000, &[1, 2, 3, 4]);
    assert_eq!(counts(&bench.served()), [8, 8, 8, 8]);
    assert!(bench.map().devices.iter().all(|device| {
        device.spans.iter().all(|span| span.primary().segment != crate::format::alloc::Segment::Secondary)
    }));
}

#[test]
fn in_pairs_nothing_can_be_handed_on() {
    let mut bench = Bench::up_with(&roomy(), SPREAD);
    bench.disconnect(2);
    bench.failover("n2");
    let version = bench.map().version;
    bench.live(10_000, &[1, 3, 4, 5, 6]);
    assert_eq!(bench.map().version, version);
}

#[test]
fn a_disk_that_stays_emptier_than_others_is_filled_once_and_no_sooner() {
    let policy =
        Policy { rebalance_above: Some(20), rebalance_after: Duration::from_secs(5), ..Policy::MANUAL };
    let mut map = roomy();
    map.disks[4].spare = false;
    let mut bench = Bench::up_with(&map, policy);
    bench.live(3_000, &ALL);
    assert!(bench.map().plans.is_empty());
    // It has to be so all the time.
    bench.disconnect(3);
    bench.live(3_000, &[1, 2, 4, 5, 6]);
    assert!(bench.map().plans.is_empty());
    bench.register(3, super::bench::incarnation(3));
    bench.live(4_000, &ALL);
    assert!(bench.map().plans.is_empty());
    bench.live(3_000, &ALL);
    assert!(
        bench.map().plans[0].cause.contains("since one is fuller than another by 50 %"),
        "{:?}",
        bench.map().plans
    );
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
    assert!((13..=16).contains(&bench.slices_on(5)), "{}", bench.slices_on(5));
    let version = bench.map().version;
    bench.live(30_000, &ALL);
    assert_eq!(bench.map().version, version);
}
