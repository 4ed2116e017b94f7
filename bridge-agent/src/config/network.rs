//! Networks in CIDR notation, without host bits and without leading zeros.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::leaf::{Leaf, Problem, has_leading_zero, leading_zero, leaf};

/// A network in CIDR notation (RFC 4632, RFC 4291 section 2.3), host bits zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network(IpNet);

leaf!(Network);

impl Network {
    /// The prefix.
    #[must_use]
    pub const fn net(self) -> IpNet {
        self.0
    }
}

impl From<Network> for IpNet {
    fn from(network: Network) -> Self {
        network.0
    }
}

impl From<IpNet> for Network {
    /// Clears the host bits.
    fn from(net: IpNet) -> Self {
        Self(net.trunc())
    }
}

impl Leaf for Network {
    const FORMAT: &'static str = "cidr";
    const EXAMPLE: &'static str = "10.200.1.0/24";

    fn parse(text: &str) -> Result<Self, Problem> {
        if let Ok(address) = IpAddr::from_str(text) {
            let whole = IpNet::from(address);
            return Err(Problem::new(
                format!("`{text}` has no prefix length"),
                format!("write {whole} for this one address, or the prefix of its network"),
            ));
        }
        let net = net(text).ok_or_else(|| not_a_network(text))?;
        check(text, net)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One address, or a network in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostOrNetwork(IpNet);

leaf!(HostOrNetwork);

impl HostOrNetwork {
    /// The prefix; of one address, all its bits.
    #[must_use]
    pub const fn net(self) -> IpNet {
        self.0
    }
}

impl From<IpNet> for HostOrNetwork {
    /// Clears the host bits.
    fn from(net: IpNet) -> Self {
        Self(net.trunc())
    }
}

impl Leaf for HostOrNetwork {
    const FORMAT: &'static str = "ip-or-cidr";
    const EXAMPLE: &'static str = "192.168.31.17";

    fn parse(text: &str) -> Result<Self, Problem> {
        let net = match IpAddr::from_str(text) {
            Ok(address) => IpNet::from(address),
            Err(_) => net(text).ok_or_else(|| not_a_network(text))?,
        };
        check(text, net).map(|network| Self(network.0))
    }
}

impl fmt::Display for HostOrNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() { self.0.addr().fmt(f) } else { self.0.fmt(f) }
    }
}

/// Parses ADDRESS/LENGTH. `ipnet` takes `010.0.0.0/08` for 10.0.0.0/8, other readers for octal, so neither part may begin
/// with a superfluous zero.
fn net(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    if has_leading_zero(length) || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    IpNet::new(IpAddr::from_str(address).ok()?, length.parse().ok()?).ok()
}

fn not_a_network(text: &str) -> Problem {
    if let Some(problem) =
        leading_zero(text, |shortest| net(shortest).is_some() || IpAddr::from_str(shortest).is_ok())
    {
        return problem;
    }
    let problem = format!("`{text}` is not a network");
    if let Some((address, length)) = text.split_once('/')
        && let Ok(address) = IpAddr::from_str(address)
    {
        let most = IpNet::from(address).prefix_len();
        let help = format!("write a prefix length from 0 to {most} after {address}/, not `{length}`");
        return Problem::new(problem, help);
    }
    Problem::new(problem, "write ADDRESS/LENGTH, such as 192.168.31.0/24 or fd00:31::/64")
}

fn check(text: &str, net: IpNet) -> Result<Network, Problem> {
    if net.trunc() != net {
        let host = IpNet::from(net.addr());
        return Err(Problem::new(
            format!("`{text}` has bits set after its first {}", net.prefix_len()),
            format!("write {} for the network, or {host} for this one address", net.trunc()),
        ));
    }
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return Err(Problem::new(
            format!(
                "`{text}` is an IPv4-mapped address (RFC 4291 section 2.5.5.2), which never is on the wire"
            ),
            format!("write {v4}/{}", v6.prefix_len() - 96),
        ));
    }
    Ok(Network(net))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_refused_with_the_right_network() {
        let problem = Network::parse("10.200.1.7/24").unwrap_err();
        assert_eq!(problem.message, "`10.200.1.7/24` has bits set after its first 24");
        assert_eq!(
            problem.help,
            "write 10.200.1.0/24 for the network, or 10.200.1.7/32 for this one address"
        );
        let problem = Network::parse("fd00:31::17/64").unwrap_err();
        assert_eq!(
            problem.help,
            "write fd00:31::/64 for the network, or fd00:31::17/128 for this one address"
        );
    }

    #[test]
    fn a_bare_address_says_which_prefix() {
        let problem = Network::parse("192.168.31.67").unwrap_err();
        assert_eq!(problem.help, "write 192.168.31.67/32 for this one address, or the prefix of its network");
        assert_eq!(HostOrNetwork::parse("192.168.31.17").unwrap().to_string(), "192.168.31.17");
        assert_eq!(HostOrNetwork::parse("192.168.31.16/30").unwrap().to_string(), "192.168.31.16/30");
    }

    #[test]
    fn a_wrong_length_says_the_right_ones() {
        assert_eq!(
            Network::parse("10.0.0.0/33").unwrap_err().help,
            "write a prefix length from 0 to 32 after 10.0.0.0/, not `33`"
        );
        assert!(Network::parse("fd00::/129").unwrap_err().help.contains("0 to 128"));
        for bad in ["", "/", "10.0.0.0/", "10.0.0/8", "x/8", "10.0.0.0/-1", "10.0.0.0/8/8", " 10.0.0.0/8"] {
            assert!(Network::parse(bad).is_err(), "{bad:?}");
            assert!(HostOrNetwork::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_with_leading_zeros_are_refused() {
        for (bad, help) in [
            ("192.168.031.067/32", "write 192.168.31.67/32 if the numbers are decimal"),
            ("192.168.010.0/24", "write 192.168.10.0/24 if the numbers are decimal"),
            ("010.0.0.0/08", "write 10.0.0.0/8 if the numbers are decimal"),
            ("10.0.0.0/08", "write 10.0.0.0/8 if the numbers are decimal"),
            ("fd00::/064", "write fd00::/64 if the numbers are decimal"),
            ("00.0.0.0/0", "write 0.0.0.0/0 if the numbers are decimal"),
        ] {
            assert_eq!(Network::parse(bad).unwrap_err().help, help, "{bad}");
            assert_eq!(HostOrNetwork::parse(bad).unwrap_err().help, help, "{bad}");
        }
        assert_eq!(
            HostOrNetwork::parse("192.168.031.67").unwrap_err().help,
            "write 192.168.31.67 if the numbers are decimal"
        );
        for good in ["0.0.0.0/0", "::/0", "fd00:0031::/64", "10.0.0.0/8"] {
            assert!(Network::parse(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn mapped_addresses_are_written_as_ipv4() {
        assert_eq!(Network::parse("::ffff:10.0.0.0/104").unwrap_err().help, "write 10.0.0.0/8");
        assert!(Network::parse("::/0").is_ok());
    }
}
