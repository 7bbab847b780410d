//! `ping`: probes over the paths that packets take, one line each.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::show::answered;
use super::{Global, Output, PingArgs, ViaArg, block_on, exit, print};
use crate::api::{PingOutcome, PingRequest, PingVia, client};
use crate::status::{clean, trip};

const COUNT: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// Between probes that wait for a direct path, and how long they do.
const DIRECT_PAUSE: Duration = Duration::from_millis(500);
const DIRECT_WAIT: Duration = Duration::from_secs(30);

/// Degraded when nothing answered, or no direct path did where one was waited for.
pub(super) fn ping(global: &Global, args: &PingArgs) -> anyhow::Result<u8> {
    block_on(async { if args.until_direct { until_direct(global, args).await } else { each(global, args).await } })?
}

async fn each(global: &Global, args: &PingArgs) -> anyhow::Result<u8> {
    let via = match args.via {
        None => PingVia::Any,
        Some(ViaArg::Relay) => PingVia::Relay,
        Some(ViaArg::Direct) => PingVia::Direct,
    };
    let count = args.count.unwrap_or(COUNT);
    let mut replies = 0;
    for number in 1..=count {
        let next = Instant::now() + PAUSE;
        let outcome = once(global, args, via).await?;
        replies += u32::from(matches!(outcome, PingOutcome::Reply { .. }));
        if number < count {
            sleep_until(next).await;
        }
    }
    Ok(if replies > 0 { exit::OK } else { exit::DEGRADED })
}

async fn until_direct(global: &Global, args: &PingArgs) -> anyhow::Result<u8> {
    let give_up = Instant::now() + DIRECT_WAIT;
    let mut sent = 0;
    while Instant::now() < give_up && args.count.is_none_or(|count| sent < count) {
        let next = Instant::now() + DIRECT_PAUSE;
        if let PingOutcome::Reply { via: PingVia::Direct, .. } = once(global, args, PingVia::Any).await? {
            return Ok(exit::OK);
        }
        sent += 1;
        sleep_until(next).await;
    }
    let status = answered(global, client::status(&global.settings().socket).await)?;
    let peer = status.peer_named(&args.peer)?;
    let why = peer.path.as_ref().and_then(|path| path.why_not_direct.as_deref()).unwrap_or("nothing is known of why");
    eprintln!("no direct path to {}: {}", clean(&peer.host_name), clean(why));
    Ok(exit::DEGRADED)
}

async fn once(global: &Global, args: &PingArgs, via: PingVia) -> anyhow::Result<PingOutcome> {
    let request = PingRequest { peer: args.peer.clone(), via };
    let outcome = answered(global, client::ping(&global.settings().socket, &request).await)?;
    let line = match global.output {
        Some(Output::Json | Output::Yaml) => serde_json::to_string(&outcome)?,
        None | Some(Output::Table | Output::Wide) => describe(&outcome),
    };
    print(&format!("{line}\n"))?;
    Ok(outcome)
}

fn describe(outcome: &PingOutcome) -> String {
    let line = match outcome {
        PingOutcome::Reply { peer, address, via, endpoint, rtt_us } => {
            let address = address.map(|address| format!(" ({address})")).unwrap_or_default();
            let way = if *via == PingVia::Relay { "relay" } else { "direct" };
            format!("reply from {peer}{address} via {way} {endpoint} in {}", trip(*rtt_us))
        }
        PingOutcome::Lost { peer, waited_ms, .. } => format!("no reply from {peer} within {} s", waited_ms / 1000),
        PingOutcome::NoPath { peer, why } => format!("no probe sent to {peer}: {why}"),
    };
    clean(&line)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_is_one_line() {
        let reply = |via, endpoint: &str, rtt_us| PingOutcome::Reply {
            peer: "b".to_owned(),
            address: Some("198.19.0.8".parse().unwrap()),
            via,
            endpoint: endpoint.to_owned(),
            rtt_us,
        };
        for (outcome, line) in [
            (
                reply(PingVia::Relay, "https://disc.example:443", 41_300),
                "reply from b (198.19.0.8) via relay https://disc.example:443 in 41 ms",
            ),
            (
                reply(PingVia::Direct, "203.0.113.7:51872", 840),
                "reply from b (198.19.0.8) via direct 203.0.113.7:51872 in 0.8 ms",
            ),
            (
                PingOutcome::Lost { peer: "b\u{7}".to_owned(), via: PingVia::Any, waited_ms: 1000 },
                "no reply from b\u{fffd} within 1 s",
            ),
            (
                PingOutcome::NoPath { peer: "b".to_owned(), why: "no relay reaches it now".to_owned() },
                "no probe sent to b: no relay reaches it now",
            ),
        ] {
            assert_eq!(describe(&outcome), line);
        }
    }
}
