//! Rules for connections that were denied, or would have been; they allow nothing that was not seen. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::nearly::name;
use crate::{
    config::{Network, PortItem, Ports, Rule, RuleName},
    datapath::{Denial, DenialClass},
    model::{self, Action, Direction, Policy, PortRange},
    policy::reference,
};

/// Ports from here on are mostly given to clients by the kernel: a rule for one is seldom meant.
const EPHEMERAL: u16 = 32768;

/// The choice of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Choice {
    /// Also connections that were denied in enforce mode.
    #[serde(default)]
    pub include_denied: bool,
    /// Also destination ports that look like those of clients.
    #[serde(default)]
    pub include_ephemeral: bool,
}

/// A rule, with the connections that it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Suggested {
    pub rule: Rule,
    /// Connections: a LAN host, a pod and a port. The rule allows exactly these.
    pub pairs: usize,
    /// Packets that asked for them.
    pub count: u64,
    /// Time of the first.
    pub first: String,
    /// Time of the latest.
    pub last: String,
}

/// A connection for which there is no rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reported {
    /// The connection.
    pub denial: Denial,
    /// Why there is none.
    pub why: String,
}

/// Rules for the connections that were seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Suggestion {
    /// The rules.
    pub rules: Vec<Suggested>,
    /// Connections without a rule.
    pub reported: Vec<Reported>,
}

/// Direction and protocol of a rule.
type Kind = (Direction, model::Protocol);

/// Ports by pod and LAN host.
type PortsOfPairs = BTreeMap<(IpAddr, IpAddr), BTreeSet<u16>>;

/// Suggests rules that allow exactly the connections that were seen. [`Suggestion::replay`] proves it.
#[must_use]
pub fn suggest(policy: &Policy, denials: &[Denial], choice: Choice) -> Suggestion {
    let mut suggestion = Suggestion::default();
    // Ports by kind, pod and LAN host.
    let mut seen: BTreeMap<(u8, RuleKind), PortsOfPairs> = BTreeMap::new();
    for denial in denials {
        match kind(policy, denial, choice) {
            Ok((direction, protocol)) => {
                let DenialClass { external, pod, port, .. } = denial.class;
                let pairs = seen
                    .entry((u8::from(external.is_ipv6()), RuleKind(direction, protocol as u8)))
                    .or_default();
                pairs.entry((pod, external)).or_default().insert(port);
            }
            Err(why) => suggestion.reported.push(Reported { denial: denial.clone(), why }),
        }
    }
    let mut names: BTreeSet<String> = policy.rules.iter().map(|rule| rule.name.clone()).collect();
    for ((_, RuleKind(direction, protocol)), pairs) in seen {
        // LAN hosts that share pod and ports, then pods that share LAN hosts and ports: each group is a full product.
        let mut by_pod: BTreeMap<(IpAddr, BTreeSet<u16>), BTreeSet<IpAddr>> = BTreeMap::new();
        for ((pod, external), ports) in pairs {
            by_pod.entry((pod, ports)).or_default().insert(external);
        }
        let mut groups: BTreeMap<(BTreeSet<IpAddr>, BTreeSet<u16>), BTreeSet<IpAddr>> = BTreeMap::new();
        for ((pod, ports), externals) in by_pod {
            groups.entry((externals, ports)).or_default().insert(pod);
        }
        for ((externals, ports), pods) in groups {
            let of_group = |denial: &&Denial| {
                let class = &denial.class;
                class.direction == name(direction)
                    && externals.contains(&class.external)
                    && pods.contains(&class.pod)
                    && ports.contains(&class.port)
                    && protocol_of(&class.protocol).is_some_and(|one| one as u8 == protocol)
            };
            let evidence: Vec<&Denial> = denials.iter().filter(of_group).collect();
            let Some(first) = evidence.first() else { continue };
            let Some(model_protocol) = protocol_of(&first.class.protocol) else { continue };
            let base = format!("seen-{}-{}", name(direction), first.class.protocol);
            let free = (1..).map(|number| format!("{base}-{number}")).find(|name| !names.contains(name));
            let Some(rule_name) = free.as_deref().and_then(|name| RuleName::new(name).ok()) else { continue };
            names.extend(free);
            let networks = |addresses: &BTreeSet<IpAddr>| {
                Some(addresses.iter().map(|address| Network::from(IpNet::from(*address))).collect())
            };
            suggestion.rules.push(Suggested {
                pairs: externals.len() * pods.len() * ports.len(),
                count: evidence.iter().map(|denial| denial.count).sum(),
                first: evidence.iter().map(|denial| denial.first.clone()).min().unwrap_or_default(),
                last: evidence.iter().map(|denial| denial.last.clone()).max().unwrap_or_default(),
                rule: Rule {
                    name: rule_name,
                    direction,
                    external: networks(&externals),
                    pods: networks(&pods),
                    pod_selector: None,
                    namespace_selector: None,
                    protocol: model_protocol,
                    ports: (model_protocol != model::Protocol::Icmp).then(|| Ports(runs(&ports))),
                    source_ports: None,
                    action: Action::Allow,
                    mode: None,
                },
            });
        }
    }
    suggestion
}

