//! Buffers that disks and sockets share: page-aligned, of a few sizes, never given back to the
//! allocator while the daemon lives.
//!
//! The engine and the frontends know buffers by number only. Frontends whose buffers belong to
//! somebody else (ublk's tags) register them here under a number, too.

use mirror_net::engine::action::{BufferId, BufferRange};
use std::alloc::Layout;
use std::ptr::NonNull;

const ALIGNMENT: usize = 4096;

/// Sizes in bytes. The largest holds a piece of a request with its trailer; NBD's longest requests
/// get a buffer of their own size.
const CLASSES: [usize; 5] = [8 << 10, 64 << 10, 256 << 10, (1 << 20) + ALIGNMENT, 4 << 20];

struct Entry {
    start: NonNull<u8>,
    length: usize,
    kind: Kind,
    free: bool,
    /// Counts against the limit.
    limited: bool,
    /// Frames that are still to be sent from it.
    pins: u32,
    /// Released while it was pinned.
    release_later: bool,
}

impl Entry {
    const EMPTY: Self = Self {
        start: NonNull::dangling(),
        length: 0,
        kind: Kind::Foreign,
        free: false,
        limited: false,
        pins: 0,
        release_later: false,
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Ours, of that class.
    Class(usize),
    /// Ours, of a size of its own; freed when released.
    Large,
    /// Somebody else's.
    Foreign,
}

/// All buffers of one I/O thread.
pub struct Buffers {
    entries: Vec<Entry>,
    free: [Vec<u32>; CLASSES.len()],
    /// Entries without memory, to be used again.
    vacant: Vec<u32>,
    used_bytes: usize,
    limit_bytes: usize,
}

// SAFETY: the pointers are owned by this value (or lent to it, see `register`), not tied to a thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The clients of [`Buffers::allocate`] share `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        Self { entries: Vec::new(), free: Default::default(), vacant: Vec::new(), used_bytes: 0, limit_bytes }
    }

    /// A buffer of at least that many bytes, with whatever content, for a client that holds `held_bytes`
    /// already; `None` if it has to give some back first, or others have.
    ///
    /// Nobody may hold more than what then stays free. So a client that takes none of its replies keeps at
    /// most half of the memory, a second one at most a quarter, and clients that are all greedy end with
    /// equal parts. The first request of each is always let through: whatever others hold, everybody gets
    /// on, with one request at a time if need be, even one that is larger than the limit.
    pub fn allocate(&mut self, bytes: usize, held_bytes: usize) -> Option<BufferId> {
        let (_, size) = class_of(bytes);
        let free = self.limit_bytes.checked_sub(self.used_bytes + size);
        if held_bytes > 0 && free.is_none_or(|free| held_bytes + size > free) {
            return None;
        }
        self.used_bytes += size;
        Some(self.take(bytes, true))
    }

    /// A buffer for what another node sends; it is never refused.
    ///
    /// Behind a frame that is left on its lane are the answers that free buffers here, and the other
    /// node may be waiting for buffers in the same way: both would wait for ever. What a node sends is
    /// bounded by what its own clients have under way.
    pub fn allocate_for_peer(&mut self, bytes: usize) -> BufferId {
        self.take(bytes, false)
    }

    fn take(&mut self, bytes: usize, limited: bool) -> BufferId {
        let (class, length) = class_of(bytes);
        if let Some(index) = class.and_then(|class| self.free[class].pop()) {
            let entry = &mut self.entries[index as usize];
            (entry.free, entry.limited) = (false, limited);
            return BufferId(index);
        }
        let start = zeroed(layout(length));
        self.insert(Entry {
            start,
            length,
            kind: class.map_or(Kind::Large, Kind::Class),
            limited,
            ..Entry::EMPTY
        })
    }

    fn insert(&mut self, entry: Entry) -> BufferId {
        if let Some(index) = self.vacant.pop() {
            self.entries[index as usize] = entry;
            return BufferId(index);
        }
        self.entries.push(entry);
        BufferId(self.entries.len() as u32 - 1)
    }

    /// A frame will be sent from it: it keeps its content until [`Buffers::unpin`], released or not.
    pub fn pin(&mut self, buffer: BufferId) {
        self.entries[buffer.0 as usize].pins += 1;
    }

    /// The frame is sent, or never will be.
    pub fn unpin(&mut self, buffer: BufferId) {
        let entry = &mut self.entries[buffer.0 as usize];
        entry.pins -= 1;
        if entry.pins == 0 && std::mem::take(&mut entry.release_later) {
            self.release(buffer);
        }
    }

    /// Whether a frame is still to be sent from it; somebody else's memory must not change before.
    pub fn is_pinned(&self, buffer: BufferId) -> bool {
        self.entries[buffer.0 as usize].pins > 0
    }

    /// Gives a buffer back. Giving back somebody else's does nothing.
    pub fn release(&mut self, buffer: BufferId) {
        let entry = &mut self.entries[buffer.0 as usize];
        assert!(!entry.free && !entry.release_later, "buffer {} is released twice", buffer.0);
        if entry.pins > 0 && entry.kind != Kind::Foreign {
            entry.release_later = true;
            return;
        }
        if entry.kind == Kind::Foreign {
            return;
        }
        entry.free = true;
        self.used_bytes -= if entry.limited { entry.length } else { 0 };
        if let Kind::Class(class) = entry.kind {
            self.free[class].push(buffer.0);
        } else {
            // SAFETY: allocated with this layout in `take`, and released once.
            unsafe { std::alloc::dealloc(entry.start.as_ptr(), layout(entry.length)) };
            self.vacant.push(buffer.0);
        }
    }

    /// Gives a number to memory that belongs to somebody else.
    ///
    /// # Safety
    /// The memory must stay valid until [`Buffers::unregister`], and nobody else may touch it while
    /// a request uses it.
    pub unsafe fn register(&mut self, start: NonNull<u8>, length: usize) -> BufferId {
        self.insert(Entry { start, length, kind: Kind::Foreign, ..Entry::EMPTY })
    }

    /// Forgets memory that belongs to somebody else.
    pub fn unregister(&mut self, buffer: BufferId) {
        let entry = &mut self.entries[buffer.0 as usize];
        assert!(entry.kind == Kind::Foreign && !entry.free);
        entry.free = true;
        self.vacant.push(buffer.0);
    }

    /// Where a range begins; its length has been checked.
    pub fn pointer(&self, range: BufferRange) -> NonNull<u8> {
        let entry = &self.entries[range.buffer.0 as usize];
        assert!(!entry.free && range.offset as usize + range.length as usize <= entry.length);
        // SAFETY: within the allocation, as just checked.
        unsafe { entry.start.add(range.offset as usize) }
    }

    /// A range's bytes.
    pub fn bytes(&self, range: BufferRange) -> &[u8] {
        // SAFETY: valid for that length; the engine lets nobody write while it reads.
        unsafe { std::slice::from_raw_parts(self.pointer(range).as_ptr(), range.length as usize) }
    }

    /// A range's bytes, to be changed.
    pub fn bytes_mut(&mut self, range: BufferRange) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(range).as_ptr(), range.length as usize) }
    }

    /// Copies between two buffers.
    pub fn copy(&mut self, from: BufferRange, to: BufferRange) {
        assert!(from.length == to.length && from.buffer != to.buffer);
        // SAFETY: different buffers, so they do not overlap; lengths were checked by `pointer`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.pointer(from).as_ptr(),
                self.pointer(to).as_ptr(),
                from.length as usize,
            );
        }
    }

    /// A buffer's size in bytes; at least what was asked for.
    pub fn size(&self, buffer: BufferId) -> usize {
        self.entries[buffer.0 as usize].length
    }

    /// Bytes that count against the limit.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }
}

