//! Managers on several hosts that share an etcd, as processes.

use super::{fake_node, mirrorctl, runtime};
use ctl::key;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::wire::handshake::Role;
use mirror_net::wire::transport;
use mirror_tests::etcd::{Etcd, free_addresses, wait_for};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The program.
pub const MIRRORCTL: &str = env!("CARGO_BIN_EXE_mirrorctl");

/// A cluster file and an etcd, managers as processes, and two fake nodes.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub etcd: Etcd,
    pub managers: Vec<String>,
    children: Vec<Option<Child>>,
    /// Fake nodes on a thread of their own.
    stop: Arc<AtomicBool>,
    nodes: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        (0..self.children.len()).for_each(|manager| self.kill(manager));
        self.stop.store(true, Ordering::Relaxed);
        if let Some(nodes) = self.nodes.take() {
            let _ = nodes.join();
        }
    }
}

impl Lab {
    /// With an etcd of three members that asks nobody who he is; no manager runs.
    pub fn new(managers: usize) -> Self {
        let etcd = Etcd::start(3);
        let store = etcd.table();
        Self::with(managers, etcd, &store)
    }

    /// With that `[store]` table in the cluster file.
    pub fn with(managers: usize, etcd: Etcd, store: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut addresses = free_addresses(managers + 2);
        let nodes = addresses.split_off(managers);
        let path = dir.path().display();
        let mut text =
            format!("[cluster]\nname = \"lab\"\nkey_file = \"{path}/key\"\nmanager = {addresses:?}\n{store}");
        for (index, node) in (1..).zip(&nodes) {
            text += &format!(
                "[[node]]\nname = \"n{index}\"\naddress = \"{node}\"\n[[node.disk]]\npath = \"{path}/n{index}.img\"\n\
                 size = \"1G\"\n"
            );
            std::fs::create_dir(dir.path().join(format!("n{index}"))).unwrap();
        }
        std::fs::write(dir.path().join("cluster.toml"), text).unwrap();
        key::write_new(&dir.path().join("key")).unwrap();
        let children = addresses.iter().map(|_| None).collect();
        Self { dir, etcd, managers: addresses, children, stop: Arc::default(), nodes: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let dir = self.dir.path().to_str().unwrap();
        mirrorctl(Path::new(MIRRORCTL), &[arguments, &["--dir", dir]].concat())
    }

    pub fn start(&mut self, manager: usize) {
        let log = std::fs::File::create(self.path(&format!("m{manager}.log"))).unwrap();
        let child = Command::new(MIRRORCTL)
            .args(["manager", "run", "--address", &self.managers[manager], "--dir"])
            .arg(self.dir.path())
            .arg("--state-dir")
            .arg(self.path(&format!("m{manager}")))
            .stderr(Stdio::from(log))
            .spawn();
        self.children[manager] = Some(child.unwrap());
    }

    pub fn kill(&mut self, manager: usize) {
        if let Some(mut child) = self.children[manager].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Two nodes that register with whoever leads.
    pub fn start_nodes(&mut self) {
        let (config, stop) = (self.path("cluster.toml"), Arc::clone(&self.stop));
        let states = [self.path("n1"), self.path("n2")];
        self.nodes = Some(std::thread::spawn(move || {
            runtime().block_on(async {
                let [one, two] = &states;
                let stopped = async {
                    while !stop.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                };
                tokio::select! {
                    () = fake_node(&config, "n1", one) => {}
                    () = fake_node(&config, "n2", two) => {}
                    () = stopped => {}
                }
            });
        }));
    }

    /// What a manager says to somebody who asks it alone.
    pub fn ask(&self, manager: usize) -> Option<OperatorReply> {
        let key = key::load(&self.path("key")).unwrap();
        runtime().block_on(async {
            let address = &self.managers[manager];
            let mut stream = super::connect(address, &key, Role::Operator, "test", None).await.ok()?;
            transport::send(&mut stream, &OperatorRequest::Map).await.ok()?;
            transport::receive(&mut stream).await.ok()
        })
    }

    pub fn leads(&self, manager: usize) -> bool {
        matches!(self.ask(manager), Some(OperatorReply::Map { .. }))
    }

    /// The one that leads; there is never more than one.
    pub fn leader(&self) -> usize {
        wait_for("a leader", || {
            let leaders: Vec<usize> =
                (0..self.managers.len()).filter(|manager| self.leads(*manager)).collect();
            assert!(leaders.len() <= 1, "managers {leaders:?} lead at the same time");
            leaders.first().copied()
        })
    }

    pub fn map(&self) -> serde_json::Value {
        let (code, out, err) = self.run(&["map", "show", "--json"]);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    }

    pub fn healthy(&self) {
        let mut last = String::new();
        wait_for("a healthy cluster", || {
            let (code, out, err) = self.run(&["status"]);
            let new = out + &err;
            if new != last {
                println!("{new}");
                last = new;
            }
            (code == 0).then_some(())
        });
    }

    pub fn create(&mut self) {
        self.start_nodes();
        wait_for("a cluster", || {
            let (code, _, err) = self.run(&["cluster", "create"]);
            println!("{err}");
            (code == 0).then_some(())
        });
        self.healthy();
    }
}
