//! A device's hardware queues, as the I/O thread serves them.

use super::queue::{Arrival, CharDevice, Operation, Outcome, Queue, QueueError, Request};
use crate::frontend::Answer;
use crate::ring::Ring;
use crate::ring::buffers::Buffers;
use mirror_net::engine::action::{BufferId, BufferRange, RequestError, RequestKind};
use mirror_net::ids::DeviceId;
use nix::errno::Errno;
use std::io;
use std::sync::Arc;

/// All hardware queues of one exported device.
pub struct Export {
    /// The device.
    pub device: DeviceId,
    /// If the device outlived the process that exported it: what its users know of lost writes.
    pub loss_told: Option<u64>,
    queues: Vec<Lent>,
}

/// A queue with its tags' buffers under the engine's numbers.
struct Lent {
    queue: Queue,
    buffers: Vec<BufferId>,
    /// Results that wait for a frame to be sent from the tag's buffer.
    late: Vec<(u16, Result<(), RequestError>)>,
}

/// What to ask the engine for.
pub struct Ask {
    /// What to do.
    pub kind: RequestKind,
    /// Byte offset on the device.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Its data, or room for it.
    pub buffer: Option<BufferRange>,
}

/// What a tag's completion brought.
pub enum Arrived {
    /// A request for the engine.
    Ask(Ask),
    /// Nothing to do.
    Nothing,
    /// The kernel refused an entry: the device has to be stopped.
    Refused(Errno),
}

impl Export {
    /// Maps the device's queues.
    pub fn new(device: DeviceId, file: &Arc<CharDevice>) -> Result<Self, QueueError> {
        let queues = (0..file.info().queues)
            .map(|index| Ok(Lent { queue: Queue::new(file, index)?, buffers: Vec::new(), late: Vec::new() }))
            .collect::<Result<_, QueueError>>()?;
        Ok(Self { device, loss_told: None, queues })
    }

    /// The device outlived the process that exported it, which had told its users of losses up to there.
    pub fn resumed(self, loss_told: u64) -> Self {
        Self { loss_told: Some(loss_told), ..self }
    }

    /// Lends every tag to the kernel; on the thread that serves them.
    pub fn start(
        &mut self,
        ring: &mut Ring,
        buffers: &mut Buffers,
        token: impl Fn(u16, u16) -> u64,
    ) -> io::Result<()> {
        for (index, lent) in self.queues.iter_mut().enumerate() {
            let (start, bytes) = lent.queue.buffer_area();
            let each = bytes / usize::from(lent.queue.depth());
            for tag in 0..lent.queue.depth() {
                // SAFETY: within the area, which lives as long as the queue; `Export::end` unregisters
                // it before the queue is dropped.
                let buffer = unsafe { buffers.register(start.add(each * usize::from(tag)), each) };
                lent.buffers.push(buffer);
                let entry = lent.queue.fetch(tag, token(index as u16, tag));
                // SAFETY: the queue lives until all its tags came back (`is_drained`).
                unsafe { ring.push(&entry)? };
            }
        }
        Ok(())
    }

    /// A tag came back from the kernel.
    pub fn arrived(&mut self, queue: u16, tag: u16, result: i32) -> Arrived {
        let lent = &mut self.queues[usize::from(queue)];
        match lent.queue.arrived(tag, result) {
            Arrival::Request(request) => Arrived::Ask(ask(&request, lent.buffers[usize::from(tag)])),
            Arrival::Gone => Arrived::Nothing,
            Arrival::Refused(errno) => Arrived::Refused(errno),
        }
    }

    /// The engine is done with a tag's request.
    pub fn complete(
        &mut self,
        (queue, tag): (u16, u16),
        result: Result<(), RequestError>,
        ring: &mut Ring,
        buffers: &Buffers,
        token: u64,
    ) -> io::Result<Answer> {
        let lent = &mut self.queues[usize::from(queue)];
        if buffers.is_pinned(lent.buffers[usize::from(tag)]) {
            lent.late.push((tag, result));
            return Ok(Answer::Later);
        }
        let outcome = match result {
            Ok(()) => Outcome::Done,
            Err(RequestError::Invalid) => Outcome::Failed(Errno::EINVAL),
            Err(_) => Outcome::Failed(Errno::EIO),
        };
        let entry = lent.queue.commit_and_fetch(tag, outcome, token);
        // SAFETY: as in `start`.
        unsafe { ring.push(&entry)? };
        Ok(Answer::Given)
    }

    /// Results that were held back: (queue, tag, result).
    pub fn take_late(&mut self) -> Vec<(u16, u16, Result<(), RequestError>)> {
        let late = |(index, lent): (usize, &mut Lent)| {
            let taken = std::mem::take(&mut lent.late);
            taken.into_iter().map(move |(tag, result)| (index as u16, tag, result)).collect::<Vec<_>>()
        };
        self.queues.iter_mut().enumerate().flat_map(late).collect()
    }

    /// Whether the kernel gave every tag up.
    pub fn is_drained(&self) -> bool {
        self.queues.iter().all(|lent| lent.queue.is_drained())
    }

    /// Forgets the tags' buffers; only when the queues are drained.
    pub fn end(&mut self, buffers: &mut Buffers) {
        for lent in &mut self.queues {
            lent.buffers.drain(..).for_each(|buffer| buffers.unregister(buffer));
        }
    }
}

fn ask(request: &Request, buffer: BufferId) -> Ask {
    let data = BufferRange { buffer, offset: 0, length: request.length_bytes as u32 };
    let (kind, buffer) = match request.operation {
        Operation::Read => (RequestKind::Read, Some(data)),
        Operation::Write => (RequestKind::Write { fua: request.fua }, Some(data)),
        Operation::Flush => return Ask { kind: RequestKind::Flush, offset: 0, length: 0, buffer: None },
        Operation::Discard => (RequestKind::Discard, None),
        Operation::WriteZeroes => (RequestKind::WriteZeroes { fua: request.fua }, None),
        // Nothing on any device lies there: it is answered as invalid.
        Operation::Unsupported(_) => {
            return Ask { kind: RequestKind::Read, offset: u64::MAX, length: 0, buffer: None };
        }
    };
    Ask { kind, offset: request.offset_bytes, length: request.length_bytes as u32, buffer }
}
