//! Lanes to other nodes: listening, dialling, handshakes. The I/O thread gets the finished socket.
//!
//! Of two nodes the one with the lower id dials, so that there is one connection, not two.

use super::io::IoHandle;
use super::{Common, Input, nonce};
use anyhow::Context;
use mirror_net::ids::{ClusterId, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::{Purpose, Role};
use mirror_net::wire::transport;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};

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
}

/// The cluster that lanes are accepted for, once it is known.
type Cluster = Arc<Mutex<Option<ClusterId>>>;

/// All lanes of this node.
pub(crate) struct Lanes {
    common: Common,
    cluster: Cluster,
    ids: HashMap<String, NodeId>,
    /// For each node that we dial: told when its lane is gone.
    dialled: HashMap<String, Arc<Notify>>,
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
        Ok(Self { common, cluster, ids: HashMap::new(), dialled: HashMap::new() })
    }

    /// Dials whoever the map names and we do not dial yet.
    pub fn follow(&mut self, map: &DistributionMap, me: NodeId, inputs: &mpsc::UnboundedSender<Input>) {
        *self.cluster.lock().expect("never poisoned") = Some(map.cluster);
        for node in map.nodes.iter().filter(|node| node.id != me) {
            self.ids.insert(node.name.clone(), node.id);
            if node.id < me || self.dialled.contains_key(&node.name) {
                continue;
            }
            let closed = Arc::new(Notify::new());
            self.dialled.insert(node.name.clone(), Arc::clone(&closed));
            let target =
                Target { name: node.name.clone(), address: node.address.clone(), cluster: map.cluster };
            tokio::spawn(dial(target, self.common.clone(), closed, inputs.clone()));
        }
    }

    /// Hands a finished socket to the I/O thread.
    pub fn established(&mut self, lane: NewLane, io: &IoHandle) {
        match self.ids.get(&lane.peer) {
            Some(id) => {
                tracing::info!(node = lane.peer, session = lane.session, "connected");
                io.lane(*id, lane.session, lane.process, lane.socket);
            }
            None => {
                tracing::warn!(node = lane.peer, "a connection was refused: that node is not in the map");
                self.closed(&lane.peer);
            }
        }
    }

    /// The lane to that node is gone: dial again, if that is ours to do.
    pub fn closed(&self, node: &str) {
        if let Some(closed) = self.dialled.get(node) {
            closed.notify_one();
        }
    }
}

struct Target {
    name: String,
    address: String,
    cluster: ClusterId,
}

async fn dial(target: Target, common: Common, closed: Arc<Notify>, inputs: mpsc::UnboundedSender<Input>) {
    let mut told = String::new();
    while !inputs.is_closed() {
        match tokio::time::timeout(PATIENCE, dial_once(&target, &common)).await {
            Ok(Ok(lane)) => {
                told.clear();
                if inputs.send(Input::Lane(lane)).is_err() {
                    return;
                }
                closed.notified().await;
            }
            failed => {
                let reason = failed.map_or_else(
                    |_| "no answer".to_owned(),
                    |result| result.err().map_or_else(String::new, |error| error.to_string()),
                );
                if told != reason {
                    tracing::warn!(
                        node = target.name,
                        address = target.address,
                        reason,
                        "cannot connect, trying on"
                    );
                    told = reason;
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
    let told = Arc::new(Mutex::new(String::new()));
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
                    if std::mem::replace(&mut *told.lock().expect("never poisoned"), news.clone()) != news {
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
    })
}
