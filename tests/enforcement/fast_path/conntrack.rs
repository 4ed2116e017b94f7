//! Conntrack and packet filters beside the fast path.

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_common::filter::fast_path::Outcome;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;

use super::support::{directions, open_fast, outcomes, packets};
use crate::support::{DEADLINE, INBOUND, SECOND, USUAL_RULES, config, json};

const BE_LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

/// Denies packets that conntrack calls invalid, and counts them.
fn deny_invalid(lab: &Lab) -> Result<()> {
    nft(lab, "add table inet strict").and(nft(
        lab,
        "add chain inet strict forward { type filter hook forward priority 10; ct state invalid counter drop; }",
    ))
}

fn nft(lab: &Lab, command: &str) -> Result<()> {
    let mut nft = Command::new("nft");
    nft.arg(command);
    lab.b().netns.output(nft).map(drop)
}

fn chain(lab: &Lab) -> Result<String> {
    let mut nft = Command::new("nft");
    nft.args(["list", "chain", "inet", "strict", "forward"]);
    lab.b().netns.output(nft)
}

#[test]
fn what_conntrack_has_not_seen_does_not_make_the_rest_invalid() -> Result<()> {
    const LENGTH: usize = 16 << 20;
    let lab = Lab::builder().conntrack().build()?;
    deny_invalid(&lab)?;
    // Both engines, as they are by default.
    let both = config("", USUAL_RULES).replace("engines: [ebpf]", "engines: [ebpf, iptables]");
    let agent = Agent::start(&lab, lab.b(), &both)?;
    let liberal = lab.b().netns.run(|| fs::read_to_string(BE_LIBERAL))?;
    assert_eq!(liberal.trim(), "1");
    // Nor is a connection forgotten sooner because the acknowledgement of its last data went by.
    let seconds = |name: &str| -> Result<u64> {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
        Ok(lab.b().netns.run(|| fs::read_to_string(path))?.trim().parse()?)
    };
    ensure!(
        seconds("unacknowledged")? >= seconds("established")?,
        "silent connections are forgotten too soon"
    );
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to = server.at(family, port);
            let _server = tcp::Server::echo(&server.netns, to)?;
            let mut connection = open_fast(&agent, client, to)?;
            let before = packets(&agent, Outcome::forwarded)?;
            let stream = connection.stream();
            stream.set_read_timeout(Some(DEADLINE))?;
            let mut writer = stream.try_clone()?;
            let sending = std::thread::spawn(move || writer.write_all(&vec![1; LENGTH]));
            stream.read_exact(&mut vec![0; LENGTH])?;
            sending.join().expect("no panic while sending")?;
            ensure!(packets(&agent, Outcome::forwarded)? > before + 100, "{}", outcomes(&agent));
            // The normal way again, far beyond the window that conntrack knows.
            lab.b().netns.ip("route add 203.0.113.0/24 dev lo")?;
            lab.b().netns.ip("route del 203.0.113.0/24 dev lo")?;
            for _ in 0..3 {
                connection.round_trip(SECOND)?;
            }
            // And the FINs: an orderly end, read by the client.
            connection.stream().shutdown(std::net::Shutdown::Write)?;
            let end = connection.stream().read(&mut [0; 1])?;
            assert_eq!(end, 0, "{family:?} to {}", server.name);
        }
    }
    let chain = chain(&lab)?;
    ensure!(chain.contains("counter packets 0 "), "{chain}");
    Ok(())
}

#[test]
fn where_conntrack_is_to_be_strict_tcp_keeps_out() -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open_fast(&agent, lab.a(), to)?;
    lab.b().netns.run(|| fs::write(BE_LIBERAL, "0"))?;
    let keeps_out = || {
        let before = packets(&agent, Outcome::forwarded).ok()?;
        let off = packets(&agent, Outcome::off).ok()?;
        connection.round_trip(SECOND).ok()?;
        let slow =
            packets(&agent, Outcome::forwarded).ok()? == before && packets(&agent, Outcome::off).ok()? > off;
        slow.then_some(())
    };
    eventually(DEADLINE, keeps_out).with_context(|| outcomes(&agent))?;
    let status = json(&agent, &["status"])?;
    let fast_path = &status["agent"]["enforcement"]["fastPath"];
    assert_eq!(fast_path["protocols"], serde_json::json!(["udp"]));
    ensure!(fast_path["remarks"].to_string().contains("nf_conntrack_tcp_be_liberal"), "{fast_path}");
    Ok(())
}

#[test]
fn a_packet_filter_that_changes_its_mind_is_heard() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let to = lab.c1().at(Family::V4, INBOUND);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    let mut connection = open_fast(&agent, lab.a(), to)?;
    nft(&lab, "add table inet strict")?;
    nft(
        &lab,
        "add chain inet strict forward { type filter hook forward priority 10; ip daddr 10.200.1.91 drop; }",
    )?;
    let is_cut = || connection.round_trip(SECOND / 5).is_err().then_some(());
    eventually(DEADLINE, is_cut).context("goes on, though every packet is to be dropped")
}
