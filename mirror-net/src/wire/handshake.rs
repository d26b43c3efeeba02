//! The first bytes of every connection: both sides prove the cluster key to each other.
//!
//! ```text
//! client                                   server
//!   Hello      { version, purpose, nonce }   ->
//!                                        <-  Challenge { version, nonce }
//!   Proof      { mac, identity }             ->
//!                                        <-  Verdict, then { mac, identity }
//! ```
//!
//! A mac is BLAKE3, keyed with the cluster key, over the role of its sender and everything sent so
//! far, both nonces included: it can neither be replayed nor reflected. The server says who it is
//! only after the client's proof held. What follows on the connection is not encrypted.

use crate::ids::{ClusterId, ProcessId};
use crate::region::digest::DigestKey;
use serde::{Deserialize, Serialize};

/// The protocol version that this program speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes of a [`Hello`](self) and of a challenge.
pub const HELLO_BYTES: usize = 48;
/// Bytes before the identity in a proof: mac and length.
pub const PROOF_PREFIX_BYTES: usize = 34;
/// Longest identity or reason.
pub const IDENTITY_BYTES_MAX: usize = 4096;

const HELLO_MAGIC: [u8; 8] = *b"UBMHELLO";
const CHALLENGE_MAGIC: [u8; 8] = *b"UBMCHALL";
const VERDICT_WELCOME: u8 = 0;
const VERDICT_WRONG_KEY: u8 = 1;
const VERDICT_REFUSED: u8 = 2;

/// The secret that all parts of a cluster share; 32 bytes, written as 64 hexadecimal digits.
#[derive(Clone)]
pub struct ClusterKey([u8; 32]);

impl ClusterKey {
    /// From 32 random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads the text of a key file.
    pub fn parse(text: &str) -> Result<Self, BadKey> {
        let hash = blake3::Hash::from_hex(text.trim()).map_err(|_| BadKey)?;
        Ok(Self(*hash.as_bytes()))
    }

    /// The key of the digests by which copies are compared.
    pub fn digest_key(&self) -> DigestKey {
        DigestKey::new(&self.0)
    }

    /// The text of a key file.
    pub fn to_text(&self) -> String {
        format!("{}\n", blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(secret)")
    }
}

/// A key file that does not hold a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a cluster key is 64 hexadecimal digits; make one with `mirrorctl key new`")]
pub struct BadKey;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Purpose {
    /// JSON messages between nodes' agents, the manager and `mirrorctl`.
    Control = 1,
    /// A lane: replication and forwarded requests between two nodes.
    Lane = 2,
}

impl Purpose {
    fn parse(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Control),
            2 => Some(Self::Lane),
            _ => None,
        }
    }
}

/// What a side of a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `ublk-server`.
    Node,
    /// `mirrorctl manager run`.
    Manager,
    /// `mirrorctl`, on behalf of a person.
    Operator,
}

/// Who a side says that it is, once the key is proven.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// Its part.
    pub role: Role,
    /// Its name: the node's, or the host's.
    pub name: String,
    /// The cluster that it belongs to, if it belongs to one.
    pub cluster: Option<ClusterId>,
    /// Its process.
    pub process: ProcessId,
}

/// The result of a handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Established {
    /// Who is at the other end.
    pub peer: Identity,
    /// The same number on both sides, different for every connection.
    pub session: u64,
}

/// Why a handshake failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HandshakeError {
    #[error("the other end does not speak our protocol (is something else listening on that port?)")]
    NotOurs,
    #[error(
        "the other end speaks protocol version {theirs}, this program version {PROTOCOL_VERSION}: install the same release on both"
    )]
    Version { theirs: u16 },
    #[error("the other end has another cluster key: copy the same key file to every machine of the cluster")]
    WrongKey,
    #[error("refused by the other end: {0}")]
    Refused(String),
    #[error("malformed handshake: {0}")]
    Malformed(&'static str),
}

fn greeting(magic: [u8; 8], version: u16, purpose: u8, nonce: &[u8; 32]) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10] = purpose;
    bytes[16..].copy_from_slice(nonce);
    bytes
}

