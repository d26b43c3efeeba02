//! One engine on a disk in memory; its peers are played by the test, frame by frame.

use super::action::{Action, Body, BufferId, BufferRange, Io, Report, Request, RequestKind, RequestToken};
use super::{Engine, LocalDisk, Me, Nanos};
use crate::format::alloc::Allocator;
use crate::format::alloc::Segment;
use crate::format::create::{FormatOptions, format};
use crate::format::{Geometry, MetadataIo, Plan, PlanStep, SlotOrder, ZoneProfile, open};
use crate::ids::{
    AttachId, ClaimGeneration, ClusterId, DeviceId, DiskId, ExporterSession, Incarnation, LossGeneration,
    MapVersion, NodeId, ProcessId, SliceEpoch, SliceIndex, SlotIndex,
};
use crate::map::{
    Claim, Commit, Device, Disk, DistributionMap, Node, OnNoQuorum, Replica, ReplicaState, SegmentSlots, Span,
};
use crate::wire::header::{Header, Kind, Status, Trailer};
use std::sync::Arc;

pub(super) const SLICE: u32 = 256 << 10;
const DISK_BYTES: u64 = 4 << 20;
pub(super) const DEVICE: DeviceId = DeviceId(1);

/// A map of `nodes` nodes with a disk each, and one device of one slice with copies on the first
/// `copies`, exported by `exporter`.
pub(super) fn map(nodes: u16, copies: u16, exporter: u16) -> DistributionMap {
    let incarnation =
        |node: u16| Incarnation { attach: AttachId(u64::from(node)), process: ProcessId(u64::from(node)) };
    let replica = |node: u16| Replica {
        disk: DiskId(u32::from(node)),
        segment: if node == 1 { Segment::Primary } else { Segment::Secondary },
        added: MapVersion(1),
        state: ReplicaState::InSync,
        incarnation: incarnation(node),
    };
    DistributionMap {
        cluster: ClusterId::default(),
        cluster_name: "test".into(),
        version: MapVersion(1),
        slice_bytes: SLICE,
        nodes: (1..=nodes)
            .map(|id| Node {
                id: NodeId(id),
                name: format!("n{id}"),
                address: String::new(),
                power: None,
                switch: None,
            })
            .collect(),
        disks: (1..=nodes)
            .map(|id| Disk {
                id: DiskId(u32::from(id)),
                node: NodeId(id),
                name: "d".into(),
                slots: SegmentSlots { primary: 4, secondary: 4, unmirrored: 0 },
                block_bytes: 512,
                spare: false,
                failed: None,
            })
            .collect(),
        devices: vec![Device {
            id: DEVICE,
            name: "dev".into(),
            slices: 1,
            block_bytes: 512,
            copies: copies as u8,
            commit: Commit::Immediate,
            on_no_quorum: OnNoQuorum::Wait,
            claim: Claim { node: NodeId(exporter), generation: ClaimGeneration(1), since: MapVersion(1) },
            spans: vec![Span {
                first: SliceIndex(0),
                count: 1,
                epoch: SliceEpoch(1),
                loss: LossGeneration(0),
                primary_since: MapVersion(0),
                replicas: (1..=copies).map(replica).collect(),
            }],
        }],
        ..DistributionMap::empty()
    }
}

/// The next version of a map, with its only span changed.
pub(super) fn next(map: &DistributionMap, change: impl FnOnce(&mut Span)) -> DistributionMap {
    let mut next = map.clone();
    next.version.0 += 1;
    let span = &mut next.devices[0].spans[0];
    change(span);
    span.epoch = SliceEpoch(next.version.0);
    next
}

/// The next version, with the claim moved.
pub(super) fn claimed(map: &DistributionMap, node: u16) -> DistributionMap {
    let mut next = map.clone();
    next.version.0 += 1;
    let claim = &mut next.devices[0].claim;
    *claim = Claim {
        node: NodeId(node),
        generation: ClaimGeneration(claim.generation.0 + 1),
        since: next.version,
    };
    next
}

/// A frame that the engine sent.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub to: u16,
    pub header: Header,
    /// A body that is not data.
    pub body: Vec<u8>,
}

