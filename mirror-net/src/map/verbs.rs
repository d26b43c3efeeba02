//! Every change of placement: three verbs, the marks beside them, and the claim.
//!
//! A batch is one new map version, or no change at all: it is applied to a copy, every step is
//! checked, and the result is validated. Repeating a batch that has taken effect changes nothing.

use super::plan::Plan;
use super::validate::InvalidMap;
use super::{
    Commit, Device, Disk, DistributionMap, Failed, Node, OnNoQuorum, Replica, ReplicaState, Span, Topology,
};
use crate::format::alloc::Segment;
use crate::ids::{
    ClaimGeneration, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId, PlanId, SliceEpoch,
    SliceIndex,
};
use crate::planted::{self, Bug};
use serde::{Deserialize, Serialize};

/// A run of slices of one device: what a verb works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The device.
    pub device: DeviceId,
    /// The first slice.
    pub first: SliceIndex,
    /// How many slices.
    pub count: u32,
}

impl Run {
    /// Whether the two have slices in common.
    pub fn overlaps(&self, other: &Run) -> bool {
        let end = |run: &Run| run.first.0.saturating_add(run.count);
        self.device == other.device && self.first.0 < end(other) && other.first.0 < end(self)
    }
}

/// One step of a change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// A new copy begins, as `syncing`.
    AddReplica {
        /// Where in the address space.
        run: Run,
        /// The disk that takes the copy.
        disk: DiskId,
        /// The segment whose slots it takes up.
        segment: Segment,
        /// The disk's incarnation.
        incarnation: Incarnation,
    },
    /// An in-sync replica becomes the primary.
    Promote {
        /// Where in the address space.
        run: Run,
        /// The disk whose replica goes first.
        disk: DiskId,
    },
    /// A copy is given up.
    DropReplica {
        /// Where in the address space.
        run: Run,
        /// The disk whose replica goes.
        disk: DiskId,
    },
    /// A mark: what a copy is worth.
    Mark {
        /// Where in the address space.
        run: Run,
        /// The disk whose replica is meant.
        disk: DiskId,
        /// Its state from now on.
        state: ReplicaState,
        /// The incarnation under which this holds; `None` leaves it.
        incarnation: Option<Incarnation>,
    },
    /// All members have a new incarnation: one goes on alone, the others are stale (docs/protocol.md rule 5).
    Readmit {
        /// Where in the address space.
        run: Run,
        /// The disk whose replica goes on.
        disk: DiskId,
        /// Its new incarnation.
        incarnation: Incarnation,
        /// Whether unflushed data may be gone: raises the loss generation.
        lost: bool,
    },
    /// No member is to come back, says the operator: a copy that need not be in sync goes on alone, and what it
    /// lacks is lost (docs/protocol.md rule 17).
    Force {
        /// Where in the address space.
        run: Run,
        /// The disk whose replica goes on.
        disk: DiskId,
        /// Its incarnation now.
        incarnation: Incarnation,
    },
    /// The device may be exported by that node only.
    MoveClaim {
        /// The device.
        device: DeviceId,
        /// The new exporter.
        node: NodeId,
    },
    /// A disk stopped working.
    FailDisk {
        /// The disk.
        disk: DiskId,
        /// What the node reported.
        reason: String,
    },
    /// A disk is a spare from now on, or is none any more.
    SetSpare {
        /// The disk.
        disk: DiskId,
        /// Whether it is to hold nothing until it is activated.
        spare: bool,
    },
    /// Ids up to these are given to nothing but what enters with them: a disk is formatted with its id before it enters,
    /// and is never to meet another of that id, whatever happens in between.
    Reserve {
        /// For disks.
        disk: DiskId,
        /// For nodes.
        node: NodeId,
    },
    /// A disk that holds nothing enters the map, under a reserved id.
    AddDisk {
        /// All of it.
        disk: Disk,
    },
    /// A node enters the map, under a reserved id.
    AddNode {
        /// All of it.
        node: Node,
    },
    /// A disk that holds nothing leaves the map; its id is never given again.
    RemoveDisk {
        /// The disk.
        disk: DiskId,
    },
    /// A node without disks that exports nothing leaves the map; its id is never given again.
    RemoveNode {
        /// The node.
        node: NodeId,
    },
    /// Who is to mirror whom.
    SetTopology {
        /// `None` for whatever the rules of the map allow.
        topology: Option<Topology>,
    },
    /// How many copies a device is to have in all; a plan makes or drops them.
    SetCopies {
        /// The device.
        device: DeviceId,
        /// 1 to [`COPIES_MAX`](super::validate::COPIES_MAX).
        copies: u8,
    },
    /// There is one more device: nothing was ever written to it, so all its copies are in sync.
    CreateDevice {
        /// The device; its id is [`DistributionMap::next_device`], and what counts versions in it is set here.
        device: Box<Device>,
    },
    /// A device is no more, and its slots are free.
    DeleteDevice {
        /// The device.
        device: DeviceId,
    },
    /// A device is longer from now on: nothing was ever written to what is added.
    GrowDevice {
        /// The device.
        device: DeviceId,
        /// What is added, from the end of the device on.
        spans: Vec<Span>,
    },
    /// When a device's secondaries acknowledge a write.
    SetCommit {
        /// The device.
        device: DeviceId,
        /// From deferred to immediate commit the way leads over settling.
        commit: Commit,
    },
    /// What becomes of a device's requests that cannot be served.
    SetOnNoQuorum {
        /// The device.
        device: DeviceId,
        /// From now on.
        on_no_quorum: OnNoQuorum,
    },
    /// What is to be moved from now on; its id is the map's next.
    BeginPlan {
        /// The plan.
        plan: Plan,
    },
    /// A plan begins nothing new, or goes on.
    PausePlan {
        /// The plan.
        plan: PlanId,
        /// Whether it is to rest.
        paused: bool,
    },
    /// A plan is done, or is given up as it is.
    EndPlan {
        /// The plan.
        plan: PlanId,
    },
}

