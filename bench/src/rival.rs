//! The rivals: other implementations of WireGuard in user space, how each is found, started and asked for its version.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use netns_tests::wireguard::{Device, Peer};

use crate::bed::{Bed, End};

const PORT: u16 = 51820;
/// What stands for the name of the link in a command; at its end when it says none.
const LINK_NAME: &str = "{}";

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    pub name: String,
    program: PathBuf,
    args: Vec<String>,
}

/// One that is always looked for.
struct Known {
    name: &'static str,
    program: &'static str,
    args: &'static [&'static str],
}

const KNOWN: [Known; 4] = [
    Known { name: "wireguard-go", program: "wireguard-go", args: &["-f"] },
    Known { name: "boringtun-cli", program: "boringtun-cli", args: &["-f", "--disable-drop-privileges"] },
    Known { name: "boringtun-cli-t1", program: "boringtun-cli", args: &["-f", "--disable-drop-privileges", "-t", "1"] },
    Known { name: "gotatun", program: "gotatun", args: &["-f", "--disable-drop-privileges", "-v", "error"] },
];

/// The known rivals that are installed, in a fixed order, and the names of those that are not.
pub fn known() -> (Vec<Rival>, Vec<String>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for known in &KNOWN {
        match installed(known.program) {
            Some(program) => found.push(Rival {
                name: known.name.to_owned(),
                program,
                args: known.args.iter().map(|arg| (*arg).to_owned()).collect(),
            }),
            None => missing.push(known.name.to_owned()),
        }
    }
    (found, missing)
}

/// A known rival, or why there is none.
pub fn by_name(name: &str) -> Result<Rival> {
    let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
    ensure!(names.contains(&name), "{name} is none of {}: give a command with --rival NAME=COMMAND", names.join(", "));
    let found = known().0.into_iter().find(|rival| rival.name == name);
    found.with_context(|| format!("{name} is not installed: run `bash bench/rivals.sh`"))
}

impl Rival {
    /// From `NAME=COMMAND`; the command stays in the foreground, makes the link whose name stands for `{}` or is its last
    /// argument, and listens on `/var/run/wireguard/LINK.sock`.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, command) = text.split_once('=').context("write NAME=COMMAND")?;
        let mut words = command.split_whitespace().map(str::to_owned);
        let program = words.next().with_context(|| format!("{name}: the command is empty"))?;
        let program = if program.contains('/') {
            PathBuf::from(&program)
        } else {
            installed(&program).with_context(|| format!("{name}: {program} is not installed"))?
        };
        ensure!(!name.is_empty() && program.is_file(), "{name}: there is no program {}", program.display());
        Ok(Self { name: name.to_owned(), program, args: words.collect() })
    }

    /// What it says its version is, on one line.
    pub fn version(&self) -> String {
        // Some know the one, some the other; none starts anything when asked so.
        let output = Command::new(&self.program).arg("--version").stdin(Stdio::null()).output();
        let said = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        said.lines().next().unwrap_or("unknown").trim().to_owned()
    }

    /// Starts one on each host of the bed, each the other's peer.
    pub fn start(&self, bed: &Bed) -> Result<[Device; 2]> {
        let device = |number: u8, end: &End| -> Result<Device> {
            let link = Device::name(number);
            let stem = bed.scratch(&format!("{}-{number}", self.name));
            let device = Device::start(&end.host, self.command(&link), &link, PORT, &stem)?;
            end.address_link(&link)?;
            Ok(device)
        };
        let [left, right] = bed.ends();
        let devices = [device(1, left)?, device(2, right)?];
        let know = |device: &Device, other: &Device, at: &End| {
            device.know(&Peer { endpoint: Some(at.endpoint(PORT)), ..Peer::new(other.public, at.inner.into()) })
        };
        know(&devices[0], &devices[1], right)?;
        know(&devices[1], &devices[0], left)?;
        Ok(devices)
    }

    pub fn command(&self, link: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(self.args.iter().map(|arg| arg.replace(LINK_NAME, link)));
        if !self.args.iter().any(|arg| arg.contains(LINK_NAME)) {
            command.arg(link);
        }
        // wireguard-go reads it from there.
        command.env("LOG_LEVEL", "error");
        command
    }
}

impl std::str::FromStr for Rival {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

/// Where `rivals.sh` puts them, then PATH.
pub fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = target_dirs().into_iter().map(|target| target.join("rivals/bin"));
    own.chain(std::env::split_paths(&path)).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// The target directory that this program was built into (`TARGET/PROFILE/mesh-bench`, tests one deeper), and the
/// workspace's own.
fn target_dirs() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let of_program = program.ancestors().skip(2).take(2).map(Path::to_owned);
    of_program.chain([Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")]).collect()
}

/// Fails when one of the names is not among the contenders.
pub fn require(names: &[String], contenders: &[String]) -> Result<()> {
    let absent: Vec<&str> = names.iter().filter(|name| !contenders.contains(name)).map(String::as_str).collect();
    if !absent.is_empty() {
        bail!(
            "required and absent: {}; run `bash bench/rivals.sh`, or give a command with --rival NAME=COMMAND",
            absent.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(rival: &Rival, link: &str) -> Vec<String> {
        rival.command(link).get_args().map(|arg| arg.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_rival_of_the_users_own_gets_the_link_where_it_wants_it() {
        let last: Rival = "mine=/bin/true -x 1".parse().unwrap();
        assert_eq!((last.name.as_str(), words(&last, "wg7")), ("mine", vec!["-x".into(), "1".into(), "wg7".into()]));
        let inside: Rival = "mine=/bin/true --tun={} -f".parse().unwrap();
        assert_eq!(words(&inside, "wg7"), ["--tun=wg7", "-f"]);
    }

    #[test]
    fn what_is_no_rival_is_refused_with_its_name() {
        for (text, said) in [("mine", "NAME=COMMAND"), ("mine=", "mine"), ("mine=/no/such", "/no/such")] {
            let error = format!("{:#}", text.parse::<Rival>().unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
        assert!(format!("{:#}", by_name("nobody").unwrap_err()).contains("wireguard-go"));
    }

    #[test]
    fn what_is_required_and_absent_is_named() {
        let there = ["meshspan".to_owned(), "gotatun".to_owned()];
        require(&["gotatun".to_owned()], &there).unwrap();
        let error = require(&["gotatun".to_owned(), "wireguard-go".to_owned()], &there).unwrap_err().to_string();
        assert!(error.contains("absent: wireguard-go;"), "{error}");
    }
}
