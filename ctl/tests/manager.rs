//! The manager as a process, and commands that fail.

mod common;

use common::{mirrorctl, runtime};
use ctl::key;
use mirror_net::control::{OperatorReply, OperatorRequest};
use mirror_net::wire::handshake::{ClusterKey, HandshakeError, Role};
use mirror_net::wire::transport::{self, TransportError};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const MIRRORCTL: &str = env!("CARGO_BIN_EXE_mirrorctl");

struct Lab {
    dir: tempfile::TempDir,
    manager: String,
    child: Option<Child>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Lab {
    /// A key and a cluster file; nothing runs.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<TcpListener> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<String> = ports.iter().map(|port| port.local_addr().unwrap().to_string()).collect();
        let path = dir.path().display();
        let mut text =
            format!("[cluster]\nname = \"lab\"\nkey_file = \"{path}/key\"\nmanager = \"{}\"\n", ports[0]);
        for (index, port) in (1..).zip(&ports[1..]) {
            text += &format!(
                "[[node]]\nname = \"n{index}\"\naddress = \"{port}\"\n[[node.disk]]\npath = \"{path}/n{index}.img\"\n\
                 size = \"1G\"\n"
            );
            std::fs::create_dir(dir.path().join(format!("n{index}"))).unwrap();
        }
        std::fs::write(dir.path().join("cluster.toml"), text).unwrap();
        key::write_new(&dir.path().join("key")).unwrap();
        Self { dir, manager: ports[0].clone(), child: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let dir = self.dir.path().to_str().unwrap();
        mirrorctl(Path::new(MIRRORCTL), &[arguments, &["--dir", dir]].concat())
    }

    fn start(&mut self) {
        let child = Command::new(MIRRORCTL)
            .args(["manager", "run", "--dir"])
            .arg(self.dir.path())
            .arg("--state-dir")
            .arg(self.path("manager"))
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.unwrap());
        for _ in 0..100 {
            if std::net::TcpStream::connect(&self.manager).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the manager does not listen");
    }
}

#[test]
fn every_failure_is_one_line_with_its_exit_code() {
    let mut lab = Lab::new();
    let state = lab.path("manager");
    let state = state.to_str().unwrap().to_owned();
    let (code, _, err) = lab.run(&["status"]);
    assert_eq!(code, 3);
    assert!(
        err.starts_with(&format!("mirrorctl: the manager at {} cannot be reached", lab.manager)),
        "{err}"
    );
    let (code, _, err) = lab.run(&["frobnicate"]);
    assert_eq!(code, 64);
    assert!(err.starts_with("mirrorctl: unrecognized subcommand 'frobnicate'"), "{err}");
    let (code, _, err) = mirrorctl(Path::new(MIRRORCTL), &["playground"]);
    assert_eq!(code, 64, "{err}");
    let several = ["playground", "--managers", "2", "--dir", "/nowhere"];
    let (code, _, err) = mirrorctl(Path::new(MIRRORCTL), &several);
    assert_eq!((code, err.contains("several managers share an etcd: add --etcd")), (64, true), "{err}");
    let (code, _, err) = mirrorctl(Path::new(MIRRORCTL), &["status", "--config", "/nowhere.toml"]);
    assert_eq!((code, err.contains("/nowhere.toml")), (1, true), "{err}");

    lab.start();
    let (code, out, _) = lab.run(&["status"]);
    assert_eq!(code, 2);
    assert!(out.starts_with("unavailable: no cluster has been created yet"), "{out}");
    let (code, _, err) = lab.run(&["cluster", "create"]);
    assert_eq!(code, 1);
    assert!(err.starts_with("mirrorctl: not connected: n1, n2; start ublk-server on every node"), "{err}");
    let (code, _, err) = lab.run(&["map", "show"]);
    assert_eq!((code, err.contains("no cluster has been created yet")), (1, true), "{err}");
    let (code, _, err) = lab.run(&["node", "failover", "n1"]);
    assert_eq!((code, err.as_str()), (1, "mirrorctl: no cluster has been created yet\n"));

    let (code, _, err) = lab.run(&["manager", "run", "--state-dir", &state]);
    assert_eq!(code, 1);
    assert!(err.contains("another manager uses this state directory"), "{err}");
    let other = lab.path("other");
    let (code, _, err) = lab.run(&["manager", "run", "--state-dir", other.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("is another manager running?"), "{err}");

    let (code, _, err) = lab.run(&["key", "new", "--out", lab.path("key").to_str().unwrap()]);
    assert_eq!((code, err.contains("exists and is not overwritten")), (1, true), "{err}");
    std::fs::remove_file(lab.path("key")).unwrap();
    key::write_new(&lab.path("key")).unwrap();
    let (code, _, err) = lab.run(&["status"]);
    assert_eq!(code, 3);
    assert!(err.contains("the other end has another cluster key"), "{err}");
}

#[test]
fn a_damaged_store_is_named() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("manager")).unwrap();
    std::fs::write(lab.path("manager/map.json"), "{}\n{}").unwrap();
    let state = lab.path("manager");
    let (code, _, err) = lab.run(&["manager", "run", "--state-dir", state.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("manager/map.json: damaged: its header"), "{err}");
}

#[test]
fn strangers_learn_nothing_and_do_no_harm() {
    let mut lab = Lab::new();
    lab.start();
    let key = key::load(&lab.path("key")).unwrap();
    runtime().block_on(async {
        let error = common::connect(&lab.manager, &ClusterKey::new([1; 32]), Role::Operator, "x", None).await;
        assert!(matches!(error, Err(TransportError::Handshake(HandshakeError::WrongKey))));
        let error = common::connect(&lab.manager, &key, Role::Manager, "x", None).await;
        assert!(matches!(error, Err(TransportError::Handshake(HandshakeError::Refused(_)))));
        // A node that speaks as an operator does is hung up on.
        let mut stream = common::connect(&lab.manager, &key, Role::Node, "n1", None).await.unwrap();
        transport::send(&mut stream, &OperatorRequest::Status).await.unwrap();
        assert!(transport::receive::<_, OperatorReply>(&mut stream).await.is_err());
        // An operator whose file is not one is told what is wrong with it.
        let mut stream = common::connect(&lab.manager, &key, Role::Operator, "x", None).await.unwrap();
        let request = OperatorRequest::CreateCluster { file: "[cluster]\nname = 3".into(), force: false };
        transport::send(&mut stream, &request).await.unwrap();
        let reply: OperatorReply = transport::receive(&mut stream).await.unwrap();
        let OperatorReply::Refused { reason } = reply else { panic!("{reply:?}") };
        assert!(reason.starts_with("cluster file: line 2: name: "), "{reason}");
    });
    assert_eq!(lab.run(&["status"]).0, 2);
}

#[test]
fn a_cluster_outlives_its_manager() {
    let mut lab = Lab::new();
    lab.start();
    let runtime = runtime();
    let config = lab.path("cluster.toml");
    let nodes = runtime.block_on(async {
        let nodes: Vec<_> = (1..=2)
            .map(|index| {
                let (config, name) = (config.clone(), format!("n{index}"));
                let state = lab.path(&name);
                tokio::spawn(async move { common::fake_node(&config, &name, &state).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        nodes
    });
    // The nodes live on a runtime that must turn while commands run.
    let turning = std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::time::sleep(Duration::from_secs(8)).await;
            drop(nodes);
        });
    });
    let (code, out, err) = lab.run(&["cluster", "create", "--json"]);
    assert_eq!(code, 0, "{err}");
    let created: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(created["devices"][0]["name"], "n1-d1");
    let (code, _, err) = lab.run(&["cluster", "create", "--force"]);
    assert_eq!(code, 1);
    assert!(err.contains("there is a cluster already, lab"), "{err}");

    let mut child = lab.child.take().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    lab.start();
    let mut code = -1;
    for _ in 0..50 {
        code = lab.run(&["status"]).0;
        if code == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(code, 0, "{}", lab.run(&["status"]).1);
    turning.join().unwrap();
}