fn version_of(bytes: &[u8; HELLO_BYTES]) -> u16 {
    u16::from_le_bytes([bytes[8], bytes[9]])
}

fn mac(key: &ClusterKey, role: &[u8], parts: &[&[u8]]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    for part in std::iter::once(&role).chain(parts) {
        // Lengths keep two different splits of the same bytes apart.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

fn session(key: &ClusterKey, hello: &[u8], challenge: &[u8]) -> u64 {
    let hash = mac(key, b"session", &[hello, challenge]);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default())
}

fn proof(mac: blake3::Hash, identity: &[u8]) -> Vec<u8> {
    let mut bytes = mac.as_bytes().to_vec();
    bytes.extend_from_slice(&(identity.len() as u16).to_le_bytes());
    bytes.extend_from_slice(identity);
    bytes
}

/// How many bytes of identity follow the prefix of a proof.
pub fn identity_length(prefix: &[u8; PROOF_PREFIX_BYTES]) -> Result<usize, HandshakeError> {
    let length = usize::from(u16::from_le_bytes([prefix[32], prefix[33]]));
    if length > IDENTITY_BYTES_MAX {
        return Err(HandshakeError::Malformed("identity too long"));
    }
    Ok(length)
}

fn identity_bytes(identity: &Identity) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(identity).unwrap_or_default();
    bytes.truncate(IDENTITY_BYTES_MAX);
    bytes
}

fn parse_identity(bytes: &[u8]) -> Result<Identity, HandshakeError> {
    serde_json::from_slice(bytes).map_err(|_| HandshakeError::Malformed("identity"))
}

/// The connecting side.
pub struct ClientHandshake {
    key: ClusterKey,
    hello: [u8; HELLO_BYTES],
    challenge: [u8; HELLO_BYTES],
    identity: Vec<u8>,
}

impl ClientHandshake {
    /// Begins; `nonce` must be fresh random bytes. Send [`Self::hello`] first.
    pub fn new(key: ClusterKey, purpose: Purpose, identity: &Identity, nonce: [u8; 32]) -> Self {
        let hello = greeting(HELLO_MAGIC, PROTOCOL_VERSION, purpose as u8, &nonce);
        Self { key, hello, challenge: [0; HELLO_BYTES], identity: identity_bytes(identity) }
    }

    /// The first bytes to send.
    pub fn hello(&self) -> [u8; HELLO_BYTES] {
        self.hello
    }

    /// Answers the server's challenge with the proof to send.
    pub fn challenge(&mut self, challenge: &[u8; HELLO_BYTES]) -> Result<Vec<u8>, HandshakeError> {
        if challenge[..8] != CHALLENGE_MAGIC {
            return Err(HandshakeError::NotOurs);
        }
        if version_of(challenge) != PROTOCOL_VERSION {
            return Err(HandshakeError::Version { theirs: version_of(challenge) });
        }
        self.challenge = *challenge;
        let mac = mac(&self.key, b"client", &[&self.hello, challenge, &self.identity]);
        Ok(proof(mac, &self.identity))
    }

    /// Judges the server's verdict byte: `Ok(true)`, its proof follows; `Ok(false)`, a reason follows
    /// in the form of a proof.
    pub fn verdict(&self, byte: u8) -> Result<bool, HandshakeError> {
        match byte {
            VERDICT_WELCOME => Ok(true),
            VERDICT_WRONG_KEY => Err(HandshakeError::WrongKey),
            VERDICT_REFUSED => Ok(false),
            _ => Err(HandshakeError::NotOurs),
        }
    }

