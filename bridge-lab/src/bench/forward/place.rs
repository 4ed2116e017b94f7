//! The lab of one contender: LAN host, node and pods, with its policy applied on the node.
//!
//! Real sockets talk from the LAN host to the first pod. Packets of the packet source go to the second one, from
//! addresses of the LAN that no host has, and come in at the end of the node's cable: a real packet of such a flow would
//! be answered by a reset.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::contender::Contender;
use super::packets::{Cable, DATA, FORWARDING, Load, PASSING, Packets, Stream, claim};
use super::ruleset::ALLOWED;
use crate::agent::Agent;
use crate::lab::Lab;
use crate::packet::Tcp;

/// The LAN host that established flows are of.
const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 31, 66);
const PEER_MAC: [u8; 6] = [2, 0, 192, 168, 31, 66];
/// The first of those that new flows are of.
const STRANGERS: Ipv4Addr = Ipv4Addr::new(192, 168, 31, 128);
const FIRST_PORT: u16 = 2000;
const PORTS: u16 = 60_000;
/// From [`STRANGERS`] up to the end of the /24.
const NEW_FLOWS: u32 = 120 * 60_000;

/// The first of the pods in whose name spoofed packets come.
const PODS: Ipv4Addr = Ipv4Addr::new(10, 200, 1, 91);

/// A kind of packets that no rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    Udp,
    Syn,
    Spoofed,
    Fragment,
}

/// A lab with a contender in it.
pub(super) struct Place {
    pub(super) contender: Contender,
    pub(super) lab: Lab,
    pub(super) packets: Packets,
    /// On the LAN.
    pub(super) cable: Cable,
    pod_cable: Cable,
    /// Number of the next packet that the packet source makes: no new flow is opened twice.
    /// Number of the next packet of the packet source: it goes on, so that no flow is opened twice in a row.
    pub(super) next_packet: u64,
    /// The threads that forward: the one that takes packets off the cable, and that of the CPU's other soft interrupts.
    pub(super) forwarding: Vec<u32>,
    /// Present if bridge enforces.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is there to be dropped with the lab"))]
    pub(super) agent: Option<Agent>,
}

impl Place {
    pub(super) fn new(contender: Contender, rules: u32) -> Result<Self> {
        let lab = Lab::builder().build()?;
        let (node, pod) = (lab.b(), lab.c2());
        let mac = PEER_MAC.map(|byte| format!("{byte:02x}")).join(":");
        node.netns.ip(&format!("neigh add {PEER} lladdr {mac} dev eth0 nud permanent"))?;
        // An end of a veth pair takes frames of XDP if it has a NAPI instance, which it has for GRO.
        for interface in ["eth0", &pod.peer_interface] {
            let mut ethtool = Command::new("ethtool");
            ethtool.args(["-K", interface, "gro", "on"]);
            node.netns.output(ethtool)?;
        }
        let mut forwarding = vec![own_thread(&lab)?];
        forwarding.extend(thread_ids(&format!("ksoftirqd/{FORWARDING}"))?);
        let mut packets =
            Packets::new(&[(pod.v4, &pod.netns, "eth0"), (PEER, lab.lan(), &node.peer_interface)])?;
        let agent = contender
            .enforce(&lab, &mut packets, rules)
            .with_context(|| format!("{} with {rules} rules", contender.title()))?;
        let cable = Cable {
            netns: lab.lan().clone(),
            interface: node.peer_interface.clone(),
            macs: (PEER_MAC, node.mac),
        };
        let pod_cable = Cable {
            netns: pod.netns.clone(),
            interface: "eth0".into(),
            macs: (pod.mac, lab.node_side_mac()),
        };
        Ok(Self { contender, packets, cable, pod_cable, next_packet: 0, forwarding, agent, lab })
    }

    /// Where the packet source's packets arrive.
    pub(super) fn sink(&self) -> Ipv4Addr {
        self.lab.c2().v4
    }

