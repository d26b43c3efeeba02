//! A small NBD client that can have many requests in flight: enough to fill a device, and to see *when* a write is
//! acknowledged. It speaks to our server only; real clients judge the protocol elsewhere.

use anyhow::{Context, bail, ensure};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;

/// What a client speaks over.
trait Socket: Read + Write + Send {
    fn set_patience(&self, patience: Duration) -> std::io::Result<()>;
}

impl Socket for UnixStream {
    fn set_patience(&self, patience: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(patience))
    }
}

impl Socket for TcpStream {
    fn set_patience(&self, patience: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(patience))
    }
}

/// A connection in transmission.
pub struct NbdClient {
    stream: Box<dyn Socket>,
    /// The export's size in bytes.
    pub size: u64,
    next_cookie: u64,
}

/// A reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's.
    pub cookie: u64,
    /// 0, or the protocol's error number.
    pub error: u32,
}

impl NbdClient {
    /// Connects through a `nbd+unix:///EXPORT?socket=PATH` URI, or `nbd://HOST:PORT/EXPORT`.
    pub fn connect(uri: &str) -> anyhow::Result<Self> {
        if let Some(rest) = uri.strip_prefix("nbd://") {
            let (address, export) = rest.split_once('/').context("no export in the URI")?;
            let stream = TcpStream::connect(address).with_context(|| uri.to_owned())?;
            stream.set_nodelay(true)?;
            return Self::negotiate(Box::new(stream), export);
        }
        let rest = uri.strip_prefix("nbd+unix:///").with_context(|| format!("{uri} is no NBD URI"))?;
        let (export, socket) = rest.split_once("?socket=").context("no socket in the URI")?;
        Self::negotiate(Box::new(UnixStream::connect(socket).with_context(|| uri.to_owned())?), export)
    }

    fn negotiate(mut stream: Box<dyn Socket>, export: &str) -> anyhow::Result<Self> {
        stream.set_patience(Duration::from_secs(60))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..8] == b"NBDMAGIC", "not an NBD server");
        // Fixed newstyle, no zeroes.
        stream.write_all(&3u32.to_be_bytes())?;
        let mut option = Vec::new();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OPTION_GO.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0u16.to_be_bytes());
        stream.write_all(&option)?;
        let mut size = 0;
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header)?;
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let mut body = vec![0; word(16) as usize];
            stream.read_exact(&mut body)?;
            match word(12) {
                REPLY_ACK => return Ok(Self { stream, size, next_cookie: 1 }),
                REPLY_INFO if body[..2] == [0, 0] => size = u64::from_be_bytes(body[2..10].try_into()?),
                REPLY_INFO => {}
                other => bail!("GO {export}: error {other:#x}: {}", String::from_utf8_lossy(&body)),
            }
        }
    }

    /// How long to wait for a reply.
    pub fn set_patience(&self, patience: Duration) -> anyhow::Result<()> {
        Ok(self.stream.set_patience(patience)?)
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> anyhow::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend(0x2560_9513u32.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)?;
        Ok(cookie)
    }

    /// Sends a write and does not wait.
    pub fn start_write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<u64> {
        self.request(1, 0, offset, data.len() as u32, data)
    }

    /// Sends a write that is on stable storage when it is acknowledged (FUA), and does not wait.
    pub fn start_write_through(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<u64> {
        self.request(1, 1, offset, data.len() as u32, data)
    }

    /// Sends a read and does not wait.
    pub fn start_read(&mut self, offset: u64, length: u32) -> anyhow::Result<u64> {
        self.request(0, 0, offset, length, &[])
    }

    /// The next reply that carries no data; `None` if none comes in time.
    pub fn reply(&mut self) -> anyhow::Result<Option<Reply>> {
        let mut bytes = [0; 16];
        match self.stream.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        ensure!(bytes[..4] == 0x6744_6698u32.to_be_bytes(), "not a simple reply");
        let error = u32::from_be_bytes(bytes[4..8].try_into()?);
        Ok(Some(Reply { cookie: u64::from_be_bytes(bytes[8..].try_into()?), error }))
    }

    fn done(&mut self, cookie: u64) -> anyhow::Result<()> {
        let reply = self.reply()?.context("no reply in time")?;
        ensure!(reply.cookie == cookie && reply.error == 0, "{reply:?}");
        Ok(())
    }

    /// Writes and waits.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        let cookie = self.start_write(offset, data)?;
        self.done(cookie)
    }

    /// Flushes and waits.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        let cookie = self.request(3, 0, 0, 0, &[])?;
        self.done(cookie)
    }

    /// Zeroes a range and waits.
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> anyhow::Result<()> {
        let cookie = self.request(6, 0, offset, length, &[])?;
        self.done(cookie)
    }

    /// Discards a range and waits.
    pub fn trim(&mut self, offset: u64, length: u32) -> anyhow::Result<()> {
        let cookie = self.request(4, 0, offset, length, &[])?;
        self.done(cookie)
    }

    /// Reads and waits.
    pub fn read(&mut self, offset: u64, length: u32) -> anyhow::Result<Vec<u8>> {
        let cookie = self.start_read(offset, length)?;
        self.done(cookie)?;
        self.data(length)
    }

    /// What follows the reply to a read.
    pub fn data(&mut self, length: u32) -> anyhow::Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}
