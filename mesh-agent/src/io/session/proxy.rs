//! The way through an HTTP proxy: which one, and a tunnel through it by CONNECT (RFC 9110, 9.3.6).
//!
//! The proxy resolves the server's name, so this way works where the node's DNS knows the own network only. What passes is
//! TLS to the pinned key: the proxy reads nothing. Its credentials go to it alone.

use std::env;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::BASE64;
use http_body_util::Empty;
use hyper::header::{HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use mesh_common::config::{HostPort, ProxyUrl};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{Failure, marked};

/// Until a tunnel stands; after it there has to be time for TLS.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The proxy that the environment names for this server (`HTTPS_PROXY`, `NO_PROXY`).
pub fn from_environment(server: &HostPort) -> Option<ProxyUrl> {
    choose(|name| env::var(name).ok(), server)
}

fn choose(read: impl Fn(&str) -> Option<String>, server: &HostPort) -> Option<ProxyUrl> {
    let either = |names: [&str; 2]| names.into_iter().filter_map(&read).find(|value| !value.trim().is_empty());
    let text = Zeroizing::new(either(["https_proxy", "HTTPS_PROXY"])?);
    if either(["no_proxy", "NO_PROXY"]).is_some_and(|list| list.split(',').any(|entry| is_exempt(entry.trim(), server)))
    {
        return None;
    }
    let text = text.trim();
    let url = if text.contains("://") { text.parse() } else { Zeroizing::new(format!("http://{text}")).parse() };
    url.inspect_err(|error| tracing::warn!("HTTPS_PROXY of the environment is not used: {error}")).ok()
}

/// Whether an entry of `NO_PROXY` names this server: `*`, an address, a network, or a domain with all below it.
fn is_exempt(entry: &str, server: &HostPort) -> bool {
    if entry == "*" {
        return true;
    }
    if let Ok(ip) = server.host.parse::<IpAddr>() {
        let entry = entry.trim_start_matches('[').trim_end_matches(']');
        return entry.parse::<IpNet>().is_ok_and(|net| net.contains(&ip)) || entry.parse() == Ok(ip);
    }
    let (domain, port) = match entry.rsplit_once(':') {
        Some((domain, port)) => (domain, port.parse().ok()),
        None => (entry, Some(server.port)),
    };
    let domain = domain.trim_start_matches('*').trim_start_matches('.').to_ascii_lowercase();
    let below = server.host.strip_suffix(&domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    !domain.is_empty() && port == Some(server.port) && below
}

/// A TCP connection to this server through the proxy.
pub(super) async fn connect(proxy: &ProxyUrl, server: &HostPort) -> Result<TcpStream, Failure> {
    let reason = match timeout(TIMEOUT, tunnel(proxy, server)).await {
        Ok(Ok(stream)) => return Ok(stream),
        Ok(Err(reason)) => reason,
        Err(_) => format!("does not answer within {TIMEOUT:?}: is it an HTTP proxy? See mesh.proxy and HTTPS_PROXY"),
    };
    Err(Failure::Proxy { proxy: proxy.to_string(), reason })
}

async fn tunnel(proxy: &ProxyUrl, server: &HostPort) -> Result<TcpStream, String> {
    let stream = open(&proxy.address)
        .await
        .map_err(|error| format!("cannot be reached ({error}): check mesh.proxy or HTTPS_PROXY"))?;
    let broken =
        |error: hyper::Error| format!("does not answer like an HTTP proxy ({error}): check mesh.proxy or HTTPS_PROXY");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let exchange = async move {
        let response = sender.send_request(request(proxy, server)).await.map_err(broken)?;
        match response.status() {
            status if status.is_success() => hyper::upgrade::on(response).await.map_err(broken),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED if proxy.credentials().is_some() => {
                Err("does not accept the user name and password of its URL (407): correct them".to_owned())
            }
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                Err("asks for a user name and a password (407): write http://user:password@host:port".to_owned())
            }
            status => Err(format!("refuses to connect to {server} ({}): allow it there", status.as_u16())),
        }
    };
    tokio::pin!(exchange);
    let upgraded = tokio::select! {
        biased;
        upgraded = &mut exchange => upgraded,
        // It hands the stream over, or broke; the exchange knows which.
        _done = connection.with_upgrades() => exchange.await,
    }?;
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().expect("the stream that was given to this connection");
    if parts.read_buf.is_empty() {
        Ok(parts.io.into_inner())
    } else {
        Err("says more than that the connection stands: is it an HTTP proxy?".to_owned())
    }
}

fn request(proxy: &ProxyUrl, server: &HostPort) -> Request<Empty<Bytes>> {
    let authority = server.to_string();
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = authority.parse().expect("a checked host and port are an authority");
    let headers = request.headers_mut();
    headers.insert(HOST, authority.parse().expect("a checked host and port are visible ASCII"));
    if let Some(credentials) = proxy.credentials() {
        let basic = Zeroizing::new(format!("Basic {}", *Zeroizing::new(BASE64.encode(credentials))));
        let mut value = HeaderValue::from_str(&basic).expect("Base64 is visible ASCII");
        value.set_sensitive(true);
        headers.insert(PROXY_AUTHORIZATION, value);
    }
    request
}

/// The first address that accepts.
async fn open(address: &HostPort) -> io::Result<TcpStream> {
    let mut last = io::Error::other("its name has no address");
    for to in tokio::net::lookup_host((address.host.as_str(), address.port)).await? {
        match marked::connect(to).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn chosen(environment: &[(&str, &str)], server: &str) -> Option<String> {
        let read = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        choose(read, &server.parse().unwrap()).map(|proxy| proxy.address.to_string())
    }

    #[test]
    fn the_environment_names_a_proxy_in_the_usual_ways() {
        let server = "disc.example:7443";
        assert_eq!(chosen(&[], server), None);
        assert_eq!(chosen(&[("HTTPS_PROXY", "")], server), None);
        assert_eq!(chosen(&[("HTTP_PROXY", "http://a:1")], server), None);
        assert_eq!(chosen(&[("HTTPS_PROXY", "http://a:1")], server).unwrap(), "a:1");
        assert_eq!(chosen(&[("HTTPS_PROXY", "u:p@a:1")], server).unwrap(), "a:1");
        assert_eq!(chosen(&[("HTTPS_PROXY", "http://a:1"), ("https_proxy", "http://b:2")], server).unwrap(), "b:2");
        assert_eq!(chosen(&[("HTTPS_PROXY", "socks5://a:1")], server), None);
    }

    #[test]
    fn no_proxy_exempts_names_domains_addresses_and_networks() {
        let exempt =
            |list: &str, server: &str| chosen(&[("HTTPS_PROXY", "http://a:1"), ("NO_PROXY", list)], server).is_none();
        for list in ["*", "disc.example", "example", ".example", "*.example", "a.b, DISC.example", "disc.example:7443"]
        {
            assert!(exempt(list, "disc.example:7443"), "{list}");
        }
        for list in ["", "isc.example", "disc", "disc.example:443", "sub.disc.example", "192.0.2.0/24", "."] {
            assert!(!exempt(list, "disc.example:7443"), "{list}");
        }
        assert!(exempt("192.0.2.0/24", "192.0.2.9:443") && exempt("192.0.2.9", "192.0.2.9:443"));
        assert!(exempt("[2001:db8::1]", "[2001:db8::1]:443") && exempt("2001:db8::/32", "[2001:db8::1]:443"));
        assert!(!exempt("192.0.2.0/25", "192.0.2.200:443") && !exempt("2.9", "192.0.2.9:443"));
    }
}
