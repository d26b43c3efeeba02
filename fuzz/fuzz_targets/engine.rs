//! Everything that can happen to a node, in any order: see `ublk_mirror_fuzz::node`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::maps;
use ublk_mirror_fuzz::node::Rig;

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let first = choices.byte();
    let mut rig = Rig::new(1 + u16::from(first & 0x7f) % maps::NODES);
    if first & 0x80 == 0 {
        rig.settle_in();
    }
    rig.play(&mut choices);
});