/// Why a batch was refused; nothing of it was applied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum VerbError {
    #[error("there is no {0} in the map")]
    UnknownDevice(DeviceId),
    #[error("there is no {0} in the map")]
    UnknownNode(NodeId),
    #[error("there is no {0} in the map")]
    UnknownDisk(DiskId),
    #[error("there is no {0} in the map")]
    UnknownPlan(PlanId),
    #[error("{device} has no slices {first} to {end}")]
    NoSuchSlices { device: DeviceId, first: u32, end: u32 },
    #[error("{device} slice {slice} has no replica on {disk}")]
    NoReplica { device: DeviceId, slice: u32, disk: DiskId },
    #[error(
        "{device} slice {slice}: the replica on {disk} is {state:?}; only one that is in sync is promoted"
    )]
    NotInSync { device: DeviceId, slice: u32, disk: DiskId, state: ReplicaState },
    #[error("{device} slice {slice}: the replica on {disk} is the last that is in sync")]
    LastMember { device: DeviceId, slice: u32, disk: DiskId },
    #[error("{0} was not reserved for a disk that enters, or is another's")]
    DiskNotReserved(DiskId),
    #[error("{0} was not reserved for a node that enters, or is another's")]
    NodeNotReserved(NodeId),
    #[error("{node} has a disk named {name} already")]
    DiskNameTaken { node: String, name: String },
    #[error("{disk} holds a copy of {device} slice {slice}")]
    DiskInUse { disk: DiskId, device: DeviceId, slice: u32 },
    #[error("{plan} moves something to {disk}")]
    Awaited { disk: DiskId, plan: PlanId },
    #[error("{node} has {disk}; remove that first")]
    NodeHasDisk { node: NodeId, disk: DiskId },
    #[error("{node} exports {device}; another node has to first")]
    NodeExports { node: NodeId, device: DeviceId },
    #[error("{device} is, or was, another device")]
    DeviceIdTaken { device: DeviceId },
    #[error("{plan} moves some of {device}")]
    Moving { device: DeviceId, plan: PlanId },
    #[error("{device} keeps in memory what it acknowledged until it has settled")]
    Unsettled { device: DeviceId },
    #[error("{device} slice {slice}: the replica on {disk} is the primary; promote another first")]
    IsPrimary { device: DeviceId, slice: u32, disk: DiskId },
    #[error("the change would make an invalid map: {0}")]
    Invalid(#[from] InvalidMap),
}

