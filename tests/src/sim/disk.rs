//! A simulated disk.
//!
//! The fault model. A write that completed is in the disk's volatile cache: reads see it at once, it
//! outlives the daemon, and a power cut keeps a subset of what was not flushed, chosen by the seed
//! piece by piece of 4 KiB, in no order; of a kept piece perhaps only some of its 512-byte sectors.
//! A sector itself is never torn. A flush makes durable what had completed when it began. A write
//! that was under way at a crash reached the cache or did not. On demand data writes, metadata writes
//! or flushes fail, or a
//! sector cannot be read until it is written again; a failed flush loses a subset of the cache, and a later one succeeds.

use crate::sim::scheduler::Random;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a page: the unit that a power cut keeps or loses.
pub const PAGE: usize = 4096;
/// Bytes that are never torn.
pub const SECTOR: usize = 512;

type Page = [u8; PAGE];

/// A write within a page.
#[derive(Clone, Copy)]
struct Piece {
    /// Counts the writes of the disk.
    number: u64,
    offset: u64,
    /// Where its bytes are.
    at: usize,
    length: usize,
}

impl Piece {
    fn page(self) -> usize {
        self.offset as usize / PAGE
    }

    fn bytes(self, written: &[u8]) -> &[u8] {
        &written[self.at..self.at + self.length]
    }
}

/// A disk's contents.
#[derive(Clone)]
pub struct SimDisk {
    /// What fills pages that were never written.
    blank: u8,
    /// Such a page.
    blank_page: Arc<Page>,
    durable: Vec<Option<Arc<Page>>>,
    current: Vec<Option<Arc<Page>>>,
    /// Completed writes that no flush has covered, in their order.
    pending: Vec<Piece>,
    /// What they wrote.
    written: Vec<u8>,
    /// How many of them lie in each page.
    unflushed: Vec<u32>,
    next_number: u64,
    /// What lies outside is metadata.
    data: Range<u64>,
    /// Counts the changes of the metadata that a reader sees.
    metadata_changes: u64,
    /// Sectors that cannot be read until they are written.
    unreadable: BTreeSet<u64>,
    /// Kinds of I/O that fail from now on.
    pub faults: Faults,
    /// Something but a read failed once: what is on it nobody can be sure of.
    pub has_failed: bool,
}

/// What is wrong with a disk.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Data writes fail.
    pub write: bool,
    /// The next data write fails, once.
    pub write_once: bool,
    /// The next flush fails, once.
    pub flush: bool,
    /// Metadata writes fail.
    pub metadata: bool,
    /// Everything fails, for ever.
    pub dead: bool,
    /// Nothing ends.
    pub hung: bool,
    /// Everything takes so many times longer.
    pub slow: u64,
}

impl Faults {
    /// Whether something is broken for ever, or will be at the next I/O of its kind.
    pub fn is_broken(&self) -> bool {
        self.write | self.write_once | self.flush | self.metadata | self.dead
    }
}

impl SimDisk {
    /// A disk of zeros.
    pub fn new(bytes: u64) -> Self {
        Self::filled(bytes, 0)
    }

    /// A disk full of that byte.
    pub fn filled(bytes: u64, blank: u8) -> Self {
        let pages = bytes as usize / PAGE;
        Self {
            blank,
            blank_page: Arc::new([blank; PAGE]),
            durable: vec![None; pages],
            current: vec![None; pages],
            pending: Vec::new(),
            written: Vec::new(),
            unflushed: vec![0; pages],
            next_number: 0,
            data: 0..0,
            metadata_changes: 0,
            unreadable: BTreeSet::new(),
            faults: Faults::default(),
            has_failed: false,
        }
    }

    /// Says where the data lies: all the rest is metadata.
    pub fn set_data(&mut self, data: Range<u64>) {
        self.data = data;
    }

    /// Another number whenever a reader may find other metadata than before.
    pub fn metadata_changes(&self) -> u64 {
        self.metadata_changes
    }

    /// Whether a sector cannot be read.
    pub fn has_unreadable(&self) -> bool {
        !self.unreadable.is_empty()
    }

    /// A sector outside of the data that cannot be read.
    pub fn unreadable_metadata(&self) -> Option<u64> {
        let is_data = |sector: u64| self.data.contains(&(sector * SECTOR as u64));
        self.unreadable.iter().copied().find(|sector| !is_data(*sector))
    }

    /// Whether everything fails.
    pub fn is_dead(&self) -> bool {
        self.faults.dead
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        (self.current.len() * PAGE) as u64
    }