    /// Checks the server's proof, or the proof of its refusal.
    pub fn finish(
        &self,
        welcome: bool,
        prefix: &[u8; PROOF_PREFIX_BYTES],
        body: &[u8],
    ) -> Result<Established, HandshakeError> {
        let role: &[u8] = if welcome { b"server" } else { b"refusal" };
        let expected = mac(&self.key, role, &[&self.hello, &self.challenge, &self.identity, body]);
        let found: [u8; 32] = prefix[..32].try_into().map_err(|_| HandshakeError::Malformed("proof"))?;
        // `Hash` compares in constant time.
        if expected != found {
            return Err(HandshakeError::WrongKey);
        }
        if !welcome {
            return Err(HandshakeError::Refused(String::from_utf8_lossy(body).into_owned()));
        }
        Ok(Established {
            peer: parse_identity(body)?,
            session: session(&self.key, &self.hello, &self.challenge),
        })
    }
}

/// The listening side.
pub struct ServerHandshake {
    key: ClusterKey,
    hello: [u8; HELLO_BYTES],
    challenge: [u8; HELLO_BYTES],
    purpose: Purpose,
}

impl ServerHandshake {
    /// Reads the client's hello; `nonce` must be fresh random bytes. On a version that we do not
    /// speak the challenge still goes out, so that the other end can say so too.
    pub fn new(
        key: ClusterKey,
        hello: &[u8; HELLO_BYTES],
        nonce: [u8; 32],
    ) -> Result<Self, (HandshakeError, Option<[u8; HELLO_BYTES]>)> {
        if hello[..8] != HELLO_MAGIC {
            return Err((HandshakeError::NotOurs, None));
        }
        let challenge = greeting(CHALLENGE_MAGIC, PROTOCOL_VERSION, 0, &nonce);
        if version_of(hello) != PROTOCOL_VERSION {
            return Err((HandshakeError::Version { theirs: version_of(hello) }, Some(challenge)));
        }
        let Some(purpose) = Purpose::parse(hello[10]) else {
            return Err((HandshakeError::Malformed("purpose"), None));
        };
        Ok(Self { key, hello: *hello, challenge, purpose })
    }

    /// What the connection is for.
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// The bytes to send after the hello.
    pub fn challenge(&self) -> [u8; HELLO_BYTES] {
        self.challenge
    }

    /// Checks the client's proof; on failure send [`Self::wrong_key`] and close.
    pub fn proof(
        &self,
        prefix: &[u8; PROOF_PREFIX_BYTES],
        identity: &[u8],
    ) -> Result<Established, HandshakeError> {
        let expected = mac(&self.key, b"client", &[&self.hello, &self.challenge, identity]);
        let found: [u8; 32] = prefix[..32].try_into().map_err(|_| HandshakeError::Malformed("proof"))?;
        if expected != found {
            return Err(HandshakeError::WrongKey);
        }
        Ok(Established {
            peer: parse_identity(identity)?,
            session: session(&self.key, &self.hello, &self.challenge),
        })
    }

    /// What a client without the key is told: nothing but that.
    pub fn wrong_key() -> [u8; 1] {
        [VERDICT_WRONG_KEY]
    }

    /// The last bytes of a handshake that succeeded; `client` is the identity as it was received.
    pub fn welcome(&self, client: &[u8], identity: &Identity) -> Vec<u8> {
        self.last(VERDICT_WELCOME, b"server", client, &identity_bytes(identity))
    }

    /// Refuses a client that has the key, and says why.
    pub fn refuse(&self, client: &[u8], reason: &str) -> Vec<u8> {
        let reason = &reason.as_bytes()[..reason.len().min(IDENTITY_BYTES_MAX)];
        self.last(VERDICT_REFUSED, b"refusal", client, reason)
    }

    fn last(&self, verdict: u8, role: &[u8], client: &[u8], body: &[u8]) -> Vec<u8> {
        let mac = mac(&self.key, role, &[&self.hello, &self.challenge, client, body]);
        let mut bytes = vec![verdict];
        bytes.extend(proof(mac, body));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        Identity { role: Role::Node, name: name.into(), cluster: None, process: ProcessId(7) }
    }

    fn key(byte: u8) -> ClusterKey {
        ClusterKey::new([byte; 32])
    }

    fn split(bytes: &[u8]) -> ([u8; PROOF_PREFIX_BYTES], &[u8]) {
        let (prefix, rest) = bytes.split_at(PROOF_PREFIX_BYTES);
        let prefix = prefix.try_into().unwrap();
        assert_eq!(identity_length(&prefix).unwrap(), rest.len());
        (prefix, rest)
    }

