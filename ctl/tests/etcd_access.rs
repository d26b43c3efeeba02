//! An etcd that asks for certificates, or for a name and a password.

mod common;

use common::lab::{Lab, MIRRORCTL};
use common::runtime;
use mirror_tests::certificates::Authority;
use mirror_tests::etcd::{Etcd, wait_for};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const PREFIX: &str = "/ublk-mirror/lab/";
const PASSWORD: &str = "correct horse";

fn write_secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// One of three members that asks for a name and a password, and checks them quickly.
fn with_password(further: &[&str]) -> Etcd {
    let etcd = Etcd::start_like(1, &[&["--bcrypt-cost", "4"], further].concat(), false);
    runtime().block_on(etcd.ask_for_password("mirror", PASSWORD, PREFIX));
    write_secret(&etcd.dir().join("password"), &format!("{PASSWORD}\n"));
    etcd
}

fn password_file(etcd: &Etcd) -> PathBuf {
    etcd.dir().join("password")
}

fn login(user: &str, password: &Path) -> String {
    format!("user = {user:?}\npassword_file = {password:?}\n")
}

/// A cluster is created, changed, and led on by another manager.
fn works(lab: &mut Lab) {
    lab.start(0);
    lab.start(1);
    lab.create();
    let (code, out, err) = lab.run(&["node", "failover", "n1"]);
    assert_eq!(code, 0, "{out}{err}");
    let map = lab.map();
    let first = lab.leader();
    lab.kill(first);
    wait_for("another leader", || lab.leads(1 - first).then_some(()));
    assert_eq!(lab.map(), map);
}

/// What `manager run` says when it ends, which it has to by itself and with exit code 1.
fn refusal(lab: &Lab, store: &str) -> String {
    let text = std::fs::read_to_string(lab.path("cluster.toml")).unwrap();
    let (head, rest) = text.split_once("[store]").unwrap();
    let (_, nodes) = rest.split_once("[[node]]").unwrap();
    let config = lab.path("other.toml");
    std::fs::write(&config, format!("{head}{store}[[node]]{nodes}")).unwrap();
    let mut child = Command::new(MIRRORCTL)
        .args(["manager", "run", "--address", &lab.managers[0], "--config"])
        .arg(config)
        .arg("--state-dir")
        .arg(lab.path("other"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said: Vec<String> = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        said.push(line.unwrap());
        if said.len() > 20 {
            child.kill().unwrap();
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said:#?}");
    // It knew why at once: the alert was not lost with its connection.
    let lost = |line: &&String| line.contains("connection closed") || line.contains("broken pipe");
    assert_eq!(said.iter().find(lost), None, "{said:#?}");
    let errors: Vec<String> = said.into_iter().filter(|line| line.starts_with("mirrorctl: ")).collect();
    println!("{errors:#?}");
    assert_eq!(errors.len(), 1, "{errors:#?}");
    errors[0].clone()
}

#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "it does not say {part:?}: {error}");
    }
}

#[test]
fn certificates_are_shown_and_checked() {
    let etcd = Etcd::start_like(3, &[], true);
    let store = etcd.table();
    let mut lab = Lab::with(2, etcd, &store);
    works(&mut lab);

    // Wrong ones.
    (0..2).for_each(|manager| lab.kill(manager));
    let other = lab.path("authority");
    std::fs::create_dir(&other).unwrap();
    let stranger = Authority::new(&other).unwrap();
    let pair = stranger.issue("client").unwrap();
    let own = lab.etcd.client_pair().clone();
    let endpoints = format!("[store]\nkind = \"etcd\"\nendpoints = {:?}\n", lab.etcd.endpoints());
    let with = |ca: &Path, identity: Option<(&Path, &Path)>| {
        let identity = identity.map(|(cert, key)| format!("cert_file = {cert:?}\nkey_file = {key:?}\n"));
        format!("{endpoints}ca_file = {ca:?}\n{}", identity.unwrap_or_default())
    };
    let ca = lab.etcd.authority().to_owned();
    let ours = Some((own.certificate.as_path(), own.key.as_path()));
    let error = refusal(&lab, &with(&stranger.own.certificate, ours));
    says(&error, &["etcd https://127.0.0.1:", "invalid peer certificate", "`ca_file` in [store]"]);
    let error = refusal(&lab, &with(&ca, None));
    says(&error, &["etcd https://127.0.0.1:", "it asks for a certificate: write `cert_file` and `key_file`"]);
    let error = refusal(&lab, &with(&ca, Some((&pair.certificate, &pair.key))));
    says(&error, &["`cert_file` in [store]", "an authority that the etcd trusts"]);
    // Files that are none of it.
    let error = refusal(&lab, &with(&own.key, ours));
    says(&error, &["client.key: holds no certificate; `ca_file` in [store]"]);
    let error = refusal(&lab, &with(&lab.path("nothing"), ours));
    says(&error, &["cannot read", "nothing: No such file", "correct `ca_file` in [store]"]);
    std::fs::set_permissions(&own.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = refusal(&lab, &with(&ca, ours));
    says(&error, &["everybody on this machine can use the etcd with its key; type: chmod 600 "]);
}

#[test]
fn a_name_and_a_password_are_shown_and_checked() {
    let etcd = with_password(&[]);
    let password = password_file(&etcd);
    let store = etcd.table();
    let mut lab = Lab::with(2, etcd, &format!("{store}{}", login("mirror", &password)));
    works(&mut lab);

    // Wrong ones.
    (0..2).for_each(|manager| lab.kill(manager));
    let wrong = lab.path("wrong");
    write_secret(&wrong, "incorrect horse");
    let error = refusal(&lab, &format!("{store}{}", login("mirror", &wrong)));
    says(&error, &["etcd http://127.0.0.1:", "authentication failed", "correct `user` in [store]", "/wrong"]);
    let error = refusal(&lab, &store);
    says(&error, &["it asks for a name and a password: write `user` and `password_file`"]);
    let error = refusal(&lab, &format!("{store}prefix = \"/other/\"\n{}", login("mirror", &password)));
    says(&error, &["permission denied", "a role of mirror the right to read and write", "/other/"]);
    let nowhere = lab.path("nowhere");
    let error = refusal(&lab, &format!("{store}{}", login("mirror", &nowhere)));
    says(&error, &["nowhere: No such file", "correct `password_file` in [store]"]);
    write_secret(&wrong, "\n");
    let error = refusal(&lab, &format!("{store}{}", login("mirror", &wrong)));
    says(&error, &["wrong: is empty; write the etcd's password"]);
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o604)).unwrap();
    let error = refusal(&lab, &format!("{store}{}", login("mirror", &password)));
    says(&error, &["everybody on this machine can read the etcd's password; type: chmod 600 "]);

    // A name where nobody asks for one.
    let open = Etcd::start(1);
    let wrong = lab.path("unasked");
    write_secret(&wrong, PASSWORD);
    let error = refusal(&lab, &format!("{}{}", open.table(), login("mirror", &wrong)));
    says(&error, &["authentication is not enabled", "leave `user` and `password_file` out"]);
}