/// An engine, its disk, and what it wants.
pub(super) struct Rig {
    pub engine: Engine,
    pub now: Nanos,
    pub sent: Vec<Sent>,
    /// The exporter sessions of what was forwarded.
    pub trailers: Vec<u64>,
    pub done: Vec<(u64, Result<(), super::action::RequestError>)>,
    pub reports: Vec<Report>,
    pub released: Vec<BufferId>,
    pub closed: Vec<u16>,
    /// Data I/O that the test completes by hand, if `hold` is set.
    pub held: Vec<Io>,
    pub hold: bool,
    pub fail_metadata: bool,
    /// Nothing is written into tables or logs.
    pub hold_metadata: bool,
    pub fail_flush: bool,
    /// Peers answer at once that nothing of theirs is dirty or readable.
    pub clean_peers: bool,
    session: u64,
    peer_sequence: u64,
    next_token: u64,
    next_buffer: u32,
}

pub(super) fn formatted(disk: u32, known_zero: bool) -> LocalDisk {
    let geometry = Geometry::with_log_blocks(DISK_BYTES, SLICE, 512, 16).unwrap();
    let options = FormatOptions {
        cluster: ClusterId::default(),
        disk: DiskId(disk),
        node: NodeId(disk as u16),
        format: uuid::Uuid::from_u128(1),
        node_name: "n".into(),
        disk_name: "d".into(),
        segments: SegmentSlots {
            primary: geometry.slots - geometry.slots / 2,
            secondary: geometry.slots / 2,
            unmirrored: 0,
        },
        geometry,
        slot_order: SlotOrder::Address,
        zone_profile: ZoneProfile::default(),
        known_zero,
    };
    let mut bytes = vec![0u8; DISK_BYTES as usize];
    let run = |bytes: &mut [u8], plan: Plan| {
        for step in plan {
            if let PlanStep::Write { offset, .. } = &step {
                let at = *offset as usize;
                bytes[at..at + step.bytes().len()].copy_from_slice(step.bytes());
            }
        }
    };
    let (_, plan) = format(options).unwrap();
    run(&mut bytes, plan);
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    };
    let opened = open(&mut read, DISK_BYTES).unwrap();
    let used = (0..opened.journal.slots()).map(SlotIndex);
    let used: Vec<_> = used.filter(|slot| opened.journal.slot(*slot).assignment.is_some()).collect();
    LocalDisk {
        id: DiskId(disk),
        attach: AttachId(u64::from(disk)),
        allocator: Allocator::new(&opened.superblock, used),
        journal: opened.journal,
    }
}

impl Rig {
    /// Node `me` with that map adopted, every wait after a start over, and a session with each peer.
    pub fn new(me: u16, map: &DistributionMap) -> Self {
        Self::on(me, map, true)
    }

    /// The same on a disk that is full of zeros, or of anything.
    pub fn on(me: u16, map: &DistributionMap, known_zero: bool) -> Self {
        let who = Me { node: NodeId(me), process: ProcessId(u64::from(me)) };
        let mut rig = Self {
            engine: Engine::new(who, SLICE, vec![formatted(u32::from(me), known_zero)], 0),
            now: 0,
            sent: Vec::new(),
            trailers: Vec::new(),
            done: Vec::new(),
            reports: Vec::new(),
            released: Vec::new(),
            closed: Vec::new(),
            held: Vec::new(),
            hold: false,
            fail_metadata: false,
            hold_metadata: false,
            fail_flush: false,
            clean_peers: true,
            session: 100,
            peer_sequence: 1,
            next_token: 1,
            next_buffer: 1,
        };
        rig.engine.add_copy_buffers([BufferId(u32::MAX)]);
        rig.engine.set_exporter_session(ExporterSession(1));
        rig.adopt(map);
        rig.now = 2_000_000_000;
        rig.tick();
        for peer in map.nodes.iter().map(|node| node.id.0).filter(|peer| *peer != me) {
            rig.open(peer, map.version);
        }
        rig.sent.clear();
        rig.reports.clear();
        rig
    }

    pub fn tick(&mut self) {
        self.engine.handle_tick(self.now);
        self.run();
    }

    /// Time goes on in ticks; the peers answer every ping meanwhile.
    pub fn wait(&mut self, ms: u64, peers: &[u16]) {
        let end = self.now + ms * 1_000_000;
        while self.now < end {
            self.now += super::TICK;
            self.tick();
            for peer in peers {
                self.pong(*peer);
            }
        }
    }

