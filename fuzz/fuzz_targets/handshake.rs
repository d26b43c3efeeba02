//! A handshake with somebody in between who may change, cut or invent anything: neither side believes
//! anything that the other did not say.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::ids::{ClusterId, ProcessId};
use mirror_net::wire::handshake::{
    ClientHandshake, ClusterKey, Established, HELLO_BYTES, HandshakeError, Identity, PROOF_PREFIX_BYTES,
    Purpose, Role, ServerHandshake, identity_length,
};
use ublk_mirror_fuzz::choices::Choices;

fn identity(choices: &mut Choices<'_>, role: Role) -> Identity {
    let length = usize::from(choices.word()) % 5000;
    let mut name = String::from_utf8_lossy(choices.bytes(length.min(64))).into_owned();
    if length > 4500 {
        // More than an identity may have.
        name = name.repeat(200);
    }
    let cluster = (choices.byte() & 1 == 0).then(ClusterId::default);
    Identity { role, name, cluster, process: ProcessId(choices.long()) }
}

/// What somebody in between makes of bytes: mostly nothing.
fn tamper(choices: &mut Choices<'_>, bytes: &mut [u8]) -> bool {
    let before = bytes.to_vec();
    match choices.below(8) {
        0 => {
            let at = usize::from(choices.word()) % bytes.len();
            bytes[at] ^= choices.byte();
        }
        1 => {
            let new = choices.bytes(bytes.len());
            bytes[..new.len()].copy_from_slice(new);
        }
        _ => {}
    }
    before != bytes
}

/// A proof, as its reader takes it from the stream.
fn split(bytes: &[u8]) -> Option<([u8; PROOF_PREFIX_BYTES], &[u8])> {
    let (prefix, rest) = bytes.split_first_chunk::<PROOF_PREFIX_BYTES>()?;
    let length = identity_length(prefix).ok()?;
    Some((*prefix, rest.get(..length)?))
}

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let key = ClusterKey::new([7; 32]);
    let client_key = if choices.byte() == 1 { ClusterKey::new([8; 32]) } else { key.clone() };
    let purpose = choices.of(&[Purpose::Control, Purpose::Lane]);
    let (mine, theirs) = (identity(&mut choices, Role::Node), identity(&mut choices, Role::Manager));

    let mut client = ClientHandshake::new(client_key, purpose, &mine, [1; 32]);
    let mut hello: [u8; HELLO_BYTES] = client.hello();
    let mut changed = tamper(&mut choices, &mut hello);
    let server = match ServerHandshake::new(key, &hello, [2; 32]) {
        Ok(server) => server,
        Err((error, _)) => {
            assert!(changed, "{error}");
            return;
        }
    };
    let mut challenge = server.challenge();
    changed |= tamper(&mut choices, &mut challenge);
    let mut proof = match client.challenge(&challenge) {
        Ok(proof) => proof,
        Err(error) => {
            assert!(changed, "{error}");
            return;
        }
    };
    changed |= tamper(&mut choices, &mut proof);
    let Some((prefix, body)) = split(&proof) else { return };
    let served: Result<Established, HandshakeError> = server.proof(&prefix, body);
    if let Ok(established) = &served {
        assert!(!changed, "a changed handshake was believed");
        assert_eq!(established.peer, mine);
        assert_eq!(server.purpose(), purpose);
    }
    let mut answer = match (&served, choices.byte() & 1) {
        (Ok(_), 0) => server.welcome(body, &theirs),
        (Ok(_), _) => {
            let count = usize::from(choices.word()) % 5000;
            let reason = String::from_utf8_lossy(choices.bytes(count)).into_owned();
            server.refuse(body, &reason)
        }
        (Err(_), _) => ServerHandshake::wrong_key().to_vec(),
    };
    changed |= tamper(&mut choices, &mut answer);
    let Ok(welcome) = client.verdict(answer[0]) else { return };
    let Some((prefix, body)) = split(&answer[1..]) else { return };
    if let Ok(established) = client.finish(welcome, &prefix, body) {
        assert!(!changed && welcome, "a changed handshake was believed");
        assert_eq!(established.peer, theirs);
        assert_eq!(Some(established.session), served.ok().map(|served| served.session));
    }
    // And somebody who just sends what comes to mind.
    let (prefix, body) = (choices.array(), choices.rest());
    assert!(server.proof(&prefix, body).is_err());
    assert!(client.finish(true, &prefix, body).is_err());
});
