//!
//! One file a noun. Every command ends with 0, or with exactly one line on stderr that says what is
//! wrong, where, and what to do, and one of the exit codes in [`failure`].
#![forbid(unsafe_code)]

mod broadcast;
mod cli;
pub mod client;
mod cluster;
mod device;
mod disk;
mod enrol;
mod events;
pub mod failure;
mod import;
pub mod json;
pub mod key;
pub mod manager;
mod map;
pub mod nbd;
mod node;
mod output;
mod picture;
mod plan;
pub mod playground;
mod redistribution;
mod risk;

#[cfg(test)]
mod snapshots;
mod status;

use clap::Parser;
use cli::{
    BroadcastVerb, Cli, ClusterVerb, Command, DeviceVerb, DiskVerb, KeyVerb, ManagerVerb, MapVerb, NodeVerb,
    PlanVerb, SpareVerb,
};
use failure::Failure;
use mirror_net::control::{BroadcastKind, PlanOrder};
use std::process::ExitCode;

/// Reads the command line, does what it says, and reports.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            output::print(&error.to_string());
            return ExitCode::SUCCESS;
        }
        Err(error) => return failure::report(&cli::usage(&error)),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(&Failure::new(format!("cannot start: {error}"))),
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure::report(&failure),
    }
}

async fn run(cli: Cli) -> Result<u8, Failure> {
    let config = cli.config_path();
    match cli.command {
        Command::Key { verb: KeyVerb::New { out } } => key::new(&out),
        Command::Cluster { verb: ClusterVerb::Create { file, force, json } } => {
            cluster::create(&file.unwrap_or(config), force, json).await
        }
        Command::Manager { verb: ManagerVerb::Run { state_dir, address, no_auto } } => {
            manager::run(&config, &state_dir, address.as_deref(), no_auto).await
        }
        Command::Map { verb: MapVerb::Rebuild(arguments) } => {
            map::rebuild(&config, arguments.force_without, arguments.dry_run).await
        }
        Command::Map { verb: MapVerb::Balance { json } } => map::balance(&config, json).await,
        Command::Map { verb: MapVerb::Show { svg: Some(file), .. } } => map::draw(&config, &file).await,
        Command::Map { verb: MapVerb::Show { dot: true, .. } } => map::dot(&config).await,
        Command::Map { verb: MapVerb::Show { json, .. } } => map::show(&config, json).await,
        Command::Status { json } => status::status(&config, json).await,
        Command::Node { verb: NodeVerb::Failover { node, json } } => {
            node::failover(&config, &node, json).await
        }
        Command::Node { verb: NodeVerb::Add(arguments) } => enrol::add_node(&config, arguments).await,
        Command::Disk { verb: DiskVerb::Add(arguments) } => enrol::add_disk(&config, arguments).await,
        Command::Disk { verb: DiskVerb::List { json } } => disk::list(&config, json).await,
        Command::Node { verb: NodeVerb::Remove(arguments) } => {
            redistribution::remove_node(&config, arguments).await
        }
        Command::Disk { verb: DiskVerb::Remove(arguments) } => {
            redistribution::remove_disk(&config, arguments).await
        }
        Command::Node { verb: NodeVerb::Force(arguments) } => node::force(&config, &arguments).await,
        Command::Device { verb } => match verb {
            DeviceVerb::List { json } => device::list(&config, json).await,
            DeviceVerb::Create(arguments) => device::create(&config, arguments).await,
            DeviceVerb::Import { name, source } => import::import(&config, &name, &source, false).await,
            DeviceVerb::Delete { name, yes, force, dry_run } => {
                device::delete(&config, &name, yes, force, dry_run).await
            }
            DeviceVerb::Resize { name, size, dry_run } => device::resize(&config, &name, size, dry_run).await,
            DeviceVerb::Set { name, what, dry_run } => device::set(&config, &name, what, dry_run).await,
        },
        Command::Broadcast { verb } => {
            let (kind, json) = match verb {
                BroadcastVerb::Checksum { json } => (BroadcastKind::Checksum, json),
                BroadcastVerb::Usage { json } => (BroadcastKind::Usage, json),
                BroadcastVerb::Flush { json } => (BroadcastKind::Flush, json),
            };
            broadcast::broadcast(&config, kind, json).await
        }
        Command::Spare { verb: SpareVerb::Make(arguments) } => {
            redistribution::make_spare(&config, arguments).await
        }
        Command::Risk(arguments) => risk::risk_of_cluster(&config, &arguments).await,
        Command::Topology { topology, copies, dry_run } => {
            redistribution::topology(&config, topology, copies, dry_run).await
        }
        Command::Rebalance { dry_run } => redistribution::rebalance(&config, dry_run).await,
        Command::Plan { verb: PlanVerb::List { json } } => plan::list(&config, json).await,
        Command::Plan { verb: PlanVerb::Show { plan, json } } => plan::show(&config, plan, json).await,
        Command::Plan { verb: PlanVerb::Watch { plan } } => plan::watch(&config, plan).await,
        Command::Plan { verb: PlanVerb::Pause { plan } } => {
            plan::order(&config, plan, PlanOrder::Pause).await
        }
        Command::Plan { verb: PlanVerb::Resume { plan } } => {
            plan::order(&config, plan, PlanOrder::Resume).await
        }
        Command::Plan { verb: PlanVerb::Cancel { plan } } => {
            plan::order(&config, plan, PlanOrder::Cancel).await
        }
        Command::Events { follow, json } => events::events(&config, follow, json).await,
        Command::Disk { verb: DiskVerb::Inspect { path, slots, json } } => disk::inspect(&path, slots, json),
        Command::Playground(arguments) => {
            let dir = cli.dir.ok_or_else(|| {
                Failure::usage(
                    "playground needs --dir DIR, the directory for its files; `mirrorctl --help` says more",
                )
            })?;
            playground::run(&dir, arguments).await
        }
    }
}
