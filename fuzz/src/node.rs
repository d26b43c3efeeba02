//! An engine whose peers, disks, frontends and manager are an input.
//!
//! The input decides what comes and in which order; what comes is of the right type, and keeps to what a
//! driver guarantees: an I/O completes once, a buffer belongs to one at a time, nothing is given while
//! actions are left. What the engine wants is checked: see [`Rig::carry_out`].

use crate::choices::Choices;
use crate::image::{SLICE_BYTES, empty};
use crate::maps;
use mirror_net::engine::action::{
    Action, Body, BufferId, BufferRange, Io, OpKey, Request, RequestKind, RequestToken,
};
use mirror_net::engine::{Engine, LocalDisk, Me, TICK};
use mirror_net::format::alloc::Allocator;
use mirror_net::ids::{
    AttachId, DeviceId, DiskId, ExporterSession, LossGeneration, MapVersion, NodeId, ProcessId, SliceEpoch,
};
use mirror_net::map::DistributionMap;
use mirror_net::region::digest::{COARSE_BYTES, DIGEST_BYTES, Digest, FINE_BYTES};
use mirror_net::wire::header::{FLAG_FINE, Header, Kind, PIECE_BYTES_MAX, Trailer};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Bytes of a frame's buffer, and of a request's.
const BUFFER_BYTES: u32 = PIECE_BYTES_MAX;
/// Requests and frames under way, at most: more teaches nothing.
const UNDER_WAY_MAX: usize = 64;
/// Buffers that the engine copies through, for ever.
const COPY_BUFFERS: [BufferId; 2] = [BufferId(u32::MAX), BufferId(u32::MAX - 1)];

const KINDS: [Kind; 22] = [
    Kind::Write,
    Kind::Zero,
    Kind::Discard,
    Kind::Flush,
    Kind::Unite,
    Kind::Compare,
    Kind::Clear,
    Kind::Fetch,
    Kind::Masks,
    Kind::Digests,
    Kind::ForwardRead,
    Kind::ForwardWrite,
    Kind::ForwardZero,
    Kind::ForwardDiscard,
    Kind::ForwardFlush,
    Kind::Ack,
    Kind::Reply,
    Kind::Adopted,
    Kind::Attached,
    Kind::Ping,
    Kind::Pong,
    Kind::Open,
];

/// A message of the engine's that waits for an answer.
#[derive(Clone, Copy)]
struct Asked {
    peer: NodeId,
    header: Header,
    /// How long the data is that the answer brings, if it brings any.
    reads: u32,
}

/// An engine and everything around it.
pub struct Rig {
    engine: Engine,
    now: u64,
    /// The newest map that was made, and all before it.
    maps: Vec<DistributionMap>,
    /// Sessions that the input opened, the present one last.
    sessions: HashMap<NodeId, Vec<u64>>,
    next_session: u64,
    next_sequence: u64,
    asked: Vec<Asked>,
    /// I/O of the engine's that has not completed, with the buffer that it uses.
    ios: Vec<(Io, Option<BufferRange>)>,
    /// Digests that the engine wants, in that order.
    digests: Vec<(OpKey, BufferRange)>,
    /// What this node's disks hold, as digests are made of it.
    content: u8,
    /// Requests that have not completed, with their buffers.
    requests: BTreeMap<u64, Option<BufferId>>,
    next_token: u64,
    /// Buffers of frames that the engine has not given back.
    frames: HashSet<BufferId>,
    /// Buffers that were handed to whoever sends them.
    leaving: HashSet<BufferId>,
    next_buffer: u32,
}

fn local_disk(node: u16) -> LocalDisk {
    let opened = empty(node).open().expect("it is formatted");
    LocalDisk {
        id: DiskId(node.into()),
        attach: AttachId(node.into()),
        allocator: Allocator::new(&opened.superblock, []),
        journal: opened.journal,
    }
}

/// Digests of so many blocks that hold `content`: few enough that those of two copies are often equal.
fn digests(content: u8, blocks: u32) -> Vec<Digest> {
    (0..blocks).map(|block| [content >> (block % 8) & 1; DIGEST_BYTES]).collect()
}

