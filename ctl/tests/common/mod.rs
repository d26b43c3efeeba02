//! A node daemon for tests: speaks to the manager as a real one does, and stores nothing.
#![allow(dead_code)] // Not every test uses all of it.

pub mod lab;

use ctl::key;
use mirror_net::config::ClusterFile;
use mirror_net::control::{
    DiskContent, DiskInventory, ExportReport, ManagerMessage, NodeMessage, NodeReport, REPORT_MS,
    Registration, SessionReport, SurveyAnswer, SurveyResult,
};
use mirror_net::ids::{AttachId, ClusterId, DiskId, MapVersion, NodeId, ProcessId};
use mirror_net::map::DistributionMap;
use mirror_net::wire::handshake::{ClusterKey, Identity, Purpose, Role};
use mirror_net::wire::transport;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// What a fake node keeps over restarts; its disks' attachments too, since nobody reboots.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    cluster: Option<ClusterId>,
    disks: BTreeMap<String, (DiskId, AttachId)>,
    adopted: MapVersion,
}

pub fn random() -> u64 {
    u64::from_le_bytes(key::random_bytes().unwrap()[..8].try_into().unwrap())
}

/// A connection to a manager, with the handshake done.
pub async fn connect(
    address: &str,
    key: &ClusterKey,
    role: Role,
    name: &str,
    cluster: Option<ClusterId>,
) -> Result<TcpStream, transport::TransportError> {
    let mut stream = TcpStream::connect(address).await?;
    let identity = Identity { role, name: name.into(), cluster, process: ProcessId(random()) };
    let nonce = key::random_bytes().unwrap();
    transport::connect(&mut stream, key, Purpose::Control, &identity, nonce).await?;
    Ok(stream)
}

struct FakeNode {
    file: ClusterFile,
    name: String,
    keep: PathBuf,
    kept: Kept,
    process: ProcessId,
    map: Option<DistributionMap>,
    exports: Vec<ExportReport>,
    /// What it said last of a manager that does not lead.
    told: String,
}

