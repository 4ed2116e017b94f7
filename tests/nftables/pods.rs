//! Pods that come and go, and strangers, with a packet filter alone.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::lab::Family;
use bridge_lab::packet::{Packet, Tcp};
use bridge_lab::traffic::{Attempt, tcp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::{Capture, Frame, Injector};
use rustix::process::{Pid, Signal, kill_process};

use crate::node::{ALLOWED, DEADLINE, DENIED, Node, RULES, config};

/// A port that no rule names.
const FORGED: u16 = 40009;

#[test]
fn denied_packets_leave_no_connections_in_conntrack() -> Result<()> {
    const PORTS: std::ops::Range<u16> = 10_000..12_500;
    for engine in ["nftables", "iptables"] {
        let node = Node::new()?;
        let agent = node.start(&config(engine, RULES))?;
        let (a, b, pod) = (node.lab.a(), node.lab.b(), node.lab.c1());
        let tracked =
            || -> Result<u64> { Ok(node.run("sysctl -n net.netfilter.nf_conntrack_count")?.trim().parse()?) };
        let before = tracked()?;
        let injector = Injector::new(&a.netns, &a.interface)?;
        for family in Family::BOTH {
            let packet = || Packet::new(a.ip(family), pod.ip(family)).between(a, b);
            for port in PORTS {
                injector.send(&packet().tcp(Tcp::syn(port, DENIED)).frame())?;
                injector.send(&packet().udp(port, DENIED, b"stranger").frame())?;
            }
        }
        let denied = || {
            let counters: serde_json::Value = serde_json::from_str(&agent.get("/v1/counters").ok()?).ok()?;
            let found = counters.as_array()?.iter().find(|row| row["reason"] == "no_rule")?;
            (found["packets"].as_u64()? == 4 * PORTS.len() as u64).then_some(())
        };
        ensure!(eventually(DEADLINE, denied).is_some(), "{engine}: {}", agent.get("/v1/counters")?);
        let none = || (tracked().ok()? <= before).then_some(());
        ensure!(eventually(DEADLINE, none).is_some(), "{engine}: {} instead of {before}", tracked()?);
        for family in ["ipv4", "ipv6"] {
            let entries = node.run(&format!("conntrack -L -f {family}"))?;
            ensure!(!entries.contains(&format!("dport={DENIED}")), "{engine}: {entries}");
        }
    }
    Ok(())
}

/// Removes the pod's interface and makes another one with the same addresses, as a network plugin does for the next pod.
fn replace_pod(node: &Node, number: u32) -> Result<String> {
    let (b, pod) = (&node.lab.b().netns, node.lab.c1());
    let peer = format!("cali-next{number}");
    if let Some(links) = b.ip("-br link show")?.lines().find(|line| line.starts_with("cali")) {
        let name = links.split(['@', ' ']).next().context("a name")?.to_owned();
        b.ip(&format!("link delete {name}"))?;
    }
    pod.plug(b, &peer)?;
    Ok(peer)
}

/// Frames with this destination port that have come in.
fn arrived(capture: &mut Capture, port: u16) -> Result<Vec<Frame>> {
    let (mut found, end) = (Vec::new(), Instant::now() + Duration::from_millis(200));
    while Instant::now() < end {
        let Some(frame) = capture.next(Duration::from_millis(20))? else { continue };
        if !frame.outgoing && frame.endpoints().is_some_and(|(_, to)| to.port() == port) {
            found.push(frame);
        }
    }
    ensure!(capture.lost()? == 0, "not every frame was seen");
    Ok(found)
}

/// The configuration of a node that knows the interfaces by its routes.
fn by_route(engine: &str) -> String {
    let lines = config(engine, RULES);
    lines.lines().filter(|line| !line.contains("interfaces:")).flat_map(|line| [line, "\n"]).collect()
}

#[test]
fn a_new_pod_is_closed_from_its_first_packet() -> Result<()> {
    for (engine, by_route) in ["nftables", "iptables"].map(|engine| (engine, by_route(engine))) {
        for config in [config(engine, RULES), by_route] {
            let node = Node::new()?;
            let agent = node.start(&config)?;
            let (a, b, pod) = (node.lab.a(), node.lab.b(), node.lab.c1());
            let stop = AtomicBool::new(false);
            let knock = [
                Packet::new(a.v4, pod.v4).between(a, b).tcp(Tcp::syn(5000, DENIED)).frame(),
                Packet::new(a.v4, pod.v4).between(a, b).udp(5000, DENIED, b"knock").frame(),
            ];
            let injector = Injector::new(&a.netns, &a.interface)?;
            thread::scope(|scope| -> Result<()> {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        // A full queue sends less.
                        knock.iter().for_each(|frame| drop(injector.send(frame)));
                        thread::sleep(Duration::from_millis(2));
                    }
                });
                let result = (0..5).try_for_each(|number| new_pod(&node, number));
                stop.store(true, Ordering::Relaxed);
                result.with_context(|| format!("{engine}, {config}\n{}", agent.log()))
            })?;
        }
    }
    Ok(())
}

