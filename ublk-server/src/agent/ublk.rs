//! The ublk control thread: adds, recovers, stops and deletes devices.
//!
//! Control commands block, some of them until all tags are fetched or the last user is gone: they
//! have a thread of their own. Recovery is fenced: a device that an earlier process left behind is
//! taken over only after the manager allowed its export, and stopped if the claim went elsewhere.

use super::Input;
use crate::frontend::ublk::control::{Control, ControlError, NewDevice, sync_block_device};
use crate::frontend::ublk::export::Export;
use crate::frontend::ublk::params::{DeviceParams, DiscardParams};
use crate::frontend::ublk::process::prepare_thread;
use crate::frontend::ublk::queue::CharDevice;
use crate::frontend::ublk::recovery::{
    ClaimConfirmed, DeviceRecord, Reattaching, Records, RecoveryError, Survivor, discard, shorten_io_timeout,
    survey,
};
use crate::frontend::ublk::users::{User, users_of};
use crate::frontend::ublk::{Cookie, UblkId};
use anyhow::Context;
use kmod::abi::Features;
use mirror_net::ids::DeviceId;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// For a control command that depends on others.
const PATIENCE: Duration = Duration::from_secs(20);
/// So often a recovery that is not over in time is waited for.
const RECOVERY_TRIES: u32 = 9;
/// For writing a device's page cache back; the agent waits for all of its devices a little longer.
const SYNC_PATIENCE: Duration = Duration::from_secs(8);
/// For programs that have a device open to be done with it, all devices together.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// For udev to be done with it: it always is, soon or on a slow machine late.
const UDEV_PATIENCE: Duration = Duration::from_secs(6);
/// Between two looks at who has a device open.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Hardware queues of a device, at most: one thread serves them all.
const QUEUES_MAX: usize = 4;
/// How soon the kernel notices on old kernels that a server died with all tags in flight.
const IO_TIMEOUT: Duration = Duration::from_secs(2);

/// Hands a device's queues to the I/O thread.
pub(super) type Serve = Box<dyn Fn(Box<Export>) + Send>;

/// For the control thread.
pub(super) enum Order {
    /// Add or recover a device; the manager allowed it.
    Start(Start),
    /// Stop it; what it holds back fails.
    Stop { device: DeviceId },
    /// Stop it if nobody has it open, otherwise leave it to the next process.
    StopUnused { device: DeviceId },
    /// It has so many bytes from now on.
    Grow { device: DeviceId, size: u64 },
    /// The I/O thread has let go of it: delete it.
    Delete { device: DeviceId },
    /// The device's users know of losses up to there.
    Told { device: DeviceId, losses: u64 },
    /// Stop devices that an earlier process left behind and whose claim is not ours any more.
    Fence { ours: Vec<String> },
}

/// A device to be exported.
pub(super) struct Start {
    pub device: DeviceId,
    pub name: String,
    /// In bytes.
    pub size: u64,
    pub block_bytes: u32,
    /// Whole ones are given back by a discard.
    pub region_bytes: u32,
    /// The claim's.
    pub generation: u64,
    /// The sum of its slices' loss generations now: whoever uses a new device has lost nothing yet.
    pub losses: u64,
    /// Takes the queues.
    pub serve: Serve,
}

/// From the control thread.
pub(crate) enum Done {
    /// Hosts can use it.
    Started { device: DeviceId, path: String },
    /// It could not be started.
    Failed { device: DeviceId, reason: String },
    /// It is not exported by this process any more.
    Gone { device: DeviceId },
}

/// The control thread's handle.
pub(super) struct UblkThread {
    orders: blocking::Sender<Order>,
}

struct Worker {
    control: Control,
    records: Records,
    running: BTreeMap<DeviceId, (UblkId, String)>,
    /// Since when what nobody has open is to be stopped.
    stopping: Option<Instant>,
    inputs: mpsc::UnboundedSender<Input>,
}

