//! Special-purpose addresses (RFC 6890): hosts have none of them, or only on one link.

use std::sync::LazyLock;

use ipnet::IpNet;

use super::leaf::Problem;

struct Special {
    net: IpNet,
    name: &'static str,
    /// Whether Linux forwards packets with these addresses, so that LAN hosts and pods may have them: EKS has pods in
    /// 169.254.0.0/16, GKE in 240.0.0.0/4, and a metadata service is 169.254.169.254.
    forwarded: bool,
}

static SPECIAL: LazyLock<Vec<Special>> = LazyLock::new(|| {
    let list = [
        ("0.0.0.0/8", "unspecified", false),
        ("127.0.0.0/8", "loopback", false),
        ("169.254.0.0/16", "link-local", true),
        ("224.0.0.0/4", "multicast", false),
        ("255.255.255.255/32", "broadcast", false),
        ("240.0.0.0/4", "reserved space", true),
        ("::/128", "unspecified", false),
        ("::1/128", "loopback", false),
        ("fe80::/10", "link-local", false),
        ("ff00::/8", "multicast", false),
    ];
    let parsed = list
        .into_iter()
        .filter_map(|(net, name, forwarded)| Some(Special { net: net.parse().ok()?, name, forwarded }));
    parsed.collect()
});

impl Special {
    fn text(&self) -> String {
        format!("{} ({})", self.name, self.net)
    }
}

/// Returns the name of the special addresses in `net`, to which no route leads.
pub(crate) fn never_routed(net: &IpNet) -> Option<String> {
    let found = SPECIAL.iter().find(|special| special.net.contains(net) || net.contains(&special.net))?;
    Some(found.text())
}

/// Refuses a network whose addresses no forwarded packet has. A wider one, such as 0.0.0.0/0, is about its other addresses.
pub(crate) fn no_hosts(net: &IpNet) -> Option<Problem> {
    let found = SPECIAL.iter().find(|special| !special.forwarded && special.net.contains(net))?;
    let message = format!("{net} is {}, and no forwarded packet has such an address", found.text());
    Some(Problem::new(message, "write the addresses that the hosts have on their network"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_network_of_the_list_is_one_and_has_its_name() {
        assert_eq!(SPECIAL.len(), 10);
        let of = |net: &str| {
            let net = net.parse().unwrap();
            (never_routed(&net).is_some(), no_hosts(&net).is_some())
        };
        for net in
            ["127.0.0.1/32", "0.0.0.0/32", "239.1.1.1/32", "255.255.255.255/32", "fe80::/64", "::1/128"]
        {
            assert_eq!(of(net), (true, true), "{net}");
        }
        for net in ["0.0.0.0/0", "::/0", "128.0.0.0/1", "169.254.169.254/32", "240.10.0.0/16"] {
            assert_eq!(of(net), (true, false), "{net}");
        }
        for net in ["10.0.0.0/8", "fd00::/8", "192.168.31.0/24", "2001:db8::/32"] {
            assert_eq!(of(net), (false, false), "{net}");
        }
    }
}
