//! Writes in an order that matters: formatting, superblock updates, repairs.

use super::block::{BLOCK_BYTES, Block};
use zerocopy::IntoBytes;

/// One step of a [`Plan`].
#[derive(Clone)]
pub enum PlanStep {
    /// Write `blocks` at byte `offset`. Writes between two flushes may go in any order, also at once.
    Write {
        /// Bytes from the start of the disk; a multiple of [`BLOCK_BYTES`].
        offset: u64,
        /// What to write, aligned for direct I/O; at most [`WRITE_BLOCKS_MAX`] blocks.
        blocks: Vec<Block>,
    },
    /// Wait for every write before, then flush the disk's caches; nothing after it may begin earlier.
    Flush,
}

/// The most blocks in one [`PlanStep::Write`]: 1 MiB.
pub const WRITE_BLOCKS_MAX: usize = (1 << 20) / BLOCK_BYTES;

impl PlanStep {
    /// The write of a single block.
    pub(super) fn block(offset: u64, block: Block) -> Self {
        Self::Write { offset, blocks: vec![block] }
    }

    /// The bytes of a write; empty for a flush.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Write { blocks, .. } => blocks.as_slice().as_bytes(),
            Self::Flush => &[],
        }
    }
}

impl std::fmt::Debug for PlanStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { offset, blocks } => write!(f, "write {} blocks at {offset}", blocks.len()),
            Self::Flush => f.write_str("flush"),
        }
    }
}

/// An ordered list of writes and flushes, made step by step so that a large disk's needs no memory.
///
/// If a step fails the driver stops and must not use the disk: opening it again yields the steps that
/// are still needed.
pub struct Plan(Box<dyn Iterator<Item = PlanStep> + Send>);

impl Plan {
    pub(super) fn new(steps: impl Iterator<Item = PlanStep> + Send + 'static) -> Self {
        Self(Box::new(steps))
    }

    /// This plan's steps, then those of `next`.
    pub fn then(self, next: Plan) -> Self {
        Self::new(self.0.chain(next.0))
    }
}

impl Iterator for Plan {
    type Item = PlanStep;

    fn next(&mut self) -> Option<PlanStep> {
        self.0.next()
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plan")
    }
}

/// The writes of `count` blocks from byte `offset` on, block *i* being `block(i)`, in large pieces.
pub(super) fn write_run(
    offset: u64,
    count: usize,
    block: impl Fn(usize) -> Block + Send + 'static,
) -> impl Iterator<Item = PlanStep> + Send {
    (0..count).step_by(WRITE_BLOCKS_MAX).map(move |first| PlanStep::Write {
        offset: offset + (first * BLOCK_BYTES) as u64,
        blocks: (first..count.min(first + WRITE_BLOCKS_MAX)).map(&block).collect(),
    })
}
