//! `bind` to port 0 by programs that know nothing of the pool, and protocols that it does not serve.

use std::{collections::BTreeSet, io::Read as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Event, Refusal, counter};
use bridge_lab::{
    lab::{Family, Lab, Netns},
    pool::{Stand, end, line, output, python, serve},
};

const PORTS: PortRange = PortRange { first: 61001, last: 61100 };
const SOON: Duration = Duration::from_secs(30);

const PRELUDE: &str = r"
import json, socket
def port(s): return s.getsockname()[1]
";

fn settings() -> Result<Settings> {
    let destinations = vec!["192.168.31.0/24".parse()?, "fd00::/8".parse()?, "2001:db8::/32".parse()?];
    Ok(Settings { ports: vec![PORTS], destinations, ..Settings::default() })
}

fn run<T: serde::de::DeserializeOwned>(stand: &Stand, netns: &Netns, script: &str) -> Result<T> {
    let text = output(netns, stand.hooked(python(&format!("{PRELUDE}{script}"))), SOON)?;
    serde_json::from_str(&text).with_context(|| text)
}

#[test]
fn a_tcp_socket_that_binds_port_0_connects_from_the_pool() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = lab.a().v4;
    let (own, any) = (lab.c1().v4.to_string(), "0.0.0.0");
    for address in [own.as_str(), any] {
        // As many at once as there are ports: each has its own.
        let script = format!(
            "def one():\n    s = socket.socket()\n    s.bind(('{address}', 0))\n    before = port(s)\n    s.connect(('{to}', 8080))\n    \
             assert port(s) == before\n    return s\nprint(json.dumps([port(s) for s in [one() for _ in range(100)]]))"
        );
        let ports: Vec<u16> = run(&stand, &lab.c1().netns, &script)?;
        let different: BTreeSet<u16> = ports.iter().copied().collect();
        ensure!(different.len() == 100 && different.iter().all(|port| PORTS.contains(*port)), "{ports:?}");
        stand.settled(SOON)?;
    }
    ensure!(stand.counter(counter::ADOPTIONS)? == 200);
    let refusals: u64 =
        (1..Refusal::COUNT).map(|code| stand.counter(counter::REFUSALS + code)).sum::<Result<_>>()?;
    ensure!(refusals == 0, "{refusals} refusals");
    Ok(())
}

#[test]
fn an_ipv6_socket_that_binds_port_0_connects_from_the_pool() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let listener = lab.a().netns.run(|| std::net::TcpListener::bind("[::]:8080"))?;
    let script = format!(
        "s = socket.socket(socket.AF_INET6)\ns.bind(('::', 0))\ns.connect(('{}', 8080))\nprint(json.dumps(port(s)))",
        lab.a().ip(Family::V6)
    );
    let port: u16 = run(&stand, &lab.c1().netns, &script)?;
    ensure!(PORTS.contains(port) && listener.accept()?.1.port() == port, "{port}");
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn servers_on_port_0_never_meet_a_port_in_use() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    // Three times as many servers as ports: the kernel's own range serves the others.
    let script = "def one():\n    s = socket.socket()\n    s.bind(('', 0))\n    s.listen()\n    return s\n\
                  print(json.dumps([port(s) for s in [one() for _ in range(300)]]))";
    let ports: Vec<u16> = run(&stand, &lab.c1().netns, script)?;
    ensure!(ports.iter().collect::<BTreeSet<_>>().len() == 300, "{ports:?}");
    let outside = Settings { strict: false, ..settings()? };
    drop(stand);
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &outside)?;
    let ports: Vec<u16> = run(&stand, &lab.c1().netns, script)?;
    ensure!(
        !ports.iter().any(|port| PORTS.contains(*port)),
        "a pool that is not strict leaves bind alone: {ports:?}"
    );
    Ok(())
}

