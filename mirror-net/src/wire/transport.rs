//! Handshake and length-prefixed JSON over any byte stream; control traffic is not in a hurry.
//!
//! The stream, the clock and the random nonces belong to the caller.

use super::handshake::{
    ClientHandshake, ClusterKey, Established, HELLO_BYTES, HandshakeError, Identity, PROOF_PREFIX_BYTES,
    Purpose, ServerHandshake, identity_length,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest JSON message in bytes; a map of a thousand nodes fits.
pub const MESSAGE_BYTES_MAX: u32 = 64 << 20;

/// Why a connection could not be made or used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TransportError {
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("a message of {0} bytes is larger than any we know")]
    TooLong(u32),
    #[error("a message that we do not understand: {0}")]
    Json(#[from] serde_json::Error),
}

/// The connecting side's handshake.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: &ClusterKey,
    purpose: Purpose,
    identity: &Identity,
    nonce: [u8; 32],
) -> Result<Established, TransportError> {
    let mut client = ClientHandshake::new(key.clone(), purpose, identity, nonce);
    stream.write_all(&client.hello()).await?;
    let mut challenge = [0; HELLO_BYTES];
    stream.read_exact(&mut challenge).await.map_err(not_ours)?;
    let proof = client.challenge(&challenge)?;
    stream.write_all(&proof).await?;
    let welcome = client.verdict(stream.read_u8().await?)?;
    let (prefix, body) = read_proof(stream).await?;
    Ok(client.finish(welcome, &prefix, &body)?)
}

/// A listener that hangs up on our hello is not one of ours.
fn not_ours(error: io::Error) -> TransportError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => HandshakeError::NotOurs.into(),
        _ => error.into(),
    }
}

/// A connection whose client has proven the key and waits to be welcomed or refused.
pub struct Incoming {
    server: ServerHandshake,
    client: Vec<u8>,
    established: Established,
}

impl Incoming {
    /// What the connection is for.
    pub fn purpose(&self) -> Purpose {
        self.server.purpose()
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Identity {
        &self.established.peer
    }

    /// Accepts the client.
    pub async fn welcome<S: AsyncWrite + Unpin>(
        self,
        stream: &mut S,
        identity: &Identity,
    ) -> io::Result<Established> {
        stream.write_all(&self.server.welcome(&self.client, identity)).await?;
        Ok(self.established)
    }

    /// Turns the client away with a reason.
    pub async fn refuse<S: AsyncWrite + Unpin>(self, stream: &mut S, reason: &str) -> io::Result<()> {
        stream.write_all(&self.server.refuse(&self.client, reason)).await
    }
}

/// The listening side's handshake, up to the decision whether to welcome the client.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: &ClusterKey,
    nonce: [u8; 32],
) -> Result<Incoming, TransportError> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello).await?;
    let server = match ServerHandshake::new(key.clone(), &hello, nonce) {
        Ok(server) => server,
        Err((error, challenge)) => {
            if let Some(challenge) = challenge {
                stream.write_all(&challenge).await?;
            }
            return Err(error.into());
        }
    };
    stream.write_all(&server.challenge()).await?;
    let (prefix, client) = read_proof(stream).await?;
    match server.proof(&prefix, &client) {
        Ok(established) => Ok(Incoming { server, client, established }),
        Err(error) => {
            stream.write_all(&ServerHandshake::wrong_key()).await?;
            Err(error.into())
        }
    }
}

async fn read_proof<S: AsyncRead + Unpin>(
    stream: &mut S,
) -> Result<([u8; PROOF_PREFIX_BYTES], Vec<u8>), TransportError> {
    let mut prefix = [0; PROOF_PREFIX_BYTES];
    stream.read_exact(&mut prefix).await?;
    let mut body = vec![0; identity_length(&prefix)?];
    stream.read_exact(&mut body).await?;
    Ok((prefix, body))
}

/// Sends one message.
pub async fn send<S: AsyncWrite + Unpin, T: Serialize>(
    stream: &mut S,
    message: &T,
) -> Result<(), TransportError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    if length > MESSAGE_BYTES_MAX {
        return Err(TransportError::TooLong(length));
    }
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&bytes).await?;
    Ok(stream.flush().await?)
}

/// Receives one message. Not safe to cancel in the middle: give it a task of its own.
pub async fn receive<S: AsyncRead + Unpin, T: DeserializeOwned>(stream: &mut S) -> Result<T, TransportError> {
    let length = receive_length(stream).await?;
    receive_body(stream, length).await
}

/// Receives what comes before a message: its length. For callers that wait long for a message to begin,
/// and not at all long for the rest of it.
pub async fn receive_length<S: AsyncRead + Unpin>(stream: &mut S) -> Result<u32, TransportError> {
    let length = stream.read_u32_le().await?;
    if length > MESSAGE_BYTES_MAX {
        return Err(TransportError::TooLong(length));
    }
    Ok(length)
}

/// Receives the rest of a message whose length is known.
pub async fn receive_body<S: AsyncRead + Unpin, T: DeserializeOwned>(
    stream: &mut S,
    length: u32,
) -> Result<T, TransportError> {
    let mut bytes = Vec::new();
    // Grows with what arrives: a length alone reserves no memory.
    (&mut *stream).take(u64::from(length)).read_to_end(&mut bytes).await?;
    if bytes.len() < length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(serde_json::from_slice(&bytes)?)
}
