//! Filling a device from a file or a block device, through its export on this machine.

use crate::client::Client;
use crate::failure::{Failure, OK};
use crate::nbd::NbdClient;
use crate::output;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_net::config::format_bytes;
use mirror_net::control::ExportReport;
use mirror_net::map::DistributionMap;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// What is read and written at a time, in bytes.
const CHUNK: usize = 1 << 20;
/// A new device is exported within so long.
const EXPORT_PATIENCE: Duration = Duration::from_secs(30);
/// Without a terminal, how far it is is told once in so long.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The size of what is to be imported, in bytes.
pub(crate) fn size_of(source: &Path) -> Result<u64, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("{}: {error}", source.display()));
    let mut file = File::open(source).map_err(failed)?;
    // Of a block device the metadata says nothing.
    match file.seek(SeekFrom::End(0)).map_err(failed)? {
        0 => Err(Failure::new(format!("{} is empty: there is nothing to import", source.display()))),
        size => Ok(size),
    }
}

/// Looks at everything that can be looked at before a device is made for it.
pub(crate) async fn check(config: &Path, node: &str, source: &Path) -> Result<(), Failure> {
    let (map, _) = status(config).await?;
    match map.node_named(node) {
        Some(node) => here(&node.name, &node.address, source),
        // Whoever makes the device says it better.
        None => Ok(()),
    }
}

/// An export is reached on its node's machine only.
fn here(name: &str, address: &str, source: &Path) -> Result<(), Failure> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_matches(['[', ']']);
    let mut addresses = (host, 0).to_socket_addrs().into_iter().flatten();
    match addresses.any(|address| TcpListener::bind(address).is_ok()) {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "the device is exported by node {name}, {host}, which is not this machine: type this there, where {} has to be too",
            source.display()
        ))),
    }
}

/// `mirrorctl device import`. `is_new`: the device reads as zeros, so zeros need not be written.
pub async fn import(config: &Path, name: &str, source: &Path, is_new: bool) -> Result<u8, Failure> {
    let size = size_of(source)?;
    let began = Instant::now();
    let export = loop {
        let (map, exports) = status(config).await?;
        let device = map.device_named(name);
        let device = device.ok_or_else(|| {
            Failure::new(format!("there is no device {name:?}; `mirrorctl device list` lists them"))
        })?;
        let node =
            map.node(device.claim.node).ok_or_else(|| Failure::new("its exporter is not in the map"))?;
        here(&node.name, &node.address, source)?;
        let found = exports.into_iter().find(|export| export.device == device.id);
        let ready = found.as_ref().is_some_and(|export| export.path.is_some() || export.uri.is_some());
        match found.filter(|_| ready) {
            Some(export) => break (export, device.bytes(map.slice_bytes)),
            None if began.elapsed() < EXPORT_PATIENCE => sleep(Duration::from_millis(200)).await,
            None => {
                return Err(Failure::new(format!(
                    "{name} is not exported yet: see `mirrorctl status`, then type: mirrorctl device import {name} {}",
                    source.display()
                )));
            }
        }
    };
    let (export, room) = export;
    if size > room {
        return Err(Failure::new(format!(
            "{} has {}, {name} only {}: nothing was written; mirrorctl device resize {name} {}",
            source.display(),
            format_bytes(size),
            format_bytes(room),
            size
        )));
    }
    if let Some(user) = export.in_use.as_ref().filter(|_| !is_new) {
        return Err(Failure::new(format!("{name} is in use: {user}; end that first, nothing was written")));
    }
    let from = source.to_owned();
    let again = format!("mirrorctl device import {name} {}", source.display());
    let copied = tokio::task::spawn_blocking(move || copy(&from, &export, size, is_new)).await;
    match copied {
        Ok(Ok(())) => {
            let seconds = began.elapsed().as_secs_f64().max(0.001);
            let rest = if is_new || size == room { "" } else { "; what lies behind that is as it was" };
            output::print(&format!(
                "{} imported into {name} in {seconds:.1} s, {}/s, and flushed to all copies{rest}",
                format_bytes(size),
                format_bytes((size as f64 / seconds) as u64)
            ));
            Ok(OK)
        }
        Ok(Err(error)) => {
            Err(Failure::new(format!("{name} is filled in part only: {error:#}; repeat: {again}")))
        }
        Err(error) => Err(Failure::new(format!("{name} is filled in part only: {error}; repeat: {again}"))),
    }
}

async fn status(config: &Path) -> Result<(DistributionMap, Vec<ExportReport>), Failure> {
    let mut status = Client::from_config(config)?.status().await?;
    let map = status.map.take().ok_or_else(|| Failure::new("no cluster has been created yet"))?;
    let reports = status.nodes.into_iter().filter(|node| node.up).filter_map(|node| node.report);
    Ok((map, reports.flat_map(|report| report.exports).collect()))
}

/// Where it is written.
enum Target {
    Disk(File),
    Nbd(NbdClient),
}

impl Target {
    fn open(export: &ExportReport) -> anyhow::Result<Self> {
        if let Some(path) = &export.path {
            // Exclusive: nobody mounts it meanwhile.
            let mut options = OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(options.write(true), nix::libc::O_EXCL);
            return Ok(Self::Disk(options.open(path)?));
        }
        let uri = export.uri.as_deref().ok_or_else(|| anyhow::anyhow!("it is exported nowhere"))?;
        let client = NbdClient::connect(uri)?;
        // What cannot be served waits, however long.
        client.set_patience(Duration::from_secs(600))?;
        Ok(Self::Nbd(client))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Disk(disk) => Ok(disk.write_all_at(data, offset)?),
            Self::Nbd(client) => client.write(offset, data),
        }
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Disk(disk) => Ok(disk.sync_all()?),
            Self::Nbd(client) => client.flush(),
        }
    }
}

fn copy(source: &Path, export: &ExportReport, size: u64, is_new: bool) -> anyhow::Result<()> {
    let mut file = File::open(source)?;
    let mut target = Target::open(export)?;
    let bar = std::io::stdout().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
        ProgressBar::new(size).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0u64;
    let mut told = Instant::now();
    while offset < size {
        let length = (size - offset).min(CHUNK as u64) as usize;
        let data = &mut chunk[..length];
        file.read_exact(data)?;
        if !is_new || data.iter().any(|byte| *byte != 0) {
            // The last sector of a file may be cut off; the device has only whole ones.
            let whole = length.next_multiple_of(4096).min(CHUNK);
            chunk[length..whole].fill(0);
            target.write(offset, &chunk[..whole])?;
        }
        offset += length as u64;
        match &bar {
            Some(bar) => bar.set_position(offset),
            None if told.elapsed() >= TELL_EVERY => {
                told = Instant::now();
                output::print(&format!("{} of {}", format_bytes(offset), format_bytes(size)));
            }
            None => {}
        }
    }
    target.flush()?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(())
}
