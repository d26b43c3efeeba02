//! Who leads: the manager whose lease the key `leader` goes with.

use super::super::{Lease, StoreError, Tenure};
use super::client::{Etcd, Value};
use super::records::EtcdStore;
use etcd_client::{PutOptions, Txn, TxnOp};
use mirror_net::config::EtcdFile;
use mirror_net::ids::ProcessId;
use mirror_net::wire::handshake::ClusterKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a lease lives without being renewed; no etcd with its default settings grants less.
const LEASE: Duration = Duration::from_secs(2);
/// Between two renewals.
const RENEW_EVERY: Duration = Duration::from_millis(500);
/// Between two looks at who leads. A watch would be told sooner, but not that its member is gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The same after it did not let us in: checking a password costs it a tenth of a second.
const REFUSED_EVERY: Duration = Duration::from_secs(2);
/// Between two attempts to ask members that had not answered.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// A lease ends by our clock this much before it can end by theirs.
const MARGIN: Duration = Duration::from_millis(100);

const LEADER: &str = "leader";
const IDENTITY: &str = "identity";

/// The value of `leader`.
#[derive(Serialize, Deserialize)]
struct Leader {
    /// Where it listens.
    address: String,
    /// Whose lease it is.
    process: ProcessId,
}

/// The value of `identity`.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    /// The cluster's name.
    cluster: String,
    /// Tells whether another manager has the same cluster key, and nothing about the key.
    key_mark: String,
}

/// A manager that would lead.
pub struct Candidate {
    etcd: Option<Etcd>,
    file: EtcdFile,
    owner: Owner,
    me: Leader,
    /// The members that have said which etcd they belong to, and when the others are asked again.
    seen: BTreeMap<String, u64>,
    check_at: Instant,
    /// It has answered us once.
    accepted: bool,
    pause: Duration,
}

/// How a look at the election ended.
pub enum Seat {
    /// We lead, for so long.
    Ours(Box<EtcdStore>, Tenure),
    /// Somebody leads at that address.
    Theirs(String),
    /// Nobody leads at this moment.
    Empty,
}

impl Candidate {
    /// One that listens at `address`.
    pub fn new(
        file: &EtcdFile,
        cluster_name: &str,
        key: &ClusterKey,
        address: &str,
        process: ProcessId,
    ) -> Self {
        let mark = blake3::derive_key("ublk-mirror 2026 owner of a map store", key.to_text().as_bytes());
        let mark = blake3::Hash::from_bytes(mark).to_hex();
        Self {
            etcd: None,
            file: file.clone(),
            owner: Owner { cluster: cluster_name.into(), key_mark: mark[..16].to_owned() },
            me: Leader { address: address.into(), process },
            seen: BTreeMap::new(),
            check_at: Instant::now(),
            accepted: false,
            pause: LOOK_EVERY,
        }
    }

    /// The time to wait between two looks.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// Looks who leads, and leads if nobody does.
    pub async fn look(&mut self) -> Result<Seat, StoreError> {
        let mut etcd = match self.etcd.take() {
            Some(etcd) => etcd,
            None => Etcd::new(&self.file).map_err(|error| self.trying_on(error))?,
        };
        match self.look_with(&mut etcd).await {
            // What was read from files may have been corrected there.
            Err(error @ StoreError::Refused { .. }) => Err(self.trying_on(error)),
            seat => {
                (self.accepted, self.pause) = (self.accepted || seat.is_ok(), LOOK_EVERY);
                self.etcd = Some(etcd);
                seat
            }
        }
    }

    /// A manager that began well does not end because it is not let in any more, and does not hurry either.
    fn trying_on(&mut self, error: StoreError) -> StoreError {
        self.pause = REFUSED_EVERY;
        let (etcd, why) = match error {
            error if !self.accepted => return error,
            StoreError::Refused { etcd, why } => (etcd, why),
            error => (format!("etcd {}", self.file.endpoints.join(", ")), error.to_string()),
        };
        StoreError::Unreachable { etcd, why }
    }

