//! Broadcasts at a node: checksums, usage, flushes of what it serves now as primary.
//!
//! What is read goes the way of a host's read: range lock, lease, repair, and the comparison after a
//! restart (docs/protocol.md rule 12), a piece at a time and slowly while hosts are busy. An answer names
//! the slices and the epoch under which they were served; what is not served any more under the
//! epoch that was asked for is refused, and whoever serves it now is asked.

use super::action::{Action, BufferId, BufferRange, FlushKey, OpKey};
use super::flush::FlushOrigin;
use super::op::{Op, OpKind, Origin};
use super::view::SpanView;
use super::{Engine, Nanos, TICK};
use crate::control::{BroadcastKind, ContentSum, SurveyAnswer, SurveyResult, SurveyRun};
use crate::format::alloc::Segment;
use crate::region::digest::{Digest, FINE_BYTES};
use crate::region::masks::REGIONS_PER_SLICE;
use crate::wire::header::Status;
use std::collections::VecDeque;

/// Between two answers about a long run.
const TELL_EVERY: Nanos = 1_000_000_000;
/// Regions that are looked at without a pause.
const LOOKS_MAX: u32 = 64 * 256;
/// Orders that wait; who asks for more is refused.
const ORDERS_MAX: usize = 16;

/// What was asked for and is not answered yet.
#[derive(Default)]
pub(super) struct Surveys {
    orders: VecDeque<Order>,
    /// What is read goes through this one; without it nothing is read.
    buffer: Option<BufferId>,
    under_way: Option<UnderWay>,
    /// The digest of a block of zeros, which counts for nothing.
    zero: Option<Digest>,
    answers: Vec<(u64, SurveyAnswer)>,
    /// Counts the orders: the manager may use a number again.
    serial: u64,
    /// Some survey may go on.
    pub due: bool,
    not_before: Nanos,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum UnderWay {
    /// A piece is read or digested for the order with that serial number.
    Piece {
        serial: u64,
        op: OpKey,
    },
    Flush {
        serial: u64,
        flush: FlushKey,
    },
}

/// One message of the manager.
struct Order {
    id: u64,
    serial: u64,
    kind: BroadcastKind,
    runs: VecDeque<SurveyRun>,
    /// Of the first run: where it goes on.
    slice: u32,
    offset: u32,
    /// What was found since the last answer, from `from` on.
    from: u32,
    found: Found,
    told_at: Nanos,
}

#[derive(Clone, Copy, Default)]
struct Found {
    segment: Option<Segment>,
    bytes: u64,
    sum: ContentSum,
}

/// What comes next for an order.
enum Step {
    /// Read this of the run's device.
    Read { device: usize, slice: u32, offset: u32 },
    /// Flush the run's device.
    Flush { device: usize },
    /// Nothing now: a lease is missing.
    Wait,
    /// The order is done.
    Done,
    /// Look again.
    Again,
}

impl Order {
    fn begin_run(&mut self) {
        let first = self.runs.front().map_or(0, |run| run.first);
        (self.slice, self.offset, self.from) = (first, 0, first);
        self.found = Found::default();
    }

    /// The answer about what was found, if anything was.
    fn tell(&mut self, now: Nanos) -> Option<SurveyAnswer> {
        let run = self.runs.front()?;
        let found = std::mem::take(&mut self.found);
        let (first, count) = (self.from, self.slice - self.from);
        self.from = self.slice;
        self.told_at = now;
        let segment = found.segment?;
        let result = SurveyResult::Answered { segment, bytes: found.bytes, sum: found.sum };
        (count > 0).then_some(SurveyAnswer { run: SurveyRun { first, count, ..*run }, result })
    }

    fn end(&self) -> u32 {
        self.runs.front().map_or(0, SurveyRun::end)
    }
}

impl Engine {
    /// Gives the engine a buffer to read through, [`Engine::copy_buffer_bytes`] long, and the digest of a
    /// small block of zeros; without them no checksums are told.
    pub fn allow_surveys(&mut self, buffer: BufferId, zero: Digest) {
        (self.surveys.buffer, self.surveys.zero) = (Some(buffer), Some(zero));
    }

