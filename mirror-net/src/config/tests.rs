use super::*;
use crate::map::{Commit, OnNoQuorum};
use std::time::Duration;

const GOOD: &str = r#"
[cluster]
name = "lab"
key_file = "/etc/ublk-mirror/cluster.key"
manager = "10.0.0.9:7300"

[[node]]
name = "n1"
address = "10.0.0.1:7301"
power = "feed-a"
[[node.disk]]
path = "/dev/disk/by-id/one"
[[node.disk]]
name = "fast"
path = "/var/lib/d2.img"
size = "1G"
segments = { primary = 50, secondary = 50, unmirrored = 0 }

[[node]]
name = "n2"
address = "host-2.lab:7301"
spare = true
frontend = "nbd"
nbd = "127.0.0.1:10809"
[[node.disk]]
path = "/dev/sdb"
"#;

/// The good file with one text replaced: the error, without the path.
fn refused(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from:?} is not in the file");
    let error = ClusterFile::parse(&GOOD.replacen(from, to, 1), "c.toml").unwrap_err();
    error.to_string().strip_prefix("c.toml: ").expect("the path comes first").to_owned()
}

#[test]
fn defaults_are_filled_in() {
    let file = ClusterFile::parse(GOOD, "c.toml").unwrap();
    assert_eq!((file.name.as_str(), file.slice_bytes), ("lab", 64 << 20));
    let [n1, n2] = &file.nodes[..] else { panic!("{file:?}") };
    assert_eq!((n1.disks[0].name.as_str(), n1.disks[0].segments), ("d1", Segments::default()));
    assert_eq!((n1.disks[1].name.as_str(), n1.disks[1].bytes), ("fast", Some(1 << 30)));
    assert_eq!(n1.disks[1].segments, Segments { primary: 50, secondary: 50, unmirrored: 0 });
    assert_eq!((n1.power.as_deref(), n1.switch.as_deref(), n1.spare), (Some("feed-a"), None, false));
    assert_eq!((n1.frontend, n1.nbd), (Frontend::Auto, NbdListen::Unix));
    assert!(n2.spare);
    assert_eq!(n2.frontend, Frontend::Nbd);
    assert_eq!(n2.nbd, NbdListen::Tcp("127.0.0.1:10809".parse().unwrap()));
    assert_eq!(file.node("n2"), Some(n2));
}

#[test]
fn values_of_the_cluster_are_inherited_by_its_nodes() {
    let text = GOOD.replacen(
        "[[node]]",
        "frontend = \"ublk\"\nsegments = { primary = 40, secondary = 40, unmirrored = 20 }\n\
         commit = \"deferred\"\non_no_quorum = \"error\"\nno_quorum_after = \"30s\"\n[[node]]\ncommit = \"immediate\"",
        1,
    );
    let file = ClusterFile::parse(&text, "c.toml").unwrap();
    assert_eq!(file.nodes[0].frontend, Frontend::Ublk);
    assert_eq!(file.nodes[1].frontend, Frontend::Nbd);
    assert_eq!(file.nodes[0].disks[0].segments.unmirrored, 20);
    assert_eq!(file.nodes[0].disks[1].segments.unmirrored, 0);
    let (commit, on_no_quorum) = (Commit::Deferred, OnNoQuorum::Error);
    assert_eq!(file.nodes[0].devices, DevicePolicy { commit: Commit::Immediate, on_no_quorum });
    assert_eq!(file.nodes[1].devices, DevicePolicy { commit, on_no_quorum });
    assert_eq!(file.policy.node.no_quorum_after, Duration::from_secs(30));
}

#[test]
fn syntax_errors_have_a_line_and_a_field() {
    let error = refused("manager = \"10", "manager = 10");
    assert!(error.starts_with("line 5: manager: "), "{error}");
    let error = refused("name = \"n2\"", "name = 3");
    assert_eq!(error, "line 20: name: invalid type: integer `3`, expected a string");
    let error = refused("size = \"1G\"", "sise = \"1G\"");
    assert!(error.starts_with("line 16: sise: unknown field `sise`, expected"), "{error}");
    let error = refused("address = \"10.0.0.1:7301\"\n", "");
    assert!(error.contains("missing field `address`"), "{error}");
}

