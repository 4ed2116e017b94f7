//! Attacks from the LAN on a node, and their effect on legitimate traffic: established connections, new ones, the
//! memory and the processor time of the agent.

mod flood;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

pub use self::flood::Attack;
use crate::agent::Agent;
use crate::bench::agent::resident_kib;
use crate::lab::{Family, Lab};
use crate::traffic::tcp;

const PORT: u16 = 40002;
/// Connections that are to live.
const CONNECTIONS: usize = 16;
/// A new connection may take so long: time for the client's kernel to repeat its SYN twice.
const PATIENCE: Duration = Duration::from_secs(5);

/// State of legitimate traffic during an attack.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// See [`Attack::name`].
    pub attack: &'static str,
    /// The engines.
    pub engines: &'static str,
    /// Packets sent.
    pub packets: u32,
    /// In a second.
    pub rate: f64,
    /// Connections that stood before.
    pub established: usize,
    /// Those of them that still answer.
    pub alive: usize,
    /// New connections tried while it lasted.
    pub tried: u32,
    /// Those of them that came about.
    pub succeeded: u32,
    /// Resident memory of the agent before and after, in KiB.
    pub memory_kib: [f64; 2],
    /// Processor time of the agent, by the time that the attack took.
    pub processor: f64,
    /// Entries and room of the table of half-open flows afterwards, from the metrics of the agent.
    pub half_open: Option<(u64, u64)>,
}

impl Row {
    /// Whether every connection lives and at least 99 % of new ones came about.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.alive == self.established && self.tried > 0 && self.succeeded * 100 >= self.tried * 99
    }
}

/// `ebpf`, or `iptables` with the kernel's connection tracking.
#[must_use]
pub fn configuration(engines: &str) -> String {
    format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24, 100.64.0.0/10]}}\n\
         enforcement:\n  engines: [{engines}]\n  onDeny: drop\n  iptables: {{backend: nft}}\n  \
         interfaces: {{external: [eth0], internal: [\"cali*\"]}}\n\
         persistence: {{save: never}}\nrules:\n  - {{name: api, direction: inbound, protocol: tcp, ports: [{PORT}]}}\n"
    )
}

/// Sends `packets` of each of `attacks`, at most `rate` in a second.
///
/// # Errors
/// The lab or the agent fails; not that connections do.
pub fn run(
    engines: &'static str,
    attacks: &[Attack],
    packets: u32,
    rate: u32,
    mut show: impl FnMut(&Row),
) -> Result<Vec<Row>> {
    let lab = Lab::builder().pods(1).build()?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let mac = c1.mac_text();
    let (target, dev) = (flood::TARGET, &c1.peer_interface);
    b.netns.ip(&format!("route replace {target} dev {dev}"))?;
    b.netns.ip(&format!("neighbour replace {target} lladdr {mac} dev {dev} nud permanent"))?;
    // Answers to spoofed addresses go where they would: out to the LAN.
    let neighbour = a.mac_text();
    b.netns.ip(&format!("route replace 100.64.0.0/10 via {} dev {}", a.v4, b.interface))?;
    b.netns
        .ip(&format!("neighbour replace {} lladdr {neighbour} dev {} nud permanent", a.v4, b.interface))?;
    let agent = Agent::start(&lab, b, &configuration(engines))?;
    let server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, PORT))?;
    let client = tcp::Client::new(&a.netns).deadline(PATIENCE);
    let mut rows = Vec::new();
    for &attack in attacks {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut connection = client.connect(server.address())?.reached()?;
            connection.round_trip(PATIENCE)?;
            connections.push(connection);
        }
        let ports: Vec<u16> =
            connections.iter().map(|connection| Ok(connection.source()?.port())).collect::<Result<_>>()?;
        let memory = resident_kib(agent.pid(), "VmRSS")?;
        let time = processor_time(agent.pid())?;
        let (took, tried, succeeded) = std::thread::scope(|scope| {
            let flood = scope.spawn(|| flood::send(attack, &lab, packets, rate, &ports, PORT));
            let (mut tried, mut succeeded) = (0, 0);
            while !flood.is_finished() {
                tried += 1;
                let reached = client.connect(server.address())?.reached();
                succeeded +=
                    u32::from(reached.is_ok_and(|mut connection| connection.round_trip(PATIENCE).is_ok()));
            }
            let took = flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
            anyhow::Ok((took, tried, succeeded))
        })?;
        let alive = connections.iter_mut().filter_map(|one| one.round_trip(PATIENCE).ok()).count();
        let row = Row {
            attack: attack.name(),
            engines,
            packets,
            rate: f64::from(packets) / took.as_secs_f64(),
            established: CONNECTIONS,
            alive,
            tried,
            succeeded,
            memory_kib: [memory, resident_kib(agent.pid(), "VmRSS")?],
            processor: (processor_time(agent.pid())? - time).as_secs_f64() / took.as_secs_f64(),
            half_open: pressure(&lab, &agent).ok(),
        };
        show(&row);
        rows.push(row);
    }
    Ok(rows)
}

/// User and system time of a process (proc_pid_stat(5)).
fn processor_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("a name")?.1.split_ascii_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|field| fields.get(*field)?.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// Returns entries and capacity of the table of half-open flows, from a scrape.
fn pressure(lab: &Lab, agent: &Agent) -> Result<(u64, u64)> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--max-time", "10", "--unix-socket"]);
    curl.arg(agent.socket()).arg("http://bridge/metrics");
    let text = lab.b().netns.output(curl)?;
    let value = |name: &str| -> Result<u64> {
        let start = format!("bridge_map_{name}{{map=\"half_open\"}} ");
        Ok(text.lines().find_map(|line| line.strip_prefix(&start)).context("no such metric")?.parse()?)
    };
    Ok((value("entries")?, value("capacity")?))
}
