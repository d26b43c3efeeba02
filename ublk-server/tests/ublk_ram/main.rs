//! The ublk frontend against a real kernel: a RAM-disk server is started, used, killed, replaced and stopped.
//!
//! Needs root and ublk, so it runs in the virtual machine (from the workspace's root):
//!
//! ```text
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=scripts/vm.d/cargo-runner UBLK_MIRROR_KERNEL=latest \
//!     cargo test -p ublk-server --features vm --test ublk_ram
//! ```
//!
//! Words after `--` choose tests by parts of their names. Lines beginning with `measured` are figures, not verdicts.

mod direct;
mod harness;
mod server;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kmod::abi::Features;
use kmod::probe::probe;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use rand::{Rng, SeedableRng};
use ublk_server::frontend::ublk::control::{Control, ControlError, NewDevice};
use ublk_server::frontend::ublk::params::DeviceParams;
use ublk_server::frontend::ublk::queue::CharDevice;
use ublk_server::frontend::ublk::recovery::{
    self, ClaimConfirmed, DeviceRecord, Records, Survivor, existing_devices, shorten_io_timeout,
};
use ublk_server::frontend::ublk::{Cookie, DeviceState, UblkId};

use direct::DirectFile;
use harness::{Server, block_path, hold, measured, options, random_bytes, release, run, sysfs, wait_until};
use server::{DEPTH, NODE, Options, QUEUES, SIZE_BYTES};

type Test = (&'static str, fn() -> Result<()>);

const TESTS: [Test; 19] = [
    ("the_probe_says_usable", the_probe_says_usable),
    ("control_errors_are_told_apart", control_errors_are_told_apart),
    ("start_without_fetches_is_withdrawn", start_without_fetches_is_withdrawn),
    ("affinity_covers_every_processor", affinity_covers_every_processor),
    ("devices_appear_with_their_parameters", devices_appear_with_their_parameters),
    ("what_is_written_is_read", what_is_written_is_read),
    ("flush_and_fua_arrive", flush_and_fua_arrive),
    ("discard_and_write_zeroes_arrive", discard_and_write_zeroes_arrive),
    ("ext4_is_made_mounted_and_clean", ext4_is_made_mounted_and_clean),
    ("a_sync_before_the_stop_keeps_cached_writes", a_sync_before_the_stop_keeps_cached_writes),
    ("a_stop_waits_for_requests_in_flight", a_stop_waits_for_requests_in_flight),
    ("deleting_waits_for_the_last_user", deleting_waits_for_the_last_user),
    ("size_changes_where_the_kernel_can", size_changes_where_the_kernel_can),
    ("a_live_server_is_not_replaced", a_live_server_is_not_replaced),
    ("io_goes_on_after_sigkill", io_goes_on_after_sigkill),
    ("sigkill_with_every_tag_in_flight", sigkill_with_every_tag_in_flight),
    ("sigkill_with_every_tag_in_flight_and_a_long_timeout", sigkill_with_every_tag_and_a_long_timeout),
    ("death_in_the_middle_of_a_recovery", death_in_the_middle_of_a_recovery),
    ("records_find_devices_and_tell_stale_ones", records_find_devices_and_tell_stale_ones),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "serve") {
        return match Options::parse(&arguments[1..]).and_then(server::serve) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("server: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if arguments.iter().any(|argument| argument == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    run_tests(&wanted)
}

fn run_tests(wanted: &[&String]) -> ExitCode {
    let tests: Vec<&Test> = TESTS
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())))
        .collect();
    println!("\nrunning {} tests", tests.len());
    // The driver may not be loaded yet; if it cannot be, the tests fail, they do not pretend.
    let _ = Command::new("modprobe").arg("ublk_drv").status();
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(test));
        let verdict = match &result {
            Ok(Ok(())) => "ok".to_owned(),
            Ok(Err(error)) => format!("FAILED: {error:#}"),
            Err(_) => "FAILED: panicked".to_owned(),
        };
        println!("test {name} ... {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
        if verdict != "ok" {
            failed.push(*name);
        }
        clean_up();
    }
    println!("\ntest result: {} passed; {} failed {failed:?}", tests.len() - failed.len(), failed.len());
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// No test leaves anything to the next one.
fn clean_up() {
    let _ = Command::new("umount").args(["--quiet", "--all-targets", "/run/ram-mnt"]).status();
    let Ok(mut control) = Control::open() else { return };
    for id in existing_devices() {
        println!("clean up: {id} was left behind");
        if let Err(error) = recovery::discard(&mut control, id, Duration::from_secs(10)) {
            println!("clean up: {error}");
        }
    }
}