    /// Answers for these runs, as [`Engine::take_surveyed`] gives them; no runs withdraw what was asked for
    /// under that number.
    pub fn handle_survey(&mut self, now: Nanos, order: u64, kind: BroadcastKind, runs: Vec<SurveyRun>) {
        self.now = now;
        if runs.is_empty() {
            self.surveys.orders.retain(|other| other.id != order);
        } else if self.surveys.orders.len() >= ORDERS_MAX {
            let refused = |run| SurveyAnswer { run, result: SurveyResult::Refused };
            self.surveys.answers.extend(runs.into_iter().map(|run| (order, refused(run))));
        } else {
            let (found, told_at) = (Found::default(), now);
            let runs = runs.into();
            self.surveys.serial += 1;
            let serial = self.surveys.serial;
            let mut order =
                Order { id: order, serial, kind, runs, slice: 0, offset: 0, from: 0, found, told_at };
            order.begin_run();
            self.surveys.orders.push_back(order);
            self.surveys.due = true;
        }
        self.settle();
    }

    /// Withdraws everything: whoever asked is gone.
    pub fn forget_surveys(&mut self) {
        self.surveys.orders.clear();
        self.surveys.answers.clear();
    }

    /// The answers since the last call, with the numbers of their orders.
    pub fn take_surveyed(&mut self) -> Vec<(u64, SurveyAnswer)> {
        std::mem::take(&mut self.surveys.answers)
    }

    /// Does what can be done now.
    pub(super) fn pump_surveys(&mut self) {
        for _ in 0..LOOKS_MAX {
            if self.surveys.under_way.is_some() || self.now < self.surveys.not_before {
                return;
            }
            match self.next_step() {
                Step::Again => {}
                Step::Wait => return,
                Step::Done => {
                    self.surveys.orders.pop_front();
                    if self.surveys.orders.is_empty() {
                        return;
                    }
                }
                Step::Read { device, slice, offset } => self.read_for_survey(device, slice, offset),
                Step::Flush { device } => self.flush_for_survey(device),
            }
        }
    }

    /// Whether a slice is served now under that epoch; then its span.
    fn surveyable(&self, run: &SurveyRun, slice: u32) -> Option<(usize, &SpanView)> {
        let device = *self.by_device.get(&run.device)?;
        let view = &self.devices[device].view;
        let span = (slice < view.slices).then(|| view.span(slice))?;
        (span.serves() && span.epoch == run.epoch).then_some((device, span))
    }

    fn next_step(&mut self) -> Step {
        let Some(order) = self.surveys.orders.front() else { return Step::Done };
        let Some(run) = order.runs.front().copied() else { return Step::Done };
        let (kind, slice, offset) = (order.kind, order.slice, order.offset);
        if slice >= run.end() {
            self.end_run(None);
            return Step::Again;
        }
        let Some((device, span)) = self.surveyable(&run, slice) else {
            self.end_run(Some(SurveyResult::Refused));
            return Step::Again;
        };
        let segment = span.mine.map(|mine| mine.segment);
        if kind == BroadcastKind::Flush {
            if self.devices[device].view.can_flush() {
                return Step::Flush { device };
            }
            self.end_run(Some(SurveyResult::Refused));
            return Step::Again;
        }
        if self.now < self.serve_after || !self.holds_leases(device, span) {
            return Step::Wait;
        }
        let length = self.region_bytes() - offset % self.region_bytes();
        let at = u64::from(slice) * u64::from(self.slice_bytes) + u64::from(offset);
        let data = self.may_hold_data(device, at);
        if data && kind == BroadcastKind::Checksum {
            return match self.surveys.buffer {
                Some(_) => Step::Read { device, slice, offset },
                None => {
                    self.end_run(Some(SurveyResult::Failed { why: "it has no memory for it".into() }));
                    Step::Again
                }
            };
        }
        let bytes = if data { u64::from(length) } else { 0 };
        self.surveyed_piece(segment, length, bytes, ContentSum::default());
        Step::Again
    }

