//! The agent on the node: traffic that it allows and denies, and state that outlives it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_common::ABI_VERSION;
use serde_json::Value;

use super::{Scene, Seen, Stage};
use crate::agent::Agent;
use crate::lab::{Family, Host};
use crate::traffic::{Attempt, tcp, udp};

/// In their order.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "first start of the agent under a live connection that no rule allows",
        expected: "the connection lives, a new one is refused",
        run: first_start,
    },
    Scene {
        name: "LAN host to pod: allowed range 60001-60100, each end and one beyond",
        expected: "60000 refused, 60001 and 60100 reached, 60101 refused",
        run: ends_of_a_range,
    },
    Scene {
        name: "LAN host to pod: a port that no rule names",
        expected: "refused in under 100 ms, TCP and UDP",
        run: denied,
    },
    Scene {
        name: "pod to LAN host: an allowed port from allowed source ports, from others, and another port",
        expected: "8443 from 61001 and 61100 reached with its replies; from 61000, 61101 and to 8444 refused",
        run: reverse,
    },
    Scene {
        name: "kill -9 of the agent under a connection",
        expected: "the connection lives, the denied port stays refused",
        run: killed,
    },
    Scene {
        name: "restart of the agent under the same connection",
        expected: "the connection lives, the denied port stays refused",
        run: restarted,
    },
    Scene {
        name: "audit mode: the denied port",
        expected: "reached, and counted as would-be denials",
        run: audit,
    },
    Scene {
        name: "the same rules in iptables beside eBPF, three connections",
        expected: "the rule counts 6 in both engines (IPv4 and IPv6)",
        run: both_engines,
    },
    Scene { name: "bpftool map dump of flows, policy and counters", expected: "fields by name", run: dump },
];

const PATIENCE: Duration = Duration::from_secs(1);
const AT_ONCE: Duration = Duration::from_millis(100);
const DENIED: u16 = 40003;

/// Configuration of the agent in the scenes; `mode` is `enforce` or `audit`.
fn config(mode: &str) -> String {
    config_with(mode, "ebpf")
}

fn config_with(mode: &str, engines: &str) -> String {
    format!(
        r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  mode: {mode}
  engines: [{engines}]
  onDeny: reject
rules:
  - {{name: lan-to-pod, direction: inbound, protocol: tcp, ports: [40002, "60001-60100"], action: allow}}
  - {{name: pod-to-lan, direction: outbound, protocol: tcp, ports: [8443], sourcePorts: ["61001-61100"], action: allow}}
persistence: {{save: never}}
"#
    )
}

/// A connection that is kept open from scene to scene.
#[derive(Debug)]
pub(super) struct Held {
    server: tcp::Server,
    connection: tcp::Connection,
}

impl Held {
    fn open(client: &Host, server: &Host, port: u16) -> Result<Self> {
        let server = tcp::Server::echo(&server.netns, server.at(Family::V4, port))?;
        let mut connection = tcp::Client::new(&client.netns).connect(server.address())?.reached()?;
        connection.round_trip(PATIENCE)?;
        Ok(Self { server, connection })
    }

    /// Time of a round trip, in words.
    fn round_trip(&mut self) -> Result<String> {
        let time = self.connection.round_trip(PATIENCE).context("the connection is dead")?;
        Ok(format!("answers in {:.1} ms", time.as_secs_f64() * 1e3))
    }
}

/// Connects by TCP to a real listener in both families, and has one round trip if it can.
fn connect(
    client: &Host,
    server: &Host,
    source: u16,
    port: u16,
    expected: fn(&Attempt<()>) -> bool,
) -> Result<Vec<(String, Attempt<()>, bool)>> {
    let mut attempts = Vec::new();
    for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let echo = tcp::Server::echo(&server.netns, server.at(family, port))?;
        let client = tcp::Client::new(&client.netns).source_port(source);
        let (connection, attempt) = client.connect(echo.address())?.split();
        if let Some(mut connection) = connection {
            connection.round_trip(PATIENCE)?;
            // The same ports are used again by the next one.
            connection.reset()?;
        }
        let ok = expected(&attempt);
        let from = if source == 0 { String::new() } else { format!("from {source} ") };
        attempts.push((format!("{name} {from}to {port}"), attempt, ok));
    }
    Ok(attempts)
}

fn refused_at_once<T>(attempt: &Attempt<T>) -> bool {
    attempt.refused() && attempt.elapsed < AT_ONCE
}

fn agent(stage: &mut Stage) -> Result<&mut Agent> {
    stage.agent.as_mut().context("the agent was started by a scene before")
}

fn first_start(stage: &mut Stage) -> Result<Seen> {
    let mut held = Held::open(stage.lab.a(), stage.lab.c1(), 22222)?;
    stage.agent = Some(Agent::start(&stage.lab, stage.lab.b(), &config("enforce"))?);
    let text = held.round_trip()?;
    let (_, again) = tcp::Client::new(&stage.lab.a().netns).connect(held.server.address())?.split();
    Ok(Seen { text: format!("{text}; a new one is {again}"), ok: refused_at_once(&again) })
}

fn ends_of_a_range(stage: &mut Stage) -> Result<Seen> {
    let (a, c1) = (stage.lab.a(), stage.lab.c1());
    let mut attempts = connect(a, c1, 0, 60000, refused_at_once)?;
    attempts.extend(connect(a, c1, 0, 60001, Attempt::succeeded)?);
    attempts.extend(connect(a, c1, 0, 60100, Attempt::succeeded)?);
    attempts.extend(connect(a, c1, 0, 60101, refused_at_once)?);
    Ok(Seen::attempts(attempts))
}

