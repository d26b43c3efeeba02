//! A RAM-disk server made of the ublk frontend's parts. It runs as a process of its own, to be killed.
//!
//! Its disks are files in a tmpfs, so they survive its death as a mirror's disks survive the daemon's. Thread i
//! owns queue i of every device, on one ring.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};
use nix::errno::Errno;
use ublk_server::frontend::ublk::control::{Control, ControlError, NewDevice, sync_block_device};
use ublk_server::frontend::ublk::params::{DeviceParams, DiscardParams};
use ublk_server::frontend::ublk::queue::{Arrival, CharDevice, Operation, Outcome, Queue, Request};
use ublk_server::frontend::ublk::recovery::{
    self, ClaimConfirmed, DeviceRecord, Reattaching, Records, Survivor, shorten_io_timeout,
};
use ublk_server::frontend::ublk::{Cookie, DeviceInfo, UblkId};

pub const NODE: &str = "ram";
pub const SIZE_BYTES: u64 = 64 << 20;
pub const DEPTH: u16 = 16;
pub const QUEUES: u16 = 2;
pub const BUFFER_BYTES: u32 = 256 << 10;

const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(90);
/// How often a thread looks whether held requests may go.
const TICK: Duration = Duration::from_millis(20);

/// What a server was asked to do.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub directory: PathBuf,
    pub devices: Vec<String>,
    /// Hardware queues of each device.
    pub queues: u16,
    /// Exit in the middle of a recovery, when this many queues were fetched.
    pub die_after_queues: Option<u16>,
    /// Leave the kernel's 30 s as the requests' timeout.
    pub long_io_timeout: bool,
}

impl Options {
    pub fn arguments(&self) -> Vec<String> {
        let directory = self.directory.to_str().unwrap().to_owned();
        let mut out = vec!["serve".to_owned(), directory, self.devices.join(","), self.queues.to_string()];
        out.extend(self.die_after_queues.map(|queues| format!("die={queues}")));
        out.extend(self.long_io_timeout.then(|| "long".to_owned()));
        out
    }

    pub fn parse(arguments: &[String]) -> Result<Options> {
        let [directory, devices, queues, rest @ ..] = arguments else {
            bail!("serve DIRECTORY DEVICES QUEUES")
        };
        let mut options = Options {
            directory: directory.into(),
            devices: devices.split(',').map(str::to_owned).collect(),
            queues: queues.parse()?,
            ..Options::default()
        };
        for word in rest {
            match word.strip_prefix("die=") {
                Some(queues) => options.die_after_queues = Some(queues.parse()?),
                None => options.long_io_timeout = true,
            }
        }
        Ok(options)
    }

    pub fn hold_file(&self) -> PathBuf {
        self.directory.join("hold")
    }
}

pub fn params() -> DeviceParams {
    DeviceParams {
        discard: Some(DiscardParams { granularity_bytes: 4096, length_bytes_max: 8 << 20 }),
        write_zeroes_bytes_max: 8 << 20,
        ..DeviceParams::new(SIZE_BYTES, BUFFER_BYTES)
    }
}

/// What a disk was asked for, by all servers it ever had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub fua: u64,
    pub discarded_bytes: u64,
    pub zeroed_bytes: u64,
    pub held: u64,
}

impl Counters {
    pub fn load(directory: &Path, device: &str) -> Counters {
        let Ok(file) = File::open(directory.join(format!("{device}.counters"))) else {
            return Counters::default();
        };
        let mut bytes = [0u8; 56];
        if file.read_exact_at(&mut bytes, 0).is_err() {
            return Counters::default();
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().unwrap());
        Counters {
            reads: word(0),
            writes: word(1),
            flushes: word(2),
            fua: word(3),
            discarded_bytes: word(4),
            zeroed_bytes: word(5),
            held: word(6),
        }
    }

    fn store(&self, file: &File) -> io::Result<()> {
        let words = [
            self.reads,
            self.writes,
            self.flushes,
            self.fua,
            self.discarded_bytes,
            self.zeroed_bytes,
            self.held,
        ];
        file.write_all_at(&words.map(u64::to_le_bytes).concat(), 0)
    }
}

