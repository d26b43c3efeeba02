//! The store in a directory of one machine.
//!
//! `map.json` is replaced by writing a file beside it, fsync, rename, fsync of the directory. Its
//! first line carries a checksum of the rest: a bit that flips in a number would leave valid JSON.
//! `history/` keeps the last maps, for people and for the case that `map.json` is damaged.

use super::event_file::EventFile;
use super::{Store, StoreError, Swapped};
use mirror_net::control::Event;
use mirror_net::ids::{ExporterSession, MapVersion};
use mirror_net::map::DistributionMap;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The version of the files.
const FORMAT: u32 = 1;
/// Maps kept in the history.
const HISTORY_MAX: usize = 100;

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    blake3: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// What led to this version.
    why: Vec<String>,
    map: DistributionMap,
}

/// A manager's state directory, held by this process alone.
#[derive(Debug)]
pub struct StateDir {
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes it if it is not there, and keeps every other manager out.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        make(path)?;
        let lock = path.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let file = file.map_err(failed("cannot open", &lock))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StoreError::InUse { path: path.to_owned() })?;
        Ok(Self { _lock: lock })
    }
}

fn make(path: &Path) -> Result<(), StoreError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(failed("cannot create", path))
}

/// See the module's description.
#[derive(Debug)]
pub struct FileStore {
    dir: PathBuf,
    version: Option<MapVersion>,
    last_session: u64,
    events: EventFile,
    _held: StateDir,
}