/// Direction and number of the protocol, in an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RuleKind(Direction, u8);

/// Returns the kind of rule that a connection needs, or why there is none for it.
fn kind(policy: &Policy, denial: &Denial, choice: Choice) -> Result<Kind, String> {
    let class = &denial.class;
    let direction = match class.direction.as_str() {
        "inbound" => Direction::Inbound,
        "outbound" => Direction::Outbound,
        _ => {
            return Err(format!(
                "nodePorts.allow names ports for all of networks.external: add {} there",
                class.port
            ));
        }
    };
    if denial.reason == "deny_rule" {
        return Err(format!("rule {} denies it", denial.rule.as_deref().unwrap_or("?")));
    }
    if denial.verdict != "audit" && !choice.include_denied {
        return Err("it was denied, not audited: --include-denied suggests a rule".to_owned());
    }
    if !policy.external.iter().any(|network| network.contains(&class.external)) {
        return Err(format!("networks.external does not have {}", class.external));
    }
    let protocol = protocol_of(&class.protocol).ok_or("rules name no such protocol")?;
    if class.port >= EPHEMERAL && !choice.include_ephemeral {
        return Err("the port looks like one of a client: --include-ephemeral suggests a rule".to_owned());
    }
    if protocol != model::Protocol::Icmp && class.port == 0 {
        return Err("port 0 is never meant".to_owned());
    }
    Ok((direction, protocol))
}

fn protocol_of(name: &str) -> Option<model::Protocol> {
    Some(match name {
        "tcp" => model::Protocol::Tcp,
        "udp" => model::Protocol::Udp,
        "sctp" => model::Protocol::Sctp,
        "icmp" | "icmpv6" => model::Protocol::Icmp,
        _ => return None,
    })
}

/// Returns ports as ranges without gaps.
fn runs(ports: &BTreeSet<u16>) -> Vec<PortItem> {
    let mut ranges: Vec<PortRange> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some(range) if range.last.checked_add(1) == Some(*port) => range.last = *port,
            _ => ranges.push(PortRange { first: *port, last: *port }),
        }
    }
    ranges.into_iter().map(PortItem).collect()
}

