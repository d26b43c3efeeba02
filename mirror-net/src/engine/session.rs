//! Sessions with other nodes: opening, heartbeat and read lease, what is in flight, loss.
//!
//! A session lives as long as its lane. Before a node opens one (or opens it again) everything
//! that it did on behalf of the session before has come to its end (docs/protocol.md rule 10). Each
//! side sends `Open` when it is ready and nothing else before the other's `Open` has arrived.

use super::action::{Action, Body, BufferId, OpKey, Report};
use super::hold::Hold;
use super::op::{LegState, OpKind, Origin, Part};
use super::view::{PeerIndex, Place};
use super::window::{Awaited, Window};
use super::{Engine, Nanos, nanos};
use crate::ids::{AttachId, DiskId, MapVersion, NodeId, ProcessId, SliceEpoch};
use crate::map::{self, Commit, ReplicaState};
use crate::planted::{self, Bug};
use crate::wire::header::{BadFrame, Header, Kind, Trailer};
use std::collections::VecDeque;
use std::time::Duration;

/// How long a grantor stands still for a reader, in nanoseconds.
pub const LEASE: Nanos = 1_000_000_000;
/// What clocks may differ by over one lease.
pub const LEASE_MARGIN: Nanos = 100_000_000;
/// Between two pings.
pub const PING_EVERY: Nanos = 250_000_000;
/// A session on which nothing came for so long is over.
pub const SILENCE: Nanos = 1_000_000_000;
/// A member that has no session for so long, since we count on it, is reported as out of reach.
pub const UNREACHED: Nanos = 5_000_000_000;
/// Between two identical requests to the manager.
pub const ASK_AGAIN: Nanos = 1_000_000_000;
/// Pings whose answer is still awaited, at most.
const PINGS_MAX: usize = 8;
/// The most disks that a peer may have.
const DISKS_MAX: usize = 1024;

#[derive(Debug)]
struct Session {
    id: u64,
    process: ProcessId,
    sent_open: bool,
    got_open: bool,
    next_sequence: u64,
    window: Window,
    /// Something could not be sent for want of room in the window.
    starved: bool,
    heard: Nanos,
    next_ping: Nanos,
    /// Sequence and time of pings without an answer.
    pings: VecDeque<(u64, Nanos)>,
    /// The newest map version that the peer has durably adopted.
    adopted: MapVersion,
    /// The attachments of its disks.
    attached: Vec<(DiskId, AttachId)>,
    /// How many of this node's disks the peer was told of.
    told_disks: usize,
}

impl super::Disk {
    fn write_attachment(&self, body: &mut Vec<u8>) {
        body.extend(u64::from(self.id.0).to_le_bytes());
        body.extend(self.attach.0.to_le_bytes());
    }
}

fn attachments(words: impl Iterator<Item = u64>) -> Vec<(DiskId, AttachId)> {
    let words: Vec<u64> = words.collect();
    words.chunks_exact(2).map(|pair| (DiskId(pair[0] as u32), AttachId(pair[1]))).collect()
}

/// A read lease that a peer granted.
#[derive(Clone, Copy, Default, Debug)]
struct Lease {
    until: Nanos,
    /// The map version that its grantor had adopted.
    version: MapVersion,
}

/// Why a peer's copies are not relied on.
#[derive(Clone, Debug)]
pub(super) struct Lost {
    /// For people.
    pub cause: String,
    /// Only its session was lost: if it opens another with the same disks before the map says anything,
    /// nothing was missed. What it did not acknowledge is sent again.
    by_session: bool,
    /// It lives, and its disks hang.
    slow: bool,
}

/// Another node.
#[derive(Debug)]
pub(super) struct Peer {
    pub node: NodeId,
    session: Option<Session>,
    /// It missed, or may have missed, writes as a member: nothing is replicated to it until the
    /// map no longer counts on it, or it is back as it was.
    pub lost: Option<Lost>,
    /// It opened a session since this process started.
    ever_open: bool,
    /// Since when there is no session although we count on its copies.
    missed_since: Option<Nanos>,
    ask_after: Nanos,
    /// When it may be asked for that its stale copies be filled.
    pub ask_syncing_after: Nanos,
    /// Its losses.
    pub hold: Hold,
    /// Since when it has not adopted what we need it to.
    lags_since: Option<Nanos>,
    /// The newest lease that it granted.
    lease: Lease,
    /// Until when we may not serve what it was primary of.
    granted_until: Nanos,
    /// Operations and flushes of it that have not come to their end, of whatever session.
    pub serving: usize,
    last_error: Option<String>,
}

