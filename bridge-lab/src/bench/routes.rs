//! The routes of a large cluster: the agent on a LAN host, which reads 5,000 nodes from a file, beside a script.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::routes::netlink::{Interest, Netlink};
use bridge_agent::routes::withdraw;
use ipnet::IpNet;
use serde_json::Value;

use super::{Measurement, agent::resident_kib};
use crate::agent::Agent;
use crate::lab::Lab;
use crate::wait::eventually;

const RUNS: usize = 3;
/// Each with one IPv4 and one IPv6 network.
pub(super) const NODES: u32 = 5000;
pub(super) const ROUTES: usize = NODES as usize * 2;
const DEADLINE: Duration = Duration::from_secs(60);

pub(super) fn measure() -> Result<Vec<Measurement>> {
    let mut figures: [Vec<f64>; 9] = Default::default();
    for _ in 0..RUNS {
        for (list, figure) in figures.iter_mut().zip(run()?) {
            list.push(figure);
        }
    }
    let names = [
        (format!("first sync, {NODES} nodes with an IPv4 and an IPv6 segment"), "ms", Some(1000.0)),
        ("of that, processor time of the agent".to_owned(), "ms", None),
        ("the same routes by ip -batch".to_owned(), "ms", None),
        (format!("one node of {NODES} changes: to its route in the kernel"), "ms", None),
        (format!("one node of {NODES} changes: routes written"), "routes", Some(1.0)),
        (format!("one route of {ROUTES} deleted: to its being back"), "ms", Some(100.0)),
        (format!("all {ROUTES} routes deleted: to their being back"), "ms", None),
        (format!("resident memory, {ROUTES} routes"), "KiB", Some(20.0 * 1024.0)),
        (format!("most resident memory, {ROUTES} routes"), "KiB", None),
    ];
    let measured = names.into_iter().zip(figures).map(|((name, unit, limit), runs)| {
        let measurement = Measurement::of(name, unit, runs);
        limit.map_or(measurement.clone(), |limit| measurement.limit(limit))
    });
    Ok(measured.collect())
}

pub(super) fn network(node: u32, v6: bool) -> IpNet {
    if v6 {
        IpNet::new_assert(Ipv6Addr::from((0xfd00_0200_u128 << 96) | (u128::from(node) << 64)).into(), 64)
    } else {
        IpNet::new_assert(Ipv4Addr::from(0x6440_0000 + (node << 8)).into(), 24)
    }
}

pub(super) fn address(node: u32, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::from((0xfd32_u128 << 112) | u128::from(node + 256)).into()
    } else {
        Ipv4Addr::from(0x0a00_0000 + 256 + node).into()
    }
}

/// `cluster.yaml`, in one step; the first node has another IPv4 address if it has moved.
fn write_cluster(path: &Path, moved: bool) -> Result<()> {
    let mut yaml = String::from("nodes:\n");
    for node in 0..NODES {
        let v4 = address(if moved && node == 0 { NODES } else { node }, false);
        let (v6, pods) = (address(node, true), [network(node, false), network(node, true)]);
        writeln!(
            yaml,
            "- {{name: node-{node}, addresses: [{v4}, '{v6}'], podNetworks: [{}, '{}']}}",
            pods[0], pods[1]
        )?;
    }
    let new = path.with_extension("new");
    fs::write(&new, yaml)?;
    fs::rename(new, path)?;
    Ok(())
}

/// How many routes of bridge the kernel has.
pub(super) fn count(lab: &Lab) -> Result<usize> {
    lab.a().netns.run(|| {
        let observed = Netlink::open()?.observe(&Interest::default())?;
        Ok(observed.routes.iter().filter(|route| route.is_own()).count())
    })
}

fn until(lab: &Lab, routes: usize, start: Instant) -> Result<f64> {
    eventually(DEADLINE, || count(lab).ok().filter(|found| *found == routes))
        .with_context(|| format!("{routes} routes, and there are {:?}", count(lab)))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Routes written so far.
fn writes(agent: &Agent) -> Result<f64> {
    let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    let counters = &status["agent"]["routes"]["counters"];
    let count = |name: &str| counters[name].as_f64().with_context(|| format!("the counter {name}"));
    Ok(count("added")? + count("replaced")? + count("deleted")?)
}

/// Processor time of a process so far, in ms: the same on a machine that has other things to do.
fn processor_ms(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc_pid_stat(5): utime and stime are fields 14 and 15; the name before field 3 may hold anything.
    let after_name = stat.rsplit_once(')').context("the name of the process")?.1;
    let ticks: Vec<u64> =
        after_name.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 * 1e3 / rustix::param::clock_ticks_per_second() as f64)
}

fn run() -> Result<[f64; 9]> {
    let lab = Lab::builder().without_routes().build()?;
    let host = &lab.a().netns;
    host.ip("address add 10.0.0.1/16 dev eth0")?;
    host.ip("address add fd32::1/64 dev eth0 nodad")?;
    let by_script = ip_batch(&lab)?;

    fs::create_dir_all(lab.directory())?;
    let file = lab.directory().join("cluster.yaml");
    fs::write(&file, "nodes: []\n")?;
    let agent = Agent::start(&lab, lab.a(), &format!("role: host\nroutes: {{file: {}}}\n", file.display()))?;
    let pid = agent.pid();
    let (start, before) = (Instant::now(), processor_ms(pid)?);
    write_cluster(&file, false)?;
    let first_sync = until(&lab, ROUTES, start)?;
    let processor = processor_ms(pid)? - before;

    let before = writes(&agent)?;
    let start = Instant::now();
    write_cluster(&file, true)?;
    let moved = format!("via {}", address(NODES, false));
    let of_first = format!("route show {}", network(0, false));
    eventually(DEADLINE, || host.ip(&of_first).ok().filter(|route| route.contains(&moved)))
        .context("the route of the node that has moved")?;
    let one_change = start.elapsed().as_secs_f64() * 1e3;
    let written = writes(&agent)? - before;

    host.ip(&format!("route del {} proto 98", network(1, false)))?;
    let one_repair = until(&lab, ROUTES, Instant::now())?;
    let (resident, peak) = (resident_kib(pid, "VmRSS")?, resident_kib(pid, "VmHWM")?);

    host.run(|| {
        let mut netlink = Netlink::open()?;
        let all = netlink.observe(&Interest::default())?;
        ensure!(netlink.apply(&withdraw(&all))?.is_empty(), "not all routes could be deleted");
        Ok(())
    })?;
    let all_repaired = until(&lab, ROUTES, Instant::now())?;
    Ok([first_sync, processor, by_script, one_change, written, one_repair, all_repaired, resident, peak])
}

/// The equivalent script.
fn ip_batch(lab: &Lab) -> Result<f64> {
    let mut total = 0.0;
    for (family, v6) in [("-4", false), ("-6", true)] {
        let mut lines = String::new();
        for node in 0..NODES {
            writeln!(lines, "route add {} via {} metric 1024", network(node, v6), address(node, v6))?;
        }
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), lines)?;
        let start = Instant::now();
        lab.a().netns.ip(&format!("{family} -batch {}", file.path().display()))?;
        total += start.elapsed().as_secs_f64() * 1e3;
        lab.a().netns.ip(&format!("{family} route flush proto boot"))?;
    }
    Ok(total)
}
