//! Rules of the old iptables, which nftables does not list, read from what `iptables -S` prints into [`super::ruleset`].

use std::process::{Command, Stdio};

use super::ruleset::{Base, Chain, Comparison, Field, Hook, Operand, Range, Rule, Table, Test, Verdict};

/// Bits of connection tracking, as nftables has them.
const STATES: [(&str, u32); 5] = [("INVALID", 1), ("ESTABLISHED", 2), ("RELATED", 4), ("NEW", 8), ("UNTRACKED", 64)];

/// What `iptables -S` says, or why nobody can ask it. Only where the kernel has such a table already: asking would make one.
pub(super) fn rules(program: &str) -> Result<String, String> {
    let run = |name: &str, argument| Command::new(name).arg(argument).stdin(Stdio::null()).output();
    let legacy = format!("{program}-legacy");
    if let Ok(output) = run(&legacy, "-S") {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let is_legacy =
        run(program, "-V").is_ok_and(|output| !String::from_utf8_lossy(&output.stdout).contains("nf_tables"));
    match run(program, "-S") {
        Ok(output) if is_legacy => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => Err(format!("the kernel has rules of the old {program}, and {legacy} is not there to list them")),
    }
}

/// The filter table that these lines describe. A line that says something else says nothing.
pub(super) fn parse(text: &str) -> Table {
    let mut table = Table::default();
    for line in text.lines() {
        let words = words(line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["-P", chain, policy] => {
                let hook = match *chain {
                    "INPUT" => Some(Hook::Input),
                    "FORWARD" => Some(Hook::Forward),
                    _ => None,
                };
                let base = hook.map(|hook| Base { hook, drops: *policy == "DROP" });
                table.chains.insert((*chain).to_owned(), Chain { base, rules: Vec::new() });
            }
            ["-N", chain] => drop(table.chains.insert((*chain).to_owned(), Chain::default())),
            ["-A", chain, rest @ ..] => {
                if let Some(chain) = table.chains.get_mut(*chain) {
                    chain.rules.push(rule(rest));
                }
            }
            _ => {}
        }
    }
    table
}

fn rule(mut words: &[&str]) -> Rule {
    let mut rule = Rule::default();
    loop {
        let inverted = words.first() == Some(&"!");
        if inverted {
            words = &words[1..];
        }
        let [option, rest @ ..] = words else { return rule };
        let count = rest.iter().take_while(|word| !word.starts_with('-') && **word != "!").count();
        let (values, next) = rest.split_at(count);
        words = next;
        let first = values.first().copied().unwrap_or_default();
        let test = match *option {
            "-i" => link(Field::InputName, first),
            "-o" => link(Field::OutputName, first),
            "-p" => protocol(first),
            "--dport" | "--dports" => port_list(first),
            "--ctstate" | "--state" => states(first),
            "-j" | "-g" => {
                rule.verdict = verdict(option, first);
                continue;
            }
            // They only bring their options along.
            "-m" if matches!(first, "udp" | "tcp" | "comment" | "conntrack" | "state" | "multiport") => continue,
            "--comment" | "--reject-with" => continue,
            _ => Test::Unknown,
        };
        rule.tests.push(if inverted { invert(test) } else { test });
    }
}

fn verdict(option: &str, target: &str) -> Verdict {
    match target {
        "ACCEPT" | "NFQUEUE" => Verdict::Accept,
        "DROP" | "REJECT" => Verdict::Drop,
        "RETURN" => Verdict::Return,
        // Of targets that only note something there is no chain, and nothing follows from them.
        chain if option == "-g" => Verdict::Goto(chain.to_owned()),
        chain => Verdict::Jump(chain.to_owned()),
    }
}

fn link(field: Field, name: &str) -> Test {
    let mut data = name.trim_end_matches('+').as_bytes().to_vec();
    if !name.ends_with('+') {
        data.resize(field.length(), 0);
    }
    Test::Of(Operand { field, mask: None }, Comparison::Equal(data))
}

fn protocol(name: &str) -> Test {
    let number = match name {
        "icmp" => Some(1),
        "tcp" => Some(6),
        "udp" => Some(17),
        "ipv6-icmp" => Some(58),
        other => other.parse().ok(),
    };
    let test = |number| Test::Of(Operand { field: Field::Protocol, mask: None }, Comparison::Equal(vec![number]));
    number.map_or(Test::Unknown, test)
}

fn port_list(list: &str) -> Test {
    let range = |range: &str| -> Option<Range> {
        let (from, to) = range.split_once(':').unwrap_or((range, range));
        let port = |text: &str| Some(text.parse::<u16>().ok()?.to_be_bytes().to_vec());
        Some((port(from)?, port(to)?))
    };
    let ranges: Option<Vec<Range>> = list.split(',').map(range).collect();
    let operand = Operand { field: Field::DestinationPort, mask: None };
    ranges.map_or(Test::Unknown, |ranges| Test::Of(operand, Comparison::In(ranges)))
}

fn states(list: &str) -> Test {
    let mask = list.split(',').map(|name| STATES.iter().find(|(state, _)| *state == name).map_or(0, |(_, bit)| *bit));
    let mask = mask.fold(0, |mask: u32, bit| mask | bit).to_ne_bytes().to_vec();
    let operand = Operand { field: Field::Connection, mask: Some(mask) };
    Test::Of(operand, Comparison::NotEqual(vec![0; 4]))
}

fn invert(test: Test) -> Test {
    let Test::Of(operand, comparison) = test else { return Test::Unknown };
    let inverted = match comparison {
        Comparison::Equal(data) => Comparison::NotEqual(data),
        Comparison::NotEqual(data) => Comparison::Equal(data),
        Comparison::In(ranges) => Comparison::NotIn(ranges),
        _ => return Test::Unknown,
    };
    Test::Of(operand, inverted)
}

/// Splits as a shell does, as far as comments need it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}
