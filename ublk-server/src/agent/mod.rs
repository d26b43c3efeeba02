//! The node's agent: control traffic, and what starts and stops on the manager's word.
//!
//! One task owns all state and takes one input after the other; connections, the I/O thread and the
//! ublk control thread are tasks and threads of their own that send it inputs. Nothing here is in
//! the way of a request.

mod disks;
mod exports;
mod in_use;
mod io;
mod lanes;
mod load;
mod manager;
mod nbd;
mod retry;
mod state;
mod told;
mod ublk;

pub use state::StateError;

use crate::driver::command::{Event, ThreadReport};
use crate::storage::prepare;
use anyhow::Context;
use disks::Disks;
use exports::Exports;
use io::IoHandle;
use lanes::Lanes;
use manager::Membership;
use mirror_net::config::{ClusterFile, Frontend, NodeFile, NodePolicy};
use mirror_net::control::{
    FormatDisk, FormatOrder, Life, ManagerMessage, NodeMessage, NodeReport, REPORT_MS, Registration,
    SurveyAnswer, SurveyResult,
};
use mirror_net::engine::Me;
use mirror_net::engine::action::Report;
use mirror_net::ids::{ClusterId, DiskId, ExporterSession, MapVersion, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::{ClusterKey, Identity, Role};
use rand::TryRngCore;
use state::StateDir;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// For devices to be written back and stopped when the daemon ends.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// How long a disk that was added, and that the cluster file need not name, may take to appear when a machine starts.
const ADDED_WITHIN: Duration = Duration::from_secs(10);

/// How a daemon was started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster file's path, for messages.
    pub config: PathBuf,
    /// The node's name in it.
    pub node: String,
    /// Overrides the file's frontend.
    pub frontend: Option<Frontend>,
    /// Where the newest adopted map is kept.
    pub state_dir: PathBuf,
    /// Where sockets and ublk records are kept: gone with a reboot.
    pub run_dir: PathBuf,
    /// Memory for requests under way, in bytes.
    pub buffer_bytes: usize,
}

/// What reaches the agent.
pub(crate) enum Input {
    /// A connection to the manager stands.
    ManagerUp(mpsc::UnboundedSender<NodeMessage>),
    /// The manager said something.
    Manager(ManagerMessage),
    /// The connection to the manager is gone.
    ManagerDown(String),
    /// A lane's handshake is done.
    Lane(lanes::NewLane),
    /// An NBD client's negotiation is done.
    NbdClient(nbd::NewClient),
    /// The I/O thread said something.
    Io(Event),
    /// The ublk control thread said something.
    Ublk(ublk::Done),
}

/// 32 bytes that nobody can guess.
pub(crate) fn nonce() -> [u8; 32] {
    let mut bytes = [0; 32];
    rand::rngs::OsRng.try_fill_bytes(&mut bytes).expect("the kernel has random numbers");
    bytes
}

/// What is the same for every connection of this process.
#[derive(Clone)]
pub(crate) struct Common {
    pub key: ClusterKey,
    pub node: String,
    pub process: ProcessId,
}

impl Common {
    pub fn identity(&self, cluster: Option<ClusterId>) -> Identity {
        Identity { role: Role::Node, name: self.node.clone(), cluster, process: self.process }
    }
}

struct Agent {
    common: Common,
    membership: Membership,
    file: NodeFile,
    state: StateDir,
    disks: Disks,
    inputs: mpsc::UnboundedSender<Input>,
    manager: Option<mpsc::UnboundedSender<NodeMessage>>,
    /// The manager has taken us in.
    registered: bool,
    io: Option<IoHandle>,
    lanes: Lanes,
    exports: Exports,
    openers: in_use::Openers,
    loads: load::Loads,
    map: Option<Arc<DistributionMap>>,
    exporter_session: ExporterSession,
    /// How the manager wants other nodes' copies to be treated.
    policy: NodePolicy,
    adopted: MapVersion,
    /// What processes of this node adopted, as kept in the state directory.
    lives: Vec<Life>,
    buffer_bytes: usize,
    /// Disks that failed in this process's life, and why.
    failed_disks: BTreeMap<DiskId, String>,
    /// A problem of this node that the operator has to know of.
    trouble: Option<String>,
    /// The newest map has no place for this node, which had one.
    removed: bool,
}

