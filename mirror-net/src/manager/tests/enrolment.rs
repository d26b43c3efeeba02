//! Disks and nodes that enter a running cluster.

use super::bench::incarnation;
use super::{Bench, map_of};
use crate::control::{
    DiskContent, DiskInventory, EnrolOrder, Entrant, FormatOrder, ManagerMessage, NodeMessage, OperatorReply,
};
use crate::ids::{AttachId, ClusterId, DiskId, NodeId};
use crate::manager::{Input, Output, Ticket};

fn add_disk(bench: &mut Bench, disk: &str, (force, carry_out): (bool, bool)) {
    let segments = [45, 45, 10];
    let what = Entrant::Disk { disk: disk.into(), path: "/dev/sdb".into(), segments, spare: false };
    bench.input(Input::Enrol { ticket: Ticket(1), order: EnrolOrder { what, force, carry_out } });
}

fn add_node(bench: &mut Bench, node: &str, power: &str, (force, carry_out): (bool, bool)) {
    let sections: String = (1..=4)
        .map(|index| {
            let power = if index == 4 { power } else { "" };
            format!(
                "[[node]]\nname = \"n{index}\"\naddress = \"10.0.0.{index}:7301\"\n{power}\n[[node.disk]]\npath = \"/dev/sda\"\n"
            )
        })
        .collect();
    let name = &bench.map().cluster_name;
    let file =
        format!("[cluster]\nname = \"{name}\"\nkey_file = \"/k\"\nmanager = \"10.0.0.9:7300\"\n{sections}");
    let what = Entrant::Node { file, node: node.into() };
    bench.input(Input::Enrol { ticket: Ticket(1), order: EnrolOrder { what, force, carry_out } });
}

fn lines(bench: &mut Bench) -> Vec<String> {
    match bench.replies.pop() {
        Some((Ticket(1), OperatorReply::Done { lines })) => lines,
        reply => panic!("{reply:?}"),
    }
}

fn refused(bench: &mut Bench) -> String {
    match bench.replies.pop() {
        Some((Ticket(1), OperatorReply::Refused { reason })) => reason,
        reply => panic!("{reply:?}"),
    }
}

fn found(content: DiskContent) -> NodeMessage {
    let (name, path) = ("d2".into(), "/dev/sdb".into());
    let (bytes, block_bytes, attach) = (16 << 26, 512, AttachId(77));
    NodeMessage::Looked { found: Ok(DiskInventory { name, path, bytes, block_bytes, attach, content }) }
}

fn formatted(error: Option<&str>) -> NodeMessage {
    NodeMessage::Formatted { error: error.map(str::to_owned), attach: vec![AttachId(77)] }
}

fn orders(bench: &Bench) -> Vec<&FormatOrder> {
    let orders = bench.sent.iter().filter_map(|(_, message)| match message {
        ManagerMessage::Format(order) => Some(order),
        _ => None,
    });
    orders.collect()
}

#[test]
fn a_disk_is_looked_at_numbered_formatted_and_entered() {
    let mut bench = Bench::up(&map_of(3));
    add_disk(&mut bench, "n1/d2", (false, true));
    let looks = bench.sent.iter().filter(|(_, message)| matches!(message, ManagerMessage::Look { .. }));
    assert_eq!(looks.count(), 1);
    bench.say(1, found(DiskContent::Blank));
    // Its id is stored before anything is formatted with it.
    assert_eq!((bench.stored.len(), bench.map().last_disk, bench.map().disks.len()), (1, 4, 3));
    let order = orders(&bench)[0].clone();
    assert_eq!(
        (order.node, order.disks[0].disk, order.check_only, order.force),
        (NodeId(1), DiskId(4), false, false)
    );
    assert_eq!(order.disks[0].path.as_deref(), Some("/dev/sdb"));
    bench.say(1, formatted(None));
    let disk = bench.map().disk(DiskId(4)).unwrap();
    assert_eq!((disk.node, &disk.name[..], disk.slots.primary, disk.spare), (NodeId(1), "d2", 7, false));
    let told = lines(&mut bench).join("\n");
    assert!(told.contains("n1/d2 (/dev/sdb, 1 GiB) enters the cluster: 7 slices for primaries"), "{told}");
    assert!(told.contains("mirrorctl rebalance"), "{told}");
    // It counts from now on, without its node having registered again.
    let entry = bench.manager.registry().get("n1").unwrap();
    assert_eq!(entry.incarnation(bench.map().cluster, DiskId(4)).unwrap().attach, AttachId(77));
    bench.pass(1_000);
    assert_eq!(bench.map().disks.len(), 4);
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let mut bench = Bench::up(&map_of(3));
    add_disk(&mut bench, "n1/d2", (false, false));
    bench.say(1, found(DiskContent::Blank));
    let told = lines(&mut bench).join("\n");
    assert!(told.contains("then `mirrorctl rebalance`") && told.contains("to copy"), "{told}");
    assert_eq!((bench.stored.len(), orders(&bench).len()), (0, 0));
}

