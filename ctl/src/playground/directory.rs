//! The files of a playground.

use super::Wanted;
use super::children::ProcessMark;
use crate::failure::Failure;
use crate::key;
use mirror_net::config::{ClusterFile, NodeFile};
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Longest directory: a socket's whole path must fit into 107 bytes, and lies a few names deeper.
const DIR_BYTES_MAX: usize = 56;
/// Marks a directory as ours, and remembers what runs.
const STATE: &str = "playground.json";

/// What is in [`STATE`].
#[derive(Serialize, Deserialize, Default)]
pub(super) struct State {
    /// The playground and its children.
    pub(super) processes: Vec<ProcessMark>,
    /// What was made in the directory.
    entries: Vec<String>,
}

/// A playground's directory, filled.
pub(super) struct Directory {
    path: PathBuf,
    /// It was not there before.
    made: bool,
    keep: bool,
    entries: Vec<String>,
    pub(super) file: ClusterFile,
    pub(super) text: String,
}

/// What the paths are.
pub(super) fn config_path(dir: &Path) -> PathBuf {
    dir.join("cluster.toml")
}

pub(super) fn socket_path(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

/// Where a node or the manager has its files.
pub(super) fn place(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}

fn failed(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let text = format!("{what} {}", path.display());
    move |error| Failure::new(format!("{text}: {error}"))
}

/// Sees to it that the directory is there and holds nothing but perhaps an old playground, which is
/// returned. `true` if it was made.
fn claim(dir: &Path) -> Result<(bool, Option<State>), Failure> {
    if dir.as_os_str().len() > DIR_BYTES_MAX {
        return Err(Failure::new(format!(
            "{}: too long a path for the sockets in it; take one of at most {DIR_BYTES_MAX} bytes",
            dir.display()
        )));
    }
    match std::fs::create_dir(dir) {
        Ok(()) => return Ok((true, None)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("cannot create", dir)(error)),
    }
    let mut entries = std::fs::read_dir(dir).map_err(failed("cannot read", dir))?;
    if entries.next().is_none() {
        return Ok((false, None));
    }
    let Ok(text) = std::fs::read_to_string(dir.join(STATE)) else {
        return Err(Failure::new(format!(
            "{} is not empty and not an old playground; name another --dir",
            dir.display()
        )));
    };
    if UnixStream::connect(socket_path(dir)).is_ok() {
        return Err(Failure::new(format!(
            "a playground runs in {} already; end it with ctrl-C, or name another --dir",
            dir.display()
        )));
    }
    Ok((false, Some(serde_json::from_str(&text).unwrap_or_default())))
}

/// Ports that nothing listens on, all different. Somebody else may take one before our processes
/// do: they then say so, and the playground is started again.
fn free_ports(count: usize) -> Result<Vec<u16>, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("no free port on 127.0.0.1: {error}"));
    let mut listeners = Vec::new();
    for _ in 0..count {
        listeners.push(TcpListener::bind("127.0.0.1:0").map_err(failed)?);
    }
    let ports: Result<Vec<u16>, _> =
        listeners.iter().map(|listener| listener.local_addr().map(|address| address.port())).collect();
    ports.map_err(failed)
}

/// The first manager's name, and that of the others with a number behind it.
pub(super) const MANAGER: &str = "manager";

/// The managers' names, in the order of their addresses in the cluster file.
pub(super) fn manager_names(count: usize) -> Vec<String> {
    let name = |index| if index == 1 { MANAGER.to_owned() } else { format!("{MANAGER}-{index}") };
    (1..=count).map(name).collect()
}

/// `keys`: what the keys in an etcd begin with.
fn cluster_text(wanted: &Wanted, keys: &str, ports: &[u16]) -> String {
    let dir = wanted.dir.display();
    let (managers, ports) = ports.split_at(usize::from(wanted.managers));
    let managers: Vec<String> = managers.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let manager = match managers.as_slice() {
        [one] => format!("{one:?}"),
        several => format!("{several:?}"),
    };
    // Written by hand, not serialised: it is an example to learn from, too.
    let mut text = format!(
        "# Made by `mirrorctl playground`.\n[cluster]\nname = \"playground\"\nkey_file = \"{dir}/cluster.key\"\n\
         manager = {manager}\nfrontend = \"{}\"\n",
        wanted.frontend.as_str()
    );
    for (name, after) in [("fail_after", wanted.fail_after), ("spare_after", wanted.spare_after)] {
        if let Some(after) = after {
            let _ = writeln!(text, "{name} = \"{}\"", humantime::format_duration(after));
        }
    }
    if let Some(rate) = wanted.regen_rate {
        let _ = writeln!(text, "regen_rate = \"{rate}\"");
    }
    let layout = wanted.layout.map(|layout| ("layout", layout.0.map_or("any", |topology| topology.name())));
    let commit = wanted.commit.map(|commit| ("commit", commit.as_str()));
    let on_no_quorum = wanted.on_no_quorum.map(|choice| ("on_no_quorum", choice.as_str()));
    for (name, word) in [layout, commit, on_no_quorum].into_iter().flatten() {
        let _ = writeln!(text, "{name} = {word:?}");
    }
    if let Some(copies) = wanted.copies {
        let _ = writeln!(text, "copies = {copies}");
        if copies > 2 {
            let _ = writeln!(text, "segments = {{ primary = 30, secondary = 60, unmirrored = 10 }}");
        }
    }
    if !wanted.etcd.is_empty() {
        let _ =
            write!(text, "\n[store]\nkind = \"etcd\"\nendpoints = {:?}\nprefix = {keys:?}\n", wanted.etcd);
    }
    let count = wanted.nodes + wanted.spares;
    for index in 1..=count {
        let spare = if index > wanted.nodes { "spare = true\n" } else { "" };
        let nbd = match wanted.nbd_tcp {
            true => format!("nbd = \"127.0.0.1:{}\"\n", ports[usize::from(count + index - 1)]),
            false => String::new(),
        };
        let _ = write!(
            text,
            "\n[[node]]\nname = \"n{index}\"\naddress = \"127.0.0.1:{}\"\n{nbd}{spare}[[node.disk]]\n\
             path = \"{dir}/n{index}/d1.img\"\nsize = \"{}\"\n",
            ports[usize::from(index - 1)],
            wanted.disk_bytes
        );
    }
    text
}