fn kernel_features() -> Result<Features> {
    Ok(Control::open()?.features()?)
}

fn the_probe_says_usable() -> Result<()> {
    let verdict = probe()?;
    println!("{}", serde_json::to_string(&verdict)?);
    ensure!(verdict.usable(), "{:?}", verdict.problems);
    let features = verdict.features.context("asked")?;
    measured("kernel", &verdict.kernel);
    measured("features", format!("{:#x} {features}", features.0));
    Ok(())
}

fn control_errors_are_told_apart() -> Result<()> {
    let mut control = Control::open()?;
    ensure!(matches!(control.get_dev_info(UblkId(77)), Err(ControlError::NoSuchDevice { .. })));
    ensure!(matches!(
        control.del_dev(UblkId(77), Duration::from_secs(5)),
        Err(ControlError::NoSuchDevice { .. })
    ));

    let new = NewDevice { id: Some(UblkId(5)), ..NewDevice::new(1, Cookie::random()) };
    let added = control.add_dev(&new)?;
    ensure!(added.id == UblkId(5) && added.queues == 1 && added.cookie == Some(new.cookie));
    ensure!(added.state == DeviceState::Dead && added.server_pid.is_none());
    measured("agreed flags", format!("{:#x}", added.features.0));
    ensure!(matches!(control.add_dev(&new), Err(ControlError::Exists { .. })));
    ensure!(matches!(control.get_params(added.id), Err(ControlError::Invalid { .. })));

    let good = DeviceParams::new(1 << 20, added.buffer_bytes);
    let bad = DeviceParams { size_bytes: 7, ..good };
    ensure!(matches!(control.set_params(&added, &bad), Err(ControlError::Params(_))));
    control.set_params(&added, &good)?;
    ensure!(control.get_params(added.id)? == good);
    ensure!(control.get_dev_info(added.id)? == added);
    ensure!(existing_devices() == [added.id]);

    let one = CharDevice::open(&added, Duration::from_secs(5))?;
    let error = CharDevice::open(&added, Duration::from_millis(50)).map(|_| ()).unwrap_err();
    ensure!(error.to_string().contains("another process"), "{error}");
    drop(one);
    let error = control.start_user_recovery(added.id, Duration::ZERO).unwrap_err();
    println!("a device that never ran is not recovered: {error}");
    ensure!(matches!(error, ControlError::Invalid { .. } | ControlError::Busy { .. }));
    control.del_dev(added.id, Duration::from_secs(10))?;
    ensure!(existing_devices().is_empty());

    let queues = NewDevice { queues: 0, ..new };
    ensure!(matches!(control.add_dev(&queues), Err(ControlError::OutOfRange { .. })));
    Ok(())
}

/// START_DEV waits for fetches; without any it must be possible to take it back.
fn start_without_fetches_is_withdrawn() -> Result<()> {
    let mut control = Control::open()?;
    let info = control.add_dev(&NewDevice::new(1, Cookie::random()))?;
    control.set_params(&info, &DeviceParams::new(1 << 20, info.buffer_bytes))?;
    let device = CharDevice::open(&info, Duration::from_secs(5))?;
    match control.start_dev(info.id, Duration::from_millis(300)) {
        Err(ControlError::TimedOut { still_running: false, .. }) => {}
        other => bail!("START_DEV: {other:?}"),
    }
    ensure!(control.commands_adrift() == 0);
    drop(device);
    control.del_dev(info.id, Duration::from_secs(10))?;
    Ok(())
}

fn affinity_covers_every_processor() -> Result<()> {
    let mut control = Control::open()?;
    let info = control.add_dev(&NewDevice::new(64, Cookie::random()))?;
    let processors = thread::available_parallelism()?.get();
    measured("queues of 64 wanted", info.queues);
    ensure!(usize::from(info.queues) <= processors.max(1) * 4);
    let mut all = Vec::new();
    for queue in 0..info.queues {
        let of_queue = control.get_queue_affinity(info.id, queue)?;
        measured(&format!("processors of queue {queue}"), format!("{of_queue:?}"));
        all.extend(of_queue);
    }
    all.sort_unstable();
    ensure!(all.len() >= processors && all.windows(2).all(|pair| pair[0] != pair[1]), "{all:?}");
    ensure!(matches!(control.get_queue_affinity(info.id, info.queues), Err(ControlError::Invalid { .. })));
    control.del_dev(info.id, Duration::from_secs(10))?;
    Ok(())
}

