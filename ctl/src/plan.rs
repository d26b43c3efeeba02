//! What is being moved.

use crate::client::{Client, unexpected};
use crate::failure::{Failure, OK};
use crate::output;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_net::config::format_bytes;
use mirror_net::control::{ClusterStatus, OperatorReply, OperatorRequest, PlanOrder, ResyncReport};
use mirror_net::ids::PlanId;
use mirror_net::map::DistributionMap;
use mirror_net::map::plan::Plan;
use serde::Serialize;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;
use tokio::time::sleep;

/// How often the manager is asked how far a plan is.
const POLL: Duration = Duration::from_millis(500);

/// A plan, as `--json` prints it.
#[derive(Serialize)]
struct PlanJson {
    plan: u64,
    cause: String,
    paused: bool,
    cancelled: bool,
    spares: Vec<String>,
    retires: Vec<String>,
    slices: u64,
    in_sync: u64,
    bytes: u64,
    behind_bytes: u64,
    moved_bytes: u64,
    bytes_per_second: u64,
    seconds_left: Option<u64>,
}

/// A move, as `--json` prints it.
#[derive(Serialize)]
struct MoveJson {
    device: String,
    first: u32,
    slices: u32,
    from: Option<String>,
    to: String,
    segment: mirror_net::format::alloc::Segment,
    becomes_primary: bool,
    in_sync: u64,
}

impl PlanJson {
    fn of(status: &ClusterStatus, map: &DistributionMap, plan: &Plan) -> Self {
        let progress = plan.progress(map);
        let reports = || resyncs(status, map, plan);
        let behind = reports().map(|report| report.behind_bytes).sum();
        let rate: u64 = reports().map(|report| report.bytes_per_second).sum();
        Self {
            plan: plan.id.0,
            cause: plan.cause.clone(),
            paused: plan.paused,
            cancelled: plan.cancelled,
            spares: plan.spares.iter().map(|disk| map.disk_name(*disk)).collect(),
            retires: plan.retires.iter().map(|disk| map.disk_name(*disk)).collect(),
            slices: progress.slices,
            in_sync: progress.in_sync,
            bytes: progress.slices * u64::from(map.slice_bytes),
            behind_bytes: behind,
            moved_bytes: reports().map(|report| report.moved_bytes).sum(),
            bytes_per_second: rate,
            seconds_left: (rate > 0).then(|| u64::div_ceil(behind, rate)),
        }
    }

    /// `12 of 20 slices in sync, 1.2 GiB to compare, 80 MiB/s, 15 s left`.
    fn progress(&self) -> String {
        let mut text = format!("{} of {} slices in sync", self.in_sync, self.slices);
        if self.paused {
            text += ", paused";
        }
        if self.cancelled {
            text += ", cancelled: of each of them one copy goes once it is certain which";
        }
        if self.behind_bytes > 0 {
            text += &format!(
                ", {} to compare, {}/s",
                format_bytes(self.behind_bytes),
                format_bytes(self.bytes_per_second)
            );
            if let Some(seconds) = self.seconds_left {
                text += &format!(", {} left", humantime::format_duration(Duration::from_secs(seconds)));
            }
        }
        text
    }
}

/// What primaries say of the copies that a plan has them fill.
fn resyncs<'a>(
    status: &'a ClusterStatus,
    map: &'a DistributionMap,
    plan: &'a Plan,
) -> impl Iterator<Item = &'a ResyncReport> {
    let reports = status.nodes.iter().filter(|node| node.up).filter_map(|node| node.report.as_ref());
    reports.flat_map(|report| &report.resyncs).filter(move |resync| {
        plan.moves
            .iter()
            .any(|step| step.run.device == resync.device && map.node_of(step.to) == Some(resync.peer))
    })
}

async fn ask_status(client: &Client) -> Result<(Box<ClusterStatus>, DistributionMap), Failure> {
    let mut status = client.status().await?;
    let map = status.map.take().ok_or_else(|| Failure::new("no cluster has been created yet"))?;
    Ok((status, map))
}

