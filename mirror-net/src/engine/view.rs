//! The adopted map as one node needs it: for each device, who is what for which slices.

use super::action::DiskIndex;
use crate::format::alloc::Segment;
use crate::ids::{
    AttachId, ClaimGeneration, DeviceId, DiskId, Incarnation, LossGeneration, MapVersion, NodeId, ProcessId,
    SliceEpoch,
};
use crate::map::validate::REPLICAS_MAX;
use crate::map::{self, Claim, Commit, DistributionMap, OnNoQuorum, ReplicaState};
use crate::planted::{self, Bug};

/// A node's index among the peers.
pub type PeerIndex = usize;

/// Other copies of a slice, at most.
pub const LEGS_MAX: usize = REPLICAS_MAX - 1;

/// A device as this node sees it.
#[derive(Clone, Debug)]
pub struct DeviceView {
    /// Its id.
    pub id: DeviceId,
    /// Who may export it.
    pub claim: Claim,
    /// The device is no more: the map does not list it.
    pub gone: bool,
    /// Its secondaries acknowledge a write once it is in their memory.
    pub deferred: bool,
    /// A request that cannot be served fails after a while.
    pub fails: bool,
    /// Its length in slices.
    pub slices: u32,
    /// Its logical block size in bytes.
    pub block_bytes: u32,
    /// It has more than one copy, or is to have: somebody may have been granted leases on it.
    pub mirrored: bool,
    /// Its spans, in order.
    pub spans: Vec<SpanView>,
    /// Who is primary of any slice, each once.
    pub primaries: Vec<Place>,
    /// Peers that hold a member or syncing copy of a slice that this node is primary of.
    pub secondaries: Vec<PeerIndex>,
    /// This node's disks that hold copies of it which are not stale.
    pub live_disks: Vec<DiskIndex>,
    /// Those from which it serves as primary.
    pub serving_disks: Vec<DiskIndex>,
}

/// This node or another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// This node.
    Here,
    /// That one.
    Peer(PeerIndex),
}

/// A run of slices with the same replica list.
#[derive(Clone, Debug)]
pub struct SpanView {
    /// The first slice.
    pub first: u32,
    /// One past the last.
    pub end: u32,
    /// Its epoch.
    pub epoch: SliceEpoch,
    /// Its loss generation.
    pub loss: LossGeneration,
    /// Who is primary.
    pub primary: Place,
    /// Whether the map means our copy as it is, where it lists us: as primary this very process and
    /// attachment, as secondary the attachment alone, unless it keeps what it acknowledged in memory
    /// (docs/protocol.md, Incarnation).
    pub intact: bool,
    /// This node's copy.
    pub mine: Option<Mine>,
    /// The other copies that get writes: members and syncing ones.
    pub others: Vec<PeerIndex>,
    /// As what each of `others` holds its copy.
    pub attached: Vec<Held>,
    /// Those of them that are members.
    pub members: Vec<PeerIndex>,
    /// Peers with copies that lack writes, on disks that work.
    pub stale: Vec<PeerIndex>,
    /// Copies in the list, stale ones included.
    pub copies: usize,
}

/// As what another node holds a copy: what it acknowledged as that, it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// The attachment of its disk.
    pub attach: AttachId,
    /// Its process, where some of what it acknowledged is in memory.
    pub process: Option<ProcessId>,
    /// The map that put it there.
    pub added: MapVersion,
}

/// This node's copy of a span.
#[derive(Clone, Copy, Debug)]
pub struct Mine {
    /// The disk.
    pub disk: DiskIndex,
    /// What it is worth.
    pub state: ReplicaState,
    /// The segment whose slots it takes up.
    pub segment: Segment,
    /// The map version that put it there.
    pub added: MapVersion,
}

impl Mine {
    /// Whether both take up slots of one segment.
    fn is_at(&self, other: &Mine) -> bool {
        (self.disk, self.segment) == (other.disk, other.segment)
    }
}

