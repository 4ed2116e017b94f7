//! SCTP associations: who opens one, and which packets are of it (RFC 9260, 5.1, 8.5).

use std::net::IpAddr;

use bridge_agent::datapath::Hook;
use bridge_common::filter::{counters::Reason, flow::FlowKey};
use bridge_lab::{
    packet::Packet,
    prog::{Node, behaviour},
};

use crate::world::{
    ExternalIngress, InternalEgress, InternalIngress, OPEN, OUT, SHUT, families, from_lan, key, node, policy,
    usual_policy,
};

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const HEARTBEAT: u8 = 4;
const HEARTBEAT_ACK: u8 = 5;
const ABORT: u8 = 6;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const ERROR: u8 = 9;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;
/// The T bit.
const REFLECTED: u8 = 1;

/// The ends of an association, and where their packets come in.
#[derive(Clone, Copy)]
struct Association {
    client: (IpAddr, u16, Hook),
    server: (IpAddr, u16, Hook),
    /// The tags that the client and the server ask for.
    tags: (u32, u32),
}

/// One towards a pod and one from it, of both families.
fn associations() -> Vec<Association> {
    let of = |client, server| Association { client, server, tags: (0x0101_0101, 0x0202_0202) };
    families()
        .iter()
        .flat_map(|f| {
            [
                of((f.lan, 50_000, ExternalIngress), (f.pod, OPEN, InternalIngress)),
                of((f.pod, 61_001, InternalIngress), (f.lan, OUT, ExternalIngress)),
            ]
        })
        .collect()
}

impl Association {
    fn client_sends(&self, kind: u8, flags: u8, tag: u32) -> Packet {
        chunk(self.client, self.server, [kind, flags], tag)
    }

    fn server_sends(&self, kind: u8, flags: u8, tag: u32) -> Packet {
        chunk(self.server, self.client, [kind, flags], tag)
    }

    fn init(&self) -> Packet {
        announcing(self.client, self.server, INIT, 0, self.tags.0)
    }

    fn init_ack(&self) -> Packet {
        announcing(self.server, self.client, INIT_ACK, self.tags.0, self.tags.1)
    }

    fn cookie_echo(&self) -> Packet {
        self.client_sends(COOKIE_ECHO, 0, self.tags.1)
    }

    fn key(&self) -> FlowKey {
        key(&self.init(), 132, self.client.1, self.server.1)
    }

    fn table(&self, node: &Node) -> Option<&'static str> {
        node.flow(&self.key()).map(|(table, _)| table)
    }

    fn establish(&self, node: &mut Node) {
        node.passes(self.client.2, &self.init(), Reason::new_flow);
        node.passes(self.server.2, &self.init_ack(), Reason::established);
        node.passes(self.client.2, &self.cookie_echo(), Reason::established);
        node.passes(self.server.2, &self.server_sends(COOKIE_ACK, 0, self.tags.0), Reason::established);
    }

    /// Both sides have their say.
    fn goes_on(&self, node: &mut Node) {
        for kind in [DATA, HEARTBEAT, HEARTBEAT_ACK, ERROR, SHUTDOWN, SHUTDOWN_ACK] {
            node.passes(self.client.2, &self.client_sends(kind, 0, self.tags.1), Reason::established);
            node.passes(self.server.2, &self.server_sends(kind, 0, self.tags.0), Reason::established);
        }
    }
}

fn chunk(from: (IpAddr, u16, Hook), to: (IpAddr, u16, Hook), [kind, flags]: [u8; 2], tag: u32) -> Packet {
    Packet::new(from.0, to.0).sctp(from.1, to.1, tag, &[kind, flags, 0, 8, 0, 0, 0, 1])
}

