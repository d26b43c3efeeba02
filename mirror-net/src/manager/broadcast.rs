//! Asking all primaries for something, each slice once.
//!
//! What is outstanding is a list of runs of slices with the epoch that the newest map gives them, each
//! asked of its primary. An answer counts only for what is outstanding under its epoch, of the node that
//! was asked; with it those slices are done for good. When the map gives a run another epoch, whoever is
//! its primary then is asked, and what the one before still says of it counts for nothing. So every slice is
//! counted once, whatever is failed over meanwhile.

use super::registry::Registry;
use super::{ConnectionId, Output};
use crate::control::{
    BroadcastKind, BroadcastRow, BroadcastStatus, ContentSum, ManagerMessage, OperatorReply, SurveyAnswer,
    SurveyResult, SurveyRun, Unserved,
};
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, NodeId, SliceIndex};
use crate::map::DistributionMap;
use std::collections::BTreeMap;

/// How long a primary that is away is waited for: longer than a failover takes.
const AWAY_MS: u64 = 5_000;
/// How long one that is there may say nothing.
const SILENT_MS: u64 = 60_000;
/// Between two questions to one that refused.
const AGAIN_MS: u64 = 300;
/// One that nobody asks about for so long is forgotten.
const FORGOTTEN_MS: u64 = 30_000;
/// Under way at the same time, those included whose end nobody has asked for yet.
const BROADCASTS_MAX: usize = 8;

/// Slices that nobody has answered for yet.
#[derive(Clone, Debug)]
struct Open {
    run: SurveyRun,
    primary: NodeId,
    /// Whom the question went to.
    asked: Option<ConnectionId>,
    /// Not asked before.
    not_before_ms: u64,
    /// When its primary was last asked, or last said anything of this broadcast.
    since_ms: u64,
    /// When its primary first refused.
    refused_ms: Option<u64>,
    /// Why it was given up.
    why: Option<String>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Found {
    slices: u64,
    bytes: u64,
    sum: ContentSum,
}

#[derive(Debug)]
struct Broadcast {
    id: u64,
    kind: BroadcastKind,
    slices: u64,
    open: Vec<Open>,
    found: BTreeMap<(DeviceId, NodeId, Segment), Found>,
    given_up: Vec<Open>,
    polled_ms: u64,
}

/// The broadcasts under way.
#[derive(Default, Debug)]
pub(super) struct Broadcasts {
    all: Vec<Broadcast>,
}

impl Broadcast {
    fn new(now_ms: u64, id: u64, kind: BroadcastKind, map: &DistributionMap) -> Self {
        let open: Vec<Open> = map
            .devices
            .iter()
            .flat_map(|device| {
                let whole = SurveyRun {
                    device: device.id,
                    first: 0,
                    count: device.slices,
                    epoch: Default::default(),
                };
                today(map, whole, now_ms)
            })
            .collect();
        let slices = open.iter().map(|open| u64::from(open.run.count)).sum();
        let found = BTreeMap::new();
        Self { id, kind, slices, open, found, given_up: Vec::new(), polled_ms: now_ms }
    }

    /// Brings what is outstanding in line with the map.
    fn follow(&mut self, now_ms: u64, map: &DistributionMap) {
        for open in std::mem::take(&mut self.open) {
            let same = map.device(open.run.device).is_some_and(|device| {
                let span = device.span(SliceIndex(open.run.first));
                span.is_some_and(|span| span.epoch == open.run.epoch && open.run.end() <= span.end())
            });
            match same {
                true => self.open.push(open),
                false => self.open.extend(today(map, open.run, now_ms)),
            }
        }
    }

