//! Managers on several hosts with an etcd of three members, as processes.

mod common;

use common::lab::{Lab, MIRRORCTL};
use ctl::key;
use mirror_net::control::{Event, OperatorReply};
use mirror_tests::etcd::wait_for;
use std::process::{Command, Stdio};
use std::time::Instant;

#[test]
fn a_killed_leader_is_replaced_and_the_map_goes_on() {
    let mut lab = Lab::new(2);
    lab.start(0);
    lab.start(1);
    let first = lab.leader();
    let second = 1 - first;
    let known = wait_for("a follower", || match lab.ask(second) {
        Some(OperatorReply::NotLeader { leader, .. }) => leader,
        _ => None,
    });
    assert_eq!(known, lab.managers[first]);
    lab.create();
    let before = lab.map();

    lab.kill(first);
    let killed = Instant::now();
    wait_for("another leader", || lab.leads(second).then_some(()));
    println!("replaced after {:?}", killed.elapsed());
    assert_eq!(lab.map(), before, "nothing is lost, nothing is done twice");
    // The nodes have followed, and it decides.
    lab.healthy();
    println!("the nodes have followed after {:?}", killed.elapsed());
    let (code, out, err) = lab.run(&["node", "failover", "n1"]);
    assert_eq!(code, 0, "{out}{err}");
    let after = lab.map();
    assert!(after["version"].as_u64() > before["version"].as_u64());

    // The old one comes back, and follows; then it leads again, and knows all that was done meanwhile.
    lab.start(first);
    wait_for("a follower", || {
        matches!(lab.ask(first), Some(OperatorReply::NotLeader { leader: Some(_), .. })).then_some(())
    });
    assert_eq!(lab.leader(), second);
    lab.kill(second);
    assert_eq!(lab.leader(), first);
    assert_eq!(lab.map()["version"], after["version"]);
}

/// What `mirrorctl events --json` printed.
fn parsed(text: &str) -> Vec<Event> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn events_go_on_after_a_change_of_leader() {
    let mut lab = Lab::new(2);
    lab.start(0);
    lab.start(1);
    lab.create();
    let events = |lab: &Lab| {
        let (code, out, err) = lab.run(&["events", "--json"]);
        assert_eq!(code, 0, "{err}");
        parsed(&out)
    };
    let out = lab.path("followed");
    let mut following = Command::new(MIRRORCTL)
        .args(["events", "--follow", "--json", "--dir"])
        .arg(lab.dir.path())
        .stdout(std::fs::File::create(&out).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let followed = || {
        let text = std::fs::read_to_string(&out).unwrap();
        // The last line may be on its way.
        parsed(text.rsplit_once('\n').map_or("", |(whole, _)| whole))
    };
    let before = events(&lab);
    assert!(before.iter().any(|event| event.map.is_some()), "{before:?}");
    wait_for("the follower", || (followed().len() >= before.len()).then_some(()));

    let mut newest = before.clone();
    for node in ["n1", "n2"] {
        let first = lab.leader();
        lab.kill(first);
        lab.start(first);
        lab.healthy();
        let (code, _, err) = lab.run(&["node", "failover", node]);
        assert_eq!(code, 0, "{err}");
        // What the failover did is told when it is done.
        let after = events(&lab);
        assert_eq!(after[..newest.len()], newest, "the next one has all that the first one told");
        let told = |event: &Event| event.map.is_some() && event.text.contains(node);
        assert!(after[newest.len()..].iter().any(told), "{after:?}");
        newest = after;
    }
    assert!(newest.iter().map(|event| event.number).eq(1..=newest.len() as u64), "{newest:?}");
    wait_for("the follower", || (followed().len() >= newest.len()).then_some(()));
    assert_eq!(followed()[..newest.len()], newest, "nothing is missing, nothing is told twice");
    following.kill().unwrap();
    following.wait().unwrap();
}

#[test]
fn members_of_the_etcd_die_and_come_back() {
    let mut lab = Lab::new(2);
    lab.start(0);
    lab.start(1);
    lab.create();
    let before = lab.map();
    lab.etcd.kill(0);
    // Led by whomever: the lease may have been renewed at the dead one.
    wait_for("a failover with two members", || {
        let (code, out, err) = lab.run(&["node", "failover", "n1"]);
        println!("{code}: {out}{err}");
        (code == 0).then_some(())
    });
    let with_two = lab.map();
    assert!(with_two["version"].as_u64() > before["version"].as_u64());

    lab.etcd.kill(1);
    let (code, _, err) = wait_for("no leader", || {
        let result = lab.run(&["node", "failover", "n2"]);
        (result.0 == 3).then_some(result)
    });
    assert_eq!(code, 3);
    assert!(
        err.contains("no manager leads at this moment") && err.contains("etcd http://127.0.0.1:"),
        "{err}"
    );
    lab.etcd.start_member(1);
    lab.leader();
    assert_eq!(lab.map(), with_two, "what was refused was not done");
    lab.etcd.start_member(0);
    wait_for("the nodes", || {
        let (_, out, _) = lab.run(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&out).ok()?;
        status["nodes"].as_array()?.iter().all(|node| node["up"] == true).then_some(())
    });
}

#[test]
fn an_etcd_that_is_down_or_somebody_elses_is_named() {
    let mut lab = Lab::new(2);
    (0..3).for_each(|member| lab.etcd.kill(member));
    lab.start(0);
    let (code, _, err) = wait_for("an answer", || {
        let result = lab.run(&["status"]);
        result.2.contains("no manager leads").then_some(result)
    });
    assert_eq!(code, 3);
    assert!(err.contains("etcd http://127.0.0.1:"), "{err}");
    (0..3).for_each(|member| lab.etcd.start_member(member));
    assert_eq!(lab.leader(), 0);

    // Another cluster of the same name.
    let other = lab.dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    key::write_new(&other.join("key")).unwrap();
    let text = std::fs::read_to_string(lab.path("cluster.toml")).unwrap();
    let mine = format!("{}/key", lab.dir.path().display());
    let theirs = format!("{}/key", other.display());
    std::fs::write(other.join("cluster.toml"), text.replacen(&mine, &theirs, 1)).unwrap();
    let arguments = [
        "manager",
        "run",
        "--address",
        &lab.managers[1],
        "--dir",
        other.to_str().unwrap(),
        "--state-dir",
        other.to_str().unwrap(),
    ];
    let output = Command::new(MIRRORCTL).args(arguments).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("another cluster of the same name, with another key, keeps its map there"), "{err}");

    let (code, _, err) = lab.run(&["manager", "run", "--address", "127.0.0.1:1", "--state-dir", "/tmp/none"]);
    assert_eq!((code, err.contains("is none of `manager` in the cluster file")), (1, true), "{err}");
}