    /// Runs both sides against each other.
    fn meet(
        client_key: u8,
        server_key: u8,
    ) -> (Result<Established, HandshakeError>, Result<Established, HandshakeError>) {
        let mut client = ClientHandshake::new(key(client_key), Purpose::Lane, &identity("a"), [1; 32]);
        let server = ServerHandshake::new(key(server_key), &client.hello(), [2; 32]).ok().unwrap();
        let proof = client.challenge(&server.challenge()).unwrap();
        let (prefix, body) = split(&proof);
        let served = server.proof(&prefix, body);
        let answer = match &served {
            Ok(_) => server.welcome(body, &identity("b")),
            Err(_) => ServerHandshake::wrong_key().to_vec(),
        };
        let connected = client.verdict(answer[0]).and_then(|welcome| {
            let (prefix, body) = split(&answer[1..]);
            client.finish(welcome, &prefix, body)
        });
        (connected, served)
    }

    #[test]
    fn both_sides_learn_each_other_and_one_session() {
        let (client, server) = meet(9, 9);
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(client.session, server.session);
        assert_eq!((client.peer.name.as_str(), server.peer.name.as_str()), ("b", "a"));
    }

    #[test]
    fn without_the_key_nobody_learns_anything() {
        let (client, server) = meet(9, 8);
        assert_eq!(client, Err(HandshakeError::WrongKey));
        assert_eq!(server, Err(HandshakeError::WrongKey));
    }

    #[test]
    fn a_proof_is_bound_to_its_challenge() {
        let mut client = ClientHandshake::new(key(1), Purpose::Control, &identity("a"), [1; 32]);
        let first = ServerHandshake::new(key(1), &client.hello(), [2; 32]).ok().unwrap();
        let second = ServerHandshake::new(key(1), &client.hello(), [3; 32]).ok().unwrap();
        let proof = client.challenge(&first.challenge()).unwrap();
        let (prefix, body) = split(&proof);
        assert!(first.proof(&prefix, body).is_ok());
        assert_eq!(second.proof(&prefix, body), Err(HandshakeError::WrongKey), "a replayed proof");
        // A server that does not know the key reflects the client's own proof.
        assert_eq!(client.finish(true, &prefix, body), Err(HandshakeError::WrongKey));
    }

    #[test]
    fn another_version_is_named_on_both_sides() {
        let mut client = ClientHandshake::new(key(1), Purpose::Control, &identity("a"), [1; 32]);
        let mut hello = client.hello();
        hello[8] = 99;
        let (error, challenge) = ServerHandshake::new(key(1), &hello, [2; 32]).err().unwrap();
        assert_eq!(error, HandshakeError::Version { theirs: 99 });
        let mut challenge = challenge.unwrap();
        challenge[8] = 77;
        assert_eq!(client.challenge(&challenge), Err(HandshakeError::Version { theirs: 77 }));
    }

    #[test]
    fn a_refusal_is_proven_too() {
        let mut client = ClientHandshake::new(key(1), Purpose::Control, &identity("a"), [1; 32]);
        let server = ServerHandshake::new(key(1), &client.hello(), [2; 32]).ok().unwrap();
        let proof = client.challenge(&server.challenge()).unwrap();
        let (_, body) = split(&proof);
        let answer = server.refuse(body, "node a is already registered");
        assert_eq!(client.verdict(answer[0]), Ok(false));
        let (prefix, reason) = split(&answer[1..]);
        assert_eq!(
            client.finish(false, &prefix, reason),
            Err(HandshakeError::Refused("node a is already registered".into()))
        );
    }

    #[test]
    fn key_files_round_trip_and_bad_ones_are_named() {
        let text = key(5).to_text();
        assert_eq!(ClusterKey::parse(&text).unwrap().0, [5; 32]);
        assert_eq!(ClusterKey::parse("hello").err(), Some(BadKey));
    }
}
