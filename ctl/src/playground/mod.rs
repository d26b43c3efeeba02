//! A whole cluster on this machine: a manager or several, a few daemons, files for disks.
//!
//! The playground process is the parent of everything it starts and ends it with itself. `playground
//! kill` and `start` ask that process over a socket in the directory, so that a daemon started anew
//! is its child as well, and no process is ever named by a number that may have been used again.

mod children;
mod control;
mod directory;
mod lineup;

use crate::cli::{Topology, commit, on_no_quorum, topology};
use crate::failure::{Failure, OK};
use crate::output;
use clap::{Args, Subcommand};
use lineup::Playground;
use mirror_net::config::{Frontend, parse_bytes};
use mirror_net::map::{Commit, OnNoQuorum};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The arguments of `mirrorctl playground`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct PlaygroundArguments {
    /// What to do with a playground that runs
    #[command(subcommand)]
    verb: Option<PlaygroundVerb>,
    /// Nodes that hold data
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=64))]
    nodes: u16,
    /// Managers; several need --etcd
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    managers: u16,
    /// Keep the map in this etcd: the client URLs of its members, http:// only; what is written stays there
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Nodes that hold none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    spares: u16,
    /// For how long a node has to be away until its copies are made again on a spare; such as 5s
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    spare_after: Option<Duration>,
    /// For how long a node has to be silent until it has failed; longer where machines are slow, such as 10s
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    fail_after: Option<Duration>,
    /// Who mirrors whom [default: pairs]
    #[arg(long, value_parser = topology, value_name = "pair|chain|sets|any")]
    layout: Option<Topology>,
    /// Copies of everything in primary segments, each on a node of its own [default: 2]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    copies: Option<u8>,
    /// When a mirror acknowledges a write: once its disk has it, or once its memory has it
    #[arg(long, value_parser = commit, value_name = "immediate|deferred")]
    commit: Option<Commit>,
    /// What becomes of a request that cannot be served: it waits, or fails after 10 s
    #[arg(long, value_parser = on_no_quorum, value_name = "wait|error")]
    on_no_quorum: Option<OnNoQuorum>,
    /// How fast copies are made, at most: bytes in a second that each node looks at, such as 50M [default: unlimited]
    #[arg(long, value_parser = size, value_name = "SIZE")]
    regen_rate: Option<u64>,
    /// The size of each node's disk, a file; such as 512M or 1G
    #[arg(long, default_value = "1G", value_parser = size, value_name = "SIZE")]
    disk_size: u64,
    /// How devices are exported
    #[arg(long, default_value = "auto", value_parser = frontend, value_name = "auto|ublk|nbd")]
    frontend: Frontend,
    /// NBD exports listen on a port of 127.0.0.1 instead of a unix socket
    #[arg(long)]
    nbd_tcp: bool,
    /// Keep the files when it ends
    #[arg(long)]
    keep: bool,
    /// Print JSON once everything runs
    #[arg(long)]
    json: bool,
}

/// Verbs for a playground that runs.
#[derive(Subcommand, Debug)]
pub enum PlaygroundVerb {
    /// Kill a node's daemon (or the `manager`, `manager-2`, …) with SIGKILL
    Kill {
        /// The node
        node: String,
    },
    /// Start it again
    Start {
        /// The node
        node: String,
    },
}

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).ok_or_else(|| "write a size such as 512M or 1G".to_owned())
}

fn frontend(text: &str) -> Result<Frontend, String> {
    Frontend::parse(text).ok_or_else(|| "it is one of auto, ublk, nbd".to_owned())
}

/// What is asked of a new playground.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Absolute.
    dir: PathBuf,
    managers: u16,
    etcd: Vec<String>,
    nodes: u16,
    spares: u16,
    fail_after: Option<Duration>,
    spare_after: Option<Duration>,
    regen_rate: Option<u64>,
    layout: Option<Topology>,
    copies: Option<u8>,
    commit: Option<Commit>,
    on_no_quorum: Option<OnNoQuorum>,
    disk_bytes: u64,
    frontend: Frontend,
    nbd_tcp: bool,
    keep: bool,
}

/// `mirrorctl playground`.
pub async fn run(dir: &Path, arguments: PlaygroundArguments) -> Result<u8, Failure> {
    let dir = std::path::absolute(dir)
        .map_err(|error| Failure::new(format!("{}: not a path: {error}", dir.display())))?;
    match arguments.verb {
        Some(PlaygroundVerb::Kill { node }) => {
            control::ask(&dir, control::Request::Kill { name: node }).await
        }
        Some(PlaygroundVerb::Start { node }) => {
            control::ask(&dir, control::Request::Start { name: node }).await
        }
        None => {
            let PlaygroundArguments { managers, etcd, nodes, spares, fail_after, spare_after, .. } =
                arguments;
            let PlaygroundArguments { regen_rate, layout, copies, commit, on_no_quorum, .. } = arguments;
            let PlaygroundArguments { frontend, nbd_tcp, keep, json, disk_size: disk_bytes, .. } = arguments;
            if managers > 1 && etcd.is_empty() {
                return Err(Failure::usage("several managers share an etcd: add --etcd URL"));
            }
            let wanted = Wanted {
                dir,
                managers,
                etcd,
                nodes,
                spares,
                fail_after,
                spare_after,
                regen_rate,
                layout,
                copies,
                commit,
                on_no_quorum,
                disk_bytes,
                frontend,
                nbd_tcp,
                keep,
            };
            play(wanted, json).await
        }
    }
}

async fn play(wanted: Wanted, json: bool) -> Result<u8, Failure> {
    // Before anything is made: what is made must be taken away again.
    let mut stop = Stop::new()?;
    let mut playground = Playground::prepare(wanted)?;
    let result = tokio::select! {
        result = run_until_failure(&mut playground, json) => result,
        () = stop.asked() => Ok(()),
    };
    playground.down().await;
    result.map(|()| OK)
}

async fn run_until_failure(playground: &mut Playground, json: bool) -> Result<(), Failure> {
    let running = playground.up().await?;
    if json {
        output::print_json(&running)?;
    } else {
        output::print(&running.text());
    }
    playground.serve().await
}

/// SIGINT, SIGTERM or SIGHUP.
struct Stop([Signal; 3]);

impl Stop {
    fn new() -> Result<Self, Failure> {
        let signals =
            |kind| signal(kind).map_err(|error| Failure::new(format!("cannot take signals: {error}")));
        Ok(Self([
            signals(SignalKind::interrupt())?,
            signals(SignalKind::terminate())?,
            signals(SignalKind::hangup())?,
        ]))
    }

    async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {},
            _ = terminate.recv() => {},
            _ = hangup.recv() => {},
        }
    }
}
