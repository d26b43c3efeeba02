//! The exported devices.

use crate::client::{Client, unexpected};
use crate::failure::{Failure, OK};
use crate::json::DeviceJson;
use crate::output;
use mirror_net::config::format_bytes;
use mirror_net::control::{OperatorReply, OperatorRequest};
use std::path::Path;

/// `mirrorctl device list`.
pub async fn list(config: &Path, json: bool) -> Result<u8, Failure> {
    let status = match Client::from_config(config)?.ask(&OperatorRequest::Status).await? {
        OperatorReply::Status(status) => status,
        reply => return Err(unexpected(&reply)),
    };
    let devices = DeviceJson::of_status(&status);
    if json {
        output::print_json(&devices)?;
    } else {
        output::print(&text(&devices));
    }
    Ok(OK)
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
