//! A node between a LAN and silent pods: a packet that leaves it was put into it, or is its own answer.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::netdevice::name_to_index;
use socket2::{Domain, Protocol, Socket, Type};

use super::identity::{Assembly, Identity};
use super::{LAN, PODS, Sent, Side, local};
use crate::netns::Ns;
use crate::packet::Packet;
use crate::wire;

/// The interfaces of the node, and the other ends of their cables.
pub(super) const SIDES: [(Side, &str, &str); 2] =
    [(Side::Lan, "lan0", "lan-end"), (Side::Pods, "pods0", "pods-end")];
/// Locally administered.
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const END_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The node's neighbour on either side.
const GATEWAYS: [&str; 2] = ["169.254.1.1", "fe80::1"];
/// RFC 2544; no policy names them, so packets between them pass. In the order of [`SIDES`].
const MARKERS: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 128, 1)];
/// Protocols that are seen to reach the node: TCP, UDP, SCTP, and one that no kernel without IPsec understands.
const DELIVERED: [u8; 4] = [6, 17, 132, 51];
const ETHERNET: usize = 14;
/// How long a marker may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Packets between two markers: fewer than a CPU's queue holds (`net.core.netdev_max_backlog`, 1000).
const BATCH: usize = 250;

/// Where a packet came out: on a side, or (`None`) at the node itself.
type Seen = HashSet<(Option<Side>, Identity)>;

/// A node with an interface on either side.
pub(super) struct Node {
    /// Its namespace; engines work in it.
    pub(super) ns: Arc<Ns>,
    /// Send frames into the node, and receive those that leave it. In the order of [`SIDES`].
    ends: [Socket; 2],
    /// Sockets of the node itself, behind every hook, by protocol.
    delivered: Vec<(Domain, u8, Socket)>,
    serial: u32,
    _ends: Ns,
}

