//! Talking to the manager.

use crate::failure::Failure;
use crate::key;
use mirror_net::config::ClusterFile;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::ids::ProcessId;
use mirror_net::wire::handshake::{ClusterKey, Identity, Purpose, Role};
use mirror_net::wire::transport;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a connection and its handshake may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long most answers may take.
const ANSWER_MAX: Duration = Duration::from_secs(20);
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

/// A manager to talk to.
pub struct Client {
    address: String,
    key: ClusterKey,
}

impl Client {
    /// From the cluster file.
    pub fn from_config(path: &Path) -> Result<Self, Failure> {
        let (file, _) = load_file(path)?;
        Self::from_file(&file)
    }

    /// From a cluster file that has been read.
    pub fn from_file(file: &ClusterFile) -> Result<Self, Failure> {
        Ok(Self { address: file.manager.clone(), key: key::load(&file.key_file)? })
    }

    /// Asks once, on a connection of its own. A refusal is a failure.
    pub async fn ask(&self, request: &OperatorRequest) -> Result<OperatorReply, Failure> {
        let address = &self.address;
        let limit = match request {
            OperatorRequest::CreateCluster { .. } => CREATE_MAX,
            _ => ANSWER_MAX,
        };
        let mut stream = timeout(CONNECT_MAX, self.connect()).await.map_err(|_| {
            Failure::no_manager(format!(
                "the manager at {address} does not answer within {} s: check `manager` in the cluster file, the \
                 machine and the network",
                CONNECT_MAX.as_secs()
            ))
        })??;
        let exchange = async {
            transport::send(&mut stream, request).await?;
            transport::receive::<_, OperatorReply>(&mut stream).await
        };
        let reply = timeout(limit, exchange)
            .await
            .map_err(|_| {
                Failure::no_manager(format!(
                    "the manager at {address} has not answered within {} s",
                    limit.as_secs()
                ))
            })?
            .map_err(|error| {
                Failure::no_manager(format!("the manager at {address} gave no answer: {error}"))
            })?;
        match reply {
            OperatorReply::Refused { reason } => Err(Failure::new(reason)),
            reply => Ok(reply),
        }
    }

    async fn connect(&self) -> Result<TcpStream, Failure> {
        let address = &self.address;
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
