//! The node's state directory: the newest map that it was sent, which maps its processes adopted, and disks that were added.
//!
//! The map is not what the node acts on after a start, which is the manager's word; it is there so that
//! the map can be rebuilt from the nodes if every manager is lost.

use super::disks::AddedDisk;
use anyhow::Context;
use mirror_net::control::Life;
use mirror_net::map::DistributionMap;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const MAP_FILE: &str = "map.json";
const LIVES_FILE: &str = "lives.json";
const DISKS_FILE: &str = "disks.json";

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StateError {
    #[error("state directory {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("state directory {path}: another ublk-server of this node is running")]
    Taken { path: PathBuf },
}

/// The directory, held by this process alone.
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Creates it if need be, and keeps others out.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(failed)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StateError::Taken { path: path.to_owned() })?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The map that was kept, if one was. Nothing acts on it but the check that the manager is not an older one.
    pub fn kept(&self) -> Option<DistributionMap> {
        self.read(MAP_FILE)
    }

    /// What processes of this node adopted; of those that are not in it the worst is assumed.
    pub fn lives(&self) -> Vec<Life> {
        self.read(LIVES_FILE).unwrap_or_default()
    }

    /// Disks that were added while the node ran. Without knowing them it must not go on: their data would seem lost.
    pub fn added_disks(&self) -> anyhow::Result<Vec<AddedDisk>> {
        let path = self.path.join(DISKS_FILE);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!("{} is damaged: write the disks into the cluster file and remove it", path.display())
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(StateError::Io { path, source }.into()),
        }
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let path = self.path.join(name);
        let told = |error: &dyn std::fmt::Display| {
            tracing::warn!(path = %path.display(), %error, "what was kept cannot be read");
        };
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                told(&error);
                return None;
            }
        };
        serde_json::from_slice(&bytes).inspect_err(|error| told(error)).ok()
    }

    /// Forgets what is kept: it is of another cluster.
    pub fn forget(&self) -> Result<(), StateError> {
        for name in [MAP_FILE, LIVES_FILE, DISKS_FILE] {
            match std::fs::remove_file(self.path.join(name)) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(StateError::Io { path: self.path.join(name), source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Keeps a map, durably and whole.
    pub fn save_map(&self, map: &DistributionMap) -> Result<(), StateError> {
        self.save(MAP_FILE, map)
    }

    /// The same for what processes adopted.
    pub fn save_lives(&self, lives: &[Life]) -> Result<(), StateError> {
        self.save(LIVES_FILE, lives)
    }

    /// The same for disks that were added.
    pub fn save_disks(&self, disks: &[AddedDisk]) -> Result<(), StateError> {
        self.save(DISKS_FILE, disks)
    }

    fn save<T: Serialize + ?Sized>(&self, name: &str, what: &T) -> Result<(), StateError> {
        self.replace(name, what).map_err(|source| StateError::Io { path: self.path.join(name), source })
    }

    fn replace<T: Serialize + ?Sized>(&self, name: &str, what: &T) -> io::Result<()> {
        let new = self.path.join(format!("{name}.new"));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(what)?)?;
        file.sync_all()?;
        std::fs::rename(&new, self.path.join(name))?;
        File::open(&self.path)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::ids::{MapVersion, ProcessId};

    #[test]
    fn two_daemons_do_not_share_a_directory() {
        let base = tempfile::tempdir().unwrap();
        let first = StateDir::open(base.path()).unwrap();
        assert!(matches!(StateDir::open(base.path()), Err(StateError::Taken { .. })));
        drop(first);
        assert!(StateDir::open(base.path()).is_ok());
    }

    #[test]
    fn what_a_process_adopted_is_known_to_the_next_ones() {
        let base = tempfile::tempdir().unwrap();
        let mut lives = Vec::new();
        for process in 1..40 {
            Life::note(&mut lives, ProcessId(process), MapVersion(process));
            Life::note(&mut lives, ProcessId(process), MapVersion(process + 1));
            StateDir::open(base.path()).unwrap().save_lives(&lives).unwrap();
        }
        let kept = StateDir::open(base.path()).unwrap().lives();
        assert_eq!(kept.len(), Life::KEPT);
        assert_eq!(kept.last(), Some(&Life { process: ProcessId(39), adopted: MapVersion(40) }));
        StateDir::open(base.path()).unwrap().forget().unwrap();
        assert_eq!(StateDir::open(base.path()).unwrap().lives(), []);
    }
}
