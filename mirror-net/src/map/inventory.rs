//! Disks and nodes that enter the map and leave it.

use super::verbs::VerbError;
use super::{Disk, DistributionMap, Node};
use crate::ids::{DiskId, NodeId};

impl DistributionMap {
    /// An id that no disk has, or had.
    pub fn next_disk(&self) -> DiskId {
        DiskId(self.last_disk.max(self.disks.last().map_or(0, |last| last.id.0)) + 1)
    }

    /// An id that no node has, or had; `None` if all are used up.
    pub fn next_node(&self) -> Option<NodeId> {
        let last = self.last_node.max(self.nodes.last().map_or(0, |last| last.id.0));
        last.checked_add(1).map(NodeId)
    }

    /// No disk or node gets an id up to these any more, but by [`add_disk`](Self::add_disk) and
    /// [`add_node`](Self::add_node).
    pub(super) fn reserve(&mut self, disk: DiskId, node: NodeId) {
        self.last_disk = self.last_disk.max(disk.0);
        self.last_node = self.last_node.max(node.0);
    }

    /// Enters a disk, empty, under an id that was reserved for it.
    pub(super) fn add_disk(&mut self, disk: &Disk) -> Result<(), VerbError> {
        if self.disk(disk.id) == Some(disk) {
            return Ok(());
        }
        let newest = self.disks.last().is_none_or(|last| last.id < disk.id);
        if disk.id.0 > self.last_disk || !newest {
            return Err(VerbError::DiskNotReserved(disk.id));
        }
        let node = self.node(disk.node).ok_or(VerbError::UnknownNode(disk.node))?;
        if self.disks.iter().any(|other| other.node == disk.node && other.name == disk.name) {
            return Err(VerbError::DiskNameTaken { node: node.name.clone(), name: disk.name.clone() });
        }
        self.disks.push(disk.clone());
        Ok(())
    }

    /// The same for a node. That its name is its own is a rule of the map.
    pub(super) fn add_node(&mut self, node: &Node) -> Result<(), VerbError> {
        if self.node(node.id) == Some(node) {
            return Ok(());
        }
        let newest = self.nodes.last().is_none_or(|last| last.id < node.id);
        if node.id.0 > self.last_node || !newest {
            return Err(VerbError::NodeNotReserved(node.id));
        }
        self.nodes.push(node.clone());
        Ok(())
    }

    /// Whether a disk was in the map once and is no more.
    pub fn has_left(&self, id: DiskId) -> bool {
        id.0 <= self.last_disk && self.disk(id).is_none()
    }

    /// Takes a disk out that holds no copy at all, not even a stale one, and that no plan brings anything to.
    pub(super) fn remove_disk(&mut self, id: DiskId) -> Result<(), VerbError> {
        if self.disk(id).is_none() {
            return Ok(());
        }
        for device in &self.devices {
            if let Some(span) = device.spans.iter().find(|span| span.replica_on(id).is_some()) {
                return Err(VerbError::DiskInUse { disk: id, device: device.id, slice: span.first.0 });
            }
        }
        let brings = |plan: &&super::plan::Plan| plan.moves.iter().any(|step| step.to == id);
        if let Some(plan) = self.plans.iter().find(brings) {
            return Err(VerbError::Awaited { disk: id, plan: plan.id });
        }
        for plan in &mut self.plans {
            plan.spares.remove(&id);
            plan.retires.remove(&id);
        }
        self.last_disk = self.disks.last().map_or(0, |last| last.id.0).max(self.last_disk);
        self.disks.retain(|disk| disk.id != id);
        Ok(())
    }

