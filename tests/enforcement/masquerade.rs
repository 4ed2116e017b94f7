//! Pods that reach the LAN by their node's address: judged by their own.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::now;
use bridge_common::filter::flow::{Flow, state};
use bridge_common::filter::policy::direction;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::packet::{Packet, Tcp};
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wire::{Capture, Injector};
use etherparse::IpNumber;

use crate::support::{DENIED, OUTBOUND, SECOND, USUAL_RULES, config, flow, open, seen_until_now};

/// Unreplied flows expire soon, and their table is small.
const HASTY: &str =
    "timeouts: {tcpHandshake: 1s, udpUnreplied: 1s}, flows: {established: 1024, halfOpen: 1024}";
/// Longer than any flow lives that has seen no reply.
const IDLE: Duration = Duration::from_secs(2);
/// More than half-open flows have room.
const FLOOD: u16 = 2048;

fn established(agent: &Agent, from: SocketAddr, to: SocketAddr, protocol: IpNumber) -> Result<Flow> {
    flow(agent, from, to, protocol.0)?.with_context(|| format!("no flow from {from} to {to}"))
}

/// SYNs of another pod without a handshake.
fn flood(lab: &Lab, family: Family) -> Result<()> {
    let c2 = lab.c2();
    let injector = Injector::new(&c2.netns, "eth0")?;
    for port in 10_000..10_000 + FLOOD {
        let syn = Packet::new(c2.ip(family), lab.a().ip(family)).tcp(Tcp::syn(port, OUTBOUND));
        injector.send(&syn.macs(c2.mac, lab.node_side_mac()).frame())?;
    }
    Ok(())
}

#[test]
fn a_tcp_connection_leaves_with_the_nodes_address_and_outlives_idleness_and_a_flood() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let agent = Agent::start(&lab, lab.b(), &config(HASTY, USUAL_RULES))?;
    for family in Family::BOTH {
        let server = tcp::Server::echo(&lab.a().netns, lab.a().at(family, OUTBOUND))?;
        let to = server.address();
        let mut capture = Capture::start(&lab.a().netns, "eth0")?;
        let mut connection = open(lab.c1(), to)?;

        let syn = |frame: &bridge_lab::wire::Frame| frame.tcp().is_some_and(|tcp| tcp.syn && !tcp.ack);
        let frame = capture.find(SECOND, syn)?.context("no SYN came to the LAN host")?;
        let (source, _) = frame.endpoints().context("a SYN has ports")?;
        assert_eq!(source.ip(), lab.b().ip(family));
        assert_eq!(server.peers(), [source]);

        let from = SocketAddr::new(lab.c1().ip(family), connection.source()?.port());
        let entry = established(&agent, from, to, IpNumber::TCP)?;
        assert_eq!((entry.state, entry.direction), (state::ESTABLISHED, direction::OUTBOUND), "{entry:?}");

        // Idle, while others come and go.
        flood(&lab, family)?;
        let idle_since = Instant::now();
        while idle_since.elapsed() <= IDLE {
            drop(open(lab.c2(), to).context("a connection of the other pod")?);
            thread::sleep(Duration::from_millis(50));
        }
        let entry = established(&agent, from, to, IpNumber::TCP)?;
        let idle = Duration::from_nanos(now().saturating_sub(entry.last_seen));
        ensure!(idle > IDLE, "not idle: its last packet was {idle:?} ago");
        connection.round_trip(SECOND).context("after the connection was idle")?;
        assert_eq!(established(&agent, from, to, IpNumber::TCP)?.state, state::ESTABLISHED);
    }
    Ok(())
}

#[test]
fn replies_make_a_udp_flow_that_needs_its_rule_no_more() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let mut agent = Agent::start(&lab, lab.b(), &config(HASTY, USUAL_RULES))?;
    let servers = Family::BOTH.map(|family| udp::Server::echo(&lab.a().netns, lab.a().at(family, OUTBOUND)));
    let ask =
        |family, source| udp::ask(&lab.c1().netns, source, lab.a().at(family, OUTBOUND), b"hello", SECOND);
    for (family, server) in Family::BOTH.into_iter().zip(servers.iter().flatten()) {
        ensure!(ask(family, 61001)?.succeeded());
        assert_eq!(server.received()[0].0.ip(), lab.b().ip(family));
        let entry = established(&agent, lab.c1().at(family, 61001), server.address(), IpNumber::UDP)?;
        assert_eq!((entry.state, entry.direction), (state::UDP_REPLIED, direction::OUTBOUND), "{entry:?}");
    }
    agent.reload(&config(HASTY, ""))?;
    for family in Family::BOTH {
        ensure!(ask(family, 61001)?.succeeded(), "the flow did not survive its rule");
        ensure!(ask(family, 61002)?.refused(), "a new flow passes without a rule");
    }
    Ok(())
}

#[test]
fn a_denied_port_never_leaves_the_node() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        let to = lab.a().at(family, DENIED);
        let _tcp = tcp::Server::echo(&lab.a().netns, to)?;
        let _udp = udp::Server::echo(&lab.a().netns, to)?;
        let mut capture = Capture::start(&lab.a().netns, "eth0")?;
        let attempt = tcp::Client::new(&lab.c1().netns).connect(to)?;
        ensure!(attempt.refused(), "{attempt}");
        let attempt = udp::ask(&lab.c1().netns, 0, to, b"hello", SECOND)?;
        ensure!(attempt.refused(), "{attempt}");

        let seen = seen_until_now(&mut capture, lab.b(), lab.a(), family)?;
        let strays = seen.iter().filter_map(|frame| frame.endpoints()).filter(|(_, at)| *at == to);
        assert_eq!(strays.collect::<Vec<_>>(), []);
    }
    Ok(())
}
