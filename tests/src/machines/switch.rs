//! The private link between machines: a switch of ours, so that any direction of any cable can be cut.
//!
//! Every machine's QEMU sends its frames to a socket of its own here, and they are handed on to those whom they are
//! for. A machine without power is simply not there: what is sent to it is lost, as on a cable.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Longer than any frame.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// For how long the sender is held up by a machine that does not take its frames; then they are lost.
const PRESSURE: Duration = Duration::from_millis(100);

/// The last byte of a machine's address on the link says which one it is.
pub fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x4c, 0x00, number]
}

struct Port {
    number: u8,
    /// Where its QEMU listens.
    machine: PathBuf,
}

struct Shared {
    ports: Vec<Port>,
    /// For each sender and receiver: whether nothing gets through.
    cut: Vec<Vec<AtomicBool>>,
    dropped: AtomicU64,
}

/// The switch; it runs until the process ends.
pub struct Switch(Arc<Shared>);

/// Where the switch listens for a machine's frames, and where that machine's QEMU listens.
pub fn sockets(dir: &Path, number: u8) -> (PathBuf, PathBuf) {
    (dir.join(format!("port{number}")), dir.join(format!("net{number}")))
}

impl Switch {
    /// Starts it for machines of these numbers, with its sockets in that directory.
    pub fn start(dir: &Path, numbers: &[u8]) -> io::Result<Self> {
        let ports: Vec<Port> =
            numbers.iter().map(|number| Port { number: *number, machine: sockets(dir, *number).1 }).collect();
        let none = || (0..ports.len()).map(|_| AtomicBool::new(false)).collect();
        let cut = (0..ports.len()).map(|_| none()).collect();
        let shared = Arc::new(Shared { ports, cut, dropped: AtomicU64::new(0) });
        for (index, number) in numbers.iter().enumerate() {
            let socket = UnixDatagram::bind(sockets(dir, *number).0)?;
            socket.set_write_timeout(Some(PRESSURE))?;
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.forward(index, &socket));
        }
        Ok(Self(shared))
    }

    fn index(&self, number: u8) -> usize {
        self.0.ports.iter().position(|port| port.number == number).expect("a machine of this switch")
    }

    /// Nothing gets from one machine to another any more.
    pub fn cut(&self, from: u8, to: u8) {
        self.0.cut[self.index(from)][self.index(to)].store(true, Ordering::SeqCst);
    }

    /// All cables are whole.
    pub fn heal(&self) {
        for cable in self.0.cut.iter().flatten() {
            cable.store(false, Ordering::SeqCst);
        }
    }

    /// Frames that were lost on cut cables.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn forward(&self, from: usize, socket: &UnixDatagram) {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        loop {
            let length = match socket.recv(&mut frame) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let frame = &frame[..length];
            let Some(receiver) = frame.get(..6) else { continue };
            let everybody = receiver[0] & 1 == 1;
            for (to, port) in self.ports.iter().enumerate() {
                if to == from || !(everybody || receiver == mac(port.number)) {
                    continue;
                }
                if self.cut[from][to].load(Ordering::SeqCst) {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                } else {
                    // A machine that is off, or does not keep up: the frame is lost.
                    let _ = socket.send_to(frame, &port.machine);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: [u8; 6], text: &[u8]) -> Vec<u8> {
        [&to[..], text].concat()
    }

    #[test]
    fn frames_go_where_they_are_for_until_that_direction_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = [1, 2, 200];
        let switch = Switch::start(dir.path(), &numbers).unwrap();
        // As QEMU does it: not connected, since a connected socket takes frames from one end only.
        let machines = numbers.map(|number| {
            let machine = UnixDatagram::bind(sockets(dir.path(), number).1).unwrap();
            machine.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            machine
        });
        let send = |index: usize, frame: &[u8]| {
            machines[index].send_to(frame, sockets(dir.path(), numbers[index]).0).unwrap();
        };
        let next = |index: usize| {
            let mut bytes = [0; 100];
            let length = machines[index].recv(&mut bytes).unwrap();
            bytes[6..length].to_vec()
        };
        send(0, &frame(mac(2), b"to 2"));
        send(0, &frame([0xff; 6], b"to all"));
        assert_eq!((next(1), next(1), next(2)), (b"to 2".to_vec(), b"to all".to_vec(), b"to all".to_vec()));

        switch.cut(1, 2);
        send(0, &frame([0xff; 6], b"lost"));
        send(0, &frame(mac(200), b"mark"));
        assert_eq!((next(2), next(2)), (b"lost".to_vec(), b"mark".to_vec()));
        assert_eq!(switch.dropped(), 1);
        send(1, &frame(mac(1), b"the other way"));
        assert_eq!(next(0), b"the other way");
        switch.heal();
        send(0, &frame(mac(2), b"again"));
        assert_eq!(next(1), b"again");
        // What is sent to nobody is lost, and holds nobody up.
        std::fs::remove_file(sockets(dir.path(), 2).1).unwrap();
        send(0, &frame([0xff; 6], b"two are left"));
        assert_eq!(next(2), b"two are left");
    }
}
