//! Requests of an NBD client: what passes the check lies within the export, and every answer is as long as
//! it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::shelf::{Shelf, export};
use ublk_mirror_fuzz::streams::receive;
use ublk_server::frontend::nbd::reply::{self, Extent};
use ublk_server::frontend::nbd::{
    Command, Exports, NbdError, PAYLOAD_BYTES_MAX, Request, RequestParser, Session,
};

/// The length that a structured reply announces, if it is one.
fn announced(bytes: &[u8]) -> Option<usize> {
    let magic = bytes.first_chunk::<4>()?;
    (u32::from_be_bytes(*magic) == 0x668e_33ef)
        .then(|| 20 + u32::from_be_bytes(bytes[16..20].try_into().expect("four bytes")) as usize)
}

fn check_reply(bytes: &[u8], data_bytes: usize) {
    assert_eq!(announced(bytes).unwrap_or(16 + data_bytes), bytes.len() + data_bytes);
}

fn answer(session: &Session, request: &Request, choices: &mut Choices<'_>) {
    if let Err(refusal) = request.check(session) {
        check_reply(&reply::refusal(session, request, refusal), 0);
        return;
    }
    let size = session.export.size;
    match request.command {
        Command::Disconnect => return,
        Command::Flush => assert_eq!((request.offset, request.length), (0, 0)),
        _ => {
            assert!(request.length > 0 && request.offset + u64::from(request.length) <= size);
            assert_eq!(
                (request.offset | u64::from(request.length)) % u64::from(session.export.block_size_min),
                0
            );
        }
    }
    assert!(!(session.export.read_only && request.command.changes_data()));
    match request.command {
        Command::Read => {
            assert!(request.length <= PAYLOAD_BYTES_MAX);
            check_reply(&reply::read_head(session, request), request.length as usize);
        }
        Command::BlockStatus => {
            assert!(session.base_allocation);
            let mut extents = *choices;
            let extents = std::iter::from_fn(|| {
                let kind = extents.byte();
                let (hole, zero) = (kind & 1 != 0, kind & 2 != 0);
                (!extents.is_empty()).then(|| Extent { length: extents.long() >> (kind >> 2), hole, zero })
            });
            let reply = reply::block_status(request, extents);
            check_reply(&reply, 0);
            let lengths = reply[24..]
                .chunks(8)
                .map(|extent| u64::from(u32::from_be_bytes(extent[..4].try_into().expect("four bytes"))));
            let (count, total) = (lengths.clone().count(), lengths.sum::<u64>());
            assert!(count >= 1 && total >= 1 && total <= request.length.into());
        }
        _ => check_reply(&reply::success(request), 0),
    }
    let error = NbdError::from_errno(i32::from(choices.word()));
    check_reply(&reply::failure(session, request, error, "worn out"), 0);
}

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let how = choices.byte();
    let names = ["disk", "other", "third"];
    let chosen = Shelf::of(3).get(names[usize::from(how >> 4) % 3]).unwrap_or_else(|| export("disk"));
    let structured = how & 1 != 0;
    let session = Session { export: chosen, structured, base_allocation: structured && how & 2 != 0 };
    let count = usize::from(choices.byte());
    let cuts = Choices::new(choices.bytes(count));
    let stream = choices.rest();
    let skip = |request: &Request| request.check(&session).is_err();
    let frames = receive(RequestParser, stream, cuts, skip);
    let at_once = receive(RequestParser, stream, Choices::new(&[0xff; 2]), skip);
    assert_eq!(frames, at_once, "cut otherwise, other requests come out");
    for (request, payload) in &frames.complete {
        if let Some(payload) = payload {
            assert_eq!(payload.len(), request.payload_bytes() as usize);
        }
        answer(&session, request, &mut Choices::new(stream));
    }
});