    /// Answers the pings sent to that peer.
    pub fn pong(&mut self, peer: u16) {
        let pings: Vec<Sent> =
            self.sent.extract_if(.., |sent| sent.to == peer && sent.header.kind == Kind::Ping).collect();
        for ping in pings {
            let pong = Header {
                sequence: ping.header.sequence,
                slice_epoch: ping.header.slice_epoch,
                ..Header::new(Kind::Pong)
            };
            self.frame(peer, pong, None);
        }
    }

    pub fn adopt(&mut self, map: &DistributionMap) {
        self.engine.handle_map(self.now, Arc::new(map.clone())).unwrap();
        self.run();
    }

    /// A new session with that peer, whose process and disk are as in the map.
    pub fn open(&mut self, peer: u16, adopted: MapVersion) {
        self.open_as(peer, adopted, u64::from(peer), u64::from(peer));
    }

    pub fn open_as(&mut self, peer: u16, adopted: MapVersion, process: u64, attach: u64) {
        self.session += 100;
        let session = self.session + u64::from(peer);
        self.engine.handle_lane_up(self.now, NodeId(peer), session, ProcessId(process));
        let words = [process, adopted.0, u64::from(peer), attach];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.run();
        let open = Header { session, sequence: 1, ..Header::new(Kind::Open) };
        self.engine.handle_frame(self.now, NodeId(peer), &open, None, &body, None);
        self.run();
        self.pong(peer);
    }

    pub fn lane_down(&mut self, peer: u16) {
        let session = self.session_of(peer);
        self.engine.handle_lane_down(self.now, NodeId(peer), session, "reset");
        self.run();
    }

    pub fn session_of(&self, peer: u16) -> u64 {
        let index = self.engine.peer_index(NodeId(peer)).unwrap();
        self.engine.peers[index].session_id().unwrap_or(0)
    }

    /// A frame from that peer on its present session; one that needs an answer gets a sequence.
    pub fn frame(&mut self, peer: u16, header: Header, trailer: Option<Trailer>) -> u64 {
        let mut header = Header { session: self.session_of(peer), ..header };
        if header.sequence == 0 {
            self.peer_sequence += 1;
            header.sequence = self.peer_sequence;
        }
        let stored = matches!(header.kind, Kind::Write | Kind::ForwardWrite);
        let data = stored || matches!(header.kind, Kind::ForwardRead | Kind::Fetch | Kind::Compare);
        if stored {
            header.body_bytes = header.length + if trailer.is_some() { 32 } else { 0 };
        }
        let buffer = data.then(|| self.buffer());
        self.engine.handle_frame(self.now, NodeId(peer), &header, trailer, &[], buffer);
        self.run();
        header.sequence
    }

    /// A frame with a small body, on that peer's present session.
    pub fn frame_with(&mut self, peer: u16, header: Header, body: &[u8]) {
        let header = Header { session: self.session_of(peer), ..header };
        self.engine.handle_frame(self.now, NodeId(peer), &header, None, body, None);
        self.run();
    }

    pub fn adopted(&mut self, peer: u16, version: u64) {
        self.frame(peer, Header { slice_epoch: SliceEpoch(version), ..Header::new(Kind::Adopted) }, None);
    }

    /// Answers a frame.
    pub fn answer(&mut self, sent: &Sent, kind: Kind, status: Status) {
        let header = Header {
            flags: status as u8,
            sequence: sent.header.sequence,
            slice_epoch: sent.header.slice_epoch,
            loss: sent.header.loss,
            ..Header::new(kind)
        };
        self.frame(sent.to, header, None);
    }

    /// Answers a `Fetch` with so many bytes, in that buffer.
    pub fn give(&mut self, fetch: &Sent, bytes: u32, buffer: BufferId) {
        let answer = Header {
            session: self.session_of(fetch.to),
            sequence: fetch.header.sequence,
            slice_epoch: fetch.header.slice_epoch,
            body_bytes: bytes,
            ..Header::new(Kind::Ack)
        };
        self.engine.handle_frame(self.now, NodeId(fetch.to), &answer, None, &[], Some(buffer));
        self.run();
    }

    pub fn ack(&mut self, sent: &Sent) {
        self.answer(sent, Kind::Ack, Status::Done);
    }

