//! The I/O thread: one io_uring, one engine, and everything that they connect.
//!
//! One turn: take what completed and give it to the engine, carry out what it wants, send what was
//! queued on the sockets, begin what the disks have to do, wait. Everything that became possible in one turn
//! goes out together, and to the partners first: theirs is the longer way.

pub mod command;
mod patience;
mod tokens;

use crate::frontend::Answer;
use crate::frontend::nbd::CONNECTIONS_MAX;
use crate::frontend::nbd::connection::{Connection, Wanted};
use crate::frontend::ublk::export::{Arrived, Export};
use crate::mirror::lane::Lane;
use crate::ring::buffers::{AlignedBlock, Buffers};
use crate::ring::disk::{DiskFile, DiskIo, DiskOutcome};
use crate::ring::stream::Sent;
use crate::ring::{Completion, Ring};
use command::{Command, DeviceReport, Event, Inbox, ThreadReport};
use io_uring::{opcode, types};
use mirror_net::engine::action::{Action, DiskIndex, Io, OpKey, Request, RequestError, RequestToken};
use mirror_net::engine::{Engine, Nanos};
use mirror_net::format::MetadataIo;
use mirror_net::ids::{DeviceId, DiskId, NodeId};
use mirror_net::region::digest::{Digest, DigestKey};
use mirror_net::wire::header::CrcSeed;
use patience::Patience;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;
use tokens::{Asker, Token};

/// Submissions between two waits.
const RING_ENTRIES: u32 = 1024;
/// Memory for requests and messages under way, in bytes, unless configured.
pub const BUFFER_BYTES: usize = 64 << 20;