struct RamDisk {
    data: File,
    counters: Mutex<(Counters, File)>,
}

impl RamDisk {
    fn open(directory: &Path, device: &str) -> Result<RamDisk> {
        let open = |name: String| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(directory.join(name))
        };
        let counters = Counters::load(directory, device);
        let data = open(format!("{device}.data"))?;
        data.set_len(SIZE_BYTES)?;
        Ok(RamDisk { data, counters: Mutex::new((counters, open(format!("{device}.counters"))?)) })
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut guard = self.counters.lock().unwrap();
        change(&mut guard.0);
        guard.0.store(&guard.1).unwrap();
    }

    fn execute(&self, queue: &mut Queue, request: &Request) -> Outcome {
        let length = request.length_bytes as usize;
        let done = match request.operation {
            Operation::Read => {
                self.data.read_exact_at(&mut queue.buffer_mut(request.tag)[..length], request.offset_bytes)
            }
            Operation::Write => {
                self.data.write_all_at(&queue.buffer(request.tag)[..length], request.offset_bytes)
            }
            Operation::Flush => Ok(()),
            Operation::Discard | Operation::WriteZeroes => self.zero(request.offset_bytes, length),
            Operation::Unsupported(_) => return Outcome::Failed(Errno::EOPNOTSUPP),
        };
        self.count(|counters| {
            match request.operation {
                Operation::Read => counters.reads += 1,
                Operation::Write => counters.writes += 1,
                Operation::Flush => counters.flushes += 1,
                Operation::Discard => counters.discarded_bytes += request.length_bytes,
                Operation::WriteZeroes => counters.zeroed_bytes += request.length_bytes,
                Operation::Unsupported(_) => {}
            }
            counters.fua += u64::from(request.fua);
        });
        match done {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    fn zero(&self, offset: u64, length: usize) -> io::Result<()> {
        let zeros = vec![0u8; 1 << 20];
        let mut done = 0;
        while done < length {
            let piece = zeros.len().min(length - done);
            self.data.write_all_at(&zeros[..piece], offset + done as u64)?;
            done += piece;
        }
        Ok(())
    }
}

struct Served {
    device: Arc<CharDevice>,
    disk: Arc<RamDisk>,
}

/// One I/O thread: one ring, one queue of every device.
struct IoThread {
    ring: IoUring,
    queues: Vec<(Queue, Arc<RamDisk>)>,
    held: VecDeque<(usize, Request)>,
    hold_file: PathBuf,
}

impl IoThread {
    fn new(served: &[Served], index: u16, hold_file: PathBuf) -> Result<IoThread> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_cqsize(1024)
            .build(64)?;
        let mut queues = Vec::new();
        for device in served.iter().filter(|served| index < served.device.info().queues) {
            queues.push((Queue::new(&device.device, index)?, Arc::clone(&device.disk)));
        }
        // Every second queue by its descriptor, the others as registered files: both must work.
        let fds: Vec<i32> = queues.iter().map(|(queue, _)| queue.device().fd()).collect();
        ring.submitter().register_files(&fds)?;
        for (slot, (queue, _)) in queues.iter_mut().enumerate().skip(1).step_by(2) {
            queue.use_registered_file(slot as u32);
        }
        Ok(IoThread { ring, queues, held: VecDeque::new(), hold_file })
    }

    fn fetch_all(&mut self) -> Result<()> {
        for slot in 0..self.queues.len() {
            for tag in 0..self.queues[slot].0.depth() {
                let entry = self.queues[slot].0.fetch(tag, user_data(slot, tag));
                self.push(entry)?;
            }
        }
        self.ring.submit()?;
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) -> Result<()> {
        // SAFETY: the entry names a queue's buffer; queues are dropped after the ring's completions were seen,
        // and leak their buffers otherwise.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let tick = Timespec::from(TICK);
        while !self.queues.iter().all(|(queue, _)| queue.is_drained()) {
            match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&tick)) {
                Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {
                    return Err(error.into());
                }
                _ => {}
            }
            let completions: Vec<_> = self.ring.completion().collect();
            let hold = self.hold_file.exists();
            for completion in completions {
                let (slot, tag) = from_user_data(completion.user_data());
                match self.queues[slot].0.arrived(tag, completion.result()) {
                    Arrival::Request(request) => {
                        self.queues[slot].1.count(|counters| counters.held += u64::from(hold));
                        self.held.push_back((slot, request));
                    }
                    Arrival::Gone => {}
                    Arrival::Refused(errno) => {
                        eprintln!("server: tag {tag} of queue {slot} refused: {errno}");
                        std::process::exit(3);
                    }
                }
            }
            if !hold {
                while let Some((slot, request)) = self.held.pop_front() {
                    let (queue, disk) = &mut self.queues[slot];
                    let outcome = disk.execute(queue, &request);
                    let entry = queue.commit_and_fetch(request.tag, outcome, user_data(slot, request.tag));
                    self.push(entry)?;
                }
            }
        }
        Ok(())
    }
}

