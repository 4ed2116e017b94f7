//! Flows and interfaces that keep out of it.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab, NodePort};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::Value;

use super::support::{directions, open_fast, outcomes, packets, speed_up, stay_slow};
use crate::support::{DEADLINE, INBOUND, OUTBOUND, SECOND, USUAL_RULES, config, json, open};
use bridge_common::filter::fast_path::Outcome;

const ROUNDS: usize = 20;

/// Returns the fast-path column of `bridge-agent flows` for a port.
fn said_of(agent: &Agent, port: u16) -> Result<Vec<String>> {
    let flows = json(agent, &["flows", "--port", &port.to_string()])?;
    let of = |flow: &Value| flow["fastPath"].as_str().map(ToOwned::to_owned).context("fastPath");
    flows["flows"].as_array().context("flows")?.iter().map(of).collect()
}

#[test]
fn it_can_be_switched_off_and_on() -> Result<()> {
    let lab = Lab::builder().build()?;
    let off = config("fastPath: off", USUAL_RULES);
    let mut agent = Agent::start(&lab, lab.b(), &off)?;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open(lab.a(), to)?;
    stay_slow(&agent, &mut connection, ROUNDS)?;
    assert_eq!(said_of(&agent, INBOUND)?, ["off"]);
    agent.reload(&config("fastPath: auto", USUAL_RULES))?;
    speed_up(&agent, &mut connection)?;
    // News of interfaces after a reload takes every flow out once more.
    let says_yes = || {
        connection.round_trip(SECOND).ok()?;
        (said_of(&agent, INBOUND).ok()? == ["yes"]).then_some(())
    };
    eventually(DEADLINE, says_yes).with_context(|| format!("{:?}", said_of(&agent, INBOUND)))?;
    let status = json(&agent, &["status"])?;
    assert_eq!(status["agent"]["enforcement"]["fastPath"]["protocols"], serde_json::json!(["tcp", "udp"]));
    agent.reload(&off)?;
    stay_slow(&agent, &mut connection, ROUNDS)?;
    // Audit mode leaves the path of packets as it is without bridge.
    agent.reload(&config("mode: audit", USUAL_RULES))?;
    stay_slow(&agent, &mut connection, ROUNDS)
}

#[test]
fn masqueraded_flows_keep_out() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        let to = lab.a().at(family, OUTBOUND);
        let server = tcp::Server::echo(&lab.a().netns, to)?;
        let mut connection = open(lab.c1(), to)?;
        ensure!(server.peers().iter().all(|peer| peer.ip() == lab.b().ip(family)), "it was not masqueraded");
        stay_slow(&agent, &mut connection, ROUNDS)?;
        assert_eq!(said_of(&agent, OUTBOUND)?, ["unseen"]);
        drop(connection);
        agent.run(&["flows", "--delete"])?;
    }
    // Connections without masquerade are not affected.
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    open_fast(&agent, lab.a(), to).map(drop)
}

#[test]
fn flows_to_node_ports_keep_out() -> Result<()> {
    const PORT: u16 = 30080;
    let lab = Lab::builder().node_port(NodePort { port: PORT, pod: 0, pod_port: 80 }).build()?;
    let rest = format!("{USUAL_RULES}nodePorts: {{range: \"30000-32767\", allow: [\"{PORT}\"]}}\n");
    let agent = Agent::start(&lab, lab.b(), &config("", &rest))?;
    for family in Family::BOTH {
        let _server = tcp::Server::echo(&lab.c1().netns, lab.c1().at(family, 80))?;
        let mut connection = open(lab.a(), lab.b().at(family, PORT))?;
        stay_slow(&agent, &mut connection, ROUNDS)?;
    }
    ensure!(packets(&agent, Outcome::unseen)? > 0, "{}", outcomes(&agent));
    Ok(())
}

/// Returns the abilities of an interface in the status.
fn allowed(agent: &Agent, interface: &str) -> Result<Vec<String>> {
    let status = json(agent, &["status"])?;
    let interfaces = status["agent"]["enforcement"]["interfaces"].as_array().context("interfaces")?;
    let found = interfaces.iter().find(|found| found["name"] == interface).context(interface.to_owned())?;
    Ok(serde_json::from_value(found["fastPath"].clone())?)
}

fn tc(lab: &Lab, arguments: &str) -> Result<()> {
    let mut tc = Command::new("tc");
    tc.args(arguments.split(' '));
    lab.b().netns.output(tc).map(drop)
}

/// Adds a classic BPF program that looks at nothing and lets everything through.
fn add_filter(lab: &Lab, interface: &str, direction: &str) -> Result<()> {
    let mut tc = Command::new("tc");
    tc.args([
        "filter", "add", "dev", interface, direction, "prio", "5", "protocol", "all", "bpf", "bytecode",
    ]);
    // BPF_RET | BPF_K, 0: no class.
    tc.arg("1,6 0 0 0,");
    lab.b().netns.output(tc).map(drop)
}

#[test]
fn packets_that_a_program_of_others_must_see_keep_out() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let by = &lab.c1().peer_interface;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open_fast(&agent, lab.a(), to)?;
    assert_eq!(allowed(&agent, by)?, ["in", "out", "peer"]);
    let becomes = |interface: &str, expected: &[&str]| {
        let is = || (allowed(&agent, interface).ok()? == expected).then_some(());
        eventually(DEADLINE, is)
            .with_context(|| format!("{interface} allows {:?}", allowed(&agent, interface)))
    };

    // On the way out: by that interface still, but through its hooks.
    tc(&lab, &format!("qdisc add dev {by} clsact"))?;
    add_filter(&lab, by, "egress")?;
    becomes(by, &["in", "out"])?;
    speed_up(&agent, &mut connection)?;
    tc(&lab, &format!("filter del dev {by} egress"))?;
    becomes(by, &["in", "out", "peer"])?;

    // On the way in: not at all.
    tc(&lab, "qdisc add dev eth0 clsact")?;
    add_filter(&lab, "eth0", "ingress")?;
    becomes("eth0", &["out"])?;
    stay_slow(&agent, &mut connection, ROUNDS)?;
    tc(&lab, "filter del dev eth0 ingress")?;
    becomes("eth0", &["in", "out"])?;
    speed_up(&agent, &mut connection)
}

#[test]
fn an_interface_with_a_queue_is_gone_out_by_through_its_queue() -> Result<()> {
    let lab = Lab::builder().build()?;
    let by = &lab.c1().peer_interface;
    tc(&lab, &format!("qdisc add dev {by} root pfifo limit 100"))?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    assert_eq!(allowed(&agent, by)?, ["in", "out"]);
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let _server = tcp::Server::echo(&server.netns, server.at(family, port))?;
            open_fast(&agent, client, server.at(family, port))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_not_forwarded_by_the_node_is_not_forwarded_by_the_fast_path() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        let to = lab.c1().at(family, INBOUND);
        let _server = tcp::Server::echo(&lab.c1().netns, to)?;
        let mut connection = open_fast(&agent, lab.a(), to)?;
        let forwarding = if family == Family::V4 { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
        lab.b().netns.set_sysctl(forwarding, "0")?;
        let is_cut = || connection.round_trip(SECOND / 5).is_err().then_some(());
        eventually(DEADLINE, is_cut).context("goes on")?;
        lab.b().netns.set_sysctl(forwarding, "1")?;
    }
    Ok(())
}
