//! Talking to the manager.

use crate::failure::{Failure, OK};
use crate::{key, output};
use mirror_net::config::ClusterFile;
use mirror_net::control::{ClusterStatus, OperatorReply, OperatorRequest};
use mirror_net::ids::ProcessId;
use mirror_net::wire::handshake::{ClusterKey, Identity, Purpose, Role};
use mirror_net::wire::transport;
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// How long a connection and its handshake may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long most answers may take.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long a leader is waited for, and between two looks: longer than an election takes.
const ELECTION_MAX: Duration = Duration::from_secs(5);
const ELECTION_POLL: Duration = Duration::from_millis(200);
/// Creating a cluster formats disks.
const CREATE_MAX: Duration = Duration::from_secs(900);

/// Reads and checks a cluster file.
pub fn load_file(path: &Path) -> Result<(ClusterFile, String), Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::NotFound => "; name it with --config FILE, or a playground with --dir DIR",
            _ => "",
        };
        Failure::new(format!("cannot read the cluster file {}: {error}{hint}", path.display()))
    })?;
    let file = ClusterFile::parse(&text, &path.display().to_string());
    Ok((file.map_err(|error| Failure::new(error.to_string()))?, text))
}

/// The managers of a cluster: of several, the one that leads is talked to.
pub struct Client {
    managers: Vec<String>,
    key: ClusterKey,
}

/// What one attempt came to that did not reach the leader.
enum Missed {
    /// It leads somewhere else, or nobody leads.
    NotLeader { leader: Option<String>, failure: Failure },
    /// Nothing was asked: another one may be.
    Unasked(Failure),
    /// It may have been asked.
    Asked(Failure),
}

impl Client {
    /// From the cluster file.
    pub fn from_config(path: &Path) -> Result<Self, Failure> {
        let (file, _) = load_file(path)?;
        Self::from_file(&file)
    }

    /// From a cluster file that has been read.
    pub fn from_file(file: &ClusterFile) -> Result<Self, Failure> {
        Ok(Self { managers: file.managers.clone(), key: key::load(&file.key_file)? })
    }

    /// Asks once, on a connection of its own. A refusal is a failure.
    pub async fn ask(&self, request: &OperatorRequest) -> Result<OperatorReply, Failure> {
        match self.ask_leader(request).await? {
            OperatorReply::Refused { reason } => Err(Failure::new(reason)),
            reply => Ok(reply),
        }
    }

    /// All that the manager knows.
    pub async fn status(&self) -> Result<Box<ClusterStatus>, Failure> {
        match self.ask(&OperatorRequest::Status).await? {
            OperatorReply::Status(status) => Ok(status),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Gives an order that is answered in lines, and prints them. Of a dry run it is said that it was one.
    pub async fn order(&self, request: &OperatorRequest, dry_run: bool) -> Result<u8, Failure> {
        let reply = self.ask(request).await?;
        let OperatorReply::Done { mut lines } = reply else { return Err(unexpected(&reply)) };
        if dry_run {
            lines.push("nothing was changed: this was a dry run".to_owned());
        }
        output::print(&lines.join("\n"));
        Ok(OK)
    }

    /// Finds the leader. While one is being elected it is waited for.
    async fn ask_leader(&self, request: &OperatorRequest) -> Result<OperatorReply, Failure> {
        let begun = Instant::now();
        loop {
            let mut queue: VecDeque<String> = self.managers.iter().cloned().collect();
            let mut asked: Vec<String> = Vec::new();
            // One that answered says more about the matter than those that did not.
            let (mut answered, mut unreached) = (None, Vec::new());
            while let Some(address) = queue.pop_front() {
                if asked.contains(&address) {
                    continue;
                }
                match self.ask_at(&address, request).await {
                    Ok(reply) => return Ok(reply),
                    Err(Missed::Asked(failure)) => return Err(failure),
                    Err(Missed::Unasked(failure)) => unreached.push(failure),
                    Err(Missed::NotLeader { leader, failure }) => {
                        if let Some(leader) = leader {
                            queue.push_front(leader);
                        }
                        answered = Some(failure);
                    }
                }
                asked.push(address);
            }
            let several = answered.is_some();
            let failure = answered.unwrap_or_else(|| {
                let lines: Vec<String> = unreached.into_iter().map(|failure| failure.message).collect();
                Failure::no_manager(lines.join("; "))
            });
            if !several || begun.elapsed() >= ELECTION_MAX {
                return Err(failure);
            }
            sleep(ELECTION_POLL).await;
        }
    }

    async fn ask_at(&self, address: &str, request: &OperatorRequest) -> Result<OperatorReply, Missed> {
        let limit = match request {
            OperatorRequest::CreateCluster { .. } => CREATE_MAX,
            _ => ANSWER_MAX,
        };
        let mut stream = match timeout(CONNECT_MAX, self.connect(address)).await {
            Ok(connected) => connected.map_err(Missed::Unasked)?,
            Err(_) => {
                return Err(Missed::Unasked(Failure::no_manager(format!(
                    "the manager at {address} does not answer within {} s: check `manager` in the cluster file, the \
                     machine and the network",
                    CONNECT_MAX.as_secs()
                ))));
            }
        };
        let exchange = async {
            transport::send(&mut stream, request).await?;
            transport::receive::<_, OperatorReply>(&mut stream).await
        };
        let asked = |what: String| Missed::Asked(Failure::no_manager(what));
        let reply = timeout(limit, exchange)
            .await
            .map_err(|_| {
                asked(format!("the manager at {address} has not answered within {} s", limit.as_secs()))
            })?
            .map_err(|error| asked(format!("the manager at {address} gave no answer: {error}")))?;
        match reply {
            OperatorReply::NotLeader { leader, why } => {
                let failure = Failure::no_manager(format!(
                    "no manager leads at this moment; the one at {address} says: {why}"
                ));
                Err(Missed::NotLeader { leader, failure })
            }
            reply => Ok(reply),
        }
    }

    async fn connect(&self, address: &str) -> Result<TcpStream, Failure> {
        let mut stream = TcpStream::connect(address).await.map_err(|error| {
            let hint = match error.kind() {
                ErrorKind::ConnectionRefused => "start it there with `mirrorctl manager run`",
                _ => "check `manager` in the cluster file, the machine and the network",
            };
            Failure::no_manager(format!("the manager at {address} cannot be reached ({error}): {hint}"))
        })?;
        let bytes = key::random_bytes()?;
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let identity = Identity {
            role: Role::Operator,
            name: name.trim().to_owned(),
            cluster: None,
            process: ProcessId(u64::from(std::process::id())),
        };
        let established = transport::connect(&mut stream, &self.key, Purpose::Control, &identity, bytes)
            .await
            .map_err(|error| Failure::no_manager(format!("the manager at {address}: {error}")))?;
        if established.peer.role != Role::Manager {
            return Err(Failure::no_manager(format!(
                "at {address} there is {} and not the manager: check `manager` in the cluster file",
                established.peer.name
            )));
        }
        Ok(stream)
    }
}

/// An answer of another kind than the question asked for.
pub fn unexpected(reply: &OperatorReply) -> Failure {
    let text = format!("{reply:?}");
    let kind = text.split([' ', '(', '{']).next().unwrap_or_default().to_owned();
    Failure::new(format!("the manager answered something else ({kind}): install the same release everywhere"))
}