impl DistributionMap {
    /// Applies a batch. `Ok(None)`: all of it holds already, nothing changes.
    ///
    /// The result's version is one higher, and so is the epoch of exactly the slices whose replica
    /// list changed.
    pub fn apply(&self, batch: &[Verb]) -> Result<Option<Self>, VerbError> {
        let mut next = self.clone();
        next.version = MapVersion(self.version.0 + 1);
        for verb in batch {
            next.apply_verb(verb)?;
        }
        let counted = |map: &Self| (map.last_device, map.last_disk, map.last_node);
        let kept = (next.topology, counted(&next)) == (self.topology, counted(self));
        if kept
            && (&next.devices, &next.disks, &next.nodes, &next.plans)
                == (&self.devices, &self.disks, &self.nodes, &self.plans)
        {
            return Ok(None);
        }
        for device in &mut next.devices {
            merge_equal_spans(device);
        }
        next.validate()?;
        Ok(Some(next))
    }

    fn apply_verb(&mut self, verb: &Verb) -> Result<(), VerbError> {
        match verb {
            Verb::AddReplica { run, disk, segment, incarnation } => {
                self.disk(*disk).ok_or(VerbError::UnknownDisk(*disk))?;
                let added = self.version;
                self.each_span(*run, |_, span| {
                    if span.replica_on(*disk).is_none() {
                        span.replicas.push(Replica {
                            disk: *disk,
                            segment: *segment,
                            added,
                            state: ReplicaState::Syncing,
                            incarnation: *incarnation,
                        });
                    }
                    Ok(())
                })
            }
            Verb::Promote { run, disk } => self.each_span(*run, |device, span| {
                let index = position(device, span, *disk)?;
                let state = span.replicas[index].state;
                if planted::is(Bug::StalePromoted) {
                    span.replicas[index].state = ReplicaState::InSync;
                } else if state != ReplicaState::InSync {
                    return Err(VerbError::NotInSync { device, slice: span.first.0, disk: *disk, state });
                }
                span.replicas[..=index].rotate_right(1);
                Ok(())
            }),
            Verb::DropReplica { run, disk } => self.each_span(*run, |device, span| {
                let Ok(index) = position(device, span, *disk) else { return Ok(()) };
                if index == 0 {
                    return Err(VerbError::IsPrimary { device, slice: span.first.0, disk: *disk });
                }
                span.replicas.remove(index);
                Ok(())
            }),
            Verb::Mark { run, disk, state, incarnation } => self.each_span(*run, |device, span| {
                let index = position(device, span, *disk)?;
                if *state != ReplicaState::InSync {
                    if span.members().all(|member| member.disk == *disk) {
                        return Err(VerbError::LastMember { device, slice: span.first.0, disk: *disk });
                    }
                    if index == 0 {
                        return Err(VerbError::IsPrimary { device, slice: span.first.0, disk: *disk });
                    }
                }
                span.replicas[index].state = *state;
                if let Some(incarnation) = incarnation {
                    span.replicas[index].incarnation = *incarnation;
                }
                Ok(())
            }),
            Verb::Readmit { run, disk, incarnation, lost } => self.each_span(*run, |device, span| {
                let index = position(device, span, *disk)?;
                let state = span.replicas[index].state;
                if state != ReplicaState::InSync {
                    return Err(VerbError::NotInSync { device, slice: span.first.0, disk: *disk, state });
                }
                if *lost && span.replicas[index].incarnation != *incarnation && !planted::is(Bug::LossUntold)
                {
                    span.loss = LossGeneration(span.loss.0 + 1);
                }
                go_on_alone(span, index, *incarnation);
                Ok(())
            }),
            Verb::Force { run, disk, incarnation } => self.each_span(*run, |device, span| {
                let index = position(device, span, *disk)?;
                let done = index == 0 && span.replicas[0].incarnation == *incarnation;
                if !done || span.members().count() > 1 {
                    span.loss = LossGeneration(span.loss.0 + 1);
                    go_on_alone(span, index, *incarnation);
                }
                Ok(())
            }),
            Verb::MoveClaim { device, node } => {
                self.node(*node).ok_or(VerbError::UnknownNode(*node))?;
                let version = self.version;
                let device = self
                    .devices
                    .iter_mut()
                    .find(|d| d.id == *device)
                    .ok_or(VerbError::UnknownDevice(*device))?;
                if device.claim.node != *node {
                    device.claim.node = *node;
                    device.claim.generation = ClaimGeneration(device.claim.generation.0 + 1);
                    device.claim.since = version;
                }
                Ok(())
            }
            Verb::FailDisk { disk, reason } => {
                let disk =
                    self.disks.iter_mut().find(|d| d.id == *disk).ok_or(VerbError::UnknownDisk(*disk))?;
                disk.failed.get_or_insert_with(|| Failed { reason: reason.clone() });
                Ok(())
            }
            Verb::SetSpare { disk, spare } => {
                let disk =
                    self.disks.iter_mut().find(|d| d.id == *disk).ok_or(VerbError::UnknownDisk(*disk))?;
                disk.spare = *spare;
                Ok(())
            }
            Verb::Reserve { disk, node } => {
                self.reserve(*disk, *node);
                Ok(())
            }
            Verb::AddDisk { disk } => self.add_disk(disk),
            Verb::AddNode { node } => self.add_node(node),
            Verb::RemoveDisk { disk } => self.remove_disk(*disk),
            Verb::RemoveNode { node } => self.remove_node(*node),
            Verb::SetTopology { topology } => {
                self.topology = *topology;
                Ok(())
            }
            Verb::SetCopies { device, copies } => {
                self.device_mut(*device)?.copies = *copies;
                Ok(())
            }
            Verb::CreateDevice { device } => {
                if device.id != self.next_device() {
                    return Err(VerbError::DeviceIdTaken { device: device.id });
                }
                let mut device = (**device).clone();
                device.claim.since = self.version;
                for span in &mut device.spans {
                    begin_span(span, self.version);
                }
                self.last_device = self.last_device.max(device.id.0);
                self.devices.push(device);
                Ok(())
            }
            Verb::DeleteDevice { device } => {
                let moves = |plan: &&Plan| plan.moves.iter().any(|step| step.run.device == *device);
                if let Some(plan) = self.plans.iter().find(moves) {
                    return Err(VerbError::Moving { device: *device, plan: plan.id });
                }
                self.last_device = self.next_device().0 - 1;
                self.devices.retain(|other| other.id != *device);
                Ok(())
            }
            Verb::GrowDevice { device, spans } => {
                let version = self.version;
                let device = self.device_mut(*device)?;
                for span in spans {
                    let mut span = span.clone();
                    begin_span(&mut span, version);
                    device.slices = device.slices.saturating_add(span.count);
                    device.spans.push(span);
                }
                Ok(())
            }
            Verb::SetCommit { device, commit } => {
                let epoch = SliceEpoch(self.version.0);
                let device = self.device_mut(*device)?;
                if device.commit == Commit::Deferred && *commit == Commit::Immediate {
                    return Err(VerbError::Unsettled { device: device.id });
                }
                if device.commit != *commit {
                    device.commit = *commit;
                    // Whoever acknowledges under the new epoch knows when it may, and who asks knows it too.
                    device.spans.iter_mut().for_each(|span| span.epoch = epoch);
                }
                Ok(())
            }
            Verb::SetOnNoQuorum { device, on_no_quorum } => {
                self.device_mut(*device)?.on_no_quorum = *on_no_quorum;
                Ok(())
            }
            Verb::BeginPlan { plan } => {
                // One that goes on with less than it began with has its number already.
                if let Err(place) = self.plans.binary_search_by_key(&plan.id, |other| other.id) {
                    self.plans.insert(place, plan.clone());
                }
                Ok(())
            }
            Verb::PausePlan { plan, paused } => {
                let plan =
                    self.plans.iter_mut().find(|p| p.id == *plan).ok_or(VerbError::UnknownPlan(*plan))?;
                plan.paused = *paused;
                Ok(())
            }
            Verb::EndPlan { plan } => {
                self.plans.retain(|other| other.id != *plan);
                Ok(())
            }
        }
    }

