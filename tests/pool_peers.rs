//! Peers of every kind, pools of several sizes: connects succeed as long as the kernel's own range of as many ports would
//! let them.
//!
//! The model of TIME_WAIT. An end that sends its FIN first keeps the 4-tuple for 60 s (`TCP_TIMEWAIT_LEN`), unless either end
//! sends an RST. If both ends use TCP timestamps, the kernel uses such a 4-tuple again at once (`tcp_twsk_unique`); if not,
//! the port is blocked towards this peer. So of the connects of a burst, all succeed, or as many as there are ports; and a
//! connect at any time succeeds if fewer than that many began their TIME_WAIT within the last 60 s.

use std::{fmt::Write as _, io::Read as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Refusal, counter};
use bridge_lab::{
    lab::{Lab, Netns, Process},
    pool::{Stand, output, python},
};

const FIRST_PORT: u16 = 50000;
const LONG: Duration = Duration::from_secs(150);

/// A way to end a connection: the peer's port for it, the client's steps and the peer's, and whether the client's FIN is the
/// first of two.
struct End {
    port: u16,
    client: &'static str,
    peer: &'static str,
    client_first: bool,
}

const CLIENT_CLOSES: End =
    End { port: 9001, client: "s.shutdown(socket.SHUT_WR); drain(s)", peer: "drain(s)", client_first: true };

const ENDS: [End; 6] = [
    CLIENT_CLOSES,
    End { port: 9002, client: "drain(s)", peer: "pass", client_first: false },
    End { port: 9003, client: "reset(s)", peer: "drain(s)", client_first: false },
    End { port: 9004, client: "drain(s)", peer: "reset(s)", client_first: false },
    // Half-closed by the client, then by the peer: data goes on in the other direction.
    End {
        port: 9005,
        client: "s.shutdown(socket.SHUT_WR); drain(s)",
        peer: "drain(s); s.sendall(b'x' * 100)",
        client_first: true,
    },
    End {
        port: 9006,
        client: "drain(s); s.sendall(b'x' * 100); s.shutdown(socket.SHUT_WR)",
        peer: "s.shutdown(socket.SHUT_WR); drain(s)",
        client_first: false,
    },
];

const PRELUDE: &str = r"
import errno, json, socket, struct, sys, threading, time
def drain(s):
    try:
        while s.recv(1000): pass
    except ConnectionResetError: pass
def reset(s): s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
def connect(to):
    s = socket.socket()
    s.settimeout(20)
    try: s.connect(to)
    # The peer was faster: the port was good for a connection.
    except ConnectionResetError: pass
    except OSError as e:
        s.close()
        if e.errno != errno.EADDRNOTAVAIL: raise
        return None
    return s
";

/// Serves every end of [`ENDS`].
fn peer(netns: &Netns) -> Result<Process> {
    let mut script = String::from(PRELUDE);
    script += "def serve(port, end):\n    l = socket.create_server(('', port), backlog=4096)\n    def loop():\n        while True:\n            \
               s = l.accept()[0]\n            with s:\n                try: end(s)\n                except OSError: pass\n    \
               threading.Thread(target=loop).start()\n";
    for End { port, peer, .. } in &ENDS {
        let steps = peer.replace("; ", "\n    ");
        writeln!(script, "def end(s):\n    {steps}\nserve({port}, end)")?;
    }
    script += "print('ready', flush=True)\n";
    let mut command = python(&script);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    process.child().stdout.as_mut().context("a pipe")?.read_exact(&mut [0; 6])?;
    Ok(process)
}

/// A script that connects `count` times, one after the other, and prints how many succeeded.
fn burst(to: &str, end: &End, count: u32) -> String {
    format!(
        "{PRELUDE}\ndef one():\n    s = connect(('{to}', {}))\n    if s is None: return 0\n    with s:\n        {}\n    return 1\n\
         print(sum(one() for _ in range({count})))",
        end.port,
        end.client.replace("; ", "\n        ")
    )
}

/// A lab with a peer that uses timestamps and one that does not; one pod uses a pool of `ports` ports, the other one the
/// kernel's own range of as many.
fn stand(ports: u16) -> Result<(Lab, Stand, [Process; 2])> {
    let lab = Lab::builder().second_host().build()?;
    let range = PortRange { first: FIRST_PORT, last: FIRST_PORT + ports - 1 };
    let destinations = vec!["192.168.31.0/24".parse()?];
    let stand = Stand::new(
        &lab,
        &Settings { ports: vec![range], destinations, bind_udp: false, ..Settings::default() },
    )?;
    lab.a2().netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    lab.c2().netns.set_sysctl("ipv4/ip_local_port_range", &format!("{} {}", range.first, range.last))?;
    let peers = [peer(&lab.a().netns)?, peer(&lab.a2().netns)?];
    Ok((lab, stand, peers))
}

