//! The reconciler against a real kernel: other programs read the desired routes in the tables.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bridge_agent::routes::netlink::{Interest, Netlink};
use bridge_agent::routes::{DesiredRoute, NextHop, OnWithdraw, Settings, State, Target, withdraw};
use bridge_lab::netns::{Ns, SECONDS, acquaint};
use bridge_lab::routes::{Agent, eventually_own, hurry, own, want};
use bridge_lab::wait::until;

/// A LAN host with two LANs; on each one node.
struct Lan {
    host: Ns,
    nodes: [Ns; 2],
}

impl Lan {
    fn new() -> Self {
        let lan = Self { host: Ns::new(), nodes: [Ns::new(), Ns::new()] };
        for (index, node) in lan.nodes.iter().enumerate() {
            let (device, third) = (format!("eth{index}"), 31 + index);
            lan.host.link(&device, node, "lan0");
            lan.host.address(&device, &format!("192.168.{third}.67/24"));
            lan.host.address(&device, &format!("fd{third}::67/64"));
            node.address("lan0", &format!("192.168.{third}.17/24"));
            node.address("lan0", &format!("fd{third}::17/64"));
        }
        lan
    }
}

fn both_families() -> Vec<DesiredRoute> {
    vec![
        want("10.200.1.0/24", "192.168.31.17"),
        want("10.200.2.91/32", "192.168.32.17"),
        want("fd00:200:1::/64", "fd31::17"),
        want("fd00:200:2::5b/128", "fd32::17"),
    ]
}

fn both_families_installed() -> Vec<String> {
    vec![
        own("10.200.1.0/24", "192.168.31.17", "eth0"),
        own("10.200.2.91/32", "192.168.32.17", "eth1"),
        own("fd00:200:1::/64", "fd31::17", "eth0"),
        own("fd00:200:2::5b/128", "fd32::17", "eth1"),
    ]
}

/// How many own routes the kernel has, read fast enough to time repairs by.
fn count_own(ns: &Ns) -> impl FnMut() -> usize + use<> {
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (answer, answered) = std::sync::mpsc::channel();
    ns.spawn(move || {
        hurry();
        let mut netlink = Netlink::open().unwrap();
        while asked.recv().is_ok() {
            let routes = netlink.observe(&Interest::default()).unwrap().routes;
            answer.send(routes.iter().filter(|route| route.is_own()).count()).unwrap();
        }
    });
    move || {
        ask.send(()).unwrap();
        answered.recv().unwrap()
    }
}

#[test]
fn routes_are_there_as_wanted_and_deleted_ones_are_back_within_100_ms() {
    let lan = Lan::new();
    let agent = Agent::with_static(&lan.host, Settings::default(), both_families());
    eventually_own(&lan.host, &both_families_installed());
    let mut count = count_own(&lan.host);
    hurry();
    let mut slowest = Duration::ZERO;
    for round in 0..20 {
        let victim = ["10.200.1.0/24", "10.200.2.91/32", "fd00:200:1::/64", "fd00:200:2::5b/128"][round % 4];
        let repaired = agent.counters.repaired.load(Ordering::Relaxed);
        lan.host.ip(&format!("route del {victim} proto 98"));
        slowest =
            slowest.max(until("the deleted route is back", Duration::from_millis(100), || count() == 4));
        until("the repair is counted", SECONDS, || {
            agent.counters.repaired.load(Ordering::Relaxed) > repaired
        });
    }
    eventually_own(&lan.host, &both_families_installed());
    println!("slowest repair: {slowest:?}");
}

#[test]
fn an_altered_route_is_put_right() {
    let lan = Lan::new();
    let _agent = Agent::with_static(&lan.host, Settings::default(), both_families());
    eventually_own(&lan.host, &both_families_installed());
    lan.host.ip("route replace 10.200.1.0/24 via 192.168.31.99 proto 98 metric 1024");
    lan.host.ip("-6 route replace fd00:200:1::/64 via fd31::99 proto 98 metric 1024");
    eventually_own(&lan.host, &both_families_installed());
    lan.host.ip("route replace 10.200.1.0/24 via 192.168.31.17 proto 98 metric 1024 mtu 1300");
    until("the MTU is gone again", SECONDS, || !lan.host.ip("route show proto 98").contains("mtu"));
    // An unwanted one, with our protocol number.
    lan.host.ip("route add 10.77.0.0/16 via 192.168.31.17 proto 98");
    eventually_own(&lan.host, &both_families_installed());
}