    fn device_mut(&mut self, id: DeviceId) -> Result<&mut Device, VerbError> {
        let index = self.devices.binary_search_by_key(&id, |device| device.id);
        Ok(&mut self.devices[index.map_err(|_| VerbError::UnknownDevice(id))?])
    }

    /// Runs `change` on each span of `run`, cut at its ends; what changed gets the new epoch.
    fn each_span(
        &mut self,
        run: Run,
        mut change: impl FnMut(DeviceId, &mut Span) -> Result<(), VerbError>,
    ) -> Result<(), VerbError> {
        let epoch = SliceEpoch(self.version.0);
        let index = self.devices.binary_search_by_key(&run.device, |device| device.id);
        let device = &mut self.devices[index.map_err(|_| VerbError::UnknownDevice(run.device))?];
        let end =
            run.first.0.checked_add(run.count).filter(|end| *end <= device.slices && run.count > 0).ok_or(
                VerbError::NoSuchSlices {
                    device: run.device,
                    first: run.first.0,
                    end: run.first.0.saturating_add(run.count),
                },
            )?;
        cut(device, run.first.0);
        cut(device, end);
        let first = device.spans.partition_point(|span| span.first < run.first);
        for span in device.spans[first..].iter_mut().take_while(|span| span.end() <= end) {
            let before = span.replicas.clone();
            change(run.device, span)?;
            if span.replicas[0].disk != before[0].disk {
                span.primary_since = MapVersion(epoch.0);
            }
            if span.replicas != before {
                span.epoch = epoch;
            }
        }
        Ok(())
    }
}

