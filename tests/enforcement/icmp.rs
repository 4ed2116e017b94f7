//! ICMP and ICMPv6 echo: by a rule, in the direction that it names.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::icmp::echo;
use bridge_lab::wire::{Capture, Frame};
use etherparse::{Icmpv4Type, Icmpv6Type, TransportHeader};

use crate::support::{SECOND, SILENCE, config, seen_until_now};

fn is_request(frame: &Frame) -> bool {
    match frame.headers().and_then(|headers| headers.transport) {
        Some(TransportHeader::Icmpv4(icmp)) => matches!(icmp.icmp_type, Icmpv4Type::EchoRequest(_)),
        Some(TransportHeader::Icmpv6(icmp)) => matches!(icmp.icmp_type, Icmpv6Type::EchoRequest(_)),
        _ => false,
    }
}

/// ICMP is never rejected: a denied packet gets no answer, and arrives nowhere.
fn is_denied(lab: &Lab, from: &Host, to: &Host, family: Family) -> Result<()> {
    let mut capture = Capture::start(&to.netns, "eth0")?;
    let attempt = echo(&from.netns, to.ip(family), SILENCE)?;
    ensure!(attempt.timed_out(), "{} to {}, {family:?}: {attempt}", from.name, to.name);
    let seen = seen_until_now(&mut capture, lab.b(), to, family)?;
    ensure!(!seen.iter().any(is_request), "{} to {}, {family:?}: a request arrived", from.name, to.name);
    Ok(())
}

#[test]
fn echo_passes_by_its_rule_and_not_without() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let rule = |direction| format!("rules: [{{name: ping, direction: {direction}, protocol: icmp}}]\n");
    let ports = "rules: [{name: in, direction: inbound, protocol: tcp, ports: [1-65535]}]\n";
    let mut agent = Agent::start(&lab, lab.b(), &config("", ports))?;
    for family in Family::BOTH {
        is_denied(&lab, a, c1, family).context("no rule")?;
        is_denied(&lab, c1, a, family).context("no rule")?;
    }
    for (direction, from, to) in [("inbound", a, c1), ("outbound", c1, a)] {
        agent.reload(&config("", &rule(direction)))?;
        for family in Family::BOTH {
            let attempt = echo(&from.netns, to.ip(family), SECOND)?;
            ensure!(attempt.succeeded(), "{direction}, {family:?}: {attempt}");
            is_denied(&lab, to, from, family).with_context(|| format!("{direction} rule"))?;
        }
    }
    Ok(())
}
