//! The devices of this node: exported on the manager's word, stopped when the claim is gone.

use super::Input;
use super::io::IoHandle;
use super::nbd::{self, Address, NewClient, Shelf};
use super::retry::Retry;
use super::ublk::{Done, Order, Start, UblkThread};
use crate::frontend::nbd::ExportInfo;
use anyhow::Context;
use mirror_net::config::{Frontend, NbdListen, NodeFile};
use mirror_net::control::ExportReport;
use mirror_net::ids::{ClaimGeneration, DeviceId, MapVersion, NodeId};
use mirror_net::map::{Device, DistributionMap};
use mirror_net::region::masks::REGIONS_PER_SLICE;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;
use tokio::sync::mpsc;

/// How this node exports.
enum Server {
    Ublk(UblkThread),
    Nbd { shelf: Shelf, address: Address },
}

impl Server {
    /// Begins to export a device.
    fn start(&self, entry: &Device, map: &DistributionMap, io: &IoHandle) -> State {
        let size = entry.bytes(map.slice_bytes);
        match self {
            Self::Nbd { shelf, address } => {
                shelf.add(
                    entry.id,
                    ExportInfo {
                        name: entry.name.clone(),
                        description: format!("cluster {}", map.cluster_name),
                        size,
                        block_size_min: entry.block_bytes,
                        block_size_preferred: 4096,
                        read_only: false,
                        rotational: false,
                        fast_zero: false,
                    },
                );
                let uri = address.uri(&entry.name);
                tracing::info!(device = entry.name, uri, "exported");
                State::Exported { path: None, uri: Some(uri) }
            }
            Self::Ublk(thread) => {
                thread.order(Order::Start(Start {
                    device: entry.id,
                    name: entry.name.clone(),
                    size,
                    block_bytes: entry.block_bytes,
                    region_bytes: map.slice_bytes / REGIONS_PER_SLICE,
                    generation: entry.claim.generation.0,
                    losses: entry
                        .spans
                        .iter()
                        .map(|span| u64::from(span.loss.0) * u64::from(span.count))
                        .sum(),
                    serve: Box::new(io.ublk_starter()),
                }));
                State::Starting
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    /// The ublk control thread is at it.
    Starting,
    /// Hosts can use it.
    Exported { path: Option<String>, uri: Option<String> },
    /// It is being stopped.
    Stopping,
    /// It could not be started, or the kernel would not go on with it.
    Failed,
}

struct Export {
    generation: ClaimGeneration,
    /// Its size in bytes, as hosts see it.
    size: u64,
    state: State,
    /// What went wrong the last time, until it is exported.
    retry: Option<Retry>,
    /// What its users know of lost writes, as was last noted.
    losses: Option<u64>,
}

/// The devices that this node exports.
pub(super) struct Exports {
    server: Server,
    frontend: Frontend,
    exports: BTreeMap<DeviceId, Export>,
    /// The newest claims that the manager allowed to be exported. It says so once for each connection, and may
    /// do so before the export can start.
    allowed: BTreeMap<DeviceId, ClaimGeneration>,
    /// The map version that the engine of this process acts on.
    adopted: MapVersion,
}

impl Exports {
    /// Prepares the node's frontend; `auto` is ublk where the kernel has it.
    pub async fn new(
        node: &NodeFile,
        run_dir: &Path,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(run_dir).with_context(|| format!("run directory {}", run_dir.display()))?;
        let frontend = match node.frontend {
            Frontend::Auto if kmod::probe::probe().is_ok_and(|verdict| verdict.usable()) => Frontend::Ublk,
            Frontend::Auto => Frontend::Nbd,
            chosen => chosen,
        };
        let server = match frontend {
            Frontend::Ublk => {
                let verdict = kmod::probe::probe().context("looking for ublk")?;
                let problems: Vec<String> = verdict.problems.iter().map(ToString::to_string).collect();
                anyhow::ensure!(
                    verdict.usable(),
                    "this kernel's ublk cannot be used: {}; `ublk-probe` shows more, and `frontend = \"nbd\"` does without",
                    problems.join("; ")
                );
                Server::Ublk(UblkThread::start(&node.name, run_dir, inputs)?)
            }
            Frontend::Nbd | Frontend::Auto => {
                let shelf = Shelf::default();
                let address = match node.nbd {
                    NbdListen::Unix => nbd::listen_unix(&run_dir.join("nbd.sock"), shelf.clone(), inputs)?,
                    NbdListen::Tcp(address) => nbd::listen_tcp(address, shelf.clone(), inputs).await?,
                };
                Server::Nbd { shelf, address }
            }
        };
        Ok(Self {
            server,
            frontend,
            exports: BTreeMap::new(),
            allowed: BTreeMap::new(),
            adopted: MapVersion(0),
        })
    }

    /// What `auto` became.
    pub fn frontend(&self) -> Frontend {
        self.frontend
    }

    /// The manager's word: every primary has adopted this claim.
    pub fn allow(&mut self, device: DeviceId, generation: ClaimGeneration) {
        self.allowed.insert(device, generation);
    }

    /// The engine acts on this map version.
    pub fn adopted(&mut self, version: MapVersion) {
        self.adopted = version;
    }

    /// Starts what was allowed and is not exported: when it was allowed, the engine may not have adopted the
    /// claim, an older export of the device was still being stopped, or it failed.
    pub fn start_due(&mut self, now: Instant, map: &DistributionMap, me: NodeId, io: &IoHandle) {
        for (id, generation) in &self.allowed {
            let Some(device) = map.device(*id).filter(|device| {
                let claim = device.claim;
                // Before the engine acts on the claim it would refuse the first requests.
                claim.node == me && claim.generation == *generation && claim.since <= self.adopted
            }) else {
                continue;
            };
            let export = self.exports.get(id);
            let due = export.is_none_or(|export| {
                export.state == State::Failed && export.retry.as_ref().is_none_or(|retry| retry.is_due(now))
            });
            if due {
                let retry = export.and_then(|export| export.retry.clone());
                let state = self.server.start(device, map, io);
                let size = device.bytes(map.slice_bytes);
                self.exports
                    .insert(*id, Export { generation: *generation, size, state, retry, losses: None });
            }
        }
        self.grow(map, me);
    }

    /// Devices that are longer by now are so for hosts, too, once the engine knows.
    fn grow(&mut self, map: &DistributionMap, me: NodeId) {
        for (id, export) in &mut self.exports {
            let Some(device) = map.device(*id).filter(|device| device.claim.node == me) else { continue };
            let size = device.bytes(map.slice_bytes);
            let known = device.spans.last().is_some_and(|span| self.adopted.0 >= span.epoch.0);
            if size > export.size && known && matches!(export.state, State::Exported { .. }) {
                export.size = size;
                tracing::info!(device = device.name, size, "longer");
                match &self.server {
                    Server::Nbd { shelf, .. } => shelf.grow(*id, size),
                    Server::Ublk(thread) => thread.order(Order::Grow { device: *id, size }),
                }
            }
        }
    }

    /// A new map: devices whose claim moved away are stopped, and what an earlier process left of
    /// devices that are no longer ours as well.
    pub fn follow(&mut self, map: &DistributionMap, me: NodeId, io: &IoHandle) {
        let lost: Vec<DeviceId> = self
            .exports
            .iter()
            .filter(|(id, export)| {
                let claim = map.device(**id).map(|device| device.claim);
                claim.is_none_or(|claim| claim.node != me || claim.generation != export.generation)
            })
            .map(|(id, _)| *id)
            .collect();
        self.allowed.retain(|id, generation| {
            map.device(*id)
                .is_some_and(|device| device.claim.node == me && device.claim.generation == *generation)
        });
        for device in lost {
            tracing::warn!(%device, "this node may not export the device any more: stopping it");
            self.exports.entry(device).and_modify(|export| export.retry = None);
            if let Server::Nbd { shelf, .. } = &self.server {
                shelf.remove(device);
                io.stop_nbd(device);
                self.exports.remove(&device);
            } else {
                self.stop_device(device);
            }
        }
        if let Server::Ublk(thread) = &self.server {
            let mine = map.devices.iter().filter(|device| device.claim.node == me);
            thread.order(Order::Fence { ours: mine.map(|device| device.name.clone()).collect() });
        }
    }

    /// An NBD client's negotiation is done.
    pub fn client(&mut self, client: NewClient, io: &IoHandle) {
        // The export may have been taken off the shelf meanwhile.
        if self.exports.contains_key(&client.device) {
            io.nbd_client(client.device, client.socket, client.session, client.unread);
        }
    }

    /// Stops a ublk device; its held I/O fails.
    pub fn stop_device(&mut self, device: DeviceId) {
        if let (Server::Ublk(thread), Some(export)) = (&self.server, self.exports.get_mut(&device)) {
            export.state = State::Stopping;
            thread.order(Order::Stop { device });
        }
    }

    /// The I/O thread has given up all tags of the device.
    pub fn drained(&mut self, device: DeviceId) {
        if let Server::Ublk(thread) = &self.server {
            thread.order(Order::Delete { device });
        }
    }

    /// The kernel refuses to go on with a device: it is stopped, and started anew later.
    pub fn refused(&mut self, now: Instant, device: DeviceId, reason: String) {
        if let Some(export) = self.exports.get_mut(&device) {
            export.retry = Some(Retry::new(export.retry.take(), now, reason));
        }
        self.stop_device(device);
    }

    /// The ublk control thread is done with something.
    pub fn ublk_done(&mut self, now: Instant, done: Done) {
        match done {
            Done::Started { device, path } => {
                tracing::info!(%device, path, "exported");
                if let Some(export) =
                    self.exports.get_mut(&device).filter(|export| export.state == State::Starting)
                {
                    (export.state, export.retry) = (State::Exported { path: Some(path), uri: None }, None);
                }
            }
            Done::Failed { device, reason } => {
                let export = self.exports.get_mut(&device);
                // If it is to be stopped, the thread has that order still before it.
                let Some(export) = export.filter(|export| export.state == State::Starting) else { return };
                let retry = Retry::new(export.retry.take(), now, reason);
                tracing::error!(%device, reason = retry.describe(now), "cannot be exported");
                (export.state, export.retry) = (State::Failed, Some(retry));
            }
            Done::Gone { device } => match self.exports.get_mut(&device) {
                Some(export) if export.retry.is_some() => export.state = State::Failed,
                _ => drop(self.exports.remove(&device)),
            },
        }
    }

    /// What a device's users know of lost writes is noted for the process after this one; `None` while they have still
    /// to be told.
    pub fn losses(&mut self, device: DeviceId, told: Option<u64>) {
        let Some(export) = self.exports.get_mut(&device) else { return };
        if let (Server::Ublk(thread), Some(losses)) = (&self.server, told)
            && matches!(export.state, State::Exported { .. })
            && export.losses.replace(losses) != Some(losses)
        {
            thread.order(Order::Told { device, losses });
        }
    }

    /// The daemon ends: stops what nobody uses.
    pub fn stop_all(&mut self, io: Option<&IoHandle>) {
        self.allowed.clear();
        match &self.server {
            Server::Nbd { shelf, .. } => {
                for device in std::mem::take(&mut self.exports).into_keys() {
                    shelf.remove(device);
                    if let Some(io) = io {
                        io.stop_nbd(device);
                    }
                }
            }
            Server::Ublk(thread) => {
                for (device, export) in &mut self.exports {
                    (export.state, export.retry) = (State::Stopping, None);
                    thread.order(Order::StopUnused { device: *device });
                }
            }
        }
    }

    /// Whether nothing is exported any more.
    pub fn all_stopped(&self) -> bool {
        self.exports.is_empty()
    }

    /// For the manager.
    pub fn reports(&self, now: Instant) -> Vec<ExportReport> {
        let report = |(device, export): (&DeviceId, &Export)| {
            let mut report = ExportReport {
                device: *device,
                path: None,
                uri: None,
                error: None,
                in_use: None,
                requests: 0,
                pending: 0,
            };
            let trouble = export.retry.as_ref().map(|retry| retry.describe(now));
            match &export.state {
                State::Starting => report.error = Some(trouble.unwrap_or_else(|| "being started".into())),
                State::Stopping => report.error = Some("being stopped".into()),
                State::Failed => report.error = trouble,
                State::Exported { path, uri } => (report.path, report.uri) = (path.clone(), uri.clone()),
            }
            report
        };
        self.exports.iter().map(report).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::tests::map;
    use super::*;
    use std::sync::mpsc::Receiver;
    use std::time::Duration;

    const ME: NodeId = NodeId(1);
    const DEVICE: DeviceId = DeviceId(1);
    const MINUTE: Duration = Duration::from_secs(60);

    struct World {
        exports: Exports,
        orders: Receiver<Order>,
        io: IoHandle,
        map: DistributionMap,
        now: Instant,
    }

    impl World {
        /// A node with the claim on a device, which the manager allows and the engine acts on.
        fn new() -> Self {
            let (thread, orders) = UblkThread::unattended();
            let exports = Exports {
                server: Server::Ublk(thread),
                frontend: Frontend::Ublk,
                exports: BTreeMap::new(),
                allowed: BTreeMap::new(),
                adopted: MapVersion(0),
            };
            let map = map(["127.0.0.1:1", "127.0.0.1:2"]);
            let mut world = Self { exports, orders, io: IoHandle::unattended().0, map, now: Instant::now() };
            world.exports.allow(DEVICE, world.generation());
            world.exports.adopted(world.map.version);
            world
        }

        fn generation(&self) -> ClaimGeneration {
            self.map.device(DEVICE).unwrap().claim.generation
        }

        /// Whether the device is ordered to be started.
        fn starts(&mut self) -> bool {
            self.exports.start_due(self.now, &self.map, ME, &self.io);
            self.orders.try_iter().any(|order| matches!(order, Order::Start(start) if start.device == DEVICE))
        }

        fn done(&mut self, done: Done) {
            self.exports.ublk_done(self.now, done);
        }

        fn error(&self) -> Option<String> {
            self.exports.reports(self.now).into_iter().next()?.error
        }

        fn failed(&mut self) {
            self.done(Done::Failed { device: DEVICE, reason: "no memory".into() });
        }

        fn started(&mut self) {
            self.done(Done::Started { device: DEVICE, path: "/dev/ublkb0".into() });
            assert_eq!(self.error(), None);
        }
    }

    #[test]
    fn what_failed_is_tried_again_and_says_why() {
        let mut world = World::new();
        assert!(world.starts());
        world.failed();
        assert_eq!(world.error().unwrap(), "no memory; trying again in 1 s");
        assert!(!world.starts(), "without a pause");
        world.now += Duration::from_secs(1);
        assert!(world.starts() && !world.starts());
        assert!(world.error().unwrap().starts_with("no memory"), "the reason is kept while it is tried");
        world.failed();
        world.now += Duration::from_secs(1);
        assert!(!world.starts(), "the pauses grow");
        world.now += MINUTE;
        assert!(world.starts());
        world.started();
        world.now += MINUTE;
        assert!(!world.starts());
    }

    #[test]
    fn what_the_kernel_refused_is_stopped_and_started_anew() {
        let mut world = World::new();
        assert!(world.starts());
        world.started();
        world.exports.refused(world.now, DEVICE, "EINVAL".into());
        assert!(matches!(world.orders.try_recv(), Ok(Order::Stop { device: DEVICE })));
        world.now += MINUTE;
        assert!(!world.starts(), "it is still being stopped");
        world.done(Done::Gone { device: DEVICE });
        assert!(world.starts());
    }

    #[test]
    fn an_export_waits_until_the_engine_acts_on_its_claim() {
        let mut world = World::new();
        world.exports.adopted(MapVersion(0));
        assert!(!world.starts());
        world.exports.adopted(world.map.version);
        assert!(world.starts());
    }

    #[test]
    fn a_claim_that_comes_back_is_exported_once_the_old_export_is_gone() {
        let mut world = World::new();
        assert!(world.starts());
        world.started();
        let claim = |map: &mut DistributionMap, node| {
            map.version.0 += 1;
            let device = map.devices.iter_mut().find(|device| device.id == DEVICE).unwrap();
            (device.claim.node, device.claim.since) = (NodeId(node), map.version);
            device.claim.generation.0 += 1;
        };
        claim(&mut world.map, 2);
        world.exports.follow(&world.map, ME, &world.io);
        claim(&mut world.map, 1);
        world.exports.follow(&world.map, ME, &world.io);
        world.exports.allow(DEVICE, world.generation());
        world.exports.adopted(world.map.version);
        assert!(!world.starts(), "it is still being stopped");
        world.done(Done::Gone { device: DEVICE });
        assert!(world.starts());
    }

    #[test]
    fn nothing_is_started_that_is_not_ours_or_when_the_daemon_ends() {
        let mut world = World::new();
        assert!(world.starts());
        world.failed();
        let claim = &mut world.map.devices.iter_mut().find(|device| device.id == DEVICE).unwrap().claim;
        claim.node = NodeId(2);
        world.exports.follow(&world.map, ME, &world.io);
        world.now += MINUTE;
        assert!(!world.starts());
        world.done(Done::Gone { device: DEVICE });
        assert!(world.exports.all_stopped());

        let mut world = World::new();
        assert!(world.starts());
        world.failed();
        world.exports.stop_all(None);
        world.now += MINUTE;
        assert!(!world.starts());
        world.done(Done::Gone { device: DEVICE });
        assert!(!world.starts() && world.exports.all_stopped());
    }
}
