//! Control commands: each one an SQE128 on a small ring of its own, awaited with a deadline.
//!
//! The driver runs most of them on a kernel worker and some of them wait for others (START_DEV for the server's
//! fetches, DEL_DEV for the last close), so no call here is without a deadline. A command that outlives its
//! deadline is asked to give up; where the kernel cannot interrupt it, it goes on by itself, and the ring keeps the
//! command's buffer until the kernel is done with it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::abi::{CONTROL_DEVICE, CtrlCmd};

/// Entries of the ring: one command, one cancellation, and room for commands that outlive their deadline.
const RING_ENTRIES: u32 = 16;

/// How long a command that was asked to give up may take to do so.
const CANCEL_GRACE: Duration = Duration::from_millis(500);

/// `user_data` of cancellations, whose results nobody needs.
const CANCEL_USER_DATA: u64 = u64::MAX;

/// A command's result and its buffer.
type Completion = (i32, Box<[u8]>);

/// Why a command did not succeed.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The kernel answered with an error.
    #[error("the kernel refused the command: {0}")]
    Refused(Errno),
    /// The deadline passed.
    #[error(
        "no answer within {} ms{}",
        waited.as_millis(),
        if *still_running { ", and the kernel goes on with it" } else { "; it was withdrawn" }
    )]
    TimedOut {
        /// How long it was waited for.
        waited: Duration,
        /// Whether the kernel still works on it: it could not be interrupted, and may yet succeed.
        still_running: bool,
    },
    /// Too many earlier commands are still running in the kernel.
    #[error(
        "{running} earlier commands are still running in the kernel: wait until what blocks them is gone"
    )]
    Crowded {
        /// How many.
        running: usize,
    },
    /// The ring itself failed.
    #[error("io_uring failed: {0}")]
    Ring(#[source] io::Error),
}

