//! What is well, what is not, and what to type about it.

use crate::client::Client;
use crate::failure::{FAILED, Failure, OK, UNAVAILABLE};
use crate::json::StatusJson;
use crate::{device, output};
use mirror_net::config::format_bytes;
use mirror_net::control::{ClusterStatus, Severity};
use std::path::Path;

/// `mirrorctl status`: the exit code is the verdict.
pub async fn status(config: &Path, json: bool) -> Result<u8, Failure> {
    let status = Client::from_config(config)?.status().await?;
    if json {
        output::print_json(&StatusJson::of(&status))?;
    } else {
        output::print(&text(&status));
    }
    Ok(exit_code(&status))
}

fn exit_code(status: &ClusterStatus) -> u8 {
    match status.findings.iter().map(|finding| finding.severity).max() {
        Some(Severity::Unavailable) => UNAVAILABLE,
        Some(Severity::Degraded) => FAILED,
        Some(Severity::Note) | None => OK,
    }
}

/// The verdict, the tables, and what to do.
pub(crate) fn text(status: &ClusterStatus) -> String {
    let json = StatusJson::of(status);
    let mut text = json.summary.clone() + "\n";
    if let (Some(cluster), Some(version)) = (&json.cluster, json.version) {
        text += &format!("cluster {cluster}, map v{version}\n");
    }
    if !json.nodes.is_empty() {
        let mut table = output::table(&["NODE", "STATE", "MAP", "DISKS", "SESSIONS"], &[]);
        for node in &json.nodes {
            let disks: Vec<String> = node
                .disks
                .iter()
                .map(|disk| format!("{} {} {}", disk.name, format_bytes(disk.bytes), disk.state))
                .collect();
            let open: Vec<String> = node
                .sessions
                .iter()
                .map(|session| format!("{}{}", session.peer, if session.open { "" } else { " (none)" }))
                .collect();
            let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
            table.add_row(vec![
                node.name.clone(),
                if node.up { "up" } else { "down" }.to_owned(),
                node.adopted.map_or_else(|| "-".to_owned(), |adopted| format!("v{adopted}")),
                or_dash(disks.join(", ")),
                or_dash(open.join(", ")),
            ]);
        }
        text += &format!("\n{}", output::table_text(&table));
    }
    if !json.devices.is_empty() {
        text += &format!("\n{}", device::text(&json.devices));
    }
    for (title, severity) in
        [("unavailable", Severity::Unavailable), ("degraded", Severity::Degraded), ("note", Severity::Note)]
    {
        for finding in json.findings.iter().filter(|finding| finding.severity == severity) {
            text += &format!("\n{title}: {}\n", finding.what);
            if !finding.todo.is_empty() {
                text += &format!("  -> {}\n", finding.todo);
            }
        }
    }
    text
}
