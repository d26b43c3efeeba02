//! Requests to an etcd, with a limit on their time, and with errors for people.

use super::super::StoreError;
use super::access::{self, Trouble};
use super::handshake;
use etcd_client::{
    Client, Compare, ConnectOptions, Error, GetOptions, KvClient, LeaseClient, ResponseHeader, Txn, TxnOp,
    TxnOpResponse,
};
use mirror_net::config::EtcdFile;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::timeout;

/// How long a request to one member may take, so that a lease outlives one that says nothing.
pub(super) const CALL_MAX: Duration = Duration::from_millis(500);
/// How long a member may take to check a password, which costs it a tenth of a second on purpose.
const LOGIN_MAX: Duration = Duration::from_secs(1);
/// How long a request for many values may take.
const LOAD_MAX: Duration = Duration::from_secs(5);
/// Keys in one answer; each value has at most 512 KiB, so that an answer has at most 32 MiB.
const PAGE: i64 = 64;
const ANSWER_BYTES_MAX: usize = 40 << 20;

/// A value and its place in the order of all changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Value {
    pub bytes: Vec<u8>,
    /// When the key was made.
    pub created: i64,
    /// When it was last written.
    pub written: i64,
    /// The lease it goes with; 0 for none.
    pub lease: i64,
}

/// The clients of one member.
#[derive(Clone)]
struct Member {
    client: Client,
    kv: KvClient,
    lease: LeaseClient,
}

/// Connections to the members of an etcd, of which one is asked, and the next one when it does not answer.
///
/// The crate's own balancer would ask a dead member as often as the others.
#[derive(Clone)]
pub(super) struct Etcd {
    /// For messages.
    name: String,
    file: EtcdFile,
    options: ConnectOptions,
    members: Vec<Option<Member>>,
    /// The one that answered last; all clones learn of it.
    current: Arc<AtomicUsize>,
    /// Which etcd it is: an answer of another one is an error.
    cluster: Option<u64>,
}

impl Etcd {
    /// Prepares to connect to the members, which happens when they are asked.
    pub fn new(file: &EtcdFile) -> Result<Self, StoreError> {
        Ok(Self {
            name: format!("etcd {}", file.endpoints.join(", ")),
            file: file.clone(),
            options: access::options(file)?,
            members: file.endpoints.iter().map(|_| None).collect(),
            current: Arc::default(),
            cluster: None,
        })
    }

    /// Connects to that member only.
    fn alone(&self, endpoint: &str) -> Self {
        Self {
            name: format!("etcd {endpoint}"),
            file: EtcdFile { endpoints: vec![endpoint.to_owned()], ..self.file.clone() },
            options: self.options.clone(),
            members: vec![None],
            current: Arc::default(),
            cluster: None,
        }
    }

    async fn member(&mut self, index: usize) -> Result<Member, Trouble> {
        if let Some(member) = &self.members[index] {
            return Ok(member.clone());
        }
        let connect = Client::connect([&self.file.endpoints[index]], Some(self.options.clone()));
        let client = self.within(LOGIN_MAX, connect).await?;
        let kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
        let lease = client.lease_client();
        Ok(self.members[index].insert(Member { client, kv, lease }).clone())
    }

    async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Trouble> {
        match timeout(limit, work).await {
            Ok(result) => result.map_err(|error| Trouble::of(&error, &self.file)),
            Err(_) => Err(Trouble::silence(limit)),
        }
    }

    /// Asks a member. If it has forgotten who we are, we tell it again.
    async fn ask_member<T, F: Future<Output = Result<T, Error>>>(
        &mut self,
        index: usize,
        limit: Duration,
        call: &impl Fn(Member) -> F,
    ) -> Result<T, Trouble> {
        let member = self.member(index).await?;
        match self.within(limit, call(member.clone())).await {
            Err(trouble) if trouble.forgotten => {
                self.within(LOGIN_MAX, member.client.refresh_token()).await?;
                self.within(limit, call(member)).await
            }
            answer => answer,
        }
    }

