//! A running daemon: the engine, its buffers, and its disk I/O under way.
//!
//! Buffers are watched: what is being written to a disk or sent may not change or be given back
//! before its end, and what was given back may not be used any more.

use crate::sim::numbered::Numbered;
use mirror_net::engine::Engine;
use mirror_net::engine::action::{BufferId, BufferRange, Io, OpKey};
use mirror_net::format::Block;
use mirror_net::ids::MapVersion;
use mirror_net::region::digest::Digest;

/// Regions that are copied at a time.
const COPIES: usize = 2;

/// What a write stores.
#[derive(Clone)]
pub enum Content {
    /// What is in the buffer, which is lent to the disk until the end.
    Buffer(BufferRange),
    /// So many of one byte.
    Fill(u8, usize),
    /// A block of metadata.
    Metadata(Box<Block>),
}

/// A disk I/O under way.
#[derive(Clone)]
pub enum DiskIo {
    /// Into a buffer.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffer: BufferRange,
    },
    /// Out of a buffer, or made up.
    Write {
        /// Where on the disk.
        offset: u64,
        /// The data.
        content: Content,
        /// Through the cache.
        durable: bool,
    },
    /// A flush that covers the cache's writes up to this one.
    Flush(u64),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Buffer(range) => write!(f, "{range:?}"),
            Self::Fill(byte, length) => write!(f, "{length} bytes of {byte:#x}"),
            Self::Metadata(_) => f.write_str("metadata"),
        }
    }
}

impl std::fmt::Debug for DiskIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read { offset, buffer } => write!(f, "read at {offset} into {buffer:?}"),
            Self::Write { offset, content, .. } => write!(f, "write at {offset} of {content:?}"),
            Self::Flush(_) => f.write_str("flush"),
        }
    }
}

/// One of an engine's I/Os.
#[derive(Clone, Debug)]
pub struct Started {
    /// The engine's name for it.
    pub id: Io,
    /// On which of the engine's disks.
    pub disk: usize,
    /// What is done.
    pub io: DiskIo,
}

/// A buffer of a daemon's.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Where it lies in them: what came with a frame lies behind its header.
    start: usize,
    end: usize,
    /// Pieces that a disk is writing.
    lent: Vec<BufferRange>,
    /// Reads into it that are under way.
    filling: usize,
}

impl Buffer {
    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn place(&self, range: BufferRange) -> Option<std::ops::Range<usize>> {
        let from = self.start + range.offset as usize;
        let to = from + range.length as usize;
        (to <= self.end).then_some(from..to)
    }
}

/// A running daemon.
pub struct Process {
    /// The engine.
    pub engine: Engine,
    /// What it told the manager as adopted.
    pub adopted: MapVersion,
    /// Which of the node's disks the engine's are.
    pub disks: Vec<usize>,
    /// Digests that were computed and that the engine has not got yet.
    pub digests: Vec<(OpKey, Vec<Digest>)>,
    buffers: Numbered<Buffer>,
    ios: Numbered<Started>,
}

impl Process {
    /// That has just started.
    pub fn new(engine: Engine, disks: Vec<usize>) -> Self {
        let mut process = Self {
            engine,
            adopted: MapVersion(0),
            disks,
            digests: Vec::new(),
            buffers: Numbered::default(),
            ios: Numbered::default(),
        };
        let bytes = process.engine.copy_buffer_bytes() as usize;
        let buffers = [(); COPIES].map(|()| process.allocate(vec![0xcc; bytes]));
        process.engine.add_copy_buffers(buffers);
        process
    }

    /// A buffer with that content.
    pub fn allocate(&mut self, data: Vec<u8>) -> BufferId {
        let end = data.len();
        self.allocate_within(data, 0, end)
    }

    /// A buffer that is a part of these bytes.
    pub fn allocate_within(&mut self, bytes: Vec<u8>, start: usize, end: usize) -> BufferId {
        let buffer = Buffer { bytes, start, end, lent: Vec::new(), filling: 0 };
        BufferId(self.buffers.put(buffer) as u32)
    }

    /// Gives a buffer back; what is wrong with that.
    pub fn free(&mut self, buffer: BufferId) -> Result<Buffer, String> {
        let Some(data) = self.buffers.take(u64::from(buffer.0)) else {
            return Err(format!("{buffer:?} is given back twice"));
        };
        if data.lent.is_empty() && data.filling == 0 {
            return Ok(data);
        }
        Err(format!("{buffer:?} is given back while a disk uses it"))
    }

    /// A piece of a buffer, if it was not given back.
    pub fn bytes(&self, range: BufferRange) -> Option<&[u8]> {
        let buffer = self.buffers.get(u64::from(range.buffer.0))?;
        buffer.bytes.get(buffer.place(range)?)
    }

    /// To write into; not while a disk is writing it.
    pub fn bytes_mut(&mut self, range: BufferRange) -> Option<&mut [u8]> {
        let buffer = self.buffers.get_mut(u64::from(range.buffer.0))?;
        let apart = |other: &BufferRange| {
            other.offset + other.length <= range.offset || range.offset + range.length <= other.offset
        };
        if !buffer.lent.iter().all(apart) {
            return None;
        }
        let place = buffer.place(range)?;
        buffer.bytes.get_mut(place)
    }

    /// Notes an I/O; its number, or what is wrong with its buffer.
    pub fn begin(&mut self, id: Io, disk: usize, io: DiskIo) -> Result<u64, String> {
        let buffer = match &io {
            DiskIo::Read { buffer, .. } => self.bytes_mut(*buffer).map(|_| Some(*buffer)),
            DiskIo::Write { content: Content::Buffer(range), .. } => self.bytes(*range).map(|_| Some(*range)),
            DiskIo::Write { .. } | DiskIo::Flush(_) => Some(None),
        };
        let Some(range) = buffer else { return Err(format!("a buffer that was given back: {io:?}")) };
        if let Some(range) = range
            && let Some(buffer) = self.buffers.get_mut(u64::from(range.buffer.0))
        {
            match io {
                DiskIo::Read { .. } => buffer.filling += 1,
                _ => buffer.lent.push(range),
            }
        }
        Ok(self.ios.put(Started { id, disk, io }))
    }

    /// An I/O is about to end; its buffer is nobody's but the engine's again.
    pub fn end(&mut self, number: u64) -> Option<Started> {
        let started = self.ios.take(number)?;
        match &started.io {
            DiskIo::Read { buffer, .. } => {
                if let Some(buffer) = self.buffers.get_mut(u64::from(buffer.buffer.0)) {
                    buffer.filling -= 1;
                }
            }
            DiskIo::Write { content: Content::Buffer(range), .. } => {
                if let Some(buffer) = self.buffers.get_mut(u64::from(range.buffer.0))
                    && let Some(index) = buffer.lent.iter().position(|lent| lent == range)
                {
                    buffer.lent.swap_remove(index);
                }
            }
            DiskIo::Write { .. } | DiskIo::Flush(_) => {}
        }
        Some(started)
    }

    /// An I/O that is under way.
    pub fn io(&self, number: u64) -> Option<&Started> {
        self.ios.get(number)
    }

    /// All I/O under way, in the order in which it began.
    pub fn ios(&self) -> impl Iterator<Item = &Started> {
        self.ios.iter().map(|(_, started)| started)
    }
}
