//! What was sent on a session and is not answered yet.

use super::Nanos;
use super::action::{FlushKey, OpKey};
use super::copy::CopyMessage;
use super::exporter::{ExportFlushKey, PartKey};
use super::resync::Exchange;
use crate::region::digest;
use crate::wire::header::{BadFrame, Header, Kind, Status};
use std::collections::VecDeque;

/// Messages in flight on one session, at most; what is more waits.
pub const WINDOW: usize = 4096;
/// Bytes of data in flight on one session, at most, but for one message: the other side has to hold them.
pub const WINDOW_BYTES: u64 = 32 << 20;

/// What an answer on a session is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Awaited {
    Leg(OpKey),
    /// With the attempt.
    Part(PartKey, u32),
    FlushLeg(FlushKey),
    ExportFlush(ExportFlushKey),
    Unite(Exchange),
    Copy(OpKey, CopyMessage),
    Fetch(OpKey),
}

impl Awaited {
    /// Whether a frame is an answer to this message, as a whole: what waits for it can then rely on its shape.
    fn is_answered_by(&self, header: &Header, body: &[u8]) -> bool {
        let done = Status::parse(header.flags) == Status::Done;
        match (self, header.kind) {
            (Self::Leg(_) | Self::FlushLeg(_) | Self::Fetch(_), Kind::Ack) => true,
            (Self::Part(..) | Self::ExportFlush(_), Kind::Reply) => true,
            (Self::Copy(_, CopyMessage::Store), Kind::Ack) => true,
            // One that cannot compare says so without digests.
            (Self::Copy(..), Kind::Ack) => !done,
            (Self::Copy(_, CopyMessage::Coarse | CopyMessage::Fine { .. }), Kind::Digests) => {
                !done || digest::parse(body).is_some()
            }
            (Self::Unite(_), Kind::Masks) => !done || body.len() == 16,
            _ => false,
        }
    }
}

/// A message that was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    awaited: Awaited,
    /// Of data that it sent or asked for.
    bytes: u32,
    at: Nanos,
}

/// Messages that wait for their answers, by sequence.
#[derive(Default, Debug)]
pub(super) struct Window {
    base: u64,
    awaited: VecDeque<Option<Sent>>,
    /// Places that are taken.
    count: usize,
    /// Bytes of all of them.
    bytes: u64,
}

impl Window {
    /// One slow answer does not hold up the others, within reason.
    pub fn has_room(&self) -> bool {
        self.count < WINDOW && self.bytes < WINDOW_BYTES && self.awaited.len() < 16 * WINDOW
    }

    pub fn put(&mut self, sequence: u64, awaited: Awaited, bytes: u32, now: Nanos) {
        if self.awaited.is_empty() {
            self.base = sequence;
        }
        // Messages without an answer have numbers too; the window keeps an empty place for them.
        while self.base + (self.awaited.len() as u64) < sequence {
            self.awaited.push_back(None);
        }
        self.awaited.push_back(Some(Sent { awaited, bytes, at: now }));
        self.count += 1;
        self.bytes += u64::from(bytes);
    }

    /// Room enough for what waited for room to go on.
    pub fn is_half_empty(&self) -> bool {
        self.count * 2 <= WINDOW && self.bytes * 2 <= WINDOW_BYTES && self.has_room()
    }

    /// Takes what that answer is for; nothing is taken if there is nothing, or the answer does not fit.
    pub fn take_answered(&mut self, header: &Header, body: &[u8]) -> Result<Awaited, BadFrame> {
        let index = header.sequence.checked_sub(self.base).and_then(|index| usize::try_from(index).ok());
        let place = index.and_then(|index| self.awaited.get_mut(index));
        let Some((place, Sent { awaited, bytes, .. })) =
            place.and_then(|place| Some((*place)?).map(|taken| (place, taken)))
        else {
            return Err(BadFrame::Content("an answer to nothing"));
        };
        if !awaited.is_answered_by(header, body) {
            return Err(BadFrame::Content("an answer of another kind than was asked for"));
        }
        *place = None;
        self.count -= 1;
        self.bytes -= u64::from(bytes);
        while let Some(None) = self.awaited.front() {
            self.awaited.pop_front();
            self.base += 1;
        }
        Ok(awaited)
    }

    /// Since when an answer about a copy is awaited, the oldest of them. What is forwarded to a primary may wait there for
    /// others.
    pub fn owed_since(&self) -> Option<Nanos> {
        let owed = |sent: &&Sent| !matches!(sent.awaited, Awaited::Part(..) | Awaited::ExportFlush(_));
        self.awaited.iter().flatten().find(owed).map(|sent| sent.at)
    }

    /// All that is still awaited, in the order in which it was sent.
    pub fn into_awaited(self) -> impl Iterator<Item = Awaited> {
        self.awaited.into_iter().flatten().map(|sent| sent.awaited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flush() -> Awaited {
        Awaited::FlushLeg(FlushKey::default())
    }

    fn answer(kind: Kind, sequence: u64) -> Header {
        Header { sequence, ..Header::new(kind) }
    }

    #[test]
    fn a_window_is_full_by_messages_or_by_bytes() {
        let mut window = Window::default();
        let mut sequence = 0;
        while window.has_room() {
            sequence += 1;
            window.put(sequence, flush(), 1 << 20, 0);
        }
        assert_eq!(sequence, 32);
        let ack = answer(Kind::Ack, 7);
        assert_eq!(window.take_answered(&ack, &[]), Ok(flush()));
        assert!(window.take_answered(&ack, &[]).is_err(), "answered twice");
        assert!(window.has_room());
        let mut window = Window::default();
        for sequence in 1..=WINDOW as u64 {
            assert!(window.has_room());
            window.put(sequence, flush(), 0, 0);
        }
        assert!(!window.has_room());
    }

    #[test]
    fn what_does_not_fit_takes_nothing() {
        let copy = Awaited::Copy(OpKey::default(), CopyMessage::Coarse);
        let fits: [(Awaited, Kind, &[u8]); 3] = [
            (flush(), Kind::Ack, &[]),
            (copy, Kind::Digests, &[0; 32]),
            (Awaited::ExportFlush(ExportFlushKey::default()), Kind::Reply, &[]),
        ];
        for (awaited, kind, body) in fits {
            let mut window = Window::default();
            window.put(1, awaited, 0, 0);
            for wrong in [Kind::Ack, Kind::Masks, Kind::Digests, Kind::Reply] {
                if wrong != kind {
                    assert!(window.take_answered(&answer(wrong, 1), body).is_err(), "{awaited:?} {wrong:?}");
                }
            }
            assert_eq!(window.take_answered(&answer(kind, 1), body), Ok(awaited));
        }
        let mut window = Window::default();
        window.put(1, copy, 0, 0);
        assert!(window.take_answered(&answer(Kind::Digests, 1), &[0; 17]).is_err(), "half a digest");
        assert_eq!(window.into_awaited().collect::<Vec<_>>(), [copy]);
    }
}