    /// A piece of the first order's run was looked at.
    fn surveyed_piece(&mut self, segment: Option<Segment>, length: u32, bytes: u64, sum: ContentSum) {
        let (slice_bytes, now) = (self.slice_bytes, self.now);
        let Some(order) = self.surveys.orders.front_mut() else { return };
        order.found.segment = order.found.segment.or(segment);
        order.found.bytes += bytes;
        order.found.sum = order.found.sum.plus(sum);
        order.offset += length;
        if order.offset < slice_bytes {
            return;
        }
        (order.slice, order.offset) = (order.slice + 1, 0);
        if order.slice >= order.end() {
            self.end_run(None);
        } else if now >= order.told_at + TELL_EVERY {
            let answer = order.tell(now).map(|answer| (order.id, answer));
            self.surveys.answers.extend(answer);
        }
    }

    /// The first order's run ends: what was found is told, and of the rest the result.
    fn end_run(&mut self, rest: Option<SurveyResult>) {
        let now = self.now;
        let Some(order) = self.surveys.orders.front_mut() else { return };
        let id = order.id;
        let found = order.tell(now);
        let (slice, end) = (order.slice, order.end());
        let left = order.runs.pop_front().zip(rest).filter(|_| slice < end);
        let left = left.map(|(run, result)| SurveyAnswer {
            run: SurveyRun { first: slice, count: end - slice, ..run },
            result,
        });
        order.begin_run();
        self.surveys.answers.extend(found.into_iter().chain(left).map(|answer| (id, answer)));
    }

    // ---- checksums ----

    fn read_for_survey(&mut self, device: usize, slice: u32, offset: u32) {
        let (Some(buffer), Some(order)) = (self.surveys.buffer, self.surveys.orders.front()) else { return };
        let serial = order.serial;
        let length = self.copy_buffer_bytes().min(self.slice_bytes - offset);
        let view = &self.devices[device].view;
        let (epoch, claim) = (view.span(slice).epoch, view.claim.generation.0);
        let op = Op {
            kind: OpKind::Read,
            slice,
            offset,
            length,
            buffer: Some(BufferRange { buffer, offset: 0, length }),
            claim,
            ..Op::primary(Origin::Survey, device, epoch)
        };
        // One that is refused at once comes back before this is set: it is set to come back later.
        self.surveys.not_before = self.now + TICK;
        if let Some(op) = self.enqueue(op) {
            self.surveys.under_way = Some(UnderWay::Piece { serial, op });
        }
    }

    /// A read of a survey has ended.
    pub(super) fn survey_read(&mut self, key: OpKey, op: &Op, status: Status) {
        let Some(UnderWay::Piece { op: under_way, .. }) = self.surveys.under_way else { return };
        if under_way != key {
            return;
        }
        match (status, op.buffer) {
            (Status::Done, Some(buffer)) => {
                self.actions.push_back(Action::Digest { op: key, buffer });
                return;
            }
            (Status::DiskFailed | Status::Invalid, _) => self.survey_unreadable(),
            // Not ours any more, or claimed anew: the next look tells.
            _ => {}
        }
        self.surveys.under_way = None;
        self.surveys.due = true;
    }

    /// A slice cannot be read, on no copy: it is named, and the others go on.
    fn survey_unreadable(&mut self) {
        let (Some(UnderWay::Piece { serial, .. }), now) = (self.surveys.under_way, self.now) else { return };
        let Some(order) = self.surveys.orders.front_mut().filter(|order| order.serial == serial) else {
            return;
        };
        let id = order.id;
        // What was read of this slice is not told.
        let found = match order.offset {
            0 => order.tell(now),
            _ => {
                order.found = Found::default();
                let whole = order.from..order.slice;
                let run = order.runs.front().copied();
                // The slices before it are asked for again: their sum is mixed with its beginning.
                run.filter(|_| !whole.is_empty()).map(|run| SurveyAnswer {
                    run: SurveyRun { first: whole.start, count: whole.end - whole.start, ..run },
                    result: SurveyResult::Refused,
                })
            }
        };
        let why = "it cannot be read, on no copy".to_owned();
        let failed = order.runs.front().map(|run| SurveyAnswer {
            run: SurveyRun { first: order.slice, count: 1, ..*run },
            result: SurveyResult::Failed { why },
        });
        (order.slice, order.offset) = (order.slice + 1, 0);
        order.from = order.slice;
        self.surveys.answers.extend(found.into_iter().chain(failed).map(|answer| (id, answer)));
    }

