//! A test disk as an NBD export, and its control socket.

use super::command::Order;
use super::{Failed, TestDisk};
use crate::nbd_server::{self, Storage};
use crate::sim::disk::{PAGE, SECTOR};
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use ublk_server::frontend::nbd::reply;
use ublk_server::frontend::nbd::{Command, ExportInfo, Exports, NbdError, Request, Session};

/// What zeros are written in.
const ZEROS_BYTES: usize = 1 << 20;

/// What one client sees: the disk under the power that was on when it came.
struct Powered {
    disk: Arc<TestDisk>,
    power: u64,
}

impl Exports for Powered {
    fn list(&self) -> Vec<String> {
        vec![self.disk.name.clone()]
    }

    fn get(&self, name: &str) -> Option<ExportInfo> {
        (name == self.disk.name).then(|| ExportInfo {
            name: name.to_owned(),
            description: "a test disk".into(),
            size: self.disk.bytes(),
            block_size_min: SECTOR as u32,
            block_size_preferred: PAGE as u32,
            read_only: false,
            rotational: false,
            fast_zero: false,
        })
    }
}

impl Storage for Powered {
    fn answer(
        &self,
        session: &Session,
        request: &Request,
        data: &[u8],
        to: &mut dyn Write,
    ) -> io::Result<()> {
        let mut read = vec![0; if request.command == Command::Read { request.length as usize } else { 0 }];
        let done = match request.command {
            Command::Read => self.disk.read(self.power, request.offset, &mut read),
            Command::Write => self.disk.write(self.power, request.offset, data, request.flags.fua()),
            Command::Trim | Command::WriteZeroes => self.zero(request),
            Command::Flush => self.disk.flush(self.power),
            Command::BlockStatus | Command::Disconnect | Command::Cache | Command::Unknown(_) => {
                return to.write_all(&reply::failure(
                    session,
                    request,
                    NbdError::Invalid,
                    "a test disk cannot say",
                ));
            }
        };
        match done {
            Ok(()) if request.command == Command::Read => {
                to.write_all(&reply::read_head(session, request))?;
                to.write_all(&read)
            }
            Ok(()) => to.write_all(&reply::success(request)),
            Err(Failed::Io) => to.write_all(&reply::failure(session, request, NbdError::Io, "told to fail")),
            // Whoever asked is dead.
            Err(Failed::Power) => Err(ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl Powered {
    fn zero(&self, request: &Request) -> Result<(), Failed> {
        let zeros = vec![0; ZEROS_BYTES.min(request.length as usize)];
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        while at < end {
            let length = zeros.len().min((end - at) as usize);
            self.disk.write(self.power, at, &zeros[..length], request.flags.fua())?;
            at += length as u64;
        }
        Ok(())
    }
}

/// Binds a unix socket; one that an earlier process left behind is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

impl TestDisk {
    /// Serves it on a unix socket, to whoever comes, for as long as the process lives.
    pub fn serve(self: &Arc<Self>, socket: &Path) -> io::Result<()> {
        let (disk, listener) = (Arc::clone(self), bind(socket)?);
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let power = disk.power();
                let powered = Powered { disk: Arc::clone(&disk), power };
                // An error is a client that hung up, or lost its power.
                thread::spawn(move || nbd_server::serve(&powered, &mut stream));
            }
        });
        Ok(())
    }

    /// Takes orders on a unix socket: one a line, answered with `ok: …` or `error: …`.
    pub fn control(self: &Arc<Self>, socket: &Path) -> io::Result<()> {
        let (disk, listener) = (Arc::clone(self), bind(socket)?);
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let disk = Arc::clone(&disk);
                thread::spawn(move || -> io::Result<()> {
                    let mut answers = stream.try_clone()?;
                    for line in BufReader::new(stream).lines() {
                        let line = line?;
                        let words: Vec<&str> = line.split_ascii_whitespace().collect();
                        let answer = Order::parse(&words).and_then(|order| disk.obey(order));
                        match answer {
                            Ok(said) => writeln!(answers, "ok: {said}")?,
                            Err(wrong) => writeln!(answers, "error: {wrong}")?,
                        }
                    }
                    Ok(())
                });
            }
        });
        Ok(())
    }
}
