use super::Bench;
use super::bench::incarnation;
use crate::config::ClusterFile;
use crate::control::{DiskContent, FormatOrder, ManagerMessage, NodeMessage, OperatorReply};
use crate::ids::{AttachId, ClusterId, MapVersion};
use crate::manager::{Input, Ticket};

const FILE: &str = r#"
[cluster]
name = "lab"
key_file = "/k"
manager = "10.0.0.9:7300"
[[node]]
name = "n1"
address = "10.0.0.1:7301"
[[node.disk]]
path = "/dev/sda"
[[node]]
name = "n2"
address = "10.0.0.2:7301"
[[node.disk]]
path = "/dev/sda"
"#;

fn create(bench: &mut Bench, force: bool) {
    let file = Box::new(ClusterFile::parse(FILE, "c.toml").unwrap());
    let cluster = ClusterId(uuid::Uuid::from_u128(5));
    bench.input(Input::Create { ticket: Ticket(1), file, cluster, force });
}

fn refused(bench: &mut Bench) -> String {
    match bench.replies.pop() {
        Some((Ticket(1), OperatorReply::Refused { reason })) => reason,
        reply => panic!("{reply:?}"),
    }
}

fn orders(bench: &Bench) -> Vec<&FormatOrder> {
    bench
        .sent
        .iter()
        .filter_map(|(_, message)| match message {
            ManagerMessage::Format(order) => Some(order),
            _ => None,
        })
        .collect()
}

fn answer(bench: &mut Bench, index: u64, error: Option<&str>, attach: &[u64]) {
    let attach = attach.iter().map(|attach| AttachId(*attach)).collect();
    bench.say(index, NodeMessage::Formatted { error: error.map(str::to_owned), attach });
}

fn registered() -> Bench {
    let mut bench = Bench::new(None);
    bench.register(1, incarnation(1));
    bench.register(2, incarnation(2));
    bench
}

#[test]
fn everything_is_checked_then_formatted_then_stored() {
    let mut bench = registered();
    create(&mut bench, false);
    assert_eq!(orders(&bench).len(), 2);
    assert!(orders(&bench).iter().all(|order| order.check_only && !order.force));
    answer(&mut bench, 1, None, &[]);
    assert_eq!(orders(&bench).len(), 2, "n2 has not answered");
    answer(&mut bench, 2, None, &[]);
    let format = orders(&bench);
    assert_eq!(format.len(), 4);
    assert_eq!((format[3].node.0, format[3].disks[0].disk.0, format[3].check_only), (2, 2, false));
    assert_eq!(format[3].disks[0].slots.total(), 15);
    answer(&mut bench, 1, None, &[71]);
    answer(&mut bench, 2, None, &[72]);
    assert!(matches!(bench.replies.pop(), Some((Ticket(1), OperatorReply::Created { .. }))));
    let map = bench.map().clone();
    assert_eq!((map.version, map.cluster_name.as_str()), (MapVersion(1), "lab"));
    assert_eq!(map.devices[0].spans[0].replicas[1].incarnation.attach, AttachId(72));
    bench.pass(100);
    assert_eq!(bench.map().version, MapVersion(1), "the nodes are what the map says");
    assert_eq!(bench.exports(1), Vec::<String>::new());
    bench.adopt(1);
    bench.adopt(2);
    assert_eq!(bench.exports(1), ["n1-d1-unmirrored", "n1-d1"]);
    create(&mut bench, true);
    assert!(refused(&mut bench).starts_with("there is a cluster already, lab"));
}

#[test]
fn absent_nodes_and_disks_are_named() {
    let mut bench = Bench::new(None);
    bench.register(1, incarnation(1));
    create(&mut bench, false);
    assert!(refused(&mut bench).starts_with("not connected: n2; start ublk-server"));
    let mut registration = bench.registration(2, incarnation(2));
    registration.disks[0].path = "/dev/sdb".into();
    bench.register_as(registration);
    create(&mut bench, false);
    assert!(refused(&mut bench).starts_with("node n2 does not know disk d1 (/dev/sda)"));
}

#[test]
fn foreign_data_is_named_and_needs_force() {
    let mut bench = registered();
    let mut registration = bench.registration(2, incarnation(2));
    registration.disks[0].content =
        DiskContent::Foreign { what: "ext4 file system labelled \"home\"".into() };
    bench.register_as(registration);
    create(&mut bench, false);
    assert_eq!(
        refused(&mut bench),
        "node n2 disk d1 (/dev/sda, 1 GiB) holds ext4 file system labelled \"home\": nothing was formatted; --force \
         would destroy what is on it"
    );
    create(&mut bench, true);
    assert!(orders(&bench).iter().all(|order| order.force));
}

#[test]
fn a_failed_check_formats_nothing_and_a_failed_format_leaves_no_map() {
    let mut bench = registered();
    create(&mut bench, false);
    answer(&mut bench, 1, Some("disk d1: mounted at /home"), &[]);
    assert!(bench.replies.is_empty(), "n2 owes an answer");
    answer(&mut bench, 2, None, &[]);
    assert_eq!(refused(&mut bench), "node n1: disk d1: mounted at /home. Nothing was formatted");

    create(&mut bench, false);
    answer(&mut bench, 1, None, &[]);
    answer(&mut bench, 2, None, &[]);
    answer(&mut bench, 1, None, &[71]);
    bench.disconnect(2);
    let reason = refused(&mut bench);
    assert!(
        reason.starts_with("node n2 disconnected meanwhile. There is no cluster, but some disks"),
        "{reason}"
    );
    assert!(bench.manager.map().is_none());
}

#[test]
fn a_node_that_does_not_answer_is_given_up_and_its_connection_closed() {
    let mut bench = registered();
    create(&mut bench, false);
    answer(&mut bench, 1, None, &[]);
    bench.pass(29_000);
    assert!(bench.replies.is_empty());
    bench.pass(2_000);
    assert_eq!(refused(&mut bench), "no answer from n2. Nothing was formatted");
    assert_eq!(bench.closed, [bench.connections["n2"]]);
}
