//! The LAN host's way to the pods: none, then by each source of its agent, and again none once they are withdrawn.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Scene, Seen, Stage};
use crate::agent::Agent;
use crate::lab::{Family, Host, Lab};
use crate::traffic::{Attempt, tcp};
use crate::wait::eventually;

/// In their order.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "no route: LAN host connects to the pod",
        expected: "unreachable at once, IPv4 and IPv6",
        run: no_route,
    },
    Scene {
        name: "agent on the LAN host, routes of cluster.yaml; then the node leaves that file",
        expected: "2 routes, reached; then none, unreachable",
        run: by_file,
    },
    Scene {
        name: "agent on the LAN host, the pod behind masquerade announces itself (discover probe); then it expires",
        expected: "2 routes, reached; then none, unreachable",
        run: by_discovery,
    },
    Scene {
        name: "agent on the LAN host, static routes; taken out of its configuration; and back",
        expected: "2 routes, reached; then none, unreachable; then reached again",
        run: by_configuration,
    },
    Scene {
        name: "no agent on the node, the other direction: pod connects to the LAN host",
        expected: "reached, IPv4 and IPv6",
        run: other_direction,
    },
];

const PORT: u16 = 40002;
const DISCOVERY: u16 = 12345;
/// The shortest life of an announcement is 5 s.
const DEADLINE: Duration = Duration::from_secs(10);

/// Connects to an echo server in both families, and has one round trip if it can.
fn connect(client: &Host, server: &Host, expected: fn(&Attempt<()>) -> bool) -> Result<Seen> {
    let mut attempts = Vec::new();
    for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let echo = tcp::Server::echo(&server.netns, server.at(family, PORT))?;
        let (connection, attempt) = tcp::Client::new(&client.netns).connect(echo.address())?.split();
        if let Some(mut connection) = connection {
            connection.round_trip(Duration::from_secs(1))?;
        }
        let ok = expected(&attempt);
        attempts.push((name, attempt, ok));
    }
    Ok(Seen::attempts(attempts))
}

fn no_route(stage: &mut Stage) -> Result<Seen> {
    connect(stage.lab.a(), stage.lab.c1(), Attempt::unreachable)
}

/// Configuration of the LAN host's agent, apart from its source of routes.
fn config(source: &str) -> String {
    format!("role: host\nnetworks: {{pods: [10.200.0.0/16, \"fd20::/16\"]}}\nroutes: {source}\n")
}

/// How many routes of the LAN host bear the mark of bridge.
fn count(lab: &Lab) -> Result<usize> {
    let (v4, v6) = (lab.a().netns.ip("-4 route show proto 98")?, lab.a().netns.ip("-6 route show proto 98")?);
    Ok(v4.lines().count() + v6.lines().count())
}

/// Connects once there are `wanted` routes: reached, or, if there are none, not.
fn with_routes(lab: &Lab, wanted: usize) -> Result<Seen> {
    let come = eventually(DEADLINE, || count(lab).ok().filter(|count| *count == wanted));
    let expected = if wanted > 0 { Attempt::succeeded } else { Attempt::unreachable };
    let Seen { text, ok } = connect(lab.a(), lab.c1(), expected)?;
    Ok(Seen { text: format!("{} routes: {text}", count(lab)?), ok: ok && come.is_some() })
}

fn in_turn(turns: impl IntoIterator<Item = Seen>) -> Seen {
    let (texts, oks): (Vec<_>, Vec<_>) = turns.into_iter().map(|seen| (seen.text, seen.ok)).unzip();
    Seen { text: texts.join("; then "), ok: oks.into_iter().all(|ok| ok) }
}

fn by_file(stage: &mut Stage) -> Result<Seen> {
    let lab = &stage.lab;
    let file = lab.directory().join("cluster.yaml");
    let (b, networks) = (lab.b(), Family::BOTH.map(|family| lab.pod_network(0, family)));
    let node = format!(
        "nodes: [{{name: b, addresses: [{}, '{}'], podNetworks: [{}, '{}']}}]\n",
        b.v4, b.v6, networks[0], networks[1]
    );
    fs::write(&file, node)?;
    let _agent = Agent::start(lab, lab.a(), &config(&format!("{{file: {}}}", file.display())))?;
    let there = with_routes(lab, 2)?;
    fs::write(&file, "nodes: []\n")?;
    Ok(in_turn([there, with_routes(lab, 0)?]))
}

fn by_discovery(_: &mut Stage) -> Result<Seen> {
    // Only where pods are masqueraded is there something to discover.
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    fs::create_dir_all(lab.directory())?;
    let key = lab.directory().join("discovery.key");
    fs::write(&key, "shared by the pods and the LAN host")?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let discovery = format!("{{discovery: {{listen: \"[::]:{DISCOVERY}\", keyFile: {}}}}}", key.display());
    let agent = Agent::start(&lab, a, &config(&discovery))?;
    for family in Family::BOTH {
        let to = a.at(family, DISCOVERY).to_string();
        let mut probe = agent.command(&["discover", "probe", &to, "--lifetime", "5s"]);
        probe.arg("--key-file").arg(&key);
        c1.netns.output(probe).with_context(|| format!("announce the pod to {to}:\n{}", agent.log()))?;
    }
    Ok(in_turn([with_routes(&lab, 2)?, with_routes(&lab, 0)?]))
}

/// Configuration of the LAN host's agent in the later scenes.
pub(super) fn static_routes(lab: &Lab) -> String {
    let routes = Family::BOTH
        .map(|family| format!("{{to: \"{}\", via: \"{}\"}}", lab.pod_network(0, family), lab.b().ip(family)));
    config(&format!("{{static: [{}]}}", routes.join(", ")))
}

fn by_configuration(stage: &mut Stage) -> Result<Seen> {
    let lab = &stage.lab;
    let with = static_routes(lab);
    let mut agent = Agent::start(lab, lab.a(), &with)?;
    let there = with_routes(lab, 2)?;
    agent.reload(&config("{static: []}"))?;
    let gone = with_routes(lab, 0)?;
    agent.reload(&with)?;
    let back = with_routes(lab, 2)?;
    // From here on the way to the pods is its.
    stage.host_agent = Some(agent);
    Ok(in_turn([there, gone, back]))
}

fn other_direction(stage: &mut Stage) -> Result<Seen> {
    connect(stage.lab.c1(), stage.lab.a(), Attempt::succeeded)
}
