//! How a token comes in: from a file, from standard input, from a hidden prompt; never from the arguments.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context;
use mesh_common::token::looks_like_token;
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use super::exit::UsageError;

/// The longest input that is read, in bytes: above the longest token.
const MAX_INPUT: u64 = 32 * 1024;
const CTRL_C: u8 = 3;

/// Refuses the whole command line when a token is in it: every user of the machine can read it there.
pub(super) fn refuse_tokens_in(arguments: &[OsString]) -> Result<(), UsageError> {
    let values = arguments.iter().skip(1).filter_map(|argument| argument.to_str());
    // `--flag=value` hides a value from the front.
    let mut values = values.flat_map(|argument| [argument, argument.split_once('=').map_or("", |(_, value)| value)]);
    if values.any(looks_like_token) {
        return Err(UsageError(
            "a token on the command line can be read by every user of this machine. Give it in a file \
             (`mesh-agent join FILE`), on standard input (`mesh-agent join - < FILE`), or at the hidden prompt \
             (`mesh-agent join`)"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Reads a token: from the file, from standard input for `-` or when nobody sits there, else from a hidden prompt.
pub(super) fn read(file: Option<&Path>, what: &str) -> anyhow::Result<Zeroizing<String>> {
    match file {
        Some(file) if file != Path::new("-") => {
            let opened =
                File::open(file).with_context(|| format!("the token file {} cannot be read", file.display()))?;
            text_of(opened).with_context(|| format!("the token file {} cannot be read", file.display()))
        }
        None if io::stdin().is_terminal() => prompt(what),
        _ => text_of(io::stdin()).context("standard input cannot be read"),
    }
}

fn text_of(source: impl Read) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    source.take(MAX_INPUT).read_to_string(&mut text)?;
    Ok(text)
}

/// Asks for a token on the terminal without showing it.
fn prompt(what: &str) -> anyhow::Result<Zeroizing<String>> {
    let stdin = io::stdin();
    let mut stderr = io::stderr();
    let mut line = Zeroizing::new(String::new());
    {
        // Before the question: hiding drops what was typed until then.
        let _hidden = Hidden::start(&stdin)?;
        write!(stderr, "Paste the {what} (it is not shown), then press Enter: ")?;
        stderr.flush()?;
        stdin.read_line(&mut line)?;
    }
    writeln!(stderr)?;
    anyhow::ensure!(!line.as_bytes().contains(&CTRL_C), "interrupted: nothing was changed");
    Ok(line)
}

/// A terminal that shows nothing, until this is dropped.
struct Hidden<'t> {
    terminal: &'t io::Stdin,
    before: Termios,
}

impl<'t> Hidden<'t> {
    fn start(terminal: &'t io::Stdin) -> nix::Result<Self> {
        let before = tcgetattr(terminal.as_fd())?;
        let mut hidden = before.clone();
        // Ctrl-C ends the line instead of the process, so that the terminal is always set back.
        hidden.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG);
        hidden.control_chars[SpecialCharacterIndices::VEOL as usize] = CTRL_C;
        tcsetattr(terminal.as_fd(), SetArg::TCSAFLUSH, &hidden)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal.as_fd(), SetArg::TCSAFLUSH, &self.before);
    }
}
