//! One hardware queue, as the I/O thread sees it that serves it.
//!
//! A queue has no ring: it builds entries for the thread's one, which serves many queues of many devices. A tag is
//! either with the kernel (its fetch is in flight, a request may come) or with us (a request came, a result is
//! owed); entries change the state when they are built, so they must be submitted in any case.
//!
//! All entries of one queue are to be submitted by one thread, always the same (before 6.16 the kernel insists).
//!
//! Data is copied: the kernel has put a write's data into the tag's buffer when the request arrives, and takes a
//! read's data out of it when its result is committed. So a buffer does not change while we have it, whatever the
//! writer does to its pages, and all copies of a write are of the same data.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue, types};
use kmod::abi::{
    IO_RESULT_ABORT, IO_RESULT_OK, IoCmd, IoDesc, QUEUE_DEPTH_MAX, REQUEST_FUA, REQUEST_NOUNMAP,
    SECTOR_BYTES, io_op, request_op,
};
use nix::errno::Errno;
use thiserror::Error;
use zerocopy::IntoBytes;

use super::control::page_bytes;
use super::{DeviceInfo, UblkId};

/// Between two attempts to open a device that is not there yet or not free yet.
const OPEN_RETRY: Duration = Duration::from_millis(10);

/// Why a queue cannot be served.
#[derive(Debug, Error)]
pub enum QueueError {
    /// `/dev/ublkcN` is not there.
    #[error("{id}: {} did not appear: is udev or devtmpfs running here?", id.char_path().display())]
    Missing {
        /// The device.
        id: UblkId,
    },
    /// Another process serves it.
    #[error("{id}: another process has {} open; end it first", id.char_path().display())]
    Taken {
        /// The device.
        id: UblkId,
    },
    /// `/dev/ublkcN` cannot be opened.
    #[error("{id}: cannot open {}: {source}", id.char_path().display())]
    Open {
        /// The device.
        id: UblkId,
        /// Why.
        source: io::Error,
    },
    /// The kernel's array of requests cannot be mapped.
    #[error(
        "{id} queue {queue}: cannot map the kernel's request array: {errno}; was /dev/ublkcN opened by another process?"
    )]
    MapRequests {
        /// The device.
        id: UblkId,
        /// The queue.
        queue: u16,
        /// Why.
        errno: Errno,
    },
    /// No memory for the buffers.
    #[error(
        "{id} queue {queue}: no {bytes} bytes of memory for its buffers: {errno}; lower the depth or the buffers, or raise the limit of locked memory"
    )]
    Buffers {
        /// The device.
        id: UblkId,
        /// The queue.
        queue: u16,
        /// Bytes of the whole area.
        bytes: usize,
        /// Why.
        errno: Errno,
    },
}

/// The open `/dev/ublkcN`. The kernel lets it be opened once, so all queues of a device share it.
#[derive(Debug)]
pub struct CharDevice {
    file: File,
    info: DeviceInfo,
}

impl CharDevice {
    /// Opens it. Waits up to `patience` for it to appear, and for the last server's end.
    ///
    /// # Errors
    /// [`QueueError::Missing`], [`QueueError::Taken`], [`QueueError::Open`].
    pub fn open(info: &DeviceInfo, patience: Duration) -> Result<Arc<CharDevice>, QueueError> {
        let id = info.id;
        let start = Instant::now();
        loop {
            let opened =
                OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(id.char_path());
            let error = match opened {
                Ok(file) => return Ok(Arc::new(CharDevice { file, info: *info })),
                Err(error) => error,
            };
            let over = start.elapsed() >= patience;
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO) if over => return Err(QueueError::Missing { id }),
                Some(libc::EBUSY) if over => return Err(QueueError::Taken { id }),
                Some(libc::ENOENT | libc::ENXIO | libc::EBUSY) => std::thread::sleep(OPEN_RETRY),
                _ => return Err(QueueError::Open { id, source: error }),
            }
        }
    }

    /// The device it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The descriptor, to be registered with a ring.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffer.
    Read,
    /// Store the buffer.
    Write,
    /// Everything that was completed before is to be on stable storage.
    Flush,
    /// The range's content is no longer wanted.
    Discard,
    /// The range must read as zeros.
    WriteZeroes,
    /// An operation that this program does not know: answer with [`Outcome::Failed`]`(EOPNOTSUPP)`.
    Unsupported(u8),
}

