//! Reads the kernel's connections: ctnetlink (linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::{Connection, IPPROTO_ICMP, IPPROTO_ICMPV6, Tuple};

/// Visits every connection that conntrack knows in the network namespace of this thread.
///
/// # Errors
///
/// Error of the kernel; [`io::ErrorKind::Unsupported`] if it has no conntrack.
pub fn for_each(mut visit: impl FnMut(Connection)) -> io::Result<()> {
    const CTNETLINK_GET: u16 = 1 << 8 | 1; // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
    const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(unsupported)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(20);
    request.extend_from_slice(&20_u32.to_ne_bytes());
    request.extend_from_slice(&CTNETLINK_GET.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence number, port
    request.extend_from_slice(&[0; 4]); // nfgenmsg: any family, version 0
    socket.send(&request, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        if !visit_messages(&bytes, &mut visit)? {
            return Ok(());
        }
    }
}

fn unsupported(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    }
}

/// `false`: there are no more.
fn visit_messages(mut bytes: &[u8], visit: &mut impl FnMut(Connection)) -> io::Result<bool> {
    const HEADER: usize = 16;
    const NFGENMSG: usize = 4;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if length < HEADER || length > bytes.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "ctnetlink message that is cut off"));
        }
        let body = &bytes[HEADER..length];
        match u16::from_ne_bytes([bytes[4], bytes[5]]) {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(unsupported(io::Error::from_raw_os_error(-code)));
            }
            _ => {
                if let Some(connection) = body.get(NFGENMSG..).and_then(connection_of) {
                    visit(connection);
                }
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// The value of an attribute, wherever it is among others.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    const HEADER: usize = 4;
    /// Flags in the type: nested, network byte order (`NLA_TYPE_MASK`, linux/netlink.h).
    const FLAGS: u16 = 0xc000;
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let found = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?) & !FLAGS;
        let value = attributes.get(HEADER..length)?;
        if found == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(HEADER)..)?;
    }
}

fn connection_of(attributes: &[u8]) -> Option<Connection> {
    const CTA_TUPLE_ORIG: u16 = 1;
    const CTA_TUPLE_REPLY: u16 = 2;
    const CTA_STATUS: u16 = 3;
    const CTA_PROTOINFO: u16 = 4;
    const CTA_PROTOINFO_TCP: u16 = 1;
    const CTA_PROTOINFO_TCP_STATE: u16 = 1;
    const IPS_SEEN_REPLY: u32 = 1 << 1;
    let status =
        attribute(attributes, CTA_STATUS)?.first_chunk().map(|status| u32::from_be_bytes(*status))?;
    let tcp_state = attribute(attributes, CTA_PROTOINFO)
        .and_then(|info| attribute(info, CTA_PROTOINFO_TCP))
        .and_then(|tcp| attribute(tcp, CTA_PROTOINFO_TCP_STATE))
        .and_then(|state| state.first().copied());
    Some(Connection {
        original: tuple_of(attribute(attributes, CTA_TUPLE_ORIG)?)?,
        reply: tuple_of(attribute(attributes, CTA_TUPLE_REPLY)?)?,
        replied: status & IPS_SEEN_REPLY != 0,
        tcp_state: tcp_state.unwrap_or(0),
    })
}

fn tuple_of(attributes: &[u8]) -> Option<Tuple> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
    const CTA_PROTO_NUM: u16 = 1;
    const CTA_PROTO_SRC_PORT: u16 = 2;
    const CTA_PROTO_DST_PORT: u16 = 3;
    const CTA_PROTO_ICMP_ID: u16 = 4;
    const CTA_PROTO_ICMPV6_ID: u16 = 7;
    let ip = attribute(attributes, CTA_TUPLE_IP)?;
    let protocol = attribute(attributes, CTA_TUPLE_PROTO)?;
    let address = |v4: u16, v6: u16| {
        let v4 = attribute(ip, v4).and_then(<[u8]>::first_chunk::<4>).map(|v4| Ipv4Addr::from(*v4).into());
        v4.or_else(|| {
            attribute(ip, v6).and_then(<[u8]>::first_chunk::<16>).map(|v6| Ipv6Addr::from(*v6).into())
        })
    };
    let port = |kind: u16| {
        attribute(protocol, kind).and_then(<[u8]>::first_chunk).map(|port| u16::from_be_bytes(*port))
    };
    let number = *attribute(protocol, CTA_PROTO_NUM)?.first()?;
    let (source_port, destination_port) = match number {
        IPPROTO_ICMP | IPPROTO_ICMPV6 => {
            let identifier = port(CTA_PROTO_ICMP_ID).or_else(|| port(CTA_PROTO_ICMPV6_ID))?;
            (identifier, identifier)
        }
        _ => (port(CTA_PROTO_SRC_PORT).unwrap_or(0), port(CTA_PROTO_DST_PORT).unwrap_or(0)),
    };
    Some(Tuple {
        source: address(1, 3)?,
        source_port,
        destination: address(2, 4)?,
        destination_port,
        protocol: number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_cut_off_anywhere_are_an_error_or_left_out() {
        let mut message = vec![0; 16];
        message.extend_from_slice(&[2, 0, 0, 0, 8, 0, 3, 0, 0, 0, 0, 2, 6, 0, 1, 0, 1]);
        for length in 16..message.len() {
            let mut cut = message[..length].to_vec();
            cut[..4].copy_from_slice(&u32::try_from(length).unwrap().to_ne_bytes());
            let mut seen = 0;
            assert!(visit_messages(&cut, &mut |_| seen += 1).is_ok());
            assert_eq!(seen, 0);
        }
        message[..4].copy_from_slice(&1000_u32.to_ne_bytes());
        assert!(visit_messages(&message, &mut |_| ()).is_err());
    }
}
