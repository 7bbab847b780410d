//! UPnP's Internet gateway device, version 1: found by SSDP, told by HTTP, asked by SOAP.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{LOOK, Manner, Shared, serve};

const SSDP: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 255, 255, 250), 1900);
pub(crate) const HTTP_PORT: u16 = 5000;
const SERVICE: &str = "urn:schemas-upnp-org:service:WANIPConnection:1";
/// A request is shorter.
const REQUEST: usize = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn start(shared: &Arc<Shared>) -> Result<[JoinHandle<Result<()>>; 2]> {
    let inside = shared.options.inside;
    let (ssdp, http) = shared.host.inside(|| {
        let ssdp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SSDP.1)).context("cannot bind 1900")?;
        ssdp.join_multicast_v4(&SSDP.0, &inside).context("cannot hear those who ask everybody")?;
        let http = TcpListener::bind((inside, HTTP_PORT)).context("cannot bind the description's port")?;
        http.set_nonblocking(true)?;
        Ok((ssdp, http))
    })?;
    let found = shared.host.start_inside({
        let shared = Arc::clone(shared);
        // Found it is always: a bad one shows when it is spoken to.
        move || serve(&shared, &ssdp, |_, _| Ok(Some(here_i_am(inside).into_bytes())))
    })?;
    let asked = shared.host.start_inside({
        let shared = Arc::clone(shared);
        move || accept(&shared, &http)
    })?;
    Ok([found, asked])
}

fn here_i_am(inside: Ipv4Addr) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=1800\r\nEXT:\r\nST: {SERVICE}\r\nUSN: uuid:lab::{SERVICE}\r\n\
         LOCATION: http://{inside}:{HTTP_PORT}/root.xml\r\nSERVER: lab\r\n\r\n"
    )
}

/// One request at a time: the lab has few clients.
fn accept(shared: &Shared, listener: &TcpListener) -> Result<()> {
    let mut kept = Vec::new();
    while !shared.is_over() {
        match listener.accept() {
            Ok((stream, _)) if shared.options.manner == Manner::Hangs => {
                shared.hear();
                kept.push(stream);
            }
            Ok((stream, _)) => {
                // A client that breaks off is no matter.
                let _ = answer(shared, stream);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(error).context("cannot accept"),
        }
    }
    Ok(())
}

fn answer(shared: &Shared, mut stream: TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = read_request(&mut stream)?;
    shared.hear();
    let (status, body) = if shared.options.manner == Manner::Garbage {
        ("200 OK", "<".repeat(100_000))
    } else {
        respond(shared, &request)?
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    Ok(())
}

fn read_request(stream: &mut TcpStream) -> Result<String> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                return Ok(text.into_owned());
            }
        }
        let length = stream.read(&mut buffer)?;
        anyhow::ensure!(length > 0 && bytes.len() < REQUEST, "no whole request");
        bytes.extend_from_slice(&buffer[..length]);
    }
}

fn respond(shared: &Shared, request: &str) -> Result<(&'static str, String)> {
    let path = request.split(' ').nth(1).unwrap_or_default();
    if path == "/root.xml" {
        return Ok(("200 OK", description()));
    }
    if path == "/scpd.xml" {
        return Ok(("200 OK", actions()));
    }
    let is_asked = |action: &str| request.contains(&format!("{SERVICE}#{action}"));
    if is_asked("GetExternalIPAddress") {
        let told = format!("<NewExternalIPAddress>{}</NewExternalIPAddress>", shared.told());
        Ok(("200 OK", envelope("GetExternalIPAddress", &told)))
    } else if is_asked("AddPortMapping") {
        let client: Option<Ipv4Addr> = field(request, "NewInternalClient").and_then(|client| client.parse().ok());
        let port: Option<u16> = field(request, "NewInternalPort").and_then(|port| port.parse().ok());
        let external: Option<u16> = field(request, "NewExternalPort").and_then(|port| port.parse().ok());
        let seconds: Option<u64> = field(request, "NewLeaseDuration").and_then(|seconds| seconds.parse().ok());
        let (Some(client), Some(port), Some(external), Some(seconds)) = (client, port, external, seconds) else {
            return Ok(fault(402, "Invalid Args"));
        };
        // What others are led by already, and what this router keeps for itself.
        let to = SocketAddrV4::new(client, port);
        let is_free = |taken: &[(u16, SocketAddrV4)]| taken.iter().all(|(port, led)| *port != external || *led == to);
        let taken: Vec<_> = shared.book().led.iter().map(|(port, led)| (*port, led.to)).collect();
        if external < super::FIRST_PORT || !is_free(&taken) {
            return Ok(fault(718, "ConflictInMappingEntry"));
        }
        let lifetime = Duration::from_secs(seconds).min(shared.options.lifetime);
        shared.lead_by(external, to, (seconds > 0).then_some(lifetime))?;
        Ok(("200 OK", envelope("AddPortMapping", "")))
    } else if is_asked("DeletePortMapping") {
        let external: Option<u16> = field(request, "NewExternalPort").and_then(|port| port.parse().ok());
        shared.release(|port, _| Some(port) == external)?;
        Ok(("200 OK", envelope("DeletePortMapping", "")))
    } else {
        Ok(fault(401, "Invalid Action"))
    }
}

