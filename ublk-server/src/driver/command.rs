//! What the control thread tells the I/O thread, and what it hears from it.

use crate::frontend::nbd;
use crate::frontend::ublk::export::Export;
use crate::ring::disk::DiskFile;
use crate::ring::meter::DiskWork;
use mirror_net::config::NodePolicy;
use mirror_net::control::{BroadcastKind, ResyncReport, SessionReport, SurveyAnswer, SurveyRun};
use mirror_net::engine::LocalDisk;
use mirror_net::engine::action::Report;
use mirror_net::ids::{DeviceId, DiskId, ExporterSession, MapVersion, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;

/// For the I/O thread.
pub enum Command {
    /// A further disk, before the map that lists it.
    AddDisk(Box<(LocalDisk, DiskFile)>),
    /// Close a disk that the newest map does not list any more, once that map is adopted and the disk is idle.
    ReleaseDisk(DiskId),
    /// Adopt this map.
    Map(Arc<DistributionMap>),
    /// The manager's number for this process as an exporter.
    ExporterSession(ExporterSession),
    /// How to treat other nodes' copies.
    Policy(NodePolicy),
    /// A lane stands.
    Lane {
        /// The node at its other end.
        peer: NodeId,
        /// Its number.
        session: u64,
        /// The other node's process.
        process: ProcessId,
        /// The socket.
        socket: OwnedFd,
    },
    /// A client finished its negotiation.
    NbdClient {
        /// The device that it asked for.
        device: DeviceId,
        /// The socket.
        socket: OwnedFd,
        /// What was agreed.
        session: nbd::Session,
        /// What it sent already.
        unread: Vec<u8>,
    },
    /// Close the connections of that device's clients: the claim is gone.
    StopNbd(DeviceId),
    /// Serve a ublk device's queues.
    StartUblk(Box<Export>),
    /// Answer for what is served now of these slices; without any, forget that order.
    Survey {
        /// Its number.
        order: u64,
        /// What is wanted.
        kind: BroadcastKind,
        /// Of which slices.
        runs: Vec<SurveyRun>,
    },
    /// Forget all orders: whoever gave them is gone.
    ForgetSurveys,
    /// Tell how things are.
    Report(tokio::sync::oneshot::Sender<ThreadReport>),
    /// End, once nothing is under way.
    Stop,
}

/// From the I/O thread.
#[derive(Debug)]
pub enum Event {
    /// Something for the manager.
    Report(Report),
    /// A lane is gone.
    LaneClosed {
        /// The node at its other end.
        peer: NodeId,
        /// Its number.
        session: u64,
        /// Why.
        reason: String,
    },
    /// A map could not be adopted.
    MapRefused(String),
    /// A disk that has left the map is closed.
    DiskReleased(DiskId),
    /// A device's copies at a peer are equal to this node's.
    Resynced(ResyncReport),
    /// Answers to that order.
    Surveyed(u64, Vec<SurveyAnswer>),
    /// A ublk device's entries are refused by the kernel.
    UblkRefused(DeviceId, nix::errno::Errno),
    /// The kernel gave up all tags of a ublk device.
    UblkDrained(DeviceId),
    /// The thread ended; with an error if it had to.
    Ended(Option<String>),
}

/// How the I/O thread is doing.
#[derive(Clone, Debug, Default)]
pub struct ThreadReport {
    /// The map version that the engine acts on.
    pub adopted: MapVersion,
    /// Sessions with other nodes.
    pub sessions: Vec<SessionReport>,
    /// What requests wait for.
    pub waiting: Vec<String>,
    /// Copies that are being made equal.
    pub resyncs: Vec<ResyncReport>,
    /// What each disk has done.
    pub disks: Vec<(DiskId, DiskWork)>,
    /// Devices that are exported, or were.
    pub devices: Vec<DeviceReport>,
}

/// An exported device, as the I/O thread sees it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceReport {
    /// The device.
    pub device: DeviceId,
    /// Requests completed.
    pub completed: u64,
    /// Requests pending.
    pub pending: u64,
    /// NBD clients that are connected.
    pub clients: usize,
    /// What its users know of lost writes; `None` while they have still to be told.
    pub loss_told: Option<u64>,
}

/// The control thread's end.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
}

/// The I/O thread's end.
pub struct Inbox {
    /// What was sent.
    pub commands: mpsc::Receiver<Command>,
    /// Becomes readable when something was.
    pub wake: Arc<OwnedFd>,
}

/// The two ends of a channel that can wake a ring.
pub fn channel() -> io::Result<(Handle, Inbox)> {
    let wake = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_CLOEXEC)?;
    let wake = Arc::new(OwnedFd::from(wake));
    let (sender, commands) = mpsc::channel();
    Ok((Handle { commands: sender, wake: Arc::clone(&wake) }, Inbox { commands, wake }))
}

impl Handle {
    /// Sends a command; it is lost only if the thread has ended, which it tells as an event.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // A full counter wakes as well.
            let _ = nix::unistd::write(self.wake.as_fd(), &1u64.to_ne_bytes());
        }
    }
}
