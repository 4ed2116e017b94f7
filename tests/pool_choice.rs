//! Which port a socket gets whose destination is not known yet, or changes: connects succeed as long as a port is free.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Refusal, counter};
use bridge_lab::{
    lab::{Family, Lab, Netns, Process},
    pool::{Stand, end, line, output, python},
};

const PORTS: PortRange = PortRange { first: 61001, last: 61100 };
const SOON: Duration = Duration::from_secs(60);

const PRELUDE: &str = r"
import json, socket, sys
def port(s): return s.getsockname()[1]
def bound(kind):
    s = socket.socket(kind)
    s.settimeout(10)
    s.bind(('', 0))
    return s
def one(kind, to):
    s = bound(kind)
    s.connect(to)
    return s
def plain(kind, to):
    s = socket.socket(kind)
    s.settimeout(10)
    s.connect(to)
    return s
def tally(results): return {x: results.count(x) for x in set(results)}
";

/// Results, and how often each came.
type Tally = BTreeMap<String, u32>;

/// A pool without a share, so that a namespace may take all ports that another one does not.
fn stand(lab: &Lab) -> Result<Stand> {
    let destinations = vec!["192.168.31.0/24".parse()?, "fd00::/8".parse()?, "2001:db8::/32".parse()?];
    let quota = Some(u32::from(PORTS.last - PORTS.first) + 1);
    Stand::new(lab, &Settings { ports: vec![PORTS], destinations, quota, ..Settings::default() })
}

fn run<T: serde::de::DeserializeOwned>(stand: &Stand, netns: &Netns, script: &str) -> Result<T> {
    let text = output(netns, stand.hooked(python(&format!("{PRELUDE}{script}"))), SOON)?;
    serde_json::from_str(&text).with_context(|| text)
}