impl Peer {
    pub fn new(node: NodeId, now: Nanos) -> Self {
        Self {
            node,
            session: None,
            lost: None,
            ever_open: false,
            missed_since: None,
            ask_after: 0,
            ask_syncing_after: 0,
            hold: Hold::default(),
            lags_since: None,
            lease: Lease::default(),
            // After a start a node assumes that it had just granted a lease to everybody (rule 13).
            granted_until: if planted::is(Bug::LeaseForgotten) { 0 } else { now + LEASE },
            serving: 0,
            last_error: None,
        }
    }

    /// Whether messages may be sent.
    pub fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.sent_open && session.got_open)
    }

    pub fn session_id(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.id)
    }

    /// The newest version that it has adopted, as far as we heard on an open session.
    pub fn adopted(&self) -> MapVersion {
        self.session.as_ref().filter(|_| self.is_open()).map_or(MapVersion(0), |session| session.adopted)
    }

    /// Until when its lease lets us read slices of that epoch; 0 if it is none for them.
    ///
    /// A grantor that has not adopted the epoch may never do so: if it was primary before and is
    /// again under the map after, it sees no role come to it and waits for nobody's lease.
    pub fn leases_until(&self, epoch: SliceEpoch) -> Nanos {
        if self.lease.version.0 >= epoch.0 { self.lease.until } else { 0 }
    }

    pub fn granted_until(&self) -> Nanos {
        self.granted_until + LEASE_MARGIN
    }

    /// Whether any answer about a copy is awaited.
    pub fn owes(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.window.owed_since().is_some())
    }

    /// For how long it has owed us an answer about a copy, if for longer than that.
    pub fn slow_for(&self, now: Nanos, longer_than: Duration) -> Option<Nanos> {
        let since = self.session.as_ref()?.window.owed_since()?;
        Some(now.saturating_sub(since)).filter(|owed| *owed >= nanos(longer_than))
    }

    /// Why it is not open, for people.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }
}

impl Engine {
    /// A lane to that node stands, its handshake is done. A lane before it is over.
    pub fn handle_lane_up(&mut self, now: Nanos, node: NodeId, session: u64, process: ProcessId) {
        self.now = now;
        let Some(peer) = self.peer_index(node) else {
            let reason = format!("{node} is not in the map");
            self.actions.push_back(Action::CloseLane { peer: node, session, reason });
            return;
        };
        if self.peers[peer].session.is_some() {
            self.end_session(peer, "replaced by a new connection".into(), true);
        }
        self.peers[peer].session = Some(Session {
            id: session,
            process,
            sent_open: false,
            got_open: false,
            next_sequence: 1,
            window: Window::default(),
            starved: false,
            heard: now,
            next_ping: now,
            pings: VecDeque::new(),
            adopted: MapVersion(0),
            attached: Vec::new(),
            told_disks: 0,
        });
        self.open_if_quiet(peer);
        self.settle();
    }

    /// The lane of that session is gone.
    pub fn handle_lane_down(&mut self, now: Nanos, node: NodeId, session: u64, reason: &str) {
        self.now = now;
        let Some(peer) = self.peer_index(node) else { return };
        if self.peers[peer].session_id() == Some(session) {
            self.end_session(peer, reason.to_owned(), false);
        }
        self.settle();
    }

    /// Sends `Open` once nothing of an earlier session is under way.
    pub(super) fn open_if_quiet(&mut self, peer: PeerIndex) {
        if self.peers[peer].serving > 0 || self.map.is_none() {
            return;
        }
        let adopted = self.adopted_version();
        let Some(session) = self.peers[peer].session.as_mut().filter(|session| !session.sent_open) else {
            return;
        };
        session.sent_open = true;
        session.told_disks = self.disks.len();
        let mut body = Vec::with_capacity(16 * (1 + self.disks.len()));
        body.extend(self.process.0.to_le_bytes());
        body.extend(adopted.0.to_le_bytes());
        self.disks.iter().for_each(|disk| disk.write_attachment(&mut body));
        self.send_unanswered(peer, Header::new(Kind::Open), Body::Bytes(body));
        self.opened(peer);
    }

