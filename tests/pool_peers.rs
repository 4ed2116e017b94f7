//! Peers of every kind, pools of several sizes: connects succeed as long as the kernel's own range of as many ports would
//! let them.
//!
//! The model of TIME_WAIT. An end that sends its FIN first keeps the 4-tuple for 60 s from the peer's FIN on
//! (`TCP_TIMEWAIT_LEN`), and before that in FIN_WAIT2 for at most 60 s (`tcp_fin_timeout`), unless either end sends an RST. If
//! both ends use TCP timestamps, the kernel uses such a 4-tuple again at once (`tcp_twsk_unique`); if not, the port is blocked
//! towards this peer. So of the connects of a burst, all succeed, or as many as there are ports; and a connect at any time
//! succeeds if fewer than that many are blocked.

use std::{fmt::Write as _, io::Read as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Refusal, counter};
use bridge_lab::{
    lab::{Family, Lab, Netns, Process},
    pool::{Stand, output, python},
};

const FIRST_PORT: u16 = 50000;
/// Seconds from the connection to the FIN of a peer that closes late.
const LATE: f64 = 6.0;
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

const ENDS: [End; 7] = [
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
    // Half-closed by the client, and reset by the peer: no TIME_WAIT, though the client's FIN came first.
    End {
        port: 9008,
        client: "s.shutdown(socket.SHUT_WR); drain(s)",
        peer: "drain(s); reset(s)",
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
    s = socket.socket(socket.AF_INET6 if ':' in to[0] else socket.AF_INET)
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
    script += "def serve(port, end):\n    l = socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)\n    def loop():\n        while True:\n            \
               s = l.accept()[0]\n            with s:\n                try: end(s)\n                except OSError: pass\n    \
               threading.Thread(target=loop).start()\n";
    for End { port, peer, .. } in &ENDS {
        let steps = peer.replace("; ", "\n    ");
        writeln!(script, "def end(s):\n    {steps}\nserve({port}, end)")?;
    }
    // Never closes, and closes late.
    script += "kept = []\ndef end(s): kept.append(s.dup())\nserve(9007, end)\n";
    writeln!(script, "def end(s): threading.Timer({LATE}, s.dup().close).start()\nserve(9010, end)")?;
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
    let destinations = vec!["192.168.31.0/24".parse()?, "fd00::/8".parse()?, "2001:db8::/32".parse()?];
    let stand = Stand::new(
        &lab,
        &Settings { ports: vec![range], destinations, bind_udp: false, ..Settings::default() },
    )?;
    lab.a2().netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    for pod in lab.pods() {
        // A peer that repeats its FIN, since the machine is slow, answers the second ACK with an RST: it must not end TIME_WAIT.
        pod.netns.set_sysctl("ipv4/tcp_rfc1337", "1")?;
    }
    lab.c2().netns.set_sysctl("ipv4/ip_local_port_range", &format!("{} {}", range.first, range.last))?;
    let peers = [peer(&lab.a().netns)?, peer(&lab.a2().netns)?];
    Ok((lab, stand, peers))
}

fn bursts(ports: u16, families: &[Family], ends: &[End]) -> Result<()> {
    let (lab, stand, _peers) = stand(ports)?;
    let peers = families.iter().flat_map(|family| [(lab.a(), *family, true), (lab.a2(), *family, false)]);
    for (peer, family, timestamps) in peers {
        let to = peer.ip(family);
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
            ensure!(kernel <= model, "the kernel's own range gave {kernel} of {count}, by the model {model}");
        }
    }
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0, "a connect failed after the hook");
    Ok(())
}

#[test]
fn a_pool_of_16_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(16, &[Family::V4, Family::V6], &ENDS)
}

#[test]
fn a_pool_of_100_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(100, &[Family::V4], &ENDS)
}

#[test]
fn a_pool_of_10000_ports_gives_as_many_connections_as_the_kernel() -> Result<()> {
    bursts(10_000, &[Family::V4], &[CLIENT_CLOSES])
}

