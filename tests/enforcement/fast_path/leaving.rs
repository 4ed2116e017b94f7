//! A change of a flow's path takes it out of the fast path.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bridge_common::filter::fast_path::Outcome;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use bridge_lab::wire::{Capture, Frame};

use super::support::{LEASE, directions, open_fast, outcomes, packets, speed_up, stay_slow};
use crate::support::{DEADLINE, INBOUND, SECOND, USUAL_RULES, config, open};

/// Runs `change`, and asserts that the next packets of a fast connection see its effect.
fn expires(
    agent: &Agent,
    connection: &mut tcp::Connection,
    change: impl FnOnce() -> Result<()>,
) -> Result<()> {
    speed_up(agent, connection)?;
    let before = packets(agent, Outcome::expired)?;
    let start = Instant::now();
    change()?;
    let learns_anew = || {
        connection.round_trip(SECOND).ok()?;
        (packets(agent, Outcome::expired).ok()? > before).then_some(())
    };
    // Sooner than by itself.
    eventually(SECOND * 2, learns_anew).with_context(|| format!("still fast:\n{}", outcomes(agent)))?;
    ensure!(start.elapsed() < SECOND * 2, "it took {:?}", start.elapsed());
    speed_up(agent, connection)
}

#[test]
fn a_change_of_policy_route_or_interface_is_seen_at_once() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let node = &lab.b().netns;
    let by = &lab.c1().peer_interface;
    for family in Family::BOTH {
        let to = lab.c1().at(family, INBOUND);
        let _server = tcp::Server::echo(&lab.c1().netns, to)?;
        let mut connection = open(lab.a(), to)?;
        let route = format!("route replace {} dev {by} metric 5", to.ip());
        expires(&agent, &mut connection, || node.ip(&route).map(drop))?;
        expires(&agent, &mut connection, || node.ip(&format!("link set {by} mtu 1400")).map(drop))?;
        node.ip(&format!("link set {by} mtu 1500"))?;

        // The rule that let the connection in is gone: as without the fast path, the connection is not.
        speed_up(&agent, &mut connection)?;
        let before = packets(&agent, Outcome::expired)?;
        agent.reload(&config("", "rules: []"))?;
        connection.round_trip(SECOND)?;
        ensure!(packets(&agent, Outcome::expired)? > before, "{}", outcomes(&agent));
        speed_up(&agent, &mut connection)?;
        agent.reload(&config("", USUAL_RULES))?;
    }
    Ok(())
}

#[test]
fn what_a_route_no_longer_lets_through_does_not_get_through() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to = server.at(family, port);
            let _server = tcp::Server::echo(&server.netns, to)?;
            let mut connection = open_fast(&agent, client, to)?;
            // Where a reply or a request would have to go.
            let (pod, by) = (lab.c1().ip(family), &lab.c1().peer_interface);
            lab.b().netns.ip(&format!("route del {pod} dev {by}"))?;
            lab.b().netns.ip(&format!("route add blackhole {pod}"))?;
            let is_cut = || connection.round_trip(SECOND / 5).is_err().then_some(());
            eventually(SECOND, is_cut).with_context(|| format!("{family:?} to {}: goes on", server.name))?;
            lab.b().netns.ip(&format!("route del blackhole {pod}"))?;
            lab.b().netns.ip(&format!("route add {pod} dev {by}"))?;
            open_fast(&agent, client, to)?;
        }
    }
    Ok(())
}

