//! What an engine wants: disk I/O, frames and completions, carried out as a daemon would.

use super::{Cluster, Event};
use crate::sim::network::Frame;
use crate::sim::node::DiskIo;
use crate::sim::scheduler::MS;
use mirror_net::control::NodeMessage;
use mirror_net::engine::action::{Action, Body, BufferId, BufferRange, Io, Report};
use mirror_net::format::MetadataIo;
use mirror_net::ids::NodeId;
use mirror_net::region::digest::DigestKey;
use mirror_net::wire::header::{HEADER_BYTES, Header, Kind, Status, TRAILER_BYTES, Trailer};

impl Cluster {
    pub(super) fn drain(&mut self, node: u16) {
        loop {
            let clock = self.node(node).clock(self.now);
            let Some(running) = self.process(node) else { return };
            if let Some(action) = running.engine.poll_action() {
                self.carry_out(node, action);
            } else if let Some((op, digests)) = running.digests.pop() {
                running.engine.handle_digests(clock, op, digests);
            } else {
                return;
            }
        }
    }

    pub(super) fn begin_io(&mut self, node: u16, id: Io, io: DiskIo) {
        let now = self.now;
        let latency = if self.random.one_in(40) {
            self.random.range(MS, 30 * MS)
        } else {
            self.random.range(20_000, 300_000)
        };
        let process = self.node(node).process_id;
        let Some(running) = self.process(node) else { return };
        let number = running.begin(id, io);
        self.queue.push(now + latency, Event::Io { node, process, number });
    }

    pub(super) fn carry_out(&mut self, node: u16, action: Action) {
        let Some(process) = self.process(node) else { return };
        match action {
            Action::Read { io, slot, offset, buffer, .. } => {
                let offset = self.node(node).offset(slot, offset);
                self.begin_io(node, io, DiskIo::Read { offset, buffer });
            }
            Action::Write { io, slot, offset, buffer, fua, .. } => {
                let Some(data) = process.bytes(buffer).map(<[u8]>::to_vec) else {
                    self.checker
                        .violations
                        .push(format!("n{node} writes from {buffer:?}, which it gave back"));
                    return;
                };
                let offset = self.node(node).offset(slot, offset);
                let io_work =
                    DiskIo::Write { offset, data, buffer: Some(buffer), durable: fua, metadata: false };
                self.begin_io(node, io, io_work);
            }
            Action::Zero { io, slot, offset, length, fua, .. } => {
                let offset = self.node(node).offset(slot, offset);
                let data = vec![0; length as usize];
                self.begin_io(
                    node,
                    io,
                    DiskIo::Write { offset, data, buffer: None, durable: fua, metadata: false },
                );
            }
            Action::Punch { io, slot, offset, length, .. } => {
                let offset = self.node(node).offset(slot, offset);
                // Punched space may hold anything.
                let data = vec![0x77; length as usize];
                self.begin_io(
                    node,
                    io,
                    DiskIo::Write { offset, data, buffer: None, durable: false, metadata: false },
                );
            }
            Action::Flush { io, .. } => {
                let mark = self.node(node).disk.flush_mark();
                self.begin_io(node, io, DiskIo::Flush(mark));
            }
            Action::Metadata { io, work, .. } => {
                let work = match work {
                    MetadataIo::Write { offset, block, durable, .. } => DiskIo::Write {
                        offset,
                        data: block.0.to_vec(),
                        buffer: None,
                        durable,
                        metadata: true,
                    },
                    MetadataIo::Flush { .. } => DiskIo::Flush(self.node(node).disk.flush_mark()),
                };
                self.begin_io(node, io, work);
            }
            Action::Send { peer, session, header, trailer, body } => {
                self.send(node, peer.0, session, header, trailer, body);
            }
            Action::CloseLane { peer, session, reason } => {
                self.say(|| format!("n{node}: closes lane {session} to n{}: {reason}", peer.0));
                self.cut(node, peer.0, session, Some(node));
            }
            Action::FillZero { buffer } => match process.bytes_mut(buffer) {
                Some(bytes) => bytes.fill(0),
                None => self.checker.violations.push(format!("n{node} fills {buffer:?}, which it gave back")),
            },
            Action::Digest { op, buffer } => match process.bytes(buffer) {
                Some(bytes) => {
                    let digests = DigestKey::new(b"simulated").fine(bytes);
                    process.digests.push((op, digests));
                }
                None => {
                    self.checker.violations.push(format!("n{node} compares {buffer:?}, which it gave back"))
                }
            },
            Action::Copy { from, to } => {
                let data = process.bytes(from).map(<[u8]>::to_vec);
                match (data, process.bytes_mut(to)) {
                    (Some(data), Some(bytes)) => bytes.copy_from_slice(&data),
                    _ => self.checker.violations.push(format!("n{node} copies {from:?} to {to:?}")),
                }
            }
            Action::Release { buffer } => {
                if let Some(wrong) = process.free(buffer) {
                    self.checker.violations.push(format!("n{node}: {wrong}"));
                }
            }
            Action::Complete { token, result } => {
                self.complete(node, token.0, result.map_err(|e| format!("{e:?}")))
            }
            Action::Report(report) => {
                if let Report::Adopted { version } = &report {
                    process.adopted = *version;
                }
                self.say(|| format!("n{node}: {report:?}"));
                let adopted = matches!(report, Report::Adopted { .. });
                self.tell_manager(
                    node,
                    match report {
                        Report::Adopted { version } => NodeMessage::Adopted { version },
                        Report::DiskFailed { disk, reason } => NodeMessage::DiskFailed { disk, reason },
                        Report::AskStale { peer, version, cause } => {
                            NodeMessage::AskStale { peer, version, cause }
                        }
                        Report::AskSyncing { peer, version } => NodeMessage::AskSyncing { peer, version },
                        Report::AskInSync { peer, device, version } => {
                            NodeMessage::AskInSync { peer, device, version }
                        }
                    },
                );
                if adopted {
                    for device in 0..self.shape.devices {
                        self.export(node, device);
                    }
                }
            }
        }
    }

