//! The README as tests read it: chapters, fenced blocks, code spans, and the commands in both.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The chapter that quotes errors.
pub(crate) const TROUBLES: &str = "When it does not work";

/// A fenced block.
#[derive(Debug)]
pub(crate) struct Block {
    /// Heading of the second level above it.
    pub(crate) chapter: String,
    /// Heading of the third level above it; may be empty.
    pub(crate) part: String,
    pub(crate) language: String,
    pub(crate) text: String,
}

/// One call of a program.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Command {
    pub(crate) subcommands: Vec<String>,
    /// Long ones.
    pub(crate) flags: Vec<String>,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

pub(crate) fn text() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

pub(crate) fn blocks() -> Vec<Block> {
    let text = text();
    let (mut chapter, mut part) = ("", "");
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some(language) = line.strip_prefix("```") {
            inside = !inside;
            if inside {
                let [chapter, part, language] = [chapter, part, language].map(str::to_owned);
                blocks.push(Block { chapter, part, language, text: String::new() });
            }
        } else if inside {
            let block = &mut blocks.last_mut().unwrap().text;
            if !block.is_empty() {
                block.push('\n');
            }
            block.push_str(line);
        } else if let Some(heading) = line.strip_prefix("## ") {
            (chapter, part) = (heading, "");
        } else if let Some(heading) = line.strip_prefix("### ") {
            part = heading;
        }
    }
    assert!(!inside, "a block has no end");
    blocks
}

/// Code spans outside of blocks.
fn all_spans() -> Vec<String> {
    let text = text();
    let prose = text.split("```").step_by(2).collect::<String>();
    prose.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Code spans that start like this, each once.
pub(crate) fn spans(start: &str) -> BTreeSet<String> {
    all_spans().into_iter().filter(|span| span.starts_with(start)).collect()
}

/// Every call of a program, in `sh` blocks and code spans.
pub(crate) fn commands(program: &str) -> BTreeSet<Command> {
    let shell = blocks().into_iter().filter(|block| block.language == "sh");
    let lines: Vec<String> =
        shell.flat_map(|block| block.text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    let calls: Vec<String> = lines.into_iter().chain(all_spans()).collect();
    calls
        .iter()
        .flat_map(|line| line.split(['|', '#']))
        .filter_map(|call| {
            let mut words =
                call.split_whitespace().skip_while(|word| matches!(*word, "sudo" | "ssh") || word.contains('@'));
            (words.next()? == program).then(|| words.collect::<Vec<_>>())
        })
        .map(|words| {
            let is_name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
            let first = words.iter().copied().filter(is_name).take(1);
            let second =
                words.iter().copied().skip(1).filter(is_name).take(usize::from(words.first() == Some(&"config")));
            Command {
                subcommands: first.chain(second).map(str::to_owned).collect(),
                flags: words.iter().filter(|word| word.starts_with("--")).map(|word| word.to_string()).collect(),
            }
        })
        .collect()
}

/// Both must be the same, in any order; says all differences at once.
pub(crate) fn compare(quoted: Vec<String>, said: Vec<String>) {
    let invented: Vec<_> = quoted.iter().filter(|error| !said.contains(error)).collect();
    let unquoted: Vec<_> = said.iter().filter(|error| !quoted.contains(error)).collect();
    assert!(
        invented.is_empty() && unquoted.is_empty(),
        "the README quotes what nothing says:\n\n{}\n\nand does not quote what is said:\n\n{}",
        invented.into_iter().cloned().collect::<Vec<_>>().join("\n\n"),
        unquoted.into_iter().cloned().collect::<Vec<_>>().join("\n\n"),
    );
}
