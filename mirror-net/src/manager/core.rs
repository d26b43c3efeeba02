//! The manager as a state machine.

mod entering;

use super::ask::{Ask, Asks, Wish};
use super::broadcast::Broadcasts;
use super::create::Creation;
use super::enrolment::Enrolment;
use super::evening::Evening;
use super::findings::slow_lines;
use super::rebuild::{self, Rebuild};
use super::redistribution::View;
use super::regeneration::{self, Situation};
use super::registry::{self, Refusal, Registry, outdated, own_disks};
use super::repair::repair;
use super::{
    Change, ConnectionId, Input, Output, Proposal, Ticket, advance, detector, devices, export, failover,
    findings, force, making, redistribution,
};
use crate::config::Policy;
use crate::control::{
    ClusterStatus, DeviceOrder, EventKind, ForceOrder, ManagerMessage, NodeMessage, NodeStatus,
    OperatorReply, PlanOrder, RedistributionOrder, Registration,
};
use crate::ids::{ClusterId, DiskId, ExporterSession, MapVersion, NodeId, PlanId};
use crate::map::DistributionMap;
use crate::map::plan::Plan;
use crate::planted::{self, Bug};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Milliseconds between two looks at which disk could become a spare.
const MAKING_MS: u64 = 1_000;

/// The system manager: see the module's description.
#[derive(Debug)]
pub struct Manager {
    policy: Policy,
    map: Option<DistributionMap>,
    /// When it began to listen; `None` before its first input.
    started_ms: Option<u64>,
    /// Disks that an operator does not want made again, until this manager ends.
    held: BTreeSet<DiskId>,
    /// Lost disks for which nothing is emptied any more, by an operator, until this manager ends.
    not_made_for: BTreeSet<DiskId>,
    /// When the next look is due at which disk could become a spare where there is none.
    next_making_ms: u64,
    /// Why copies that are gone are not made again, as was last said.
    hindered: Vec<String>,
    registry: Registry,
    /// Nodes that know a newer map than we do, with what to say about each.
    outdated: BTreeMap<String, String>,
    asks: Asks,
    /// The last question of each node about each other that led to nothing: the log says it once.
    ignored: BTreeMap<(String, NodeId), String>,
    failovers: VecDeque<(Ticket, String)>,
    forces: VecDeque<(Ticket, ForceOrder)>,
    orders: VecDeque<(Ticket, PlanId, PlanOrder)>,
    redistributions: VecDeque<(Ticket, RedistributionOrder)>,
    device_orders: VecDeque<(Ticket, DeviceOrder)>,
    broadcasts: Broadcasts,
    evening: Evening,
    /// Nodes that count as failed, as was last said.
    down: BTreeSet<NodeId>,
    creation: Option<Creation>,
    enrolment: Option<Enrolment>,
    rebuild: Option<Rebuild>,
    /// What is being stored, and who waits for it.
    storing: Option<(Proposal, Then)>,
    outputs: VecDeque<Output>,
}

/// What follows once a proposal is stored.
#[derive(Debug)]
enum Then {
    Nothing,
    FailedOver {
        ticket: Ticket,
        moved: Vec<String>,
        stayed: Vec<String>,
    },
    Ordered {
        ticket: Ticket,
        lines: Vec<String>,
    },
    Created,
    /// The enrolment's ids are.
    Reserved,
    /// What enters has.
    Entered {
        lines: Vec<String>,
    },
}

impl Manager {
    /// Starts with what the store holds.
    pub fn new(map: Option<DistributionMap>, policy: Policy) -> Self {
        Self {
            policy,
            map,
            started_ms: None,
            held: BTreeSet::new(),
            not_made_for: BTreeSet::new(),
            next_making_ms: 0,
            hindered: Vec::new(),
            registry: Registry::default(),
            outdated: BTreeMap::new(),
            asks: Asks::default(),
            ignored: BTreeMap::new(),
            failovers: VecDeque::new(),
            forces: VecDeque::new(),
            orders: VecDeque::new(),
            redistributions: VecDeque::new(),
            device_orders: VecDeque::new(),
            broadcasts: Broadcasts::default(),
            evening: Evening::default(),
            down: BTreeSet::new(),
            creation: None,
            enrolment: None,
            rebuild: None,
            storing: None,
            outputs: VecDeque::new(),
        }
    }

