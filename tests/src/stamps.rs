//! A workload that knows what it may read: every block of 4 KiB carries the number of the write that made
//! it, and a ledger knows which writes were acknowledged, which were only sent, and what was read since.
//!
//! The rule is one for all faults that leave a copy: a read returns a write that was sent, and none older
//! than the newest one that was acknowledged or read. What was sent and not acknowledged may be there or
//! not, but what was read once does not go away. Where all copies lost their caches ([`Workload::lost_caches`])
//! it begins anew from what was flushed: a FLUSH that was acknowledged keeps what had been acknowledged or
//! read before it was sent, and each sector of what came after it is there or not.

use crate::nbd::NbdClient;
use crate::playground::Playground;
use crate::sim::disk::SECTOR;
use crate::sim::scheduler::Random;
use anyhow::{Context, ensure};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are stamped together.
pub const BLOCK: usize = 4096;
/// A stamp is written over and over through its block, so that a torn one is noticed.
const STAMP: usize = 32;
const MIB: u64 = 1 << 20;
/// How old an answer about where a device is exported may be.
const URI_FRESH: Duration = Duration::from_millis(100);
/// Consecutive blocks that are written by one request at most.
const RUN_MAX: usize = 16;

/// One block's history, as far as it still matters.
#[derive(Clone, Default, Debug)]
struct Block {
    at: u64,
    /// The newest write that was sent; 0: none.
    sent: u64,
    /// The newest that was acknowledged or read.
    floor: u64,
    /// The newest that a flush has covered.
    flushed: u64,
    /// Those not older than the flushed one that wrote zeros.
    zeros: Vec<u64>,
    /// Caches were lost, and no write was acknowledged since: each sector is of a write of its own.
    torn: bool,
}

impl Block {
    fn send(&mut self, zeros: bool) -> u64 {
        self.sent += 1;
        if zeros {
            self.zeros.push(self.sent);
        }
        self.sent
    }

    fn raise(&mut self, to: u64) {
        self.floor = self.floor.max(to);
    }

    /// A write was acknowledged, and went through to the disks if it was a `durable` one.
    fn acknowledge(&mut self, write: u64, durable: bool) {
        self.raise(write);
        self.torn = false;
        if durable {
            self.flush(write);
        }
    }

    /// A flush covered all up to that write.
    fn flush(&mut self, to: u64) {
        self.flushed = self.flushed.max(to);
        let flushed = self.flushed;
        self.zeros.retain(|write| *write >= flushed);
    }

    /// Nothing is left for certain but what was flushed.
    fn lose_cache(&mut self) {
        self.torn = self.sent > self.flushed;
        self.floor = self.flushed;
    }

    /// What was read is something that may be there; from now on nothing older may.
    fn judge(&mut self, writer: u64, data: &[u8]) -> Result<(), String> {
        let pieces = data.chunks_exact(if self.torn { SECTOR } else { data.len() });
        let found = pieces.map(|piece| self.judge_piece(writer, piece)).collect::<Result<Vec<_>, _>>()?;
        self.raise(found.into_iter().min().unwrap_or_default());
        Ok(())
    }

