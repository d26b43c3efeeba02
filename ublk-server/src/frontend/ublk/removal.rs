//! Removing what a daemon left behind that will not be started again.
//!
//! A device that somebody used when its daemon ended waits for the next one, and whatever waits on it waits as long.
//! Where there will be none, as on a node that is taken out of the cluster, that is for ever.

use super::control::Control;
use super::recovery::{Records, Survivor, discard, survey};
use super::{DeviceInfo, DeviceState, UblkId};
use anyhow::Context;
use std::path::Path;
use std::time::Duration;

/// For the kernel to fail what waits.
const PATIENCE: Duration = Duration::from_secs(20);

/// Stops and deletes every device that an earlier daemon of the node left behind; what waits on it fails. Names and
/// numbers are returned.
///
/// # Errors
/// One that a daemon serves: nothing is removed then. Records that cannot be read, a kernel that refuses.
pub fn remove_devices(node: &str, run_dir: &Path) -> anyhow::Result<Vec<(String, UblkId)>> {
    let mut removed = Vec::new();
    let records = Records::open(run_dir, node)?;
    let found = records.load()?.into_iter().collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() {
        return Ok(removed);
    }
    let mut control = Control::open()?;
    let survivors = survey(&mut control, found)?;
    for survivor in &survivors {
        if let Survivor::Orphan(orphan) = survivor
            && let Some(pid) = server_of(orphan.info())
        {
            anyhow::bail!(
                "{} is served by process {pid}: stop the node's ublk-server first",
                orphan.record().device
            );
        }
    }
    for survivor in survivors {
        let (name, id) = match survivor {
            Survivor::Orphan(orphan) => (orphan.record().device.clone(), Some(orphan.info().id)),
            Survivor::NotStarted { record, info } => (record.device, Some(info.id)),
            Survivor::Stale { record } => (record.device, None),
        };
        if let Some(id) = id {
            discard(&mut control, id, PATIENCE).with_context(|| format!("{name} ({id})"))?;
            removed.push((name.clone(), id));
        }
        records.remove(&name)?;
    }
    Ok(removed)
}

/// The process that serves a device, if it lives: old kernels go on naming one that is dead.
fn server_of(info: &DeviceInfo) -> Option<i32> {
    let lives = |pid: &i32| Path::new(&format!("/proc/{pid}")).exists();
    info.server_pid.filter(|pid| info.state == DeviceState::Live && lives(pid))
}
