//! An operator's words to the manager, and what has to hold of what comes of them.

use super::Cluster;
use crate::sim::operator::{Deed, Wish};
use mirror_net::control::{
    DeviceChange, DeviceOrder, OperatorReply, PlanOrder, Redistribution, RedistributionOrder,
};
use mirror_net::manager::{Input, Ticket};
use mirror_net::map::plan::{Move, Plan};
use mirror_net::map::{Device, DistributionMap, ReplicaState, Span};

/// The ticket of a request that is none of these.
pub(super) const OTHER: Ticket = Ticket(0);

/// How the names of devices begin that an operator made.
const MADE: &str = "made";

fn ticket(deed: Deed) -> Ticket {
    Ticket(deed as u64 + 1)
}

impl Cluster {
    pub(super) fn redistribute(&mut self, wish: Wish) {
        let (wish, deed) = match wish {
            Wish::Balance => (Redistribution::Balance, Deed::Rebalanced),
            Wish::Topology(topology) => {
                (Redistribution::Topology { topology, copies: None }, Deed::TopologyChanged)
            }
            Wish::Copies { device, copies } => {
                let mirrored = self.manager.map.devices.iter().filter(|device| device.is_mirrored());
                let names: Vec<&str> = mirrored.map(|device| device.name.as_str()).collect();
                if names.is_empty() {
                    return;
                }
                let device = names[device % names.len()].to_owned();
                (Redistribution::Copies { device, copies }, Deed::CopiesChanged)
            }
            Wish::Make { .. } | Wish::Grow | Wish::Delete => return self.change_device(wish),
            Wish::Spare { node, disk, onto_spares } => {
                let emptied = match disk {
                    Some(disk) => format!("n{node}/d{}", disk + 1),
                    None => format!("n{node}"),
                };
                let map = &self.manager.map;
                let spares = map.disks.iter().filter(|it| onto_spares && it.spare && it.node.0 != node);
                let onto = spares.map(|disk| map.disk_name(disk.id)).collect();
                (Redistribution::Spare { emptied, onto }, Deed::SpareMade)
            }
        };
        let order = RedistributionOrder { wish, carry_out: true };
        self.feed(Input::Redistribute { ticket: ticket(deed), order });
    }

    /// Makes a device that nobody uses, deletes the last of those, or enlarges one, which may be in use.
    fn change_device(&mut self, wish: Wish) {
        let map = &self.manager.map;
        let bytes = |slices: u32| u64::from(slices) * u64::from(map.slice_bytes);
        let last = map.devices.last().filter(|device| device.name.starts_with(MADE));
        // As good as any, and no schedule that enlarges nothing becomes another one by it.
        let any = map.devices.get(map.version.0 as usize % map.devices.len().max(1));
        let (name, change, deed) = match (wish, last) {
            (Wish::Make { node, copies }, _) => {
                let change = DeviceChange::Create {
                    bytes: bytes(1 + u32::from(copies) % 2),
                    node: format!("n{node}"),
                    copies,
                    commit: self.shape.policy.commit,
                    on_no_quorum: self.shape.policy.on_no_quorum,
                };
                (format!("{MADE}{}", map.next_device().0), change, Deed::DeviceMade)
            }
            (Wish::Grow, _) => {
                let Some(device) = any else { return };
                let change = DeviceChange::Grow { bytes: bytes(device.slices + 1) };
                (device.name.clone(), change, Deed::DeviceGrown)
            }
            (_, Some(last)) => {
                // Nodes here do not tell what they export, and nobody uses what the operator makes.
                (last.name.clone(), DeviceChange::Delete { force: true }, Deed::DeviceDeleted)
            }
            _ => return,
        };
        let order = DeviceOrder { name, change, carry_out: true };
        self.feed(Input::Device { ticket: ticket(deed), order });
    }

