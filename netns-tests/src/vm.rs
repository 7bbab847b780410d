//! A machine of its own for what the host's kernel cannot do: Debian's kernel under qemu, with our programs inside.
//!
//! ```text
//!  find   qemu, busybox, cpio, depmod, the kernel package: what is missing is named, with the command that helps
//!  kernel the package, downloaded by apt and unpacked, never installed; which modules to load, in which order
//!  image  an initramfs: busybox, modules, programs with the shared libraries that ldd names
//!  boot   qemu without acceleration; a second serial line carries what the program inside says
//! ```
//! Owns a directory under `target/`, where the unpacked kernel is kept for the next run. Refuses to know what is run inside:
//! a program with its arguments, whose output comes back line by line.

pub mod boot;
pub mod find;
pub mod image;
pub mod kernel;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};

use self::{boot::Machine, find::Tools, image::Program};

/// What is run inside.
#[derive(Debug)]
pub struct Job {
    /// The first one is run, with these arguments; the others stand beside it in `/bin`.
    pub programs: Vec<PathBuf>,
    pub arguments: Vec<String>,
    /// Kernel modules it needs; those that this kernel has built in or not at all are left out.
    pub modules: &'static [&'static str],
    pub memory_mib: u32,
    pub within: Duration,
}

/// Boots, runs the job and gives each line of its output to `line` as it comes. Fails when the machine did not run the job to
/// its end.
pub fn run(job: &Job, line: impl FnMut(&str)) -> Result<()> {
    let tools = Tools::find()?;
    let dir = cache_dir()?;
    let kernel = kernel::Kernel::prepare(&dir, &tools)?;
    let programs = job.programs.iter().map(|file| Program::of(file)).collect::<Result<Vec<_>>>()?;
    let image = image::build(&dir, &tools, &kernel, &programs, job)?;
    Machine { tools: &tools, kernel: &kernel.image, initramfs: &image, memory_mib: job.memory_mib }.run(
        &dir.join("console.log"),
        job.within,
        line,
    )
}

/// `target/kernel-vm` of whatever target directory this program was built into.
fn cache_dir() -> Result<PathBuf> {
    let dir = crate::binaries::own_target_dir()
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"))
        .join("kernel-vm");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))
}