    /// Packets of `flows` flows that go on for ever.
    pub(super) fn established(&self, flows: u32) -> Stream {
        let mut data = Tcp::ack(0, 0, 1001, 5001).payload(&[0; DATA]);
        data.header.psh = true;
        self.stream(true, flows, data)
    }

    /// Each packet opens a flow; by the time all are open, the first has been forgotten.
    pub(super) fn new_flows(&self) -> Stream {
        Stream { lan: STRANGERS, ..self.stream(true, NEW_FLOWS, Tcp::syn(0, 0)) }
    }

    /// Packets that no rule allows.
    pub(super) fn denied(&self, kind: Denied) -> Stream {
        let of = |load| Stream { pod_port: ALLOWED.1 + 1, load, ..self.new_flows() };
        match kind {
            Denied::Udp => of(Load::Udp),
            Denied::Syn => of(Load::Tcp(Tcp::syn(0, 0))),
            // In the name of pods of this node.
            Denied::Spoofed => Stream { lan: PODS, flows: 2 * u32::from(PORTS), ..of(Load::Udp) },
            Denied::Fragment => of(Load::Fragment),
        }
    }

    fn stream(&self, from_lan: bool, flows: u32, tcp: Tcp) -> Stream {
        Stream {
            from_lan,
            lan: PEER,
            lan_port: FIRST_PORT,
            ports: PORTS,
            pod: self.sink(),
            pod_port: ALLOWED.0,
            flows,
            load: Load::Tcp(tcp),
        }
    }

    /// Opens `flows` flows by a TCP handshake and sends data both ways, so that every stateful firewall sees them
    /// established.
    ///
    /// # Errors
    /// A packet did not arrive.
    pub(super) fn establish(&mut self, flows: u32) -> Result<()> {
        self.deliver(&self.stream(true, flows, Tcp::syn(0, 0)))?;
        self.deliver(&self.stream(false, flows, Tcp::syn_ack(0, 0)))?;
        self.deliver(&self.stream(true, flows, Tcp::ack(0, 0, 1001, 5001)))?;
        self.speak(flows)
    }

    /// Lets both sides of the first `flows` flows speak, as they do in a real one: the fast path wants to see it, again
    /// and again.
    ///
    /// # Errors
    /// A packet did not arrive.
    pub(super) fn speak(&mut self, flows: u32) -> Result<()> {
        let reply = Tcp::ack(0, 0, 5001, 1001 + u32::try_from(DATA)?);
        self.deliver(&self.established(flows))?;
        self.deliver(&self.stream(false, flows, reply))?;
        self.deliver(&self.established(flows))
    }

    /// One packet of each flow.
    fn deliver(&mut self, stream: &Stream) -> Result<()> {
        let (cable, to) =
            if stream.from_lan { (&self.cable, stream.pod) } else { (&self.pod_cable, stream.lan) };
        self.packets
            .deliver(stream, cable, to, stream.flows)
            .with_context(|| format!("{}: {} flows, {:?}", self.contender.title(), stream.flows, stream.load))
    }

    /// Connection tracking forgets; without it, nothing happens.
    pub(super) fn forget(&self) -> Result<()> {
        let mut conntrack = Command::new("conntrack");
        conntrack.arg("-F");
        self.lab.b().netns.output(conntrack).context("forget connections").map(drop)
    }
}

/// Gives the node's LAN interface a thread of its own that takes packets off the cable, on a CPU of its own.
fn own_thread(lab: &Lab) -> Result<u32> {
    let before = thread_ids("napi/eth0-")?;
    // /sys is that of the namespace only for programs that `ip netns exec` starts.
    let mut ip = Command::new("ip");
    let on = "echo 1 > /sys/class/net/eth0/threaded";
    ip.args(["netns", "exec", lab.b().netns.name(), "sh", "-c", on]);
    let output = ip.output().context("start ip")?;
    ensure!(output.status.success(), "{on}: {}", String::from_utf8_lossy(&output.stderr));
    let new: Vec<_> = thread_ids("napi/eth0-")?.into_iter().filter(|id| !before.contains(id)).collect();
    let [thread] = new[..] else {
        anyhow::bail!("{} threads of interfaces began at once: another benchmark runs", new.len())
    };
    claim(thread, FORWARDING, PASSING)?;
    Ok(thread)
}