impl UblkThread {
    /// Opens the control device and starts the thread.
    pub fn start(node: &str, run_dir: &Path, inputs: mpsc::UnboundedSender<Input>) -> anyhow::Result<Self> {
        let control = Control::open()?;
        let records = Records::open(run_dir, node).context("ublk records")?;
        let (orders, received) = blocking::channel();
        let mut worker = Worker { control, records, running: BTreeMap::new(), stopping: None, inputs };
        std::thread::Builder::new().name("ublk-control".into()).spawn(move || {
            prepare_thread_or_warn();
            while let Ok(order) = received.recv() {
                worker.carry_out(order);
            }
        })?;
        Ok(Self { orders })
    }

    /// One whose orders the test takes.
    #[cfg(test)]
    pub fn unattended() -> (Self, blocking::Receiver<Order>) {
        let (orders, received) = blocking::channel();
        (Self { orders }, received)
    }

    /// Queues an order.
    pub fn order(&self, order: Order) {
        // The thread ends with the agent only.
        let _ = self.orders.send(order);
    }
}

/// For threads that requests of our own devices wait for.
pub(super) fn prepare_thread_or_warn() {
    if let Err(error) = prepare_thread() {
        tracing::warn!(%error, "this thread may wait for its own devices when memory is short");
    }
}

