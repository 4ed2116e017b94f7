//! `explain` against real connections: where another program breaks one, the summary names the cause; where it passes, the summary
//! names none. Needs root.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::{tcp, udp};
use serde_json::Value;

const CONFIG: &str = r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement: {engines: [ENGINE], interfaces: {external: [eth0], internal: ["cali*"]}}
persistence: {save: never}
nodePorts: {range: "30000-32767", allow: [30080]}
rules:
  - {name: in-tcp, direction: inbound, protocol: tcp, ports: [40002]}
  - {name: in-udp, direction: inbound, protocol: udp, ports: [40002]}
  - {name: out-tcp, direction: outbound, protocol: tcp, ports: [8443]}
  - {name: out-udp, direction: outbound, protocol: udp, ports: [8443]}
"#;

/// Each part of a summary that says why a connection does not pass.
const CAUSES: [&str; 6] =
    ["DENIED", "DROPPED by another", "NOT FORWARDED", "NO WAY BACK", "ROUTED ELSEWHERE", "NO ANSWER"];

/// How long a connection may take that nothing stops.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A connection, and the commands that another program runs on the node.
struct Shape {
    from: &'static str,
    to: &'static str,
    protocol: &'static str,
    script: &'static str,
    /// A part of the summary; empty: the connection passes.
    cause: &'static str,
}

const fn shape(
    from: &'static str,
    to: &'static str,
    protocol: &'static str,
    script: &'static str,
    cause: &'static str,
) -> Shape {
    Shape { from, to, protocol, script, cause }
}

const ANSWER: &str = "DENIED: the answer is denied at";
const LATER: &str = "DENIED: the packet after the answer is denied at";
/// Words of the scripts.
const PRELUDE: &str = r#"
dnat() { iptables -t nat -A PREROUTING "$@"; }
dnat6() { ip6tables -t nat -A PREROUTING "$@"; }
to_pod() { iptables -t nat -A POSTROUTING -o cali+ -j "$@"; }
to_pod6() { ip6tables -t nat -A POSTROUTING -o cali+ -j "$@"; }
to_lan() { iptables -t nat -A POSTROUTING -o eth0 -p tcp -j "$@"; }
drop() { iptables -A FORWARD "$@" -j DROP; }
mangle() { iptables -t mangle -A PREROUTING "$@"; }
nat() { nft "add table ip f; add chain ip f c { type nat hook $1 priority $2; }; $3"; }
marked() { ip route add blackhole default table 99; ip rule add fwmark 7 lookup 99; }
veth() { ip link add d0 type veth peer name d1; ip link set d1 up; ip link set d0 up; }
link_local() {
  for i in $PODS; do
    ip address add 169.254.1.1/32 dev $i; ip address del 10.200.1.1/32 dev $i; ip address add 10.200.1.1/32 dev $i
  done
}
clean() {
  for table in $TABLES; do iptables -t $table -F; ip6tables -t $table -F; done
  nft delete table ip f; ipset destroy s
  ip rule flush; ip rule add lookup main priority 32766; ip rule add lookup default priority 32767
  ip route flush table 99; ip link del d0
  for i in $PODS; do ip address del 169.254.1.1/32 dev $i; done
  conntrack -F
}
"#;