#[test]
fn every_mistake_names_line_field_and_remedy() {
    for (from, to, expected) in [
        (
            "name = \"lab\"",
            "name = \"Lab\"",
            "line 3: cluster.name: \"Lab\" is not a name: 1 to 32 of a-z, 0-9 and -, not beginning with -",
        ),
        (
            "manager = ",
            "slice_size = \"60MiB\"\nmanager = ",
            "line 5: cluster.slice_size: \"60MiB\" is not a power of two between 256 KiB and 1 GiB",
        ),
        (
            "manager = ",
            "commit = \"later\"\nmanager = ",
            "line 5: cluster.commit: \"later\" is neither \"immediate\" nor \"deferred\"",
        ),
        (
            "manager = ",
            "on_no_quorum = \"fail\"\nmanager = ",
            "line 5: cluster.on_no_quorum: \"fail\" is neither \"wait\" nor \"error\"",
        ),
        (
            "manager = ",
            "no_quorum_after = \"2s\"\nmanager = ",
            "line 5: cluster.no_quorum_after: \"2s\" is not longer than fail_after, 2s: requests would fail that a \
             failover serves",
        ),
        (
            "manager = ",
            "regen_rate = \"10K\"\nmanager = ",
            "line 5: cluster.regen_rate: \"10K\" a second is less than 1 MiB: to stop copies, pause their plan",
        ),
        (
            "manager = ",
            "regen_rate = \"20M\"\nregen_floor = \"30M\"\nmanager = ",
            "line 6: cluster.regen_floor: \"30M\" is more than regen_rate, 20 MiB",
        ),
        (
            "manager = ",
            "slow_after = \"1ms\"\nmanager = ",
            "line 5: cluster.slow_after: \"1ms\" is shorter than 500ms",
        ),
        (
            "manager = ",
            "slow_stale_after = \"5s\"\nslow_after = \"6s\"\nmanager = ",
            "line 6: cluster.slow_after: \"6s\" is longer than slow_stale_after, 5s",
        ),
        (
            "manager = ",
            "slow_stale_after = \"1s\"\nmanager = ",
            "line 5: cluster.slow_stale_after: \"1s\" is shorter than 2s",
        ),
        ("manager = ", "copies = 4\nmanager = ", "line 5: cluster.copies: 4 is not 1, 2 or 3"),
        (
            "manager = ",
            "layout = \"pair\"\ncopies = 3\nmanager = ",
            "line 6: cluster.copies: a pair has two nodes and can have two copies: choose layout = \"chain\" or \"sets\"",
        ),
        (
            "manager = ",
            "layout = \"ring\"\nmanager = ",
            "line 5: cluster.layout: \"ring\" is none of \"pair\", \"chain\", \"sets\", \"any\"",
        ),
        (
            "\"10.0.0.9:7300\"",
            "\"10.0.0.9\"",
            "line 5: cluster.manager: \"10.0.0.9\" has no port; write host:port, such as \"10.0.0.1:7301\" or \
             \"[fd00::1]:7301\"",
        ),
        (
            "\"/etc/ublk-mirror/cluster.key\"",
            "\"cluster.key\"",
            "line 4: cluster.key_file: \"cluster.key\" is not an absolute path",
        ),
        (
            "name = \"n2\"",
            "name = \"n1\"",
            "line 20: node.name: \"n1\" is already the name of the node in line 8",
        ),
        (
            "host-2.lab:7301",
            "10.0.0.9:7300",
            "line 21: node.address: node n2: 10.0.0.9:7300 is already the address of the manager (line 5)",
        ),
        (
            "size = \"1G\"",
            "size = \"1 gig\"",
            "line 16: node.disk.size: node n1: \"1 gig\" is not a size such as \"64MiB\" or \"1G\"",
        ),
        (
            "unmirrored = 0 ",
            "unmirrored = 1 ",
            "line 17: node.disk.segments: node n1: the three percentages add up to 101, they must add up to 100",
        ),
        (
            "/var/lib/d2.img",
            "/dev/disk/by-id/one",
            "line 15: node.disk.path: node n1: /dev/disk/by-id/one is already the path of disk d1",
        ),
        (
            "name = \"fast\"",
            "name = \"d1\"",
            "line 14: node.disk.name: node n1: two disks are called \"d1\"; give each a name",
        ),
        (
            "frontend = \"nbd\"",
            "frontend = \"iscsi\"",
            "line 23: node.frontend: node n2: \"iscsi\" is none of \"auto\", \"ublk\", \"nbd\"",
        ),
        (
            "127.0.0.1:10809",
            "0.0.0.0:10809",
            "line 24: node.nbd: node n2: NBD has no authentication: anybody who reaches 0.0.0.0:10809 could read and \
             write the devices; if that network is closed, add nbd_allow_remote = true to [cluster]",
        ),
        ("[[node.disk]]\npath = \"/dev/sdb\"", "", "line 20: node.disk: node n2: there is no [[node.disk]]"),
        (
            "path = \"/dev/sdb\"",
            "path = \"/dev/sdb\"\nsize = \"1G\"",
            "line 27: node.disk.size: node n2: /dev/sdb is a device and has a size of its own; `size` is for files",
        ),
    ] {
        assert_eq!(refused(from, to), expected);
    }
}

#[test]
fn remote_nbd_is_a_decision() {
    let text = GOOD.replacen("127.0.0.1:10809", "10.0.0.2:10809", 1).replacen(
        "manager =",
        "nbd_allow_remote = true\nmanager =",
        1,
    );
    assert!(ClusterFile::parse(&text, "c.toml").is_ok());
}

