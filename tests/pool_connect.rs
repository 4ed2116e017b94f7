//! Effects of the hooks on the sockets of unmodified programs.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Event, Refusal, counter};
use bridge_lab::{
    lab::{Family, Lab, Netns, Process},
    pool::{Stand, finish, output, python},
    wait::{eventually, patience},
};

const PORTS: PortRange = PortRange { first: 61001, last: 61080 };
const SOON: Duration = Duration::from_secs(20);
/// A connect is refused in less, also by an emulated processor, by its measure.
const MOMENT: Duration = Duration::from_millis(1);

/// Beginning of every Python program here.
const PRELUDE: &str = r"
import json, socket, sys, time
def tcp(to, family=socket.AF_INET):
    s = socket.socket(family)
    s.settimeout(10)
    s.connect(to)
    return s
def port(s): return s.getsockname()[1]
";

fn settings() -> Result<Settings> {
    Ok(Settings {
        ports: vec![PORTS],
        exclude: vec![PortRange { first: 61050, last: 61050 }],
        destinations: vec![
            "192.168.31.0/24".parse()?,
            "fd00::/8".parse()?,
            "2001:db8::/32".parse()?,
            "10.200.0.0/16".parse()?,
        ],
        ..Settings::default()
    })
}

fn in_pool(port: u16) -> bool {
    PORTS.contains(port) && port != 61050
}

/// Accepts TCP on some ports of all addresses, for ever, and says to each client which port it came from.
fn serve(netns: &Netns, ports: &[u16]) -> Result<Process> {
    let greet = r"
                c.sendall(b'HTTP/1.0 200 OK\r\n\r\n%d\n' % peer[1])
                c.shutdown(socket.SHUT_WR)";
    accept(netns, ports, greet)
}

/// Accepts TCP likewise, is silent, and closes after the client has closed.
fn serve_until_closed(netns: &Netns, ports: &[u16]) -> Result<Process> {
    accept(netns, ports, "pass")
}

/// Accepts TCP on some ports of all addresses, for ever, does `greet` to each connection, and closes it after the client.
fn accept(netns: &Netns, ports: &[u16], greet: &str) -> Result<Process> {
    let mut script = String::from("import selectors, socket\nsel = selectors.DefaultSelector()\n");
    for port in ports {
        writeln!(
            script,
            "l = socket.create_server(('::', {port}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)"
        )?;
        writeln!(script, "sel.register(l, selectors.EVENT_READ, 1)")?;
    }
    script.push_str(
        &r"print('ready', flush=True)
while True:
    for key, _ in sel.select():
        s = key.fileobj
        if key.data:
            c, peer = s.accept()
            try: GREET
            except OSError: pass
            sel.register(c, selectors.EVENT_READ, 0)
        else:
            try: data = s.recv(4096)
            except OSError: data = b''
            if not data:
                sel.unregister(s)
                s.close()
"
        .replace("GREET", greet),
    );
    let mut command = python(&script);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    let mut ready = [0; 6];
    std::io::Read::read_exact(process.child().stdout.as_mut().context("a pipe")?, &mut ready)?;
    Ok(process)
}

/// Runs a hooked Python program that prints JSON.
fn run<T: serde::de::DeserializeOwned>(stand: &Stand, netns: &Netns, script: &str) -> Result<T> {
    let text = output(netns, stand.hooked(python(&format!("{PRELUDE}{script}"))), SOON)?;
    serde_json::from_str(&text).with_context(|| text)
}

#[test]
fn curl_nc_and_python_connect_from_pool_ports_without_knowing() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, &[8080])?;
    let to = lab.a().v4;
    for pod in lab.pods() {
        let mut curl = Command::new("curl");
        curl.args(["-s", "--max-time", "10", &format!("http://{to}:8080/")]);
        let mut nc = Command::new("nc");
        nc.args(["-d", "-w", "10", &to.to_string(), "8080"]);
        let py = python(&format!(
            "import urllib.request as u; print(u.urlopen('http://{to}:8080/').read().decode())"
        ));
        for command in [curl, nc, py] {
            let program = format!("{:?}", command.get_program());
            let text = output(&pod.netns, stand.hooked(command), SOON)?;
            let port: u16 = text
                .trim()
                .lines()
                .last()
                .unwrap_or_default()
                .trim()
                .parse()
                .with_context(|| text.clone())?;
            ensure!(in_pool(port), "{program} came from {port}");
        }
    }
    ensure!(stand.settled(SOON)? == 6);
    Ok(())
}

