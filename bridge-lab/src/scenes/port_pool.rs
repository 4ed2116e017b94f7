//! Unmodified programs connect from ports of the pool, and connections from other ports are refused.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::model::PortRange;
use bridge_agent::pool::attach;

use super::routing::static_routes;
use super::{Scene, Seen, Stage};
use crate::lab::{Family, Host};
use crate::pool::{Watch, in_cgroup, output, python};
use crate::traffic::{Attempt, tcp};

/// In their order.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "port pool 61001-61100 on the node: curl, nc and a Python script in a pod, all unmodified, connect to the \
               LAN host",
        expected: "each from a port of the pool; a program outside the pool's control group is refused",
        run: pod_is_client,
    },
    Scene {
        name: "the other way round, port pool on the LAN host: the same programs there connect to the pod",
        expected: "each from a port of the pool; a program outside the pool's control group is refused",
        run: host_is_client,
    },
    Scene {
        name: "a pool of 100 ports, 101 connections of a pod to one destination",
        expected: "the last one is refused at once with EADDRNOTAVAIL",
        run: exhaustion,
    },
];

const PORTS: PortRange = PortRange { first: 61001, last: 61100 };
/// Of the LAN host's server, and of the pod's.
const LAN_PORT: u16 = 8443;
const POD_PORT: u16 = 9443;
const DEADLINE: Duration = Duration::from_secs(30);

/// Control groups of clients.
#[derive(Debug)]
pub(super) struct Pool {
    pods: PathBuf,
    lan: PathBuf,
}

/// Configuration of the agent on the node: the pool, and rules that open both directions to its ports alone.
fn node(cgroup: &str) -> String {
    format!(
        r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement: {{mode: enforce, engines: [ebpf], onDeny: reject}}
rules:
  - {{name: lan-to-pod, direction: inbound, protocol: tcp, ports: [{POD_PORT}], sourcePorts: ["{PORTS}"], action: allow}}
  - {{name: pod-to-lan, direction: outbound, protocol: tcp, ports: [{LAN_PORT}], sourcePorts: ["{PORTS}"], action: allow}}
persistence: {{save: never}}
{}"#,
        section(cgroup)
    )
}

/// `portPool`, for the programs of a control group.
fn section(cgroup: &str) -> String {
    format!("portPool: {{ports: [\"{PORTS}\"], bindUdp: false, transparent: {{cgroups: [{cgroup}]}}}}\n")
}

fn pool(stage: &mut Stage) -> Result<&Pool> {
    if stage.pool.is_none() {
        let mount = attach::mount_point()?;
        let below = |directory: &Path| -> Result<String> {
            Ok(format!("/{}", directory.strip_prefix(&mount)?.display()))
        };
        let (pods, lan) = (stage.lab.cgroup("pods")?, stage.lab.cgroup("lan-host")?);
        let agent = stage.agent.as_mut().context("the agent was started by a scene before")?;
        agent.reload(&node(&below(&pods)?))?;
        let status: serde_json::Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
        ensure!(status["agent"]["pool"]["mode"] == "kernel", "{status}");
        let agent = stage.host_agent.as_mut().context("the agent was started by a scene before")?;
        agent.reload(&(static_routes(&stage.lab) + &section(&below(&lan)?)))?;
        stage.pool = Some(Pool { pods, lan });
    }
    stage.pool.as_ref().context("just made")
}

/// Answers every client with a web page that contains its source port. The server ends with the process.
fn serve(server: &Host, port: u16) -> Result<()> {
    let listener = server.netns.run(|| TcpListener::bind((server.v4, port)))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            if let Ok(peer) = stream.peer_addr() {
                // A client that has gone needs no answer.
                let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\n{}\n", peer.port());
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            }
        }
    });
    Ok(())
}

/// Runs the programs, in the control group and one outside it, and looks at the wire of the server meanwhile.
fn programs(client: &Host, cgroup: &Path, server: &Host, port: u16) -> Result<Seen> {
    let to = server.v4;
    serve(server, port)?;
    let watch = Watch::start(&server.netns, "eth0", PORTS, 0)?;
    let mut curl = Command::new("curl");
    curl.args(["-s", "--max-time", "5", &format!("http://{to}:{port}/")]);
    let mut nc = Command::new("nc");
    nc.args(["-d", "-w", "5", &to.to_string(), &port.to_string()]);
    let script = python(&format!(
        "import urllib.request as u; print(u.urlopen('http://{to}:{port}/').read().decode())"
    ));
    let mut seen = Seen { text: String::new(), ok: true };
    for (name, command) in [("curl", curl), ("nc", nc), ("python3", script)] {
        let text = output(&client.netns, in_cgroup(cgroup, command), DEADLINE)?;
        let port: u16 = text.trim().lines().last().unwrap_or_default().trim().parse()?;
        seen.text += &format!("{name} from {port}, ");
        seen.ok &= PORTS.contains(port);
    }
    let (_, plain) = tcp::Client::new(&client.netns).connect(server.at(Family::V4, port))?.split();
    let wire = watch.finish()?;
    seen.text += &format!(
        "{} SYNs on the wire, {} of them from other ports; without the pool {plain}",
        wire.syns,
        wire.outside.len()
    );
    // Three, since that of the one outside never got here.
    seen.ok &= wire.syns == 3 && wire.outside.is_empty() && Attempt::refused(&plain);
    Ok(seen)
}

fn pod_is_client(stage: &mut Stage) -> Result<Seen> {
    let cgroup = pool(stage)?.pods.clone();
    programs(stage.lab.c1(), &cgroup, stage.lab.a(), LAN_PORT)
}

fn host_is_client(stage: &mut Stage) -> Result<Seen> {
    let cgroup = pool(stage)?.lan.clone();
    programs(stage.lab.a(), &cgroup, stage.lab.c1(), POD_PORT)
}

fn exhaustion(stage: &mut Stage) -> Result<Seen> {
    let cgroup = pool(stage)?.pods.clone();
    let to = stage.lab.a().v4;
    let script = format!(
        r"
import errno, socket, time
held = []
while len(held) < 101:
    s = socket.socket(); s.settimeout(5); start = time.perf_counter()
    try: s.connect(('{to}', {LAN_PORT}))
    except OSError as e: print(len(held), errno.errorcode[e.errno], round((time.perf_counter() - start) * 1e6)); break
    held.append(s)
"
    );
    let text = output(&stage.lab.c1().netns, in_cgroup(&cgroup, python(&script)), DEADLINE)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [held, error, micros] = words[..] else { anyhow::bail!("not refused: {text}") };
    Ok(Seen {
        text: format!("{held} connected, the next one {error} after {micros} us"),
        ok: held == "100" && error == "EADDRNOTAVAIL",
    })
}
