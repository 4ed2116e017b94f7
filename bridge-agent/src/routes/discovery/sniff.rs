//! Passive discovery: which addresses connections arrive from.
//!
//! Shows the same as `tcpdump 'tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn and dst port P'` on the host while a client
//! connects from a pod: the address of the pod's node. Sees the packets before any firewall judges them, so nothing has
//! to listen on the port. Needs CAP_NET_RAW.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use serde::Serialize;
use socket2::{Domain, SockFilter, Socket, Type};
use tokio::io::unix::AsyncFd;

/// Headers fit: 60 bytes of IPv4 or 40 of IPv6, and 20 of TCP.
const SNAP: usize = 128;

const ETH_P_ALL: u16 = 3;
const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
const PACKET_OUTGOING: u32 = 4;
const TCP: u32 = 6;

/// A new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Attempt {
    /// Where it comes from: behind masquerade, the node's address.
    pub from: SocketAddr,
    /// Where it goes.
    pub to: SocketAddr,
}

/// Sees SYNs as they arrive on any interface of the network namespace.
pub struct Sniffer {
    socket: AsyncFd<Socket>,
    port: u16,
}

impl Sniffer {
    /// For connections to this destination port.
    pub fn open(port: u16) -> io::Result<Self> {
        // Protocol 0 receives nothing until the filter is in place.
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&filter(port))?;
        bind_all(&socket)?;
        // SAFETY: `Socket` owns its descriptor and gives out the same one for as long as it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket, port })
    }

    /// The next attempt. A retransmitted SYN is another one.
    pub async fn next(&mut self) -> io::Result<Attempt> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut buffer = [MaybeUninit::<u8>::uninit(); SNAP];
            match ready.try_io(|socket| socket.get_ref().recv(&mut buffer)) {
                Ok(Ok(length)) => {
                    // SAFETY: `recv` filled the first `length` bytes (it returns no more than fit).
                    let packet =
                        unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length.min(SNAP)) };
                    if let Some(attempt) = parse(packet).filter(|attempt| attempt.to.port() == self.port) {
                        return Ok(attempt);
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // An interface went down; the others go on.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

/// Binds to all protocols of all interfaces.
fn bind_all(socket: &Socket) -> io::Result<()> {
    let address = || {
        // SAFETY: the storage is zeroed and large enough for every kind of address, `sockaddr_ll` among them.
        unsafe {
            socket2::SockAddr::try_init(|storage, length| {
                let address = &mut *storage.cast::<libc::sockaddr_ll>();
                address.sll_family =
                    libc::sa_family_t::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
                address.sll_protocol = ETH_P_ALL.to_be();
                *length =
                    libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
                Ok(())
            })
        }
    };
    socket.bind(&address()?.1)
}

/// The SYN of a connection, in a packet that begins with the IP header.
fn parse(packet: &[u8]) -> Option<Attempt> {
    // The buffer holds the headers only: lengths that reach beyond it are as they should be.
    let packet = LaxSlicedPacket::from_ip(packet).ok()?;
    let (from, to): (IpAddr, IpAddr) = match packet.net? {
        LaxNetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        LaxNetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        _ => return None,
    };
    match packet.transport? {
        TransportSlice::Tcp(tcp) if tcp.syn() && !tcp.ack() => Some(Attempt {
            from: SocketAddr::new(from, tcp.source_port()),
            to: SocketAddr::new(to, tcp.destination_port()),
        }),
        _ => None,
    }
}

/// Accepts packets that arrive, are TCP directly behind IPv4 or IPv6, is no later fragment, has the port, and has SYN
/// without ACK. Everything else costs no wake-up. (`man 7 packet`, `linux/filter.h`; `tcpdump -d` shows such programs.)
fn filter(port: u16) -> Vec<SockFilter> {
    const LD_W_ABS: u16 = 0x20;
    const LD_H_ABS: u16 = 0x28;
    const LD_B_ABS: u16 = 0x30;
    const LD_H_IND: u16 = 0x48;
    const LD_B_IND: u16 = 0x50;
    const LDX_MSH: u16 = 0xb1;
    const AND_K: u16 = 0x54;
    const JEQ_K: u16 = 0x15;
    const JSET_K: u16 = 0x45;
    const RET_K: u16 = 0x06;
    // Loads from here read the packet's metadata: SKF_AD_OFF (-0x1000) plus the field.
    const PROTOCOL: u32 = 0xffff_f000;
    const PACKET_TYPE: u32 = 0xffff_f004;
    const SYN_ACK: u32 = 0x12;
    const SYN: u32 = 0x02;
    let step = |code, k| SockFilter::new(code, 0, 0, k);
    // A jump counts the instructions it leaves out.
    let jump = |code, k, yes, no| SockFilter::new(code, yes, no, k);
    let port = u32::from(port);
    vec![
        /*  0 */ step(LD_W_ABS, PACKET_TYPE),
        /*  1 */ jump(JEQ_K, PACKET_OUTGOING, 22, 0),
        /*  2 */ step(LD_W_ABS, PROTOCOL),
        /*  3 */ jump(JEQ_K, ETH_P_IPV6, 11, 0),
        /*  4 */ jump(JEQ_K, ETH_P_IP, 0, 19),
        /*  5 */ step(LD_B_ABS, 9),
        /*  6 */ jump(JEQ_K, TCP, 0, 17),
        /*  7 */ step(LD_H_ABS, 6),
        /*  8 */ jump(JSET_K, 0x1fff, 15, 0),
        /*  9 */ step(LDX_MSH, 0),
        /* 10 */ step(LD_H_IND, 2),
        /* 11 */ jump(JEQ_K, port, 0, 12),
        /* 12 */ step(LD_B_IND, 13),
        /* 13 */ step(AND_K, SYN_ACK),
        /* 14 */ jump(JEQ_K, SYN, 8, 9),
        /* 15 */ step(LD_B_ABS, 6),
        /* 16 */ jump(JEQ_K, TCP, 0, 7),
        /* 17 */ step(LD_H_ABS, 42),
        /* 18 */ jump(JEQ_K, port, 0, 5),
        /* 19 */ step(LD_B_ABS, 53),
        /* 20 */ step(AND_K, SYN_ACK),
        /* 21 */ jump(JEQ_K, SYN, 1, 2),
        /* 22 */ step(RET_K, 0),
        /* 23 */ step(RET_K, u32::MAX),
        /* 24 */ step(RET_K, 0),
    ]
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn packet(v6: bool, syn: bool, ack: bool) -> Vec<u8> {
        let builder = if v6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64)
        } else {
            PacketBuilder::ipv4([192, 168, 31, 17], [192, 168, 31, 67], 64)
        };
        let mut tcp = builder.tcp(40000, 12345, 7, 1000);
        if syn {
            tcp = tcp.syn();
        }
        if ack {
            tcp = tcp.ack(1);
        }
        let mut bytes = Vec::new();
        tcp.write(&mut bytes, &[]).unwrap();
        bytes
    }

    #[test]
    fn only_the_first_packet_of_a_connection_is_an_attempt() {
        let attempt = parse(&packet(false, true, false)).unwrap();
        assert_eq!(
            (attempt.from.to_string(), attempt.to.to_string()),
            ("192.168.31.17:40000".into(), "192.168.31.67:12345".into())
        );
        assert!(parse(&packet(true, true, false)).unwrap().from.is_ipv6());
        for (syn, ack) in [(true, true), (false, true), (false, false)] {
            assert_eq!(parse(&packet(false, syn, ack)), None);
        }
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_parser_panic(v6 in any::<bool>(), cut in 0usize..60, place in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = packet(v6, true, false);
            bytes.truncate(bytes.len().saturating_sub(cut));
            if !bytes.is_empty() {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            _ = parse(&bytes);
        }
    }
}