fn bursts(ports: u16, ends: &[End]) -> Result<()> {
    let (lab, stand, _peers) = stand(ports)?;
    for (to, timestamps) in [(lab.a().v4, true), (lab.a2().v4, false)] {
        for end in ends {
            let count = u32::from(ports) + 20;
            let script = burst(&to.to_string(), end, count);
            let pool: u32 = output(&lab.c1().netns, stand.hooked(python(&script)), LONG)?.trim().parse()?;
            let kernel: u32 = output(&lab.c2().netns, python(&script), LONG)?.trim().parse()?;
            let blocked = end.client_first && !timestamps;
            let model = if blocked { u32::from(ports) } else { count };
            println!(
                "{ports} ports, timestamps {timestamps}, end {}: pool {pool}, kernel {kernel}, model {model} of {count}",
                end.port
            );
            ensure!(pool == model, "{pool} of {count} to {to}:{}, by the model {model}", end.port);
            // A repeated FIN of the peer can end a TIME_WAIT early (RFC 1337) when the machine is slow.
            let most = model + model / 100 + 3;
            ensure!(kernel <= most, "the kernel's own range gave {kernel} of {count}, by the model {model}");
        }
    }
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0, "a connect failed after the hook");
    Ok(())
}

#[test]
fn a_pool_of_16_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(16, &ENDS)
}

#[test]
fn a_pool_of_100_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(100, &ENDS)
}

#[test]
fn a_pool_of_10000_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(10_000, &[CLIENT_CLOSES])
}

/// At rates below and above ports / 60 s, towards a peer without timestamps, for longer than a TIME_WAIT.
#[test]
fn connects_at_any_rate_succeed_by_the_model_of_time_wait() -> Result<()> {
    const PORTS: u16 = 16;
    const TIME_WAIT: f64 = 60.0;
    /// The kernel's timers end a TIME_WAIT up to this later: 5.1 s at 100 Hz, 2 s at 250 Hz, 4.1 s at 1,000 Hz.
    const SLACK: f64 = 5.5;
    let (lab, stand, _peers) = stand(PORTS)?;
    // Two programs at once, towards two ports of the peer: each destination has all ports.
    let script = |end: &End, pause: f64| {
        format!(
            "{PRELUDE}\nstart = time.monotonic()\nseen = []\nwhile time.monotonic() - start < 82:\n    \
             s = connect(('{}', {}))\n    if s:\n        with s:\n            {}\n    \
             seen.append((time.monotonic() - start, bool(s)))\n    time.sleep({pause})\nprint(json.dumps(seen))",
            lab.a2().v4,
            end.port,
            end.client.replace("; ", "\n            ")
        )
    };
    let (slow, fast) = (script(&ENDS[0], 4.2), script(&ENDS[4], 0.5));
    let [slow, fast] = std::thread::scope(|scope| {
        [slow, fast]
            .map(|script| {
                let (lab, stand) = (&lab, &stand);
                scope.spawn(move || output(&lab.c1().netns, stand.hooked(python(&script)), LONG))
            })
            .map(|thread| thread.join().expect("no panic"))
    });
    let seen = |text: Result<String>| -> Result<Vec<(f64, bool)>> { Ok(serde_json::from_str(&text?)?) };
    let (slow, fast) = (seen(slow)?, seen(fast)?);
    ensure!(slow.len() > 15 && slow.iter().all(|(_, ok)| *ok), "below ports / 60 s: {slow:?}");
    for (at, ok) in &fast {
        let within = |age: f64| {
            let blocks = |(then, ok): &&(f64, bool)| *ok && then < at && at - then < age;
            fast.iter().filter(blocks).count()
        };
        let (surely_free, surely_full) =
            (within(TIME_WAIT + SLACK) < usize::from(PORTS), within(TIME_WAIT - 1.0) >= usize::from(PORTS));
        ensure!(
            *ok || !surely_free,
            "refused at {at} with a port free: {} {fast:?}",
            within(TIME_WAIT + SLACK)
        );
        ensure!(!ok || !surely_full, "connected at {at} without a port: {fast:?}");
    }
    let late = fast.iter().filter(|(at, ok)| *ok && *at > TIME_WAIT).count();
    ensure!(late >= 8, "{late} connections after the first TIME_WAITs: {fast:?}");
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0, "a connect failed after the hook");
    ensure!(stand.counter(counter::REFUSALS + Refusal::RESTING.0)? > 0);
    Ok(())
}
