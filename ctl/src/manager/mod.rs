//! `mirrorctl manager run`: the manager's core with sockets, a clock and a store.

mod connection;
mod events;
mod front;
mod keeper;
mod server;
pub mod store;

use crate::client::load_file;
use crate::failure::{Failure, OK};
use crate::key;
use front::{Front, Post};
use mirror_net::config::{ClusterFile, EtcdFile, StoreFile};
use mirror_net::control::Event;
use mirror_net::map::DistributionMap;
use server::{End, Reign};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use store::{Candidate, EtcdStore, FileStore, Seat, StateDir, Store, StoreError, Tenure};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;
use tracing_subscriber::EnvFilter;

/// `mirrorctl manager run`: until SIGTERM or SIGINT.
pub async fn run(
    config: &Path,
    state_dir: &Path,
    address: Option<&str>,
    no_auto: bool,
) -> Result<u8, Failure> {
    let filter = EnvFilter::try_from_env("UBLK_MIRROR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A library user may have set one up; then that is used.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(filter)
        .try_init();
    let (mut file, _) = load_file(config)?;
    file.policy.auto_make_spare &= !no_auto;
    let signals = |kind| signal(kind).map_err(|error| Failure::new(format!("cannot take signals: {error}")));
    let (mut terminate, mut interrupt) =
        (signals(SignalKind::terminate())?, signals(SignalKind::interrupt())?);
    let mut stop = std::pin::pin!(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    });
    match &file.store {
        StoreFile::File => alone(&file, state_dir, address, &mut stop).await?,
        StoreFile::Etcd(etcd) => elected(&file, etcd, state_dir, address, &mut stop).await?,
    }
    tracing::info!("stopped");
    Ok(OK)
}

fn failed(error: StoreError) -> Failure {
    Failure::new(error.to_string())
}

/// Says with what a manager begins to lead.
fn greet(map: Option<&DistributionMap>, address: &str) {
    match map {
        Some(map) => tracing::info!(
            "cluster {} ({}), map {}, {} nodes, {} devices; listening on {address}",
            map.cluster_name,
            map.cluster,
            map.version,
            map.nodes.len(),
            map.devices.len(),
        ),
        None => tracing::info!("no cluster yet; listening on {address}"),
    }
}

/// Leads from beginning to end, on a store of its own.
async fn alone(
    file: &ClusterFile,
    state_dir: &Path,
    address: Option<&str>,
    stop: &mut Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Failure> {
    let mut store = FileStore::open(state_dir).map_err(failed)?;
    let map = store.map().map_err(failed)?;
    let events = store.events().await.map_err(failed)?;
    let mut front = Front::open(&file.managers, address, key::load(&file.key_file)?).await?;
    greet(map.as_ref(), &front.address);
    front.post.send_replace(Post::Leads);
    let (policy, tenure) = (file.policy, Tenure::for_ever());
    let reign = Reign { map, tenure, policy, events, cluster: &front.cluster };
    server::lead(store, reign, &mut front.arriving, stop).await.map(drop)
}

/// Leads whenever it is elected.
async fn elected(
    file: &ClusterFile,
    etcd: &EtcdFile,
    state_dir: &Path,
    address: Option<&str>,
    stop: &mut Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Failure> {
    let _held = StateDir::open(state_dir).map_err(failed)?;
    let key = key::load(&file.key_file)?;
    let mut front = Front::open(&file.managers, address, key.clone()).await?;
    let mut candidate = Candidate::new(etcd, &file.name, &key, &front.address, front.process);
    tracing::info!("listening on {}; the map is kept in etcd {}", front.address, etcd.endpoints.join(", "));
    loop {
        let Some((mut store, tenure)) = follow(&mut candidate, &mut front, stop).await? else {
            return Ok(());
        };
        let (map, events) = match found(&mut store).await {
            Ok(found) => found,
            Err(
                error
                @ (StoreError::Deposed(_) | StoreError::Unreachable { .. } | StoreError::Refused { .. }),
            ) => {
                tracing::warn!("elected, but {error}");
                continue;
            }
            Err(error) => return Err(failed(error)),
        };
        tracing::info!("this manager leads");
        greet(map.as_ref(), &front.address);
        front.post.send_replace(Post::Leads);
        let policy = file.policy;
        let reign = Reign { map, tenure, policy, events, cluster: &front.cluster };
        match server::lead(*store, reign, &mut front.arriving, stop).await? {
            End::Stopped => return Ok(()),
            End::Deposed(why) => {
                tracing::warn!("this manager does not lead any more: {why}");
                front.post.send_replace(Post::Follows { leader: None, why });
            }
        }
    }
}

/// What there is when this manager begins to lead.
async fn found(store: &mut EtcdStore) -> Result<(Option<DistributionMap>, Vec<Event>), StoreError> {
    Ok((store.map().await?, store.events().await?))
}

/// Waits until this manager is elected; `None` if it is told to stop before.
async fn follow(
    candidate: &mut Candidate,
    front: &mut Front,
    stop: &mut Pin<&mut impl Future<Output = ()>>,
) -> Result<Option<(Box<EtcdStore>, Tenure)>, Failure> {
    loop {
        let Some(seat) = turning_away(front, stop, candidate.look()).await else { return Ok(None) };
        let post = match seat {
            Ok(Seat::Ours(store, tenure)) => return Ok(Some((store, tenure))),
            Ok(Seat::Theirs(address)) => {
                Post::Follows { why: format!("{address} leads"), leader: Some(address) }
            }
            Ok(Seat::Empty) => Post::Follows { leader: None, why: "a leader is being elected".into() },
            Err(error @ (StoreError::Unreachable { .. } | StoreError::Deposed(_))) => {
                Post::Follows { leader: None, why: error.to_string() }
            }
            Err(error) => return Err(failed(error)),
        };
        if *front.post.borrow() != post {
            if let Post::Follows { why, .. } = &post {
                tracing::info!("this manager follows: {why}");
            }
            front.post.send_replace(post);
        }
        if turning_away(front, stop, sleep(candidate.pause())).await.is_none() {
            return Ok(None);
        }
    }
}

/// Does something, and answers meanwhile whoever has taken this manager for the leader; `None` if it is told to
/// stop before that is done.
async fn turning_away<T>(
    front: &mut Front,
    stop: &mut Pin<&mut impl Future<Output = ()>>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = std::pin::pin!(work);
    loop {
        let event = tokio::select! {
            () = stop.as_mut() => return None,
            result = &mut work => return Some(result),
            event = front.arriving.recv() => event?,
        };
        front.turn_away(event);
    }
}