    /// The write that a piece is of.
    fn judge_piece(&self, writer: u64, data: &[u8]) -> Result<u64, String> {
        let (own, sent, floor, flushed) = (self.at, self.sent, self.floor, self.flushed);
        let wrong = |what: String| {
            Err(format!(
                "writer {writer:#x}, block at {own}: {what}; {floor} was there, {flushed} was flushed, {sent} was sent"
            ))
        };
        if data.iter().all(|byte| *byte == 0) {
            let never_written = (floor == 0).then_some(0);
            let zeros = self.zeros.iter().copied().find(|write| *write >= floor);
            return never_written.or(zeros).map_or_else(|| wrong("zeros".into()), Ok);
        }
        let (first, rest) = data.split_at(STAMP);
        if rest.chunks_exact(STAMP).any(|other| other != first) {
            return wrong("two writes in one block".into());
        }
        let word = |index: usize| {
            first.iter().skip(8 * index).take(8).rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let (owner, at, write) = (word(0), word(1), word(2));
        if (owner, at) != (writer, own) {
            return wrong(format!("write {write} of writer {owner:#x} to {at}"));
        }
        if write < floor || write > sent || self.zeros.contains(&write) {
            return wrong(format!("write {write}"));
        }
        Ok(write)
    }
}

/// A block's content as that write makes it.
fn stamp(writer: u64, at: u64, write: u64) -> impl Iterator<Item = u8> {
    let words = [writer, at, write, !write];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    std::iter::repeat_n(bytes, BLOCK / STAMP).flatten()
}

/// What one writer owns: runs of blocks that lie together. Nobody else writes them.
#[derive(Debug)]
struct Ledger {
    writer: u64,
    device: String,
    runs: Vec<Vec<Block>>,
    /// How often caches had been lost when it was last looked at.
    losses: u64,
}

impl Ledger {
    /// Runs all over the device, in regions that others write as well, and one region of its own at the end.
    fn new(writer: u64, number: u64, device: &str) -> Self {
        let run = |from: u64, blocks: u64| {
            (0..blocks).map(|index| Block { at: from + index * BLOCK as u64, ..Block::default() }).collect()
        };
        let shared = (0..6).map(|index| run(index * 19 * MIB + number * 128 * 1024, RUN_MAX as u64));
        let own = run((120 + number) * MIB, MIB / BLOCK as u64);
        Self { writer, device: device.to_owned(), runs: shared.chain([own]).collect(), losses: 0 }
    }

    /// Takes in that caches were lost meanwhile.
    fn note_losses(&mut self, losses: u64) {
        if self.losses != losses {
            self.losses = losses;
            self.runs.iter_mut().flatten().for_each(Block::lose_cache);
        }
    }

    /// Reads everything and compares.
    fn check(&mut self, client: &mut NbdClient) -> anyhow::Result<()> {
        for run in &mut self.runs {
            let from = run.first().context("an empty run")?.at;
            let data = client.read(from, (run.len() * BLOCK) as u32)?;
            for (block, data) in run.iter_mut().zip(data.chunks_exact(BLOCK)) {
                block
                    .judge(self.writer, data)
                    .map_err(|wrong| anyhow::anyhow!("{}: {wrong}", self.device))?;
            }
        }
        Ok(())
    }
}

/// What a part of the workload met.
enum Trouble {
    /// The connection broke, or a request failed: where the exporter dies this is to be expected.
    Connection,
    /// A promise was broken.
    Broken(String),
}

impl From<anyhow::Error> for Trouble {
    fn from(_: anyhow::Error) -> Self {
        Self::Connection
    }
}

impl From<String> for Trouble {
    fn from(wrong: String) -> Self {
        Self::Broken(wrong)
    }
}

/// Writes to some blocks, under way.
struct Sent {
    cookie: u64,
    run: usize,
    from: usize,
    writes: Vec<u64>,
    durable: bool,
}

/// Counts of what was done.
#[derive(Default, Debug)]
pub struct Counts {
    /// Writes, zeroes and discards that were acknowledged.
    pub acknowledged: AtomicU64,
    /// Those whose end nobody was told.
    pub unanswered: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Blocks that were read and compared while faults went on.
    pub reads: AtomicU64,
    /// Connections that ended.
    pub broken: AtomicU64,
}

/// A cluster that serves devices.
pub trait Served: Sync {
    /// Where an NBD client finds a device now, if it does.
    fn find(&self, device: &str) -> Option<String>;

    /// The longest that a request may take, as long as a round of faults and all repair take.
    fn reply_within(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// What it has to say when something is wrong.
    fn logs(&self) -> String;
}

impl Served for Playground {
    fn find(&self, device: &str) -> Option<String> {
        self.device(device).ok()?["uri"].as_str().map(str::to_owned)
    }

