//! The traces of the protocol's rules that earlier drafts got wrong, as stories: what happens, when,
//! and what has to be true at the end.

use mirror_net::engine::action::RequestKind;
use mirror_net::map::ReplicaState;
use mirror_tests::sim::cluster::{Cluster, Fault, Shape, Wrong};
use mirror_tests::sim::schedule::finish;
use mirror_tests::sim::scheduler::MS;
use mirror_tests::sim::workload::Wish;

const WRITE: RequestKind = RequestKind::Write { fua: false };

/// Device 1 has its primary on node 1 and its secondary on node 2; node 1 exports it. Device 2 is
/// the other way round, or with three nodes has its primary on node 3.
fn shape(nodes: u16, copies: u16) -> Shape {
    Shape {
        nodes,
        spares: 0,
        disks: 1,
        pairs: false,
        copies,
        devices: 2,
        mirrored_only: false,
        depth: 0,
        wanders: false,
        operator: false,
        discards: false,
        policy: Default::default(),
        drift: true,
    }
}

struct Story {
    cluster: Cluster,
}

impl Story {
    fn new(nodes: u16, copies: u16) -> Self {
        let shape = shape(nodes, copies);
        let mut cluster = Cluster::new(7, shape, false);
        cluster.busy = false;
        cluster.run_until(2_000 * MS);
        Self { cluster }
    }

    fn wait(&mut self, ms: u64) -> &mut Self {
        let end = self.cluster.now + ms * MS;
        self.cluster.plan(end, Fault::Pause { node: 1, ms: 0 });
        self.cluster.run_until(end);
        self
    }

    fn fault(&mut self, fault: Fault) -> &mut Self {
        self.cluster.fault(fault);
        self
    }

    fn ask(&mut self, device: usize, kind: RequestKind, offset: u64, length: u32) -> u64 {
        self.cluster.submit(device, Wish { kind, offset, length }).expect("the device is exported")
    }

