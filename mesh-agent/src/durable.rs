//! Files that are either the old ones or the new ones, whatever happens in between.
//!
//! A new file is written beside the old one, synced, and renamed over it; the directory is synced last. A failure (a full
//! disk, too) leaves the old file as it was.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Puts `bytes` in place of the file with this mode; the file need not exist.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = write_temporary(path, bytes, mode)?;
    finish(fs::rename(&temporary, path), &temporary)?;
    sync_parent(path)
}

/// Like [`replace`], and the file that was there is then found at [`previous`].
pub fn replace_keeping_previous(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = write_temporary(path, bytes, mode)?;
    match fs::rename(path, previous(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return finish(Err(error), &temporary);
        }
        _ => {}
    }
    finish(fs::rename(&temporary, path), &temporary)?;
    sync_parent(path)
}

/// Where the generation before the current one is kept.
pub fn previous(path: &Path) -> PathBuf {
    with_suffix(path, ".prev")
}

/// Where a file is written before it is renamed into place; one found after a crash means nothing.
pub fn temporary(path: &Path) -> PathBuf {
    with_suffix(path, ".tmp")
}

fn write_temporary(path: &Path, bytes: &[u8], mode: u32) -> io::Result<PathBuf> {
    let temporary = temporary(path);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    // The mode of `open` is cut by the umask; this one is not.
    let written = file
        .set_permissions(Permissions::from_mode(mode))
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all());
    finish(written, &temporary)?;
    Ok(temporary)
}

/// Removes the temporary file after a failure; the failure is what matters then.
fn finish(result: io::Result<()>, temporary: &Path) -> io::Result<()> {
    if result.is_err() {
        let _ = fs::remove_file(temporary);
    }
    result
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
