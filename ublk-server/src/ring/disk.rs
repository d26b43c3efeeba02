//! A disk of the node on the ring: data of its slots, its metadata, flushes.
//!
//! Direct I/O where the file system can. On tmpfs io_uring hands every write to a worker thread,
//! which costs twenty times the write: there the work is done inline.

use super::buffers::{AlignedBlock, Buffers};
use super::meter::{DiskWork, Meter};
use super::{Ring, check};
use io_uring::{opcode, types};
use mirror_net::engine::Nanos;
use mirror_net::engine::action::{BufferRange, Io};
use mirror_net::format::Block;
use mirror_net::format::geometry::Geometry;
use mirror_net::ids::SlotIndex;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A disk, opened for this process alone.
pub struct DiskFile {
    fd: OwnedFd,
    geometry: Geometry,
    inline: bool,
    /// The kernel or device cannot zero a range by itself.
    writes_zeros: bool,
    meter: Meter,
}

/// One I/O of a disk that is under way.
pub struct DiskIo {
    /// The engine's name for it.
    pub io: Io,
    disk: usize,
    work: Work,
}

enum Work {
    Transfer {
        write: bool,
        pointer: *mut u8,
        length: u32,
        at: u64,
        durable: bool,
        _block: Option<Box<Block>>,
    },
    Zero {
        length: u32,
        at: u64,
        durable: bool,
    },
    /// Zeros written by hand, piece by piece, from a block of zeros.
    ZeroWrite {
        length: u32,
        at: u64,
        durable: bool,
        zeros: AlignedBlock,
        piece: u32,
    },
    Punch {
        length: u32,
        at: u64,
    },
    Flush,
}

/// The largest piece in which zeros are written by hand, in bytes.
const ZEROS_BYTES: u32 = 1 << 20;

/// What became of a disk I/O.
pub enum DiskOutcome {
    /// It is finished.
    Done(Io, Result<(), String>),
    /// It goes on: submit it again.
    Again(DiskIo),
}

impl DiskFile {
    /// Takes an opened disk. `inline` for file systems on which the ring would use worker threads.
    pub fn new(fd: OwnedFd, geometry: Geometry, inline: bool) -> Self {
        Self { fd, geometry, inline, writes_zeros: false, meter: Meter::default() }
    }

    /// Reads a piece of a slot into a buffer.
    pub fn read(
        &self,
        io: Io,
        disk: usize,
        place: (u32, u32),
        buffer: BufferRange,
        buffers: &Buffers,
    ) -> DiskIo {
        self.transfer(io, disk, place, buffer, (false, false), buffers)
    }

    /// Writes a buffer to a piece of a slot; `durable`: through to stable storage.
    pub fn write(
        &self,
        io: Io,
        disk: usize,
        place: (u32, u32),
        buffer: BufferRange,
        durable: bool,
        buffers: &Buffers,
    ) -> DiskIo {
        self.transfer(io, disk, place, buffer, (true, durable), buffers)
    }

    fn transfer(
        &self,
        io: Io,
        disk: usize,
        place: (u32, u32),
        buffer: BufferRange,
        (write, durable): (bool, bool),
        buffers: &Buffers,
    ) -> DiskIo {
        let pointer = buffers.pointer(buffer).as_ptr();
        let at = self.at(place);
        DiskIo {
            io,
            disk,
            work: Work::Transfer { write, pointer, length: buffer.length, at, durable, _block: None },
        }
    }

    /// A metadata block.
    pub fn metadata(io: Io, disk: usize, at: u64, mut block: Box<Block>, durable: bool) -> DiskIo {
        let pointer = std::ptr::from_mut::<Block>(&mut block).cast::<u8>();
        let length = size_of::<Block>() as u32;
        DiskIo {
            io,
            disk,
            work: Work::Transfer { write: true, pointer, length, at, durable, _block: Some(block) },
        }
    }

    /// Makes a range of a slot zero.
    pub fn zero(&self, io: Io, disk: usize, place: (u32, u32), length: u32, durable: bool) -> DiskIo {
        let at = self.at(place);
        let work =
            if self.writes_zeros { by_hand(at, length, durable) } else { Work::Zero { length, at, durable } };
        DiskIo { io, disk, work }
    }

    /// Gives back the space of a range of a slot.
    pub fn punch(&self, io: Io, disk: usize, place: (u32, u32), length: u32) -> DiskIo {
        DiskIo { io, disk, work: Work::Punch { length, at: self.at(place) } }
    }

    /// Flushes the disk's cache.
    pub fn flush(io: Io, disk: usize) -> DiskIo {
        DiskIo { io, disk, work: Work::Flush }
    }

    fn at(&self, (slot, offset): (u32, u32)) -> u64 {
        self.geometry.slot_offset(SlotIndex(slot)) + u64::from(offset)
    }

    /// What it has done so far.
    pub fn work(&self, now: Nanos) -> DiskWork {
        self.meter.work(now)
    }

