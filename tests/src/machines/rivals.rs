//! A mirrored `/dev/ublkbN` beside what others mirror disks with, in the same two machines, on the same disks and link:
//! DRBD with protocol C, and md over NVMe/TCP. Emulated processors are slow and make a change of context dear, so what counts
//! is the order, and how much of what each of them needs for a request.

use super::{Lab, Options};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// Of each of the parts that the second disk is cut into, in MiB.
const PART_MIB: u64 = 120;
/// What is written to of every device, in MiB; all of it is written before anything is measured.
const AREA_MIB: u64 = 64;

const DRBD: &str = "\
global { usage-count no; }
resource r0 {
  net { protocol C; }
  device /dev/drbd0;
  meta-disk internal;
  on n1 { address 10.77.0.1:7789; disk /dev/disk/by-id/virtio-data2-part2; }
  on n2 { address 10.77.0.2:7789; disk /dev/disk/by-id/virtio-data2-part2; }
}
";

/// A load: its name, and what fio is told.
const JOBS: [(&str, &[&str]); 4] = [
    ("write-4k-qd1", &["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    ("write-4k-qd16", &["--rw=randwrite", "--bs=4k", "--iodepth=16"]),
    ("write-128k-qd8", &["--rw=write", "--bs=128k", "--iodepth=8"]),
    ("read-4k-qd16", &["--rw=randread", "--bs=4k", "--iodepth=16"]),
];

/// Two nodes with a disk for the cluster and one for the others.
pub fn options() -> Options {
    Options { nodes: 2, disks: 2, foreign_disks: 1, ..Options::default() }
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Repetitions, of which the median is told.
    pub rounds: usize,
    /// Of each measurement.
    pub seconds: u64,
}

/// What one run of a load came to.
#[derive(Clone, Copy)]
struct Run {
    iops: f64,
    /// The median.
    latency_us: f64,
    /// Changes of context on both machines, for each request.
    switches: f64,
    /// Time that the processors of both machines were at work, for each request.
    cpu_us: f64,
}

/// Runs it in that directory, and prints a line of JSON for each result, and a table.
pub fn run(dir: &Path, options: &Options, effort: Effort) -> anyhow::Result<()> {
    let lab = Lab::up(dir, options)?;
    println!("{}", lab.calibration);
    lab.create_cluster()?;
    let result = Bench { lab: &lab, effort }.run();
    result.with_context(|| lab.logs())
}

struct Bench<'a> {
    lab: &'a Lab,
    effort: Effort,
}

impl Bench<'_> {
    fn run(&self) -> anyhow::Result<()> {
        let (exporter, ours) = self.lab.exported("n1-d1")?.context("n1-d1 is not exported")?;
        ensure!(exporter.number == self.lab.node(0).number, "n1-d1 is exported elsewhere");
        self.set_up().context("the others")?;
        let systems = [
            ("floor", "/dev/disk/by-id/virtio-data2-part1".to_owned()),
            ("ublk-mirror", ours),
            ("drbd", "/dev/drbd0".to_owned()),
            ("md-nvme-tcp", "/dev/md0".to_owned()),
        ];
        for (name, path) in &systems {
            let fill = ["--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"];
            self.fio(path, &fill, &[]).with_context(|| format!("filling {name}"))?;
        }
        let mut rows = Vec::new();
        for (job, words) in JOBS {
            let mut runs: Vec<Vec<Run>> = vec![Vec::new(); systems.len()];
            for round in 0..self.effort.rounds {
                // Who is first in one round is last in the next.
                let mut turns: Vec<usize> = (0..systems.len()).collect();
                if round % 2 == 1 {
                    turns.reverse();
                }
                for system in turns {
                    let (name, path) = &systems[system];
                    runs[system].push(self.measure(path, words).with_context(|| format!("{job} on {name}"))?);
                }
            }
            let calls = self.calls(&systems[1].1, words)?;
            for (system, (name, _)) in systems.iter().enumerate() {
                let of = |what: fn(&Run) -> f64| median(runs[system].iter().map(what).collect());
                let beside = |what: fn(&Run) -> f64| {
                    median(
                        runs[1]
                            .iter()
                            .zip(&runs[system])
                            .map(|(ours, other)| what(ours) / what(other))
                            .collect(),
                    )
                };
                let result = json!({
                    "bench": "machines", "job": job, "system": name,
                    "iops": of(|run| run.iops).round(),
                    "latency_us": of(|run| run.latency_us).round(),
                    "switches_per_io": of(|run| run.switches),
                    "cpu_us_per_io": of(|run| run.cpu_us).round(),
                    "our_iops_beside_it": beside(|run| run.iops),
                    "our_latency_beside_it": beside(|run| run.latency_us),
                    "daemons_calls_per_io": if system == 1 { calls } else { None },
                });
                println!("{result}");
                rows.push(result);
            }
        }
        print!("{}", table(&rows));
        Ok(())
    }

    fn set_up(&self) -> anyhow::Result<()> {
        let lab = self.lab;
        let rival = |index: usize, words: &[&str]| {
            let words = [&["scripts/lab.d/rival"], words].concat();
            lab.node(index).run(&words, lab.patience())?.ok()
        };
        for index in 0..2 {
            lab.node(index).put("/state/drbd.conf", DRBD.as_bytes(), lab.patience())?;
            rival(index, &["partition", &PART_MIB.to_string()])?;
            rival(index, &["drbd"])?;
        }
        rival(0, &["drbd-primary"])?;
        rival(1, &["nvme-target", "10.77.0.2"])?;
        rival(0, &["md", "10.77.0.2"]).map(drop)
    }

    /// What fio says of a load on a device of the first machine.
    fn fio(&self, path: &str, words: &[&str], more: &[&str]) -> anyhow::Result<Value> {
        let (name, size) = (format!("--filename={path}"), format!("--size={AREA_MIB}m"));
        let own =
            ["fio", "--name=job", "--direct=1", "--ioengine=io_uring", "--output-format=json", &name, &size];
        let words = [&own, words, more].concat();
        let patience = self.lab.patience() + Duration::from_secs(2 * self.effort.seconds);
        let out = self.lab.node(0).run(&words, patience)?.ok()?;
        let text = out.find('{').map_or("", |at| &out[at..]);
        let mut said: Value = serde_json::from_str(text).with_context(|| out.clone())?;
        ensure!(said["jobs"][0]["error"] == 0, "{out}");
        Ok(said["jobs"][0].take())
    }

    fn timed(&self, path: &str, words: &[&str]) -> anyhow::Result<Value> {
        let runtime = format!("--runtime={}", self.effort.seconds);
        self.fio(path, words, &["--time_based", "--norandommap", "--randrepeat=0", &runtime])
    }

    fn measure(&self, path: &str, words: &[&str]) -> anyhow::Result<Run> {
        let before = self.work()?;
        let said = self.timed(path, words)?;
        let after = self.work()?;
        let of = if words.iter().any(|word| word.contains("read")) { &said["read"] } else { &said["write"] };
        let number = |value: &Value| value.as_f64().context("fio does not say");
        let ios = number(&of["total_ios"])?;
        Ok(Run {
            iops: number(&of["iops"])?,
            latency_us: number(&of["clat_ns"]["percentile"]["50.000000"])? / 1e3,
            switches: (after.0 - before.0) as f64 / ios,
            cpu_us: (after.1 - before.1) as f64 * 10_000.0 / ios,
        })
    }

    /// Changes of context on both machines so far, and hundredths of a second that their processors were at work.
    fn work(&self) -> anyhow::Result<(u64, u64)> {
        let (mut switches, mut ticks) = (0, 0);
        for index in 0..2 {
            let stat = self.lab.node(index).run(&["cat", "/proc/stat"], self.lab.patience())?.ok()?;
            let line =
                |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)).context("/proc/stat");
            switches += line("ctxt ")?.trim().parse::<u64>()?;
            let fields: Vec<u64> =
                line("cpu ")?.split_whitespace().map_while(|word| word.parse().ok()).collect();
            // All but idle and waiting for a disk.
            ticks += fields
                .iter()
                .enumerate()
                .filter(|(index, _)| ![3, 4].contains(index))
                .map(|(_, n)| n)
                .sum::<u64>();
        }
        Ok((switches, ticks))
    }

    /// System calls of both daemons for each request; `None` if this kernel does not count them.
    fn calls(&self, path: &str, words: &[&str]) -> anyhow::Result<Option<f64>> {
        let order = |index: usize, what: &str| {
            self.lab.node(index).run(&["scripts/lab.d/rival", "calls", what], self.lab.patience())
        };
        for index in 0..2 {
            if order(index, "begin")?.code != 0 {
                return Ok(None);
            }
        }
        let said = self.timed(path, words)?;
        let mut sum = 0;
        for index in 0..2 {
            sum += order(index, "end")?.ok()?.trim().parse::<u64>().context("a count")?;
        }
        let ios = |side: &str| said[side]["total_ios"].as_f64().unwrap_or(0.0);
        Ok(Some(sum as f64 / (ios("read") + ios("write"))))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(rows: &[Value]) -> String {
    let mut text = format!(
        "{:<15} {:<12} {:>7} {:>10} {:>12} {:>10} {:>10}  beside it we have\n",
        "", "", "IOPS", "latency us", "switches/IO", "CPU us/IO", "calls/IO"
    );
    for row in rows {
        let number = |field: &str, digits: usize| {
            row[field].as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        text += &format!(
            "{:<15} {:<12} {:>7} {:>10} {:>12} {:>10} {:>10}  {} of its IOPS, {} of its latency\n",
            row["job"].as_str().unwrap_or_default(),
            row["system"].as_str().unwrap_or_default(),
            number("iops", 0),
            number("latency_us", 0),
            number("switches_per_io", 1),
            number("cpu_us_per_io", 0),
            number("daemons_calls_per_io", 1),
            number("our_iops_beside_it", 2),
            number("our_latency_beside_it", 2),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let row = json!({"job": "j", "system": "s", "iops": 12.4, "daemons_calls_per_io": null});
        let line = table(&[row]);
        let line = line.lines().last().unwrap();
        assert!(line.starts_with("j               s                 12          -"), "{line:?}");
    }
}