fn devices_appear_with_their_parameters() -> Result<()> {
    let (_directory, options) = options(&["one", "two"])?;
    let server = Server::start(&options)?;
    measured("milliseconds to two served devices", server.ready_ms);
    let mut control = Control::open()?;
    for id in &server.ids {
        let info = control.get_dev_info(*id)?;
        ensure!(info.state == DeviceState::Live && info.depth == DEPTH && info.queues == QUEUES);
        ensure!(info.server_pid == Some(server.child.id() as i32));
        ensure!(info.features.contains(Features::REQUIRED));
        ensure!(control.get_params(*id)? == server::params());
        let expected = [
            ("size", (SIZE_BYTES / 512).to_string()),
            ("queue/logical_block_size", "512".to_owned()),
            ("queue/physical_block_size", "4096".to_owned()),
            ("queue/minimum_io_size", "4096".to_owned()),
            ("queue/max_hw_sectors_kb", "256".to_owned()),
            ("queue/write_cache", "write back".to_owned()),
            ("queue/fua", "1".to_owned()),
            ("queue/discard_granularity", "4096".to_owned()),
            ("queue/discard_max_hw_bytes", (8 << 20).to_string()),
            ("queue/write_zeroes_max_bytes", (8 << 20).to_string()),
            ("queue/chunk_sectors", "0".to_owned()),
            ("queue/io_timeout", "1000".to_owned()),
        ];
        for (name, value) in expected {
            let found = sysfs(*id, name)?;
            ensure!(found == value, "{name} is {found}, not {value}");
        }
    }
    ensure!(matches!(
        control.set_params(&control_info(&mut Control::open()?, server.id())?, &server::params()),
        Err(ControlError::Started { .. })
    ));
    server.stop()
}

fn control_info(control: &mut Control, id: UblkId) -> Result<ublk_server::frontend::ublk::DeviceInfo> {
    Ok(control.get_dev_info(id)?)
}

/// Random writes of random lengths on two devices at once, against a copy in memory.
fn what_is_written_is_read() -> Result<()> {
    let (_directory, options) = options(&["one", "two"])?;
    let server = Server::start(&options)?;
    thread::scope(|scope| {
        let jobs: Vec<_> =
            server.ids.iter().map(|id| scope.spawn(move || random_writes(*id, u64::from(id.0)))).collect();
        jobs.into_iter().try_for_each(|job| job.join().expect("no panic"))
    })?;
    let counters = server.counters();
    println!("{counters:?}");
    ensure!(counters.writes > 100 && counters.reads > 100);
    server.stop()
}

fn random_writes(id: UblkId, seed: u64) -> Result<()> {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let mut file = DirectFile::open(&id.block_path(), 0)?;
    let span = 8 << 20;
    let mut model = vec![0u8; span];
    for round in 0..150u64 {
        // Up to 1 MiB, so that the kernel splits some.
        let length = 512 * rng.random_range(1..=if round % 8 == 0 { 2048 } else { 64 });
        let offset = 512 * rng.random_range(0..(span - length) / 512 + 1);
        let data = random_bytes(seed << 32 | round, length);
        file.write(&data, offset as u64)?;
        model[offset..offset + length].copy_from_slice(&data);
        let length = 512 * rng.random_range(1..=128);
        let offset = 512 * rng.random_range(0..(span - length) / 512 + 1);
        ensure!(
            file.read(length, offset as u64)? == model[offset..offset + length],
            "round {round} at {offset}"
        );
    }
    for start in (0..span).step_by(1 << 20) {
        ensure!(file.read(1 << 20, start as u64)? == model[start..start + (1 << 20)], "at {start}");
    }
    Ok(())
}

