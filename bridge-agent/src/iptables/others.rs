//! Follows a packet through the rules of other programs, as iptables-save prints them; pure.
//!
//! As [`super::walk`], it never guesses: a rule that it cannot read is named, and no verdict follows from it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::observe::{ObservedRule, ObservedTable, target};
use super::ruleset::is_own;
use super::walk::{self, Interfaces, NewSource, Packet, State};

/// The verdict of other programs on a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// The rule or policy that drops it.
    pub dropped_by: Option<String>,
    /// Rules that may drop it: they have conditions that are not known here.
    pub may_drop: Vec<String>,
    /// The rule that gives it another source address.
    pub masqueraded_by: Option<String>,
    /// That address.
    pub source: Option<NewSource>,
    /// Rules that may do so: they have conditions that are not known here.
    pub may_masquerade: Vec<String>,
    /// The mark that it has as it is routed; `None`: 0, or not known.
    pub mark: Option<u32>,
    /// The mark that its connection has afterwards; `None`: 0, or not known.
    pub connection_mark: Option<u32>,
}

/// Deeper than chains are nested; the kernel refuses loops.
const DEPTH: u32 = 16;

/// Follows a packet of a flow through the tables of one family, `before` as it comes in and `after` as it is routed, behind
/// a translation of its destination. `connection_mark`: that of its connection.
#[must_use]
pub fn others(
    tables: &BTreeMap<String, ObservedTable>,
    before: &Packet,
    after: &Packet,
    interfaces: Interfaces<'_>,
    connection_mark: Option<u32>,
) -> Others {
    let mut others = Others::default();
    let (first, hook, mangle) = match (after.from_node, after.to_node) {
        // Both hooks are one.
        (true, _) => ("OUTPUT", "OUTPUT", None),
        (false, true) => ("PREROUTING", "INPUT", Some("INPUT")),
        (false, false) => ("PREROUTING", "FORWARD", Some("FORWARD")),
    };
    let (mut mark, mut state) = (Some(0), after.state);
    let mut connection = connection_mark;
    let inbound = Interfaces { output: None, ..interfaces };
    let outbound = Interfaces { input: None, ..interfaces };
    for (table, chain, packet, interfaces) in [
        ("raw", first, before, inbound),
        ("mangle", first, before, inbound),
        ("nat", first, before, inbound),
        ("mangle", mangle.unwrap_or_default(), after, interfaces),
        ("filter", hook, after, interfaces),
        ("security", hook, after, interfaces),
        ("mangle", "POSTROUTING", after, outbound),
        ("nat", "POSTROUTING", after, outbound),
    ] {
        let Some(rules) = tables.get(table) else { continue };
        // Only the first packet of a flow comes to the table nat.
        if (table == "nat" && matches!(state, State::Reply | State::Following))
            || (after.to_node && chain == "POSTROUTING")
        {
            continue;
        }
        let packet = &Packet { state, ..*packet };
        if table == "nat" && chain == first {
            let mut walk = Translate { rules, packet, mark, connection, interfaces, found: Vec::new() };
            walk.chain(chain, true, 0);
            mark = walk.mark;
            others.mark = mark.filter(|mark| *mark != 0);
            continue;
        }
        let open = false;
        let others = &mut others;
        let mut walk = Walk { rules, packet, mark, connection, state, interfaces, table, open, others };
        let end = walk.chain(chain, true, 0);
        let open = walk.open;
        (mark, connection, state) = (walk.mark, walk.connection, walk.state);
        if chain == first {
            others.mark = mark.filter(|mark| *mark != 0);
        }
        let observed = rules.chains.iter().find(|one| one.name == *chain);
        if end == End::Returned && observed.is_some_and(|chain| chain.policy == "DROP") {
            let shown = format!("the policy DROP of {table} {chain}");
            if open {
                others.may_drop.push(shown);
            } else {
                others.dropped_by.get_or_insert(shown);
            }
        }
    }
    others.connection_mark = connection.filter(|mark| *mark != 0);
    others
}

/// Returns addresses and ports that rules may translate the destination of a packet to; none: it is not translated. The unspecified
/// address stands for that of the interface that it comes in by.
#[must_use]
pub fn translations(
    tables: &BTreeMap<String, ObservedTable>,
    packet: &Packet,
    interfaces: Interfaces<'_>,
) -> Vec<(IpAddr, u16)> {
    let Some(rules) = tables.get("nat") else { return Vec::new() };
    let (mark, connection) = (Some(0), Some(0));
    let mut walk = Translate { rules, packet, mark, connection, interfaces, found: Vec::new() };
    walk.chain("PREROUTING", true, 0);
    walk.found
}

