//! Follows a packet through the rules of other programs, as iptables-save prints them; pure.
//!
//! As [`super::walk`], it never guesses: a rule that it cannot read is named, and no verdict follows from it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::observe::{ObservedRule, ObservedTable, target};
use super::ruleset::is_own;
use super::walk::{self, Interfaces, Packet};

/// The verdict of other programs on a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// The rule or policy that drops it.
    pub dropped_by: Option<String>,
    /// Rules that may drop it: they have conditions that are not known here.
    pub may_drop: Vec<String>,
    /// The rule that gives it another source address.
    pub masqueraded_by: Option<String>,
}

/// Deeper than chains are nested; the kernel refuses loops.
const DEPTH: u32 = 16;

/// Follows the first packet of a flow through the tables `mangle`, `filter` and `nat` of one family.
#[must_use]
pub fn others(
    tables: &BTreeMap<String, ObservedTable>,
    packet: &Packet,
    interfaces: Interfaces<'_>,
) -> Others {
    let mut others = Others::default();
    let hook = if packet.to_node { "INPUT" } else { "FORWARD" };
    for (table, chains) in [
        ("raw", &["PREROUTING"][..]),
        ("mangle", &["PREROUTING", hook, "POSTROUTING"]),
        ("filter", &[hook]),
        ("security", &[hook]),
        ("nat", &["POSTROUTING"]),
    ] {
        let Some(rules) = tables.get(table) else { continue };
        for chain in chains {
            let mut walk = Walk { rules, packet, interfaces, table, others: &mut others };
            let end = walk.chain(chain, 0);
            let observed = rules.chains.iter().find(|one| one.name == *chain);
            if end == End::Returned && observed.is_some_and(|chain| chain.policy == "DROP") {
                others.dropped_by.get_or_insert_with(|| format!("the policy DROP of {table} {chain}"));
            }
        }
    }
    others
}

/// Returns addresses and ports that rules may translate the destination of a packet to; none: it is not translated.
#[must_use]
pub fn translations(
    tables: &BTreeMap<String, ObservedTable>,
    packet: &Packet,
    interfaces: Interfaces<'_>,
) -> Vec<(IpAddr, u16)> {
    let Some(rules) = tables.get("nat") else { return Vec::new() };
    let mut found = Vec::new();
    translate(rules, "PREROUTING", packet, interfaces, 0, &mut found);
    found
}

/// Follows a chain; returns whether a rule certainly ended the table.
fn translate(
    rules: &ObservedTable,
    name: &str,
    packet: &Packet,
    interfaces: Interfaces<'_>,
    depth: u32,
    found: &mut Vec<(IpAddr, u16)>,
) -> bool {
    let Some(chain) = rules.chains.iter().find(|chain| chain.name == name).filter(|_| depth < DEPTH) else {
        return false;
    };
    for ObservedRule { rule, .. } in &chain.rules {
        let matches = walk::matches(rule, packet, interfaces);
        let (Some(target), true) = (target(rule), matches != Some(false)) else { continue };
        let certain = matches == Some(true);
        let ends = match target {
            "DNAT" => {
                found.extend(destination(rule, packet));
                true
            }
            "ACCEPT" | "REDIRECT" => true,
            "RETURN" if certain => return false,
            chain => translate(rules, chain, packet, interfaces, depth + 1, found),
        };
        if ends && certain {
            return true;
        }
    }
    false
}

/// Returns the end that a rule translates to: `--to-destination ADDRESS[:PORT]`.
fn destination(rule: &str, packet: &Packet) -> Option<(IpAddr, u16)> {
    let to = rule.split_whitespace().skip_while(|word| *word != "--to-destination").nth(1)?;
    match (to.parse::<SocketAddr>(), to.parse::<IpAddr>()) {
        (Ok(to), _) => Some((to.ip(), to.port())),
        (_, Ok(address)) => Some((address, packet.destination_port)),
        _ => None,
    }
}

