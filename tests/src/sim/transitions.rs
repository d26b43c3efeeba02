//! What may follow what in the store: from one map to the next.

use mirror_net::ids::{Incarnation, SliceIndex};
use mirror_net::map::{Commit, Device, DistributionMap, ReplicaState, Span};

/// What is wrong with this step, in words.
pub fn wrong_with(before: &DistributionMap, after: &DistributionMap) -> Vec<String> {
    let mut wrong = Vec::new();
    if after.version.0 != before.version.0 + 1 {
        wrong.push(format!("map {} follows {}", after.version, before.version));
    }
    for new in &after.devices {
        let Some(old) = before.device(new.id) else { continue };
        if old != new {
            device(old, new, after.version.0, &mut wrong);
        }
    }
    wrong
}

fn device(old: &Device, new: &Device, version: u64, wrong: &mut Vec<String>) {
    let moved = old.claim.node != new.claim.node;
    let raised = new.claim.generation.0 > old.claim.generation.0;
    if moved != raised || (moved && new.claim.since.0 != version) {
        wrong.push(format!("{}: claim {:?} follows {:?}", new.name, new.claim, old.claim));
    }
    for slice in (0..new.slices).map(SliceIndex) {
        let (Some(old), Some(new_span)) = (old.span(slice), new.span(slice)) else { continue };
        for what in span(new.commit, old, new_span, version) {
            wrong.push(format!("map {version}: {} {slice}: {what}: {new_span:?} follows {old:?}", new.name));
        }
    }
}

fn span(commit: Commit, old: &Span, new: &Span, version: u64) -> Vec<&'static str> {
    use ReplicaState::{InSync, Stale};
    let mut wrong = Vec::new();
    let changed = old.replicas != new.replicas;
    if new.epoch.0 != if changed { version } else { old.epoch.0 } {
        wrong.push("the epoch is not that of the last change");
    }
    if new.loss < old.loss {
        wrong.push("the loss generation sinks");
    }
    if !changed {
        return wrong;
    }
    if old.replica_on(new.primary().disk).is_none_or(|replica| replica.state != InSync) {
        wrong.push("a copy that was not in sync is primary");
    }
    for replica in &new.replicas {
        match (old.replica_on(replica.disk).map(|old| old.state), replica.state) {
            (None, InSync | Stale) => wrong.push("a new copy does not begin as syncing"),
            (Some(Stale), InSync) => wrong.push("a stale copy is in sync at once"),
            _ => {}
        }
    }
    // What a secondary acknowledged is in its memory, where commits are deferred.
    let in_memory = |disk| commit != Commit::Immediate && old.primary().disk != disk;
    let has_all = |disk, now: Incarnation| {
        old.replica_on(disk).is_some_and(|old| {
            let same = now.attach == old.incarnation.attach && (!in_memory(disk) || now == old.incarnation);
            old.state == InSync && same
        })
    };
    if !new.members().any(|member| has_all(member.disk, member.incarnation)) && new.loss == old.loss {
        wrong.push("no member has its caches and what was in memory, and nobody is told of a loss");
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::cluster::{Cluster, Shape};
    use mirror_net::ids::{AttachId, LossGeneration};

    fn map() -> DistributionMap {
        let shape = Shape {
            nodes: 2,
            spares: 0,
            disks: 1,
            pairs: false,
            copies: 2,
            devices: 1,
            mirrored_only: true,
            drift: false,
            depth: 0,
            discards: false,
            policy: Default::default(),
            wanders: false,
            operator: false,
        };
        (*Cluster::new(1, shape, false).manager.map).clone()
    }

    fn after(map: &DistributionMap, change: impl Fn(&mut Span)) -> DistributionMap {
        let mut next = map.clone();
        next.version.0 += 1;
        for span in &mut next.devices[0].spans {
            change(span);
            span.epoch.0 = next.version.0;
        }
        next
    }

    #[test]
    fn a_stale_copy_comes_back_only_as_syncing_and_is_never_promoted() {
        let map = map();
        let alone = after(&map, |span| span.replicas[1].state = ReplicaState::Stale);
        assert_eq!(wrong_with(&map, &alone), Vec::<String>::new());
        let back = after(&alone, |span| span.replicas[1].state = ReplicaState::InSync);
        assert!(!wrong_with(&alone, &back).is_empty());
        let syncing = after(&alone, |span| span.replicas[1].state = ReplicaState::Syncing);
        assert_eq!(wrong_with(&alone, &syncing), Vec::<String>::new());
        let promoted = after(&alone, |span| {
            span.replicas.rotate_left(1);
            span.replicas[0].state = ReplicaState::InSync;
        });
        assert!(!wrong_with(&alone, &promoted).is_empty());
        let handed_over = after(&map, |span| span.replicas.rotate_left(1));
        assert_eq!(wrong_with(&map, &handed_over), Vec::<String>::new());
    }

    #[test]
    fn lost_caches_are_a_loss() {
        let map = map();
        let readmitted = |lost: u32| {
            after(&map, |span| {
                span.replicas[0].incarnation.attach = AttachId(77);
                span.replicas[1].state = ReplicaState::Stale;
                span.loss = LossGeneration(lost);
            })
        };
        assert!(!wrong_with(&map, &readmitted(0)).is_empty());
        assert_eq!(wrong_with(&map, &readmitted(1)), Vec::<String>::new());
    }
}