/// Starts a pod: nothing denied gets to it or from it, and the allowed port is reached.
fn new_pod(node: &Node, number: u32) -> Result<()> {
    let (a, pod) = (node.lab.a(), node.lab.c1());
    let mut at_a = Capture::start(&a.netns, &a.interface)?;
    replace_pod(node, number)?;
    let mut at_pod = Capture::start(&pod.netns, "eth0")?;
    let injector = Injector::new(&pod.netns, "eth0")?;
    let sources: [IpAddr; 3] =
        [pod.v4.into(), Ipv4Addr::new(192, 168, 31, 77).into(), Ipv4Addr::new(10, 200, 1, 99).into()];
    for _ in 0..100 {
        for source in sources {
            let frame =
                Packet::new(source, a.v4).macs(pod.mac, [0xee; 6]).udp(5000, FORGED, b"forged").frame();
            injector.send(&frame)?;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let (at_pod, at_a) = (arrived(&mut at_pod, DENIED)?, arrived(&mut at_a, FORGED)?);
    ensure!(at_pod.is_empty(), "{} packets got to the new pod", at_pod.len());
    let from: Vec<_> = at_a.iter().filter_map(Frame::addresses).map(|(from, _)| from).collect();
    ensure!(from.is_empty(), "{} packets got out of the new pod, the first from {}", from.len(), from[0]);
    let server = tcp::Server::echo(&pod.netns, pod.at(Family::V4, ALLOWED))?;
    let connect = || tcp::Client::new(&a.netns).connect(server.address()).ok().filter(Attempt::succeeded);
    ensure!(eventually(DEADLINE, connect).is_some(), "the allowed port of the new pod is not reached");
    Ok(())
}

/// The rules have never seen a pod's interface, of this name or of another one, nor a route to a pod.
#[test]
fn the_first_pod_cannot_forge_its_source_before_its_interface_is_known() -> Result<()> {
    for engine in ["nftables", "iptables"] {
        for name in ["cali-first", "poda1"] {
            let node = Node::new()?;
            let (b, pod) = (node.lab.b(), node.lab.c1());
            b.netns.ip(&format!("link delete {}", pod.peer_interface))?;
            let agent = node.start(&by_route(engine))?;
            // The agent sees nothing of the pod before it goes on.
            let process = Pid::from_raw(i32::try_from(agent.pid())?).context("a pid")?;
            kill_process(process, Signal::STOP)?;
            let tried = forge(&node, name);
            kill_process(process, Signal::CONT)?;
            let (forged, allowed) = tried.with_context(|| format!("{engine}, {name}"))?;
            let rules =
                || node.run(if engine == "nftables" { "nft list ruleset" } else { "iptables-save -t raw" });
            ensure!(
                forged.is_empty(),
                "{engine}, {name}: {} got out: {forged:?}\n{}",
                forged.len(),
                rules()?
            );
            ensure!(
                allowed,
                "{engine}, {name}: the allowed port of the unseen pod is not reached\n{}",
                rules()?
            );
            // Once it is known, as well.
            let again = eventually(DEADLINE, || (forge_known(&node).ok()? == (true, true)).then_some(()));
            ensure!(again.is_some(), "{engine}, {name}: {:?}\n{}", forge_known(&node)?, agent.log());
        }
    }
    Ok(())
}

/// Starts a pod behind an interface of this name. Returns the sources of its forged packets that got to the LAN, and whether its
/// allowed port is reached.
fn forge(node: &Node, name: &str) -> Result<(Vec<IpAddr>, bool)> {
    node.lab.c1().plug(&node.lab.b().netns, name)?;
    forge_from(node)
}

/// Whether no forged packet of the pod gets out, and its allowed port is reached.
fn forge_known(node: &Node) -> Result<(bool, bool)> {
    let (forged, allowed) = forge_from(node)?;
    Ok((forged.is_empty(), allowed))
}

fn forge_from(node: &Node) -> Result<(Vec<IpAddr>, bool)> {
    let (a, pod) = (node.lab.a(), node.lab.c1());
    let mut at_a = Capture::start(&a.netns, &a.interface)?;
    let injector = Injector::new(&pod.netns, "eth0")?;
    for source in ["192.168.31.77", "10.200.1.99", "1.2.3.4", "fd31::77", "2001:db8::1"] {
        let source: IpAddr = source.parse()?;
        let to: IpAddr = if source.is_ipv4() { a.v4.into() } else { a.v6.into() };
        let packet = Packet::new(source, to).macs(pod.mac, [0xee; 6]).udp(5000, FORGED, b"forged");
        for _ in 0..20 {
            injector.send(&packet.frame())?;
        }
    }
    let got_out = arrived(&mut at_a, FORGED)?;
    let server = tcp::Server::echo(&pod.netns, pod.at(Family::V4, ALLOWED))?;
    let allowed = tcp::Client::new(&a.netns).connect(server.address())?.succeeded();
    Ok((got_out.iter().filter_map(Frame::addresses).map(|(from, _)| from).collect(), allowed))
}