    async fn look_with(&mut self, etcd: &mut Etcd) -> Result<Seat, StoreError> {
        let leader = etcd.get(LEADER).await?;
        let identity = etcd.get(IDENTITY).await?;
        if let Some(value) = &identity {
            self.check_owner(etcd, value)?;
        }
        if Instant::now() >= self.check_at {
            etcd.check_members(&mut self.seen).await?;
            self.check_at = Instant::now() + CHECK_EVERY;
        }
        if let Some(value) = leader {
            // Whoever wrote this has the prefix, and with it our name and key.
            let theirs: Leader = serde_json::from_slice(&value.bytes).map_err(|error| {
                let (etcd, key) = (etcd.name().to_owned(), etcd.key(LEADER));
                StoreError::CorruptKey { etcd, key, why: error.to_string() }
            })?;
            if theirs.process != self.me.process {
                return Ok(Seat::Theirs(theirs.address));
            }
            // Ours, from a tenure that is over or an answer that was lost: what was begun under it
            // must not be mixed with what comes.
            etcd.revoke(value.lease).await?;
            return Ok(Seat::Empty);
        }
        self.campaign(etcd, identity.is_none()).await
    }

    fn check_owner(&self, etcd: &Etcd, value: &Value) -> Result<(), StoreError> {
        let owner: Owner = serde_json::from_slice(&value.bytes).map_err(|error| {
            let (etcd, key) = (etcd.name().to_owned(), etcd.key(IDENTITY));
            StoreError::CorruptKey { etcd, key, why: error.to_string() }
        })?;
        if owner == self.owner {
            return Ok(());
        }
        let whose = if owner.cluster == self.owner.cluster {
            "another cluster of the same name, with another key,".to_owned()
        } else {
            format!("cluster {}", owner.cluster)
        };
        let why = format!(
            "{whose} keeps its map there under {}: check `endpoints`, or choose another `prefix` in [store]",
            etcd.key("")
        );
        Err(StoreError::OtherCluster { etcd: etcd.name().to_owned(), why })
    }

    /// Takes the seat, unless somebody was faster.
    async fn campaign(&self, etcd: &mut Etcd, first: bool) -> Result<Seat, StoreError> {
        let begun = Instant::now();
        let (lease, ttl) = etcd.grant(LEASE).await?;
        let json = |value: Result<Vec<u8>, serde_json::Error>| {
            value.map_err(|error| StoreError::Setup(error.to_string()))
        };
        let me = json(serde_json::to_vec(&self.me))?;
        let mut compare = vec![etcd.made_at(LEADER, 0)];
        let mut puts = vec![TxnOp::put(etcd.key(LEADER), me, Some(PutOptions::new().with_lease(lease)))];
        if first {
            compare.push(etcd.made_at(IDENTITY, 0));
            puts.push(TxnOp::put(etcd.key(IDENTITY), json(serde_json::to_vec(&self.owner))?, None));
        }
        let (won, _, revision) = etcd.txn(Txn::new().when(compare).and_then(puts)).await?;
        if !won {
            // It would end by itself.
            let _ = etcd.revoke(lease).await;
            return Ok(Seat::Empty);
        }
        if ttl > LEASE {
            tracing::warn!(
                "{} grants leases of {} s and more: a leader that dies is replaced that late; its election timeout \
                 is long",
                etcd.name(),
                ttl.as_secs()
            );
        }
        let (tenure, held) = Tenure::until(begun + ttl - MARGIN);
        tokio::spawn(keep_alive(etcd.clone(), lease, ttl, held));
        let store = EtcdStore::open(etcd.clone(), LEADER, revision, tenure.clone()).await?;
        Ok(Seat::Ours(Box::new(store), tenure))
    }
}

/// Renews the lease until nobody wants it any more, or it is gone.
async fn keep_alive(mut etcd: Etcd, id: i64, ttl: Duration, lease: Lease) {
    while lease.is_wanted() {
        let begun = Instant::now();
        match etcd.renew(id).await {
            // It lives for `ttl` from a moment after we asked.
            Ok(true) => {
                lease.renew(begun + ttl - MARGIN);
                sleep(RENEW_EVERY.saturating_sub(begun.elapsed())).await;
            }
            Ok(false) => {
                lease.trouble(format!("{}: its lease has run out", etcd.name()));
                lease.renew(begun);
                return;
            }
            Err(error) => {
                lease.trouble(error.to_string());
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    // Somebody else need not wait for its end.
    let _ = etcd.revoke(id).await;
}
