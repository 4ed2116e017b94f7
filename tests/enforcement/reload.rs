//! The configuration and the interfaces change while the agent runs.

use std::io::{Seek as _, Write as _};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::icmp::echo;
use bridge_lab::traffic::{Attempt, tcp};
use bridge_lab::wait::eventually;

use crate::support::{DEADLINE, DENIED, INBOUND, OUTBOUND, SECOND, USUAL_RULES, config, json, open};

/// Opens [`DENIED`] in addition.
const MORE: &str = "  - {name: more, direction: inbound, protocol: tcp, ports: [40003]}\n";

fn servers(host: &Host, port: u16) -> Result<Vec<tcp::Server>> {
    Family::BOTH
        .into_iter()
        .map(|family| Ok(tcp::Server::echo(&host.netns, host.at(family, port))?))
        .collect()
}

fn connect(lab: &Lab, family: Family, port: u16) -> Result<Attempt<()>> {
    Ok(tcp::Client::new(&lab.a().netns).connect(lab.c1().at(family, port))?.split().1)
}

#[test]
fn a_bad_configuration_changes_nothing_and_says_why() -> Result<()> {
    let lab = Lab::builder().build()?;
    let good = config("", USUAL_RULES);
    let mut agent = Agent::start(&lab, lab.b(), &good)?;
    let (_allowed, _denied) = (servers(lab.c1(), INBOUND)?, servers(lab.c1(), DENIED)?);
    let generation = json(&agent, &["status"])?["enforcement"]["generation"].clone();
    // Each of them would open the denied port, if it were taken.
    let opening = config("", &format!("{USUAL_RULES}{MORE}"));
    let overlapping = opening.replace("external: [192.168.31.0/24", "external: [10.200.0.0/16");
    for (failed, (bad, complaint)) in
        (1..).zip([(format!("{opening}\n  [not: yaml"), "agent.yaml:"), (overlapping, "10.200.0.0/16")])
    {
        agent.reload(&bad)?;
        let status = json(&agent, &["status"])?;
        let reloads = &status["agent"]["reloads"];
        let error = reloads["last"]["error"].as_str().with_context(|| format!("no error in {status}"))?;
        ensure!(error.contains(complaint), "{error}");
        ensure!(reloads["failed"].as_u64() >= Some(failed) && reloads["succeeded"] == 0, "{reloads}");
        assert_eq!(status["enforcement"]["generation"], generation);
        for family in Family::BOTH {
            let (allowed, denied) = (connect(&lab, family, INBOUND)?, connect(&lab, family, DENIED)?);
            ensure!(allowed.succeeded() && denied.refused(), "{family:?}: {allowed}; {denied}");
        }
    }
    agent.reload(&good)?;
    let last = json(&agent, &["status"])?["agent"]["reloads"]["last"].clone();
    ensure!(last["error"].is_null() && last["time"].is_string(), "{last}");
    Ok(())
}

#[test]
fn a_port_opens_and_closes_within_a_second_and_connections_outlive_that() -> Result<()> {
    let lab = Lab::builder().build()?;
    let less = config("", USUAL_RULES);
    let more = config("", &format!("{USUAL_RULES}{MORE}"));
    let mut agent = Agent::start(&lab, lab.b(), &less)?;
    let _servers = servers(lab.c1(), DENIED)?;
    for family in Family::BOTH {
        let attempt = connect(&lab, family, DENIED)?;
        ensure!(attempt.refused(), "{attempt}");

        let start = Instant::now();
        agent.reload(&more)?;
        let mut connection = open(lab.a(), lab.c1().at(family, DENIED))?;
        ensure!(start.elapsed() < SECOND, "open after {:?}", start.elapsed());

        let start = Instant::now();
        agent.reload(&less)?;
        let attempt = connect(&lab, family, DENIED)?;
        ensure!(attempt.refused(), "{attempt}");
        ensure!(start.elapsed() < SECOND, "closed after {:?}", start.elapsed());
        for _ in 0..3 {
            connection.round_trip(SECOND).context("the connection did not outlive its rule")?;
        }
    }
    Ok(())
}

