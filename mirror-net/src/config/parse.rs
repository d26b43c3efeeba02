//! From text to a checked cluster file.

use super::store::{RawStore, StoreFile};
use super::{
    ClusterFile, ConfigError, DiskFile, Frontend, NbdListen, NodeFile, NodePolicy, Pace, Policy,
    SLICE_BYTES_DEFAULT, Segments, Tolerance, check_name, format_bytes, parse_bytes,
};
use crate::map::layout::Layout;
use crate::map::validate::{COPIES_MAX, SLICE_BYTES_MAX, SLICE_BYTES_MIN};
use crate::map::{Commit, DevicePolicy, OnNoQuorum, Topology};
use core::net::{IpAddr, SocketAddr};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;

/// The lowest `regen_rate`, in bytes a second: a region of a slice of the usual size.
const RATE_MIN: u64 = 1 << 20;

pub(super) type Text = Spanned<String>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    cluster: Spanned<RawCluster>,
    store: Option<Spanned<RawStore>>,
    #[serde(default)]
    node: Vec<Spanned<RawNode>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    name: Text,
    slice_size: Option<Text>,
    key_file: Text,
    /// An address, or a list of them.
    manager: Spanned<toml::Value>,
    segments: Option<Spanned<RawSegments>>,
    frontend: Option<Text>,
    nbd: Option<Text>,
    nbd_allow_remote: Option<bool>,
    auto_failover: Option<bool>,
    fail_after: Option<Text>,
    auto_spare: Option<bool>,
    auto_make_spare: Option<bool>,
    spare_after: Option<Text>,
    spread_after: Option<Text>,
    rebalance_above: Option<Spanned<toml::Value>>,
    rebalance_after: Option<Text>,
    regen_rate: Option<Text>,
    regen_floor: Option<Text>,
    slow_after: Option<Text>,
    slow_stale_after: Option<Text>,
    rejoin_hold_max: Option<Text>,
    commit: Option<Text>,
    on_no_quorum: Option<Text>,
    no_quorum_after: Option<Text>,
    copies: Option<Spanned<i64>>,
    layout: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: Text,
    address: Text,
    power: Option<Text>,
    switch: Option<Text>,
    #[serde(default)]
    spare: bool,
    frontend: Option<Text>,
    nbd: Option<Text>,
    commit: Option<Text>,
    on_no_quorum: Option<Text>,
    #[serde(default)]
    disk: Vec<Spanned<RawDisk>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    name: Option<Text>,
    path: Text,
    size: Option<Text>,
    segments: Option<Spanned<RawSegments>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSegments {
    primary: Spanned<i64>,
    secondary: Spanned<i64>,
    unmirrored: Spanned<i64>,
}

/// The text being read, for messages.
pub(super) struct Reader<'a> {
    text: &'a str,
    path: &'a str,
    /// The name of the node being read, so that every error about it says it.
    node: String,
}

pub(super) fn parse(text: &str, path: &str) -> Result<ClusterFile, ConfigError> {
    let raw: RawFile = toml::from_str(text).map_err(|error| ConfigError::from_toml(text, path, &error))?;
    Reader { text, path, node: String::new() }.file(raw)
}

