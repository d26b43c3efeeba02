//! What happened, a key for each event.
//!
//! Its number is the key, so that writing it again after an answer was lost changes nothing.

use super::super::StoreError;
use super::client::Etcd;
use etcd_client::{DeleteOptions, TxnOp};
use mirror_net::control::Event;

/// Events that are kept.
const KEPT_MAX: u64 = 2_000;
/// Events in a transaction, which has to hold two operations more.
const TOGETHER_MAX: usize = 98;

/// What the keys of all events begin with.
const EVENTS: &str = "event/";

fn key(number: u64) -> String {
    format!("{EVENTS}{number:012}")
}

/// Operations that keep as many of the events, from the first, as a transaction takes, and remove those that are too
/// many then.
pub(super) fn puts(etcd: &Etcd, events: &[Event]) -> (usize, Vec<TxnOp>) {
    let events = &events[..events.len().min(TOGETHER_MAX)];
    let put = |event: &Event| {
        let value = serde_json::to_vec(event).expect("it is plain data");
        TxnOp::put(etcd.key(&key(event.number)), value, None)
    };
    let mut ops: Vec<TxnOp> = events.iter().map(put).collect();
    if let Some(last) = events.last().filter(|last| last.number > KEPT_MAX) {
        let end = etcd.key(&key(last.number - KEPT_MAX + 1));
        ops.push(TxnOp::delete(etcd.key(EVENTS), Some(DeleteOptions::new().with_range(end))));
    }
    (events.len(), ops)
}

/// Those that are kept, the oldest first.
pub(super) async fn read(etcd: &mut Etcd) -> Result<Vec<Event>, StoreError> {
    let mut events = Vec::new();
    for (key, value) in etcd.small_values(EVENTS).await? {
        match serde_json::from_slice::<Event>(&value) {
            Ok(event) => events.push(event),
            // Nothing is decided by it.
            Err(error) => tracing::warn!("{}: key {}: {error}; it is left out", etcd.name(), etcd.key(&key)),
        }
    }
    Ok(events)
}