/// Follows a packet through `nat PREROUTING`: its marks, and where it is translated to.
struct Translate<'a> {
    rules: &'a ObservedTable,
    packet: &'a Packet,
    mark: Option<u32>,
    /// The mark of its connection.
    connection: Option<u32>,
    interfaces: Interfaces<'a>,
    found: Vec<(IpAddr, u16)>,
}

impl Translate<'_> {
    /// Follows a chain that the packet certainly, or perhaps, comes to; returns whether a rule certainly ended the table.
    fn chain(&mut self, name: &str, mut certain: bool, depth: u32) -> bool {
        let rules = self.rules;
        let Some(chain) = rules.chains.iter().find(|chain| chain.name == name).filter(|_| depth < DEPTH)
        else {
            return false;
        };
        for ObservedRule { rule, .. } in &chain.rules {
            let matches = walk::matches(rule, self.packet, self.mark, self.connection, self.interfaces);
            let (Some(target), true) = (target(rule), matches != Some(false)) else { continue };
            let sure = certain && matches == Some(true);
            let found = self.found.len();
            let ends = match target {
                "DNAT" => {
                    self.found.extend(destination(rule, self.packet));
                    true
                }
                "REDIRECT" => {
                    self.found.push(redirected(rule, self.packet));
                    true
                }
                "ACCEPT" => true,
                "MARK" => {
                    let mark = walk::marked(rule, self.mark);
                    self.mark = mark.filter(|mark| sure || self.mark == Some(*mark));
                    false
                }
                "RETURN" if sure => return false,
                chain => self.chain(chain, sure, depth + 1),
            };
            if ends && matches == Some(true) {
                return true;
            }
            // Another endpoint than this one.
            certain &= self.found.len() == found && !ends;
        }
        false
    }
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

/// Returns the port that a rule with the target REDIRECT leads to: of the interface that the packet comes in by, for which the
/// unspecified address stands.
fn redirected(rule: &str, packet: &Packet) -> (IpAddr, u16) {
    let port = rule.split_whitespace().skip_while(|word| *word != "--to-ports").nth(1);
    let port = port.and_then(|ports| ports.split('-').next()?.parse().ok());
    (unspecified(packet.source), port.unwrap_or(packet.destination_port))
}

/// Returns the unspecified address of an IP version.
pub(crate) const fn unspecified(of: IpAddr) -> IpAddr {
    match of {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
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
    mark: Option<u32>,
    /// The mark of its connection.
    connection: Option<u32>,
    /// The state of the packet behind this table.
    state: State,
    interfaces: Interfaces<'a>,
    table: &'a str,
    /// Whether a rule with conditions that are not known here may have ended the table.
    open: bool,
    others: &'a mut Others,
}

impl Walk<'_> {
    /// Follows a chain that the packet certainly, or perhaps, comes to.
    fn chain(&mut self, name: &str, mut reached: bool, depth: u32) -> End {
        let rules = self.rules;
        let Some(chain) = rules.chains.iter().find(|chain| chain.name == name).filter(|_| depth < DEPTH)
        else {
            return End::Returned;
        };
        for rule in &chain.rules {
            let rule = rule.rule.as_str();
            // The rules of bridge have a stage of their own.
            let Some(target) = target(rule).filter(|target| !is_own(target)) else { continue };
            let matches = walk::matches(rule, self.packet, self.mark, self.connection, self.interfaces);
            if matches == Some(false) {
                continue;
            }
            let shown = format!("{} {name} {rule}", self.table);
            let certain = matches == Some(true) && reached && !self.open;
            match target {
                "DROP" | "REJECT" if certain => {
                    self.others.dropped_by.get_or_insert(shown);
                    return End::Final;
                }
                "DROP" | "REJECT" => {
                    self.others.may_drop.push(shown);
                    self.open = true;
                }
                "MASQUERADE" | "SNAT" | "NETMAP" if certain => {
                    if self.others.masqueraded_by.is_none() {
                        self.others.source = walk::new_source(rule, target);
                        self.others.masqueraded_by = Some(shown);
                    }
                    return End::Final;
                }
                "MASQUERADE" | "SNAT" | "NETMAP" => {
                    self.others.may_masquerade.push(shown);
                    self.open = true;
                }
                "MARK" => {
                    let mark = walk::marked(rule, self.mark);
                    self.mark = mark.filter(|mark| certain || self.mark == Some(*mark));
                }
                "CONNMARK" => {
                    let (mark, connection) = walk::connmarked(rule, self.mark, self.connection);
                    self.mark = mark.filter(|mark| certain || self.mark == Some(*mark));
                    self.connection = connection.filter(|mark| certain || self.connection == Some(*mark));
                }
                // The node drops a packet whose life ends before it is forwarded.
                "TTL" | "HL" if !self.packet.to_node && rule.contains("-set 1") && certain => {
                    self.others.dropped_by.get_or_insert(shown);
                }
                "CT" | "NOTRACK" if target == "NOTRACK" || rule.contains("--notrack") => {
                    self.state = if certain { State::Untracked } else { State::Unknown };
                }
                // A program decides; without one, the packet is dropped.
                "NFQUEUE" => {
                    self.others.may_drop.push(shown);
                    self.open = true;
                }
                "ACCEPT" if certain => return End::Final,
                "ACCEPT" => self.open = true,
                "RETURN" if certain => return End::Returned,
                "RETURN" => reached = false,
                own_chain if rules.chains.iter().any(|chain| chain.name == own_chain) => {
                    let is_goto = rule.split_whitespace().any(|word| word == "-g");
                    let end = self.chain(own_chain, certain, depth + 1);
                    if certain && (end == End::Final || is_goto) {
                        return end;
                    }
                    // After a goto that may have led away, the next rule may not be reached.
                    reached &= !is_goto;
                }
                _ => {}
            }
            if self.open && matches == Some(true) && matches!(target, "DROP" | "REJECT" | "ACCEPT") {
                // Whichever way led here, the table ends.
                return End::Final;
            }
        }
        End::Returned
    }
}

