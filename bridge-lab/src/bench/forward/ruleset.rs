//! One policy, as each contender's user would write it: default deny, established first, then a rule for each device of
//! the LAN. The rule that the traffic of the benchmark needs is the last.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// Ports that the last rule allows.
pub(super) const ALLOWED: (u16, u16) = (40_000, 40_099);
/// The LAN and the pods of the lab.
const LAN: &str = "192.168.31.0/24";
const PODS: &str = "10.200.1.0/24";
/// The network of the other devices.
const DEVICES: &str = "100.64.0.0/10";
const FIRST_DEVICE: u32 = 0x6440_0000;

/// Source, and first and last destination port: of the rules before the last, and of the last.
fn rules(count: u32) -> impl Iterator<Item = (String, u16, u16)> {
    let device = |index: u32| {
        let first = u16::try_from(1024 + index * 7919 % 60_000).expect("below 61024");
        (format!("{}/32", Ipv4Addr::from(FIRST_DEVICE + index)), first, first + 99)
    };
    let last = (LAN.to_owned(), ALLOWED.0, ALLOWED.1);
    (0..count.saturating_sub(1)).map(device).chain([last])
}

/// Input of `iptables-restore`.
pub(super) fn iptables(count: u32) -> String {
    let mut text = String::from(
        "*filter\n:FORWARD DROP\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n",
    );
    for (source, first, last) in rules(count) {
        writeln!(text, "-A FORWARD -s {source} -d {PODS} -p tcp -m tcp --dport {first}:{last} -j ACCEPT")
            .expect("writing to a string");
    }
    text + "COMMIT\n"
}

/// Input of `iptables-restore`: the packets to an address are dropped before connection tracking, whatever they are.
pub(super) fn iptables_raw(address: Ipv4Addr) -> String {
    format!("*raw\n-A PREROUTING -d {address}/32 -j DROP\nCOMMIT\n")
}

/// Input of `nft -f`: one lookup in a set of addresses and intervals of ports.
pub(super) fn nftables(count: u32) -> String {
    let mut text = String::from(
        "table ip bench {\nset allowed {\ntypeof ip saddr . tcp dport\nflags interval\nelements = {\n",
    );
    for (source, first, last) in rules(count) {
        writeln!(text, "{source} . {first}-{last},").expect("writing to a string");
    }
    text + &format!(
        "}}\n}}\nchain forward {{\ntype filter hook forward priority filter; policy drop;\n\
         ct state established,related accept\nip daddr {PODS} ip saddr . tcp dport @allowed accept\n}}\n}}\n"
    )
}

/// A configuration of the agent; `enforcement` has the keys besides the interfaces.
pub(super) fn agent(count: u32, enforcement: &str) -> String {
    let mut text = format!(
        "role: node\nnetworks: {{pods: [{PODS}], external: [{LAN}, {DEVICES}]}}\n\
         enforcement: {{{enforcement}, interfaces: {{external: [eth0], internal: [\"cali*\"]}}}}\n\
         persistence: {{save: never}}\nrules:\n"
    );
    for (index, (source, first, last)) in rules(count).enumerate() {
        writeln!(
            text,
            "  - {{name: device-{index}, direction: inbound, external: [{source}], protocol: tcp, \
             ports: [\"{first}-{last}\"], action: allow}}"
        )
        .expect("writing to a string");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_as_many_rules_and_the_one_that_matches_is_the_last() {
        for count in [1, 2, 1000] {
            let number = usize::try_from(count).unwrap();
            let iptables = iptables(count);
            let rules: Vec<_> = iptables.lines().filter(|line| line.contains("--dport")).collect();
            assert_eq!(rules.len(), number);
            let last =
                "-A FORWARD -s 192.168.31.0/24 -d 10.200.1.0/24 -p tcp -m tcp --dport 40000:40099 -j ACCEPT";
            assert_eq!(rules.last(), Some(&last));
            let nftables = nftables(count);
            let elements: Vec<_> = nftables.lines().filter(|line| line.ends_with(',')).collect();
            assert_eq!(elements.len(), number);
            assert_eq!(elements.last(), Some(&"192.168.31.0/24 . 40000-40099,"));
            let agent = agent(count, "engines: [ebpf]");
            assert_eq!(agent.lines().filter(|line| line.contains("name: device-")).count(), number);
            assert!(agent.trim_end().lines().last().unwrap().contains("[192.168.31.0/24]"), "{agent}");
        }
    }
}