    /// `Open` from the peer.
    pub(super) fn on_open(&mut self, peer: PeerIndex, body: &[u8]) -> Result<(), BadFrame> {
        let mut words =
            body.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        let (Some(process), Some(adopted)) = (words.next(), words.next()) else {
            return Err(BadFrame::Content("open: too short"));
        };
        let attached = attachments(words);
        let session = self.peers[peer].session.as_mut().ok_or(BadFrame::Session)?;
        if session.process != ProcessId(process) {
            return Err(BadFrame::Content("open: not the process of the handshake"));
        }
        if session.got_open {
            return Err(BadFrame::Content("open: twice"));
        }
        session.got_open = true;
        session.adopted = MapVersion(adopted);
        session.attached = attached;
        self.check_incarnation(peer);
        self.opened(peer);
        Ok(())
    }

    /// Tells the peer of disks that this node got since it sent `Open`.
    pub(super) fn tell_disks(&mut self, peer: PeerIndex) {
        if !self.peers[peer].is_open() {
            return;
        }
        let Some(session) = self.peers[peer].session.as_mut() else { return };
        let told = std::mem::replace(&mut session.told_disks, self.disks.len());
        let mut body = Vec::new();
        self.disks[told..].iter().for_each(|disk| disk.write_attachment(&mut body));
        if !body.is_empty() {
            self.send_unanswered(peer, Header::new(Kind::Attached), Body::Bytes(body));
        }
    }

    /// `Attached` from the peer.
    pub(super) fn on_attached(&mut self, peer: PeerIndex, body: &[u8]) -> Result<(), BadFrame> {
        let session = self.peers[peer].session.as_mut().ok_or(BadFrame::Session)?;
        let words = body.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        for (disk, attach) in attachments(words) {
            if session.attached.iter().any(|(other, _)| *other == disk) {
                return Err(BadFrame::Content("attached: a disk that was there"));
            }
            if session.attached.len() >= DISKS_MAX {
                return Err(BadFrame::Content("attached: too many disks"));
            }
            session.attached.push((disk, attach));
        }
        self.check_incarnation(peer);
        Ok(())
    }

    /// A member whose incarnation is not the map's is no member (rule 3). Asked when any of these
    /// is new: the peer's session, its disks, the map that it has, or ours.
    pub(super) fn check_incarnation(&mut self, peer: PeerIndex) {
        if let Some(cause) = self.other_incarnation(peer)
            && !planted::is(Bug::SecondaryRebootBelieved)
        {
            self.lose(peer, cause);
        }
    }

    fn other_incarnation(&self, peer: PeerIndex) -> Option<String> {
        let map = self.map.as_ref()?;
        let node = self.peers[peer].node;
        let session = self.peers[peer].session.as_ref().filter(|session| session.got_open)?;
        let (attached, process) = (&session.attached, session.process);
        for (device, span) in self.spans_mirrored_by(peer) {
            let Some(replica) = span.replicas.iter().find(|replica| map.node_of(replica.disk) == Some(node))
            else {
                continue;
            };
            let attach = attached.iter().find(|(disk, _)| *disk == replica.disk).map(|(_, attach)| *attach);
            // It may have got the disk just now: it tells before it adopts the map that made this copy, and nothing was
            // ever stored there before it has. Of a copy that is older the disk is missing, whatever map the peer has: a
            // flush that it answers would cover nothing there.
            if attach.is_none() && session.adopted < replica.added {
                continue;
            }
            if attach != Some(replica.incarnation.attach) {
                return Some(format!(
                    "{} was detached or its machine restarted",
                    map.disk_name(replica.disk)
                ));
            }
            // Otherwise its process may be another: what it acknowledged was on its disk (rule 3).
            let memory_counts =
                device.commit != Commit::Immediate && !planted::is(Bug::StagedRestartBelieved);
            if memory_counts && process != replica.incarnation.process {
                return Some(format!(
                    "ublk-server on {} restarted with acknowledged writes in its memory",
                    map.node_name(node)
                ));
            }
        }
        None
    }

    /// The map's spans that this node is primary of and that have a current copy on that peer.
    fn spans_mirrored_by(&self, peer: PeerIndex) -> impl Iterator<Item = (&map::Device, &map::Span)> {
        let map = self.map.as_deref();
        let listed =
            self.devices.iter().filter_map(move |device| Some((&device.view, map?.device(device.view.id)?)));
        listed.flat_map(move |(view, device)| {
            view.spans.iter().zip(&device.spans).filter_map(move |(view, span)| {
                (view.serves() && view.others.contains(&peer)).then_some((device, span))
            })
        })
    }

