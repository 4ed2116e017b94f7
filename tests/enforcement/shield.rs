//! `enforcement.xdp`: the driver of veth drops denied packets, and nothing else than the hook behind it would.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use bridge_agent::datapath::{Maps, Pins, SHIELD_PROGRAM, object};
use bridge_lab::{
    agent::Agent,
    lab::{Family, Host, Lab, Netns},
    traffic::{tcp, udp},
    wait::eventually,
};
use serde_json::Value;

use crate::support::{DEADLINE, DENIED, INBOUND, OUTBOUND, SECOND, SILENCE, USUAL_RULES, config, json, open};

/// No packet is answered or reported, so that the driver drops every denied one.
const SILENT: &str = "xdp: auto, onDeny: drop, events: {rate: 0}";
/// Denied packets of a flood; as many at a time as the ring of veth takes.
const FLOOD: u64 = 4000;
const BURST: u64 = 100;

/// Packets denied so far from the LAN to pods for want of a rule, and those of them that the driver dropped.
fn denied(agent: &Agent) -> Result<(u64, u64)> {
    let maps = Maps::open(&Pins::new(agent.pins()))?;
    let counts = maps.reason_counts()?;
    let of = counts.iter().find(|count| count.direction == "inbound" && count.reason == "no_rule");
    Ok((of.context("a counter")?.packets, maps.shielded()?.packets))
}

/// Sends `packets` datagrams from an unconnected socket, each burst once the one before was counted.
fn flood(agent: &Agent, from: &Host, to: SocketAddr, packets: u64) -> Result<()> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = from.netns.run(|| UdpSocket::bind(any))?;
    let (before, _) = denied(agent)?;
    for burst in 1..=packets / BURST {
        for _ in 0..BURST {
            socket.send_to(b"flood", to)?;
        }
        let counted = || denied(agent).ok().filter(|(now, _)| now - before >= burst * BURST);
        let now = eventually(DEADLINE, counted);
        now.with_context(|| format!("{:?} after {burst} bursts from {before}", denied(agent)))?;
    }
    Ok(())
}

/// The mode and the id of the XDP program of an interface, as the kernel shows them.
fn attached(netns: &Netns, interface: &str) -> Result<Option<(String, u64)>> {
    let links: Value =
        serde_json::from_str(&netns.ip(&format!("-json -details link show dev {interface}"))?)?;
    let xdp = &links[0]["xdp"];
    let Some(id) = xdp["prog"]["id"].as_u64() else { return Ok(None) };
    // XDP_ATTACHED_DRV and XDP_ATTACHED_SKB (linux/if_link.h).
    let mode = match xdp["mode"].as_u64() {
        Some(1) => "native".to_owned(),
        Some(2) => "generic".to_owned(),
        mode => format!("{mode:?}"),
    };
    Ok(Some((mode, id)))
}

/// The state of an interface in the status of the agent.
fn shown(agent: &Agent, interface: &str) -> Result<Option<String>> {
    let status = json(agent, &["status"])?;
    let interfaces = status["agent"]["enforcement"]["interfaces"].as_array().context("interfaces")?.clone();
    let found = interfaces.iter().find(|one| one["name"] == interface);
    Ok(found.and_then(|one| one["xdp"].as_str()).map(str::to_owned))
}

fn is_shielded(agent: &Agent, lab: &Lab) -> Result<()> {
    let (shown, attached) = (shown(agent, "eth0")?, attached(&lab.b().netns, "eth0")?);
    ensure!(
        shown.as_deref() == Some("native") && attached.as_ref().is_some_and(|(mode, _)| mode == "native"),
        "{shown:?}, {attached:?}\n{}",
        agent.log()
    );
    Ok(())
}

