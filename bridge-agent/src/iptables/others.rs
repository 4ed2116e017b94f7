//! Follows a packet through the rules of other programs, as iptables-save prints them; pure.
//!
//! As [`super::walk`], it never guesses: a rule that it cannot read is named, and no verdict follows from it.

use std::collections::BTreeMap;

use super::observe::{ObservedTable, target};
use super::plan::is_own;
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