    fn logs(&self) -> String {
        Playground::logs(self)
    }
}

/// Writers on some devices of a cluster.
pub struct Workload<'a> {
    cluster: &'a dyn Served,
    ledgers: Vec<Mutex<Ledger>>,
    uris: Mutex<HashMap<String, (Instant, Option<String>)>>,
    paused: AtomicBool,
    ended: AtomicBool,
    busy: AtomicUsize,
    broken: Mutex<Vec<String>>,
    /// How often all copies have lost their caches.
    losses: AtomicU64,
    /// What was done so far.
    pub counts: Counts,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Workload<'a> {
    /// With so many connections to each of the devices.
    pub fn new(cluster: &'a dyn Served, seed: u64, devices: &[&str], connections: u64) -> Self {
        let ledgers = devices.iter().enumerate().flat_map(|(index, device)| {
            let writer = move |number| seed << 16 | (index as u64) << 8 | number;
            (0..connections).map(move |number| Mutex::new(Ledger::new(writer(number), number, device)))
        });
        Self {
            cluster,
            ledgers: ledgers.collect(),
            uris: Mutex::default(),
            paused: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            broken: Mutex::default(),
            losses: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }

    /// Runs the writers while `story` is told.
    pub fn run<T>(&self, story: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            for ledger in &self.ledgers {
                self.busy.fetch_add(1, Ordering::SeqCst);
                scope.spawn(|| self.write(ledger));
            }
            let result = story();
            self.ended.store(true, Ordering::SeqCst);
            result
        })
    }

