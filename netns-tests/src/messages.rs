//! What a user is told when something is wrong: one row a situation, held by `tests/labs/bad_input.rs` with the real programs.
//!
//! Invariant: a row says the whole message, with `{name}` where a value stands that differs from machine to machine, and
//! every message names the object and the fix.

/// One situation and its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What is wrong, in words of a user.
    pub when: &'static str,
    /// The exit code of the command that says it; `None` for what a running agent tells in its log or in `status`.
    pub exit: Option<i32>,
    /// The message, `{…}` for values.
    pub text: &'static str,
}

impl Message {
    /// Is this message part of what was said? A value is any text of one line.
    pub fn is_in(&self, said: &str) -> bool {
        said.lines().any(|line| self.is_in_line(line))
    }

    fn is_in_line(&self, line: &str) -> bool {
        let mut parts = pieces(self.text);
        let Some(first) = parts.next() else { return false };
        let tail: Vec<&str> = parts.collect();
        line.match_indices(first).any(|(at, _)| {
            let mut rest = &line[at + first.len()..];
            tail.iter().all(|piece| match rest.find(piece) {
                // A value is never empty.
                Some(at) if at > 0 || piece.is_empty() => {
                    rest = &rest[at + piece.len()..];
                    true
                }
                _ => false,
            })
        })
    }
}

/// The fixed texts between the values.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    text.split('{')
        .enumerate()
        .map(|(n, piece)| if n == 0 { piece } else { piece.split_once('}').map_or("", |(_, rest)| rest) })
}

/// Every message, in the order of a node's life: joining, starting, reaching servers, hearing from others.
pub const ALL: &[Message] = &[
    NO_CONFIG,
    NEVER_JOINED,
    SECRET_MISSING,
    SECRET_SHORT,
    UNKNOWN_KEY,
    DEFAULT_ROUTE,
    STATE_IN_USE,
    STATE_OF_ANOTHER,
    IDENTITY_CUT,
    FILE_CUT,
    CACHE_LOST,
    PORT_IN_USE,
    NO_TUN,
    NO_CAPABILITY,
    CLEANUP_NOT_PERMITTED,
    NOT_RUNNING,
    WRONG_SECRET,
    WRONG_PIN,
    NO_SERVER,
    NOT_TLS,
    GARBAGE,
];

pub const NO_CONFIG: Message = Message {
    when: "`run` without a configuration",
    exit: Some(1),
    text: "this machine has no config ({file}): run `mesh-agent init` or `mesh-agent join`",
};
pub const NEVER_JOINED: Message = Message {
    when: "`status` on a machine that never joined",
    exit: Some(3),
    text: "this machine has no config ({file}): run `mesh-agent init` or `mesh-agent join`",
};
pub const SECRET_MISSING: Message = Message {
    when: "the secret file is missing",
    exit: Some(1),
    text: "the cluster secret file {file} is not there: run `mesh-agent join`, or restore the file",
};
pub const SECRET_SHORT: Message = Message {
    when: "the secret is too short",
    exit: Some(1),
    text: "the cluster secret in {file} is wrong: it holds {n} bytes, a cluster secret is exactly 32. Copy the file again \
           from a node of the cluster, or run `mesh-agent join --replace`",
};
pub const UNKNOWN_KEY: Message = Message {
    when: "a key of the configuration is misspelt",
    exit: Some(1),
    text: "line {n}, column {n}: unknown key `{key}` in `mesh`: did you mean `{key}`?",
};
pub const DEFAULT_ROUTE: Message = Message {
    when: "a default route is announced",
    exit: Some(1),
    text: "is 0.0.0.0/0, it is a default route: write a narrower prefix, or set mesh.allowWidePrefixes: true",
};
pub const STATE_IN_USE: Message = Message {
    when: "a second agent on the same state directory",
    exit: Some(1),
    text: "another agent (process {pid}) uses the state directory {dir}: stop it, or give --state-dir",
};
pub const STATE_OF_ANOTHER: Message = Message {
    when: "a file of the state directory belongs to another user",
    exit: Some(5),
    text: "{file} belongs to user {uid}, this agent runs as user {uid}: chown {uid} {file}, or run as the owner",
};
pub const IDENTITY_CUT: Message = Message {
    when: "the identity file is cut in half",
    exit: Some(1),
    text: "{file} is damaged ({what}): restore it from a backup, or empty {dir} to join as a new node",
};
pub const FILE_CUT: Message = Message {
    when: "another state file is cut in half",
    exit: None,
    text: "file is damaged, the generation before it is used",
};
pub const CACHE_LOST: Message = Message {
    when: "another state file and its older copy are damaged",
    exit: None,
    text: "file is damaged and dropped, its content is learned again",
};
pub const PORT_IN_USE: Message = Message {
    when: "the UDP port is taken",
    exit: Some(1),
    text: "another agent or WireGuard is on UDP port {port}: stop it or set mesh.listenPort",
};
pub const NO_TUN: Message = Message {
    when: "there is no /dev/net/tun",
    exit: Some(1),
    text: "/dev/net/tun is missing ({why}): run `modprobe tun`, or pass the device into the container \
           (`--device /dev/net/tun`)",
};
pub const NO_CAPABILITY: Message = Message {
    when: "the agent lacks CAP_NET_ADMIN",
    exit: Some(5),
    text: "no permission to make link {name}: run as root or give the agent CAP_NET_ADMIN",
};
pub const CLEANUP_NOT_PERMITTED: Message = Message {
    when: "`cleanup` lacks CAP_NET_ADMIN",
    exit: Some(5),
    text: "not permitted to remove {what}: mesh-agent needs CAP_NET_ADMIN; run it as root or by its systemd unit",
};
pub const NOT_RUNNING: Message = Message {
    when: "`status` while no agent runs",
    exit: Some(3),
    text: "no agent answers on {socket}: start it with `systemctl start mesh-agent` or `mesh-agent run`",
};
pub const WRONG_SECRET: Message = Message {
    when: "the secret is that of another cluster",
    exit: None,
    text: "no other node with this cluster secret is there: if there should be, copy {file} anew from one of them",
};
pub const WRONG_PIN: Message = Message {
    when: "the pin of the server is wrong",
    exit: None,
    text: "the server at {endpoint} has key {pin}, the configuration expects {pin}: if the server was set up anew, put its \
           new pin into the configuration; if not, somebody stands between",
};
pub const NO_SERVER: Message = Message {
    when: "nothing is at the server's address",
    exit: None,
    text: "nothing answers at {endpoint} ({why}): is the server running, is the port open for UDP and TCP?",
};
pub const NOT_TLS: Message = Message {
    when: "something else is at the server's address",
    exit: None,
    text: "{endpoint} does not speak TLS: is it a discovery server?",
};
pub const GARBAGE: Message = Message {
    when: "a server does not keep to the protocol",
    exit: None,
    text: "{endpoint} answers garbage: is it a discovery server?",
};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_message_is_found_with_its_values_and_not_without() {
        let said = "error: another agent or WireGuard is on UDP port 51872: stop it or set mesh.listenPort\n";
        assert!(PORT_IN_USE.is_in(said));
        assert!(!PORT_IN_USE.is_in(&said.replace("51872", "")));
        assert!(!PORT_IN_USE.is_in(&said.replace("stop it", "")));
        assert!(!PORT_IN_USE.is_in(""));
    }

    #[test]
    fn a_value_at_the_beginning_is_a_value_too() {
        assert!(NOT_TLS.is_in("https://a:1 does not speak TLS: is it a discovery server?"));
        assert!(!NOT_TLS.is_in("does not speak TLS: is it a discovery server"));
    }
}
