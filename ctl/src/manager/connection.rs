//! One connection to the manager, from handshake to end.

use super::server::{Event, Shared};
use crate::key::random_bytes;
use mirror_net::control::{ManagerMessage, NodeMessage, OperatorRequest};
use mirror_net::manager::ConnectionId;
use mirror_net::wire::handshake::{Identity, Purpose, Role};
use mirror_net::wire::transport::{self, TransportError};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long a handshake and a first message may take.
const GREETING_MAX: Duration = Duration::from_secs(5);
/// A node that says nothing for so long is hung up on; long after it counts as silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Messages waiting for a node that does not read them.
const QUEUE_MAX: usize = 256;

/// Serves a connection until it ends.
pub(super) async fn serve(stream: TcpStream, from: SocketAddr, shared: Shared) {
    if let Err(error) = run(stream, from, &shared).await {
        tracing::debug!("connection from {from}: {error}");
    }
}

async fn run(mut stream: TcpStream, from: SocketAddr, shared: &Shared) -> Result<(), TransportError> {
    stream.set_nodelay(true)?;
    let Ok(nonce) = random_bytes() else { return Ok(()) };
    let greeting = transport::accept(&mut stream, &shared.key, nonce);
    let Ok(incoming) = timeout(GREETING_MAX, greeting).await else { return Ok(()) };
    let incoming = incoming.inspect_err(|error| {
        // Somebody with another key is worth knowing; a port scan is not.
        if matches!(error, TransportError::Handshake(_)) {
            let news = format!("a connection from {} was turned away: {error}", from.ip());
            if shared.is_news(&news) {
                tracing::warn!("{news}");
            }
        }
    })?;
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

async fn operator(mut stream: TcpStream, shared: &Shared) -> Result<(), TransportError> {
    loop {
        let request: OperatorRequest = transport::receive(&mut stream).await?;
        let (reply, answer) = oneshot::channel();
        if shared.events.send(Event::Operator { request, reply }).await.is_err() {
            return Ok(());
        }
        let Ok(answer) = answer.await else { return Ok(()) };
        transport::send(&mut stream, &answer).await?;
    }
}

async fn node(mut stream: TcpStream, shared: &Shared, peer: Identity) -> Result<(), TransportError> {
    let first = timeout(GREETING_MAX, transport::receive(&mut stream));
    let Ok(first) = first.await else { return Ok(()) };
    let NodeMessage::Register(registration) = first? else {
        tracing::warn!("node {} spoke before it registered", peer.name);
        return Ok(());
    };
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
            Err(error) => Err(error),
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
) -> Result<(), TransportError> {
    loop {
        let Ok(message) = timeout(SILENCE_MAX, transport::receive(&mut reader)).await else { return Ok(()) };
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                // Most likely the node runs another release: worth a line, and the end of this connection.
                if matches!(error, TransportError::Json(_)) {
                    tracing::warn!("{connection:?}: {error}");
                }
                return Err(error);
            }
        };
        if shared.events.send(Event::Message { connection, message }).await.is_err() {
            return Ok(());
        }
    }
}
