//! A distribution map from anywhere: read and refused, or read and used; every batch of verbs leaves it
//! valid or as it was, and it survives its own text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::config::Policy;
use mirror_net::engine::{Engine, Me};
use mirror_net::ids::{NodeId, ProcessId, SliceIndex};
use mirror_net::manager::{Input, Manager};
use mirror_net::map::DistributionMap;
use mirror_net::map::verbs::Verb;
use std::sync::Arc;
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::maps;

/// What can be asked of a valid map, by whoever it reaches.
fn use_map(map: &DistributionMap) {
    let text = serde_json::to_string(map).expect("a map is text");
    assert_eq!(&serde_json::from_str::<DistributionMap>(&text).expect("our own text"), map);
    for device in &map.devices {
        let _ = device.bytes(map.slice_bytes);
        for slice in [0, device.slices / 2, device.slices.saturating_sub(1)] {
            assert_eq!(device.span(SliceIndex(slice)).is_some(), slice < device.slices);
        }
        assert!(device.span(SliceIndex(device.slices)).is_none());
    }
    for disk in &map.disks {
        let _ = map.disk_name(disk.id);
    }
    // A node without disks of its own, and one that is not in the map.
    for node in [map.nodes.first().map_or(NodeId(0), |node| node.id), NodeId(u16::MAX)] {
        let me = Me { node, process: ProcessId(1) };
        let mut engine = Engine::new(me, map.slice_bytes, Vec::new(), 0);
        let adopted = engine.handle_map(0, Arc::new(map.clone()));
        assert_eq!(adopted, Ok(()));
        while engine.poll_action().is_some() {}
        let _ = (engine.waiting(), engine.session_reports());
    }
    // Nobody ever registers: what it does about that by itself, it can do.
    let mut manager = Manager::new(Some(map.clone()), Policy::default());
    for now_ms in [10_000, 100_000] {
        manager.handle(now_ms, Input::Tick);
        while manager.poll().is_some() {}
    }
    let _ = manager.status(20_000);
}

fuzz_target!(|input: &[u8]| {
    // Text, then what is done to it: a zero byte never is in JSON.
    let at = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let (text, rest) = input.split_at(at);
    let mut choices = Choices::new(rest.get(1..).unwrap_or_default());
    let mut map = maps::small();
    if !text.is_empty() {
        let Ok(read) = serde_json::from_slice::<DistributionMap>(text) else { return };
        map = read;
    }
    if let Err(error) = map.validate() {
        assert!(!error.to_string().is_empty());
        // What is invalid is refused wherever it comes.
        let me = Me { node: NodeId(1), process: ProcessId(1) };
        let mut engine = Engine::new(me, maps::small().slice_bytes, Vec::new(), 0);
        assert!(engine.handle_map(0, Arc::new(map)).is_err());
        return;
    }
    use_map(&map);
    let mut steps = 0;
    while !choices.is_empty() && steps < 100 {
        steps += 1;
        let batch: Vec<Verb> = (0..=choices.below(3)).map(|_| maps::verb(&mut choices)).collect();
        let text = serde_json::to_string(&batch).expect("verbs are text");
        assert_eq!(serde_json::from_str::<Vec<Verb>>(&text).expect("our own text"), batch);
        match map.apply(&batch) {
            Ok(Some(next)) => {
                assert_eq!(next.version.0, map.version.0 + 1);
                assert_eq!(next.validate(), Ok(()));
                assert_eq!(next.cluster, map.cluster);
                for (old, new) in map.devices.iter().zip(&next.devices) {
                    assert!(new.claim.generation >= old.claim.generation);
                }
                map = next;
            }
            Ok(None) | Err(_) => {}
        }
    }
    use_map(&map);
});