#[test]
fn a_flood_is_dropped_in_the_driver_and_counted_while_other_traffic_goes_on() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config(SILENT, USUAL_RULES))?;
    is_shielded(&agent, &lab)?;
    for family in Family::BOTH {
        let allowed = lab.c1().at(family, INBOUND);
        let _tcp = tcp::Server::echo(&lab.c1().netns, allowed)?;
        let _udp = udp::Server::echo(&lab.c1().netns, allowed)?;
        let victim = udp::Server::echo(&lab.c1().netns, lab.c1().at(family, DENIED))?;
        let _out = udp::Server::echo(&lab.a().netns, lab.a().at(family, OUTBOUND))?;
        let mut established = open(lab.a(), allowed)?;
        let (before, dropped_before) = denied(&agent)?;

        for _ in 0..4 {
            flood(&agent, lab.a(), victim.address(), FLOOD / 4)?;
            established.round_trip(SECOND).context("an established connection")?;
            open(lab.a(), allowed).context("a new connection")?;
            let asked = udp::ask(&lab.a().netns, 0, allowed, b"new", SECOND)?;
            ensure!(asked.succeeded(), "UDP to an open port: {asked}");
            let answered = udp::ask(&lab.c1().netns, 0, lab.a().at(family, OUTBOUND), b"out", SECOND)?;
            ensure!(answered.succeeded(), "an answer to a pod: {answered}");
        }

        let (after, dropped) = denied(&agent)?;
        ensure!(after - before == FLOOD, "{family:?}: {} of {FLOOD} counted", after - before);
        ensure!(dropped - dropped_before == FLOOD, "{family:?}: {} in the driver", dropped - dropped_before);
        ensure!(victim.received().is_empty(), "a denied datagram arrived");
        let attempt = tcp::Client::new(&lab.a().netns)
            .deadline(SILENCE)
            .connect(lab.c1().at(family, DENIED))?
            .split()
            .1;
        ensure!(attempt.timed_out(), "TCP to a denied port: {attempt}");
    }
    let metrics = agent.metrics()?;
    let (_, dropped) = denied(&agent)?;
    ensure!(metrics.contains(&format!("bridge_xdp_dropped_packets_total {dropped}\n")), "{metrics}");
    Ok(())
}

/// As many as the hook answers and reports go on to it; the rest of the flood does not.
#[test]
fn refusals_and_events_stay_as_they_are_without_it() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("xdp: auto", USUAL_RULES))?;
    is_shielded(&agent, &lab)?;
    for family in Family::BOTH {
        let to = lab.c1().at(family, DENIED);
        // The second of the flood before ends on each CPU.
        std::thread::sleep(SECOND);
        for _ in 0..20 {
            let attempt = tcp::Client::new(&lab.a().netns).connect(to)?.split().1;
            ensure!(attempt.refused(), "TCP: {attempt}");
            let attempt = udp::ask(&lab.a().netns, 0, to, b"denied", SECOND)?;
            ensure!(attempt.refused(), "UDP: {attempt}");
        }
        let (before, dropped) = denied(&agent)?;
        flood(&agent, lab.a(), to, 2 * FLOOD)?;
        let (after, dropped_after) = denied(&agent)?;
        ensure!(after - before == 2 * FLOOD, "{} of {} counted", after - before, 2 * FLOOD);
        ensure!(dropped_after > dropped, "{family:?}: none was dropped in the driver");
        let eventual = || {
            let attempt = udp::ask(&lab.a().netns, 0, to, b"denied", SILENCE).ok()?;
            attempt.refused().then_some(())
        };
        eventually(DEADLINE, eventual).context("no answer in the seconds after the flood")?;
    }
    Ok(())
}

#[test]
fn a_reload_opens_a_port_at_once_and_takes_the_program_away() -> Result<()> {
    let lab = Lab::builder().build()?;
    let denies = "\
rules:
  - {name: all, direction: inbound, protocol: udp, ports: [40000-40010]}
  - {name: shut, direction: inbound, protocol: udp, ports: [40003], action: deny}
";
    let allows = denies.replace("action: deny", "action: allow");
    let off = SILENT.replace("xdp: auto", "xdp: off");
    let mut agent = Agent::start(&lab, lab.b(), &config(SILENT, denies))?;
    let to = lab.c1().at(Family::V4, DENIED);
    let _server = udp::Server::echo(&lab.c1().netns, to)?;
    let ask = |lab: &Lab| udp::ask(&lab.a().netns, 0, to, b"ask", SILENCE);
    for _ in 0..3 {
        ensure!(ask(&lab)?.timed_out(), "a rule denies it");
        agent.reload(&config(SILENT, &allows))?;
        let attempt = ask(&lab)?;
        ensure!(attempt.succeeded(), "after the reload: {attempt}");
        is_shielded(&agent, &lab)?;
        agent.reload(&config(SILENT, denies))?;
    }
    let hits = json(&agent, &["rules"])?;
    ensure!(hits.to_string().contains("\"shut\""), "{hits}");

    agent.reload(&config(&off, denies))?;
    ensure!(attached(&lab.b().netns, "eth0")?.is_none(), "still attached");
    ensure!(shown(&agent, "eth0")?.as_deref() == Some("off (enforcement.xdp is off)"));
    ensure!(ask(&lab)?.timed_out(), "the hook behind denies it");
    agent.reload(&config(&SILENT.replace("xdp", "mode: audit, xdp"), denies))?;
    ensure!(attached(&lab.b().netns, "eth0")?.is_none(), "attached in audit mode");
    ensure!(shown(&agent, "eth0")?.as_deref() == Some("off (audit mode denies nothing)"));
    agent.reload(&config(SILENT, denies))?;
    is_shielded(&agent, &lab)
}