    fn answered(&mut self, now_ms: u64, from: (ConnectionId, NodeId), answer: SurveyAnswer) {
        let (connection, node) = from;
        let run = answer.run;
        let covers = |open: &Open| {
            open.asked == Some(connection)
                && (open.run.device, open.run.epoch) == (run.device, run.epoch)
                && open.run.first <= run.first
                && run.end() <= open.run.end()
                && run.count > 0
        };
        let Some(at) = self.open.iter().position(covers) else { return };
        let open = self.open.swap_remove(at);
        let piece = |first: u32, end: u32| Open {
            run: SurveyRun { first, count: end - first, ..open.run },
            since_ms: now_ms,
            ..open.clone()
        };
        let around = [piece(open.run.first, run.first), piece(run.end(), open.run.end())];
        self.open.extend(around.into_iter().filter(|open| open.run.count > 0));
        let mine = Open { run, ..open.clone() };
        match answer.result {
            SurveyResult::Answered { segment, bytes, sum } => {
                let found = self.found.entry((run.device, node, segment)).or_default();
                found.slices += u64::from(run.count);
                found.bytes = found.bytes.saturating_add(bytes);
                found.sum = found.sum.plus(sum);
            }
            SurveyResult::Refused => self.open.push(Open {
                asked: None,
                not_before_ms: now_ms + AGAIN_MS,
                refused_ms: open.refused_ms.or(Some(now_ms)),
                ..mine
            }),
            SurveyResult::Failed { why } => self.given_up.push(Open { why: Some(why), ..mine }),
        }
    }

    /// Asks whom there is to ask, and gives up whom there is not.
    fn advance(
        &mut self,
        now_ms: u64,
        map: &DistributionMap,
        registry: &Registry,
        output: &mut impl FnMut(Output),
    ) {
        self.follow(now_ms, map);
        let mut orders: BTreeMap<ConnectionId, Vec<SurveyRun>> = BTreeMap::new();
        let mut open = Vec::new();
        for mut entry in std::mem::take(&mut self.open) {
            let node = map.node(entry.primary).and_then(|node| registry.get(&node.name));
            let there = node.filter(|node| node.session.is_some() && node.is_up(now_ms));
            let waited_ms = now_ms.saturating_sub(entry.since_ms);
            match there {
                None => {
                    entry.asked = None;
                    if waited_ms >= AWAY_MS {
                        entry.why = Some("it is not connected".into());
                        self.given_up.push(entry);
                        continue;
                    }
                }
                Some(node) if entry.asked == Some(node.connection) => {
                    if waited_ms >= SILENT_MS {
                        entry.why = Some(format!("it has not answered within {} s", SILENT_MS / 1000));
                        self.given_up.push(entry);
                        continue;
                    }
                }
                // It refused, again and again: it serves nothing, whatever the map says.
                Some(_) if entry.refused_ms.is_some_and(|first| now_ms >= first + AWAY_MS) => {
                    entry.why = Some("it does not serve them now; `mirrorctl status` says why".into());
                    self.given_up.push(entry);
                    continue;
                }
                Some(node) if now_ms >= entry.not_before_ms => {
                    entry.since_ms = now_ms;
                    entry.asked = Some(node.connection);
                    orders.entry(node.connection).or_default().push(entry.run);
                }
                Some(_) => {}
            }
            open.push(entry);
        }
        self.open = open;
        for (connection, runs) in orders {
            let message = ManagerMessage::Survey { order: self.id, kind: self.kind, runs };
            output(Output::Send { connection, message });
        }
    }