    /// Begins the I/O. `Some` is its result, because it was done inline.
    pub fn submit(
        &mut self,
        now: Nanos,
        ring: &mut Ring,
        io: &DiskIo,
        token: u64,
    ) -> io::Result<Option<i32>> {
        self.meter.began(now);
        let raw = self.fd.as_raw_fd();
        if self.inline {
            return Ok(Some(inline(raw, io)));
        }
        let fd = types::Fd(raw);
        let entry = match &io.work {
            Work::Transfer { write: true, pointer, length, at, durable, .. } => {
                opcode::Write::new(fd, *pointer, *length).offset(*at).rw_flags(dsync(*durable)).build()
            }
            Work::Transfer { write: false, pointer, length, at, .. } => {
                opcode::Read::new(fd, *pointer, *length).offset(*at).build()
            }
            Work::Zero { length, at, .. } => {
                opcode::Fallocate::new(fd, u64::from(*length)).offset(*at).mode(ZERO_RANGE).build()
            }
            Work::ZeroWrite { at, durable, zeros, piece, .. } => {
                opcode::Write::new(fd, zeros.as_ptr(), *piece).offset(*at).rw_flags(dsync(*durable)).build()
            }
            Work::Punch { length, at } => {
                opcode::Fallocate::new(fd, u64::from(*length)).offset(*at).mode(PUNCH_HOLE).build()
            }
            Work::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        // SAFETY: the engine keeps the buffer, and the caller the `DiskIo` with everything it owns,
        // until the completion.
        unsafe { ring.push(&entry.user_data(token))? };
        Ok(None)
    }

    /// Judges a completion.
    pub fn completed(&mut self, now: Nanos, mut io: DiskIo, result: i32) -> DiskOutcome {
        self.meter.ended(now);
        let done = match check(result) {
            Ok(done) => done,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                return DiskOutcome::Again(io);
            }
            Err(error) => {
                if let (Work::Zero { length, at, durable }, Some(libc::EOPNOTSUPP | libc::EINVAL)) =
                    (&io.work, error.raw_os_error())
                {
                    self.writes_zeros = true;
                    io.work = by_hand(*at, *length, *durable);
                    return DiskOutcome::Again(io);
                }
                return DiskOutcome::Done(io.io, Err(error.to_string()));
            }
        };
        if let Work::Transfer { write, length, .. } = &io.work {
            self.meter.transferred(*write, done, done == *length);
        }
        match &mut io.work {
            Work::Transfer { pointer, length, at, .. } if done < *length => {
                if done == 0 {
                    return DiskOutcome::Done(io.io, Err("the disk ended".into()));
                }
                // SAFETY: fewer bytes than the transfer had.
                *pointer = unsafe { pointer.add(done as usize) };
                *at += u64::from(done);
                *length -= done;
                DiskOutcome::Again(io)
            }
            Work::ZeroWrite { length, at, piece, .. } => {
                if done == 0 {
                    return DiskOutcome::Done(io.io, Err("the disk ended".into()));
                }
                *length -= done;
                *at += u64::from(done);
                *piece = (*length).min(ZEROS_BYTES);
                if *length == 0 { DiskOutcome::Done(io.io, Ok(())) } else { DiskOutcome::Again(io) }
            }
            Work::Zero { durable: true, .. } => {
                // A range is zeroed through the cache: durable means a flush behind it.
                io.work = Work::Flush;
                DiskOutcome::Again(io)
            }
            _ => DiskOutcome::Done(io.io, Ok(())),
        }
    }
}

impl DiskIo {
    /// The disk it belongs to.
    pub fn disk(&self) -> usize {
        self.disk
    }
}

const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

fn dsync(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn by_hand(at: u64, length: u32, durable: bool) -> Work {
    let piece = length.min(ZEROS_BYTES);
    Work::ZeroWrite { length, at, durable, zeros: AlignedBlock::new(piece as usize), piece }
}

/// Does the work here and now.
fn inline(fd: RawFd, io: &DiskIo) -> i32 {
    // The plain system calls: the library's functions are points of cancellation, which costs as much as the rest
    // of them.
    let result = match &io.work {
        Work::Transfer { write, pointer, length, at, .. } => {
            let call = if *write { libc::SYS_pwrite64 } else { libc::SYS_pread64 };
            // SAFETY: pointer and length are the engine's buffer or an owned block, as in `submit`.
            unsafe { libc::syscall(call, fd, *pointer, *length as usize, *at as i64) }
        }
        // A hole in a file reads as zeros, and tmpfs knows no other way.
        Work::Zero { length, at, .. } | Work::Punch { length, at } => {
            // SAFETY: no memory is involved.
            unsafe { libc::fallocate(fd, PUNCH_HOLE, *at as i64, i64::from(*length)).into() }
        }
        // SAFETY: the block of zeros is as long as the piece.
        Work::ZeroWrite { at, zeros, piece, .. } => unsafe {
            libc::pwrite(fd, zeros.as_ptr().cast(), *piece as usize, *at as i64) as i64
        },
        // Memory has no cache to flush.
        Work::Flush => 0,
    };
    if result < 0 { -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { result as i32 }
}
