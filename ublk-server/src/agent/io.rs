//! Starting the I/O thread, and talking to it.

use super::Input;
use crate::driver::command::{Command, Event, Handle, ThreadReport, channel};
use crate::driver::{IoThread, WireKeys, now};
use crate::frontend::nbd;
use crate::frontend::ublk::export::Export;
use crate::ring::disk::DiskFile;
use anyhow::Context;
use mirror_net::config::NodePolicy;
use mirror_net::control::{BroadcastKind, SurveyRun};
use mirror_net::engine::{Engine, LocalDisk, Me};
use mirror_net::ids::{DeviceId, DiskId, ExporterSession, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::ClusterKey;
use mirror_net::wire::header::CrcSeed;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// The mistake that UBLK_MIRROR_PLANTED names, if any: for measurements, and in no build of the product.
#[cfg(feature = "planted-bugs")]
fn make_planted_mistake() {
    use mirror_net::planted::{Bug, set};
    let name = std::env::var("UBLK_MIRROR_PLANTED").unwrap_or_default();
    let bug = Bug::named(&name);
    assert!(bug.is_some() || name.is_empty(), "UBLK_MIRROR_PLANTED: there is no mistake called {name:?}");
    tracing::warn!(bug = name, "a build that makes mistakes on purpose");
    set(bug);
}

/// The I/O thread, as the agent sees it.
pub struct IoHandle {
    handle: Handle,
}

impl IoHandle {
    /// One whose thread is the test.
    #[cfg(test)]
    pub fn unattended() -> (Self, crate::driver::command::Inbox) {
        let (handle, inbox) = channel().expect("an eventfd");
        (Self { handle }, inbox)
    }

    /// Starts the thread with the node's disks.
    pub fn start(
        key: &ClusterKey,
        me: Me,
        map: &DistributionMap,
        disks: Vec<(LocalDisk, DiskFile)>,
        inputs: mpsc::UnboundedSender<Input>,
        buffer_bytes: usize,
        serves_ublk: bool,
    ) -> anyhow::Result<Self> {
        let (locals, files): (Vec<LocalDisk>, Vec<DiskFile>) = disks.into_iter().unzip();
        let engine = Engine::new(me, map.slice_bytes, locals, now());
        let (handle, inbox) = channel().context("eventfd")?;
        let (events, mut received) = mpsc::unbounded_channel::<Event>();
        let keys = WireKeys { seed: CrcSeed::new(&map.cluster), digests: key.digest_key() };
        let (started, start) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("io".into()).spawn(move || {
            if serves_ublk {
                super::ublk::prepare_thread_or_warn();
            }
            #[cfg(feature = "planted-bugs")]
            make_planted_mistake();
            // The ring belongs to the thread that made it.
            match IoThread::new(engine, files, keys, inbox, events, buffer_bytes) {
                Ok(thread) => {
                    let _ = started.send(Ok(()));
                    thread.run();
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
        start.recv()?.context("io_uring is not usable (is kernel.io_uring_disabled set?)")?;
        tokio::spawn(async move {
            while let Some(event) = received.recv().await {
                if inputs.send(Input::Io(event)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { handle })
    }

    /// A further disk, before the map that lists it.
    pub fn add_disk(&self, disk: (LocalDisk, DiskFile)) {
        self.handle.send(Command::AddDisk(Box::new(disk)));
    }

    /// Close a disk that the map does not list any more.
    pub fn release_disk(&self, disk: DiskId) {
        self.handle.send(Command::ReleaseDisk(disk));
    }

    /// Adopt this map.
    pub fn map(&self, map: Arc<DistributionMap>) {
        self.handle.send(Command::Map(map));
    }

    /// The manager's number for this process as an exporter.
    pub fn exporter_session(&self, session: ExporterSession) {
        self.handle.send(Command::ExporterSession(session));
    }

    /// How to treat other nodes' copies.
    pub fn policy(&self, policy: NodePolicy) {
        self.handle.send(Command::Policy(policy));
    }

    /// A lane stands.
    pub fn lane(&self, peer: NodeId, session: u64, process: ProcessId, socket: OwnedFd) {
        self.handle.send(Command::Lane { peer, session, process, socket });
    }

    /// A client finished its negotiation.
    pub fn nbd_client(&self, device: DeviceId, socket: OwnedFd, session: nbd::Session, unread: Vec<u8>) {
        self.handle.send(Command::NbdClient { device, socket, session, unread });
    }

    /// Close a device's NBD connections.
    pub fn stop_nbd(&self, device: DeviceId) {
        self.handle.send(Command::StopNbd(device));
    }

    /// A sender for the ublk control thread.
    pub fn ublk_starter(&self) -> impl Fn(Box<Export>) + Send + use<> {
        let handle = self.handle.clone();
        move |export| handle.send(Command::StartUblk(export))
    }

    /// Answer for what is served now of these slices.
    pub fn survey(&self, order: u64, kind: BroadcastKind, runs: Vec<SurveyRun>) {
        self.handle.send(Command::Survey { order, kind, runs });
    }

    /// Whoever asked for surveys is gone.
    pub fn forget_surveys(&self) {
        self.handle.send(Command::ForgetSurveys);
    }

    /// How the thread is doing; `None` if it does not answer.
    pub async fn report(&self) -> Option<ThreadReport> {
        let (reply, answer) = oneshot::channel();
        self.handle.send(Command::Report(reply));
        tokio::time::timeout(Duration::from_secs(1), answer).await.ok()?.ok()
    }

    /// End, once nothing is under way.
    pub fn stop(&self) {
        self.handle.send(Command::Stop);
    }
}