    /// The map as it is stored.
    pub fn map(&self) -> Option<&DistributionMap> {
        self.map.as_ref()
    }

    /// The nodes that have registered.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What is to be done next; to be asked until it says `None` after every [`Self::handle`].
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Everything that `mirrorctl status` shows.
    pub fn status(&self, now_ms: u64) -> ClusterStatus {
        let in_map = self.map.iter().flat_map(|map| &map.nodes).map(|node| node.name.as_str());
        let mut names: Vec<&str> = in_map.collect();
        for (name, _) in self.registry.iter() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let nodes = names
            .into_iter()
            .map(|name| {
                let entry = self.registry.get(name);
                NodeStatus {
                    name: name.to_owned(),
                    up: entry.is_some_and(|entry| entry.is_up(now_ms)),
                    process: entry.map(|entry| entry.process),
                    adopted: entry.map_or(MapVersion(0), |entry| entry.adopted),
                    disks: entry.map_or_else(Vec::new, |entry| entry.disks.clone()),
                    report: entry.and_then(|entry| entry.report.clone()),
                }
            })
            .collect();
        let findings = findings::findings(self.map.as_ref(), &self.registry, &self.outdated, now_ms);
        ClusterStatus { map: self.map.clone(), nodes, findings }
    }

    /// Takes one event, and decides all that follows from it.
    pub fn handle(&mut self, now_ms: u64, input: Input) {
        self.started_ms.get_or_insert(now_ms);
        match input {
            Input::Register { connection, cluster, registration } => {
                self.register(now_ms, connection, cluster, registration);
            }
            Input::Session { connection, session } => self.session(connection, session),
            Input::Message { connection, message } => self.message(now_ms, connection, message),
            Input::Disconnected { connection } => self.disconnected(connection),
            Input::Create { ticket, file, cluster, force } => {
                self.create(now_ms, (ticket, &*file, cluster, force));
            }
            Input::Enrol { ticket, order } => self.enrol(now_ms, ticket, &order),
            Input::Failover { ticket, node } => self.failovers.push_back((ticket, node)),
            Input::Force { ticket, order } => self.forces.push_back((ticket, order)),
            Input::Plan { ticket, plan, order } => self.orders.push_back((ticket, plan, order)),
            Input::Device { ticket, order } => self.device_orders.push_back((ticket, order)),
            Input::Redistribute { ticket, order } => self.redistributions.push_back((ticket, order)),
            Input::Rebuild { ticket, file, without, install } => {
                if self.creation.is_some() || self.storing.is_some() || self.rebuild.is_some() {
                    let reason = "a map is being made at this moment; wait for it".to_owned();
                    self.reply(ticket, OperatorReply::Refused { reason });
                } else {
                    let outputs = &mut self.outputs;
                    let request = (ticket, &*file, &without[..], install);
                    let known = (self.map.as_ref(), &self.registry);
                    let begun =
                        Rebuild::begin(now_ms, request, known, &mut |output| outputs.push_back(output));
                    match begun {
                        Ok(rebuild) => self.rebuild = Some(rebuild),
                        Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                    }
                }
            }
            Input::Broadcast { ticket, kind, id, begins } => {
                let reply = match &self.map {
                    Some(map) => self.broadcasts.request(now_ms, map, (kind, id, begins)),
                    None => OperatorReply::Refused { reason: "no cluster has been created yet".to_owned() },
                };
                self.reply(ticket, reply);
            }
            Input::Stored { version } => self.stored(now_ms, version),
            Input::Conflict { newest } => self.conflict(newest.map(|map| *map)),
            Input::Tick => {}
        }
        self.advance_creation(now_ms);
        self.advance_enrolment(now_ms);
        self.advance_rebuild(now_ms);
        self.decide(now_ms);
        self.grant_exports(now_ms);
        if let Some(map) = &self.map {
            let outputs = &mut self.outputs;
            self.broadcasts.advance(now_ms, map, &self.registry, &mut |output| outputs.push_back(output));
        }
    }

    fn log(&mut self, line: String) {
        self.outputs.push_back(Output::Log(line));
    }

    fn reply(&mut self, ticket: Ticket, reply: OperatorReply) {
        self.outputs.push_back(Output::Reply { ticket, reply });
    }

