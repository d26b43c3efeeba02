//! fio, run where the files that it leaves behind do no harm.

use anyhow::{Context, ensure};
use std::process::{Child, Command, Stdio};

/// A fio that runs.
pub struct Fio {
    child: Child,
    /// It writes the states of its verification into the directory that it is started in.
    cwd: tempfile::TempDir,
}

impl Fio {
    /// Starts it with these arguments; whatever it finds wrong ends it.
    pub fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let cwd = tempfile::tempdir()?;
        let output = std::fs::File::create(cwd.path().join("output"))?;
        let child = Command::new("fio")
            .args(["--name=verify", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
            .args(arguments)
            .current_dir(cwd.path())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("fio is installed: apt-get install fio")?;
        Ok(Self { child, cwd })
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for its end and wants it to be content.
    pub fn finish(mut self) -> anyhow::Result<()> {
        let status = self.child.wait()?;
        let output = std::fs::read(self.cwd.path().join("output"))?;
        ensure!(status.success(), "fio: {status}: {}", String::from_utf8_lossy(&output));
        Ok(())
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        // Only matters if the test failed.
        let _ = self.child.kill();
    }
}

/// Runs it to its end.
pub fn fio(arguments: &[&str]) -> anyhow::Result<()> {
    Fio::start(arguments)?.finish()
}