#[test]
fn the_pace_of_copies_has_two_bounds() {
    let pace = |fields: &str| {
        let text = GOOD.replacen("manager =", &format!("{fields}\nmanager ="), 1);
        ClusterFile::parse(&text, "c.toml").unwrap().policy.node.pace
    };
    assert_eq!(pace(""), Pace { rate: None, floor: 10 << 20 });
    assert_eq!(pace("regen_rate = \"unlimited\"\nregen_floor = \"1G\""), Pace { rate: None, floor: 1 << 30 });
    assert_eq!(pace("regen_rate = \"200M\""), Pace { rate: Some(200 << 20), floor: 10 << 20 });
    assert_eq!(pace("regen_rate = \"4M\""), Pace { rate: Some(4 << 20), floor: 4 << 20 });
    assert_eq!(pace("regen_floor = \"none\""), Pace { rate: None, floor: 0 });
}

#[test]
fn addresses_are_checked() {
    for wrong in
        ["10.0.0.1:0", "10.0.0.1:99999", "10.0.0.300:1", "0.0.0.0:7301", ":7301", "a b:1", "fd00::1:7301"]
    {
        let error = refused("10.0.0.1:7301", wrong);
        assert!(error.starts_with("line 9: node.address: node n1: "), "{wrong}: {error}");
    }
    let text = GOOD.replacen("10.0.0.1:7301", "[fd00::1]:7301", 1);
    assert_eq!(ClusterFile::parse(&text, "c.toml").unwrap().nodes[0].address, "[fd00::1]:7301");
}

#[test]
fn files_in_memory_are_no_devices() {
    let text = GOOD.replacen("/var/lib/d2.img", "/dev/shm/d2.img", 1);
    assert_eq!(ClusterFile::parse(&text, "c.toml").unwrap().nodes[0].disks[1].bytes, Some(1 << 30));
}

/// The good file with a `[store]` table.
fn with_store(manager: &str, store: &str) -> Result<ClusterFile, String> {
    let text = GOOD.replacen("\"10.0.0.9:7300\"", manager, 1).replacen(
        "[[node]]",
        &format!("[store]\n{store}\n[[node]]"),
        1,
    );
    ClusterFile::parse(&text, "c.toml").map_err(|error| error.to_string())
}

#[test]
fn a_store_is_a_file_unless_it_is_an_etcd() {
    let file = ClusterFile::parse(GOOD, "c.toml").unwrap();
    assert_eq!((file.managers, file.store), (vec!["10.0.0.9:7300".to_owned()], StoreFile::File));
    let managers = "[\"10.0.0.8:7300\", \"10.0.0.9:7300\"]";
    let store = "kind = \"etcd\"\nendpoints = [\"10.0.0.7:2379\", \"http://etcd-2:2379/\"]";
    let file = with_store(managers, store).unwrap();
    assert_eq!(file.managers, ["10.0.0.8:7300", "10.0.0.9:7300"]);
    let StoreFile::Etcd(etcd) = file.store else { panic!("{:?}", file.store) };
    assert_eq!(etcd.endpoints, ["http://10.0.0.7:2379", "http://etcd-2:2379"]);
    assert_eq!((etcd.prefix.as_str(), etcd.user, etcd.tls), ("/ublk-mirror/lab/", None, None));
}

#[test]
fn a_store_that_cannot_be_is_refused() {
    let one = "\"10.0.0.9:7300\"";
    let etcd = "kind = \"etcd\"\nendpoints = [\"10.0.0.7:2379\"]";
    for (manager, store, expected) in [
        ("[]", etcd, "cluster.manager: is empty"),
        ("7300", etcd, "cluster.manager: is neither"),
        ("[\"a:1\", \"a:1\"]", etcd, "cluster.manager: a:1 is in it twice"),
        (
            "[\"a:1\", \"b:1\"]",
            "kind = \"file\"",
            "cluster.manager: several managers need a store that they share",
        ),
        (one, "kind = \"zookeeper\"", "store.kind: \"zookeeper\" is none of"),
        (one, "kind = \"file\"\nprefix = \"/x/\"", "store.prefix: is for kind = \"etcd\""),
        (one, "kind = \"etcd\"", "store.endpoints: is missing or empty"),
        (one, "kind = \"etcd\"\nendpoints = [\"ftp://a:1\"]", "begins with neither"),
        (one, "kind = \"etcd\"\nendpoints = [\"a\"]", "store.endpoints: \"a\" has no port"),
        (one, "kind = \"etcd\"\nendpoints = [\"https://a:1\"]", "store.ca_file: is missing"),
        (
            one,
            &format!("{etcd}\nca_file = \"/ca.pem\""),
            "certificates are for endpoints that begin with https://",
        ),
        (one, &format!("{etcd}\nuser = \"me\""), "user and password_file belong together"),
        (one, &format!("{etcd}\nprefix = \"x\""), "store.prefix: \"x\" does not begin and end"),
    ] {
        let error = with_store(manager, store).unwrap_err();
        assert!(error.starts_with("c.toml: line ") && error.contains(expected), "{store}: {error}");
    }
}
