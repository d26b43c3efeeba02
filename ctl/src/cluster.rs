//! The cluster as a whole.

use crate::client::{Client, load_file, unexpected};
use crate::failure::{Failure, OK};
use crate::output;
use mirror_net::config::format_bytes;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::map::DistributionMap;
use serde::Serialize;
use std::path::Path;

/// What `cluster create --json` prints.
#[derive(Serialize)]
struct CreatedJson {
    cluster: String,
    id: String,
    version: u64,
    devices: Vec<CreatedDeviceJson>,
}

#[derive(Serialize)]
struct CreatedDeviceJson {
    name: String,
    bytes: u64,
    copies: u8,
    exporter: String,
}

/// `mirrorctl cluster create`.
pub async fn create(path: &Path, force: bool, json: bool) -> Result<u8, Failure> {
    let (file, text) = load_file(path)?;
    let map = request(&Client::from_file(&file)?, text, force).await?;
    let devices: Vec<CreatedDeviceJson> = map
        .devices
        .iter()
        .map(|device| CreatedDeviceJson {
            name: device.name.clone(),
            bytes: device.bytes(map.slice_bytes),
            copies: device.copies,
            exporter: map.node_name(device.claim.node),
        })
        .collect();
    if json {
        let (cluster, id) = (map.cluster_name.clone(), map.cluster.to_string());
        output::print_json(&CreatedJson { cluster, id, version: map.version.0, devices })?;
        return Ok(OK);
    }
    let mut table = output::table(&["DEVICE", "SIZE", "COPIES", "EXPORTER"], &[1, 2]);
    for device in devices {
        let size = format_bytes(device.bytes);
        table.add_row(vec![device.name, size, device.copies.to_string(), device.exporter]);
    }
    output::print(&format!(
        "cluster {} created: {} nodes, {} disks\n\n{}\nwhere they are exported: mirrorctl device list",
        map.cluster_name,
        map.nodes.len(),
        map.disks.len(),
        output::table_text(&table)
    ));
    Ok(OK)
}

/// Asks the manager to make a cluster of that file.
pub async fn request(client: &Client, file: String, force: bool) -> Result<DistributionMap, Failure> {
    match client.ask(&OperatorRequest::CreateCluster { file, force }).await? {
        OperatorReply::Created { map } => Ok(*map),
        reply => Err(unexpected(&reply)),
    }
}