fn flush_and_fua_arrive() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let path = server.id().block_path();

    let before = server.counters();
    let cached = OpenOptions::new().write(true).open(&path)?;
    cached.write_all_at(&random_bytes(1, 8192), 0)?;
    cached.sync_all()?;
    let after = server.counters();
    ensure!(after.writes > before.writes && after.flushes > before.flushes, "{before:?} {after:?}");
    drop(cached);

    let before = server.counters();
    let mut file = DirectFile::open(&path, libc::O_DSYNC)?;
    for block in 0..10 {
        file.write(&random_bytes(block, 4096), block * 4096)?;
    }
    let after = server.counters();
    ensure!(after.fua == before.fua + 10, "{before:?} {after:?}");
    // The block device's own file adds a flush to each, needed or not; filesystems do not.
    measured("flushes beside ten FUA writes", after.flushes - before.flushes);
    drop(file);
    server.stop()
}

fn discard_and_write_zeroes_arrive() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let id = server.id();
    let mut file = DirectFile::open(&id.block_path(), 0)?;
    let data = random_bytes(9, 1 << 20);
    for at in 0..20 {
        file.write(&data, at << 20)?;
    }
    let before = server.counters();
    run("blkdiscard", &["--offset", "1048576", "--length", "10485760", &block_path(id)])?;
    let after = server.counters();
    ensure!(after.discarded_bytes == before.discarded_bytes + (10 << 20), "{before:?} {after:?}");
    run("blkdiscard", &["--zeroout", "--offset", "12582912", "--length", "3145728", &block_path(id)])?;
    let zeroed = server.counters();
    ensure!(zeroed.zeroed_bytes == after.zeroed_bytes + (3 << 20), "{after:?} {zeroed:?}");
    ensure!(zeroed.writes == after.writes, "zeroes were written as data: {after:?} {zeroed:?}");
    for at in 0..20usize {
        let wanted_zero = (1..11).contains(&at) || (12..15).contains(&at);
        let found = file.read(1 << 20, (at as u64) << 20)?;
        ensure!(if wanted_zero { found.iter().all(|byte| *byte == 0) } else { found == data }, "MiB {at}");
    }
    drop(file);
    server.stop()
}

fn ext4_is_made_mounted_and_clean() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let path = block_path(server.id());
    run("mkfs.ext4", &["-q", "-E", "nodiscard", &path])?;
    let mount = Path::new("/run/ram-mnt");
    fs::create_dir_all(mount)?;
    run("mount", &[&path, "/run/ram-mnt"])?;
    for number in 0..40u64 {
        fs::write(
            mount.join(format!("file{number}")),
            random_bytes(number, 100_000 + number as usize * 977),
        )?;
    }
    File::open(mount.join("file3"))?.sync_all()?;
    fs::remove_file(mount.join("file4"))?;
    run("fstrim", &["/run/ram-mnt"])?;
    run("umount", &["/run/ram-mnt"])?;
    run("e2fsck", &["-f", "-n", &path])?;
    run("mount", &[&path, "/run/ram-mnt"])?;
    for number in (0..40u64).filter(|number| *number != 4) {
        let found = fs::read(mount.join(format!("file{number}")))?;
        ensure!(found == random_bytes(number, 100_000 + number as usize * 977), "file{number}");
    }
    run("umount", &["/run/ram-mnt"])?;
    let counters = server.counters();
    println!("{counters:?}");
    ensure!(counters.flushes > 0 && counters.discarded_bytes > 0);
    server.stop()
}

/// STOP_DEV fails what is written back after it; `stop` syncs first. Both are shown.
fn a_sync_before_the_stop_keeps_cached_writes() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let data = random_bytes(5, 1 << 20);

    let server = Server::start(&options)?;
    let cached = OpenOptions::new().write(true).open(server.id().block_path())?;
    cached.write_all_at(&data, 0)?;
    let child = thread::spawn(move || server.stop());
    child.join().expect("no panic")?;
    drop(cached);
    ensure!(fs::read(options.directory.join("one.data"))?[..1 << 20] == data, "cached writes were lost");

    let server = Server::start(&options)?;
    let cached = OpenOptions::new().write(true).open(server.id().block_path())?;
    cached.write_all_at(&data, 2 << 20)?;
    let mut control = Control::open()?;
    control.stop_dev(server.id(), Duration::from_secs(10))?;
    let kept = fs::read(options.directory.join("one.data"))?[2 << 20..][..1 << 20] == data;
    measured("cached writes survive a STOP_DEV without a sync", kept);
    drop(cached);
    let id = server.id();
    server.kill()?;
    control.del_dev(id, Duration::from_secs(10))?;
    Ok(())
}

