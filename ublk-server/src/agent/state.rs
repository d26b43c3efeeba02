//! The node's state directory: the newest map that it adopted.
//!
//! It is not what the node acts on after a start, which is the manager's word; it is there so that
//! the map can be rebuilt from the nodes if every manager is lost.

use mirror_net::map::DistributionMap;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const MAP_FILE: &str = "map.json";

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

    /// The map that was kept, if one was.
    pub fn kept(&self) -> Option<DistributionMap> {
        let path = self.path.join(MAP_FILE);
        let told = |error: &dyn std::fmt::Display| {
            // Nothing acts on it but the check that the manager is not an older one.
            tracing::warn!(path = %path.display(), %error, "the map that was kept cannot be read");
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

    /// Forgets the kept map.
    pub fn forget(&self) -> Result<(), StateError> {
        match std::fs::remove_file(self.path.join(MAP_FILE)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StateError::Io { path: self.path.join(MAP_FILE), source })
            }
            _ => Ok(()),
        }
    }

    /// Keeps a map, durably and whole.
    pub fn save_map(&self, map: &DistributionMap) -> Result<(), StateError> {
        self.replace(map).map_err(|source| StateError::Io { path: self.path.join(MAP_FILE), source })
    }

    fn replace(&self, map: &DistributionMap) -> io::Result<()> {
        let new = self.path.join("map.json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(map)?)?;
        file.sync_all()?;
        std::fs::rename(&new, self.path.join(MAP_FILE))?;
        File::open(&self.path)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_daemons_do_not_share_a_directory() {
        let base = tempfile::tempdir().unwrap();
        let first = StateDir::open(base.path()).unwrap();
        assert!(matches!(StateDir::open(base.path()), Err(StateError::Taken { .. })));
        drop(first);
        assert!(StateDir::open(base.path()).is_ok());
    }
}
