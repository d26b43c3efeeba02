//! What is on a disk that is not ours, so that nobody formats over it by mistake.

use crate::ring::buffers::AlignedBlock;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// How much of the disk's beginning is looked at, in bytes.
const LOOK_BYTES: usize = 1 << 20;

/// Names what is on the disk; `None` if there is nothing.
pub fn identify(path: &Path, file: &File, bytes: u64) -> io::Result<Option<String>> {
    if let Some(found) = signatures(path)? {
        return Ok(Some(found));
    }
    let mut block = AlignedBlock::new(LOOK_BYTES);
    let length = (bytes.min(LOOK_BYTES as u64) / 4096 * 4096) as usize;
    file.read_exact_at(&mut block[..length], 0)?;
    let data = block[..length].iter().any(|byte| *byte != 0);
    Ok(data.then(|| "data of an unknown kind in its first MiB".to_owned()))
}

/// Asks `blkid`, which knows every file system, partition table, RAID and swap signature there is.
fn signatures(path: &Path) -> io::Result<Option<String>> {
    let output = match Command::new("blkid").args(["--probe", "--output", "export"]).arg(path).output() {
        Ok(output) => output,
        // Without it the disk's first bytes decide.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let Some(kind) = value("TYPE").or_else(|| value("PTTYPE")) else { return Ok(None) };
    let what = if value("TYPE").is_some() { "signature" } else { "partition table" };
    Ok(Some(match value("LABEL") {
        Some(label) => format!("a {kind} {what}, labelled \"{label}\""),
        None => format!("a {kind} {what}"),
    }))
}
