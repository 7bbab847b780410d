//! Secrets that stand in files of their own: the cluster secret and preshared keys.
//!
//! A file that others can read is refused, and no error shows what is in it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mesh_common::config::SecretSource;
use mesh_common::key::{ClusterSecret, ParseSecretError, PresharedKey};
use zeroize::Zeroizing;

#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    #[error("the {what} file {} is not there: run `mesh-agent join`, or restore the file", file.display())]
    Missing { what: &'static str, file: PathBuf },
    #[error("the {what} file {} cannot be read: run as root, or as the owner of the file", file.display())]
    Unreadable { what: &'static str, file: PathBuf, source: io::Error },
    #[error(
        "the {what} file {0} can be read by everyone (mode {mode:o}): chmod 600 {0}, and change the secret if others use this machine",
        file.display()
    )]
    Exposed { what: &'static str, file: PathBuf, mode: u32 },
    #[error(
        "the {what} in {} is wrong: {reason}. Copy the file again from a node of the cluster, or run `mesh-agent join --replace`",
        file.display()
    )]
    Wrong { what: &'static str, file: PathBuf, reason: ParseSecretError },
}

/// The cluster secret, from wherever the configuration says it is.
pub fn cluster_secret(source: &SecretSource) -> Result<ClusterSecret, SecretFileError> {
    match source {
        SecretSource::Inline(secret) => Ok(secret.clone()),
        SecretSource::File(file) => read_key("cluster secret", file),
    }
}

/// A WireGuard preshared key: base64 of 32 bytes.
pub fn preshared_key(file: &Path) -> Result<PresharedKey, SecretFileError> {
    read_key("preshared key", file).map(|key| PresharedKey(*key.as_bytes()))
}

fn read_key(what: &'static str, file: &Path) -> Result<ClusterSecret, SecretFileError> {
    let file_name = || file.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => SecretFileError::Missing { what, file: file_name() },
        _ => SecretFileError::Unreadable { what, file: file_name(), source },
    };
    let mode = fs::metadata(file).map_err(failed)?.mode() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(SecretFileError::Exposed { what, file: file_name(), mode });
    }
    let bytes = Zeroizing::new(fs::read(file).map_err(failed)?);
    let wrong = |reason| SecretFileError::Wrong { what, file: file_name(), reason };
    let text = str::from_utf8(&bytes).map_err(|_| wrong(ParseSecretError::NotBase64))?;
    ClusterSecret::parse(text).map_err(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn each_bad_secret_file_is_named_with_its_fix_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cluster.secret");
        let source = SecretSource::File(file.clone());
        let shown = file.display().to_string();
        let error = || cluster_secret(&source).unwrap_err().to_string();
        assert_eq!(
            error(),
            format!("the cluster secret file {shown} is not there: run `mesh-agent join`, or restore the file")
        );

        crate::durable::replace(&file, b"Y2FuYXJ5LWNhbmFyeQ==\n", 0o600).unwrap();
        let expected = format!(
            "the cluster secret in {shown} is wrong: it holds 13 bytes, a cluster secret is exactly 32. \
             Copy the file again from a node of the cluster, or run `mesh-agent join --replace`"
        );
        assert_eq!(error(), expected);

        let secret = ClusterSecret::from_bytes(*b"canary-canary-canary-canary-0123");
        crate::durable::replace(&file, secret.to_text().as_bytes(), 0o600).unwrap();
        assert_eq!(cluster_secret(&source).unwrap(), secret);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(error().starts_with(&format!(
            "the cluster secret file {shown} can be read by everyone (mode 644): chmod 600 {shown}"
        )));
    }
}
