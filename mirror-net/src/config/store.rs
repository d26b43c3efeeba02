//! Where the manager keeps the map: the `[store]` table of the cluster file.

use super::ConfigError;
use super::parse::{Reader, Text};
use serde::Deserialize;
use std::path::PathBuf;
use toml::Spanned;

/// Where the manager keeps what must survive it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum StoreFile {
    /// In the state directory of the one machine on which it runs.
    #[default]
    File,
    /// In an etcd, which several managers share: one of them leads.
    Etcd(EtcdFile),
}

/// How an etcd is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EtcdFile {
    /// URLs of its members, `http://` or `https://`.
    pub endpoints: Vec<String>,
    /// What all keys begin with; ends with `/`.
    pub prefix: String,
    /// A name, and the file that holds its password.
    pub user: Option<(String, PathBuf)>,
    /// For `https://`; without it the members' certificates are checked by nothing that we know.
    pub tls: Option<TlsFile>,
}

/// PEM files for `https://` endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFile {
    /// The certificate authority that signed the members' certificates.
    pub ca: PathBuf,
    /// Our own certificate and its key, where the members ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStore {
    kind: Text,
    endpoints: Option<Spanned<Vec<Text>>>,
    prefix: Option<Text>,
    user: Option<Text>,
    password_file: Option<Text>,
    ca_file: Option<Text>,
    cert_file: Option<Text>,
    key_file: Option<Text>,
}

/// What is written in the text, if it is.
fn given<'a>(fields: &[(&'a str, &'a Option<Text>)]) -> Option<(&'a str, &'a Text)> {
    fields.iter().find_map(|(name, text)| text.as_ref().map(|text| (*name, text)))
}

impl Reader<'_> {
    /// `cluster`: the cluster's name.
    pub(super) fn store(
        &self,
        raw: Option<&Spanned<RawStore>>,
        cluster: &str,
    ) -> Result<StoreFile, ConfigError> {
        let Some(raw) = raw else { return Ok(StoreFile::File) };
        let store = raw.get_ref();
        let fields = [
            ("store.prefix", &store.prefix),
            ("store.user", &store.user),
            ("store.password_file", &store.password_file),
            ("store.ca_file", &store.ca_file),
            ("store.cert_file", &store.cert_file),
            ("store.key_file", &store.key_file),
        ];
        match store.kind.get_ref().as_str() {
            "file" => {
                if let Some(endpoints) = &store.endpoints {
                    return Err(self.error(endpoints, "store.endpoints", "is for kind = \"etcd\""));
                }
                match given(&fields) {
                    Some((field, at)) => Err(self.error(at, field, "is for kind = \"etcd\"")),
                    None => Ok(StoreFile::File),
                }
            }
            "etcd" => self.etcd(raw, cluster).map(StoreFile::Etcd),
            other => {
                Err(self.error(&store.kind, "store.kind", format!("{other:?} is none of \"file\", \"etcd\"")))
            }
        }
    }

    fn etcd(&self, raw: &Spanned<RawStore>, cluster: &str) -> Result<EtcdFile, ConfigError> {
        let store = raw.get_ref();
        let mut endpoints = Vec::new();
        for endpoint in store.endpoints.iter().flat_map(Spanned::get_ref) {
            endpoints.push(self.endpoint(endpoint)?);
        }
        if endpoints.is_empty() {
            return Err(self.error(
                raw,
                "store.endpoints",
                "is missing or empty; write endpoints = [\"http://10.0.0.7:2379\", …], all members of the etcd",
            ));
        }
        let prefix = match &store.prefix {
            None => format!("/ublk-mirror/{cluster}/"),
            Some(prefix) => {
                let text = prefix.get_ref();
                if !text.starts_with('/') || !text.ends_with('/') || text.len() < 2 {
                    let what =
                        format!("{text:?} does not begin and end with \"/\", such as \"/storage/lab/\"");
                    return Err(self.error(prefix, "store.prefix", what));
                }
                text.clone()
            }
        };
        let path =
            |text: &Option<Text>, field| text.as_ref().map(|text| self.path_of(text, field)).transpose();
        let password = path(&store.password_file, "store.password_file")?;
        let user = match (&store.user, password) {
            (Some(user), Some(password)) => Some((user.get_ref().clone(), password)),
            (None, None) => None,
            _ => return Err(self.error(raw, "store.user", "user and password_file belong together")),
        };
        let ca = path(&store.ca_file, "store.ca_file")?;
        let identity =
            match (path(&store.cert_file, "store.cert_file")?, path(&store.key_file, "store.key_file")?) {
                (Some(cert), Some(key)) => Some((cert, key)),
                (None, None) => None,
                _ => {
                    return Err(self.error(raw, "store.cert_file", "cert_file and key_file belong together"));
                }
            };
        let secure = endpoints[0].starts_with("https://");
        if endpoints.iter().any(|endpoint| endpoint.starts_with("https://") != secure) {
            return Err(self.error(raw, "store.endpoints", "mixes http:// and https://"));
        }
        let tls = match (secure, ca, identity) {
            (true, Some(ca), identity) => Some(TlsFile { ca, identity }),
            (false, None, None) => None,
            (true, None, _) => {
                let what = "is missing: https:// needs the certificate authority of the etcd, a PEM file";
                return Err(self.error(raw, "store.ca_file", what));
            }
            (false, ..) => {
                let what = "certificates are for endpoints that begin with https://";
                return Err(self.error(raw, "store.endpoints", what));
            }
        };
        Ok(EtcdFile { endpoints, prefix, user, tls })
    }

    /// `http://host:port`, `https://host:port`; `host:port` is the former.
    fn endpoint(&self, text: &Text) -> Result<String, ConfigError> {
        let url = text.get_ref();
        let (scheme, address) = match url.split_once("://") {
            None => ("http", url.as_str()),
            Some((scheme @ ("http" | "https"), address)) => (scheme, address),
            Some(_) => {
                let what = format!("{url:?} begins with neither http:// nor https://");
                return Err(self.error(text, "store.endpoints", what));
            }
        };
        let address = Spanned::new(text.span(), address.trim_end_matches('/').to_owned());
        Ok(format!("{scheme}://{}", self.address(&address, "store.endpoints")?))
    }
}
