//! Bringing a playground up, keeping it, and taking it down.

use super::Wanted;
use super::children::{Process, ProcessMark, last_line};
use super::control::{self, Request};
use super::directory::{Directory, config_path, manager_names, place, socket_path};
use crate::client::{Client, unexpected};
use crate::failure::Failure;
use crate::json::DeviceJson;
use crate::{cluster, device};
use mirror_net::control::{ClusterStatus, OperatorReply, OperatorRequest};
use mirror_net::ids::ProcessId;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpStream, UnixListener};
use tokio::time::{Instant, sleep};

/// How long the manager may take to answer and nodes to register.
const START_MAX: Duration = Duration::from_secs(30);
/// How long devices may take to appear.
const EXPORT_MAX: Duration = Duration::from_secs(60);
/// How long a process may take to end.
const STOP_MAX: Duration = Duration::from_secs(20);
/// A process whose first thread has ended is soon gone as a whole.
const ENDING_MAX: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// A playground that is being brought up, runs, or is being taken down.
pub(super) struct Playground {
    directory: Directory,
    leftovers: Vec<ProcessMark>,
    client: Client,
    managers: Vec<Process>,
    nodes: Vec<Process>,
    listener: Option<UnixListener>,
}

/// `playground --json`.
#[derive(Serialize)]
pub(super) struct RunningJson {
    dir: PathBuf,
    config: PathBuf,
    /// The first of `managers`.
    manager: RunningProcessJson,
    managers: Vec<RunningProcessJson>,
    nodes: Vec<RunningProcessJson>,
    devices: Vec<DeviceJson>,
}

#[derive(Clone, Serialize)]
struct RunningProcessJson {
    name: String,
    pid: u32,
    address: String,
    log: PathBuf,
}

impl RunningJson {
    pub(super) fn text(&self) -> String {
        let dir = self.dir.display();
        let mut table = crate::output::table(&["NODE", "PID", "ADDRESS", "LOG"], &[1]);
        for process in self.managers.iter().chain(&self.nodes) {
            table.add_row(vec![
                process.name.clone(),
                process.pid.to_string(),
                process.address.clone(),
                process.log.display().to_string(),
            ]);
        }
        format!(
            "{}\n{}\nmirrorctl status --dir {dir}\nmirrorctl playground kill n1 --dir {dir}\nctrl-C ends it\n",
            crate::output::table_text(&table),
            device::text(&self.devices)
        )
    }
}

