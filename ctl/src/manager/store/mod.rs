//! Where the manager keeps what must survive it.

mod etcd;
mod event_file;
mod file;
mod pieces;

pub use etcd::{Candidate, EtcdStore, Seat};
pub use file::{FileStore, StateDir};

use mirror_net::control::Event;
use mirror_net::ids::{ExporterSession, MapVersion};
use mirror_net::map::DistributionMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StoreError {
    #[error("{what} {}: {error}", path.display())]
    Io { what: &'static str, path: PathBuf, error: std::io::Error },
    #[error("{}: another manager uses this state directory; stop it first", path.display())]
    InUse { path: PathBuf },
    #[error(
        "{}: damaged: {why}; copy the newest intact file of {} over it, but only if no later map was ever sent to a \
         node (one that has adopted a newer map is turned away)",
        path.display(), history.display()
    )]
    Corrupt { path: PathBuf, history: PathBuf, why: String },
    #[error("{etcd}: key {key}: {why}; bring back a snapshot of it that no node is ahead of")]
    CorruptKey { etcd: String, key: String, why: String },
    #[error("{etcd}: {why}")]
    Unreachable { etcd: String, why: String },
    /// Every member turns us away, until somebody corrects something.
    #[error("{etcd}: {why}")]
    Refused { etcd: String, why: String },
    #[error("{etcd}: {why}")]
    OtherCluster { etcd: String, why: String },
    #[error("{0}")]
    Setup(String),
    /// Another manager may lead by now; this one must not change anything any more.
    #[error("{0}")]
    Deposed(String),
}

/// What a compare-and-swap came to.
#[derive(Debug)]
pub enum Swapped {
    /// It is durable.
    Stored {
        /// How many of the events are, from the first.
        events: usize,
    },
    /// The store holds another version than was expected: this one.
    Conflict(Option<Box<DistributionMap>>),
}

/// Keeps the map, by compare-and-swap on its version, the exporter sessions given, and what happened.
///
/// What a method has returned is durable. After an error nothing is known: the manager must stop
/// and start anew from what the store then holds.
pub trait Store: Send + 'static {
    /// The newest map.
    fn map(&mut self) -> impl Future<Output = Result<Option<DistributionMap>, StoreError>> + Send;

    /// Replaces version `base` (`None`: nothing) by `next`; `why` is kept with it, and as many of the
    /// events, from the first, as cost no further request.
    fn swap(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
        events: &[Event],
    ) -> impl Future<Output = Result<Swapped, StoreError>> + Send;

    /// A number larger than any given before.
    fn exporter_session(&mut self) -> impl Future<Output = Result<ExporterSession, StoreError>> + Send;

    /// The last events that are kept, the oldest first. Asked for once, before any is kept.
    fn events(&mut self) -> impl Future<Output = Result<Vec<Event>, StoreError>> + Send;

    /// Keeps events, and says how many of them, from the first. Their numbers follow each other and those before. It
    /// may be given up in the middle; the same events then come again first.
    fn keep_events(&mut self, events: &[Event]) -> impl Future<Output = Result<usize, StoreError>> + Send;

    /// Removes what no map of the history needs any more. Nobody waits for it, and it may fail.
    fn tidy(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// For how long this manager may act: for ever on a store of its own, else as long as its lease
/// cannot have run out, by its own clock.
#[derive(Clone, Debug)]
pub struct Tenure {
    until: Option<watch::Receiver<Instant>>,
    why: Arc<Mutex<String>>,
}

/// The end of a [`Tenure`] that moves.
#[derive(Debug)]
struct Lease {
    until: watch::Sender<Instant>,
    why: Arc<Mutex<String>>,
}

impl Tenure {
    /// It never ends.
    pub fn for_ever() -> Self {
        Self { until: None, why: Arc::default() }
    }

    fn until(until: Instant) -> (Self, Lease) {
        let (sender, receiver) = watch::channel(until);
        let why: Arc<Mutex<String>> = Arc::default();
        (Self { until: Some(receiver), why: Arc::clone(&why) }, Lease { until: sender, why })
    }

    /// Whether it still holds.
    pub fn holds(&self) -> bool {
        self.until.as_ref().is_none_or(|until| Instant::now() < *until.borrow())
    }

    /// Why it ended, for people.
    pub fn why(&self) -> String {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for its end.
    pub async fn over(&mut self) {
        let Some(until) = &mut self.until else { return std::future::pending().await };
        loop {
            let end = *until.borrow_and_update();
            if Instant::now() >= end {
                return;
            }
            tokio::select! {
                () = sleep_until(end) => {}
                changed = until.changed() => if changed.is_err() {
                    // Nobody renews it any more.
                    return sleep_until(end).await;
                },
            }
        }
    }
}

impl Lease {
    fn renew(&self, until: Instant) {
        self.until.send_replace(until);
    }

    /// What went wrong last; it is the reason if the tenure ends.
    fn trouble(&self, why: String) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn is_wanted(&self) -> bool {
        !self.until.is_closed()
    }
}
