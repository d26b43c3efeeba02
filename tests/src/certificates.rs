//! A certificate authority, and certificates of it, made by the `openssl` command.

use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// For `openssl req`: nothing is asked, and the extensions are ours.
const CONFIG: &str = "[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = ublk-mirror test\n\
                      [authority]\nbasicConstraints = critical, CA:true\nsubjectKeyIdentifier = hash\n\
                      [member]\nbasicConstraints = critical, CA:false\nsubjectAltName = IP:127.0.0.1\n\
                      extendedKeyUsage = serverAuth, clientAuth\n";

/// A certificate and its key, PEM files.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// An authority in a directory.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    /// Its own certificate and key.
    pub own: Pair,
}

fn openssl(dir: &Path, name: &str, more: &[&str]) -> anyhow::Result<Pair> {
    let pair = Pair { certificate: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
    let config = dir.join("openssl.cnf");
    std::fs::write(&config, CONFIG)?;
    let output = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-days", "2", "-config"])
        .arg(config)
        .args(["-subj", &format!("/CN={name}")])
        .args(more)
        .arg("-keyout")
        .arg(&pair.key)
        .arg("-out")
        .arg(&pair.certificate)
        .output()
        .context("openssl: is Debian's openssl installed?")?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(pair)
}

impl Authority {
    /// A new one, with its files in a directory that is there.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let own = openssl(dir, "ca", &["-extensions", "authority"])?;
        Ok(Self { dir: dir.to_owned(), own })
    }

    /// A certificate for 127.0.0.1, for either end of a connection.
    pub fn issue(&self, name: &str) -> anyhow::Result<Pair> {
        let text = |path: &Path| path.display().to_string();
        let (certificate, key) = (text(&self.own.certificate), text(&self.own.key));
        openssl(&self.dir, name, &["-extensions", "member", "-CA", &certificate, "-CAkey", &key])
    }
}
