//! An NBD client's negotiation, in pieces of any size: it ends in a session for an export that there is, or
//! it does not.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::shelf::Shelf;
use ublk_server::frontend::nbd::{Exports, Negotiation, Outcome};

/// Replies that nobody reads pile up to here, and the replies to one option on top.
const PENDING_BYTES_MAX: usize = 256 << 10;

/// Feeds all of `stream`; returns the outcome and every byte that was answered.
fn negotiate(shelf: &Shelf, stream: &[u8], mut cuts: Choices<'_>) -> (Outcome, Vec<u8>) {
    let mut negotiation = Negotiation::new();
    let (mut rest, mut answers) = (stream, Vec::new());
    while *negotiation.outcome() == Outcome::Continue {
        let most = if cuts.is_empty() { usize::MAX } else { 1 + usize::from(cuts.byte()) };
        let piece = &rest[..most.min(rest.len())];
        let used = negotiation.handle(piece, shelf);
        assert!(used <= piece.len());
        rest = &rest[used..];
        let pending = negotiation.pending();
        assert!(pending.len() <= PENDING_BYTES_MAX, "{} bytes of replies", pending.len());
        let count = most.min(pending.len());
        answers.extend_from_slice(&pending[..count]);
        negotiation.sent(count);
        if rest.is_empty() && negotiation.pending().is_empty() {
            break;
        }
        assert!(used > 0 || count > 0 || piece.is_empty(), "it does not get on");
    }
    answers.extend_from_slice(negotiation.pending());
    (negotiation.outcome().clone(), answers)
}

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let shelf = Shelf::of(usize::from(choices.byte() % 4));
    let count = usize::from(choices.byte());
    let cuts = Choices::new(choices.bytes(count));
    let stream = choices.rest();
    let (outcome, answers) = negotiate(&shelf, stream, cuts);
    if let Outcome::Transmit(session) = &outcome {
        let export = shelf.get(&session.export.name);
        assert_eq!(export.as_ref(), Some(&session.export));
        assert!(!session.base_allocation || session.structured);
    }
    let (at_once, same) = negotiate(&shelf, stream, Choices::new(&[]));
    assert_eq!(outcome, at_once, "cut otherwise, it ends otherwise");
    assert_eq!(answers, same, "cut otherwise, it answers otherwise");
});
