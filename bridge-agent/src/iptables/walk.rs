//! Follows one packet through the rules of bridge, as read back from the kernel; pure.
//!
//! An interpreter of the part of iptables that bridge writes itself. A rule of another program may be beyond it; then it
//! returns no verdict, and never guesses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bridge_common::protocol;
use ipnet::IpNet;

use super::observe::OwnRules;
use super::render::DENY;
use super::ruleset::{Family, Table};
use crate::model::PortRange;

/// A packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who opens the flow.
    pub source: IpAddr,
    /// Where one port is not known: those that it may have. 0 for a protocol without ports.
    pub source_ports: PortRange,
    /// To whom.
    pub destination: IpAddr,
    /// 0 for a protocol without ports.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Type of an ICMP header.
    pub icmp_type: u8,
    /// Whether the destination is an address of this node, as on a NodePort.
    pub to_node: bool,
    /// Whether the source is one.
    pub from_node: bool,
    /// Its place in the flow.
    pub state: State,
}

/// The state that connection tracking gives to a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// The first of its flow.
    #[default]
    New,
    /// The first answer.
    Reply,
    /// The packet of the opener after that.
    Following,
    /// A rule keeps it from connection tracking.
    Untracked,
    /// One of these.
    Unknown,
}

/// Interfaces of a packet; `None`: unknown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interfaces<'a> {
    /// The one that it comes in by.
    pub input: Option<&'a str>,
    /// The one that it leaves by.
    pub output: Option<&'a str>,
}

/// The source that a rule gives to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSource {
    /// `None`: an address of the interface that the packet leaves by.
    pub address: Option<IpAddr>,
    /// The first of the ports that it may get; `None`: its own, if that is free.
    pub port: Option<u16>,
}

/// The verdict of bridge on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The rules of others decide.
    Passes,
    /// Dropped or rejected; in audit mode: would be.
    Denied,
}

const NO_NEXT_HEADER: u8 = 59;
/// Deeper than any chain of bridge leads; the kernel refuses loops.
const DEPTH: u32 = 16;

impl Packet {
    /// Whether connection tracking follows it: an IPv6 packet without next header has nothing to follow.
    #[must_use]
    pub const fn is_tracked(&self) -> bool {
        self.protocol != NO_NEXT_HEADER || self.source.is_ipv4()
    }

    /// Returns the first answer to the packet.
    #[must_use]
    pub const fn reply(&self) -> Self {
        Self {
            source: self.destination,
            source_ports: PortRange::one(self.destination_port),
            destination: self.source,
            // Rules about the ports of clients name all of them.
            destination_port: self.source_ports.first,
            protocol: self.protocol,
            icmp_type: if self.source.is_ipv4() { 0 } else { 129 },
            to_node: self.from_node,
            from_node: self.to_node,
            state: State::Reply,
        }
    }

    /// Returns the packet of the opener after the first answer.
    #[must_use]
    pub const fn following(&self) -> Self {
        Self { state: State::Following, ..*self }
    }

    const fn family(&self) -> Family {
        match self.source {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

/// Returns the verdict of `rules`; `None` if it depends on something that is not known here. In audit mode (`audit`), a
/// packet that comes to the chain BRIDGE-DENY would be denied.
#[must_use]
pub fn verdict(rules: &BTreeMap<(Family, Table), OwnRules>, packet: &Packet, audit: bool) -> Option<Verdict> {
    walk(rules, packet, packet, audit).verdict
}

/// A walk through rules: its end, and the rules that led there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// See [`verdict`].
    pub verdict: Option<Verdict>,
    /// The chains on the way to the verdict.
    pub chains: Vec<String>,
    /// The rule with the verdict, or the one that is beyond this interpreter.
    pub rule: Option<String>,
    /// Its comment: the configured name of a rule, or a reason that begins with `bridge:`.
    pub name: Option<String>,
}

/// Follows a packet, `before` as it comes in and `after` as it is routed, behind a translation of its destination.
#[must_use]
pub fn walk(
    rules: &BTreeMap<(Family, Table), OwnRules>,
    before: &Packet,
    after: &Packet,
    audit: bool,
) -> Walked {
    // Not raw: eBPF compares a packet with its rules only if it believes the source.
    let hooks =
        [(Table::Mangle, "PREROUTING"), (Table::Filter, if after.to_node { "INPUT" } else { "FORWARD" })];
    let (mut marked, mut walked) = (false, Walked::default());
    for (table, hook) in hooks {
        let Some(rules) = rules.get(&(before.family(), table)) else { continue };
        let packet = if table == Table::Mangle { before } else { after };
        walked = Walked { chains: vec![format!("{} {hook}", table.name())], ..Walked::default() };
        let original_port = before.destination_port;
        let mut walk = Walk { rules, packet, original_port, audit, marked, walked };
        let end = walk.rules(rules.jumps_of(hook), 0);
        (marked, walked) = (walk.marked, walk.walked);
        match end {
            End::Unknown => return walked,
            End::Denied => return Walked { verdict: Some(Verdict::Denied), ..walked },
            End::Accepted | End::Returned => {}
        }
    }
    Walked { verdict: Some(Verdict::Passes), ..walked }
}

/// How a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Nothing more of this table is asked.
    Accepted,
    Denied,
    /// Back to where the chain was called from.
    Returned,
    Unknown,
}

struct Walk<'a> {
    rules: &'a OwnRules,
    packet: &'a Packet,
    /// Its destination port before translation.
    original_port: u16,
    audit: bool,
    marked: bool,
    walked: Walked,
}