    pub(super) fn send(
        &mut self,
        node: u16,
        peer: u16,
        session: u64,
        mut header: Header,
        trailer: Option<Trailer>,
        body: Body,
    ) {
        let Some(process) = self.process(node) else { return };
        let mut borrowed = None;
        let mut content = Vec::new();
        match &body {
            Body::None => {}
            Body::Bytes(bytes) => content.extend(bytes),
            Body::Buffer(range) | Body::Release(range) => match process.bytes(*range) {
                Some(bytes) => {
                    content.extend(bytes);
                    if matches!(body, Body::Buffer(_)) {
                        borrowed = Some((range.buffer.0, range.offset, range.length));
                    }
                }
                None => self.checker.violations.push(format!("n{node} sends {range:?}, which it gave back")),
            },
        }
        if let Body::Release(range) = body
            && let Some(wrong) = self.process(node).and_then(|process| process.free(range.buffer))
        {
            self.checker.violations.push(format!("n{node}: {wrong}"));
        }
        if let Some(trailer) = trailer {
            content.extend(trailer.encode());
        }
        match header.kind {
            Kind::Write | Kind::Zero | Kind::Discard => {
                self.checker.acts_as_primary(header.device, header.slice, header.slice_epoch.0, node);
            }
            Kind::Reply
                if header.flags == Status::Done as u8
                    && header.slice_epoch.0 > 0
                    && header.body_bytes > 0 =>
            {
                self.checker.acts_as_primary(header.device, header.slice, header.slice_epoch.0, node);
            }
            _ => {}
        }
        header.body_bytes = content.len() as u32;
        header.body_crc = self.seed.body([&content, &[]]);
        let mut bytes = header.encode(self.seed).to_vec();
        bytes.extend(content);
        let Some(at) = self.network.arrival(self.now, node, peer, session, &mut self.random) else { return };
        let process = self.node(peer).process_id;
        let frame = Frame { bytes, borrowed };
        self.queue.push(at, Event::Frame { from: node, to: peer, process, session, frame });
    }

