//! `mirrorctl manager run`: the manager's core with sockets, a clock and a store.

mod connection;
mod events;
mod server;
pub mod store;

pub use server::{Server, serve};

use crate::client::load_file;
use crate::failure::{Failure, OK};
use crate::key;
use events::EventLog;
use std::io::ErrorKind;
use std::path::Path;
use store::{FileStore, Store};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// `mirrorctl manager run`: until SIGTERM or SIGINT.
pub async fn run(config: &Path, state_dir: &Path) -> Result<u8, Failure> {
    let filter = EnvFilter::try_from_env("UBLK_MIRROR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A library user may have set one up; then that is used.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(filter)
        .try_init();
    let (file, _) = load_file(config)?;
    let key = key::load(&file.key_file)?;
    let store = FileStore::open(state_dir).map_err(|error| Failure::new(error.to_string()))?;
    let map = store.map().map_err(|error| Failure::new(error.to_string()))?;
    let listener = TcpListener::bind(&file.manager).await.map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::AddrInUse => "is another manager running? `ss -ltnp` names it",
            ErrorKind::AddrNotAvailable => "`manager` in the cluster file must be an address of this machine",
            _ => "check `manager` in the cluster file",
        };
        Failure::new(format!("cannot listen on {}: {error}: {hint}", file.manager))
    })?;
    match &map {
        Some(map) => tracing::info!(
            "cluster {} ({}), map {}, {} nodes, {} devices; listening on {}",
            map.cluster_name,
            map.cluster,
            map.version,
            map.nodes.len(),
            map.devices.len(),
            file.manager
        ),
        None => tracing::info!("no cluster yet; listening on {}", file.manager),
    }
    let signals = |kind| signal(kind).map_err(|error| Failure::new(format!("cannot take signals: {error}")));
    let (mut terminate, mut interrupt) =
        (signals(SignalKind::terminate())?, signals(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    serve(listener, key, store, map, EventLog::open(state_dir), file.policy, stop).await?;
    tracing::info!("stopped");
    Ok(OK)
}