    fn register(
        &mut self,
        now_ms: u64,
        connection: ConnectionId,
        cluster: Option<ClusterId>,
        mut registration: Registration,
    ) {
        match self.registry.admit(self.map.as_ref(), cluster, &registration, now_ms) {
            Ok(()) => drop(self.outdated.remove(&registration.node)),
            Err(Refusal::Wrong(reason)) => {
                self.log(format!("refused: {reason}"));
                let message = ManagerMessage::Refused { reason };
                self.outputs.push_back(Output::Send { connection, message });
                self.outputs.push_back(Output::Close { connection });
                return;
            }
            Err(Refusal::Outdated(reason)) => {
                self.turn_away(connection, registration.node, reason);
                return;
            }
        }
        // What a node adopted as a member of no cluster, or of one that is no more, is not ours.
        let ours = |map: &DistributionMap| cluster == Some(map.cluster) || own_disks(map, &registration);
        if !self.map.as_ref().is_some_and(ours) {
            registration.adopted = MapVersion(0);
        }
        let line = format!("node {} registered with {}", registration.node, registration.process);
        let stranger = self.map.as_ref().filter(|map| map.node_named(&registration.node).is_none());
        let waits = stranger.map(|map| registry::waits(map, &registration.node));
        if let Some(old) = self.registry.enter(now_ms, connection, registration) {
            self.enrolled_by_gone(old);
            self.outputs.push_back(Output::Close { connection: old });
        }
        if let Some(why) = waits {
            self.log(why.clone());
            self.outputs.push_back(Output::Send { connection, message: ManagerMessage::Waiting { why } });
            return;
        }
        self.outputs.push_back(Output::Event(EventKind::Node, line));
        self.outputs.push_back(Output::GiveSession { connection });
    }

    /// A node knows more than we do: nothing that we decide about it could be right.
    fn turn_away(&mut self, connection: ConnectionId, node: String, reason: String) {
        // It tries again and again; once is enough for the log.
        if self.outdated.get(&node) != Some(&reason) {
            self.log(reason.clone());
            self.outdated.insert(node, reason);
        }
        self.disconnected(connection);
        self.outputs.push_back(Output::Close { connection });
    }

    fn session(&mut self, connection: ConnectionId, session: ExporterSession) {
        let Some((_, entry)) = self.registry.by_connection_mut(connection) else { return };
        entry.session = Some(session);
        let message = ManagerMessage::Registered { exporter_session: session, policy: self.policy.node };
        self.outputs.push_back(Output::Send { connection, message });
        self.send_map(connection);
    }

    fn send_map(&mut self, connection: ConnectionId) {
        if let Some(map) = &self.map {
            let message = ManagerMessage::Map { map: Box::new(map.clone()) };
            self.outputs.push_back(Output::Send { connection, message });
        }
    }

    fn message(&mut self, now_ms: u64, connection: ConnectionId, message: NodeMessage) {
        // A connection that was replaced speaks for a process that is gone.
        let Some((name, entry)) = self.registry.by_connection_mut(connection) else { return };
        let name = name.to_owned();
        entry.heard_ms = now_ms;
        let newest = self.map.as_ref().map_or(MapVersion(0), |map| map.version);
        match message {
            NodeMessage::Register(registration) => {
                self.log(format!("node {} registered twice on one connection: ignored", registration.node));
            }
            // Before there is a cluster, what it says of maps is about another one.
            NodeMessage::Adopted { version } => {
                if version <= newest {
                    entry.adopted = entry.adopted.max(version);
                } else if self.map.is_some() {
                    self.turn_away(connection, name.clone(), outdated(&name, version, newest));
                }
            }
            NodeMessage::Report(report) => {
                let theirs = report.adopted;
                let before = entry.report.replace(report.clone());
                let before = before.map_or_else(Vec::new, |before| before.sessions);
                let map = self.map.as_ref();
                let lines =
                    map.map_or_else(Vec::new, |map| slow_lines(map, &name, &before, &report.sessions));
                self.outputs.extend(lines.into_iter().map(|line| Output::Event(EventKind::Node, line)));
                if theirs <= newest {
                    entry.adopted = entry.adopted.max(theirs);
                } else if self.map.is_some() {
                    self.turn_away(connection, name.clone(), outdated(&name, theirs, newest));
                }
            }
            NodeMessage::AskStale { peer, version, cause } => {
                self.asks.push(Ask { connection, peer, version, wish: Wish::Stale { cause } });
            }
            NodeMessage::AskSlow { peer, version, cause } => {
                self.asks.push(Ask { connection, peer, version, wish: Wish::Slow { cause } });
            }
            NodeMessage::AskSyncing { peer, version } => {
                self.asks.push(Ask { connection, peer, version, wish: Wish::Syncing });
            }
            NodeMessage::AskInSync { peer, device, version } => {
                self.asks.push(Ask { connection, peer, version, wish: Wish::InSync { device } });
            }
            NodeMessage::DiskFailed { disk, reason } => {
                let node = self.map.as_ref().and_then(|map| map.node_of(disk).and_then(|id| map.node(id)));
                if node.is_some_and(|node| node.name == name) {
                    self.registry.disk_failed(disk, reason);
                } else {
                    self.log(format!("node {name} says that {disk} failed, which is not its own: ignored"));
                }
            }
            NodeMessage::DiskReleased { disk } => self.registry.disk_released(&name, disk),
            NodeMessage::KeptMap { map } => {
                if let Some(rebuild) = &mut self.rebuild {
                    rebuild.answered(connection, map.map(|map| *map));
                }
            }
            NodeMessage::Surveyed { order, answers } => {
                let node = self.map.as_ref().and_then(|map| map.node_named(&name)).map(|node| node.id);
                if let Some(node) = node {
                    self.broadcasts.answered(now_ms, (connection, node), order, answers);
                }
            }
            NodeMessage::Formatted { error, attach } => {
                if let Some(creation) = &mut self.creation {
                    creation.formatted(connection, error, &attach);
                } else if let Some(enrolment) = &mut self.enrolment {
                    enrolment.formatted(connection, error, &attach);
                }
            }
            NodeMessage::Looked { found } => {
                if let (Some(enrolment), Some(map)) = (&mut self.enrolment, &self.map) {
                    enrolment.looked(map, connection, found);
                }
            }
        }
    }

