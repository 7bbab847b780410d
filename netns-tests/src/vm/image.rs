//! The initramfs: what the machine finds at its start, all in memory.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{
    Job,
    find::{Tools, libraries_of},
    kernel::{Kernel, run},
};

/// The line with which the program's output ends; its exit code follows.
pub const ENDED: &str = "MESHSPAN-VM-ENDED ";
/// The serial line that carries the program's output; the first one is the kernel's console.
const OUTPUT: &str = "/dev/ttyS1";

/// A program and the libraries it needs.
#[derive(Debug)]
pub struct Program {
    file: PathBuf,
    libraries: Vec<PathBuf>,
}

impl Program {
    pub fn of(file: &Path) -> Result<Self> {
        Ok(Self { file: file.to_owned(), libraries: libraries_of(file)? })
    }

    fn name(&self) -> Result<String> {
        let name = self.file.file_name().context("a program has a name")?;
        Ok(name.to_string_lossy().into_owned())
    }
}

/// Makes it anew: programs change, and it takes a moment.
pub fn build(dir: &Path, tools: &Tools, kernel: &Kernel, programs: &[Program], job: &Job) -> Result<PathBuf> {
    let root = tempfile::Builder::new().prefix("root-").tempdir_in(dir)?;
    let root = root.path();
    for place in ["bin", "dev", "proc", "sys", "tmp", "run", "etc", "var/lib", "modules", "root"] {
        fs::create_dir_all(root.join(place))?;
    }
    fs::copy(&tools.busybox, root.join("bin/busybox")).context("cannot copy busybox")?;
    let mut modules = Vec::new();
    for module in kernel.load_order(job.modules)? {
        let name = module.file_name().context("a module has a name")?.to_string_lossy().into_owned();
        fs::copy(&module, root.join("modules").join(&name))
            .with_context(|| format!("cannot copy {}", module.display()))?;
        modules.push(name);
    }
    for program in programs {
        let to = root.join("bin").join(program.name()?);
        match &tools.strip {
            Some(strip) => run(Command::new(strip).arg("-o").arg(&to).arg(&program.file)).map(drop)?,
            None => fs::copy(&program.file, &to).map(drop).context("cannot copy a program")?,
        }
    }
    let libraries: BTreeSet<&PathBuf> = programs.iter().flat_map(|program| &program.libraries).collect();
    for library in libraries {
        let to = root.join(library.strip_prefix("/").unwrap_or(library));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(library, &to).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    let first = programs.first().context("a job has a program")?.name()?;
    let init = root.join("init");
    fs::write(&init, init_script(&modules, &first, &job.arguments))?;
    fs::set_permissions(&init, Permissions::from_mode(0o755))?;
    let image = dir.join("initramfs.cpio");
    pack(tools, root, &image)?;
    Ok(image)
}

/// What runs first. Arguments come from this crate and need no quotes but these.
fn init_script(modules: &[String], program: &str, arguments: &[String]) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         b=/bin/busybox\n\
         $b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev\n\
         $b mount -t tmpfs tmp /tmp; $b mount -t tmpfs run /run\n\
         export PATH=/bin HOME=/root MESHSPAN_BIN_DIR=/bin\n\
         $b ip link set lo up\n",
    );
    for module in modules {
        // One that fails is seen on the console, and by what needs it.
        let _ = writeln!(script, "$b insmod /modules/{module}");
    }
    let arguments: String = arguments.iter().map(|argument| format!(" '{argument}'")).collect();
    let _ = writeln!(
        script,
        "$b mkdir -p /dev/net; [ -e /dev/net/tun ] || $b mknod /dev/net/tun c 10 200\n\
         $b stty -F {OUTPUT} raw\n\
         /bin/{program}{arguments} >{OUTPUT} 2>&1 </dev/null\n\
         echo \"{ENDED}$?\" >{OUTPUT}\n\
         $b poweroff -f"
    );
    script
}

fn pack(tools: &Tools, root: &Path, image: &Path) -> Result<()> {
    let mut names = Vec::new();
    list(root, Path::new(""), &mut names)?;
    let mut cpio = Command::new(&tools.cpio)
        .args(["--quiet", "--create", "--format=newc", "--null", "--owner=0:0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(File::create(image).with_context(|| format!("cannot write {}", image.display()))?)
        .spawn()
        .context("cannot run cpio")?;
    let mut stdin = cpio.stdin.take().context("cpio takes a list")?;
    for name in names {
        stdin.write_all(name.as_os_str().as_encoded_bytes())?;
        stdin.write_all(&[0])?;
    }
    drop(stdin);
    let status = cpio.wait()?;
    ensure!(status.success(), "cpio ended with {status}");
    Ok(())
}

/// Everything below, directories before what is in them.
fn list(root: &Path, below: &Path, names: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = fs::read_dir(root.join(below))?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = below.join(entry.file_name());
        names.push(name.clone());
        if entry.file_type()?.is_dir() {
            list(root, &name, names)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_before_the_program_runs_and_its_end_is_told() {
        let script = init_script(&["a.ko".into(), "b.ko".into()], "kernel-vm", &["--inside".into()]);
        let at = |text: &str| script.find(text).unwrap_or(usize::MAX);
        assert!(at("insmod /modules/a.ko") < at("insmod /modules/b.ko"));
        assert!(at("insmod /modules/b.ko") < at("/bin/kernel-vm '--inside' >/dev/ttyS1 2>&1"));
        assert!(at("'--inside'") < at(ENDED) && at(ENDED) < at("poweroff"));
    }
}