/// The slices of a span exist from that version on.
fn begin_span(span: &mut Span, version: MapVersion) {
    span.epoch = SliceEpoch(version.0);
    span.primary_since = MapVersion(0);
    for replica in &mut span.replicas {
        replica.added = version;
        replica.state = ReplicaState::InSync;
    }
}

/// That replica is the only member and the primary; also what was syncing is stale: the one that filled it is not
/// what it was.
fn go_on_alone(span: &mut Span, index: usize, incarnation: Incarnation) {
    for replica in &mut span.replicas {
        replica.state = ReplicaState::Stale;
    }
    span.replicas[index].state = ReplicaState::InSync;
    span.replicas[index].incarnation = incarnation;
    span.replicas[..=index].rotate_right(1);
}

fn position(device: DeviceId, span: &Span, disk: DiskId) -> Result<usize, VerbError> {
    span.replicas.iter().position(|replica| replica.disk == disk).ok_or(VerbError::NoReplica {
        device,
        slice: span.first.0,
        disk,
    })
}

/// Makes a span boundary at that slice.
fn cut(device: &mut Device, slice: u32) {
    let index = device.spans.partition_point(|span| span.end() <= slice);
    let Some(span) = device.spans.get_mut(index).filter(|span| span.first.0 < slice) else { return };
    let mut right = span.clone();
    right.count = span.end() - slice;
    right.first = SliceIndex(slice);
    span.count = slice - span.first.0;
    device.spans.insert(index + 1, right);
}

