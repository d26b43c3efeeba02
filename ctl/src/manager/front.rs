//! Where the manager listens, whether it leads or not.

use super::connection;
use crate::failure::Failure;
use crate::key::random_bytes;
use mirror_net::control::{ManagerMessage, NodeMessage, OperatorReply, OperatorRequest, Registration};
use mirror_net::ids::{ClusterId, ProcessId};
use mirror_net::manager::ConnectionId;
use mirror_net::wire::handshake::ClusterKey;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// Connections at a time; more wait.
const CONNECTIONS_MAX: usize = 1024;
/// Events that have arrived and wait for the core.
const EVENTS_MAX: usize = 1024;

/// What a connection tells the loop.
pub(super) enum Event {
    Register {
        connection: ConnectionId,
        cluster: Option<ClusterId>,
        registration: Registration,
        sender: mpsc::Sender<ManagerMessage>,
    },
    Message {
        connection: ConnectionId,
        message: NodeMessage,
    },
    Disconnected {
        connection: ConnectionId,
    },
    Operator {
        request: OperatorRequest,
        reply: oneshot::Sender<OperatorReply>,
    },
}

/// Whether this manager leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Post {
    Leads,
    /// Where the one is that does, if that is known, and why it is not this one.
    Follows {
        leader: Option<String>,
        why: String,
    },
}

/// What connections share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) key: ClusterKey,
    pub(super) process: ProcessId,
    pub(super) cluster: watch::Receiver<Option<ClusterId>>,
    pub(super) post: watch::Receiver<Post>,
    pub(super) events: mpsc::Sender<Event>,
    connections: Arc<AtomicU64>,
    told: Arc<Mutex<String>>,
}

impl Shared {
    pub(super) fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed))
    }

    /// Whoever is turned away comes again, several times a second: the same is said once.
    pub(super) fn is_news(&self, line: &str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *told, line.to_owned()) != line
    }
}

/// The listener, and the ends of what connections share.
pub(super) struct Front {
    pub(super) address: String,
    pub(super) process: ProcessId,
    pub(super) cluster: watch::Sender<Option<ClusterId>>,
    pub(super) post: watch::Sender<Post>,
    pub(super) arriving: mpsc::Receiver<Event>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Front {
    /// Listens on `wanted`, or else on the first of the managers' addresses that is this machine's.
    pub(super) async fn open(
        managers: &[String],
        wanted: Option<&str>,
        key: ClusterKey,
    ) -> Result<Self, Failure> {
        let (address, listener) = listen(managers, wanted).await?;
        let (cluster, cluster_watch) = watch::channel(None);
        let follows = Post::Follows { leader: None, why: "this manager has just started".into() };
        let (post, post_watch) = watch::channel(follows);
        let (events, arriving) = mpsc::channel(EVENTS_MAX);
        let bytes = random_bytes()?;
        let process = ProcessId(u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default()));
        let shared = Shared {
            key,
            process,
            cluster: cluster_watch,
            post: post_watch,
            events,
            connections: Arc::new(AtomicU64::new(1)),
            told: Arc::default(),
        };
        let accepting = tokio::spawn(accept(listener, shared));
        Ok(Self { address, process, cluster, post, arriving, accepting })
    }

    /// Answers what had been on its way when this manager did not lead.
    pub(super) fn turn_away(&self, event: Event) {
        let Post::Follows { leader, why } = self.post.borrow().clone() else { return };
        match event {
            Event::Register { sender, .. } => {
                let _ = sender.try_send(ManagerMessage::NotLeader { leader, why });
            }
            Event::Operator { reply, .. } => {
                let _ = reply.send(OperatorReply::NotLeader { leader, why });
            }
            Event::Message { .. } | Event::Disconnected { .. } => {}
        }
    }
}

async fn listen(managers: &[String], wanted: Option<&str>) -> Result<(String, TcpListener), Failure> {
    if let Some(wanted) = wanted.filter(|wanted| !managers.iter().any(|manager| manager == wanted)) {
        return Err(Failure::new(format!(
            "--address {wanted} is none of `manager` in the cluster file, which are {}",
            managers.join(", ")
        )));
    }
    let candidates: Vec<&str> = match wanted {
        Some(wanted) => vec![wanted],
        None => managers.iter().map(String::as_str).collect(),
    };
    let mut failures = Vec::new();
    for address in candidates {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok((address.to_owned(), listener)),
            Err(error) => {
                let hint = match error.kind() {
                    ErrorKind::AddrInUse => "is another manager running? `ss -ltnp` names it",
                    ErrorKind::AddrNotAvailable => {
                        "`manager` in the cluster file must have an address of this machine"
                    }
                    _ => "check `manager` in the cluster file",
                };
                failures.push(format!("cannot listen on {address}: {error}: {hint}"));
            }
        }
    }
    Err(Failure::new(failures.join("; ")))
}

async fn accept(listener: TcpListener, shared: Shared) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    connection::serve(stream, from, shared).await;
                    drop(place);
                });
            }
            // Out of descriptors, most likely: others will be closed.
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
