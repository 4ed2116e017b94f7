use super::*;
use crate::config::Scope;
use crate::iptables::observe::parse;
use crate::iptables::render::{Options, restore_input};
use crate::model::{
    Action as RuleAction, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule,
};

fn policy() -> Policy {
    let nets = |texts: [&str; 2]| texts.map(|text| text.parse().unwrap()).into();
    let rule = |name: &str, direction, protocol, port: u16, action| Rule {
        name: name.into(),
        direction,
        external: None,
        pods: None,
        protocol,
        ports: if port == 0 { Vec::new() } else { vec![PortRange { first: port, last: port }] },
        source_ports: Vec::new(),
        action,
    };
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: nets(["10.200.1.0/24", "fd00:200:1::/64"]),
        external: nets(["192.168.31.0/24", "fd00:31::/64"]),
        nodes: vec!["192.168.31.17/32".parse().unwrap()],
        rules: vec![
            rule("api", Direction::Inbound, Protocol::Tcp, 40002, RuleAction::Allow),
            rule("not-this", Direction::Inbound, Protocol::Udp, 53, RuleAction::Deny),
            rule("udp", Direction::Inbound, Protocol::Udp, 0, RuleAction::Allow),
            rule("ping", Direction::Inbound, Protocol::Icmp, 0, RuleAction::Allow),
            rule("sctp", Direction::Outbound, Protocol::Sctp, 9000, RuleAction::Allow),
        ],
        audited: Vec::new(),
        node_ports: Some(NodePorts {
            range: PortRange { first: 30000, last: 32767 },
            allow: vec![PortRange { first: 30080, last: 30090 }],
        }),
    }
}

/// As the kernel would give it back: `-I` is where the rule then stands.
fn read_back(input: &str) -> String {
    input
        .replace("-I PREROUTING 1", "-A PREROUTING")
        .replace("-I FORWARD 1", "-A FORWARD")
        .replace("-I INPUT 1", "-A INPUT")
        .replace("*mangle\n", "*mangle\n:PREROUTING ACCEPT [0:0]\n")
        .replace("*filter\n", "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n")
}

fn rules(policy: &Policy, edit: impl Fn(String) -> String) -> BTreeMap<(Family, Table), OwnRules> {
    let mut rules = BTreeMap::new();
    for family in Family::ALL {
        let text = edit(read_back(&restore_input(policy, &Options::default(), family)));
        let mut tables = parse(&text);
        for table in Table::ALL {
            rules.insert((family, table), tables.remove(table.name()).unwrap_or_default().own());
        }
    }
    rules
}

fn packet(from: &str, to: &str, protocol: u8, port: u16) -> Packet {
    Packet {
        source: from.parse().unwrap(),
        source_ports: PortRange::one(50_000),
        destination: to.parse().unwrap(),
        destination_port: port,
        protocol,
        icmp_type: if protocol == 58 { 128 } else { 8 },
        to_node: to.ends_with(".17"),
        from_node: false,
        state: State::New,
    }
}

const LAN: &str = "192.168.31.67";
const POD: &str = "10.200.1.91";

#[test]
fn verdicts_follow_the_policy() {
    use Verdict::{Denied, Passes};
    let cases = [
        (packet(LAN, POD, 6, 40002), Passes),
        (packet(LAN, POD, 6, 40003), Denied),
        (packet(POD, LAN, 6, 40002), Denied),
        (packet("fd00:31::67", "fd00:200:1::91", 6, 40002), Passes),
        (packet("fd00:31::67", "fd00:200:1::91", 6, 40003), Denied),
        (packet(LAN, POD, 17, 53), Denied),
        (packet(LAN, POD, 17, 54), Passes),
        (packet(LAN, POD, 1, 0), Passes),
        (packet("fd00:31::67", "fd00:200:1::91", 58, 0), Passes),
        (packet(POD, LAN, 132, 9000), Passes),
        (packet(POD, LAN, 132, 9001), Denied),
        // No rule can name such a host.
        (packet("198.51.100.1", POD, 6, 40002), Denied),
        // Out of scope: not bridge's to deny.
        (packet("198.51.100.1", LAN, 6, 1), Passes),
        (packet(POD, "198.51.100.1", 6, 1), Passes),
        (packet(LAN, "192.168.31.17", 6, 30085), Passes),
        (packet(LAN, "192.168.31.17", 6, 30091), Denied),
        (packet(LAN, "192.168.31.17", 132, 30091), Denied),
        (packet(LAN, "192.168.31.17", 6, 22), Passes),
    ];
    for on_deny in [OnDeny::Reject, OnDeny::Drop] {
        for mode in [Mode::Enforce, Mode::Audit] {
            let rules = rules(&Policy { on_deny, mode, ..policy() }, |text| text);
            for (packet, expected) in &cases {
                let seen = verdict(&rules, packet, mode == Mode::Audit);
                assert_eq!(seen, Some(*expected), "{on_deny:?} {mode:?} {packet:?}");
            }
        }
    }
}

#[test]
fn strict_denies_what_is_out_of_scope() {
    let options = Options { scope: Scope::Strict, ..Options::default() };
    let text = read_back(&restore_input(&Policy { node_ports: None, ..policy() }, &options, Family::V4));
    let rules = BTreeMap::from([((Family::V4, Table::Filter), parse(&text).remove("filter").unwrap().own())]);
    assert_eq!(verdict(&rules, &packet("198.51.100.1", LAN, 6, 1), false), Some(Verdict::Denied));
}

#[test]
fn rules_of_others_in_own_chains_count() {
    let denied = packet(LAN, POD, 6, 40003);
    let with = |rule: &str| {
        let rules = rules(&policy(), |text| {
            text.replacen("-A BRIDGE-FORWARD ", &format!("-A BRIDGE-FORWARD {rule}\n-A BRIDGE-FORWARD "), 1)
        });
        verdict(&rules, &denied, false)
    };
    assert_eq!(with("-j ACCEPT"), Some(Verdict::Passes));
    assert_eq!(with("-s 192.168.31.67/32 -j RETURN"), Some(Verdict::Passes));
    assert_eq!(with("! -s 192.168.31.67/32 -j ACCEPT"), Some(Verdict::Denied));
    assert_eq!(with(r#"-m comment --comment "a \"-j\" b" -j ACCEPT"#), Some(Verdict::Passes));
    // An unknown match is not guessed, unless it makes no difference.
    assert_eq!(with("-m set --match-set friends src -j ACCEPT"), None);
    assert_eq!(with("-d 10.0.0.1/32 -m set --match-set friends src -j ACCEPT"), Some(Verdict::Denied));
    assert_eq!(with("-m limit --limit 1/sec -j LOG"), Some(Verdict::Denied));
    assert_eq!(with("-j SOMEWHERE"), None);
    assert_eq!(with("-j BRIDGE-GONE"), None);
    let gone = rules(&policy(), |text| text.replace("-j BRIDGE-FORWARD", "-j ACCEPT"));
    assert_eq!(verdict(&gone, &denied, false), Some(Verdict::Passes));
    let emptied = rules(&policy(), |text| {
        text.lines().filter(|line| !line.starts_with("-A BRIDGE-DENY")).collect::<Vec<_>>().join("\n")
    });
    assert_eq!(verdict(&emptied, &denied, false), Some(Verdict::Passes));
}