impl Suggestion {
    /// Judges each connection again, by the policy and the suggested rules. Returns those that would not pass.
    #[must_use]
    pub fn replay<'d>(&self, policy: &Policy, denials: &'d [Denial]) -> Vec<&'d Denial> {
        let added = self.rules.iter().map(|suggested| suggested.rule.to_model());
        let rules: Vec<model::Rule> = policy.rules.iter().cloned().chain(added).collect();
        let reported: BTreeSet<&DenialClass> =
            self.reported.iter().map(|reported| &reported.denial.class).collect();
        let fails = |denial: &&Denial| {
            let DenialClass { external, pod, port, .. } = denial.class;
            let inbound = denial.class.direction == "inbound";
            let Ok(protocol) = denial.class.protocol.parse::<super::Protocol>() else { return true };
            let (source, destination) = if inbound { (external, pod) } else { (pod, external) };
            let packet = super::Packet {
                source,
                destination,
                protocol: protocol.0,
                source_port: denial.source_ports[0],
                destination_port: port,
                kind: super::Kind::Opening,
            };
            let direction = if inbound { Direction::Inbound } else { Direction::Outbound };
            let winner = reference::winner(&rules, direction, external, pod, &packet.for_rules());
            !matches!(winner, Some((_, Action::Allow)))
        };
        denials.iter().filter(|denial| !reported.contains(&denial.class)).filter(fails).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn policy() -> Policy {
        let text = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\nrules:\n  - {name: seen-inbound-tcp-1, direction: inbound, protocol: tcp, ports: [80]}\n";
        config::parse(text, None).unwrap().policy()
    }

    fn denial(direction: &str, external: u8, pod: u8, port: u16) -> Denial {
        Denial {
            class: DenialClass {
                direction: direction.into(),
                external: [192, 168, 31, external].into(),
                pod: [10, 200, 1, pod].into(),
                protocol: "tcp".into(),
                port,
            },
            verdict: "audit".into(),
            reason: "no_rule".into(),
            rule: None,
            count: 2,
            first: "a".into(),
            last: "b".into(),
            source_ports: [40_000, 50_000],
        }
    }

    /// Every connection of these hosts, pods and ports that the rules allow.
    fn allowed(suggestion: &Suggestion) -> BTreeSet<(u8, u8, u16)> {
        let rules = suggestion.rules.iter().map(|one| one.rule.to_model()).collect();
        let policy = Policy { rules, ..policy() };
        let mut allowed = BTreeSet::new();
        for (external, pod) in (1..20).flat_map(|external| (1..20).map(move |pod| (external, pod))) {
            for port in 1..200 {
                let probe = denial("inbound", external, pod, port);
                let nothing = Suggestion::default();
                if nothing.replay(&policy, &[probe]).is_empty() {
                    allowed.insert((external, pod, port));
                }
            }
        }
        allowed
    }

    #[test]
    fn rules_allow_exactly_the_connections_that_were_seen() {
        let seen = [
            (1, 1, 10),
            (2, 1, 10),
            (3, 1, 11),
            (1, 2, 10),
            (2, 2, 10),
            (4, 3, 10),
            (4, 3, 12),
            (4, 3, 13),
            (5, 3, 10),
        ];
        let denials: Vec<Denial> = seen.iter().map(|(e, p, port)| denial("inbound", *e, *p, *port)).collect();
        let suggestion = suggest(&policy(), &denials, Choice::default());
        assert_eq!(allowed(&suggestion), seen.into_iter().collect());
        assert!(suggestion.replay(&policy(), &denials).is_empty());
        // (1, 2) x (1, 2) is one rule, and no name of the policy is taken.
        assert_eq!(suggestion.rules.len(), 4, "{suggestion:#?}");
        assert!(suggestion.rules.iter().all(|one| one.rule.name.as_str() != "seen-inbound-tcp-1"));
        assert_eq!(suggestion.rules.iter().map(|one| one.pairs).sum::<usize>(), seen.len());
        assert_eq!(suggestion.rules.iter().map(|one| one.count).sum::<u64>(), 18);
    }

    #[test]
    fn connections_that_are_no_matter_of_a_rule_are_reported() {
        let foreign = Denial {
            class: DenialClass { external: [8, 8, 8, 8].into(), ..denial("inbound", 1, 1, 1).class },
            ..denial("inbound", 1, 1, 1)
        };
        let denied = Denial { verdict: "reject".into(), ..denial("inbound", 1, 1, 2) };
        let by_rule =
            Denial { reason: "deny_rule".into(), rule: Some("no".into()), ..denial("inbound", 1, 1, 3) };
        let all =
            [foreign, denied, by_rule, denial("inbound", 1, 1, 40_000), denial("nodeport", 1, 1, 30_080)];
        let none = suggest(&policy(), &all, Choice::default());
        assert!(none.rules.is_empty());
        let why: Vec<&str> = none.reported.iter().map(|one| one.why.as_str()).collect();
        for (why, part) in why.iter().zip([
            "networks.external",
            "--include-denied",
            "rule no",
            "--include-ephemeral",
            "30080",
        ]) {
            assert!(why.contains(part), "{why}");
        }
        let more = suggest(&policy(), &all, Choice { include_denied: true, include_ephemeral: true });
        assert_eq!((more.rules.len(), more.reported.len()), (1, 3), "{more:#?}");
    }

    #[test]
    fn a_replay_finds_a_connection_that_a_deny_stops() {
        let mut policy = policy();
        let seen = [denial("inbound", 1, 1, 10)];
        let suggestion = suggest(&policy, &seen, Choice::default());
        let mut deny = suggestion.rules[0].rule.to_model();
        (deny.name, deny.action) = ("no".into(), Action::Deny);
        policy.rules.push(deny);
        assert_eq!(suggestion.replay(&policy, &seen).len(), 1);
    }
}
