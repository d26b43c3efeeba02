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

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(300);
/// For a connection and its handshake.
const PATIENCE: Duration = Duration::from_secs(3);
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

/// Keeps a connection to the manager until the agent ends.
///
/// `cluster` is the one that this node belongs to, as far as it knows at each attempt.
pub(super) fn start(
    address: String,
    common: Common,
    cluster: Membership,
    inputs: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let mut told = Told::default();
        while !inputs.is_closed() {
            let reason = match tokio::time::timeout(PATIENCE, connect(&address, &common, cluster.get())).await
            {
                Ok(Ok(stream)) => {
                    told.forget();
                    let reason = converse(stream, &inputs).await.to_string();
                    if inputs.send(Input::ManagerDown(reason.clone())).is_err() {
                        return;
                    }
                    reason
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            // The same reason is said once.
            if told.is_news(Instant::now(), &reason) {
                tracing::warn!(address, reason, "cannot reach the manager, trying on");
            }
            tokio::time::sleep(RETRY).await;
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
    let body = tokio::time::timeout(MESSAGE_MAX, transport::receive_body(reader, length)).await;
    body.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

/// Carries messages both ways until the connection ends.
async fn converse(stream: TcpStream, inputs: &mpsc::UnboundedSender<Input>) -> TransportError {
    let (mut reader, mut writer) = stream.into_split();
    let (sender, mut outgoing) = mpsc::unbounded_channel::<NodeMessage>();
    let write = async move {
        while let Some(message) = outgoing.recv().await {
            if let Err(error) = transport::send(&mut writer, &message).await {
                return error;
            }
        }
        TransportError::Io(std::io::ErrorKind::ConnectionAborted.into())
    };
    let read = async {
        // Registered before anything that the manager says can arrive.
        if inputs.send(Input::ManagerUp(sender)).is_err() {
            return TransportError::Io(std::io::ErrorKind::ConnectionAborted.into());
        }
        loop {
            match receive(&mut reader).await {
                Ok(message) => {
                    if inputs.send(Input::Manager(message)).is_err() {
                        return TransportError::Io(std::io::ErrorKind::ConnectionAborted.into());
                    }
                }
                Err(error) => return error,
            }
        }
    };
    tokio::select! {
        error = write => error,
        error = read => error,
    }
}
