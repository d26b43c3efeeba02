//! Nothing is allocated for a request on its way through both nodes: two real I/O threads, an NBD client, and an
//! allocator that counts.

use mirror_net::engine::{Engine, LocalDisk, Me};
use mirror_net::format::alloc::{Allocator, Segment};
use mirror_net::format::create::{FormatOptions, format};
use mirror_net::format::{Geometry, Plan, PlanStep, SlotOrder, ZoneProfile, open};
use mirror_net::ids::{
    AttachId, ClaimGeneration, ClusterId, DeviceId, DiskId, ExporterSession, Incarnation, LossGeneration,
    MapVersion, NodeId, ProcessId, SliceEpoch, SliceIndex,
};
use mirror_net::map::{
    Claim, Device, Disk, DistributionMap, Node, Replica, ReplicaState, SegmentSlots, Span,
};
use mirror_net::wire::handshake::ClusterKey;
use mirror_net::wire::header::CrcSeed;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use ublk_server::driver::command::{Command, Event, Handle, channel};
use ublk_server::driver::{IoThread, WireKeys, now};
use ublk_server::frontend::nbd::{ExportInfo, Session};
use ublk_server::ring::disk::DiskFile;

const SLICE: u32 = 256 << 10;
const DISK_BYTES: u64 = 4 << 20;
const DEVICE: DeviceId = DeviceId(1);
const BLOCK: u32 = 4096;
const DEPTH: u64 = 16;

/// Counts what is allocated by threads that asked for it.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: all of it is the system's allocator's work; counting touches no memory that is handed out.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Two nodes, and a device of one slice that the first exports.
fn map() -> DistributionMap {
    let slots = geometry().slots;
    let replica = |node: u16| Replica {
        disk: DiskId(u32::from(node)),
        segment: if node == 1 { Segment::Primary } else { Segment::Secondary },
        added: MapVersion(1),
        state: ReplicaState::InSync,
        incarnation: Incarnation { attach: AttachId(u64::from(node)), process: ProcessId(u64::from(node)) },
    };
    let node = |id: u16| Node {
        id: NodeId(id),
        name: format!("n{id}"),
        address: String::new(),
        power: None,
        switch: None,
    };
    let disk = |id: u16| Disk {
        id: DiskId(u32::from(id)),
        node: NodeId(id),
        name: "d".into(),
        slots: SegmentSlots { primary: slots - slots / 2, secondary: slots / 2, unmirrored: 0 },
        block_bytes: 512,
        spare: false,
        failed: None,
    };
    DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "test".into(),
        version: MapVersion(1),
        slice_bytes: SLICE,
        nodes: vec![node(1), node(2)],
        disks: vec![disk(1), disk(2)],
        devices: vec![Device {
            id: DEVICE,
            name: "dev".into(),
            slices: 1,
            block_bytes: 512,
            copies: 2,
            commit: Default::default(),
            on_no_quorum: Default::default(),
            claim: Claim { node: NodeId(1), generation: ClaimGeneration(1), since: MapVersion(1) },
            spans: vec![Span {
                first: SliceIndex(0),
                count: 1,
                epoch: SliceEpoch(1),
                loss: LossGeneration(0),
                primary_since: MapVersion(0),
                replicas: vec![replica(1), replica(2)],
            }],
        }],
        ..DistributionMap::empty()
    }
}

fn geometry() -> Geometry {
    Geometry::with_log_blocks(DISK_BYTES, SLICE, 512, 16).unwrap()
}

fn carry_out(file: &File, plan: Plan) {
    for step in plan {
        if let PlanStep::Write { offset, .. } = &step {
            file.write_all_at(step.bytes(), *offset).unwrap();
        }
    }
}

