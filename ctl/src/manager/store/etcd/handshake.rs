//! What a member's TLS has against us.
//!
//! In TLS 1.3 the client is through before the server has looked at its certificate. What the client has written by
//! then makes the server's kernel reset the connection, and the alert that says why may be lost with it: the client of
//! etcd sees `connection closed` or `broken pipe` as often as not. Who writes nothing gets the alert.

use mirror_net::config::TlsFile;
use std::io::{Error, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// One that is there takes a connection sooner; for one that is not, a lease has no time.
const CONNECT_MAX: Duration = Duration::from_millis(100);

/// Why the member at that `https://` endpoint ends a connection on which nothing is said; `None` if it says nothing
/// of TLS, as one that is away, or one that is content.
pub(super) async fn refusal(endpoint: &str, tls: &TlsFile) -> Option<String> {
    let error = listen(endpoint, tls).await.err()?;
    error.get_ref()?.downcast_ref::<tokio_rustls::rustls::Error>().map(ToString::to_string)
}

async fn listen(endpoint: &str, tls: &TlsFile) -> Result<(), Error> {
    let address = endpoint.trim_start_matches("https://");
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(|_| ErrorKind::InvalidInput)?;
    let connector = TlsConnector::from(Arc::new(setup(tls)?));
    let stream = timeout(CONNECT_MAX, TcpStream::connect(address)).await??;
    let mut stream = connector.connect(name, stream).await?;
    // The first byte of one that is content: HTTP/2 begins with the server's settings.
    stream.read(&mut [0]).await.map(drop)
}

fn setup(tls: &TlsFile) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    // As the client of etcd does it: an authority's file may hold what is none.
    roots.add_parsable_certificates(certificates(&tls.ca)?);
    let setup = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(Error::other)?
        .with_root_certificates(roots);
    let mut setup = match &tls.identity {
        None => setup.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(Error::other)?;
            setup.with_client_auth_cert(certificates(certificate)?, key).map_err(Error::other)?
        }
    };
    setup.alpn_protocols = vec![b"h2".to_vec()];
    Ok(setup)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = CertificateDer::pem_file_iter(path).map_err(Error::other)?;
    found.collect::<Result<_, _>>().map_err(Error::other)
}