#[test]
fn a_manager_outlives_its_token() {
    let etcd = with_password(&["--auth-token-ttl", "1"]);
    let store = format!("{}{}", etcd.table(), login("mirror", &password_file(&etcd)));
    let mut lab = Lab::with(1, etcd, &store);
    lab.start(0);
    lab.create();
    for node in ["n1", "n2"] {
        // A token that nobody uses for so long is forgotten.
        std::thread::sleep(Duration::from_millis(2500));
        wait_for("a failover", || (lab.run(&["node", "failover", node]).0 == 0).then_some(()));
        lab.healthy();
    }
    // A member that was restarted knows none.
    lab.etcd.kill(0);
    lab.etcd.start_member(0);
    wait_for("a failover", || (lab.run(&["node", "failover", "n1"]).0 == 0).then_some(()));
}

#[test]
fn a_manager_that_led_waits_for_its_password_to_be_right_again() {
    let etcd = with_password(&["--auth-token-ttl", "1"]);
    let store = format!("{}{}", etcd.table(), login("mirror", &password_file(&etcd)));
    let mut lab = Lab::with(1, etcd, &store);
    lab.start(0);
    lab.create();
    runtime().block_on(async {
        let options = etcd_client::ConnectOptions::new().with_user("root", "root");
        let mut root = etcd_client::Client::connect(lab.etcd.endpoints(), Some(options)).await.unwrap();
        root.user_change_password("mirror", "changed").await.unwrap();
    });
    // It may renew its lease, and can write nothing: somebody else may be able to.
    let error = wait_for("the leader to give up", || {
        let (code, _, err) = lab.run(&["node", "failover", "n1"]);
        (code == 3 && err.contains("authentication failed")).then_some(err)
    });
    says(&error, &["no manager leads", "correct `user` in [store]", "the password in"]);
    // Nor does it end while the file is being replaced.
    std::fs::remove_file(password_file(&lab.etcd)).unwrap();
    wait_for("a manager that misses its file", || {
        let (code, _, err) = lab.run(&["status"]);
        (code == 3 && err.contains("cannot read")).then_some(())
    });
    write_secret(&password_file(&lab.etcd), "changed");
    wait_for("a leader", || lab.leads(0).then_some(()));
    lab.healthy();
}