/// A chunk that asks for packets with a tag of its own.
fn announcing(
    from: (IpAddr, u16, Hook),
    to: (IpAddr, u16, Hook),
    kind: u8,
    tag: u32,
    announced: u32,
) -> Packet {
    let chunk =
        [&[kind, 0, 0, 20][..], &announced.to_be_bytes(), &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat();
    Packet::new(from.0, to.0).sctp(from.1, to.1, tag, &chunk)
}

#[test]
fn init_alone_opens_an_association() {
    let mut node = node();
    for a in associations() {
        for kind in
            [DATA, INIT_ACK, HEARTBEAT, ABORT, SHUTDOWN_ACK, COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE]
        {
            let stray = announcing(a.client, a.server, kind, 1, 1);
            node.denies(a.client.2, &stray, Reason::not_init);
        }
        let elsewhere = Association { server: (a.server.0, SHUT, a.server.2), ..a };
        node.denies(a.client.2, &elsewhere.init(), Reason::no_rule);
        node.passes(a.client.2, &a.init(), Reason::new_flow);
        assert_eq!(a.table(&node), Some("half_open"));
        node.passes(a.server.2, &a.init_ack(), Reason::established);
        assert_eq!(a.table(&node), Some("half_open"), "the client has not answered");
        node.passes(a.client.2, &a.cookie_echo(), Reason::established);
        assert_eq!(a.table(&node), Some("other_flows"));
        a.goes_on(&mut node);
    }
}

#[test]
fn a_wrong_tag_passes_at_no_stage_and_changes_nothing() {
    let mut node = node();
    for a in associations() {
        let (client, server) = a.tags;
        let strays = |node: &mut Node, stage: &str| {
            let before = node.flow(&a.key());
            for kind in
                [DATA, INIT_ACK, 3, HEARTBEAT, HEARTBEAT_ACK, ABORT, SHUTDOWN, SHUTDOWN_ACK, COOKIE_ECHO]
            {
                for tag in [0, client, server + 1, !server] {
                    let packet = announcing(a.client, a.server, kind, tag, 7);
                    node.denies(a.client.2, &packet, Reason::not_init);
                }
                for tag in [0, server, client + 1, !client] {
                    let packet = announcing(a.server, a.client, kind, tag, 7);
                    node.denies(a.server.2, &packet, Reason::not_init);
                }
            }
            assert_eq!(node.flow(&a.key()), before, "{stage}");
        };
        node.passes(a.client.2, &a.init(), Reason::new_flow);
        node.denies(a.client.2, &a.client_sends(COOKIE_ECHO, 0, 0), Reason::not_init);
        strays(&mut node, "after INIT");
        node.passes(a.server.2, &a.init_ack(), Reason::established);
        strays(&mut node, "after INIT ACK");
        node.passes(a.client.2, &a.cookie_echo(), Reason::established);
        strays(&mut node, "established");
        a.goes_on(&mut node);
    }
}

#[test]
fn the_end_of_an_association_may_reflect_a_tag() {
    let mut node = node();
    for a in associations() {
        let (client, server) = a.tags;
        a.establish(&mut node);
        for kind in [ABORT, SHUTDOWN_COMPLETE] {
            for (flags, to_server, to_client) in [(0, server, client), (REFLECTED, client, server)] {
                node.passes(a.client.2, &a.client_sends(kind, flags, to_server), Reason::established);
                node.passes(a.server.2, &a.server_sends(kind, flags, to_client), Reason::established);
                node.denies(a.client.2, &a.client_sends(kind, flags, to_client), Reason::not_init);
                node.denies(a.server.2, &a.server_sends(kind, flags, to_server), Reason::not_init);
            }
        }
        // The bit means something else in other chunks.
        node.denies(a.client.2, &a.client_sends(DATA, REFLECTED, client), Reason::not_init);
        node.passes(a.client.2, &a.client_sends(DATA, REFLECTED, server), Reason::established);
    }
}

#[test]
fn a_refused_association_is_not_established() {
    let mut node = node();
    for a in associations() {
        node.passes(a.client.2, &a.init(), Reason::new_flow);
        node.passes(a.server.2, &a.server_sends(ABORT, 0, a.tags.0), Reason::established);
        assert_eq!(a.table(&node), Some("half_open"));
        node.denies(a.client.2, &a.cookie_echo(), Reason::not_init);
    }
}

#[test]
fn a_stale_init_ack_is_of_no_association() {
    let mut node = node();
    for a in associations() {
        let old = Association { tags: (0x0909_0909, 0x0a0a_0a0a), ..a };
        let foreign = Association { tags: (a.tags.0, old.tags.1), ..a };
        node.passes(a.client.2, &a.init(), Reason::new_flow);
        node.denies(a.server.2, &old.init_ack(), Reason::not_init);
        node.passes(a.server.2, &a.init_ack(), Reason::established);
        node.passes(a.client.2, &a.cookie_echo(), Reason::established);
        for stale in [old, foreign] {
            node.denies(a.server.2, &stale.init_ack(), Reason::not_init);
            node.denies(a.client.2, &stale.cookie_echo(), Reason::not_init);
        }
        node.passes(a.server.2, &a.init_ack(), Reason::established);
        a.goes_on(&mut node);
    }
}

#[test]
fn an_init_ends_nothing_before_it_is_answered() {
    let mut node = node();
    for a in associations() {
        a.establish(&mut node);
        let again = Association { tags: (0x0303_0303, 0x0404_0404), ..a };
        node.passes(a.client.2, &again.init(), Reason::new_flow);
        a.goes_on(&mut node);
        node.passes(a.server.2, &again.init_ack(), Reason::established);
        a.goes_on(&mut node);
        node.passes(a.client.2, &again.cookie_echo(), Reason::established);
        again.goes_on(&mut node);
        node.denies(a.client.2, &a.client_sends(DATA, 0, a.tags.1), Reason::not_init);
        node.denies(a.server.2, &a.server_sends(DATA, 0, a.tags.0), Reason::not_init);
    }
}

#[test]
fn an_init_is_judged_whatever_came_before_it() {
    let mut node = node();
    for a in associations() {
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        let back = announcing(a.server, a.client, INIT, 0, a.tags.1);
        node.passes(a.client.2, &a.init(), Reason::new_flow);
        node.denies(a.server.2, &back, Reason::no_rule);
        node.passes(a.server.2, &a.init_ack(), Reason::established);
        node.denies(a.server.2, &back, Reason::no_rule);
        node.passes(a.client.2, &a.cookie_echo(), Reason::established);
        node.passes(a.client.2, &a.client_sends(SHUTDOWN, 0, a.tags.1), Reason::established);
        node.passes(a.server.2, &a.server_sends(SHUTDOWN_ACK, 0, a.tags.0), Reason::established);
        node.passes(a.client.2, &a.client_sends(SHUTDOWN_COMPLETE, 0, a.tags.1), Reason::established);
        node.publish(&policy(Vec::new()), &behaviour()).expect("a policy");
        node.denies(a.client.2, &a.init(), Reason::no_rule);
        a.goes_on(&mut node);
    }
}

/// RFC 9260, 3.3.2, 3.3.3 and 8.5.1 (A).
#[test]
fn an_init_without_a_tag_of_its_own_is_malformed() {
    let mut node = node();
    for a in associations() {
        let (client, server) = (a.client, a.server);
        node.denies(client.2, &announcing(client, server, INIT, 5, 1), Reason::malformed_l4);
        node.denies(client.2, &announcing(client, server, INIT, 0, 0), Reason::malformed_l4);
        node.passes(client.2, &a.init(), Reason::new_flow);
        let nameless = announcing(server, client, INIT_ACK, a.tags.0, 0);
        node.denies(server.2, &nameless, Reason::malformed_l4);
    }
}

/// No rule restricts what a pod asks of hosts elsewhere, and none but those asked may answer.
#[test]
fn answers_to_a_pod_from_elsewhere_have_its_tag() {
    let mut node = node();
    for f in families() {
        let a = Association {
            client: (f.pod, 61_001, InternalIngress),
            server: (f.stranger, 9000, ExternalIngress),
            tags: (0x0101_0101, 0x0202_0202),
        };
        let answer = from_lan(InternalEgress);
        node.ignores(InternalIngress, &a.init());
        node.denies(answer, &a.server_sends(DATA, 0, a.tags.0 + 1), Reason::not_init);
        node.ignores(answer, &a.init_ack());
        node.ignores(InternalIngress, &a.cookie_echo());
        assert_eq!(a.table(&node), Some("other_flows"));
        node.ignores(answer, &a.server_sends(DATA, 0, a.tags.0));
        node.denies(answer, &a.server_sends(DATA, 0, a.tags.0 + 1), Reason::not_init);
        // A stray of the pod itself ends nothing either.
        node.ignores(InternalIngress, &a.client_sends(DATA, 0, 99));
        node.ignores(answer, &a.server_sends(DATA, 0, a.tags.0));
        node.denies(answer, &a.server_sends(DATA, 0, a.tags.0 + 1), Reason::not_init);
    }
}

/// The agent was started, or its programs were replaced, after the pod had opened it.
#[test]
fn an_association_of_a_pod_that_was_not_seen_to_open_goes_on() {
    let mut node = node();
    for f in families() {
        let a = Association {
            client: (f.pod, 61_001, InternalIngress),
            server: (f.stranger, 9000, ExternalIngress),
            tags: (0x0101_0101, 0x0202_0202),
        };
        node.ignores(InternalIngress, &a.client_sends(DATA, 0, a.tags.1));
        node.ignores(from_lan(InternalEgress), &a.server_sends(DATA, 0, a.tags.0));
        node.ignores(InternalIngress, &a.client_sends(HEARTBEAT, 0, a.tags.1));
        node.ignores(from_lan(InternalEgress), &a.server_sends(HEARTBEAT_ACK, 0, a.tags.0));
    }
}