fn a_stop_waits_for_requests_in_flight() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let id = server.id();
    let mut control = Control::open()?;
    hold(&options)?;
    let before = server.counters().held;
    let writer = thread::spawn(move || -> Result<()> {
        DirectFile::open(&id.block_path(), 0)?.write(&random_bytes(1, 4096), 0)
    });
    wait_until("the write", Duration::from_secs(10), || server.counters().held > before)?;
    match control.stop_dev(id, Duration::from_millis(500)) {
        Err(ControlError::TimedOut { still_running: true, .. }) => {}
        other => bail!("STOP_DEV of a device with a request in flight: {other:?}"),
    }
    ensure!(control.commands_adrift() == 1);
    release(&options);
    wait_until("the stop", Duration::from_secs(20), || control.commands_adrift() == 0)?;
    let written = writer.join().expect("no panic");
    ensure!(written.is_ok(), "the request in flight was completed: {written:?}");
    ensure!(control.get_dev_info(id)?.state == DeviceState::Dead && !id.block_path().exists());
    server.kill()?;
    control.del_dev(id, Duration::from_secs(10))?;
    Ok(())
}

fn deleting_waits_for_the_last_user() -> Result<()> {
    let mut control = Control::open()?;
    for wait in [true, false] {
        let (_directory, options) = options(&["one"])?;
        let server = Server::start(&options)?;
        let id = server.id();
        let user = File::open(id.block_path())?;
        if control.features()?.contains(Features::SAFE_STOP_DEV) {
            let refused = control.try_stop_dev(id, Duration::from_secs(10));
            ensure!(
                matches!(refused, Err(ControlError::Busy { .. })),
                "TRY_STOP_DEV of an open device: {refused:?}"
            );
        } else {
            let refused = control.try_stop_dev(id, Duration::from_secs(10));
            ensure!(matches!(refused, Err(ControlError::Unsupported { .. })), "{refused:?}");
        }
        let start = Instant::now();
        control.stop_dev(id, Duration::from_secs(10))?;
        measured("milliseconds of a STOP_DEV while open", start.elapsed().as_millis());
        server.kill()?;
        let start = Instant::now();
        if wait {
            match control.del_dev(id, Duration::from_millis(300)) {
                Err(ControlError::TimedOut { still_running: false, .. }) => {}
                other => bail!("DEL_DEV of an open device: {other:?}"),
            }
        } else {
            control.del_dev_async(id, Duration::from_secs(10))?;
            measured("milliseconds of a DEL_DEV_ASYNC while open", start.elapsed().as_millis());
        }
        println!("after the deletion, still open: {:?}", control.get_dev_info(id).map(|info| info.state));
        let again = NewDevice { id: Some(id), ..NewDevice::new(1, Cookie::random()) };
        ensure!(
            matches!(control.add_dev(&again), Err(ControlError::Exists { .. })),
            "the number is not free yet"
        );
        drop(user);
        let mut freed = None;
        let waited = wait_until("the number", Duration::from_secs(10), || {
            freed = control.add_dev(&again).ok();
            freed.is_some()
        })?;
        measured("milliseconds from the last close to a free number", waited.as_millis());
        control.del_dev(id, Duration::from_secs(10))?;
    }
    Ok(())
}

fn size_changes_where_the_kernel_can() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let mut control = Control::open()?;
    let resized = control.update_size(server.id(), SIZE_BYTES / 2);
    if kernel_features()?.contains(Features::UPDATE_SIZE) {
        resized?;
        ensure!(sysfs(server.id(), "size")? == (SIZE_BYTES / 1024).to_string());
        ensure!(control.get_params(server.id())?.size_bytes == SIZE_BYTES / 2);
    } else {
        ensure!(matches!(resized, Err(ControlError::Unsupported { .. })), "{resized:?}");
    }
    server.stop()
}

fn a_live_server_is_not_replaced() -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let server = Server::start(&options)?;
    let mut control = Control::open()?;
    let start = Instant::now();
    let refused = control.start_user_recovery(server.id(), Duration::from_millis(200));
    ensure!(matches!(refused, Err(ControlError::Busy { .. })), "{refused:?}");
    ensure!(start.elapsed() >= Duration::from_millis(200));
    DirectFile::open(&server.id().block_path(), 0)?.write(&random_bytes(1, 4096), 0)?;
    server.stop()
}