/// Translations that bring the two directions of a connection apart, and such that do not.
#[rustfmt::skip]
const TRANSLATED: [Shape; 26] = [
    shape("A", "C1:40002", "tcp", "true", ""),
    shape("A", "C1:40002", "tcp", "dnat -p tcp -d $C1 --dport 40002 -j DNAT --to-destination $C2:40003", ANSWER),
    shape("A", "C1:40002", "udp", "dnat -p udp -d $C1 --dport 40002 -j DNAT --to-destination $C2:40003", ANSWER),
    shape("A", "C1.6:40002", "tcp", "dnat6 -p tcp -d $C1_6 --dport 40002 -j DNAT --to-destination [$C2_6]:40003", ANSWER),
    shape("A", "C1:40002", "tcp", "dnat -p tcp -d $C1 --dport 40002 -j DNAT --to-destination $B:9000", LATER),
    shape("A", "C1:40002", "tcp", "dnat -p tcp -d $C1 --dport 40002 -j REDIRECT --to-ports 9000", LATER),
    shape("A", "C1:40002", "tcp", "dnat -p tcp -d $C1 --dport 40002 -j DNAT --to-destination $A:8443", "\nNO ANSWER: "),
    shape("A", "C1:40002", "tcp", r#"nat prerouting -100 "add map ip f m { type inet_service : ipv4_addr; elements = { 40002 : $C2 }; }; add rule ip f c dnat to tcp dport map @m""#, ANSWER),
    shape("C1", "A:8443", "tcp", "dnat -p tcp -d $A --dport 8443 -j DNAT --to-destination $A:8444", ANSWER),
    shape("C1", "A:8443", "tcp", "dnat -p tcp -d $A --dport 8443 -j DNAT --to-destination $C2:40002", LATER),
    shape("A", "C1:40002", "tcp", "to_pod MASQUERADE", ""),
    shape("A", "C1:40002", "udp", "to_pod MASQUERADE", ""),
    shape("A", "C1.6:40002", "tcp", "to_pod6 MASQUERADE", ""),
    shape("A", "C1:40002", "tcp", "to_pod SNAT --to-source 192.168.31.200", ANSWER),
    shape("A", "C1:40002", "tcp", "to_pod SNAT --to-source 10.9.9.9", ""),
    shape("A", "C1:40002", "tcp", "to_pod SNAT --to-source $C2", LATER),
    shape("A", "C1:40002", "tcp", r#"nat postrouting 100 "add rule ip f c oifname \"cali*\" snat to 192.168.31.200""#, ANSWER),
    shape("A", "C1:40002", "tcp", "link_local; to_pod MASQUERADE", LATER),
    shape("A", "B:30080", "tcp", "dnat -p tcp -d $B --dport 30080 -j DNAT --to-destination $C1:40003; to_pod MASQUERADE", ""),
    shape("A", "B:30080", "tcp", "link_local; dnat -p tcp -d $B --dport 30080 -j DNAT --to-destination $C1:40003; to_pod MASQUERADE", LATER),
    shape("A", "B:9999", "tcp", "dnat -p tcp -d $B --dport 9999 -j DNAT --to-destination $C1:40002; to_pod MASQUERADE", ""),
    shape("C1", "A:8443", "tcp", "to_lan MASQUERADE", ""),
    shape("C1", "A:8443", "tcp", "to_lan MASQUERADE --to-ports 30500-30600", ANSWER),
    shape("C1", "A:8443", "tcp", "to_lan SNAT --to-source $C2", ANSWER),
    shape("C1", "A:8443", "tcp", "to_lan SNAT --to-source 192.168.31.200", "\nNO ANSWER: "),
    shape("C1", "A:8443", "tcp", "to_lan SNAT --to-source 10.9.9.9", "\nPERHAPS NO ANSWER: "),
];

/// Routes that marks and rules choose, and conditions of rules.
#[rustfmt::skip]
const ROUTED: [Shape; 12] = [
    shape("A", "C1:40002", "tcp", "mangle -i cali+ -j MARK --set-mark 7; marked", "\nNO WAY BACK"),
    shape("A", "C1:40002", "tcp", "mangle -p tcp --dport 40002 -j CONNMARK --set-mark 7; mangle -i cali+ -j CONNMARK --restore-mark; marked", "\nNO WAY BACK"),
    shape("A", "C1:40002", "tcp", r#"nft 'add table ip f; add chain ip f c { type filter hook prerouting priority -150; }; add rule ip f c iifname "cali*" meta mark set 7'; marked"#, "\nNO WAY BACK"),
    shape("A", "C1:40002", "tcp", "veth; ip route add $C1/32 dev d0 table 99; ip rule add iif eth0 lookup 99", "\nROUTED ELSEWHERE"),
    shape("A", "C1:40002", "tcp", "veth; ip route add default dev d0 table 99; ip rule add from $C1 lookup 99", "\nPERHAPS ROUTED ELSEWHERE"),
    shape("A", "C1:40002", "tcp", "drop -p tcp -m tcp --tcp-flags SYN,ACK ACK", "\nDROPPED by another firewall, after the answer"),
    shape("A", "C1:40002", "tcp", "drop -m iprange --src-range 192.168.31.60-192.168.31.70", "\nDROPPED by another"),
    shape("A", "C1:40002", "tcp", "drop -m iprange --src-range 192.168.31.70-192.168.31.80", ""),
    shape("A", "C1:40002", "tcp", "drop -p tcp -m multiport --ports 40002", "\nDROPPED by another"),
    shape("A", "C1:40002", "tcp", "mangle -p tcp --dport 40002 -j TTL --ttl-set 1", "\nDROPPED by another"),
    shape("A", "C1:40002", "tcp", "ipset create s hash:ip; ipset add s $A; drop -m set --match-set s src", "\nPERHAPS DROPPED by another"),
    shape("A", "C1.6:40002", "udp", "ip6tables -A FORWARD -p udp -m udp --dport 40002 -j REJECT", "\nDROPPED by another"),
];

/// Servers on all stations, and the words of the scripts.
struct Scene<'a> {
    lab: &'a Lab,
    agent: &'a Agent,
    by_ebpf: bool,
    /// Names of the interfaces towards pods.
    pods: String,
}

impl Scene<'_> {
    fn host(&self, name: &str) -> &Host {
        match name {
            "A" => self.lab.a(),
            "B" => self.lab.b(),
            "C1" => self.lab.c1(),
            _ => self.lab.c2(),
        }
    }

    fn run(&self, script: &str) -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-ec", &format!("{PRELUDE}{script}")]).env("PODS", &self.pods);
        // A packet filter of bridge has rules in the others.
        command.env("TABLES", if self.by_ebpf { "nat mangle filter" } else { "nat" });
        for name in ["A", "B", "C1", "C2"] {
            let host = self.host(name);
            command.env(name, host.ip(Family::V4).to_string());
            command.env(format!("{name}_6"), host.ip(Family::V6).to_string());
        }
        self.lab.b().netns.output(command).map(drop).context(script.to_owned())
    }

    /// Compares the summary of a shape with its connection.
    fn compare(&self, shape: &Shape) -> Result<()> {
        let (name, port) = shape.to.split_once(':').context("a port")?;
        let (name, family) = name.split_once('.').map_or((name, Family::V4), |(name, _)| (name, Family::V6));
        let (from, to) = (self.host(shape.from), self.host(name).at(family, port.parse()?));
        self.run(shape.script)?;
        if self.by_ebpf {
            self.agent.run(&["flows", "--delete", "--yes"])?;
        }
        let (source, to_text) = (from.ip(family).to_string(), to.to_string());
        let asked = ["explain", "--json", "--protocol", shape.protocol, source.as_str(), to_text.as_str()];
        let explained = self.agent.run(&asked);
        let passes = passes(from, to, shape.protocol)?;
        self.run("set +e; clean >/dev/null 2>&1; true")?;
        let explained: Value = serde_json::from_str(&explained?)?;
        let summary = explained["summary"].as_str().unwrap_or_default();
        let named = CAUSES.iter().any(|cause| summary.contains(cause));
        ensure!(passes == shape.cause.is_empty(), "passes: {passes}\n{explained}");
        let says = if passes { !named } else { summary.contains(shape.cause) };
        ensure!(says, "{} is not in {summary:?}\n{explained}", shape.cause);
        Ok(())
    }
}

