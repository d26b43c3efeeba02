//! Programs on a file system on a device, in the machine that exports it; the ledger of what they were told to be done is
//! here, outside of all that dies.
//!
//! SQLite and PostgreSQL say a row's number when its commit has returned, which it does after a flush: so every row
//! that was said has to be there after whatever happens, both machines' power cut at once included. What a machine had no
//! time to say is not asked for. fio only tells whether each block is one that it wrote.

use super::Lab;
use super::exec::Running;
use super::machine::Machine;
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SCRIPT: &str = "scripts/lab.d/tenant";

/// A program of the script, and what it has said.
struct Program {
    name: &'static str,
    said: Arc<Mutex<Said>>,
    running: Option<(Arc<Running>, JoinHandle<anyhow::Result<i32>>)>,
}

#[derive(Default)]
struct Said {
    /// The whole lines.
    ledger: String,
    rows: u64,
    /// A line that has not ended.
    part: String,
    errors: String,
    /// When the last row came, and the longest time without one, since somebody asked.
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Said {
    fn add(&mut self, stdout: bool, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        if !stdout {
            self.errors += &text;
            return;
        }
        self.part += &text;
        if let Some(end) = self.part.rfind('\n') {
            let rest = self.part.split_off(end + 1);
            if let Some(last) = self.last.replace(Instant::now()) {
                self.longest_gap = self.longest_gap.max(last.elapsed());
            }
            self.rows += self.part.lines().count() as u64;
            self.ledger += &self.part;
            self.part = rest;
        }
    }
}

/// The programs of one device.
pub struct Tenants<'a> {
    lab: &'a Lab,
    device: String,
    /// The machine they are on, how often that had been switched on by then, and the device's path there.
    home: Option<(&'a Machine, u64, String)>,
    programs: Vec<Program>,
}

impl<'a> Tenants<'a> {
    /// Makes the file system, and starts the programs.
    pub fn new(lab: &'a Lab, device: &str, names: &[&'static str]) -> anyhow::Result<Self> {
        let program = |name: &&'static str| Program { name, said: Arc::default(), running: None };
        let programs = names.iter().map(program).collect();
        let mut tenants = Self { lab, device: device.to_owned(), home: None, programs };
        tenants.move_in("make")?;
        if names.contains(&"postgres") {
            let (machine, ..) = tenants.home.as_ref().context("homeless")?;
            tenants.script(machine, &["make-postgres"], &[])?;
        }
        tenants.start()?;
        Ok(tenants)
    }

    fn script(&self, machine: &Machine, words: &[&str], input: &[u8]) -> anyhow::Result<String> {
        let running = Running::start(&machine.agent(), &[&[SCRIPT], words].concat())?;
        running.feed(input)?;
        let ended = running.finish(2 * self.lab.patience())?;
        ended.ok().with_context(|| format!("tenant {words:?} on {}", machine.name))
    }

    /// Goes where the device is now.
    fn move_in(&mut self, how: &str) -> anyhow::Result<()> {
        let (lab, device) = (self.lab, self.device.clone());
        let (machine, path) = lab.until(&format!("{device} to be exported"), || lab.exported(&device))?;
        if let Some((old, boots, at)) = self.home.take() {
            if (old.number, boots, at.as_str()) == (machine.number, machine.boots(), path.as_str()) {
                self.home = Some((old, boots, at));
                return Ok(());
            }
            // Where the machine lives on it has a mount whose device is gone.
            if old.is_on() && old.boots() == boots {
                self.script(old, &["leave"], &[])?;
            }
        }
        self.script(machine, &[how, &device, &path], &[])?;
        self.home = Some((machine, machine.boots(), path));
        Ok(())
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let (machine, ..) = self.home.as_ref().context("homeless")?;
        for program in &mut self.programs {
            let running = Arc::new(Running::start(&machine.agent(), &[SCRIPT, program.name])?);
            running.feed(&[])?;
            let (said, follows) = (Arc::clone(&program.said), Arc::clone(&running));
            let thread = std::thread::spawn(move || {
                follows.follow(None, |stdout, bytes| {
                    said.lock().unwrap_or_else(PoisonError::into_inner).add(stdout, bytes);
                })
            });
            program.running = Some((running, thread));
        }
        Ok(())
    }

