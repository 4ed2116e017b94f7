//! Audit mode: everything passes, and is counted as it would have been.

use bridge_agent::model::{Action as Outcome, Direction, Policy, Protocol, Rule};
use bridge_common::filter::{counters::Reason, event::verdict};
use bridge_lab::{
    packet::Packet,
    prog::{Action, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families, from_lan, node,
    range, rule, usual_policy,
};

#[test]
fn what_would_be_denied_passes_and_is_reported_once() {
    let mut node = node();
    let mut audit = behaviour();
    audit.audit = true;
    node.publish(&usual_policy(), &audit).expect("a policy");
    for f in families() {
        let c = Connection::inbound(f, SHUT);
        let judged = node.run(c.client_hook, &c.syn().frame()).expect("the program runs");
        assert_eq!((judged.action, judged.counted), (Action::Next, None));
        assert_eq!(judged.audited.map(|(_, reason)| reason), Some(Reason::no_rule));
        assert_eq!(judged.frame, c.syn().frame());
        for (hook, packet) in
            [(c.server_hook, c.syn_ack()), (c.client_hook, c.ack()), (c.server_hook, c.server_ack())]
        {
            let judged = node.run(hook, &packet.frame()).expect("the program runs");
            assert_eq!((judged.action, judged.counted), (Action::Next, None));
            assert_eq!(judged.audited.map(|(_, reason)| reason), Some(Reason::established));
        }
        let verdicts: Vec<_> = node.events().iter().map(|event| event.verdict).collect();
        assert_eq!(verdicts, [verdict::AUDIT]);
    }
}

#[test]
fn what_audit_would_have_denied_is_denied_once_the_mode_is_enforce() {
    let mut node = node();
    let mut audit = behaviour();
    audit.audit = true;
    for f in families() {
        node.publish(&usual_policy(), &audit).expect("a policy");
        let (shut, open) = (Connection::inbound(f, SHUT), Connection::inbound(f, OPEN));
        for c in [shut, open] {
            for (hook, packet) in
                [(c.client_hook, c.syn()), (c.server_hook, c.syn_ack()), (c.client_hook, c.ack())]
            {
                assert_eq!(node.run(hook, &packet.frame()).expect("the program runs").action, Action::Next);
            }
        }
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        node.denies(shut.client_hook, &shut.ack(), Reason::not_syn);
        node.denies(shut.server_hook, &shut.server_ack(), Reason::not_syn);
        node.passes(open.client_hook, &open.ack(), Reason::established);
    }
}

#[test]
fn a_flow_that_audit_mode_alone_let_in_behind_the_node_is_shut_afterwards() {
    let mut node = node();
    let mut audit = behaviour();
    audit.audit = true;
    for f in families() {
        node.publish(&usual_policy(), &audit).expect("a policy");
        let c = Connection::inbound(f, SHUT);
        let judged = node.run(from_lan(InternalEgress), &c.syn().frame()).expect("the program runs");
        assert_eq!((judged.action, judged.counted), (Action::Next, None));
        assert_eq!(judged.audited.map(|(_, reason)| reason), Some(Reason::no_rule));
        let reply = node.run(InternalIngress, &c.syn_ack().frame()).expect("the program runs");
        assert_eq!(reply.audited.map(|(_, reason)| reason), Some(Reason::established));
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        node.denies(InternalIngress, &c.syn_ack(), Reason::not_syn);
    }
}

#[test]
fn malformed_packets_pass_in_audit_mode_too() {
    let mut node = node();
    let mut audit = behaviour();
    audit.audit = true;
    node.publish(&usual_policy(), &audit).expect("a policy");
    for f in families() {
        let part = &Packet::new(f.lan, f.pod).udp(50_000, OPEN, &[7; 100]).fragments(8, 9)[1];
        let judged = node.run(ExternalIngress, &part.frame()).expect("the program runs");
        assert_eq!(judged.action, Action::Next);
        assert_eq!(judged.audited.map(|(_, reason)| reason), Some(Reason::fragment_overlap));
    }
}

/// Rules in audit mode that would open [`SHUT`] and close [`OPEN`].
fn opposite() -> Vec<Rule> {
    let rule = |name, port, action| Rule {
        action,
        ..rule(name, Direction::Inbound, Protocol::Tcp, &[range(port, port)])
    };
    vec![rule("would-open", SHUT, Outcome::Allow), rule("would-close", OPEN, Outcome::Deny)]
}

#[test]
fn a_rule_in_audit_mode_opens_nothing_closes_nothing_and_is_reported() {
    let usual = usual_policy();
    let first = u32::try_from(usual.rules.len()).expect("few") + 1;
    let policy = Policy { audited: opposite(), ..usual };
    let mut node = node();
    node.publish(&policy, &behaviour()).expect("a policy");
    let mut flows = 0;
    for f in families() {
        flows += 1;
        let c = Connection::inbound(f, SHUT);
        node.denies(c.client_hook, &c.syn(), Reason::no_rule);
        let events = node.events();
        let of = |verdict| events.iter().find(|event| event.verdict == verdict).copied();
        let would = of(verdict::AUDIT_ALLOW).expect("a report");
        // Indexes in events begin at one.
        assert_eq!((would.rule, would.reason), (first + 1, Reason::new_flow as u8));
        let denied = events.iter().filter(|event| event.verdict != verdict::AUDIT_ALLOW);
        assert_eq!(denied.map(|event| event.reason).collect::<Vec<_>>(), [Reason::no_rule as u8]);

        let c = Connection::inbound(f, OPEN);
        for (hook, packet, reason) in [
            (c.client_hook, c.syn(), Reason::new_flow),
            (c.server_hook, c.syn_ack(), Reason::established),
            (c.client_hook, c.ack(), Reason::established),
        ] {
            node.passes(hook, &packet, reason);
        }
        let events = node.events();
        let audits = events.iter().filter(|event| event.verdict != verdict::ALLOW);
        let audits: Vec<_> = audits.map(|event| (event.verdict, event.rule, event.reason)).collect();
        assert_eq!(audits, [(verdict::AUDIT, first + 2, Reason::deny_rule as u8)], "once a flow");
        // Flows about which no rule in audit mode decides.
        let c = Connection::outbound(f, OPEN);
        node.denies(c.client_hook, &c.syn(), Reason::no_rule);
        assert!(node.events().iter().all(|event| event.verdict != verdict::AUDIT_ALLOW));
        for index in [first, first + 1] {
            let hits = node.rule_hits(node.slot()).expect("the map");
            let of_cpu = |cpu: u32| hits.get(&(cpu * (first + 2) + index), 0).map_or(0, |hits| hits.packets);
            assert_eq!((0..64).map(of_cpu).sum::<u64>(), flows, "hits of rule {index}");
        }
    }
}

#[test]
fn a_rule_in_audit_mode_is_silent_where_it_would_change_nothing() {
    let usual = usual_policy();
    let same = |action, port| Rule {
        action,
        ..rule("same", Direction::Inbound, Protocol::Tcp, &[range(port, port)])
    };
    let mut node = node();
    for f in families() {
        for (action, port) in [(Outcome::Allow, OPEN), (Outcome::Deny, SHUT)] {
            let policy = Policy { audited: vec![same(action, port)], ..usual.clone() };
            node.publish(&policy, &behaviour()).expect("a policy");
            let c = Connection::inbound(f, port);
            node.run(c.client_hook, &c.syn().frame()).expect("the program runs");
            let audits = [verdict::AUDIT, verdict::AUDIT_ALLOW];
            assert!(node.events().iter().all(|event| !audits.contains(&event.verdict)), "{action:?}");
        }
        // A deny of another rule wins over an allow in audit mode.
        let mut policy = Policy { audited: vec![same(Outcome::Allow, OPEN)], ..usual.clone() };
        policy.rules.push(Rule { name: "no".into(), ..same(Outcome::Deny, OPEN) });
        node.publish(&policy, &behaviour()).expect("a policy");
        let c = Connection::inbound(f, OPEN);
        node.denies(c.client_hook, &c.syn(), Reason::deny_rule);
        assert!(node.events().iter().all(|event| event.verdict != verdict::AUDIT_ALLOW));
    }
}