fn merge_equal_spans(device: &mut Device) {
    device.spans.dedup_by(|right, left| {
        let equal = left.epoch == right.epoch && left.loss == right.loss && left.replicas == right.replicas;
        if equal {
            left.count += right.count;
            left.primary_since = left.primary_since.max(right.primary_since);
        }
        equal
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AttachId, ProcessId};
    use crate::map::layout::tests::pair_map;
    use proptest::prelude::*;

    fn run(map: &DistributionMap) -> Run {
        Run { device: map.devices[0].id, first: SliceIndex(0), count: map.devices[0].slices }
    }

    #[test]
    fn failover_is_one_version_and_raises_the_epoch_of_its_slices_only() {
        let map = pair_map(2);
        let device = &map.devices[0];
        let (old, new) = (device.spans[0].replicas[0].disk, device.spans[0].replicas[1].disk);
        let batch = [
            Verb::Promote { run: run(&map), disk: new },
            Verb::Mark { run: run(&map), disk: old, state: ReplicaState::Stale, incarnation: None },
        ];
        let next = map.apply(&batch).unwrap().unwrap();
        assert_eq!(next.version.0, map.version.0 + 1);
        assert_eq!(next.devices[0].spans[0].primary().disk, new);
        assert_eq!(next.devices[0].spans[0].replicas[1].state, ReplicaState::Stale);
        assert_eq!(next.devices[0].spans[0].epoch.0, next.version.0);
        assert_eq!(next.devices[1], map.devices[1]);
        assert_eq!(next.apply(&batch).unwrap(), None, "a repeated batch changes nothing");
    }

    #[test]
    fn a_stale_copy_is_never_promoted_and_the_last_member_never_given_up() {
        let map = pair_map(2);
        let (first, second) =
            (map.devices[0].spans[0].replicas[0].disk, map.devices[0].spans[0].replicas[1].disk);
        let stale =
            Verb::Mark { run: run(&map), disk: second, state: ReplicaState::Stale, incarnation: None };
        let alone = map.apply(&[stale]).unwrap().unwrap();
        assert!(matches!(
            alone.apply(&[Verb::Promote { run: run(&map), disk: second }]),
            Err(VerbError::NotInSync { .. })
        ));
        let last = Verb::Mark { run: run(&map), disk: first, state: ReplicaState::Stale, incarnation: None };
        assert!(matches!(alone.apply(&[last]), Err(VerbError::LastMember { .. })));
        assert!(matches!(
            alone.apply(&[Verb::DropReplica { run: run(&map), disk: first }]),
            Err(VerbError::IsPrimary { .. })
        ));
    }

    #[test]
    fn readmission_leaves_one_member_and_counts_the_loss_once() {
        let map = pair_map(2);
        let disk = map.devices[0].spans[0].replicas[1].disk;
        let incarnation = Incarnation { attach: AttachId(77), process: ProcessId(78) };
        let verb = Verb::Readmit { run: run(&map), disk, incarnation, lost: true };
        let next = map.apply(std::slice::from_ref(&verb)).unwrap().unwrap();
        let span = &next.devices[0].spans[0];
        assert_eq!(span.primary().disk, disk);
        assert_eq!(span.members().count(), 1);
        assert_eq!(span.loss.0, 1);
        assert_eq!(next.apply(&[verb]).unwrap(), None);
    }

    #[test]
    fn a_claim_moves_with_a_new_generation() {
        let map = pair_map(2);
        let other = map.nodes[1].id;
        let next = map.apply(&[Verb::MoveClaim { device: map.devices[0].id, node: other }]).unwrap().unwrap();
        assert_eq!(next.devices[0].claim.generation.0, map.devices[0].claim.generation.0 + 1);
        assert_eq!(next.devices[0].claim.since, next.version);
    }

    proptest! {
        /// Whatever is asked for, in whatever order: the map stays valid, or it stays as it was;
        /// and no batch ever takes the last in-sync copy.
        #[test]
        fn any_sequence_of_verbs_keeps_the_map_valid(
            steps in prop::collection::vec((0u8..7, 0u32..6, 0u32..3, 0u32..8, 0u32..8), 1..40)
        ) {
            let mut map = pair_map(3);
            for (kind, disk, device, first, count) in steps {
                let run = Run { device: DeviceId(device + 1), first: SliceIndex(first), count };
                let disk = DiskId(disk + 1);
                let incarnation = Incarnation::default();
                let verb = match kind {
                    0 => Verb::AddReplica { run, disk, segment: Segment::Secondary, incarnation },
                    1 => Verb::Promote { run, disk },
                    6 => Verb::Force { run, disk, incarnation },
                    2 => Verb::DropReplica { run, disk },
                    3 => Verb::Mark { run, disk, state: ReplicaState::Stale, incarnation: None },
                    4 => Verb::Mark { run, disk, state: ReplicaState::InSync, incarnation: None },
                    _ => Verb::Readmit { run, disk, incarnation, lost: true },
                };
                if let Ok(Some(next)) = map.apply(&[verb]) {
                    prop_assert_eq!(next.version.0, map.version.0 + 1);
                    prop_assert_eq!(next.validate(), Ok(()));
                    let text = serde_json::to_string(&next).unwrap();
                    prop_assert_eq!(&serde_json::from_str::<DistributionMap>(&text).unwrap(), &next);
                    map = next;
                }
            }
        }
    }
}