impl Rig {
    /// That node of the small map, with nothing adopted yet.
    pub fn new(node: u16) -> Self {
        let me = Me { node: NodeId(node), process: ProcessId(node.into()) };
        let mut engine = Engine::new(me, SLICE_BYTES, vec![local_disk(node)], 0);
        engine.set_exporter_session(ExporterSession(1));
        engine.add_copy_buffers(COPY_BUFFERS);
        Self {
            engine,
            now: 0,
            maps: vec![maps::small()],
            sessions: HashMap::new(),
            next_session: 1,
            next_sequence: 1,
            asked: Vec::new(),
            ios: Vec::new(),
            digests: Vec::new(),
            content: 0,
            requests: BTreeMap::new(),
            next_token: 1,
            frames: HashSet::new(),
            leaving: HashSet::new(),
            next_buffer: 1,
        }
    }

    /// The first map adopted, sessions open, waits over: what most inputs should begin with.
    pub fn settle_in(&mut self) {
        self.adopt(self.maps[0].clone());
        self.complete_all();
        self.pass(2_000_000_000);
        for node in 1..=maps::NODES {
            self.open(NodeId(node), node.into(), MapVersion(1));
        }
        self.complete_all();
        self.answer_pings();
    }

    /// Does what the input says, to its end.
    pub fn play(&mut self, choices: &mut Choices<'_>) {
        while !choices.is_empty() {
            self.step(choices);
        }
        // Whatever was going on, the node goes on living: I/O ends, time passes, and the lanes go.
        self.complete_all();
        for _ in 0..30 {
            self.pass(TICK);
            self.complete_all();
        }
        for node in (1..=maps::NODES).map(NodeId) {
            let session = self.session(node);
            self.engine.handle_lane_down(self.now, node, session, "the end");
            self.carry_out();
        }
        self.complete_all();
        let _ = (self.engine.waiting(), self.engine.session_reports());
        let pending: usize = (0..6).map(|id| self.engine.pending_requests(DeviceId(id))).sum();
        assert_eq!(pending, self.requests.len(), "requests that nobody knows of any more");
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        let node = NodeId(choices.below(u32::from(maps::NODES) + 2) as u16);
        match choices.below(21) {
            0..=3 => self.request(choices),
            4..=7 => self.frame(choices, node),
            8..=10 => self.answer(choices),
            11..=13 => self.complete(choices),
            14 => self.pass(u64::from(choices.word()) * 100_000),
            15 => self.change_map(choices),
            16 => {
                let process = if choices.one_in(4) { 9 } else { node.0.into() };
                let adopted = MapVersion(choices.below(self.maps.len() as u32 + 3).into());
                self.open(node, process, adopted);
            }
            17 => {
                let session = if choices.one_in(4) { choices.long() } else { self.session(node) };
                self.engine.handle_lane_down(self.now, node, session, "reset");
                self.carry_out();
            }
            18 => {
                self.answer_pings();
                self.complete_all();
            }
            19 => self.content = choices.byte(),
            _ => {
                let device = DeviceId(choices.below(6));
                let (offset, length) = (u64::from(choices.word()) << 9, u64::from(choices.word()) << 9);
                let total: u64 =
                    self.engine.extents(self.now, device, offset, length).map(|extent| extent.length).sum();
                assert_eq!(total, length);
            }
        }
    }

    fn session(&self, node: NodeId) -> u64 {
        self.sessions.get(&node).and_then(|sessions| sessions.last()).copied().unwrap_or(0)
    }

    fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        self.engine.handle_tick(self.now);
        self.carry_out();
    }

    fn adopt(&mut self, map: DistributionMap) {
        // A map may be refused: no slot, another cluster.
        let _ = self.engine.handle_map(self.now, Arc::new(map));
        self.carry_out();
    }

    fn change_map(&mut self, choices: &mut Choices<'_>) {
        if choices.one_in(8) {
            // An older one once more.
            let old = self.maps[choices.below(self.maps.len() as u32) as usize].clone();
            return self.adopt(old);
        }
        let newest = self.maps.last().expect("there is a first");
        let batch: Vec<_> = (0..=choices.below(2)).map(|_| maps::verb(choices)).collect();
        if let Ok(Some(mut next)) = newest.apply(&batch) {
            // Versions that this node never sees.
            next.version.0 += u64::from(choices.below(2));
            self.maps.push(next.clone());
            self.adopt(next);
        }
    }

    /// A lane, and the peer's first message on it.
    fn open(&mut self, node: NodeId, process: u64, adopted: MapVersion) {
        let session = self.next_session;
        self.next_session += 1;
        self.sessions.entry(node).or_default().push(session);
        self.engine.handle_lane_up(self.now, node, session, ProcessId(process));
        self.carry_out();
        let disk = u64::from(node.0);
        let body: Vec<u8> =
            [process, adopted.0, disk, disk].iter().flat_map(|word| word.to_le_bytes()).collect();
        let header = Header { session, sequence: 1, ..Header::new(Kind::Open) };
        self.engine.handle_frame(self.now, node, &header, None, &body, None);
        self.carry_out();
    }

    fn request(&mut self, choices: &mut Choices<'_>) {
        if self.requests.len() >= UNDER_WAY_MAX {
            return;
        }
        let fua = choices.one_in(4);
        let kind = choices.of(&[
            RequestKind::Write { fua },
            RequestKind::Read,
            RequestKind::Flush,
            RequestKind::WriteZeroes { fua },
            RequestKind::Discard,
        ]);
        let device = DeviceId(choices.of(&[1, 3, 4, 2, 5]));
        let (offset, length) = match kind {
            RequestKind::Flush => (0, 0),
            _ => (u64::from(choices.word()) << 8 & !511, u32::from(choices.of(&[8u16, 1, 32, 700])) << 9),
        };
        // Nobody keeps a frontend from asking for nonsense.
        let offset = if choices.one_in(32) { choices.long() } else { offset };
        let data = matches!(kind, RequestKind::Read | RequestKind::Write { .. });
        let buffer = data.then(|| BufferRange { buffer: self.buffer(), offset: 0, length });
        let token = self.next_token;
        self.next_token += 1;
        self.requests.insert(token, buffer.map(|range| range.buffer));
        let request = Request { token: RequestToken(token), device, kind, offset, length, buffer };
        self.engine.handle_request(self.now, &request);
        self.carry_out();
    }

    fn buffer(&mut self) -> BufferId {
        self.next_buffer += 1;
        BufferId(self.next_buffer)
    }

    /// A message that nobody asked for.
    fn frame(&mut self, choices: &mut Choices<'_>, node: NodeId) {
        if self.frames.len() >= UNDER_WAY_MAX {
            return;
        }
        let kind = choices.of(&KINDS);
        let newest = self.maps.last().map_or(1, |map| map.version.0);
        let device = DeviceId(choices.of(&[1, 2, 4, 3, 7]));
        let slice = choices.below(maps::SLICES + 1);
        let map = self.maps.last().and_then(|map| map.device(device));
        let span = map.and_then(|device| device.span(mirror_net::ids::SliceIndex(slice)));
        let mut header = Header {
            flags: choices.below(6) as u8,
            session: self.session(node),
            sequence: self.next_sequence,
            slice_epoch: span.map_or(SliceEpoch(newest), |span| span.epoch),
            device: device.0,
            slice,
            offset: u32::from(choices.word()) << 9 & (SLICE_BYTES - 1),
            length: choices.of(&[8u32, 1, 32, 64]) << 9,
            loss: LossGeneration(choices.below(3)),
            ..Header::new(kind)
        };
        self.next_sequence += 1;
        if choices.one_in(4) {
            // Something is off.
            match choices.below(7) {
                0 => header.session = choices.long(),
                1 => header.sequence = choices.long(),
                2 => header.slice_epoch = SliceEpoch(choices.below(newest as u32 + 3).into()),
                3 => header.offset = choices.long() as u32,
                4 => header.length = choices.long() as u32,
                5 => header.slice = choices.long() as u32,
                _ => header.slice_epoch = SliceEpoch(choices.long()),
            }
        }
        let trailer = kind.is_forwarded().then(|| Trailer {
            claim: map.map_or(1, |device| device.claim.generation.0) + u64::from(choices.below(2)),
            exporter_session: choices.below(3).into(),
            exporter_sequence: header.sequence,
            origin: node.0,
        });
        // As a lane's parser gives them: only these kinds have a buffer, and it holds what it says.
        let carries = match kind {
            Kind::Write | Kind::ForwardWrite => true,
            Kind::Reply | Kind::Ack => choices.byte() & 1 == 1,
            _ => false,
        };
        let small: &[u8] = match kind {
            Kind::Open => choices.bytes(40),
            Kind::Masks => choices.bytes(16),
            Kind::Digests => {
                let count = usize::from(choices.byte());
                choices.bytes(count)
            }
            Kind::Unite | Kind::Clear => {
                let count = if choices.one_in(16) { 9 } else { 8 };
                choices.bytes(count)
            }
            _ => &[],
        };
        if kind == Kind::Unite && !choices.one_in(16) {
            header.length = 0;
        }
        let tail = if trailer.is_some() { 32 } else { 0 };
        let length = if choices.one_in(16) { choices.word().into() } else { header.length };
        let own = if carries { length.min(PIECE_BYTES_MAX) } else { small.len() as u32 };
        header.body_bytes = own + tail;
        let room = kind.asks_for_data();
        if room && header.length > PIECE_BYTES_MAX {
            return;
        }
        self.deliver(node, &header, trailer, small, carries || room);
    }

    fn deliver(
        &mut self,
        node: NodeId,
        header: &Header,
        trailer: Option<Trailer>,
        small: &[u8],
        has_buffer: bool,
    ) {
        let buffer = has_buffer.then(|| self.buffer());
        self.frames.extend(buffer);
        self.engine.handle_frame(self.now, node, header, trailer, small, buffer);
        self.carry_out();
    }

    /// The answer to something that the engine sent, on whatever session there is now.
    fn answer(&mut self, choices: &mut Choices<'_>) {
        if self.asked.is_empty() {
            return;
        }
        let index = choices.below(self.asked.len() as u32) as usize;
        // Most are answered once.
        let asked = if choices.one_in(16) { self.asked[index] } else { self.asked.swap_remove(index) };
        let status = if choices.one_in(4) { choices.below(6) as u8 } else { 0 };
        let brings = if choices.one_in(16) { 0 } else { asked.reads };
        let (kind, small) = match asked.header.kind {
            Kind::Unite => (Kind::Masks, choices.array::<16>().to_vec()),
            Kind::Compare => {
                let fine = asked.header.flags & FLAG_FINE != 0;
                let block_bytes = if fine { FINE_BYTES } else { COARSE_BYTES };
                let blocks = asked.header.length.div_ceil(block_bytes);
                (Kind::Digests, digests(choices.byte(), blocks).as_flattened().to_vec())
            }
            kind if kind.is_forwarded() => (Kind::Reply, Vec::new()),
            _ => (Kind::Ack, Vec::new()),
        };
        // A failure is told without details.
        let small = if status == 0 { small } else { Vec::new() };
        let header = Header {
            flags: status,
            session: self.session(asked.peer),
            sequence: asked.header.sequence,
            slice_epoch: asked.header.slice_epoch,
            loss: asked.header.loss,
            length: asked.header.length,
            body_bytes: brings + small.len() as u32,
            ..Header::new(kind)
        };
        self.deliver(asked.peer, &header, None, &small, brings > 0);
    }

    fn answer_pings(&mut self) {
        let pings: Vec<Asked> = self.asked.extract_if(.., |asked| asked.header.kind == Kind::Ping).collect();
        for ping in pings {
            let header = Header {
                session: ping.header.session,
                sequence: ping.header.sequence,
                slice_epoch: ping.header.slice_epoch,
                ..Header::new(Kind::Pong)
            };
            self.engine.handle_frame(self.now, ping.peer, &header, None, &[], None);
            self.carry_out();
        }
    }

    /// One I/O of the engine's ends.
    fn complete(&mut self, choices: &mut Choices<'_>) {
        if self.ios.is_empty() {
            return;
        }
        let index = choices.below(self.ios.len() as u32) as usize;
        let failed = choices.one_in(64);
        let (io, _) = self.ios.remove(index);
        self.engine.handle_io(self.now, io, if failed { Err("worn out".into()) } else { Ok(()) });
        self.carry_out();
    }

    fn complete_all(&mut self) {
        while !self.ios.is_empty() {
            let (io, _) = self.ios.remove(0);
            self.engine.handle_io(self.now, io, Ok(()));
            self.carry_out();
        }
    }

    /// Does what the engine wants. Checked: a request completes once, and not before its I/O; a buffer is
    /// given back once and not used after; nothing leaves its slot, its buffer or its session.
    fn carry_out(&mut self) {
        loop {
            while let Some(action) = self.engine.poll_action() {
                self.act(action);
            }
            if self.digests.is_empty() {
                break;
            }
            let (op, buffer) = self.digests.remove(0);
            let computed = digests(self.content, buffer.length.div_ceil(FINE_BYTES));
            self.engine.handle_digests(self.now, op, computed);
        }
        let _ = self.engine.take_refused_map();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Read { io, offset, buffer, .. } | Action::Write { io, offset, buffer, .. } => {
                assert!(u64::from(offset) + u64::from(buffer.length) <= SLICE_BYTES.into(), "{io:?}");
                self.check_buffer(buffer);
                self.ios.push((io, Some(buffer)));
            }
            Action::Zero { io, offset, length, .. } | Action::Punch { io, offset, length, .. } => {
                assert!(u64::from(offset) + u64::from(length) <= SLICE_BYTES.into(), "{io:?}");
                assert!(length > 0, "{io:?} of nothing");
                self.ios.push((io, None));
            }
            Action::Flush { io, .. } | Action::Metadata { io, .. } => {
                assert!(!self.ios.iter().any(|(other, _)| *other == io), "{io:?} twice");
                self.ios.push((io, None));
            }
            Action::Send { peer, session, header, body, .. } => {
                assert_eq!(header.session, session);
                let known = self.sessions.get(&peer).is_some_and(|all| all.contains(&session));
                assert!(known, "a message on a lane that never was");
                self.sent(peer, header, &body);
            }
            Action::CloseLane { .. } => {}
            Action::FillZero { buffer } => self.check_buffer(buffer),
            Action::Copy { from, to } => {
                assert_eq!(from.length, to.length);
                self.check_buffer(from);
                self.check_buffer(to);
            }
            Action::Release { buffer } => self.give_back(buffer),
            Action::Complete { token, .. } => {
                let buffer = self.requests.remove(&token.0).expect("it completes once");
                if let Some(buffer) = buffer {
                    self.check_unused(buffer);
                }
            }
            Action::Digest { op, buffer } => {
                self.check_buffer(buffer);
                self.digests.push((op, buffer));
            }
            Action::Report(_) => {}
        }
    }

    fn sent(&mut self, peer: NodeId, header: Header, body: &Body) {
        match body {
            Body::Buffer(range) => self.check_buffer(*range),
            Body::Release(range) => {
                self.check_buffer(*range);
                self.give_back(range.buffer);
                self.leaving.insert(range.buffer);
            }
            Body::None | Body::Bytes(_) => {}
        }
        let answered = match header.kind {
            Kind::Write | Kind::Zero | Kind::Discard | Kind::Flush | Kind::Ping => true,
            Kind::Unite | Kind::Compare | Kind::Clear | Kind::Fetch => true,
            kind => kind.is_forwarded(),
        };
        if answered && self.asked.len() < 4 * UNDER_WAY_MAX {
            let reads = matches!(header.kind, Kind::ForwardRead | Kind::Fetch);
            self.asked.push(Asked { peer, header, reads: if reads { header.length } else { 0 } });
        }
    }

    /// The engine may use it: it is part of a request or of a frame that it has.
    fn check_buffer(&self, range: BufferRange) {
        assert!(u64::from(range.offset) + u64::from(range.length) <= BUFFER_BYTES.into(), "{range:?}");
        let asked = self.requests.values().any(|buffer| *buffer == Some(range.buffer));
        let lent = self.frames.contains(&range.buffer) || COPY_BUFFERS.contains(&range.buffer);
        assert!(asked || lent, "{range:?} is not the engine's any more");
    }

    fn check_unused(&self, buffer: BufferId) {
        let user = self.ios.iter().find(|(_, range)| range.is_some_and(|range| range.buffer == buffer));
        assert!(user.is_none(), "{buffer:?} is given back while {user:?} uses it");
    }

    fn give_back(&mut self, buffer: BufferId) {
        assert!(self.frames.remove(&buffer), "{buffer:?} is given back twice, or was never lent");
        self.check_unused(buffer);
    }
}