/// Why no command ring could be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The control device could not be opened.
    #[error("cannot open {CONTROL_DEVICE}: {0}; run ublk-probe, it says what to do")]
    ControlDevice(#[source] io::Error),
    /// No io_uring could be made.
    #[error("cannot set up an io_uring: {0}; run ublk-probe, it says what to do")]
    Ring(#[source] io::Error),
}

/// Makes the kind of ring that control commands need: SQEs of 128 bytes.
///
/// # Errors
/// What `io_uring_setup` says: EPERM where it is forbidden, ENOSYS where it is not built in.
pub fn open_ring() -> io::Result<IoUring<squeue::Entry128, cqueue::Entry>> {
    IoUring::builder().build(RING_ENTRIES)
}

/// An open control device with its ring.
pub struct CommandRing {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    control: File,
    user_data_next: u64,
    /// Buffers of commands that outlived their deadline: the kernel may still write there.
    adrift: HashMap<u64, Box<[u8]>>,
}

impl CommandRing {
    /// Opens `/dev/ublk-control` and a ring for it.
    ///
    /// # Errors
    /// [`OpenError`], which points to the probe.
    pub fn open() -> Result<CommandRing, OpenError> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open(CONTROL_DEVICE)
            .map_err(OpenError::ControlDevice)?;
        let ring = open_ring().map_err(OpenError::Ring)?;
        Ok(CommandRing { ring, control, user_data_next: 0, adrift: HashMap::new() })
    }

    /// Commands that outlived their deadline and that the kernel has not finished, as far as is known.
    pub fn commands_adrift(&mut self) -> usize {
        self.collect(None);
        self.adrift.len()
    }

    /// Sends `command` with `payload` as its buffer (in and out) and waits for the result.
    ///
    /// `len` and `addr` of `command` are filled in here.
    ///
    /// # Errors
    /// [`CommandError`]; `payload` is unchanged then.
    pub fn call(
        &mut self,
        command_op: u32,
        mut command: CtrlCmd,
        payload: &mut [u8],
        timeout: Duration,
    ) -> Result<i32, CommandError> {
        let running = self.commands_adrift();
        if running + 2 > RING_ENTRIES as usize {
            return Err(CommandError::Crowded { running });
        }
        // A copy on the heap, because it must outlive this call if the kernel does not answer in time.
        let mut buffer: Box<[u8]> = payload.into();
        command.len = u16::try_from(buffer.len()).expect("a control buffer is below 64 KiB");
        command.addr = if buffer.is_empty() { 0 } else { buffer.as_mut_ptr() as u64 };

        let user_data = self.user_data_next;
        self.user_data_next += 1;
        assert!(user_data < CANCEL_USER_DATA);
        let mut bytes = [0u8; 80];
        bytes[..size_of::<CtrlCmd>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(Fd(self.control.as_raw_fd()), command_op)
            .cmd(bytes)
            .build()
            .user_data(user_data);
        // From here on the kernel may hold the address of the buffer.
        self.adrift.insert(user_data, buffer);
        // SAFETY: the file is open as long as `self` is; the command's buffer stays in `adrift` until its
        // completion was seen, and is leaked if that never happens.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring was emptied by the submit before");

        let (outcome, waited) = self.wait_for(user_data, timeout)?;
        let (result, buffer) = match outcome {
            Some(done) => done,
            None => match self.cancel(user_data)? {
                // It may have succeeded in the last moment.
                Some((result, buffer)) if result >= 0 => (result, buffer),
                Some(_) => return Err(CommandError::TimedOut { waited, still_running: false }),
                None => return Err(CommandError::TimedOut { waited, still_running: true }),
            },
        };
        if result < 0 {
            return Err(CommandError::Refused(Errno::from_raw(-result)));
        }
        payload.copy_from_slice(&buffer);
        Ok(result)
    }

    /// Asks the kernel to give a command up, and waits a little for its last word.
    fn cancel(&mut self, user_data: u64) -> Result<Option<Completion>, CommandError> {
        let entry: squeue::Entry128 =
            opcode::AsyncCancel::new(user_data).build().user_data(CANCEL_USER_DATA).into();
        // SAFETY: a cancellation refers to no memory.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring was emptied by the submit before");
        Ok(self.wait_for(user_data, CANCEL_GRACE)?.0)
    }

    /// Submits what is queued and waits for one command. Returns its result and buffer, if it came in time.
    fn wait_for(
        &mut self,
        user_data: u64,
        timeout: Duration,
    ) -> Result<(Option<Completion>, Duration), CommandError> {
        let start = Instant::now();
        loop {
            let waited = start.elapsed();
            let left = timeout.saturating_sub(waited);
            let timespec = Timespec::from(left);
            let args = SubmitArgs::new().timespec(&timespec);
            let entered = self.ring.submitter().submit_with_args(1, &args);
            // What is there counts, whatever the call said.
            if let Some(done) = self.collect(Some(user_data)) {
                return Ok((Some(done), waited));
            }
            match entered {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(CommandError::Ring(error)),
                },
            }
            if start.elapsed() >= timeout {
                return Ok((None, start.elapsed()));
            }
        }
    }

    /// Takes all completions; returns the wanted one, lets go of the buffers of the others.
    fn collect(&mut self, wanted: Option<u64>) -> Option<Completion> {
        let mut found = None;
        for completion in self.ring.completion() {
            let user_data = completion.user_data();
            if user_data == CANCEL_USER_DATA {
                continue;
            }
            let buffer = self.adrift.remove(&user_data).expect("one completion for each command");
            if Some(user_data) == wanted {
                found = Some((completion.result(), buffer));
            }
        }
        found
    }
}

impl Drop for CommandRing {
    fn drop(&mut self) {
        self.collect(None);
        for (_, buffer) in self.adrift.drain() {
            // The kernel may still write there; a few bytes lost are better than somebody else's overwritten.
            Box::leak(buffer);
        }
    }
}
