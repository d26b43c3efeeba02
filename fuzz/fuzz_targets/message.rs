//! Messages on a lane, whole and broken: the same come out however the stream is cut, and what was damaged
//! on the way ends it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::ids::ClusterId;
use mirror_net::wire::header::{BODY_BYTES_MAX, CrcSeed, Header, Kind, Trailer};
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::streams::receive;
use ublk_server::mirror::lane::{LaneParser, open_body};

const KINDS: [Kind; 22] = [
    Kind::Open,
    Kind::Adopted,
    Kind::Attached,
    Kind::Ping,
    Kind::Pong,
    Kind::Write,
    Kind::Zero,
    Kind::Discard,
    Kind::Flush,
    Kind::Unite,
    Kind::Compare,
    Kind::Clear,
    Kind::Fetch,
    Kind::Ack,
    Kind::Masks,
    Kind::Digests,
    Kind::ForwardRead,
    Kind::ForwardWrite,
    Kind::ForwardZero,
    Kind::ForwardDiscard,
    Kind::ForwardFlush,
    Kind::Reply,
];

/// A message as it was sent.
struct Sent {
    header: Header,
    body: Vec<u8>,
    trailer: Option<Trailer>,
}

fn message(choices: &mut Choices<'_>, seed: CrcSeed) -> Sent {
    let mut header = Header::new(choices.of(&KINDS));
    (header.flags, header.session, header.sequence) = (choices.byte(), choices.long(), choices.long());
    (header.length, header.device) = (u32::from(choices.word()), u32::from(choices.byte()));
    let length = usize::from(choices.word()) >> choices.below(16);
    let mut body: Vec<u8> = choices.bytes(length).to_vec();
    // Long bodies need no long inputs.
    body.resize(length, choices.byte());
    let trailer = header.kind.is_forwarded().then(|| Trailer::decode(&choices.array()));
    body.extend(trailer.iter().flat_map(Trailer::encode));
    header.body_bytes = body.len() as u32;
    header.body_crc = seed.body([&body, &[]]);
    Sent { header, body, trailer }
}

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let seed = CrcSeed::new(&ClusterId::default());
    let count = choices.below(8);
    let mut stream = Vec::new();
    let sent: Vec<Sent> = (0..count).map(|_| message(&mut choices, seed)).collect();
    for message in &sent {
        stream.extend(message.header.encode(seed));
        stream.extend(&message.body);
    }
    // Nothing, a flipped bit, or anything at all behind what is whole.
    let damage = choices.below(3);
    let mut damaged_at = stream.len();
    match damage {
        1 if !stream.is_empty() => {
            damaged_at = choices.below(stream.len().min(1 << 16) as u32) as usize;
            stream[damaged_at] ^= 1 << choices.below(8);
        }
        2 => {
            let count = usize::from(choices.byte());
            stream.extend(choices.bytes(count));
        }
        _ => {}
    }
    let skip = |header: &Header| header.flags == 0xff;
    let frames = receive(LaneParser::new(seed), &stream, choices, skip);
    let at_once = receive(LaneParser::new(seed), &stream, Choices::new(&[0xff; 2]), skip);
    assert_eq!(frames, at_once, "cut otherwise, other frames come out");

    let mut end = 0;
    for (index, (header, body)) in frames.complete.iter().enumerate() {
        assert!(header.body_bytes <= BODY_BYTES_MAX);
        let Some(sent) = sent.get(index) else { continue };
        let begin = end;
        end += 64 + sent.body.len();
        if (begin..end).contains(&damaged_at) {
            assert_eq!(header, &sent.header, "a damaged header");
            let opened = body.as_ref().map(|body| open_body(header, body, seed));
            assert!(opened.is_none_or(|opened| opened.is_err()), "a damaged body");
            return;
        }
        assert_eq!(header, &sent.header);
        if let Some(body) = body {
            assert_eq!(body, &sent.body);
            assert_eq!(open_body(header, body, seed), Ok(sent.trailer));
        }
    }
    if damage == 0 {
        assert_eq!(frames.complete.len(), sent.len());
    }
    // What was not sent by us is judged as well.
    for (header, body) in frames.complete.iter().skip(sent.len()) {
        let _ = body.as_ref().map(|body| open_body(header, body, seed));
    }
});
