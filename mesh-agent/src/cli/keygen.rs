//! WireGuard keys for devices that have no agent.

use std::io::{self, Read};

use anyhow::{Context, anyhow};
use data_encoding::BASE64;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::print;

/// The longest input that is read, in bytes: a key and some white space.
const MAX_INPUT: u64 = 1024;

pub(super) fn keygen(public: bool) -> anyhow::Result<u8> {
    if public {
        let mut text = Zeroizing::new(String::new());
        io::stdin().take(MAX_INPUT).read_to_string(&mut text).context("standard input cannot be read")?;
        let bytes = Zeroizing::new(BASE64.decode(text.trim().as_bytes()).unwrap_or_default());
        let seed: [u8; 32] = bytes
            .as_slice()
            .try_into()
            .map_err(|_| anyhow!("standard input is no WireGuard private key: it must be base64 of 32 bytes"))?;
        return print(&format!("{}\n", public_of(&Zeroizing::new(seed))));
    }
    let mut key = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *key).map_err(|error| anyhow!("the system gives no randomness: {error}"))?;
    // The form that `wg genkey` gives: clamped.
    key[0] &= 248;
    key[31] = (key[31] & 127) | 64;
    eprintln!("{}", public_of(&key));
    let text = Zeroizing::new(BASE64.encode(&*key) + "\n");
    print(&text)
}

fn public_of(key: &[u8; 32]) -> String {
    BASE64.encode(PublicKey::from(&StaticSecret::from(*key)).as_bytes())
}