impl SpanView {
    /// Slices of which nobody has a copy.
    fn empty(slices: std::ops::Range<u32>, epoch: SliceEpoch, loss: LossGeneration) -> Self {
        Self {
            first: slices.start,
            end: slices.end,
            epoch,
            loss,
            primary: Place::Here,
            intact: false,
            mine: None,
            others: Vec::new(),
            attached: Vec::new(),
            members: Vec::new(),
            stale: Vec::new(),
            copies: 0,
        }
    }

    /// Whether this node serves these slices, leases and waits apart.
    pub fn serves(&self) -> bool {
        self.primary == Place::Here && self.intact
    }

    /// Whether every copy in the list is a member.
    pub fn is_complete(&self) -> bool {
        self.members.len() + 1 == self.copies || planted::is(Bug::ClearedAlone)
    }

    /// As what that peer holds its copy, if it gets writes.
    pub fn attached(&self, peer: PeerIndex) -> Option<Held> {
        self.others.iter().position(|other| *other == peer).map(|index| self.attached[index])
    }

    /// Whether that peer may send us writes for these slices.
    pub fn mirrors(&self, peer: PeerIndex) -> bool {
        self.primary == Place::Peer(peer)
            && self.intact
            && self.mine.is_some_and(|mine| mine.state != ReplicaState::Stale)
    }
}

impl DeviceView {
    /// Whether this node can flush what it is primary of: its own copy must be what the map says. One
    /// that lost its caches would flush nothing, and call it done.
    pub fn can_flush(&self) -> bool {
        let mut mine = self.spans.iter().filter(|span| span.primary == Place::Here).peekable();
        mine.peek().is_some() && mine.all(SpanView::serves)
    }

    /// The span of a slice, which must be within the device.
    pub fn span(&self, slice: u32) -> &SpanView {
        &self.spans[self.spans.partition_point(|span| span.end <= slice)]
    }

    /// The same device with those spans, which cover it in order.
    fn with_spans(self, spans: Vec<SpanView>) -> Self {
        let mut view = DeviceView {
            spans,
            primaries: Vec::new(),
            secondaries: Vec::new(),
            live_disks: Vec::new(),
            serving_disks: Vec::new(),
            ..self
        };
        for span in &view.spans {
            push_new(&mut view.primaries, span.primary);
            if span.primary == Place::Here {
                span.others.iter().for_each(|peer| push_new(&mut view.secondaries, *peer));
            }
            if let Some(mine) = span.mine {
                if mine.state != ReplicaState::Stale {
                    push_new(&mut view.live_disks, mine.disk);
                }
                if span.serves() {
                    push_new(&mut view.serving_disks, mine.disk);
                }
            }
        }
        view
    }

    /// The view of a device that is no more from that map on. What is under way ends: the claim is nobody's, and the
    /// epoch is one that no copy has.
    pub fn buried(&self, version: MapVersion) -> DeviceView {
        let claim = Claim {
            node: NodeId::default(),
            generation: ClaimGeneration(self.claim.generation.0 + 1),
            since: version,
        };
        let span = SpanView::empty(0..self.slices, SliceEpoch(version.0), LossGeneration(0));
        let spans = if self.slices > 0 { vec![span] } else { Vec::new() };
        DeviceView { claim, gone: true, fails: false, deferred: false, ..self.clone() }.with_spans(spans)
    }

    /// This view without this node's copies of slices that a newer one lists on another of its disks or in another
    /// segment, or as another copy, or not here at all: of those it says what the newer one says. `None` if there are none.
    pub fn without_copies_left_by(&self, newer: &DeviceView) -> Option<DeviceView> {
        let leaves = |span: &SpanView, newer: &SpanView| {
            let stays =
                |mine: Mine| newer.mine.is_some_and(|there| there.is_at(&mine) && there.added == mine.added);
            span.mine.is_some_and(|mine| !stays(mine))
        };
        let pairs = || {
            self.spans.iter().flat_map(|span| {
                let overlaps = |other: &&SpanView| other.first < span.end && span.first < other.end;
                newer.spans.iter().filter(overlaps).map(move |other| (span, other))
            })
        };
        // Of most devices a node has nothing.
        if !pairs().any(|(span, other)| leaves(span, other)) {
            return None;
        }
        let spans = pairs().map(|(span, other)| {
            let (first, end) = (span.first.max(other.first), span.end.min(other.end));
            if leaves(span, other) {
                // One that was dropped and added again keeps its slot, and gives nothing of what is there.
                let mine = other.mine.filter(|there| span.mine.is_some_and(|mine| mine.is_at(there)));
                SpanView { first, end, mine, intact: false, ..other.clone() }
            } else {
                SpanView { first, end, ..span.clone() }
            }
        });
        Some(self.clone().with_spans(spans.collect()))
    }

