//! How fast, and how big, the routes of a large cluster are.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bridge_agent::routes::netlink::{Interest, Netlink};
use bridge_agent::routes::sources::Desired;
use bridge_agent::routes::{DesiredRoute, Settings, SourceKind, State, withdraw};
use ipnet::IpNet;
use serde::Serialize;

use crate::netns::{Ns, eventually};
use crate::routes::Agent;

/// Figures for one cluster size. Times in milliseconds, sizes in KiB.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Nodes, each with one IPv4 and one IPv6 network.
    pub nodes: usize,
    /// From publishing to all routes in the kernel.
    pub first_sync_ms: f64,
    /// The same routes by `ip -batch`, for comparison.
    pub ip_batch_ms: f64,
    /// From publishing the next hop of one node's network to the kernel having it.
    pub one_change_ms: f64,
    /// Routes written for that.
    pub one_change_writes: u64,
    /// From a deletion by another program to the route being back.
    pub repair_ms: f64,
    /// From the end of `ip route flush` of everything to everything being back.
    pub repair_all_ms: f64,
    /// Times the kernel dropped events meanwhile.
    pub overruns: u64,
    /// The process once all is quiet (`VmRSS`).
    pub resident_kib: u64,
    /// The most it ever had (`VmHWM`).
    pub peak_kib: u64,
}

fn network(node: u32, v6: bool) -> IpNet {
    if v6 {
        IpNet::new_assert(Ipv6Addr::from((0xfd00_0200_u128 << 96) | (u128::from(node) << 64)).into(), 64)
    } else {
        IpNet::new_assert(Ipv4Addr::from(0x6440_0000 + (node << 8)).into(), 24)
    }
}

fn address(node: u32, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::from((0xfd31_u128 << 112) | u128::from(node + 256)).into()
    } else {
        Ipv4Addr::from(0x0a00_0000 + 256 + node).into()
    }
}

fn cluster(nodes: u32) -> Vec<DesiredRoute> {
    let route = |node, v6| {
        DesiredRoute::forward(
            network(node, v6),
            address(node, v6),
            SourceKind::Kubernetes,
            format!("node-{node}"),
        )
    };
    (0..nodes).flat_map(|node| [route(node, false), route(node, true)]).collect()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Measures in a namespace of its own. What the process holds besides is in the sizes, so run it alone.
#[must_use]
pub fn run(nodes: u32) -> Figures {
    let (host, lan) = (Ns::new(), Ns::new());
    host.link("eth0", &lan, "lan0");
    host.address("eth0", "10.0.0.1/16");
    host.address("eth0", "fd31::1/64");
    let routes = nodes as usize * 2;

    let ip_batch_ms = ip_batch(&host, nodes);
    let desired = Desired::default();
    let kubernetes = desired.register(SourceKind::Kubernetes);
    let agent = Agent::start(&host, Settings::default(), desired);
    let installed = || agent.status.borrow().totals().get(&State::Installed).copied().unwrap_or(0);

    let start = Instant::now();
    kubernetes.publish(cluster(nodes));
    eventually("the first sync", Duration::from_secs(60), || installed() == routes);
    let first_sync_ms = milliseconds(start.elapsed());
    // The agent's own word is checked by another reader.
    assert_eq!(count(&host), routes);

    let writes = || {
        [&agent.counters.added, &agent.counters.replaced, &agent.counters.deleted]
            .map(|counter| counter.load(Ordering::Relaxed))
            .iter()
            .sum::<u64>()
    };
    let before = writes();
    let mut changed = cluster(nodes);
    changed[0] =
        DesiredRoute::forward(network(0, false), address(nodes, false), SourceKind::Kubernetes, "node-0");
    let start = Instant::now();
    kubernetes.publish(changed);
    eventually("one change", Duration::from_secs(10), || writes() > before);
    let one_change_ms = milliseconds(start.elapsed());
    let syncs = agent.counters.syncs.load(Ordering::Relaxed);
    host.address("lo", "192.0.2.1/32");
    eventually("compared once more", Duration::from_secs(10), || {
        agent.counters.syncs.load(Ordering::Relaxed) > syncs
    });
    let one_change_writes = writes() - before;

    let repaired = agent.counters.repaired.load(Ordering::Relaxed);
    host.ip(&format!("route del {} proto 98", network(1, false)));
    let start = Instant::now();
    eventually("the repair", Duration::from_secs(10), || {
        agent.counters.repaired.load(Ordering::Relaxed) > repaired
    });
    let repair_ms = milliseconds(start.elapsed());
    let resident_kib = memory("VmRSS");
    let peak_kib = memory("VmHWM");

    host.enter(move || {
        let mut netlink = Netlink::open().unwrap();
        let all = netlink.observe(&Interest::default()).unwrap();
        assert!(netlink.apply(&withdraw(&all)).unwrap().is_empty());
    });
    let start = Instant::now();
    let mut found = 0;
    while found != routes {
        found = count(&host);
        assert!(start.elapsed() < Duration::from_secs(60), "{found} of {routes} are back");
    }
    let repair_all_ms = milliseconds(start.elapsed());
    let overruns = agent.counters.overruns.load(Ordering::Relaxed);
    Figures {
        nodes: nodes as usize,
        first_sync_ms,
        ip_batch_ms,
        one_change_ms,
        one_change_writes,
        repair_ms,
        repair_all_ms,
        overruns,
        resident_kib,
        peak_kib,
    }
}

fn count(host: &Ns) -> usize {
    host.enter(|| {
        let observed = Netlink::open().unwrap().observe(&Interest::default()).unwrap();
        observed.routes.iter().filter(|route| route.is_own()).count()
    })
}

/// What a script would do.
fn ip_batch(host: &Ns, nodes: u32) -> f64 {
    let mut total = Duration::ZERO;
    for (family, v6) in [("-4", false), ("-6", true)] {
        let lines: String = (0..nodes)
            .map(|node| format!("route add {} via {} metric 1024\n", network(node, v6), address(node, v6)))
            .collect();
        total += host.enter(move || {
            let start = Instant::now();
            let mut ip =
                Command::new("ip").args([family, "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
            ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
            assert!(ip.wait().unwrap().success());
            start.elapsed()
        });
        host.ip(&format!("{family} route flush proto boot"));
    }
    milliseconds(total)
}

fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let fields: BTreeMap<_, _> = status.lines().filter_map(|line| line.split_once(':')).collect();
    fields[field].trim().trim_end_matches(" kB").parse().unwrap()
}
