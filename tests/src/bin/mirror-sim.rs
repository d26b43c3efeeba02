//! Runs the simulator.

use mirror_tests::sim::schedule::{Class, Outcome, run};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const USAGE: &str = "\
usage: mirror-sim [--start-seed SEED] [--schedules N] [--threads N]
       mirror-sim --replay SEED [--trace] [--bug BUG]
       mirror-sim --hunt BUG|all [--start-seed SEED] [--schedules N]
       mirror-sim --bugs

Runs whole clusters of the real engine and manager on simulated disks, clocks and a simulated network,
with everything going wrong that a seed says, and holds what users saw against what was promised.

  (first form)     N schedules, one a seed; names the seeds that break a promise
  --replay SEED    one of them again: the same events to the last, as its trace hash shows
  --hunt BUG       plants a mistake and runs schedules until it is noticed and the same schedule
                   without it is well; prints a line for tests/planted-seeds.txt
  --bugs           lists the mistakes that can be planted

  --start-seed S   the first seed (default: 1; of a hunt 0)
  --schedules N    how many (default: 1000; of a hunt 20000 at most)
  --threads N      schedules at a time, each on a thread of its own (default: 1)
  --trace          tell the story of the schedule
  --bug BUG        with that mistake planted

--hunt, --bugs and --bug need a build with the feature planted-bugs:
  cargo run --release --package mirror-tests --features planted-bugs --bin mirror-sim -- --hunt all

Exit code: 0 all is well (of a hunt: every mistake was noticed), 1 it is not, 64 wrong usage.";

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Campaign,
    Replay,
    Hunt,
    Bugs,
}

/// What was asked for.
#[derive(Default)]
struct Arguments {
    start_seed: Option<u64>,
    schedules: Option<u64>,
    threads: Option<u64>,
    replay: Option<u64>,
    hunt: Option<String>,
    bug: Option<String>,
    bugs: bool,
    trace: bool,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--trace" => arguments.trace = true,
                "--bugs" => arguments.bugs = true,
                "--start-seed" | "--schedules" | "--threads" | "--replay" => {
                    let text = words.next().ok_or(format!("{word} wants a number"))?;
                    let number = text.parse().map_err(|_| format!("{word} wants a number, not {text:?}"))?;
                    *match word.as_str() {
                        "--start-seed" => &mut arguments.start_seed,
                        "--schedules" => &mut arguments.schedules,
                        "--threads" => &mut arguments.threads,
                        _ => &mut arguments.replay,
                    } = Some(number);
                }
                "--hunt" => arguments.hunt = Some(words.next().ok_or("--hunt wants a bug, or all")?),
                "--bug" => arguments.bug = Some(words.next().ok_or("--bug wants a bug")?),
                _ => return Err(format!("unknown argument {word:?}")),
            }
        }
        Ok(arguments)
    }

    /// The one thing that was asked for, if what came with it belongs there.
    fn mode(&self) -> Result<Mode, String> {
        let mode = match (self.replay.is_some(), self.hunt.is_some(), self.bugs) {
            (false, false, false) => Mode::Campaign,
            (true, false, false) => Mode::Replay,
            (false, true, false) => Mode::Hunt,
            (false, false, true) => Mode::Bugs,
            _ => return Err("one of --replay, --hunt and --bugs at a time".into()),
        };
        let runs = matches!(mode, Mode::Campaign | Mode::Hunt);
        let stray = [
            (self.trace && mode != Mode::Replay, "--trace belongs to --replay"),
            (self.bug.is_some() && mode != Mode::Replay, "--bug belongs to --replay"),
            (self.start_seed.is_some() && !runs, "--start-seed belongs to many schedules"),
            (self.schedules.is_some() && !runs, "--schedules belongs to many schedules"),
            (self.threads.is_some() && mode != Mode::Campaign, "--threads belongs to a campaign"),
            (self.threads == Some(0), "--threads wants one at least"),
        ];
        match stray.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, why)) => Err(why.into()),
            None => Ok(mode),
        }
    }
}

fn main() -> ExitCode {
    if std::env::args().skip(1).any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let outcome =
        Arguments::parse(std::env::args().skip(1)).and_then(|arguments| match arguments.mode()? {
            Mode::Campaign => Ok(campaign(&arguments)),
            Mode::Replay => replay(&arguments),
            Mode::Hunt => planted::hunt(&arguments),
            Mode::Bugs => planted::list(),
        });
    match outcome {
        Ok(well) => u8::from(!well).into(),
        Err(error) => {
            eprintln!("mirror-sim: {error}\nmirror-sim --help says more.");
            64.into()
        }
    }
}

