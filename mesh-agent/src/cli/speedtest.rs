//! `speedtest`: what the tunnel to a peer carries, and over which path.

use std::io::IsTerminal as _;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::show::answered;
use super::{Global, Output, SpeedtestArgs, block_on, exit, print, to_json};
use crate::api::client;
use crate::speedtest::client::{Flow, RoundTrips, Test};
use crate::speedtest::lock_file;
use crate::status::path::Tier;
use crate::status::{PeerStatus, clean, trip};

/// The answer, as `-o json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Speedtest {
    peer: String,
    /// Of the peer, in the mesh.
    address: IpAddr,
    idle: RoundTrips,
    /// From this node to the peer.
    up: Flow,
    down: Flow,
    /// What carried it at the end.
    path: Carrier,
    /// Another path than at the beginning, or another one in between.
    path_changed: bool,
    path_before: Carrier,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Carrier {
    tier: Option<Tier>,
    /// The relay's server, or the address of the peer.
    endpoint: Option<String>,
    rtt_us: Option<u64>,
    mtu: Option<u16>,
    switches: u64,
}

/// Degraded when the path changed meanwhile: then the figures are of no one path.
pub(super) fn speedtest(global: &Global, args: &SpeedtestArgs) -> anyhow::Result<u8> {
    let socket = global.settings().socket;
    let look = || -> anyhow::Result<PeerStatus> {
        let status = answered(global, block_on(client::status(&socket))?)?;
        Ok(status.peer_named(&args.peer)?.clone())
    };
    let peer = look()?;
    let address = peer.overlay_v4.map(IpAddr::from).or(peer.overlay_v6.map(IpAddr::from));
    let Some(address) = address.filter(|_| peer.node_id.is_some()) else {
        anyhow::bail!("{} runs no agent that could answer a speed test", clean(&peer.host_name));
    };
    let is_watched = std::io::stderr().is_terminal();
    let say = |what: &str| {
        if is_watched {
            eprintln!("{what} …");
        }
    };
    let mut test = Test::begin(address, &lock_file(&socket))?;
    // The tunnel is up by now.
    let idle = test.idle()?;
    let before = Carrier::of(&look()?);
    say(&format!("sending to {} for {} s", clean(&peer.host_name), args.seconds));
    let up = test.up(args.seconds)?;
    say(&format!("receiving for {} s", args.seconds));
    let down = test.down(args.seconds)?;
    drop(test);
    let path = Carrier::of(&look()?);
    let result = Speedtest {
        peer: peer.host_name,
        address,
        idle,
        up,
        down,
        path_changed: (&before.tier, &before.endpoint, before.switches) != (&path.tier, &path.endpoint, path.switches),
        path,
        path_before: before,
    };
    print(&match global.output {
        Some(Output::Json) => to_json(&result)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&result)?,
        None | Some(Output::Table | Output::Wide) => result.to_lines(),
    })?;
    Ok(if result.path_changed { exit::DEGRADED } else { exit::OK })
}

impl Carrier {
    fn of(peer: &PeerStatus) -> Self {
        let path = peer.path.as_ref();
        let relay = path.and_then(|path| path.relay.clone());
        Self {
            tier: path.and_then(|path| path.tier),
            endpoint: relay.or_else(|| peer.endpoint.map(|endpoint| endpoint.to_string())),
            rtt_us: path.and_then(|path| path.rtt_us),
            mtu: path.and_then(|path| path.mtu),
            switches: path.map_or(0, |path| path.switches),
        }
    }

    fn words(&self) -> String {
        let endpoint = clean(self.endpoint.as_deref().unwrap_or("an unknown address"));
        match self.tier {
            Some(Tier::Lan) => format!("on the LAN, to {endpoint}"),
            Some(Tier::Direct) => format!("direct, to {endpoint}"),
            Some(Tier::Relay) => format!("relay, over {endpoint}"),
            None => "none".to_owned(),
        }
    }
}

impl Speedtest {
    fn to_lines(&self) -> String {
        let flow = |flow: &Flow| {
            let RoundTrips { median_us, max_us, .. } = flow.loaded;
            let trips = format!("round trip {}, at most {}", trip(median_us), trip(max_us));
            format!("{:<12}{trips}", rate(flow.bits_per_second))
        };
        let path = if self.path_changed {
            format!("changed meanwhile: {}, then {}", self.path_before.words(), self.path.words())
        } else {
            self.path.words()
        };
        format!(
            "{:<12}{} ({})\n{:<12}{path}\n{:<12}round trip {}, at most {}\n{:<12}{}\n{:<12}{}\n",
            "Peer",
            clean(&self.peer),
            self.address,
            "Path",
            "Idle",
            trip(self.idle.median_us),
            trip(self.idle.max_us),
            "To it",
            flow(&self.up),
            "From it",
            flow(&self.down),
        )
    }
}

fn rate(bits_per_second: u64) -> String {
    match bits_per_second {
        0..10_000_000 => format!("{}.{} Mbit/s", bits_per_second / 1_000_000, bits_per_second % 1_000_000 / 100_000),
        10_000_000..1_000_000_000 => format!("{} Mbit/s", bits_per_second / 1_000_000),
        _ => format!("{}.{:02} Gbit/s", bits_per_second / 1_000_000_000, bits_per_second % 1_000_000_000 / 10_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_reads() {
        let trips = |median_us| RoundTrips { count: 20, median_us, max_us: median_us * 3 };
        let flow = |bits_per_second, median_us| Flow { bytes: 1, micros: 1, bits_per_second, loaded: trips(median_us) };
        let path = Carrier {
            tier: Some(Tier::Direct),
            endpoint: Some("203.0.113.7:51872".to_owned()),
            rtt_us: None,
            mtu: None,
            switches: 1,
        };
        let relay = Carrier {
            tier: Some(Tier::Relay),
            endpoint: Some("https://disc.example:443".to_owned()),
            rtt_us: None,
            mtu: None,
            switches: 0,
        };
        let mut test = Speedtest {
            peer: "b\u{7}".to_owned(),
            address: "198.19.0.8".parse().expect("an address"),
            idle: trips(800),
            up: flow(2_413_000_000, 2100),
            down: flow(93_400_000, 11_000),
            path: path.clone(),
            path_changed: false,
            path_before: path,
        };
        assert_eq!(
            test.to_lines(),
            "Peer        b\u{fffd} (198.19.0.8)\n\
             Path        direct, to 203.0.113.7:51872\n\
             Idle        round trip 0.8 ms, at most 2.4 ms\n\
             To it       2.41 Gbit/s round trip 2.1 ms, at most 6.3 ms\n\
             From it     93 Mbit/s   round trip 11 ms, at most 33 ms\n"
        );
        test.path_before = relay;
        test.path_changed = true;
        let words = "changed meanwhile: relay, over https://disc.example:443, then direct, to 203.0.113.7:51872";
        assert!(test.to_lines().contains(words), "{}", test.to_lines());
        assert_eq!([rate(0), rate(9_960_000), rate(1_000_000_000)], ["0.0 Mbit/s", "9.9 Mbit/s", "1.00 Gbit/s"]);
    }
}
