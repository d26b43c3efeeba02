//! What an engine wants: disk I/O, frames and completions, carried out as a daemon would.

use super::{Cluster, Event};
use crate::sim::network::Frame;
use crate::sim::node::{PUNCH, position};
use crate::sim::process::{Content, DiskIo, Started};
use crate::sim::scheduler::{MS, Nanos};
use mirror_net::control::{Life, NodeMessage};
use mirror_net::engine::action::{Action, Body, Io, Report};
use mirror_net::format::MetadataIo;
use mirror_net::ids::{NodeId, ProcessId};
use mirror_net::region::digest::DigestKey;
use mirror_net::wire::header::{HEADER_BYTES, Header, Kind, Status, TRAILER_BYTES, Trailer};

/// No I/O takes longer, however slow its disk.
const SLOWEST: Nanos = 1_500 * MS;
/// One in so many data writes is looked at as it begins; reading a disk's metadata takes a while.
const INTENT_LOOK: u64 = 200;
/// And one in so many regions whose dirty bits are about to be cleared.
const CLEAR_LOOK: u64 = 12;
/// And one in so many words that a map is adopted.
const ADOPTED_LOOK: u64 = 3;
/// How often a disk that hangs is looked at.
const HANG_LOOK: Nanos = 20 * MS;

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

    /// A disk begins an I/O.
    pub(super) fn begin_io(&mut self, node: u16, id: Io, disk: usize, io: DiskIo) {
        let latency = if self.random.one_in(40) {
            self.random.range(MS, 30 * MS)
        } else {
            self.random.range(20_000, 300_000)
        };
        let slow = self.node_mut(node).media(disk).map_or(0, |media| media.faults.slow);
        let latency = if slow > 0 { (latency * slow).min(SLOWEST) } else { latency };
        let process = self.node(node).process_id;
        let Some(running) = self.process(node) else { return };
        match running.begin(id, disk, io) {
            Ok(number) => self.queue.push(self.now + latency, Event::Io { node, process, number }),
            Err(wrong) => self.checker.violations.push(format!("n{node} gives a disk {wrong}")),
        }
    }

    pub(super) fn carry_out(&mut self, node: u16, action: Action) {
        let Some(process) = self.process(node) else { return };
        match action {
            Action::Read { io, disk, slot, offset, buffer } => {
                self.begin_io(node, io, disk, DiskIo::Read { offset: position(slot, offset), buffer });
            }
            Action::Write { io, disk, slot, offset, buffer, fua } => {
                if self.random.one_in(INTENT_LOOK) {
                    self.check_intent(node, disk, slot, offset, buffer.length);
                }
                let content = Content::Buffer(buffer);
                let work = DiskIo::Write { offset: position(slot, offset), content, durable: fua };
                self.begin_io(node, io, disk, work);
            }
            Action::Zero { io, disk, slot, offset, length, fua } => {
                let content = Content::Fill(0, length as usize);
                let work = DiskIo::Write { offset: position(slot, offset), content, durable: fua };
                self.begin_io(node, io, disk, work);
            }
            Action::Punch { io, disk, slot, offset, length } => {
                // Punched space may hold anything.
                let content = Content::Fill(PUNCH, length as usize);
                let work = DiskIo::Write { offset: position(slot, offset), content, durable: false };
                self.begin_io(node, io, disk, work);
            }
            Action::Flush { io, disk } => {
                let mark = self.node_mut(node).media(disk).map_or(0, |media| media.flush_mark());
                self.begin_io(node, io, disk, DiskIo::Flush(mark));
            }
            Action::Metadata { io, disk, work } => {
                let work = match work {
                    MetadataIo::Write { offset, block, durable, .. } => {
                        DiskIo::Write { offset, content: Content::Metadata(block), durable }
                    }
                    MetadataIo::Flush { .. } => {
                        let mark = self.node_mut(node).media(disk).map_or(0, |media| media.flush_mark());
                        DiskIo::Flush(mark)
                    }
                };
                self.begin_io(node, io, disk, work);
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
                if let Err(wrong) = process.free(buffer) {
                    self.checker.violations.push(format!("n{node}: {wrong}"));
                }
            }
            Action::Complete { token, result } => {
                self.complete(node, token.0, result.map_err(|e| format!("{e:?}")))
            }
            Action::Report(report) => {
                if let Report::Adopted { version } = &report {
                    process.adopted = *version;
                    let id = ProcessId(self.node(node).process_id);
                    Life::note(&mut self.agents[usize::from(node) - 1].lives, id, *version);
                }
                self.say(|| format!("n{node}: {report:?}"));
                if let Report::Adopted { version } = &report
                    && self.random.one_in(ADOPTED_LOOK)
                {
                    self.check_adopted(node, *version);
                }
                let adopted = matches!(report, Report::Adopted { .. });
                self.tell_manager(
                    node,
                    match report {
                        Report::Adopted { version } => NodeMessage::Adopted { version },
                        Report::DiskFailed { disk, reason } => NodeMessage::DiskFailed { disk, reason },
                        Report::AskStale { peer, version, cause } => {
                            NodeMessage::AskStale { peer, version, cause }
                        }
                        Report::AskSlow { peer, version, cause } => {
                            NodeMessage::AskSlow { peer, version, cause }
                        }
                        Report::AskSyncing { peer, version } => NodeMessage::AskSyncing { peer, version },
                        Report::AskInSync { peer, device, version } => {
                            NodeMessage::AskInSync { peer, device, version }
                        }
                    },
                );
                if adopted {
                    for device in 0..self.exporting.len() {
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
        // Header, body and trailer in one piece; the header is put in place when the rest is known.
        let mut bytes = Vec::with_capacity(HEADER_BYTES + TRAILER_BYTES + body_length(&body));
        bytes.resize(HEADER_BYTES, 0);
        match &body {
            Body::None => {}
            Body::Bytes(content) => bytes.extend_from_slice(content),
            Body::Buffer(range) | Body::Release(range) => match process.bytes(*range) {
                Some(content) => {
                    bytes.extend_from_slice(content);
                    if matches!(body, Body::Buffer(_)) {
                        borrowed = Some(*range);
                    }
                }
                None => self.checker.violations.push(format!("n{node} sends {range:?}, which it gave back")),
            },
        }
        if let Body::Release(range) = body
            && let Some(Err(wrong)) = self.process(node).map(|process| process.free(range.buffer))
        {
            self.checker.violations.push(format!("n{node}: {wrong}"));
        }
        if let Some(trailer) = trailer {
            bytes.extend_from_slice(&trailer.encode());
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
            Kind::Clear if self.random.one_in(CLEAR_LOOK) => {
                self.check_clear(&header);
            }
            _ => {}
        }
        header.body_bytes = (bytes.len() - HEADER_BYTES) as u32;
        // Nothing but damage alters a body, so only one that will be damaged needs its checksum.
        let damaged = self.network.take_damage(node, peer);
        if damaged {
            header.body_crc = self.seed.body([&bytes[HEADER_BYTES..], &[]]);
        }
        bytes[..HEADER_BYTES].copy_from_slice(&header.encode(self.seed));
        let Some(at) = self.network.arrival(self.now, node, peer, session, &mut self.random) else { return };
        let process = self.node(peer).process_id;
        if damaged {
            let bit = self.random.below(8 * bytes.len() as u64) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let frame = Box::new(Frame { session, bytes, borrowed, damaged, late: false });
        self.queue.push(at, Event::Frame { from: node, to: peer, process, frame });
    }

    /// A frame comes to where it was sent, or waits for the end of a silence.
    pub(super) fn arrive(&mut self, from: u16, to: u16, process: u64, frame: Box<Frame>) {
        if self.network.is_silent(from, to) {
            // Kept in order: they all wait for the same moments.
            let at = self.now / (10 * MS) * (10 * MS) + 10 * MS;
            self.queue.push(at, Event::Frame { from, to, process, frame });
        } else if frame.late || self.network.session(from, to) == Some(frame.session) {
            self.deliver(from, to, *frame);
        } else {
            let (now, session) = (self.now, frame.session);
            let Some(at) = self.network.linger(now, from, to, session, &mut self.random) else { return };
            self.late_frames += 1;
            let frame = Box::new(Frame { late: true, borrowed: None, ..*frame });
            self.queue.push(at, Event::Frame { from, to, process, frame });
        }
    }

    fn deliver(&mut self, from: u16, to: u16, frame: Frame) {
        if let (Some(range), Some(sender), false) = (frame.borrowed, &self.node(from).process, frame.damaged)
        {
            let sent = &frame.bytes[HEADER_BYTES..HEADER_BYTES + range.length as usize];
            if sender.bytes(range) != Some(sent) {
                self.checker
                    .violations
                    .push(format!("n{from}: {range:?} was given back while it was being sent"));
            }
        }
        let header = match self.decode(&frame.bytes, frame.damaged) {
            Ok(header) if !frame.damaged => header,
            Err(error) if frame.damaged => {
                self.say(|| format!("n{to}: a frame from n{from}: {error}"));
                self.cut(to, from, frame.session, None);
                return;
            }
            decoded => {
                let violation = format!("a frame from n{from}, damaged {}: {decoded:?}", frame.damaged);
                self.checker.violations.push(violation);
                return;
            }
        };
        self.note(u64::from(to) << 8 | header.kind as u64);
        if !matches!(header.kind, Kind::Ping | Kind::Pong) {
            self.say(|| format!("n{from} -> n{to}: {header:?}"));
        }
        let mut end = frame.bytes.len();
        let mut trailer = None;
        if header.kind.is_forwarded() {
            end = frame.bytes.len() - TRAILER_BYTES;
            trailer = frame.bytes[end..].try_into().ok().map(Trailer::decode);
        }
        let clock = self.node(to).clock(self.now);
        let Some(process) = self.process(to) else { return };
        let (small, buffer) = match header.kind {
            kind if kind.asks_for_data() => {
                (Vec::new(), Some(process.allocate(vec![0xcc; header.length as usize])))
            }
            kind if kind.carries_data() && end > HEADER_BYTES => {
                (Vec::new(), Some(process.allocate_within(frame.bytes, HEADER_BYTES, end)))
            }
            _ => (frame.bytes[HEADER_BYTES..end].to_vec(), None),
        };
        process.engine.handle_frame(clock, NodeId(from), &header, trailer, &small, buffer);
        self.drain(to);
    }

    fn decode(&self, bytes: &[u8], damaged: bool) -> Result<Header, String> {
        let head = bytes[..HEADER_BYTES].try_into().map_err(|_| "too short".to_owned())?;
        let header = Header::decode(head, self.seed).map_err(|error| error.to_string())?;
        if damaged && self.seed.body([&bytes[HEADER_BYTES..], &[]]) != header.body_crc {
            return Err("body checksum".to_owned());
        }
        Ok(header)
    }

    /// An I/O comes to its end, unless its disk hangs.
    pub(super) fn io_done(&mut self, node: u16, number: u64) {
        let Some(disk) = self.process(node).and_then(|process| Some(process.io(number)?.disk)) else {
            return;
        };
        let Some(media) = self.node_mut(node).media(disk) else { return };
        if media.faults.hung {
            let process = self.node(node).process_id;
            self.queue.push(self.now + HANG_LOOK, Event::Io { node, process, number });
            return;
        }
        let Some(started) = self.process(node).and_then(|process| process.end(number)) else { return };
        self.note(u64::from(node) << 16 | number);
        let result = self.end_io(node, &started);
        if let Err(error) = &result {
            self.say(|| format!("n{node}: disk {disk}: {:?}: {error}", started.io));
        }
        let clock = self.node(node).clock(self.now);
        if let Some(process) = self.process(node) {
            process.engine.handle_io(clock, started.id, result);
        }
        self.drain(node);
    }

    fn end_io(&mut self, node: u16, started: &Started) -> Result<(), String> {
        let Some(media) = self.node_mut(node).media(started.disk) else { return Ok(()) };
        let faults = media.faults;
        if faults.dead {
            media.has_failed = true;
            return Err("the disk is dead".to_owned());
        }
        match &started.io {
            DiskIo::Read { offset, buffer } => match self.node_mut(node).load(started, *offset, *buffer) {
                Some(true) => return Ok(()),
                Some(false) => return Err("unreadable sector".to_owned()),
                None => {
                    self.checker.violations.push(format!("n{node} reads into {buffer:?}, which it gave back"))
                }
            },
            DiskIo::Write { offset, content, durable } => {
                let metadata = matches!(content, Content::Metadata(_));
                if if metadata { faults.metadata } else { faults.write | faults.write_once } {
                    media.faults.write_once &= metadata;
                    media.has_failed = true;
                    return Err("input/output error".to_owned());
                }
                if !self.node_mut(node).store(started, *offset, content, *durable) {
                    self.checker
                        .violations
                        .push(format!("n{node} gave back a buffer while it was written: {content:?}"));
                }
            }
            DiskIo::Flush(_) if faults.flush => {
                let mut random = self.random.clone();
                if let Some(media) = self.node_mut(node).media(started.disk) {
                    media.faults.flush = false;
                    media.has_failed = true;
                    media.lose_cache(&mut random);
                }
                self.random = random;
                return Err("flush failed".to_owned());
            }
            DiskIo::Flush(mark) => media.flushed(*mark),
        }
        Ok(())
    }
}

fn body_length(body: &Body) -> usize {
    match body {
        Body::None => 0,
        Body::Buffer(range) | Body::Release(range) => range.length as usize,
        Body::Bytes(bytes) => bytes.len(),
    }
}
