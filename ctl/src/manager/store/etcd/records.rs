//! What the leader keeps: the map in pieces, its history, the exporter sessions, and what happened.

use super::super::pieces::{self, Entry, HEAD, Head, Places};
use super::super::{Store, StoreError, Swapped, Tenure};
use super::client::Etcd;
use super::events;
use etcd_client::{Compare, DeleteOptions, Txn, TxnOp};
use mirror_net::control::Event;
use mirror_net::ids::{ExporterSession, MapVersion};
use mirror_net::map::DistributionMap;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, sleep};

/// Maps kept in the history.
const HISTORY_MAX: usize = 100;
/// Operations and bytes in a transaction: etcd takes 128 and 1.5 MiB unless told otherwise.
const OPERATIONS_MAX: usize = 100;
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Between two attempts at a request that got no answer.
const AGAIN: Duration = Duration::from_millis(100);
/// After so long without an answer a leader gives up: its lease may live on where it cannot write.
const TRY_MAX: Duration = Duration::from_secs(2);

const SESSION: &str = "exporter-session";

/// The store of the manager that leads.
pub struct EtcdStore {
    etcd: Etcd,
    /// The key that says that we lead, and when it was made.
    leader: (&'static str, i64),
    tenure: Tenure,
    /// The newest map's pieces.
    places: Option<Places>,
    /// When the head was last written; 0 for never.
    head_written: i64,
    /// The versions whose bases are kept, the oldest first.
    history: VecDeque<MapVersion>,
    last_session: u64,
}

impl EtcdStore {
    /// Reads what is there. Nobody else can write from the moment that `leader` was made.
    pub(super) async fn open(
        mut etcd: Etcd,
        leader: &'static str,
        revision: i64,
        tenure: Tenure,
    ) -> Result<Self, StoreError> {
        let mut session = 0;
        if let Some(value) = etcd.get(SESSION).await? {
            let text = String::from_utf8_lossy(&value.bytes).into_owned();
            session = text.parse().map_err(|_| StoreError::CorruptKey {
                etcd: etcd.name().to_owned(),
                key: etcd.key(SESSION),
                why: format!("{text:?} is no number"),
            })?;
        }
        let mut store = Self {
            etcd,
            leader: (leader, revision),
            tenure,
            places: None,
            head_written: 0,
            history: VecDeque::new(),
            last_session: session,
        };
        store.read_head().await?;
        store.read_history().await?;
        Ok(store)
    }

    fn corrupt(&self, key: &str, why: impl ToString) -> StoreError {
        let (etcd, key) = (self.etcd.name().to_owned(), self.etcd.key(key));
        StoreError::CorruptKey { etcd, key, why: why.to_string() }
    }

    fn deposed(&self) -> StoreError {
        let why = match self.tenure.why() {
            why if why.is_empty() => "its lease has run out, or another manager leads".to_owned(),
            why => why,
        };
        StoreError::Deposed(why)
    }

    async fn read_head(&mut self) -> Result<Option<DistributionMap>, StoreError> {
        (self.places, self.head_written) = (None, 0);
        let Some(head) = self.etcd.get(HEAD).await? else { return Ok(None) };
        let parsed = Head::parse(&head.bytes).map_err(|why| self.corrupt(HEAD, why))?;
        let base = self.etcd.need_all(&parsed.base_keys()).await?.concat();
        let places = parsed.places(&base).map_err(|why| self.corrupt(&parsed.base_keys()[0], why))?;
        let keys: Vec<String> = places.span_keys().flat_map(|(_, keys)| keys).collect();
        let mut values = self.etcd.need_all(&keys).await?.into_iter();
        let spans: BTreeMap<_, Vec<u8>> = places
            .span_keys()
            .map(|(device, keys)| (device, values.by_ref().take(keys.len()).flatten().collect()))
            .collect();
        let map = places.join(&base, &spans).map_err(|why| self.corrupt(HEAD, why))?;
        (self.places, self.head_written) = (Some(places), head.written);
        Ok(Some(map))
    }

    async fn read_history(&mut self) -> Result<(), StoreError> {
        let keys = self.etcd.keys(pieces::BASES).await?;
        let versions: BTreeSet<MapVersion> = keys.iter().filter_map(|key| pieces::version_of(key)).collect();
        let newest = self.newest();
        self.history = versions.iter().copied().filter(|version| Some(*version) <= newest).collect();
        // What a leader before wrote for a change that it did not complete.
        let keys = keys.into_iter().chain(self.etcd.keys(pieces::DEVICES).await?);
        let left: Vec<String> = keys.filter(|key| pieces::version_of(key) > newest).collect();
        let ops = left.iter().map(|key| TxnOp::delete(self.etcd.key(key), None)).collect();
        self.fenced_all(ops).await
    }

    fn newest(&self) -> Option<MapVersion> {
        self.places.as_ref().map(|places| places.head.version())
    }

