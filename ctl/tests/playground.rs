//! The whole tool against fake nodes: a playground, and every command on it.

mod common;

use common::mirrorctl;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[test]
#[ignore = "not a test: what `ublk-server` is in these tests"]
fn fake_node_entry() {
    common::fake_node_main();
}

struct Playground {
    child: Child,
    json: Value,
}

impl Playground {
    fn start(program: &Path, dir: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(["playground", "--json", "--disk-size", "1G", "--dir"])
            .arg(dir)
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        // The document ends with a brace in the first column; then the process stays.
        while !text.ends_with("\n}\n") && stdout.read_line(&mut text).unwrap() > 0 {}
        let json = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text:?}"));
        Self { child, json }
    }

    fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
    }

    fn stop(mut self) {
        self.terminate();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Playground {
    /// A test that failed leaves no processes.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.terminate();
            let _ = self.child.wait();
        }
    }
}

fn gone(pid: &Value) -> bool {
    // In a container nobody may collect orphans: they stay as zombies.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// Asks for the status until the verdict is that.
fn wait_for(program: &Path, dir: &str, verdict: &str) -> Value {
    for _ in 0..100 {
        let (_, out, _) = mirrorctl(program, &["status", "--json", "--dir", dir]);
        if let Ok(status) = serde_json::from_str::<Value>(&out)
            && status["verdict"] == verdict
        {
            return status;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let (_, out, err) = mirrorctl(program, &["status", "--dir", dir]);
    panic!("never {verdict}: {out}{err}");
}

#[test]
fn a_playground_lives_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let program = common::programs(parent.path());
    let dir = parent.path().join("p");
    let text = dir.to_str().unwrap().to_owned();
    let run = |arguments: &[&str]| mirrorctl(&program, &[arguments, &["--dir", &text]].concat());
    let playground = Playground::start(&program, &dir, &["--nodes", "2", "--spares", "1"]);
    let json = &playground.json;
    assert_eq!(json["nodes"].as_array().unwrap().len(), 3);
    let names: Vec<&str> =
        json["devices"].as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["n1-d1", "n1-d1-unmirrored", "n2-d1", "n2-d1-unmirrored"]);
    assert!(json["devices"][0]["uri"].as_str().unwrap().starts_with("nbd+unix:///n1-d1?"));

    let status = wait_for(&program, &text, "healthy");
    assert_eq!(status["devices"][0]["copies_in_sync"], 2);
    let (code, out, _) = run(&["status"]);
    assert_eq!((code, out.lines().next()), (0, Some("healthy")));
    let (code, out, _) = run(&["map", "show"]);
    assert!(code == 0 && out.contains("n2/d1 in_sync"), "{out}");
    let (code, out, _) = run(&["map", "show", "--json"]);
    let map: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &map["devices"][0]["spans"][0]["replicas"][0]["node"]), (0, &Value::from("n1")));
    let (code, out, _) = run(&["device", "list"]);
    assert!(code == 0 && out.contains("2 of 2"), "{out}");

    // A node dies and is failed over by hand.
    let (code, out, _) = run(&["playground", "kill", "n1"]);
    assert_eq!((code, out.as_str()), (0, "n1 killed\n"));
    let (code, _, err) = run(&["playground", "kill", "n1"]);
    assert_eq!((code, err.as_str()), (1, "mirrorctl: n1 does not run\n"));
    let status = wait_for(&program, &text, "unavailable");
    let todo = status["findings"][0]["todo"].as_str().unwrap();
    assert!(todo.starts_with("mirrorctl node failover n1"), "{status}");
    assert_eq!(run(&["status"]).0, 2);
    let (code, out, err) = run(&["node", "failover", "n1", "--json"]);
    assert_eq!(code, 0, "{err}");
    let moved: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(moved["moved"][1], "n1-d1: exporter n1 -> n2");
    assert_eq!(moved["adopted"], true);
    let (code, _, err) = run(&["node", "failover", "n1"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("nothing of node n1 can move: n1-d1-unmirrored: n1/d1 holds the only copy"),
        "{err}"
    );

    // It comes back with a copy that is stale, and with the only one of its unmirrored device.
    let (code, out, err) = run(&["playground", "start", "n1"]);
    assert!(code == 0 && out.starts_with("n1 started, process "), "{out}{err}");
    let status = wait_for(&program, &text, "degraded");
    assert!(
        status["summary"].as_str().unwrap().contains("1 of 2 copies in sync: n1/d1 is stale"),
        "{status}"
    );
    assert_eq!(status["devices"][0]["exporter"], "n2");

    // The manager dies: nodes go on, commands say so; it comes back and knows everything.
    assert_eq!(run(&["playground", "kill", "manager"]).0, 0);
    let (code, _, err) = run(&["status"]);
    assert_eq!(code, 3);
    assert!(err.contains("start it there with `mirrorctl manager run`"), "{err}");
    let (code, _, err) = run(&["playground", "start", "manager"]);
    assert_eq!(code, 0, "{err}");
    let again = wait_for(&program, &text, "degraded");
    assert_eq!(again["version"], status["version"]);

    let (code, _, err) = run(&["playground"]);
    assert_eq!(code, 1);
    assert!(err.contains("a playground runs in"), "{err}");
    let pids: Vec<Value> = wait_pids(json);
    playground.stop();
    assert!(pids.iter().all(gone));
    assert!(!dir.exists());
}

fn wait_pids(json: &Value) -> Vec<Value> {
    let nodes = json["nodes"].as_array().unwrap().iter().map(|node| node["pid"].clone());
    std::iter::once(json["manager"]["pid"].clone()).chain(nodes).collect()
}

#[test]
fn what_a_killed_playground_left_is_ended_by_the_next() {
    let parent = tempfile::tempdir().unwrap();
    let program = common::programs(parent.path());
    let dir = parent.path().join("p");
    let mut first = Playground::start(&program, &dir, &["--nodes", "2"]);
    let pids = wait_pids(&first.json);
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(pids.iter().any(|pid| !gone(pid)), "its children do not notice");
    let second = Playground::start(&program, &dir, &["--nodes", "2", "--keep"]);
    assert!(pids.iter().all(gone));
    second.stop();
    assert!(dir.join("n1/d1.img").exists(), "--keep");
    assert!(!dir.join("control.sock").exists());
}

#[test]
fn a_daemon_that_cannot_start_is_told_with_its_last_words() {
    let parent = tempfile::tempdir().unwrap();
    let program = common::programs(parent.path());
    std::fs::write(parent.path().join("ublk-server"), "#!/bin/sh\necho no such kernel >&2\nexit 1\n")
        .unwrap();
    let dir = parent.path().join("p");
    let (code, out, err) = mirrorctl(&program, &["playground", "--dir", dir.to_str().unwrap()]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("ended (exit status: 1): no such kernel; its log is "), "{err}");
    assert!(!dir.exists());
}
