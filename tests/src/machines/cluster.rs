//! The cluster on a lab's machines: made once, asked through the manager's machine.

use super::Lab;
use super::exec::Ended;
use super::machine::{EXPORT_PORT, EXPORTS, Machine};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long a node has to be away until its copies are made again, where nothing is slow: longer than a start takes.
const SPARE_AFTER: Duration = Duration::from_secs(5);
const CONFIG: &str = "/state/cluster.toml";

impl Lab {
    /// Makes a cluster of all nodes, and waits until every copy is in sync and every device exported.
    pub fn create_cluster(&self) -> anyhow::Result<()> {
        let key = "mirrorctl key new --out /state/cluster.key >/dev/null && cat /state/cluster.key";
        let key = self.manager().run(&["sh", "-c", key], self.patience())?.ok()?;
        for machine in self.machines() {
            machine.put("/state/cluster.key", key.as_bytes(), self.patience())?;
            // The daemons wait for this file.
            machine.put(CONFIG, self.cluster_file().as_bytes(), self.patience())?;
        }
        self.until("all nodes have registered", || {
            let made = self.ctl(&["cluster", "create"])?;
            let early = ["not connected", "cannot be reached"].iter().any(|words| made.err.contains(words));
            ensure!(made.code == 0 || early, "cluster create: {made:?}");
            Ok((made.code == 0).then_some(()))
        })?;
        self.healthy()
    }

    fn cluster_file(&self) -> String {
        let mut text = format!(
            "[cluster]\nname = \"lab\"\nmanager = \"10.77.0.{}:7300\"\nkey_file = \"/state/cluster.key\"\nslice_size = \
             \"16MiB\"\nfrontend = \"ublk\"\nfail_after = \"{}ms\"\nspare_after = \"{}s\"\n",
            self.manager().number,
            self.fail_after.as_millis(),
            self.calibration.scale(SPARE_AFTER).as_secs()
        );
        for (index, node) in self.nodes().iter().enumerate() {
            let spare = index >= self.nodes().len() - self.spares;
            text += &format!(
                "[[node]]\nname = \"{}\"\naddress = \"10.77.0.{}:7301\"\nspare = {spare}\n",
                node.name, node.number
            );
            if let Some((power, switch)) = self.sets.get(index) {
                text += &format!("power = \"{power}\"\nswitch = \"{switch}\"\n");
            }
            for serial in node.data_disks().take(self.cluster_disks) {
                text += &format!("[[node.disk]]\npath = \"/dev/disk/by-id/virtio-{serial}\"\n");
            }
        }
        text
    }

    /// Puts a mirrored device of that size on each node, called like the first that a cluster begins with, in place of all
    /// that there are: with room left on every disk.
    pub fn make_roomy(&self, size: &str) -> anyhow::Result<()> {
        let devices = self.json(&["device", "list"])?;
        for device in devices.as_array().into_iter().flatten() {
            let name = device["name"].as_str().context("a device without a name")?;
            self.ctl(&["device", "delete", name, "--yes"])?.ok()?;
        }
        // Else mirrors would be spread over all others.
        self.ctl(&["topology", "pair"])?.ok()?;
        for node in self.nodes() {
            let name = format!("{}-d1", node.name);
            self.ctl(&["device", "create", &name, "--size", size, "--node", &node.name])?.ok()?;
        }
        self.healthy()
    }

    /// The machines of the nodes.
    pub fn nodes(&self) -> &[Machine] {
        let machines = self.machines();
        &machines[..machines.len() - 1]
    }

    /// Runs `mirrorctl` on the manager's machine.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<Ended> {
        let words = [&["mirrorctl", "--config", CONFIG], arguments].concat();
        self.manager().run(&words, self.patience())
    }

    /// `mirrorctl … --json`, whatever its exit code says of the cluster's health.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let ended = self.ctl(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&ended.out).with_context(|| format!("mirrorctl {arguments:?}: {ended:?}"))
    }

    /// What `mirrorctl device list` says of a device.
    pub fn device(&self, name: &str) -> anyhow::Result<Value> {
        let devices = self.json(&["device", "list"])?.as_array().cloned().unwrap_or_default();
        devices.into_iter().find(|device| device["name"] == name).with_context(|| format!("no device {name}"))
    }

    /// The machine that exports a device now, and the path there; `None` while nobody does.
    pub fn exported(&self, name: &str) -> anyhow::Result<Option<(&Machine, String)>> {
        let device = self.device(name)?;
        match (device["exporter"].as_str(), device["path"].as_str()) {
            (Some(node), Some(path)) => Ok(Some((self.machine(node)?, path.to_owned()))),
            _ => Ok(None),
        }
    }

    /// Serves a device to the host over NBD, from the machine that exports it now; tells the URI.
    pub fn reach(&self, name: &str) -> anyhow::Result<Option<String>> {
        let Some((machine, path)) = self.exported(name)? else { return Ok(None) };
        let index = self.nodes().iter().position(|node| name.starts_with(&format!("{}-", node.name)));
        let index = index.with_context(|| format!("{name} is no node's"))? as u16;
        ensure!(index < EXPORTS, "too many devices for the ports of a machine");
        let port = (EXPORT_PORT + index).to_string();
        machine.run(&["scripts/lab.d/export", name, &path, &port], self.patience())?.ok()?;
        Ok(Some(format!("nbd://{}/{name}", machine.export(index))))
    }

    /// Waits until `mirrorctl status` has nothing to find: every copy is in sync.
    pub fn healthy(&self) -> anyhow::Result<()> {
        let mut last = String::new();
        self.until("status says healthy", || {
            let status = self.ctl(&["status"])?;
            last = status.out + &status.err;
            Ok((status.code == 0).then_some(()))
        })
        .with_context(|| last)
    }

    /// Waits until `look` finds something, for three times the patience of a single request: a whole resync may
    /// be on the way. While machines come and go a look may fail; what counts is that it does not for ever.
    pub fn until<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let begun = Instant::now();
        loop {
            let found = look();
            if let Ok(Some(found)) = found {
                return Ok(found);
            }
            if begun.elapsed() > 3 * self.patience() {
                let waited = || format!("waited {:?} for: {what}", begun.elapsed());
                return Err(found
                    .err()
                    .map_or_else(|| anyhow::anyhow!(waited()), |error| error.context(waited())));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
