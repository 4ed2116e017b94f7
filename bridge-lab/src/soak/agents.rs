//! Work of the agents' operators.

use std::{
    fmt::Write as _,
    fs,
    io::Read as _,
    net::Ipv4Addr,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::pool::attach;
use serde_json::Value;

use super::{
    Course, REST,
    ledger::Sample,
    traffic::{IN, OUT},
};
use crate::{agent::Agent, lab::Lab, wait::eventually};

pub(super) const RELOAD: &str = "another policy";
pub(super) const REFUSED: &str = "a policy that is refused";
pub(super) const KILL: &str = "kill -9 and start";
pub(super) const STOP: &str = "stop and start";
pub(super) const REVERT: &str = "a trial that is taken back";
pub(super) const EXPIRE: &str = "a trial without confirmation";
pub(super) const SECOND: &str = "a second agent is refused";
pub(super) const ROUTES: &str = "other routes on the LAN host";
pub(super) const ROUTE_LOST: &str = "a route is deleted, and back";

const PAUSE: Duration = Duration::from_millis(300);

/// The fields in which policies differ.
pub(super) struct Policy {
    engines: &'static str,
    on_deny: &'static str,
    rules: u32,
    ports: &'static str,
}

impl Policy {
    pub(super) const USUAL: Self =
        Self { engines: "ebpf, iptables", on_deny: "reject", rules: 10, ports: "61001-61499" };
    const OTHERS: [Self; 4] = [
        Self { rules: 1000, ..Self::USUAL },
        Self { on_deny: "drop", ..Self::USUAL },
        Self { engines: "ebpf", ..Self::USUAL },
        Self { ports: "61201-61450", rules: 100, ..Self::USUAL },
    ];
}

/// The configuration of the node.
pub(super) fn node(cgroup: &Path, policy: &Policy) -> Result<String> {
    let Policy { engines, on_deny, rules, ports } = policy;
    let cgroup = cgroup.strip_prefix(attach::mount_point()?)?.display();
    let mut yaml = format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24, 100.64.0.0/10]}}\n\
         enforcement:\n  engines: [{engines}]\n  onDeny: {on_deny}\n  iptables: {{backend: nft}}\n  \
         interfaces: {{external: [eth0], internal: [\"cali*\"]}}\npersistence: {{save: never}}\n\
         portPool: {{ports: {ports}, destinations: [192.168.31.0/24], transparent: {{cgroups: [/{cgroup}]}}}}\nrules:\n  \
         - {{name: in, direction: inbound, protocol: tcp, ports: {IN:?}}}\n  \
         - {{name: out, direction: outbound, protocol: tcp, ports: {OUT:?}}}\n"
    );
    for rule in 0..*rules {
        let (address, port) = (Ipv4Addr::from(0x6440_0000 + rule), 1024 + rule * 7919 % 60_000);
        writeln!(
            yaml,
            "  - {{name: device-{rule}, direction: inbound, external: [{address}/32], protocol: tcp, ports: [{port}]}}"
        )?;
    }
    Ok(yaml)
}

/// Configuration of the LAN host, with `routes` routes.
pub(super) fn host(routes: u32) -> String {
    let routes: Vec<String> = (0..=routes)
        .map(|number| format!("{{to: 10.201.{}.0/24, via: 192.168.31.17}}", number % 256))
        .collect();
    format!("role: host\nnetworks: {{pods: [10.200.0.0/15]}}\nroutes: {{static: [{}]}}\n", routes.join(", "))
}

fn status(agent: &Agent) -> Result<Value> {
    Ok(serde_json::from_str::<Value>(&agent.run(&["status", "--json"])?)?["agent"].take())
}

fn reload(agent: &mut Agent, config: &str, refused: bool) -> Result<()> {
    agent.reload(config)?;
    let error = &status(agent)?["reloads"]["last"]["error"];
    ensure!(error.is_null() != refused, "the last reload: {error}");
    Ok(())
}

fn replace(agent: &mut Agent, pid: &AtomicU32, stop: bool) -> Result<()> {
    pid.store(0, Ordering::Relaxed);
    if stop {
        agent.stop()?;
    }
    agent.restart()?;
    pid.store(agent.pid(), Ordering::Relaxed);
    Ok(())
}

fn apply(agent: &Agent, lab: &Lab, config: &str, time: &str) -> Result<()> {
    let file = lab.directory().join("candidate.yaml");
    fs::write(&file, format!("{config}api: {{socket: {}}}\n", agent.socket().display()))?;
    agent.run(&["apply", &file.to_string_lossy(), "--confirm", time]).map(drop)
}

/// Another agent with the same pins and socket, which must name this one and end.
fn second(agent: &Agent, lab: &Lab) -> Result<()> {
    let mut command = agent.command(&["run"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut second = lab.b().netns.spawn_command(command)?;
    let status = second.wait(REST)?.context("it runs")?;
    let mut said = String::new();
    second.child().stderr.take().context("a pipe")?.read_to_string(&mut said)?;
    ensure!(!status.success() && said.contains(&format!("pid {}", agent.pid())), "{status}: {said}");
    Ok(())
}

/// Works until the end; returns a sample of one agent's resources after each round of the second half.
pub(super) fn work_on_node(
    agent: &mut Agent,
    lab: &Lab,
    cgroup: &Path,
    course: &Course,
) -> Result<Vec<Sample>> {
    let usual = node(cgroup, &Policy::USUAL)?;
    let others = Policy::OTHERS.iter().map(|policy| node(cgroup, policy)).collect::<Result<Vec<_>>>()?;
    let mut samples = Vec::new();
    while course.pause(PAUSE) {
        let kills = course.kills();
        for other in others.iter().chain([&usual]) {
            course.count(RELOAD, 1, reload(agent, other, false));
            if kills {
                replace(agent, &course.node, false)?;
                course.count(KILL, 1, Ok(()));
            }
        }
        course.count(REFUSED, 1, reload(agent, &usual.replace("role: node", "role: none"), true));
        course.count(RELOAD, 1, reload(agent, &usual, false));
        if kills {
            replace(agent, &course.node, true)?;
            course.count(STOP, 1, Ok(()));
        }
        let reverted = apply(agent, lab, &others[1], "600s").and_then(|()| agent.run(&["revert"]));
        course.count(REVERT, 1, reverted.map(drop));
        course.count(
            EXPIRE,
            1,
            apply(agent, lab, &others[0], "1s").and_then(|()| {
                let over = || status(agent).is_ok_and(|status| status["trial"].is_null()).then_some(());
                eventually(REST, over).context("it does not end")
            }),
        );
        course.count(SECOND, 1, second(agent, lab));
        course.count(RELOAD, 1, reload(agent, &usual, false));
        if !kills {
            let sample = Sample::of(agent.pid(), &samples)?;
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// As [`work_on_node`].
pub(super) fn work_on_host(agent: &mut Agent, lab: &Lab, course: &Course) -> Result<Vec<Sample>> {
    let netns = &lab.a().netns;
    let mut samples = Vec::new();
    while course.pause(PAUSE) {
        let kills = course.kills();
        for routes in [200, 50, 0] {
            course.count(ROUTES, 1, reload(agent, &host(routes), false));
            if kills {
                replace(agent, &course.host, false)?;
                course.count(KILL, 1, Ok(()));
            }
        }
        let lost = netns.ip("route delete 10.201.0.0/24 proto 98").and_then(|_| {
            let back = || netns.ip("route show 10.201.0.0/24").ok().filter(|text| text.contains("via"));
            eventually(REST, back).map(drop).context("it does not come back")
        });
        course.count(ROUTE_LOST, 1, lost);
        if !kills {
            let sample = Sample::of(agent.pid(), &samples)?;
            samples.push(sample);
        }
    }
    Ok(samples)
}
