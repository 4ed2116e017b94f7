//! Every kind of packet stays within its budget of `bridge-ebpf/packets.toml`.
//!
//! The unit is a lookup in a hash table, measured in the same moments: a slower machine, or a busier one, is slower at both.
//! Of many short runs the fastest counts, which no other work has interrupted.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::Behaviour;
use bridge_common::filter::counters::Reason;
use bridge_lab::{
    cpu::stay_on,
    packet::{Packet, Tcp},
    prog::{LAN_INTERFACE, Reference, behaviour},
};

use crate::world::{Connection, ExternalIngress, Family, OPEN, SHUT, families, node_of, usual_policy};

/// Packets of a run.
const PACKETS: u32 = 2000;
/// Runs of each kind.
const RUNS: usize = 60;

fn kinds(family: Family) -> Vec<(&'static str, Packet, Reason)> {
    let to = |source: IpAddr| Packet::new(source, family.pod);
    vec![
        ("denied_udp", to(family.lan).udp(50_000, SHUT, &[0; 18]), Reason::no_rule),
        ("denied_syn", to(family.lan).tcp(Tcp::syn(50_000, SHUT + 1)), Reason::no_rule),
        ("denied_foreign_syn", to(family.stranger).tcp(Tcp::syn(50_000, OPEN)), Reason::no_rule),
        ("denied_ack", to(family.lan).tcp(Tcp::ack(50_001, OPEN, 1, 1)), Reason::not_syn),
        ("spoofed", to(family.node).udp(50_000, OPEN, &[0; 18]), Reason::spoofed),
        (
            "later_fragment",
            to(family.lan).udp(50_000, OPEN, &[0; 18]).fragment(100, true, 1),
            Reason::fragment_unknown,
        ),
        ("new_flow", to(family.lan).tcp(Tcp::syn(50_000, OPEN)), Reason::new_flow),
    ]
}

#[test]
fn packets_stay_within_their_budget() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bridge-ebpf/packets.toml");
    let budget: BTreeMap<String, f64> =
        toml::from_str(&fs::read_to_string(&file)?).context("bridge-ebpf/packets.toml")?;
    stay_on(0)?;
    let quiet = Behaviour { reject: false, report_allowed: false, events_per_second: 0, ..behaviour() };
    let mut node = node_of(&usual_policy(), &quiet);
    let mut measured = Vec::new();
    for (family, suffix) in families().into_iter().zip(["", "_v6"]) {
        node.host(family.pod, LAN_INTERFACE)?;
        for (name, packet, reason) in kinds(family) {
            let judged = node.run(ExternalIngress, &packet.frame())?;
            ensure!(judged.counted.map(|(_, reason)| reason) == Some(reason), "{name}: {:?}", judged.counted);
            measured.push((format!("{name}{suffix}"), packet.frame()));
        }
        let connection = Connection::inbound(family, OPEN);
        connection.establish(&mut node);
        node.passes(ExternalIngress, &connection.ack(), Reason::established);
        measured.push((format!("established{suffix}"), connection.ack().frame()));
    }
    let reference = Reference::new()?;
    // Neither answered nor reported, so that the shield drops them.
    let shielded = ["denied_udp", "denied_syn", "denied_foreign_syn", "denied_ack"];
    let shielded: Vec<(String, Vec<u8>)> = measured
        .iter()
        .filter(|(name, _)| shielded.contains(&name.trim_end_matches("_v6")))
        .map(|(name, frame)| (format!("shield_{name}"), frame.clone()))
        .collect();
    for (name, frame) in &shielded {
        ensure!(node.run_shield(frame)?.is_some(), "{name} goes on");
    }
    let hooked = measured.len();
    measured.extend(shielded);
    let (mut unit, mut least) = (f64::MAX, vec![f64::MAX; measured.len()]);
    for _ in 0..RUNS {
        unit = unit.min(reference.lookup(PACKETS / 4)?);
        for (index, ((_, frame), least)) in measured.iter().zip(&mut least).enumerate() {
            let cost = if index < hooked {
                node.cost(ExternalIngress, frame, PACKETS)?
            } else {
                node.cost_of_shield(frame, PACKETS)?
            };
            *least = least.min(cost);
        }
    }
    println!("a lookup: {unit:.1} ns");
    let mut complaints = Vec::new();
    for ((name, _), least) in measured.iter().zip(&least) {
        let (cost, limit) = (least / unit, budget.get(name).copied());
        println!("{name:<24} {least:>6.1} ns {cost:>6.2} lookups, budget {limit:?}");
        if limit.is_none_or(|limit| cost > limit) {
            complaints.push(format!("{name} = {:.1}", cost * 1.4));
        }
    }
    ensure!(
        complaints.is_empty(),
        "beyond their budget; make them cheaper, or if it is worth it, write to bridge-ebpf/packets.toml\n{}",
        complaints.join("\n")
    );
    Ok(())
}
