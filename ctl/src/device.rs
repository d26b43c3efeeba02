//! The exported devices.

use crate::cli::{DeviceCreateArguments, DeviceSetArguments};
use crate::client::{Client, unexpected};
use crate::failure::{Failure, OK};
use crate::json::DeviceJson;
use crate::redistribution::redistribute;
use crate::{import, output};
use mirror_net::config::format_bytes;
use mirror_net::control::{
    DeviceChange, DeviceOrder, OperatorReply, OperatorRequest, Redistribution, RedistributionOrder,
};
use std::io::IsTerminal;
use std::path::Path;

/// `mirrorctl device list`.
pub async fn list(config: &Path, json: bool) -> Result<u8, Failure> {
    let status = Client::from_config(config)?.status().await?;
    let devices = DeviceJson::of_status(&status);
    if json {
        output::print_json(&devices)?;
    } else {
        output::print(&text(&devices));
    }
    Ok(OK)
}

/// `mirrorctl device create`.
pub async fn create(config: &Path, arguments: DeviceCreateArguments) -> Result<u8, Failure> {
    let DeviceCreateArguments { name, size, node, copies, unmirrored, commit, on_no_quorum, import, dry_run } =
        arguments;
    let source = import.as_deref().map(import::size_of).transpose()?;
    let bytes = match (size, source) {
        (Some(size), Some(source)) if size < source => {
            return Err(Failure::usage(format!(
                "--size {} is less than what is to be imported, {}: leave it out, or enlarge it",
                format_bytes(size),
                format_bytes(source)
            )));
        }
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) => return Err(Failure::usage("device create wants --size, or --import")),
    };
    let copies = if unmirrored { 1 } else { copies };
    let change = DeviceChange::Create { bytes, node: node.clone(), copies, commit, on_no_quorum };
    if let Some(source) = import.as_deref().filter(|_| !dry_run) {
        // What cannot be imported afterwards is not made first.
        import::check(config, &node, source).await?;
    }
    let done = order(config, &name, change, dry_run).await?;
    match import.filter(|_| !dry_run) {
        Some(source) => import::import(config, &name, &source, true).await,
        None => Ok(done),
    }
}

/// `mirrorctl device delete`.
pub async fn delete(config: &Path, name: &str, yes: bool, force: bool, dry_run: bool) -> Result<u8, Failure> {
    if !yes && !dry_run {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Err(Failure::new(format!(
                "nothing was changed: {name} and all that is on it would be gone for good; repeat with --yes if it shall be so"
            )));
        }
        output::print(&format!(
            "{name} and all that is on it will be gone for good. Type its name to go on:"
        ));
        let mut typed = String::new();
        stdin.read_line(&mut typed).map_err(|error| Failure::new(format!("nothing was changed: {error}")))?;
        if typed.trim() != name {
            return Err(Failure::new("nothing was changed: that is not its name"));
        }
    }
    order(config, name, DeviceChange::Delete { force }, dry_run).await
}

/// `mirrorctl device resize`.
pub async fn resize(config: &Path, name: &str, bytes: u64, dry_run: bool) -> Result<u8, Failure> {
    order(config, name, DeviceChange::Grow { bytes }, dry_run).await
}

/// `mirrorctl device set`.
pub async fn set(config: &Path, name: &str, what: DeviceSetArguments, dry_run: bool) -> Result<u8, Failure> {
    let DeviceSetArguments { copies, commit, on_no_quorum } = what;
    if commit.is_some() || on_no_quorum.is_some() {
        if let Some(copies) = copies {
            // All of it or nothing: what would be refused is, before anything is changed.
            let wish = Redistribution::Copies { device: name.to_owned(), copies };
            let request = OperatorRequest::Redistribute(RedistributionOrder { wish, carry_out: false });
            let reply = Client::from_config(config)?.ask(&request).await?;
            let OperatorReply::Done { .. } = reply else { return Err(unexpected(&reply)) };
        }
        order(config, name, DeviceChange::Set { commit, on_no_quorum }, dry_run).await?;
    }
    match copies {
        Some(copies) => {
            redistribute(config, Redistribution::Copies { device: name.to_owned(), copies }, dry_run).await
        }
        None => Ok(OK),
    }
}

async fn order(config: &Path, name: &str, change: DeviceChange, dry_run: bool) -> Result<u8, Failure> {
    let order = DeviceOrder { name: name.to_owned(), change, carry_out: !dry_run };
    Client::from_config(config)?.order(&OperatorRequest::Device(order), dry_run).await
}

/// The table of devices.
pub(crate) fn text(devices: &[DeviceJson]) -> String {
    let header = ["DEVICE", "SIZE", "EXPORTER", "STATE", "IN SYNC", "WHERE"];
    let mut table = output::table(&header, &[1]);
    for device in devices {
        let place = device.path.clone().or_else(|| device.uri.clone()).unwrap_or_else(|| "-".to_owned());
        table.add_row(vec![
            device.name.clone(),
            format_bytes(device.bytes),
            device.exporter.clone(),
            device.state.to_owned(),
            format!("{} of {}", device.copies_in_sync, device.copies),
            place,
        ]);
    }
    output::table_text(&table)
}