    /// About one of the plans that there are.
    pub(super) fn order(&mut self, order: PlanOrder, nth: usize) {
        let plans = &self.manager.map.plans;
        let Some(plan) = plans.get(nth % plans.len().max(1)).map(|plan| plan.id) else { return };
        let deed = match order {
            PlanOrder::Pause => Deed::Paused,
            PlanOrder::Resume => Deed::Resumed,
            PlanOrder::Cancel => Deed::Cancelled,
        };
        self.feed(Input::Plan { ticket: ticket(deed), plan, order });
    }

    /// All is mended: what rests goes on, and what can come to no end is taken back.
    pub fn conclude_plans(&mut self) {
        if !self.shape.operator || self.manager.storing {
            return;
        }
        let map = self.manager.map.clone();
        for (nth, plan) in map.plans.iter().enumerate() {
            if plan.paused {
                self.order(PlanOrder::Resume, nth);
            } else if !plan.cancelled && self.is_unreadable(plan) {
                self.order(PlanOrder::Cancel, nth);
            }
        }
        // Where a third copy was cancelled or has no room any more he is content with what there is.
        let uneven = |device: &&Device| {
            let wanted = usize::from(device.copies);
            device.is_mirrored() && device.spans.iter().any(|span| span.replicas.len() != wanted)
        };
        if let Some(device) = map.devices.iter().find(uneven).filter(|_| map.plans.is_empty()) {
            let fewest = device.spans.iter().map(|span| span.replicas.len()).min().unwrap_or(1);
            let (device, copies) = (device.name.clone(), fewest as u8);
            let order =
                RedistributionOrder { wish: Redistribution::Copies { device, copies }, carry_out: true };
            self.feed(Input::Redistribute { ticket: OTHER, order });
        }
    }

    /// Whether a plan moves something that nobody can read any more.
    pub(super) fn is_unreadable(&self, plan: &Plan) -> bool {
        // Where one copy cannot be read and the other has never had it the primary says so.
        let said = self.waiting();
        let of_plan = |step: &Move| {
            let device = self.manager.map.device(step.run.device);
            let device = device.map_or_else(String::new, |device| format!("{}: ", device.name));
            said.iter().any(|line| line.contains(&device) && line.contains("regions cannot be copied to"))
        };
        // Nor does anything of a device become a member on a node where a broken disk has the last copy of another part:
        // the node's flush of the device fails.
        let blocked = |step: &Move| {
            let map = &self.manager.map;
            let node = map.node_of(step.to);
            let spans = map.device(step.run.device).into_iter().flat_map(|device| &device.spans);
            spans.flat_map(Span::members).any(|copy| {
                map.node_of(copy.disk) == node
                    && map.disk(copy.disk).is_some_and(|disk| disk.failed.is_some())
            })
        };
        if plan.moves.iter().any(|step| of_plan(step) || blocked(step)) {
            return true;
        }
        let mut spans = plan.moves.iter().flat_map(|step| self.manager.map.spans_of(step.run));
        spans.any(|(span, _)| {
            let works = |media: &crate::sim::disk::SimDisk| {
                !media.is_dead() && !media.has_failed && !media.has_unreadable() && !media.faults.is_broken()
            };
            !span.members().any(|member| works(&self.mounted(member.disk).media))
        })
    }

    /// What the manager answered.
    pub(super) fn answered(&mut self, ticket: Ticket, reply: &OperatorReply) {
        let Some(deed) = Deed::ALL.iter().find(|deed| self::ticket(**deed) == ticket) else { return };
        let nothing = |lines: &[String]| {
            let moving = lines.iter().any(|line| line.contains("mirrorctl plan watch"));
            matches!(deed, Deed::SpareMade | Deed::Rebalanced | Deed::TopologyChanged | Deed::CopiesChanged)
                && !moving
        };
        let deed = match reply {
            OperatorReply::Done { lines } if !nothing(lines) => *deed,
            _ => Deed::Refused,
        };
        self.deeds[deed as usize] += 1;
    }

