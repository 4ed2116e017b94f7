//! Finds settings of this machine that would break the pool, with remedies.

use std::{fs, io, process::Command};

use serde::Serialize;

use crate::{
    kernel::sysctl,
    model::{PortSet, parse_ephemeral, parse_ranges},
};

/// Something that spoils the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The fault and its consequence.
    pub problem: String,
    /// The remedy.
    pub remedy: String,
    /// Whether bridge's own masquerade would outdo it.
    #[serde(skip)]
    pub masquerade: bool,
}

/// Looks for everything known to spoil the pool in this network namespace.
#[must_use]
pub fn look(ports: &PortSet) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if let Ok(value) = fs::read_to_string("/proc/sys/net/ipv4/tcp_timestamps") {
        warnings.extend(timestamps(&value));
    }
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        String::from_utf8(output.stdout).ok()
    };
    // nft does not show the rules of iptables-legacy.
    let rules = [
        ("nft", run("nft", &["list", "ruleset"])),
        ("iptables", run("iptables-save", &["-t", "nat"])),
        ("ip6tables", run("ip6tables-save", &["-t", "nat"])),
    ];
    for (tool, text) in rules {
        warnings.extend(text.as_deref().and_then(|text| masquerade(tool, text, ports)));
    }
    if let Ok(range) = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range") {
        let reserved = fs::read_to_string(RESERVED).unwrap_or_default();
        warnings.extend(ephemeral(&range, &reserved, ports));
    }
    warnings
}

/// `net.ipv4.tcp_timestamps`: without it a 4-tuple in TIME_WAIT cannot be used again before its 60 s are over.
fn timestamps(value: &str) -> Option<Warning> {
    (value.trim() == "0").then(|| Warning {
        problem: "net.ipv4.tcp_timestamps is 0: a port stays unusable for 60 s after each connection (TIME_WAIT), and \
                  the pool runs dry"
            .into(),
        remedy: "sysctl -w net.ipv4.tcp_timestamps=1".into(),
        masquerade: false,
    })
}

/// Finds a masquerade rule that chooses a random port, which takes every connection out of the pool.
fn masquerade(tool: &str, rules: &str, ports: &PortSet) -> Option<Warning> {
    let mut kube_proxy = KubeProxy::default();
    let rule = rules.lines().map(str::trim).find(|rule| {
        let words = || rule.split([' ', ',']);
        let nft = words().any(|word| word == "masquerade" || word == "snat")
            && words().any(|word| matches!(word, "random" | "fully-random"));
        let iptables = words().any(|word| word == "MASQUERADE" || word == "SNAT")
            && words().any(|word| word == "--random" || word == "--random-fully");
        let services_only = kube_proxy.services_only(rule);
        (nft || iptables) && !services_only
    })?;
    let range = ports.ranges().first().map(ToString::to_string).unwrap_or_default();
    Some(Warning {
        problem: format!(
            "{tool} has a masquerade with random ports ({rule}): connections leave the node from ports outside the pool"
        ),
        remedy: format!(
            "take the random flag away (kube-proxy and flannel: --random-fully; Calico: natOutgoing without it), or let \
             bridge install its own `masquerade to :{range}` before it with portPool.masquerade: true"
        ),
        masquerade: true,
    })
}

/// Reads through a ruleset line by line and recognises kube-proxy's masquerade.
///
/// kube-proxy masquerades connections to Services: those that it has marked, and hairpin connections. A connection of a pod
/// to a LAN host is neither, so the random ports of these rules do not touch the pool.
#[derive(Default)]
struct KubeProxy {
    /// In a chain of kube-proxy (`nft list ruleset`).
    chain: bool,
    /// In a table of kube-proxy's nftables mode.
    table: bool,
    /// An earlier rule of KUBE-POSTROUTING returns for packets without the mark.
    returned: bool,
}

impl KubeProxy {
    /// Reads the next line, and returns whether it is a rule for connections to Services alone.
    fn services_only(&mut self, line: &str) -> bool {
        const CHAIN: &str = "KUBE-POSTROUTING";
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("table"), _, Some(name)) => *self = Self { table: name == "kube-proxy", ..Self::default() },
            (Some("chain"), Some(name), _) => (self.chain, self.returned) = (name == CHAIN, false),
            _ => {}
        }
        if self.table {
            // The condition is in the rule itself; earlier versions have it in a rule before.
            let marked = line.contains("mark & ") || line.contains("mark and ");
            self.returned |= marked && line.ends_with("return");
            return marked || self.returned || line.contains("@hairpin-connections");
        }
        if self.chain || line.strip_prefix("-A ").is_some_and(|rest| rest.split(' ').next() == Some(CHAIN)) {
            self.returned |= line.contains("! --mark ") && line.ends_with("-j RETURN")
                || line.contains("mark & ") && line.contains("!= ") && line.ends_with("return");
            return self.returned;
        }
        false
    }
}

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Ports that the kernel gives to programs outside the pool.
fn ephemeral(range: &str, reserved: &str, ports: &PortSet) -> Option<Warning> {
    let mut open = ports.clone();
    open.keep_all(&[parse_ephemeral(range)?].into_iter().collect());
    open.remove_all(&parse_ranges(reserved).into_iter().collect());
    (!open.is_empty()).then(|| Warning {
        problem: format!(
            "{} ports of the pool are also in net.ipv4.ip_local_port_range: the kernel gives them to programs outside \
             the pool, and those block them",
            open.len()
        ),
        remedy: format!("sysctl -w net.ipv4.ip_local_reserved_ports={}", union(reserved, ports)),
        masquerade: false,
    })
}