impl Walk<'_> {
    fn rules<'r>(&mut self, rules: impl Iterator<Item = &'r str>, depth: u32) -> End {
        for rule in rules {
            let (matches, action) = read(rule, self.packet, self.original_port, self.marked);
            match matches {
                Some(false) => continue,
                // It makes no difference to the packet whether it is counted or logged.
                None if matches!(action, Action::None) => continue,
                None => {
                    self.walked.rule = Some(rule.to_owned());
                    return End::Unknown;
                }
                Some(true) => {}
            }
            let is_verdict = !matches!(action, Action::None | Action::Mark);
            if is_verdict && let Some(name) = super::observe::comment(rule).filter(|name| is_reason(name)) {
                self.walked.name = Some(name.to_owned());
            }
            if matches!(action, Action::End(_)) {
                self.walked.rule = Some(rule.to_owned());
            }
            match action {
                Action::None => {}
                Action::Mark => self.marked = true,
                Action::End(end) => return end,
                Action::Jump(chain) => match self.chain(chain, depth) {
                    End::Returned => {}
                    end => return end,
                },
                Action::Goto(chain) => return self.chain(chain, depth),
            }
        }
        End::Returned
    }

    fn chain(&mut self, name: &str, depth: u32) -> End {
        if self.audit && name == DENY {
            return End::Denied;
        }
        let rules = self.rules;
        match rules.chain(name) {
            Some(chain) if depth < DEPTH => {
                self.walked.chains.push(name.to_owned());
                self.rules(chain, depth + 1)
            }
            _ => End::Unknown,
        }
    }
}

/// Whether a comment says why a packet is allowed or denied; the others name steps on the way.
fn is_reason(comment: &str) -> bool {
    !matches!(
        comment,
        "bridge:jump"
            | "bridge:opening"
            | "bridge:scope"
            | "bridge:to-pod"
            | "bridge:to-lan"
            | "bridge:inbound"
            | "bridge:outbound"
            | "bridge:from-lan"
            | "bridge:deny"
    )
}

enum Action<'r> {
    /// It only counts or logs.
    None,
    Mark,
    End(End),
    Jump(&'r str),
    Goto(&'r str),
}

/// Returns whether a rule matches, if that is known, and its action.
fn read<'r>(rule: &'r str, packet: &Packet, original_port: u16, marked: bool) -> (Option<bool>, Action<'r>) {
    let mut words = Words(rule);
    let mut matches = Some(true);
    let mut negated = false;
    while let Some(word) = words.next() {
        let holds = match word {
            "!" => {
                negated = true;
                continue;
            }
            // The options that follow say it all.
            "-m" | "--comment" => {
                words.next();
                continue;
            }
            "-j" => return (matches, target(words.next().unwrap_or_default())),
            "-g" => return (matches, Action::Goto(words.next().unwrap_or_default())),
            "--ctorigdstport" => words.next().and_then(|list| in_ranges(list, PortRange::one(original_port))),
            _ => holds(word, &mut words, packet, marked),
        };
        let holds = holds.map(|holds| holds != std::mem::take(&mut negated));
        matches = match (matches, holds) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (None, _) | (_, None) => None,
            _ => Some(true),
        };
    }
    (matches, Action::None)
}

