//! Every option, and every way a negotiation can end.

use super::handshake::{OPTION_BYTES_MAX, OPTION_SKIPPED_BYTES_MAX, OPTIONS_MAX};
use super::*;
use proptest::prelude::*;

const ACK: u32 = 1;
const UNSUP: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

struct Shelf(Vec<ExportInfo>);

impl Exports for Shelf {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|export| export.name.clone()).collect()
    }

    fn get(&self, name: &str) -> Option<ExportInfo> {
        assert!(!name.is_empty());
        self.0.iter().find(|export| export.name == name).cloned()
    }
}

pub(super) fn export(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 30,
        block_size_min: 512,
        block_size_preferred: 4096,
        read_only: false,
        rotational: false,
        fast_zero: false,
    }
}

fn one() -> Shelf {
    Shelf(vec![export("disk")])
}

fn two() -> Shelf {
    Shelf(vec![export("disk"), ExportInfo { read_only: true, rotational: true, ..export("other") }])
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|wanted| data.extend(wanted.to_be_bytes()));
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// After the greeting and the client's flags.
fn begun(flags: u32) -> Negotiation {
    let mut negotiation = Negotiation::new();
    assert_eq!(negotiation.pending(), b"NBDMAGICIHAVEOPT\x00\x03");
    negotiation.sent(18);
    assert_eq!(negotiation.handle(&flags.to_be_bytes(), &one()), 4);
    assert!(negotiation.pending().is_empty());
    negotiation
}

fn take_pending(negotiation: &mut Negotiation) -> Vec<u8> {
    let bytes = negotiation.pending().to_vec();
    negotiation.sent(bytes.len());
    bytes
}

