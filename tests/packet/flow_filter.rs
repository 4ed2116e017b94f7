//! The filter in front of the flow tables.

use std::{net::IpAddr, sync::atomic::AtomicBool, thread, time::Duration};

use aya::maps::{Array, Map, MapData};
use bridge_common::filter::counters::Reason;
use bridge_lab::{
    packet::Packet,
    prog::{Node, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalIngress, OPEN, OUT, families, node_of, usual_policy,
};

/// Enough to clear and fill each half.
const SWEEPS: u16 = 4;

fn sweep(node: &mut Node) {
    // Longer than a step waits for programs that run.
    thread::sleep(Duration::from_millis(1050));
    node.datapath().maps.remove_expired_flows(&AtomicBool::new(false)).expect("the tables can be read");
}

/// The bits that are set in either half.
fn bits(node: &mut Node) -> u32 {
    let map = MapData::from_pin(node.datapath().maps.pins().map("flow_filter")).expect("a pinned map");
    let halves: Array<MapData, [u64; 2]> =
        Map::from_map_data(map).and_then(Array::try_from).expect("an array");
    halves.iter().map(|words| words.expect("an element")).map(|[a, b]| (a | b).count_ones()).sum()
}

fn neighbour(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4((u32::from(v4) ^ 1).into()),
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) ^ 1).into()),
    }
}

#[test]
fn no_flow_is_lost_while_the_filter_is_rebuilt_and_ended_flows_leave_it() {
    let mut node = node_of(&usual_policy(), &behaviour());
    let connections: Vec<Connection> = families()
        .into_iter()
        .flat_map(|family| [Connection::inbound(family, OPEN), Connection::outbound(family, OUT)])
        .collect();
    connections.iter().for_each(|connection| connection.establish(&mut node));
    let datagrams = |from, to, port| {
        [Packet::new(from, to).udp(port, OPEN, b"?"), Packet::new(to, from).udp(OPEN, port, b"!")]
    };
    // Questions of a pod that wait for their answers, to a host that has no other flow.
    let waiting = |number, family: crate::world::Family| {
        let (pod, host) = (family.pod, neighbour(family.lan));
        let port = 62_000 + number;
        [Packet::new(pod, host).udp(port, OUT, b"?"), Packet::new(host, pod).udp(OUT, port, b"!")]
    };
    for family in families() {
        let [question, answer] = datagrams(family.lan, family.pod, 2000);
        node.passes(ExternalIngress, &question, Reason::new_flow);
        node.passes(InternalIngress, &answer, Reason::established);
        for number in 0..SWEEPS {
            node.passes(InternalIngress, &waiting(number, family)[0], Reason::new_flow);
        }
    }
    for number in 0..SWEEPS {
        sweep(&mut node);
        for connection in &connections {
            node.passes(connection.client_hook, &connection.ack(), Reason::established);
            node.passes(connection.server_hook, &connection.server_ack(), Reason::established);
        }
        for family in families() {
            let [question, answer] = datagrams(family.lan, family.pod, 2000);
            node.passes(ExternalIngress, &question, Reason::established);
            node.passes(InternalIngress, &answer, Reason::established);
            node.passes(ExternalIngress, &waiting(number, family)[1], Reason::established);
        }
    }
    assert!(bits(&mut node) > 0);
    node.forget_flows().expect("the tables can be emptied");
    for _ in 0..SWEEPS {
        sweep(&mut node);
    }
    assert_eq!(bits(&mut node), 0);
    for connection in &connections {
        node.denies(connection.client_hook, &connection.ack(), Reason::not_syn);
    }
}
