//! Disks: all of the cluster's, and one looked at without the daemon.

use crate::client::Client;
use crate::failure::{FAILED, Failure, OK};
use crate::json::ListedDiskJson;
use crate::output;
use mirror_net::config::format_bytes;
use mirror_net::format::ReadFailed;
use mirror_net::format::inspect::inspect as look;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// `mirrorctl disk inspect`: reads only, and takes no lock, so it may run beside the daemon.
pub fn inspect(path: &Path, slots: bool, json: bool) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("cannot read {}: {error}", path.display()));
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut read =
        |offset: u64, buffer: &mut [u8]| file.read_exact_at(buffer, offset).map_err(|_| ReadFailed);
    let report = look(&mut read, bytes, slots);
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&report.to_string());
    }
    Ok(if report.refused.is_some() { FAILED } else { OK })
}

/// `mirrorctl disk list`.
pub async fn list(config: &Path, json: bool) -> Result<u8, Failure> {
    let status = Client::from_config(config)?.status().await?;
    let disks = ListedDiskJson::of(&status);
    if json {
        output::print_json(&disks)?;
    } else {
        output::print(&list_text(&disks));
    }
    Ok(OK)
}

/// One line for each disk.
pub(crate) fn list_text(disks: &[ListedDiskJson]) -> String {
    let header = ["DISK", "PATH", "SIZE", "PRIMARY", "SECONDARY", "UNMIRRORED", "USED", "STATE"];
    let mut table = output::table(&header, &[2, 3, 4, 5, 6]);
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), format_bytes);
    for disk in disks {
        let state = match &disk.detail {
            Some(detail) => format!("{}: {detail}", disk.state),
            None => disk.state.clone(),
        };
        table.add_row(vec![
            format!("{}/{}", disk.node, disk.disk),
            disk.path.clone().unwrap_or_else(|| "-".to_owned()),
            size(disk.bytes),
            size(disk.primary_bytes),
            size(disk.secondary_bytes),
            size(disk.unmirrored_bytes),
            size(disk.used_bytes),
            state,
        ]);
    }
    output::table_text(&table)
}
