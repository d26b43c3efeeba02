//! An etcd of three members on loopback, for tests.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up; nothing is measured by it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something is there.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Addresses on loopback that nobody uses.
pub fn free_addresses(count: usize) -> Vec<String> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect()
}

pub struct Etcd {
    dir: tempfile::TempDir,
    clients: Vec<String>,
    peers: Vec<String>,
    members: Vec<Option<Child>>,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }
}

impl Etcd {
    /// Starts its members; it answers when most of them do.
    pub fn start(members: usize) -> Self {
        let mut addresses = free_addresses(members * 2);
        let peers = addresses.split_off(members);
        let dir = tempfile::tempdir().unwrap();
        let mut etcd = Self { dir, clients: addresses, peers, members: (0..members).map(|_| None).collect() };
        (0..members).for_each(|member| etcd.start_member(member));
        for endpoint in etcd.endpoints() {
            wait_for("an etcd member", || {
                super::runtime().block_on(async {
                    let answer = async {
                        let mut client = etcd_client::Client::connect([&endpoint], None).await.ok()?;
                        client.get("x", None).await.ok().map(drop)
                    };
                    tokio::time::timeout(Duration::from_secs(1), answer).await.ok().flatten()
                })
            });
        }
        etcd
    }

    pub fn start_member(&mut self, member: usize) {
        let data: PathBuf = self.dir.path().join(format!("e{member}"));
        let all: Vec<String> =
            self.peers.iter().enumerate().map(|(index, peer)| format!("e{index}=http://{peer}")).collect();
        let (client, peer) = (&self.clients[member], &self.peers[member]);
        let child = Command::new("etcd")
            .args(["--name", &format!("e{member}"), "--data-dir"])
            .arg(data)
            .args(["--listen-client-urls", &format!("http://{client}")])
            .args(["--advertise-client-urls", &format!("http://{client}")])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--initial-cluster-token", &self.peers[0]])
            .env_clear()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd: is Debian's etcd-server installed?");
        self.members[member] = Some(child);
    }

    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.members[member].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.clients.iter().map(|client| format!("http://{client}")).collect()
    }

    /// The `[store]` table of a cluster file.
    pub fn table(&self) -> String {
        format!("[store]\nkind = \"etcd\"\nendpoints = {:?}\n", self.endpoints())
    }

    /// A client of our own.
    pub async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect(self.endpoints(), None).await.unwrap()
    }
}
