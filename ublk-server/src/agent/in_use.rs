//! Who uses a block device, as far as can be told without touching it: one that hangs must not hang whoever asks.

use std::fs;
use std::path::Path;

/// What a block device is mounted on, or otherwise used for, for people; partitions of it too.
///
/// Looks at the mounts of this process's namespace, at swap, and at devices built on it. A program that merely has it
/// open is not seen.
pub(super) fn mounted(path: &str) -> Option<String> {
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
    fn a_disk_its_partitions_and_no_other() {
        let mounts = "/dev/vda / ext4 rw 0 0\n/dev/ublkb12 /other ext4 rw 0 0\n/dev/ublkb1p2 /srv/a\\040b xfs rw 0 0\n";
        assert_eq!(found("ublkb1", mounts, ""), Some("it is mounted on /srv/a b".to_owned()));
        assert_eq!(found("ublkb2", mounts, ""), None);
        let swaps = "Filename Type Size\n/dev/ublkb2 partition 1\n";
        assert_eq!(found("ublkb2", mounts, swaps), Some("it is swapped to".to_owned()));
    }
}