/// Ids of the kernel's threads whose names begin so.
fn thread_ids(name: &str) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|id| id.parse().ok()) else { continue };
        // A process that has ended meanwhile has no name.
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|found| found.starts_with(name)) {
            ids.push(id);
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bridge_agent::datapath::{Maps, Pins};
    use etherparse::{NetHeaders, TransportHeader};

    use super::super::alone;
    use super::*;
    use crate::wait::eventually;
    use crate::wire::Capture;

    const FLOWS: u32 = 300;

    #[test]
    fn packets_are_forwarded_as_made_and_each_flow_comes_round() -> Result<()> {
        let _alone = alone()?;
        let mut place = Place::new(Contender::None, 1)?;
        let (sink, stream) = (place.sink(), place.established(FLOWS));
        let mut capture = Capture::start(&place.lab.c2().netns, "eth0")?;
        place.packets.deliver(&stream, &place.cable, sink, 2 * FLOWS)?;
        for number in 0..2 * FLOWS {
            let frame = capture
                .find(Duration::from_secs(5), |frame| frame.tcp().is_some())?
                .with_context(|| format!("packet {number}"))?;
            let headers = frame.headers().context("headers")?;
            let (Some(NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Tcp(tcp))) =
                (headers.net, headers.transport)
            else {
                anyhow::bail!("not TCP in IPv4: {:?}", frame.bytes);
            };
            let port = FIRST_PORT + u16::try_from(number % FLOWS)?;
            assert_eq!((ip.source, tcp.source_port), (PEER.octets(), port));
            assert_eq!((ip.destination, tcp.destination_port), (sink.octets(), ALLOWED.0));
            // One hop further, and whole.
            assert_eq!((ip.time_to_live, ip.header_checksum), (63, ip.calc_header_checksum()));
            assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, headers.payload.slice())?);
        }
        Ok(())
    }

    #[test]
    fn each_contender_allows_the_traffic_of_its_last_rule_and_sees_flows_established() -> Result<()> {
        let _alone = alone()?;
        for contender in Contender::FORWARD {
            if contender.missing(3)?.is_some() {
                continue;
            }
            let mut place = Place::new(contender, 3)?;
            place.establish(FLOWS)?;
            if contender == Contender::None {
                continue;
            }
            // With nftables alone conntrack knows the flows.
            let known = match place.agent.as_ref().filter(|_| contender != Contender::Nftables) {
                Some(agent) => Maps::open(&Pins::new(agent.pins()))?.count_flows()?.established,
                None => {
                    let mut conntrack = Command::new("conntrack");
                    conntrack.args(["-L", "-p", "tcp", "--state", "ESTABLISHED"]);
                    let list = place.lab.b().netns.output(conntrack)?;
                    u64::try_from(list.lines().filter(|line| line.contains("[ASSURED]")).count())?
                }
            };
            assert_eq!(known, u64::from(FLOWS), "{}", contender.title());

            let sink = place.sink();
            let forbidden = Stream { pod_port: ALLOWED.1 + 1, ..place.new_flows() };
            let before = place.packets.arrived(sink)?;
            place.packets.flood(&forbidden, &place.cable, 0, |counts| {
                let many = || counts.made().is_ok_and(|made| made > 100_000).then_some(());
                eventually(Duration::from_secs(5), many).context("nothing is sent")
            })?;
            // Behind all of them.
            place.packets.deliver(&place.established(1), &place.cable, sink, 1)?;
            assert_eq!(
                place.packets.arrived(sink)?,
                before + 1,
                "{}: of a forbidden port",
                contender.title()
            );
        }
        Ok(())
    }
}