/// Class, if one is large enough, and size of a buffer.
fn class_of(bytes: usize) -> (Option<usize>, usize) {
    let class = CLASSES.iter().position(|size| *size >= bytes);
    (class, class.map_or(bytes.next_multiple_of(ALIGNMENT), |class| CLASSES[class]))
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGNMENT).expect("a sane size")
}

/// Zeroed memory of that layout, whose size is not zero.
fn zeroed(layout: Layout) -> NonNull<u8> {
    assert!(layout.size() > 0);
    // SAFETY: the size is not zero.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    NonNull::new(start).unwrap_or_else(|| std::alloc::handle_alloc_error(layout))
}

/// A fixed, page-aligned block of memory.
pub struct AlignedBlock {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its memory.
unsafe impl Send for AlignedBlock {}

impl AlignedBlock {
    /// Zeroed memory.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn new(bytes: usize) -> Self {
        let layout = layout(bytes.max(ALIGNMENT));
        Self { start: zeroed(layout), layout }
    }
}

impl std::ops::Deref for AlignedBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: owned, initialised, of that size.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for AlignedBlock {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBlock {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(buffer: BufferId, offset: u32, length: u32) -> BufferRange {
        BufferRange { buffer, offset, length }
    }

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let mut buffers = Buffers::new(1 << 20);
        let first = buffers.allocate(4096, 0).unwrap();
        assert_eq!(buffers.pointer(range(first, 0, 1)).as_ptr() as usize % ALIGNMENT, 0);
        buffers.bytes_mut(range(first, 0, 4096)).fill(7);
        buffers.release(first);
        assert_eq!(buffers.allocate(100, 0), Some(first));
    }