/// Whether a rule of another program matches a packet with this mark, of a connection with that one, at these interfaces; `None` if it has conditions that are not
/// known here.
pub(super) fn matches(
    rule: &str,
    packet: &Packet,
    mark: Option<u32>,
    connection: Option<u32>,
    interfaces: Interfaces<'_>,
) -> Option<bool> {
    let is_named = |interface: Option<&str>, name: &str| {
        let interface = interface?;
        Some(name.strip_suffix('+').map_or(interface == name, |prefix| interface.starts_with(prefix)))
    };
    let (mut words, mut result, mut negated) = (Words(rule), Some(true), false);
    let mut module = "";
    while let Some(word) = words.next() {
        let holds = match word {
            "!" => {
                negated = true;
                continue;
            }
            "-m" => {
                module = words.next().unwrap_or_default();
                continue;
            }
            "--comment" => {
                words.next();
                continue;
            }
            // Options after the target are the target's.
            "-j" | "-g" => break,
            "-i" => is_named(interfaces.input, words.next().unwrap_or_default()),
            "-o" => is_named(interfaces.output, words.next().unwrap_or_default()),
            "--mark" if module == "connmark" => {
                words.next().zip(connection).and_then(|(wanted, mark)| has_mark(wanted, mark))
            }
            "--mark" => words.next().zip(mark).and_then(|(wanted, mark)| has_mark(wanted, mark)),
            "--ctdir" if packet.state == State::Reply => words.next().map(|direction| direction == "REPLY"),
            "--ctdir" => {
                words.next();
                None
            }
            _ => holds(word, &mut words, packet, false),
        };
        match holds.map(|holds| holds != std::mem::take(&mut negated)) {
            Some(false) => return Some(false),
            Some(true) => {}
            None => {
                negated = false;
                result = None;
            }
        }
    }
    result
}

/// Whether a packet has a mark: `VALUE` or `VALUE/MASK`.
fn has_mark(wanted: &str, mark: u32) -> Option<bool> {
    let (value, mask) = masked(wanted)?;
    Some(mark & mask == value)
}

fn option<'r>(rule: &'r str, name: &str) -> Option<&'r str> {
    rule.split_whitespace().skip_while(|word| *word != name).nth(1)
}

/// Returns the marks of a packet and of its connection behind a rule with the target CONNMARK.
pub(super) fn connmarked(
    rule: &str,
    packet: Option<u32>,
    connection: Option<u32>,
) -> (Option<u32>, Option<u32>) {
    let mask =
        |name: &str| option(rule, name).map_or(Some(u32::MAX), |text| masked(text).map(|(mask, _)| mask));
    let copy = |from: Option<u32>, to: Option<u32>, from_mask: &str, to_mask: &str| {
        let (from, from_mask, to_mask) = (from?, mask(from_mask)?, mask(to_mask)?);
        let kept = if to_mask == u32::MAX { 0 } else { to? & !to_mask };
        Some(kept ^ (from & from_mask))
    };
    if rule.contains("--restore-mark") {
        (copy(connection, packet, "--ctmask", "--nfmask"), connection)
    } else if rule.contains("--save-mark") {
        (packet, copy(packet, connection, "--nfmask", "--ctmask"))
    } else {
        (packet, marked(rule, connection))
    }
}

/// Returns the source that a rule gives to a packet; `None`: the rule does not say.
pub(super) fn new_source(rule: &str, target: &str) -> Option<NewSource> {
    let port = |text: &str| text.split('-').next()?.parse().ok();
    match target {
        "MASQUERADE" => Some(NewSource { address: None, port: option(rule, "--to-ports").and_then(port) }),
        "SNAT" => {
            // `ADDRESS[-ADDRESS][:PORT[-PORT]]`, an IPv6 address with a port in brackets.
            let to = option(rule, "--to-source")?;
            let (address, ports) = match to.strip_prefix('[') {
                Some(v6) => v6.split_once(']').map(|(address, rest)| (address, rest.strip_prefix(':')))?,
                None if to.matches(':').count() > 1 => (to, None),
                None => to.split_once(':').map_or((to, None), |(address, ports)| (address, Some(ports))),
            };
            let address = address.split('-').next()?.parse().ok()?;
            Some(NewSource { address: Some(address), port: ports.and_then(port) })
        }
        _ => None,
    }
}

/// Returns the mark that a rule with the target MARK gives a packet.
pub(super) fn marked(rule: &str, mark: Option<u32>) -> Option<u32> {
    let text = option(rule, "--set-xmark")?;
    let (value, mask) = masked(text)?;
    // With a full mask, the former mark does not count.
    if mask == u32::MAX { Some(value) } else { Some((mark? & !mask) ^ value) }
}

fn masked(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

fn target(name: &str) -> Action<'_> {
    match name {
        "ACCEPT" => Action::End(End::Accepted),
        "DROP" | "REJECT" => Action::End(End::Denied),
        "RETURN" => Action::End(End::Returned),
        "LOG" | "NFLOG" => Action::None,
        "MARK" => Action::Mark,
        own if super::ruleset::is_own(own) => Action::Jump(own),
        _ => Action::End(End::Unknown),
    }
}

/// Options that are understood, all with a value.
const KNOWN: [&str; 21] = [
    "-s",
    "-d",
    "-p",
    "--sport",
    "--sports",
    "--dport",
    "--dports",
    "--ctorigdstport",
    "--tcp-flags",
    "--chunk-types",
    "--ctstate",
    "--icmp-type",
    "--icmpv6-type",
    "--dst-type",
    "--src-type",
    "--mark",
    "--ctdir",
    "-o",
    "--ports",
    "--src-range",
    "--dst-range",
];