    /// Whether this node counts on that peer's copies anywhere.
    pub(super) fn counts_on(&self, peer: PeerIndex) -> bool {
        (0..self.devices.len()).any(|device| self.counted_spans(device, peer).next().is_some())
    }

    /// Whether that peer's copies get this node's writes anywhere.
    pub(super) fn gets_writes(&self, peer: PeerIndex) -> bool {
        let mut spans = self.devices.iter().flat_map(|device| &device.view.spans);
        spans.any(|span| span.serves() && span.others.contains(&peer))
    }

    fn opened(&mut self, peer: PeerIndex) {
        if !self.peers[peer].is_open() {
            return;
        }
        self.peers[peer].ever_open = true;
        self.peers[peer].last_error = None;
        if self.peers[peer].lost.as_ref().is_some_and(|lost| lost.by_session) {
            self.peers[peer].lost = None;
        }
        self.shorten_wait();
        self.retry_parked();
        self.tell_disks(peer);
        self.send_adopted(peer);
        self.ping_if_due(peer);
        self.resume_after(peer);
    }

    /// Something became possible on that session: legs, parts and flushes that waited for it.
    pub(super) fn resume_after(&mut self, peer: PeerIndex) {
        let waiting: Vec<OpKey> = self
            .ops
            .iter()
            .filter(|(_, op)| op.doomed.is_none() && op.holds)
            .filter(|(_, op)| op.legs.iter().any(|leg| leg.peer == peer && leg.state == LegState::Unsent))
            .map(|(key, _)| key)
            .collect();
        for key in waiting {
            self.send_legs(key);
            self.progress(key);
        }
        self.route_held();
        self.resume_flushes();
        self.resync_due = true;
    }

    /// The peer is, or may be, behind as a member: the manager has to say so before anything goes on.
    pub(super) fn lose(&mut self, peer: PeerIndex, cause: String) {
        let lost_before = self.peers[peer].lost.as_ref();
        // That its disks hang may pass, and then be forgotten: this must not be.
        if self.gets_writes(peer) && lost_before.is_none_or(|lost| lost.by_session || lost.slow) {
            self.note_lost(peer, Lost { cause, by_session: false, slow: false });
        }
    }

    /// The peer cannot be reached. Copies that are not counted on are left out without a word (rule 1).
    fn lose_session(&mut self, peer: PeerIndex, cause: String) {
        if self.counts_on(peer) && self.peers[peer].lost.is_none() {
            self.note_lost(peer, Lost { cause, by_session: true, slow: false });
        }
    }

    fn note_lost(&mut self, peer: PeerIndex, lost: Lost) {
        if self.peers[peer].lost.is_none() {
            self.peers[peer].hold.lost(self.now, nanos(self.tolerance.hold_max));
        }
        self.peers[peer].lost = Some(lost);
        self.peers[peer].ask_after = 0;
        self.ask_if_due(peer);
        self.resume_after(peer);
    }

    fn ask_if_due(&mut self, peer: PeerIndex) {
        let entry = &mut self.peers[peer];
        let Some(lost) = entry.lost.clone().filter(|_| entry.ask_after <= self.now) else { return };
        entry.ask_after = self.now + ASK_AGAIN;
        let node = entry.node;
        let version = self.adopted_version();
        let Lost { cause, slow, .. } = lost;
        self.actions.push_back(Action::Report(match slow {
            true => Report::AskSlow { peer: node, version, cause },
            false => Report::AskStale { peer: node, version, cause },
        }));
    }

    /// Ends the peer's session; with `close` the lane has to be closed too.
    pub(super) fn end_session(&mut self, peer: PeerIndex, reason: String, close: bool) {
        let Some(session) = self.peers[peer].session.take() else { return };
        let node = self.peers[peer].node;
        if close {
            self.actions.push_back(Action::CloseLane {
                peer: node,
                session: session.id,
                reason: reason.clone(),
            });
        }
        self.peers[peer].last_error = Some(reason.clone());
        for awaited in session.window.into_awaited() {
            match awaited {
                Awaited::Leg(key) => self.leg_ended(peer, key, false),
                Awaited::Part(key, attempt) => self.part_unanswered(key, attempt, peer),
                Awaited::FlushLeg(key) => self.flush_leg_unsent(key, peer),
                Awaited::ExportFlush(key) => self.export_flush_unsent(key, peer),
                Awaited::Unite(exchange) => self.on_masks(peer, exchange, None),
                Awaited::Copy(key, message) => self.on_copy_answer(key, message, None),
                Awaited::Fetch(key) => self.on_fetched(key, None, None),
            }
        }
        self.resync_interrupted(peer);
        if self.peers[peer].ever_open {
            self.lose_session(peer, format!("session lost: {reason}"));
        }
        self.resume_after(peer);
        self.drop_operations_of(peer, session.id);
    }

