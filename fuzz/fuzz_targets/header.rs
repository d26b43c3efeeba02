//! The 64 bytes before a message, and the trailer behind one: whatever is accepted is encoded to the same
//! bytes again, and not one bit of it can change unnoticed.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::ids::ClusterId;
use mirror_net::wire::header::{
    BODY_BYTES_MAX, CrcSeed, HEADER_BYTES, Header, Status, TRAILER_BYTES, Trailer,
};
use ublk_mirror_fuzz::choices::Choices;

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let how = choices.byte();
    let seed = CrcSeed::new(&ClusterId(uuid::Uuid::from_bytes([how; 16])));
    let mut bytes: [u8; HEADER_BYTES] = choices.array();
    if how & 1 == 1 {
        // Past magic, version and checksum, which no fuzzer finds by itself.
        bytes[..6].copy_from_slice(b"UBMW\x01\0");
        bytes[8..12].fill(0);
        let crc = seed.body([&bytes, &[]]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(header) = Header::decode(&bytes, seed) {
        assert!(header.body_bytes <= BODY_BYTES_MAX);
        assert_eq!(header.encode(seed), bytes);
        let _ = Status::parse(header.flags);
        let bit = usize::from(choices.word()) % (HEADER_BYTES * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&bytes, seed).is_err(), "bit {bit} changed unnoticed");
        bytes[bit / 8] ^= 1 << (bit % 8);
        let other = CrcSeed::new(&ClusterId(uuid::Uuid::from_bytes([!how; 16])));
        assert!(Header::decode(&bytes, other).is_err(), "a frame of another cluster");
    }
    let bytes: [u8; TRAILER_BYTES] = choices.array();
    let trailer = Trailer::decode(&bytes);
    let again = trailer.encode();
    assert_eq!(again[..26], bytes[..26]);
    assert_eq!(Trailer::decode(&again), trailer);
});
