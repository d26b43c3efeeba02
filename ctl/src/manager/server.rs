//! The loop around the manager's core, from the moment that this manager leads until it does not.

use super::events::{EventLog, Note};
use super::front::Event;
use super::keeper::{Done, Order, keep};
use super::store::{Store, StoreError, Swapped, Tenure};
use crate::failure::Failure;
use mirror_net::config::{ClusterFile, Policy};
use mirror_net::control::{self, ManagerMessage, OperatorReply, OperatorRequest};
use mirror_net::ids::ClusterId;
use mirror_net::manager::watch::WatchClock;
use mirror_net::manager::{ConnectionId, Input, Manager, Output, Ticket};
use mirror_net::map::DistributionMap;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// How often the core learns that time has passed.
const TICK: Duration = Duration::from_millis(250);
/// How long the store may take to write what is left when the manager is told to stop.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// How a reign ended.
#[derive(Debug)]
pub(super) enum End {
    /// The manager was told to stop.
    Stopped,
    /// It may not act any more, and why.
    Deposed(String),
}

/// The core, and what it needs to act.
struct Server<'a> {
    manager: Manager,
    orders: mpsc::UnboundedSender<Order>,
    events: EventLog,
    started: Instant,
    clock: WatchClock,
    senders: HashMap<ConnectionId, mpsc::Sender<ManagerMessage>>,
    replies: HashMap<Ticket, oneshot::Sender<OperatorReply>>,
    tickets: u64,
    cluster: &'a watch::Sender<Option<ClusterId>>,
}

/// What one reign begins with, besides its store.
pub(super) struct Reign<'a> {
    pub(super) map: Option<DistributionMap>,
    pub(super) tenure: Tenure,
    pub(super) policy: Policy,
    pub(super) events: Vec<control::Event>,
    pub(super) cluster: &'a watch::Sender<Option<ClusterId>>,
}

