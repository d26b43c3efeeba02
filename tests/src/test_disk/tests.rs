//! What a loss of power may take, and what it may not: asked through the NBD server, as a machine asks.

use super::command::Order;
use super::*;
use crate::nbd::NbdClient;
use crate::sim::disk::PAGE;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

const PAGES: usize = 8;
const BYTES: usize = PAGES * PAGE;

/// A disk and the socket it is served on.
struct Served {
    disk: Arc<TestDisk>,
    dir: tempfile::TempDir,
}

impl Served {
    fn new(bytes: usize, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(TestDisk::new("disk", bytes as u64, seed));
        disk.serve(&dir.path().join("nbd")).unwrap();
        Self { disk, dir }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> NbdClient {
        let uri = format!("nbd+unix:///disk?socket={}", self.socket("nbd").display());
        NbdClient::connect(&uri).unwrap()
    }

    fn order(&self, words: &str) -> Result<String, String> {
        let words: Vec<&str> = words.split(' ').collect();
        Order::parse(&words).and_then(|order| self.disk.obey(order))
    }
}

/// A request that a machine may make.
#[derive(Clone, Debug)]
enum Op {
    Write { sector: usize, sectors: usize, through: bool },
    Flush,
    Cut,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let sectors = BYTES / SECTOR;
    let op = prop_oneof![
        6 => (0..sectors, 1..20usize, prop::bool::weighted(0.2)).prop_map(move |(sector, count, through)| {
            Op::Write { sector, sectors: count.min(sectors - sector), through }
        }),
        1 => Just(Op::Flush),
        1 => Just(Op::Cut),
    ];
    prop::collection::vec(op, 1..60)
}

/// Of every sector: what a read returns, and what else may be there after a loss of power. A value is the number
/// of the write, 0 none.
struct Expected(Vec<(u8, BTreeSet<u8>)>);

impl Expected {
    fn write(&mut self, from: usize, to: usize, value: u8, through: bool) {
        let per_page = PAGE / SECTOR;
        if through {
            // What was written before to the same page goes along.
            self.flush(from / per_page * per_page, to.div_ceil(per_page) * per_page);
        }
        for (current, possible) in &mut self.0[from..to] {
            if through {
                possible.clear();
            }
            *current = value;
            possible.insert(value);
        }
    }

