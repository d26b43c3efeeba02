//! By what an etcd knows us, and what is the matter where it does not.

use super::super::StoreError;
use super::client::CALL_MAX;
use crate::key;
use etcd_client::{Certificate, ConnectOptions, Error, Identity, TlsOptions};
use mirror_net::config::EtcdFile;
use std::path::Path;
use std::time::Duration;

/// A member that does not answer a ping is not asked any more.
const PING_EVERY: Duration = Duration::from_millis(500);
const PING_MAX: Duration = Duration::from_millis(700);

/// How the members are connected to, from the cluster file and the files that it names.
pub(super) fn options(file: &EtcdFile) -> Result<ConnectOptions, StoreError> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CALL_MAX)
        .with_keep_alive(PING_EVERY, PING_MAX)
        .with_keep_alive_while_idle(true)
        // A member that has lost the others says so at once.
        .with_require_leader(true);
    if let Some((user, path)) = &file.user {
        options = options.with_user(user, password(path)?);
    }
    if let Some(tls) = &file.tls {
        let authority = pem("ca_file", &tls.ca, "CERTIFICATE")?;
        let mut wanted = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
        if let Some((certificate, key)) = &tls.identity {
            let certificate = pem("cert_file", certificate, "CERTIFICATE")?;
            secret(key, "use the etcd with its key")?;
            wanted = wanted.identity(Identity::from_pem(certificate, pem("key_file", key, "PRIVATE KEY")?));
        }
        options = options.with_tls(wanted);
    }
    Ok(options)
}

fn read(field: &str, path: &Path) -> Result<String, StoreError> {
    std::fs::read_to_string(path).map_err(|error| {
        StoreError::Setup(format!(
            "cannot read {}: {error}; correct `{field}` in [store] of the cluster file, or the file",
            path.display()
        ))
    })
}

fn secret(path: &Path, what: &str) -> Result<(), StoreError> {
    key::refuse_public(path, what).map_err(|failure| StoreError::Setup(failure.message))
}

fn password(path: &Path) -> Result<String, StoreError> {
    let text = read("password_file", path)?;
    secret(path, "read the etcd's password")?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(StoreError::Setup(format!("{}: is empty; write the etcd's password", path.display())));
    }
    Ok(password.to_owned())
}

/// A PEM file, which has to hold that: what is no PEM would be taken for an empty list.
fn pem(field: &str, path: &Path, what: &str) -> Result<String, StoreError> {
    let text = read(field, path)?;
    if text.contains(&format!("{what}-----")) {
        return Ok(text);
    }
    Err(StoreError::Setup(format!(
        "{}: holds no {}; `{field}` in [store] of the cluster file names a PEM file",
        path.display(),
        what.to_lowercase()
    )))
}

/// Why a member did not do what it was asked for.
pub(super) struct Trouble {
    /// One line for people; where only they can do something about it, it says what.
    pub why: String,
    /// It stays so until somebody does.
    pub refused: bool,
    /// It does not know our token any more.
    pub forgotten: bool,
    /// Nothing is known but that the connection, or the answer, was no good.
    pub obscure: bool,
}

impl Trouble {
    /// It has said nothing for so long.
    pub fn silence(limit: Duration) -> Self {
        let why = format!("no answer within {} ms", limit.as_millis());
        Self { why, refused: false, forgotten: false, obscure: false }
    }

    pub fn of(error: &Error, file: &EtcdFile) -> Self {
        // What a member has answered is all that it has to say.
        let answered =
            matches!(error, Error::GRpcStatus(status) if std::error::Error::source(status).is_none());
        let trouble = Self::of_text(text(error), file);
        Self { obscure: trouble.obscure && !answered, ..trouble }
    }

    pub fn of_text(mut why: String, file: &EtcdFile) -> Self {
        let forgotten = ["invalid auth token", "revision of auth store is old"];
        let forgotten = forgotten.iter().any(|said| why.contains(said));
        let todo = todo(&why, file);
        if let Some(todo) = &todo {
            why = format!("{why}: {todo}");
        }
        Self { why, refused: todo.is_some(), forgotten, obscure: !forgotten && todo.is_none() }
    }
}

/// What an error of the client says, for people.
fn text(error: &Error) -> String {
    let (mut text, mut cause) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), std::error::Error::source(status)),
        Error::TransportError(error) => (error.to_string(), std::error::Error::source(error)),
        error => (error.to_string(), None),
    };
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

/// What somebody has to do.
fn todo(why: &str, file: &EtcdFile) -> Option<String> {
    let says = |what: &str| why.contains(what);
    let path = |path: Option<&Path>| path.map_or_else(String::new, |path| path.display().to_string());
    let tls = file.tls.as_ref();
    let user = file.user.as_ref();
    Some(if says("authentication failed") {
        let file = path(user.map(|(_, path)| path.as_path()));
        format!("correct `user` in [store] of the cluster file, or the password in {file}")
    } else if says("user name is empty") {
        "it asks for a name and a password: write `user` and `password_file` in [store] of the cluster file"
            .into()
    } else if says("authentication is not enabled") {
        "leave `user` and `password_file` out of the cluster file, or enable authentication in the etcd"
            .into()
    } else if says("etcdserver: permission denied") {
        let who = user.map_or("the user of our certificate", |(name, _)| name);
        format!("give a role of {who} the right to read and write all that begins with {}", file.prefix)
    } else if says("invalid peer certificate") {
        let file = path(tls.map(|tls| tls.ca.as_path()));
        format!(
            "`ca_file` in [store] of the cluster file has to name the authority of its certificate, which has to be \
             for the host in `endpoints`; now it is {file}"
        )
    } else if says("fatal alert") && tls.is_some_and(|tls| tls.identity.is_none()) {
        "it asks for a certificate: write `cert_file` and `key_file` in [store] of the cluster file".into()
    } else if says("fatal alert") {
        "`cert_file` in [store] of the cluster file has to name a certificate of an authority that the etcd \
         trusts (its --trusted-ca-file)"
            .into()
    } else if says("corrupt message") && tls.is_some() {
        "it does not speak TLS: write http:// in `endpoints`, or give it a certificate".into()
    } else {
        return None;
    })
}
