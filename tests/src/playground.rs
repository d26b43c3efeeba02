//! A playground run by a test: a whole cluster of real processes, ended with the test.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The longest that anything here may take; emulated machines are slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where the project's programs are: beside the test's own, or in PATH inside a machine.
pub fn program(name: &str) -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|own| {
        let folder = own.parent()?.parent()?.join(name);
        folder.exists().then_some(folder)
    });
    beside.unwrap_or_else(|| name.into())
}

/// A running playground.
pub struct Playground {
    child: Child,
    /// Its directory.
    pub dir: PathBuf,
    base: tempfile::TempDir,
    description: Value,
}

impl Playground {
    /// Starts one with NBD frontends and small disks.
    pub fn start(nodes: u32) -> anyhow::Result<Self> {
        Self::start_with(nodes, "nbd", "512M")
    }

    /// Starts one and waits until every device is exported. Its disks are kept when it ends, until
    /// this value is dropped.
    pub fn start_with(nodes: u32, frontend: &str, disk_size: &str) -> anyhow::Result<Self> {
        Self::start_like(nodes, frontend, disk_size, &[])
    }

    /// The same, with further arguments of `mirrorctl playground`.
    pub fn start_like(nodes: u32, frontend: &str, disk_size: &str, further: &[&str]) -> anyhow::Result<Self> {
        let base = tempfile::tempdir()?;
        let dir = base.path().join("play");
        let mut child = Command::new(program("mirrorctl"))
            .args(["playground", "--json", "--keep", "--nodes", &nodes.to_string()])
            .args(["--frontend", frontend, "--disk-size", disk_size, "--dir"])
            .arg(&dir)
            .args(further)
            .stdout(Stdio::piped())
            .spawn()
            .context("mirrorctl")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut text = String::new();
        for line in output.lines() {
            text.push_str(&line?);
            text.push('\n');
            if let Ok(description) = serde_json::from_str(&text) {
                return Ok(Self { child, dir, base, description });
            }
        }
        let status = child.wait()?;
        anyhow::bail!("the playground ended with {status}: {text}");
    }

    /// The folder that holds the playground's and is removed with this value.
    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// Runs `mirrorctl` on this playground.
    pub fn mirrorctl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(Command::new(program("mirrorctl")).arg("--dir").arg(&self.dir).args(arguments).output()?)
    }

    /// Runs `mirrorctl` on this playground and does not wait for its end.
    pub fn begin(&self, arguments: &[&str]) -> anyhow::Result<Child> {
        let mut command = Command::new(program("mirrorctl"));
        command.arg("--dir").arg(&self.dir).args(arguments);
        Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    }

    /// Runs `mirrorctl` and wants it to succeed.
    pub fn must(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.mirrorctl(arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "mirrorctl {arguments:?}: {} {text} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    /// `mirrorctl … --json`, whatever its exit code says of the cluster's health.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self.mirrorctl(&[arguments, &["--json"]].concat())?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("mirrorctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// What `mirrorctl status --json` says of a device.
    pub fn device(&self, name: &str) -> anyhow::Result<Value> {
        let devices = self.json(&["device", "list"])?.as_array().cloned().unwrap_or_default();
        devices.into_iter().find(|device| device["name"] == name).with_context(|| format!("no device {name}"))
    }

    /// The URI where a device is exported, once it is.
    pub fn uri(&self, name: &str) -> anyhow::Result<String> {
        self.until(&format!("{name} is exported"), || {
            Ok(self.device(name)?["uri"].as_str().map(str::to_owned))
        })
    }

    /// The block device that a device is exported as, once it is.
    pub fn path(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.until(&format!("{name} is exported"), || {
            Ok(self.device(name)?["path"].as_str().map(PathBuf::from))
        })
    }

    /// A node's process id as it was at the start.
    pub fn pid(&self, node: &str) -> anyhow::Result<i32> {
        let nodes = self.description["nodes"].as_array().context("no nodes")?;
        let found = nodes.iter().find(|entry| entry["name"] == node).context("no such node")?;
        Ok(found["pid"].as_i64().context("no pid")? as i32)
    }

    /// The name of the manager that listens at that address.
    pub fn manager_at(&self, address: &str) -> Option<&str> {
        let managers = self.description["managers"].as_array()?;
        managers.iter().find(|manager| manager["address"] == address)?["name"].as_str()
    }

    /// The manager's process id.
    pub fn manager_pid(&self) -> anyhow::Result<i32> {
        Ok(self.description["manager"]["pid"].as_i64().context("no pid")? as i32)
    }

    /// A node's disk.
    pub fn disk(&self, node: &str) -> PathBuf {
        self.dir.join(node).join("d1.img")
    }

    /// SIGKILLs a node's daemon.
    pub fn kill(&self, node: &str) -> anyhow::Result<()> {
        self.playground("kill", node)
    }

    /// Starts a node's daemon again.
    pub fn restart(&self, node: &str) -> anyhow::Result<()> {
        self.playground("start", node)
    }

    fn playground(&self, verb: &str, node: &str) -> anyhow::Result<()> {
        let output = Command::new(program("mirrorctl"))
            .args(["playground", verb, node, "--dir"])
            .arg(&self.dir)
            .output()?;
        ensure!(
            output.status.success(),
            "playground {verb} {node}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Waits until `mirrorctl status` has nothing to find: every copy is in sync.
    pub fn healthy(&self) -> anyhow::Result<()> {
        let mut last = Value::Null;
        self.until("status says healthy", || {
            last = self.json(&["status"])?;
            Ok((last["verdict"] == "healthy").then_some(()))
        })
        .with_context(|| format!("{last:#}"))
    }

    /// Waits until `look` finds something.
    pub fn until<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let begun = Instant::now();
        loop {
            // While daemons come and go a look may fail; what counts is that it does not for ever.
            match look() {
                Ok(Some(found)) => return Ok(found),
                Ok(None) if begun.elapsed() > PATIENCE => {
                    anyhow::bail!("waited for: {what}\n{}", self.logs());
                }
                Err(error) if begun.elapsed() > PATIENCE => {
                    return Err(error.context(format!("waited for: {what}\n{}", self.logs())));
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// The ends of all logs, for a failing test.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let log = entry.path().join("log");
            let Ok(content) = std::fs::read_to_string(&log) else { continue };
            let lines: Vec<&str> = content.lines().collect();
            text +=
                &format!("--- {}\n{}\n", log.display(), lines[lines.len().saturating_sub(25)..].join("\n"));
        }
        text
    }

    /// Ends all processes in an orderly way; the disks stay until this value is dropped.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            signal(self.child.id() as i32, nix::sys::signal::Signal::SIGTERM)?;
            self.child.wait()?;
        }
        Ok(())
    }
}

/// The ublk devices of this machine.
pub fn ublk_devices() -> Vec<String> {
    let names = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("ublkb")).collect()
}

impl Drop for Playground {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("ending the playground: {error:#}");
        }
    }
}

/// Sends a signal to a process of a playground.
pub fn signal(pid: i32, signal: nix::sys::signal::Signal) -> anyhow::Result<()> {
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?)
}