impl FileStore {
    /// Opens a state directory, makes it if it is not there, and keeps every other manager out.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let held = StateDir::open(dir)?;
        make(&dir.join("history"))?;
        let events = EventFile::new(dir);
        let mut store = Self { dir: dir.to_owned(), version: None, last_session: 0, events, _held: held };
        store.version = store.map()?.map(|map| map.version);
        store.last_session = store.read_session()?;
        Ok(store)
    }

    fn map_path(&self) -> PathBuf {
        self.dir.join("map.json")
    }

    fn session_path(&self) -> PathBuf {
        self.dir.join("exporter-session")
    }

    fn corrupt(&self, path: &Path, why: impl ToString) -> StoreError {
        StoreError::Corrupt { path: path.to_owned(), history: self.dir.join("history"), why: why.to_string() }
    }

    fn read_session(&self) -> Result<u64, StoreError> {
        let path = self.session_path();
        match std::fs::read_to_string(&path) {
            // A lost or damaged number costs nothing: the clock is ahead of all that were given.
            Ok(text) => Ok(text.trim().parse().unwrap_or(0)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
            Err(error) => Err(failed("cannot read", &path)(error)),
        }
    }

    /// Writes a file so that a crash leaves the old or the new one, never a part.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), StoreError> {
        let beside = path.with_extension("new");
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&beside, path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(failed("cannot write", path))
    }

    /// The history is for people: that it could not be written is no reason to stop.
    fn remember(&self, version: MapVersion, text: &str) {
        let history = self.dir.join("history");
        // A copy, no link: damage to one must not be damage to both.
        let _ = std::fs::write(history.join(format!("{:012}.json", version.0)), text);
        let Ok(entries) = std::fs::read_dir(&history) else { return };
        let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        names.sort();
        let old = names.len().saturating_sub(HISTORY_MAX);
        for path in &names[..old] {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |error| StoreError::Io { what, path, error }
}

/// Undoes what [`encode`] did; the error is for people.
fn decode(text: &str) -> Result<DistributionMap, String> {
    let (header, body) = text.split_once('\n').ok_or("it has no header")?;
    let header: Header = serde_json::from_str(header).map_err(|error| format!("its header: {error}"))?;
    if header.format != FORMAT {
        return Err(format!("it has format {}, this program reads format {FORMAT}", header.format));
    }
    if blake3::hash(body.as_bytes()).to_hex().as_str() != header.blake3 {
        return Err("its checksum does not match".into());
    }
    let stored: Stored = serde_json::from_str(body).map_err(|error| error.to_string())?;
    stored.map.validate().map_err(|error| error.to_string())?;
    Ok(stored.map)
}

fn encode(map: &DistributionMap, why: &[String]) -> Result<String, serde_json::Error> {
    let body = serde_json::to_string(&Stored { why: why.to_vec(), map: map.clone() })? + "\n";
    let header = Header { format: FORMAT, blake3: blake3::hash(body.as_bytes()).to_hex().to_string() };
    Ok(serde_json::to_string(&header)? + "\n" + &body)
}

impl FileStore {
    /// The newest map.
    pub fn map(&self) -> Result<Option<DistributionMap>, StoreError> {
        let path = self.map_path();
        match std::fs::read_to_string(&path) {
            Ok(text) => decode(&text).map(Some).map_err(|why| self.corrupt(&path, why)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Err(self.corrupt(&path, "it is not text"))
            }
            Err(error) => Err(failed("cannot read", &path)(error)),
        }
    }

    fn swap(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
        events: &[Event],
    ) -> Result<Swapped, StoreError> {
        if self.version != base {
            return Ok(Swapped::Conflict(FileStore::map(self)?.map(Box::new)));
        }
        let path = self.map_path();
        let text = encode(next, why).map_err(|error| self.corrupt(&path, error))?;
        self.replace(&path, text.as_bytes())?;
        self.version = Some(next.version);
        self.remember(next.version, &text);
        // What fails here is told when they are written behind.
        Ok(Swapped::Stored { events: FileStore::keep_events(self, events).unwrap_or(0) })
    }

    fn keep_events(&self, events: &[Event]) -> Result<usize, StoreError> {
        self.events.append(events).map_err(failed("cannot write", self.events.path()))?;
        Ok(events.len())
    }

    fn exporter_session(&mut self) -> Result<ExporterSession, StoreError> {
        // The clock keeps it growing even when the file is lost or an old one was brought back.
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let session = clock.max(self.last_session + 1);
        self.replace(&self.session_path(), format!("{session}\n").as_bytes())?;
        self.last_session = session;
        Ok(ExporterSession(session))
    }
}

impl Store for FileStore {
    async fn map(&mut self) -> Result<Option<DistributionMap>, StoreError> {
        FileStore::map(self)
    }

    async fn swap(
        &mut self,
        base: Option<MapVersion>,
        next: &DistributionMap,
        why: &[String],
        events: &[Event],
    ) -> Result<Swapped, StoreError> {
        FileStore::swap(self, base, next, why, events)
    }

    async fn exporter_session(&mut self) -> Result<ExporterSession, StoreError> {
        FileStore::exporter_session(self)
    }

    async fn events(&mut self) -> Result<Vec<Event>, StoreError> {
        Ok(self.events.read())
    }

    async fn keep_events(&mut self, events: &[Event]) -> Result<usize, StoreError> {
        FileStore::keep_events(self, events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::ids::ClusterId;

    fn map(version: u64) -> DistributionMap {
        DistributionMap {
            cluster: ClusterId::default(),
            cluster_name: "lab".into(),
            version: MapVersion(version),
            slice_bytes: 64 << 20,
            nodes: Vec::new(),
            disks: Vec::new(),
            devices: Vec::new(),
            ..DistributionMap::empty()
        }
    }

    fn swap(store: &mut FileStore, base: Option<u64>, next: u64) -> bool {
        let swapped = store.swap(base.map(MapVersion), &map(next), &["because".into()], &[]).unwrap();
        matches!(swapped, Swapped::Stored { .. })
    }

    #[test]
    fn a_map_survives_and_only_its_successor_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(dir.path()).unwrap();
        assert_eq!(store.map().unwrap(), None);
        assert!(swap(&mut store, None, 1));
        assert!(!swap(&mut store, None, 1));
        assert!(swap(&mut store, Some(1), 2));
        drop(store);
        let mut store = FileStore::open(dir.path()).unwrap();
        assert_eq!(store.map().unwrap(), Some(map(2)));
        let Swapped::Conflict(Some(newest)) = store.swap(Some(MapVersion(1)), &map(2), &[], &[]).unwrap()
        else {
            panic!("version 1 is gone");
        };
        assert_eq!(newest.version, MapVersion(2));
        assert!(swap(&mut store, Some(2), 3));
    }

    #[test]
    fn a_second_manager_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let _store = FileStore::open(dir.path()).unwrap();
        let error = FileStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    }

    #[test]
    fn exporter_sessions_grow_over_restarts_and_lost_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for _ in 0..3 {
            let mut store = FileStore::open(dir.path()).unwrap();
            for _ in 0..3 {
                let session = store.exporter_session().unwrap().0;
                assert!(session > last);
                last = session;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::remove_file(dir.path().join("exporter-session")).unwrap();
        assert!(FileStore::open(dir.path()).unwrap().exporter_session().unwrap().0 > last);
    }

    #[test]
    fn damage_is_named_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(dir.path()).unwrap();
        swap(&mut store, None, 7);
        drop(store);
        let path = dir.path().join("map.json");
        let text = std::fs::read_to_string(&path).unwrap();
        for (damaged, why) in [
            (text.replace("\"version\":7", "\"version\":8"), "its checksum does not match"),
            (text[..text.len() / 2].to_owned(), "its checksum does not match"),
            (
                text.replacen("\"format\":1", "\"format\":2", 1),
                "it has format 2, this program reads format 1",
            ),
            (String::new(), "it has no header"),
        ] {
            std::fs::write(&path, damaged).unwrap();
            let error = FileStore::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("map.json: damaged: ") && error.contains(why), "{error}");
        }
        std::fs::write(&path, [0xff, 0xfe, b'\n']).unwrap();
        assert!(FileStore::open(dir.path()).unwrap_err().to_string().contains("it is not text"));
        // What the message says to do.
        std::fs::copy(dir.path().join("history/000000000007.json"), &path).unwrap();
        assert_eq!(FileStore::open(dir.path()).unwrap().map().unwrap(), Some(map(7)));
    }

    #[test]
    fn the_history_keeps_the_last_hundred() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(dir.path()).unwrap();
        swap(&mut store, None, 1);
        for version in 2..=HISTORY_MAX as u64 + 5 {
            swap(&mut store, Some(version - 1), version);
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path().join("history"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!((names.len(), names[0].as_str()), (HISTORY_MAX, "000000000006.json"));
    }

    #[test]
    fn an_interrupted_write_leaves_the_old_map() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(dir.path()).unwrap();
        swap(&mut store, None, 1);
        std::fs::write(dir.path().join("map.new"), "half a ma").unwrap();
        assert_eq!(store.map().unwrap(), Some(map(1)));
        assert!(swap(&mut store, Some(1), 2));
    }
}
