//! Serves a test disk: `test-disk SOCKET CONTROL_SOCKET SIZE_MIB [SEED]`.

use mirror_tests::test_disk::{TestDisk, command};
use std::path::Path;
use std::sync::Arc;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (socket, control, size, seed) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [socket, control, size] => (socket, control, size, "1"),
        [socket, control, size, seed] => (socket, control, size, seed),
        _ => {
            eprintln!("usage: test-disk SOCKET CONTROL_SOCKET SIZE_MIB [SEED]");
            eprintln!(
                "The export is called `disk`. Orders, one a line on the control socket: {}",
                command::USAGE
            );
            std::process::exit(64);
        }
    };
    let mib: u64 = size.parse()?;
    let disk = Arc::new(TestDisk::new("disk", mib << 20, seed.parse()?));
    disk.control(Path::new(control))?;
    disk.serve(Path::new(socket))?;
    println!("nbd+unix:///disk?socket={socket}");
    loop {
        std::thread::park();
    }
}