    #[test]
    fn the_limit_holds_but_lets_one_request_of_each_client_through() {
        let mut buffers = Buffers::new(100 << 10);
        let large = buffers.allocate(32 << 20, 0).unwrap();
        assert_eq!(buffers.allocate(1, 32 << 20), None);
        let other = buffers.allocate(1, 0).unwrap();
        assert_eq!(buffers.allocate(1, 8 << 10), None);
        buffers.release(large);
        buffers.release(other);
        assert_eq!(buffers.used_bytes(), 0);
    }

    #[test]
    fn what_a_client_may_hold_shrinks_with_what_others_do() {
        const PIECE: usize = 64 << 10;
        let mut buffers = Buffers::new(64 * PIECE);
        let mut held = [0; 4];
        // One after the other takes all that it can get and never gives any back.
        for held in &mut held {
            while buffers.allocate(PIECE, *held).is_some() {
                *held += PIECE;
            }
        }
        assert_eq!(held.map(|bytes| bytes / PIECE), [32, 16, 8, 4]);
        // Those who take turns end with equal parts.
        let mut buffers = Buffers::new(64 * PIECE);
        let mut held = [0; 3];
        for turn in 0..300 {
            if buffers.allocate(PIECE, held[turn % 3]).is_some() {
                held[turn % 3] += PIECE;
            }
        }
        assert_eq!(held.map(|bytes| bytes / PIECE), [16; 3]);
    }

    #[test]
    fn what_peers_send_finds_room_beyond_the_limit_and_leaves_the_limit_alone() {
        let mut buffers = Buffers::new(128 << 10);
        let own = buffers.allocate(64 << 10, 0).unwrap();
        assert_eq!(buffers.allocate(1, 64 << 10), None);
        let theirs = buffers.allocate_for_peer(64 << 10);
        buffers.release(own);
        assert_eq!(buffers.allocate(64 << 10, 0), Some(own), "theirs does not count");
        buffers.release(theirs);
        assert_eq!(buffers.used_bytes(), 64 << 10);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_caught() {
        let mut buffers = Buffers::new(1 << 20);
        let buffer = buffers.allocate(1, 0).unwrap();
        buffers.release(buffer);
        buffers.release(buffer);
    }

    #[test]
    fn a_pinned_buffer_stays_until_its_frame_is_sent() {
        let mut buffers = Buffers::new(1 << 20);
        let buffer = buffers.allocate(1, 0).unwrap();
        buffers.pin(buffer);
        buffers.release(buffer);
        assert_ne!(buffers.allocate(1, 0), Some(buffer));
        buffers.unpin(buffer);
        assert_eq!(buffers.allocate(1, 0), Some(buffer));
    }

    #[test]
    fn copies() {
        let mut buffers = Buffers::new(1 << 20);
        let (a, b) = (buffers.allocate(10, 0).unwrap(), buffers.allocate(10, 0).unwrap());
        buffers.bytes_mut(range(a, 2, 3)).copy_from_slice(b"abc");
        buffers.copy(range(a, 2, 3), range(b, 5, 3));
        assert_eq!(buffers.bytes(range(b, 5, 3)), b"abc");
    }
}