/// Why the daemon ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It was told to.
    Told,
    /// Its node was removed from the cluster: starting it again leads to nothing.
    Removed,
}

/// Runs the daemon until it is told to stop, or has nothing to serve any more.
pub async fn run(options: Options) -> anyhow::Result<End> {
    let text = std::fs::read_to_string(&options.config)
        .with_context(|| format!("cannot read the cluster file {}", options.config.display()))?;
    let file = ClusterFile::parse(&text, &options.config.to_string_lossy())?;
    let names = || file.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
    let mut node = file.node(&options.node).cloned().with_context(|| {
        format!(
            "{} has no node {:?}, only {}: give one of them as --node",
            options.config.display(),
            options.node,
            names()
        )
    })?;
    node.frontend = options.frontend.unwrap_or(node.frontend);
    let key_text = std::fs::read_to_string(&file.key_file).with_context(|| {
        format!(
            "cannot read the cluster key {}: copy it from where `mirrorctl key new` made it",
            file.key_file.display()
        )
    })?;
    let mode = std::fs::metadata(&file.key_file).map_or(0, |metadata| metadata.mode());
    anyhow::ensure!(
        mode & 0o006 == 0,
        "{0}: everybody on this machine can use the cluster key; type: chmod 600 {0}",
        file.key_file.display()
    );
    let key = ClusterKey::parse(&key_text).with_context(|| format!("{}", file.key_file.display()))?;
    let process = ProcessId(u64::from_le_bytes(*nonce().first_chunk().expect("32 bytes")));
    let common = Common { key, node: node.name.clone(), process };

    let state = StateDir::open(&options.state_dir)?;
    let (adopted, cluster) =
        state.kept().map_or((MapVersion(0), None), |map| (map.version, Some(map.cluster)));
    let lives = state.lives();
    let (sender, mut inputs) = mpsc::unbounded_channel();
    let lanes = Lanes::listen(&node.address, common.clone(), sender.clone()).await?;
    let mut disks = Disks::open(&node.disks, state.added_disks()?, ADDED_WITHIN)?;
    cluster.into_iter().for_each(|cluster| disks.recover(cluster));
    let exports = Exports::new(&node, &options.run_dir, sender.clone()).await?;
    let membership = Membership::default();
    membership.set(cluster);
    manager::start(file.managers.clone(), common.clone(), membership.clone(), sender.clone());
    tracing::info!(node = node.name, %process, frontend = exports.frontend().as_str(), "started, waiting for the manager");

    let mut agent = Agent {
        common,
        membership,
        file: node,
        state,
        disks,
        inputs: sender,
        manager: None,
        registered: false,
        io: None,
        lanes,
        exports,
        openers: in_use::Openers::default(),
        loads: load::Loads::default(),
        map: None,
        exporter_session: ExporterSession(0),
        policy: NodePolicy::default(),
        lives,
        adopted,
        buffer_bytes: options.buffer_bytes,
        failed_disks: BTreeMap::new(),
        trouble: None,
        removed: false,
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut report = tokio::time::interval(Duration::from_millis(REPORT_MS));
    report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            input = inputs.recv() => {
                let Some(input) = input else { break };
                agent.handle(input).await?;
                if agent.removed {
                    break;
                }
            }
            _ = report.tick() => {
                agent.start_exports();
                agent.report().await;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("stopping");
    let removed = agent.removed.then(|| agent.common.node.clone());
    agent.stop(&mut inputs).await?;
    Ok(match removed {
        None => End::Told,
        Some(node) => {
            tracing::warn!(
                node,
                "removed from the cluster: nothing is left to be served here; disable ublk-server on this machine"
            );
            End::Removed
        }
    })
}

impl Agent {
    async fn handle(&mut self, input: Input) -> anyhow::Result<()> {
        match input {
            Input::ManagerUp(sender) => {
                self.manager = Some(sender);
                self.register();
            }
            Input::Manager(message) => self.manager_said(message).await?,
            Input::ManagerDown(reason) => {
                self.manager = None;
                // Of a manager that does not lead its connection's task has told.
                if std::mem::take(&mut self.registered) {
                    tracing::warn!(
                        reason,
                        "no connection to the manager; I/O goes on as long as all copies are well"
                    );
                }
            }
            Input::Lane(lane) => {
                // Without a map it is dropped: whoever dialled it tries again until the map is here.
                if let Some(io) = &self.io {
                    self.lanes.established(lane, io);
                }
            }
            Input::NbdClient(client) => {
                if let Some(io) = &self.io {
                    self.exports.client(client, io);
                }
            }
            Input::Io(event) => self.io_said(event)?,
            Input::Ublk(done) => {
                self.exports.ublk_done(Instant::now(), done);
                self.start_exports();
            }
        }
        Ok(())
    }

    fn tell_manager(&self, message: NodeMessage) {
        if let Some(manager) = &self.manager {
            // If the connection is going down just now, the next registration tells all of it again.
            let _ = manager.send(message);
        }
    }

    fn register(&mut self) {
        let disks = self.disks.inventory();
        self.tell_manager(NodeMessage::Register(Registration {
            node: self.common.node.clone(),
            process: self.common.process,
            adopted: self.adopted,
            lives: self.lives.clone(),
            address: self.file.address.clone(),
            disks,
        }));
    }

    async fn manager_said(&mut self, message: ManagerMessage) -> anyhow::Result<()> {
        match message {
            ManagerMessage::Registered { exporter_session, policy } => {
                tracing::info!(%exporter_session, "registered with the manager");
                (self.exporter_session, self.policy) = (exporter_session, policy);
                self.registered = true;
                self.io.iter().for_each(IoHandle::forget_surveys);
                if let Some(io) = &self.io {
                    io.exporter_session(exporter_session);
                    io.policy(policy);
                }
                // A manager that was restarted does not know what the one before was told; requests for
                // stale copies are repeated by the engine until the map has them.
                for (disk, reason) in self.failed_disks.clone() {
                    self.tell_manager(NodeMessage::DiskFailed { disk, reason });
                }
            }
            ManagerMessage::Format(order) => {
                let result = self.format(order.clone()).await;
                if let Err(error) = &result {
                    tracing::error!(error = format!("{error:#}"), "formatting was refused");
                }
                let attach = self.disks.attachments(&order);
                let error = result.err().map(|error| format!("{error:#}"));
                self.tell_manager(NodeMessage::Formatted { error, attach });
            }
            ManagerMessage::Look { name, path } => {
                let disks = self.disks.clone();
                let look = move || Ok(disks.find(&name, Path::new(&path))?.inventory());
                let found = meanwhile(look, async || self.report().await).await?;
                let found = found.map_err(|error: anyhow::Error| format!("{error:#}"));
                self.tell_manager(NodeMessage::Looked { found });
            }
            ManagerMessage::Waiting { why } => tracing::warn!(why, "this node is no part of the cluster"),
            ManagerMessage::Map { map } => self.new_map(Arc::new(*map)).await?,
            ManagerMessage::Export { device, generation } => {
                self.exports.allow(device, generation);
                self.start_exports();
            }
            ManagerMessage::Refused { reason } => {
                // Another process, or another cluster's disks: going on would only repeat it.
                anyhow::bail!("the manager refused this node: {reason}");
            }
            ManagerMessage::TellMap => {
                let map = self.state.kept().map(Box::new);
                self.tell_manager(NodeMessage::KeptMap { map });
            }
            ManagerMessage::Survey { order, kind, runs } => match &self.io {
                Some(io) => io.survey(order, kind, runs),
                None => {
                    let refused = |run| SurveyAnswer { run, result: SurveyResult::Refused };
                    let answers = runs.into_iter().map(refused).collect();
                    self.tell_manager(NodeMessage::Surveyed { order, answers });
                }
            },
            // The connection's own task follows it.
            ManagerMessage::NotLeader { .. } => {}
        }
        Ok(())
    }

    async fn format(&mut self, order: FormatOrder) -> anyhow::Result<()> {
        if let [FormatDisk { name, path: Some(path), disk: id, .. }] = &order.disks[..] {
            let (name, path, id) = (name.clone(), PathBuf::from(path), *id);
            let (node, disks) = (self.common.node.clone(), self.disks.clone());
            let format = move || {
                let candidate = disks.find(&name, &path)?;
                disks::format(&order, &node, &candidate)?;
                Ok::<_, anyhow::Error>(candidate)
            };
            let candidate = meanwhile(format, async || self.report().await).await??;
            return self.disks.add(candidate, id, &self.state);
        }
        anyhow::ensure!(
            self.io.is_none(),
            "its disks are in use for the cluster that it serves: stop the daemon, empty its state directory, start it again"
        );
        if order.check_only {
            return Ok(prepare::check(&order, &self.disks.candidates())?);
        }
        // What is known of a cluster that these disks were part of is history now.
        self.state.forget()?;
        self.disks.forget_added();
        self.membership.set(None);
        self.adopted = MapVersion(0);
        let (name, disks) = (self.common.node.clone(), self.disks.candidates());
        let format = move || prepare::format_all(&order, &name, &disks);
        meanwhile(format, async || self.report().await).await??;
        Ok(())
    }

    async fn new_map(&mut self, map: Arc<DistributionMap>) -> anyhow::Result<()> {
        if let Some(mine) = &self.map {
            // A cluster made anew needs a daemon that has nothing of the old one in its memory.
            anyhow::ensure!(
                mine.cluster == map.cluster,
                "the manager's map is of another cluster ({}) than this daemon has served: restart it",
                map.cluster
            );
            if mine.version >= map.version {
                return Ok(());
            }
        }
        let Some(me) = map.node_named(&self.common.node).map(|node| node.id) else {
            self.removed = self.map.is_some();
            tracing::info!(version = %map.version, "this node is not in the map");
            return Ok(());
        };
        let removed = self.forget_removed(&map)?;
        self.state.save_map(&map)?;
        self.membership.set(Some(map.cluster));
        match self.io.is_some() {
            true => self.add_disks(me, &map).await?,
            false if !self.start_io(me, &map).await? => return Ok(()),
            false => {}
        }
        self.lanes.follow(&map, me, &self.inputs);
        self.map = Some(Arc::clone(&map));
        if let Some(io) = &self.io {
            // Claims that are gone end before the map is adopted: the report of that is the manager's
            // word to the next exporter.
            self.exports.follow(&map, me, io);
            io.map(map);
            removed.into_iter().for_each(|disk| io.release_disk(disk));
        }
        Ok(())
    }

    /// Disks of this node that a new map does not list any more are written nothing from then on.
    fn forget_removed(&mut self, map: &DistributionMap) -> anyhow::Result<Vec<DiskId>> {
        let Some(before) = self.map.clone() else { return Ok(Vec::new()) };
        let me = before.node_named(&self.common.node).map(|node| node.id);
        let mine = before.disks.iter().filter(|disk| Some(disk.node) == me);
        let removed: Vec<_> = mine.filter(|disk| map.disk(disk.id).is_none()).collect();
        for disk in &removed {
            self.disks.removed(disk.id, &disk.name, &self.state)?;
            tracing::warn!(
                disk = disk.name,
                "removed from the cluster: take it out of the cluster file of this machine, if it is there"
            );
        }
        Ok(removed.into_iter().map(|disk| disk.id).collect())
    }

    /// Opens the disks and starts the I/O thread; false if it does not start.
    async fn start_io(&mut self, me: NodeId, map: &Arc<DistributionMap>) -> anyhow::Result<bool> {
        let opened = self.open_disks(map, true).await?;
        let me = Me { node: me, process: self.common.process };
        let (key, map) = (self.common.key.clone(), Arc::clone(map));
        let (inputs, buffer_bytes) = (self.inputs.clone(), self.buffer_bytes);
        let serves_ublk = self.exports.frontend() == Frontend::Ublk;
        let start = move || IoHandle::start(&key, me, &map, opened, inputs, buffer_bytes, serves_ublk);
        match meanwhile(start, async || self.report().await).await? {
            Ok(io) => {
                io.exporter_session(self.exporter_session);
                io.policy(self.policy);
                self.io = Some(io);
                Ok(true)
            }
            Err(error) => {
                tracing::error!(%error, "the I/O thread did not start");
                self.disks.let_go();
                self.trouble = Some(error.to_string());
                Ok(false)
            }
        }
    }

    /// Gives the I/O thread disks that were added and that this map lists, before it adopts it.
    async fn add_disks(&mut self, me: NodeId, map: &Arc<DistributionMap>) -> anyhow::Result<()> {
        if self.disks.awaits(map, me) {
            let opened = self.open_disks(map, false).await?;
            for disk in opened {
                tracing::info!(disk = %disk.0.id, "a disk was added");
                if let Some(io) = &self.io {
                    io.add_disk(disk);
                }
            }
        }
        Ok(())
    }

    /// Opens disks for the I/O thread; what cannot be used is left out and told.
    async fn open_disks(
        &mut self,
        map: &Arc<DistributionMap>,
        first: bool,
    ) -> anyhow::Result<Vec<disks::Opened>> {
        let (mut disks, map) = (self.disks.clone(), Arc::clone(map));
        let open = move || {
            let opened = disks.open_for_service(&map, first);
            (disks, opened)
        };
        let (disks, (opened, troubles)) = meanwhile(open, async || self.report().await).await?;
        self.disks = disks;
        self.disks.save(&self.state)?;
        if first {
            self.trouble = troubles.first().map(|(_, trouble)| trouble.clone());
        }
        for (disk, trouble) in troubles {
            tracing::error!(trouble, "a disk is left out");
            if let Some(disk) = disk {
                self.failed_disks.insert(disk, trouble.clone());
                self.tell_manager(NodeMessage::DiskFailed { disk, reason: trouble });
            }
        }
        Ok(opened)
    }

    /// Starts what may be exported and is not.
    fn start_exports(&mut self) {
        if let (Some(map), Some(io)) = (&self.map, &self.io)
            && let Some(me) = map.node_named(&self.common.node)
        {
            self.exports.start_due(Instant::now(), map, me.id, io);
        }
    }

    fn io_said(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Report(Report::Adopted { version }) => {
                tracing::info!(%version, "map adopted");
                self.adopted = version;
                Life::note(&mut self.lives, self.common.process, version);
                self.state.save_lives(&self.lives)?;
                self.exports.adopted(version);
                self.start_exports();
                self.tell_manager(NodeMessage::Adopted { version });
            }
            Event::DiskReleased(disk) => {
                tracing::info!(%disk, "a removed disk is let go of");
                self.failed_disks.remove(&disk);
                self.disks.released(disk);
                self.tell_manager(NodeMessage::DiskReleased { disk });
            }
            Event::Report(Report::AskStale { peer, version, cause }) => {
                tracing::warn!(
                    node = self.node_name(peer),
                    cause,
                    "its copies may lack writes: asking the manager to record them stale"
                );
                self.tell_manager(NodeMessage::AskStale { peer, version, cause });
            }
            Event::Report(Report::AskSlow { peer, version, cause }) => {
                tracing::warn!(
                    node = self.node_name(peer),
                    cause,
                    "its disks hang: asking the manager to go on without its copies"
                );
                self.tell_manager(NodeMessage::AskSlow { peer, version, cause });
            }
            Event::Report(Report::AskSyncing { peer, version }) => {
                tracing::info!(
                    node = self.node_name(peer),
                    "its stale copies can be filled: asking the manager"
                );
                self.tell_manager(NodeMessage::AskSyncing { peer, version });
            }
            Event::Report(Report::AskInSync { peer, device, version }) => {
                tracing::info!(
                    node = self.node_name(peer),
                    %device,
                    "its copies are equal to ours: asking the manager to record them in sync"
                );
                self.tell_manager(NodeMessage::AskInSync { peer, device, version });
            }
            Event::Report(Report::DiskFailed { disk, reason }) => {
                tracing::error!(%disk, reason, "a disk failed");
                self.failed_disks.insert(disk, reason.clone());
                self.tell_manager(NodeMessage::DiskFailed { disk, reason });
            }
            Event::LaneClosed { peer, session, reason } => {
                let node = self.node_name(peer);
                if self.lanes.closed(peer, session) {
                    tracing::warn!(node, session, reason, "session ended");
                } else {
                    tracing::info!(node, session, reason, "a connection that was replaced has ended");
                }
            }
            Event::Resynced(resync) => {
                let map = self.map.as_ref();
                let device = map.and_then(|map| map.device(resync.device)).map(|device| device.name.clone());
                tracing::info!(
                    device = device.unwrap_or_else(|| resync.device.to_string()),
                    node = self.node_name(resync.peer),
                    moved_bytes = resync.moved_bytes,
                    "its copies are equal"
                );
            }
            Event::Surveyed(order, answers) => self.tell_manager(NodeMessage::Surveyed { order, answers }),
            Event::MapRefused(reason) => {
                tracing::error!(reason, "the newest map cannot be adopted");
                self.trouble = Some(reason);
            }
            Event::UblkRefused(device, errno) => {
                tracing::error!(%device, %errno, "the kernel refused an entry of this device");
                self.exports.refused(Instant::now(), device, format!("the kernel refused an entry: {errno}"));
            }
            Event::UblkDrained(device) => self.exports.drained(device),
            Event::Ended(error) => {
                let error = error.unwrap_or_else(|| "for no reason".to_owned());
                anyhow::bail!("the I/O thread ended: {error}");
            }
        }
        Ok(())
    }

    /// For people.
    fn node_name(&self, node: NodeId) -> String {
        self.map.as_ref().map_or_else(|| node.to_string(), |map| map.node_name(node))
    }

    async fn report(&mut self) {
        let thread = match &self.io {
            Some(io) => io.report().await,
            None => None,
        };
        // Whether or not there is a manager to be told.
        for found in thread.iter().flat_map(|thread| &thread.devices) {
            self.exports.losses(found.device, found.loss_told);
        }
        if self.manager.is_none() {
            return;
        }
        let mut report = NodeReport {
            adopted: self.adopted,
            exports: self.exports.reports(Instant::now()),
            ..NodeReport::default()
        };
        let paths = report.exports.iter().filter_map(|export| export.path.as_deref());
        self.openers.look(Instant::now(), paths).await;
        for export in &mut report.exports {
            let of_device = |thread: &ThreadReport| {
                thread
                    .devices
                    .iter()
                    .find(|found| found.device == export.device)
                    .map_or(0, |found| found.clients)
            };
            export.in_use = match (&export.path, thread.as_ref().map(of_device)) {
                (Some(path), _) => self.openers.user(path),
                (None, None) => Some("nobody answers who is connected".to_owned()),
                (None, Some(0)) => None,
                (None, Some(1)) => Some("an NBD client is connected".to_owned()),
                (None, Some(clients)) => Some(format!("{clients} NBD clients are connected")),
            };
        }
        if let Some(thread) = thread {
            for export in &mut report.exports {
                if let Some(found) = thread.devices.iter().find(|found| found.device == export.device) {
                    (export.requests, export.pending) = (found.completed, found.pending);
                }
            }
            report.sessions = thread.sessions;
            report.waiting = thread.waiting;
            report.resyncs = thread.resyncs;
            report.loads = self.loads.observe(Instant::now(), &thread.disks);
        }
        report.waiting.extend(self.trouble.clone());
        self.tell_manager(NodeMessage::Report(report));
    }

    /// Stops devices that nobody uses, leaves the others for the next process to recover.
    async fn stop(mut self, inputs: &mut mpsc::UnboundedReceiver<Input>) -> anyhow::Result<()> {
        self.exports.stop_all(self.io.as_ref());
        if self.io.is_none() {
            return Ok(());
        }
        let patience = tokio::time::sleep(STOP_PATIENCE);
        tokio::pin!(patience);
        let mut stopped = false;
        loop {
            if !stopped && self.exports.all_stopped() {
                self.io.iter().for_each(IoHandle::stop);
                stopped = true;
            }
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Io(Event::Ended(None))) => return Ok(()),
                    Some(Input::Manager(ManagerMessage::Export { .. })) => {}
                    // What is flushed now may need a map in which a partner that is gone has no part.
                    Some(input) => self.handle(input).await?,
                    None => return Ok(()),
                },
                () = &mut patience => {
                    tracing::warn!("requests are still under way; their devices are left to the next start");
                    return Ok(());
                }
            }
        }
    }
}

/// Does what takes long with large disks on a thread of its own. Further inputs wait for it, but reports do not: a node
/// that opens its disks is no node that has failed.
async fn meanwhile<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    mut report: impl AsyncFnMut(),
) -> anyhow::Result<T> {
    let mut work = tokio::task::spawn_blocking(work);
    let mut due = tokio::time::interval(Duration::from_millis(REPORT_MS));
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            done = &mut work => return done.context("a thread that works on the disks died"),
            _ = due.tick() => report().await,
        }
    }
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn a_node_reports_while_it_works_on_its_disks() {
        let (enough, wait) = std::sync::mpsc::channel();
        let mut reports = 0;
        let work = move || wait.recv().expect("the reports go on");
        let report = async || {
            reports += 1;
            if reports == 3 {
                enough.send("opened").expect("the work goes on");
            }
        };
        assert_eq!(super::meanwhile(work, report).await.expect("no panic"), "opened");
    }
}