fn make_disk(path: &Path, bytes: u64) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    let file: File =
        options.write(true).create_new(true).mode(0o600).open(path).map_err(failed("cannot create", path))?;
    let length = i64::try_from(bytes).map_err(|_| Failure::usage("--disk-size is too large"))?;
    match fallocate(&file, FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        // No such thing on this file system: then space is taken as it is written.
        Err(nix::errno::Errno::EOPNOTSUPP) => file.set_len(bytes).map_err(failed("cannot size", path)),
        Err(error) => Err(Failure::new(format!(
            "cannot give {} {} of disk space: {error}; take a smaller --disk-size",
            path.display(),
            mirror_net::config::format_bytes(bytes)
        ))),
    }
}

impl Directory {
    /// Fills a directory; what an earlier playground left in it is taken away first.
    pub(super) fn make(wanted: &Wanted) -> Result<(Self, Vec<ProcessMark>), Failure> {
        let dir = &wanted.dir;
        if !dir.display().to_string().chars().all(|c| !c.is_control() && !matches!(c, '"' | '\\')) {
            return Err(Failure::new(format!("{}: quotes in the path; name another --dir", dir.display())));
        }
        let (made, old) = claim(dir)?;
        let old = old.unwrap_or_default();
        let ports_per_node = if wanted.nbd_tcp { 2 } else { 1 };
        let ports = free_ports(
            usize::from(wanted.managers) + ports_per_node * usize::from(wanted.nodes + wanted.spares),
        )?;
        // Another playground, with another key, may have been there before.
        let number = u64::from_le_bytes(key::random_bytes()?[..8].try_into().unwrap_or_default());
        let keys = format!("/ublk-mirror/playground-{number:016x}/");
        let text = cluster_text(wanted, &keys, &ports);
        let file = ClusterFile::parse(&text, &config_path(dir).display().to_string())
            .map_err(|error| Failure::new(error.to_string()))?;
        let mut directory =
            Self { path: dir.clone(), made, keep: wanted.keep, entries: old.entries, file, text };
        let leftovers: Vec<ProcessMark> = old.processes;
        directory.empty();
        directory.fill(wanted).inspect_err(|_| directory.remove())?;
        Ok((directory, leftovers))
    }

    fn fill(&mut self, wanted: &Wanted) -> Result<(), Failure> {
        let names: Vec<String> = self.file.nodes.iter().map(|node| node.name.clone()).collect();
        self.entries = names;
        let managers = manager_names(self.file.managers.len());
        self.entries.extend(managers.iter().cloned());
        self.entries.extend(["cluster.toml", "cluster.key", "control.sock"].map(str::to_owned));
        self.remember(Vec::new())?;
        let make = |path: PathBuf| std::fs::create_dir_all(&path).map_err(failed("cannot create", &path));
        for manager in &managers {
            make(place(&self.path, manager).join("state"))?;
        }
        for node in &self.file.nodes {
            make(place(&self.path, &node.name).join("state"))?;
            make(place(&self.path, &node.name).join("run"))?;
            for disk in &node.disks {
                make_disk(&disk.path, wanted.disk_bytes)?;
            }
        }
        key::write_new(&self.file.key_file)?;
        let config = config_path(&self.path);
        std::fs::write(&config, &self.text).map_err(failed("cannot write", &config))
    }

