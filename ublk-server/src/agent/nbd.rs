//! NBD listeners and negotiations; the I/O thread gets the finished socket.

use super::Input;
use crate::frontend::nbd::{ExportInfo, Exports, Negotiation, Outcome, Session};
use anyhow::Context;
use mirror_net::ids::DeviceId;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// For a whole negotiation.
const PATIENCE: Duration = Duration::from_secs(10);
/// Negotiations under way at a time.
const NEGOTIATIONS_MAX: usize = 64;

/// A client whose negotiation is done.
pub(crate) struct NewClient {
    pub device: DeviceId,
    pub socket: OwnedFd,
    pub session: Session,
    pub unread: Vec<u8>,
}

/// The devices that clients may use now.
#[derive(Clone, Default)]
pub(crate) struct Shelf(Arc<Mutex<Vec<(DeviceId, ExportInfo)>>>);

impl Shelf {
    pub fn add(&self, device: DeviceId, info: ExportInfo) {
        let mut shelf = self.0.lock().expect("never poisoned");
        shelf.retain(|(other, _)| *other != device);
        shelf.push((device, info));
    }

    /// Whoever connects from now on sees that size; NBD has no word for those who have connected.
    pub fn grow(&self, device: DeviceId, size: u64) {
        let mut shelf = self.0.lock().expect("never poisoned");
        for (_, info) in shelf.iter_mut().filter(|(other, _)| *other == device) {
            info.size = size;
        }
    }

    pub fn remove(&self, device: DeviceId) {
        self.0.lock().expect("never poisoned").retain(|(other, _)| *other != device);
    }

    fn device(&self, name: &str) -> Option<DeviceId> {
        let shelf = self.0.lock().expect("never poisoned");
        shelf.iter().find(|(_, info)| info.name == name).map(|(device, _)| *device)
    }
}

impl Exports for Shelf {
    fn list(&self) -> Vec<String> {
        self.0.lock().expect("never poisoned").iter().map(|(_, info)| info.name.clone()).collect()
    }

    fn get(&self, name: &str) -> Option<ExportInfo> {
        let shelf = self.0.lock().expect("never poisoned");
        shelf.iter().find(|(_, info)| info.name == name).map(|(_, info)| info.clone())
    }
}

/// Where clients connect.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Address {
    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

/// Listens on a unix socket; one that an earlier process left behind is replaced.
pub(crate) fn listen_unix(
    path: &Path,
    shelf: Shelf,
    inputs: mpsc::UnboundedSender<Input>,
) -> anyhow::Result<Address> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("{} is in use by another program", path.display());
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let places = Arc::new(Semaphore::new(NEGOTIATIONS_MAX));
    tokio::spawn(async move {
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => serve(stream, place, &shelf, &inputs),
                Err(error) => pause(&error).await,
            }
        }
    });
    Ok(Address::Unix(path.to_owned()))
}

/// Listens on a TCP address.
pub(crate) async fn listen_tcp(
    address: SocketAddr,
    shelf: Shelf,
    inputs: mpsc::UnboundedSender<Input>,
) -> anyhow::Result<Address> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen for NBD clients on {address}: is another program using it?")
    })?;
    let address = listener.local_addr()?;
    let places = Arc::new(Semaphore::new(NEGOTIATIONS_MAX));
    tokio::spawn(async move {
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Replies are gathered by us; waiting for more only delays them.
                    if stream.set_nodelay(true).is_ok() {
                        serve(stream, place, &shelf, &inputs);
                    }
                }
                Err(error) => pause(&error).await,
            }
        }
    });
    Ok(Address::Tcp(address))
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "accepting an NBD client");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// A stream that can be given to the ring.
trait IntoSocket {
    fn into_socket(self) -> io::Result<OwnedFd>;
}

impl IntoSocket for UnixStream {
    fn into_socket(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

impl IntoSocket for TcpStream {
    fn into_socket(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

fn serve<S>(
    stream: S,
    place: tokio::sync::OwnedSemaphorePermit,
    shelf: &Shelf,
    inputs: &mpsc::UnboundedSender<Input>,
) where
    S: AsyncRead + AsyncWrite + IntoSocket + Unpin + Send + 'static,
{
    let (shelf, inputs) = (shelf.clone(), inputs.clone());
    tokio::spawn(async move {
        match tokio::time::timeout(PATIENCE, negotiate(stream, &shelf)).await {
            Ok(Ok(Some(client))) => {
                // Nobody listening means that the process is ending.
                let _ = inputs.send(Input::NbdClient(client));
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "an NBD client left"),
            Err(_) => tracing::debug!("an NBD client did not finish its negotiation"),
        }
        drop(place);
    });
}

async fn negotiate<S>(mut stream: S, shelf: &Shelf) -> io::Result<Option<NewClient>>
where
    S: AsyncRead + AsyncWrite + IntoSocket + Unpin,
{
    let mut negotiation = Negotiation::new();
    let mut bytes = Vec::new();
    loop {
        let pending = negotiation.pending().to_vec();
        stream.write_all(&pending).await?;
        negotiation.sent(pending.len());
        match negotiation.outcome() {
            Outcome::Transmit(session) => {
                let session = session.clone();
                let Some(device) = shelf.device(&session.export.name) else { return Ok(None) };
                let socket = stream.into_socket()?;
                return Ok(Some(NewClient { device, socket, session, unread: bytes }));
            }
            Outcome::Closed(_) => return Ok(None),
            Outcome::Continue => {}
        }
        let used = negotiation.handle(&bytes, shelf);
        bytes.drain(..used);
        if used == 0 && negotiation.pending().is_empty() && matches!(negotiation.outcome(), Outcome::Continue)
        {
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).await?;
            if count == 0 {
                return Ok(None);
            }
            bytes.extend_from_slice(&chunk[..count]);
        }
    }
}
