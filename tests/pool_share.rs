//! A pod that connects to very many destinations leaves the pool to others.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{model::PortRange, pool::Settings};
use bridge_common::pool::{Refusal, counter};
use bridge_lab::{
    lab::{Lab, Netns},
    pool::{Stand, output, python},
};

const SOON: Duration = Duration::from_secs(120);

fn stand(lab: &Lab, ports: PortRange) -> Result<Stand> {
    let destinations = vec!["192.168.31.0/24".parse()?, "fd00::/8".parse()?, "2001:db8::/32".parse()?];
    Stand::new(lab, &Settings { ports: vec![ports], destinations, ..Settings::default() })
}

fn run<T: serde::de::DeserializeOwned>(stand: &Stand, netns: &Netns, script: &str) -> Result<T> {
    let prelude = r"
import json, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
";
    let text = output(netns, stand.hooked(python(&format!("{prelude}{script}"))), SOON)?;
    serde_json::from_str(&text).with_context(|| text)
}

/// Connects to new destinations with UDP and TCP of both families; all succeed.
fn others_connect(lab: &Lab, stand: &Stand) -> Result<()> {
    let _server = bridge_lab::pool::serve(&lab.a().netns, 8080)?;
    let script = format!(
        "def one(kind, to):\n    with socket.socket(socket.AF_INET6 if ':' in to[0] else socket.AF_INET, kind) as s: s.connect(to)\n\
         results = [code(lambda: one(socket.SOCK_DGRAM, (to, 40000 + n))) for to in ('{}', '{}') for n in range(100)]\n\
         results.append(code(lambda: one(socket.SOCK_STREAM, ('{}', 8080))))\n\
         print(json.dumps([results.count('connected'), len(results), sorted(set(results))]))",
        lab.a().v4,
        lab.a().ip(bridge_lab::lab::Family::V6),
        lab.a().v4,
    );
    let (connected, all, results): (u32, u32, Vec<String>) = run(stand, &lab.c2().netns, &script)?;
    ensure!(connected == all, "{connected} of {all}: {results:?}");
    Ok(())
}

#[test]
fn a_socket_that_connects_everywhere_costs_other_pods_nothing_and_its_slots_come_back() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut stand = stand(&lab, PortRange { first: 61001, last: 61100 })?;
    // One socket, and no packet.
    let everywhere = |first: u32| {
        format!(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
             results = [code(lambda: s.connect(('192.168.31.%d' % (1 + n // 50000), 1 + n % 50000))) for n in range({first}, {first} + 40000)]\n\
             print(json.dumps([results.count(x) for x in ('connected', 'EADDRNOTAVAIL')]))"
        )
    };
    let (connected, refused): (u32, u32) = run(&stand, &lab.c1().netns, &everywhere(0))?;
    ensure!((connected, refused) == (40000, 0), "{connected} {refused}");
    others_connect(&lab, &stand)?;
    // Beyond its share, each new destination takes the place of one that it does not use any more.
    let (again, refused): (u32, u32) = run(&stand, &lab.c1().netns, &everywhere(40000))?;
    ensure!((again, refused) == (40000, 0), "{again} {refused}");
    others_connect(&lab, &stand)?;
    stand.settled(SOON)?;
    let refusals: u64 =
        (1..Refusal::COUNT).map(|code| stand.counter(counter::REFUSALS + code)).sum::<Result<_>>()?;
    ensure!(refusals == 0, "{refusals} refusals");
    // Nothing is held: two rounds of the agent take all back.
    let retired: u32 =
        [stand.pool.sweep(|_, _| false)?, stand.pool.sweep(|_, _| false)?].iter().map(|s| s.retired).sum();
    ensure!(retired >= 2 * 20000 && !stand.pool.tables().is_short_of_slots(), "{retired} slots");
    Ok(())
}

#[test]
fn a_pod_that_holds_sockets_to_thousands_of_destinations_costs_others_nothing() -> Result<()> {
    let lab = Lab::builder().build()?;
    // A pool so wide that its memory suffices for few destinations.
    let stand = stand(&lab, PortRange { first: 2048, last: 62000 })?;
    let script = |kind: &str| {
        format!(
            "held = []\n\
             def one(n):\n    s = socket.socket(socket.AF_INET, socket.{kind})\n    s.setblocking(False)\n    held.append(s)\n    \
             try: s.connect(('192.168.31.200', 1 + n))\n    except BlockingIOError: pass\n\
             results = [code(lambda: one(n)) for n in range(3000)]\n\
             print(json.dumps([results.count(x) for x in ('connected', 'EADDRNOTAVAIL')]))"
        )
    };
    for kind in ["SOCK_DGRAM", "SOCK_STREAM"] {
        let (connected, refused): (u32, u32) = run(&stand, &lab.c1().netns, &script(kind))?;
        ensure!(connected + refused == 3000, "{kind}: {connected} {refused}");
        others_connect(&lab, &stand)?;
    }
    ensure!(stand.counter(counter::REFUSALS + Refusal::SHARE.0)? > 0);
    ensure!(stand.counter(counter::REFUSALS + Refusal::TABLE_FULL.0)? == 0);
    Ok(())
}
