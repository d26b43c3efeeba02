//! The distribution map, for people.

use crate::client::{Client, load_file, unexpected};
use crate::failure::{Failure, OK};
use crate::json::{BalanceJson, LoadJson, MapJson, state_name};
use crate::{output, picture};
use mirror_net::config::format_bytes;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::map::{Commit, Device, DistributionMap, OnNoQuorum};
use std::path::Path;

async fn ask(config: &Path) -> Result<Box<DistributionMap>, Failure> {
    ask_at(&Client::from_config(config)?).await
}

/// The map, if there is one.
pub(crate) async fn ask_at(client: &Client) -> Result<Box<DistributionMap>, Failure> {
    match client.ask(&OperatorRequest::Map).await? {
        OperatorReply::Map { map: Some(map) } => Ok(map),
        OperatorReply::Map { map: None } => Err(no_cluster()),
        reply => Err(unexpected(&reply)),
    }
}

fn no_cluster() -> Failure {
    Failure::new(
        "no cluster has been created yet: start ublk-server on every node, then type `mirrorctl cluster create`",
    )
}

/// `mirrorctl map show`.
pub async fn show(config: &Path, json: bool) -> Result<u8, Failure> {
    let map = ask(config).await?;
    if json {
        output::print_json(&MapJson::of(&map))?;
    } else {
        output::print(&text(&map));
    }
    Ok(OK)
}

/// `mirrorctl map show --svg`.
pub async fn draw(config: &Path, file: &Path) -> Result<u8, Failure> {
    let map = ask(config).await?;
    std::fs::write(file, picture::svg(&map)).map_err(|error| {
        Failure::new(format!("cannot write the picture to {}: {error}; name another file", file.display()))
    })?;
    output::print(&format!("map {} is drawn in {}", map.version, file.display()));
    Ok(OK)
}

/// `mirrorctl map show --dot`.
pub async fn dot(config: &Path) -> Result<u8, Failure> {
    output::print(&picture::dot(&*ask(config).await?));
    Ok(OK)
}

/// `mirrorctl map balance`.
pub async fn balance(config: &Path, json: bool) -> Result<u8, Failure> {
    let status = Client::from_config(config)?.status().await?;
    let map = status.map.as_ref().ok_or_else(no_cluster)?;
    let disks = BalanceJson::of(map, &status.nodes);
    if json {
        output::print_json(&disks)?;
    } else {
        output::print(&balance_text(&disks));
    }
    Ok(OK)
}

/// One line for each disk.
pub(crate) fn balance_text(disks: &[BalanceJson]) -> String {
    let header =
        ["DISK", "SIZE", "USED", "FULL", "PRIMARIES", "IO/S", "READ/S", "WRITTEN/S", "BUSY", "STATE"];
    let mut table = output::table(&header, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let of_load = |disk: &BalanceJson, text: &dyn Fn(&LoadJson) -> String| {
        disk.load.as_ref().map_or_else(|| "-".to_owned(), text)
    };
    for disk in disks {
        table.add_row(vec![
            format!("{}/{}", disk.node, disk.disk),
            format_bytes(disk.bytes),
            format_bytes(disk.used_bytes),
            format!("{} %", (disk.used_bytes * 100).checked_div(disk.bytes).unwrap_or(0)),
            format_bytes(disk.primary_bytes),
            of_load(disk, &|load| (load.reads + load.writes).to_string()),
            of_load(disk, &|load| format_bytes(load.read_bytes)),
            of_load(disk, &|load| format_bytes(load.written_bytes)),
            of_load(disk, &|load| format!("{} %", load.busy_percent)),
            disk.state.to_owned(),
        ]);
    }
    output::table_text(&table)
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
    let choices: String = map.devices.iter().filter_map(choices).collect();
    let gap = if choices.is_empty() { "" } else { "\n" };
    format!(
        "cluster {}, map {}, slices of {}\n\n{}{gap}{choices}",
        map.cluster_name,
        map.version,
        format_bytes(u64::from(map.slice_bytes)),
        output::table_text(&table)
    )
}

/// How a device differs from others by choice.
fn choices(device: &Device) -> Option<String> {
    let deferred = match device.commit {
        Commit::Immediate => None,
        Commit::Deferred => Some("mirrors acknowledge from memory"),
        Commit::Settling => Some("mirrors store what they hold in memory, and commit immediately then"),
    };
    let fails = (device.on_no_quorum == OnNoQuorum::Error).then_some("what cannot be served fails");
    let both: Vec<&str> = [deferred, fails].into_iter().flatten().collect();
    (!both.is_empty()).then(|| format!("{}: {}\n", device.name, both.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshots::first_map;

    #[test]
    fn what_was_chosen_for_a_device_is_told() {
        let mut map = first_map();
        let plain = text(&map);
        map.devices[0].commit = Commit::Deferred;
        map.devices[0].on_no_quorum = OnNoQuorum::Error;
        let name = map.devices[0].name.clone();
        let told = format!("\n{name}: mirrors acknowledge from memory, what cannot be served fails\n");
        assert_eq!(text(&map), plain + &told);
    }
}
