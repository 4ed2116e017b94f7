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

use super::elsewhere::{BEYOND, OVERLAY, OVERLAY_MACS, VXLAN, encapsulated, other_node};
use super::endpoints::side;
use super::identity::{Assembly, Identity};
use super::{LAN, PODS, Sent, Side, local};
use crate::netns::Ns;
use crate::packet::Packet;
use crate::wire;

/// The interfaces of the node, and the other ends of their cables.
pub(super) const SIDES: [(Side, &str, &str); 2] =
    [(Side::Lan, "lan0", "lan-end"), (Side::Pods, "pods0", "pods-end")];
/// The node's end of the overlay.
pub(super) const OVERLAY_INTERFACE: &str = "overlay0";
/// Locally administered.
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const END_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The node's neighbour on either side.
const GATEWAYS: [&str; 2] = ["169.254.1.1", "fe80::1"];
/// RFC 2544; no policy names them, so packets between them pass. In the order of [`Side::ALL`].
const MARKERS: [Ipv4Addr; 3] =
    [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 128, 1), Ipv4Addr::new(198, 18, 192, 1)];
/// Protocols that are seen to reach the node: TCP, UDP, SCTP, one that no kernel without IPsec understands, and IP in IP.
const DELIVERED: [u8; 5] = [6, 17, 132, 51, 4];
const ETHERNET: usize = 14;
/// From the start of a VXLAN frame over IPv4 to the frame inside.
const OUTER: usize = ETHERNET + 20 + 8 + 8;
/// How long a marker may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Frames between two markers, or some more if the last packet is in fragments: fewer than a CPU's queue
/// (`net.core.netdev_max_backlog`, 1000) and the ring of a veth with an XDP program hold (`VETH_RING_SIZE`, 256).
const BATCH: usize = 200;

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
    is_cut_off: bool,
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
                ("ipv4/conf/all/send_redirects", "0"),
                ("ipv4/conf/default/send_redirects", "0"),
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
            // An XDP program makes veth join segments, which are then other packets.
            ns.ip(&format!("link set {name} gro_max_size 1"));
            let blocks = if side == Side::Lan { [LAN, BEYOND].concat() } else { PODS.to_vec() };
            lead(&ns, side, name, END_MAC, &blocks);
        }
        for address in local() {
            ns.address(SIDES[0].1, &format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
        }
        let [node, other] = other_node();
        ns.ip(&format!("route add {node} via {} dev {} onlink", GATEWAYS[0], SIDES[0].1));
        ns.ip(&format!("route add {other} via {} dev {} onlink", GATEWAYS[1], SIDES[0].1));
        let [mac, other_mac] = OVERLAY_MACS;
        ns.ip(&format!(
            "link add {OVERLAY_INTERFACE} address {} type vxlan id 1 local {} remote {node} dstport {VXLAN} nolearning",
            text(mac),
            local()[0]
        ));
        ns.ip(&format!("link set {OVERLAY_INTERFACE} up"));
        ns.run("ethtool", &["-K", OVERLAY_INTERFACE, "gro", "off"]);
        lead(&ns, Side::Overlay, OVERLAY_INTERFACE, other_mac, &OVERLAY);
        let open = |end: &'static str| ends.enter(move || cable(end)).context("a packet socket");
        let cables = [open(SIDES[0].2)?, open(SIDES[1].2)?];
        let delivered = ns.enter(raw_sockets).context("raw sockets")?;
        Ok(Self { ns: Arc::new(ns), ends: cables, delivered, serial: 0, is_cut_off: false, _ends: ends })
    }

    /// Index and name of the interface on a side.
    pub(super) fn interface(&self, side: Side) -> Result<(u32, &'static str)> {
        let name = SIDES.get(side as usize).map_or(OVERLAY_INTERFACE, |(_, name, _)| name);
        let index = self.ns.enter(move || {
            name_to_index(Socket::new(Domain::IPV4, Type::DGRAM, None)?, name).map_err(io::Error::from)
        });
        Ok((index?, name))
    }

    /// Sets whether no packet gets in by the overlay.
    pub(super) const fn cut_off(&mut self, is_cut_off: bool) {
        self.is_cut_off = is_cut_off;
    }

    /// Sends everything in order; for each, whether it came out where its destination is, or reached the node itself.
    ///
    /// Call on a thread that stays on one CPU: each CPU has a queue of its own for packets of a veth.
    pub(super) fn send(&mut self, sent: &[Sent]) -> Result<Vec<bool>> {
        let mut seen = Seen::new();
        let mut frames = 0;
        for (number, one) in sent.iter().enumerate() {
            one.packets.iter().try_for_each(|packet| self.inject(one.from, packet))?;
            frames += one.packets.len();
            if frames >= BATCH || number + 1 == sent.len() {
                self.collect(&mut seen)?;
                frames = 0;
            }
        }
        let passed = |sent: &Sent| -> Result<bool> {
            let mut assembly = Assembly::default();
            let out = sent.arrives.as_ref().map_or(sent.packets.as_slice(), std::slice::from_ref);
            let whole = out.iter().find_map(|packet| assembly.add(&packet.ip()));
            let identity = whole.context("fragments that make no whole")?;
            let is_local = local().contains(&identity.destination);
            let to = if is_local { None } else { Some(side(identity.destination)) };
            Ok(seen.contains(&(to, identity)))
        };
        sent.iter().map(passed).collect()
    }

    fn inject(&self, from: Side, packet: &Packet) -> Result<()> {
        let (cable, packet) = match from {
            Side::Overlay => (Side::Lan, &encapsulated(other_node()[0], local()[0], VXLAN, packet)),
            cable => (cable, packet),
        };
        let frame = packet.clone().macs(END_MAC, NODE_MAC).frame();
        let sent = self.ends[cable as usize].send(&frame)?;
        ensure!(sent == frame.len(), "sent {sent} of {} octets", frame.len());
        Ok(())
    }

    /// Everything up to markers that are sent now.
    fn collect(&mut self, seen: &mut Seen) -> Result<()> {
        self.serial += 1;
        let mark = self.serial.to_be_bytes();
        let [lan, pods, overlay] = MARKERS.map(IpAddr::from);
        let overlay_markers = [(Side::Overlay, overlay, pods), (Side::Overlay, overlay, lan)];
        let through_overlay = if self.is_cut_off { &[][..] } else { &overlay_markers };
        // The kernel queues the packets of a tunnel once more: they come out behind later ones.
        let direct = [(Side::Lan, lan, pods), (Side::Pods, pods, lan), (Side::Lan, lan, local()[0])];
        for &(from, source, to) in direct.iter().chain(through_overlay) {
            self.inject(from, &Packet::new(source, to).udp(9, 9, &mark))?;
        }
        let is_marker = |identity: &Identity| {
            MARKERS.map(IpAddr::from).contains(&identity.source) && identity.payload.ends_with(&mark)
        };
        let mut assembly = Assembly::default();
        let mut buffer = vec![0; usize::from(u16::MAX) + ETHERNET];
        for (socket, (cable, ..)) in self.ends.iter().zip(SIDES) {
            let mut markers = if self.is_cut_off { 1 } else { 2 };
            while markers > 0 {
                let (length, _) = receive(socket, &mut buffer)?.with_context(|| {
                    format!("{markers} markers are missing on side {cable:?} after {DEADLINE:?}")
                })?;
                let (side, ip) = match inside(&buffer[..length]) {
                    Some(ip) => (Side::Overlay, ip),
                    None => (cable, buffer.get(ETHERNET..length).unwrap_or_default()),
                };
                let Some(identity) = assembly.add(ip) else { continue };
                if is_marker(&identity) {
                    markers -= 1;
                } else {
                    seen.insert((Some(side), identity));
                }
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

/// Routes blocks of addresses, and the marker of a side, to the neighbour on that side.
fn lead(ns: &Ns, side: Side, interface: &str, neighbour: [u8; 6], blocks: &[&str]) {
    for gateway in GATEWAYS {
        ns.ip(&format!("neigh add {gateway} lladdr {} dev {interface} nud permanent", text(neighbour)));
    }
    let marker = MARKERS[side as usize].to_string();
    for block in blocks.iter().chain([&marker.as_str()]) {
        let gateway = GATEWAYS[usize::from(block.contains(':'))];
        ns.ip(&format!("route add {block} via {gateway} dev {interface} onlink"));
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

/// Returns the IP packet inside of a VXLAN frame that the node sends.
fn inside(frame: &[u8]) -> Option<&[u8]> {
    let IpAddr::V4(own) = local()[0] else { return None };
    let is_outer = frame.get(12..14)? == [8, 0]
        && frame.get(23)? == &17
        && frame.get(26..30)? == own.octets()
        && frame.get(36..38)? == VXLAN.to_be_bytes();
    if is_outer { frame.get(OUTER + ETHERNET..) } else { None }
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
