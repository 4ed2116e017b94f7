//! ICMP echo (RFC 792, RFC 4443) through a raw socket.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type};
use socket2::{Protocol, Socket, Type};

use super::{Attempt, domain, left};
use crate::lab::Netns;

/// Asks `to` for an echo and waits for it.
///
/// # Errors
/// A system call fails. The answer of the network is in the [`Attempt`].
pub fn echo(netns: &Netns, to: IpAddr, deadline: Duration) -> io::Result<Attempt<()>> {
    let protocol = if to.is_ipv4() { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
    let mut socket = netns.run(|| Socket::new(domain(to), Type::RAW, Some(protocol)))?;
    let echo = IcmpEchoHeader { id: rand::random(), seq: 1 };
    let start = Instant::now();
    let result = socket
        // A connected socket gets answers from this peer alone, and ICMP errors as errors.
        .connect(&SocketAddr::new(to, 0).into())
        .and_then(|()| socket.send(&request(to, echo)))
        .and_then(|_| await_reply(&mut socket, to, echo, start + deadline));
    Attempt::sort(result, start.elapsed())
}

fn request(to: IpAddr, echo: IcmpEchoHeader) -> Vec<u8> {
    match to {
        IpAddr::V4(_) => Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &[]).to_bytes().to_vec(),
        // The kernel fills in the checksum (RFC 3542, 3.1).
        IpAddr::V6(_) => Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes().to_vec(),
    }
}

fn await_reply(socket: &mut Socket, to: IpAddr, echo: IcmpEchoHeader, end: Instant) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left(end)))?;
        let length = socket.read(&mut buffer)?;
        if is_reply(&buffer[..length], to, echo) {
            return Ok(());
        }
    }
}

/// A raw IPv4 socket hands out the IP header too; a raw IPv6 socket does not.
fn is_reply(packet: &[u8], to: IpAddr, echo: IcmpEchoHeader) -> bool {
    match to {
        IpAddr::V4(_) => etherparse::Ipv4Header::from_slice(packet)
            .ok()
            .and_then(|(_, rest)| Icmpv4Header::from_slice(rest).ok())
            .is_some_and(|(icmp, _)| icmp.icmp_type == Icmpv4Type::EchoReply(echo)),
        IpAddr::V6(_) => Icmpv6Header::from_slice(packet)
            .is_ok_and(|(icmp, _)| icmp.icmp_type == Icmpv6Type::EchoReply(echo)),
    }
}