#[test]
fn what_cannot_be_added_is_refused_before_anything_is_formatted() {
    let mut bench = Bench::up(&map_of(3));
    for (disk, reason) in [
        ("n1", "\"n1\" is no NODE/DISK"),
        ("n9/d2", "there is no node \"n9\", only n1, n2, n3"),
        ("n1/d1", "n1 has a disk d1 already: see `mirrorctl disk list`"),
        ("n1/D 2", "\"D 2\" is not a name"),
    ] {
        add_disk(&mut bench, disk, (false, true));
        let told = refused(&mut bench);
        assert!(told.starts_with(reason), "{told}");
    }
    let cluster = bench.map().cluster;
    for (content, force, reason) in [
        (DiskContent::Foreign { what: "an ext4 file system".into() }, false, "holds an ext4 file system"),
        (
            DiskContent::Ours { cluster: ClusterId(uuid::Uuid::from_u128(9)), disk: DiskId(1) },
            false,
            "already belongs",
        ),
        (DiskContent::Unusable { why: "it is gone".into() }, true, "cannot be used: it is gone"),
        // What counts is not formatted whatever anybody says.
        (DiskContent::Ours { cluster, disk: DiskId(2) }, true, "is n2/d1 of this cluster"),
    ] {
        add_disk(&mut bench, "n1/d2", (force, true));
        bench.say(1, found(content));
        let told = refused(&mut bench);
        assert!(told.contains(reason) && told.ends_with("Nothing was formatted"), "{told}");
    }
    add_disk(&mut bench, "n1/d2", (false, true));
    add_disk(&mut bench, "n2/d2", (false, true));
    assert!(refused(&mut bench).starts_with("something else enters"));
    bench.say(1, NodeMessage::Looked { found: Err("/dev/sdb does not exist".into()) });
    assert_eq!(refused(&mut bench), "/dev/sdb does not exist. Nothing was formatted");
    bench.disconnect(2);
    add_disk(&mut bench, "n2/d2", (false, true));
    assert_eq!(refused(&mut bench), "n2 is not connected: start ublk-server there, then repeat");
    assert_eq!((bench.stored.len(), orders(&bench).len()), (0, 0));
}

#[test]
fn what_fails_while_formatting_leaves_an_id_that_nobody_else_gets() {
    let mut bench = Bench::up(&map_of(3));
    add_disk(&mut bench, "n1/d2", (false, true));
    bench.say(1, found(DiskContent::Blank));
    bench.say(1, formatted(Some("I/O error")));
    let told = refused(&mut bench);
    assert!(told.contains("I/O error. Disks may be formatted") && told.contains("--force"), "{told}");
    add_disk(&mut bench, "n1/d2", (true, true));
    let content = DiskContent::Ours { cluster: bench.map().cluster, disk: DiskId(4) };
    bench.say(1, found(content.clone()));
    bench.disconnect(1);
    assert!(refused(&mut bench).starts_with("node n1 disconnected meanwhile"));
    bench.register(1, incarnation(1));
    add_disk(&mut bench, "n1/d2", (true, true));
    bench.say(1, found(content));
    assert_eq!(orders(&bench).last().unwrap().disks[0].disk, DiskId(6));
    bench.say(1, formatted(None));
    assert_eq!(bench.map().disks.last().unwrap().id, DiskId(6));
    // An answer that never comes.
    add_disk(&mut bench, "n1/d3", (false, true));
    bench.pass(40_000);
    assert!(refused(&mut bench).starts_with("no answer from n1"));
}

