//! A cluster file with anything in it: every mistake is an error with a place, and what is accepted can be
//! laid out or is refused with a reason.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::config::{ClusterFile, format_bytes, parse_bytes, segment_slots};
use mirror_net::ids::{AttachId, ClusterId, Incarnation, ProcessId};
use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};

fn lay_out(file: &ClusterFile) {
    let specs: Option<Vec<NodeSpec>> = file
        .nodes
        .iter()
        .map(|node| {
            let disks = node.disks.iter().map(|disk| {
                let bytes = disk.bytes.unwrap_or(1 << 30);
                let usable = (bytes / u64::from(file.slice_bytes)).min(1 << 24);
                let slots = segment_slots(bytes, file.slice_bytes, usable, disk.segments).ok()?;
                let incarnation = Incarnation { attach: AttachId(1), process: ProcessId(1) };
                Some(DiskSpec { name: disk.name.clone(), slots, block_bytes: 512, incarnation })
            });
            Some(NodeSpec {
                name: node.name.clone(),
                address: node.address.clone(),
                power: node.power.clone(),
                switch: node.switch.clone(),
                disks: disks.collect::<Option<_>>()?,
                spare: node.spare,
                devices: node.devices,
            })
        })
        .collect();
    let Some(specs) = specs else { return };
    if let Ok(map) = pairs(ClusterId::default(), &file.name, file.slice_bytes, &specs) {
        assert_eq!(map.validate(), Ok(()));
    }
}

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match ClusterFile::parse(text, "cluster.toml") {
        Ok(file) => {
            assert!(file.slice_bytes.is_power_of_two());
            for node in &file.nodes {
                assert_eq!(file.node(&node.name), Some(node), "names are unique");
            }
            lay_out(&file);
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("cluster.toml"), "{error}");
            assert!(!error.contains('\n'), "not one line: {error}");
        }
    }
    if let Some(bytes) = parse_bytes(text).filter(|bytes| bytes % (1 << 10) == 0) {
        let again = parse_bytes(&format_bytes(bytes));
        assert!(again == Some(bytes) || format_bytes(bytes).contains('.'));
    }
});