impl Node {
    pub(super) fn new() -> Result<Self> {
        let (ns, ends) = (Ns::new(), Ns::new());
        sysctl(
            &ns,
            &[
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                // No link-local address, and so nothing said about one.
                ("ipv6/conf/default/addr_gen_mode", "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                // Parts of datagrams whose first fragment was denied are forgotten before their numbers come again.
                ("ipv4/ipfrag_time", "1"),
                ("ipv6/ip6frag_time", "1"),
                ("netfilter/nf_conntrack_frag6_timeout", "1"),
            ],
        )?;
        sysctl(&ends, &[("ipv6/conf/default/disable_ipv6", "1")])?;
        for (side, name, end) in SIDES {
            ns.link(name, &ends, end);
            ns.ip(&format!("link set {name} address 02:00:00:00:00:01"));
            // Checksums are looked at, as they are on a device that does not vouch for them.
            ns.run("ethtool", &["-K", name, "rx", "off"]);
            for gateway in GATEWAYS {
                ns.ip(&format!("neigh add {gateway} lladdr 02:00:00:00:00:02 dev {name} nud permanent"));
            }
            let (blocks, marker) = match side {
                Side::Lan => (LAN, MARKERS[0]),
                Side::Pods => (PODS, MARKERS[1]),
            };
            for block in blocks.map(ToOwned::to_owned).into_iter().chain([marker.to_string()]) {
                let gateway = GATEWAYS[usize::from(block.contains(':'))];
                ns.ip(&format!("route add {block} via {gateway} dev {name} onlink"));
            }
        }
        for address in local() {
            ns.address(SIDES[0].1, &format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
        }
        let open = |end: &'static str| ends.enter(move || cable(end)).context("a packet socket");
        let cables = [open(SIDES[0].2)?, open(SIDES[1].2)?];
        let delivered = ns.enter(raw_sockets).context("raw sockets")?;
        Ok(Self { ns: Arc::new(ns), ends: cables, delivered, serial: 0, _ends: ends })
    }

    /// Index and name of the interface on a side.
    pub(super) fn interface(&self, side: Side) -> Result<(u32, &'static str)> {
        let (_, name, _) = SIDES[side as usize];
        let index = self.ns.enter(move || {
            name_to_index(Socket::new(Domain::IPV4, Type::DGRAM, None)?, name).map_err(io::Error::from)
        });
        Ok((index?, name))
    }

    /// Sends everything in order; for each, whether it came out on the other side or reached the node itself.
    ///
    /// Call on a thread that stays on one CPU: each CPU has a queue of its own for packets of a veth.
    pub(super) fn send(&mut self, sent: &[Sent]) -> Result<Vec<bool>> {
        let mut seen = Seen::new();
        for batch in sent.chunks(BATCH) {
            for sent in batch {
                sent.packets.iter().try_for_each(|packet| self.inject(sent.from, packet))?;
            }
            self.collect(&mut seen)?;
        }
        let passed = |sent: &Sent| -> Result<bool> {
            let mut assembly = Assembly::default();
            let out = sent.arrives.as_ref().map_or(sent.packets.as_slice(), std::slice::from_ref);
            let whole = out.iter().find_map(|packet| assembly.add(&packet.ip()));
            let identity = whole.context("fragments that make no whole")?;
            let to = if local().contains(&identity.destination) { None } else { Some(sent.from.other()) };
            Ok(seen.contains(&(to, identity)))
        };
        sent.iter().map(passed).collect()
    }

    fn inject(&self, from: Side, packet: &Packet) -> Result<()> {
        let frame = packet.clone().macs(END_MAC, NODE_MAC).frame();
        let sent = self.ends[from as usize].send(&frame)?;
        ensure!(sent == frame.len(), "sent {sent} of {} octets", frame.len());
        Ok(())
    }

    /// Everything up to markers that are sent now.
    fn collect(&mut self, seen: &mut Seen) -> Result<()> {
        self.serial += 1;
        let mark = self.serial.to_be_bytes();
        let [lan, pods] = MARKERS.map(IpAddr::from);
        for (from, source, to) in
            [(Side::Lan, lan, pods), (Side::Pods, pods, lan), (Side::Lan, lan, local()[0])]
        {
            self.inject(from, &Packet::new(source, to).udp(9, 9, &mark))?;
        }
        let is_marker = |identity: &Identity| {
            MARKERS.map(IpAddr::from).contains(&identity.source) && identity.payload.ends_with(&mark)
        };
        let mut assembly = Assembly::default();
        let mut buffer = vec![0; usize::from(u16::MAX) + ETHERNET];
        for (socket, (side, ..)) in self.ends.iter().zip(SIDES) {
            loop {
                let (length, _) = receive(socket, &mut buffer)?
                    .with_context(|| format!("no marker came out on side {side:?} in {DEADLINE:?}"))?;
                let ip = buffer.get(ETHERNET..length).unwrap_or_default();
                let Some(identity) = assembly.add(ip) else { continue };
                if is_marker(&identity) {
                    break;
                }
                seen.insert((Some(side), identity));
            }
        }
        let end = Instant::now() + DEADLINE;
        let mut arrived = false;
        // Once more after the marker was seen: by then, earlier packets are in the other sockets.
        loop {
            let last_look = arrived;
            for (domain, protocol, socket) in &self.delivered {
                while let Some((length, from)) = receive(socket, &mut buffer)? {
                    let bytes = &buffer[..length];
                    let identity = match (*domain, from, local()[1]) {
                        (Domain::IPV4, ..) => assembly.add(bytes),
                        (_, Some(from), IpAddr::V6(own)) => assembly.add_v6(from, own, *protocol, bytes),
                        _ => None,
                    };
                    arrived |= identity.as_ref().is_some_and(is_marker);
                    seen.extend(identity.map(|identity| (None, identity)));
                }
            }
            if last_look {
                return Ok(());
            }
            ensure!(Instant::now() < end, "no marker reached the node in {DEADLINE:?}");
        }
    }
}

fn sysctl(ns: &Ns, values: &'static [(&'static str, &'static str)]) -> Result<()> {
    ns.enter(move || {
        values.iter().try_for_each(|(path, value)| {
            std::fs::write(format!("/proc/sys/net/{path}"), value).with_context(|| format!("set {path}"))
        })
    })
}

/// Sends on an interface, and receives its incoming packets, but not its own.
fn cable(interface: &str) -> io::Result<Socket> {
    let socket = wire::open(interface, libc::ETH_P_ALL)?;
    wire::set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, wire::BUFFER)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket)
}

fn raw_sockets() -> io::Result<Vec<(Domain, u8, Socket)>> {
    let mut sockets = Vec::new();
    for domain in [Domain::IPV4, Domain::IPV6] {
        for protocol in DELIVERED {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(protocol))))?;
            wire::set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, wire::BUFFER)?;
            socket.set_nonblocking(true)?;
            sockets.push((domain, protocol, socket));
        }
    }
    Ok(sockets)
}

/// Returns the length of a packet, and its IPv6 source if the socket reports it. `None`: there is none.
fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<Ipv6Addr>)>> {
    // SAFETY: octets of any value are initialised octets, and the kernel writes nothing else.
    let room = unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) };
    match socket.recv_from(room) {
        Ok((length, from)) => Ok(Some((length, from.as_socket_ipv6().map(|from| *from.ip())))),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
