//! Attempts to get past the default deny, each beside legitimate traffic of the same shape.
//!
//! An attempt holds if none of its packets comes through and all of the legitimate ones do. Addresses: `a` is a LAN host
//! that rules allow, `x` one that no rule names, `b` the node, `c1` and `c2` its pods.

mod ends;
mod interfaces;
mod openings;
mod overlay;
mod payload;
mod sctp;
mod sources;
mod translation;

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::agent::Agent;
use crate::lab::{Builder, Family, Host, Lab};
use crate::packet::Packet;
use crate::traffic::{tcp, udp};
use crate::wait::eventually;
use crate::wire::Injector;

/// A port of pods that `a` may use, TCP and UDP.
const OPEN: u16 = 60001;
/// A port that no rule names, of pods and of LAN hosts.
const CLOSED: u16 = 40003;
/// A port of LAN hosts that pods may use, TCP and UDP.
const OUT: u16 = 8443;
const SECOND: Duration = Duration::from_secs(1);
/// Time for a packet to come through, or not to.
const SILENCE: Duration = Duration::from_millis(250);

/// The usual rules.
const RULES: &str = "\
rules:
  - {name: in-tcp, direction: inbound, external: [192.168.31.67/32, \"fd31::67/128\"], protocol: tcp, ports: [60001]}
  - {name: in-udp, direction: inbound, external: [192.168.31.67/32, \"fd31::67/128\"], protocol: udp, ports: [60001]}
  - {name: out-tcp, direction: outbound, protocol: tcp, ports: [8443]}
  - {name: out-udp, direction: outbound, protocol: udp, ports: [8443]}
";

/// The engines of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As `enforcement.engines` has them.
    pub engines: &'static str,
    /// The sysctl of every interface of the node.
    pub rp_filter: u8,
}

impl Setting {
    /// Every combination of engines.
    pub const ENGINES: [&'static str; 5] =
        ["ebpf", "iptables", "nftables", "ebpf, iptables", "ebpf, nftables"];
}

/// One way to get past the default deny.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// A short name.
    pub name: &'static str,
    /// The values of `rp_filter` that it is played with.
    pub rp_filters: &'static [u8],
    run: fn(Setting) -> Result<Finding>,
}

/// All attempts, in order of their subject.
pub const ATTEMPTS: &[Attempt] = &[
    attempt("a flow opened in a pod's name", &[0, 2], sources::reverse_open),
    attempt("a simultaneous open in a pod's name", &[0, 2], sources::simultaneous),
    attempt("foreign, node's, mapped and pods' sources from the LAN", &[0, 2], sources::from_lan),
    attempt("a pod with another's address", &[0, 2], sources::from_pod),
    attempt("a pod resets another's connection", &[0], sources::reset_by_pod),
    attempt("many VLAN tags of id 0", &[0], payload::tags),
    attempt("later fragments and ICMP errors without a flow", &[0], payload::fragments_and_errors),
    attempt("an allowed NodePort opens another", &[0], translation::node_port),
    attempt("a NodePort by a link-local address", &[0], translation::link_local),
    attempt("NodePort, no nodePorts section", &[0], translation::unlisted_node_port),
    attempt("pod -> Service -> LAN host", &[0], translation::service_out),
    attempt("pod -> Service -> LAN host, masqueraded", &[0], translation::service_out_masqueraded),
    attempt("hostPort, LoadBalancer and ClusterIP from the LAN", &[0], translation::inbound),
    attempt("the same, masqueraded", &[0], translation::inbound_masqueraded),
    attempt("a second network card", &[0], interfaces::second_card),
    attempt("a pod of another node, through an overlay", &[0], overlay::vxlan),
    attempt("tunnel packets of a LAN host and of a pod", &[0], overlay::injected),
    attempt("one node as the gateway of all pods", &[0], overlay::transit),
    attempt("a SYN of an established flow whose rule is gone", &[0], openings::syn_without_rule),
    attempt("a simultaneous open", &[0], openings::simultaneous),
    attempt("a SYN-ACK with a wrong acknowledgement", &[0], openings::wrong_syn_ack),
    attempt("an SCTP association on the ports of an ended one", &[0], sctp::again),
    attempt("an SCTP packet with a wrong verification tag", &[0], sctp::wrong_tags),
    attempt("a reused pod address", &[0], interfaces::reused_address),
    attempt("a LAN interface that flaps", &[0], interfaces::flap),
    attempt("a detached program", &[0], interfaces::detached),
    attempt("forged RSTs and FINs", &[0], ends::forged),
    attempt("a half-closed connection", &[0], ends::half_closed),
    attempt("a stranger's datagrams against idle connections", &[0], ends::datagrams),
];

const fn attempt(
    name: &'static str,
    rp_filters: &'static [u8],
    run: fn(Setting) -> Result<Finding>,
) -> Attempt {
    Attempt { name, rp_filters, run }
}

/// The result of one attempt with one setting.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// See [`Attempt::name`].
    pub attempt: &'static str,
    /// See [`Setting::engines`].
    pub engines: &'static str,
    /// See [`Setting::rp_filter`].
    pub rp_filter: u8,
    /// Packets that should not have come through, and did.
    pub came_through: Vec<String>,
    /// Legitimate traffic that was cut.
    pub cut: Vec<String>,
}

impl Row {
    /// Whether nothing came through and nothing was cut.
    #[must_use]
    pub const fn holds(&self) -> bool {
        self.came_through.is_empty() && self.cut.is_empty()
    }
}

impl Attempt {
    /// Plays the attempt.
    ///
    /// # Errors
    /// The lab or the agent fails.
    pub fn play(&self, setting: Setting) -> Result<Row> {
        let Finding { came_through, cut } =
            (self.run)(setting).with_context(|| format!("{}: {setting:?}", self.name))?;
        let Setting { engines, rp_filter } = setting;
        Ok(Row { attempt: self.name, engines, rp_filter, came_through, cut })
    }
}

/// Collects the outcome of an attempt.
#[derive(Clone, Debug, Default)]
struct Finding {
    came_through: Vec<String>,
    cut: Vec<String>,
}

impl Finding {
    /// Notes whether a packet of the attempt came through.
    fn attack(&mut self, name: impl Into<String>, came_through: bool) {
        if came_through {
            self.came_through.push(name.into());
        }
    }

    /// Notes whether legitimate traffic passed.
    fn legitimate(&mut self, name: impl Into<String>, passed: bool) {
        if !passed {
            self.cut.push(name.into());
        }
    }
}

/// The configuration of a node: `networks` are further keys of that section, `enforcement` of that one.
fn config(setting: Setting, networks: &str, enforcement: &str, rest: &str) -> String {
    let Setting { engines, .. } = setting;
    format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24, \"fd20:1::/64\"], external: [192.168.31.0/24, \"fd31::/64\"], \
         {networks}}}\nenforcement: {{engines: [{engines}], onDeny: drop, iptables: {{backend: nft}}, {enforcement}}}\n\
         persistence: {{save: never}}\n{rest}"
    )
}

/// A lab with an agent on its first node.
struct Ground {
    lab: Lab,
    agent: Agent,
}

impl Ground {
    /// Two LAN hosts, a node and two pods, with the usual rules.
    fn usual(setting: Setting) -> Result<Self> {
        Self::new(setting, Lab::builder(), &config(setting, "", "", RULES))
    }

    fn new(setting: Setting, builder: Builder, config: &str) -> Result<Self> {
        let lab = builder.second_host().build()?;
        reverse_path(lab.b(), setting)?;
        let agent = Agent::start(&lab, lab.b(), config)?;
        Ok(Self { lab, agent })
    }

    fn a(&self) -> &Host {
        self.lab.a()
    }

    fn x(&self) -> &Host {
        self.lab.a2()
    }

    fn b(&self) -> &Host {
        self.lab.b()
    }

    fn c1(&self) -> &Host {
        self.lab.c1()
    }

    fn c2(&self) -> &Host {
        self.lab.c2()
    }

    /// Sends a packet out of a LAN host to the node.
    fn send_from_lan(&self, host: &Host, packet: Packet) -> Result<()> {
        Ok(Injector::new(&host.netns, "eth0")?.send(&packet.between(host, self.b()).frame())?)
    }

    /// Sends a packet out of a pod.
    fn send_from_pod(&self, pod: &Host, packet: Packet) -> Result<()> {
        let packet = packet.macs(pod.mac, self.lab.node_side_mac());
        Ok(Injector::new(&pod.netns, "eth0")?.send(&packet.frame())?)
    }
}

fn reverse_path(node: &Host, Setting { rp_filter, .. }: Setting) -> Result<()> {
    let interfaces = node
        .netns
        .run(|| fs::read_dir("/proc/sys/net/ipv4/conf").map(|all| all.flatten().collect::<Vec<_>>()))?;
    for interface in interfaces {
        let name = interface.file_name();
        node.netns
            .set_sysctl(&format!("ipv4/conf/{}/rp_filter", name.to_string_lossy()), &rp_filter.to_string())?;
    }
    Ok(())
}

/// Loads nftables rules on a host.
fn nft(lab: &Lab, host: &Host, rules: &str) -> Result<()> {
    let file = lab.directory().join(format!("{}.nft", host.name));
    fs::write(&file, rules)?;
    let mut command = Command::new("nft");
    command.arg("-f").arg(file);
    host.netns.output(command).map(drop)
}

/// Whether this payload comes to a server within a short time.
fn arrives(server: &udp::Server, payload: &[u8]) -> bool {
    let came = || server.received().iter().any(|(_, received)| received == payload).then_some(());
    eventually(SILENCE, came).is_some()
}

/// Whether a client gets a connection with a round trip.
fn connects(from: &Host, to: std::net::SocketAddr) -> Result<bool> {
    let attempt = tcp::Client::new(&from.netns).deadline(SECOND).connect(to)?;
    Ok(attempt.reached().is_ok_and(|mut connection| connection.round_trip(SECOND).is_ok()))
}

/// Whether a datagram is answered.
fn answered(from: &Host, source_port: u16, to: std::net::SocketAddr) -> Result<bool> {
    Ok(udp::ask(&from.netns, source_port, to, b"question", SILENCE * 2)?.succeeded())
}

/// An address of documentation (RFC 5737, RFC 3849), foreign to everybody.
fn foreign(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, 9]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]),
    }
}