#[test]
fn a_neighbour_that_is_elsewhere_is_found_there() -> Result<()> {
    const ELSEWHERE: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        let to = lab.c1().at(family, INBOUND);
        let _server = tcp::Server::echo(&lab.c1().netns, to)?;
        let mut connection = open_fast(&agent, lab.a(), to)?;
        let mut capture = Capture::start(lab.lan(), &lab.b().peer_interface)?;
        let mac = ELSEWHERE.map(|byte| format!("{byte:02x}")).join(":");
        let neighbour =
            |mac: &str| format!("neigh replace {} lladdr {mac} dev eth0 nud permanent", lab.a().ip(family));
        lab.b().netns.ip(&neighbour(&mac))?;
        let sent_there = |frame: &Frame| {
            frame.bytes[..6] == ELSEWHERE && frame.endpoints().is_some_and(|(from, _)| from == to)
        };
        // Packets before the agent has received the change still take the old path.
        let is_found = || {
            let _ = connection.round_trip(SECOND / 20);
            capture.find(SECOND / 20, sent_there).ok()?
        };
        eventually(SECOND, is_found).with_context(|| format!("{family:?}: sent to where it was"))?;
        let own = lab.a().mac.map(|byte| format!("{byte:02x}")).join(":");
        lab.b().netns.ip(&neighbour(&own))?;
        open_fast(&agent, lab.a(), to)?;
    }
    Ok(())
}

/// Replaces the interfaces of a pod by equal ones.
fn replace_interface(lab: &Lab, pod: &Host) -> Result<()> {
    let node = &lab.b().netns;
    let by = &pod.peer_interface;
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    node.ip(&format!("link del {by}"))?;
    let (own, near, inside) = (mac(pod.mac), mac(lab.node_side_mac()), pod.netns.name());
    node.ip(&format!("link add {by} address {near} type veth peer name eth0 address {own} netns {inside}"))?;
    node.ip(&format!("link set {by} up"))?;
    for (gateway, length, address) in
        [("10.200.1.1", 32, pod.v4.to_string()), ("fd20:1::1", 128, pod.v6.to_string())]
    {
        let nodad = if length == 128 { "nodad" } else { "" };
        node.ip(&format!("address add {gateway}/{length} dev {by} {nodad}"))?;
        node.ip(&format!("route add {address}/{length} dev {by}"))?;
        if length == 32 {
            pod.netns.ip("link set eth0 up")?;
        }
        pod.netns.ip(&format!("address add {address}/{length} dev eth0 {nodad}"))?;
        pod.netns.ip(&format!("route add {gateway}/{length} dev eth0"))?;
        pod.netns.ip(&format!("route add default via {gateway} dev eth0"))?;
    }
    Ok(())
}

#[test]
fn a_connection_outlives_an_interface_that_goes_down_and_none_that_is_made_anew() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let node = &lab.b().netns;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open_fast(&agent, lab.a(), to)?;
    let by = &lab.c1().peer_interface;
    node.ip(&format!("link set {by} down"))?;
    node.ip(&format!("link set {by} up"))?;
    node.ip(&format!("route replace {} dev {by}", to.ip()))?;
    connection.round_trip(DEADLINE).context("down and up")?;
    speed_up(&agent, &mut connection)?;
    // To the node, another interface is another pod, though it has the same address.
    replace_interface(&lab, lab.c1())?;
    ensure!(connection.round_trip(SECOND).is_err(), "a connection of a pod that has gone reaches another");
    let mut connection = open_fast(&agent, lab.a(), to)?;
    speed_up(&agent, &mut connection)
}

#[test]
fn without_an_agent_connections_go_on_the_normal_way_and_get_fast_again_with_one() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open_fast(&agent, lab.a(), to)?;

    // At once, before the change is seen.
    agent.restart()?;
    connection.round_trip(SECOND)?;
    speed_up(&agent, &mut connection)?;

    agent.kill()?;
    let runs_out = || {
        let before = packets(&agent, Outcome::forwarded).ok()?;
        connection.round_trip(SECOND).ok()?;
        (packets(&agent, Outcome::forwarded).ok()? == before).then_some(())
    };
    eventually(LEASE, runs_out).context("still fast, without an agent to watch the routes")?;
    stay_slow(&agent, &mut connection, 20)?;
    agent.restart()?;
    connection.round_trip(SECOND)?;
    speed_up(&agent, &mut connection)
}