/// Nanoseconds that go on during suspend: leases depend on it.
pub fn now() -> Nanos {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// What the nodes of one cluster share.
pub struct WireKeys {
    /// Of the checksums of frames.
    pub seed: CrcSeed,
    /// Of the digests by which copies are compared.
    pub digests: DigestKey,
}

/// The engine asks nothing of a disk that it has released.
const HELD: &str = "a disk that was not let go of";

/// Regions that are copied at a time.
const COPIES: usize = 4;

/// The I/O thread.
pub struct IoThread {
    ring: Ring,
    engine: Engine,
    buffers: Buffers,
    /// As the engine numbers them; none where one was let go of.
    disks: Vec<Option<DiskFile>>,
    /// Those that have left the map, and that something may be under way on.
    leaving: Vec<DiskId>,
    disk_ios: Slab<DiskIo>,
    /// Those that have not begun.
    starting: Vec<usize>,
    lanes: Slab<Lane>,
    clients: Slab<Connection>,
    /// Clients that wait until one before them is drained (docs/protocol.md rule 14).
    queued_clients: VecDeque<Connection>,
    exports: Slab<Export>,
    completed: HashMap<DeviceId, u64>,
    /// I/O that was done inline, and room for the next.
    done: [Vec<(usize, i32)>; 2],
    /// Requests and frames that this turn brought.
    arrived: usize,
    patience: Patience,
    /// Digests that were computed and that the engine has not got yet.
    digests: Vec<(OpKey, Vec<Digest>)>,
    inbox: Inbox,
    wake_buffer: AlignedBlock,
    events: tokio::sync::mpsc::UnboundedSender<Event>,
    keys: WireKeys,
    late_answers: bool,
    stopping: bool,
}

impl IoThread {
    /// Brings everything together; [`IoThread::run`] must be called on the same thread.
    pub fn new(
        mut engine: Engine,
        disks: Vec<DiskFile>,
        keys: WireKeys,
        inbox: Inbox,
        events: tokio::sync::mpsc::UnboundedSender<Event>,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        let mut buffers = Buffers::new(buffer_bytes);
        let bytes = engine.copy_buffer_bytes() as usize;
        engine.add_copy_buffers((0..COPIES).map(|_| buffers.allocate_for_peer(bytes)));
        engine.allow_surveys(buffers.allocate_for_peer(bytes), keys.digests.zero());
        Ok(Self {
            ring: Ring::new(RING_ENTRIES)?,
            engine,
            buffers,
            disks: disks.into_iter().map(Some).collect(),
            leaving: Vec::new(),
            disk_ios: Slab::new(),
            starting: Vec::new(),
            lanes: Slab::new(),
            clients: Slab::new(),
            queued_clients: VecDeque::new(),
            exports: Slab::new(),
            completed: HashMap::new(),
            done: [Vec::new(), Vec::new()],
            arrived: 0,
            patience: Patience::new(),
            digests: Vec::new(),
            inbox,
            wake_buffer: AlignedBlock::new(8),
            events,
            keys,
            late_answers: false,
            stopping: false,
        })
    }

    /// Runs until it is told to stop.
    pub fn run(mut self) {
        let error = self.turns().err().map(|error| error.to_string());
        // Nobody listening means that the process is ending anyway.
        let _ = self.events.send(Event::Ended(error));
    }

    fn turns(&mut self) -> io::Result<()> {
        self.listen()?;
        let mut completions: Vec<Completion> = Vec::with_capacity(RING_ENTRIES as usize * 4);
        loop {
            self.settle()?;
            self.send_all()?;
            if self.start_disk_ios()? || self.late_answers {
                continue;
            }
            self.let_go();
            if self.stopping && self.is_quiet() {
                return Ok(());
            }
            let wait = self.engine.next_tick().saturating_sub(now()).max(1);
            let depth = self.engine.under_way().max(std::mem::take(&mut self.arrived));
            let on_disk = !self.disk_ios.is_empty();
            self.patience.wait(&mut self.ring, depth, on_disk, Duration::from_nanos(wait))?;
            self.ring.completions(&mut completions);
            for completion in completions.drain(..) {
                self.completed(completion)?;
            }
            // After what has arrived: a stall of our own must not look like the others' silence.
            self.engine.handle_tick(now());
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.inbox.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_buffer.as_mut_ptr(), 8).build();
        // SAFETY: the buffer lives as long as the ring.
        unsafe { self.ring.push(&entry.user_data(Token::Wake.encode())) }
    }

    /// Carries out all that the engine wants, and what that leads to.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            while let Some(action) = self.engine.poll_action() {
                self.carry_out(action)?;
            }
            if let Some(error) = self.engine.take_refused_map() {
                self.tell(Event::MapRefused(error.to_string()));
            }
            for (order, answer) in self.engine.take_surveyed() {
                self.tell(Event::Surveyed(order, vec![answer]));
            }
            for resync in self.engine.take_ended_resyncs() {
                self.tell(Event::Resynced(resync));
            }
            if self.late_answers {
                self.late_answers = false;
                self.answer_late()?;
            }
            if self.done[0].is_empty() && self.digests.is_empty() {
                return Ok(());
            }
            for (op, digests) in std::mem::take(&mut self.digests) {
                self.engine.handle_digests(now(), op, digests);
                while let Some(action) = self.engine.poll_action() {
                    self.carry_out(action)?;
                }
            }
            // Taken out, and its memory put back.
            self.done.swap(0, 1);
            let mut done = std::mem::take(&mut self.done[1]);
            let now = now();
            for (index, result) in done.drain(..) {
                self.disk_io_done(now, index, result)?;
            }
            self.done[1] = done;
        }
    }

    fn completed(&mut self, completion: Completion) -> io::Result<()> {
        let result = completion.result;
        match Token::decode(completion.token) {
            Token::Wake => {
                self.listen()?;
                while let Ok(command) = self.inbox.commands.try_recv() {
                    self.command(command)?;
                }
            }
            Token::Disk(index) => self.disk_io_done(now(), index, result)?,
            Token::LaneReceive(index) => {
                let outcome = self.lanes[index].stream.received(result);
                self.lane_outcome(index, outcome);
                self.read_lane(index)?;
            }
            Token::LaneSend(index) => {
                let outcome = self.lanes[index].stream.sent(result, &mut self.buffers);
                self.late_answers = true;
                self.lane_outcome(index, outcome);
            }
            Token::ClientReceive(index) => {
                if self.clients[index].stream.received(result).is_err() {
                    self.clients[index].stream.close();
                }
                self.read_client(index)?;
            }
            Token::ClientSend(index) => {
                if self.clients[index].stream.sent(result, &mut self.buffers).is_err() {
                    self.clients[index].stream.close();
                }
                self.read_client(index)?;
            }
            Token::Tag { export, queue, tag } => self.tag_arrived(export, queue, tag, result)?,
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> io::Result<()> {
        match command {
            Command::Map(map) => {
                if let Err(error) = self.engine.handle_map(now(), map) {
                    self.tell(Event::MapRefused(error.to_string()));
                }
            }
            Command::AddDisk(disk) => {
                let (local, file) = *disk;
                self.disks.push(Some(file));
                self.engine.add_disk(now(), local);
            }
            Command::ReleaseDisk(disk) => self.leaving.push(disk),
            Command::ExporterSession(session) => self.engine.set_exporter_session(session),
            Command::Policy(policy) => self.engine.set_policy(policy),
            Command::Lane { peer, session, process, socket } => {
                let index = self.lanes.insert(Lane::new(peer, session, socket, self.keys.seed));
                self.engine.handle_lane_up(now(), peer, session, process);
                self.read_lane(index)?;
            }
            Command::NbdClient { device, .. }
                if self.clients.len() + self.queued_clients.len() >= CONNECTIONS_MAX =>
            {
                tracing::warn!(%device, "a client was turned away: {CONNECTIONS_MAX} are connected");
            }
            Command::NbdClient { device, socket, session, unread } => {
                let client = Connection::new(device, socket, session, &unread);
                self.queued_clients.push_back(client);
                self.admit_clients()?;
            }
            Command::StopNbd(device) => {
                self.queued_clients.retain(|client| client.device != device);
                for (_, client) in self.clients.iter_mut().filter(|(_, client)| client.device == device) {
                    client.stream.close();
                }
            }
            Command::StartUblk(export) => {
                let entry = self.exports.vacant_entry();
                let number = entry.key();
                let export = entry.insert(*export);
                if let Some(told) = export.loss_told {
                    self.engine.resume_export(export.device, told);
                }
                let token = |queue, tag| Token::Tag { export: number, queue, tag }.encode();
                export.start(&mut self.ring, &mut self.buffers, token)?;
            }
            Command::Survey { order, kind, runs } => self.engine.handle_survey(now(), order, kind, runs),
            Command::ForgetSurveys => self.engine.forget_surveys(),
            Command::Report(reply) => {
                // Whoever asked may be gone.
                let _ = reply.send(self.report());
            }
            Command::Stop => {
                self.stopping = true;
                self.engine.handle_stop(now());
                self.clients.iter_mut().for_each(|(_, client)| client.stream.close());
                self.queued_clients.clear();
            }
        }
        Ok(())
    }

    fn report(&self) -> ThreadReport {
        let mut devices: Vec<DeviceId> = self.completed.keys().copied().collect();
        devices.extend(self.exports.iter().map(|(_, export)| export.device));
        devices.extend(self.clients.iter().map(|(_, client)| client.device));
        devices.sort_unstable();
        devices.dedup();
        let report = |device: DeviceId| DeviceReport {
            device,
            completed: self.completed.get(&device).copied().unwrap_or(0),
            pending: self.engine.pending_requests(device) as u64,
            clients: self.clients.iter().filter(|(_, client)| client.device == device).count(),
            loss_told: self.engine.loss_told(device),
        };
        let now = now();
        let disks = self.engine.disk_ids().zip(&self.disks);
        ThreadReport {
            disks: disks.filter_map(|(id, disk)| Some((id, disk.as_ref()?.work(now)))).collect(),
            adopted: self.engine.adopted_version(),
            sessions: self.engine.session_reports(),
            waiting: self.engine.waiting(),
            resyncs: self.engine.resync_reports(),
            devices: devices.into_iter().map(report).collect(),
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listening means that the process is ending anyway.
        let _ = self.events.send(event);
    }

    /// Nothing is under way that somebody waits for.
    fn is_quiet(&self) -> bool {
        // Devices that are still exported are left to the next process on purpose: the kernel gives it what is
        // in flight again.
        self.disk_ios.is_empty() && self.clients.is_empty() && !self.engine.has_staged()
    }

    // ---- what the engine wants ----

    fn carry_out(&mut self, action: Action) -> io::Result<()> {
        match action {
            Action::Read { io, disk, slot, offset, buffer } => {
                let io = self.disk(disk).read(io, disk, (slot, offset), buffer, &self.buffers);
                self.start_disk_io(io);
                Ok(())
            }
            Action::Write { io, disk, slot, offset, buffer, fua } => {
                let io = self.disk(disk).write(io, disk, (slot, offset), buffer, fua, &self.buffers);
                self.start_disk_io(io);
                Ok(())
            }
            Action::Zero { io, disk, slot, offset, length, fua } => {
                let io = self.disk(disk).zero(io, disk, (slot, offset), length, fua);
                self.start_disk_io(io);
                Ok(())
            }
            Action::Punch { io, disk, slot, offset, length } => {
                let io = self.disk(disk).punch(io, disk, (slot, offset), length);
                self.start_disk_io(io);
                Ok(())
            }
            Action::Flush { io, disk } => {
                self.start_disk_io(DiskFile::flush(io, disk));
                Ok(())
            }
            Action::Metadata { io, disk, work } => {
                let io = match work {
                    MetadataIo::Write { offset, block, durable, .. } => {
                        DiskFile::metadata(io, disk, offset, block, durable)
                    }
                    MetadataIo::Flush { .. } => DiskFile::flush(io, disk),
                };
                self.start_disk_io(io);
                Ok(())
            }
            Action::Send { peer, session, header, trailer, body } => {
                let lane =
                    self.lanes.iter_mut().find(|(_, lane)| lane.peer == peer && lane.session == session);
                match (lane, body) {
                    (Some((_, lane)), body) => lane.send(header, trailer, body, &mut self.buffers),
                    (None, mirror_net::engine::action::Body::Release(range)) => {
                        self.buffers.release(range.buffer)
                    }
                    (None, _) => {}
                }
                Ok(())
            }
            Action::CloseLane { peer, session, reason } => {
                let lane =
                    self.lanes.iter_mut().find(|(_, lane)| lane.peer == peer && lane.session == session);
                if let Some((index, lane)) = lane {
                    lane.stream.close();
                    self.tell(Event::LaneClosed { peer, session, reason });
                    self.drop_lane_if_idle(index);
                }
                Ok(())
            }
            Action::FillZero { buffer } => {
                self.buffers.bytes_mut(buffer).fill(0);
                Ok(())
            }
            Action::Digest { op, buffer } => {
                let digests = self.keys.digests.fine(self.buffers.bytes(buffer));
                self.digests.push((op, digests));
                Ok(())
            }
            Action::Copy { from, to } => {
                self.buffers.copy(from, to);
                Ok(())
            }
            Action::Release { buffer } => {
                self.buffers.release(buffer);
                Ok(())
            }
            Action::Complete { token, result } => self.complete(token, result),
            Action::Report(report) => {
                self.tell(Event::Report(report));
                Ok(())
            }
        }
    }

    fn disk(&self, disk: DiskIndex) -> &DiskFile {
        self.disks[disk].as_ref().expect(HELD)
    }

    /// Closes disks that have left the map once they are idle.
    fn let_go(&mut self) {
        for id in std::mem::take(&mut self.leaving) {
            let index = self.engine.disk_ids().position(|disk| disk == id);
            let busy = self.disk_ios.iter().any(|(_, io)| Some(io.disk()) == index);
            if busy || !self.engine.release_disk(id) {
                self.leaving.push(id);
                continue;
            }
            if let Some(index) = index {
                self.disks[index] = None;
            }
            self.tell(Event::DiskReleased(id));
        }
    }

    /// It begins once what is to be sent is on its way.
    fn start_disk_io(&mut self, io: DiskIo) {
        let index = self.disk_ios.insert(io);
        self.starting.push(index);
    }

    /// True if some of it is done already, which leads to more.
    fn start_disk_ios(&mut self) -> io::Result<bool> {
        if self.starting.is_empty() {
            return Ok(false);
        }
        let (mut any_done, now) = (false, now());
        for index in self.starting.drain(..) {
            let (io, token) = (&self.disk_ios[index], Token::Disk(index).encode());
            let disk = self.disks[io.disk()].as_mut().expect(HELD);
            let inline = disk.submit(now, &mut self.ring, io, token)?;
            if let Some(result) = inline {
                self.done[0].push((index, result));
                any_done = true;
            }
        }
        Ok(any_done)
    }

    fn disk_io_done(&mut self, now: Nanos, index: usize, result: i32) -> io::Result<()> {
        let io = self.disk_ios.remove(index);
        let disk = io.disk();
        match self.disks[disk].as_mut().expect(HELD).completed(now, io, result) {
            DiskOutcome::Done(io, result) => {
                if let (Err(reason), Io::Metadata(..) | Io::Flush(_)) = (&result, io) {
                    tracing::error!(disk, reason, "the disk failed a metadata write or flush");
                }
                self.engine.handle_io(now, io, result);
                Ok(())
            }
            DiskOutcome::Again(io) => {
                self.start_disk_io(io);
                Ok(())
            }
        }
    }

    // ---- lanes ----

    fn read_lane(&mut self, index: usize) -> io::Result<()> {
        let now = now();
        while let Some(lane) = self.lanes.get_mut(index).filter(|lane| !lane.stream.is_closed()) {
            match lane.next(&mut self.buffers) {
                Ok(Some(message)) => {
                    let peer = lane.peer;
                    let small: &[u8] = if message.buffer.is_none() { lane.stream.small() } else { &[] };
                    let (header, trailer) = (message.header, message.trailer);
                    self.arrived += 1;
                    self.engine.handle_frame(now, peer, &header, trailer, small, message.buffer);
                    // The lane may be closed by what this led to.
                    self.settle()?;
                }
                Ok(None) => break,
                Err(error) => {
                    let outcome = Err(io::Error::other(format!("bad frame: {error}")));
                    self.lane_outcome(index, outcome);
                }
            }
        }
        Ok(())
    }

    /// An error ends the lane's session.
    fn lane_outcome(&mut self, index: usize, outcome: io::Result<()>) {
        let lane = &mut self.lanes[index];
        if let Err(error) = outcome
            && !lane.stream.is_closed()
        {
            let (peer, session) = (lane.peer, lane.session);
            lane.stream.close();
            let reason = match error.kind() {
                io::ErrorKind::UnexpectedEof => "closed by the other side".to_owned(),
                _ => error.to_string(),
            };
            self.engine.handle_lane_down(now(), peer, session, &reason);
            self.tell(Event::LaneClosed { peer, session, reason });
        }
        self.drop_lane_if_idle(index);
    }

    fn drop_lane_if_idle(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        if lane.stream.is_closed() && lane.stream.is_idle() {
            lane.release_all(&mut self.buffers);
            self.lanes.remove(index);
            self.late_answers = true;
        }
    }

    /// Node ids of the lanes that stand; for tests.
    pub fn lane_peers(&self) -> impl Iterator<Item = NodeId> {
        self.lanes.iter().map(|(_, lane)| lane.peer)
    }

    // ---- sockets ----

    /// Everything queued goes out, everything that can be received is asked for.
    fn send_all(&mut self) -> io::Result<()> {
        // Requests lead to more that is to be sent, and what was sent makes room for more requests.
        while self.read_clients()? || self.send_once()? {}
        for (index, lane) in &mut self.lanes {
            lane.stream.receive(&mut self.ring, &mut self.buffers, Token::LaneReceive(index).encode())?;
        }
        for (index, client) in &mut self.clients {
            client.stream.receive(&mut self.ring, &mut self.buffers, Token::ClientReceive(index).encode())?;
        }
        Ok(())
    }

    /// True if anything went out.
    fn send_once(&mut self) -> io::Result<bool> {
        let mut any = false;
        for index in 0..self.lanes.capacity() {
            let Some(lane) = self.lanes.get_mut(index) else { continue };
            let token = Token::LaneSend(index).encode();
            match lane.stream.send(&mut self.ring, &mut self.buffers, token)? {
                Sent::Nothing => {}
                Sent::Some => {
                    any = true;
                    self.late_answers |= !self.exports.is_empty();
                }
                Sent::Failed(error) => {
                    any = true;
                    self.lane_outcome(index, Err(error));
                    self.settle()?;
                }
            }
        }
        for (index, client) in &mut self.clients {
            let token = Token::ClientSend(index).encode();
            match client.stream.send(&mut self.ring, &mut self.buffers, token)? {
                Sent::Nothing => {}
                Sent::Some => any = true,
                Sent::Failed(_) => {
                    any = true;
                    client.stream.close();
                }
            }
        }
        Ok(any)
    }

    // ---- NBD ----

    /// Requests that waited for a free buffer, or for the answers to earlier ones; true if any did.
    fn read_clients(&mut self) -> io::Result<bool> {
        let mut any = false;
        for index in 0..self.clients.capacity() {
            any |= self.clients.contains(index) && self.read_client(index)?;
        }
        Ok(any)
    }

    /// Takes a client's requests; true if there were any.
    fn read_client(&mut self, index: usize) -> io::Result<bool> {
        let mut any = false;
        let now = now();
        while let Some(client) = self.clients.get_mut(index).filter(|client| !client.stream.is_closed()) {
            match client.next(&mut self.buffers) {
                Ok(Some(Wanted::Status(request))) => {
                    let extents = self.engine.extents(
                        self::now(),
                        client.device,
                        request.offset,
                        request.length.into(),
                    );
                    client.status(&request, extents, &mut self.buffers);
                }
                Ok(Some(Wanted::Request(ask))) => {
                    let request = Request {
                        token: Asker::Client { index, slot: ask.slot }.encode(),
                        device: client.device,
                        kind: ask.kind,
                        offset: ask.offset,
                        length: ask.length,
                        buffer: ask.buffer,
                    };
                    self.arrived += 1;
                    self.engine.handle_request(now, &request);
                    self.settle()?;
                    any = true;
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "an NBD client does not keep to the protocol");
                    client.stream.close();
                }
            }
        }
        self.drop_client_if_done(index)?;
        Ok(any)
    }

    fn drop_client_if_done(&mut self, index: usize) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(index) else { return Ok(()) };
        if client.is_finished() {
            client.stream.close();
        }
        if client.stream.is_closed() && client.stream.is_idle() && client.pending() == 0 {
            client.release_all(&mut self.buffers);
            self.clients.remove(index);
            self.admit_clients()?;
        }
        Ok(())
    }

    /// Lets clients in for whose device nobody is being drained.
    fn admit_clients(&mut self) -> io::Result<()> {
        let mut waiting = VecDeque::new();
        while let Some(client) = self.queued_clients.pop_front() {
            let device = client.device;
            // One that hung up while nothing was received from it is not known to be gone yet.
            for (_, other) in self.clients.iter_mut().filter(|(_, other)| other.device == device) {
                if other.stream.has_hung_up() {
                    other.stream.close();
                }
            }
            let drains = |(_, other): (usize, &Connection)| other.device == device && other.is_leaving();
            if self.clients.iter().any(drains) {
                waiting.push_back(client);
            } else {
                let index = self.clients.insert(client);
                self.read_client(index)?;
            }
        }
        self.queued_clients.append(&mut waiting);
        Ok(())
    }

    // ---- ublk ----

    fn tag_arrived(&mut self, index: usize, queue: u16, tag: u16, result: i32) -> io::Result<()> {
        let export = &mut self.exports[index];
        let device = export.device;
        match export.arrived(queue, tag, result) {
            Arrived::Ask(ask) => {
                let token = Asker::Tag { export: index, queue, tag }.encode();
                let (kind, offset, length, buffer) = (ask.kind, ask.offset, ask.length, ask.buffer);
                self.engine.handle_request(now(), &Request { token, device, kind, offset, length, buffer });
            }
            Arrived::Nothing => {}
            Arrived::Refused(errno) => self.tell(Event::UblkRefused(device, errno)),
        }
        let export = &mut self.exports[index];
        if export.is_drained() {
            export.end(&mut self.buffers);
            self.exports.remove(index);
            self.tell(Event::UblkDrained(device));
        }
        Ok(())
    }

    // ---- answers ----

    fn complete(&mut self, token: RequestToken, result: Result<(), RequestError>) -> io::Result<()> {
        let asker = Asker::decode(token);
        let device = match asker {
            Asker::Client { index, slot } => {
                let client = &mut self.clients[index];
                client.complete(slot, result, &mut self.buffers);
                client.device
            }
            Asker::Tag { export, queue, tag } => {
                let token = Token::Tag { export, queue, tag }.encode();
                let entry = &mut self.exports[export];
                let answer = entry.complete((queue, tag), result, &mut self.ring, &self.buffers, token)?;
                if answer == Answer::Later {
                    return Ok(());
                }
                entry.device
            }
        };
        *self.completed.entry(device).or_default() += 1;
        Ok(())
    }

    /// Tags whose buffers frames were still to be sent from.
    fn answer_late(&mut self) -> io::Result<()> {
        let late: Vec<_> = self
            .exports
            .iter_mut()
            .flat_map(|(index, export)| export.take_late().into_iter().map(move |late| (index, late)))
            .collect();
        for (export, (queue, tag, result)) in late {
            self.complete(Asker::Tag { export, queue, tag }.encode(), result)?;
        }
        Ok(())
    }
}