    /// Takes a node out that has no disk and exports nothing.
    pub(super) fn remove_node(&mut self, id: NodeId) -> Result<(), VerbError> {
        if self.node(id).is_none() {
            return Ok(());
        }
        if let Some(disk) = self.disks.iter().find(|disk| disk.node == id) {
            return Err(VerbError::NodeHasDisk { node: id, disk: disk.id });
        }
        if let Some(device) = self.devices.iter().find(|device| device.claim.node == id) {
            return Err(VerbError::NodeExports { node: id, device: device.id });
        }
        for plan in &mut self.plans {
            plan.retires_node = plan.retires_node.filter(|node| *node != id);
        }
        self.last_node = self.nodes.last().map_or(0, |last| last.id.0).max(self.last_node);
        self.nodes.retain(|node| node.id != id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::layout::tests::pair_map;
    use crate::map::verbs::{Run, Verb};

    /// What enters a third node with an empty disk.
    fn third(map: &DistributionMap, node: NodeId, disk: DiskId) -> [Verb; 2] {
        let (name, address) = ("third".into(), "third:1".into());
        let node = Node { id: node, name, address, power: None, switch: None };
        let disk = Disk { id: disk, node: node.id, spare: false, failed: None, ..map.disks[0].clone() };
        [Verb::AddNode { node }, Verb::AddDisk { disk }]
    }

    /// A pair with a third node that has one empty disk.
    fn with_empty_third() -> (DistributionMap, NodeId, DiskId) {
        let map = pair_map(2);
        let (node, disk) = (NodeId(9), DiskId(9));
        let reserved = map.apply(&[Verb::Reserve { disk, node }]).unwrap().unwrap();
        (reserved.apply(&third(&map, node, disk)).unwrap().unwrap(), node, disk)
    }

    #[test]
    fn what_enters_has_an_id_that_was_reserved_for_it() {
        let map = pair_map(2);
        let (node, disk) = (map.next_node().unwrap(), map.next_disk());
        let enter = third(&map, node, disk);
        assert_eq!(map.apply(&enter), Err(VerbError::NodeNotReserved(node)));
        let reserved = map.apply(&[Verb::Reserve { disk, node }]).unwrap().unwrap();
        // What was formatted with it and did not enter keeps it: the next gets another.
        assert_eq!(
            (reserved.next_node(), reserved.next_disk()),
            (Some(NodeId(node.0 + 1)), DiskId(disk.0 + 1))
        );
        let after = reserved.apply(&enter).unwrap().unwrap();
        assert_eq!((&after.node(node).unwrap().name[..], after.node_of(disk)), ("third", Some(node)));
        // Repeated it changes nothing.
        assert_eq!(after.apply(&enter), Ok(None));
        let text = serde_json::to_string(&after).unwrap();
        assert_eq!(serde_json::from_str::<DistributionMap>(&text).unwrap(), after);
        // Not with an id of another, or older than another's, nor with another's name.
        let first = Disk { name: "new".into(), ..map.disks[0].clone() };
        let again = Verb::AddDisk { disk: first.clone() };
        assert_eq!(after.apply(&[again]), Err(VerbError::DiskNotReserved(first.id)));
        let reserved = after.apply(&[Verb::Reserve { disk: after.next_disk(), node }]).unwrap().unwrap();
        let twin = Disk { id: after.next_disk(), ..map.disks[0].clone() };
        let error = reserved.apply(&[Verb::AddDisk { disk: twin }]).unwrap_err();
        assert!(matches!(error, VerbError::DiskNameTaken { .. }), "{error}");
    }

    #[test]
    fn what_holds_nothing_leaves_and_its_ids_are_remembered() {
        let (map, node, disk) = with_empty_third();
        let leave = [Verb::RemoveDisk { disk }, Verb::RemoveNode { node }];
        let after = map.apply(&leave).unwrap().unwrap();
        assert_eq!((after.disk(disk), after.node(node)), (None, None));
        assert_eq!((after.last_disk, after.last_node), (disk.0, node.0));
        assert_eq!(after.apply(&leave), Ok(None));
        let text = serde_json::to_string(&after).unwrap();
        assert_eq!(serde_json::from_str::<DistributionMap>(&text).unwrap(), after);
    }

    #[test]
    fn what_holds_or_exports_anything_stays() {
        let (map, node, disk) = with_empty_third();
        let refused = |map: &DistributionMap, verb: Verb| map.apply(&[verb]).unwrap_err();
        assert_eq!(refused(&map, Verb::RemoveNode { node }), VerbError::NodeHasDisk { node, disk });
        let device = &map.devices[0];
        for copy in &device.spans[0].replicas {
            let error = refused(&map, Verb::RemoveDisk { disk: copy.disk });
            assert_eq!(error, VerbError::DiskInUse { disk: copy.disk, device: device.id, slice: 0 });
        }
        // A stale copy holds it too: somebody has to make it again elsewhere.
        let run = Run { device: device.id, first: device.spans[0].first, count: device.spans[0].count };
        let stale = device.spans[0].replicas[1].disk;
        let mark = Verb::Mark { run, disk: stale, state: crate::map::ReplicaState::Stale, incarnation: None };
        let marked = map.apply(&[mark]).unwrap().unwrap();
        assert!(matches!(refused(&marked, Verb::RemoveDisk { disk: stale }), VerbError::DiskInUse { .. }));
        let claimed = map.apply(&[Verb::MoveClaim { device: device.id, node }]).unwrap().unwrap();
        let both = [Verb::RemoveDisk { disk }, Verb::RemoveNode { node }];
        assert_eq!(claimed.apply(&both), Err(VerbError::NodeExports { node, device: device.id }));
    }

    proptest::proptest! {
        /// Whatever comes and goes in whatever order: the map keeps its rules, and no id comes back.
        #[test]
        fn no_id_is_ever_given_twice(steps in proptest::collection::vec((0u8..4, 0usize..8), 1..40)) {
            let mut map = pair_map(2);
            let (mut disks, mut nodes) = (map.next_disk().0, map.next_node().unwrap().0);
            for (what, which) in steps {
                let node = map.nodes[which % map.nodes.len()].clone();
                let batch = match what {
                    0 => {
                        let id = map.next_node().unwrap();
                        assert!(id.0 >= nodes, "{id} was given before");
                        nodes = id.0 + 1;
                        let (name, address) = (format!("n{id}"), format!("n{id}:1"));
                        let node = Node { id, name, address, power: None, switch: None };
                        vec![Verb::Reserve { disk: DiskId(0), node: id }, Verb::AddNode { node }]
                    }
                    1 => {
                        let id = map.next_disk();
                        assert!(id.0 >= disks, "{id} was given before");
                        disks = id.0 + 1;
                        let disk = Disk { id, node: node.id, name: format!("d{id}"), ..map.disks[0].clone() };
                        vec![Verb::Reserve { disk: id, node: NodeId(0) }, Verb::AddDisk { disk }]
                    }
                    2 => vec![Verb::RemoveDisk { disk: map.disks[which % map.disks.len()].id }],
                    _ => vec![Verb::RemoveNode { node: node.id }],
                };
                match map.apply(&batch) {
                    Ok(Some(next)) => map = next,
                    Ok(None) => panic!("{batch:?} changes nothing"),
                    // What holds something stays.
                    Err(VerbError::DiskInUse { .. } | VerbError::NodeHasDisk { .. } | VerbError::NodeExports { .. }) => {}
                    Err(error) => panic!("{batch:?}: {error}"),
                }
                assert_eq!(map.validate(), Ok(()));
            }
        }
    }
}
