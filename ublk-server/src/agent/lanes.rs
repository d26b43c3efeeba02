//! Lanes to other nodes: listening, dialling, handshakes. The I/O thread gets the finished socket.
//!
//! Of two nodes the one with the lower id dials, so that there is one connection, not two. Still a lane
//! may be replaced by a newer one: a node notices sooner than its peer that a connection is dead. What is
//! told of a lane then always says which, and the end of the older one is not the end of the newer one.

use super::io::IoHandle;
use super::told::Told;
use super::{Common, Input, nonce};
use anyhow::Context;
use mirror_net::ids::{ClusterId, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::{Purpose, Role};
use mirror_net::wire::transport;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

/// Between two attempts to dial.
const RETRY: Duration = Duration::from_millis(100);
/// For a connection and its handshake.
const PATIENCE: Duration = Duration::from_secs(3);
/// Handshakes under way at a time; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;

/// A lane whose handshake is done.
pub(crate) struct NewLane {
    /// The other node's name.
    pub peer: String,
    process: ProcessId,
    session: u64,
    socket: OwnedFd,
    /// If we dialled.
    hold: Option<Hold>,
}

/// Keeps a node from being dialled; dropping it lets the dialling go on.
type Hold = oneshot::Sender<Infallible>;

/// The cluster that lanes are accepted for, once it is known.
type Cluster = Arc<Mutex<Option<ClusterId>>>;

/// All lanes of this node.
pub(crate) struct Lanes {
    common: Common,
    cluster: Cluster,
    ids: HashMap<String, NodeId>,
    /// The nodes that we dial, and who does it.
    dialled: HashMap<NodeId, AbortHandle>,
    /// The newest lane to each node, until it is gone.
    standing: HashMap<NodeId, Standing>,
}

/// A lane that the I/O thread has.
struct Standing {
    session: u64,
    hold: Option<Hold>,
}

impl Lanes {
    /// Listens for other nodes.
    pub async fn listen(
        address: &str,
        common: Common,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!(
                "cannot listen on {address} (`address` of node {}): is another program using it?",
                common.node
            )
        })?;
        let cluster = Cluster::default();
        tokio::spawn(accept_all(listener, common.clone(), Arc::clone(&cluster), inputs));
        Ok(Self { common, cluster, ids: HashMap::new(), dialled: HashMap::new(), standing: HashMap::new() })
    }

    /// Dials whoever the map names and we do not dial yet, and nobody else any more: one that was removed from the
    /// cluster gets no lane.
    pub fn follow(&mut self, map: &DistributionMap, me: NodeId, inputs: &mpsc::UnboundedSender<Input>) {
        *self.cluster.lock().expect("never poisoned") = Some(map.cluster);
        self.ids.retain(|_, id| map.node(*id).is_some());
        self.dialled.retain(|id, dialler| {
            let stays = map.node(*id).is_some();
            if !stays {
                dialler.abort();
            }
            stays
        });
        for node in map.nodes.iter().filter(|node| node.id != me) {
            self.ids.insert(node.name.clone(), node.id);
            if node.id < me || self.dialled.contains_key(&node.id) {
                continue;
            }
            let target =
                Target { name: node.name.clone(), address: node.address.clone(), cluster: map.cluster };
            let dialler = tokio::spawn(dial(target, self.common.clone(), inputs.clone()));
            self.dialled.insert(node.id, dialler.abort_handle());
        }
    }

    /// Hands a finished socket to the I/O thread. It takes the place of a lane that still stands; one of a
    /// node that is not known is dropped.
    pub fn established(&mut self, lane: NewLane, io: &IoHandle) {
        let NewLane { peer, process, session, socket, hold } = lane;
        let Some(&id) = self.ids.get(&peer) else {
            tracing::warn!(node = peer, "a connection was refused: that node is not in the map");
            return;
        };
        tracing::info!(node = peer, session, "connected");
        let before = self.standing.remove(&id);
        // Whoever dialled the lane before waits for this one now.
        let hold = hold.or(before.and_then(|before| before.hold));
        self.standing.insert(id, Standing { session, hold });
        io.lane(id, session, process, socket);
    }

    /// That lane is gone: dial again, if that is ours to do. One that was replaced is not missed; false then.
    pub fn closed(&mut self, node: NodeId, session: u64) -> bool {
        let standing = self.standing.get(&node).is_some_and(|lane| lane.session == session);
        if standing {
            self.standing.remove(&node);
        }
        standing
    }
}

struct Target {
    name: String,
    address: String,
    cluster: ClusterId,
}