    fn disconnected(&mut self, connection: ConnectionId) {
        self.enrolled_by_gone(connection);
        let Some((name, entry)) = self.registry.by_connection_mut(connection) else { return };
        entry.connected = false;
        let line = format!("node {name} disconnected");
        self.outputs.push_back(Output::Event(EventKind::Node, line));
        self.map.iter().for_each(|map| self.registry.forget_strangers(map));
    }

    fn advance_rebuild(&mut self, now_ms: u64) {
        if self.storing.is_some() {
            return;
        }
        let Some(outcome) = self.rebuild.as_ref().and_then(|rebuild| rebuild.outcome(now_ms)) else { return };
        let Some(Rebuild { ticket, .. }) = self.rebuild.take() else { return };
        match outcome {
            Ok(rebuild::Rebuilt { proposal: Some(proposal), lines }) => {
                self.store(proposal, Then::Ordered { ticket, lines });
            }
            Ok(rebuild::Rebuilt { proposal: None, lines }) => {
                self.reply(ticket, OperatorReply::Done { lines })
            }
            Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
        }
    }

    fn store(&mut self, proposal: Proposal, then: Then) {
        if planted::is(Bug::SentBeforeStored) {
            self.map = Some((*proposal.next).clone());
            self.send_map_to_all();
        }
        self.outputs.push_back(Output::Store(proposal.clone()));
        self.storing = Some((proposal, then));
    }

