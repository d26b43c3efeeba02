//! What happened, kept for people: `events.jsonl` in the state directory, a JSON object a line.
//!
//! Nothing is decided by it, so an event that cannot be written is told to the log and lost.

use mirror_net::control::{Event, EventKind};
use mirror_net::ids::MapVersion;
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Events that are remembered.
const REMEMBERED_MAX: usize = 10_000;
/// Events in one answer: they fit in a frame.
const ANSWER_MAX: usize = 2_000;
/// A file that grew beyond this gives way to a new one, and is kept as `events.1.jsonl`.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// The last events.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    older: PathBuf,
    remembered: VecDeque<Event>,
    last: u64,
}

impl EventLog {
    /// Reads what is there.
    pub fn open(dir: &Path) -> Self {
        let (path, older) = (dir.join("events.jsonl"), dir.join("events.1.jsonl"));
        let mut log = Self { path, older, remembered: VecDeque::new(), last: 0 };
        for path in [log.older.clone(), log.path.clone()] {
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::warn!("cannot read {}: {error}", path.display());
                    continue;
                }
            };
            // The last line may have been cut off by a crash.
            let events = text.lines().filter_map(|line| serde_json::from_str::<Event>(line).ok());
            events.for_each(|event| log.remember(event));
        }
        log
    }

    fn remember(&mut self, event: Event) {
        self.last = self.last.max(event.number);
        self.remembered.push_back(event);
        if self.remembered.len() > REMEMBERED_MAX {
            self.remembered.pop_front();
        }
    }

    /// Notes an event of this moment.
    pub fn note(&mut self, kind: EventKind, map: Option<MapVersion>, text: String) {
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let event = Event { number: self.last + 1, at, kind, map, text };
        if let Err(error) = self.write(&event) {
            tracing::warn!("cannot write {}: {error}", self.path.display());
        }
        self.remember(event);
    }

    fn write(&self, event: &Event) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.create(true).append(true).mode(0o600).open(&self.path)?;
        if file.metadata()?.len() > FILE_BYTES_MAX {
            std::fs::rename(&self.path, &self.older)?;
            file = options.open(&self.path)?;
        }
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        // In one piece, so that a crash cuts off the last line and no other.
        file.write_all(&line)
    }

    /// Those with a larger number, the oldest first; the newest of them if there are too many.
    pub fn after(&self, number: u64) -> Vec<Event> {
        let first = self.remembered.partition_point(|event| event.number <= number);
        let first = first.max(self.remembered.len().saturating_sub(ANSWER_MAX));
        self.remembered.iter().skip(first).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_outlive_the_manager_and_a_line_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path());
        log.note(EventKind::Node, None, "one".into());
        log.note(EventKind::Map, Some(MapVersion(7)), "two".into());
        let mut file = OpenOptions::new().append(true).open(dir.path().join("events.jsonl")).unwrap();
        file.write_all(b"{\"number\": 3, \"at\"").unwrap();
        let mut again = EventLog::open(dir.path());
        let texts = |log: &EventLog, after| {
            log.after(after).into_iter().map(|event| (event.number, event.text)).collect::<Vec<_>>()
        };
        assert_eq!(texts(&again, 0), [(1, "one".to_owned()), (2, "two".to_owned())]);
        again.note(EventKind::Spare, None, "three".into());
        assert_eq!(texts(&again, 2), [(3, "three".to_owned())]);
        assert_eq!(again.after(1)[0].map, Some(MapVersion(7)));
    }
}
