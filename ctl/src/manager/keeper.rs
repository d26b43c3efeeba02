//! What the store is to do, one thing after the other, so that the core need not wait for it.
//!
//! Events give way: a map is never stored later because of one. While nothing else is to be done they are written in
//! order; if something comes in the middle of that, the writing is given up, and done again with the map or after it.

use super::events::{Note, Unkept};
use super::store::{Store, StoreError, Swapped};
use mirror_net::control::{Event, EventKind};
use mirror_net::ids::ExporterSession;
use mirror_net::manager::{ConnectionId, Proposal};
use tokio::sync::mpsc;

/// What the store is to do.
pub(super) enum Order {
    Swap(Box<Proposal>),
    Session(ConnectionId),
    Note(Note),
}

/// What it did.
pub(super) enum Done {
    Swapped(Box<Proposal>, Swapped),
    Session(ConnectionId, ExporterSession),
    /// These events are kept, behind all that were before.
    Kept(Vec<Event>),
}

/// Sends what the store did.
type Results = mpsc::UnboundedSender<Result<Done, StoreError>>;

struct Keeper<S> {
    store: S,
    orders: mpsc::UnboundedReceiver<Order>,
    done: Results,
    unkept: Unkept,
}

/// Carries out the orders until there are no more of them, or one fails: then nobody knows what is stored. `kept` is
/// the number of the last event that the store has.
pub(super) async fn keep<S: Store>(
    store: S,
    orders: mpsc::UnboundedReceiver<Order>,
    done: Results,
    kept: u64,
) {
    let mut keeper = Keeper { store, orders, done, unkept: Unkept::new(kept) };
    if let Err(error) = keeper.run().await {
        let _ = keeper.done.send(Err(error));
    }
}

impl<S> Drop for Keeper<S> {
    /// Also where it is given up in the middle of something.
    fn drop(&mut self) {
        if !self.unkept.all().is_empty() {
            tracing::warn!("the last {} events are told in this log only", self.unkept.all().len());
        }
    }
}

impl<S: Store> Keeper<S> {
    async fn run(&mut self) -> Result<(), StoreError> {
        while let Some(order) = self.next().await? {
            let done = match order {
                Order::Swap(proposal) => {
                    let swapped = self.swap(&proposal).await?;
                    Done::Swapped(proposal, swapped)
                }
                Order::Session(connection) => Done::Session(connection, self.store.exporter_session().await?),
                Order::Note(note) => {
                    self.unkept.push(note);
                    continue;
                }
            };
            if self.done.send(Ok(done)).is_err() {
                return Ok(());
            }
            self.store.tidy().await;
        }
        while !self.unkept.all().is_empty() {
            let result = self.store.keep_events(self.unkept.all()).await;
            self.kept(result)?;
        }
        Ok(())
    }