#[test]
fn an_interface_that_comes_up_is_used_at_once() {
    let lan = Lan::new();
    let agent = Agent::with_static(&lan.host, Settings::default(), both_families());
    eventually_own(&lan.host, &both_families_installed());
    lan.host.ip("link set eth1 down");
    eventually_own(
        &lan.host,
        &[own("10.200.1.0/24", "192.168.31.17", "eth0"), own("fd00:200:1::/64", "fd31::17", "eth0")],
    );
    until("the refusal says why", SECONDS, || {
        let rows: Vec<_> = agent.status.borrow().rows().collect();
        rows.iter().any(|row| {
            row.state == State::Refused
                && row
                    .reason
                    .as_deref()
                    .is_some_and(|reason| reason.contains("interface eth1 (192.168.32.67/24) is down"))
        })
    });
    let mut count = count_own(&lan.host);
    hurry();
    lan.host.ip("link set eth1 up");
    // The IPv6 address went with the link.
    let took = until("the IPv4 route is back", Duration::from_millis(100), || count() == 3);
    lan.host.address("eth1", "fd32::67/64");
    until("the IPv6 route is back", Duration::from_millis(100), || count() == 4);
    eventually_own(&lan.host, &both_families_installed());
    println!("after the link came up: {took:?}");
}

/// The kernel removes IPv4 routes with a link and sends no notification for them, only that the link went down.
#[test]
fn a_link_that_goes_down_yields_to_the_backup_at_once() {
    let (host, lan) = (Ns::new(), Ns::new());
    // Nor does IPv6 send one.
    host.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap());
    for (device, net) in [("eth0", "192.168.31.67/24"), ("eth1", "192.168.32.67/24")] {
        host.link(device, &lan, device);
        host.address(device, net);
    }
    let hop = |via: &str| vec![NextHop::new(via.parse().unwrap())];
    let target = Target::Forward { via: hop("192.168.32.17"), backup: hop("192.168.31.17") };
    let wanted = DesiredRoute { target, ..want("10.200.1.0/24", "192.168.32.17") };
    let _agent = Agent::with_static(&host, Settings::default(), vec![wanted]);
    eventually_own(&host, &[own("10.200.1.0/24", "192.168.32.17", "eth1")]);
    let mut count = count_own(&host);
    hurry();
    host.ip("link set eth1 down");
    until("there is a route", Duration::from_millis(100), || count() == 1);
    eventually_own(&host, &[own("10.200.1.0/24", "192.168.31.17", "eth0")]);
}

#[test]
fn foreign_routes_are_refused_by_name_and_never_touched() {
    let lan = Lan::new();
    lan.host.ip("route add default via 192.168.31.1");
    lan.host.ip("route add 10.200.1.128/25 via 192.168.31.9 proto static");
    lan.host.ip("-6 route add fd00:200::/48 via fd31::9");
    let before = lan.host.foreign_routes();
    let mut wanted = both_families();
    wanted.push(want("10.200.1.0/24", "192.168.31.17"));
    wanted.push(want("fd00:200:0:1::/64", "fd31::17"));
    wanted.push(want("192.168.31.128/25", "192.168.32.17"));
    wanted.push(want("0.0.0.0/0", "192.168.32.17"));
    let agent = Agent::with_static(&lan.host, Settings::default(), wanted);
    eventually_own(&lan.host, &both_families_installed()[1..]);
    until("four are refused", SECONDS, || agent.status.borrow().totals().get(&State::Refused) == Some(&4));
    let reasons: Vec<_> = agent.status.borrow().rows().filter_map(|row| row.reason).collect();
    assert!(
        reasons
            .iter()
            .any(|reason| reason.contains("10.200.1.128/25 via 192.168.31.9 dev eth0 proto static")),
        "{reasons:?}"
    );
    // Later foreign routes make ours yield, and give way again.
    lan.host.ip("route add 10.200.2.0/24 via 192.168.31.9 proto static");
    eventually_own(&lan.host, &both_families_installed()[2..]);
    lan.host.ip("route del 10.200.2.0/24");
    lan.host.ip("route del 10.200.1.128/25");
    eventually_own(&lan.host, &both_families_installed());
    drop(agent);
    lan.host.ip("route add 10.200.1.128/25 via 192.168.31.9 proto static");
    assert_eq!(before, lan.host.foreign_routes());
}

