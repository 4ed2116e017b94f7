//! Cost of a connect from a pool of 10,000 ports towards one destination, as ratios to a plain `connect` from 10,000
//! ports that are all free. In one run, side by side: the pool (by its hook, programs unmodified), the kernel's own choice,
//! IP_LOCAL_PORT_RANGE, and a random port that is tried again.

mod client;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};
use bridge_agent::model::PortRange;
use bridge_agent::pool::Settings;
use socket2::{Domain, Socket, Type};

use self::client::{Job, Method};
use super::Measurement;
use crate::lab::{Host, Lab, Process};
use crate::pool::{Stand, in_cgroup};

const PORTS: u16 = 10_000;
/// Ports that the kernel gives out itself in the lab (`net.ipv4.ip_local_port_range`).
const KERNEL: u16 = 10_000;
const POOL: u16 = 20_000;
const RANDOM: u16 = 30_000;
const RANDOM_REUSE: u16 = 40_000;
const OCCUPANCIES: [usize; 4] = [0, 50, 90, 99];
const ROUNDS: usize = 45;
/// Connects of each way in a round; the round counts by their median.
const CONNECTS: usize = 40;

/// Argument of this program that makes it a client.
pub const CLIENT: &str = "pool-client";

/// Is a client; `job` comes from the one that measures.
///
/// # Errors
/// Whatever goes wrong; the one that measures sees the end of its answers.
pub fn client(job: &str) -> Result<()> {
    client::run(serde_json::from_str(job)?)
}

pub(super) fn measure() -> Result<Vec<Measurement>> {
    let lab = Lab::builder().build()?;
    let range = PortRange { first: POOL, last: POOL + PORTS - 1 };
    let destinations = vec!["192.168.31.0/24".parse()?];
    let stand = Stand::new(&lab, &Settings { ports: vec![range], destinations, ..Settings::default() })?;
    for pod in [lab.c1(), lab.c2()] {
        let range = format!("{KERNEL} {}", KERNEL + PORTS - 1);
        pod.netns.set_sysctl("ipv4/ip_local_port_range", &range)?;
    }
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let _server = listen(lab.a(), to)?;

    let job = |method, first: u16| Job { method, to, first, last: first + PORTS - 1 };
    // In a namespace of its own: nothing is ever held there.
    let mut plain = Client::start(lab.c2(), job(Method::Connect, KERNEL), |command| command)?;
    let pod = lab.c1();
    let mut ways = [
        Way::new(
            "pool",
            Client::start(pod, job(Method::Connect, POOL), |command| in_cgroup(&stand.cgroup, command))?,
        ),
        Way::new("kernel's choice", Client::start(pod, job(Method::Connect, KERNEL), |command| command)?),
        // From the same ports as the kernel's own choice: the option only narrows the range.
        Way {
            fills: false,
            ..Way::new(
                "IP_LOCAL_PORT_RANGE",
                Client::start(pod, job(Method::Range, KERNEL), |command| command)?,
            )
        },
        Way::new("random, retry", Client::start(pod, job(Method::Random, RANDOM), |command| command)?),
        Way::new(
            "random, SO_REUSEADDR, retry",
            Client::start(pod, job(Method::RandomReuse, RANDOM_REUSE), |command| command)?,
        ),
    ];

    let mut measurements = Vec::new();
    let mut all = Vec::new();
    for occupancy in OCCUPANCIES {
        for way in ways.iter_mut().filter(|way| way.fills) {
            way.client.ask("fill", usize::from(PORTS) * occupancy / 100)?;
        }
        let ratios = rounds(&mut plain, &mut ways, "time", &mut all)?;
        for (way, ratios) in ways.iter().zip(ratios) {
            let name = format!("connect, {}, {occupancy} % in use", way.name);
            let measurement = Measurement::of(name, "ratio", ratios);
            measurements.push(if way.name == "pool" { measurement.limit(1.2) } else { measurement });
        }
    }
    // The random ways never end when nothing is free.
    let ways = &mut ways[..3];
    for way in ways.iter_mut().filter(|way| way.fills) {
        way.client.ask("fill", usize::from(PORTS))?;
    }
    let ratios = rounds(&mut plain, ways, "refused", &mut all)?;
    for (way, ratios) in ways.iter().zip(ratios) {
        let measurement = Measurement::of(format!("refusal, {}, full", way.name), "ratio", ratios);
        measurements.push(if way.name == "pool" { measurement.limit(3.0) } else { measurement });
    }
    measurements.insert(0, Measurement::of("plain connect, 0 % in use", "us", all));
    Ok(measurements)
}

/// Ratios of each way to plain connects just before and just after it; those go to `all`, in microseconds.
fn rounds(plain: &mut Client, ways: &mut [Way], task: &str, all: &mut Vec<f64>) -> Result<Vec<Vec<f64>>> {
    let mut ratios = vec![Vec::new(); ways.len()];
    // The first one warms up caches.
    for round in 0..=ROUNDS {
        let mut before = plain.ask("time", CONNECTS)?;
        for (way, ratios) in ways.iter_mut().zip(&mut ratios) {
            let took = way.client.ask(task, CONNECTS)?;
            let after = plain.ask("time", CONNECTS)?;
            if round > 0 {
                ratios.push(2.0 * took / (before + after));
                all.push(after);
            }
            before = after;
        }
    }
    Ok(ratios)
}

/// A way to find a source port.
struct Way {
    name: &'static str,
    client: Client,
    /// Whether it has ports of its own to hold.
    fills: bool,
}

impl Way {
    fn new(name: &'static str, client: Client) -> Self {
        Self { name, client, fills: true }
    }
}

/// A client process.
struct Client {
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    _process: Process,
}

impl Client {
    fn start(host: &Host, job: Job, place: impl FnOnce(Command) -> Command) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(CLIENT).arg(serde_json::to_string(&job)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = host.netns.spawn_command(place(command))?;
        let commands = process.child().stdin.take().context("a pipe")?;
        let answers = BufReader::new(process.child().stdout.take().context("a pipe")?);
        Ok(Self { commands, answers, _process: process })
    }

    fn ask(&mut self, task: &str, count: usize) -> Result<f64> {
        writeln!(self.commands, "{task} {count}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        line.trim().parse().with_context(|| format!("the client did not do `{task} {count}`: {line:?}"))
    }
}

/// Listens, and leaves every connection in the queue of those to be accepted: it needs no descriptor there, and no
/// processor.
fn listen(host: &Host, at: SocketAddr) -> Result<Socket> {
    const QUEUE: i32 = 1 << 20;
    host.netns.set_sysctl("core/somaxconn", &QUEUE.to_string())?;
    Ok(host.netns.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&at.into())?;
        socket.listen(QUEUE)?;
        std::io::Result::Ok(socket)
    })?)
}