    /// Writes what is pending until an order comes that does not wait for it; `None` if none will come.
    async fn next(&mut self) -> Result<Option<Order>, StoreError> {
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Note(note) => self.unkept.push(note),
                    order => return Ok(Some(order)),
                }
            }
            if self.unkept.all().is_empty() {
                return Ok(self.orders.recv().await);
            }
            let events = self.unkept.all().to_vec();
            let Self { store, orders, unkept, .. } = self;
            let result = {
                let mut writing = std::pin::pin!(store.keep_events(&events));
                loop {
                    tokio::select! {
                        biased;
                        order = orders.recv() => match order {
                            Some(Order::Note(note)) => unkept.push(note),
                            order => return Ok(order),
                        },
                        result = &mut writing => break result,
                    }
                }
            };
            self.kept(result)?;
        }
    }

    /// The store has so many of the events, from the first, or cannot keep them.
    fn kept(&mut self, result: Result<usize, StoreError>) -> Result<(), StoreError> {
        match result {
            Ok(count) => {
                let events = self.unkept.take(count);
                if !events.is_empty() {
                    // That nobody waits for it any more is noticed with the next order.
                    let _ = self.done.send(Ok(Done::Kept(events)));
                }
                Ok(())
            }
            Err(error @ StoreError::Deposed(_)) => Err(error),
            // Not what anything is decided by: no reason to stop.
            Err(error) => {
                tracing::warn!("what happened is told in this log only: {error}");
                self.unkept.truncate(0);
                Ok(())
            }
        }
    }

    async fn swap(&mut self, proposal: &Proposal) -> Result<Swapped, StoreError> {
        let before = self.unkept.all().len();
        for line in &proposal.why {
            self.unkept.push(Note::new(EventKind::Map, Some(proposal.next.version), line.clone()));
        }
        let events = self.unkept.all();
        let swapped = self.store.swap(proposal.base, &proposal.next, &proposal.why, events).await?;
        match &swapped {
            Swapped::Stored { events } => self.kept(Ok(*events))?,
            Swapped::Conflict(_) => self.unkept.truncate(before),
        }
        Ok(swapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::ids::{ClusterId, MapVersion};
    use mirror_net::map::DistributionMap;
    use std::io::ErrorKind;

    /// How a store treats events.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Way {
        /// Keeps so many at a time.
        Keeps(usize),
        /// Never answers.
        Hangs,
        Fails,
    }

    struct FakeStore {
        way: Way,
        conflict: bool,
    }

    impl Store for FakeStore {
        async fn map(&mut self) -> Result<Option<DistributionMap>, StoreError> {
            Ok(None)
        }

        async fn swap(
            &mut self,
            _base: Option<MapVersion>,
            _next: &DistributionMap,
            _why: &[String],
            events: &[Event],
        ) -> Result<Swapped, StoreError> {
            if self.conflict {
                return Ok(Swapped::Conflict(None));
            }
            let events = if self.way == Way::Fails { 0 } else { events.len() };
            Ok(Swapped::Stored { events })
        }

        async fn exporter_session(&mut self) -> Result<ExporterSession, StoreError> {
            Ok(ExporterSession(1))
        }

        async fn events(&mut self) -> Result<Vec<Event>, StoreError> {
            Ok(Vec::new())
        }

        async fn keep_events(&mut self, events: &[Event]) -> Result<usize, StoreError> {
            match self.way {
                Way::Keeps(most) => Ok(events.len().min(most)),
                Way::Hangs => std::future::pending().await,
                Way::Fails => Err(StoreError::Io {
                    what: "cannot write",
                    path: "events".into(),
                    error: ErrorKind::StorageFull.into(),
                }),
            }
        }
    }

    fn note(text: &str) -> Order {
        Order::Note(Note::new(EventKind::Node, None, text.into()))
    }

    fn swap() -> Order {
        let next = DistributionMap {
            cluster: ClusterId::default(),
            cluster_name: "lab".into(),
            version: MapVersion(3),
            slice_bytes: 64 << 20,
            nodes: Vec::new(),
            disks: Vec::new(),
            devices: Vec::new(),
            ..DistributionMap::empty()
        };
        let why = vec!["because".into()];
        Order::Swap(Box::new(Proposal { base: None, batch: Vec::new(), next: Box::new(next), why }))
    }

    /// What the orders come to, in words; each is given when what came before it has been answered or waits.
    async fn carry_out(way: Way, conflict: bool, list: Vec<Order>) -> Vec<String> {
        let (orders, received) = mpsc::unbounded_channel();
        let (done, mut results) = mpsc::unbounded_channel();
        let keeping = tokio::spawn(keep(FakeStore { way, conflict }, received, done, 10));
        for order in list {
            orders.send(order).map_err(drop).unwrap();
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        }
        if way == Way::Hangs {
            keeping.abort();
        }
        drop(orders);
        let _ = keeping.await;
        let mut words = Vec::new();
        while let Ok(result) = results.try_recv() {
            words.push(match result.unwrap() {
                Done::Kept(events) => {
                    let texts = events.iter().map(|event| format!("{} {}", event.number, event.text));
                    texts.collect::<Vec<_>>().join(", ")
                }
                Done::Swapped(_, Swapped::Stored { .. }) => "stored".into(),
                Done::Swapped(_, Swapped::Conflict(_)) => "conflict".into(),
                Done::Session(..) => "session".into(),
            });
        }
        words
    }

    #[tokio::test]
    async fn a_map_is_stored_while_an_event_is_being_written() {
        let orders = vec![note("one"), note("two"), swap()];
        let done = carry_out(Way::Hangs, false, orders).await;
        assert_eq!(done, ["11 one, 12 two, 13 because", "stored"]);
    }

    #[tokio::test]
    async fn a_map_that_is_not_stored_is_no_event() {
        let orders = vec![note("one"), swap(), note("two")];
        let done = carry_out(Way::Keeps(9), true, orders).await;
        assert_eq!(done, ["11 one", "conflict", "12 two"]);
    }

    #[tokio::test]
    async fn events_that_cannot_be_kept_stop_nothing() {
        let orders = vec![note("one"), swap(), Order::Session(ConnectionId(1))];
        assert_eq!(carry_out(Way::Fails, false, orders).await, ["stored", "session"]);
    }

    #[tokio::test]
    async fn what_is_pending_at_the_end_is_written() {
        let (orders, received) = mpsc::unbounded_channel();
        let (done, mut results) = mpsc::unbounded_channel();
        (0..5).for_each(|_| orders.send(note("x")).map_err(drop).unwrap());
        drop(orders);
        keep(FakeStore { way: Way::Keeps(2), conflict: false }, received, done, 0).await;
        let mut numbers = Vec::new();
        while let Ok(Ok(Done::Kept(events))) = results.try_recv() {
            numbers.push(events.iter().map(|event| event.number).collect::<Vec<_>>());
        }
        assert_eq!(numbers, [vec![1, 2], vec![3, 4], vec![5]]);
    }
}
