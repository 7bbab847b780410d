//! Debian's cloud kernel: fetched by apt, unpacked and never installed; its modules with their order.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::find::Tools;

/// Depends on the newest kernel of its release.
const PACKAGE: &str = "linux-image-cloud-amd64";

#[derive(Debug)]
pub struct Kernel {
    pub image: PathBuf,
    pub release: String,
    modules: PathBuf,
}

impl Kernel {
    /// The kernel of an earlier run, or of a package that is fetched now.
    pub fn prepare(dir: &Path, tools: &Tools) -> Result<Self> {
        let root = dir.join("kernel");
        if let Some(kernel) = Self::unpacked(&root) {
            return Ok(kernel);
        }
        let new = dir.join("kernel.new");
        remove(&new)?;
        fs::create_dir_all(&new)?;
        let package = fetch(&new).with_context(|| {
            format!("cannot fetch Debian's {PACKAGE}: apt-get update && apt-get download {PACKAGE}")
        })?;
        run(Command::new("dpkg").arg("-x").arg(&package).arg(&new))?;
        fs::remove_file(&package)?;
        let kernel = Self::unpacked(&new).with_context(|| format!("{} holds no kernel", package.display()))?;
        let lib = fs::read_dir(&new)?.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
        ensure!(lib.iter().any(|name| name == "lib"), "{} holds no modules", package.display());
        run(Command::new(&tools.depmod).arg("-b").arg(&new).arg(&kernel.release))?;
        remove(&root)?;
        fs::rename(&new, &root)?;
        Self::unpacked(&root).context("the kernel that was just unpacked is gone")
    }

    fn unpacked(root: &Path) -> Option<Self> {
        let image = fs::read_dir(root.join("boot")).ok()?.flatten().find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((entry.path(), name.strip_prefix("vmlinuz-")?.to_owned()))
        });
        let (image, release) = image?;
        let modules = root.join("lib/modules").join(&release);
        modules.is_dir().then_some(Self { image, release, modules })
    }

    /// Files of these modules and of all they depend on, each after what it needs. Unknown names are left out: built in, or
    /// not there at all, which shows when they are used.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let list = self.modules.join("modules.dep");
        let text = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        Ok(order(&text, wanted)?.into_iter().map(|module| self.modules.join(module)).collect())
    }
}

/// `modules.dep` has a line a module: `path: path of what it needs, nearest first`.
fn order(text: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut ordered: Vec<String> = Vec::new();
    let mut known = BTreeSet::new();
    for name in wanted {
        let named = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == *name)
        };
        let Some((path, needed)) = text.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| named(path))
        else {
            continue;
        };
        for module in needed.split_whitespace().rev().chain([path]) {
            ensure!(
                !module.ends_with(".xz") && !module.ends_with(".zst"),
                "{module} is compressed: busybox cannot load it"
            );
            if known.insert(module.to_owned()) {
                ordered.push(module.to_owned());
            }
        }
    }
    Ok(ordered)
}

fn fetch(into: &Path) -> Result<PathBuf> {
    let package = match download(into) {
        Ok(package) => package,
        // A new machine has no lists, and old lists name what is not there any more.
        Err(_) => {
            run(Command::new("apt-get").args(["update", "-qq"]))?;
            download(into)?
        }
    };
    let file = fs::read_dir(into)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "deb"));
    file.with_context(|| format!("apt-get download brought no {package}"))
}

fn download(into: &Path) -> Result<String> {
    let package = newest()?;
    eprintln!("fetching {package}");
    run(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(into))?;
    Ok(package)
}

/// The package with the files: the one asked for only depends on it.
fn newest() -> Result<String> {
    let said = run(Command::new("apt-cache").args(["depends", "--important", PACKAGE]))?;
    let depends = said.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    depends.map(str::to_owned).with_context(|| format!("apt knows no {PACKAGE}"))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Runs a command that must succeed and gives its output.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LIST: &str = "kernel/net/wireguard.ko: kernel/net/udp_tunnel.ko kernel/crypto/curve.ko kernel/crypto/base.ko\n\
                        kernel/crypto/curve.ko: kernel/crypto/base.ko\nkernel/crypto/base.ko:\n\
                        kernel/net/udp_tunnel.ko:\nkernel/net/nft-x.ko: kernel/crypto/base.ko\n";

    #[test]
    fn each_module_comes_once_and_after_what_it_needs() {
        let order = order(LIST, &["wireguard", "built_in", "nft_x"]).unwrap();
        let expected = [
            "kernel/crypto/base.ko",
            "kernel/crypto/curve.ko",
            "kernel/net/udp_tunnel.ko",
            "kernel/net/wireguard.ko",
            "kernel/net/nft-x.ko",
        ];
        assert_eq!(order, expected);
    }
}