    /// What has not begun is dropped. A secondary's ends with its I/O. A primary's write that has begun
    /// runs to its full end, without an answer: until every copy has it nobody may read it (rule 12), and
    /// so it keeps its range.
    fn drop_operations_of(&mut self, peer: PeerIndex, session: u64) {
        let theirs: Vec<OpKey> = self
            .ops
            .iter()
            .filter(|(_, op)| matches!(op.origin, Origin::Peer(sender) if sender.peer == peer && sender.session == session))
            .filter(|(_, op)| op.part == Part::Secondary || op.kind == OpKind::Read || !op.begun())
            .map(|(key, _)| key)
            .collect();
        for key in theirs {
            self.doom(key, crate::wire::header::Status::Fenced);
        }
        self.drop_flushes_of(peer, session);
    }

    /// An operation or flush of a peer's came to its end.
    pub(super) fn served(&mut self, peer: PeerIndex) {
        self.peers[peer].serving -= 1;
        self.open_if_quiet(peer);
    }

    // ---- messages ----

    /// Sends a message that will be answered; false if the session has no room for it.
    pub(super) fn send_awaited(
        &mut self,
        peer: PeerIndex,
        header: Header,
        trailer: Option<Trailer>,
        body: Body,
        awaited: Awaited,
    ) -> bool {
        let entry = &mut self.peers[peer];
        if !entry.is_open() {
            return false;
        }
        let Some(session) = entry.session.as_mut() else { return false };
        if !session.window.has_room() {
            session.starved = true;
            return false;
        }
        let data = matches!(body, Body::Buffer(_)) || header.kind.asks_for_data();
        let bytes = if data { header.length } else { 0 };
        session.window.put(session.next_sequence, awaited, bytes, self.now);
        self.push_frame(peer, header, trailer, body);
        true
    }

    /// Sends a message that nobody answers, or an answer whose `sequence` is set already.
    pub(super) fn send_unanswered(&mut self, peer: PeerIndex, header: Header, body: Body) {
        self.push_frame(peer, header, None, body);
    }

    fn push_frame(&mut self, peer: PeerIndex, mut header: Header, trailer: Option<Trailer>, body: Body) {
        let node = self.peers[peer].node;
        let Some(session) = self.peers[peer].session.as_mut() else { return };
        header.session = session.id;
        if header.sequence == 0 {
            header.sequence = session.next_sequence;
            session.next_sequence += 1;
        }
        let session = session.id;
        self.actions.push_back(Action::Send { peer: node, session, header, trailer, body });
    }

    /// Answers a message, if its session still stands; otherwise the body's buffer is given back.
    pub(super) fn answer(&mut self, sender: super::op::Sender, mut header: Header, body: Body) {
        if self.peers[sender.peer].session_id() != Some(sender.session) {
            if let Body::Release(range) = body {
                self.actions.push_back(Action::Release { buffer: range.buffer });
            }
            return;
        }
        header.sequence = sender.sequence;
        self.push_frame(sender.peer, header, None, body);
    }

    pub(super) fn send_adopted(&mut self, peer: PeerIndex) {
        if self.peers[peer].is_open() {
            let mut header = Header::new(Kind::Adopted);
            header.slice_epoch = SliceEpoch(self.adopted_version().0);
            self.send_unanswered(peer, header, Body::None);
        }
    }

    /// Takes the answer's waiter out of the window. One that an answer does not fit stays there: the session
    /// ends, and it is told so with all the others.
    pub(super) fn take_answered(
        &mut self,
        peer: PeerIndex,
        header: &Header,
        body: &[u8],
    ) -> Result<Awaited, BadFrame> {
        let session = self.peers[peer].session.as_mut().ok_or(BadFrame::Session)?;
        session.window.take_answered(header, body)
    }