fn field<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = request.split_once(&format!("<{name}>"))?;
    rest.split_once('<').map(|(value, _)| value.trim())
}

fn envelope(action: &str, body: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
         s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body><u:{action}Response \
         xmlns:u=\"{SERVICE}\">{body}</u:{action}Response></s:Body></s:Envelope>"
    )
}

fn fault(code: u16, words: &str) -> (&'static str, String) {
    let body = format!(
        "<?xml version=\"1.0\"?><s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body><s:Fault>\
         <faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail><UPnPError \
         xmlns=\"urn:schemas-upnp-org:control-1-0\"><errorCode>{code}</errorCode><errorDescription>{words}\
         </errorDescription></UPnPError></detail></s:Fault></s:Body></s:Envelope>"
    );
    ("500 Internal Server Error", body)
}

fn description() -> String {
    let service = format!(
        "<serviceList><service><serviceType>{SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1\
         </serviceId><SCPDURL>/scpd.xml</SCPDURL><controlURL>/control</controlURL><eventSubURL>/events</eventSubURL>\
         </service></serviceList>"
    );
    let device = |kind: &str, inner: &str| {
        format!(
            "<device><deviceType>urn:schemas-upnp-org:device:{kind}:1</deviceType><friendlyName>lab</friendlyName>\
             <UDN>uuid:lab-{kind}</UDN>{inner}</device>"
        )
    };
    let nested = |inner: &str| format!("<deviceList>{inner}</deviceList>");
    let connection = device("WANConnectionDevice", &service);
    let wan = device("WANDevice", &nested(&connection));
    let root = device("InternetGatewayDevice", &nested(&wan));
    format!(
        "<?xml version=\"1.0\"?><root xmlns=\"urn:schemas-upnp-org:device-1-0\"><specVersion><major>1</major>\
         <minor>0</minor></specVersion>{root}</root>"
    )
}

fn actions() -> String {
    let action = |name: &str, inputs: &[&str], outputs: &[&str]| {
        let argument = |name: &str, direction: &str| {
            format!("<argument><name>{name}</name><direction>{direction}</direction></argument>")
        };
        let inputs: String = inputs.iter().map(|name| argument(name, "in")).collect();
        let outputs: String = outputs.iter().map(|name| argument(name, "out")).collect();
        format!("<action><name>{name}</name><argumentList>{inputs}{outputs}</argumentList></action>")
    };
    let mapping = ["NewRemoteHost", "NewExternalPort", "NewProtocol"];
    let add = [
        "NewRemoteHost",
        "NewExternalPort",
        "NewProtocol",
        "NewInternalPort",
        "NewInternalClient",
        "NewEnabled",
        "NewPortMappingDescription",
        "NewLeaseDuration",
    ];
    format!(
        "<?xml version=\"1.0\"?><scpd xmlns=\"urn:schemas-upnp-org:service-1-0\"><actionList>{}{}{}</actionList></scpd>",
        action("GetExternalIPAddress", &[], &["NewExternalIPAddress"]),
        action("AddPortMapping", &add, &[]),
        action("DeletePortMapping", &mapping, &[])
    )
}