/// A request, as it came with a tag.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its tag.
    pub tag: u16,
    /// What it wants.
    pub operation: Operation,
    /// The write or write zeroes must be on stable storage when it completes.
    pub fua: bool,
    /// Write zeroes must keep the space allocated.
    pub no_unmap: bool,
    /// First byte on the device.
    pub offset_bytes: u64,
    /// Bytes on the device; 0 for a flush.
    pub length_bytes: u64,
    /// The start of the tag's buffer, which holds `length_bytes` of data for reads and writes. Valid while the
    /// tag is with us and the queue lives.
    pub buffer: NonNull<u8>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it was done.
    Done,
    /// It failed. EIO is the common case; ENOSPC, EOPNOTSUPP, ETIMEDOUT and ENODATA (a medium error) reach the
    /// user as themselves.
    Failed(Errno),
}

/// What a completion of a fetch means.
#[derive(Clone, Copy, Debug)]
pub enum Arrival {
    /// A request: the tag is with us until its result is committed.
    Request(Request),
    /// The tag is given up: the device was stopped or the server is being replaced. It brings nothing more.
    Gone,
    /// The kernel refused the entry. That is a mistake of ours, the tag brings nothing more: log it and stop the
    /// device.
    Refused(Errno),
}

/// Where a tag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagState {
    /// Never fetched.
    Idle,
    /// Fetched: the kernel may fill its buffer and its descriptor at any moment.
    WithKernel,
    /// It brought a request and owes a result.
    WithUs,
    /// Given up for good.
    Gone,
}

/// How entries name `/dev/ublkcN`.
#[derive(Clone, Copy, Debug)]
enum Target {
    Descriptor(RawFd),
    Registered(u32),
}

/// One hardware queue of one device. Belongs to the thread that submits its entries.
#[derive(Debug)]
pub struct Queue {
    device: Arc<CharDevice>,
    target: Target,
    queue: u16,
    requests: Mapping,
    buffers: Mapping,
    buffer_bytes: usize,
    tags: Box<[TagState]>,
    /// What of the last request's data size each tag holds: what a commit of success reports.
    lengths: Box<[i32]>,
    with_kernel: u16,
    gone: u16,
}

// SAFETY: the mappings are owned by the queue and not tied to a thread; it is only ever used through `&mut` or
// from one thread at a time.
unsafe impl Send for Queue {}

impl Queue {
    /// Maps the kernel's request array of the queue, and memory for all buffers of its tags.
    ///
    /// # Errors
    /// [`QueueError::MapRequests`], [`QueueError::Buffers`].
    ///
    /// # Panics
    /// If the device has no such queue.
    pub fn new(device: &Arc<CharDevice>, queue: u16) -> Result<Queue, QueueError> {
        let info = device.info;
        assert!(queue < info.queues, "{} has {} queues, not {queue}", info.id, info.queues);
        assert!(info.depth >= 1 && info.depth <= QUEUE_DEPTH_MAX);
        let page = page_bytes() as usize;
        let descriptor_bytes = size_of::<IoDesc>();
        // The arrays of the queues lie at distances of the largest possible one.
        let distance = (usize::from(QUEUE_DEPTH_MAX) * descriptor_bytes).next_multiple_of(page);
        let requests = Mapping::shared_read_only(
            device.fd(),
            (usize::from(info.depth) * descriptor_bytes).next_multiple_of(page),
            usize::from(queue) * distance,
        )
        .map_err(|errno| QueueError::MapRequests { id: info.id, queue, errno })?;
        let buffer_bytes = info.buffer_bytes as usize;
        assert!(buffer_bytes >= page && buffer_bytes.is_multiple_of(page));
        let bytes = buffer_bytes * usize::from(info.depth);
        let buffers = Mapping::anonymous(bytes).map_err(|errno| QueueError::Buffers {
            id: info.id,
            queue,
            bytes,
            errno,
        })?;
        Ok(Queue {
            device: Arc::clone(device),
            target: Target::Descriptor(device.fd()),
            queue,
            requests,
            buffers,
            buffer_bytes,
            tags: vec![TagState::Idle; info.depth.into()].into(),
            lengths: vec![0; info.depth.into()].into(),
            with_kernel: 0,
            gone: 0,
        })
    }

