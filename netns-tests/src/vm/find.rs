//! The programs that a virtual machine takes, and what to say when one is missing.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// Installed by this command, all of it.
pub const PACKAGES: &str = "apt-get install --no-install-recommends qemu-system-x86 busybox-static cpio kmod";
/// Where administrators' programs are, although PATH may not say so.
const MORE_PLACES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// What a virtual machine cannot be made without.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error("{program} is missing (Debian package {package}): {PACKAGES}")]
    Program { program: &'static str, package: &'static str },
    #[error("busybox needs shared libraries, so it cannot start a machine: {PACKAGES}")]
    DynamicBusybox,
    #[error("the machine is x86-64 Debian's, and this is {0}")]
    Architecture(&'static str),
}

#[derive(Debug, Clone)]
pub struct Tools {
    pub qemu: PathBuf,
    pub busybox: PathBuf,
    pub cpio: PathBuf,
    pub depmod: PathBuf,
    /// Images are larger without it, nothing else.
    pub strip: Option<PathBuf>,
}

impl Tools {
    pub fn find() -> Result<Self, Missing> {
        Self::find_with(in_path)
    }

    fn find_with(find: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, Missing> {
        if env::consts::ARCH != "x86_64" {
            return Err(Missing::Architecture(env::consts::ARCH));
        }
        let need = |program, package| find(program).ok_or(Missing::Program { program, package });
        let tools = Self {
            qemu: need("qemu-system-x86_64", "qemu-system-x86")?,
            busybox: need("busybox", "busybox-static")?,
            cpio: need("cpio", "cpio")?,
            depmod: need("depmod", "kmod")?,
            strip: find("strip"),
        };
        match libraries_of(&tools.busybox) {
            Ok(libraries) if !libraries.is_empty() => Err(Missing::DynamicBusybox),
            _ => Ok(tools),
        }
    }
}

/// The shared libraries of a program, its loader with them. Empty for a static one.
pub fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let said = Command::new("ldd").arg(program).output().context("cannot run ldd (Debian package libc-bin)")?;
    let text = String::from_utf8_lossy(&said.stdout);
    let errors = String::from_utf8_lossy(&said.stderr);
    if text.contains("statically linked") || errors.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(said.status.success(), "ldd {} ended with {}: {}", program.display(), said.status, errors.trim());
    libraries(&text).with_context(|| format!("in what {} needs", program.display()))
}

/// Lines are `name => path (address)`, `path (address)` for the loader, `name (address)` for what the kernel provides.
fn libraries(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines() {
        ensure!(!line.contains("not found"), "a library is missing: {}", line.trim());
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        found.extend(path.map(PathBuf::from));
    }
    Ok(found)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(MORE_PLACES.map(PathBuf::from)).collect::<Vec<_>>();
    places.into_iter().map(|place| place.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_command_that_helps() {
        let error = Tools::find_with(|program| (program != "depmod").then(|| PathBuf::from("/nowhere"))).unwrap_err();
        assert_eq!(error, Missing::Program { program: "depmod", package: "kmod" });
        assert!(error.to_string().contains("apt-get install") && error.to_string().contains("qemu-system-x86"));
        let error = Tools::find_with(|_| None).unwrap_err().to_string();
        assert!(error.starts_with("qemu-system-x86_64 is missing"), "{error}");
    }

    #[test]
    fn libraries_are_read_as_ldd_writes_them() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f0a)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f0b)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(text).unwrap(), expected);
        assert!(libraries("\tlibx.so.1 => not found\n").is_err());
    }
}