    /// Asks and waits; what a read returned.
    fn done(
        &mut self,
        device: usize,
        kind: RequestKind,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u64>, String> {
        let token = self.ask(device, kind, offset, length);
        let end = self.cluster.now + 2_000 * MS;
        while self.cluster.now < end && !self.cluster.results.contains_key(&token) {
            self.wait(5);
        }
        self.cluster.results.get(&token).cloned().unwrap_or_else(|| Err("waits".into()))
    }

    fn write(&mut self) -> u64 {
        self.done(0, WRITE, 0, 512).expect("it is written");
        self.read().expect("it is read")
    }

    fn read(&mut self) -> Result<u64, String> {
        self.done(0, RequestKind::Read, 0, 512).map(|stamps| stamps[0])
    }

    fn flush(&mut self) -> Result<(), String> {
        self.done(0, RequestKind::Flush, 0, 0).map(drop)
    }

    /// The copies of device 1 in the map: node and state.
    fn copies(&self) -> Vec<(u32, ReplicaState)> {
        let span = &self.cluster.manager.map.devices[0].spans[0];
        span.replicas.iter().map(|replica| (replica.disk.0, replica.state)).collect()
    }

    /// Everything heals; all is answered, nothing is lost, the copies are equal.
    fn end(mut self) {
        finish(&mut self.cluster);
        assert_eq!(self.cluster.checker.violations, Vec::<String>::new());
    }
}

use ReplicaState::{InSync, Stale};

/// Rule 3.
#[test]
fn a_primary_that_was_power_cut_and_is_back_before_anyone_noticed_serves_nothing() {
    let mut story = Story::new(3, 2);
    story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
    let stamp = story.write();
    story.fault(Fault::PowerCut { node: 1 }).fault(Fault::Start { node: 1 }).wait(500);
    assert_eq!(story.copies()[0], (2, InSync));
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// Rule 3, the daemon only.
#[test]
fn a_primary_that_was_restarted_forwards_to_the_member_that_was_promoted() {
    let mut story = Story::new(2, 2);
    let stamp = story.write();
    story.fault(Fault::Kill { node: 1 }).wait(50).fault(Fault::Start { node: 1 }).wait(2_000);
    assert_eq!(story.copies()[0], (2, InSync));
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// Rules 1 and 6: a primary goes on alone only by the manager's word.
#[test]
fn a_primary_without_its_secondary_and_without_a_manager_acknowledges_nothing() {
    let mut story = Story::new(2, 2);
    story.write();
    story.fault(Fault::NoManager { node: 1, on: true }).fault(Fault::CutLane { a: 1, b: 2 });
    story.fault(Fault::PowerCut { node: 2 });
    let token = story.ask(0, WRITE, 0, 512);
    story.wait(1_500);
    assert!(!story.cluster.results.contains_key(&token));
    story.fault(Fault::NoManager { node: 1, on: false }).wait(1_500);
    assert!(story.cluster.results.contains_key(&token));
    assert_eq!(story.copies(), [(1, InSync), (2, Stale)]);
    story.end();
}

/// Rule 10: what the old primary had queued does not land on what came after the hand-over.
#[test]
fn writes_under_way_at_a_hand_over_do_not_come_back() {
    for delay in 0..20 {
        let mut story = Story::new(3, 2);
        // The exporter stays where it is.
        story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
        for round in 0..8 {
            story.ask(0, WRITE, round % 2 * 512, 1024);
        }
        story.cluster.run_until(story.cluster.now + delay * MS / 20);
        story.fault(Fault::FailOver { node: 1 });
        for round in 0..8 {
            story.ask(0, WRITE, round % 2 * 512, 1024);
        }
        // All of them have ended by now; what is written next comes after them.
        story.wait(1_000);
        let stamp = story.write();
        story.wait(500);
        assert_eq!(story.copies()[0], (2, InSync));
        assert_eq!(story.read(), Ok(stamp));
        story.end();
    }
}

/// Rule 12: a primary cut off from the manager serves no reads beyond its leases.
#[test]
fn a_deposed_primary_that_has_not_heard_of_it_serves_no_old_data() {
    let mut story = Story::new(3, 2);
    story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
    story.write();
    story.fault(Fault::NoManager { node: 1, on: true });
    for (from, to) in [(1, 2), (2, 1)] {
        story.fault(Fault::Silence { from, to, on: true });
    }
    for round in 0..100 {
        if round == 10 {
            story.fault(Fault::FailOver { node: 1 });
        }
        story.ask(0, RequestKind::Read, 0, 512);
        story.ask(0, WRITE, 0, 512);
        story.wait(50);
    }
    assert_eq!(story.copies()[0], (2, InSync));
    story.end();
}

/// Rule 13: a grantor that restarted and was promoted waits for the leases it may have granted.
#[test]
fn a_restarted_grantor_waits_before_it_serves() {
    let mut story = Story::new(2, 2);
    story.write();
    let before = story.cluster.now;
    // The other cannot say that it knows what was taken from it.
    for (from, to) in [(1, 2), (2, 1)] {
        story.fault(Fault::Silence { from, to, on: true });
    }
    story.fault(Fault::PowerCut { node: 1 }).fault(Fault::PowerCut { node: 2 });
    story.wait(10).fault(Fault::Start { node: 1 }).fault(Fault::Start { node: 2 }).wait(600);
    let read = story.ask(0, RequestKind::Read, 0, 512);
    story.wait(100);
    assert!(story.cluster.now < before + 1_000 * MS && !story.cluster.results.contains_key(&read));
    story.end();
}

/// Rule 16.
#[test]
fn an_exporter_that_survives_a_loss_hears_of_it_from_one_flush() {
    let mut story = Story::new(3, 2);
    story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
    story.write();
    story.fault(Fault::PowerCut { node: 1 }).fault(Fault::PowerCut { node: 2 }).wait(10);
    story.fault(Fault::Start { node: 1 }).fault(Fault::Start { node: 2 }).wait(2_500);
    assert_eq!(story.cluster.manager.map.devices[0].spans[0].loss.0, 1);
    assert!(story.flush().is_err());
    assert_eq!(story.flush(), Ok(()));
    story.end();
}

/// Rule 16: what a flush covered is no loss.
#[test]
fn flushed_writes_survive_a_power_cut_of_all() {
    let mut story = Story::new(3, 2);
    story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
    let stamp = story.write();
    assert_eq!(story.flush(), Ok(()));
    story.fault(Fault::PowerCut { node: 1 }).fault(Fault::PowerCut { node: 2 }).wait(10);
    story.fault(Fault::Start { node: 1 }).fault(Fault::Start { node: 2 }).wait(2_500);
    assert_eq!(story.flush(), Ok(()));
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// Rules 14 and 15.
#[test]
fn what_the_old_exporter_had_queued_does_not_land_after_the_claim_moved() {
    let mut story = Story::new(3, 2);
    story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
    story.fault(Fault::Silence { from: 3, to: 1, on: true });
    let old = story.ask(0, WRITE, 0, 512);
    story.fault(Fault::MoveClaim { device: 0, node: 2 }).wait(500);
    let stamp = story.write();
    story.fault(Fault::Silence { from: 3, to: 1, on: false }).wait(500);
    assert_eq!(story.cluster.results[&old], Err("ClaimLost".into()));
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// Rule 5.
#[test]
fn when_all_members_restarted_one_goes_on_alone() {
    let mut story = Story::new(2, 2);
    let stamp = story.write();
    story.fault(Fault::PowerCut { node: 1 }).fault(Fault::Kill { node: 2 }).wait(10);
    story.fault(Fault::Start { node: 1 }).fault(Fault::Start { node: 2 }).wait(3_000);
    // Node 2 has its cache.
    assert_eq!(story.copies()[0], (2, InSync));
    assert_eq!(story.cluster.manager.map.devices[0].spans[0].loss.0, 0);
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// A disk's death is not the user's business while there is another copy.
#[test]
fn a_disk_that_fails_on_either_side_costs_no_request() {
    for node in [1, 2] {
        for wrong in [Wrong::Writes, Wrong::OneWrite, Wrong::Flush, Wrong::Metadata, Wrong::Dead] {
            let fault = Fault::Disk { node, disk: 0, wrong };
            let mut story = Story::new(2, 2);
            let stamp = story.write();
            story.fault(fault);
            let write = story.ask(0, WRITE, 8192, 512);
            let flush = story.ask(0, RequestKind::Flush, 0, 0);
            story.wait(3_000);
            assert!(
                story.cluster.checker.violations.is_empty(),
                "{fault:?}: {:?}",
                story.cluster.checker.violations
            );
            let done = |token| story.cluster.results.get(token).cloned();
            assert_eq!(done(&write), Some(Ok(vec![])), "{fault:?}: {:#?}", story.cluster.waiting());
            assert_eq!(done(&flush), Some(Ok(vec![])), "{fault:?}: {:#?}", story.cluster.waiting());
            assert_eq!(story.read(), Ok(stamp), "{fault:?}");
            story.end();
        }
    }
}

/// Three copies: one is lost, then the primary; the third has everything.
#[test]
fn of_three_copies_the_last_has_everything() {
    let mut story = Story::new(3, 3);
    let stamp = story.write();
    story.fault(Fault::PowerCut { node: 2 });
    story.wait(3_000);
    story.fault(Fault::PowerCut { node: 1 });
    story.wait(3_000).fault(Fault::FailOver { node: 1 }).wait(3_000);
    assert_eq!(story.copies()[0], (3, InSync));
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// Whoever takes over from three, those that are there become members again.
#[test]
fn of_three_copies_a_failover_has_all_back() {
    let mut story = Story::new(3, 3);
    let stamp = story.write();
    story.fault(Fault::FailOver { node: 1 }).wait(3_000);
    assert_eq!(story.copies(), [(2, InSync), (1, InSync), (3, InSync)]);
    assert_eq!(story.read(), Ok(stamp));
    story.end();
}

/// A manager that dies at any moment of a failover has made it, or its successor knows nothing of it.
#[test]
fn a_manager_that_dies_in_the_middle_of_a_change_leaves_all_of_it_or_nothing() {
    for delay in 0..20 {
        let mut story = Story::new(3, 2);
        story.fault(Fault::MoveClaim { device: 0, node: 3 }).wait(500);
        let stamp = story.write();
        story.fault(Fault::FailOver { node: 1 });
        story.cluster.run_until(story.cluster.now + delay * MS / 2);
        story.fault(Fault::KillManager).wait(50);
        story.fault(Fault::StartManager).wait(1_500);
        let copies = story.copies();
        assert!(copies[0] == (2, InSync) || copies == [(1, InSync), (2, InSync)], "{copies:?}");
        assert_eq!(story.read(), Ok(stamp));
        story.end();
    }
}