/// Returns addresses and ports of a Service, by the comments of kube-proxy.
#[must_use]
pub fn service(tables: &BTreeMap<String, ObservedTable>, namespace: &str, name: &str) -> Vec<(IpAddr, u16)> {
    let wanted = format!("{namespace}/{name}");
    let chains = ["nat", "filter"].into_iter().filter_map(|table| tables.get(table));
    let chains = chains.flat_map(|table| &table.chains).filter(|chain| chain.name == "KUBE-SERVICES");
    let of_service = |ObservedRule { rule, .. }: &ObservedRule| {
        // `shop/web:http cluster IP`, `shop/web has no endpoints`.
        let (_, text) = rule.split_once("--comment \"")?;
        let (of, _) = text.split_once('"')?.0.split_once(' ')?;
        let option = |name: &str| rule.split_whitespace().skip_while(|word| *word != name).nth(1);
        let address = option("-d")?.split('/').next()?.parse().ok()?;
        (of.split(':').next() == Some(&wanted)).then_some((address, option("--dport")?.parse().ok()?))
    };
    chains.flat_map(|chain| &chain.rules).filter_map(of_service).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// A verdict of this table.
    Final,
    Returned,
}

struct Walk<'a> {
    rules: &'a ObservedTable,
    packet: &'a Packet,
    interfaces: Interfaces<'a>,
    table: &'a str,
    others: &'a mut Others,
}

impl Walk<'_> {
    fn chain(&mut self, name: &str, depth: u32) -> End {
        let rules = self.rules;
        let Some(chain) = rules.chains.iter().find(|chain| chain.name == name).filter(|_| depth < DEPTH)
        else {
            return End::Returned;
        };
        for rule in &chain.rules {
            let rule = rule.rule.as_str();
            // The rules of bridge have a stage of their own.
            let Some(target) = target(rule).filter(|target| !is_own(target)) else { continue };
            let matches = walk::matches(rule, self.packet, self.interfaces);
            if matches == Some(false) {
                continue;
            }
            let shown = || format!("{} {name} {rule}", self.table);
            let certain = matches == Some(true);
            match target {
                "DROP" | "REJECT" if certain => {
                    self.others.dropped_by.get_or_insert_with(shown);
                    return End::Final;
                }
                "DROP" | "REJECT" => {
                    let shown = shown();
                    self.others.may_drop.push(shown);
                }
                "MASQUERADE" | "SNAT" | "NETMAP" => {
                    self.others.masqueraded_by.get_or_insert_with(shown);
                    return End::Final;
                }
                "ACCEPT" if certain => return End::Final,
                "RETURN" if certain => return End::Returned,
                own_chain if rules.chains.iter().any(|chain| chain.name == own_chain) => {
                    // Of a chain that may be left out, only what it may drop counts.
                    let before = self.others.dropped_by.clone();
                    let goes_on = self.chain(own_chain, depth + 1);
                    if certain {
                        let is_goto = rule.split_whitespace().any(|word| word == "-g");
                        if goes_on == End::Final || is_goto {
                            return goes_on;
                        }
                    } else if let Some(dropped) = self.others.dropped_by.take_if(|_| before.is_none()) {
                        self.others.may_drop.push(dropped);
                    }
                }
                _ => {}
            }
        }
        End::Returned
    }
}

#[cfg(test)]
mod tests {
    use super::super::observe::parse;
    use super::*;

    fn ask(rules: &str) -> Others {
        let packet = Packet {
            source: [10, 200, 1, 91].into(),
            source_port: 61001,
            destination: [192, 168, 31, 67].into(),
            destination_port: 502,
            protocol: 6,
            icmp_type: 0,
            to_node: false,
        };
        others(&parse(rules), &packet, Interfaces { input: Some("cali1"), output: Some("eth0") })
    }