    /// Tries a transaction until it is answered, our time is over, or it takes too long: whether its comparisons held,
    /// that of our leading included.
    async fn fenced(&mut self, compare: Option<Compare>, ops: Vec<TxnOp>) -> Result<(bool, i64), StoreError> {
        let mut when = vec![self.etcd.made_at(self.leader.0, self.leader.1)];
        when.extend(compare);
        let begun = Instant::now();
        loop {
            if !self.tenure.holds() {
                return Err(self.deposed());
            }
            match self.etcd.txn(Txn::new().when(when.clone()).and_then(ops.clone())).await {
                Ok((held, _, revision)) => return Ok((held, revision)),
                Err(error @ (StoreError::Unreachable { .. } | StoreError::Refused { .. }))
                    if begun.elapsed() < TRY_MAX =>
                {
                    tracing::warn!("{error}; trying on");
                    sleep(AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Operations that only need our leading, in as many transactions as it takes.
    async fn fenced_all(&mut self, ops: Vec<TxnOp>) -> Result<(), StoreError> {
        for some in ops.chunks(OPERATIONS_MAX) {
            if !self.fenced(None, some.to_vec()).await?.0 {
                return Err(self.deposed());
            }
        }
        Ok(())
    }

    async fn write_pieces(&mut self, entries: Vec<Entry>) -> Result<(), StoreError> {
        let (mut puts, mut bytes) = (Vec::new(), 0);
        for (key, value) in entries {
            if bytes + value.len() > REQUEST_BYTES_MAX {
                self.fenced_all(std::mem::take(&mut puts)).await?;
                bytes = 0;
            }
            bytes += value.len();
            puts.push(TxnOp::put(self.etcd.key(&key), value, None));
        }
        self.fenced_all(puts).await
    }

    /// Whether we still lead, by what the store says.
    async fn leads(&mut self) -> Result<bool, StoreError> {
        let (held, _) = self.fenced(None, Vec::new()).await?;
        Ok(held)
    }

    /// See [`Store::swap`].
    async fn replace(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
        events: &[Event],
    ) -> Result<Swapped, StoreError> {
        if self.newest() != base {
            return Ok(Swapped::Conflict(self.read_head().await?.map(Box::new)));
        }
        let (places, entries) = pieces::split(self.places.as_ref(), next, why);
        self.write_pieces(entries).await?;
        let head = places.head.to_text();
        let unwritten = self.etcd.unwritten_since(HEAD, self.head_written);
        let (events, mut ops) = events::puts(&self.etcd, events);
        ops.push(TxnOp::put(self.etcd.key(HEAD), head.clone(), None));
        let (held, revision) = self.fenced(Some(unwritten), ops).await?;
        let mut written = revision;
        if !held {
            if !self.leads().await? {
                return Err(self.deposed());
            }
            // Nobody but us could write it: it is what we wrote when the answer was lost.
            match self.etcd.get(HEAD).await? {
                Some(value) if value.bytes == head => written = value.written,
                _ => return Ok(Swapped::Conflict(self.read_head().await?.map(Box::new))),
            }
        }
        self.history.push_back(next.version);
        (self.places, self.head_written) = (Some(places), written);
        Ok(Swapped::Stored { events })
    }

    async fn remove_oldest(&mut self) -> Result<(), StoreError> {
        while self.history.len() > HISTORY_MAX {
            let (oldest, next) = (self.history[0], self.history[1]);
            let mut spans = [None, None];
            for (version, spans) in [oldest, next].into_iter().zip(&mut spans) {
                let prefix = pieces::history_prefix(version);
                let keys = self.etcd.keys(&prefix).await?;
                let base = self.etcd.need_all(&keys).await?.concat();
                *spans = Places::of_history(&base).ok();
            }
            // Of one that is half removed already the rest goes as well. What one that cannot be read needs nobody can
            // tell: then nothing goes that it may share with this.
            let unused = match spans {
                [Some(old), Some(new)] => old.difference(&new).copied().collect(),
                _ => BTreeSet::new(),
            };
            let all = Some(DeleteOptions::new().with_prefix());
            let unused = unused.into_iter().map(pieces::spans_prefix);
            let prefixes = unused.chain([pieces::history_prefix(oldest)]);
            let ops = prefixes.map(|prefix| TxnOp::delete(self.etcd.key(&prefix), all.clone())).collect();
            self.fenced_all(ops).await?;
            self.history.pop_front();
        }
        Ok(())
    }
}

/// What a leader is that cannot do what it has to: nobody knows what is stored, and another one may be able to.
fn resigned(error: StoreError) -> StoreError {
    match error {
        StoreError::Unreachable { .. } | StoreError::Refused { .. } => StoreError::Deposed(error.to_string()),
        error => error,
    }
}

impl Store for EtcdStore {
    async fn map(&mut self) -> Result<Option<DistributionMap>, StoreError> {
        self.read_head().await
    }

    async fn swap(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
        events: &[Event],
    ) -> Result<Swapped, StoreError> {
        self.replace(base, next, why, events).await.map_err(resigned)
    }

    async fn exporter_session(&mut self) -> Result<ExporterSession, StoreError> {
        // The clock keeps it growing even when an old snapshot of the etcd was brought back.
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let session = clock.max(self.last_session + 1);
        let put = TxnOp::put(self.etcd.key(SESSION), session.to_string(), None);
        self.fenced_all(vec![put]).await.map_err(resigned)?;
        self.last_session = session;
        Ok(ExporterSession(session))
    }

    async fn events(&mut self) -> Result<Vec<Event>, StoreError> {
        events::read(&mut self.etcd).await
    }

    async fn keep_events(&mut self, events: &[Event]) -> Result<usize, StoreError> {
        let (count, puts) = events::puts(&self.etcd, events);
        self.fenced_all(puts).await?;
        Ok(count)
    }

    async fn tidy(&mut self) {
        if let Err(error) = self.remove_oldest().await {
            tracing::debug!("the history keeps more than {HISTORY_MAX} maps for now: {error}");
        }
    }
}
