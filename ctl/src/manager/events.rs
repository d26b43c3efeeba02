//! What happened, kept for people by the manager that leads.
//!
//! Nothing is decided by it. An event is told to nobody before the store has it: whoever asks for what came after it
//! may ask another manager the next time, and must find there what he has seen.

use mirror_net::control::{Event, EventKind};
use mirror_net::ids::MapVersion;
use std::collections::VecDeque;
use std::time::SystemTime;

/// Events that are remembered.
pub(super) const REMEMBERED_MAX: usize = 10_000;
/// Events in one answer: they fit in a frame.
const ANSWER_MAX: usize = 2_000;
/// Bytes of an event's text; what is longer is cut off.
const TEXT_BYTES_MAX: usize = 4 << 10;
/// Events that may wait for the store.
const UNKEPT_MAX: usize = 2_000;

/// An event of this moment; the order in which events are kept gives it its number.
#[derive(Debug)]
pub(super) struct Note {
    at: String,
    kind: EventKind,
    map: Option<MapVersion>,
    text: String,
}

impl Note {
    pub(super) fn new(kind: EventKind, map: Option<MapVersion>, mut text: String) -> Self {
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        if text.len() > TEXT_BYTES_MAX {
            let end = (0..=TEXT_BYTES_MAX).rev().find(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or(0));
            text.push('…');
        }
        Self { at, kind, map, text }
    }
}

/// The last events that the store has.
#[derive(Debug)]
pub(super) struct EventLog {
    remembered: VecDeque<Event>,
}

impl EventLog {
    /// With what the store had when this manager began to lead.
    pub(super) fn new(events: Vec<Event>) -> Self {
        Self { remembered: events.into() }
    }

    /// The store has them.
    pub(super) fn add(&mut self, events: Vec<Event>) {
        self.remembered.extend(events);
        let old = self.remembered.len().saturating_sub(REMEMBERED_MAX);
        self.remembered.drain(..old);
    }

    /// Those with a larger number, the oldest first; the newest of them if there are too many.
    pub(super) fn after(&self, number: u64) -> Vec<Event> {
        let first = self.remembered.partition_point(|event| event.number <= number);
        let first = first.max(self.remembered.len().saturating_sub(ANSWER_MAX));
        self.remembered.iter().skip(first).cloned().collect()
    }
}

/// Events that the store has not, in their order.
#[derive(Debug)]
pub(super) struct Unkept {
    events: Vec<Event>,
    /// The number of the last event that the store has.
    kept: u64,
    /// Some were left out, and that has been told.
    overflowed: bool,
}

impl Unkept {
    /// `kept`: the number of the last event that the store has; 0 for none.
    pub(super) fn new(kept: u64) -> Self {
        Self { events: Vec::new(), kept, overflowed: false }
    }

    pub(super) fn push(&mut self, note: Note) {
        if self.events.len() >= UNKEPT_MAX {
            if !std::mem::replace(&mut self.overflowed, true) {
                tracing::warn!(
                    "{UNKEPT_MAX} events wait for the store: what happens now is told in this log only"
                );
            }
            return;
        }
        let Note { at, kind, map, text } = note;
        let number = self.events.last().map_or(self.kept, |event| event.number) + 1;
        self.events.push(Event { number, at, kind, map, text });
    }

    pub(super) fn all(&self) -> &[Event] {
        &self.events
    }

    /// The store has the first `count`.
    pub(super) fn take(&mut self, count: usize) -> Vec<Event> {
        self.overflowed &= count == 0;
        let taken: Vec<Event> = self.events.drain(..count).collect();
        self.kept = taken.last().map_or(self.kept, |event| event.number);
        taken
    }

    /// Forgets all but the first `count`: they have not happened.
    pub(super) fn truncate(&mut self, count: usize) {
        self.events.truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(text: &str) -> Note {
        Note::new(EventKind::Node, None, text.into())
    }

    #[test]
    fn numbers_follow_each_other_whatever_has_not_happened() {
        let mut unkept = Unkept::new(7);
        unkept.push(note("one"));
        let before = unkept.all().len();
        unkept.push(note("a map that was not stored"));
        unkept.truncate(before);
        unkept.push(note("two"));
        let numbers: Vec<u64> = unkept.take(1).iter().map(|event| event.number).collect();
        assert_eq!(numbers, [8]);
        unkept.take(1);
        unkept.push(note("three"));
        assert_eq!((unkept.all()[0].number, unkept.all()[0].text.as_str()), (10, "three"));
    }

    #[test]
    fn a_store_that_keeps_nothing_costs_a_bounded_memory() {
        let mut unkept = Unkept::new(0);
        (0..UNKEPT_MAX + 5).for_each(|_| unkept.push(note("x")));
        assert_eq!(unkept.all().len(), UNKEPT_MAX);
        let mut log = EventLog::new(Vec::new());
        for _ in 0..2 * REMEMBERED_MAX / UNKEPT_MAX {
            log.add(unkept.take(UNKEPT_MAX));
            (0..UNKEPT_MAX).for_each(|_| unkept.push(note("x")));
        }
        let events = log.after(0);
        assert_eq!((events.len(), events[ANSWER_MAX - 1].number), (ANSWER_MAX, 2 * REMEMBERED_MAX as u64));
        assert_eq!(log.after(events[0].number).len(), ANSWER_MAX - 1);
        assert_eq!(log.remembered.len(), REMEMBERED_MAX);
        let long = note(&"ä".repeat(TEXT_BYTES_MAX));
        assert_eq!(long.text.len(), TEXT_BYTES_MAX + '…'.len_utf8());
    }
}