impl Reader<'_> {
    pub(super) fn error<T>(&self, at: &Spanned<T>, field: &str, what: impl Display) -> ConfigError {
        let what = match self.node.as_str() {
            "" => what.to_string(),
            node => format!("node {node}: {what}"),
        };
        ConfigError::at(self.text, self.path, at.span(), field, what)
    }

    fn line<T>(&self, at: &Spanned<T>) -> usize {
        ConfigError::at(self.text, self.path, at.span(), "", String::new()).line
    }

    fn file(&mut self, raw: RawFile) -> Result<ClusterFile, ConfigError> {
        let cluster = raw.cluster.get_ref();
        let segments = match &cluster.segments {
            Some(segments) => self.segments(segments, "cluster.segments")?,
            None => Segments::default(),
        };
        let managers = self.managers(&cluster.manager)?;
        let key_file = self.path_of(&cluster.key_file, "cluster.key_file")?;
        let name = self.name(&cluster.name, "cluster.name")?;
        let store = self.store(raw.store.as_ref(), &name)?;
        if store == StoreFile::File && managers.len() > 1 {
            return Err(self.error(
                &cluster.manager,
                "cluster.manager",
                "several managers need a store that they share: add [store] with kind = \"etcd\"",
            ));
        }
        let mut file = ClusterFile {
            name,
            slice_bytes: self.slice_bytes(cluster)?,
            key_file,
            managers,
            store,
            policy: self.policy(cluster)?,
            layout: self.layout(cluster)?,
            nodes: Vec::new(),
        };
        let frontend = self.frontend(cluster.frontend.as_ref(), "cluster.frontend")?.unwrap_or_default();
        let remote = cluster.nbd_allow_remote.unwrap_or(false);
        let nbd = self.nbd(cluster.nbd.as_ref(), "cluster.nbd", remote)?.unwrap_or_default();
        let devices =
            self.devices("cluster", &cluster.commit, &cluster.on_no_quorum, DevicePolicy::default())?;
        if raw.node.is_empty() {
            return Err(self.error(&raw.cluster, "node", "there is no [[node]] in the file"));
        }
        let mut names: HashMap<String, usize> = HashMap::new();
        let line = self.line(&cluster.manager);
        let manager = |address: &String| (address.clone(), ("the manager".to_owned(), line));
        let mut addresses: HashMap<_, _> = file.managers.iter().map(manager).collect();
        for raw in &raw.node {
            self.node.clear();
            let node = raw.get_ref();
            let name = self.name(&node.name, "node.name")?;
            if let Some(line) = names.insert(name.clone(), self.line(&node.name)) {
                return Err(self.error(
                    &node.name,
                    "node.name",
                    format!("{name:?} is already the name of the node in line {line}"),
                ));
            }
            self.node = name.clone();
            let address = self.address(&node.address, "node.address")?;
            if let Some((other, line)) =
                addresses.insert(address.clone(), (format!("node {name}"), self.line(&node.address)))
            {
                return Err(self.error(
                    &node.address,
                    "node.address",
                    format!("{address} is already the address of {other} (line {line})"),
                ));
            }
            file.nodes.push(NodeFile {
                name,
                address,
                power: self.label(node.power.as_ref(), "node.power")?,
                switch: self.label(node.switch.as_ref(), "node.switch")?,
                spare: node.spare,
                frontend: self.frontend(node.frontend.as_ref(), "node.frontend")?.unwrap_or(frontend),
                nbd: self.nbd(node.nbd.as_ref(), "node.nbd", remote)?.unwrap_or(nbd),
                devices: self.devices("node", &node.commit, &node.on_no_quorum, devices)?,
                disks: self.disks(raw, segments)?,
            });
        }
        Ok(file)
    }

    /// One address, or a list of different ones.
    fn managers(&self, value: &Spanned<toml::Value>) -> Result<Vec<String>, ConfigError> {
        let field = "cluster.manager";
        let values = match value.get_ref() {
            toml::Value::Array(values) if values.is_empty() => {
                return Err(self.error(value, field, "is empty: name at least one address"));
            }
            toml::Value::Array(values) => &values[..],
            one => std::slice::from_ref(one),
        };
        let mut managers: Vec<String> = Vec::new();
        for one in values {
            let Some(text) = one.as_str() else {
                return Err(self.error(value, field, "is neither \"host:port\" nor a list of such"));
            };
            let address = self.address(&Spanned::new(value.span(), text.to_owned()), field)?;
            if managers.contains(&address) {
                return Err(self.error(value, field, format!("{address} is in it twice")));
            }
            managers.push(address);
        }
        Ok(managers)
    }

    /// Who mirrors whom when the cluster is created.
    fn layout(&self, cluster: &RawCluster) -> Result<Layout, ConfigError> {
        let mut layout = Layout::default();
        if let Some(at) = &cluster.layout {
            layout.topology = match (at.get_ref().as_str(), Topology::parse(at.get_ref())) {
                ("any", _) => Some(None),
                (_, Some(topology)) => Some(Some(topology)),
                (other, None) => {
                    let what = format!("{other:?} is none of \"pair\", \"chain\", \"sets\", \"any\"");
                    return Err(self.error(at, "cluster.layout", what));
                }
            };
        }
        if let Some(at) = &cluster.copies {
            let copies = u8::try_from(*at.get_ref()).ok();
            let copies = copies.filter(|copies| (1..=COPIES_MAX).contains(&usize::from(*copies)));
            let Some(copies) = copies else {
                let what = format!("{} is not 1, 2 or 3", at.get_ref());
                return Err(self.error(at, "cluster.copies", what));
            };
            layout.copies = copies;
            if copies > 2 && layout.topology == Some(Some(Topology::Pair)) {
                let what =
                    "a pair has two nodes and can have two copies: choose layout = \"chain\" or \"sets\"";
                return Err(self.error(at, "cluster.copies", what));
            }
        }
        Ok(layout)
    }

    fn policy(&self, cluster: &RawCluster) -> Result<Policy, ConfigError> {
        let default = Policy::default();
        let policy = Policy {
            auto_failover: cluster.auto_failover.unwrap_or(default.auto_failover),
            fail_after: self
                .duration(cluster.fail_after.as_ref(), "cluster.fail_after")?
                .unwrap_or(default.fail_after),
            auto_spare: cluster.auto_spare.unwrap_or(default.auto_spare),
            auto_make_spare: cluster.auto_make_spare.unwrap_or(default.auto_make_spare),
            spare_after: self
                .duration(cluster.spare_after.as_ref(), "cluster.spare_after")?
                .unwrap_or(default.spare_after),
            spread_after: match &cluster.spread_after {
                Some(text) if text.get_ref() == "never" => None,
                text => self.duration(text.as_ref(), "cluster.spread_after")?.or(default.spread_after),
            },
            rebalance_above: self.rebalance_above(cluster)?,
            rebalance_after: self
                .duration(cluster.rebalance_after.as_ref(), "cluster.rebalance_after")?
                .unwrap_or(default.rebalance_after),
            node: NodePolicy {
                pace: self.pace(cluster)?,
                tolerance: self.tolerance(cluster)?,
                no_quorum_after: self
                    .duration(cluster.no_quorum_after.as_ref(), "cluster.no_quorum_after")?
                    .unwrap_or(default.node.no_quorum_after),
            },
        };
        if let Some(at) = &cluster.no_quorum_after
            && policy.node.no_quorum_after <= policy.fail_after
        {
            let what = format!(
                "{:?} is not longer than fail_after, {:?}: requests would fail that a failover serves",
                at.get_ref(),
                policy.fail_after
            );
            return Err(self.error(at, "cluster.no_quorum_after", what));
        }
        match &cluster.fail_after {
            Some(at) if policy.fail_after < Policy::FAIL_AFTER_MIN => Err(self.error(
                at,
                "cluster.fail_after",
                format!(
                    "{:?} is shorter than {:?}, twice the time between two reports of a node",
                    at.get_ref(),
                    Policy::FAIL_AFTER_MIN
                ),
            )),
            _ => Ok(policy),
        }
    }

    /// What a node's devices are made with.
    fn devices(
        &self,
        table: &str,
        commit: &Option<Text>,
        on_no_quorum: &Option<Text>,
        default: DevicePolicy,
    ) -> Result<DevicePolicy, ConfigError> {
        let wrong = |at: &Text, field: &str, words: &str| {
            self.error(at, &format!("{table}.{field}"), format!("{:?} is neither {words}", at.get_ref()))
        };
        let mut policy = default;
        if let Some(at) = commit {
            policy.commit = Commit::parse(at.get_ref())
                .ok_or_else(|| wrong(at, "commit", "\"immediate\" nor \"deferred\""))?;
        }
        if let Some(at) = on_no_quorum {
            policy.on_no_quorum = OnNoQuorum::parse(at.get_ref())
                .ok_or_else(|| wrong(at, "on_no_quorum", "\"wait\" nor \"error\""))?;
        }
        Ok(policy)
    }

    fn tolerance(&self, cluster: &RawCluster) -> Result<Tolerance, ConfigError> {
        let default = Tolerance::default();
        let never = cluster.slow_stale_after.as_ref().is_some_and(|text| text.get_ref() == "never");
        let stale_after = match never {
            true => None,
            false => self
                .duration(cluster.slow_stale_after.as_ref(), "cluster.slow_stale_after")?
                .or(default.stale_after),
        };
        let least = Tolerance::STALE_AFTER_MIN;
        if let (Some(at), Some(_)) = (&cluster.slow_stale_after, stale_after.filter(|after| *after < least)) {
            let what = format!("{:?} is shorter than {least:?}", at.get_ref());
            return Err(self.error(at, "cluster.slow_stale_after", what));
        }
        let duration = |text: &Option<Text>, field| self.duration(text.as_ref(), field);
        let slow_after = duration(&cluster.slow_after, "cluster.slow_after")?;
        let (least, most) = (Tolerance::SLOW_AFTER_MIN, stale_after.unwrap_or(Duration::MAX));
        if let (Some(at), Some(after)) = (&cluster.slow_after, slow_after) {
            let what = match after {
                after if after < least => Some(format!("{:?} is shorter than {least:?}", at.get_ref())),
                after if after > most => {
                    Some(format!("{:?} is longer than slow_stale_after, {most:?}", at.get_ref()))
                }
                _ => None,
            };
            if let Some(what) = what {
                return Err(self.error(at, "cluster.slow_after", what));
            }
        }
        Ok(Tolerance {
            slow_after: slow_after.unwrap_or(default.slow_after).min(most),
            stale_after,
            hold_max: duration(&cluster.rejoin_hold_max, "cluster.rejoin_hold_max")?
                .unwrap_or(default.hold_max),
        })
    }

    fn rebalance_above(&self, cluster: &RawCluster) -> Result<Option<u8>, ConfigError> {
        let Some(value) = &cluster.rebalance_above else { return Ok(Policy::default().rebalance_above) };
        match value.get_ref() {
            toml::Value::String(text) if text == "never" => Ok(None),
            toml::Value::Integer(percent) if (1..=100).contains(percent) => Ok(Some(*percent as u8)),
            other => {
                let what = format!("{other} is neither \"never\" nor a number of percent from 1 to 100");
                Err(self.error(value, "cluster.rebalance_above", what))
            }
        }
    }

    fn pace(&self, cluster: &RawCluster) -> Result<Pace, ConfigError> {
        let bytes =
            |text: &Option<Text>, field| text.as_ref().map(|text| self.bytes(text, field)).transpose();
        let unlimited = cluster.regen_rate.as_ref().is_none_or(|text| text.get_ref() == "unlimited");
        let rate = if unlimited { None } else { bytes(&cluster.regen_rate, "cluster.regen_rate")? };
        let none = cluster.regen_floor.as_ref().is_some_and(|text| text.get_ref() == "none");
        let floor = if none { Some(0) } else { bytes(&cluster.regen_floor, "cluster.regen_floor")? };
        let low = rate.zip(cluster.regen_rate.as_ref()).filter(|(rate, _)| *rate < RATE_MIN);
        if let Some((_, at)) = low {
            let least = format_bytes(RATE_MIN);
            let what =
                format!("{:?} a second is less than {least}: to stop copies, pause their plan", at.get_ref());
            return Err(self.error(at, "cluster.regen_rate", what));
        }
        match (floor, rate, &cluster.regen_floor) {
            (Some(floor), Some(rate), Some(at)) if floor > rate => {
                let what = format!("{:?} is more than regen_rate, {}", at.get_ref(), format_bytes(rate));
                Err(self.error(at, "cluster.regen_floor", what))
            }
            // A rate below the usual floor is meant as it stands.
            _ => Ok(Pace { rate, floor: floor.unwrap_or(Pace::FLOOR_DEFAULT).min(rate.unwrap_or(u64::MAX)) }),
        }
    }

    fn duration(&self, text: Option<&Text>, field: &str) -> Result<Option<Duration>, ConfigError> {
        let parsed = text.map(|text| {
            humantime::parse_duration(text.get_ref().trim()).map_err(|error| {
                self.error(
                    text,
                    field,
                    format!("{:?}: {error}; write it as \"2s\" or \"1500ms\"", text.get_ref()),
                )
            })
        });
        parsed.transpose()
    }

    fn slice_bytes(&self, cluster: &RawCluster) -> Result<u32, ConfigError> {
        let Some(size) = &cluster.slice_size else { return Ok(SLICE_BYTES_DEFAULT) };
        let bytes = self.bytes(size, "cluster.slice_size")?;
        u32::try_from(bytes)
            .ok()
            .filter(|bytes| bytes.is_power_of_two() && (SLICE_BYTES_MIN..=SLICE_BYTES_MAX).contains(bytes))
            .ok_or_else(|| {
                self.error(
                    size,
                    "cluster.slice_size",
                    format!(
                        "{:?} is not a power of two between {} and {}",
                        size.get_ref(),
                        format_bytes(SLICE_BYTES_MIN.into()),
                        format_bytes(SLICE_BYTES_MAX.into())
                    ),
                )
            })
    }

    fn bytes(&self, size: &Text, field: &str) -> Result<u64, ConfigError> {
        parse_bytes(size.get_ref()).ok_or_else(|| {
            self.error(size, field, format!("{:?} is not a size such as \"64MiB\" or \"1G\"", size.get_ref()))
        })
    }

    fn name(&self, name: &Text, field: &str) -> Result<String, ConfigError> {
        let text = name.get_ref();
        check_name(text).map_err(|what| self.error(name, field, what))?;
        Ok(text.clone())
    }

    /// A power feed or a switch: any text but an empty one, which would join all that left it so.
    fn label(&self, label: Option<&Text>, field: &str) -> Result<Option<String>, ConfigError> {
        match label {
            Some(label) if label.get_ref().trim().is_empty() => {
                Err(self.error(label, field, "is empty: name it, or leave the field out"))
            }
            label => Ok(label.map(|label| label.get_ref().clone())),
        }
    }

    pub(super) fn path_of(&self, path: &Text, field: &str) -> Result<PathBuf, ConfigError> {
        if !path.get_ref().starts_with('/') {
            return Err(self.error(path, field, format!("{:?} is not an absolute path", path.get_ref())));
        }
        Ok(PathBuf::from(path.get_ref()))
    }

    /// `host:port`, where the host is an address or a DNS name.
    pub(super) fn address(&self, address: &Text, field: &str) -> Result<String, ConfigError> {
        let text = address.get_ref();
        let wrong = |why: &str| {
            self.error(
                address,
                field,
                format!("{text:?} {why}; write host:port, such as \"10.0.0.1:7301\" or \"[fd00::1]:7301\""),
            )
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(|| wrong("has no port"))?;
        let port: u16 = port.parse().map_err(|_| wrong("has a port that is not a number up to 65535"))?;
        if port == 0 {
            return Err(wrong("has port 0"));
        }
        if let Ok(socket) = text.parse::<SocketAddr>() {
            if socket.ip().is_unspecified() {
                return Err(wrong("names no machine: others connect to this address"));
            }
            return Ok(text.clone());
        }
        let label = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        };
        // All digits and dots is an address with a mistake in it, not a DNS name.
        let numeric = host.chars().all(|c| c.is_ascii_digit() || c == '.');
        if host.is_empty() || numeric || !host.split('.').all(label) {
            return Err(wrong("has a host that is neither an address nor a name"));
        }
        Ok(text.clone())
    }

    fn frontend(&self, text: Option<&Text>, field: &str) -> Result<Option<Frontend>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        Frontend::parse(text.get_ref()).map(Some).ok_or_else(|| {
            self.error(text, field, format!("{:?} is none of \"auto\", \"ublk\", \"nbd\"", text.get_ref()))
        })
    }

    fn nbd(&self, text: Option<&Text>, field: &str, remote: bool) -> Result<Option<NbdListen>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        if text.get_ref() == "unix" {
            return Ok(Some(NbdListen::Unix));
        }
        let address: SocketAddr = text.get_ref().parse().map_err(|_| {
            self.error(
                text,
                field,
                format!(
                    "{:?} is neither \"unix\" nor an address such as \"127.0.0.1:10809\"",
                    text.get_ref()
                ),
            )
        })?;
        let loopback = match address.ip() {
            IpAddr::V4(ip) => ip.is_loopback(),
            IpAddr::V6(ip) => ip.is_loopback(),
        };
        if !loopback && !remote {
            return Err(self.error(
                text,
                field,
                format!(
                    "NBD has no authentication: anybody who reaches {address} could read and write the devices; \
                     if that network is closed, add nbd_allow_remote = true to [cluster]"
                ),
            ));
        }
        Ok(Some(NbdListen::Tcp(address)))
    }

    fn segments(&self, raw: &Spanned<RawSegments>, field: &str) -> Result<Segments, ConfigError> {
        let RawSegments { primary, secondary, unmirrored } = raw.get_ref();
        let mut percent = [0u8; 3];
        for (value, slot) in [primary, secondary, unmirrored].into_iter().zip(&mut percent) {
            *slot = u8::try_from(*value.get_ref()).ok().filter(|value| *value <= 100).ok_or_else(|| {
                self.error(value, field, format!("{} is not a percentage from 0 to 100", value.get_ref()))
            })?;
        }
        let sum: u32 = percent.iter().map(|value| u32::from(*value)).sum();
        if sum != 100 {
            return Err(self.error(
                raw,
                field,
                format!("the three percentages add up to {sum}, they must add up to 100"),
            ));
        }
        let [primary, secondary, unmirrored] = percent;
        Ok(Segments { primary, secondary, unmirrored })
    }

    fn disks(&self, node: &Spanned<RawNode>, default: Segments) -> Result<Vec<DiskFile>, ConfigError> {
        let mut disks: Vec<DiskFile> = Vec::new();
        for (index, raw) in node.get_ref().disk.iter().enumerate() {
            let disk = raw.get_ref();
            let name = match &disk.name {
                Some(name) => self.name(name, "node.disk.name")?,
                None => format!("d{}", index + 1),
            };
            let path = self.path_of(&disk.path, "node.disk.path")?;
            let named = disk.name.as_ref().unwrap_or(&disk.path);
            if disks.iter().any(|other| other.name == name) {
                return Err(self.error(
                    named,
                    "node.disk.name",
                    format!("two disks are called {name:?}; give each a name"),
                ));
            }
            if let Some(other) = disks.iter().find(|other| other.path == path) {
                return Err(self.error(
                    &disk.path,
                    "node.disk.path",
                    format!("{} is already the path of disk {}", path.display(), other.name),
                ));
            }
            let bytes = disk.size.as_ref().map(|size| self.bytes(size, "node.disk.size")).transpose()?;
            if let Some(size) = disk.size.as_ref().filter(|_| is_device(&path)) {
                return Err(self.error(
                    size,
                    "node.disk.size",
                    format!("{} is a device and has a size of its own; `size` is for files", path.display()),
                ));
            }
            let segments = match &disk.segments {
                Some(segments) => self.segments(segments, "node.disk.segments")?,
                None => default,
            };
            disks.push(DiskFile { name, path, bytes, segments });
        }
        if disks.is_empty() {
            return Err(self.error(&node.get_ref().name, "node.disk", "there is no [[node.disk]]"));
        }
        Ok(disks)
    }
}

/// Whether something with that path is a device: all of /dev but the memory that is mounted there for files.
fn is_device(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}