/// Runs a hooked program that prints a line, and keeps its sockets until its standard input ends.
fn hold(stand: &Stand, netns: &Netns, script: &str) -> Result<(Process, String)> {
    let mut command = python(&format!("{PRELUDE}{script}\nsys.stdin.read()"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(stand.hooked(command))?;
    let text = line(&mut process)?;
    Ok((process, text))
}

/// Accepts TCP of both families.
fn serve(netns: &Netns) -> Result<Process> {
    let mut command = python(
        "import socket, sys\nl = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)\n\
         print('ready', flush=True)\nkept = []\nwhile True: kept.append(l.accept()[0])",
    );
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    ensure!(line(&mut process)? == "ready");
    Ok(process)
}

fn family(lab: &Lab, family: Family) -> (&'static str, String) {
    let kind = if family == Family::V4 { "socket.AF_INET" } else { "socket.AF_INET6" };
    (kind, format!("('{}', 8080)", lab.a().ip(family)))
}

#[test]
fn a_tcp_socket_that_binds_port_0_connects_as_long_as_a_port_is_free() -> Result<()> {
    for which in Family::BOTH {
        let lab = Lab::builder().build()?;
        let stand = stand(&lab)?;
        let _server = serve(&lab.a().netns)?;
        let (kind, to) = family(&lab, which);
        // Another pod has half of the ports.
        let others = format!("held = [plain({kind}, {to}) for _ in range(50)]\nprint(len(held), flush=True)");
        let (other, text) = hold(&stand, &lab.c2().netns, &others)?;
        ensure!(text == "50", "{text}");
        // One after the other, and many that are bound before the first of them connects.
        let half = format!(
            "held = [one({kind}, {to}) for _ in range(25)]\nlate = [bound({kind}) for _ in range(25)]\n\
             results = [code(lambda: s.connect({to})) for s in late]\n"
        );
        let script = format!(
            "{half}full = code(lambda: one({kind}, {to}))\nprint(json.dumps([tally(results), full, len(set(map(port, held + late)))]), flush=True)"
        );
        let (own, text) = hold(&stand, &lab.c1().netns, &script)?;
        ensure!(text == r#"[{"connected": 25}, "EADDRNOTAVAIL", 50]"#, "{which:?}: {text}");
        [own, other].into_iter().try_for_each(end)?;
        stand.settled(SOON)?;
        // The ports of the other pod are not free for this one yet; its own are.
        let again: Tally = run(&stand, &lab.c1().netns, &format!("{half}print(json.dumps(tally(results)))"))?;
        ensure!(again == [("connected".to_owned(), 25)].into(), "{which:?}: {again:?}");
        stand.settled(SOON)?;
        let (taken, outside) = (Refusal::TAKEN.0, Refusal::OUTSIDE.0);
        ensure!(stand.counter(counter::REFUSALS + outside)? == 0);
        ensure!(stand.counter(counter::REFUSALS + taken)? == 1, "the one for which no port was free");
    }
    Ok(())
}

#[test]
fn servers_on_port_0_leave_ports_to_clients_of_their_namespace() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = stand(&lab)?;
    let _server = serve(&lab.a().netns)?;
    for which in Family::BOTH {
        let (kind, to) = family(&lab, which);
        let script = format!(
            "servers = [bound({kind}) for _ in range(300)]\nfor s in servers: s.listen()\n\
             ports = [port(s) for s in servers]\n\
             clients = [code(lambda: held.append(plain({kind}, {to}))) for held in [[]] for _ in range(45)]\n\
             for s in servers: s.close()\n\
             after = [code(lambda: held.append(one({kind}, {to}))) for held in [[]] for _ in range(45)]\n\
             print(json.dumps([ports, tally(clients), tally(after)]))"
        );
        let (servers, clients, after): (Vec<u16>, Tally, Tally) = run(&stand, &lab.c1().netns, &script)?;
        ensure!(servers.iter().collect::<BTreeSet<_>>().len() == 300, "{servers:?}");
        let of_pool = servers.iter().filter(|port| PORTS.contains(**port)).count();
        ensure!(of_pool == 50, "{which:?}: {of_pool} ports of the pool have a server");
        let all = Tally::from([("connected".to_owned(), 45)]);
        ensure!(clients == all && after == all, "{which:?}: {clients:?}, without servers {after:?}");
        stand.settled(SOON)?;
    }
    Ok(())
}

/// A socket keeps its port when it is connected to another destination: that must be free there as well.
#[test]
fn a_socket_that_is_connected_again_has_a_port_that_is_free_there() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = stand(&lab)?;
    let _server = serve(&lab.a().netns)?;
    for which in Family::BOTH {
        let (kind, to) = family(&lab, which);
        let other = to.replace("8080", "53");
        let udp =
            "def udp(to):\n    s = socket.socket(KIND, socket.SOCK_DGRAM)\n    s.connect(to)\n    return s\n"
                .replace("KIND", kind);
        // UDP: a sixth of the ports are in use by each of two pods, towards one destination.
        let script = format!("{udp}held = [udp({to}) for _ in range(15)]\nprint(len(held), flush=True)");
        let (beside, text) = hold(&stand, &lab.c2().netns, &script)?;
        ensure!(text == "15", "{text}");
        let script = format!(
            "import ctypes\n{udp}held = [udp({to}) for _ in range(15)]\n\
             def disconnect(s): assert ctypes.CDLL(None).connect(s.fileno(), bytes(28), 28) == 0\n\
             def again(n):\n    s = udp({other})\n    if n % 2: disconnect(s)\n    s.connect({to})\n    s.connect({other})\n\
             print(json.dumps(tally([code(lambda: again(n)) for n in range(20)])))"
        );
        let seen: serde_json::Value = run(&stand, &lab.c1().netns, &script)?;
        ensure!(seen == serde_json::json!({"connected": 20}), "{which:?}, UDP: {seen}");
        end(beside)?;
        // TCP: refused by one destination, then connected to another one.
        let refused = to.replace("8080", "9999");
        let script = format!(
            "import struct\nheld = [plain({kind}, {to}) for _ in range(10)]\ndef again():\n    s = socket.socket({kind})\n    \
             s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n    assert code(lambda: s.connect({refused})) == 'ECONNREFUSED'\n    s.connect({to})\n\
             print(json.dumps(tally([code(again) for _ in range(20)])))"
        );
        let seen: serde_json::Value = run(&stand, &lab.c1().netns, &script)?;
        ensure!(seen == serde_json::json!({"connected": 20}), "{which:?}, TCP: {seen}");
        stand.settled(SOON)?;
    }
    Ok(())
}