    /// Lets every writer finish what it has sent and wait.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.paused.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        while self.busy.load(Ordering::SeqCst) > 0 {
            self.sound()?;
            ensure!(
                begun.elapsed() < 2 * self.cluster.reply_within(),
                "a request does not end\n{}",
                self.cluster.logs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// All copies have lost what was in their caches: only what was flushed is sure to be there. To be called after the
    /// power cut and before the machines are on again. What is answered to a request that was sent before says nothing:
    /// it may tell of what is lost.
    pub fn lost_caches(&self) {
        self.losses.fetch_add(1, Ordering::SeqCst);
    }

    fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    /// Lets them go on.
    pub fn go_on(&self) {
        self.paused.store(false, Ordering::SeqCst);
    }

    /// Reads everything back, while nobody writes.
    pub fn check(&self) -> anyhow::Result<()> {
        self.sound()?;
        for ledger in &self.ledgers {
            let mut ledger = lock(ledger);
            ledger.note_losses(self.losses());
            let mut client = self.connected(&ledger.device)?;
            ledger.check(&mut client)?;
        }
        Ok(())
    }

    /// A client of a device that has to be served.
    fn connected(&self, device: &str) -> anyhow::Result<NbdClient> {
        let begun = Instant::now();
        loop {
            if let Some(client) = self.connect(device) {
                return Ok(client);
            }
            ensure!(
                begun.elapsed() < self.cluster.reply_within(),
                "{device} is not served\n{}",
                self.cluster.logs()
            );
            std::thread::sleep(URI_FRESH);
        }
    }

    fn sound(&self) -> anyhow::Result<()> {
        let broken = lock(&self.broken);
        ensure!(broken.is_empty(), "{}", broken.join("\n"));
        Ok(())
    }

    fn write(&self, ledger: &Mutex<Ledger>) {
        let mut random = Random::new(lock(ledger).writer);
        let mut client = None;
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            if self.paused.load(Ordering::SeqCst) {
                self.busy.fetch_sub(1, Ordering::SeqCst);
                while self.paused.load(Ordering::SeqCst) && !self.ended.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(2));
                }
                self.busy.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let mut ledger = lock(ledger);
            if client.is_none() {
                client = self.connect(&ledger.device);
            }
            let Some(connected) = &mut client else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            match self.step(&mut ledger, connected, &mut random) {
                Ok(()) => {}
                Err(Trouble::Connection) => {
                    self.counts.broken.fetch_add(1, Ordering::Relaxed);
                    client = None;
                }
                Err(Trouble::Broken(wrong)) => {
                    lock(&self.broken).push(format!("{}: {wrong}", ledger.device));
                    client = None;
                }
            }
            drop(ledger);
            std::thread::sleep(Duration::from_micros(random.below(4000)));
        }
    }

    fn connect(&self, device: &str) -> Option<NbdClient> {
        let uri = {
            let mut uris = lock(&self.uris);
            match uris.get(device) {
                Some((asked, uri)) if asked.elapsed() < URI_FRESH => uri.clone(),
                _ => {
                    let uri = self.cluster.find(device);
                    uris.insert(device.to_owned(), (Instant::now(), uri.clone()));
                    uri
                }
            }
        }?;
        let client = NbdClient::connect(&uri).ok()?;
        client.set_patience(self.cluster.reply_within()).ok()?;
        Some(client)
    }

    fn step(&self, ledger: &mut Ledger, client: &mut NbdClient, random: &mut Random) -> Result<(), Trouble> {
        let own = ledger.runs.len() - 1;
        let losses = self.losses();
        ledger.note_losses(losses);
        match random.below(100) {
            0..=6 => {
                let covered: Vec<u64> = ledger.runs.iter().flatten().map(|block| block.floor).collect();
                client.flush()?;
                if self.losses() != losses {
                    return Ok(());
                }
                ledger.runs.iter_mut().flatten().zip(covered).for_each(|(block, to)| block.flush(to));
                self.counts.flushes.fetch_add(1, Ordering::Relaxed);
            }
            7..=24 => {
                let run = &mut ledger.runs[random.below(own as u64 + 1) as usize];
                let (from, count) = part(random, run.len());
                let data = client.read(run[from].at, (count * BLOCK) as u32)?;
                if self.losses() != losses {
                    return Ok(());
                }
                for (block, data) in run[from..].iter_mut().zip(data.chunks_exact(BLOCK)) {
                    block.judge(ledger.writer, data)?;
                }
                self.counts.reads.fetch_add(count as u64, Ordering::Relaxed);
            }
            25..=29 => {
                let (from, count) = part(random, ledger.runs[own].len());
                self.clear(&mut ledger.runs[own][from..from + count], client, false)?;
            }
            // Of whole regions alone is it promised that a discard leaves zeros.
            30..=32 => self.clear(&mut ledger.runs[own], client, true)?,
            _ => self.write_some(ledger, client, random)?,
        }
        Ok(())
    }

    fn clear(&self, blocks: &mut [Block], client: &mut NbdClient, discard: bool) -> Result<(), Trouble> {
        let at = blocks[0].at;
        let losses = self.losses();
        let writes: Vec<u64> = blocks.iter_mut().map(|block| block.send(true)).collect();
        let length = (blocks.len() * BLOCK) as u32;
        self.counts.unanswered.fetch_add(1, Ordering::Relaxed);
        if discard { client.trim(at, length) } else { client.write_zeroes(at, length) }?;
        self.acknowledged(losses, blocks, &writes, false);
        Ok(())
    }

    fn acknowledged(&self, losses: u64, blocks: &mut [Block], writes: &[u64], durable: bool) {
        self.counts.unanswered.fetch_sub(1, Ordering::Relaxed);
        self.counts.acknowledged.fetch_add(1, Ordering::Relaxed);
        if self.losses() != losses {
            return;
        }
        for (block, write) in blocks.iter_mut().zip(writes) {
            block.acknowledge(*write, durable);
        }
    }

    /// Up to four writes at once, in different runs: which of them comes first is nobody's to say.
    fn write_some(
        &self,
        ledger: &mut Ledger,
        client: &mut NbdClient,
        random: &mut Random,
    ) -> Result<(), Trouble> {
        let losses = self.losses();
        let first = random.below(ledger.runs.len() as u64) as usize;
        let mut under_way: Vec<Sent> = Vec::new();
        for index in 0..1 + random.below(4) as usize {
            let run = (first + index) % ledger.runs.len();
            let (from, count) = part(random, ledger.runs[run].len());
            let blocks = &mut ledger.runs[run][from..from + count];
            let writes: Vec<u64> = blocks.iter_mut().map(|block| block.send(false)).collect();
            let stamps =
                blocks.iter().zip(&writes).flat_map(|(block, write)| stamp(ledger.writer, block.at, *write));
            let data: Vec<u8> = stamps.collect();
            self.counts.unanswered.fetch_add(1, Ordering::Relaxed);
            let durable = random.one_in(10);
            let cookie = match durable {
                true => client.start_write_through(blocks[0].at, &data)?,
                false => client.start_write(blocks[0].at, &data)?,
            };
            under_way.push(Sent { cookie, run, from, writes, durable });
        }
        while !under_way.is_empty() {
            let Some(reply) = client.reply()? else {
                let within = self.cluster.reply_within();
                return Err(Trouble::Broken(format!("no reply within {within:?}")));
            };
            let found = under_way.iter().position(|sent| sent.cookie == reply.cookie);
            let sent = under_way.swap_remove(found.ok_or_else(|| format!("a reply to nothing: {reply:?}"))?);
            if reply.error != 0 {
                return Err(Trouble::Connection);
            }
            let blocks = &mut ledger.runs[sent.run][sent.from..sent.from + sent.writes.len()];
            self.acknowledged(losses, blocks, &sent.writes, sent.durable);
        }
        Ok(())
    }
}