#[cfg(test)]
mod tests {
    use super::super::observe::parse;
    use super::*;
    use crate::model::PortRange;

    fn packet() -> Packet {
        Packet {
            source: [10, 200, 1, 91].into(),
            source_ports: PortRange::one(61001),
            destination: [192, 168, 31, 67].into(),
            destination_port: 502,
            protocol: 6,
            icmp_type: 0,
            to_node: false,
            from_node: false,
            state: State::New,
        }
    }

    fn follow(rules: &str, packet: &Packet) -> Others {
        let interfaces = Interfaces { input: Some("cali1"), output: Some("eth0") };
        others(&parse(rules), packet, packet, interfaces, Some(0))
    }

    fn ask(rules: &str) -> Others {
        follow(rules, &packet())
    }

    /// An answer passes OUTPUT instead of PREROUTING and INPUT where the node sends it, and the flow is known.
    #[test]
    fn an_answer_is_followed_as_one() {
        let answer = packet().reply();
        let stateless = "*filter\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --sport 502 -j DROP\n";
        assert_eq!(ask(stateless), Others::default());
        assert!(follow(stateless, &answer).dropped_by.is_some());
        let stateful =
            "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
        assert!(ask(stateful).dropped_by.is_some());
        assert_eq!(follow(stateful, &answer), Others::default());
        let syn_ack =
            "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK -j DROP\n";
        assert!(ask(syn_ack).dropped_by.is_none() && follow(syn_ack, &answer).dropped_by.is_some());
        let output = "*filter\n:FORWARD DROP [0:0]\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -d 10.200.1.91/32 -j DROP\n";
        let of_node = Packet { from_node: true, ..answer };
        let dropped = follow(output, &of_node).dropped_by;
        assert_eq!(dropped.as_deref(), Some("filter OUTPUT -d 10.200.1.91/32 -j DROP"));
    }

    #[test]
    fn a_packet_that_is_not_tracked_and_one_for_a_queue_are_known() {
        let found = ask(
            "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j CT --notrack\n*filter\n:FORWARD ACCEPT [0:0]\n\
             -A FORWARD -m conntrack --ctstate INVALID,UNTRACKED -j DROP\n",
        );
        assert!(found.dropped_by.is_some(), "{found:?}");
        let found = ask(
            "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -j NFQUEUE --queue-num 3\n-A FORWARD -m mark --mark 0x1 -j DROP\n",
        );
        assert_eq!((found.dropped_by, found.may_drop.len()), (None, 1));
    }

    /// The mark of a connection is 0 until a rule sets it, and its later packets find it there.
    #[test]
    fn the_mark_of_a_connection_is_followed_to_its_answer() {
        let mangle = |rules: &str| {
            format!("*mangle\n:PREROUTING ACCEPT [0:0]\n{rules}*filter\n:FORWARD ACCEPT [0:0]\n")
        };
        let drops = "-A FORWARD -m connmark --mark 0x10/0x10 -j DROP\n";
        assert_eq!(ask(&(mangle("") + drops)), Others::default());
        let set = "-A PREROUTING -p tcp -m tcp --dport 502 -j CONNMARK --set-xmark 0x10/0xffffffff\n";
        assert!(ask(&(mangle(set) + drops)).dropped_by.is_some());
        let restore =
            "-A PREROUTING -i eth0 -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff\n";
        let rules = parse(&mangle(&format!("{set}{restore}")));
        let first = others(
            &rules,
            &packet(),
            &packet(),
            Interfaces { input: Some("cali1"), output: Some("eth0") },
            Some(0),
        );
        assert_eq!((first.mark, first.connection_mark), (None, Some(0x10)));
        let back = Interfaces { input: Some("eth0"), output: Some("cali1") };
        let answer = packet().reply();
        let found = others(&rules, &answer, &answer, back, first.connection_mark);
        assert_eq!(found.mark, Some(0x10));
        let unknown = "-A PREROUTING -m set --match-set x src -j CONNMARK --set-xmark 0x10/0xffffffff\n";
        let found = ask(&(mangle(unknown) + drops));
        assert_eq!((found.dropped_by, found.may_drop.len()), (None, 1));
    }

