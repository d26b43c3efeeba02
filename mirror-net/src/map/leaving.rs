//! Disks and nodes that leave the map.

use super::DistributionMap;
use super::verbs::VerbError;
use crate::ids::{DiskId, NodeId};

impl DistributionMap {
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
    use crate::map::{Disk, Node};

    /// A pair with a third node that has one empty disk.
    fn with_empty_third() -> (DistributionMap, NodeId, DiskId) {
        let mut map = pair_map(2);
        let (node, disk) = (NodeId(9), DiskId(9));
        map.nodes.push(Node { id: node, name: "third".into(), ..map.nodes[0].clone() });
        map.nodes[2].address = "third:1".into();
        map.disks.push(Disk { id: disk, node, spare: false, failed: None, ..map.disks[0].clone() });
        map.nodes[2].power = None;
        map.nodes[2].switch = None;
        assert_eq!(map.validate(), Ok(()));
        (map, node, disk)
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
}