#[test]
fn it_outlives_the_agent_is_adopted_and_goes_with_down() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut agent = Agent::start(&lab, lab.b(), &config(SILENT, USUAL_RULES))?;
    is_shielded(&agent, &lab)?;
    let first = attached(&lab.b().netns, "eth0")?;
    let to = lab.c1().at(Family::V4, DENIED);
    agent.kill()?;
    ensure!(attached(&lab.b().netns, "eth0")? == first, "killed");
    let (_, before) = denied(&agent)?;
    flood(&agent, lab.a(), to, BURST)?;
    ensure!(denied(&agent)?.1 - before == BURST, "without an agent");

    agent.restart()?;
    is_shielded(&agent, &lab)?;
    ensure!(attached(&lab.b().netns, "eth0")? != first, "the new agent has not put its own program there");
    let (_, before) = denied(&agent)?;
    flood(&agent, lab.a(), to, BURST)?;
    ensure!(denied(&agent)?.1 - before == BURST, "adopted");

    agent.stop()?;
    ensure!(attached(&lab.b().netns, "eth0")?.is_some(), "stopped");
    agent.run(&["down"])?;
    ensure!(attached(&lab.b().netns, "eth0")?.is_none(), "down");
    Ok(())
}

#[test]
fn it_follows_interfaces_that_come_and_go() -> Result<()> {
    let lab = Lab::builder().build()?;
    let text = config(SILENT, USUAL_RULES).replace("external: [eth0]", "external: [\"eth*\"]");
    let agent = Agent::start(&lab, lab.b(), &text)?;
    let node = &lab.b().netns;
    let pins = || {
        Ok::<_, anyhow::Error>(
            std::fs::read_dir(Pins::new(agent.pins()).directory().join("shields"))?.count(),
        )
    };
    for _ in 0..2 {
        node.ip("link add eth9 type veth peer name other9")?;
        let native = || shown(&agent, "eth9").ok()?.filter(|state| state == "native");
        eventually(DEADLINE, native).with_context(|| agent.log())?;
        ensure!(attached(node, "eth9")?.is_some() && pins()? == 2);
        node.ip("link delete eth9")?;
        eventually(DEADLINE, || (pins().ok()? == 1).then_some(())).context("the pin is left")?;
    }
    // A bridge has no XDP of its own.
    node.ip("link add eth8 type bridge")?;
    let off = || shown(&agent, "eth8").ok()?.filter(|state| state == "off (the driver has no native XDP)");
    eventually(DEADLINE, off).with_context(|| format!("{:?}", shown(&agent, "eth8")))?;
    let text = agent.run(&["status"])?;
    ensure!(
        text.contains("eth8: off (the driver has no native XDP)") && text.contains("eth0: native"),
        "{text}"
    );
    is_shielded(&agent, &lab)
}

/// It never takes the place of another one's program.
#[test]
fn a_program_of_others_keeps_it_off_until_it_is_gone() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut alien = Ebpf::load(object::ENFORCE)?;
    let program: &mut Xdp = alien.program_mut(SHIELD_PROGRAM).context("a program")?.try_into()?;
    program.load()?;
    for mode in [XdpMode::Skb, XdpMode::Driver] {
        let link = lab.b().netns.run(|| program.attach("eth0", mode))?;
        let theirs = attached(&lab.b().netns, "eth0")?;
        ensure!(theirs.is_some(), "attached");
        let mut agent = Agent::start(&lab, lab.b(), &config(SILENT, USUAL_RULES))?;
        ensure!(shown(&agent, "eth0")?.as_deref() == Some("off (another XDP program is attached)"));
        ensure!(attached(&lab.b().netns, "eth0")? == theirs, "replaced");
        program.detach(link)?;
        let native = || shown(&agent, "eth0").ok()?.filter(|state| state == "native");
        eventually(3 * DEADLINE, native).context("not tried again")?;
        is_shielded(&agent, &lab)?;
        agent.stop()?;
        agent.run(&["down"])?;
    }
    Ok(())
}
