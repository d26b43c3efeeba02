//! An operator moves everything away from a node.

use super::registry::{Registry, Standing};
use super::{Lines, left_behind_text, node_named, promotion, run_of};
use crate::ids::NodeId;
use crate::map::verbs::Verb;
use crate::map::{Device, DistributionMap, ReplicaState, Span};

/// What a failover would do.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Failover {
    /// The steps, one batch.
    pub batch: Vec<Verb>,
    /// One line for each thing that moves.
    pub moved: Vec<String>,
    /// One line for each thing that cannot, with what to do.
    pub stayed: Vec<String>,
}

/// Computes the failover of a node: nothing, if it serves nothing; an error, for people, if nothing can move.
///
/// The copies of a node that is well stay in sync, those of one that is not become stale (see
/// `promotion`) until the new primary reaches it and resyncs them. Nothing is failed back by itself.
pub fn plan(map: &DistributionMap, registry: &Registry, now_ms: u64, name: &str) -> Result<Failover, String> {
    let node = node_named(map, name)?;
    let mut plan = Failover::default();
    for device in &map.devices {
        move_device(map, registry, now_ms, node.id, device, &mut plan);
    }
    if plan.batch.is_empty() && !plan.stayed.is_empty() {
        return Err(format!("nothing of node {name} can move: {}", plan.stayed.join("; ")));
    }
    Ok(plan)
}

fn move_device(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    node: NodeId,
    device: &Device,
    plan: &mut Failover,
) {
    let (mut moved, mut stayed) = (Lines::default(), Lines::default());
    // The node that serves the first slice afterwards, if that is a node that works.
    let mut first = None;
    for span in &device.spans {
        let old = span.primary();
        let serving = if map.node_of(old.disk) == Some(node) {
            match successor(map, registry, now_ms, node, device, span) {
                Ok(disk) => {
                    plan.batch.extend(promotion(map, registry, now_ms, span, run_of(device.id, span), disk));
                    let others = left_behind_text(map, registry, now_ms, device, span, disk);
                    moved.add(
                        span,
                        format!("primary {} -> {}{others}", map.disk_name(old.disk), map.disk_name(disk)),
                    );
                    map.node_of(disk)
                }
                Err(why) => {
                    stayed.add(span, why);
                    None
                }
            }
        } else {
            map.node_of(old.disk)
                .filter(|_| registry.standing(map, device, span, old, now_ms) == Standing::Intact)
        };
        if span.first.0 == 0 {
            first = serving;
        }
    }
    let mut claim = Lines::default();
    if device.claim.node == node {
        let whole = &device.spans[0];
        match first {
            Some(exporter) => {
                plan.batch.push(Verb::MoveClaim { device: device.id, node: exporter });
                claim.add(whole, format!("exporter {} -> {}", map.node_name(node), map.node_name(exporter)));
            }
            None if map.node_of(whole.primary().disk) != Some(node) => stayed.add(
                whole,
                format!(
                    "its exporter cannot move: the primary {} does not work either; bring it back first",
                    map.disk_name(whole.primary().disk)
                ),
            ),
            // Said already, with the reason why the first slices stay.
            None => {}
        }
    }
    plan.moved.extend(moved.finish(&device.name, device.slices));
    // A claim belongs to the device, whatever slices it was decided by.
    plan.moved.extend(claim.entries.into_iter().map(|(text, _)| format!("{}: {text}", device.name)));
    plan.stayed.extend(stayed.finish(&device.name, device.slices));
}

/// The member that takes a span over, or a sentence why none can.
fn successor(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    node: NodeId,
    device: &Device,
    span: &Span,
) -> Result<crate::ids::DiskId, String> {
    let here = map.node_name(node);
    let own = map.disk_name(span.primary().disk);
    let mut why = Vec::new();
    for replica in &span.replicas[1..] {
        let disk = map.disk_name(replica.disk);
        let partner = map.node_of(replica.disk).map_or_else(String::new, |id| map.node_name(id));
        match (replica.state, registry.standing(map, device, span, replica, now_ms)) {
            (ReplicaState::InSync, Standing::Intact) => return Ok(replica.disk),
            (ReplicaState::Stale, _) => why.push(format!(
                "the copy on {disk} is stale, it lacks writes that only {own} has; bring {here} back"
            )),
            (ReplicaState::Syncing, _) => why.push(format!(
                "the copy on {disk} is not complete yet; wait until it is in sync, or bring {here} back"
            )),
            (_, Standing::Unknown | Standing::Away) => {
                why.push(format!("{partner}, which has the other copy, is not connected; start it first"));
            }
            (_, Standing::Changed { power_lost: false, .. }) => why.push(format!(
                "ublk-server on {partner} was restarted with acknowledged writes in its memory, which {own} has; bring \
                 {here} back"
            )),
            (_, Standing::Changed { .. }) => why.push(format!(
                "{disk} was attached anew or {partner} lost power, and only {own} can tell whether the copy there \
                 is complete; bring {here} back"
            )),
            (_, Standing::Gone) => {
                why.push(format!("the disk {disk} with the other copy is gone; bring {here} back"));
            }
        }
    }
    if why.is_empty() {
        why.push(format!("{own} holds the only copy; bring {here} back"));
    }
    Err(why.join(", and "))
}
