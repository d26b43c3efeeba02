//! A disk in memory behind the blocking NBD server, with holes, and counts of what clients did.

use mirror_tests::nbd_server::{Filter, Open, Storage, listen};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use ublk_server::frontend::nbd::reply::{self, Extent, More};
use ublk_server::frontend::nbd::{Command, ExportInfo, Exports, NbdError, Request, Session};

/// The unit in which memory counts as allocated or as a hole.
pub const BLOCK_BYTES: usize = 4096;

/// A disk in memory.
struct Disk {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

impl Disk {
    fn range(request: &Request) -> std::ops::Range<usize> {
        let start = request.offset as usize;
        start..start + request.length as usize
    }

    fn write(&mut self, request: &Request, data: &[u8]) {
        self.bytes[Self::range(request)].copy_from_slice(data);
        self.allocate(request);
    }

    fn allocate(&mut self, request: &Request) {
        let range = Self::range(request);
        self.allocated[range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)].fill(true);
    }

    fn zero(&mut self, request: &Request, punch: bool) {
        let range = Self::range(request);
        self.bytes[range.clone()].fill(0);
        if punch {
            // Only whole blocks become holes; a part of one keeps what is around it.
            let blocks = range.start.div_ceil(BLOCK_BYTES)..range.end / BLOCK_BYTES;
            if blocks.start < blocks.end {
                self.allocated[blocks].fill(false);
            }
        } else {
            self.allocate(request);
        }
    }

    /// Pieces of a range: start, length, whether it is a hole.
    fn pieces(&self, request: &Request) -> Vec<(usize, usize, bool)> {
        let range = Self::range(request);
        let mut pieces: Vec<(usize, usize, bool)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
            let hole = !self.allocated[at / BLOCK_BYTES];
            match pieces.last_mut() {
                Some(last) if last.2 == hole => last.1 += end - at,
                _ => pieces.push((at, end - at, hole)),
            }
            at = end;
        }
        pieces
    }
}

/// The server: its exports, and what clients did to it.
pub struct Ram {
    exports: Vec<(ExportInfo, Mutex<Disk>)>,
    /// Structured replies are refused, as by an older server.
    simple_only: bool,
    /// Requests are answered with this error.
    broken: Option<NbdError>,
    requests: Mutex<Vec<Request>>,
    sessions: AtomicUsize,
    structured_sessions: AtomicUsize,
}

impl Exports for Ram {
    fn list(&self) -> Vec<String> {
        self.exports.iter().map(|(export, _)| export.name.clone()).collect()
    }

    fn get(&self, name: &str) -> Option<ExportInfo> {
        self.exports.iter().map(|(export, _)| export).find(|export| export.name == name).cloned()
    }
}

/// A server that listens on a unix socket, and on a loopback port.
pub struct Running {
    ram: Arc<Ram>,
    directory: tempfile::TempDir,
    port: u16,
}

pub fn export(name: &str, size: u64) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: format!("{name} in memory"),
        size,
        block_size_min: 512,
        block_size_preferred: BLOCK_BYTES as u32,
        read_only: false,
        rotational: false,
        fast_zero: true,
    }
}

pub fn start(exports: Vec<ExportInfo>) -> Running {
    start_with(exports, false, None)
}

pub fn start_with(exports: Vec<ExportInfo>, simple_only: bool, broken: Option<NbdError>) -> Running {
    let with_disk = |export: ExportInfo| {
        let size = export.size as usize;
        let disk = Disk { bytes: vec![0; size], allocated: vec![false; size.div_ceil(BLOCK_BYTES)] };
        (export, Mutex::new(disk))
    };
    let ram = Arc::new(Ram {
        exports: exports.into_iter().map(with_disk).collect(),
        simple_only,
        broken,
        requests: Mutex::default(),
        sessions: AtomicUsize::new(0),
        structured_sessions: AtomicUsize::new(0),
    });
    let directory = tempfile::tempdir().unwrap();
    let unix = UnixListener::bind(directory.path().join("nbd")).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    // The threads end with the test process.
    listen(&ram, move || unix.accept().map(|(stream, _)| stream));
    listen(&ram, move || tcp.accept().map(|(stream, _)| stream));
    Running { ram, directory, port }
}

impl Running {
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    pub fn unix_uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    pub fn tcp_uri(&self, name: &str) -> String {
        format!("nbd://127.0.0.1:{}/{name}", self.port)
    }

    /// A place for the clients' files.
    pub fn file(&self, name: &str) -> PathBuf {
        Path::join(self.directory.path(), name)
    }

    pub fn contents(&self, index: usize) -> Vec<u8> {
        self.ram.exports[index].1.lock().unwrap().bytes.clone()
    }

    /// How many requests have been received for which this holds.
    pub fn requests(&self, which: impl Fn(&Request) -> bool) -> usize {
        self.ram.requests.lock().unwrap().iter().filter(|request| which(request)).count()
    }

