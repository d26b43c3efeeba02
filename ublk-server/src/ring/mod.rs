//! What stands between io_uring and the rest of the daemon: the ring, buffers, sockets and disks.
//!
//! All `unsafe` of the I/O path is in here and in `frontend/ublk`.

pub mod buffers;
pub mod disk;
pub mod meter;
pub mod reassembly;
pub mod stream;

use io_uring::{IoUring, squeue, types};
use std::io;
use std::time::{Duration, Instant};

/// One I/O thread's io_uring.
///
/// Every submission carries a token, which its completion gives back.
pub struct Ring {
    uring: IoUring,
}

/// A completion: its token and the result, as a negative `errno` where it failed.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// As it was submitted.
    pub token: u64,
    /// Bytes, or a negative `errno`.
    pub result: i32,
}

/// What looking for completions without sleeping came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Looked {
    /// There are some, or there will be at once.
    Found,
    /// None came in time.
    Nothing,
    /// This thread did not have its core for a while: others need the cores more than whoever only looks.
    Crowded,
}

/// So often room is made for a submission, where the kernel may be short of memory.
const PUSH_TRIES: u32 = 1_000;

/// So long without the core means that others need it.
const CROWDED: Duration = Duration::from_micros(300);

impl Ring {
    /// A ring for `entries` submissions between two waits. Completions have four times the room, and
    /// the kernel keeps what does not fit.
    pub fn new(entries: u32) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_cqsize(entries * 4)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(entries)?;
        Ok(Self { uring })
    }

    /// Queues a submission.
    ///
    /// # Safety
    /// Everything that `entry` points at must stay valid, and untouched where the kernel writes,
    /// until its completion was taken.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..PUSH_TRIES {
            // SAFETY: the caller keeps what the entry points at.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            tolerate(self.uring.submit().map(drop))?;
        }
        // What completed can be taken by the caller only: to go on trying would be for ever.
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Submits, and looks for completions for so long without sleeping. Whoever else is ready to run on this
    /// core goes first.
    pub fn look(&mut self, patience: Duration) -> io::Result<Looked> {
        if !self.uring.submission().is_empty() {
            tolerate(self.uring.submit().map(drop))?;
        }
        let began = Instant::now();
        let mut before = began;
        loop {
            if self.uring.submission().taskrun() || !self.uring.completion().is_empty() {
                return Ok(Looked::Found);
            }
            std::thread::yield_now();
            let now = Instant::now();
            if now - before > CROWDED {
                return Ok(Looked::Crowded);
            }
            if now - began > patience {
                return Ok(Looked::Nothing);
            }
            before = now;
        }
    }

    /// Submits, and waits until something completed or the time is over.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        tolerate(self.uring.submitter().submit_with_args(1, &args).map(drop))
    }

    /// Takes what completed.
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        let queue = self.uring.completion();
        into.extend(queue.map(|entry| Completion { token: entry.user_data(), result: entry.result() }));
    }
}

/// Entering the ring may be in vain; the next time will do.
fn tolerate(entered: io::Result<()>) -> io::Result<()> {
    match entered {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        entered => entered,
    }
}

/// An `errno` result as a Rust result.
pub fn check(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}
