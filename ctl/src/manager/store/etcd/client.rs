//! Requests to an etcd, with a limit on their time, and with errors for people.

use super::super::StoreError;
use etcd_client::{
    Certificate, Client, Compare, ConnectOptions, Error, GetOptions, Identity, KvClient, LeaseClient,
    ResponseHeader, TlsOptions, Txn, TxnOp, TxnOpResponse,
};
use mirror_net::config::EtcdFile;
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::timeout;

/// How long a request to one member may take, so that a lease outlives one that says nothing.
const CALL_MAX: Duration = Duration::from_millis(500);
/// How long a request for many values may take.
const LOAD_MAX: Duration = Duration::from_secs(5);
/// A member that does not answer a ping is not asked any more.
const PING_EVERY: Duration = Duration::from_millis(500);
const PING_MAX: Duration = Duration::from_millis(700);
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

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path).map_err(|error| StoreError::Io { what: "cannot read", path: path.to_owned(), error })
}

fn options(file: &EtcdFile) -> Result<ConnectOptions, StoreError> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CALL_MAX)
        .with_keep_alive(PING_EVERY, PING_MAX)
        .with_keep_alive_while_idle(true)
        // A member that has lost the others says so at once.
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if let Some((user, password)) = &file.user {
        let text = String::from_utf8(read(password)?);
        let text = text.map_err(|_| StoreError::Setup(format!("{}: it is not text", password.display())))?;
        options = options.with_user(user, text.trim_end());
    }
    if let Some(tls) = &file.tls {
        let mut wanted = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
        if let Some((cert, key)) = &tls.identity {
            wanted = wanted.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        options = options.with_tls(wanted);
    }
    Ok(options)
}

/// What an error of the client says, for people.
fn text(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => {
            let mut text = status.message().to_owned();
            let mut cause = std::error::Error::source(status);
            while let Some(error) = cause {
                text = error.to_string();
                cause = error.source();
            }
            text
        }
        error => error.to_string(),
    }
}

impl Etcd {
    /// Prepares to connect to the members, which happens when they are asked.
    pub fn new(file: &EtcdFile) -> Result<Self, StoreError> {
        Ok(Self {
            name: format!("etcd {}", file.endpoints.join(", ")),
            file: file.clone(),
            options: options(file)?,
            members: file.endpoints.iter().map(|_| None).collect(),
            current: Arc::default(),
            cluster: None,
        })
    }

    async fn member(&mut self, index: usize) -> Result<Member, Error> {
        if let Some(member) = &self.members[index] {
            return Ok(member.clone());
        }
        let client = Client::connect([&self.file.endpoints[index]], Some(self.options.clone())).await?;
        let kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(self.members[index].insert(Member { kv, lease: client.lease_client() }).clone())
    }

    /// Asks one member after the other until one answers.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &mut self,
        limit: Duration,
        call: impl Fn(Member) -> F,
    ) -> Result<T, StoreError> {
        let mut reasons = Vec::new();
        for _ in 0..self.members.len() {
            let index = self.current.load(Ordering::Relaxed);
            let attempt = async { call(self.member(index).await?).await };
            let reason = match timeout(limit, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => text(&error),
                Err(_) => format!("no answer within {} ms", limit.as_millis()),
            };
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
            // Unless another clone has turned away from it meanwhile.
            let next = (index + 1) % self.members.len();
            let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        // In one order, so that the same trouble is the same line.
        reasons.sort();
        Err(StoreError::Unreachable { etcd: self.name.clone(), why: reasons.join("; ") })
    }

    /// Asks the members alone that are not in `seen` which etcd they belong to: two in one list would be two
    /// truths. One that is away, or has lost the others, is asked the next time.
    pub async fn check_members(file: &EtcdFile, seen: &mut BTreeMap<String, u64>) -> Result<(), StoreError> {
        for endpoint in &file.endpoints {
            if seen.contains_key(endpoint) {
                continue;
            }
            let one = EtcdFile { endpoints: vec![endpoint.clone()], ..file.clone() };
            let mut etcd = Self::new(&one)?;
            let (true, Some(cluster)) = (etcd.get("identity").await.is_ok(), etcd.cluster) else { continue };
            if let Some((other, theirs)) = seen.iter().find(|(_, theirs)| **theirs != cluster) {
                let why = format!(
                    "{other} and {endpoint} belong to different etcds ({theirs:x} and {cluster:x}): correct \
                     `endpoints` in the cluster file"
                );
                return Err(StoreError::OtherCluster { etcd: etcd.name, why });
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