    /// From now on entries name `/dev/ublkcN` by its slot in the ring's registered files.
    pub fn use_registered_file(&mut self, slot: u32) {
        self.target = Target::Registered(slot);
    }

    /// The device.
    pub fn device(&self) -> &Arc<CharDevice> {
        &self.device
    }

    /// The number of the queue.
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// Tags of the queue; they are numbered from 0.
    pub fn depth(&self) -> u16 {
        self.tags.len() as u16
    }

    /// The memory of all buffers, tag 0's first: to be registered with a ring as one buffer.
    pub fn buffer_area(&self) -> (NonNull<u8>, usize) {
        (self.buffers.start, self.buffers.bytes)
    }

    /// Where a tag is.
    pub fn tag_state(&self, tag: u16) -> TagState {
        self.tags[usize::from(tag)]
    }

    /// Tags that brought a request and owe a result.
    pub fn tags_with_us(&self) -> u16 {
        self.tags.iter().filter(|state| **state == TagState::WithUs).count() as u16
    }

    /// Whether every tag was given up: the thread may let go of the queue.
    pub fn is_drained(&self) -> bool {
        self.gone == self.depth()
    }

    /// The entry that lends a tag to the kernel for the first time. START_DEV and END_USER_RECOVERY wait until
    /// all tags were lent.
    ///
    /// The entry refers to the tag's buffer: the queue must outlive its completion.
    ///
    /// # Panics
    /// If the tag was fetched before.
    #[must_use = "the tag counts as being with the kernel: submit the entry"]
    pub fn fetch(&mut self, tag: u16, user_data: u64) -> squeue::Entry {
        assert_eq!(self.tag_state(tag), TagState::Idle, "tag {tag} is fetched once");
        self.lend(tag);
        self.entry(io_op::FETCH, tag, 0, user_data)
    }

    /// The entry that returns a request's result and lends the tag again.
    ///
    /// # Panics
    /// If the tag owes no result.
    #[must_use = "the tag counts as being with the kernel: submit the entry"]
    pub fn commit_and_fetch(&mut self, tag: u16, outcome: Outcome, user_data: u64) -> squeue::Entry {
        assert_eq!(self.tag_state(tag), TagState::WithUs, "tag {tag} owes no result");
        let result = match outcome {
            Outcome::Done => self.lengths[usize::from(tag)],
            Outcome::Failed(errno) => -(errno as i32),
        };
        self.lend(tag);
        self.entry(io_op::COMMIT_AND_FETCH, tag, result, user_data)
    }

    /// Takes the completion of a tag's entry.
    ///
    /// # Panics
    /// If the tag was not with the kernel.
    pub fn arrived(&mut self, tag: u16, completion_result: i32) -> Arrival {
        assert_eq!(self.tag_state(tag), TagState::WithKernel, "a completion for tag {tag}");
        self.with_kernel -= 1;
        if completion_result == IO_RESULT_OK {
            self.tags[usize::from(tag)] = TagState::WithUs;
            let request = self.request(tag);
            self.lengths[usize::from(tag)] = data_bytes(&request);
            return Arrival::Request(request);
        }
        self.tags[usize::from(tag)] = TagState::Gone;
        self.gone += 1;
        match completion_result {
            // ECANCELED: the ring itself is going down.
            IO_RESULT_ABORT | LIBC_ECANCELED => Arrival::Gone,
            other => Arrival::Refused(Errno::from_raw(-other)),
        }
    }