fn user_data(slot: usize, tag: u16) -> u64 {
    (slot as u64) << 16 | u64::from(tag)
}

fn from_user_data(user_data: u64) -> (usize, u16) {
    ((user_data >> 16) as usize, user_data as u16)
}

struct Server {
    options: Options,
    control: Control,
    records: Records,
    served: Vec<Served>,
    threads: Vec<JoinHandle<()>>,
    added: Vec<DeviceRecord>,
    reattaching: Vec<Reattaching>,
}

/// Serves until told to stop: the process's `main` when it is a server.
pub fn serve(options: Options) -> Result<()> {
    let records = Records::open(&options.directory.join("run"), NODE)?;
    let mut server = Server {
        control: Control::open()?,
        records,
        options,
        served: vec![],
        threads: vec![],
        added: vec![],
        reattaching: vec![],
    };
    let start = Instant::now();
    server.recover()?;
    let announced = start.elapsed();
    server.add_missing()?;
    server.start_threads()?;
    let ids = server.start_devices()?;
    println!("ready {} {} {}", ids.join(","), announced.as_millis(), start.elapsed().as_millis());
    for line in io::stdin().lock().lines() {
        if line? == "stop" {
            server.stop()?;
            println!("stopped");
            return Ok(());
        }
    }
    bail!("nobody is there any more")
}

impl Server {
    /// Announces us for what the last server left.
    fn recover(&mut self) -> Result<()> {
        let records: Vec<DeviceRecord> = self.records.load()?.into_iter().collect::<Result<_, _>>()?;
        for survivor in recovery::survey(&mut self.control, records)? {
            match survivor {
                Survivor::Orphan(orphan) => {
                    let name = orphan.record().device.clone();
                    let id = orphan.info().id;
                    ensure!(self.control.get_params(id)? == orphan.record().params, "the parameters live on");
                    let claim = ClaimConfirmed { generation: 1 };
                    let reattaching = match orphan.start(&mut self.control, &self.records, claim, PATIENCE) {
                        Ok(reattaching) => reattaching,
                        Err(error @ recovery::RecoveryError::Unrecoverable { .. }) => {
                            println!("unrecoverable {id} {error}");
                            recovery::discard(&mut self.control, id, CONTROL_TIMEOUT)?;
                            self.records.remove(&name)?;
                            continue;
                        }
                        Err(error) => return Err(error.into()),
                    };
                    let device = Arc::clone(reattaching.device());
                    let disk = Arc::new(RamDisk::open(&self.options.directory, &name)?);
                    self.served.push(Served { device, disk });
                    self.reattaching.push(reattaching);
                }
                Survivor::NotStarted { record, info } => {
                    println!("notstarted {}", record.device);
                    recovery::discard(&mut self.control, info.id, CONTROL_TIMEOUT)?;
                    self.records.remove(&record.device)?;
                }
                Survivor::Stale { record } => {
                    println!("stale {}", record.device);
                    self.records.remove(&record.device)?;
                }
            }
        }
        Ok(())
    }

