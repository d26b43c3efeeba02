//! The processes of a playground.

use crate::failure::Failure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// A process as it can be found again, or found gone: a number alone may have been used again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct ProcessMark {
    pub(super) name: String,
    pub(super) pid: u32,
    /// Clock ticks since boot at its start, from `/proc/PID/stat`.
    pub(super) start_ticks: u64,
}

impl ProcessMark {
    pub(super) fn of(name: &str, pid: u32) -> Option<Self> {
        Some(Self { name: name.to_owned(), pid, start_ticks: start_ticks(pid)? })
    }

    /// Kills what an earlier playground left behind; only if it is still that process.
    pub(super) async fn kill_leftover(&self) {
        for _ in 0..100 {
            if start_ticks(self.pid) != Some(self.start_ticks) {
                return;
            }
            let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // A zombie has ended; its parent has only not asked yet.
    (fields.first() != Some(&"Z")).then_some(())?;
    fields.get(19)?.parse().ok()
}

/// A process that the playground started.
pub(super) struct Process {
    pub(super) name: String,
    program: PathBuf,
    arguments: Vec<String>,
    pub(super) log: PathBuf,
    child: Option<Child>,
    /// The last exit, until it is started again.
    ended: Option<ExitStatus>,
    /// It was ended on purpose: nothing to report.
    expected: bool,
}

impl Process {
    pub(super) fn new(name: &str, program: &Path, arguments: Vec<String>, log: PathBuf) -> Self {
        let program = program.to_owned();
        Self { name: name.to_owned(), program, arguments, log, child: None, ended: None, expected: false }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    pub(super) fn spawn(&mut self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(format!("cannot start {} for {}: {error}", self.program.display(), self.name))
        };
        let log = OpenOptions::new().create(true).append(true).open(&self.log).map_err(failed)?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            // A ctrl-C at the terminal is for the playground, which ends its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        (self.child, self.ended, self.expected) = (Some(child), None, false);
        Ok(())
    }

    /// Whether its first thread has ended: it looks dead, and cannot be waited for while others of its threads end.
    pub(super) fn is_ending(&self) -> bool {
        self.pid().is_some_and(|pid| start_ticks(pid).is_none())
    }

    /// How it ended, if it has ended.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        if let Some(child) = &mut self.child
            && let Ok(Some(status)) = child.try_wait()
        {
            self.ended = Some(status);
            self.child = None;
        }
        self.ended
    }

    /// Says once, in one line, that it ended although nobody asked it to.
    pub(super) fn unexpected_end(&mut self) -> Option<String> {
        let status = self.ended()?;
        if std::mem::replace(&mut self.expected, true) {
            return None;
        }
        Some(format!(
            "{} ended ({status}): {}; its log is {}",
            self.name,
            last_line(&self.log),
            self.log.display()
        ))
    }

    pub(super) async fn kill(&mut self) {
        self.expected = true;
        if let Some(child) = &mut self.child {
            let _ = child.start_kill();
            self.ended = child.wait().await.ok();
            self.child = None;
        }
    }

    /// Asks it to end.
    pub(super) fn terminate(&mut self) {
        self.expected = true;
        // The child has not been waited for, so the number is still its own.
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
    }

    /// Waits for it to end, and kills it if it takes too long.
    pub(super) async fn wait(&mut self, limit: Duration) {
        if let Some(child) = &mut self.child
            && let Ok(Ok(status)) = timeout(limit, child.wait()).await
        {
            self.ended = Some(status);
            self.child = None;
            return;
        }
        self.kill().await;
    }
}

/// The last line of a log, for a message.
pub(super) fn last_line(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(bytes.saturating_sub(4096)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = read().unwrap_or_default();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it has said nothing").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_number_that_was_used_again_is_not_killed() {
        let mut child = Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
        let mark = ProcessMark::of("n1", child.id().unwrap()).unwrap();
        let other = ProcessMark { start_ticks: mark.start_ticks - 1, ..mark.clone() };
        other.kill_leftover().await;
        assert!(child.try_wait().unwrap().is_none());
        mark.kill_leftover().await;
        assert!(!child.wait().await.unwrap().success());
    }

    #[tokio::test]
    async fn one_that_looks_dead_is_ending() {
        let dir = tempfile::tempdir().unwrap();
        let arguments = vec!["60".into()];
        let mut process = Process::new("n1", Path::new("/bin/sleep"), arguments, dir.path().join("log"));
        process.spawn().unwrap();
        assert!(!process.is_ending());
        let pid = Pid::from_raw(process.pid().unwrap() as i32);
        kill(pid, Signal::SIGKILL).unwrap();
        while !process.is_ending() {
            sleep(Duration::from_millis(5)).await;
        }
        while process.ended().is_none() {
            sleep(Duration::from_millis(5)).await;
        }
        assert!(!process.is_ending());
    }

    #[tokio::test]
    async fn an_end_that_nobody_asked_for_is_told_once_with_the_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let arguments = vec!["-c".into(), "echo first; echo last words; exit 3".into()];
        let mut process = Process::new("n1", Path::new("/bin/sh"), arguments, log);
        process.spawn().unwrap();
        let line = loop {
            match process.unexpected_end() {
                Some(line) => break line,
                None => sleep(Duration::from_millis(5)).await,
            }
        };
        assert!(line.starts_with("n1 ended (exit status: 3): last words; its log is "), "{line}");
        assert_eq!(process.unexpected_end(), None);
    }
}
