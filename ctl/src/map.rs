//! The distribution map, for people.

use crate::client::{Client, load_file, unexpected};
use crate::failure::{Failure, OK};
use crate::json::{MapJson, state_name};
use crate::output;
use mirror_net::config::format_bytes;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::map::DistributionMap;
use std::path::Path;

/// `mirrorctl map show`.
pub async fn show(config: &Path, json: bool) -> Result<u8, Failure> {
    let map = match Client::from_config(config)?.ask(&OperatorRequest::Map).await? {
        OperatorReply::Map { map: Some(map) } => map,
        OperatorReply::Map { map: None } => {
            return Err(Failure::new(
                "no cluster has been created yet: start ublk-server on every node, then type `mirrorctl cluster create`",
            ));
        }
        reply => return Err(unexpected(&reply)),
    };
    if json {
        output::print_json(&MapJson::of(&map))?;
    } else {
        output::print(&text(&map));
    }
    Ok(OK)
}

/// `mirrorctl map rebuild`.
pub async fn rebuild(config: &Path, without: Vec<String>, dry_run: bool) -> Result<u8, Failure> {
    let (file, text) = load_file(config)?;
    let request = OperatorRequest::Rebuild { file: text, without, install: !dry_run };
    match Client::from_file(&file)?.ask(&request).await? {
        OperatorReply::Done { lines } => output::print(&lines.join("\n")),
        reply => return Err(unexpected(&reply)),
    }
    Ok(OK)
}

/// One line for each run of slices with the same copies.
pub(crate) fn text(map: &DistributionMap) -> String {
    let header = ["DEVICE", "SLICES", "SIZE", "PRIMARY", "SECONDARIES", "EPOCH"];
    let mut table = output::table(&header, &[2, 5]);
    for device in &map.devices {
        for span in &device.spans {
            let secondaries: Vec<String> = span.replicas[1..]
                .iter()
                .map(|replica| format!("{} {}", map.disk_name(replica.disk), state_name(replica.state)))
                .collect();
            let secondaries = if secondaries.is_empty() { "-".to_owned() } else { secondaries.join(", ") };
            table.add_row(vec![
                device.name.clone(),
                format!("{}-{}", span.first.0, span.end() - 1),
                format_bytes(u64::from(span.count) * u64::from(map.slice_bytes)),
                map.disk_name(span.primary().disk),
                secondaries,
                span.epoch.0.to_string(),
            ]);
        }
    }
    format!(
        "cluster {}, map {}, slices of {}\n\n{}",
        map.cluster_name,
        map.version,
        format_bytes(u64::from(map.slice_bytes)),
        output::table_text(&table)
    )
}
