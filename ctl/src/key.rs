//! The cluster key in its file.

use crate::failure::{Failure, OK};
use crate::output;
use mirror_net::wire::handshake::ClusterKey;
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// 32 bytes from the system's random number generator.
pub fn random_bytes() -> Result<[u8; 32], Failure> {
    let mut bytes = [0; 32];
    OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| Failure::new(format!("the system gives no random numbers: {error}")))?;
    Ok(bytes)
}

/// `mirrorctl key new`.
pub fn new(out: &Path) -> Result<u8, Failure> {
    write_new(out)?;
    output::print(&format!(
        "{}: a new cluster key; copy it to every machine of the cluster, readable by root only",
        out.display()
    ));
    Ok(OK)
}

/// Makes a key file that only its owner can read; refuses to overwrite.
pub fn write_new(out: &Path) -> Result<(), Failure> {
    let key = ClusterKey::new(random_bytes()?);
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(out);
    let mut file: File = file.map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(format!(
            "{} exists and is not overwritten: a cluster whose key is lost must be stopped to give it another; move \
             the file away if you mean it",
            out.display()
        )),
        _ => Failure::new(format!("cannot write {}: {error}", out.display())),
    })?;
    file.write_all(key.to_text().as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", out.display())))
}

/// Reads a key file; one that everybody can read is refused.
pub fn load(path: &Path) -> Result<ClusterKey, Failure> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::new(format!(
            "{shown}: there is no cluster key; copy it from another machine of the cluster, or make one with \
             `mirrorctl key new --out {shown}`"
        )),
        _ => Failure::new(format!("cannot read the cluster key {shown}: {error}")),
    })?;
    refuse_public(path, "use the cluster key")?;
    ClusterKey::parse(&text).map_err(|error| Failure::new(format!("{shown}: {error}")))
}

/// Refuses a secret file that everybody can read or write; `what` they could do with it.
pub fn refuse_public(path: &Path, what: &str) -> Result<(), Failure> {
    let mode = std::fs::metadata(path).map(|metadata| metadata.mode()).unwrap_or(0);
    if mode & 0o006 == 0 {
        return Ok(());
    }
    let shown = path.display();
    Err(Failure::new(format!("{shown}: everybody on this machine can {what}; type: chmod 600 {shown}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_new(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        load(&path).unwrap();
        assert!(write_new(&path).unwrap_err().message.contains("exists and is not overwritten"));
    }

    #[test]
    fn a_key_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(load(&path).unwrap_err().message.contains("there is no cluster key"));
        std::fs::write(&path, "hello").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load(&path).unwrap_err().message.contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(load(&path).unwrap_err().message.contains("64 hexadecimal digits"));
    }
}
