//! Audit mode: everything passes, and is counted as it would have been.

use bridge_common::filter::{counters::Reason, event::verdict};
use bridge_lab::{
    packet::Packet,
    prog::{Action, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families, from_lan, node,
    usual_policy,
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