/// Whether one option holds, negation left out; `None` also for a value of an option that is not known.
fn holds(option: &str, words: &mut Words<'_>, packet: &Packet, marked: bool) -> Option<bool> {
    if !KNOWN.contains(&option) {
        return None;
    }
    let value = words.next()?;
    match option {
        "-s" => Some(value.parse::<IpNet>().ok()?.contains(&packet.source)),
        "-d" => Some(value.parse::<IpNet>().ok()?.contains(&packet.destination)),
        "-p" => Some(protocol_number(value)? == packet.protocol),
        "--ports" => {
            let to = in_ranges(value, PortRange::one(packet.destination_port))?;
            if to { Some(true) } else { in_ranges(value, packet.source_ports) }
        }
        "--src-range" => in_addresses(value, packet.source),
        "--dst-range" => in_addresses(value, packet.destination),
        "--sport" | "--sports" => in_ranges(value, packet.source_ports),
        // Before any translation the two are the same.
        "--dport" | "--dports" | "--ctorigdstport" => {
            in_ranges(value, PortRange::one(packet.destination_port))
        }
        "--tcp-flags" => {
            let flags = words.next()?;
            let has: &[&str] = match packet.state {
                State::Reply => &["SYN", "ACK"],
                State::Following => &["ACK"],
                _ => &["SYN"],
            };
            let asked = |flag: &&&str| value.split(',').any(|one| one == **flag || one == "ALL");
            let set: Vec<&str> = has.iter().filter(asked).copied().collect();
            let wanted: Vec<&str> = flags.split(',').filter(|flag| *flag != "NONE").collect();
            let same = set.len() == wanted.len() && set.iter().all(|flag| wanted.contains(flag));
            Some(packet.protocol == protocol::TCP && same)
        }
        "--chunk-types" => {
            let is_init = value == "only" && words.next()? == "INIT";
            (is_init && !matches!(packet.state, State::Reply | State::Following)).then_some(true)
        }
        "--ctstate" => {
            let has = match packet.state {
                _ if !packet.is_tracked() => "INVALID",
                State::New => "NEW",
                State::Reply | State::Following => "ESTABLISHED",
                State::Untracked => "UNTRACKED",
                State::Unknown => return None,
            };
            Some(value.split(',').any(|state| state == has))
        }
        "--icmp-type" | "--icmpv6-type" => Some(value.parse::<u8>().ok()? == packet.icmp_type),
        "--dst-type" => (value == "LOCAL").then_some(packet.to_node),
        "--src-type" => (value == "LOCAL").then_some(packet.from_node),
        "--mark" => Some(marked),
        // A direct flow: not translated, and between this node's pods and the LAN.
        "--ctdir" => Some(value == "ORIGINAL"),
        "-o" => (!packet.to_node).then_some(false),
        _ => None,
    }
}

/// Whether a list such as `80,8000:8100` has all of these ports, or none; `None`: some.
fn in_ranges(list: &str, ports: PortRange) -> Option<bool> {
    let mut some = false;
    for range in list.split(',') {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        if first <= ports.first && ports.last <= last {
            return Some(true);
        }
        some |= first <= ports.last && ports.first <= last;
    }
    (!some).then_some(false)
}

/// Whether an interval such as `10.0.0.1-10.0.0.9` has an address.
fn in_addresses(interval: &str, address: IpAddr) -> Option<bool> {
    let (first, last) = interval.split_once('-').unwrap_or((interval, interval));
    Some((first.parse::<IpAddr>().ok()?..=last.parse().ok()?).contains(&address))
}

/// As iptables-save names them.
pub(crate) fn protocol_number(name: &str) -> Option<u8> {
    Some(match name {
        "icmp" => protocol::ICMP,
        "tcp" => protocol::TCP,
        "udp" => protocol::UDP,
        "ipv6-icmp" | "icmpv6" => protocol::ICMPV6,
        "sctp" => protocol::SCTP,
        number => number.parse().ok()?,
    })
}

/// Words of a rule; a quoted text is one word.
struct Words<'r>(&'r str);

impl<'r> Iterator for Words<'r> {
    type Item = &'r str;

    fn next(&mut self) -> Option<&'r str> {
        let rest = self.0.trim_start();
        if rest.is_empty() {
            return None;
        }
        let (word, rest) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let end = quoted
                    .match_indices('"')
                    .map(|(at, _)| at)
                    .find(|at| !quoted[..*at].ends_with('\\'))
                    .unwrap_or(quoted.len());
                (&quoted[..end], quoted.get(end + 1..).unwrap_or_default())
            }
            None => rest.split_at(rest.find(' ').unwrap_or(rest.len())),
        };
        self.0 = rest;
        Some(word)
    }
}

#[cfg(test)]
mod tests;
