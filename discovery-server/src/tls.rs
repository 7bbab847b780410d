//! The server's TLS identity: its one file on disk, and the pin by which agents know it.
//!
//! The key is made once and never replaced: a damaged or unreadable file is an error, only a missing one is made. The pin is
//! the SHA-256 of the public key (SPKI), so a certificate may be renewed or made anew at each start without touching agents.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_common::config::Pin;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use sha2::{Digest as _, Sha256};
use tracing::warn;

use mesh_proto::wire::session::ALPN;

/// Name of the key file in the state directory: PKCS#8 PEM, mode 0600.
pub(crate) const KEY_FILE: &str = "tls.key";

/// Where the key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// The server's own key in this directory, made at the first start.
    StateDir(PathBuf),
    /// The operator's certificate chain and key, PEM.
    Files { cert: PathBuf, key: PathBuf },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("cannot read {path}: {source}: let the server's user read it")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "{path} is damaged ({reason}): restore it from a backup; a new key would be another server to every agent, so none is made. \
         To start over with a new pin, move the file away"
    )]
    DamagedKey { path: PathBuf, reason: String },
    #[error(
        "{path} is not usable ({reason}): give a PEM certificate chain with --tls-cert and its PEM private key with --tls-key"
    )]
    BadFile { path: PathBuf, reason: String },
    #[error("{cert} and {key} do not belong together: give the key this certificate was made for")]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("there is no key in {dir}: start the server once on this machine, or name its directory with --state-dir")]
    NoKey { dir: PathBuf },
    #[error("cannot make a TLS key: {0}")]
    Make(String),
}

/// A certificate with its key, and the pin of its public key.
pub(crate) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pin: Pin,
}

impl Identity {
    /// Reads the key, or makes one when there is none; a throwaway one, with a warning, where it cannot be kept.
    pub(crate) fn load_or_make(source: &KeySource) -> Result<Self, IdentityError> {
        match source {
            KeySource::Files { cert, key } => Self::from_files(cert, key),
            KeySource::StateDir(dir) => match read_own(dir)? {
                Some(key) => Self::self_signed(&key),
                None => {
                    let key = KeyPair::generate().map_err(|e| IdentityError::Make(e.to_string()))?;
                    if let Err(error) = keep(dir, &key) {
                        warn!(
                            "cannot keep a TLS key in {} ({error}): this run uses a throwaway key and the next one will have another pin; \
                             make the directory writable or choose one with --state-dir",
                            dir.display()
                        );
                    }
                    Self::self_signed(&key)
                }
            },
        }
    }

    /// Reads the key of a server that has run before; never makes one.
    pub(crate) fn load(source: &KeySource) -> Result<Self, IdentityError> {
        match source {
            KeySource::Files { cert, key } => Self::from_files(cert, key),
            KeySource::StateDir(dir) => match read_own(dir)? {
                Some(key) => Self::self_signed(&key),
                None => Err(IdentityError::NoKey { dir: dir.clone() }),
            },
        }
    }

    pub(crate) fn pin(&self) -> Pin {
        self.pin
    }

    /// A secret of this key for QUIC's stateless resets.
    pub(crate) fn reset_seed(&self) -> [u8; 32] {
        let hash = Sha256::new().chain_update(b"meshspan/v1 quic reset").chain_update(self.key.secret_der());
        hash.finalize().into()
    }

    /// TLS for the TCP port: HTTP/1.1 inside.
    pub(crate) fn https(&self) -> Result<rustls::ServerConfig, IdentityError> {
        self.config(b"http/1.1")
    }

    /// TLS for the QUIC port: the session inside.
    pub(crate) fn quic(&self) -> Result<rustls::ServerConfig, IdentityError> {
        self.config(ALPN.as_bytes())
    }

