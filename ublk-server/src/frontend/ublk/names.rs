//! What a device in the kernel is called in the map: for udev, to which ublk says nothing but a number.

use std::fs;
use std::path::{Path, PathBuf};

use super::UblkId;
use super::control::{Control, ControlError};
use super::recovery::{DeviceRecord, RECORD_DIRECTORY, Records};

/// The run directories of this machine's nodes, where nobody has chosen others.
pub fn run_directories() -> Vec<PathBuf> {
    directories(Path::new(RECORD_DIRECTORY))
}

/// The name of the device with that number; `None` if it is no device of nodes with these run directories.
///
/// # Errors
/// [`ControlError`] if the kernel cannot be asked.
pub fn name_of(
    control: &mut Control,
    id: UblkId,
    run_directories: &[PathBuf],
) -> Result<Option<String>, ControlError> {
    let recorded = recorded(id, run_directories);
    if recorded.is_empty() {
        return Ok(None);
    }
    // A record may be old and the number used again since.
    let cookie = control.get_dev_info(id)?.cookie;
    Ok(recorded.into_iter().find(|record| Some(record.cookie) == cookie).map(|record| record.device))
}

/// What is on record about a number.
fn recorded(id: UblkId, run_directories: &[PathBuf]) -> Vec<DeviceRecord> {
    let nodes = run_directories.iter().flat_map(|run| directories(run));
    let records = nodes.filter_map(|node| Records::open(node.parent()?, node.file_name()?.to_str()?).ok());
    // What cannot be read is of no help here; the daemon tells of it.
    let records = records.filter_map(|records| records.load().ok()).flatten().flatten();
    records.filter(|record| record.id == Some(id)).collect()
}

fn directories(place: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::ublk::Cookie;
    use crate::frontend::ublk::params::DeviceParams;

    #[test]
    fn a_number_is_found_in_the_records_of_all_nodes() {
        let base = tempfile::tempdir().unwrap();
        for (node, device, id) in [("n1", "data", Some(0)), ("n1", "new", None), ("n2", "other", Some(3))] {
            let records = Records::open(&base.path().join(node), node).unwrap();
            let mut record = DeviceRecord::new(device, Cookie(7), DeviceParams::new(1 << 20, 4096));
            record.id = id.map(UblkId);
            records.save(&record).unwrap();
        }
        fs::write(base.path().join("n1/n1/broken.json"), "{").unwrap();
        fs::write(base.path().join("n1/nbd.sock"), "").unwrap();
        let found = |id| {
            let records = recorded(UblkId(id), &directories(base.path()));
            records.into_iter().map(|record| record.device).collect::<Vec<_>>()
        };
        assert_eq!(found(0), ["data"]);
        assert_eq!(found(3), ["other"]);
        assert!(found(1).is_empty());
    }
}