    /// After a round: the programs end, move to where their device is now, everything that they were told to be done
    /// is there, and they go on. Of what was not flushed nothing need be left after a common power cut, and fio flushes nothing.
    pub fn check(&mut self, caches_lost: bool) -> anyhow::Result<()> {
        for program in &mut self.programs {
            let Some((running, thread)) = program.running.take() else { continue };
            running.hang_up();
            // Whether it was still there, has failed with its device or died with its machine.
            let code = thread.join().expect("it does not panic");
            let said = program.said.lock().unwrap_or_else(PoisonError::into_inner);
            let corrupt = ["verify: bad", "malformed", "crc32c: verify failed"]
                .iter()
                .any(|words| said.errors.contains(words));
            ensure!(!corrupt, "{} ended with {code:?}: {}", program.name, said.errors);
        }
        self.move_in("mount")?;
        let (machine, ..) = self.home.as_ref().context("homeless")?;
        for program in &self.programs {
            let ledger = program.said.lock().unwrap_or_else(PoisonError::into_inner).ledger.clone();
            let words = match (program.name, caches_lost) {
                ("fio", true) => "fill-fio".to_owned(),
                (name, _) => format!("check-{name}"),
            };
            self.script(machine, &[&words], ledger.as_bytes())?;
        }
        self.start()
    }

    /// From now on the longest time without a row is looked for.
    pub fn begin_gap(&mut self) {
        for program in &self.programs {
            let mut said = program.said.lock().unwrap_or_else(PoisonError::into_inner);
            (said.last, said.longest_gap) = (Some(Instant::now()), Duration::ZERO);
        }
    }

    /// The longest time without a row of the program that says most of them.
    pub fn longest_gap(&self) -> Duration {
        let said = |program: &Program| {
            let said = program.said.lock().unwrap_or_else(PoisonError::into_inner);
            (said.rows, said.longest_gap)
        };
        let databases = self.programs.iter().filter(|program| program.name != "fio");
        databases.map(said).max().map_or(Duration::ZERO, |(_, gap)| gap)
    }

    /// Whether every program still runs: a file system that sees an error ends it.
    pub fn all_run(&self) -> anyhow::Result<()> {
        for program in &self.programs {
            let ended = program.running.as_ref().is_none_or(|(_, thread)| thread.is_finished());
            let said = program.said.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(!ended, "{} has ended: {}", program.name, said.errors);
        }
        Ok(())
    }

    /// Ends the programs, and unmounts the file system: nothing is written any more.
    pub fn rest(&mut self) -> anyhow::Result<()> {
        for (running, thread) in self.programs.iter_mut().filter_map(|program| program.running.take()) {
            running.hang_up();
            // What it said was looked at before.
            let _ = thread.join();
        }
        let (machine, ..) = self.home.as_ref().context("homeless")?;
        self.script(machine, &["rest"], &[]).map(drop)
    }

    /// How many rows were said, by each program that has any.
    pub fn rows(&self) -> BTreeMap<&'static str, u64> {
        let rows = |program: &Program| program.said.lock().unwrap_or_else(PoisonError::into_inner).rows;
        let databases = self.programs.iter().filter(|program| program.name != "fio");
        databases.map(|program| (program.name, rows(program))).collect()
    }

    /// Waits until every program that says rows has said some more.
    pub fn busy(&self, more: u64) -> anyhow::Result<()> {
        let before = self.rows();
        self.lab.until("the programs to get on", || {
            let now = self.rows();
            let idle = before.iter().any(|(name, rows)| now[name] < rows + more);
            Ok((!idle).then_some(()))
        })
    }
}

impl Drop for Tenants<'_> {
    fn drop(&mut self) {
        for (running, thread) in self.programs.iter_mut().filter_map(|program| program.running.take()) {
            running.hang_up();
            // Nobody is interested any more.
            let _ = thread.join();
        }
    }
}