    fn status(&self, map: &DistributionMap) -> BroadcastStatus {
        let device =
            |id: DeviceId| map.device(id).map_or_else(|| id.to_string(), |device| device.name.clone());
        let rows = self.found.iter().map(|((id, node, segment), found)| BroadcastRow {
            device: device(*id),
            node: map.node_name(*node),
            segment: *segment,
            slices: found.slices,
            bytes: found.bytes,
            sum: found.sum,
        });
        let mut given_up: Vec<&Open> = self.given_up.iter().collect();
        given_up.sort_by_key(|open| (open.run.device, open.run.first));
        let unserved = given_up.into_iter().map(|open| Unserved {
            device: device(open.run.device),
            first: open.run.first,
            count: open.run.count,
            node: map.node_name(open.primary),
            why: open.why.clone().unwrap_or_default(),
        });
        let outstanding: u64 = self.open.iter().map(|open| u64::from(open.run.count)).sum();
        BroadcastStatus {
            id: self.id,
            slices: self.slices,
            answered: self.slices.saturating_sub(outstanding),
            done: self.open.is_empty(),
            rows: rows.collect(),
            unserved: unserved.collect(),
        }
    }
}

/// The runs that the map makes of these slices.
fn today(map: &DistributionMap, run: SurveyRun, now_ms: u64) -> Vec<Open> {
    let Some(device) = map.device(run.device) else { return Vec::new() };
    let overlapping = device.spans.iter().filter(|span| span.first.0 < run.end() && run.first < span.end());
    overlapping
        .filter_map(|span| {
            let (first, end) = (span.first.0.max(run.first), span.end().min(run.end()));
            Some(Open {
                run: SurveyRun { first, count: end - first, epoch: span.epoch, ..run },
                primary: map.node_of(span.primary().disk)?,
                asked: None,
                not_before_ms: now_ms,
                since_ms: now_ms,
                refused_ms: None,
                why: None,
            })
        })
        .collect()
}

impl Broadcasts {
    /// An operator begins one, or asks how far it is.
    pub(super) fn request(
        &mut self,
        now_ms: u64,
        map: &DistributionMap,
        (kind, id, begins): (BroadcastKind, u64, bool),
    ) -> OperatorReply {
        if begins {
            if self.all.len() >= BROADCASTS_MAX {
                let reason = format!("{BROADCASTS_MAX} broadcasts are under way; wait for one of them");
                return OperatorReply::Refused { reason };
            }
            self.all.push(Broadcast::new(now_ms, id, kind, map));
        }
        match self.all.iter().position(|broadcast| broadcast.id == id) {
            Some(at) => {
                let broadcast = &mut self.all[at];
                broadcast.polled_ms = now_ms;
                let status = broadcast.status(map);
                if status.done {
                    self.all.remove(at);
                }
                OperatorReply::Broadcast(Box::new(status))
            }
            None => {
                let reason =
                    "the manager that began this broadcast does not lead any more; repeat it".to_owned();
                OperatorReply::Refused { reason }
            }
        }
    }

    /// A node has answered.
    pub(super) fn answered(
        &mut self,
        now_ms: u64,
        from: (ConnectionId, NodeId),
        order: u64,
        answers: Vec<SurveyAnswer>,
    ) {
        let Some(broadcast) = self.all.iter_mut().find(|broadcast| broadcast.id == order) else { return };
        // Whoever says anything goes on with the rest.
        for open in broadcast.open.iter_mut().filter(|open| open.asked == Some(from.0)) {
            open.since_ms = now_ms;
        }
        for answer in answers {
            broadcast.answered(now_ms, from, answer);
        }
    }

    /// Time passed, or the map changed.
    pub(super) fn advance(
        &mut self,
        now_ms: u64,
        map: &DistributionMap,
        registry: &Registry,
        output: &mut impl FnMut(Output),
    ) {
        for broadcast in &mut self.all {
            broadcast.advance(now_ms, map, registry, output);
        }
        self.all.retain(|broadcast| {
            let wanted = now_ms.saturating_sub(broadcast.polled_ms) < FORGOTTEN_MS;
            if !wanted {
                let asked: std::collections::BTreeSet<ConnectionId> =
                    broadcast.open.iter().filter_map(|open| open.asked).collect();
                for connection in asked {
                    let (order, kind) = (broadcast.id, broadcast.kind);
                    let message = ManagerMessage::Survey { order, kind, runs: Vec::new() };
                    output(Output::Send { connection, message });
                }
            }
            wanted
        });
    }
}