/// fio writes and verifies while its server is killed twice.
fn io_goes_on_after_sigkill() -> Result<()> {
    let (_directory, options) = options(&["one", "two"])?;
    let mut server = Server::start(&options)?;
    let path = block_path(server.id());
    let mut fio = Command::new("fio")
        .args([
            "--name=v",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k,4k,4k",
            "--iodepth=12",
        ])
        .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--size=16m", "--io_size=12m"])
        .args(["--randrepeat=1", "--norandommap=0", "--output-format=terse", &format!("--filename={path}")])
        .stdout(Stdio::piped())
        .spawn()?;
    for kill in 1..=2 {
        let before = server.counters().writes;
        wait_until("some writes", Duration::from_secs(60), || server.counters().writes > before + 150)?;
        let id = server.id();
        server.kill()?;
        let mut control = Control::open()?;
        println!("killed: {:?}", control.get_dev_info(id)?);
        server = Server::start(&options)?;
        measured(
            &format!("kill {kill}, milliseconds to announced, to served"),
            format!("{}, {}", server.announced_ms, server.ready_ms),
        );
        ensure!(server.id() == id && server.said.is_empty(), "{:?} {:?}", server.ids, server.said);
        ensure!(control.get_dev_info(id)?.state == DeviceState::Live);
    }
    ensure!(fio.try_wait()?.is_none(), "fio was to be still running");
    let status = fio.wait()?;
    ensure!(status.success(), "fio: {status}");
    let counters = server.counters();
    println!("{counters:?}");
    ensure!(counters.reads * 4096 >= 12 << 20, "fio verified all of it");
    server.stop()
}

fn sigkill_with_every_tag_in_flight() -> Result<()> {
    every_tag_in_flight(false)
}

fn sigkill_with_every_tag_and_a_long_timeout() -> Result<()> {
    every_tag_in_flight(true)
}

/// The server dies holding every tag of every queue: nothing is left by which an old kernel would notice at once.
fn every_tag_in_flight(long_io_timeout: bool) -> Result<()> {
    let (_directory, options) = options(&["one"])?;
    let options = Options { long_io_timeout, ..options };
    let server = Server::start(&options)?;
    let id = server.id();
    hold(&options)?;
    let before = server.counters().held;
    let tags = u64::from(DEPTH) * u64::from(QUEUES);
    // The processor that writes decides on the queue, so each gets its share.
    let processors = thread::available_parallelism()?.get() as u64;
    let writers: Vec<_> = (0..tags * 2)
        .map(|at| {
            thread::spawn(move || -> Result<()> {
                let mut processor = CpuSet::new();
                processor.set((at % processors) as usize)?;
                sched_setaffinity(Pid::from_raw(0), &processor)?;
                DirectFile::open(&id.block_path(), 0)?.write(&random_bytes(at, 4096), at * 4096)
            })
        })
        .collect();
    let filled = wait_until("every tag", Duration::from_secs(10), || server.counters().held >= before + tags);
    measured("tags held of all", format!("{} of {tags}", server.counters().held - before));
    filled?;
    server.kill()?;
    release(&options);
    let server = Server::start(&options)?;
    measured(
        &format!(
            "all tags in flight, timeout {} ms: milliseconds to announced",
            sysfs(id, "queue/io_timeout")?
        ),
        server.announced_ms,
    );
    for writer in writers {
        writer.join().expect("no panic")?;
    }
    let mut file = DirectFile::open(&id.block_path(), 0)?;
    for at in 0..tags * 2 {
        ensure!(file.read(4096, at * 4096)? == random_bytes(at, 4096), "block {at}");
    }
    server.stop()
}

