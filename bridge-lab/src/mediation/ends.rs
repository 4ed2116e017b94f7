//! Packets that end a flow, or seem to.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Finding, Ground, OPEN, OUT, RULES, SECOND, Setting, config, connects};
use crate::lab::{Family, Lab};
use crate::packet::{Packet, Tcp};
use crate::traffic::tcp;
use crate::wait::eventually;
use crate::wire::Injector;

/// Flows that have ended are soon forgotten.
const HASTY: &str = "timeouts: {tcpClosing: 1s, tcpReset: 1s}";
/// Longer than they live.
const IDLE: Duration = Duration::from_millis(2500);

/// A stranger who knows only the addresses sends one RST or FIN for each connection.
pub(super) fn forged(setting: Setting) -> Result<Finding> {
    let ground = Ground::new(setting, Lab::builder(), &config(setting, "", HASTY, RULES))?;
    let (a, b, x, c1) = (ground.a(), ground.b(), ground.x(), ground.c1());
    for state in ["close", "close_wait", "fin_wait", "last_ack", "time_wait"] {
        b.netns.set_sysctl(&format!("netfilter/nf_conntrack_tcp_timeout_{state}"), "1")?;
    }
    let mut finding = Finding::default();
    let mut connections = Vec::new();
    let mut servers = Vec::new();
    let injector = Injector::new(&x.netns, "eth0")?;
    for family in Family::BOTH {
        let server = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        for kind in ["RST", "FIN", "RST with a wrong checksum", "FIN with a wrong checksum", "nothing"] {
            let mut connection = tcp::Client::new(&a.netns).connect(server.address())?.reached()?;
            connection.round_trip(SECOND)?;
            let port = connection.source()?.port();
            for (inbound, sequence) in [(true, 12_345), (false, 12_345), (true, 0x8000_0000), (false, 0)] {
                let (from, to) = if inbound { (port, OPEN) } else { (OPEN, port) };
                let tcp = if kind.starts_with("RST") {
                    Tcp::rst(from, to, sequence)
                } else {
                    Tcp::fin(from, to, sequence, 999)
                };
                let packet = if inbound {
                    Packet::new(a.ip(family), c1.ip(family))
                } else {
                    Packet::new(c1.ip(family), a.ip(family))
                };
                let mut frame = packet.tcp(tcp).between(x, b).frame();
                if kind.ends_with("checksum") {
                    let at = frame.len() - 4;
                    frame[at] ^= 0x55;
                }
                if kind != "nothing" {
                    injector.send(&frame)?;
                }
            }
            connections.push((format!("{kind}, {family:?}"), connection));
        }
        servers.push(server);
    }
    thread::sleep(IDLE);
    for (kind, connection) in &mut connections {
        finding.legitimate(format!("a connection after {kind}"), connection.round_trip(SECOND * 2).is_ok());
    }
    Ok(finding)
}

/// The client has said all, the server takes its time for the answer.
pub(super) fn half_closed(setting: Setting) -> Result<Finding> {
    let ground = Ground::new(setting, Lab::builder(), &config(setting, "", HASTY, RULES))?;
    let (a, c1) = (ground.a(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        for (client, host, port) in [(a, c1, OPEN), (c1, a, OUT)] {
            let to = host.at(family, port);
            let listener = host.netns.run(|| TcpListener::bind(to))?;
            let server = thread::spawn(move || -> std::io::Result<()> {
                let (mut stream, _) = listener.accept()?;
                stream.read_to_end(&mut Vec::new())?;
                thread::sleep(IDLE);
                stream.write_all(b"answer")
            });
            let mut connection = tcp::Client::new(&client.netns).connect(to)?.reached()?;
            let stream = connection.stream();
            stream.write_all(b"question")?;
            stream.shutdown(Shutdown::Write)?;
            stream.set_read_timeout(Some(IDLE + SECOND * 3))?;
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer);
            finding.legitimate(
                format!("the answer to {}, {family:?}", client.name),
                read.is_ok() && answer == b"answer",
            );
            drop(server.join());
        }
    }
    Ok(finding)
}

/// Flows of datagrams crowd out neither idle connections nor new ones.
pub(super) fn datagrams(setting: Setting) -> Result<Finding> {
    const FLOOD: u16 = 12_000;
    let open = "  - {name: everybody, direction: inbound, protocol: udp, ports: [5353]}\n";
    let small = "flows: {established: 1024, halfOpen: 1024}";
    let ground =
        Ground::new(setting, Lab::builder(), &config(setting, "", small, &format!("{RULES}{open}")))?;
    let (a, b, x, c1) = (ground.a(), ground.b(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    let family = Family::V4;
    let server = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
    let mut connections = Vec::new();
    for _ in 0..20 {
        let mut connection = tcp::Client::new(&a.netns).connect(server.address())?.reached()?;
        connection.round_trip(SECOND)?;
        connections.push(connection);
    }
    let echo = crate::traffic::udp::Server::echo(&c1.netns, c1.at(family, 5353))?;
    let injector = Injector::new(&x.netns, "eth0")?;
    let ports: Vec<u16> = (2000..2000 + FLOOD).collect();
    for some in ports.chunks(50) {
        // The answer makes a flow established. A table evicts flows of one datagram first, so there is another one.
        for _ in 0..2 {
            for port in some {
                let packet = Packet::new(x.ip(family), c1.ip(family)).udp(*port, 5353, b"flood");
                injector.send(&packet.between(x, b).frame())?;
            }
            // The server keeps up, so that most of them are answered.
            thread::sleep(Duration::from_millis(5));
        }
    }
    let flooded = || (echo.received().len() > usize::from(FLOOD) / 2).then_some(());
    eventually(SECOND * 5, flooded).context("the flood did not come through")?;
    let alive = connections.iter_mut().filter_map(|one| one.round_trip(SECOND).ok()).count();
    finding.legitimate(format!("{} of 20 idle connections", 20 - alive), alive == 20);
    finding.legitimate("a new connection", connects(a, server.address())?);
    Ok(finding)
}