    /// What was read has its digests; whether they are a survey's.
    pub(super) fn survey_digested(&mut self, key: OpKey, fine: &[Digest]) -> bool {
        let Some(UnderWay::Piece { serial, op }) = self.surveys.under_way else { return false };
        if op != key {
            return false;
        }
        self.surveys.under_way = None;
        self.surveys.due = true;
        if !self.pacer.hosts_are_busy(self.now) {
            self.surveys.not_before = self.now;
        }
        // It may have been withdrawn, or what was read may be somebody else's by now.
        let Some(order) = self.surveys.orders.front().filter(|order| order.serial == serial) else {
            return true;
        };
        let Some(run) = order.runs.front() else { return true };
        let (slice, offset) = (order.slice, order.offset);
        let Some((_, span)) = self.surveyable(run, slice) else { return true };
        let segment = span.mine.map(|mine| mine.segment);
        let start = u64::from(slice) * u64::from(self.slice_bytes) + u64::from(offset);
        let zero = self.surveys.zero;
        let blocks = fine.iter().zip((start..).step_by(FINE_BYTES as usize));
        let data = blocks.filter(|(digest, _)| Some(**digest) != zero);
        let sum = data.fold(ContentSum::default(), |sum, (digest, at)| sum.with_block(digest, at));
        let length = self.copy_buffer_bytes().min(self.slice_bytes - offset);
        self.surveyed_piece(segment, length, u64::from(length), sum);
        true
    }

    // ---- flushes ----

    fn flush_for_survey(&mut self, device: usize) {
        let Some(serial) = self.surveys.orders.front().map(|order| order.serial) else { return };
        let flush = self.start_flush(FlushOrigin::Survey, device);
        // One that ended at once is not there any more.
        match self.flushes.contains_key(flush) {
            true => self.surveys.under_way = Some(UnderWay::Flush { serial, flush }),
            false => self.surveys.not_before = self.now + TICK,
        }
    }

    /// A flush of a survey has ended: it answers for all runs of the device.
    pub(super) fn survey_flushed(&mut self, device: usize, status: Status) {
        let order = match self.surveys.under_way.take() {
            Some(UnderWay::Flush { serial, .. }) => Some(serial),
            other => {
                // It ended before it was noted.
                self.surveys.under_way = other;
                self.surveys.orders.front().map(|order| order.serial)
            }
        };
        self.surveys.due = true;
        let id = self.devices[device].view.id;
        let Some(order) = self.surveys.orders.front_mut().filter(|first| Some(first.serial) == order) else {
            return;
        };
        let number = order.id;
        let (runs, left): (Vec<SurveyRun>, _) = order.runs.drain(..).partition(|run| run.device == id);
        order.runs = left.into();
        order.begin_run();
        let moves = self.may_move(device);
        for run in runs {
            let served = self.surveyable(&run, run.first).and_then(|(_, span)| span.mine);
            let result = match (served, status) {
                (Some(mine), Status::Done) => {
                    SurveyResult::Answered { segment: mine.segment, bytes: 0, sum: ContentSum::default() }
                }
                (Some(_), Status::DiskFailed) if !moves => {
                    SurveyResult::Failed { why: "its disk cannot be flushed".into() }
                }
                // The role moves, or has moved: whoever has it then is asked.
                _ => SurveyResult::Refused,
            };
            self.surveys.answers.push((number, SurveyAnswer { run, result }));
        }
    }
}

const _: () = assert!(LOOKS_MAX >= REGIONS_PER_SLICE, "a slice is looked at in one go");