/// A formatted disk in a file without a name.
fn disk(node: u16) -> (LocalDisk, DiskFile) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let segments = map().disks[0].slots;
    let (_, plan) = format(FormatOptions {
        cluster: ClusterId::default(),
        disk: DiskId(u32::from(node)),
        node: NodeId(node),
        format: Default::default(),
        node_name: format!("n{node}"),
        disk_name: "d".into(),
        geometry: geometry(),
        segments,
        slot_order: SlotOrder::Address,
        zone_profile: ZoneProfile::default(),
        known_zero: true,
    })
    .unwrap();
    carry_out(&file, plan);
    let mut read = |offset: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, offset).unwrap();
        Ok(())
    };
    let opened = open(&mut read, DISK_BYTES).unwrap();
    carry_out(&file, opened.plan);
    let local = LocalDisk {
        id: DiskId(u32::from(node)),
        attach: AttachId(u64::from(node)),
        allocator: Allocator::new(&opened.superblock, Vec::new()),
        journal: opened.journal,
    };
    (local, DiskFile::new(file.into(), geometry(), true))
}

/// An I/O thread with the map, whose allocations count. The receiver keeps it from talking to nobody.
fn start(node: u16) -> (Handle, tokio::sync::mpsc::UnboundedReceiver<Event>) {
    let (local, file) = disk(node);
    let (handle, inbox) = channel().unwrap();
    let (events, received) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let me = Me { node: NodeId(node), process: ProcessId(u64::from(node)) };
        let engine = Engine::new(me, SLICE, vec![local], now());
        let keys = WireKeys {
            seed: CrcSeed::new(&ClusterId::default()),
            digests: ClusterKey::new([7; 32]).digest_key(),
        };
        let thread = IoThread::new(engine, vec![file], keys, inbox, events, 64 << 20).unwrap();
        COUNTED.set(true);
        thread.run();
    });
    handle.send(Command::Map(Arc::new(map())));
    handle.send(Command::ExporterSession(ExporterSession(1)));
    (handle, received)
}

/// A client that has one socket and keeps a fixed number of requests under way.
struct Client(UnixStream);

impl Client {
    fn ask(&mut self, write: bool, number: u64) {
        let block = number % u64::from(SLICE / BLOCK);
        let mut request = [0; 28 + BLOCK as usize];
        request[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        request[7] = u8::from(write);
        request[8..16].copy_from_slice(&number.to_be_bytes());
        request[16..24].copy_from_slice(&(block * u64::from(BLOCK)).to_be_bytes());
        request[24..28].copy_from_slice(&BLOCK.to_be_bytes());
        let length = if write { request.len() } else { 28 };
        self.0.write_all(&request[..length]).unwrap();
    }

    fn answer(&mut self, write: bool) {
        let mut reply = [0; 16 + BLOCK as usize];
        let length = if write { 16 } else { reply.len() };
        self.0.read_exact(&mut reply[..length]).unwrap();
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "an error, or no reply");
    }

    /// So many requests; what the two I/O threads allocated meanwhile.
    fn run(&mut self, write: bool, requests: u64) -> u64 {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for number in 0..requests + DEPTH {
            if number < requests {
                self.ask(write, number);
            }
            if number >= DEPTH {
                self.answer(write);
            }
        }
        ALLOCATIONS.load(Ordering::Relaxed) - before
    }
}

#[test]
fn a_request_allocates_nothing_on_either_node() {
    let (first, _events) = start(1);
    let (second, _more_events) = start(2);
    let (a, b) = UnixStream::pair().unwrap();
    for (node, peer, socket) in [(&first, 2, a), (&second, 1, b)] {
        node.send(Command::Lane {
            peer: NodeId(peer),
            session: 7,
            process: ProcessId(u64::from(peer)),
            socket: socket.into(),
        });
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let export = ExportInfo {
        name: "dev".into(),
        description: String::new(),
        size: u64::from(SLICE),
        block_size_min: 512,
        block_size_preferred: BLOCK,
        read_only: false,
        rotational: false,
        fast_zero: false,
    };
    let session = Session { export, structured: false, base_allocation: false };
    first.send(Command::NbdClient { device: DEVICE, socket: theirs.into(), session, unread: Vec::new() });
    let mut client = Client(ours);
    // Queues and tables grow to what they need.
    client.run(true, 2_000);
    client.run(false, 2_000);
    for write in [true, false] {
        // What is done by the clock, such as heartbeats, allocates a little: more of it in a batch that took long.
        let least = (0..5).map(|_| client.run(write, 2_000)).min().unwrap();
        assert!(least < 200, "{least} allocations for 2,000 requests, write: {write}");
    }
    first.send(Command::Stop);
    second.send(Command::Stop);
}