    /// Answers made room: what could not be sent goes on. Not for every single one, since it looks at
    /// everything that waits.
    pub(super) fn resume_starved(&mut self, peer: PeerIndex) {
        let Some(session) = self.peers[peer].session.as_mut() else { return };
        if session.starved && session.window.is_half_empty() {
            session.starved = false;
            self.resume_after(peer);
        }
    }

    /// Checks that a frame belongs to the present session and notes that the peer lives.
    pub(super) fn heard(&mut self, peer: PeerIndex, header: &Header) -> Result<(), BadFrame> {
        let now = self.now;
        let session = self.peers[peer].session.as_mut().ok_or(BadFrame::Session)?;
        let late = planted::is(Bug::OldLane) || planted::is(Bug::OldExporter) && header.kind.is_forwarded();
        if session.id != header.session && !late {
            return Err(BadFrame::Session);
        }
        session.heard = now;
        let open = session.sent_open && session.got_open;
        if !open && header.kind != Kind::Open {
            return Err(BadFrame::Content("a message before open"));
        }
        Ok(())
    }

    /// The peer said which map it has.
    pub(super) fn on_adopted(&mut self, peer: PeerIndex, version: MapVersion) {
        if let Some(session) = self.peers[peer].session.as_mut()
            && session.adopted < version
        {
            session.adopted = version;
            self.check_incarnation(peer);
            self.shorten_wait();
            self.retry_parked();
            self.resume_after(peer);
            self.ping_soon(peer);
        }
    }

    /// A map was adopted here or there: leases granted before may be worth nothing now.
    pub(super) fn ping_soon(&mut self, peer: PeerIndex) {
        if let Some(session) = self.peers[peer].session.as_mut() {
            session.next_ping = self.now;
        }
        self.ping_if_due(peer);
    }

    // ---- lease ----

    /// Grants a lease: we will not serve what the peer is primary of before it has run out.
    pub(super) fn on_ping(&mut self, peer: PeerIndex, header: &Header) {
        self.on_adopted(peer, MapVersion(header.slice_epoch.0));
        self.peers[peer].granted_until = self.now + LEASE;
        let mut pong = Header::new(Kind::Pong);
        pong.sequence = header.sequence;
        pong.slice_epoch = SliceEpoch(self.adopted_version().0);
        self.send_unanswered(peer, pong, Body::None);
    }

    /// Takes a lease, unless its grantor knows a map that we do not (rule 2): the next will do.
    pub(super) fn on_pong(&mut self, peer: PeerIndex, header: &Header) {
        let mine = self.adopted_version();
        let Some(session) = self.peers[peer].session.as_mut() else { return };
        let Some(index) = session.pings.iter().position(|(sequence, _)| *sequence == header.sequence) else {
            return;
        };
        let (_, mut sent) = session.pings[index];
        if planted::is(Bug::LeaseFromAnswer) {
            sent = self.now;
        }
        session.pings.drain(..=index);
        let version = MapVersion(header.slice_epoch.0);
        if version <= mine || planted::is(Bug::LeaseOfNewerMap) {
            self.peers[peer].lease = Lease { until: sent + LEASE, version };
            self.retry_parked();
        }
        self.on_adopted(peer, version);
    }

    fn ping_if_due(&mut self, peer: PeerIndex) {
        let now = self.now;
        let version = self.adopted_version();
        if !self.peers[peer].is_open() {
            return;
        }
        let Some(session) = self.peers[peer].session.as_mut().filter(|session| session.next_ping <= now)
        else {
            return;
        };
        session.next_ping = now + PING_EVERY;
        session.pings.push_back((session.next_sequence, now));
        if session.pings.len() > PINGS_MAX {
            session.pings.pop_front();
        }
        let mut ping = Header::new(Kind::Ping);
        ping.slice_epoch = SliceEpoch(version.0);
        self.send_unanswered(peer, ping, Body::None);
    }

    /// Time passed: pings, silence, and what has to be asked again.
    /// `stalled`: this process did not run for a while; what has come meanwhile may not have been read.
    pub(super) fn tick_sessions(&mut self, stalled: bool) {
        for peer in 0..self.peers.len() {
            let heard = self.peers[peer].session.as_ref().map(|session| session.heard);
            if heard.is_some_and(|heard| heard + SILENCE <= self.now) {
                self.end_session(peer, format!("nothing heard for {} ms", SILENCE / 1_000_000), true);
            }
            self.ping_if_due(peer);
            self.miss(peer);
            self.lag(peer);
            if !stalled {
                self.owe(peer);
            }
            self.ask_if_due(peer);
            self.ask_syncing_if_due(peer);
        }
    }