    /// Reads what a reader sees now.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        read(&self.current, self.blank, offset, into);
    }

    /// Reads, unless a sector of the range cannot be read.
    pub fn read_checked(&self, offset: u64, into: &mut [u8]) -> bool {
        self.read(offset, into);
        self.is_readable(offset, into.len() as u64)
    }

    /// Whether every sector of a range can be read.
    pub fn is_readable(&self, offset: u64, length: u64) -> bool {
        let sectors = offset / SECTOR as u64..(offset + length).div_ceil(SECTOR as u64);
        self.unreadable.range(sectors).next().is_none()
    }

    /// That sector cannot be read any more.
    pub fn spoil(&mut self, offset: u64) {
        self.unreadable.insert(offset / SECTOR as u64);
    }

    /// A write completed: it is in the cache, or on stable storage.
    pub fn write(&mut self, offset: u64, data: &[u8], durable: bool) {
        let is_data = self.data.start <= offset && offset + data.len() as u64 <= self.data.end;
        self.metadata_changes += u64::from(!is_data);
        if !self.unreadable.is_empty() {
            let sectors = offset / SECTOR as u64..(offset + data.len() as u64).div_ceil(SECTOR as u64);
            self.unreadable.retain(|sector| !sectors.contains(sector));
        }
        let mut at = 0;
        while at < data.len() {
            let (page, _, length) = piece(offset + at as u64, data.len() - at);
            let bytes = &data[at..at + length];
            put(&mut self.current, self.blank, offset + at as u64, bytes);
            if durable {
                self.flush_page(page);
            } else {
                self.next_number += 1;
                let (number, offset) = (self.next_number, offset + at as u64);
                self.pending.push(Piece { number, offset, at: self.written.len(), length });
                self.written.extend_from_slice(bytes);
                self.unflushed[page] += 1;
            }
            at += length;
        }
    }

    /// A page becomes durable as it is.
    fn flush_page(&mut self, page: usize) {
        self.durable[page].clone_from(&self.current[page]);
        if std::mem::take(&mut self.unflushed[page]) > 0 {
            self.pending.retain(|piece| piece.page() != page);
        }
    }

    /// What a flush that begins now will cover.
    pub fn flush_mark(&self) -> u64 {
        self.next_number
    }

    /// Whether a write up to that mark is still in the cache only.
    pub fn is_unflushed(&self, mark: u64) -> bool {
        self.pending.first().is_some_and(|piece| piece.number <= mark)
    }

    /// The page at that offset, as a reader sees it now.
    pub fn page(&self, offset: u64) -> &[u8; PAGE] {
        self.page_of(&self.current, offset)
    }

    /// The page at that offset, as a loss of power would surely leave it.
    pub fn durable_page(&self, offset: u64) -> &[u8; PAGE] {
        self.page_of(&self.durable, offset)
    }

    fn page_of<'a>(&'a self, pages: &'a [Option<Arc<Page>>], offset: u64) -> &'a Page {
        assert!(offset.is_multiple_of(PAGE as u64));
        pages[offset as usize / PAGE].as_deref().unwrap_or(&self.blank_page)
    }

    /// Bytes of completed writes that are still in the cache only.
    pub fn unflushed_bytes(&self) -> usize {
        self.written.len()
    }

    /// Every sector can be read again.
    pub fn unspoil(&mut self) {
        self.unreadable.clear();
    }

    /// A flush completed.
    pub fn flushed(&mut self, mark: u64) {
        let covered = self.pending.partition_point(|piece| piece.number <= mark);
        for piece in self.pending.drain(..covered) {
            let page = piece.page();
            self.unflushed[page] -= 1;
            if self.unflushed[page] == 0 {
                // Nothing newer is left: it is durable as it is.
                self.durable[page].clone_from(&self.current[page]);
            } else {
                put(&mut self.durable, self.blank, piece.offset, piece.bytes(&self.written));
            }
        }
        if self.pending.is_empty() {
            self.written.clear();
        }
    }

    /// The cache is lost, but for a subset.
    pub fn lose_cache(&mut self, random: &mut Random) {
        let keep_of_8 = random.below(9);
        for piece in std::mem::take(&mut self.pending) {
            self.unflushed[piece.page()] = 0;
            let bytes = piece.bytes(&self.written);
            if random.below(8) >= keep_of_8 {
                continue;
            }
            if random.one_in(4) {
                for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
                    if random.one_in(2) {
                        put(&mut self.durable, self.blank, piece.offset + (sector * SECTOR) as u64, bytes);
                    }
                }
            } else {
                put(&mut self.durable, self.blank, piece.offset, bytes);
            }
        }
        self.written.clear();
        self.metadata_changes += 1;
        self.current.clone_from(&self.durable);
    }
}

fn piece(offset: u64, length: usize) -> (usize, usize, usize) {
    let within = offset as usize % PAGE;
    (offset as usize / PAGE, within, length.min(PAGE - within))
}

fn read(pages: &[Option<Arc<Page>>], blank: u8, offset: u64, into: &mut [u8]) {
    let mut at = 0;
    while at < into.len() {
        let (page, within, length) = piece(offset + at as u64, into.len() - at);
        match &pages[page] {
            Some(bytes) => into[at..at + length].copy_from_slice(&bytes[within..within + length]),
            None => into[at..at + length].fill(blank),
        }
        at += length;
    }
}

fn put(pages: &mut [Option<Arc<Page>>], blank: u8, offset: u64, bytes: &[u8]) {
    let (page, within, _) = piece(offset, bytes.len());
    if let Ok(whole) = Page::try_from(bytes) {
        pages[page] = Some(Arc::new(whole));
        return;
    }
    let page = pages[page].get_or_insert_with(|| Arc::new([blank; PAGE]));
    Arc::make_mut(page)[within..within + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_had_completed_when_it_began() {
        let mut disk = SimDisk::new(64 << 10);
        disk.write(0, &[1; 512], false);
        let mark = disk.flush_mark();
        disk.write(0, &[2; 512], true);
        disk.write(4096, &[3; 512], false);
        disk.flushed(mark);
        assert_eq!(disk.pending.len(), 1);
        assert!(disk.durable[1].is_none());
    }

    #[test]
    fn a_power_cut_never_loses_what_was_flushed_or_written_through() {
        for seed in 0..50 {
            let mut disk = SimDisk::new(64 << 10);
            let mut random = Random::new(seed);
            disk.write(0, &[1; 8192], false);
            disk.flushed(disk.flush_mark());
            disk.write(0, &[2; 512], false);
            disk.write(4096, &[3; 512], true);
            disk.lose_cache(&mut random);
            let mut bytes = [0; 8192];
            disk.read(0, &mut bytes);
            assert!(bytes[0] == 1 || bytes[0] == 2);
            assert_eq!((bytes[512], bytes[4096], bytes[4608]), (1, 3, 1));
        }
    }
}