#[test]
fn udp_sockets_on_port_0_get_random_ports_and_leave_some_to_others() -> Result<()> {
    let lab = Lab::builder().build()?;
    let wide = PortRange { first: 61001, last: 63000 };
    let stand = Stand::new(&lab, &Settings { ports: vec![wide], ..settings()? })?;
    // The highest eighth, 250 ports, is set aside for these.
    let script = |count: u32| {
        format!(
            "def one():\n    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n        s.bind(('', 0))\n        \
             return port(s)\nprint(json.dumps([one() for _ in range({count})]))"
        )
    };
    let few: Vec<u16> = run(&stand, &lab.c1().netns, &script(20))?;
    let different = few.iter().collect::<BTreeSet<_>>().len();
    ensure!(different >= 12, "{different} ports of 20: {few:?}");
    let ascending = few.windows(2).filter(|pair| pair[0] < pair[1]).count();
    ensure!((3..=16).contains(&ascending), "they can be foretold: {few:?}");
    // Spread over all of them: each of the four words of the bitmap has its part.
    let many: Vec<u16> = run(&stand, &lab.c1().netns, &script(2000))?;
    let different: BTreeSet<u16> = many.iter().copied().collect();
    ensure!(different.iter().all(|port| (62751..=63000).contains(port)), "{different:?}");
    ensure!((80..=200).contains(&different.len()), "{} ports of 2000", different.len());
    let most = many.iter().filter(|port| **port == many[0]).count();
    ensure!(most < 100, "one port {most} times of 2000");
    // Another namespace finds ports that this one has left.
    let others: Vec<u16> = run(&stand, &lab.c2().netns, &script(200))?;
    let others: BTreeSet<u16> = others.into_iter().collect();
    ensure!(others.iter().all(|port| wide.contains(*port)), "{others:?}");
    ensure!(others.len() >= 20 && others.is_disjoint(&different), "{} ports", others.len());
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn udp_lite_does_not_leave_from_outside_a_strict_pool() -> Result<()> {
    let script = "print(json.dumps(code(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136))))";
    let lab = Lab::builder().build()?;
    let mut stand = Stand::new(&lab, &settings()?)?;
    let mut events = stand.pool.take_events().context("no events")?;
    let seen: String = run(&stand, &lab.c1().netns, script)?;
    ensure!(seen == "EPROTONOSUPPORT", "{seen}");
    ensure!(stand.counter(counter::REFUSALS + Refusal::PROTOCOL.0)? == 1);
    let event = events.next().context("no event")?;
    ensure!(event.len() >= size_of::<Event>());
    drop(event);
    // TCP and UDP go on; and so does UDP-Lite where the pool is not strict.
    let udp: u16 = run(
        &stand,
        &lab.c1().netns,
        &format!(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.connect(('{}', 53))\nprint(json.dumps(port(s)))",
            lab.a().v4
        ),
    )?;
    ensure!(PORTS.contains(udp), "{udp}");
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &Settings { strict: false, ..settings()? })?;
    let seen: String = run(&stand, &lab.c1().netns, script)?;
    ensure!(seen == "connected", "{seen}");
    Ok(())
}

/// A datagram to an address leaves from a port that no other socket uses towards it, whatever the socket did before.
#[test]
fn datagrams_to_an_address_never_leave_from_a_port_of_another_socket() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    for (family, kind) in [(Family::V4, "AF_INET"), (Family::V6, "AF_INET6")] {
        let to = lab.a().ip(family);
        let new = format!(
            "def udp(port=None):\n    s = socket.socket(socket.{kind}, socket.SOCK_DGRAM)\n    \
                           s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n    if port: s.bind(('', port))\n    return s\n"
        );
        let mut command = python(&format!(
            "{PRELUDE}{new}import sys\ns = udp()\ns.connect(('{to}', 53))\nprint(port(s), flush=True)\nsys.stdin.read()"
        ));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = lab.c1().netns.spawn_command(stand.hooked(command))?;
        let taken: u16 = line(&mut holder)?.parse()?;
        let free = if taken == PORTS.first { taken + 1 } else { taken - 1 };
        let outside = 40000;
        // The last two: connected elsewhere, then back to no destination.
        let script = format!(
            "{new}import ctypes\ndef disconnect(s): assert ctypes.CDLL(None).connect(s.fileno(), bytes(16), 16) == 0\n\
             def moved(p):\n    s = udp(p)\n    s.connect(('{to}', 54))\n    disconnect(s)\n    return s\n\
             seen = [code(lambda: s.sendto(b'x', ('{to}', 53))) for s in (udp({taken}), udp({free}), udp({outside}), moved({taken}), moved({free}))]\n\
             print(json.dumps(seen))"
        );
        let seen: Vec<String> = run(&stand, &lab.c2().netns, &script)?;
        ensure!(
            seen == ["EADDRNOTAVAIL", "connected", "EADDRNOTAVAIL", "EADDRNOTAVAIL", "connected"],
            "{kind}: {seen:?}"
        );
        // And the port that it was sent from stays with that namespace.
        let script = format!("{new}print(json.dumps(code(lambda: udp({free}).connect(('{to}', 53)))))");
        let seen: [String; 2] =
            [run(&stand, &lab.c1().netns, &script)?, run(&stand, &lab.c2().netns, &script)?];
        ensure!(seen == ["EADDRNOTAVAIL", "connected"], "{kind}: {seen:?}");
        // A port of those for every destination is one for all sockets.
        let script = format!(
            "{new}first, second = udp(61099), udp(61099)\nseen = [code(lambda: s.connect(('{to}', p))) for s, p in ((first, 53), (second, 54), (udp(61100), 54))]\n\
             print(json.dumps([seen, port(first)]))"
        );
        let (seen, used): (Vec<String>, u16) = run(&stand, &lab.c2().netns, &script)?;
        ensure!(seen == ["connected", "EADDRNOTAVAIL", "connected"] && used == 61099, "{kind}: {seen:?}");
        end(holder)?;
    }
    stand.settled(SOON)?;
    Ok(())
}

