//! How likely data is lost in a year.

use crate::cli::RiskArguments;
use crate::client::{Client, load_file};
use crate::failure::{Failure, OK};
use crate::{map, output};
use mirror_net::config::format_bytes;
use mirror_net::map::DistributionMap;
use mirror_net::risk::{Assumptions, Risk, layouts, risk};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// What `risk --json` prints.
#[derive(Serialize, Debug)]
pub(crate) struct RiskJson {
    assumptions: AssumptionsJson,
    today: ProbabilitiesJson,
    wrong_way_round: bool,
    layouts: Vec<LayoutJson>,
}

/// What it is computed from, in seconds and bytes.
#[derive(Serialize, Debug)]
struct AssumptionsJson {
    disk_mttf_seconds: u64,
    node_mttf_seconds: u64,
    set_mttf_seconds: u64,
    delay_seconds: u64,
    bytes_per_second: u64,
}

/// Probabilities of a loss in a year.
#[derive(Serialize, Debug)]
struct ProbabilitiesJson {
    any: f64,
    within_a_set: f64,
    across_sets: f64,
}

/// A layout that the same nodes could have.
#[derive(Serialize, Debug)]
struct LayoutJson {
    topology: &'static str,
    copies: u8,
    /// `None` if the nodes are too few, or share too much.
    risk: Option<ProbabilitiesJson>,
}

impl ProbabilitiesJson {
    fn of(risk: Risk) -> Self {
        Self { any: risk.any, within_a_set: risk.within, across_sets: risk.across }
    }
}

fn hours(time: Duration) -> f64 {
    time.as_secs_f64() / 3_600.0
}

/// Of a map: after `delay` what is lost begins to be made again.
pub(crate) fn of(map: &DistributionMap, arguments: &RiskArguments, delay: Duration) -> RiskJson {
    let assume = Assumptions {
        disk_hours: hours(arguments.disk_mttf),
        node_hours: hours(arguments.node_mttf),
        set_hours: hours(arguments.set_mttf),
        delay_hours: hours(delay),
        bytes_per_hour: arguments.rate as f64 * 3_600.0,
    };
    let today = risk(map, &assume);
    let layouts = layouts(map, &assume).into_iter().map(|layout| LayoutJson {
        topology: layout.topology.name(),
        copies: layout.copies,
        risk: layout.risk.map(ProbabilitiesJson::of),
    });
    RiskJson {
        assumptions: AssumptionsJson {
            disk_mttf_seconds: arguments.disk_mttf.as_secs(),
            node_mttf_seconds: arguments.node_mttf.as_secs(),
            set_mttf_seconds: arguments.set_mttf.as_secs(),
            delay_seconds: delay.as_secs(),
            bytes_per_second: arguments.rate,
        },
        wrong_way_round: today.is_wrong_way_round(),
        today: ProbabilitiesJson::of(today),
        layouts: layouts.collect(),
    }
}

/// `0`, `2.1 %` or `3.2e-7`.
fn probability(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        0.001.. => format!("{:.1} %", value * 100.0),
        _ => format!("{value:.1e}"),
    }
}

/// A table with today's layout first.
pub(crate) fn text(found: &RiskJson) -> String {
    let header = ["LAYOUT", "COPIES", "LOSS IN A YEAR", "WITHIN A SET", "ACROSS SETS"];
    let mut table = output::table(&header, &[1, 2, 3, 4]);
    let today = ("today".to_owned(), String::new(), Some(&found.today));
    let others = found
        .layouts
        .iter()
        .map(|layout| (layout.topology.to_owned(), layout.copies.to_string(), layout.risk.as_ref()));
    for (name, copies, risk) in std::iter::once(today).chain(others) {
        let cells = match risk {
            Some(risk) => [risk.any, risk.within_a_set, risk.across_sets].map(probability),
            None => ["cannot be had".to_owned(), String::new(), String::new()],
        };
        table.add_row([vec![name, copies], cells.to_vec()].concat());
    }
    let AssumptionsJson {
        disk_mttf_seconds,
        node_mttf_seconds,
        set_mttf_seconds,
        delay_seconds,
        bytes_per_second,
    } = &found.assumptions;
    let years = |seconds: &u64| format!("{:.0} years", *seconds as f64 / 31_557_600.0);
    let mut text = output::table_text(&table);
    text += &format!(
        "\nif a disk is lost once in {}, a node in {}, a failure set in {}; copies begin to be made again after {}, {}/s a \
         disk\n",
        years(disk_mttf_seconds),
        years(node_mttf_seconds),
        years(set_mttf_seconds),
        humantime::format_duration(Duration::from_secs(*delay_seconds)),
        format_bytes(*bytes_per_second)
    );
    if found.wrong_way_round {
        text += "warning: failures within one failure set, which may come together, are more likely to lose data than those \
                 across sets: both copies of something depend on the same power or switch; see docs/risk.md\n";
    }
    text
}

/// `mirrorctl risk`.
pub async fn risk_of_cluster(config: &Path, arguments: &RiskArguments) -> Result<u8, Failure> {
    let (file, _) = load_file(config)?;
    let map = map::ask_at(&Client::from_file(&file)?).await?;
    let spare = map.disks.iter().any(|disk| disk.spare && disk.failed.is_none());
    let delay =
        if spare && file.policy.auto_spare { file.policy.spare_after } else { arguments.replace_after };
    let found = of(&map, arguments, delay);
    if arguments.json {
        output::print_json(&found)?;
    } else {
        output::print(&text(&found));
    }
    Ok(OK)
}
