//! A cluster whose processes a test starts one by one, with a cluster file of its own: for what a
//! playground is too comfortable for.

use anyhow::{Context, ensure};
use mirror_net::wire::handshake::ClusterKey;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::playground::{program, signal};

/// The longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ended {
    /// Wants a failure with this exit code and exactly one line that says all of this.
    pub fn refused(&self, code: i32, says: &[&str]) -> anyhow::Result<()> {
        ensure!(self.code == code, "the exit code is not {code}: {self:?}");
        ensure!(self.err.trim_end().lines().count() == 1, "not one line: {self:?}");
        for words in says {
            ensure!(self.err.contains(words), "not a word of {words:?}: {self:?}");
        }
        Ok(())
    }
}

/// A process of a cluster, killed with the test.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    /// Where in it this process begins: those before it in the same place wrote to the same file.
    log_from: usize,
}

impl Daemon {
    /// What it has logged.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.log_from..).unwrap_or_default()).into_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until its log says something.
    pub fn says(&self, words: &str) -> anyhow::Result<()> {
        until(&format!("{words:?} in its log"), || Ok(self.log().contains(words).then_some(())))
            .with_context(|| self.log())
    }

    /// SIGTERM, and its orderly end.
    pub fn stop(mut self) -> anyhow::Result<()> {
        signal(self.pid(), nix::sys::signal::Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {}", self.log());
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `look` finds something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        match look()? {
            Some(found) => return Ok(found),
            None if begun.elapsed() > PATIENCE => anyhow::bail!("waited for: {what}"),
            None => std::thread::sleep(Duration::from_millis(30)),
        }
    }
}

/// A directory with a key, a cluster file and disks.
pub struct Lab {
    dir: tempfile::TempDir,
    /// The loopback address and the first of the ports that are this lab's alone.
    host: String,
    port: u16,
}

impl Lab {
    /// A cluster of n1 and n2, with a disk of that size each; nothing runs, and the disks are not there.
    pub fn new(disk_size: &str) -> anyhow::Result<Self> {
        let (host, port) = own_address();
        let lab = Self { dir: tempfile::tempdir()?, host, port };
        lab.write_key(&lab.path("key"), 7)?;
        lab.write_config("cluster.toml", |_| disk_size.to_owned(), "")?;
        Ok(lab)
    }

    /// Writes a cluster file; `extra` goes into its `[cluster]`.
    pub fn write_config(
        &self,
        name: &str,
        size: impl Fn(usize) -> String,
        extra: &str,
    ) -> anyhow::Result<PathBuf> {
        let dir = self.dir.path().display();
        let mut text = format!(
            "[cluster]\nname = \"lab\"\nkey_file = \"{dir}/key\"\nmanager = \"{}\"\nfrontend = \"nbd\"\n\
             slice_size = \"1MiB\"\n{extra}",
            self.manager_address()
        );
        for index in 1..=2 {
            text += &format!(
                "[[node]]\nname = \"n{index}\"\naddress = \"{}\"\n[[node.disk]]\npath = \
                 \"{dir}/n{index}.img\"\nsize = \"{}\"\n",
                self.address(&format!("n{index}")),
                size(index)
            );
        }
        std::fs::write(self.path(name), text)?;
        Ok(self.path(name))
    }