/// A few blocks of a run: where they begin, how many.
fn part(random: &mut Random, blocks: usize) -> (usize, usize) {
    let count = if random.one_in(2) { 1 } else { 1 + random.below(RUN_MAX as u64) as usize };
    (random.below((blocks - count + 1) as u64) as usize, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(write: u64) -> Vec<u8> {
        stamp(7, 0, write).collect()
    }

    #[test]
    fn what_was_acknowledged_may_not_be_missed() {
        let mut block = Block::default();
        assert_eq!(block.judge(7, &[0; BLOCK]), Ok(()));
        assert!(block.judge(7, &data(1)).is_err(), "nobody has sent it");
        for _ in 0..3 {
            block.send(false);
        }
        block.raise(2);
        assert!(block.judge(7, &data(1)).is_err());
        assert!(block.judge(7, &[0; BLOCK]).is_err());
        assert_eq!(block.clone().judge(7, &data(2)), Ok(()));
        assert_eq!(block.judge(7, &data(3)), Ok(()));
        assert!(block.judge(7, &data(2)).is_err(), "it was seen to be gone");
        assert!(block.judge(8, &data(3)).is_err(), "another's");
    }

    #[test]
    fn zeros_are_a_write_as_well() {
        let mut block = Block::default();
        block.send(false);
        block.raise(1);
        assert!(block.judge(7, &[0; BLOCK]).is_err());
        block.send(true);
        block.send(false);
        assert_eq!(block.clone().judge(7, &data(1)), Ok(()));
        assert_eq!(block.clone().judge(7, &[0; BLOCK]), Ok(()));
        block.raise(3);
        assert!(block.judge(7, &[0; BLOCK]).is_err());
        assert_eq!(block.judge(7, &data(3)), Ok(()));
    }

    #[test]
    fn what_was_flushed_is_what_a_common_power_cut_leaves() {
        let mut block = Block::default();
        for write in 1..=3 {
            block.send(false);
            block.acknowledge(write, false);
        }
        block.flush(2);
        assert!(block.clone().judge(7, &data(2)).is_err());
        block.lose_cache();
        assert!(block.clone().judge(7, &data(1)).is_err() && block.clone().judge(7, &[0; BLOCK]).is_err());
        assert_eq!(block.clone().judge(7, &data(2)), Ok(()));
        // Sector by sector one or the other; a sector itself is whole.
        let mut torn = data(2);
        torn[SECTOR..2 * SECTOR].copy_from_slice(&data(3)[..SECTOR]);
        assert_eq!(block.clone().judge(7, &torn), Ok(()));
        torn[..SECTOR / 2].copy_from_slice(&data(3)[..SECTOR / 2]);
        assert!(block.clone().judge(7, &torn).is_err());
        // What is there now stays.
        assert_eq!(block.judge(7, &data(3)), Ok(()));
        assert!(block.judge(7, &data(2)).is_err());
        block.send(false);
        block.acknowledge(4, true);
        block.lose_cache();
        assert!(block.judge(7, &data(3)).is_err(), "it was written through");
    }

    #[test]
    fn a_torn_block_is_noticed() {
        let mut block = Block::default();
        block.send(false);
        block.send(false);
        let mut torn = data(1);
        torn[BLOCK / 2..].copy_from_slice(&data(2)[BLOCK / 2..]);
        assert!(block.judge(7, &torn).is_err_and(|wrong| wrong.contains("two writes")));
    }
}