/// The second server dies as well: before any queue was fetched, between the queues, and when all were. A kernel
/// before 6.16 must not be asked a second time: it crashes if the queues differ. A single queue cannot.
fn death_in_the_middle_of_a_recovery() -> Result<()> {
    for (queues, fetched) in [(QUEUES, 0), (QUEUES, 1), (QUEUES, QUEUES), (1, 0), (1, 1)] {
        let (_directory, options) = options(&["one"])?;
        let options = Options { queues, ..options };
        let server = Server::start(&options)?;
        let id = server.id();
        let held = server.counters().held;
        hold(&options)?;
        let writer = thread::spawn(move || -> Result<()> {
            DirectFile::open(&id.block_path(), 0)?.write(&random_bytes(3, 4096), 0)
        });
        wait_until("the write", Duration::from_secs(10), || server.counters().held > held)?;
        server.kill()?;
        release(&options);

        let dying = Options { die_after_queues: Some(fetched), ..options.clone() };
        let mut second = Server::spawn(&dying)?;
        ensure!(second.child.wait()?.success(), "the second server was to die by itself");
        let mut control = Control::open()?;
        println!("after the second death: {:?}", control.get_dev_info(id)?);
        drop(second);

        let start = Instant::now();
        let third = Server::start(&options)?;
        let written = writer.join().expect("no panic");
        let recovered = third.said.is_empty();
        let recovers_twice =
            kernel_features()?.contains(Features::PER_IO_DAEMON) || (queues, fetched) == (1, 1);
        ensure!(recovered == recovers_twice, "{:?}", third.said);
        measured(
            &format!("death after {fetched} of {queues} queues: recovered by the third server"),
            format!("{recovered}, after {} ms, the waiting write: {written:?}", start.elapsed().as_millis()),
        );
        if recovered {
            written?;
            let found = DirectFile::open(&third.id().block_path(), 0)?.read(4096, 0)?;
            ensure!(found == random_bytes(3, 4096), "the write was repeated");
        } else {
            println!("{:?}", third.said);
            ensure!(third.said[0].starts_with("unrecoverable"));
            ensure!(written.is_err(), "a discarded device fails what waits");
        }
        third.stop()?;
    }
    Ok(())
}

fn records_find_devices_and_tell_stale_ones() -> Result<()> {
    let (directory, options) = options(&["one"])?;
    let records = Records::open(&directory.path().join("run"), NODE)?;
    let mut control = Control::open()?;
    let survey = |control: &mut Control| -> Result<Vec<Survivor>> {
        Ok(recovery::survey(control, records.load()?.into_iter().collect::<Result<Vec<DeviceRecord>, _>>()?)?)
    };

    // Died before the number was recorded.
    let mut record = DeviceRecord::new("one", Cookie::random(), server::params());
    records.save(&record)?;
    ensure!(matches!(survey(&mut control)?[..], [Survivor::Stale { .. }]));
    let added = control.add_dev(&NewDevice::new(1, record.cookie))?;
    let found = survey(&mut control)?;
    let [Survivor::NotStarted { info, .. }] = &found[..] else { bail!("{found:?}") };
    ensure!(info.id == added.id);
    // Somebody else has the recorded number.
    record.id = Some(UblkId(added.id.0 + 1));
    records.save(&record)?;
    let other = control.add_dev(&NewDevice { id: record.id, ..NewDevice::new(1, Cookie::random()) })?;
    let found = survey(&mut control)?;
    let [Survivor::NotStarted { info, .. }] = &found[..] else { bail!("{found:?}") };
    ensure!(info.id == added.id && other.id != added.id);
    recovery::discard(&mut control, added.id, Duration::from_secs(10))?;
    wait_until("the deletion", Duration::from_secs(5), || existing_devices() == [other.id])?;
    ensure!(matches!(survey(&mut control)?[..], [Survivor::Stale { .. }]));
    ensure!(shorten_io_timeout(added.id, Duration::from_secs(1)).is_err());
    control.del_dev(other.id, Duration::from_secs(10))?;

    // A server forgets the stale record and adds the device anew; its record leads to it when it is dead.
    let server = Server::start(&options)?;
    ensure!(server.said == ["stale one"], "{:?}", server.said);
    let id = server.id();
    server.kill()?;
    let found = survey(&mut control)?;
    let Some(Survivor::Orphan(orphan)) = found.into_iter().next() else { bail!("no orphan") };
    ensure!(orphan.info().id == id && orphan.record().id == Some(id));
    // And this very process can take it as far as the fetches, which it then does not do.
    let claim = ClaimConfirmed { generation: 7 };
    let mut reattaching = orphan.start(&mut control, &records, claim, Duration::from_secs(30))?;
    ensure!(records.load()?[0].as_ref().is_ok_and(|record| record.reattaching));
    // It may be asked for again: the fetches may come yet.
    for _ in 0..2 {
        let refused = reattaching.end(&mut control, &records, Duration::from_millis(300)).unwrap_err();
        println!("{refused}");
        ensure!(refused.to_string().contains("withdrawn"));
    }
    recovery::discard(&mut control, id, Duration::from_secs(10))?;
    Ok(())
}