/// Leads until `stop` is done, the tenure is over, or the store fails.
pub(super) async fn lead<S: Store>(
    store: S,
    reign: Reign<'_>,
    arriving: &mut mpsc::Receiver<Event>,
    stop: &mut Pin<&mut (impl Future<Output = ()> + ?Sized)>,
) -> Result<End, Failure> {
    let Reign { map, tenure, policy, events, cluster } = reign;
    let (orders, received) = mpsc::unbounded_channel();
    let (done, mut results) = mpsc::unbounded_channel();
    let kept = events.last().map_or(0, |event| event.number);
    let mut keeping = tokio::spawn(keep(store, received, done, kept));
    cluster.send_replace(map.as_ref().map(|map| map.cluster));
    let mut server = Server {
        manager: Manager::new(map, policy),
        orders,
        events: EventLog::new(events),
        started: Instant::now(),
        clock: WatchClock::default(),
        senders: HashMap::new(),
        replies: HashMap::new(),
        tickets: 0,
        cluster,
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut clock = tenure.clone();
    let result = loop {
        let input = tokio::select! {
            () = stop.as_mut() => break Ok(End::Stopped),
            () = clock.over() => break Ok(End::Deposed(tenure.why())),
            result = results.recv() => match result {
                Some(Ok(done)) => server.done(done),
                Some(Err(StoreError::Deposed(why))) => break Ok(End::Deposed(why)),
                Some(Err(error)) => break Err(stopped(&error)),
                None => break Err(Failure::new("the manager's store ended without a reason")),
            },
            _ = tick.tick() => Some(Input::Tick),
            event = arriving.recv() => match event {
                Some(event) => server.event(event),
                None => break Ok(End::Stopped),
            },
        };
        // It may have been long since the look at the clock: this process may have been stopped.
        if !tenure.holds() {
            break Ok(End::Deposed(tenure.why()));
        }
        if let Some(input) = input {
            server.feed(input);
        }
    };
    if let Ok(End::Deposed(_)) = &result {
        server.give_up();
    }
    drop(server);
    let stopped = matches!(result, Ok(End::Stopped));
    if !(stopped && timeout(FLUSH_MAX, &mut keeping).await.is_ok()) {
        // Whatever is being written is as good as lost: what the store then holds is what counts.
        keeping.abort();
        let _ = keeping.await;
    }
    result
}

impl Server<'_> {
    fn now_ms(&mut self) -> u64 {
        self.clock.look(self.started.elapsed().as_millis() as u64)
    }

    fn event(&mut self, event: Event) -> Option<Input> {
        match event {
            Event::Register { connection, cluster, registration, sender } => {
                self.senders.insert(connection, sender);
                Some(Input::Register { connection, cluster, registration })
            }
            Event::Message { connection, message } => Some(Input::Message { connection, message }),
            Event::Disconnected { connection } => {
                self.senders.remove(&connection);
                Some(Input::Disconnected { connection })
            }
            Event::Operator { request, reply } => self.operator(request, reply),
        }
    }

    fn operator(&mut self, request: OperatorRequest, reply: oneshot::Sender<OperatorReply>) -> Option<Input> {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        // An operator who has gone away needs no answer; what was asked for is done all the same.
        let answer = match request {
            OperatorRequest::Map => OperatorReply::Map { map: self.manager.map().cloned().map(Box::new) },
            OperatorRequest::Status => {
                let now_ms = self.now_ms();
                OperatorReply::Status(Box::new(self.manager.status(now_ms)))
            }
            OperatorRequest::Events { after } => OperatorReply::Events { events: self.events.after(after) },
            OperatorRequest::Plan { plan, order } => {
                self.replies.insert(ticket, reply);
                return Some(Input::Plan { ticket, plan, order });
            }
            OperatorRequest::Redistribute(order) => {
                self.replies.insert(ticket, reply);
                return Some(Input::Redistribute { ticket, order });
            }
            OperatorRequest::Device(order) => {
                self.replies.insert(ticket, reply);
                return Some(Input::Device { ticket, order });
            }
            OperatorRequest::Enrol(order) => {
                self.replies.insert(ticket, reply);
                return Some(Input::Enrol { ticket, order });
            }
            OperatorRequest::Rebuild { file, without, install } => {
                match ClusterFile::parse(&file, "cluster file") {
                    Ok(file) => {
                        self.replies.insert(ticket, reply);
                        return Some(Input::Rebuild { ticket, file: Box::new(file), without, install });
                    }
                    Err(error) => OperatorReply::Refused { reason: error.to_string() },
                }
            }
            OperatorRequest::Broadcast { kind, id } => {
                self.replies.insert(ticket, reply);
                let new = || uuid::Uuid::new_v4().as_u64_pair().0;
                let (begins, id) = (id.is_none(), id.unwrap_or_else(new));
                return Some(Input::Broadcast { ticket, kind, id, begins });
            }
            OperatorRequest::Failover { node } => {
                self.replies.insert(ticket, reply);
                return Some(Input::Failover { ticket, node });
            }
            OperatorRequest::Force(order) => {
                self.replies.insert(ticket, reply);
                return Some(Input::Force { ticket, order });
            }
            OperatorRequest::CreateCluster { file, force } => match ClusterFile::parse(&file, "cluster file")
            {
                Ok(file) => {
                    let cluster = ClusterId(uuid::Uuid::new_v4());
                    self.replies.insert(ticket, reply);
                    return Some(Input::Create { ticket, file: Box::new(file), cluster, force });
                }
                Err(error) => OperatorReply::Refused { reason: error.to_string() },
            },
        };
        let _ = reply.send(answer);
        None
    }

    /// What the store did, as the core is to hear it.
    fn done(&mut self, done: Done) -> Option<Input> {
        Some(match done {
            Done::Swapped(proposal, Swapped::Stored { .. }) => {
                let version = proposal.next.version;
                for line in &proposal.why {
                    tracing::info!("map {version}: {line}");
                }
                Input::Stored { version }
            }
            Done::Swapped(_, Swapped::Conflict(newest)) => Input::Conflict { newest },
            Done::Session(connection, session) => Input::Session { connection, session },
            Done::Kept(events) => {
                self.events.add(events);
                return None;
            }
        })
    }

    /// Feeds the core and does what it wants, until it wants nothing more.
    fn feed(&mut self, input: Input) {
        let changes = matches!(input, Input::Stored { .. } | Input::Conflict { .. });
        let now_ms = self.now_ms();
        self.manager.handle(now_ms, input);
        if changes {
            self.cluster.send_replace(self.manager.map().map(|map| map.cluster));
        }
        while let Some(output) = self.manager.poll() {
            match output {
                // The store's end is noticed by the loop.
                Output::Store(proposal) => drop(self.orders.send(Order::Swap(Box::new(proposal)))),
                Output::GiveSession { connection } => drop(self.orders.send(Order::Session(connection))),
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
                    drop(self.orders.send(Order::Note(Note::new(kind, None, line))));
                }
            }
        }
    }

    fn send(&mut self, connection: ConnectionId, message: ManagerMessage) {
        let Some(sender) = self.senders.get(&connection) else { return };
        if sender.try_send(message).is_err() {
            tracing::warn!("{connection:?} does not read what it is sent: hanging up");
            self.senders.remove(&connection);
        }
    }

    /// Another manager may lead: operators learn that nobody knows yet what became of their wishes.
    fn give_up(&mut self) {
        let reason = "the manager ceased to lead in the middle of this: what is stored of it is in `mirrorctl map \
                      show`; repeating it is safe";
        for (_, reply) in self.replies.drain() {
            let _ = reply.send(OperatorReply::Refused { reason: reason.to_owned() });
        }
    }
}

/// After a failed write nobody knows what is stored: the next start reads it.
fn stopped(error: &StoreError) -> Failure {
    Failure::new(format!("the manager stops, since its state cannot be kept: {error}"))
}