    /// Makes the next change, if there is one and none is being stored.
    fn decide(&mut self, now_ms: u64) {
        while self.storing.is_none() {
            let Some(map) = &self.map else {
                self.asks.clear();
                let waiting = std::mem::take(&mut self.failovers).into_iter().map(|(ticket, _)| ticket);
                let orders = std::mem::take(&mut self.orders).into_iter().map(|(ticket, ..)| ticket);
                let forces = std::mem::take(&mut self.forces).into_iter().map(|(ticket, _)| ticket);
                let moves = std::mem::take(&mut self.redistributions).into_iter().map(|(ticket, _)| ticket);
                let devices = std::mem::take(&mut self.device_orders).into_iter().map(|(ticket, _)| ticket);
                let all = waiting.chain(orders).chain(forces).chain(moves).chain(devices);
                for ticket in all.collect::<Vec<_>>() {
                    let reason = "no cluster has been created yet".to_owned();
                    self.reply(ticket, OperatorReply::Refused { reason });
                }
                return;
            };
            let change = repair(map, &self.registry, now_ms);
            if !change.is_empty() {
                self.propose(change, Then::Nothing);
                // One that cannot be made would be computed again at once.
                return;
            } else if let Some(ask) = self.asks.pop() {
                self.decide_ask(now_ms, &ask);
            } else if let Some((ticket, node)) = self.failovers.pop_front() {
                match failover::plan(map, &self.registry, now_ms, &node) {
                    // It has been failed over already, perhaps by this manager a moment ago.
                    Ok(failover::Failover { batch, moved, stayed }) if batch.is_empty() => {
                        let version = map.version;
                        self.reply(ticket, OperatorReply::FailedOver { version, moved, stayed });
                    }
                    Ok(failover::Failover { batch, moved, stayed }) => {
                        let why = std::iter::once(format!("failover of {node} by the operator"))
                            .chain(moved.iter().cloned())
                            .collect();
                        self.propose(Change { batch, why }, Then::FailedOver { ticket, moved, stayed });
                    }
                    Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                }
            } else if let Some((ticket, order)) = self.forces.pop_front() {
                match force::plan(map, &self.registry, now_ms, &order) {
                    Ok(Change { why: lines, .. }) if !order.carry_out => {
                        self.reply(ticket, OperatorReply::Done { lines });
                    }
                    Ok(Change { batch, why: lines }) => {
                        let cause = format!("forced onto {} by the operator", order.node);
                        let why = std::iter::once(cause).chain(lines.iter().cloned()).collect();
                        self.propose(Change { batch, why }, Then::Ordered { ticket, lines });
                    }
                    Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                }
            } else if let Some((ticket, plan, order)) = self.orders.pop_front() {
                match advance::ordered(map, &self.situation(now_ms), plan, order) {
                    Ok(change) => {
                        if order == PlanOrder::Cancel {
                            // One that is well is made again if it dies later.
                            let now = self.situation(now_ms);
                            let lost = regeneration::lost_disks(map, &now).into_iter().map(|lost| lost.disk);
                            let lost: BTreeSet<DiskId> = lost.collect();
                            let sources = map.plan(plan).into_iter().flat_map(Plan::sources);
                            self.held.extend(sources.filter(|disk| lost.contains(disk)));
                            // It may have made a spare for them: another would be begun at once.
                            if map.plan(plan).is_some_and(|plan| !plan.spares.is_empty()) {
                                self.not_made_for.extend(lost);
                            }
                        }
                        let lines = change.why.clone();
                        self.propose(change, Then::Ordered { ticket, lines });
                    }
                    Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                }
            } else if let Some((ticket, order)) = self.redistributions.pop_front() {
                match redistribution::plan(map, &self.situation(now_ms), &order) {
                    Ok(Change { batch, why: lines }) if !order.carry_out || batch.is_empty() => {
                        self.reply(ticket, OperatorReply::Done { lines });
                    }
                    Ok(Change { batch, why: lines }) => {
                        let cause = "redistribution by the operator".to_owned();
                        let why = std::iter::once(cause).chain(lines.iter().cloned()).collect();
                        self.propose(Change { batch, why }, Then::Ordered { ticket, lines });
                    }
                    Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                }
            } else if let Some((ticket, order)) = self.device_orders.pop_front() {
                let now = self.situation(now_ms);
                let view = View { map, now: &now, carry_out: order.carry_out };
                match devices::plan(&view, &order) {
                    Ok(Change { batch, why: lines }) if !order.carry_out || batch.is_empty() => {
                        // What it would make has to be a map, too.
                        let reply = match map.apply(&batch) {
                            Ok(_) => OperatorReply::Done { lines },
                            Err(error) => OperatorReply::Refused { reason: error.to_string() },
                        };
                        self.reply(ticket, reply);
                    }
                    Ok(Change { batch, why: lines }) => match map.apply(&batch) {
                        Ok(_) => self
                            .propose(Change { batch, why: lines.clone() }, Then::Ordered { ticket, lines }),
                        Err(error) => {
                            self.reply(ticket, OperatorReply::Refused { reason: error.to_string() });
                        }
                    },
                    Err(reason) => self.reply(ticket, OperatorReply::Refused { reason }),
                }
            } else {
                let change = self.unasked(now_ms);
                if change.is_empty() {
                    return;
                }
                self.propose(change, Then::Nothing);
                return;
            }
        }
    }

