//! The devices of this node: exported on the manager's word, stopped when the claim is gone.

use super::Input;
use super::io::IoHandle;
use super::nbd::{self, Address, NewClient, Shelf};
use super::ublk::{Done, Order, Start, UblkThread};
use crate::frontend::nbd::ExportInfo;
use anyhow::Context;
use mirror_net::config::{Frontend, NbdListen, NodeFile};
use mirror_net::control::ExportReport;
use mirror_net::ids::{ClaimGeneration, DeviceId, MapVersion, NodeId};
use mirror_net::map::DistributionMap;
use mirror_net::region::masks::REGIONS_PER_SLICE;
use std::collections::BTreeMap;
use std::path::Path;
use tokio::sync::mpsc;

/// How this node exports.
enum Server {
    Ublk(UblkThread),
    Nbd { shelf: Shelf, address: Address },
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    /// The ublk control thread is at it.
    Starting,
    /// Hosts can use it.
    Exported { path: Option<String>, uri: Option<String> },
    /// It is being stopped.
    Stopping,
    /// It could not be started.
    Failed(String),
}

struct Export {
    generation: ClaimGeneration,
    state: State,
}

/// The devices that this node exports.
pub(super) struct Exports {
    server: Server,
    frontend: Frontend,
    exports: BTreeMap<DeviceId, Export>,
    /// The newest claims that the manager allowed to be exported.
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
    pub fn allow(
        &mut self,
        device: DeviceId,
        generation: ClaimGeneration,
        map: &DistributionMap,
        io: &IoHandle,
    ) {
        let Some(entry) = map.device(device).filter(|entry| entry.claim.generation == generation) else {
            return;
        };
        if self.exports.get(&device).is_some_and(|export| !matches!(export.state, State::Failed(_))) {
            return;
        }
        let size = entry.bytes(map.slice_bytes);
        let state = match &self.server {
            Server::Nbd { shelf, address } => {
                shelf.add(
                    device,
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
            Server::Ublk(thread) => {
                thread.order(Order::Start(Start {
                    device,
                    name: entry.name.clone(),
                    size,
                    block_bytes: entry.block_bytes,
                    region_bytes: map.slice_bytes / REGIONS_PER_SLICE,
                    generation: generation.0,
                    serve: Box::new(io.ublk_starter()),
                }));
                State::Starting
            }
        };
        self.exports.insert(device, Export { generation, state });
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
        for device in lost {
            tracing::warn!(%device, "this node may not export the device any more: stopping it");
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

    /// The engine acts on this map version: exports that waited for it may start.
    pub fn adopted(&mut self, version: MapVersion, map: &DistributionMap, me: NodeId, io: &IoHandle) {
        self.adopted = version;
        self.allow_again(map, me, io);
    }

    /// Starts what was allowed and could not start then.
    pub fn allow_again(&mut self, map: &DistributionMap, me: NodeId, io: &IoHandle) {
        let ours = |device: &DeviceId| map.device(*device).is_some_and(|entry| entry.claim.node == me);
        let missing: Vec<(DeviceId, ClaimGeneration)> = self
            .allowed
            .iter()
            .filter(|(device, _)| ours(device) && !self.exports.contains_key(device))
            .map(|(device, generation)| (*device, *generation))
            .collect();
        for (device, generation) in missing {
            self.allow(device, generation, map, io);
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

    /// The ublk control thread is done with something.
    pub fn ublk_done(&mut self, done: Done) {
        match done {
            Done::Started { device, path } => {
                tracing::info!(%device, path, "exported");
                if let Some(export) =
                    self.exports.get_mut(&device).filter(|export| export.state == State::Starting)
                {
                    export.state = State::Exported { path: Some(path), uri: None };
                }
            }
            Done::Failed { device, reason } => {
                tracing::error!(%device, reason, "cannot be exported");
                if let Some(export) = self.exports.get_mut(&device) {
                    export.state = State::Failed(reason);
                }
            }
            Done::Gone { device } => {
                self.exports.remove(&device);
            }
        }
    }

    /// The daemon ends: stops what nobody uses.
    pub fn stop_all(&mut self, io: Option<&IoHandle>) {
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
                    export.state = State::Stopping;
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
    pub fn reports(&self) -> Vec<ExportReport> {
        let report = |(device, export): (&DeviceId, &Export)| {
            let mut report =
                ExportReport { device: *device, path: None, uri: None, error: None, requests: 0, pending: 0 };
            match &export.state {
                State::Starting => report.error = Some("being started".into()),
                State::Stopping => report.error = Some("being stopped".into()),
                State::Failed(reason) => report.error = Some(reason.clone()),
                State::Exported { path, uri } => (report.path, report.uri) = (path.clone(), uri.clone()),
            }
            report
        };
        self.exports.iter().map(report).collect()
    }
}