#[test]
fn a_lan_host_is_a_client_too() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.c1().netns, &[8080])?;
    let ports: Vec<u16> = run(
        &stand,
        &lab.a().netns,
        &format!("print(json.dumps([port(tcp(('{}', 8080))) for _ in range(20)]))", lab.c1().v4),
    )?;
    ensure!(ports.iter().all(|port| in_pool(*port)), "{ports:?}");
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn a_full_pool_is_eaddrnotavail_at_once_with_an_event_and_a_counter() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, &[8080, 8081])?;
    let mut events = stand.pool.take_events().context("events")?;
    #[derive(serde::Deserialize)]
    struct Seen {
        ports: Vec<u16>,
        full: String,
        refusal: f64,
        success: f64,
        elsewhere: u16,
        mapped: String,
        again: u16,
        freed: u16,
    }
    let a = lab.a().v4;
    let seen: Seen = run(
        &stand,
        &lab.c1().netns,
        &format!(
            r"
to = ('{a}', 8080)
def timed(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result
held = [timed(lambda: tcp(to)) for _ in range(79)]
success = sorted(t for t, _ in held)[39]
held = [s for _, s in held]
ports = [port(s) for s in held]
full = code(lambda: tcp(to))
refusal = sorted(timed(lambda: code(lambda: tcp(to)))[0] for _ in range(79))[39]
elsewhere = port(tcp(('{a}', 8081)))
mapped = code(lambda: tcp(('::ffff:{a}', 8080), socket.AF_INET6))
freed = port(held[7])
held[7].recv(100); held[7].close()
while True:
    try: s = tcp(to); break
    except OSError: pass
print(json.dumps(dict(ports=ports, full=full, refusal=refusal, success=success, elsewhere=elsewhere, mapped=mapped, again=port(s), freed=freed)))
"
        ),
    )?;
    let unique: BTreeSet<u16> = seen.ports.iter().copied().collect();
    ensure!(unique.len() == 79 && unique.iter().all(|port| in_pool(*port)), "{unique:?}");
    ensure!(seen.full == "EADDRNOTAVAIL" && seen.mapped == "EADDRNOTAVAIL", "{} {}", seen.full, seen.mapped);
    ensure!(seen.again == seen.freed && in_pool(seen.elsewhere));
    println!("median of 79: success {:.0} us, refusal {:.0} us", seen.success * 1e6, seen.refusal * 1e6);
    // An emulated processor needs longer for instructions of BPF, of which a refusal is made, than for system calls.
    let emulated = patience(MOMENT) > MOMENT;
    let most = if emulated { patience(MOMENT).as_secs_f64() } else { 3.0 * seen.success };
    ensure!(seen.refusal < most, "a refusal takes {:.0} us", seen.refusal * 1e6);
    ensure!(stand.counter(counter::REFUSALS + Refusal::EXHAUSTED.0)? >= 81);
    let item = events.next().context("no event")?;
    // SAFETY: the hooks write events and nothing else.
    let event: Event = unsafe { item.as_ptr().cast::<Event>().read_unaligned() };
    ensure!(Refusal(event.refusal) == Refusal::EXHAUSTED && event.destination.port() == 8080);
    ensure!(event.comm.starts_with(b"python3"), "{:?}", event.comm);
    drop(item);
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn one_port_serves_many_destinations_and_two_pods_never_the_same() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, &[8080, 8081, 8082])?;
    let a = lab.a().v4;
    let many: Vec<Vec<u16>> = run(
        &stand,
        &lab.c1().netns,
        &format!(
            "s = [[tcp(('{a}', p)) for _ in range(79)] for p in (8080, 8081, 8082)]\nprint(json.dumps([[port(c) for c in r] for r in s]))"
        ),
    )?;
    for ports in &many {
        ensure!(ports.iter().collect::<BTreeSet<_>>().len() == 79);
    }
    // All of them are warm with the first pod now: the second one gets none.
    let second: String =
        run(&stand, &lab.c2().netns, &format!("print(json.dumps(code(lambda: tcp(('{a}', 8080)))))"))?;
    ensure!(second == "EADDRNOTAVAIL", "{second}");
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn a_port_that_a_program_binds_itself_is_adopted_or_refused() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, &[8080])?;
    let a = lab.a().v4;
    let bound = |port: u16| {
        format!(
            r"
def bound():
    global s
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(('', {port}))
    s.settimeout(10)
    s.connect(('{a}', 8080))
"
        )
    };
    // Held by the first pod for as long as its standard input is open.
    let script = format!("{PRELUDE}{}bound(); print(port(s), flush=True); sys.stdin.read()", bound(61005));
    let mut command = stand.hooked(python(&script));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = lab.c1().netns.spawn_command(command)?;
    let adopted = || stand.counter(counter::ADOPTIONS).ok().filter(|count| *count == 1);
    eventually(patience(SOON), adopted).context("not adopted")?;
    let ask = |netns: &Netns, port: u16| -> Result<String> {
        run(&stand, netns, &format!("{}print(json.dumps(code(bound)))", bound(port)))
    };
    ensure!(ask(&lab.c2().netns, 61005)? == "EADDRNOTAVAIL");
    ensure!(stand.counter(counter::REFUSALS + Refusal::TAKEN.0)? == 1);
    for outside in [61000, 61081, 61050, 40000] {
        let seen = ask(&lab.c2().netns, outside)?;
        ensure!(seen == "EADDRNOTAVAIL", "{outside}: {seen}");
    }
    ensure!(stand.counter(counter::REFUSALS + Refusal::OUTSIDE.0)? == 4);
    ensure!(stand.counter(counter::ADOPTIONS)? == 1);
    ensure!(ask(&lab.c2().netns, 61006)? == "connected");
    drop(holder.child().stdin.take());
    finish(holder, SOON)?;
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn udp_connected_and_unconnected() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    #[derive(Debug, serde::Deserialize)]
    struct Seen {
        connected: Vec<u16>,
        bound: Vec<u16>,
        bound6: u16,
        sent: String,
        unbound: String,
        probe: u16,
        other: u16,
        again: u16,
    }
    let a = lab.a().v4;
    let seen: Seen = run(
        &stand,
        &lab.c1().netns,
        &format!(
            r"
def udp(family=socket.AF_INET): return socket.socket(family, socket.SOCK_DGRAM)
def connected(to):
    s = udp(); s.connect(to); return s
def bound(family=socket.AF_INET):
    s = udp(family); s.bind(('', 0)); return s
c = [connected(('{a}', 5353)) for _ in range(40)]
b = [bound() for _ in range(5)]
first = port(c[0])
c[0].connect(('{a}', 5354))
print(json.dumps(dict(
    connected=[port(s) for s in c], bound=[port(s) for s in b], bound6=port(bound(socket.AF_INET6)),
    sent=code(lambda: b[0].sendto(b'x', ('{a}', 5353))),
    unbound=code(lambda: udp().sendto(b'x', ('{a}', 5353))),
    probe=port(connected(('{a}', 0))), other=port(connected(('127.0.0.1', 5353))), again=port(c[0]) - first)))
"
        ),
    )?;
    // 79 ports, of which 9 are set aside for unconnected sockets.
    let connected: BTreeSet<u16> = seen.connected.iter().copied().collect();
    let bound: BTreeSet<u16> = seen.bound.iter().copied().chain([seen.bound6]).collect();
    ensure!(
        connected.len() == 40 && connected.iter().all(|port| in_pool(*port) && *port < 61072),
        "{seen:?}"
    );
    ensure!(bound.len() == 6 && bound.iter().all(|port| (61072..=61080).contains(port)), "{seen:?}");
    ensure!(seen.sent == "connected" && seen.unbound == "EADDRNOTAVAIL", "{seen:?}");
    ensure!(!in_pool(seen.probe) && !in_pool(seen.other) && seen.again == 0, "{seen:?}");
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn ipv6_and_what_the_pool_is_not_for() -> Result<()> {
    let lab = Lab::builder().build()?;
    let settings = Settings {
        destinations: vec!["192.168.31.67/32".parse()?, lab.a().ip(Family::V6).into()],
        ..settings()?
    };
    let stand = Stand::new(&lab, &settings)?;
    let _server = serve(&lab.a().netns, &[8080])?;
    let _other = serve(&lab.b().netns, &[8080])?;
    let (a, b) = (lab.a().at(Family::V6, 8080), lab.b().at(Family::V4, 8080));
    let [six, mapped, other]: [u16; 3] = run(
        &stand,
        &lab.c1().netns,
        &format!(
            r"print(json.dumps([port(tcp(('{}', 8080), socket.AF_INET6)), port(tcp(('::ffff:{}', 8080), socket.AF_INET6)), port(tcp(('{}', 8080)))]))",
            a.ip(),
            lab.a().v4,
            b.ip()
        ),
    )?;
    ensure!(in_pool(six) && in_pool(mapped), "{six} {mapped}");
    ensure!(!in_pool(other), "{other} for {}", b);
    ensure!(stand.settled(SOON)? == 2);
    Ok(())
}

