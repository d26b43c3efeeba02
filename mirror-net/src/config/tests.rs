use super::*;

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
        "frontend = \"ublk\"\nsegments = { primary = 40, secondary = 40, unmirrored = 20 }\n[[node]]",
        1,
    );
    let file = ClusterFile::parse(&text, "c.toml").unwrap();
    assert_eq!(file.nodes[0].frontend, Frontend::Ublk);
    assert_eq!(file.nodes[1].frontend, Frontend::Nbd);
    assert_eq!(file.nodes[0].disks[0].segments.unmirrored, 20);
    assert_eq!(file.nodes[0].disks[1].segments.unmirrored, 0);
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
            "commit = \"deferred\"\nmanager = ",
            "line 5: cluster.commit: \"deferred\" is not built yet: leave the field out, or write \"immediate\"",
        ),
        (
            "manager = ",
            "copies = 3\nmanager = ",
            "line 5: cluster.copies: 3 copies are not built yet: leave the field out, or write 2",
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