    /// The same trouble, or what is behind it: a connection that is lost as soon as it is there may be one that the
    /// member's TLS has refused.
    async fn explained(&self, index: usize, trouble: Trouble) -> Trouble {
        let Some(tls) = self.file.tls.as_ref().filter(|_| trouble.obscure) else { return trouble };
        match timeout(CALL_MAX, handshake::refusal(&self.file.endpoints[index], tls)).await {
            Ok(Some(why)) => Trouble::of_text(why, &self.file),
            Ok(None) | Err(_) => trouble,
        }
    }

    /// Asks one member after the other until one answers.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &mut self,
        limit: Duration,
        call: impl Fn(Member) -> F,
    ) -> Result<T, StoreError> {
        let (mut reasons, mut refused) = (Vec::new(), true);
        for _ in 0..self.members.len() {
            let index = self.current.load(Ordering::Relaxed);
            let trouble = match self.ask_member(index, limit, &call).await {
                Ok(answer) => return Ok(answer),
                Err(trouble) => self.explained(index, trouble).await,
            };
            refused &= trouble.refused;
            if !reasons.contains(&trouble.why) {
                reasons.push(trouble.why);
            }
            // Unless another clone has turned away from it meanwhile.
            let next = (index + 1) % self.members.len();
            let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        // In one order, so that the same trouble is the same line.
        reasons.sort();
        let (etcd, why) = (self.name.clone(), reasons.join("; "));
        Err(if refused { StoreError::Refused { etcd, why } } else { StoreError::Unreachable { etcd, why } })
    }

    /// Asks the members alone that are not in `seen` which etcd they belong to: two in one list would be two
    /// truths. One that is away, or has lost the others, is asked the next time.
    pub async fn check_members(&self, seen: &mut BTreeMap<String, u64>) -> Result<(), StoreError> {
        for endpoint in &self.file.endpoints {
            if seen.contains_key(endpoint) {
                continue;
            }
            let mut etcd = self.alone(endpoint);
            let (true, Some(cluster)) = (etcd.get("identity").await.is_ok(), etcd.cluster) else { continue };
            if let Some((other, theirs)) = seen.iter().find(|(_, theirs)| **theirs != cluster) {
                let why = format!(
                    "{other} and {endpoint} belong to different etcds ({theirs:x} and {cluster:x}): correct \
                     `endpoints` in the cluster file"
                );
                return Err(StoreError::OtherCluster { etcd: self.name.clone(), why });
            }
            seen.insert(endpoint.clone(), cluster);
        }
        Ok(())
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A key with the store's prefix.
    pub fn key(&self, key: &str) -> String {
        format!("{}{key}", self.file.prefix)
    }

    /// Refuses the answer of another etcd than the first one that answered.
    fn check(&mut self, header: Option<&ResponseHeader>) -> Result<(), StoreError> {
        let Some(header) = header else { return Ok(()) };
        let ours = *self.cluster.get_or_insert(header.cluster_id());
        if ours == header.cluster_id() {
            return Ok(());
        }
        let theirs = header.cluster_id();
        let why =
            format!("its members belong to different etcds ({ours:x} and {theirs:x}): correct `endpoints`");
        Err(StoreError::OtherCluster { etcd: self.name.clone(), why })
    }

    /// The value of a key.
    pub async fn get(&mut self, key: &str) -> Result<Option<Value>, StoreError> {
        let key = self.key(key);
        let call = |mut member: Member| {
            let key = key.clone();
            async move { member.kv.get(key, None).await }
        };
        let mut answer = self.ask(CALL_MAX, call).await?;
        self.check(answer.header())?;
        Ok(answer.take_kvs().into_iter().next().map(|kv| Value {
            created: kv.create_revision(),
            written: kv.mod_revision(),
            lease: kv.lease(),
            bytes: kv.into_key_value().1,
        }))
    }

    /// All keys that begin so, without the store's prefix, in order.
    pub async fn keys(&mut self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let options = GetOptions::new().with_keys_only().with_limit(PAGE * 16);
        let found = self.range(prefix, CALL_MAX, options).await?;
        Ok(found.into_iter().map(|(key, _)| key).collect())
    }

    /// The same with their values, which are small.
    pub async fn small_values(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.range(prefix, LOAD_MAX, GetOptions::new().with_limit(PAGE * 8)).await
    }

    async fn range(
        &mut self,
        prefix: &str,
        limit: Duration,
        options: GetOptions,
    ) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let end = {
            let mut end = self.key(prefix).into_bytes();
            // The first key behind all those that begin so: every prefix here ends with ASCII.
            if let Some(last) = end.last_mut() {
                *last += 1;
            }
            end
        };
        let options = options.with_range(end);
        let (mut from, mut found) = (self.key(prefix).into_bytes(), Vec::new());
        loop {
            let call = |mut member: Member| {
                let (from, options) = (from.clone(), options.clone());
                async move { member.kv.get(from, Some(options)).await }
            };
            let mut answer = self.ask(limit, call).await?;
            self.check(answer.header())?;
            let more = answer.more();
            let page = answer.take_kvs();
            let Some(last) = page.last() else { return Ok(found) };
            from = last.key().iter().copied().chain([0]).collect();
            for (key, value) in page.into_iter().map(|kv| kv.into_key_value()) {
                let ours = std::str::from_utf8(&key).ok().and_then(|key| key.strip_prefix(&self.file.prefix));
                found.extend(ours.map(|key| (key.to_owned(), value)));
            }
            if !more {
                return Ok(found);
            }
        }
    }

    /// The values of many keys, in their order; all have to be there.
    pub async fn need_all(&mut self, keys: &[String]) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut values = Vec::with_capacity(keys.len());
        for page in keys.chunks(PAGE as usize) {
            let gets: Vec<TxnOp> = page.iter().map(|key| TxnOp::get(self.key(key), None)).collect();
            let answer = self.txn_within(LOAD_MAX, Txn::new().and_then(gets)).await?;
            for (key, response) in page.iter().zip(answer.1) {
                let TxnOpResponse::Get(mut response) = response else { continue };
                let value = response.take_kvs().into_iter().next().map(|kv| kv.into_key_value().1);
                values.push(value.ok_or_else(|| StoreError::CorruptKey {
                    etcd: self.name.clone(),
                    key: self.key(key),
                    why: "it is missing".into(),
                })?);
            }
        }
        Ok(values)
    }

    /// A transaction: whether its comparisons held, what its operations answered, and its revision.
    pub async fn txn(&mut self, txn: Txn) -> Result<(bool, Vec<TxnOpResponse>, i64), StoreError> {
        self.txn_within(CALL_MAX, txn).await
    }

    async fn txn_within(
        &mut self,
        limit: Duration,
        txn: Txn,
    ) -> Result<(bool, Vec<TxnOpResponse>, i64), StoreError> {
        let call = |mut member: Member| {
            let txn = txn.clone();
            async move { member.kv.txn(txn).await }
        };
        let answer = self.ask(limit, call).await?;
        self.check(answer.header())?;
        let revision = answer.header().map_or(0, ResponseHeader::revision);
        Ok((answer.succeeded(), answer.op_responses(), revision))
    }

    /// A comparison that holds as long as a key is the one that was made at that revision; 0 for none.
    pub fn made_at(&self, key: &str, revision: i64) -> Compare {
        Compare::create_revision(self.key(key), etcd_client::CompareOp::Equal, revision)
    }

    /// A comparison that holds as long as nobody has written a key since; 0 for none.
    pub fn unwritten_since(&self, key: &str, revision: i64) -> Compare {
        Compare::mod_revision(self.key(key), etcd_client::CompareOp::Equal, revision)
    }

    /// A new lease, and how long it lives.
    pub async fn grant(&mut self, ttl: Duration) -> Result<(i64, Duration), StoreError> {
        let seconds = ttl.as_secs() as i64;
        let call = |mut member: Member| async move { member.lease.grant(seconds, None).await };
        let answer = self.ask(CALL_MAX, call).await?;
        self.check(answer.header())?;
        Ok((answer.id(), Duration::from_secs(answer.ttl().max(0) as u64)))
    }

    /// Lets a lease live on; `false` if there is none any more.
    pub async fn renew(&mut self, id: i64) -> Result<bool, StoreError> {
        let call = |mut member: Member| async move {
            match member.lease.keep_alive(id).await {
                Ok(_) => Ok(true),
                Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.ask(CALL_MAX, call).await
    }

    /// Ends a lease, and removes what goes with it.
    pub async fn revoke(&mut self, id: i64) -> Result<(), StoreError> {
        let call = |mut member: Member| async move { member.lease.revoke(id).await };
        self.ask(CALL_MAX, call).await.map(drop)
    }
}