#[test]
fn sockets_outside_the_pool_only_cost_another_try() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, &[8080])?;
    let foreign: Vec<u16> = (61001..=61080).step_by(4).collect();
    let _foreign = serve(&lab.c1().netns, &foreign)?;
    let ports: Vec<u16> = run(
        &stand,
        &lab.c1().netns,
        &format!(
            "s = [tcp(('{}', 8080)) for _ in range(30)]\nprint(json.dumps([port(c) for c in s]))",
            lab.a().v4
        ),
    )?;
    ensure!(ports.iter().all(|port| in_pool(*port) && !foreign.contains(port)), "{ports:?}");
    ensure!(stand.counter(counter::BIND_RETRIES)? > 0);
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn the_only_port_that_no_other_socket_has_bound_is_found() -> Result<()> {
    let lab = Lab::builder().build()?;
    let hundred = PortRange { first: 61001, last: 61100 };
    // Without a share, so that the other namespace may take all.
    let settings = Settings { ports: vec![hundred], exclude: vec![], quota: Some(100), ..settings()? };
    let stand = Stand::new(&lab, &settings)?;
    let _server = serve(&lab.a().netns, &[8080])?;
    for (family, kind, free) in [
        ("AF_INET", "SOCK_STREAM", 61006),
        ("AF_INET6", "SOCK_STREAM", 61007),
        ("AF_INET", "SOCK_DGRAM", 61008),
        ("AF_INET6", "SOCK_DGRAM", 61009),
    ] {
        let to = if family == "AF_INET" { lab.a().ip(Family::V4) } else { lab.a().ip(Family::V6) };
        let script = format!(
            "def new(): return socket.socket(socket.{family}, socket.{kind})\n\
             def connect():\n    s = new()\n    s.connect(('{to}', 8080))\n    return s\n\
             others = []\n\
             for p in range(61001, 61101):\n    if p != {free}:\n        s = new()\n        s.bind(('', p))\n        others.append(s)\n\
             first = connect()\nprint(json.dumps([port(first), code(connect)]))"
        );
        let (first, second): (u16, String) = run(&stand, &lab.c1().netns, &script)?;
        ensure!(first == free && second == "EADDRNOTAVAIL", "{family} {kind}: {first} {second}");
    }
    // A port whose bind failed is as free as before: another namespace gets all that this one has not used.
    let script = format!(
        "to = ('{}', 8080)\ns = [tcp(to) for _ in range(99)]\nprint(json.dumps([port(c) for c in s]))",
        lab.a().v4
    );
    let elsewhere: BTreeSet<u16> = run(&stand, &lab.c2().netns, &script)?;
    ensure!(elsewhere.len() == 99 && !elsewhere.contains(&61006), "{elsewhere:?}");
    stand.settled(SOON)?;
    Ok(())
}