#[test]
fn a_node_waits_until_it_is_added() {
    let mut bench = Bench::up(&map_of(3));
    let connection = bench.register(4, incarnation(4));
    let waits = bench.sent.iter().find(|(to, _)| *to == connection).unwrap();
    assert!(matches!(&waits.1, ManagerMessage::Waiting { why } if why.contains("mirrorctl node add n4")));
    let status = bench.manager.status(bench.now_ms);
    assert!(status.findings.iter().any(|finding| finding.todo.starts_with("mirrorctl node add n4")));
    let maps = |bench: &Bench| {
        bench
            .sent
            .iter()
            .filter(|(to, message)| *to == connection && matches!(message, ManagerMessage::Map { .. }))
            .count()
    };
    // A second daemon of that name does not push it out.
    let mut second = bench.registration(4, incarnation(5));
    second.process = incarnation(5).process;
    bench.register_as(second);
    assert!(bench.log.last().unwrap().contains("is connected already"), "{:?}", bench.log);
    bench.connections.insert("n4".into(), connection);

    add_node(&mut bench, "n4", "", (false, false));
    bench.say(4, formatted(None));
    assert!(lines(&mut bench).join("\n").starts_with("node n4 enters the cluster\nn4/d1 (/dev/sda, 1 GiB)"));
    assert_eq!(bench.stored.len(), 0);
    add_node(&mut bench, "n4", "", (false, true));
    assert!(orders(&bench).last().unwrap().check_only);
    bench.say(4, formatted(None));
    assert_eq!((bench.map().last_node, bench.map().last_disk, maps(&bench)), (4, 4, 0));
    bench.say(4, formatted(None));
    lines(&mut bench);
    let map = bench.map();
    assert_eq!((&map.node(NodeId(4)).unwrap().name[..], map.node_of(DiskId(4))), ("n4", Some(NodeId(4))));
    assert!(maps(&bench) > 0, "it is a node as any other now");
    assert!(bench.manager.registry().usable(map, DiskId(4), bench.now_ms).is_some());
    add_node(&mut bench, "n4", "", (false, true));
    assert!(refused(&mut bench).starts_with("n4 is in the cluster already"));
}

/// What it formatted counts whatever becomes of its connection while that is being stored.
#[test]
fn a_node_that_connects_anew_at_the_last_moment_is_welcome() {
    let mut bench = Bench::up(&map_of(3));
    bench.register(4, incarnation(4));
    add_node(&mut bench, "n4", "", (false, true));
    bench.say(4, formatted(None));
    let old = bench.connections["n4"];
    // The store takes its time.
    let message = formatted(None);
    bench.manager.handle(bench.now_ms, Input::Message { connection: old, message });
    let mut stored = None;
    while let Some(output) = bench.manager.poll() {
        if let Output::Store(proposal) = output {
            stored = Some(proposal.next.version);
        }
    }
    bench.disconnect(4);
    let mut again = bench.registration(4, incarnation(4));
    again.disks[0].content = DiskContent::Ours { cluster: bench.map().cluster, disk: DiskId(4) };
    let connection = bench.register_as(again);
    bench.input(Input::Stored { version: stored.unwrap() });
    let map = |(to, message): &(_, ManagerMessage)| {
        *to == connection && matches!(message, ManagerMessage::Map { .. })
    };
    assert!(bench.sent.iter().any(map), "it is a node as any other now");
}

#[test]
fn a_node_that_does_not_fit_is_refused() {
    let mut bench = Bench::up(&map_of(3));
    add_node(&mut bench, "n4", "", (false, true));
    assert_eq!(refused(&mut bench), "n4 is not connected: start ublk-server there, then repeat");
    add_node(&mut bench, "n5", "", (false, true));
    assert!(refused(&mut bench).starts_with("the cluster file has no node n5"));
    let mut registration = bench.registration(4, incarnation(4));
    registration.address = "10.0.0.44:7301".into();
    registration.disks[0].content = DiskContent::Foreign { what: "an XFS file system".into() };
    bench.register_as(registration.clone());
    add_node(&mut bench, "n4", "", (false, true));
    assert!(refused(&mut bench).starts_with("node n4 listens on 10.0.0.44:7301, the cluster file says"));
    bench.disconnect(4);
    registration.address = "10.0.0.4:7301".into();
    bench.register_as(registration);
    add_node(&mut bench, "n4", "", (false, true));
    assert!(refused(&mut bench).contains("holds an XFS file system"));
    // One that has a disk of somebody else's is not what it says.
    let mut thief = bench.registration(6, incarnation(6));
    thief.disks[0].content = DiskContent::Ours { cluster: bench.map().cluster, disk: DiskId(2) };
    bench.register_as(thief);
    assert!(bench.log.last().unwrap().contains("is n2/d1, and no disk of n6 is there"), "{:?}", bench.log);
    assert_eq!((bench.stored.len(), orders(&bench).len()), (0, 0));
}
