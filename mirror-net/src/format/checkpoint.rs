//! The checkpoint: bringing both copies of the changed pages up to date, so that the log's tail can
//! move on. Copy 0, flush, copy 1, flush, a log block with the new tail. The log goes on meanwhile.

use super::journal::IoId;
use super::page::PageKind;
use crate::planted::{self, Bug};
use std::collections::HashSet;

/// Page writes in flight at once: enough to keep a disk busy, few enough to leave it to the data.
const WRITES_IN_FLIGHT_MAX: usize = 32;

/// A page that was changed since both its copies were written.
pub(super) type PageRef = (PageKind, u32);

/// A set of pages, two bits for each 126 slots.
#[derive(Default)]
struct PageSet {
    words: [Vec<u64>; 2],
    count: usize,
}

impl PageSet {
    fn new(pages: u32) -> Self {
        let words = vec![0; pages.div_ceil(64) as usize];
        Self { words: [words.clone(), words], count: 0 }
    }

    fn insert(&mut self, (kind, index): PageRef) {
        let word = &mut self.words[kind as usize][index as usize / 64];
        let bit = 1 << (index % 64);
        self.count += usize::from(*word & bit == 0);
        *word |= bit;
    }

    /// Empties the set into a list in disk order.
    fn drain(&mut self) -> Vec<PageRef> {
        let mut pages = Vec::with_capacity(self.count);
        for kind in PageKind::ALL {
            for (i, word) in self.words[kind as usize].iter_mut().enumerate() {
                while *word != 0 {
                    pages.push((kind, i as u32 * 64 + word.trailing_zeros()));
                    *word &= *word - 1;
                }
            }
        }
        self.count = 0;
        pages
    }
}

/// How far a checkpoint has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    /// Pages from `next` on are still to be written.
    Pages {
        copy: usize,
        next: usize,
    },
    /// All writes of this copy are done; its flush is not.
    Flush {
        copy: usize,
        flush: Option<IoId>,
    },
    /// Both copies are durable; a log block with the new tail is not.
    Tail,
}

/// What the checkpoint wants done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Write this copy of this page.
    Page { page: PageRef, copy: usize, sequence: u64 },
    /// Flush the disk.
    Flush,
}

pub(super) struct Checkpoint {
    changed: PageSet,
    phase: Phase,
    pages: Vec<PageRef>,
    writes: HashSet<IoId>,
    /// Everything up to this log sequence number will be in both copies.
    cover_lsn: u64,
    /// The sequence of the newest page image.
    sequence: u64,
}

impl Checkpoint {
    pub(super) fn new(pages: u32, sequence: u64) -> Self {
        Self {
            changed: PageSet::new(pages),
            phase: Phase::Idle,
            pages: Vec::new(),
            writes: HashSet::new(),
            cover_lsn: 0,
            sequence,
        }
    }

    /// A durable change is not in the page's copies yet.
    pub(super) fn note_changed(&mut self, page: PageRef) {
        self.changed.insert(page);
    }

    pub(super) fn changed_pages(&self) -> usize {
        self.changed.count
    }

    pub(super) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Begins, to cover every durable log block.
    pub(super) fn start(&mut self, durable_lsn: u64) {
        assert!(self.is_idle());
        self.cover_lsn = durable_lsn;
        self.pages = self.changed.drain();
        self.enter_copy(0);
    }

    fn enter_copy(&mut self, copy: usize) {
        self.sequence += 1;
        self.phase = Phase::Pages { copy, next: 0 };
        self.settle();
    }

    /// The tail that a log block must make durable for the checkpoint to end.
    pub(super) fn new_tail(&self) -> Option<u64> {
        (self.phase == Phase::Tail).then_some(self.cover_lsn + 1)
    }

    /// What to do next, if anything can be done now; the caller does it under `id`.
    pub(super) fn next_step(&mut self, id: IoId) -> Option<Step> {
        match &mut self.phase {
            Phase::Pages { copy, next }
                if *next < self.pages.len() && self.writes.len() < WRITES_IN_FLIGHT_MAX =>
            {
                let step = Step::Page { page: self.pages[*next], copy: *copy, sequence: self.sequence };
                *next += 1;
                self.writes.insert(id);
                Some(step)
            }
            Phase::Flush { flush: flush @ None, .. } => {
                *flush = Some(id);
                Some(Step::Flush)
            }
            _ => None,
        }
    }

    /// One of the checkpoint's writes or flushes succeeded. `false` if it is none of them.
    pub(super) fn handle_done(&mut self, id: IoId) -> bool {
        if self.writes.remove(&id) {
            self.settle();
            return true;
        }
        match self.phase {
            Phase::Flush { copy: 0, flush } if flush == Some(id) => self.enter_copy(1),
            Phase::Flush { flush, .. } if flush == Some(id) => self.phase = Phase::Tail,
            _ => return false,
        }
        true
    }

    /// A log block with the new tail is durable.
    pub(super) fn finish(&mut self) {
        assert_eq!(self.phase, Phase::Tail);
        self.phase = Phase::Idle;
        self.pages = Vec::new();
    }

    /// The flush may begin only when every write before it is complete.
    fn settle(&mut self) {
        if let Phase::Pages { copy, next } = self.phase
            && next == self.pages.len()
            && self.writes.is_empty()
        {
            if planted::is(Bug::TailEarly) {
                if copy == 0 {
                    self.enter_copy(1)
                } else {
                    self.phase = Phase::Tail
                }
                return;
            }
            self.phase = Phase::Flush { copy, flush: None };
        }
    }
}
