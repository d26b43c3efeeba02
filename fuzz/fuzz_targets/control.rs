//! JSON in length-prefixed frames: what is read is written to something that is read as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::control::{ManagerMessage, NodeMessage, OperatorReply, OperatorRequest};
use mirror_net::wire::transport;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Nothing here ever waits.
fn now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("memory is always ready"),
    }
}

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(mut stream: &[u8]) {
    while !stream.is_empty() {
        let before = stream.len();
        let Ok(message) = now(transport::receive::<_, T>(&mut stream)) else { return };
        assert!(stream.len() < before);
        let mut bytes = Vec::new();
        now(transport::send(&mut bytes, &message)).expect("what was read can be written");
        let again = now(transport::receive::<_, T>(&mut &bytes[..])).expect("what was written can be read");
        assert_eq!(message, again);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((which, rest)) = input.split_first() else { return };
    // Most inputs are one message; a fuzzer does not guess a length.
    let mut framed = (rest.len() as u32).to_le_bytes().to_vec();
    framed.extend(rest);
    let stream = if which & 4 == 0 { &framed } else { rest };
    match which & 3 {
        0 => check::<NodeMessage>(stream),
        1 => check::<ManagerMessage>(stream),
        2 => check::<OperatorRequest>(stream),
        _ => check::<OperatorReply>(stream),
    }
});