/// A peer without TCP timestamps, as many controllers are: a port whose connection this end closed first stays in TIME_WAIT
/// towards it for a minute.
#[test]
fn a_port_in_time_wait_is_given_to_nobody_while_others_are_free() -> Result<()> {
    const COUNT: u32 = 60;
    let lab = Lab::builder().second_host().build()?;
    let hundred = PortRange { first: 61001, last: 61100 };
    let stand = Stand::new(&lab, &Settings { ports: vec![hundred], exclude: vec![], ..settings()? })?;
    lab.a2().netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    // On a slow machine the peer repeats its FIN, and answers the second ACK with an RST, which ends TIME_WAIT (RFC 1337).
    lab.c1().netns.set_sysctl("ipv4/tcp_rfc1337", "1")?;
    let _with = serve_until_closed(&lab.a().netns, &[8080])?;
    let _without = serve_until_closed(&lab.a2().netns, &[8080])?;
    for family in Family::BOTH {
        let (kind, with, without) = match family {
            Family::V4 => ("AF_INET", lab.a().ip(family), lab.a2().ip(family)),
            Family::V6 => ("AF_INET6", lab.a().ip(family), lab.a2().ip(family)),
        };
        let script = format!(
            "def round(to):\n    s = tcp((to, 8080), socket.{kind})\n    p = port(s)\n    s.shutdown(socket.SHUT_WR)\n    \
             while s.recv(100): pass\n    s.close()\n    return p\n\
             def many(to, n): return [code(lambda: ports.append(round(to))) for _ in range(n)].count('connected')\n\
             ports = []\nfirst = many('{without}', {COUNT})\nused = len(set(ports))\n\
             second = many('{with}', 200)\nrest = many('{without}', 100)\n\
             print(json.dumps([first, used, second, rest]))"
        );
        let (first, used, second, rest): (u32, u32, u32, u32) = run(&stand, &lab.c1().netns, &script)?;
        ensure!(first == COUNT && used == COUNT, "{family:?}: {first} connections from {used} ports");
        ensure!(second == 200, "{family:?}: {second} of 200 to a peer with timestamps");
        // The kernel's own range of these ports gives no more either.
        ensure!(rest == 100 - COUNT, "{family:?}: {rest} further connections, of 40 that are possible");
    }
    ensure!(stand.counter(counter::RESTS)? == 200, "{} rests", stand.counter(counter::RESTS)?);
    ensure!(stand.counter(counter::CONNECT_FAILURES)? == 0);
    ensure!(stand.counter(counter::REFUSALS + Refusal::RESTING.0)? == 2 * u64::from(COUNT));
    stand.settled(SOON)?;
    Ok(())
}
