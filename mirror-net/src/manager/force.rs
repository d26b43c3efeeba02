//! An operator gives up what nobody can bring back: a copy that is not in sync goes on (docs/protocol.md rule 17).

use super::registry::{Registry, Standing};
use super::repair::{SpanPlan, plan_span};
use super::{Change, Lines, node_named, run_of};
use crate::config::format_bytes;
use crate::control::ForceOrder;
use crate::ids::{DiskId, Incarnation, NodeId};
use crate::map::verbs::Verb;
use crate::map::{Device, DistributionMap, Replica, ReplicaState, Span};
use std::collections::BTreeSet;

/// What would happen: a line for each thing that is given up, and the change.
///
/// Only slices that nobody serves, and that nothing but a return of somebody could save, are touched. A member
/// that is not heard of may be serving them where we cannot see it: the operator has to say that it is off. One
/// that is heard of and has lost its disk serves nothing, and hears of the new epoch from us.
pub fn plan(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    order: &ForceOrder,
) -> Result<Change, String> {
    let node = node_named(map, &order.node)?;
    for name in &order.confirmed_off {
        let off = node_named(map, name)?;
        if registry.is_up(&off.name, now_ms) {
            return Err(format!("{name} is not off: it is connected to this manager"));
        }
    }
    if let Some(name) = order.devices.iter().find(|name| !map.devices.iter().any(|it| it.name == **name)) {
        return Err(format!("there is no device {name:?}; `mirrorctl device list` shows them"));
    }
    let wanted = |device: &&Device| order.devices.is_empty() || order.devices.contains(&device.name);
    let mut change = Change::default();
    let (mut unsure, mut useless) = (BTreeSet::new(), Vec::new());
    for device in map.devices.iter().filter(wanted) {
        let mut lines = Lines::default();
        let mut first = None;
        for span in &device.spans {
            match decide(map, registry, now_ms, node.id, device, span) {
                Decision::Served => {}
                Decision::Useless(why) => useless.push(format!("{}: {why}", device.name)),
                Decision::Force { disk, incarnation, others } => {
                    unsure.extend(others.into_iter().filter(|name| !order.confirmed_off.contains(name)));
                    change.batch.push(Verb::Force { run: run_of(device.id, span), disk, incarnation });
                    lines.add(span, given_up(map, span, disk));
                    if span.first.0 == 0 {
                        first = Some(node.id);
                    }
                }
            }
        }
        let exporter = map.node(device.claim.node).is_some_and(|it| registry.is_up(&it.name, now_ms));
        if let Some(node) = first.filter(|_| !exporter) {
            change.batch.push(Verb::MoveClaim { device: device.id, node });
        }
        change.why.extend(lines.finish(&device.name, device.slices));
    }
    if !unsure.is_empty() {
        let names: Vec<String> = unsure.into_iter().collect();
        return Err(format!(
            "{} may be serving this data where nobody sees it: make sure that it is off, then repeat with {}",
            names.join(" and "),
            names.iter().map(|name| format!("--confirmed-off {name}")).collect::<Vec<_>>().join(" ")
        ));
    }
    if change.batch.is_empty() {
        useless.sort();
        useless.dedup();
        let why = if useless.is_empty() {
            "whatever it has a copy of is served, or will be without force".to_owned()
        } else {
            useless.join("; ")
        };
        return Err(format!("there is nothing to force onto {}: {why}", node.name));
    }
    Ok(change)
}

/// What force can do for a span.
enum Decision {
    /// It is served, or somebody takes it over without force.
    Served,
    /// Nobody serves it, and the node cannot either.
    Useless(String),
    /// The copy on that disk goes on, if these nodes are off.
    Force { disk: DiskId, incarnation: Incarnation, others: Vec<String> },
}

fn decide(
    map: &DistributionMap,
    registry: &Registry,
    now_ms: u64,
    node: NodeId,
    device: &Device,
    span: &Span,
) -> Decision {
    let standing = |replica: &Replica| registry.standing(map, device, span, replica, now_ms);
    if plan_span(map, device, span, registry, now_ms) != SpanPlan::Wait {
        return Decision::Served;
    }
    if let Some(member) = span.members().find(|member| standing(member) == Standing::Intact) {
        let primary = map.node_of(span.primary().disk).map_or_else(String::new, |id| map.node_name(id));
        return Decision::Useless(format!(
            "{} is in sync and there; `mirrorctl node failover {primary}` loses nothing",
            map.disk_name(member.disk)
        ));
    }
    let own = span.replicas.iter().filter(|replica| map.node_of(replica.disk) == Some(node));
    let Some(own) = own.max_by_key(|replica| worth(replica.state)) else {
        // It has no copy of this one, and was not asked about it.
        return Decision::Served;
    };
    let usable = |replica: &Replica| registry.usable(map, replica.disk, now_ms);
    let Some(incarnation) = usable(own) else {
        return Decision::Useless(format!("{} is not there", map.disk_name(own.disk)));
    };
    let better = span.members().find(|member| own.state != ReplicaState::InSync && usable(member).is_some());
    if let Some(better) = better {
        return Decision::Useless(format!(
            "{} was in sync and is there; `mirrorctl node force {}` loses less",
            map.disk_name(better.disk),
            map.node_of(better.disk).map_or_else(String::new, |id| map.node_name(id))
        ));
    }
    let away = |replica: &&Replica| {
        let id = map.node_of(replica.disk).filter(|id| *id != node);
        id.and_then(|id| map.node(id)).is_some_and(|node| !registry.is_up(&node.name, now_ms))
    };
    let others = span.members().filter(away).filter_map(|replica| map.node_of(replica.disk));
    let others = others.map(|id| map.node_name(id)).collect();
    Decision::Force { disk: own.disk, incarnation, others }
}

/// Which of two copies is rather to go on.
fn worth(state: ReplicaState) -> u8 {
    match state {
        ReplicaState::InSync => 2,
        ReplicaState::Stale => 1,
        // It has been filled in part: some of it is new and some old.
        ReplicaState::Syncing => 0,
    }
}

/// What is given up, for people.
fn given_up(map: &DistributionMap, span: &Span, disk: DiskId) -> String {
    let state = span.replica_on(disk).map(|replica| replica.state);
    let bytes = format_bytes(u64::from(span.count) * u64::from(map.slice_bytes));
    let lost = match state {
        Some(ReplicaState::InSync) => "whatever was acknowledged and not flushed may be lost",
        Some(ReplicaState::Syncing) => {
            "it was being filled and is a mixture of old and new: whatever is on it needs a check"
        }
        _ => "whatever was acknowledged since it became stale is lost",
    };
    format!(
        "{bytes} go on from {}, whose copies last changed in map {}: {lost}",
        map.disk_name(disk),
        span.epoch.0
    )
}
