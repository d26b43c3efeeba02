//! One connection to the manager, from handshake to end.

use super::front::{Event, Post, Shared};
use crate::key::random_bytes;
use mirror_net::control::{ManagerMessage, NodeMessage, OperatorReply, OperatorRequest};
use mirror_net::manager::ConnectionId;
use mirror_net::wire::handshake::{Identity, Purpose, Role};
use mirror_net::wire::transport::{self, TransportError};
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long a handshake and a first message may take.
const GREETING_MAX: Duration = Duration::from_secs(5);
/// How long a message may take from its first bytes to its last.
const MESSAGE_MAX: Duration = Duration::from_secs(5);
/// A node that says nothing for so long is hung up on; long after it counts as silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Messages waiting for a node that does not read them.
const QUEUE_MAX: usize = 256;

/// Why a connection ended before it was done.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("it did not finish its handshake")]
    Greeting,
    #[error("it has said nothing for {} s", .0.as_secs())]
    Silence(Duration),
    #[error("it stopped in the middle of a message")]
    Midway,
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Transport(error.into())
    }
}

impl End {
    /// Somebody who goes away is nothing to tell of, nor is a port scan.
    fn is_ordinary(&self) -> bool {
        matches!(self, Self::Transport(TransportError::Io(_)))
    }
}

/// Serves a connection until it ends.
pub(super) async fn serve(stream: TcpStream, from: SocketAddr, shared: Shared) {
    let mut who = String::new();
    let Err(end) = run(stream, &shared, &mut who).await else { return };
    let what = match who.as_str() {
        "" => format!("a connection from {} was turned away: {end}", from.ip()),
        who => format!("the connection of {who} at {} ended: {end}", from.ip()),
    };
    if end.is_ordinary() {
        tracing::debug!("{what}");
    } else if shared.is_news(&what) {
        tracing::warn!("{what}");
    }
}

/// `who` is filled in once the other side has proven the key.
async fn run(mut stream: TcpStream, shared: &Shared, who: &mut String) -> Result<(), End> {
    stream.set_nodelay(true)?;
    let Ok(nonce) = random_bytes() else { return Ok(()) };
    let greeting = transport::accept(&mut stream, &shared.key, nonce);
    let incoming = timeout(GREETING_MAX, greeting).await.map_err(|_| End::Greeting)??;
    let peer = incoming.peer();
    *who = match peer.role {
        Role::Node => format!("node {}", peer.name),
        Role::Manager => format!("manager {}", peer.name),
        Role::Operator => format!("an operator on {}", peer.name),
    };
    if incoming.purpose() != Purpose::Control {
        incoming.refuse(&mut stream, "this is the manager; lanes go from node to node").await?;
        return Ok(());
    }
    let identity = Identity {
        role: Role::Manager,
        name: "manager".into(),
        cluster: *shared.cluster.borrow(),
        process: shared.process,
    };
    match incoming.peer().role {
        Role::Manager => {
            incoming.refuse(&mut stream, "a manager does not talk to managers").await?;
            Ok(())
        }
        Role::Operator => {
            incoming.welcome(&mut stream, &identity).await?;
            operator(stream, shared).await
        }
        Role::Node => {
            let established = incoming.welcome(&mut stream, &identity).await?;
            node(stream, shared, established.peer).await
        }
    }
}

/// Receives a message that begins within `patience`. Once it has begun it has to come.
async fn receive<S: AsyncRead + Unpin, T: DeserializeOwned>(
    stream: &mut S,
    patience: Duration,
) -> Result<T, End> {
    let length = timeout(patience, transport::receive_length(stream)).await;
    let length = length.map_err(|_| End::Silence(patience))??;
    let body = timeout(MESSAGE_MAX, transport::receive_body(stream, length)).await;
    Ok(body.map_err(|_| End::Midway)??)
}

async fn operator(mut stream: TcpStream, shared: &Shared) -> Result<(), End> {
    loop {
        let request: OperatorRequest = receive(&mut stream, GREETING_MAX).await?;
        let post = shared.post.borrow().clone();
        if let Post::Follows { leader, why } = post {
            return Ok(transport::send(&mut stream, &OperatorReply::NotLeader { leader, why }).await?);
        }
        let (reply, answer) = oneshot::channel();
        if shared.events.send(Event::Operator { request, reply }).await.is_err() {
            return Ok(());
        }
        let Ok(answer) = answer.await else { return Ok(()) };
        transport::send(&mut stream, &answer).await?;
    }
}

async fn node(mut stream: TcpStream, shared: &Shared, peer: Identity) -> Result<(), End> {
    let NodeMessage::Register(registration) = receive(&mut stream, GREETING_MAX).await? else {
        tracing::warn!("node {} spoke before it registered", peer.name);
        return Ok(());
    };
    let post = shared.post.borrow().clone();
    if let Post::Follows { leader, why } = post {
        return Ok(transport::send(&mut stream, &ManagerMessage::NotLeader { leader, why }).await?);
    }
    let connection = shared.next_connection();
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    let cluster = peer.cluster;
    let event = Event::Register { connection, cluster, registration, sender };
    if shared.events.send(event).await.is_err() {
        return Ok(());
    }
    let (reader, writer) = stream.into_split();
    let mut sending = std::pin::pin!(send_all(writer, receiver));
    let mut receiving = std::pin::pin!(receive_all(reader, connection, shared));
    let result = tokio::select! {
        result = &mut receiving => result,
        sent = &mut sending => match sent {
            // Hung up on by us: let it read the last words, since closing now could discard them.
            Ok(writer) => {
                let _ = timeout(Duration::from_secs(1), &mut receiving).await;
                drop(writer);
                Ok(())
            }
            Err(error) => Err(error.into()),
        },
    };
    let _ = shared.events.send(Event::Disconnected { connection }).await;
    result
}

/// Sends until the server drops its end, then says so to the other side.
async fn send_all(
    mut writer: OwnedWriteHalf,
    mut receiver: mpsc::Receiver<ManagerMessage>,
) -> Result<OwnedWriteHalf, TransportError> {
    while let Some(message) = receiver.recv().await {
        transport::send(&mut writer, &message).await?;
    }
    writer.shutdown().await?;
    Ok(writer)
}

async fn receive_all(
    mut reader: OwnedReadHalf,
    connection: ConnectionId,
    shared: &Shared,
) -> Result<(), End> {
    loop {
        let message = receive(&mut reader, SILENCE_MAX).await?;
        if shared.events.send(Event::Message { connection, message }).await.is_err() {
            return Ok(());
        }
    }
}