    fn flush(&mut self, from: usize, to: usize) {
        for (current, possible) in &mut self.0[from..to] {
            *possible = BTreeSet::from([*current]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_cut_takes_only_what_was_not_flushed(ops in ops(), seed: u64) {
        let served = Served::new(BYTES, seed);
        let mut client = served.client();
        let mut expected = Expected(vec![(0, BTreeSet::from([0])); BYTES / SECTOR]);
        let mut number = 0;
        for op in ops {
            match op {
                Op::Write { sector, sectors, through } => {
                    number += 1;
                    let (offset, data) = ((sector * SECTOR) as u64, vec![number; sectors * SECTOR]);
                    if through {
                        let cookie = client.start_write_through(offset, &data).unwrap();
                        let reply = client.reply().unwrap().unwrap();
                        prop_assert_eq!((reply.cookie, reply.error), (cookie, 0));
                    } else {
                        client.write(offset, &data).unwrap();
                    }
                    expected.write(sector, sector + sectors, number, through);
                }
                Op::Flush => {
                    client.flush().unwrap();
                    expected.flush(0, BYTES / SECTOR);
                }
                Op::Cut => {
                    served.disk.cut();
                    prop_assert!(client.flush().is_err(), "the connection outlived the power");
                    client = served.client();
                    let found = client.read(0, BYTES as u32).unwrap();
                    for (sector, (current, possible)) in found.chunks(SECTOR).zip(&mut expected.0) {
                        prop_assert!(sector.iter().all(|byte| *byte == sector[0]), "a torn sector");
                        prop_assert!(possible.contains(&sector[0]), "{} is none of {possible:?}", sector[0]);
                        *current = sector[0];
                        *possible = BTreeSet::from([sector[0]]);
                    }
                }
            }
            let found = client.read(0, BYTES as u32).unwrap();
            for (sector, (current, _)) in found.chunks(SECTOR).zip(&expected.0) {
                prop_assert_eq!(sector[0], *current);
            }
        }
    }
}

#[test]
fn a_cut_loses_keeps_and_tears_as_the_seed_says() {
    let after = |seed| {
        let served = Served::new(BYTES, seed);
        served.client().write(0, &[1; BYTES]).unwrap();
        served.disk.cut();
        served.client().read(0, BYTES as u32).unwrap()
    };
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..40 {
        let found = after(seed);
        assert_eq!(found, after(seed), "seed {seed} did something else the second time");
        for page in found.chunks(PAGE) {
            match page.iter().map(|byte| usize::from(*byte)).sum() {
                0 => lost += 1,
                PAGE => kept += 1,
                _ => torn += 1,
            }
        }
    }
    assert!(lost > 20 && kept > 20 && torn > 5, "lost {lost}, kept {kept}, torn {torn}");
}

#[test]
fn a_bad_sector_fails_until_it_is_written_again() {
    let served = Served::new(BYTES, 1);
    let mut client = served.client();
    client.write(0, &[5; BYTES]).unwrap();
    client.flush().unwrap();
    served.order("bad-sector 9 2").unwrap();
    assert!(client.read(0, 2 * PAGE as u32).is_err());
    assert_eq!(client.read(0, PAGE as u32).unwrap(), [5; PAGE]);
    client.write(9 * SECTOR as u64, &[6; SECTOR]).unwrap();
    assert!(client.read(0, 2 * PAGE as u32).is_err(), "the other one is still bad");
    served.disk.cut();
    let mut client = served.client();
    client.write(10 * SECTOR as u64, &[6; SECTOR]).unwrap();
    assert_eq!(client.read(10 * SECTOR as u64, SECTOR as u32).unwrap(), [6; SECTOR]);
    assert!(served.order(&format!("bad-sector {}", BYTES / SECTOR)).is_err());
}

#[test]
fn what_is_told_to_fail_fails_until_it_is_healed() {
    let served = Served::new(BYTES, 1);
    let mut client = served.client();
    client.write(0, &[1; PAGE]).unwrap();
    served.order("fail next-write").unwrap();
    assert!(client.write(0, &[2; PAGE]).is_err());
    client.write(0, &[2; PAGE]).unwrap();
    served.order("fail writes").unwrap();
    assert!(client.write(0, &[3; PAGE]).is_err() && client.write(0, &[3; PAGE]).is_err());
    assert_eq!(client.read(0, PAGE as u32).unwrap(), [2; PAGE]);
    served.order("heal").unwrap();
    client.write(0, &[3; PAGE]).unwrap();
    served.order("fail").unwrap();
    assert!(client.read(0, PAGE as u32).is_err() && client.flush().is_err());
    served.disk.cut();
    // A dead disk is still dead when the power is back.
    assert!(served.client().read(0, PAGE as u32).is_err());
    served.order("heal").unwrap();
    assert!(served.client().read(0, PAGE as u32).is_ok());
}

#[test]
fn a_flush_that_fails_may_have_lost_what_it_covered() {
    let mut gone = 0;
    for seed in 0..20 {
        let served = Served::new(BYTES, seed);
        let mut client = served.client();
        client.write(0, &[1; BYTES]).unwrap();
        served.order("fail next-flush").unwrap();
        assert!(client.flush().is_err());
        client.flush().unwrap();
        gone += client.read(0, BYTES as u32).unwrap().iter().filter(|byte| **byte == 0).count();
    }
    assert!(gone > 0, "the next flush made it good");
}

#[test]
fn what_hangs_goes_on_when_healed_and_never_after_a_cut() {
    let served = Served::new(BYTES, 1);
    let mut client = served.client();
    served.order("hang").unwrap();
    client.set_patience(Duration::from_millis(50)).unwrap();
    let cookie = client.start_write(0, &[1; PAGE]).unwrap();
    assert_eq!(client.reply().unwrap(), None);
    served.order("heal").unwrap();
    client.set_patience(Duration::from_secs(60)).unwrap();
    assert_eq!(client.reply().unwrap().map(|reply| reply.cookie), Some(cookie));
    client.flush().unwrap();

    served.order("hang").unwrap();
    client.start_write(0, &[2; PAGE]).unwrap();
    served.disk.cut();
    assert!(client.reply().is_err(), "answered a machine without power");
    served.order("heal").unwrap();
    assert_eq!(served.client().read(0, PAGE as u32).unwrap(), [1; PAGE]);
}

#[test]
fn the_speed_falls_towards_the_end() {
    let (size, mib) = (100 << 20, 1 << 20);
    assert_eq!(takes((100.0, 50.0), 0, mib, size), Duration::from_millis(10));
    assert_eq!(takes((100.0, 50.0), 50 << 20, 3 * mib, size), Duration::from_millis(40));
    // And requests are carried out one after the other, each in its time.
    let served = Served::new(16 << 20, 1);
    served.order("slow 100 20").unwrap();
    let (mut one, mut other) = (served.client(), served.client());
    let begun = Instant::now();
    one.start_write(0, &vec![1; mib]).unwrap();
    other.start_write(8 << 20, &vec![1; mib]).unwrap();
    for client in [&mut one, &mut other] {
        assert_eq!(client.reply().unwrap().map(|reply| reply.error), Some(0));
    }
    // 10 ms at 100 MiB/s, 16 at 60: no upper bound, the machine may be busy.
    assert!(begun.elapsed() >= Duration::from_millis(26));
}

#[test]
fn orders_are_words_on_a_socket() {
    use std::io::{BufRead, BufReader, Write};
    let served = Served::new(BYTES, 1);
    served.disk.control(&served.socket("control")).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(served.socket("control")).unwrap();
    stream.write_all(b"bad-sector 3\nslow 0\nstatus\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let answers: Vec<String> = BufReader::new(stream).lines().map(Result::unwrap).collect();
    assert!(answers[0].starts_with("ok: sectors 3 to 3"), "{answers:?}");
    assert!(answers[1].starts_with("error: \"0\" is not a speed"), "{answers:?}");
    assert!(answers[2].starts_with("ok: ") && answers[2].contains("some bad sectors"), "{answers:?}");
}
