//! The command line: `mirrorctl <noun> <verb>`.

use crate::failure::Failure;
use crate::playground::PlaygroundArguments;
use clap::{Parser, Subcommand};
use mirror_net::config::Segments;
use mirror_net::map::{Commit, OnNoQuorum};
use std::path::PathBuf;
use std::time::Duration;

/// Where the cluster file is unless the command line or the environment says otherwise.
const CONFIG_DEFAULT: &str = "/etc/ublk-mirror/cluster.toml";

/// Control a cluster of mirrored disks.
///
/// Exit codes: 0 done (status: healthy), 1 failed (status: degraded), 2 status: some data
/// unavailable, 3 the manager cannot be reached, 64 wrong usage.
#[derive(Parser, Debug)]
#[command(name = "mirrorctl", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// The cluster file
    #[arg(long, global = true, env = "UBLK_MIRROR_CONFIG", value_name = "FILE", default_value = CONFIG_DEFAULT)]
    config: PathBuf,
    /// A playground's directory: its cluster file is used
    #[arg(long, global = true, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The cluster file that the command is about.
    pub fn config_path(&self) -> PathBuf {
        match &self.dir {
            Some(dir) => dir.join("cluster.toml"),
            None => self.config.clone(),
        }
    }
}

/// The nouns.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// The secret that all parts of a cluster share
    Key {
        /// What to do
        #[command(subcommand)]
        verb: KeyVerb,
    },
    /// The cluster as a whole
    Cluster {
        /// What to do
        #[command(subcommand)]
        verb: ClusterVerb,
    },
    /// The system manager
    Manager {
        /// What to do
        #[command(subcommand)]
        verb: ManagerVerb,
    },
    /// The distribution map
    Map {
        /// What to do
        #[command(subcommand)]
        verb: MapVerb,
    },
    /// What is well, what is not, and what to type about it
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// The machines
    Node {
        /// What to do
        #[command(subcommand)]
        verb: NodeVerb,
    },
    /// The exported devices
    Device {
        /// What to do
        #[command(subcommand)]
        verb: DeviceVerb,
    },
    /// Ask all nodes at once, each for what it serves now
    Broadcast {
        /// What they are asked for
        #[command(subcommand)]
        verb: BroadcastVerb,
    },
    /// Disks that hold nothing until they take the place of others
    Spare {
        /// What to do
        #[command(subcommand)]
        verb: SpareVerb,
    },
    /// Make all disks that are in use equally full, and bring primaries home
    Rebalance {
        /// Only show what would be moved
        #[arg(long)]
        dry_run: bool,
    },
    /// Who mirrors whom, and how many copies there are of everything; changed online
    Topology {
        /// pair: nodes mirror each other two by two; chain: each is mirrored by the next; sets: copies are in different
        /// failure sets, by power and by switch; any: whatever these rules of the map allow
        #[arg(value_parser = topology, value_name = "pair|chain|sets|any")]
        topology: Option<Topology>,
        /// Copies of every mirrored device, in all
        #[arg(long, requires = "topology", value_parser = clap::value_parser!(u8).range(1..=3), value_name = "1|2|3")]
        copies: Option<u8>,
        /// Only show what would be moved, and what is at risk meanwhile
        #[arg(long, requires = "topology")]
        dry_run: bool,
    },
    /// How likely data is lost in a year, as it is laid out and as it could be
    Risk(RiskArguments),
    /// What is being moved
    Plan {
        /// What to do
        #[command(subcommand)]
        verb: PlanVerb,
    },
    /// What happened, and why
    Events {
        /// Go on until interrupted
        #[arg(long)]
        follow: bool,
        /// Print JSON, an object a line
        #[arg(long)]
        json: bool,
    },
    /// The disks of nodes
    Disk {
        /// What to do
        #[command(subcommand)]
        verb: DiskVerb,
    },
    /// A whole cluster on this machine, for trying things out
    Playground(PlaygroundArguments),
}

