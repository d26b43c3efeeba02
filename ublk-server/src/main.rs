//! `ublk-server`: the daemon of one node.

use anyhow::Context;
use clap::{Parser, Subcommand};
use mirror_net::config::Frontend;
use std::path::PathBuf;
use std::process::ExitCode;
use ublk_server::agent::{self, End, Options};
use ublk_server::driver::BUFFER_BYTES;
use ublk_server::frontend::ublk::control::Control;
use ublk_server::frontend::ublk::process::prepare_process;
use ublk_server::frontend::ublk::removal::remove_devices as remove_devices_of;
use ublk_server::frontend::ublk::{UblkId, names};

/// Exit code for a command line that makes no sense (EX_USAGE).
const USAGE: u8 = 64;
/// The node was removed from the cluster. Its unit names this in `RestartPreventExitStatus`.
const REMOVED: u8 = 3;

#[derive(Parser)]
#[command(version, about = "The daemon of one ublk-mirror node", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground.
    Run(Run),
    /// Print the name in the map of a ublk device of this machine; for udev. Fails if it is none of ours.
    DeviceName(DeviceName),
    /// Remove the ublk devices that this node's daemon left behind because they were in use, where it will not be started
    /// again; whatever waits on them fails.
    RemoveDevices(RemoveDevices),
}

#[derive(Parser)]
struct DeviceName {
    /// The block device, such as /dev/ublkb0.
    device: PathBuf,
    /// The `--run-dir` of its daemon [default: all that are in /run/ublk-mirror].
    #[arg(long)]
    run_dir: Option<PathBuf>,
}

#[derive(Parser)]
struct RemoveDevices {
    /// The node's name in the cluster file [default: the host's name].
    #[arg(long)]
    node: Option<String>,
    /// The `--run-dir` of its daemon [default: /run/ublk-mirror/NODE].
    #[arg(long)]
    run_dir: Option<PathBuf>,
}

#[derive(Parser)]
struct Run {
    /// The cluster file; the same on every machine.
    #[arg(long, env = "UBLK_MIRROR_CONFIG", default_value = "/etc/ublk-mirror/cluster.toml")]
    config: PathBuf,
    /// This node's name in the cluster file [default: the host's name].
    #[arg(long)]
    node: Option<String>,
    /// How devices are exported, instead of what the cluster file says: auto, ublk or nbd.
    #[arg(long, value_parser = frontend)]
    frontend: Option<Frontend>,
    /// Where the newest map is kept [default: /var/lib/ublk-mirror/NODE].
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Where sockets and records of ublk devices are kept [default: /run/ublk-mirror/NODE].
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Memory for requests under way, in MiB.
    #[arg(long, default_value_t = BUFFER_BYTES >> 20)]
    buffers: usize,
}

fn frontend(text: &str) -> Result<Frontend, String> {
    Frontend::parse(text).ok_or_else(|| "it is one of auto, ublk, nbd".to_owned())
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing can be done if standard error is closed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("UBLK_MIRROR_LOG").unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    ublk_server::abort::on_panic();
    let result = match arguments.command {
        Command::Run(run) => match start(run) {
            Ok(End::Removed) => return ExitCode::from(REMOVED),
            ended => ended.map(drop),
        },
        Command::DeviceName(asked) => device_name(asked),
        Command::RemoveDevices(asked) => remove_devices(asked),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ublk-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn device_name(asked: DeviceName) -> anyhow::Result<()> {
    let id = asked.device.to_str().and_then(|path| path.strip_prefix("/dev/ublkb")?.parse().ok()).map(UblkId);
    let id = id.with_context(|| format!("{} is not a path such as /dev/ublkb0", asked.device.display()))?;
    let run_dirs = asked.run_dir.map_or_else(names::run_directories, |given| vec![given]);
    let name = names::name_of(&mut Control::open()?, id, &run_dirs)?;
    println!("{}", name.with_context(|| format!("{} is no device of a node here", asked.device.display()))?);
    Ok(())
}

/// The node that is meant if none is named, and its run directory.
fn node_and_run_dir(node: Option<String>, run_dir: Option<PathBuf>) -> anyhow::Result<(String, PathBuf)> {
    let node = match node {
        Some(node) => node,
        None => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
    };
    let run_dir = run_dir.unwrap_or_else(|| PathBuf::from("/run/ublk-mirror").join(&node));
    Ok((node, run_dir))
}

fn remove_devices(asked: RemoveDevices) -> anyhow::Result<()> {
    let (node, run_dir) = node_and_run_dir(asked.node, asked.run_dir)?;
    anyhow::ensure!(
        run_dir.is_dir(),
        "{} is not there: no daemon of {node} ran on this machine since it was booted, or name its --run-dir",
        run_dir.display()
    );
    for (name, id) in remove_devices_of(&node, &run_dir)? {
        println!("{name}: {} is removed, what waited on it has failed", id.block_path().display());
    }
    Ok(())
}

fn start(run: Run) -> anyhow::Result<End> {
    let (node, run_dir) = node_and_run_dir(run.node, run.run_dir)?;
    let options = Options {
        config: run.config,
        frontend: run.frontend,
        state_dir: run.state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/ublk-mirror").join(&node)),
        run_dir,
        buffer_bytes: run.buffers << 20,
        node,
    };
    // Whether there will be ublk devices is known later; threads, which must not be there yet, are needed to know.
    if options.frontend != Some(Frontend::Nbd) && kmod::probe::probe().is_ok_and(|verdict| verdict.usable()) {
        for trouble in prepare_process() {
            tracing::warn!(trouble, "not protected against waiting for its own devices");
        }
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(agent::run(options))
}