fn denied(stage: &mut Stage) -> Result<Seen> {
    let (a, c1) = (stage.lab.a(), stage.lab.c1());
    let mut attempts = connect(a, c1, 0, DENIED, refused_at_once)?;
    for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let _server = udp::Server::echo(&c1.netns, c1.at(family, DENIED))?;
        let attempt = udp::ask(&a.netns, 0, c1.at(family, DENIED), b"?", PATIENCE)?;
        let ok = refused_at_once(&attempt);
        attempts.push((format!("{name} UDP"), attempt, ok));
    }
    Ok(Seen::attempts(attempts))
}

fn reverse(stage: &mut Stage) -> Result<Seen> {
    let (a, c1) = (stage.lab.a(), stage.lab.c1());
    let mut attempts = Vec::new();
    for source in [61001, 61100] {
        attempts.extend(connect(c1, a, source, 8443, Attempt::succeeded)?);
    }
    for source in [61000, 61101] {
        attempts.extend(connect(c1, a, source, 8443, refused_at_once)?);
    }
    attempts.extend(connect(c1, a, 61001, 8444, refused_at_once)?);
    Ok(Seen::attempts(attempts))
}

fn killed(stage: &mut Stage) -> Result<Seen> {
    stage.held = Some(Held::open(stage.lab.a(), stage.lab.c1(), 40002)?);
    agent(stage)?.kill()?;
    alive(stage)
}

fn restarted(stage: &mut Stage) -> Result<Seen> {
    agent(stage)?.restart()?;
    alive(stage)
}

fn alive(stage: &mut Stage) -> Result<Seen> {
    let text = stage.held.as_mut().context("a connection of the scene before")?.round_trip()?;
    let denied = Seen::attempts(connect(stage.lab.a(), stage.lab.c1(), 0, DENIED, refused_at_once)?);
    Ok(Seen { text: format!("{text}; {}", denied.text), ok: denied.ok })
}

fn audit(stage: &mut Stage) -> Result<Seen> {
    agent(stage)?.reload(&config("audit"))?;
    let before = no_rule(&map(stage, "audited")?);
    let reached = Seen::attempts(connect(stage.lab.a(), stage.lab.c1(), 0, DENIED, Attempt::succeeded)?);
    let counted = no_rule(&map(stage, "audited")?) - before;
    agent(stage)?.reload(&config("enforce"))?;
    Ok(Seen { text: format!("{}; {counted} counted", reached.text), ok: reached.ok && counted == 2 })
}

fn both_engines(stage: &mut Stage) -> Result<Seen> {
    agent(stage)?.reload(&config_with("enforce", "ebpf, iptables"))?;
    let (ebpf, _) = counts(stage)?;
    let mut reached = true;
    for _ in 0..3 {
        reached &= Seen::attempts(connect(stage.lab.a(), stage.lab.c1(), 0, 60050, Attempt::succeeded)?).ok;
    }
    let (after, iptables) = counts(stage)?;
    let text = format!("lan-to-pod: {} in eBPF, {iptables} in iptables", after - ebpf);
    agent(stage)?.reload(&config("enforce"))?;
    Ok(Seen { text, ok: reached && after - ebpf == 6 && iptables == 6 })
}

/// How often the rule `lan-to-pod` decided, in eBPF and in iptables.
fn counts(stage: &mut Stage) -> Result<(u64, u64)> {
    let rules: Value = serde_json::from_str(&agent(stage)?.run(&["rules", "--json"])?)?;
    let rule = rules
        .as_array()
        .into_iter()
        .flatten()
        .find(|rule| rule["rule"] == "lan-to-pod" || rule["name"] == "lan-to-pod");
    let rule = rule.with_context(|| format!("the rule lan-to-pod in {rules}"))?;
    Ok((
        rule["hits"].as_u64().context("hits")?,
        rule["iptables"]["packets"].as_u64().context("packets in iptables")?,
    ))
}

/// A map of the agent as `bpftool map dump` shows it.
fn map(stage: &mut Stage, path: &str) -> Result<Value> {
    let pin = agent(stage)?.pins().join(format!("v{ABI_VERSION}")).join(path);
    let output = Command::new("bpftool").args(["--json", "map", "dump", "pinned"]).arg(&pin).output()?;
    ensure!(output.status.success(), "bpftool map dump of {}: {output:?}", pin.display());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Packets counted for want of a rule, over all directions and CPUs, in a dump of counters.
fn no_rule(dump: &Value) -> u64 {
    let rows = dump.as_array().into_iter().flatten();
    let cpus = rows.flat_map(|row| row["formatted"]["values"].as_array().into_iter().flatten());
    cpus.filter_map(|cpu| cpu["value"]["no_rule"]["packets"].as_u64()).sum()
}

fn dump(stage: &mut Stage) -> Result<Seen> {
    let flows = map(stage, "flows")?;
    let flow = &flows[0]["formatted"];
    let counters = map(stage, "counters")?;
    let counter = &counters[0]["formatted"]["values"][0]["value"]["established"];
    let slot =
        map(stage, "control")?[0]["formatted"]["value"]["word"].as_u64().context("the control word")? & 0xff;
    let policy = map(stage, &format!("policy/{slot}/rule_sets"))?;
    let set = &policy[0]["formatted"]["value"];
    let ok = flow["key"]["low_port"].is_array()
        && flow["value"]["state"].is_u64()
        && counter["packets"].is_u64()
        && set["roots"].is_array();
    let text = format!("flow state {}, counter {}, rule set {}", flow["value"]["state"], counter, set);
    Ok(Seen { text, ok })
}
