//! The lab with an agent, and `bridge-agent ui` beside it.

use std::{
    io::{BufRead as _, BufReader},
    net::UdpSocket,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bridge_lab::{
    agent::{self, Agent},
    lab::{Family, Lab},
    traffic::tcp,
};

pub(crate) const ALLOWED: u16 = 40002;
pub(crate) const DENIED: u16 = 40100;
/// TCP port of the metrics, on the node's loopback.
pub(crate) const METRICS: u16 = 9469;
/// UDP, of which each datagram is a flow.
const FLOWS: u16 = 40003;

pub(crate) const CONFIG: &str = r#"
role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  engines: [ebpf]
  interfaces: {external: [eth0], internal: ["cali*"]}
  events: {rate: 10000}
  timeouts: {udpUnreplied: 10m}
portPool: {ports: ["61001-61100"]}
persistence: {save: never}
rules:
- {name: api, direction: inbound, protocol: tcp, ports: [40002]}
- {name: telemetry, direction: inbound, protocol: udp, ports: [40003]}
- {name: pods-to-plant, direction: outbound, protocol: tcp, ports: [502, 4840]}
- {name: no-telnet, direction: inbound, protocol: tcp, ports: [23], action: deny}
"#;

pub(crate) struct Stage {
    pub(crate) lab: Lab,
    pub(crate) agent: Agent,
    pub(crate) url: String,
    _servers: Vec<tcp::Server>,
    page: Child,
}

/// Starts `bridge-agent ui` by `program` (with its first arguments), and returns it with the address that it prints.
pub(crate) fn page(program: &[&str], socket: &Path) -> Result<(Child, String)> {
    let bridge_agent = agent::program()?;
    let mut command = match program {
        [] => Command::new(&bridge_agent),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(&bridge_agent);
            command
        }
    };
    command.args(["ui", "--listen", "127.0.0.1:0", "--socket"]).arg(socket);
    let mut page = command.stdout(Stdio::piped()).spawn().context("start bridge-agent ui")?;
    let mut url = String::new();
    BufReader::new(page.stdout.take().context("stdout")?).read_line(&mut url)?;
    Ok((page, url.trim().to_owned()))
}

impl Stage {
    pub(crate) fn start() -> Result<Self> {
        let lab = Lab::builder().pods(3).second_host().build()?;
        let start = |port| Ok(tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, port))?);
        let servers = [ALLOWED, DENIED].into_iter().map(start).collect::<Result<_>>()?;
        let config = format!("{CONFIG}api: {{metrics: \"127.0.0.1:{METRICS}\"}}\n");
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let (page, url) = page(&[], agent.socket())?;
        Ok(Self { lab, agent, url, _servers: servers, page })
    }

    /// The process of `bridge-agent ui`.
    pub(crate) fn page_pid(&self) -> u32 {
        self.page.id()
    }

    /// Scheme, address and port.
    pub(crate) fn origin(&self) -> String {
        self.url.split("/#").next().unwrap_or_default().to_owned()
    }

    pub(crate) fn token(&self) -> &str {
        self.url.split_once("token=").map_or("", |(_, token)| token)
    }

    /// Tries to connect from the LAN to the first pod.
    pub(crate) fn connect(&self, port: u16) -> Result<()> {
        self.reaches(port).map(drop)
    }

    pub(crate) fn reaches(&self, port: u16) -> Result<bool> {
        Ok(tcp::Client::new(&self.lab.a().netns).connect(self.lab.c1().at(Family::V4, port))?.succeeded())
    }

    /// Opens UDP flows of the rule `telemetry`, each from its own port.
    pub(crate) fn open_flows(&self, number: u16) -> Result<()> {
        self.lab.a().netns.run(|| {
            (0..number).try_for_each(|index| {
                let socket = UdpSocket::bind((self.lab.a().v4, 20_000 + index))?;
                socket.send_to(b"x", self.lab.c1().at(Family::V4, FLOWS)).map(drop)
            })
        })?;
        Ok(())
    }

    /// Sends datagrams that are denied, each to another port.
    pub(crate) fn denied_datagrams(&self, number: u16, per_second: u32) -> Result<()> {
        self.lab.a2().netns.run(|| {
            let socket = UdpSocket::bind((self.lab.a2().v4, 0))?;
            let start = Instant::now();
            (0..number).try_for_each(|index| {
                let due = Duration::from_secs(1) * u32::from(index) / per_second;
                std::thread::sleep(due.saturating_sub(start.elapsed()));
                // A refusal by ICMP is an error of the next datagram.
                drop(socket.send_to(b"x", self.lab.c2().at(Family::V4, 50_000 + index)));
                Ok::<_, std::io::Error>(())
            })
        })?;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.page.kill());
        drop(self.page.wait());
    }
}
