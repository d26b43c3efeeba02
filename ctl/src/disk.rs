//! A disk, looked at without the daemon.

use crate::failure::{FAILED, Failure, OK};
use crate::output;
use mirror_net::format::ReadFailed;
use mirror_net::format::inspect::inspect as look;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// `mirrorctl disk inspect`: reads only, and takes no lock, so it may run beside the daemon.
pub fn inspect(path: &Path, slots: bool, json: bool) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("cannot read {}: {error}", path.display()));
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut read =
        |offset: u64, buffer: &mut [u8]| file.read_exact_at(buffer, offset).map_err(|_| ReadFailed);
    let report = look(&mut read, bytes, slots);
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&report.to_string());
    }
    Ok(if report.refused.is_some() { FAILED } else { OK })
}
