//! The machines.

use crate::cli::ForceArguments;
use crate::client::{Client, unexpected};
use crate::failure::{FAILED, Failure, OK};
use crate::output;
use mirror_net::control::{ClusterStatus, ForceOrder, OperatorReply, OperatorRequest};
use mirror_net::ids::{MapVersion, NodeId};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long the new primaries may take to adopt the map.
const ADOPTION_MAX: Duration = Duration::from_secs(30);
/// How often they are asked about.
const POLL: Duration = Duration::from_millis(50);

/// What `node failover --json` prints.
#[derive(Serialize)]
struct FailoverJson {
    node: String,
    version: u64,
    moved: Vec<String>,
    stayed: Vec<String>,
    adopted: bool,
    seconds: f64,
}

/// `mirrorctl node failover`.
pub async fn failover(config: &Path, node: &str, json: bool) -> Result<u8, Failure> {
    let client = Client::from_config(config)?;
    let started = Instant::now();
    let reply = client.ask(&OperatorRequest::Failover { node: node.to_owned() }).await?;
    let OperatorReply::FailedOver { version, moved, stayed } = reply else { return Err(unexpected(&reply)) };
    let late = loop {
        let status = client.status().await?;
        let late = not_adopted(&status, version);
        if late.is_empty() || started.elapsed() > ADOPTION_MAX {
            break late;
        }
        sleep(POLL).await;
    };
    let seconds = started.elapsed().as_secs_f64();
    if json {
        let adopted = late.is_empty();
        let node = node.to_owned();
        output::print_json(&FailoverJson { node, version: version.0, moved, stayed, adopted, seconds })?;
        return Ok(if adopted { OK } else { FAILED });
    }
    if moved.is_empty() && stayed.is_empty() {
        output::print(&format!("node {node} serves nothing: there is nothing to move"));
        return Ok(OK);
    }
    let mut text = String::new();
    for line in &moved {
        text += &format!("{line}\n");
    }
    for line in &stayed {
        text += &format!("not moved: {line}\n");
    }
    if late.is_empty() {
        text += &format!("map {version} adopted by every new primary after {seconds:.3} s\n");
        output::print(&text);
        return Ok(OK);
    }
    output::print(&text);
    Err(Failure::new(format!(
        "map {version} is stored, but {} did not adopt it within {} s: what moved there waits; see `mirrorctl status`",
        late.join(", "),
        ADOPTION_MAX.as_secs()
    )))
}

/// `mirrorctl node force`.
pub async fn force(config: &Path, arguments: &ForceArguments) -> Result<u8, Failure> {
    let client = Client::from_config(config)?;
    let ForceArguments { node, device, confirmed_off, yes } = arguments;
    let order = ForceOrder {
        node: node.clone(),
        devices: device.clone(),
        confirmed_off: confirmed_off.clone(),
        carry_out: *yes,
    };
    let reply = client.ask(&OperatorRequest::Force(order)).await?;
    let OperatorReply::Done { lines } = reply else { return Err(unexpected(&reply)) };
    output::print(&lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    if *yes {
        return Ok(OK);
    }
    Err(Failure::new("nothing was changed: this loses data for good; repeat with --yes if it shall be so"))
}

/// The primaries and exporters that a version made and that do not know it yet.
fn not_adopted(status: &ClusterStatus, version: MapVersion) -> Vec<String> {
    let Some(map) = &status.map else { return Vec::new() };
    let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
    for device in &map.devices {
        let made = device.spans.iter().filter(|span| span.epoch.0 == version.0);
        nodes.extend(made.filter_map(|span| map.node_of(span.primary().disk)));
        if device.claim.since == version {
            nodes.insert(device.claim.node);
        }
    }
    let behind = |name: &str| status.nodes.iter().any(|node| node.name == name && node.adopted < version);
    nodes.into_iter().map(|node| map.node_name(node)).filter(|name| behind(name)).collect()
}
