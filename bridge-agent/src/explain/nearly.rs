//! Rules that miss a connection by one criterion, and the rule that would allow it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Judge, MAX_NEARLY, Nearly, Packet, Protocol, Remedy};
use crate::{
    config::{GROUP, Network, PortItem, Ports, Rule, RuleName, VERSION},
    model::{self, Action, Direction, PortRange},
    policy::reference::{Criterion, misses},
};

/// A connection as rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sides {
    pub(super) direction: Direction,
    pub(super) external: IpAddr,
    pub(super) pod: IpAddr,
}

/// Returns the allow rules that miss `packet` by one criterion.
pub(super) fn nearly(judge: &Judge<'_>, sides: Sides, packet: &Packet) -> Vec<Nearly> {
    let Sides { direction, external, pod } = sides;
    let packet_for_rules = packet.for_rules();
    let allow = judge.policy.rules.iter().filter(|rule| rule.action == Action::Allow);
    let missed = allow.filter_map(|rule| {
        let criterion = misses(rule, direction, external, pod, &packet_for_rules).only()?;
        let (has, asked) = match criterion {
            Criterion::Direction => (name(rule.direction).to_owned(), name(direction).to_owned()),
            Criterion::External => (networks(rule.external.as_deref()), external.to_string()),
            Criterion::Pods => (networks(rule.pods.as_deref()), pod.to_string()),
            Criterion::Protocol => {
                (format!("{:?}", rule.protocol).to_lowercase(), Protocol(packet.protocol).to_string())
            }
            Criterion::Ports => (ports(&rule.ports), packet.destination_port.to_string()),
            Criterion::SourcePorts => (ports(&rule.source_ports), packet.source_port.to_string()),
        };
        Some(Nearly { rule: rule.name.clone(), criterion, has, asked })
    });
    missed.take(MAX_NEARLY).collect()
}

/// Returns the rule that allows a connection and nothing else.
pub(super) fn rule(judge: &Judge<'_>, sides: Sides, packet: &Packet) -> Option<Rule> {
    let (protocol, ports) = match packet.protocol {
        1 | 58 => (model::Protocol::Icmp, None),
        6 => (model::Protocol::Tcp, Some(packet.destination_port)),
        17 => (model::Protocol::Udp, Some(packet.destination_port)),
        132 => (model::Protocol::Sctp, Some(packet.destination_port)),
        _ => return None,
    };
    let suffix = ports.map(|port| format!("-{port}")).unwrap_or_default();
    let base = format!("{}-{}{suffix}", name(sides.direction), Protocol(packet.protocol));
    let mut names = std::iter::once(base.clone()).chain((2..).map(|number| format!("{base}-{number}")));
    let rules = judge.policy.rules.iter().chain(&judge.policy.audited);
    let free = names.find(|name| !rules.clone().any(|rule| rule.name == *name))?;
    Some(Rule {
        name: RuleName::new(&free).ok()?,
        direction: sides.direction,
        external: Some(vec![Network::from(IpNet::from(sides.external))]),
        pods: Some(vec![Network::from(IpNet::from(sides.pod))]),
        pod_selector: None,
        namespace_selector: None,
        protocol,
        ports: ports.map(|port| Ports(vec![PortItem(PortRange { first: port, last: port })])),
        source_ports: None,
        action: Action::Allow,
        mode: None,
    })
}

impl Remedy {
    /// Adding these rules.
    pub(crate) fn of_rules(text: String, name: &str, rules: &[Rule]) -> Self {
        let Ok(list) = serde_saphyr::to_string(&rules) else {
            return Self { text, config: None, policy: None };
        };
        let indented = |by: &str| list.lines().map(|line| format!("{by}{line}\n")).collect::<String>();
        let config = format!("rules:\n{}", indented("  "));
        let policy = format!(
            "apiVersion: {GROUP}/{VERSION}\nkind: BridgePolicy\nmetadata:\n  name: {name}\nspec:\n  rules:\n{}",
            indented("    ")
        );
        Self { text, config: Some(config), policy: Some(policy) }
    }
}

pub(super) fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

/// The most networks or ranges that are shown.
const SHOWN: usize = 4;

fn list<T: ToString>(items: &[T]) -> String {
    let shown: Vec<String> = items.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if items.len() > SHOWN { format!(" and {} more", items.len() - SHOWN) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

fn networks(named: Option<&[IpNet]>) -> String {
    match named {
        Some([]) => "no pod, because its selector selects none".to_owned(),
        Some(networks) => list(networks),
        None => "all".to_owned(),
    }
}

pub(super) fn ports(ranges: &[PortRange]) -> String {
    if ranges.is_empty() { "all".to_owned() } else { list(ranges) }
}