    /// A plan is over, or goes on with less.
    pub(super) fn note_plans(&mut self, before: &DistributionMap, after: &DistributionMap) {
        for plan in &before.plans {
            let moved = |plan: &Plan| plan.progress(after).in_sync == plan.progress(after).slices;
            let is_regeneration = plan.cause.starts_with("regeneration");
            match after.plan(plan.id) {
                None if is_regeneration => self.plans_done += u64::from(moved(plan)),
                None if moved(plan) && !plan.cancelled => self.deeds[Deed::Done as usize] += 1,
                None => self.deeds[Deed::GivenUp as usize] += 1,
                Some(_) => {}
            }
        }
    }

    /// What must hold of what a manager decides by itself where nobody else moves copies: none goes that was in sync
    /// unless as many are left as are wanted, or as there were; and there are never fewer than are wanted.
    pub(super) fn check_drops(&mut self, before: &DistributionMap, after: &DistributionMap) {
        if !self.shape.operator {
            return;
        }
        let mut wrong = Vec::new();
        for plan in after.plans.iter().filter(|plan| before.plan(plan.id).is_none()) {
            for step in &plan.moves {
                let wanted = after.device(step.run.device).map_or(0, |device| usize::from(device.copies));
                let has =
                    |span: &Span, disk: Option<_>| disk.is_some_and(|disk| span.replica_on(disk).is_some());
                let both = |span: &Span| has(span, step.from) && has(span, Some(step.to));
                if before.spans_of(step.run).any(|(span, _)| both(span) && span.replicas.len() <= wanted) {
                    wrong.push(format!("{} gives up a copy for one that there is: {step:?}", plan.id));
                }
            }
        }
        for new in &after.devices {
            let Some(old) = before.device(new.id).filter(|old| *old != new) else { continue };
            let wanted = usize::from(new.copies);
            for slice in (0..new.slices).map(mirror_net::ids::SliceIndex) {
                let (Some(old), Some(span)) = (old.span(slice), new.span(slice)) else { continue };
                let mut dropped =
                    old.replicas.iter().filter(|copy| span.replica_on(copy.disk).is_none()).peekable();
                if dropped.peek().is_none() {
                    continue;
                }
                let members = |span: &Span| span.members().count();
                let was_member = dropped.any(|copy| copy.state == ReplicaState::InSync);
                // A third copy that is still to come in a plan was not there before either.
                let comes = |step: &Move| {
                    let run = step.run;
                    let has = (run.first.0..run.first.0 + run.count).contains(&slice.0);
                    run.device == new.id && has && step.from.is_none() && span.replica_on(step.to).is_none()
                };
                let to_come =
                    after.plans.iter().flat_map(|plan| &plan.moves).filter(|step| comes(step)).count();
                // What a move had begun was one too many, or the third of two.
                let moved = |step: &&Move| {
                    let run = step.run;
                    let has = (run.first.0..run.first.0 + run.count).contains(&slice.0);
                    let both = [step.from, Some(step.to)]
                        .map(|disk| disk.is_some_and(|disk| old.replica_on(disk).is_some()));
                    run.device == new.id && has && both == [true; 2]
                };
                let extra = before.plans.iter().flat_map(|plan| &plan.moves).filter(moved).count();
                let had = old.replicas.len() - extra.min(old.replicas.len());
                // Where a third copy was cancelled there are two to be kept, however many are wished.
                let kept = wanted.min(had);
                let few = was_member && members(span) + to_come < kept.min(members(old));
                if few || span.replicas.len() + to_come < kept {
                    wrong.push(format!("{} {slice}: too little is left: {span:?} follows {old:?}", new.name));
                }
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    /// Every slice has as many copies as are wanted, all in sync but those that nobody can bring back.
    pub fn check_copies(&mut self) {
        if !self.shape.operator {
            return;
        }
        let (map, said) = (self.manager.map.clone(), self.waiting());
        for device in &map.devices {
            for span in &device.spans {
                let unreadable =
                    span.members().all(|member| self.mounted(member.disk).media.has_unreadable())
                        || self.has_held_up(&said, device, span);
                let complete = span.replicas.len() == usize::from(device.copies);
                if !complete && !unreadable && !self.is_place_kept() {
                    let wrong = format!("{} has not {} copies: {span:?}", device.name, device.copies);
                    self.checker.violations.push(wrong);
                }
            }
        }
    }
}
