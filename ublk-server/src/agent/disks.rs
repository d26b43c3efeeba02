//! The node's disks: those of the cluster file, and those that were added while it ran.
//!
//! What is added is remembered in the state directory, since the cluster file of this machine need not name it yet. Once
//! it does, the two have to agree.

use super::state::StateDir;
use crate::ring::disk::DiskFile;
use crate::storage::{Candidate, DiskError, prepare};
use anyhow::Context;
use mirror_net::config::{self, Segments};
use mirror_net::control::{DiskInventory, FormatOrder};
use mirror_net::engine::LocalDisk;
use mirror_net::ids::{AttachId, DiskId, NodeId};
use mirror_net::map::DistributionMap;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A disk that was added while the node ran.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedDisk {
    /// Its name.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
}

/// A disk ready for the I/O thread.
pub type Opened = (LocalDisk, DiskFile);

#[derive(Clone)]
struct Held {
    candidate: Arc<Candidate>,
    /// Not by the cluster file.
    added: bool,
    /// The I/O thread has it, and does until the process ends.
    in_service: bool,
    /// Its id, where a map is awaited that lists it.
    awaited: Option<DiskId>,
}

/// All disks that this process holds.
#[derive(Clone)]
pub struct Disks {
    held: Vec<Held>,
    /// Added ones that could not be opened.
    absent: Vec<AddedDisk>,
}

impl Disks {
    /// Opens the disks of the cluster file, and what was added since. An added one that is not there is left out.
    pub fn open(file: &[config::DiskFile], added: Vec<AddedDisk>) -> anyhow::Result<Self> {
        let mut disks = Self { held: Vec::new(), absent: Vec::new() };
        for disk in file {
            let candidate = Arc::new(Candidate::open(disk)?);
            disks.held.push(Held { candidate, added: false, in_service: false, awaited: None });
        }
        for disk in added {
            if let Some(named) = file.iter().find(|named| named.name == disk.name) {
                anyhow::ensure!(
                    is_same(&named.path, &disk.path),
                    "disk {} is {} in the cluster file, and was added as {}: give the cluster file that path, or another name \
                     to what it means",
                    disk.name,
                    named.path.display(),
                    disk.path.display()
                );
                continue;
            }
            if let Some(named) = file.iter().find(|named| is_same(&named.path, &disk.path)) {
                anyhow::bail!(
                    "{} is disk {} in the cluster file, and was added as {}: call it {1} there",
                    disk.path.display(),
                    named.name,
                    disk.name
                );
            }
            match open(&disk.name, &disk.path) {
                Ok(candidate) => {
                    let candidate = Arc::new(candidate);
                    disks.held.push(Held { candidate, added: true, in_service: false, awaited: None });
                }
                Err(error) => {
                    tracing::error!(%error, "a disk is left out");
                    disks.absent.push(disk);
                }
            }
        }
        Ok(disks)
    }

    /// What is on each of them.
    pub fn inventory(&self) -> Vec<DiskInventory> {
        self.held.iter().map(|held| held.candidate.inventory()).collect()
    }

    /// Their attachments, in that order.
    pub fn attachments(&self, order: &FormatOrder) -> Vec<AttachId> {
        let named = |name: &str| self.held.iter().find(|held| held.candidate.name == name);
        order
            .disks
            .iter()
            .filter_map(|wanted| named(&wanted.name))
            .map(|held| held.candidate.attach)
            .collect()
    }

    /// Those that a cluster to be made may format.
    pub fn candidates(&self) -> Vec<Arc<Candidate>> {
        self.held.iter().map(|held| Arc::clone(&held.candidate)).collect()
    }

    /// Forgets what was added: it was of another cluster.
    pub fn forget_added(&mut self) {
        self.held.retain(|held| !held.added);
        self.absent.clear();
    }

