//! The events of a manager with a store of its own: `events.jsonl` in the state directory, a JSON object a line.

use super::super::events::REMEMBERED_MAX;
use mirror_net::control::Event;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that grew beyond this gives way to a new one, and is kept as `events.1.jsonl`.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// See the module's description.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    older: PathBuf,
}

impl EventFile {
    pub(super) fn new(dir: &Path) -> Self {
        Self { path: dir.join("events.jsonl"), older: dir.join("events.1.jsonl") }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The last that are there, the oldest first.
    pub(super) fn read(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for path in [&self.older, &self.path] {
            let text = match std::fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::warn!("cannot read {}: {error}", path.display());
                    continue;
                }
            };
            // Any line may have been cut off by a crash.
            events.extend(text.lines().filter_map(|line| serde_json::from_str::<Event>(line).ok()));
        }
        events.drain(..events.len().saturating_sub(REMEMBERED_MAX));
        events
    }

    /// Writes them behind what is there.
    pub(super) fn append(&self, events: &[Event]) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        options.create(true).read(true).append(true).mode(0o600);
        let mut file = options.open(&self.path)?;
        if file.metadata()?.len() > FILE_BYTES_MAX {
            std::fs::rename(&self.path, &self.older)?;
            file = options.open(&self.path)?;
        }
        let mut text = Vec::new();
        if is_cut_off(&mut file)? {
            // What is behind it would be lost with it.
            text.push(b'\n');
        }
        for event in events {
            serde_json::to_writer(&mut text, event)?;
            text.push(b'\n');
        }
        // In one piece, so that a crash cuts off the last lines and no other.
        file.write_all(&text)
    }
}

/// Whether the last line has no end.
fn is_cut_off(file: &mut File) -> std::io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::control::EventKind;
    use mirror_net::ids::MapVersion;

    fn event(number: u64) -> Event {
        let (at, map) = ("2026-01-01T00:00:00.000Z".into(), Some(MapVersion(number)));
        Event { number, at, kind: EventKind::Map, map, text: format!("event {number}") }
    }

    #[test]
    fn events_outlive_the_manager_and_a_line_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let file = EventFile::new(dir.path());
        assert_eq!(file.read(), []);
        file.append(&[event(1), event(2)]).unwrap();
        let mut cut = OpenOptions::new().append(true).open(file.path()).unwrap();
        cut.write_all(b"{\"number\": 3, \"at\"").unwrap();
        let again = EventFile::new(dir.path());
        assert_eq!(again.read(), [event(1), event(2)]);
        again.append(&[event(3)]).unwrap();
        assert_eq!(again.read(), [event(1), event(2), event(3)], "what comes behind the cut line is whole");
    }

    #[test]
    fn a_long_file_gives_way_to_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = EventFile::new(dir.path());
        let long = |number| Event { text: "x".repeat(1 << 20), ..event(number) };
        (1..=12).for_each(|number| file.append(&[long(number)]).unwrap());
        let numbers: Vec<u64> = file.read().iter().map(|event| event.number).collect();
        assert_eq!(numbers, (1..=12).collect::<Vec<_>>());
        assert!(std::fs::metadata(file.path()).unwrap().len() < FILE_BYTES_MAX);
    }
}