    /// Writes a key file of 32 equal bytes.
    pub fn write_key(&self, path: &Path, byte: u8) -> anyhow::Result<()> {
        let mut options = File::options();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(file.write_all(ClusterKey::new([byte; 32]).to_text().as_bytes())?)
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A node's disk.
    pub fn disk(&self, node: &str) -> PathBuf {
        self.path(&format!("{node}.img"))
    }

    /// A node's address.
    pub fn address(&self, node: &str) -> String {
        self.address_of(node.strip_prefix('n').and_then(|number| number.parse().ok()).unwrap_or(9))
    }

    /// The manager's address.
    pub fn manager_address(&self) -> String {
        self.address_of(0)
    }

    /// The address with the lab's port of that number.
    pub fn address_of(&self, number: u16) -> String {
        format!("{}:{}", self.host, self.port + number)
    }

    fn command(&self, name: &str, arguments: &[String]) -> Command {
        let mut command = Command::new(program(name));
        // Whatever the user has set has no say here.
        command.args(arguments).env_remove("UBLK_MIRROR_CONFIG").env_remove("UBLK_MIRROR_LOG");
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn spawn(&self, name: &str, arguments: &[String], log: &str) -> anyhow::Result<Daemon> {
        let log = self.path(log);
        let file = File::options().create(true).append(true).open(&log)?;
        let log_from = file.metadata()?.len() as usize;
        let child = self.command(name, arguments).stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Daemon { child, log, log_from })
    }

    fn node_arguments(&self, config: &str, node: &str, place: &str) -> Vec<String> {
        let of = |what: &str| self.path(&format!("{place}-{what}")).display().to_string();
        let config = self.path(config).display().to_string();
        let (state, run) = (of("state"), of("run"));
        ["run", "--config", &config, "--node", node, "--state-dir", &state, "--run-dir", &run]
            .map(str::to_owned)
            .to_vec()
    }

    /// Starts a node's daemon and waits until it listens.
    pub fn node(&self, node: &str) -> anyhow::Result<Daemon> {
        self.node_with("cluster.toml", node, node)
    }

    /// Starts a node's daemon with another cluster file, and its state in other directories.
    pub fn node_with(&self, config: &str, node: &str, place: &str) -> anyhow::Result<Daemon> {
        let arguments = self.node_arguments(config, node, place);
        let mut daemon = self.spawn("ublk-server", &arguments, &format!("{place}.log"))?;
        // A connection would be a better sign, but the daemon tells of those that are no node's.
        until("the daemon to listen", || {
            ensure!(daemon.runs()?, "the daemon ended: {}", daemon.log());
            Ok(daemon.log().contains("started, waiting for the manager").then_some(()))
        })?;
        Ok(daemon)
    }

    /// Runs a node's daemon, which has to end by itself. Only errors are logged.
    pub fn node_ends(&self, config: &str, node: &str, place: &str) -> anyhow::Result<Ended> {
        let mut command = self.command("ublk-server", &self.node_arguments(config, node, place));
        finish(command.env("UBLK_MIRROR_LOG", "error"))
    }

    /// The same as another user, which needs root.
    pub fn node_ends_as(&self, user: Option<u32>, node: &str) -> anyhow::Result<Ended> {
        let mut command = self.command("ublk-server", &self.node_arguments("cluster.toml", node, node));
        if let Some(id) = user {
            command.uid(id).gid(id);
        }
        finish(command.env("UBLK_MIRROR_LOG", "error"))
    }

    /// Starts the manager and waits until it listens.
    pub fn manager(&self) -> anyhow::Result<Daemon> {
        let mut daemon =
            self.spawn("mirrorctl", &self.manager_arguments("cluster.toml", "manager"), "manager.log")?;
        until("the manager to listen", || {
            ensure!(daemon.runs()?, "the manager ended: {}", daemon.log());
            Ok(std::net::TcpStream::connect(self.manager_address()).ok())
        })?;
        Ok(daemon)
    }

    /// Runs a manager, which has to end by itself. Only errors are logged.
    pub fn manager_ends(&self, config: &str, place: &str) -> anyhow::Result<Ended> {
        let mut command = self.command("mirrorctl", &self.manager_arguments(config, place));
        finish(command.env("UBLK_MIRROR_LOG", "error"))
    }

    fn manager_arguments(&self, config: &str, place: &str) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        ["--config", &path(config), "manager", "run", "--state-dir", &path(place)].map(str::to_owned).to_vec()
    }

    /// Runs `mirrorctl` to its end.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<Ended> {
        self.ctl_with("cluster.toml", arguments)
    }

    /// The same with another cluster file.
    pub fn ctl_with(&self, config: &str, arguments: &[&str]) -> anyhow::Result<Ended> {
        let config = self.path(config).display().to_string();
        let arguments: Vec<String> =
            ["--config", &config].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
        finish(&mut self.command("mirrorctl", &arguments))
    }

    /// `mirrorctl cluster create` once all nodes have registered.
    pub fn create(&self) -> anyhow::Result<Ended> {
        until("both nodes to register", || {
            let ended = self.ctl(&["cluster", "create"])?;
            Ok((!ended.err.contains("not connected")).then_some(ended))
        })
    }

    /// Makes a cluster that serves n1-d1.
    pub fn cluster(&self) -> anyhow::Result<(Daemon, Daemon, Daemon)> {
        let daemons = (self.manager()?, self.node("n1")?, self.node("n2")?);
        let created = self.create()?;
        ensure!(created.code == 0, "{created:?}");
        self.uri("n1-d1")?;
        Ok(daemons)
    }

    /// Where a device is exported, once it is.
    pub fn uri(&self, device: &str) -> anyhow::Result<String> {
        until(&format!("{device} to be exported"), || {
            let listed = self.ctl(&["device", "list", "--json"])?;
            let devices: serde_json::Value = serde_json::from_str(&listed.out).unwrap_or_default();
            let mut devices = devices.as_array().into_iter().flatten();
            let found = devices.find(|found| found["name"] == device);
            Ok(found.and_then(|found| found["uri"].as_str()).map(str::to_owned))
        })
    }

    /// The map's version.
    pub fn map_version(&self) -> anyhow::Result<u64> {
        let map: serde_json::Value = serde_json::from_str(&self.ctl(&["map", "show", "--json"])?.out)?;
        map["version"].as_u64().context("no version")
    }
}

fn finish(command: &mut Command) -> anyhow::Result<Ended> {
    let output = command.output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().context("ended by a signal")?;
    Ok(Ended { code, out: text(&output.stdout), err: text(&output.stderr) })
}

/// All of 127.0.0.0/8 is this machine: labs of processes side by side need not share an address, and those
/// of one process have ports of their own.
fn own_address() -> (String, u16) {
    static LABS: AtomicU16 = AtomicU16::new(0);
    let pid = std::process::id().to_be_bytes();
    // Not below 127.64, where people have things of their own.
    let host = format!("127.{}.{}.{}", 64 | pid[1] & 0x3f, pid[2], pid[3]);
    (host, 7300 + 10 * LABS.fetch_add(1, Ordering::Relaxed))
}