    /// The disk at a path, which is to get a name: opened, unless it is held and nobody's.
    pub fn find(&self, name: &str, path: &Path) -> anyhow::Result<Arc<Candidate>> {
        for held in &self.held {
            let candidate = &held.candidate;
            let same_path = is_same(&candidate.path, path);
            if !same_path && candidate.name != name {
                continue;
            }
            anyhow::ensure!(
                !held.in_service,
                "{} is held by ublk-server here as disk {}, in use or removed: if it was removed, restart ublk-server, then \
                 repeat",
                candidate.path.display(),
                candidate.name
            );
            anyhow::ensure!(
                same_path && candidate.name == name,
                "the cluster file here has {} as disk {}: add it under that name and path, or correct the file and restart \
                 ublk-server",
                candidate.path.display(),
                candidate.name
            );
            return Ok(Arc::clone(candidate));
        }
        Ok(Arc::new(open(name, path)?))
    }

    /// A disk has been formatted as one that a map will list. Known after a restart as well, before anybody hears of it.
    pub fn add(&mut self, candidate: Arc<Candidate>, id: DiskId, state: &StateDir) -> anyhow::Result<()> {
        let known = self.held.iter_mut().find(|held| Arc::ptr_eq(&held.candidate, &candidate));
        if let Some(held) = known {
            held.awaited = Some(id);
        } else {
            self.absent.retain(|absent| absent.name != candidate.name);
            self.held.push(Held { candidate, added: true, in_service: false, awaited: Some(id) });
        }
        self.save(state)
    }

    fn save(&self, state: &StateDir) -> anyhow::Result<()> {
        let added = self
            .held
            .iter()
            .filter(|held| held.added)
            .map(|held| AddedDisk { name: held.candidate.name.clone(), path: held.candidate.path.clone() });
        let added: Vec<AddedDisk> = added.chain(self.absent.iter().cloned()).collect();
        state.save_disks(&added)?;
        Ok(())
    }

    /// Whether a map lists disks that the I/O thread is still to get.
    pub fn awaits(&self, map: &DistributionMap, me: NodeId) -> bool {
        let listed = |id: DiskId| map.node_of(id) == Some(me);
        self.held.iter().any(|held| !held.in_service && held.awaited.is_some_and(listed))
    }

    /// Opens what the map lists and the I/O thread does not have: for the first map everything. What cannot be used is
    /// left out, and why is returned beside, with its id if that is known.
    pub fn open_for_service(
        &mut self,
        map: &DistributionMap,
        first: bool,
    ) -> (Vec<Opened>, Vec<(Option<DiskId>, String)>) {
        let (mut opened, mut troubles) = (Vec::new(), Vec::new());
        for held in self.held.iter_mut().filter(|held| !held.in_service) {
            let awaited = held.awaited.filter(|id| map.disk(*id).is_some());
            if !first && awaited.is_none() {
                continue;
            }
            let disk = &held.candidate;
            match prepare::open_for_service(disk, map.cluster) {
                Ok((local, _)) if map.disk(local.id).is_none() => {
                    held.awaited = Some(local.id);
                    // The manager knows it from the registration, and tells what to do.
                    tracing::warn!(disk = disk.name, id = %local.id, "a disk is left out: it is no part of the cluster");
                }
                Ok(pair) => {
                    held.in_service = true;
                    held.awaited = None;
                    opened.push(pair);
                }
                Err(error) => troubles.push((awaited, error.to_string())),
            }
        }
        (opened, troubles)
    }

    /// There is no I/O thread after all.
    pub fn let_go(&mut self) {
        self.held.iter_mut().for_each(|held| held.in_service = false);
    }

    /// A disk has left the map: nobody adds it again by itself after a restart.
    pub fn removed(&mut self, name: &str, state: &StateDir) -> anyhow::Result<()> {
        for held in self.held.iter_mut().filter(|held| held.candidate.name == name) {
            held.added = false;
        }
        self.absent.retain(|absent| absent.name != name);
        self.save(state)
    }
}

fn open(name: &str, path: &Path) -> Result<Candidate, DiskError> {
    let (name, path) = (name.to_owned(), path.to_owned());
    Candidate::open(&config::DiskFile { name, path, bytes: None, segments: Segments::default() })
}

/// Whether two paths lead to one disk, be it by way of links such as those of /dev/disk.
fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    one == other || real(one) == real(other)
}

/// Formats one that was found, and says which attachment it has.
pub fn format(order: &FormatOrder, node: &str, candidate: &Arc<Candidate>) -> anyhow::Result<()> {
    prepare::format_all(order, node, std::slice::from_ref(candidate))
        .with_context(|| format!("{} cannot be formatted", candidate.path.display()))
}
