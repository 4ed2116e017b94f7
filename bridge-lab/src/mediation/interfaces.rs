//! Interfaces that come, go and change.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::programs::{SchedClassifier, TcAttachType};

use super::{CLOSED, Finding, Ground, OPEN, RULES, SECOND, SILENCE, Setting, arrives, config, connects};
use crate::lab::{Family, Host};
use crate::packet::{Packet, Tcp};
use crate::traffic::{tcp, udp};
use crate::wait::eventually;
use crate::wire::{Capture, Frame, Injector};

/// A card without a route to the LAN.
pub(super) fn second_card(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, b, x, c1) = (ground.a(), ground.b(), ground.x(), ground.c1());
    let mut cards = Vec::new();
    for (number, host) in [(1, a), (2, x)] {
        let name = b.netns.name();
        host.netns.ip(&format!("link add second type veth peer name card{number} netns {name}"))?;
        host.netns.ip("link set second up")?;
        b.netns.ip(&format!("link set card{number} up"))?;
        cards.push((host, mac(b, &format!("card{number}"))?));
    }
    // The agent has some time to see them.
    thread::sleep(SECOND);
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let closed = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let open = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        for (host, card) in &cards {
            let injector = Injector::new(&host.netns, "second")?;
            for (server, port) in [(&closed, CLOSED), (&open, OPEN)] {
                let payload = format!("{} {port}", host.name);
                let packet = Packet::new(host.ip(family), c1.ip(family)).udp(5000, port, payload.as_bytes());
                injector.send(&packet.macs(host.mac, *card).frame())?;
                let came = arrives(server, payload.as_bytes());
                if host.name == a.name && port == OPEN {
                    finding.legitimate(format!("an allowed datagram, {family:?}"), came);
                } else {
                    finding.attack(format!("{payload}, {family:?}"), came);
                }
            }
        }
    }
    Ok(finding)
}

fn mac(host: &Host, interface: &str) -> Result<[u8; 6]> {
    let text = host.netns.ip(&format!("-oneline link show {interface}"))?;
    let mac =
        text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).context("an address")?;
    let octets: Vec<u8> =
        mac.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect::<Result<_, _>>()?;
    octets.try_into().ok().context("six octets")
}

/// A pod goes, and another gets its address; no rule lets anybody in to that one.
pub(super) fn reused_address(setting: Setting) -> Result<Finding> {
    let mut ground = Ground::usual(setting)?;
    let (family, port, from) = (Family::V4, OPEN, 50_001);
    let (a, b, c1) = (ground.a().clone(), ground.b().clone(), ground.c1().clone());
    let server = tcp::Server::echo(&c1.netns, c1.at(family, port))?;
    let datagrams = udp::Server::echo(&c1.netns, c1.at(family, port))?;
    let mut connection = tcp::Client::new(&a.netns).source_port(from).connect(server.address())?.reached()?;
    connection.round_trip(SECOND)?;
    let ask = || udp::ask(&a.netns, from, c1.at(family, port), b"old", SILENCE);
    anyhow::ensure!(ask()?.succeeded() && ask()?.succeeded(), "the flow of datagrams did not begin");

    b.netns.ip(&format!("link delete {}", c1.peer_interface))?;
    let without: String =
        RULES.lines().filter(|line| !line.contains("in-")).flat_map(|line| [line, "\n"]).collect();
    ground.agent.reload(&config(setting, "", "", &without))?;
    c1.plug(&b.netns, &c1.peer_interface)?;
    let mut finding = Finding::default();
    let mut capture = Capture::start(&c1.netns, "eth0")?;
    let to_pod = || Packet::new(a.ip(family), c1.ip(family));
    // Time for the agent to see what happened.
    thread::sleep(SECOND);
    ground.send_from_lan(&a, to_pod().tcp(Tcp::syn(from, port)))?;
    let from_a = |frame: &Frame| {
        !frame.outgoing && frame.endpoints().is_some_and(|(source, _)| source == a.at(family, from))
    };
    finding.attack("a SYN from the old port", capture.find(SILENCE, from_a)?.is_some());
    ground.send_from_lan(&a, to_pod().tcp(Tcp::ack(from, port, 1, 1).payload(b"data")))?;
    finding.attack("data of the old connection", capture.find(SILENCE, from_a)?.is_some());
    ground.send_from_lan(&a, to_pod().udp(from, port, b"again"))?;
    finding.attack("a datagram of the old flow", capture.find(SILENCE, from_a)?.is_some());
    drop(datagrams);

    ground.agent.reload(&config(setting, "", "", RULES))?;
    finding.legitimate("the new pod with a rule", connects(&a, c1.at(family, port))?);
    Ok(finding)
}

/// A LAN interface goes down and up again, while denied datagrams come all the time.
pub(super) fn flap(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, b, x, c1) = (ground.a(), ground.b(), ground.x(), ground.c1());
    let family = Family::V4;
    let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
    let packet = Packet::new(x.ip(family), c1.ip(family)).udp(5000, CLOSED, b"flap").between(x, b).frame();
    let injector = Injector::new(&x.netns, "eth0")?;
    let end = Instant::now() + SECOND * 2;
    thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(move || {
            while Instant::now() < end {
                // While the interface is down there is no peer to send to.
                drop(injector.send(&packet));
                thread::sleep(Duration::from_micros(200));
            }
        });
        for _ in 0..5 {
            b.netns.ip("link set eth0 down")?;
            thread::sleep(Duration::from_millis(50));
            b.netns.ip("link set eth0 up")?;
            thread::sleep(Duration::from_millis(250));
        }
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))
    })?;
    let mut finding = Finding::default();
    finding.attack(format!("{} datagrams", server.received().len()), !server.received().is_empty());
    let _open = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
    let connected = || connects(a, c1.at(family, OPEN)).ok().filter(|connected| *connected);
    finding.legitimate("an allowed connection afterwards", eventually(SECOND * 5, connected).is_some());
    Ok(finding)
}

/// Another program detaches a program of bridge.
pub(super) fn detached(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let family = Family::V4;
    let mut finding = Finding::default();
    if setting.engines.contains("ebpf") {
        let links = ground.agent.pins().to_owned();
        for link in files(&links)?.iter().filter(|path| path.to_string_lossy().contains("external_ingress")) {
            let mut command = Command::new("bpftool");
            command.args(["link", "detach", "pinned"]).arg(link);
            ground.b().netns.output(command)?;
        }
    }
    // Twice a second the agent looks.
    thread::sleep(SECOND * 2);
    if setting.engines.contains("ebpf") {
        let query = || SchedClassifier::query_tcx("eth0", TcAttachType::Ingress);
        let (_, programs) = ground.b().netns.run(query)?;
        finding.legitimate("the program is attached again", !programs.is_empty());
        let counted = ground.agent.metrics()?.contains("bridge_programs_restored_total 1\n");
        finding.legitimate("the agent counts it", counted);
    }
    let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
    ground.send_from_lan(x, Packet::new(x.ip(family), c1.ip(family)).udp(5000, CLOSED, b"detached"))?;
    finding.attack("a denied datagram two seconds later", arrives(&server, b"detached"));
    let _open = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
    finding.legitimate("an allowed connection", connects(a, c1.at(family, OPEN))?);
    Ok(finding)
}

fn files(directory: &std::path::Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    Ok(found)
}