fn find(map: &DistributionMap, plan: u64) -> Result<&Plan, Failure> {
    map.plan(PlanId(plan)).ok_or_else(|| {
        Failure::new(format!(
            "there is no plan {plan}: it is done or never was; `mirrorctl plan list` lists those under way, \
             `mirrorctl events` what happened"
        ))
    })
}

/// `mirrorctl plan list`.
pub async fn list(config: &Path, json: bool) -> Result<u8, Failure> {
    let (status, map) = ask_status(&Client::from_config(config)?).await?;
    let plans: Vec<PlanJson> = map.plans.iter().map(|plan| PlanJson::of(&status, &map, plan)).collect();
    if json {
        output::print_json(&plans)?;
    } else if plans.is_empty() {
        output::print("nothing is being moved");
    } else {
        let mut table = output::table(&["PLAN", "PROGRESS", "CAUSE"], &[]);
        for plan in &plans {
            table.add_row(vec![plan.plan.to_string(), plan.progress(), plan.cause.clone()]);
        }
        output::print(&output::table_text(&table));
    }
    Ok(OK)
}

/// `mirrorctl plan show`.
pub async fn show(config: &Path, plan: u64, json: bool) -> Result<u8, Failure> {
    let (status, map) = ask_status(&Client::from_config(config)?).await?;
    let plan = find(&map, plan)?;
    let moves: Vec<MoveJson> = plan
        .moves
        .iter()
        .map(|step| MoveJson {
            device: map
                .device(step.run.device)
                .map_or_else(|| step.run.device.to_string(), |device| device.name.clone()),
            first: step.run.first.0,
            slices: step.run.count,
            from: step.from.map(|disk| map.disk_name(disk)),
            to: map.disk_name(step.to),
            segment: step.segment,
            becomes_primary: step.primary,
            in_sync: step.progress(&map).in_sync,
        })
        .collect();
    if json {
        output::print_json(&moves)?;
        return Ok(OK);
    }
    let mut text =
        format!("plan {}: {}\n{}\n\n", plan.id.0, plan.cause, PlanJson::of(&status, &map, plan).progress());
    let mut table = output::table(&["DEVICE", "SLICES", "FROM", "TO", "AS", "IN SYNC"], &[5]);
    for step in &moves {
        table.add_row(vec![
            step.device.clone(),
            format!("{}-{}", step.first, step.first + step.slices - 1),
            step.from.clone().unwrap_or_else(|| "-".into()),
            step.to.clone(),
            if step.becomes_primary { "primary" } else { "secondary" }.to_owned(),
            step.in_sync.to_string(),
        ]);
    }
    text += &output::table_text(&table);
    output::print(&text);
    Ok(OK)
}

/// `mirrorctl plan watch`.
pub async fn watch(config: &Path, plan: u64) -> Result<u8, Failure> {
    let client = Client::from_config(config)?;
    let (_, map) = ask_status(&client).await?;
    find(&map, plan)?;
    let bar = std::io::stdout().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("{wide_bar} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(1).with_style(style)
    });
    let mut said = String::new();
    loop {
        let (status, map) = ask_status(&client).await?;
        let Some(plan) = map.plan(PlanId(plan)) else {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            output::print(&format!("plan {plan} is over; `mirrorctl events` says how it ended"));
            return Ok(OK);
        };
        let json = PlanJson::of(&status, &map, plan);
        let line = json.progress();
        match &bar {
            Some(bar) => {
                bar.set_length(json.bytes.max(1));
                bar.set_position(json.bytes.saturating_sub(json.behind_bytes));
                bar.set_message(line);
            }
            None if line != said => {
                output::print(&line);
                said = line;
            }
            None => {}
        }
        sleep(POLL).await;
    }
}

/// `mirrorctl plan pause`, `resume` and `cancel`.
pub async fn order(config: &Path, plan: u64, order: PlanOrder) -> Result<u8, Failure> {
    let request = OperatorRequest::Plan { plan: PlanId(plan), order };
    match Client::from_config(config)?.ask(&request).await? {
        OperatorReply::Done { lines } => {
            output::print(&lines.join("\n"));
            Ok(OK)
        }
        reply => Err(unexpected(&reply)),
    }
}
