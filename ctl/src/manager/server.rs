//! The loop around the manager's core.

use super::connection;
use super::events::EventLog;
use super::store::{Store, Swapped};
use crate::failure::Failure;
use crate::key::random_bytes;
use mirror_net::config::{ClusterFile, Policy};
use mirror_net::control::{
    EventKind, ManagerMessage, NodeMessage, OperatorReply, OperatorRequest, Registration,
};
use mirror_net::ids::{ClusterId, ProcessId};
use mirror_net::manager::{ConnectionId, Input, Manager, Output, Ticket};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::ClusterKey;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often the core learns that time has passed.
const TICK: Duration = Duration::from_millis(250);
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

/// What connections share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) key: ClusterKey,
    pub(super) process: ProcessId,
    pub(super) cluster: watch::Receiver<Option<ClusterId>>,
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

/// The core, and what it needs to act.
pub struct Server<S> {
    manager: Manager,
    store: S,
    events: EventLog,
    started: Instant,
    senders: HashMap<ConnectionId, mpsc::Sender<ManagerMessage>>,
    replies: HashMap<Ticket, oneshot::Sender<OperatorReply>>,
    tickets: u64,
    cluster: watch::Sender<Option<ClusterId>>,
}

/// Serves until `stop` is done, or the store fails.
pub async fn serve<S: Store>(
    listener: TcpListener,
    key: ClusterKey,
    store: S,
    map: Option<DistributionMap>,
    events: EventLog,
    policy: Policy,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let (cluster, watch) = watch::channel(map.as_ref().map(|map| map.cluster));
    let (sender, mut arriving) = mpsc::channel(EVENTS_MAX);
    let bytes = random_bytes()?;
    let process = ProcessId(u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default()));
    let shared = Shared {
        key,
        process,
        cluster: watch,
        events: sender,
        connections: Arc::new(AtomicU64::new(1)),
        told: Arc::default(),
    };
    let accepting = tokio::spawn(accept(listener, shared));
    let mut server = Server {
        manager: Manager::new(map, policy),
        store,
        events,
        started: Instant::now(),
        senders: HashMap::new(),
        replies: HashMap::new(),
        tickets: 0,
        cluster,
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = std::pin::pin!(stop);
    let result = loop {
        let outcome = tokio::select! {
            () = &mut stop => break Ok(()),
            _ = tick.tick() => server.feed(Input::Tick),
            event = arriving.recv() => match event {
                Some(event) => server.event(event),
                None => break Ok(()),
            },
        };
        if let Err(failure) = outcome {
            break Err(failure);
        }
    };
    accepting.abort();
    result
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

impl<S: Store> Server<S> {
    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn event(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Register { connection, cluster, registration, sender } => {
                self.senders.insert(connection, sender);
                self.feed(Input::Register { connection, cluster, registration })
            }
            Event::Message { connection, message } => self.feed(Input::Message { connection, message }),
            Event::Disconnected { connection } => {
                self.senders.remove(&connection);
                self.feed(Input::Disconnected { connection })
            }
            Event::Operator { request, reply } => self.operator(request, reply),
        }
    }

    fn operator(
        &mut self,
        request: OperatorRequest,
        reply: oneshot::Sender<OperatorReply>,
    ) -> Result<(), Failure> {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        // An operator who has gone away needs no answer; what was asked for is done all the same.
        let answer = match request {
            OperatorRequest::Map => OperatorReply::Map { map: self.manager.map().cloned().map(Box::new) },
            OperatorRequest::Status => OperatorReply::Status(Box::new(self.manager.status(self.now_ms()))),
            OperatorRequest::Events { after } => OperatorReply::Events { events: self.events.after(after) },
            OperatorRequest::Plan { plan, order } => {
                self.replies.insert(ticket, reply);
                return self.feed(Input::Plan { ticket, plan, order });
            }
            OperatorRequest::Failover { node } => {
                self.replies.insert(ticket, reply);
                return self.feed(Input::Failover { ticket, node });
            }
            OperatorRequest::CreateCluster { file, force } => match ClusterFile::parse(&file, "cluster file")
            {
                Ok(file) => {
                    let cluster = ClusterId(uuid::Uuid::new_v4());
                    self.replies.insert(ticket, reply);
                    return self.feed(Input::Create { ticket, file: Box::new(file), cluster, force });
                }
                Err(error) => OperatorReply::Refused { reason: error.to_string() },
            },
        };
        let _ = reply.send(answer);
        Ok(())
    }

    /// Feeds the core and does what it wants, until it wants nothing more.
    fn feed(&mut self, input: Input) -> Result<(), Failure> {
        self.manager.handle(self.now_ms(), input);
        while let Some(output) = self.manager.poll() {
            match output {
                Output::Store(proposal) => {
                    let swapped = self.store.swap(proposal.base, &proposal.next, &proposal.why);
                    let input = match swapped.map_err(|error| stopped(&error))? {
                        Swapped::Stored => {
                            for line in &proposal.why {
                                tracing::info!("map {}: {line}", proposal.next.version);
                                self.events.note(EventKind::Map, Some(proposal.next.version), line.clone());
                            }
                            Input::Stored { version: proposal.next.version }
                        }
                        Swapped::Conflict(newest) => Input::Conflict { newest },
                    };
                    self.manager.handle(self.now_ms(), input);
                    self.cluster.send_replace(self.manager.map().map(|map| map.cluster));
                }
                Output::GiveSession { connection } => {
                    let session = self.store.exporter_session().map_err(|error| stopped(&error))?;
                    self.manager.handle(self.now_ms(), Input::Session { connection, session });
                }
                Output::Send { connection, message } => self.send(connection, message),
                // The connection ends when everything queued is sent.
                Output::Close { connection } => drop(self.senders.remove(&connection)),
                Output::Reply { ticket, reply } => {
                    if let Some(sender) = self.replies.remove(&ticket) {
                        let _ = sender.send(reply);
                    }
                }
                Output::Log(line) => tracing::info!("{line}"),
                Output::Event(kind, line) => {
                    tracing::info!("{line}");
                    self.events.note(kind, None, line);
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, connection: ConnectionId, message: ManagerMessage) {
        let Some(sender) = self.senders.get(&connection) else { return };
        if sender.try_send(message).is_err() {
            tracing::warn!("{connection:?} does not read what it is sent: hanging up");
            self.senders.remove(&connection);
        }
    }
}

/// After a failed write nobody knows what is stored: the next start reads it.
fn stopped(error: &super::store::StoreError) -> Failure {
    Failure::new(format!("the manager stops, since its state cannot be kept: {error}"))
}