    pub(super) fn deliver(&mut self, from: u16, to: u16, session: u64, frame: Frame) {
        let now = self.now;
        if let (Some((buffer, offset, length)), Some(sender)) = (frame.borrowed, &self.node(from).process) {
            let range = BufferRange { buffer: BufferId(buffer), offset, length };
            let sent = &frame.bytes[HEADER_BYTES..HEADER_BYTES + length as usize];
            if sender.bytes(range) != Some(sent) {
                self.checker
                    .violations
                    .push(format!("n{from}: {range:?} was given back while it was being sent"));
            }
        }
        let Ok(head) = <&[u8; HEADER_BYTES]>::try_from(&frame.bytes[..HEADER_BYTES]) else { return };
        let header = match Header::decode(head, self.seed) {
            Ok(header) => header,
            Err(error) => {
                self.checker.violations.push(format!("a frame from n{from}: {error}"));
                return;
            }
        };
        let mut body = &frame.bytes[HEADER_BYTES..];
        if self.seed.body([body, &[]]) != header.body_crc {
            self.checker.violations.push(format!("a frame from n{from}: body checksum"));
        }
        self.note(u64::from(to) << 8 | header.kind as u64);
        if !matches!(header.kind, Kind::Ping | Kind::Pong) {
            self.say(|| format!("n{from} -> n{to}: {header:?}"));
        }
        let mut trailer = None;
        if header.kind.is_forwarded() {
            let (data, tail) = body.split_at(body.len() - TRAILER_BYTES);
            trailer = tail.try_into().ok().map(Trailer::decode);
            body = data;
        }
        let clock = self.node(to).clock(now);
        let Some(process) = self.process(to) else { return };
        let (small, data) = match header.kind {
            kind if kind.asks_for_data() => (Vec::new(), Some(vec![0xcc; header.length as usize])),
            kind if kind.carries_data() && !body.is_empty() => (Vec::new(), Some(body.to_vec())),
            kind if kind.carries_data() => (Vec::new(), None),
            _ => (body.to_vec(), None),
        };
        let buffer = data.map(|data| process.allocate(data));
        let _ = session;
        process.engine.handle_frame(clock, NodeId(from), &header, trailer, &small, buffer);
        self.drain(to);
    }

    pub(super) fn io_done(&mut self, node: u16, number: u64) {
        let now = self.now;
        let faults = self.node(node).disk.faults;
        let Some(process) = self.process(node) else { return };
        let Some((id, io)) = process.ios.remove(&number) else { return };
        self.note(u64::from(node) << 16 | number);
        let mut result = Ok(());
        match io {
            DiskIo::Read { offset, buffer } => {
                let mut data = vec![0; buffer.length as usize];
                if !self.node(node).disk.read_checked(offset, &mut data) {
                    result = Err("unreadable sector".to_owned());
                }
                match self.process(node).and_then(|process| process.bytes_mut(buffer)) {
                    Some(bytes) => bytes.copy_from_slice(&data),
                    None => self
                        .checker
                        .violations
                        .push(format!("n{node} reads into {buffer:?}, which it gave back")),
                }
            }
            DiskIo::Write { offset, data, buffer, durable, metadata } => {
                if let Some(range) = buffer
                    && self.process(node).and_then(|process| process.bytes(range)) != Some(&data[..])
                {
                    self.checker.violations.push(format!("n{node}: {range:?} changed while it was written"));
                }
                if if metadata { faults.metadata } else { faults.write } {
                    result = Err("input/output error".to_owned());
                } else {
                    self.node_mut(node).disk.write(offset, &data, durable);
                }
            }
            DiskIo::Flush(mark) => {
                if faults.flush {
                    result = Err("flush failed".to_owned());
                    let mut random = self.random.clone();
                    let disk = &mut self.node_mut(node).disk;
                    disk.faults.flush = false;
                    disk.lose_cache(&mut random);
                    self.random = random;
                } else {
                    self.node_mut(node).disk.flushed(mark);
                }
            }
        }
        if let Err(error) = &result {
            self.say(|| format!("n{node}: disk: {error}"));
        }
        let clock = self.node(node).clock(now);
        if let Some(process) = self.process(node) {
            process.engine.handle_io(clock, id, result);
        }
        self.drain(node);
    }
}