    /// Frames of that kind that the engine sent and the test has not taken.
    pub fn take(&mut self, kind: Kind) -> Vec<Sent> {
        self.sent.extract_if(.., |sent| sent.header.kind == kind).collect()
    }

    fn buffer(&mut self) -> BufferId {
        self.next_buffer += 1;
        BufferId(self.next_buffer)
    }

    pub fn request(&mut self, kind: RequestKind, offset: u64, length: u32) -> u64 {
        self.next_token += 1;
        let token = self.next_token;
        let data = matches!(kind, RequestKind::Read | RequestKind::Write { .. });
        let buffer = data.then(|| BufferRange { buffer: self.buffer(), offset: 0, length });
        let request = Request { token: RequestToken(token), device: DEVICE, kind, offset, length, buffer };
        self.engine.handle_request(self.now, &request);
        self.run();
        token
    }

    pub fn write(&mut self, offset: u64, length: u32) -> u64 {
        self.request(RequestKind::Write { fua: false }, offset, length)
    }

    /// A write that this node and its only partner have.
    pub fn write_to_both(&mut self, offset: u64, length: u32) {
        let write = self.write(offset, length);
        let leg = self.take(Kind::Write);
        self.ack(&leg[0]);
        assert_eq!(self.result(write), Some(Ok(())));
    }

    pub fn flush(&mut self) -> u64 {
        self.request(RequestKind::Flush, 0, 0)
    }

    pub fn result(&self, token: u64) -> Option<Result<(), super::action::RequestError>> {
        self.done.iter().find(|(done, _)| *done == token).map(|(_, result)| *result)
    }

    /// Completes what was held.
    pub fn complete_io(&mut self, result: Result<(), String>) {
        for io in std::mem::take(&mut self.held) {
            self.engine.handle_io(self.now, io, result.clone());
            self.run();
        }
    }

    /// Carries out what the engine wants.
    pub fn run(&mut self) {
        let mut io = Vec::new();
        let mut digests = Vec::new();
        loop {
            while let Some(action) = self.engine.poll_action() {
                match action {
                    Action::Read { io: id, .. }
                    | Action::Write { io: id, .. }
                    | Action::Zero { io: id, .. }
                    | Action::Punch { io: id, .. } => match self.hold {
                        true => self.held.push(id),
                        false => io.push((id, Ok(()))),
                    },
                    Action::Flush { io: id, .. } => {
                        io.push((id, if self.fail_flush { Err("flush".into()) } else { Ok(()) }));
                    }
                    Action::Metadata { io: id, .. } if self.hold_metadata => self.held.push(id),
                    Action::Metadata { io: id, work, .. } => {
                        let failed = self.fail_metadata && matches!(work, MetadataIo::Write { .. });
                        io.push((id, if failed { Err("metadata".into()) } else { Ok(()) }));
                    }
                    Action::Send { peer, header, body, trailer, .. } => {
                        self.trailers.extend(trailer.map(|trailer| trailer.exporter_session));
                        let body = if let Body::Bytes(bytes) = body { bytes.to_vec() } else { Vec::new() };
                        self.sent.push(Sent { to: peer.0, header, body });
                    }
                    Action::CloseLane { peer, .. } => self.closed.push(peer.0),
                    Action::FillZero { .. } | Action::Copy { .. } => {}
                    Action::Digest { op, .. } => digests.push(op),
                    Action::Release { buffer } => self.released.push(buffer),
                    Action::Complete { token, result } => self.done.push((token.0, result)),
                    Action::Report(report) => self.reports.push(report),
                }
            }
            if self.clean_peers && io.is_empty() && digests.is_empty() {
                for unite in self.take(Kind::Unite) {
                    let answer = Header {
                        session: self.session_of(unite.to),
                        sequence: unite.header.sequence,
                        ..Header::new(Kind::Masks)
                    };
                    self.engine.handle_frame(self.now, NodeId(unite.to), &answer, None, &[0; 16], None);
                }
            }
            if let Some(op) = digests.pop() {
                self.engine.handle_digests(self.now, op, Vec::new());
                continue;
            }
            if io.is_empty() {
                if self.engine.actions.is_empty() {
                    return;
                }
                continue;
            }
            let (id, result) = io.remove(0);
            self.engine.handle_io(self.now, id, result);
        }
    }
}