    #[test]
    fn the_first_rule_that_drops_is_named() {
        let found = ask("*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j BRIDGE-FORWARD\n\
             -A FORWARD -p udp -j DROP\n-A FORWARD -s 10.200.0.0/16 -i cali+ -p tcp -m tcp --dport 502 -j DROP\n");
        assert_eq!(
            found.dropped_by.as_deref(),
            Some("filter FORWARD -s 10.200.0.0/16 -i cali+ -p tcp -m tcp --dport 502 -j DROP")
        );
    }

    #[test]
    fn an_accept_before_it_and_other_interfaces_spare_the_packet() {
        let accept = "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -o eth0 -j ACCEPT\n-A FORWARD -j DROP\n";
        assert_eq!(ask(accept), Others::default());
        let elsewhere =
            "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i docker0 -j DROP\n-A FORWARD ! -i cali1 -j DROP\n";
        assert_eq!(ask(elsewhere), Others::default());
    }

    #[test]
    fn a_policy_of_drop_counts_behind_all_rules_and_chains() {
        let found =
            ask("*filter\n:FORWARD DROP [0:0]\n:DOCKER - [0:0]\n-A FORWARD -j DOCKER\n-A DOCKER -j RETURN\n");
        assert_eq!(found.dropped_by.as_deref(), Some("the policy DROP of filter FORWARD"));
    }

    #[test]
    fn an_unknown_condition_is_no_verdict() {
        let found = ask(
            "*filter\n:FORWARD ACCEPT [0:0]\n:X - [0:0]\n-A FORWARD -m limit --limit 5/min -j X\n-A X -j DROP\n",
        );
        assert_eq!(found.dropped_by, None);
        assert_eq!(found.may_drop, ["filter X -j DROP"]);
    }

    #[test]
    fn endpoints_of_a_service_are_found_by_name_and_by_address() {
        let tables = parse(
            "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-SEP-A - [0:0]\n\
             :KUBE-SEP-B - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A PREROUTING -m comment --comment \"kubernetes service portals\" \
             -j KUBE-SERVICES\n-A KUBE-SERVICES -d 10.96.0.7/32 -p tcp -m comment --comment \"shop/web:http cluster IP\" -m tcp \
             --dport 80 -j KUBE-SVC-A\n-A KUBE-SERVICES -d 10.96.0.8/32 -p tcp -m comment --comment \"shop/webhook:http cluster \
             IP\" -m tcp --dport 80 -j KUBE-SVC-B\n-A KUBE-SVC-A ! -s 10.200.0.0/16 -d 10.96.0.7/32 -p tcp -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n-A KUBE-SVC-A -j KUBE-SEP-B\n\
             -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.200.1.91:8080\n\
             -A KUBE-SEP-B -p tcp -m tcp -j DNAT --to-destination 10.200.1.92:8080\n",
        );
        let web = ([10, 96, 0, 7].into(), 80);
        assert_eq!(service(&tables, "shop", "web"), [web]);
        assert!(service(&tables, "shop", "we").is_empty());
        let to = |(destination, destination_port): (IpAddr, u16)| {
            let source = [192, 168, 31, 67].into();
            let (source_port, protocol, icmp_type, to_node) = (0, 6, 0, false);
            let packet =
                Packet { source, source_port, destination, destination_port, protocol, icmp_type, to_node };
            translations(&tables, &packet, Interfaces::default())
        };
        let endpoint = |last| (IpAddr::from([10, 200, 1, last]), 8080);
        assert_eq!(to(web), [endpoint(91), endpoint(92)]);
        assert!(to((web.0, 81)).is_empty());
    }

    #[test]
    fn a_masquerade_is_named() {
        let found = ask(
            "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -s 10.200.1.0/24 ! -d 10.0.0.0/8 -j MASQUERADE\n",
        );
        assert_eq!(
            found.masqueraded_by.as_deref(),
            Some("nat POSTROUTING -s 10.200.1.0/24 ! -d 10.0.0.0/8 -j MASQUERADE")
        );
    }
}