/// The daemon's program: beside our own, or in the search path.
fn server_program() -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("ublk-server")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let searched = std::env::split_paths(&path).map(|dir| dir.join("ublk-server"));
    beside.into_iter().chain(searched).find(|program| program.is_file()).ok_or_else(|| {
        Failure::new("there is no ublk-server beside mirrorctl nor in PATH: install or build both")
    })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Playground {
    /// Makes the files; nothing runs yet.
    pub(super) fn prepare(wanted: Wanted) -> Result<Self, Failure> {
        let server = server_program()?;
        let own = std::env::current_exe()
            .map_err(|error| Failure::new(format!("cannot find mirrorctl's own program: {error}")))?;
        let (directory, leftovers) = Directory::make(&wanted)?;
        let dir = directory.path();
        let config = text(&config_path(dir));
        let of = |name: &str, inner: &str| text(&place(dir, name).join(inner));
        let addresses = &directory.file.managers;
        let names = manager_names(addresses.len());
        let managers = names.iter().zip(addresses).map(|(name, address)| {
            let state = of(name, "state");
            let arguments =
                ["--config", &config, "manager", "run", "--state-dir", &state, "--address", address];
            let arguments = arguments.map(str::to_owned).to_vec();
            Process::new(name, &own, arguments, place(dir, name).join("log"))
        });
        let managers = managers.collect();
        let nodes = directory.nodes().iter().map(|node| {
            let (state, run) = (of(&node.name, "state"), of(&node.name, "run"));
            let arguments =
                ["run", "--config", &config, "--node", &node.name, "--state-dir", &state, "--run-dir", &run];
            let arguments = arguments.map(str::to_owned).to_vec();
            Process::new(&node.name, &server, arguments, place(dir, &node.name).join("log"))
        });
        let nodes = nodes.collect();
        let client = Client::from_file(&directory.file).inspect_err(|_| directory.remove())?;
        Ok(Self { directory, leftovers, client, managers, nodes, listener: None })
    }

    /// Starts everything, makes the cluster, waits for the devices.
    pub(super) async fn up(&mut self) -> Result<RunningJson, Failure> {
        for leftover in std::mem::take(&mut self.leftovers) {
            leftover.kill_leftover().await;
        }
        for manager in &mut self.managers {
            manager.spawn()?;
        }
        self.remember()?;
        self.status_until(START_MAX, "the manager to answer", |_| Ok(true)).await?;
        for node in &mut self.nodes {
            node.spawn()?;
        }
        self.remember()?;
        let wanted = self.nodes.len();
        self.status_until(START_MAX, "every node to register", |status| {
            Ok(status.nodes.iter().filter(|node| node.up).count() == wanted)
        })
        .await?;
        cluster::request(&self.client, self.directory.text.clone(), false).await?;
        let status = self.status_until(EXPORT_MAX, "every device to be exported", exported).await?;
        let path = socket_path(self.directory.path());
        let listener = UnixListener::bind(&path)
            .map_err(|error| Failure::new(format!("cannot listen on {}: {error}", path.display())))?;
        self.listener = Some(listener);
        Ok(self.running(&status))
    }

    fn running(&self, status: &ClusterStatus) -> RunningJson {
        let process = |process: &Process, address: &str| RunningProcessJson {
            name: process.name.clone(),
            pid: process.pid().unwrap_or(0),
            address: address.to_owned(),
            log: process.log.clone(),
        };
        let dir = self.directory.path();
        let nodes = self.nodes.iter().zip(self.directory.nodes());
        let managers = self.managers.iter().zip(&self.directory.file.managers);
        let managers: Vec<_> = managers.map(|(manager, address)| process(manager, address)).collect();
        RunningJson {
            dir: dir.to_owned(),
            config: config_path(dir),
            manager: managers[0].clone(),
            managers,
            nodes: nodes.map(|(node, file)| process(node, &file.address)).collect(),
            devices: DeviceJson::of_status(status),
        }
    }

    fn remember(&self) -> Result<(), Failure> {
        let own = ProcessMark::of("playground", std::process::id());
        let children = self.managers.iter().chain(&self.nodes);
        let marks = children.filter_map(|process| ProcessMark::of(&process.name, process.pid()?));
        self.directory.remember(own.into_iter().chain(marks).collect())
    }

    async fn status(&self) -> Result<ClusterStatus, Failure> {
        match self.client.ask(&OperatorRequest::Status).await? {
            OperatorReply::Status(status) => Ok(*status),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Asks for the status until it is as wanted, a process ends, or time is up.
    async fn status_until(
        &mut self,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&ClusterStatus) -> Result<bool, String>,
    ) -> Result<ClusterStatus, Failure> {
        let started = Instant::now();
        loop {
            let asked = self.status().await;
            let why = match asked {
                Ok(status) => match wanted(&status) {
                    Ok(true) => return Ok(status),
                    Ok(false) => None,
                    Err(why) => Some(why),
                },
                Err(failure) => Some(failure.message),
            };
            for process in self.managers.iter_mut().chain(&mut self.nodes) {
                if let Some(line) = process.unexpected_end() {
                    return Err(Failure::new(line));
                }
            }
            if started.elapsed() > limit {
                let why = why.unwrap_or_else(|| self.last_words());
                return Err(Failure::new(format!("waited {} s for {what}: {why}", limit.as_secs())));
            }
            sleep(POLL).await;
        }
    }

    fn last_words(&self) -> String {
        let words: Vec<String> =
            self.nodes.iter().map(|node| format!("{}: {}", node.name, last_line(&node.log))).collect();
        words.join("; ")
    }

    /// Answers requests and tells of processes that end, for ever.
    pub(super) async fn serve(&mut self) -> Result<(), Failure> {
        loop {
            let client = match &self.listener {
                Some(listener) => control::accept(listener, Duration::from_millis(250)).await,
                None => return Err(Failure::new("the playground is not up")),
            };
            let dir = self.directory.path().display().to_string();
            for process in self.managers.iter_mut().chain(&mut self.nodes) {
                if let Some(line) = process.unexpected_end() {
                    let name = &process.name;
                    eprintln!(
                        "mirrorctl: {line}; start it again with `mirrorctl playground start {name} --dir {dir}`"
                    );
                }
            }
            if let Some(mut stream) = client
                && let Some(request) = control::request(&mut stream).await
            {
                let result = self.obey(request).await;
                control::answer(stream, result).await;
            }
        }
    }

    async fn obey(&mut self, request: Request) -> Result<String, Failure> {
        match request {
            Request::Kill { name } => {
                let process = self.process(&name)?;
                if process.ended().is_some() || process.pid().is_none() {
                    return Err(Failure::new(format!("{name} does not run")));
                }
                process.kill().await;
                self.remember()?;
                Ok(format!("{name} killed"))
            }
            Request::Start { name } => self.start(&name).await,
        }
    }

    fn process(&mut self, name: &str) -> Result<&mut Process, Failure> {
        let names = self.managers.iter().chain(&self.nodes);
        let names: Vec<String> = names.map(|process| process.name.clone()).collect();
        self.managers.iter_mut().chain(&mut self.nodes).find(|process| process.name == name).ok_or_else(
            || Failure::new(format!("there is no {name} in this playground, there are {}", names.join(", "))),
        )
    }

    async fn start(&mut self, name: &str) -> Result<String, Failure> {
        let before = self.process_id(name).await;
        let process = self.process(name)?;
        let asked = Instant::now();
        while process.is_ending() && process.ended().is_none() && asked.elapsed() < ENDING_MAX {
            sleep(POLL).await;
        }
        if process.ended().is_none() && process.pid().is_some() {
            return Err(Failure::new(format!("{name} runs already")));
        }
        process.spawn()?;
        self.remember()?;
        let started = Instant::now();
        loop {
            let up = match self.manager_address(name) {
                // One that does not lead says so; a single one leads.
                Some(address) if self.managers.len() > 1 => TcpStream::connect(address).await.is_ok(),
                Some(_) => self.status().await.is_ok(),
                None => self.process_id(name).await.is_some_and(|process| Some(process) != before),
            };
            let process = self.process(name)?;
            if let Some(line) = process.unexpected_end() {
                return Err(Failure::new(line));
            }
            if up {
                return Ok(format!("{name} started, process {}", process.pid().unwrap_or(0)));
            }
            if started.elapsed() > START_MAX {
                let line = last_line(&process.log);
                return Err(Failure::new(format!("{name} has started but not registered: {line}")));
            }
            sleep(POLL).await;
        }
    }

    /// Where the manager of that name listens.
    fn manager_address(&self, name: &str) -> Option<&str> {
        let mut managers = self.managers.iter().zip(&self.directory.file.managers);
        managers.find(|(manager, _)| manager.name == name).map(|(_, address)| address.as_str())
    }

    /// The process under which a node is known to the manager and up.
    async fn process_id(&self, name: &str) -> Option<ProcessId> {
        let status = self.status().await.ok()?;
        status.nodes.iter().find(|node| node.name == name && node.up)?.process
    }

    async fn remove_devices(&self) {
        let Ok(server) = server_program() else { return };
        for node in &self.nodes {
            let run = place(self.directory.path(), &node.name).join("run");
            // A daemon keeps a record of each ublk device until that is gone.
            let mut records = std::fs::read_dir(run.join(&node.name)).into_iter().flatten().flatten();
            if records.any(|entry| entry.path().extension().is_some_and(|extension| extension == "json"))
                && let Err(error) = remove_devices_of(&server, &node.name, &run).await
            {
                eprintln!("mirrorctl: devices of {} are left behind: {error}", node.name);
            }
        }
    }

    /// Ends everything, nodes before the manager, and takes the files away.
    pub(super) async fn down(&mut self) {
        for node in &mut self.nodes {
            node.terminate();
        }
        let deadline = Instant::now() + STOP_MAX;
        for node in &mut self.nodes {
            node.wait(deadline.saturating_duration_since(Instant::now())).await;
        }
        for manager in &mut self.managers {
            manager.terminate();
        }
        for manager in &mut self.managers {
            manager.wait(STOP_MAX).await;
        }
        self.remove_devices().await;
        self.listener = None;
        self.directory.remove();
    }
}

/// What somebody still used, a mounted file system or a program, would wait for ever: nobody serves it any more.
async fn remove_devices_of(server: &Path, node: &str, run: &Path) -> Result<(), String> {
    let mut command = tokio::process::Command::new(server);
    command.args(["remove-devices", "--node", node, "--run-dir"]).arg(run).kill_on_drop(true);
    let output = tokio::time::timeout(STOP_MAX, command.output()).await;
    let output = output.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
    eprint!("{}", String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Whether every device is to be found somewhere; an error names one that cannot be exported.
fn exported(status: &ClusterStatus) -> Result<bool, String> {
    for report in status.nodes.iter().filter_map(|node| node.report.as_ref()) {
        if let Some(error) = report.exports.iter().find_map(|export| export.error.as_ref()) {
            return Err(error.clone());
        }
    }
    let devices = DeviceJson::of_status(status);
    Ok(!devices.is_empty() && devices.iter().all(|device| device.path.is_some() || device.uri.is_some()))
}
