//! Closed connections that conntrack still has: their ports must not be used for another pod yet.

use std::{collections::HashSet, io, net::IpAddr};

use bridge_common::{pool::Destination, protocol};

use crate::kernel::conntrack;

/// Returns destination and source port (host byte order) of every TCP and UDP connection in conntrack, in the direction
/// of its first packet.
///
/// # Errors
/// Those of [`conntrack::for_each`].
pub fn known() -> io::Result<HashSet<(Destination, u16)>> {
    let mut known = HashSet::new();
    conntrack::for_each(|connection| known.extend(entry(&connection.original)))?;
    Ok(known)
}

fn entry(original: &conntrack::Tuple) -> Option<(Destination, u16)> {
    let conntrack::Tuple { source_port, destination, destination_port, protocol, .. } = *original;
    let port = destination_port.to_be_bytes();
    let destination = match destination {
        IpAddr::V4(address) => Destination::from_network_v4(address.octets(), port, protocol),
        IpAddr::V6(address) => Destination::from_network(address.octets(), port, protocol),
    };
    matches!(protocol, protocol::TCP | protocol::UDP).then_some((destination, source_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcp_or_udp_connection_is_known_by_its_first_direction() {
        let tuple = |protocol| conntrack::Tuple {
            source: [10, 200, 1, 91].into(),
            source_port: 61_001,
            destination: [192, 168, 31, 67].into(),
            destination_port: 443,
            protocol,
        };
        for protocol in [6, 17] {
            let to = Destination::from_network_v4([192, 168, 31, 67], [1, 187], protocol);
            assert_eq!(entry(&tuple(protocol)), Some((to, 61_001)));
        }
        assert_eq!(entry(&tuple(1)), None);
    }
}