    /// The request that a tag brought.
    ///
    /// # Panics
    /// If the tag is not with us.
    pub fn request(&self, tag: u16) -> Request {
        assert_eq!(self.tag_state(tag), TagState::WithUs, "tag {tag} has no request");
        // SAFETY: the mapping holds `depth` descriptors and `tag` is below it. The kernel wrote this one before it
        // posted the completion that made the tag ours, and leaves it alone until the tag is lent again; volatile
        // because the writer is outside of this program.
        let descriptor =
            unsafe { ptr::read_volatile(self.requests.start.cast::<IoDesc>().as_ptr().add(tag.into())) };
        let request = decode(&descriptor, tag, self.buffer_start(tag));
        assert!(
            data_bytes(&request) as usize <= self.buffer_bytes,
            "the kernel keeps to the buffer it was lent"
        );
        request
    }

    /// A tag's whole buffer, while the tag is with us.
    ///
    /// # Panics
    /// If it is not.
    pub fn buffer(&self, tag: u16) -> &[u8] {
        assert_eq!(self.tag_state(tag), TagState::WithUs, "tag {tag}'s buffer is lent out");
        // SAFETY: the range is mapped, initialised (zeroed at first) and, while the tag is ours, not written by
        // the kernel's ublk driver; entries of our own that write there are their submitter's responsibility.
        unsafe { std::slice::from_raw_parts(self.buffer_start(tag).as_ptr(), self.buffer_bytes) }
    }

    /// As [`Queue::buffer`], to be filled.
    ///
    /// # Panics
    /// If the tag is not with us.
    pub fn buffer_mut(&mut self, tag: u16) -> &mut [u8] {
        assert_eq!(self.tag_state(tag), TagState::WithUs, "tag {tag}'s buffer is lent out");
        // SAFETY: as in `buffer`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.buffer_start(tag).as_ptr(), self.buffer_bytes) }
    }

    fn lend(&mut self, tag: u16) {
        self.tags[usize::from(tag)] = TagState::WithKernel;
        self.with_kernel += 1;
        assert!(self.with_kernel + self.gone <= self.depth());
    }

    fn entry(&self, command_op: u32, tag: u16, result: i32, user_data: u64) -> squeue::Entry {
        let command = IoCmd { q_id: self.queue, tag, result, addr: self.buffer_start(tag).as_ptr() as u64 };
        let mut bytes = [0u8; 16];
        bytes.copy_from_slice(command.as_bytes());
        let entry = match self.target {
            Target::Descriptor(fd) => opcode::UringCmd16::new(types::Fd(fd), command_op).cmd(bytes).build(),
            Target::Registered(slot) => {
                opcode::UringCmd16::new(types::Fixed(slot), command_op).cmd(bytes).build()
            }
        };
        entry.user_data(user_data)
    }

    fn buffer_start(&self, tag: u16) -> NonNull<u8> {
        assert!(tag < self.depth());
        // SAFETY: the area holds `depth` buffers of `buffer_bytes`, and `tag` is below `depth`.
        unsafe { self.buffers.start.add(usize::from(tag) * self.buffer_bytes) }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.with_kernel > 0 {
            // The kernel still has the addresses of lent buffers and would write into whatever is mapped there
            // next. This happens when a thread ends without draining its queues; the process is about to end too.
            self.buffers.leak();
        }
    }
}

const LIBC_ECANCELED: i32 = -libc::ECANCELED;

/// A descriptor in our words.
fn decode(descriptor: &IoDesc, tag: u16, buffer: NonNull<u8>) -> Request {
    let code = (descriptor.op_flags & 0xff) as u8;
    let operation = match code {
        request_op::READ => Operation::Read,
        request_op::WRITE => Operation::Write,
        request_op::FLUSH => Operation::Flush,
        request_op::DISCARD => Operation::Discard,
        request_op::WRITE_ZEROES => Operation::WriteZeroes,
        other => Operation::Unsupported(other),
    };
    // A flush has no place; what the kernel leaves in these fields then is of no meaning.
    let (start, sectors) = match operation {
        Operation::Flush => (0, 0),
        _ => (descriptor.start_sector, descriptor.nr_sectors),
    };
    Request {
        tag,
        operation,
        fua: descriptor.op_flags & REQUEST_FUA != 0,
        no_unmap: operation == Operation::WriteZeroes && descriptor.op_flags & REQUEST_NOUNMAP != 0,
        offset_bytes: start.checked_mul(SECTOR_BYTES).expect("no device is that large"),
        length_bytes: u64::from(sectors) * SECTOR_BYTES,
        buffer,
    }
}