fn replay(arguments: &Arguments) -> Result<bool, String> {
    let seed = arguments.replay.unwrap_or_default();
    if let Some(name) = &arguments.bug {
        planted::activate(name)?;
    }
    let outcome = run(seed, arguments.trace);
    outcome.violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
    println!(
        "seed {seed}: {} requests, {} sectors read, trace hash {:016x}",
        outcome.completed, outcome.reads, outcome.hash
    );
    Ok(outcome.violations.is_empty())
}

/// What many schedules came to.
#[derive(Default)]
struct Total {
    faults: [u64; Class::ALL.len()],
    completed: u64,
    reads: u64,
    failing: Vec<u64>,
}

impl Total {
    fn add(&mut self, seed: u64, outcome: Option<Outcome>) {
        let Some(outcome) = outcome else {
            println!("seed {seed}: panicked");
            self.failing.push(seed);
            return;
        };
        for (sum, count) in self.faults.iter_mut().zip(outcome.faults) {
            *sum += count;
        }
        self.completed += outcome.completed;
        self.reads += outcome.reads;
        if let Some(first) = outcome.violations.first() {
            println!("seed {seed}: {first}");
            self.failing.push(seed);
        }
    }
}

fn campaign(arguments: &Arguments) -> bool {
    let start = arguments.start_seed.unwrap_or(1);
    let schedules = arguments.schedules.unwrap_or(1_000);
    let threads = arguments.threads.unwrap_or(1);
    let end = start.saturating_add(schedules);
    let next = AtomicU64::new(start);
    let total = Mutex::new(Total::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = std::panic::catch_unwind(|| run(seed, false));
                    let mut total = total.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    total.add(seed, outcome.ok());
                }
            });
        }
    });
    let mut total = total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    total.failing.sort_unstable();
    let rate = schedules as f64 / began.elapsed().as_secs_f64();
    println!(
        "{schedules} schedules, {rate:.0}/s, {} requests, {} sectors read",
        total.completed, total.reads
    );
    for (class, count) in Class::ALL.iter().zip(total.faults) {
        println!("  {}: {count}", class.name());
    }
    println!("failing: {} {:?}", total.failing.len(), total.failing);
    total.failing.is_empty()
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::Arguments;
    use mirror_net::planted::{Bug, set};
    use mirror_tests::sim::schedule::{broken_by, run};
    use nix::time::{ClockId, clock_gettime};

    fn named(name: &str) -> Result<Bug, String> {
        Bug::named(name).ok_or_else(|| format!("there is no bug {name:?}; --bugs lists them"))
    }

    pub fn activate(name: &str) -> Result<(), String> {
        set(Some(named(name)?));
        Ok(())
    }

    pub fn list() -> Result<bool, String> {
        for bug in Bug::ALL {
            println!("{:<26} {}", bug.name(), bug.description());
        }
        Ok(true)
    }

    /// Seconds that this thread had a core.
    fn seconds() -> f64 {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .map_or(0.0, |time| time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
    }

    pub fn hunt(arguments: &Arguments) -> Result<bool, String> {
        let name = arguments.hunt.as_deref().unwrap_or_default();
        let bugs = if name == "all" { Bug::ALL.to_vec() } else { vec![named(name)?] };
        let start = arguments.start_seed.unwrap_or(0);
        let limit = arguments.schedules.unwrap_or(20_000);
        // A mistake may well end in a panic, which is as good a sign as any.
        std::panic::set_hook(Box::new(|_| {}));
        let mut all_found = true;
        for bug in bugs {
            let began = seconds();
            // What a seed shows without the mistake as well is no sign of it.
            let shown = |seed| broken_by(bug, seed).filter(|_| run(seed, false).violations.is_empty());
            let mut seeds = start..start.saturating_add(limit);
            let found = seeds.find_map(|seed| Some((seed, shown(seed)?)));
            let seconds = seconds() - began;
            match found {
                Some((seed, violation)) => {
                    let schedules = seed - start + 1;
                    println!("{} {seed}  # {schedules} schedules, {seconds:.1} s", bug.name());
                    println!("    {}", violation.chars().take(200).collect::<String>());
                }
                None => {
                    println!("{}: not noticed in {limit} schedules, {seconds:.1} s", bug.name());
                    all_found = false;
                }
            }
        }
        Ok(all_found)
    }
}

#[cfg(not(feature = "planted-bugs"))]
mod planted {
    use super::Arguments;

    const MISSING: &str = "no mistakes can be planted in this build: use --features planted-bugs";

    pub fn activate(_: &str) -> Result<(), String> {
        Err(MISSING.into())
    }

    pub fn list() -> Result<bool, String> {
        Err(MISSING.into())
    }

    pub fn hunt(_: &Arguments) -> Result<bool, String> {
        Err(MISSING.into())
    }
}
