//! Who uses a block device, as far as can be told without touching it: one that hangs must not hang whoever asks.

use crate::frontend::ublk::UblkId;
use crate::frontend::ublk::users::{User, processes_of};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io};
use tokio::task::JoinHandle;

/// Programs that have a device open are looked for so often; at every report while there are any.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Devices that somebody has open, each with one who has.
type Seen = Vec<(UblkId, User)>;

/// Which programs have this node's block devices open: every process is looked at, in a thread of its own.
#[derive(Default)]
pub(super) struct Openers {
    /// As was last seen; `None` before anything was, and where it could not be.
    found: Option<BTreeMap<UblkId, User>>,
    looking: Option<JoinHandle<io::Result<Seen>>>,
    looked: Option<Instant>,
}

impl Openers {
    /// Begins to look, if it is time to; what was found before is known from then on.
    pub async fn look(&mut self, now: Instant, paths: impl Iterator<Item = &str>) {
        if let Some(looking) = self.looking.take_if(|looking| looking.is_finished()) {
            let seen = looking.await.map_err(io::Error::other).and_then(|seen| seen);
            self.found = match seen {
                Ok(seen) => Some(seen.into_iter().collect()),
                Err(error) => {
                    tracing::warn!(%error, "cannot see who has the devices open");
                    None
                }
            };
        }
        let is_due = self.looked.is_none_or(|looked| {
            let used = self.found.as_ref().is_none_or(|found| !found.is_empty());
            used || now >= looked + LOOK_EVERY
        });
        let ids: Vec<UblkId> = paths.filter_map(number_of).collect();
        if ids.is_empty() {
            self.found = None;
        } else if is_due && self.looking.is_none() {
            self.looked = Some(now);
            self.looking = Some(tokio::task::spawn_blocking(move || processes_of(&ids)));
        }
    }

    /// Who uses the block device at that path, for people. What is not known counts as used.
    pub fn user(&self, path: &str) -> Option<String> {
        mounted(path).or_else(|| match &self.found {
            None => Some("it is not known yet which programs have it open".to_owned()),
            Some(found) => Some(format!("{} has it open", found.get(&number_of(path)?)?)),
        })
    }
}

/// The number in `/dev/ublkbN`.
fn number_of(path: &str) -> Option<UblkId> {
    path.strip_prefix("/dev/ublkb")?.parse().ok().map(UblkId)
}

/// What a block device is mounted on, or otherwise used for, for people; partitions of it too.
///
/// Looks at the mounts of this process's namespace, at swap, and at devices built on it.
fn mounted(path: &str) -> Option<String> {
    let disk = Path::new(path).file_name()?.to_str()?;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if let Some(user) = found(disk, &mounts, &swaps) {
        return Some(user);
    }
    let mut holders = fs::read_dir(format!("/sys/block/{disk}/holders")).ok()?.flatten();
    holders.next().map(|holder| format!("{} is built on it", holder.file_name().to_string_lossy()))
}

fn found(disk: &str, mounts: &str, swaps: &str) -> Option<String> {
    let is_ours = |source: &str| {
        let name = source.strip_prefix("/dev/").unwrap_or_default();
        let rest = name.strip_prefix(disk);
        // `ublkb1p2` is a partition of `ublkb1`, and `ublkb12` another disk.
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
    };
    let fields = |line: &str| -> Option<(String, String)> {
        let mut fields = line.split_ascii_whitespace().map(str::to_owned);
        Some((fields.next()?, fields.next()?))
    };
    let mounted = mounts.lines().filter_map(fields).find(|(source, _)| is_ours(source));
    let swap = || swaps.lines().filter_map(fields).find(|(source, _)| is_ours(source));
    mounted
        .map(|(_, place)| format!("it is mounted on {}", place.replace("\\040", " ")))
        .or_else(|| swap().map(|_| "it is swapped to".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_looked_at_counts_as_used() {
        let mut openers = Openers::default();
        assert!(openers.user("/dev/ublkb4000000").is_some());
        openers.found = Some(BTreeMap::new());
        assert_eq!(openers.user("/dev/ublkb4000000"), None);
    }

    #[test]
    fn a_disk_its_partitions_and_no_other() {
        let mounts = "/dev/vda / ext4 rw 0 0\n/dev/ublkb12 /other ext4 rw 0 0\n/dev/ublkb1p2 /srv/a\\040b xfs rw 0 0\n";
        assert_eq!(found("ublkb1", mounts, ""), Some("it is mounted on /srv/a b".to_owned()));
        assert_eq!(found("ublkb2", mounts, ""), None);
        let swaps = "Filename Type Size\n/dev/ublkb2 partition 1\n";
        assert_eq!(found("ublkb2", mounts, swaps), Some("it is swapped to".to_owned()));
    }
}
