//! What happened, and why.

use crate::client::{Client, unexpected};
use crate::failure::{Failure, OK};
use crate::output;
use mirror_net::control::{OperatorReply, OperatorRequest};
use std::path::Path;
use std::time::Duration;
use tokio::time::sleep;

/// How often the manager is asked for what is new.
const POLL: Duration = Duration::from_millis(500);

/// `mirrorctl events`.
pub async fn events(config: &Path, follow: bool, json: bool) -> Result<u8, Failure> {
    let client = Client::from_config(config)?;
    let mut after = 0;
    loop {
        let events = match client.ask(&OperatorRequest::Events { after }).await {
            Ok(OperatorReply::Events { events }) => events,
            Ok(reply) => return Err(unexpected(&reply)),
            // A manager that is being replaced comes back.
            Err(failure) if follow && after > 0 && failure.code == crate::failure::NO_MANAGER => {
                sleep(POLL).await;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        for event in &events {
            after = after.max(event.number);
            if json {
                let line = serde_json::to_string(event);
                output::print(&line.map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?);
            } else {
                let map = event.map.map_or_else(String::new, |map| format!(" {map}"));
                output::print(&format!("{} {}{map}: {}", event.at, event.kind.as_str(), event.text));
            }
        }
        if !follow {
            return Ok(OK);
        }
        sleep(POLL).await;
    }
}