    /// A copy may come to be counted on by this node while there is no session with its node: after
    /// our start, or when another primary's role came to us.
    fn miss(&mut self, peer: PeerIndex) {
        if self.peers[peer].is_open() || self.peers[peer].lost.is_some() || !self.counts_on(peer) {
            self.peers[peer].missed_since = None;
            return;
        }
        let since = *self.peers[peer].missed_since.get_or_insert(self.now);
        if since + UNREACHED <= self.now {
            self.lose_session(peer, "no session could be opened".into());
        }
    }

    /// A copy that we count on may be cut off from the manager, and never learn of the epoch that our
    /// writes carry.
    fn lag(&mut self, peer: PeerIndex) {
        let adopted = self.peers[peer].adopted();
        let lags = self.peers[peer].is_open()
            && (0..self.devices.len())
                .any(|device| self.counted_spans(device, peer).any(|span| span.epoch.0 > adopted.0));
        if !lags {
            self.peers[peer].lags_since = None;
            return;
        }
        let since = *self.peers[peer].lags_since.get_or_insert(self.now);
        if since + UNREACHED <= self.now {
            let cause = format!("it has not adopted {} yet", self.adopted_version());
            // It cannot, if its disk hangs.
            match self.peers[peer].slow_for(self.now, self.tolerance.slow_after) {
                Some(_) => self.lose_slow(peer, cause),
                None => self.lose(peer, cause),
            }
        }
    }

    /// A peer's disk may hang while its node lives: writes must not wait for it for ever.
    fn owe(&mut self, peer: PeerIndex) {
        let counted = self.gets_writes(peer);
        let lost_as_slow = self.peers[peer].lost.as_ref().is_some_and(|lost| lost.slow);
        if counted && lost_as_slow && self.peers[peer].is_open() && !self.peers[peer].owes() {
            // It has answered everything before the manager said anything: it missed nothing.
            self.peers[peer].lost = None;
            self.check_incarnation(peer);
            self.resume_after(peer);
            return;
        }
        let after = self.tolerance.stale_after;
        let too_long = |owed: Nanos| after.is_some_and(|after| owed >= nanos(after));
        let cause = |owed: Nanos| format!("it owes an answer for {} s", owed / 1_000_000_000);
        match self.peers[peer].slow_for(self.now, self.tolerance.slow_after) {
            Some(owed) if counted && too_long(owed) => self.lose_slow(peer, cause(owed)),
            // Its copies are on record as stale. What it owes holds its range here until the session ends, for only
            // then it cannot land there after what is written next (rule 10). Not while it is primary of what we have in
            // sync: it would go on without the copies here, which are well.
            Some(owed) if !counted && self.follows(peer) => self.ask_slow_if_due(peer, cause(owed)),
            Some(owed) if !counted => self.end_session(peer, cause(owed), true),
            _ => {}
        }
    }

    /// The peer lives, and its disks hang.
    fn lose_slow(&mut self, peer: PeerIndex, cause: String) {
        let lost_before = self.peers[peer].lost.as_ref();
        if self.gets_writes(peer) && lost_before.is_none_or(|lost| lost.by_session) {
            self.note_lost(peer, Lost { cause, by_session: false, slow: true });
        }
    }

    /// Whether that peer is primary of something that this node has in sync.
    fn follows(&self, peer: PeerIndex) -> bool {
        let mut spans = self.devices.iter().flat_map(|device| &device.view.spans);
        spans.any(|span| {
            span.primary == Place::Peer(peer)
                && span.mine.as_ref().is_some_and(|mine| mine.state == ReplicaState::InSync)
        })
    }

    fn ask_slow_if_due(&mut self, peer: PeerIndex, cause: String) {
        let version = self.adopted_version();
        let entry = &mut self.peers[peer];
        if entry.ask_after <= self.now {
            entry.ask_after = self.now + ASK_AGAIN;
            let peer = entry.node;
            self.actions.push_back(Action::Report(Report::AskSlow { peer, version, cause }));
        }
    }

    /// Gives a frame's buffer back.
    pub(super) fn release(&mut self, buffer: Option<BufferId>) {
        if let Some(buffer) = buffer {
            self.actions.push_back(Action::Release { buffer });
        }
    }
}