/// As when a pod is made: its interface is there before it is up, and by then it is judged on.
#[test]
fn an_interface_that_appears_is_enforced_when_it_comes_up() -> Result<()> {
    const NEW: &str = "cali-new";
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let (b, c2) = (lab.b(), lab.c2());
    b.netns.ip(&format!("link delete {}", c2.peer_interface))?;
    b.netns.ip(&format!("link add {NEW} type veth peer name eth0 netns {}", c2.netns.name()))?;
    let is_judged_on = || {
        let interfaces = json(&agent, &["status"]).ok()?["enforcement"]["interfaces"].clone();
        interfaces
            .as_array()?
            .iter()
            .any(|hook| hook.as_str() == Some("cali-new internal_ingress"))
            .then_some(())
    };
    eventually(DEADLINE, is_judged_on).context("nothing was attached")?;

    b.netns.ip(&format!("link set {NEW} up"))?;
    c2.netns.ip("link set eth0 up")?;
    let gateways = ["10.200.1.1", "fd20:1::1"];
    for (family, gateway) in Family::BOTH.into_iter().zip(gateways) {
        let nodad = if family == Family::V6 { "nodad" } else { "" };
        b.netns.ip(&format!("address add {gateway} dev {NEW} {nodad}"))?;
        b.netns.ip(&format!("route add {} dev {NEW}", c2.ip(family)))?;
        c2.netns.ip(&format!("address add {} dev eth0 {nodad}", c2.ip(family)))?;
        c2.netns.ip(&format!("route add {gateway} dev eth0"))?;
        c2.netns.ip(&format!("route add default via {gateway} dev eth0"))?;
        // Neighbours are found; packets to the node are not judged.
        let is_there = || echo(&c2.netns, gateway.parse().ok()?, SECOND).ok().filter(Attempt::succeeded);
        eventually(DEADLINE, is_there).with_context(|| format!("no answer from {gateway}"))?;
    }
    let (allowed, denied) = (servers(lab.a(), OUTBOUND)?, servers(lab.a(), DENIED)?);
    for (allowed, denied) in allowed.iter().zip(&denied) {
        let attempt = tcp::Client::new(&c2.netns).connect(denied.address())?;
        ensure!(attempt.refused(), "{attempt}");
        assert_eq!(denied.peers(), []);
        open(c2, allowed.address())?;
    }
    Ok(())
}

#[test]
fn a_flow_that_is_deleted_is_over_with_its_next_packet() -> Result<()> {
    let lab = Lab::builder().build()?;
    for fast_path in ["off", "auto"] {
        let agent = Agent::start(&lab, lab.b(), &config(&format!("fastPath: {fast_path}"), USUAL_RULES))?;
        for family in Family::BOTH {
            let to = lab.c1().at(family, INBOUND);
            let _server = tcp::Server::echo(&lab.c1().netns, to)?;
            let mut connection = open(lab.a(), to)?;
            for _ in 0..20 {
                connection.round_trip(SECOND)?;
            }
            agent.run(&["flows", "--delete"])?;
            let answered = connection.round_trip(SECOND);
            ensure!(answered.is_err(), "{family:?}, fast path {fast_path}: it goes on");
        }
    }
    Ok(())
}

#[test]
fn a_terminal_is_asked_before_all_flows_are_deleted() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open(lab.a(), to)?;
    connection.round_trip(SECOND)?;
    // script(1) gives a command a terminal, and types there what it reads itself.
    let on_terminal = |arguments: &[&str], typed: &str| -> Result<String> {
        let command = agent.command(arguments);
        let words: Vec<_> = [command.get_program()].into_iter().chain(command.get_args()).collect();
        let line = words.iter().map(|word| format!("'{}'", word.display())).collect::<Vec<_>>().join(" ");
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        let mut input = tempfile::tempfile()?;
        input.write_all(typed.as_bytes())?;
        input.rewind()?;
        script.stdin(input);
        lab.b().netns.output_with(script, &[1])
    };
    let shown = on_terminal(&["flows", "--delete"], "n\n")?;
    ensure!(shown.contains("[y/N]") && shown.contains("nothing was done"), "{shown}");
    connection.round_trip(SECOND).context("forgotten though the answer was no")?;
    let shown = on_terminal(&["flows", "--delete", "--dry-run"], "")?;
    ensure!(!shown.contains("[y/N]") && shown.contains("established"), "{shown}");
    connection.round_trip(SECOND).context("forgotten by --dry-run")?;
    let shown = on_terminal(&["flows", "--delete"], "y\n")?;
    ensure!(shown.contains("[y/N]") && shown.contains("Forgot 1 flows."), "{shown}");
    ensure!(connection.round_trip(SECOND).is_err(), "it goes on");
    Ok(())
}