    /// Adds what is not there yet. The record comes first, so that nothing is left behind that nobody knows.
    fn add_missing(&mut self) -> Result<()> {
        for name in self.options.devices.clone() {
            if self.records.load()?.iter().flatten().any(|record| record.device == name) {
                continue;
            }
            let mut record = DeviceRecord::new(&name, Cookie::random(), params());
            self.records.save(&record)?;
            let new = NewDevice {
                depth: DEPTH,
                buffer_bytes: BUFFER_BYTES,
                ..NewDevice::new(self.options.queues, record.cookie)
            };
            let info: DeviceInfo = self.control.add_dev(&new)?;
            record.id = Some(info.id);
            self.records.save(&record)?;
            self.control.set_params(&info, &record.params)?;
            let device = CharDevice::open(&info, CONTROL_TIMEOUT)?;
            let disk = Arc::new(RamDisk::open(&self.options.directory, &name)?);
            self.served.push(Served { device, disk });
            self.added.push(record);
        }
        Ok(())
    }

    fn start_threads(&mut self) -> Result<()> {
        if self.options.die_after_queues == Some(0) {
            std::process::exit(0);
        }
        let count = self.served.iter().map(|served| served.device.info().queues).max().unwrap_or(0);
        for index in 0..count {
            let served: Vec<Served> = self
                .served
                .iter()
                .map(|served| Served { device: Arc::clone(&served.device), disk: Arc::clone(&served.disk) })
                .collect();
            let hold_file = self.options.hold_file();
            let die = self.options.die_after_queues == Some(index + 1);
            self.threads.push(thread::Builder::new().name(format!("io{index}")).spawn(move || {
                let fail = |error: anyhow::Error| -> ! {
                    eprintln!("server: thread {index}: {error:#}");
                    std::process::exit(2);
                };
                let mut thread = IoThread::new(&served, index, hold_file).unwrap_or_else(|error| fail(error));
                drop(served);
                thread.fetch_all().unwrap_or_else(|error| fail(error));
                if die {
                    std::process::exit(0);
                }
                thread.run().unwrap_or_else(|error| fail(error));
            })?);
            if self.options.die_after_queues.is_some() {
                // One after the other, so that the rest is really missing.
                thread::sleep(Duration::from_millis(300));
            }
        }
        Ok(())
    }

    fn start_devices(&mut self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for mut reattaching in self.reattaching.drain(..) {
            let record = reattaching.end(&mut self.control, &self.records, CONTROL_TIMEOUT)?;
            ids.push((record.device.clone(), record.id));
            self.added.push(record);
        }
        for record in &self.added {
            let id = record.id.context("it was added")?;
            if !ids.iter().any(|(name, _)| *name == record.device) {
                self.control.start_dev(id, CONTROL_TIMEOUT)?;
                ids.push((record.device.clone(), record.id));
                if !self.options.long_io_timeout {
                    shorten_io_timeout(id, Duration::from_secs(1))?;
                }
            }
        }
        let place = |name: &String| self.options.devices.iter().position(|device| device == name);
        ids.sort_by_key(|(name, _)| place(name));
        Ok(ids.into_iter().map(|(_, id)| id.map_or(0, |UblkId(number)| number).to_string()).collect())
    }

    fn stop(&mut self) -> Result<()> {
        let ids: Vec<UblkId> = self.served.iter().map(|served| served.device.info().id).collect();
        for id in &ids {
            sync_block_device(*id, Duration::from_secs(60))?;
            self.control.stop_dev(*id, CONTROL_TIMEOUT)?;
        }
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("an I/O thread panicked"))?;
        }
        self.served.clear();
        for id in ids {
            match self.control.del_dev(id, Duration::from_secs(2)) {
                // Deleted; somebody has it open still, and its number becomes free when they close it.
                Err(ControlError::TimedOut { still_running: false, .. }) => {}
                other => other?,
            }
        }
        for record in &self.added {
            self.records.remove(&record.device)?;
        }
        ensure!(self.control.commands_adrift() == 0, "every command was answered");
        Ok(())
    }
}
