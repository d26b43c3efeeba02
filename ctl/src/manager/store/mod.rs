//! Where the manager keeps what must survive it.

mod file;

pub use file::FileStore;

use mirror_net::ids::{ExporterSession, MapVersion};
use mirror_net::map::DistributionMap;
use std::path::PathBuf;

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StoreError {
    #[error("{what} {}: {error}", path.display())]
    Io { what: &'static str, path: PathBuf, error: std::io::Error },
    #[error("{}: another manager uses this state directory; stop it first", path.display())]
    InUse { path: PathBuf },
    #[error(
        "{}: damaged: {why}; copy the newest intact file of {} over it, but only if no later map was ever sent to a \
         node (one that has adopted a newer map is turned away)",
        path.display(), history.display()
    )]
    Corrupt { path: PathBuf, history: PathBuf, why: String },
}

/// What a compare-and-swap came to.
#[derive(Debug)]
pub enum Swapped {
    /// It is durable.
    Stored,
    /// The store holds another version than was expected: this one.
    Conflict(Option<Box<DistributionMap>>),
}

/// Keeps the map, by compare-and-swap on its version, and the exporter sessions given.
///
/// What a method has returned is durable. After an error nothing is known: the manager must stop
/// and start anew from what the store then holds.
pub trait Store {
    /// The newest map.
    fn map(&self) -> Result<Option<DistributionMap>, StoreError>;

    /// Replaces version `base` (`None`: nothing) by `next`; `why` is kept with it.
    fn swap(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
    ) -> Result<Swapped, StoreError>;

    /// A number larger than any given before.
    fn exporter_session(&mut self) -> Result<ExporterSession, StoreError>;
}
