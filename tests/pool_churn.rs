//! Connections that come and go in every way, from several namespaces behind masquerade: none leaves from a port outside
//! the pool, no two are the same on the wire, and every port that was claimed is given back.

use std::{
    net::SocketAddrV4,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::counter;
use bridge_lab::{
    agent::sibling,
    lab::{Lab, Netns, Process},
    pool::{Churn, Churned, Served, Stand, Watch, finish, output},
    wait::eventually,
};

const SILENT: u16 = 9999;

fn traffic(arguments: &[&str]) -> Command {
    let mut command = Command::new(sibling("pool_traffic").expect("`cargo xtask test` builds it"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn churn(total: u64) -> Result<()> {
    let lab = Lab::builder().masquerade().pods(3).build()?;
    let ports = PortRange { first: 61001, last: 61400 };
    let settings = Settings {
        ports: vec![ports],
        destinations: vec!["192.168.31.0/24".parse()?, "198.51.100.0/24".parse()?],
        ..Settings::default()
    };
    let stand = Stand::new(&lab, &settings)?;
    let server = SocketAddrV4::new(lab.a().v4, 9001);
    let mut drop_silent = Command::new("nft");
    drop_silent.arg(format!(
        "table inet silent {{ chain input {{ type filter hook input priority 0; tcp dport {SILENT} drop; }}; }}"
    ));
    lab.a().netns.output(drop_silent)?;
    for pod in lab.pods() {
        pod.netns.ip("route add unreachable 198.51.100.0/24")?;
    }
    let _server = lab.a().netns.spawn_command(traffic(&["serve", &server.to_string()]))?;
    let listening = || lab.a().netns.run(|| std::net::TcpStream::connect(server)).ok();
    ensure!(eventually(Duration::from_secs(5), listening).is_some(), "the server does not listen");
    let watch = Watch::start(&lab.a().netns, "eth0", ports, SILENT)?;

    let order = |seed: u64, count: u64| Churn {
        count,
        seed,
        hold: 40,
        server,
        refused: SocketAddrV4::new(lab.a().v4, 9002),
        unreachable: "198.51.100.1:9001".parse().expect("an address"),
        silent: SocketAddrV4::new(lab.a().v4, SILENT),
        first: ports.first,
        last: ports.last,
    };
    let start = |netns: &Netns, seed: u64, count: u64| -> Result<Process> {
        let order = serde_json::to_string(&order(seed, count))?;
        Ok(netns.spawn_command(stand.hooked(traffic(&["churn", &order])))?)
    };
    // Two processes in each pod to their end, and one after the other that is killed in the middle.
    let each = total / (2 * lab.pods().len() as u64);
    let mut seed = 0;
    let mut running = Vec::new();
    for pod in lab.pods() {
        for _ in 0..2 {
            seed += 1;
            running.push(start(&pod.netns, seed, each)?);
        }
    }
    let mut killed = 0;
    while running.iter_mut().any(|process| matches!(process.child().try_wait(), Ok(None))) {
        let pod = &lab.pods()[killed % lab.pods().len()];
        seed += 1;
        let before = stand.counter(counter::CLAIMS)?;
        let mut victim = start(&pod.netns, seed, u64::MAX)?;
        let busy = || stand.counter(counter::CLAIMS).ok().filter(|claims| *claims > before + 300);
        eventually(Duration::from_secs(5), busy);
        victim.kill()?;
        killed += 1;
    }
    let mut sum = Churned::default();
    for process in running {
        let seen: Churned = serde_json::from_str(&finish(process, Duration::from_secs(60))?)?;
        sum.attempts += seen.attempts;
        sum.connected += seen.connected;
        sum.refused += seen.refused;
        sum.unreachable += seen.unreachable;
        sum.silent += seen.silent;
        sum.exhausted += seen.exhausted;
        sum.again += seen.again;
        sum.broken += seen.broken;
        sum.outside += seen.outside;
        for (code, count) in seen.other {
            *sum.other.entry(code).or_default() += count;
        }
    }
    let claims = stand.settled(Duration::from_secs(90))?;
    let served: Served = serde_json::from_str(&output(
        &lab.a().netns,
        traffic(&["report", &server.to_string()]),
        Duration::from_secs(5),
    )?)?;
    let seen = watch.finish()?;
    println!("{killed} killed; {sum:?}; {served:?}");
    println!(
        "{claims} claims and releases; {} SYNs, {} outside, {} duplicates, {} abandoned, {} early, {} lost; counters {:?}",
        seen.syns,
        seen.outside.len(),
        seen.duplicates.len(),
        seen.abandoned,
        seen.early,
        seen.lost,
        stand.pool.counters()?
    );
    ensure!(seen.lost == 0, "the capture lost {} frames", seen.lost);
    ensure!(
        seen.outside.is_empty(),
        "from outside the pool: {:?}",
        &seen.outside[..seen.outside.len().min(10)]
    );
    ensure!(seen.duplicates.is_empty(), "twice: {:?}", &seen.duplicates[..seen.duplicates.len().min(10)]);
    ensure!(
        seen.abandoned <= killed as u64,
        "{} connections were abandoned, {killed} clients killed",
        seen.abandoned
    );
    ensure!(sum.outside == 0 && sum.other.is_empty());
    ensure!(served.translated == 0, "masquerade changed {} ports", served.translated);
    ensure!(sum.attempts == each * 2 * lab.pods().len() as u64 && claims >= sum.attempts - sum.exhausted);
    ensure!(sum.connected > 0 && sum.refused > 0 && sum.unreachable > 0 && sum.silent > 0 && killed > 0);
    Ok(())
}

#[test]
fn no_port_outside_no_tuple_twice_and_every_claim_is_given_back() -> Result<()> {
    churn(20_000)
}

#[test]
#[ignore = "takes minutes: cargo test --test pool_churn -- --ignored"]
fn the_same_a_million_times() -> Result<()> {
    churn(1_000_000)
}
