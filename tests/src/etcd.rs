//! An etcd on loopback, for tests.

use crate::certificates::{Authority, Pair};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission, TlsOptions};
use std::net::TcpListener;
use std::path::Path;
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

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What its members ask their clients for a certificate with.
struct Tls {
    authority: Authority,
    member: Pair,
    client: Pair,
}

/// An etcd; it ends with this value.
pub struct Etcd {
    dir: tempfile::TempDir,
    clients: Vec<String>,
    peers: Vec<String>,
    members: Vec<Option<Child>>,
    further: Vec<String>,
    tls: Option<Tls>,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }
}

impl Etcd {
    /// Starts its members, and waits until each answers.
    pub fn start(members: usize) -> Self {
        Self::start_like(members, &[], false)
    }

    /// The same with further arguments of `etcd`, and, if `tls`, with members that talk to nobody without a
    /// certificate.
    pub fn start_like(members: usize, further: &[&str], tls: bool) -> Self {
        let mut addresses = free_addresses(members * 2);
        let peers = addresses.split_off(members);
        let dir = tempfile::tempdir().unwrap();
        let tls = tls.then(|| {
            let authority = Authority::new(dir.path()).unwrap();
            let [member, client] = ["member", "client"].map(|name| authority.issue(name).unwrap());
            Tls { authority, member, client }
        });
        let further = further.iter().map(|&argument| argument.to_owned()).collect();
        let none = (0..members).map(|_| None).collect();
        let mut etcd = Self { dir, clients: addresses, peers, members: none, further, tls };
        (0..members).for_each(|member| etcd.start_member(member));
        let runtime = runtime();
        for endpoint in etcd.endpoints() {
            let options = etcd.options();
            wait_for("an etcd member", || {
                runtime.block_on(async {
                    let answer = async {
                        let mut client = Client::connect([&endpoint], Some(options.clone())).await.ok()?;
                        client.get("x", None).await.ok().map(drop)
                    };
                    tokio::time::timeout(Duration::from_secs(1), answer).await.ok().flatten()
                })
            });
        }
        etcd
    }

    /// How many members it has, running or not.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Starts a member, with what it had stored if it ran before.
    pub fn start_member(&mut self, member: usize) {
        let data = self.dir.path().join(format!("e{member}"));
        let all: Vec<String> =
            self.peers.iter().enumerate().map(|(index, peer)| format!("e{index}=http://{peer}")).collect();
        let (client, peer) = (&self.endpoints()[member], &self.peers[member]);
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("e{member}"), "--data-dir"])
            .arg(data)
            .args(["--listen-client-urls", client])
            .args(["--advertise-client-urls", client])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--initial-cluster-token", &self.peers[0]])
            .args(&self.further);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.member.certificate).arg("--key-file").arg(&tls.member.key);
            command.args(["--client-cert-auth", "--trusted-ca-file"]).arg(&tls.authority.own.certificate);
        }
        let child = command.env_clear().stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.members[member] = Some(child.expect("etcd: is Debian's etcd-server installed?"));
    }

    /// SIGKILLs a member, if it runs.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.members[member].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// The client URLs of its members.
    pub fn endpoints(&self) -> Vec<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        self.clients.iter().map(|client| format!("{scheme}://{client}")).collect()
    }

    /// The directory of its files; a test may put its own there.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The certificate of the authority that its members and clients trust; it has to have one.
    pub fn authority(&self) -> &Path {
        &self.tls.as_ref().unwrap().authority.own.certificate
    }

    /// A certificate that its members accept; it has to have one.
    pub fn client_pair(&self) -> &Pair {
        &self.tls.as_ref().unwrap().client
    }

    /// The `[store]` table of a cluster file.
    pub fn table(&self) -> String {
        let mut table = format!("[store]\nkind = \"etcd\"\nendpoints = {:?}\n", self.endpoints());
        if let Some(tls) = &self.tls {
            let (ca, Pair { certificate, key }) = (&tls.authority.own.certificate, &tls.client);
            table += &format!("ca_file = {ca:?}\ncert_file = {certificate:?}\nkey_file = {key:?}\n");
        }
        table
    }

    fn options(&self) -> ConnectOptions {
        let Some(tls) = &self.tls else { return ConnectOptions::new() };
        let read = |path: &Path| std::fs::read(path).unwrap();
        let identity = Identity::from_pem(read(&tls.client.certificate), read(&tls.client.key));
        let authority = Certificate::from_pem(read(&tls.authority.own.certificate));
        ConnectOptions::new().with_tls(TlsOptions::new().ca_certificate(authority).identity(identity))
    }

    /// A client of our own.
    pub async fn client(&self) -> Client {
        Client::connect(self.endpoints(), Some(self.options())).await.unwrap()
    }

    /// The value of the key that begins and ends so, if there is one and most members answer.
    pub fn value(&self, prefix: &str, ending: &str) -> Option<Vec<u8>> {
        runtime().block_on(async {
            let answer = async {
                let options = etcd_client::GetOptions::new().with_prefix();
                let found = self.client().await.get(prefix, Some(options)).await.ok()?;
                let mut found = found.kvs().iter();
                let kv = found.find(|kv| kv.key().ends_with(ending.as_bytes()))?;
                Some(kv.value().to_vec())
            };
            tokio::time::timeout(Duration::from_secs(1), answer).await.ok().flatten()
        })
    }

    /// From now on it asks for a name and a password: `root` has `root`, and `user` may read and write what begins
    /// with `prefix`.
    pub async fn ask_for_password(&self, user: &str, password: &str, prefix: &str) {
        let mut client = self.client().await;
        client.role_add("keeper").await.unwrap();
        let all_below = Permission::read_write(prefix).with_prefix();
        client.role_grant_permission("keeper", all_below).await.unwrap();
        for (name, password, role) in [("root", "root", "root"), (user, password, "keeper")] {
            client.user_add(name, password, None).await.unwrap();
            client.user_grant_role(name, role).await.unwrap();
        }
        client.auth_enable().await.unwrap();
    }
}