fn passes(from: &Host, to: SocketAddr, protocol: &str) -> Result<bool> {
    if protocol == "udp" {
        return Ok(udp::ask(&from.netns, 0, to, b"hello", PATIENCE)?.succeeded());
    }
    // The packets after the answer may be lost.
    Ok(match tcp::Client::new(&from.netns).deadline(PATIENCE).connect(to)?.reached() {
        Ok(mut connection) => connection.round_trip(PATIENCE).is_ok(),
        Err(_) => false,
    })
}

fn compare(engine: &str, shapes: &[Shape]) -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let agent = Agent::start(&lab, lab.b(), &CONFIG.replace("ENGINE", engine))?;
    let links = lab.b().netns.ip("-o link")?;
    let pods = links.split_whitespace().filter_map(|word| word.strip_prefix("cali")?.split('@').next());
    let pods: Vec<String> = pods.map(|rest| format!("cali{rest}")).collect();
    let scene = Scene { lab: &lab, agent: &agent, by_ebpf: engine == "ebpf", pods: pods.join(" ") };
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    for family in Family::BOTH {
        let of_pods = [lab.c1(), lab.c2()].map(|pod| (pod, [40002, 40003]));
        for (host, ports) in of_pods.into_iter().chain([(lab.a(), [8443, 8444]), (lab.b(), [9000, 9001])]) {
            for port in ports {
                tcp.push(tcp::Server::echo(&host.netns, host.at(family, port))?);
                udp.push(udp::Server::echo(&host.netns, host.at(family, port))?);
            }
        }
    }
    let wrong: Vec<String> = shapes
        .iter()
        .filter_map(|shape| {
            let error = scene.compare(shape).err()?;
            Some(format!("{} -> {} {}: {}\n{error:#}", shape.from, shape.to, shape.protocol, shape.script))
        })
        .collect();
    ensure!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), shapes.len(), wrong.join("\n\n"));
    Ok(())
}

#[test]
fn translated_connections_are_followed_both_ways() -> Result<()> {
    compare("ebpf", &TRANSLATED)
}

#[test]
fn marks_routes_and_conditions_of_others_are_named() -> Result<()> {
    compare("ebpf", &ROUTED)
}

/// A packet filter judges the end behind the translation, and follows the answers itself.
#[test]
fn a_packet_filter_judges_the_end_behind_the_translation() -> Result<()> {
    #[rustfmt::skip]
    const SHAPES: [Shape; 6] = [
        shape("A", "C1:40002", "tcp", "true", ""),
        shape("A", "C1:40002", "tcp", "dnat -p tcp -d $C1 --dport 40002 -j DNAT --to-destination $C2:40003", "DENIED (no_rule"),
        shape("A", "C1:40003", "tcp", "dnat -p tcp -d $C1 --dport 40003 -j DNAT --to-destination $C2:40002", ""),
        shape("C1", "A:8443", "tcp", "dnat -p tcp -d $A --dport 8443 -j DNAT --to-destination $A:8444", "DENIED (no_rule"),
        shape("A", "C1:40002", "tcp", "to_pod SNAT --to-source 192.168.31.200", ""),
        shape("A", "C1:40002", "tcp", "link_local; to_pod MASQUERADE", ""),
    ];
    for engine in ["iptables", "nftables"] {
        compare(engine, &SHAPES).context(engine)?;
    }
    Ok(())
}