impl Worker {
    fn tell(&self, done: Done) {
        // Nobody listening means that the process is ending.
        let _ = self.inputs.send(Input::Ublk(done));
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Start(start) => {
                let device = start.device;
                match self.start(&start) {
                    Ok(id) => {
                        self.running.insert(device, (id, start.name));
                        self.tell(Done::Started {
                            device,
                            path: id.block_path().to_string_lossy().into_owned(),
                        });
                    }
                    Err(error) => self.tell(Done::Failed { device, reason: format!("{error:#}") }),
                }
            }
            Order::Stop { device } => self.stop(device),
            Order::StopUnused { device } => self.stop_unused(device),
            Order::Grow { device, size } => self.grow(device, size),
            Order::Delete { device } => self.delete(device),
            Order::Told { device, losses } => {
                if let Err(error) = self.told(device, losses) {
                    tracing::warn!(error = format!("{error:#}"), "a restart may tell of a loss once more");
                }
            }
            Order::Fence { ours } => {
                if let Err(error) = self.fence(&ours) {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "stopping devices whose claim went elsewhere"
                    );
                }
            }
        }
    }

    fn start(&mut self, start: &Start) -> anyhow::Result<UblkId> {
        let Start { device, ref name, size, block_bytes, region_bytes, generation, losses, ref serve } =
            *start;
        if let Some(record) = self.record(name)? {
            for survivor in survey(&mut self.control, vec![record])? {
                match survivor {
                    Survivor::Orphan(orphan) => {
                        let old = orphan.info().id;
                        let claim = ClaimConfirmed { generation };
                        let orphan = match orphan.start(&mut self.control, &self.records, claim, PATIENCE) {
                            Ok(orphan) => orphan,
                            Err(error @ RecoveryError::Unrecoverable { .. }) => {
                                // Its I/O would wait for ever: it fails, and a new device takes its place.
                                tracing::error!(%error, "discarded");
                                discard(&mut self.control, old, PATIENCE)?;
                                continue;
                            }
                            Err(error) => return Err(error.into()),
                        };
                        let export = Export::new(device, orphan.device())?;
                        // What an older server did not note is as good as told.
                        serve(Box::new(export.resumed(orphan.record().loss_told.unwrap_or(losses))));
                        let record = self.end_recovery(name, orphan)?;
                        tracing::info!(device = name, "recovered: its I/O goes on");
                        return record.id.context("a recovered device has a number");
                    }
                    Survivor::NotStarted { info, .. } => discard(&mut self.control, info.id, PATIENCE)?,
                    Survivor::Stale { .. } => {}
                }
            }
        }
        let cookie = Cookie::random();
        let queues = self.queues()?;
        let new = NewDevice::new(queues, cookie);
        let mut params = DeviceParams::new(size, new.buffer_bytes);
        params.logical_block_bytes = block_bytes;
        params.physical_block_bytes = params.physical_block_bytes.max(block_bytes);
        // Whole regions are given back; smaller discards would be ignored.
        params.discard = Some(DiscardParams { granularity_bytes: region_bytes, length_bytes_max: 64 << 20 });
        params.write_zeroes_bytes_max = 64 << 20;
        let mut record = DeviceRecord::new(name, cookie, params);
        record.loss_told = Some(losses);
        // Before the device: one whose record is missing could not be found again.
        self.records.save(&record)?;
        let info = self.control.add_dev(&new)?;
        record.id = Some(info.id);
        self.records.save(&record)?;
        let started = self.control.set_params(&info, &params).map_err(anyhow::Error::from).and_then(|()| {
            let file = CharDevice::open(&info, PATIENCE)?;
            serve(Box::new(Export::new(device, &file)?));
            Ok(self.control.start_dev(info.id, PATIENCE)?)
        });
        if let Err(error) = started {
            discard(&mut self.control, info.id, PATIENCE)?;
            self.records.remove(name)?;
            return Err(error);
        }
        if let Err(error) = shorten_io_timeout(info.id, IO_TIMEOUT) {
            tracing::warn!(%error, "a recovery may take half a minute to begin");
        }
        Ok(info.id)
    }

    /// Its I/O goes on once the I/O thread has taken all of it, be it late: nobody could begin the recovery again.
    fn end_recovery(&mut self, name: &str, mut orphan: Reattaching) -> anyhow::Result<DeviceRecord> {
        for _ in 0..RECOVERY_TRIES {
            match orphan.end(&mut self.control, &self.records, PATIENCE) {
                Err(RecoveryError::Control(error @ ControlError::TimedOut { still_running: false, .. })) => {
                    tracing::warn!(device = name, %error, "its I/O still waits: the I/O thread stands still");
                }
                result => return Ok(result?),
            }
        }
        // Other devices wait for this thread as well.
        discard(&mut self.control, orphan.device().info().id, PATIENCE)?;
        anyhow::bail!(
            "the I/O thread never took what waited for it: that I/O fails, and a new device takes its place"
        )
    }

    /// Kernels before 6.16 crash when a server dies in the middle of a recovery, unless the device has
    /// a single queue (`kmod/README.md`).
    fn queues(&mut self) -> anyhow::Result<u16> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let sound = self.control.features()?.contains(Features::PER_IO_DAEMON);
        Ok(if sound { processors.min(QUEUES_MAX) as u16 } else { 1 })
    }

    fn record(&self, name: &str) -> anyhow::Result<Option<DeviceRecord>> {
        let mut found = None;
        for record in self.records.load()? {
            match record {
                Ok(record) if record.device == name => found = Some(record),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "a ublk record cannot be read"),
            }
        }
        Ok(found)
    }

    fn stop(&mut self, device: DeviceId) {
        match self.running.get(&device) {
            Some((id, name)) => {
                if let Err(error) = self.control.stop_dev(*id, PATIENCE) {
                    tracing::error!(device = name, %error, "stopping");
                }
            }
            None => self.tell(Done::Gone { device }),
        }
    }

    fn stop_unused(&mut self, device: DeviceId) {
        let Some((id, name)) = self.running.get(&device) else { return self.tell(Done::Gone { device }) };
        let (id, name) = (*id, name.clone());
        let since = *self.stopping.get_or_insert_with(Instant::now);
        if let Some(hindrance) = self.stop_if_unused(id, since).err() {
            let path = id.block_path();
            tracing::warn!(device = name, path = %path.display(), "left to the next start: {hindrance:#}");
            self.running.remove(&device);
            self.tell(Done::Gone { device });
        }
    }

    /// Stops a device that nobody has open, or nobody for long after `since`; why it does not otherwise.
    fn stop_if_unused(&mut self, id: UblkId, since: Instant) -> anyhow::Result<()> {
        let in_use = |users: &[User]| {
            let users: Vec<String> = users.iter().map(ToString::to_string).collect();
            anyhow::anyhow!("in use by {}", users.join(", "))
        };
        // First, since writing back what is used would never end.
        let users = users_after(id, since)?;
        anyhow::ensure!(users.is_empty(), in_use(&users));
        // Stopped before it would lose what is in the page cache.
        sync_block_device(id, SYNC_PATIENCE).context("cannot be written back")?;
        loop {
            let users = users_after(id, since)?;
            anyhow::ensure!(users.is_empty(), in_use(&users));
            match self.control.try_stop_dev(id, PATIENCE) {
                Err(ControlError::Busy { .. }) if since.elapsed() < UDEV_PATIENCE => {
                    std::thread::sleep(LOOK_EVERY)
                }
                Err(error @ ControlError::Busy { .. }) => return Err(error).context("in use"),
                // Before 7.0 whoever opens it between the look and this is cut off.
                Err(ControlError::Unsupported { .. }) => return Ok(self.control.stop_dev(id, PATIENCE)?),
                result => return Ok(result?),
            }
        }
    }

    fn grow(&mut self, device: DeviceId, size: u64) {
        let Some((id, name)) = self.running.get(&device) else { return };
        match self.control.update_size(*id, size) {
            Ok(()) => {}
            Err(ControlError::Unsupported { .. }) => tracing::warn!(
                device = name,
                "this kernel cannot change a running device's size (Linux 6.16 can): hosts see the new size once nobody uses \
                 the device and this daemon is restarted"
            ),
            Err(error) => tracing::error!(device = name, %error, "telling the kernel its new size"),
        }
    }

    fn delete(&mut self, device: DeviceId) {
        let Some((id, name)) = self.running.remove(&device) else { return };
        // Whoever still has it mounted keeps the number in use; nobody waits for that.
        if let Err(error) = self.control.del_dev_async(id, PATIENCE) {
            tracing::error!(device = name, %error, "deleting");
        }
        if let Err(error) = self.records.remove(&name) {
            tracing::error!(device = name, %error, "forgetting its record");
        }
        self.tell(Done::Gone { device });
    }

    /// Notes what a device's users know of lost writes, for the next process.
    fn told(&mut self, device: DeviceId, losses: u64) -> anyhow::Result<()> {
        let Some((_, name)) = self.running.get(&device) else { return Ok(()) };
        if let Some(mut record) = self.record(name)?.filter(|record| record.loss_told != Some(losses)) {
            record.loss_told = Some(losses);
            self.records.save(&record)?;
        }
        Ok(())
    }

    fn fence(&mut self, ours: &[String]) -> anyhow::Result<()> {
        let mut left = Vec::new();
        for record in self.records.load()?.into_iter().flatten() {
            let served = self.running.values().any(|(_, name)| *name == record.device);
            if !ours.contains(&record.device) && !served {
                left.push(record);
            }
        }
        for survivor in survey(&mut self.control, left)? {
            let name = match survivor {
                Survivor::Orphan(orphan) => {
                    tracing::warn!(
                        device = orphan.record().device,
                        "its claim is elsewhere: its waiting I/O fails"
                    );
                    discard(&mut self.control, orphan.info().id, PATIENCE)?;
                    orphan.record().device.clone()
                }
                Survivor::NotStarted { record, info } => {
                    discard(&mut self.control, info.id, PATIENCE)?;
                    record.device
                }
                Survivor::Stale { record } => record.device,
            };
            self.records.remove(&name)?;
        }
        Ok(())
    }
}

/// Who uses a device, and is not done with it in time after `since`.
fn users_after(id: UblkId, since: Instant) -> anyhow::Result<Vec<User>> {
    loop {
        let users = users_of(id).context("cannot see who uses it")?;
        let patience = if users.iter().all(User::is_udev) {
            UDEV_PATIENCE
        } else if users.iter().all(|user| matches!(user, User::Process { .. })) {
            CLOSE_PATIENCE
        } else {
            Duration::ZERO
        };
        if users.is_empty() || since.elapsed() >= patience {
            return Ok(users);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
