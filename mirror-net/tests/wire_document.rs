//! docs/wire-format.md says what the code does.

use mirror_net::ids::{ClusterId, LossGeneration, SliceEpoch};
use mirror_net::wire::header::{CrcSeed, HEADER_BYTES, Header, Kind, Status, TRAILER_BYTES, Trailer};
use std::collections::BTreeMap;

/// The rows of the table that begins with this head.
fn table(head: &str) -> Vec<Vec<String>> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/wire-format.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(str::trim).skip_while(|line| !line.starts_with(head));
    assert!(lines.next().is_some(), "there is no table {head}");
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

fn seed() -> CrcSeed {
    CrcSeed::new(&ClusterId::default())
}

/// A header of that kind, if there is one.
fn of_kind(number: u8) -> Option<Header> {
    let mut bytes = Header::new(Kind::Open).encode(seed());
    bytes[6] = number;
    bytes[8..12].fill(0);
    let crc = seed().body([&bytes, &[]]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    Header::decode(&bytes, seed()).ok()
}

#[test]
fn every_kind_is_in_the_table_under_its_number() {
    let documented: BTreeMap<u8, String> =
        table("| number | kind |").into_iter().map(|row| (row[0].parse().unwrap(), row[1].clone())).collect();
    let built: BTreeMap<u8, String> = (0..=u8::MAX)
        .filter_map(|number| of_kind(number).map(|header| (number, format!("{:?}", header.kind))))
        .collect();
    assert_eq!(documented, built);
}

#[test]
fn every_status_is_in_the_table_under_its_number() {
    for row in table("| status | meaning |") {
        let (number, name) = row[0].split_once(' ').unwrap();
        assert_eq!(format!("{:?}", Status::parse(number.parse().unwrap())), name);
    }
    assert_eq!(Status::parse(99), Status::Invalid);
}

/// The bytes of a field by its documented place, as a number.
fn field(bytes: &[u8], row: &[String]) -> u64 {
    let (offset, length): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
    bytes[offset..offset + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Whether fields lie one behind the other from 0 to `end`.
fn assert_gapless(rows: &[Vec<String>], end: usize) {
    let mut at = 0;
    for row in rows {
        assert_eq!(row[0].parse::<usize>().unwrap(), at, "{row:?}");
        at += row[1].parse::<usize>().unwrap();
    }
    assert_eq!(at, end);
}

#[test]
fn every_field_of_a_header_is_where_the_table_says() {
    let header = Header {
        kind: Kind::Write,
        flags: 0x81,
        session: 0x1112_1314_1516_1718,
        sequence: 0x2122_2324_2526_2728,
        slice_epoch: SliceEpoch(0x3132_3334_3536_3738),
        device: 0x4142_4344,
        slice: 0x5152_5354,
        offset: 0x6162_6364,
        length: 0x7172_7374,
        body_bytes: 0x0008_8384,
        body_crc: 0x9192_9394,
        loss: LossGeneration(0xa1a2_a3a4),
    };
    let bytes = header.encode(seed());
    let rows = table("| offset | bytes | field | meaning |");
    assert_gapless(&rows, HEADER_BYTES);
    let mut unsealed = bytes;
    unsealed[8..12].fill(0);
    for row in &rows {
        let expected = match row[2].as_str() {
            "magic" => u64::from(u32::from_le_bytes(*b"UBMW")),
            "version" => 1,
            "kind" => header.kind as u64,
            "flags" => header.flags.into(),
            // Over the cluster id, then the bytes.
            "header_crc" => crc32c::crc32c(&[&[0; 16][..], &unsealed].concat()).into(),
            "body_crc" => header.body_crc.into(),
            "session" => header.session,
            "sequence" => header.sequence,
            "slice_epoch" => header.slice_epoch.0,
            "device" => header.device.into(),
            "slice" => header.slice.into(),
            "offset" => header.offset.into(),
            "length" => header.length.into(),
            "body_bytes" => header.body_bytes.into(),
            "loss" => header.loss.0.into(),
            other => panic!("there is no field {other}"),
        };
        assert_eq!(field(&bytes, row), expected, "{}", row[2]);
    }
}

#[test]
fn every_field_of_a_trailer_is_where_the_table_says() {
    let trailer = Trailer {
        claim: 0x1112_1314_1516_1718,
        exporter_session: 0x2122_2324_2526_2728,
        exporter_sequence: 0x3132_3334_3536_3738,
        origin: 0x4142,
    };
    let bytes = trailer.encode();
    let rows = table("| trailer offset | bytes | field |");
    assert_gapless(&rows, TRAILER_BYTES);
    let fields =
        [trailer.claim, trailer.exporter_session, trailer.exporter_sequence, trailer.origin.into(), 0];
    assert_eq!(rows.iter().map(|row| field(&bytes, row)).collect::<Vec<_>>(), fields);
}