#[test]
fn withdraw_removes_exactly_what_was_added() {
    let lan = Lan::new();
    lan.host.ip("route add default via 192.168.31.1");
    lan.host.ip("route add 10.9.0.0/16 via 192.168.31.9 proto static metric 1024");
    let before = lan.host.foreign_routes();
    let mut odd = want("10.201.0.0/16", "192.168.31.17");
    odd.table = Some(100);
    drop({
        let agent = Agent::with_static(&lan.host, Settings::default(), [both_families(), vec![odd]].concat());
        until("all are there", SECONDS, || lan.host.own_routes().len() == 5);
        agent
    });
    assert_eq!(lan.host.own_routes().len(), 5, "routes outlive the agent");
    lan.host.enter(|| {
        let mut netlink = Netlink::open().unwrap();
        let observed = netlink.observe(&Interest::default()).unwrap();
        assert!(netlink.apply(&withdraw(&observed)).unwrap().is_empty());
    });
    assert_eq!(lan.host.own_routes(), [].into());
    assert_eq!(before, lan.host.foreign_routes());
}

#[test]
fn every_kind_of_route_is_written_compared_and_exchanged_by_this_kernel() {
    let lan = Lan::new();
    let hops = |list: &[(&str, u16)]| {
        let hop =
            |(via, weight): &(&str, u16)| NextHop { weight: *weight, ..NextHop::new(via.parse().unwrap()) };
        Target::Forward { via: list.iter().map(hop).collect(), backup: Vec::new() }
    };
    let targets = [
        (
            [hops(&[("192.168.31.17", 1), ("192.168.32.17", 3)]), hops(&[("fd31::17", 1), ("fd32::17", 3)])],
            [
                " via 192.168.31.17 dev eth0 weight 1 via 192.168.32.17 dev eth1 weight 3",
                " via fd31::17 dev eth0 weight 1 via fd32::17 dev eth1 weight 3",
            ],
        ),
        (
            [hops(&[("192.168.32.17", 1)]), hops(&[("fd32::17", 1)])],
            [" via 192.168.32.17 dev eth1", " via fd32::17 dev eth1"],
        ),
        ([Target::Blackhole, Target::Blackhole], ["", ""]),
        // IPv4 through IPv6 beside IPv4.
        (
            [hops(&[("192.168.31.17", 1), ("fd32::17", 2)]), hops(&[("fd31::17", 256), ("fd32::17", 256)])],
            [
                " via 192.168.31.17 dev eth0 weight 1 via fd32::17 dev eth1 weight 2",
                " via fd31::17 dev eth0 weight 256 via fd32::17 dev eth1 weight 256",
            ],
        ),
        (
            [hops(&[("fd31::17", 1)]), hops(&[("fd31::17", 1)])],
            [" via fd31::17 dev eth0", " via fd31::17 dev eth0"],
        ),
    ];
    let agent = Agent::with_static(&lan.host, Settings::default(), Vec::new());
    // Every target after every other, so that each exchange the kernel can be asked for is asked for.
    for from in 0..targets.len() {
        for to in 0..targets.len() {
            for place in [from, to] {
                let (wanted, expected) = &targets[place];
                let route =
                    |net: &str, target: &Target| DesiredRoute { target: target.clone(), ..want(net, "::") };
                agent.publish(vec![route("10.200.1.0/24", &wanted[0]), route("fd00:200:1::/64", &wanted[1])]);
                let kind = if expected[0].is_empty() { "blackhole" } else { "unicast" };
                eventually_own(
                    &lan.host,
                    &[
                        format!("{kind} 10.200.1.0/24{} metric 1024 table main", expected[0]),
                        format!("{kind} fd00:200:1::/64{} metric 1024 table main", expected[1]),
                    ],
                );
            }
        }
    }
    assert_eq!(agent.counters.failed.load(Ordering::Relaxed), 0);
    // Reading returns the written routes: nothing is left to do.
    let done = agent.counters.replaced.load(Ordering::Relaxed);
    let syncs = agent.counters.syncs.load(Ordering::Relaxed);
    lan.host.ip("address add 192.168.99.1/32 dev lo");
    until("compared again", SECONDS, || agent.counters.syncs.load(Ordering::Relaxed) > syncs);
    assert_eq!(agent.counters.replaced.load(Ordering::Relaxed), done);
}