async fn dial(target: Target, common: Common, inputs: mpsc::UnboundedSender<Input>) {
    let mut told = Told::default();
    while !inputs.is_closed() {
        match tokio::time::timeout(PATIENCE, dial_once(&target, &common)).await {
            Ok(Ok(mut lane)) => {
                told.forget();
                let (hold, released) = oneshot::channel();
                lane.hold = Some(hold);
                if inputs.send(Input::Lane(lane)).is_err() {
                    return;
                }
                // Nothing is ever sent: it was dropped.
                let _ = released.await;
            }
            failed => {
                let reason = failed.map_or_else(
                    |_| "no answer".to_owned(),
                    |result| result.err().map_or_else(String::new, |error| error.to_string()),
                );
                if told.is_news(Instant::now(), &reason) {
                    tracing::warn!(
                        node = target.name,
                        address = target.address,
                        reason,
                        "cannot connect, trying on"
                    );
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn dial_once(target: &Target, common: &Common) -> anyhow::Result<NewLane> {
    let mut stream = TcpStream::connect(&target.address).await?;
    let identity = common.identity(Some(target.cluster));
    let established = transport::connect(&mut stream, &common.key, Purpose::Lane, &identity, nonce()).await?;
    anyhow::ensure!(
        established.peer.name == target.name,
        "{} answers as node {}: is its `address` right in the cluster file?",
        target.address,
        established.peer.name
    );
    Ok(NewLane {
        peer: established.peer.name,
        process: established.peer.process,
        session: established.session,
        socket: prepare(stream)?,
        hold: None,
    })
}

/// Makes a socket ready for the ring.
fn prepare(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let fd = OwnedFd::from(stream);
    // Nothing else notices a peer that is cut off while we wait for its acknowledgements.
    nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::TcpUserTimeout, &5_000)?;
    Ok(fd)
}

async fn accept_all(
    listener: TcpListener,
    common: Common,
    cluster: Cluster,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    // Whoever is refused comes again, ten times a second: the same is said once.
    let told = Arc::new(Mutex::new(Told::default()));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others will be closed.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let (common, cluster, inputs) = (common.clone(), Arc::clone(&cluster), inputs.clone());
        let told = Arc::clone(&told);
        tokio::spawn(async move {
            let from = stream.peer_addr().map_or_else(|_| String::new(), |address| address.ip().to_string());
            match tokio::time::timeout(PATIENCE, accept_one(stream, &common, &cluster)).await {
                Ok(Ok(lane)) => {
                    // Nobody listening means that the process is ending.
                    let _ = inputs.send(Input::Lane(lane));
                }
                failed => {
                    let reason = match failed {
                        Ok(refused) => refused.err().map_or_else(String::new, |error| error.to_string()),
                        Err(_) => "it did not finish its handshake".to_owned(),
                    };
                    let news = format!("{from}: {reason}");
                    if told.lock().expect("never poisoned").is_news(Instant::now(), &news) {
                        tracing::warn!(from, reason, "a connection was refused");
                    }
                }
            }
            drop(place);
        });
    }
}

async fn accept_one(mut stream: TcpStream, common: &Common, cluster: &Cluster) -> anyhow::Result<NewLane> {
    let incoming = transport::accept(&mut stream, &common.key, nonce()).await?;
    let mine = *cluster.lock().expect("never poisoned");
    let peer = incoming.peer().clone();
    let objection = if incoming.purpose() != Purpose::Lane || peer.role != Role::Node {
        Some("this port is for other nodes; mirrorctl talks to the manager")
    } else if mine.is_none() {
        Some("this node has no map yet")
    } else if peer.cluster != mine {
        Some("this node belongs to another cluster")
    } else {
        None
    };
    if let Some(objection) = objection {
        incoming.refuse(&mut stream, objection).await?;
        anyhow::bail!("{}: {objection}", peer.name);
    }
    let established = incoming.welcome(&mut stream, &common.identity(mine)).await?;
    Ok(NewLane {
        peer: peer.name,
        process: peer.process,
        session: established.session,
        socket: prepare(stream)?,
        hold: None,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::command::{Command, Inbox};
    use mirror_net::map::SegmentSlots;
    use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};
    use mirror_net::wire::handshake::{ClusterKey, Identity};

    const N1: NodeId = NodeId(1);
    const N2: NodeId = NodeId(2);

    fn key() -> ClusterKey {
        ClusterKey::new([7; 32])
    }

    /// Two nodes with those addresses that mirror each other.
    pub(in crate::agent) fn map(addresses: [&str; 2]) -> DistributionMap {
        let nodes = ["n1", "n2"].iter().zip(addresses).map(|(name, address)| NodeSpec {
            name: (*name).into(),
            address: address.into(),
            power: None,
            switch: None,
            disks: vec![DiskSpec {
                name: "d1".into(),
                slots: SegmentSlots { primary: 4, secondary: 4, unmirrored: 0 },
                block_bytes: 512,
                incarnation: Default::default(),
            }],
            spare: false,
            devices: Default::default(),
        });
        pairs(ClusterId::default(), "test", 64 << 20, &nodes.collect::<Vec<_>>()).unwrap()
    }

    /// n1 with its lanes, and n2's end of them.
    struct Pair {
        lanes: Lanes,
        io: IoHandle,
        inbox: Inbox,
        received: mpsc::UnboundedReceiver<Input>,
        /// Where n2 listens.
        other: TcpListener,
        /// n2's ends stay open.
        sockets: Vec<TcpStream>,
    }

    impl Pair {
        async fn new() -> Self {
            let (inputs, received) = mpsc::unbounded_channel();
            let common = Common { key: key(), node: "n1".into(), process: ProcessId(1) };
            let mut lanes = Lanes::listen("127.0.0.1:0", common, inputs.clone()).await.unwrap();
            let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = other.local_addr().unwrap().to_string();
            lanes.follow(&map(["127.0.0.1:1", &address]), N1, &inputs);
            let (io, inbox) = IoHandle::unattended();
            Self { lanes, io, inbox, received, other, sockets: Vec::new() }
        }

        /// n2 takes a connection. Returns the session.
        async fn welcomed(&mut self) -> u64 {
            let (mut stream, _) = self.other.accept().await.unwrap();
            let incoming = transport::accept(&mut stream, &key(), nonce()).await.unwrap();
            let me = Identity {
                role: Role::Node,
                name: "n2".into(),
                cluster: Some(ClusterId::default()),
                process: ProcessId(2),
            };
            let session = incoming.welcome(&mut stream, &me).await.unwrap().session;
            self.sockets.push(stream);
            session
        }

        /// And n1 hands its end to the I/O thread.
        async fn dialled(&mut self) -> u64 {
            let session = self.welcomed().await;
            let Some(Input::Lane(lane)) = self.received.recv().await else { panic!("not a lane") };
            self.lanes.established(lane, &self.io);
            assert_eq!(self.taken(), session);
            session
        }

        /// The session of the lane that the I/O thread was given.
        fn taken(&self) -> u64 {
            match self.inbox.commands.try_recv() {
                Ok(Command::Lane { peer: N2, session, .. }) => session,
                _ => panic!("the I/O thread was given no lane"),
            }
        }

        /// Another lane to n2, made by n2.
        fn replaced(&mut self, session: u64) {
            let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
            let lane = NewLane {
                peer: "n2".into(),
                process: ProcessId(2),
                session,
                socket: socket.into(),
                hold: None,
            };
            self.lanes.established(lane, &self.io);
            assert_eq!(self.taken(), session);
        }

        /// Whether n1 dials within some attempts.
        async fn dials(&self) -> bool {
            tokio::time::timeout(5 * RETRY, self.other.accept()).await.is_ok()
        }
    }

    #[tokio::test]
    async fn a_lane_that_is_gone_is_dialled_again() {
        let mut pair = Pair::new().await;
        let first = pair.dialled().await;
        assert!(!pair.dials().await, "two lanes");
        assert!(pair.lanes.closed(N2, first));
        let second = pair.dialled().await;
        assert_ne!(first, second);
        // What is told twice of one lane counts once.
        assert!(!pair.lanes.closed(N2, first));
        assert!(!pair.dials().await, "the new lane was given up");
    }

    #[tokio::test]
    async fn the_end_of_a_lane_that_was_replaced_takes_nothing_down() {
        let mut pair = Pair::new().await;
        let first = pair.dialled().await;
        pair.replaced(first.wrapping_add(1));
        assert!(!pair.lanes.closed(N2, first), "the newer lane was reported gone");
        assert!(!pair.dials().await, "a lane stands");
        assert!(pair.lanes.closed(N2, first.wrapping_add(1)));
        pair.dialled().await;
    }

    #[tokio::test]
    async fn a_lane_that_nobody_took_is_dialled_again() {
        let mut pair = Pair::new().await;
        // As when the map is not here yet.
        pair.welcomed().await;
        assert!(matches!(pair.received.recv().await, Some(Input::Lane(_))));
        pair.dialled().await;
    }
}
