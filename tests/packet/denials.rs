//! Classes of denied connections: counted whatever the rate of events, and only for packets that ask for a connection.

use bridge_agent::datapath::Denial;
use bridge_lab::packet::Tcp;
use bridge_lab::prog::{Node, behaviour};

use crate::world::{Connection, OPEN, SHUT, families, node, usual_policy};

fn denials(node: &mut Node) -> Vec<Denial> {
    let (list, evicted) = node.datapath().maps.denials(None).expect("denials");
    assert_eq!(evicted, 0);
    list
}

#[test]
fn connections_that_rules_deny_are_counted_without_events() {
    let mut node = node();
    for audit in [false, true] {
        let quiet = bridge_agent::datapath::Behaviour { audit, events_per_second: 0, ..behaviour() };
        node.publish(&usual_policy(), &quiet).expect("a policy");
        for f in families() {
            // Each connection from another port.
            for port in 0..100 {
                let c = Connection::inbound(f, SHUT);
                let syn = bridge_lab::packet::Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000 + port, SHUT));
                node.run(c.client_hook, &syn.frame()).expect("the program runs");
            }
        }
        assert!(node.events().is_empty());
        let found = denials(&mut node);
        assert_eq!(found.len(), 2, "{found:?}");
        for (denial, f) in found.iter().zip(families()) {
            let class = &denial.class;
            assert_eq!((class.external, class.pod, class.port), (f.lan, f.pod, SHUT));
            assert_eq!((class.direction.as_str(), class.protocol.as_str()), ("inbound", "tcp"));
            assert_eq!(denial.source_ports, [50_000, 50_099]);
            assert_eq!(denial.count, if audit { 200 } else { 100 });
            assert_eq!(denial.verdict == "audit", audit, "{denial:?}");
            assert!(denial.first <= denial.last, "{denial:?}");
        }
    }
}

#[test]
fn packets_of_flows_and_stray_packets_are_no_class() {
    let mut node = node();
    for f in families() {
        let (open, shut) = (Connection::inbound(f, OPEN), Connection::inbound(f, SHUT));
        for (hook, packet) in [
            (open.client_hook, open.syn()),
            (open.server_hook, open.syn_ack()),
            (open.client_hook, open.ack()),
            // A segment of no flow is denied, and asks for none.
            (shut.client_hook, shut.ack()),
        ] {
            node.run(hook, &packet.frame()).expect("the program runs");
        }
    }
    assert!(denials(&mut node).is_empty());
}
