//! The connection to the manager: made again whenever it is lost.

use super::told::Told;
use super::{Common, Input, nonce};
use mirror_net::control::{ManagerMessage, NodeMessage};
use mirror_net::ids::ClusterId;
use mirror_net::wire::handshake::Purpose;
use mirror_net::wire::transport::{self, TransportError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(300);
/// Before an attempt at the address that a manager named as the leader's.
const HINT_PAUSE: Duration = Duration::from_millis(20);
/// For a connection and its handshake.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same, where there are several managers.
const PATIENCE_OF_SEVERAL: Duration = Duration::from_secs(1);
/// For a message, from its first bytes to its last; a map may be long.
const MESSAGE_MAX: Duration = Duration::from_secs(10);

/// The cluster that this node belongs to, once it knows.
#[derive(Clone, Default)]
pub(super) struct Membership(Arc<Mutex<Option<ClusterId>>>);

impl Membership {
    pub fn get(&self) -> Option<ClusterId> {
        *self.0.lock().expect("never poisoned")
    }

    pub fn set(&self, cluster: Option<ClusterId>) {
        *self.0.lock().expect("never poisoned") = cluster;
    }
}

/// How a conversation ended.
enum End {
    /// The connection is gone.
    Lost(String),
    /// That manager does not lead; the leader's address, if it is known.
    NotLeader(Option<String>, String),
}

/// Keeps a connection to the manager that leads until the agent ends.
///
/// `cluster` is the one that this node belongs to, as far as it knows at each attempt.
pub(super) fn start(
    managers: Vec<String>,
    common: Common,
    cluster: Membership,
    inputs: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let mut told = Told::default();
        let mut turn = managers.iter().cycle().cloned();
        let mut address = turn.next().unwrap_or_default();
        // A dead machine says nothing: with others to ask it is not waited for as long.
        let patience = if managers.len() > 1 { PATIENCE_OF_SEVERAL } else { PATIENCE };
        while !inputs.is_closed() {
            let connected = timeout(patience, connect(&address, &common, cluster.get())).await;
            let (reason, leads, leader) = match connected {
                Ok(Ok(stream)) => match converse(stream, &inputs).await {
                    End::Lost(reason) => {
                        told.forget();
                        (reason, true, None)
                    }
                    End::NotLeader(leader, why) => (why, false, leader),
                },
                Ok(Err(error)) => (error.to_string(), true, None),
                Err(_) => ("no answer".to_owned(), true, None),
            };
            if inputs.is_closed() {
                return;
            }
            // The same reason is said once.
            if told.is_news(Instant::now(), &format!("{address}: {reason}")) {
                if leads {
                    tracing::warn!(address, reason, "cannot reach the manager, trying on");
                } else {
                    tracing::info!(address, reason, "this manager does not lead, trying on");
                }
            }
            let known = leader.is_some();
            // Managers that name each other must not be asked without a pause.
            let hint = leader.filter(|leader| *leader != address);
            address = hint.or_else(|| turn.next()).unwrap_or_default();
            tokio::time::sleep(if known { HINT_PAUSE } else { RETRY }).await;
        }
    });
}

async fn connect(
    address: &str,
    common: &Common,
    cluster: Option<ClusterId>,
) -> Result<TcpStream, TransportError> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    // A manager's machine that is gone says nothing: without this the kernel would try for a quarter
    // of an hour before we look for it again.
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::TcpUserTimeout, &5_000)
        .map_err(std::io::Error::from)?;
    transport::connect(&mut stream, &common.key, Purpose::Control, &common.identity(cluster), nonce())
        .await?;
    Ok(stream)
}

/// Receives a message. The manager may say nothing for long, but not stop in the middle.
async fn receive(reader: &mut OwnedReadHalf) -> Result<ManagerMessage, TransportError> {
    let length = transport::receive_length(reader).await?;
    let body = timeout(MESSAGE_MAX, transport::receive_body(reader, length)).await;
    body.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

/// Carries messages both ways until the connection ends, or the manager says that it does not lead.
async fn converse(stream: TcpStream, inputs: &mpsc::UnboundedSender<Input>) -> End {
    let (mut reader, mut writer) = stream.into_split();
    let (sender, mut outgoing) = mpsc::unbounded_channel::<NodeMessage>();
    let aborted = || TransportError::Io(std::io::ErrorKind::ConnectionAborted.into()).to_string();
    let write = async move {
        while let Some(message) = outgoing.recv().await {
            if let Err(error) = transport::send(&mut writer, &message).await {
                return End::Lost(error.to_string());
            }
        }
        End::Lost(aborted())
    };
    let read = async {
        // Registered before anything that the manager says can arrive.
        if inputs.send(Input::ManagerUp(sender)).is_err() {
            return End::Lost(aborted());
        }
        loop {
            match receive(&mut reader).await {
                Ok(ManagerMessage::NotLeader { leader, why }) => return End::NotLeader(leader, why),
                Ok(message) => {
                    if inputs.send(Input::Manager(message)).is_err() {
                        return End::Lost(aborted());
                    }
                }
                Err(error) => return End::Lost(error.to_string()),
            }
        }
    };
    let end = tokio::select! {
        end = write => end,
        end = read => end,
    };
    let reason = match &end {
        End::Lost(reason) | End::NotLeader(_, reason) => reason.clone(),
    };
    // Whether anybody listens is noticed by the caller.
    let _ = inputs.send(Input::ManagerDown(reason));
    end
}