/// Subflows of MPTCP are the kernel's own sockets, for which no release hook runs.
#[test]
fn mptcp_sockets_give_their_ports_back() -> Result<()> {
    let lab = Lab::builder().build()?;
    // Fewer ports than connections of one kind.
    let stand =
        Stand::new(&lab, &Settings { ports: vec![PortRange { first: 61001, last: 61016 }], ..settings()? })?;
    let mut server = python(
        r"
import selectors, socket
sel = selectors.DefaultSelector()
for protocol, port in ((262, 8080), (6, 8081)):
    s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, protocol)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(('::', port))
    s.listen(4096)
    sel.register(s, selectors.EVENT_READ, 1)
print('ready', flush=True)
while True:
    for key, _ in sel.select():
        s = key.fileobj
        if key.data:
            sel.register(s.accept()[0], selectors.EVENT_READ, 0)
            continue
        try: data = s.recv(4096)
        except OSError: data = b''
        if not data:
            sel.unregister(s)
            s.close()
",
    );
    server.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = lab.a().netns.spawn_command(server)?;
    server.child().stdout.as_mut().context("a pipe")?.read_exact(&mut [0; 6])?;
    let mut connections = 0;
    for (family, kind) in [(Family::V4, "AF_INET"), (Family::V6, "AF_INET6")] {
        let to = lab.a().ip(family);
        // A peer with MPTCP, one without, and a port that refuses; closed, and closed with an RST.
        let script = format!(
            r"
import struct, time
def one(to, reset):
    s = socket.socket(socket.{kind}, socket.SOCK_STREAM, 262)
    s.connect(to)
    seen.add(port(s))
    if reset: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.close()
def retried(f):
    # The kernel ends a subflow some time after its socket was closed.
    end = time.monotonic() + 10
    while True:
        result = code(f)
        if result != 'EADDRNOTAVAIL' or time.monotonic() > end: return result
        time.sleep(0.01)
seen = set()
results = []
for to in (8080, 8081, 8082):
    for reset in (0, 1):
        for _ in range(50): results.append(retried(lambda: one(('{to}', to), reset)))
print(json.dumps([[results.count(x) for x in ('connected', 'ECONNREFUSED')], len(results), sorted(seen)]))"
        );
        let ([connected, refused], all, ports): ([u32; 2], u32, Vec<u16>) =
            run(&stand, &lab.c1().netns, &script)?;
        ensure!((connected, refused, all) == (200, 100, 300), "{kind}: {connected} {refused} of {all}");
        ensure!(ports.iter().all(|port| (61001..=61016).contains(port)), "{ports:?}");
        connections += all;
        let claims = stand.settled(SOON)?;
        ensure!(claims == u64::from(connections), "{claims} claims of {connections} connections");
    }
    Ok(())
}