    fn situation(&self, now_ms: u64) -> Situation<'_> {
        let started_ms = self.started_ms.unwrap_or(now_ms);
        Situation { registry: &self.registry, policy: &self.policy, started_ms, now_ms }
    }

    /// What is done without being asked for.
    fn unasked(&mut self, now_ms: u64) -> Change {
        let Some(map) = &self.map else { return Change::default() };
        let started_ms = self.started_ms.unwrap_or(now_ms);
        let (registry, policy) = (&self.registry, &self.policy);
        for node in &map.nodes {
            let failed = detector::failed(map, registry, policy, node, started_ms, now_ms);
            let text = match &failed {
                Some(why) if self.down.insert(node.id) => {
                    Some(format!("node {} counts as failed: {why}", node.name))
                }
                None if self.down.remove(&node.id) => Some(format!("node {} is back", node.name)),
                _ => None,
            };
            self.outputs.extend(text.map(|text| Output::Event(EventKind::Node, text)));
            let Some(why) = failed.filter(|_| policy.auto_failover) else { continue };
            let plan = failover::plan(map, registry, now_ms, &node.name);
            if let Some(failover::Failover { batch, moved, .. }) =
                plan.ok().filter(|plan| !plan.batch.is_empty())
            {
                let cause = std::iter::once(format!("failover of {}: {why}", node.name));
                return Change { batch, why: cause.chain(moved).collect() };
            }
        }
        let change = devices::settle(map, registry);
        if !change.is_empty() {
            return change;
        }
        let now = self.situation(now_ms);
        let change = advance::advance(map, &now);
        if !change.is_empty() {
            return change;
        }
        let change = if policy.auto_spare { self.made_again(now_ms) } else { change };
        let Some(map) = self.map.as_ref().filter(|_| change.is_empty()) else { return change };
        let started_ms = self.started_ms.unwrap_or(now_ms);
        let now = Situation { registry: &self.registry, policy: &self.policy, started_ms, now_ms };
        self.evening.look(map, &now)
    }

    /// What is gone is made again.
    fn made_again(&mut self, now_ms: u64) -> Change {
        let Some(map) = &self.map else { return Change::default() };
        let now = self.situation(now_ms);
        let (mut change, without_spare) = regeneration::begin(map, &now, &self.held);
        if change.is_empty() {
            change = advance::give_up_held(map, &now);
        }
        let mut hindered: Vec<String> = without_spare.iter().map(|hindered| hindered.why.clone()).collect();
        if change.is_empty() && !hindered.is_empty() && self.policy.auto_make_spare {
            // Each look may take as long as planning does.
            if now_ms < self.next_making_ms {
                return change;
            }
            (change, hindered) = making::begin(map, &now, &without_spare, &self.not_made_for);
            self.next_making_ms = now_ms + MAKING_MS;
        }
        if hindered != self.hindered {
            let new = hindered.iter().filter(|line| !self.hindered.contains(line));
            self.outputs.extend(new.map(|line| Output::Event(EventKind::Spare, line.clone())));
            self.hindered = hindered;
        }
        change
    }

    fn decide_ask(&mut self, now_ms: u64, ask: &Ask) {
        let Some(map) = &self.map else { return };
        let Some((name, _)) = self.registry.by_connection(ask.connection) else { return };
        let Some(asker) = map.node_named(name).map(|node| node.id) else { return };
        let (name, text) = (name.to_owned(), ask.text(map));
        if ask.version > map.version {
            let reason = outdated(&name, ask.version, map.version);
            self.turn_away(ask.connection, name, reason);
            return;
        }
        let mut change = ask.change(map, &self.registry, now_ms, asker);
        if change.is_empty() {
            // It acts on an old map, or is not what the map says: the newest tells it so. One who
            // asks for a copy under the newest knows all that there is to know, and asks again.
            if matches!(ask.wish, Wish::Stale { .. } | Wish::Slow { .. }) || ask.version < map.version {
                self.send_map(ask.connection);
            }
            let line = format!("node {name} asks under map {} {text}: there is nothing to do", ask.version);
            if self.ignored.insert((name, ask.peer), line.clone()).as_ref() != Some(&line) {
                self.log(line);
            }
            return;
        }
        self.ignored.remove(&(name.clone(), ask.peer));
        change.why.insert(0, format!("{name} asks {text}"));
        self.propose(change, Then::Nothing);
    }

    fn propose(&mut self, change: Change, then: Then) {
        let Some(map) = &self.map else { return };
        match map.apply(&change.batch) {
            Ok(Some(next)) => {
                let proposal = Proposal {
                    base: Some(map.version),
                    batch: change.batch,
                    next: Box::new(next),
                    why: change.why,
                };
                self.store(proposal, then);
            }
            // Neither can happen: every rule proposes only what is not so yet, and what is allowed.
            // If one does, nothing changes, and the log says what to look at.
            outcome => {
                let reason = match outcome {
                    Err(error) => error.to_string(),
                    _ => "it changes nothing".to_owned(),
                };
                debug_assert!(false, "{reason}: {:?}", change.batch);
                self.log(format!(
                    "BUG: a change was computed that cannot be made: {reason}: {:?}",
                    change.batch
                ));
                match then {
                    Then::FailedOver { ticket, .. } | Then::Ordered { ticket, .. } => {
                        self.reply(ticket, OperatorReply::Refused { reason });
                    }
                    Then::Reserved | Then::Entered { .. } => self.enrolment_failed(reason, None),
                    Then::Created | Then::Nothing => {}
                }
                self.storing = None;
                self.asks.clear();
            }
        }
    }

    fn stored(&mut self, now_ms: u64, version: MapVersion) {
        let Some((proposal, then)) = self.storing.take() else { return };
        assert_eq!(proposal.next.version, version, "the store confirmed another version than was proposed");
        self.map = Some(*proposal.next);
        match then {
            Then::Created => self.enter_formatted_disks(),
            Then::Entered { .. } => self.enter_newcomers(),
            _ => {}
        }
        self.send_map_to_all();
        self.map.iter().for_each(|map| self.registry.forget_strangers(map));
        match then {
            Then::Nothing => {}
            Then::FailedOver { ticket, moved, stayed } => {
                self.reply(ticket, OperatorReply::FailedOver { version, moved, stayed });
            }
            Then::Ordered { ticket, lines } => self.reply(ticket, OperatorReply::Done { lines }),
            Then::Created => {
                if let (Some(creation), Some(map)) = (self.creation.take(), self.map.clone()) {
                    self.reply(creation.ticket, OperatorReply::Created { map: Box::new(map) });
                }
            }
            Then::Reserved => self.format_newcomers(now_ms),
            Then::Entered { lines } => self.welcome(lines),
        }
    }

    fn send_map_to_all(&mut self) {
        let connections: Vec<ConnectionId> = self
            .registry
            .iter()
            .filter(|(_, node)| node.connected && node.session.is_some())
            .map(|(_, node)| node.connection)
            .collect();
        for connection in connections {
            self.send_map(connection);
        }
    }

    fn conflict(&mut self, newest: Option<DistributionMap>) {
        let then = self.storing.take().map(|(_, then)| then);
        self.map = newest;
        self.log("the store holds a map that another manager wrote; going on with it".to_owned());
        self.send_map_to_all();
        let reason =
            "another manager changed the map at the same moment; nothing changed, repeat it".to_owned();
        match then {
            Some(Then::FailedOver { ticket, .. } | Then::Ordered { ticket, .. }) => {
                self.reply(ticket, OperatorReply::Refused { reason })
            }
            Some(Then::Created) => {
                if let Some(creation) = self.creation.take() {
                    self.reply(creation.ticket, OperatorReply::Refused { reason });
                }
            }
            Some(Then::Reserved | Then::Entered { .. }) => self.enrolment_failed(reason, None),
            Some(Then::Nothing) | None => {}
        }
    }

    /// Tells exporters which devices they may export, once for each connection and claim.
    fn grant_exports(&mut self, now_ms: u64) {
        let Some(map) = &self.map else { return };
        let mut grants = Vec::new();
        for device in &map.devices {
            let Some(exporter) = map.node(device.claim.node) else { continue };
            let Some(entry) = self.registry.get(&exporter.name) else { continue };
            if entry.session.is_some()
                && entry.is_up(now_ms)
                && entry.exported.get(&device.id) != Some(&device.claim.generation)
                && export::hindrances(map, device, &self.registry, now_ms).is_empty()
            {
                grants.push((exporter.name.clone(), entry.connection, device.id, device.claim.generation));
            }
        }
        for (name, connection, device, generation) in grants {
            if let Some((_, entry)) = self.registry.iter_mut().find(|(other, _)| *other == name) {
                entry.exported.insert(device, generation);
            }
            let message = ManagerMessage::Export { device, generation };
            self.outputs.push_back(Output::Send { connection, message });
        }
    }
}