/// Runs a fake node until it is killed; connects again whenever the connection is lost.
pub async fn fake_node(config: &Path, name: &str, state_dir: &Path) {
    let text = std::fs::read_to_string(config).unwrap();
    let file = ClusterFile::parse(&text, "cluster.toml").unwrap();
    let key = key::load(&file.key_file).unwrap();
    let keep = state_dir.join("kept.json");
    let kept = std::fs::read_to_string(&keep).ok().and_then(|text| serde_json::from_str(&text).ok());
    let mut node = FakeNode {
        file,
        name: name.into(),
        keep,
        kept: kept.unwrap_or_default(),
        process: ProcessId(random()),
        map: None,
        exports: Vec::new(),
        told: String::new(),
    };
    let managers = node.file.managers.clone();
    for manager in managers.iter().cycle() {
        match connect(manager, &key, Role::Node, name, node.kept.cluster).await {
            Ok(stream) => {
                let (reader, writer) = stream.into_split();
                if let Err(error) = node.serve(reader, writer).await {
                    println!("{name}: {error}");
                }
            }
            Err(error) => println!("{name}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl FakeNode {
    fn registration(&self) -> Registration {
        let node = self.file.node(&self.name).unwrap();
        let disks = node.disks.iter().map(|disk| {
            let kept = self.kept.disks.get(&disk.name).zip(self.kept.cluster);
            let content = kept.map_or(DiskContent::Blank, |((disk, _), cluster)| DiskContent::Ours {
                cluster,
                disk: *disk,
            });
            DiskInventory {
                name: disk.name.clone(),
                path: disk.path.display().to_string(),
                bytes: disk.bytes.unwrap_or(1 << 30),
                block_bytes: 512,
                attach: kept.map_or(AttachId(7), |((_, attach), _)| *attach),
                content,
            }
        });
        Registration {
            lives: Vec::new(),
            node: self.name.clone(),
            process: self.process,
            adopted: self.kept.adopted,
            address: node.address.clone(),
            disks: disks.collect(),
        }
    }

    async fn serve(
        &mut self,
        mut reader: OwnedReadHalf,
        mut writer: OwnedWriteHalf,
    ) -> Result<(), transport::TransportError> {
        transport::send(&mut writer, &NodeMessage::Register(self.registration())).await?;
        self.exports.clear();
        let (sender, mut arriving) = mpsc::channel(16);
        let reading = tokio::spawn(async move {
            while let Ok(message) = transport::receive::<_, ManagerMessage>(&mut reader).await {
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        });
        let mut report = tokio::time::interval(Duration::from_millis(REPORT_MS));
        let result = loop {
            let message = tokio::select! {
                message = arriving.recv() => match message {
                    Some(message) => self.handle(message),
                    None => break Ok(()),
                },
                _ = report.tick() => vec![NodeMessage::Report(self.report())],
            };
            let mut sent = Ok(());
            for message in message {
                sent = transport::send(&mut writer, &message).await;
            }
            if let Err(error) = sent {
                break Err(error);
            }
        };
        reading.abort();
        result
    }

    fn report(&self) -> NodeReport {
        let me =
            self.map.as_ref().and_then(|map| map.node_named(&self.name)).map_or(NodeId(0), |node| node.id);
        let peers = self.map.iter().flat_map(|map| &map.nodes).map(|node| node.id).filter(|id| *id != me);
        NodeReport {
            adopted: self.kept.adopted,
            sessions: peers
                .map(|peer| SessionReport {
                    peer,
                    open: true,
                    last_error: None,
                    slow_ms: None,
                    held_ms: None,
                })
                .collect(),
            exports: self.exports.clone(),
            ..NodeReport::default()
        }
    }

    fn handle(&mut self, message: ManagerMessage) -> Vec<NodeMessage> {
        match message {
            ManagerMessage::Registered { exporter_session, .. } => {
                println!("{}: registered, {exporter_session}", self.name);
                Vec::new()
            }
            ManagerMessage::Format(order) => {
                let attach: Vec<AttachId> = order.disks.iter().map(|_| AttachId(random())).collect();
                if !order.check_only {
                    self.kept.cluster = Some(order.cluster);
                    let disks = order.disks.iter().zip(&attach);
                    self.kept.disks =
                        disks.map(|(disk, attach)| (disk.name.clone(), (disk.disk, *attach))).collect();
                    self.write_down();
                }
                vec![NodeMessage::Formatted { error: None, attach }]
            }
            ManagerMessage::Look { .. } => {
                vec![NodeMessage::Looked { found: Err("no such disk".to_owned()) }]
            }
            ManagerMessage::Waiting { why } => {
                println!("{}: {why}", self.name);
                Vec::new()
            }
            ManagerMessage::Map { map } => {
                let version = map.version;
                self.kept.adopted = version;
                self.write_down();
                let me = map.node_named(&self.name).map(|node| node.id);
                let still = |export: &ExportReport| {
                    map.device(export.device).is_some_and(|device| Some(device.claim.node) == me)
                };
                self.exports.retain(still);
                self.map = Some(*map);
                vec![NodeMessage::Adopted { version }]
            }
            ManagerMessage::Export { device, .. } => {
                let name = self.map.as_ref().and_then(|map| map.device(device)).unwrap().name.clone();
                let uri = Some(format!("nbd+unix:///{name}?socket=/run/{name}.sock"));
                let (path, error) = (None, None);
                self.exports.retain(|export| export.device != device);
                self.exports.push(ExportReport {
                    device,
                    path,
                    uri,
                    error,
                    in_use: None,
                    requests: 0,
                    pending: 0,
                });
                vec![NodeMessage::Report(self.report())]
            }
            ManagerMessage::Refused { reason } => {
                println!("{}: refused: {reason}", self.name);
                Vec::new()
            }
            ManagerMessage::TellMap => vec![NodeMessage::KeptMap { map: self.map.clone().map(Box::new) }],
            ManagerMessage::Survey { order, runs, .. } => {
                let answers = runs.into_iter().map(|run| SurveyAnswer { run, result: SurveyResult::Refused });
                vec![NodeMessage::Surveyed { order, answers: answers.collect() }]
            }
            ManagerMessage::NotLeader { leader, why } => {
                let line = format!("not the leader, which is {leader:?}: {why}");
                if self.told != line {
                    println!("{}: {line}", self.name);
                    self.told = line;
                }
                Vec::new()
            }
        }
    }

    fn write_down(&self) {
        std::fs::write(&self.keep, serde_json::to_string(&self.kept).unwrap()).unwrap();
    }
}

/// A directory with `mirrorctl` and a program called `ublk-server` beside it, which is a fake node:
/// this test program again, told by the environment to be one.
pub fn programs(dir: &Path) -> PathBuf {
    let mirrorctl = dir.join("mirrorctl");
    if std::fs::hard_link(env!("CARGO_BIN_EXE_mirrorctl"), &mirrorctl).is_err() {
        std::fs::copy(env!("CARGO_BIN_EXE_mirrorctl"), &mirrorctl).unwrap();
    }
    let own = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\nFAKE_NODE=\"$*\" exec {} --exact fake_node_entry --ignored --nocapture\n",
        own.display()
    );
    let server = dir.join("ublk-server");
    std::fs::write(&server, script).unwrap();
    std::fs::set_permissions(&server, std::fs::Permissions::from_mode(0o755)).unwrap();
    mirrorctl
}

/// What [`programs`] starts: `run --config FILE --node NAME --state-dir DIR --run-dir DIR`.
pub fn fake_node_main() {
    let Ok(arguments) = std::env::var("FAKE_NODE") else { return };
    let words: Vec<&str> = arguments.split(' ').collect();
    let value = |name: &str| words[words.iter().position(|word| *word == name).unwrap() + 1];
    let run = fake_node(Path::new(value("--config")), value("--node"), Path::new(value("--state-dir")));
    runtime().block_on(run);
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a command and gives its exit code, stdout and stderr.
pub fn mirrorctl(program: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output: Output = std::process::Command::new(program)
        .env_remove("UBLK_MIRROR_CONFIG")
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(stderr.lines().count() <= 1, "more than one line of error: {stderr}");
    (output.status.code().unwrap_or(-1), stdout, stderr)
}