    /// How many connections have got as far as to requests.
    pub fn sessions(&self) -> usize {
        self.ram.sessions.load(Ordering::Relaxed)
    }

    /// How many of them have negotiated structured replies.
    pub fn structured_sessions(&self) -> usize {
        self.ram.structured_sessions.load(Ordering::Relaxed)
    }
}

impl Storage for Ram {
    fn joined(&self, session: &Session) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        self.structured_sessions.fetch_add(usize::from(session.structured), Ordering::Relaxed);
    }

    fn admit(&self, session: &Session, request: &Request) -> Result<(), (NbdError, &'static str)> {
        self.requests.lock().unwrap().push(*request);
        request.check(session).map_err(|refusal| (refusal.error, refusal.message))?;
        match self.broken {
            Some(error) => Err((error, "the disk is broken")),
            None => Ok(()),
        }
    }

    fn answer(
        &self,
        session: &Session,
        request: &Request,
        data: &[u8],
        to: &mut dyn Write,
    ) -> std::io::Result<()> {
        let (_, disk) = self.exports.iter().find(|(export, _)| *export == session.export).unwrap();
        execute(to, session, request, data, &mut disk.lock().unwrap())
    }

    fn filter(&self) -> Box<dyn Filter> {
        if self.simple_only { Box::<OldServer>::default() } else { Box::new(Open) }
    }
}

/// Stands between client and negotiation and makes structured replies an option that is unknown, so
/// that clients fall back to simple ones.
#[derive(Default)]
struct OldServer {
    flags_received: bool,
    data_bytes: usize,
}

impl OldServer {
    const STRUCTURED_REPLY: [u8; 4] = [0, 0, 0, 8];
    const UNKNOWN: [u8; 4] = [0xff, 0, 0, 8];
}

impl Filter for OldServer {
    /// Receives the flags, a header or an option's data: clients send some of them in one piece.
    fn receive(&mut self, stream: &mut dyn Read, staging: &mut [u8]) -> std::io::Result<usize> {
        if !self.flags_received {
            self.flags_received = true;
            stream.read_exact(&mut staging[..4])?;
            return Ok(4);
        }
        if self.data_bytes > 0 {
            let count = std::mem::take(&mut self.data_bytes);
            stream.read_exact(&mut staging[..count])?;
            return Ok(count);
        }
        stream.read_exact(&mut staging[..16])?;
        self.data_bytes = u32::from_be_bytes(staging[12..16].try_into().unwrap()) as usize;
        if staging[8..12] == Self::STRUCTURED_REPLY {
            staging[8..12].copy_from_slice(&Self::UNKNOWN);
        }
        Ok(16)
    }

    fn send(&mut self, reply: &mut [u8]) {
        if reply.len() >= 20 && reply[8..12] == Self::UNKNOWN {
            reply[8..12].copy_from_slice(&Self::STRUCTURED_REPLY);
        }
    }
}

fn execute(
    stream: &mut dyn Write,
    session: &Session,
    request: &Request,
    data: &[u8],
    disk: &mut Disk,
) -> std::io::Result<()> {
    match request.command {
        Command::Read => return read(stream, session, request, disk),
        Command::BlockStatus => {
            let pieces = disk.pieces(request);
            let extents = pieces.iter().map(|(_, length, hole)| Extent {
                length: *length as u64,
                hole: *hole,
                zero: *hole,
            });
            return stream.write_all(&reply::block_status(request, extents));
        }
        Command::Write => disk.write(request, data),
        Command::Trim => disk.zero(request, true),
        Command::WriteZeroes => disk.zero(request, !request.flags.no_hole()),
        Command::Flush => {}
        Command::Disconnect | Command::Cache | Command::Unknown(_) => unreachable!("checked before"),
    }
    stream.write_all(&reply::success(request))
}

/// Reads with holes go out in chunks where they may, so that clients have to put them together.
fn read(stream: &mut dyn Write, session: &Session, request: &Request, disk: &Disk) -> std::io::Result<()> {
    let pieces = disk.pieces(request);
    if !session.structured || pieces.len() == 1 && !pieces[0].2 {
        stream.write_all(&reply::read_head(session, request))?;
        return stream.write_all(&disk.bytes[Disk::range(request)]);
    }
    for (start, length, hole) in &pieces {
        if *hole {
            stream.write_all(&reply::hole_chunk(
                request.cookie,
                *start as u64,
                *length as u32,
                More::Follows,
            ))?;
        } else {
            stream.write_all(&reply::data_chunk(
                request.cookie,
                *start as u64,
                *length as u32,
                More::Follows,
            ))?;
            stream.write_all(&disk.bytes[*start..start + length])?;
        }
    }
    stream.write_all(&reply::none_chunk(request.cookie))
}