#[test]
fn a_withdrawn_node_leaves_a_blackhole_where_that_is_asked_for() {
    let lan = Lan::new();
    let settings = Settings { on_withdraw: OnWithdraw::Blackhole, ..Settings::default() };
    let agent = Agent::with_static(&lan.host, settings, both_families());
    eventually_own(&lan.host, &both_families_installed());
    agent.publish(both_families()[1..3].to_vec());
    let blackhole = |net: &str| format!("blackhole {net} metric 1024 table main");
    eventually_own(
        &lan.host,
        &[
            blackhole("10.200.1.0/24"),
            blackhole("fd00:200:2::5b"),
            own("10.200.2.91/32", "192.168.32.17", "eth1"),
            own("fd00:200:1::/64", "fd31::17", "eth0"),
        ],
    );
    agent.publish(both_families());
    eventually_own(&lan.host, &both_families_installed());
}

#[test]
fn no_packet_is_lost_while_the_next_hop_changes() {
    let lan = Lan::new();
    let received = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let mut listeners = Vec::new();
    for node in &lan.nodes {
        for (address, net) in [("10.200.1.91", "10.200.1.91/32"), ("fd00:200:1::5b", "fd00:200:1::5b/128")] {
            node.address("lo", net);
            let (received, done) = (received.clone(), done.clone());
            listeners.push(node.spawn(move || {
                let socket = UdpSocket::bind((address, 7777)).unwrap();
                // News that waits for this thread to run is not lost.
                rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 24).unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                let mut buffer = [0; 16];
                while !done.load(Ordering::Relaxed) {
                    if socket.recv(&mut buffer).is_ok() {
                        received.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
    }
    let through = |third: usize| {
        vec![
            want("10.200.1.0/24", &format!("192.168.{third}.17")),
            want("fd00:200:1::/64", &format!("fd{third}::17")),
        ]
    };
    let agent = Agent::with_static(&lan.host, Settings::default(), through(31));
    until("both routes are there", SECONDS, || lan.host.own_routes().len() == 2);
    // Neighbours known beforehand: a queue of packets that wait for ARP is not measured.
    for third in [31, 32] {
        acquaint(&lan.host, &format!("192.168.{third}.17"));
        acquaint(&lan.host, &format!("fd{third}::17"));
    }
    let halt = Arc::new(AtomicBool::new(false));
    let halted = halt.clone();
    let sender = lan.host.spawn(move || {
        let sockets = [("0.0.0.0:0", "10.200.1.91:7777"), ("[::]:0", "[fd00:200:1::5b]:7777")]
            .map(|(from, to)| (UdpSocket::bind(from).unwrap(), to));
        let mut sent = 0u64;
        while !halted.load(Ordering::Relaxed) {
            for (socket, to) in &sockets {
                // ENETUNREACH here is a gap.
                socket.send_to(b"x", to).unwrap();
                sent += 1;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        sent
    });
    let start = Instant::now();
    for flip in 0..100 {
        let replaced = agent.counters.replaced.load(Ordering::Relaxed);
        agent.publish(through(if flip % 2 == 0 { 32 } else { 31 }));
        until("both are exchanged", SECONDS, || {
            agent.counters.replaced.load(Ordering::Relaxed) == replaced + 2
        });
    }
    halt.store(true, Ordering::Relaxed);
    let sent = sender.join().unwrap();
    until(&format!("all {sent} packets arrived"), SECONDS, || received.load(Ordering::Relaxed) == sent);
    done.store(true, Ordering::Relaxed);
    for listener in listeners {
        listener.join().unwrap();
    }
    println!("{sent} packets through 200 exchanges in {:?}, none lost", start.elapsed());
}
