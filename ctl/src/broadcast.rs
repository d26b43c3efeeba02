//! Asking all nodes at once, each for what it serves now.

use crate::client::{Client, unexpected};
use crate::failure::{FAILED, Failure, OK};
use crate::output;
use mirror_net::config::format_bytes;
use mirror_net::control::{
    BroadcastKind, BroadcastRow, BroadcastStatus, ContentSum, OperatorReply, OperatorRequest,
};
use mirror_net::format::alloc::Segment;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;
use tokio::time::sleep;

/// How often the manager is asked how far it is: at first, and at most.
const POLL: Duration = Duration::from_millis(50);
const POLL_MAX: Duration = Duration::from_secs(1);

/// What `broadcast … --json` prints.
#[derive(Serialize)]
pub struct BroadcastJson {
    broadcast: BroadcastKind,
    complete: bool,
    rows: Vec<RowJson>,
    devices: Vec<DeviceJson>,
    unserved: Vec<UnservedJson>,
}

#[derive(Serialize)]
struct RowJson {
    device: String,
    node: String,
    segment: Segment,
    slices: u64,
    result: Value,
}

#[derive(Serialize)]
struct DeviceJson {
    device: String,
    slices: u64,
    result: Value,
}

#[derive(Serialize)]
struct UnservedJson {
    device: String,
    first: u32,
    count: u32,
    node: String,
    why: String,
}

/// `mirrorctl broadcast`.
pub async fn broadcast(config: &Path, kind: BroadcastKind, json: bool) -> Result<u8, Failure> {
    let client = Client::from_config(config)?;
    let mut id = None;
    let mut pause = POLL;
    let bar = progress();
    let status = loop {
        let status = match client.ask(&OperatorRequest::Broadcast { kind, id }).await? {
            OperatorReply::Broadcast(status) => status,
            reply => return Err(unexpected(&reply)),
        };
        if status.done {
            break status;
        }
        id = Some(status.id);
        if let Some(bar) = &bar {
            bar.set_length(status.slices);
            bar.set_position(status.answered);
        }
        sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
    };
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let complete = status.unserved.is_empty();
    if json {
        output::print_json(&BroadcastJson::new(kind, &status))?;
        return Ok(if complete { OK } else { FAILED });
    }
    output::print(&text(kind, &status));
    if complete {
        return Ok(OK);
    }
    let slices: u64 = status.unserved.iter().map(|unserved| u64::from(unserved.count)).sum();
    Err(Failure::new(format!("{slices} of {} slices were answered for by nobody", status.slices)))
}

fn progress() -> Option<indicatif::ProgressBar> {
    std::io::stderr().is_terminal().then(|| {
        let bar = indicatif::ProgressBar::new(0);
        let style = indicatif::ProgressStyle::with_template("{bar:40} {pos} of {len} slices, {eta} left");
        match style {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    })
}

/// What was found of each device, on whatever node.
fn by_device(status: &BroadcastStatus) -> BTreeMap<&str, (u64, u64, ContentSum)> {
    let mut devices: BTreeMap<&str, (u64, u64, ContentSum)> = BTreeMap::new();
    for row in &status.rows {
        let (slices, bytes, sum) = devices.entry(&row.device).or_default();
        (*slices, *bytes, *sum) =
            (slices.saturating_add(row.slices), bytes.saturating_add(row.bytes), sum.plus(row.sum));
    }
    devices
}

fn result_json(kind: BroadcastKind, bytes: u64, sum: ContentSum) -> Value {
    match kind {
        BroadcastKind::Checksum => json!(sum),
        BroadcastKind::Usage => json!(bytes),
        BroadcastKind::Flush => json!("flushed"),
    }
}

fn result_text(kind: BroadcastKind, bytes: u64, sum: ContentSum) -> String {
    match kind {
        BroadcastKind::Checksum => sum.to_string(),
        BroadcastKind::Usage => format_bytes(bytes),
        BroadcastKind::Flush => "flushed".to_owned(),
    }
}

fn segment_text(segment: Segment) -> &'static str {
    match segment {
        Segment::Primary => "primary",
        Segment::Secondary => "secondary",
        Segment::Unmirrored => "unmirrored",
    }
}

impl BroadcastJson {
    /// Of what the manager answered.
    pub fn new(kind: BroadcastKind, status: &BroadcastStatus) -> Self {
        let row = |row: &BroadcastRow| RowJson {
            device: row.device.clone(),
            node: row.node.clone(),
            segment: row.segment,
            slices: row.slices,
            result: result_json(kind, row.bytes, row.sum),
        };
        let device = |(device, (slices, bytes, sum)): (&str, (u64, u64, ContentSum))| DeviceJson {
            device: device.to_owned(),
            slices,
            result: result_json(kind, bytes, sum),
        };
        let unserved = status.unserved.iter().map(|unserved| UnservedJson {
            device: unserved.device.clone(),
            first: unserved.first,
            count: unserved.count,
            node: unserved.node.clone(),
            why: unserved.why.clone(),
        });
        Self {
            broadcast: kind,
            complete: status.unserved.is_empty(),
            rows: status.rows.iter().map(row).collect(),
            devices: by_device(status).into_iter().map(device).collect(),
            unserved: unserved.collect(),
        }
    }
}

/// For people.
pub fn text(kind: BroadcastKind, status: &BroadcastStatus) -> String {
    let heading = match kind {
        BroadcastKind::Checksum => "CHECKSUM",
        BroadcastKind::Usage => "USED",
        BroadcastKind::Flush => "RESULT",
    };
    let mut table = output::table(&["DEVICE", "NODE", "SEGMENT", "SLICES", heading], &[3]);
    for row in &status.rows {
        table.add_row(vec![
            row.device.clone(),
            row.node.clone(),
            segment_text(row.segment).to_owned(),
            row.slices.to_string(),
            result_text(kind, row.bytes, row.sum),
        ]);
    }
    let mut text = output::table_text(&table);
    let mut several = Vec::new();
    for (device, (_, bytes, sum)) in by_device(status) {
        if status.rows.iter().filter(|row| row.device == device).count() > 1 {
            several.push(format!("{device} together: {}\n", result_text(kind, bytes, sum)));
        }
    }
    if !several.is_empty() {
        text += &format!("\n{}", several.concat());
    }
    for unserved in &status.unserved {
        let last = u64::from(unserved.first) + u64::from(unserved.count) - 1;
        let slices = match unserved.count {
            1 => format!("slice {last}"),
            _ => format!("slices {} to {last}", unserved.first),
        };
        text += &format!(
            "nobody answers for {} {slices}, primary {}: {}\n",
            unserved.device, unserved.node, unserved.why
        );
    }
    text
}