/// The replies to an option: type and data of each.
fn replies(bytes: &[u8], option: u32) -> Vec<(u32, Vec<u8>)> {
    let (mut rest, mut found) = (bytes, Vec::new());
    while !rest.is_empty() {
        let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        assert_eq!(rest[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        assert_eq!(word(8), option);
        let end = 20 + word(16) as usize;
        found.push((word(12), rest[20..end].to_vec()));
        rest = &rest[end..];
    }
    found
}

fn ask(
    negotiation: &mut Negotiation,
    exports: &dyn Exports,
    number: u32,
    data: &[u8],
) -> Vec<(u32, Vec<u8>)> {
    let bytes = option(number, data);
    assert_eq!(negotiation.handle(&bytes, exports), bytes.len());
    replies(&take_pending(negotiation), number)
}

/// The only reply is an error of that type, with a message.
fn assert_refused(replies: &[(u32, Vec<u8>)], kind: u32) {
    assert_eq!(replies.len(), 1, "{replies:?}");
    assert_eq!(replies[0].0, kind);
    assert!(!replies[0].1.is_empty(), "no message");
}

fn session(negotiation: &Negotiation) -> &Session {
    match negotiation.outcome() {
        Outcome::Transmit(session) => session,
        other => panic!("{other:?}"),
    }
}

fn closed(negotiation: &Negotiation) -> &CloseReason {
    match negotiation.outcome() {
        Outcome::Closed(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn export_name_pads_unless_asked_not_to() {
    for (flags, length) in [(1, 134), (3, 10), (0, 134), (2, 10)] {
        let mut negotiation = begun(flags);
        negotiation.handle(&option(1, b"disk"), &two());
        let reply = take_pending(&mut negotiation);
        assert_eq!(reply.len(), length);
        assert_eq!(reply[..8], (1u64 << 30).to_be_bytes());
        assert_eq!(reply[8..10], 0x096du16.to_be_bytes());
        assert_eq!(session(&negotiation).export.name, "disk");
        assert!(!session(&negotiation).structured);
    }
}

#[test]
fn export_name_can_only_refuse_by_hanging_up() {
    let mut negotiation = begun(3);
    negotiation.handle(&option(1, b"none"), &one());
    assert_eq!(closed(&negotiation), &CloseReason::UnknownExport("none".into()));
    assert!(negotiation.pending().is_empty());
    for name in [b"a\0b".to_vec(), b"\xff".to_vec(), vec![b'a'; STRING_BYTES_MAX + 1]] {
        let mut negotiation = begun(3);
        negotiation.handle(&option(1, &name), &one());
        assert_eq!(closed(&negotiation), &CloseReason::BadExportName);
    }
}

#[test]
fn the_empty_name_is_the_only_export() {
    let mut negotiation = begun(3);
    negotiation.handle(&option(1, b""), &one());
    assert_eq!(session(&negotiation).export.name, "disk");
    let mut negotiation = begun(3);
    assert_refused(&ask(&mut negotiation, &two(), 7, &go("", &[])), UNKNOWN);
    assert_refused(&ask(&mut negotiation, &Shelf(vec![]), 7, &go("", &[])), UNKNOWN);
}

#[test]
fn abort_is_acknowledged_and_its_data_ignored() {
    for data in [&b""[..], b"goodbye"] {
        let mut negotiation = begun(3);
        assert_eq!(ask(&mut negotiation, &one(), 2, data), [(ACK, vec![])]);
        assert_eq!(closed(&negotiation), &CloseReason::Aborted);
    }
}

#[test]
fn list_names_and_describes() {
    let mut negotiation = begun(3);
    let server = |name| [string(name), b"a disk".to_vec()].concat();
    let expected = [(2, server("disk")), (2, server("other")), (ACK, vec![])];
    assert_eq!(ask(&mut negotiation, &two(), 3, b""), expected);
    assert_refused(&ask(&mut negotiation, &two(), 3, b"x"), INVALID);
    assert_eq!(ask(&mut negotiation, &Shelf(vec![]), 3, b""), [(ACK, vec![])]);
}

#[test]
fn info_says_what_was_asked_and_go_goes() {
    let mut negotiation = begun(3);
    let basic = [
        (3, b"\0\0\0\0\0\0\x40\0\0\0\x09\x6d".to_vec()),
        (3, b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0".to_vec()),
    ];
    let plain = ask(&mut negotiation, &one(), 6, &go("disk", &[]));
    assert_eq!(plain, [&basic[..], &[(ACK, vec![])]].concat());
    assert_eq!(negotiation.outcome(), &Outcome::Continue);

    let details = [(3, b"\0\x01disk".to_vec()), (3, b"\0\x02a disk".to_vec()), (ACK, vec![])];
    // Also one that does not exist, and one twice.
    let all = ask(&mut negotiation, &one(), 7, &go("", &[3, 2, 1, 77, 1]));
    assert_eq!(all, [&basic[..], &details[..]].concat());
    assert_eq!(session(&negotiation).export.name, "disk");
}

#[test]
fn flags_of_a_read_only_rotational_export() {
    let mut negotiation = begun(3);
    let replies = ask(&mut negotiation, &two(), 7, &go("other", &[]));
    assert_eq!(replies[0].1[10..], 0x011fu16.to_be_bytes());
}

#[test]
fn info_refuses_what_is_malformed() {
    let too_long = go(&"a".repeat(STRING_BYTES_MAX + 1), &[]);
    let mut half_request = go("disk", &[1]);
    half_request.pop();
    let mut name_beyond_data = go("disk", &[]);
    name_beyond_data[0] = 0xff;
    let too_much = [go("disk", &[1]), vec![0]].concat();
    let not_text = [&4u32.to_be_bytes()[..], b"\xff\xff\xff\xff\0\0"].concat();
    for number in [6, 7] {
        let mut negotiation = begun(3);
        for data in [&[][..], b"abc", &too_long, &half_request, &name_beyond_data, &too_much, &not_text] {
            assert_refused(&ask(&mut negotiation, &one(), number, data), INVALID);
        }
        assert_refused(&ask(&mut negotiation, &one(), number, &go("none", &[])), UNKNOWN);
        assert_eq!(negotiation.outcome(), &Outcome::Continue);
        let longest = go(&"a".repeat(STRING_BYTES_MAX), &[]);
        assert_refused(&ask(&mut negotiation, &one(), number, &longest), UNKNOWN);
    }
}

#[test]
fn structured_replies_once_and_without_data() {
    let mut negotiation = begun(3);
    assert_refused(&ask(&mut negotiation, &one(), 8, b"x"), INVALID);
    assert_eq!(ask(&mut negotiation, &one(), 8, b""), [(ACK, vec![])]);
    assert_refused(&ask(&mut negotiation, &one(), 8, b""), INVALID);
    ask(&mut negotiation, &one(), 7, &go("disk", &[]));
    assert!(session(&negotiation).structured);
}

#[test]
fn contexts_need_structured_replies() {
    let mut negotiation = begun(3);
    for number in [9, 10] {
        assert_refused(&ask(&mut negotiation, &one(), number, &contexts("disk", &[])), INVALID);
    }
}

#[test]
fn listing_contexts() {
    let mut negotiation = begun(3);
    ask(&mut negotiation, &one(), 8, b"");
    let found = [(4, b"\0\0\0\0base:allocation".to_vec()), (ACK, vec![])];
    for queries in [&[][..], &["base:"], &["base:allocation"], &["qemu:", "base:", "base:allocation"]] {
        assert_eq!(ask(&mut negotiation, &one(), 9, &contexts("", queries)), found);
    }
    for queries in [&["qemu:dirty-bitmap:a"][..], &["base:other"], &["nonsense"], &[""]] {
        assert_eq!(ask(&mut negotiation, &one(), 9, &contexts("disk", queries)), [(ACK, vec![])]);
    }
    assert_refused(&ask(&mut negotiation, &one(), 9, &contexts("none", &[])), UNKNOWN);
    ask(&mut negotiation, &one(), 7, &go("disk", &[]));
    assert!(!session(&negotiation).base_allocation);
}

#[test]
fn setting_contexts() {
    let set = |exports: &Shelf, name: &str, tries: &[(&str, &[&str])]| {
        let mut negotiation = begun(3);
        ask(&mut negotiation, exports, 8, b"");
        let last =
            tries.iter().map(|(name, queries)| ask(&mut negotiation, exports, 10, &contexts(name, queries)));
        let last = last.last().unwrap();
        ask(&mut negotiation, exports, 7, &go(name, &[]));
        (last, session(&negotiation).base_allocation)
    };
    let found = vec![(4, b"\0\0\0\x01base:allocation".to_vec()), (ACK, vec![])];
    let none = vec![(ACK, vec![])];
    let alloc = &["base:allocation"][..];
    assert_eq!(set(&one(), "disk", &[("disk", alloc)]), (found.clone(), true));
    assert_eq!(set(&one(), "disk", &[("", alloc)]), (found.clone(), true));
    assert_eq!(set(&one(), "disk", &[("disk", &["base:"])]), (none.clone(), false));
    assert_eq!(set(&one(), "disk", &[("disk", &[])]), (none.clone(), false));
    assert_eq!(set(&two(), "disk", &[("other", alloc)]), (found, false));
    // The last one counts, also when it fails.
    assert_eq!(set(&one(), "disk", &[("disk", alloc), ("disk", &[])]), (none, false));
    let (refused, chosen) = set(&one(), "disk", &[("disk", alloc), ("none", alloc)]);
    assert_refused(&refused, UNKNOWN);
    assert!(!chosen);
}

#[test]
fn contexts_refuse_what_is_malformed() {
    let mut negotiation = begun(3);
    ask(&mut negotiation, &one(), 8, b"");
    let mut more_queries_than_data = contexts("disk", &["base:"]);
    more_queries_than_data[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let more_data_than_queries = [contexts("disk", &["base:"]), vec![0]].concat();
    for number in [9, 10] {
        for data in [&[][..], b"abc", &string("disk"), &more_queries_than_data, &more_data_than_queries] {
            assert_refused(&ask(&mut negotiation, &one(), number, data), INVALID);
        }
    }
}

#[test]
fn unknown_options_are_refused_and_skipped() {
    let mut negotiation = begun(3);
    // PEEK_EXPORT, STARTTLS, EXTENDED_HEADERS, nonsense.
    for number in [0, 4, 5, 11, 0xffff_ffff] {
        assert_refused(&ask(&mut negotiation, &one(), number, b""), UNSUP);
        assert_refused(&ask(&mut negotiation, &one(), number, &vec![0; 100_000]), UNSUP);
    }
    assert_eq!(ask(&mut negotiation, &one(), 8, b""), [(ACK, vec![])]);
}

#[test]
fn options_that_are_too_long_are_skipped_or_end_it() {
    let mut negotiation = begun(3);
    assert_refused(&ask(&mut negotiation, &one(), 7, &vec![0; OPTION_BYTES_MAX as usize + 1]), TOO_BIG);
    assert_refused(&ask(&mut negotiation, &one(), 7, &vec![0; OPTION_BYTES_MAX as usize]), INVALID);
    let mut header = option(7, b"");
    let length = OPTION_SKIPPED_BYTES_MAX + 1;
    header[12..].copy_from_slice(&length.to_be_bytes());
    negotiation.handle(&header, &one());
    assert_eq!(closed(&negotiation), &CloseReason::OptionTooLong { option: 7, length });
}

#[test]
fn options_are_counted() {
    let mut negotiation = begun(3);
    for _ in 0..OPTIONS_MAX {
        assert_refused(&ask(&mut negotiation, &one(), 99, b""), UNSUP);
    }
    negotiation.handle(&option(99, b""), &one());
    assert_eq!(closed(&negotiation), &CloseReason::TooManyOptions);
}

#[test]
fn strangers_are_sent_away() {
    let mut negotiation = Negotiation::new();
    negotiation.handle(&7u32.to_be_bytes(), &one());
    assert_eq!(closed(&negotiation), &CloseReason::UnknownClientFlags(4));

    let mut negotiation = begun(3);
    assert_eq!(negotiation.handle(b"GET / HTTP/1.1\r\nHost: here\r\n", &one()), 16);
    assert_eq!(closed(&negotiation), &CloseReason::BadOptionMagic(u64::from_be_bytes(*b"GET / HT")));

    let mut negotiation = begun(2);
    negotiation.handle(&option(3, b""), &one());
    assert_eq!(closed(&negotiation), &CloseReason::NotFixedNewstyle(3));
}

#[test]
fn a_client_that_does_not_read_is_not_listened_to() {
    let mut negotiation = begun(3);
    let shelf = Shelf(vec![ExportInfo { description: "d".repeat(4096), ..export("disk") }; 8]);
    let bytes = option(3, b"").repeat(100);
    let used = negotiation.handle(&bytes, &shelf);
    assert_eq!(used, 2 * 16);
    assert_eq!(negotiation.handle(&bytes[used..], &shelf), 0);
    take_pending(&mut negotiation);
    assert_eq!(negotiation.handle(&bytes[used..], &shelf), 2 * 16);
}

fn conversation() -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(option(5, b""));
    bytes.extend(option(8, b""));
    bytes.extend(option(10, &contexts("disk", &["base:allocation"])));
    bytes.extend(option(7, &vec![9; 70_000]));
    bytes.extend(option(7, &go("disk", &[1, 3])));
    bytes
}

proptest! {
    /// The same replies and the same session however the bytes arrive, and not a byte of the first
    /// request is taken.
    #[test]
    fn any_cuts_mean_the_same(cuts in prop::collection::vec(prop_oneof![1..9usize, 1..9000usize], 1..30)) {
        let mut whole = Negotiation::new();
        prop_assert_eq!(whole.handle(&conversation(), &one()), conversation().len());
        prop_assert!(session(&whole).base_allocation);

        let (conversation, mut cuts) = (conversation(), cuts.iter().cycle());
        let mut stream = &[&conversation[..], &[0x25; 100]].concat()[..];
        let (mut pieces, mut said) = (Negotiation::new(), Vec::new());
        while *pieces.outcome() == Outcome::Continue {
            let piece = &stream[..stream.len().min(*cuts.next().unwrap())];
            stream = &stream[pieces.handle(piece, &one())..];
            let part = pieces.pending().len().min(*cuts.next().unwrap());
            said.extend_from_slice(&pieces.pending()[..part]);
            pieces.sent(part);
        }
        said.extend_from_slice(pieces.pending());
        prop_assert_eq!(stream.len(), 100);
        prop_assert_eq!(pieces.outcome(), whole.outcome());
        prop_assert_eq!(&said[..], whole.pending());
    }

    /// Well-formed headers around garbage get deeper than garbage alone.
    #[test]
    fn garbage_never_panics(
        flags in 0..4u32,
        options in prop::collection::vec(
            (0..12u32, prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..60)), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut bytes = flags.to_be_bytes().to_vec();
        options.iter().for_each(|(number, data)| bytes.extend(option(*number, data)));
        bytes.extend(tail);
        let mut negotiation = Negotiation::new();
        let used = negotiation.handle(&bytes, &two());
        prop_assert!(used <= bytes.len());
        if *negotiation.outcome() == Outcome::Continue {
            prop_assert_eq!(used, bytes.len());
        } else {
            prop_assert_eq!(negotiation.handle(&bytes[used..], &two()), 0);
        }
    }
}
