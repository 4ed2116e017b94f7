//! Values of options, read as those of the configuration file.

use std::{net::SocketAddr, str::FromStr, time::Duration};

use ipnet::IpNet;

use crate::config::{
    HostOrNetwork, Network, TimeSpan,
    leaf::{Leaf, Problem, SocketAddress},
    ports::one_port,
    whole_number,
};

fn text(problem: Problem) -> String {
    problem.to_string()
}

/// A duration, such as 30s.
pub(super) fn time(value: &str) -> Result<Duration, String> {
    TimeSpan::parse(value).map(TimeSpan::duration).map_err(text)
}

/// A port, 1 to 65535.
pub(super) fn port(value: &str) -> Result<u16, String> {
    one_port(value).map_err(text)
}

/// A whole number from 1 on.
pub(super) fn number<T: FromStr>(value: &str) -> Result<T, String> {
    whole_number(value, 1).map_err(text)
}

/// An address or a network.
pub(super) fn address(value: &str) -> Result<IpNet, String> {
    HostOrNetwork::parse(value).map(HostOrNetwork::net).map_err(text)
}

/// A network.
pub(super) fn network(value: &str) -> Result<IpNet, String> {
    Network::parse(value).map(Network::net).map_err(text)
}

/// An address and a port.
pub(super) fn socket_address(value: &str) -> Result<SocketAddr, String> {
    SocketAddress::parse(value).map(|address| address.0).map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_addresses_are_those_of_the_configuration() {
        assert_eq!((port("80"), number("7")), (Ok(80), Ok(7_u64)));
        for bad in ["", "0", "080", "+80", "0x50", "80-81", "65536", " 80", "\u{663}"] {
            assert!(port(bad).unwrap_err().contains("write "), "{bad:?}");
        }
        for bad in ["", "0", "07", "+7", "7 ", "1e3", "99999999999999999999"] {
            assert!(number::<u32>(bad).unwrap_err().contains("write "), "{bad:?}");
        }
        for bad in ["", "10.0.0.0/08", "10.0.0.1/8", "010.0.0.1", "::ffff:10.0.0.1"] {
            assert!(address(bad).unwrap_err().contains("write "), "{bad:?}");
        }
        assert_eq!(address("10.200.1.91").unwrap().to_string(), "10.200.1.91/32");
        assert!(network("10.0.0.1").is_err() && socket_address("10.0.0.1:080").is_err());
    }
}