/// A peer that never closes: the kernel keeps the tuple in FIN_WAIT2 for `tcp_fin_timeout`, here 3 s, and never in TIME_WAIT. And
/// one that resets what the client has half-closed.
#[test]
fn a_port_serves_again_as_soon_as_the_kernel_releases_it() -> Result<()> {
    const PORTS: u16 = 16;
    let (lab, stand, _peers) = stand(PORTS)?;
    for pod in lab.pods() {
        pod.netns.set_sysctl("ipv4/tcp_fin_timeout", "3")?;
    }
    let to = lab.a2().v4;
    // Second by second: how many of as many connects as there are ports succeed.
    let script = format!(
        "{PRELUDE}\ndef one():\n    s = connect(('{to}', 9007))\n    if s: s.close()\n    return bool(s)\n\
         start = time.monotonic()\nseen = []\nwhile time.monotonic() - start < 7:\n    seen.append((time.monotonic() - start, sum(one() for _ in range({PORTS}))))\n    \
         time.sleep(0.5)\nprint(json.dumps(seen))"
    );
    let seen: Vec<(f64, u32)> =
        serde_json::from_str(&output(&lab.c1().netns, stand.hooked(python(&script)), LONG)?)?;
    ensure!(seen[0].1 == u32::from(PORTS), "{seen:?}");
    ensure!(seen.iter().all(|(at, count)| !(0.5..2.9).contains(at) || *count == 0), "{seen:?}");
    let again: u32 = seen.iter().filter(|(at, _)| *at > 2.9).map(|(_, count)| count).sum();
    ensure!(again >= u32::from(PORTS), "{seen:?}");
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0, "a connect failed after the hook");
    Ok(())
}

/// At rates below and above ports / 60 s, towards a peer without timestamps, for longer than a TIME_WAIT.
#[test]
fn connects_at_any_rate_succeed_by_the_model_of_time_wait() -> Result<()> {
    const PORTS: u16 = 16;
    const TIME_WAIT: f64 = 60.0;
    /// The kernel's timers end a TIME_WAIT up to this later: 5.1 s at 100 Hz, 2 s at 250 Hz, 4.1 s at 1,000 Hz.
    const SLACK: f64 = 5.5;
    let (lab, stand, _peers) = stand(PORTS)?;
    // Programs at once, towards several ports of the peer: each destination has all ports.
    let script = |port: u16, steps: &str, pause: f64| {
        format!(
            "{PRELUDE}\nstart = time.monotonic()\nseen = []\nwhile time.monotonic() - start < 82:\n    \
             s = connect(('{}', {port}))\n    if s:\n        with s:\n            {}\n    \
             seen.append((time.monotonic() - start, bool(s)))\n    time.sleep({pause})\nprint(json.dumps(seen))",
            lab.a2().v4,
            steps.replace("; ", "\n            ")
        )
    };
    let seen = std::thread::scope(|scope| {
        [
            script(ENDS[0].port, ENDS[0].client, 4.2),
            script(ENDS[4].port, ENDS[4].client, 0.5),
            // The client closes for good, the peer six seconds later.
            script(9010, "pass", 0.5),
        ]
        .map(|script| {
            let (lab, stand) = (&lab, &stand);
            scope.spawn(move || output(&lab.c1().netns, stand.hooked(python(&script)), LONG))
        })
        .map(|thread| -> Result<Vec<(f64, bool)>> {
            Ok(serde_json::from_str(&thread.join().expect("no panic")?)?)
        })
    });
    let [slow, fast, late] = seen;
    let slow = slow?;
    ensure!(slow.len() > 15 && slow.iter().all(|(_, ok)| *ok), "below ports / 60 s: {slow:?}");
    for (seen, blocked) in [(fast?, TIME_WAIT), (late?, LATE + TIME_WAIT)] {
        for (at, ok) in &seen {
            let within = |age: f64| {
                let blocks = |(then, ok): &&(f64, bool)| *ok && then < at && at - then < age;
                seen.iter().filter(blocks).count()
            };
            let surely_free = within(blocked + SLACK) < usize::from(PORTS);
            let surely_full = within(blocked - 1.0) >= usize::from(PORTS);
            ensure!(*ok || !surely_free, "refused at {at} with a port free: {seen:?}");
            ensure!(!ok || !surely_full, "connected at {at} without a port: {seen:?}");
        }
        let again = seen.iter().filter(|(at, ok)| *ok && *at > blocked).count();
        ensure!(again >= 8, "{again} connections after the first TIME_WAITs: {seen:?}");
    }
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0, "a connect failed after the hook");
    ensure!(stand.counter(counter::REFUSALS + Refusal::RESTING.0)? > 0);
    Ok(())
}