    #[test]
    fn a_condition_on_the_source_port_holds_for_all_ports_or_is_no_verdict() {
        let rule = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --sport 61000:61100 -j DROP\n";
        let from = |first, last| {
            let found = follow(rule, &Packet { source_ports: PortRange { first, last }, ..packet() });
            (found.dropped_by.is_some(), found.may_drop.len())
        };
        assert_eq!(
            [from(61001, 61100), from(32768, 60999), from(32768, 61000)],
            [(true, 0), (false, 0), (false, 1)]
        );
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
    fn a_drop_behind_an_accept_that_may_match_is_no_verdict() {
        let accept = "-A FORWARD -m set --match-set lan src -j ACCEPT\n";
        let found = ask(&format!("*filter\n:FORWARD ACCEPT [0:0]\n{accept}-A FORWARD -j DROP\n"));
        assert_eq!((found.dropped_by, found.may_drop), (None, vec!["filter FORWARD -j DROP".to_owned()]));
        let found = ask(&format!("*filter\n:FORWARD DROP [0:0]\n{accept}"));
        assert_eq!((found.dropped_by.as_deref(), found.may_drop.len()), (None, 1));
        let found = ask(
            "*filter\n:FORWARD ACCEPT [0:0]\n:X - [0:0]\n-A FORWARD -j X\n-A X -m time --weekdays Mon -j RETURN\n\
             -A X -j DROP\n",
        );
        assert_eq!((found.dropped_by, found.may_drop.len()), (None, 1));
    }

    /// kube-proxy masquerades packets with its mark, and nothing else.
    #[test]
    fn marks_decide_about_a_masquerade() {
        let post = "-A POSTROUTING -j KUBE-POSTROUTING\n-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
                    -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n";
        let table = |rules: &str| {
            format!(
                "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                 -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n{rules}{post}"
            )
        };
        let none = ask(&table(""));
        assert_eq!((none.masqueraded_by, none.may_masquerade.len()), (None, 0));
        let marked = ask(&table("-A PREROUTING -p tcp -m tcp --dport 502 -j KUBE-MARK-MASQ\n"));
        assert!(marked.masqueraded_by.is_some_and(|rule| rule.contains("-j MASQUERADE")));
        let perhaps = ask(&table("-A PREROUTING -m set --match-set x src -j KUBE-MARK-MASQ\n"));
        assert_eq!((perhaps.masqueraded_by, perhaps.may_masquerade.len()), (None, 1));
    }

    /// The CNI plugin portmap, as `iptables-save` prints its rules.
    #[test]
    fn a_host_port_leads_to_its_pod() {
        let tables = parse(
            "*nat\n:PREROUTING ACCEPT [0:0]\n:CNI-HOSTPORT-DNAT - [0:0]\n:CNI-DN-a1 - [0:0]\n:CNI-HOSTPORT-SETMARK - [0:0]\n\
             -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n\
             -A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: \\\"net\\\" id: \\\"1\\\"\" -m multiport --dports 18080 -j \
             CNI-DN-a1\n-A CNI-DN-a1 -s 10.200.1.0/24 -p tcp -m tcp --dport 18080 -j CNI-HOSTPORT-SETMARK\n\
             -A CNI-DN-a1 -p tcp -m tcp --dport 18080 -j DNAT --to-destination 10.200.1.91:8080\n\
             -A CNI-HOSTPORT-SETMARK -m comment --comment \"CNI portfwd masquerade mark\" -j MARK --set-xmark 0x2000/0x2000\n",
        );
        let to = |destination_port, to_node| {
            let (source, destination) = ([192, 168, 31, 67].into(), [192, 168, 31, 17].into());
            let packet = Packet { source, destination, destination_port, to_node, ..packet() };
            translations(&tables, &packet, Interfaces::default())
        };
        assert_eq!(to(18080, true), [(IpAddr::from([10, 200, 1, 91]), 8080)]);
        assert_eq!((to(18081, true), to(18080, false)), (vec![], vec![]));
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
            let packet = Packet { source, destination, destination_port, ..packet() };
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
