//! What the tests share: a server process and small helpers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::{RngCore, SeedableRng};
use ublk_server::frontend::ublk::UblkId;
use ublk_server::frontend::ublk::recovery::Records;

use crate::server::{Counters, NODE, Options, QUEUES};

/// A server process, with its devices.
pub struct Server {
    pub child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub options: Options,
    pub ids: Vec<UblkId>,
    /// Milliseconds until the kernel let it announce itself for all devices, and until they were served.
    pub announced_ms: u64,
    pub ready_ms: u64,
    /// What it said before it was ready.
    pub said: Vec<String>,
}

impl Server {
    pub fn spawn(options: &Options) -> Result<Server> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(options.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("piped")?;
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        let options = options.clone();
        Ok(Server { child, stdin, stdout, options, ids: vec![], announced_ms: 0, ready_ms: 0, said: vec![] })
    }

    pub fn start(options: &Options) -> Result<Server> {
        let mut server = Server::spawn(options)?;
        loop {
            let mut line = String::new();
            ensure!(server.stdout.read_line(&mut line)? > 0, "the server ended: {:?}", server.child.wait()?);
            match line.trim().strip_prefix("ready ") {
                None => server.said.push(line.trim().to_owned()),
                Some(words) => {
                    let words: Vec<&str> = words.split(' ').collect();
                    let [ids, announced, ready] = words[..] else { bail!("odd line {line:?}") };
                    server.ids = ids.split(',').map(|id| Ok(UblkId(id.parse()?))).collect::<Result<_>>()?;
                    server.announced_ms = announced.parse()?;
                    server.ready_ms = ready.parse()?;
                    return Ok(server);
                }
            }
        }
    }

    pub fn id(&self) -> UblkId {
        self.ids[0]
    }

    pub fn counters(&self) -> Counters {
        Counters::load(&self.options.directory, &self.options.devices[0])
    }

    /// SIGKILL, and wait until the process is gone. What it was asked in the meantime still waits.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The orderly end: devices are synced, stopped and deleted, records removed.
    pub fn stop(mut self) -> Result<()> {
        writeln!(self.stdin, "stop")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(line.trim() == "stopped", "the server said {line:?}");
        ensure!(self.child.wait()?.success());
        for id in &self.ids {
            ensure!(!id.block_path().exists() && !id.char_path().exists(), "{id} is still there");
        }
        let left = Records::open(&self.options.directory.join("run"), NODE)?.load()?;
        ensure!(left.is_empty(), "records were left: {left:?}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only matters if the test failed.
        release(&self.options);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory in memory for the disks of one test.
pub fn options(devices: &[&str]) -> Result<(tempfile::TempDir, Options)> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let options = Options {
        directory: directory.path().to_owned(),
        devices: devices.iter().map(|name| (*name).to_owned()).collect(),
        queues: QUEUES,
        ..Options::default()
    };
    Ok((directory, options))
}

/// Requests are answered again.
pub fn release(options: &Options) {
    // A server's end does it too.
    let _ = fs::remove_file(options.hold_file());
}

/// From now on requests are taken and not answered. The probing of new devices by udev must be over.
pub fn hold(options: &Options) -> Result<()> {
    run("udevadm", &["settle"])?;
    Ok(fs::write(options.hold_file(), "")?)
}

pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    Ok(text)
}

pub fn block_path(id: UblkId) -> String {
    id.block_path().to_str().expect("an ASCII path").to_owned()
}

pub fn sysfs(id: UblkId, name: &str) -> Result<String> {
    Ok(fs::read_to_string(id.sysfs_path().join(name))?.trim().to_owned())
}

pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    let start = Instant::now();
    while !condition() {
        ensure!(start.elapsed() < limit, "{what} did not happen within {limit:?}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(start.elapsed())
}

pub fn measured(what: &str, value: impl std::fmt::Display) {
    println!("measured {what}: {value}");
}

pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
