//! Unmodified programs connect from ports of the pool.

use std::io::Write as _;
use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_agent::model::PortRange;
use bridge_agent::pool::Settings;

use super::{Scene, Seen, Stage};
use crate::lab::Host;
use crate::pool::{Stand, output, python};

/// In their order.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "pool 61001-61100: curl, nc and a Python script in a pod connect to the LAN host",
        expected: "each from a port of the pool",
        run: pod_is_client,
    },
    Scene {
        name: "the other way round: the same programs on the LAN host connect to the pod",
        expected: "each from a port of the pool",
        run: host_is_client,
    },
    Scene {
        name: "a pool of 100 ports, 101 connections to one destination",
        expected: "the last one is refused at once with EADDRNOTAVAIL",
        run: exhaustion,
    },
];

const PORTS: PortRange = PortRange { first: 61001, last: 61100 };
const PORT: u16 = 8080;
const DEADLINE: Duration = Duration::from_secs(10);

fn pool(stage: &mut Stage) -> Result<&Stand> {
    if stage.pool.is_none() {
        let settings = Settings {
            ports: vec![PORTS],
            destinations: vec!["192.168.31.0/24".parse()?, "10.200.0.0/16".parse()?],
            ..Settings::default()
        };
        stage.pool = Some(Stand::new(&stage.lab, &settings)?);
    }
    stage.pool.as_ref().context("just made")
}

/// Tells every client, as a web page, which port it comes from. The server ends with the process.
fn serve(server: &Host) -> Result<()> {
    let listener = server.netns.run(|| TcpListener::bind((server.v4, PORT)))?;
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

fn programs(stage: &mut Stage, client: &Host, server: &Host) -> Result<Seen> {
    let to = server.v4;
    serve(server)?;
    let pool = pool(stage)?;
    let mut curl = Command::new("curl");
    curl.args(["-s", "--max-time", "5", &format!("http://{to}:{PORT}/")]);
    let mut nc = Command::new("nc");
    nc.args(["-d", "-w", "5", &to.to_string(), &PORT.to_string()]);
    let script = python(&format!(
        "import urllib.request as u; print(u.urlopen('http://{to}:{PORT}/').read().decode())"
    ));
    let mut seen = Seen { text: String::new(), ok: true };
    for (name, command) in [("curl", curl), ("nc", nc), ("python3", script)] {
        let text = output(&client.netns, pool.hooked(command), DEADLINE)?;
        let port: u16 = text.trim().lines().last().unwrap_or_default().trim().parse()?;
        let separator = if seen.text.is_empty() { "" } else { ", " };
        seen.text += &format!("{separator}{name} from {port}");
        seen.ok &= PORTS.contains(port);
    }
    Ok(seen)
}

fn pod_is_client(stage: &mut Stage) -> Result<Seen> {
    let (client, server) = (stage.lab.c1().clone(), stage.lab.a().clone());
    programs(stage, &client, &server)
}

fn host_is_client(stage: &mut Stage) -> Result<Seen> {
    let (client, server) = (stage.lab.a().clone(), stage.lab.c1().clone());
    programs(stage, &client, &server)
}

fn exhaustion(stage: &mut Stage) -> Result<Seen> {
    let (client, to) = (stage.lab.c1().netns.clone(), stage.lab.a().v4);
    let script = format!(
        r"
import errno, socket, time
held = []
while len(held) < 101:
    s = socket.socket(); s.settimeout(5); start = time.perf_counter()
    try: s.connect(('{to}', {PORT}))
    except OSError as e: print(len(held), errno.errorcode[e.errno], round((time.perf_counter() - start) * 1e6)); break
    held.append(s)
"
    );
    let text = output(&client, pool(stage)?.hooked(python(&script)), DEADLINE)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [held, error, micros] = words[..] else { anyhow::bail!("not refused: {text}") };
    Ok(Seen {
        text: format!("{held} connected, the next one {error} after {micros} us"),
        ok: held == "100" && error == "EADDRNOTAVAIL",
    })
}
