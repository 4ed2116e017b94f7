//! Next hops that stop answering.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bridge_agent::routes::health::{Damping, Options};
use bridge_agent::routes::{DesiredRoute, EventKind, NextHop, Settings, State, Target};
use bridge_lab::netns::Ns;
use bridge_lab::routes::{Agent, eventually_own, own, want};
use bridge_lab::wait::until;

const DEADLINE: Duration = Duration::from_secs(15);

/// A host with a link to each of two nodes.
fn host_and_nodes() -> (Ns, [Ns; 2]) {
    let (host, nodes) = (Ns::new(), [Ns::new(), Ns::new()]);
    for (index, node) in nodes.iter().enumerate() {
        let (device, third) = (format!("eth{index}"), 31 + index);
        host.link(&device, node, "lan0");
        host.address(&device, &format!("192.168.{third}.67/24"));
        host.address(&device, &format!("fd{third}::67/64"));
        node.address("lan0", &format!("192.168.{third}.17/24"));
        node.address("lan0", &format!("fd{third}::17/64"));
        // A node that is dead in a second, not in three.
        for family in ["ipv4", "ipv6"] {
            let device = device.clone();
            host.enter(move || {
                std::fs::write(format!("/proc/sys/net/{family}/neigh/{device}/retrans_time_ms"), "100")
                    .unwrap();
            });
        }
    }
    (host, nodes)
}

fn with_backup(to: &str, via: &str, backup: &str) -> DesiredRoute {
    let hop = |address: &str| vec![NextHop::new(address.parse().unwrap())];
    DesiredRoute { target: Target::Forward { via: hop(via), backup: hop(backup) }, ..want(to, via) }
}

fn settings(options: Options) -> Settings {
    Settings {
        health: Some(Options { interval: Duration::from_millis(500), ..options }),
        ..Settings::default()
    }
}

fn patient() -> Damping {
    Damping { suppress: u32::MAX, ..Damping::default() }
}

#[test]
fn a_dead_node_yields_to_the_backup_or_loses_its_routes_until_it_answers_again() {
    let (host, nodes) = host_and_nodes();
    let settings = settings(Options { damping: patient(), ..Options::default() });
    let mut agent = Agent::with_static(
        &host,
        settings,
        vec![
            with_backup("10.200.1.0/24", "192.168.31.17", "192.168.32.17"),
            with_backup("fd00:200:1::/64", "fd31::17", "fd32::17"),
            want("10.200.3.0/24", "192.168.31.17"),
        ],
    );
    let healthy = [
        own("10.200.1.0/24", "192.168.31.17", "eth0"),
        own("fd00:200:1::/64", "fd31::17", "eth0"),
        own("10.200.3.0/24", "192.168.31.17", "eth0"),
    ];
    eventually_own(&host, &healthy);
    // Dead, with its link up: it answers neither ARP nor neighbour discovery.
    nodes[0].ip("link set lan0 arp off");
    nodes[0].ip("-6 address flush dev lan0");
    until("both routes go through the other node, the third is withdrawn", DEADLINE, || {
        host.own_routes()
            == [own("10.200.1.0/24", "192.168.32.17", "eth1"), own("fd00:200:1::/64", "fd32::17", "eth1")]
                .into()
    });
    until("the third is said to be down", DEADLINE, || {
        agent.status.borrow().totals().get(&State::Down) == Some(&1)
    });
    assert_eq!(agent.counters.next_hops_down.load(Ordering::Relaxed), 2);

    nodes[0].ip("link set lan0 arp on");
    nodes[0].address("lan0", "fd31::17/64");
    until("all is as before", DEADLINE, || host.own_routes() == healthy.clone().into());
    assert_eq!(agent.counters.next_hops_up.load(Ordering::Relaxed), 2);
    let mut kinds = Vec::new();
    while let Ok(event) = agent.events.try_recv() {
        kinds.push(event.kind);
    }
    let count = |kind| kinds.iter().filter(|seen| **seen == kind).count();
    assert_eq!((count(EventKind::NextHopDown), count(EventKind::NextHopUp)), (2, 2), "{kinds:?}");
}

#[test]
fn a_node_whose_port_is_closed_is_down_where_a_tcp_check_is_asked_for() {
    let (host, nodes) = host_and_nodes();
    let open = |address: &str| {
        let address = address.to_owned();
        nodes[0].enter(move || std::net::TcpListener::bind((address, 10250)).unwrap())
    };
    let listener = open("192.168.31.17");
    let options = Options { tcp: Some(10250), damping: patient(), ..Options::default() };
    let _agent = Agent::with_static(&host, settings(options), vec![want("10.200.1.0/24", "192.168.31.17")]);
    let there = [own("10.200.1.0/24", "192.168.31.17", "eth0")];
    eventually_own(&host, &there);
    drop(listener);
    until("withdrawn", DEADLINE, || host.own_routes().is_empty());
    let _listener = open("192.168.31.17");
    until("back", DEADLINE, || host.own_routes() == there.clone().into());
}

#[test]
fn a_node_that_comes_and_goes_is_held_down() {
    let (host, nodes) = host_and_nodes();
    let damping = Damping {
        half_life: Duration::from_secs(2),
        max_suppress: Duration::from_secs(4),
        ..Damping::default()
    };
    // Decayed within seconds, so three failures must come fast: the limit is low.
    let damping = Damping { suppress: 1200, reuse: 600, ..damping };
    let agent = Agent::with_static(
        &host,
        settings(Options { damping, interval: Duration::from_millis(200), ..Options::default() }),
        vec![with_backup("10.200.1.0/24", "192.168.31.17", "192.168.32.17")],
    );
    let first = [own("10.200.1.0/24", "192.168.31.17", "eth0")];
    let second = [own("10.200.1.0/24", "192.168.32.17", "eth1")];
    eventually_own(&host, &first);
    let damped = || agent.counters.next_hops_damped.load(Ordering::Relaxed);
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while damped() == 0 {
        assert!(std::time::Instant::now() < end, "flapped for a minute without being damped");
        nodes[0].ip("link set lan0 arp off");
        until("it yields", DEADLINE, || host.own_routes() == second.clone().into());
        nodes[0].ip("link set lan0 arp on");
        if damped() == 0 {
            until("it is back", DEADLINE, || host.own_routes() == first.clone().into());
        }
    }
    // It answers again, and is not used for now.
    until("the neighbour is reachable", DEADLINE, || {
        host.ip("neigh show 192.168.31.17").contains("REACHABLE")
    });
    assert_eq!(host.own_routes(), second.clone().into());
    until("forgiven", DEADLINE, || host.own_routes() == first.clone().into());
}