    /// Writes down what runs, for the playground after one that was killed.
    pub(super) fn remember(&self, processes: Vec<ProcessMark>) -> Result<(), Failure> {
        let state = State { processes, entries: self.entries.clone() };
        let path = self.path.join(STATE);
        let text = serde_json::to_string_pretty(&state).unwrap_or_default();
        std::fs::write(&path, text + "\n").map_err(failed("cannot write", &path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn nodes(&self) -> &[NodeFile] {
        &self.file.nodes
    }

    /// Takes away what was made, unless it is to be kept.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(socket_path(&self.path));
        if self.keep {
            return;
        }
        self.empty();
        if self.made {
            // Not if somebody has put something of his own there.
            let _ = std::fs::remove_dir(&self.path);
        }
    }

    fn empty(&self) {
        for entry in &self.entries {
            // The names come from a file: only ever plain names in this directory.
            if entry.contains('/') || entry.starts_with('.') {
                continue;
            }
            let path = self.path.join(entry);
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
        let _ = std::fs::remove_file(self.path.join(STATE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::config::{Frontend, StoreFile};

    fn wanted(dir: PathBuf, keep: bool) -> Wanted {
        Wanted {
            dir,
            managers: 1,
            etcd: Vec::new(),
            nodes: 2,
            spares: 1,
            fail_after: None,
            spare_after: None,
            regen_rate: None,
            layout: None,
            copies: None,
            commit: None,
            on_no_quorum: None,
            disk_bytes: 1 << 20,
            frontend: Frontend::Nbd,
            nbd_tcp: false,
            keep,
        }
    }

    #[test]
    fn a_directory_is_filled_and_leaves_no_trace() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("p");
        let (directory, leftovers) = Directory::make(&wanted(dir.clone(), false)).unwrap();
        assert!(leftovers.is_empty());
        assert!(directory.nodes()[2].spare);
        assert_eq!(std::fs::metadata(dir.join("n3/d1.img")).unwrap().len(), 1 << 20);
        assert_eq!(std::fs::read_to_string(dir.join("cluster.toml")).unwrap(), directory.text);
        directory.remove();
        assert!(!dir.exists());
    }

    #[test]
    fn exports_over_tcp_have_ports_of_their_own() {
        let wanted = Wanted { nbd_tcp: true, ..wanted(PathBuf::from("/p"), false) };
        let text = cluster_text(&wanted, "", &[1, 2, 3, 4, 5, 6, 7]);
        let file = ClusterFile::parse(&text, "cluster.toml").unwrap();
        let nbd: Vec<_> = file.nodes.iter().map(|node| format!("{:?}", node.nbd)).collect();
        assert!(
            nbd.iter().zip(["127.0.0.1:5", "127.0.0.1:6", "127.0.0.1:7"]).all(|(a, b)| a.contains(b)),
            "{nbd:?}"
        );
    }

    #[test]
    fn several_managers_share_an_etcd() {
        let endpoints = vec!["http://127.0.0.1:91".to_owned(), "http://127.0.0.1:92".to_owned()];
        let wanted = Wanted { managers: 2, etcd: endpoints.clone(), ..wanted(PathBuf::from("/p"), false) };
        let text = cluster_text(&wanted, "/ublk-mirror/x/", &[1, 2, 3, 4, 5]);
        let file = ClusterFile::parse(&text, "cluster.toml").unwrap();
        assert_eq!(file.managers, ["127.0.0.1:1", "127.0.0.1:2"]);
        assert_eq!(file.nodes[2].address, "127.0.0.1:5");
        let StoreFile::Etcd(etcd) = file.store else { panic!("{:?}", file.store) };
        assert_eq!((etcd.endpoints, etcd.prefix.as_str()), (endpoints, "/ublk-mirror/x/"));
        assert_eq!(manager_names(3), ["manager", "manager-2", "manager-3"]);
    }

    #[test]
    fn somebody_elses_files_are_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("p");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("thesis.tex"), "").unwrap();
        let error = Directory::make(&wanted(dir.clone(), false)).err().unwrap();
        assert!(error.message.contains("is not empty and not an old playground"), "{error}");
        std::fs::remove_file(dir.join("thesis.tex")).unwrap();

        let (directory, _) = Directory::make(&wanted(dir.clone(), false)).unwrap();
        std::fs::write(dir.join("notes"), "").unwrap();
        directory.remove();
        assert_eq!(
            std::fs::read_dir(&dir).unwrap().count(),
            1,
            "the directory was there before, notes are not ours"
        );
    }

    #[test]
    fn an_old_playground_is_replaced_and_a_running_one_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("p");
        let (kept, _) = Directory::make(&wanted(dir.clone(), true)).unwrap();
        let mark = ProcessMark { name: "n1".into(), pid: 1, start_ticks: 1 };
        kept.remember(vec![mark.clone()]).unwrap();
        kept.remove();
        assert!(dir.join("n1/d1.img").exists());
        let (again, leftovers) = Directory::make(&wanted(dir.clone(), false)).unwrap();
        assert_eq!(leftovers, [mark]);
        let _listener = std::os::unix::net::UnixListener::bind(socket_path(&dir)).unwrap();
        let error = Directory::make(&wanted(dir.clone(), false)).err().unwrap();
        assert!(error.message.contains("runs in"), "{error}");
        again.remove();
    }

    #[test]
    fn a_path_too_long_for_sockets_is_said_before_anything_is_made() {
        let dir = PathBuf::from(format!("/tmp/{}", "x".repeat(60)));
        let error = Directory::make(&wanted(dir, false)).err().unwrap();
        assert!(error.message.contains("too long a path"), "{error}");
    }
}
