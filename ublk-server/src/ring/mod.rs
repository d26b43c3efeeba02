//! What stands between io_uring and the rest of the daemon: the ring, buffers, sockets and disks.
//!
//! All `unsafe` of the I/O path is in here and in `frontend/ublk`.

pub mod buffers;
pub mod disk;
pub mod reassembly;
pub mod stream;

use io_uring::{IoUring, squeue, types};
use std::io;
use std::time::Duration;

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

impl Ring {
    /// A ring for `entries` submissions between two waits. Completions have four times the room, and
    /// the kernel keeps what does not fit.
    pub fn new(entries: u32) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_cqsize(entries * 4)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(entries)?;
        Ok(Self { uring })
    }

    /// Queues a submission.
    ///
    /// # Safety
    /// Everything that `entry` points at must stay valid, and untouched where the kernel writes,
    /// until its completion was taken.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller keeps what the entry points at.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.uring.submit()?;
        }
    }

    /// Submits, and waits until something completed or the time is over.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        match self.uring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Takes what completed.
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        let queue = self.uring.completion();
        into.extend(queue.map(|entry| Completion { token: entry.user_data(), result: entry.result() }));
    }
}

/// An `errno` result as a Rust result.
pub fn check(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}