/// Bytes of data that a request moves through its buffer.
fn data_bytes(request: &Request) -> i32 {
    match request.operation {
        Operation::Read | Operation::Write => {
            i32::try_from(request.length_bytes).expect("a request fits its buffer, which is 32 MiB at most")
        }
        _ => 0,
    }
}

/// Memory that is unmapped when it is dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    leaked: bool,
}

impl Mapping {
    /// The kernel's memory behind a file, for reading.
    fn shared_read_only(fd: RawFd, bytes: usize, offset: usize) -> Result<Mapping, Errno> {
        let offset = libc::off_t::try_from(offset).expect("a file offset");
        Mapping::map(bytes, libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE, fd, offset)
    }

    /// Fresh memory, zeroed and present, so that no request pays for page faults.
    ///
    /// It becomes present piece by piece. While the kernel fills a mapping no other thread can change the address
    /// space, that is, allocate much; filling all of this at once stops an I/O thread long enough for its peers
    /// to take it for dead.
    fn anonymous(bytes: usize) -> Result<Mapping, Errno> {
        const PIECE_BYTES: usize = 1 << 20;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // Inaccessible memory is not filled, even if the process locks all its memory.
        let mapping = Mapping::map(bytes, libc::PROT_NONE, flags | libc::MAP_NORESERVE, -1, 0)?;
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let length = PIECE_BYTES.min(bytes - at);
            let flags = flags | libc::MAP_FIXED | libc::MAP_POPULATE;
            // SAFETY: takes the place of a part of the mapping made above, which nobody uses yet.
            let piece = unsafe {
                let start = mapping.start.as_ptr().add(at);
                libc::mmap(start.cast(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
            };
            if piece == libc::MAP_FAILED {
                return Err(Errno::last());
            }
        }
        // SAFETY: the range is the mapping made above. A child of a fork must not make its pages copy-on-write,
        // since rings may have them pinned.
        let result = unsafe { libc::madvise(mapping.start.as_ptr().cast(), bytes, libc::MADV_DONTFORK) };
        Errno::result(result)?;
        Ok(mapping)
    }

    fn map(
        bytes: usize,
        protection: libc::c_int,
        flags: libc::c_int,
        fd: RawFd,
        offset: libc::off_t,
    ) -> Result<Mapping, Errno> {
        assert!(bytes > 0);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let start = NonNull::new(start.cast()).expect("mmap never returns 0 by itself");
        Ok(Mapping { start, bytes, leaked: false })
    }

    /// Leaves the memory mapped for ever.
    fn leak(&mut self) {
        self.leaked = true;
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.leaked {
            return;
        }
        // SAFETY: the range was mapped by `map` and is unmapped once; its owner hands out no reference that
        // outlives it.
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        assert_eq!(result, 0, "unmapping our own mapping: {}", Errno::last());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(op_flags: u32, nr_sectors: u32, start_sector: u64) -> Request {
        decode(&IoDesc { op_flags, nr_sectors, start_sector, addr: 0 }, 7, NonNull::dangling())
    }

    #[test]
    fn memory_for_buffers_is_present_to_the_last_page() {
        let page = page_bytes() as usize;
        let bytes = (5 << 20) / 2 + page;
        let mapping = Mapping::anonymous(bytes).unwrap();
        let mut present = vec![0u8; bytes / page];
        // SAFETY: one byte for each page of the mapping.
        let result = unsafe { libc::mincore(mapping.start.as_ptr().cast(), bytes, present.as_mut_ptr()) };
        assert_eq!(result, 0);
        assert!(present.iter().all(|page| page & 1 == 1));
        // SAFETY: within the mapping, which nobody else uses.
        let memory = unsafe { std::slice::from_raw_parts_mut(mapping.start.as_ptr(), bytes) };
        assert!(memory.iter().all(|byte| *byte == 0));
        memory.fill(1);
    }

    #[test]
    fn descriptors_are_decoded() {
        let write = decoded(u32::from(request_op::WRITE) | REQUEST_FUA, 8, 16);
        assert_eq!(write.operation, Operation::Write);
        assert!(write.fua && !write.no_unmap);
        assert_eq!((write.offset_bytes, write.length_bytes, data_bytes(&write)), (8192, 4096, 4096));

        let zeroes = decoded(u32::from(request_op::WRITE_ZEROES) | REQUEST_NOUNMAP, u32::MAX, 1 << 40);
        assert_eq!(zeroes.operation, Operation::WriteZeroes);
        assert!(zeroes.no_unmap && !zeroes.fua);
        assert_eq!(zeroes.length_bytes, u64::from(u32::MAX) * 512);
        assert_eq!(data_bytes(&zeroes), 0);

        let flush = decoded(u32::from(request_op::FLUSH), u32::MAX, u64::MAX);
        assert_eq!((flush.operation, flush.offset_bytes, flush.length_bytes), (Operation::Flush, 0, 0));

        assert_eq!(decoded(15, 0, 0).operation, Operation::Unsupported(15));
        // Flags that mean nothing to us are passed over.
        assert_eq!(decoded(u32::from(request_op::READ) | 0x700, 1, 0).operation, Operation::Read);
    }

    /// A queue on a file that stands for `/dev/ublkcN`, with a descriptor for tag 1.
    fn queue_on_file() -> Queue {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let descriptor =
            IoDesc { op_flags: u32::from(request_op::WRITE), nr_sectors: 8, start_sector: 2, addr: 0 };
        std::os::unix::fs::FileExt::write_all_at(&file, descriptor.as_bytes(), size_of::<IoDesc>() as u64)
            .unwrap();
        let info = DeviceInfo {
            id: UblkId(0),
            queues: 1,
            depth: 2,
            buffer_bytes: 8192,
            state: super::super::DeviceState::Dead,
            server_pid: None,
            features: kmod::abi::Features::REQUIRED,
            cookie: None,
        };
        Queue::new(&Arc::new(CharDevice { file, info }), 0).unwrap()
    }

    #[test]
    fn a_tag_goes_to_the_kernel_and_back() {
        let mut queue = queue_on_file();
        let _ = queue.fetch(0, 10);
        let _ = queue.fetch(1, 11);
        let Arrival::Request(request) = queue.arrived(1, IO_RESULT_OK) else { panic!("a request") };
        assert_eq!((request.tag, request.operation), (1, Operation::Write));
        assert_eq!((request.offset_bytes, request.length_bytes), (1024, 4096));
        assert_eq!(request.buffer.as_ptr() as usize - queue.buffer_area().0.as_ptr() as usize, 8192);
        queue.buffer_mut(1)[0] = 7;
        assert_eq!(queue.buffer(1)[0], 7);
        assert_eq!(queue.tags_with_us(), 1);
        let _ = queue.commit_and_fetch(1, Outcome::Done, 11);
        assert_eq!(queue.tag_state(1), TagState::WithKernel);

        assert!(matches!(queue.arrived(1, IO_RESULT_ABORT), Arrival::Gone));
        assert!(!queue.is_drained());
        assert!(matches!(queue.arrived(0, -libc::EINVAL), Arrival::Refused(Errno::EINVAL)));
        assert!(queue.is_drained());
    }

    #[test]
    #[should_panic(expected = "owes no result")]
    fn a_result_is_committed_once() {
        let mut queue = queue_on_file();
        let _ = queue.fetch(1, 0);
        let _ = queue.arrived(1, IO_RESULT_OK);
        let _ = queue.commit_and_fetch(1, Outcome::Failed(Errno::EIO), 0);
        let _ = queue.commit_and_fetch(1, Outcome::Done, 0);
    }

    #[test]
    #[should_panic(expected = "lent out")]
    fn a_lent_buffer_is_not_touched() {
        let mut queue = queue_on_file();
        let _ = queue.fetch(1, 0);
        let _ = queue.buffer(1);
    }
}