    /// The map version from which on this claim and that span hold together.
    pub fn fence(&self, span: &SpanView) -> MapVersion {
        MapVersion(span.epoch.0.max(self.claim.since.0))
    }
}

/// What the view of a node depends on besides the map.
pub struct Viewer<'a> {
    /// This node.
    pub me: NodeId,
    /// Its disks and their incarnations, in the engine's order.
    pub disks: &'a [(DiskId, Incarnation)],
    /// Where each node is in the engine's order of the others, by its id.
    pub peers: &'a [Option<PeerIndex>],
}

impl Viewer<'_> {
    /// Prepares one device of a map.
    pub fn device(&self, map: &DistributionMap, device: &map::Device) -> DeviceView {
        let unborn = DeviceView {
            id: device.id,
            claim: device.claim,
            gone: false,
            deferred: device.commit == Commit::Deferred,
            fails: device.on_no_quorum == OnNoQuorum::Error,
            slices: device.slices,
            block_bytes: device.block_bytes,
            mirrored: device.copies > 1 || device.spans.iter().any(|span| span.replicas.len() > 1),
            spans: Vec::new(),
            primaries: Vec::new(),
            secondaries: Vec::new(),
            live_disks: Vec::new(),
            serving_disks: Vec::new(),
        };
        unborn.with_spans(device.spans.iter().map(|span| self.span(map, device, span)).collect())
    }

    fn span(&self, map: &DistributionMap, device: &map::Device, span: &map::Span) -> SpanView {
        let copies = span.replicas.len();
        let mut view =
            SpanView { copies, ..SpanView::empty(span.first.0..span.end(), span.epoch, span.loss) };
        for (position, replica) in span.replicas.iter().enumerate() {
            let Some(place) = map.node_of(replica.disk).and_then(|node| self.place(node)) else { continue };
            if position == 0 {
                view.primary = place;
            }
            match place {
                Place::Here => {
                    // A disk that the map gives us and that we do not have leaves `mine` empty.
                    let disk = self.disks.iter().position(|(disk, _)| *disk == replica.disk);
                    view.mine = disk.map(|disk| Mine {
                        disk,
                        state: replica.state,
                        segment: replica.segment,
                        added: replica.added,
                    });
                    view.intact = disk.map(|disk| self.disks[disk].1).is_some_and(|now| {
                        now.attach == replica.incarnation.attach
                            && (!device.lives_in_memory(span, replica.disk) || now == replica.incarnation)
                    });
                }
                Place::Peer(peer) if replica.state != ReplicaState::Stale => {
                    view.others.push(peer);
                    view.attached.push(Held {
                        attach: replica.incarnation.attach,
                        process: device
                            .lives_in_memory(span, replica.disk)
                            .then_some(replica.incarnation.process),
                        added: replica.added,
                    });
                    if replica.state == ReplicaState::InSync {
                        view.members.push(peer);
                    }
                }
                Place::Peer(peer) => {
                    if map.disk(replica.disk).is_some_and(|disk| disk.failed.is_none()) {
                        view.stale.push(peer);
                    }
                }
            }
        }
        view
    }

    fn place(&self, node: NodeId) -> Option<Place> {
        if node == self.me {
            return Some(Place::Here);
        }
        self.peers.get(usize::from(node.0)).copied().flatten().map(Place::Peer)
    }
}

fn push_new<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}