/// Adds the ports to `net.ipv4.ip_local_reserved_ports`: the kernel then gives them only to programs that ask for them.
///
/// # Errors
/// The sysctl cannot be written.
pub fn reserve(ports: &PortSet) -> io::Result<()> {
    let reserved = fs::read_to_string(RESERVED)?;
    write_reserved(&union(&reserved, ports))
}

/// Takes the ports out of `net.ipv4.ip_local_reserved_ports`.
///
/// # Errors
/// The sysctl cannot be written.
pub fn unreserve(ports: &PortSet) -> io::Result<()> {
    let mut reserved: PortSet = parse_ranges(&fs::read_to_string(RESERVED)?).into_iter().collect();
    reserved.remove_all(ports);
    write_reserved(&reserved)
}

fn write_reserved(ports: &PortSet) -> io::Result<()> {
    // An empty line means none; an empty write does nothing.
    sysctl::write_net("ipv4/ip_local_reserved_ports", &format!("{ports}\n"))
}

/// Returns the content of `net.ipv4.ip_local_reserved_ports`.
#[must_use]
pub fn reserved() -> PortSet {
    parse_ranges(&fs::read_to_string(RESERVED).unwrap_or_default()).into_iter().collect()
}

fn union(reserved: &str, ports: &PortSet) -> PortSet {
    parse_ranges(reserved).into_iter().chain(ports.ranges()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PortRange;

    fn ports() -> PortSet {
        [PortRange { first: 61001, last: 61100 }].into_iter().collect()
    }

    #[test]
    fn random_masquerade_is_found_in_either_syntax() {
        for rule in [
            "oifname \"eth0\" masquerade random",
            "ip saddr 10.0.0.0/8 masquerade fully-random,persistent",
            "-A POSTROUTING -s 10.42.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
        ] {
            let warning = masquerade("nft", &format!("table inet x {{\n  {rule}\n}}"), &ports());
            assert!(
                warning.is_some_and(|w| w.problem.contains(rule) && w.remedy.contains("61001-61100")),
                "{rule}"
            );
        }
        for rule in ["oifname eth0 masquerade", "-A POSTROUTING -j MASQUERADE", "comment \"random\" accept"] {
            assert_eq!(masquerade("nft", rule, &ports()), None, "{rule}");
        }
    }

    #[test]
    fn kube_proxys_masquerade_is_no_matter_but_that_of_others_beside_it() {
        // As `iptables-save` and `nft list ruleset` print the rules of kube-proxy 1.36 in both of its modes.
        let iptables = "*nat\n:KUBE-POSTROUTING - [0:0]\n\
            -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
            -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
            -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
            -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n";
        let iptables_in_nft = "table ip nat {\n\tchain KUBE-POSTROUTING {\n\
            \t\tmeta mark & 0x00004000 != 0x00004000 counter packets 0 bytes 0 return\n\
            \t\tcounter packets 0 bytes 0 meta mark set mark xor 0x4000\n\
            \t\t counter packets 0 bytes 0 masquerade fully-random\n\t}\n";
        let nftables = "table ip kube-proxy {\n\tchain masquerading {\n\
            \t\tmeta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random\n\
            \t\tct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random\n\t}\n";
        let earlier = "table ip kube-proxy {\n\tchain masquerading {\n\
            \t\tmeta mark & 0x00004000 == 0x00000000 return\n\
            \t\tmeta mark set meta mark ^ 0x00004000\n\
            \t\tmasquerade fully-random\n\t}\n";
        for (rules, other) in [
            (iptables, "-A POSTROUTING -s 10.200.0.0/16 -j MASQUERADE --random-fully\n"),
            (iptables_in_nft, "\tchain FLANNEL-POSTRTG {\n\t\tmasquerade fully-random\n\t}\n"),
            (nftables, "}\ntable ip other {\n\tchain masquerading {\n\t\tmasquerade random\n\t}\n"),
            (earlier, "\tchain x {\n\t\toifname \"eth0\" masquerade random\n\t}\n"),
        ] {
            assert_eq!(masquerade("nft", rules, &ports()), None, "{rules}");
            let beside = masquerade("nft", &format!("{rules}{other}"), &ports());
            assert!(beside.is_some(), "{rules}{other}");
        }
        // kube-proxy's chain without the condition on the mark masquerades everything; flannel's returns for marked packets.
        for rules in [
            iptables.replace("! --mark", "--mark"),
            iptables_in_nft.replace("!= 0x00004000", "== 0x00004000"),
            "-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN\n-A FLANNEL-POSTRTG -s 10.200.0.0/16 -j MASQUERADE --random-fully\n".to_owned(),
        ] {
            assert!(masquerade("nft", &rules, &ports()).is_some(), "{rules}");
        }
    }

    #[test]
    fn timestamps_must_be_on() {
        assert!(timestamps("0\n").is_some());
        assert_eq!(timestamps("1\n"), None);
        assert_eq!(timestamps("2\n"), None);
    }

    #[test]
    fn ports_that_the_kernel_gives_away_are_found_unless_reserved() {
        assert!(ephemeral("32768\t60999\n", "", &ports()).is_none());
        let warning = ephemeral("32768\t61005\n", "8080\n", &ports()).unwrap();
        assert!(warning.problem.starts_with("5 ports"), "{warning:?}");
        assert!(warning.remedy.ends_with("=8080,61001-61100"), "{warning:?}");
        assert!(ephemeral("32768\t65535\n", "61001-61100\n", &ports()).is_none());
    }
}