    fn config(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, IdentityError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                builder.with_no_client_auth().with_single_cert(self.chain.clone(), self.key.clone_key())
            })
            .map_err(|e| IdentityError::Make(e.to_string()))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // Every connection proves itself anew: no resumption, no 0-RTT.
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    fn self_signed(key: &KeyPair) -> Result<Self, IdentityError> {
        let make = |e: rcgen::Error| IdentityError::Make(e.to_string());
        let params = CertificateParams::new(vec!["meshspan-discovery".to_owned()]).map_err(make)?;
        let certificate = params.self_signed(key).map_err(make)?;
        let chain = vec![certificate.der().clone()];
        let pin = pin_of(&chain[0]).map_err(|e| IdentityError::Make(e.to_string()))?;
        Ok(Self { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), pin })
    }

    fn from_files(cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        let bad = |path: &Path, reason: String| IdentityError::BadFile { path: path.to_owned(), reason };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(cert)?)
            .collect::<Result<_, _>>()
            .map_err(|e| bad(cert, e.to_string()))?;
        let Some(leaf) = chain.first() else {
            return Err(bad(cert, "it holds no certificate".to_owned()));
        };
        let pin = pin_of(leaf).map_err(|e| bad(cert, e.to_string()))?;
        let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|e| bad(key, e.to_string()))?;
        let provider = rustls::crypto::ring::default_provider();
        match rustls::sign::CertifiedKey::from_der(chain.clone(), private.clone_key(), &provider) {
            Ok(_) => Ok(Self { chain, key: private, pin }),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(IdentityError::Mismatch { cert: cert.to_owned(), key: key.to_owned() })
            }
            Err(e) => Err(bad(key, e.to_string())),
        }
    }
}

fn pin_of(certificate: &CertificateDer<'_>) -> Result<Pin, rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(Pin(Sha256::digest(parsed.subject_public_key_info().as_ref()).into()))
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::Unreadable { path: path.to_owned(), source })
}

/// The key of the state directory; `None` only when there is no such file.
fn read_own(dir: &Path) -> Result<Option<KeyPair>, IdentityError> {
    let path = dir.join(KEY_FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(source) => return Err(IdentityError::Unreadable { path, source }),
    };
    let damaged = |reason: String| IdentityError::DamagedKey { path: path.clone(), reason };
    let text = String::from_utf8(bytes).map_err(|_| damaged("it is not text".to_owned()))?;
    KeyPair::from_pem(&text).map(Some).map_err(|e| damaged(e.to_string()))
}

/// Writes the key so that a crash at any moment leaves either no key or the whole one.
fn keep(dir: &Path, key: &KeyPair) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let temporary = dir.join(format!("{KEY_FILE}.new"));
    // What a killed start left behind was never anybody's key.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(key.serialize_pem().as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(KEY_FILE))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let source = KeySource::StateDir(dir.path().join("deep/state"));
        let first = Identity::load_or_make(&source).unwrap().pin();
        assert_eq!(Identity::load_or_make(&source).unwrap().pin(), first);
        assert_eq!(Identity::load(&source).unwrap().pin(), first);
        let file = dir.path().join("deep/state").join(KEY_FILE);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_key_cut_anywhere_is_an_error_that_names_the_file_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let source = KeySource::StateDir(dir.path().to_owned());
        Identity::load_or_make(&source).unwrap();
        let file = dir.path().join(KEY_FILE);
        let whole = fs::read(&file).unwrap();
        for cut in [0, 1, whole.len() / 2, whole.len() - 30] {
            fs::write(&file, &whole[..cut]).unwrap();
            let error = Identity::load_or_make(&source).err().unwrap().to_string();
            assert!(error.contains(file.to_str().unwrap()), "{error}");
            assert_eq!(fs::read(&file).unwrap(), &whole[..cut]);
        }
    }

    #[test]
    fn the_operators_files_give_the_pin_of_their_key_whatever_the_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let write = |name: &str, host: &str, key: &KeyPair| {
            let certificate = CertificateParams::new(vec![host.to_owned()]).unwrap().self_signed(key).unwrap();
            fs::write(path(name), certificate.pem()).unwrap();
        };
        write("old.pem", "a.example", &key);
        write("new.pem", "b.example", &key);
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        fs::write(path("other.pem"), other.serialize_pem()).unwrap();
        fs::write(path("empty.pem"), "").unwrap();

        let pin = |cert: &str, key: &str| {
            Identity::load(&KeySource::Files { cert: path(cert), key: path(key) })
                .map(|identity| identity.pin())
                .map_err(|e| e.to_string())
        };
        assert_eq!(pin("old.pem", "key.pem").unwrap(), pin("new.pem", "key.pem").unwrap());
        assert!(pin("old.pem", "other.pem").unwrap_err().contains("do not belong together"));
        assert!(pin("empty.pem", "key.pem").unwrap_err().contains("empty.pem"));
        assert!(pin("missing.pem", "key.pem").unwrap_err().contains("missing.pem"));
    }
}