/// Verbs of `key`.
#[derive(Subcommand, Debug)]
pub enum KeyVerb {
    /// Make a new cluster key; an existing file is never overwritten
    New {
        /// Where to write it
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

/// Verbs of `cluster`.
#[derive(Subcommand, Debug)]
pub enum ClusterVerb {
    /// Format the disks of every node of the cluster file and make the first map
    Create {
        /// The cluster file [default: that of --config]
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Format over whatever is on the disks: it is destroyed
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Verbs of `manager`.
#[derive(Subcommand, Debug)]
pub enum ManagerVerb {
    /// Run the system manager
    Run {
        /// Where the map and what happened are kept, unless the cluster file says in an etcd
        #[arg(long, value_name = "DIR", default_value = "/var/lib/ublk-mirror/manager")]
        state_dir: PathBuf,
        /// Which of the cluster file's manager addresses this one is [default: the first that this
        /// machine has]
        #[arg(long, value_name = "HOST:PORT")]
        address: Option<String>,
        /// Where there is no spare for copies that are gone, empty no disk to make one
        #[arg(long)]
        no_auto: bool,
    },
}

/// What [`Command::Risk`] is told.
#[derive(clap::Args, Debug)]
pub struct RiskArguments {
    /// Mean time until a disk fails
    #[arg(long, default_value = "50years", value_parser = time, value_name = "TIME")]
    pub disk_mttf: Duration,
    /// Mean time until a node is lost with all its disks
    #[arg(long, default_value = "20years", value_parser = time, value_name = "TIME")]
    pub node_mttf: Duration,
    /// Mean time until a power feed or a switch takes all its nodes with it for good
    #[arg(long, default_value = "200years", value_parser = time, value_name = "TIME")]
    pub set_mttf: Duration,
    /// Bytes in a second that a disk takes while it is filled
    #[arg(long, default_value = "100MiB", value_parser = size, value_name = "SIZE")]
    pub rate: u64,
    /// Where there is no spare: how long it takes until a lost disk is replaced
    #[arg(long, default_value = "3days", value_parser = time, value_name = "TIME")]
    pub replace_after: Duration,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A topology that is asked for; `None` for any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology(pub Option<mirror_net::map::Topology>);

pub(crate) fn topology(text: &str) -> Result<Topology, String> {
    match (mirror_net::map::Topology::parse(text), text) {
        (None, "any") => Ok(Topology(None)),
        (None, _) => Err("it is one of pair, chain, sets, any".to_owned()),
        (known, _) => Ok(Topology(known)),
    }
}

fn time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time.is_zero() { Err("it has to be longer than nothing".to_owned()) } else { Ok(time) }
}

fn size(text: &str) -> Result<u64, String> {
    let size = mirror_net::config::parse_bytes(text).filter(|size| *size > 0);
    size.ok_or_else(|| format!("{text:?} is not a size such as \"100MiB\""))
}

/// Verbs of `spare`.
#[derive(Subcommand, Debug)]
pub enum SpareVerb {
    /// Move everything away from a node or a disk, online; afterwards its disks are spares
    Make(SpareMakeArguments),
}

/// What [`SpareVerb::Make`] is told.
#[derive(clap::Args, Debug)]
pub struct SpareMakeArguments {
    /// The node, with all its disks
    #[arg(required_unless_present = "disk", conflicts_with = "disk")]
    pub node: Option<String>,
    /// One disk of a node
    #[arg(long, value_name = "NODE/DISK")]
    pub disk: Option<String>,
    /// Where it goes: nodes or disks, spares too [default: all disks that are in use]
    #[arg(long, value_name = "NODE[/DISK],…", value_delimiter = ',')]
    pub onto: Vec<String>,
    /// Only show what would be moved, and what is at risk meanwhile
    #[arg(long)]
    pub dry_run: bool,
}

/// Verbs of `map`.
#[derive(Subcommand, Debug)]
pub enum MapVerb {
    /// Show how full every disk is, and how much is served from it
    Balance {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make it again after the loss of every store
    Rebuild(RebuildArguments),
    /// Show where every slice lies
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Draw nodes, disks and who mirrors whom into this file
        #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "dot"])]
        svg: Option<PathBuf>,
        /// Print the same for Graphviz
        #[arg(long, conflicts_with = "json")]
        dot: bool,
    },
}

/// What [`MapVerb::Rebuild`] is told.
#[derive(clap::Args, Debug)]
pub struct RebuildArguments {
    /// From the newest map that any node has kept; there is no other source
    #[arg(long, required = true)]
    from_nodes: bool,
    /// Go on without this node, which is gone: what it has in sync waits for it
    #[arg(long, value_name = "NODE")]
    pub force_without: Vec<String>,
    /// Only show what would be stored
    #[arg(long)]
    pub dry_run: bool,
}

/// Verbs of `node`.
#[derive(Subcommand, Debug)]
pub enum NodeVerb {
    /// Move every role and claim of a node to its partners
    Failover {
        /// The node's name
        node: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take a node of the cluster file into a running cluster; its disks are formatted, and empty
    Add(NodeAddArguments),
    /// Move everything away from a node, online; afterwards it is no part of the cluster any more
    Remove(NodeRemoveArguments),
    /// Go on from a node's copies that are not in sync, where every other is lost: what they lack is lost too
    Force(ForceArguments),
}

/// What [`NodeVerb::Force`] is told.
#[derive(clap::Args, Debug)]
pub struct ForceArguments {
    /// The node whose copies go on
    pub node: String,
    /// Only this device; may be repeated
    #[arg(long, value_name = "DEVICE")]
    pub device: Vec<String>,
    /// This node, which may have newer data, is off and stays off until it finds the new map; may be repeated
    #[arg(long, value_name = "NODE")]
    pub confirmed_off: Vec<String>,
    /// Do it; without this, only show what would be lost
    #[arg(long)]
    pub yes: bool,
}

/// Verbs of `device`.
#[derive(Subcommand, Debug)]
pub enum DeviceVerb {
    /// List the devices and where they are to be found
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a device; it reads as zeros
    Create(DeviceCreateArguments),
    /// Fill a device from a file or block device; on the node that exports it
    Import {
        /// The device's name
        name: String,
        /// Where the data is
        source: PathBuf,
    },
    /// Delete a device with all that is on it
    Delete {
        /// Its name
        name: String,
        /// It is meant: do not ask
        #[arg(long)]
        yes: bool,
        /// Though it is in use: whoever uses it gets errors
        #[arg(long)]
        force: bool,
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a device longer, online
    Resize {
        /// Its name
        name: String,
        /// Its size from now on, rounded up to whole slices
        #[arg(value_parser = size)]
        size: u64,
        /// Only show where the rest would lie
        #[arg(long)]
        dry_run: bool,
    },
    /// Change how many copies a device has, and what it promises; online
    Set {
        /// Its name
        name: String,
        /// What is changed
        #[command(flatten)]
        what: DeviceSetArguments,
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

/// What [`DeviceVerb::Create`] is told.
#[derive(clap::Args, Debug)]
pub struct DeviceCreateArguments {
    /// Its name: letters, digits, '.', '_' and '-'
    pub name: String,
    /// Its size, rounded up to whole slices; with --import that of the source
    #[arg(long, value_parser = size, value_name = "SIZE", required_unless_present = "import")]
    pub size: Option<u64>,
    /// The node that exports it, and on whose disks it is at home
    #[arg(long, value_name = "NODE")]
    pub node: String,
    /// Copies in all
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3), value_name = "1|2|3")]
    pub copies: u8,
    /// One copy, in an unmirrored segment
    #[arg(long, conflicts_with = "copies")]
    pub unmirrored: bool,
    /// When a mirror acknowledges a write: once its disk has it, or once its memory has it
    #[arg(long, default_value = "immediate", value_parser = commit, value_name = "immediate|deferred")]
    pub commit: Commit,
    /// What becomes of a request that cannot be served: it waits, or fails
    #[arg(long, default_value = "wait", value_parser = on_no_quorum, value_name = "wait|error")]
    pub on_no_quorum: OnNoQuorum,
    /// Fill it from this file or block device; on the node that exports it
    #[arg(long, value_name = "FILE|DEV")]
    pub import: Option<PathBuf>,
    /// Only show where it would lie
    #[arg(long)]
    pub dry_run: bool,
}

/// What [`DeviceVerb::Set`] is told.
#[derive(clap::Args, Debug)]
#[group(required = true, multiple = true, id = "what")]
pub struct DeviceSetArguments {
    /// Copies in all; made or dropped online, by a plan
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3), value_name = "1|2|3", group = "what")]
    pub copies: Option<u8>,
    /// When a mirror acknowledges a write
    #[arg(long, value_parser = commit, value_name = "immediate|deferred", group = "what")]
    pub commit: Option<Commit>,
    /// What becomes of a request that cannot be served
    #[arg(long, value_parser = on_no_quorum, value_name = "wait|error", group = "what")]
    pub on_no_quorum: Option<OnNoQuorum>,
}

pub(crate) fn commit(text: &str) -> Result<Commit, String> {
    Commit::parse(text).ok_or_else(|| "it is one of immediate, deferred".to_owned())
}

pub(crate) fn on_no_quorum(text: &str) -> Result<OnNoQuorum, String> {
    OnNoQuorum::parse(text).ok_or_else(|| "it is one of wait, error".to_owned())
}

/// Verbs of `broadcast`.
#[derive(Subcommand, Debug)]
pub enum BroadcastVerb {
    /// A checksum of every device's content, computed where it lies
    Checksum {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// How much of every device holds data
    Usage {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Flush every device to stable storage, on all copies
    Flush {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Verbs of `plan`.
#[derive(Subcommand, Debug)]
pub enum PlanVerb {
    /// List the plans and how far they are
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show every move of a plan
    Show {
        /// The plan's number
        plan: u64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how it goes on until it is done: a bar for a person, lines in a pipe
    Watch {
        /// The plan's number
        plan: u64,
    },
    /// Copy nothing until it is resumed
    Pause {
        /// The plan's number
        plan: u64,
    },
    /// Go on with it
    Resume {
        /// The plan's number
        plan: u64,
    },
    /// Take back what has not taken its new place yet
    Cancel {
        /// The plan's number
        plan: u64,
    },
}

/// Percent of a disk for each segment, as `--segments` spells it.
#[derive(Clone, Copy, Debug)]
pub struct SegmentShares(pub [u8; 3]);

fn segment_shares(text: &str) -> Result<SegmentShares, String> {
    let shares: Option<Vec<u8>> = text.split('/').map(|share| share.parse().ok()).collect();
    let shares: Option<[u8; 3]> = shares.and_then(|shares| shares.try_into().ok());
    shares.filter(|shares| Segments::of(*shares).is_some()).map(SegmentShares).ok_or_else(|| {
        "three percentages that add up to 100: for primaries, mirrors, and what nobody mirrors".to_owned()
    })
}

/// What [`DiskVerb::Add`] is told.
#[derive(clap::Args, Debug)]
pub struct DiskAddArguments {
    /// Its node, and the name that it is to have
    #[arg(value_name = "NODE/DISK")]
    pub disk: String,
    /// The block device on that node
    pub path: PathBuf,
    /// Percent of it for primaries, mirrors and what nobody mirrors
    #[arg(long, value_name = "P/S/U", value_parser = segment_shares, default_value = "45/45/10")]
    pub segments: SegmentShares,
    /// It holds nothing until it takes the place of another
    #[arg(long)]
    pub spare: bool,
    /// Though it holds something, which is destroyed
    #[arg(long)]
    pub force: bool,
    /// Do nothing, successfully, if the node has a disk of that name already
    #[arg(long)]
    pub if_new: bool,
    /// Only show what it would bring, and what `rebalance` would move then
    #[arg(long)]
    pub dry_run: bool,
}

/// What [`NodeVerb::Add`] is told.
#[derive(clap::Args, Debug)]
pub struct NodeAddArguments {
    /// Its name in the cluster file
    pub node: String,
    /// Though its disks hold something, which is destroyed
    #[arg(long)]
    pub force: bool,
    /// Only show what it would bring, and what `rebalance` would move then
    #[arg(long)]
    pub dry_run: bool,
}

/// What [`DiskVerb::Remove`] is told.
#[derive(clap::Args, Debug)]
pub struct DiskRemoveArguments {
    /// The disk
    #[arg(value_name = "NODE/DISK")]
    pub disk: String,
    /// Where what it holds goes: nodes or disks, spares too [default: all disks that are in use]
    #[arg(long, value_name = "NODE[/DISK],…", value_delimiter = ',')]
    pub onto: Vec<String>,
    /// Only show what would be moved, and what is at risk meanwhile
    #[arg(long)]
    pub dry_run: bool,
}

/// What [`NodeVerb::Remove`] is told.
#[derive(clap::Args, Debug)]
pub struct NodeRemoveArguments {
    /// The node's name
    pub node: String,
    /// Where what it holds goes: nodes or disks, spares too [default: all disks that are in use]
    #[arg(long, value_name = "NODE[/DISK],…", value_delimiter = ',')]
    pub onto: Vec<String>,
    /// Though somebody uses what it exports: he gets errors
    #[arg(long)]
    pub force: bool,
    /// Only show what would be moved, and what is at risk meanwhile
    #[arg(long)]
    pub dry_run: bool,
}

/// Verbs of `disk`.
#[derive(Subcommand, Debug)]
pub enum DiskVerb {
    /// What there is: where, how large, how full, in which state
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take a disk into a running cluster; it is formatted, and empty
    Add(DiskAddArguments),
    /// Move everything away from a disk, online; afterwards it is no part of the cluster any more
    Remove(DiskRemoveArguments),
    /// Show what our metadata on a disk says, damaged or not; without the daemon
    Inspect {
        /// The disk or file
        path: PathBuf,
        /// List every used slot
        #[arg(long)]
        slots: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// A mistake in the command line as one line.
pub fn usage(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let what: Vec<&str> =
        text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")).collect();
    let what: Vec<&str> = what.into_iter().filter(|line| !line.is_empty()).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    // Asked for a noun or verb, clap prints its whole help instead of an error.
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::usage("what to do is missing; `mirrorctl --help` lists it");
    }
    let what = what.strip_suffix("For more information, try '--help'.").unwrap_or(what).trim_end();
    Failure::usage(format!("{what}; `mirrorctl --help` lists what there is"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_mistake_is_one_line() {
        for wrong in [
            &["mirrorctl"][..],
            &["mirrorctl", "map"],
            &["mirrorctl", "map", "shwo"],
            &["mirrorctl", "key", "new"],
            &["mirrorctl", "status", "--jsn"],
        ] {
            let error = Cli::try_parse_from(wrong).unwrap_err();
            let failure = usage(&error);
            assert_eq!(failure.code, 64);
            assert!(!failure.message.contains('\n'), "{}", failure.message);
            assert!(failure.message.ends_with("there is") || failure.message.ends_with("lists it"));
        }
    }

    #[test]
    fn a_playgrounds_directory_names_its_cluster_file() {
        let cli = Cli::try_parse_from(["mirrorctl", "status", "--dir", "/tmp/p"]).unwrap();
        assert_eq!(cli.config_path(), PathBuf::from("/tmp/p/cluster.toml"));
    }
}
