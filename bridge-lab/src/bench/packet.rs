//! The packet path by itself, by BPF_PROG_TEST_RUN: nanoseconds a packet, without the network stack around it.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use bridge_agent::datapath::Hook;

use super::{Measurement, rules};
use crate::packet::{Packet, Tcp};
use crate::prog::{LAN_INTERFACE, Node, behaviour};

/// Maps lie at other addresses in each node, so other data shares their cache lines.
const NODES: usize = 6;
const RUNS: usize = 6;
const COUNTS: [u32; 2] = [1, 100_000];
const PACKETS: u32 = 100_000;

pub(super) fn measure() -> Result<Vec<Measurement>> {
    // Device 0 may connect to every pod on port 443, in both policies.
    let (device, pod): (IpAddr, IpAddr) = ("100.64.0.0".parse()?, "10.200.1.91".parse()?);
    let syn = Packet::new(device, pod).tcp(Tcp::syn(50_000, 443)).frame();
    let established = [
        (Hook::ExternalIngress, Packet::new(device, pod).tcp(Tcp::syn(50_001, 443)).frame()),
        (Hook::InternalIngress, Packet::new(pod, device).tcp(Tcp::syn_ack(443, 50_001)).frame()),
        (Hook::ExternalIngress, Packet::new(device, pod).tcp(Tcp::ack(50_001, 443, 1001, 5001)).frame()),
    ];
    let stranger = Packet::new("203.0.113.5".parse::<IpAddr>()?, device).tcp(Tcp::syn(1, 2)).frame();
    let mut figures: Vec<Vec<Vec<f64>>> = vec![vec![Vec::new(); COUNTS.len()]; 3];
    for _ in 0..NODES {
        let mut nodes = Vec::new();
        for count in COUNTS {
            let mut quiet = behaviour();
            quiet.report_allowed = false;
            let mut node = Node::new(&rules::policy(0, count), &quiet)?;
            node.host(pod, LAN_INTERFACE)?;
            nodes.push(node);
        }
        for node in &mut nodes {
            for (hook, frame) in &established {
                ensure!(
                    node.run(*hook, frame)?.counted.is_some_and(|(_, reason)| !reason.denies()),
                    "handshake"
                );
            }
        }
        // Interleaved, so that other load on the machine falls on all alike.
        for run in 0..RUNS {
            for turn in 0..nodes.len() {
                // Each is first as often as the other.
                let i = (run + turn) % nodes.len();
                let node = &mut nodes[i];
                let hook = Hook::ExternalIngress;
                for (kind, frame) in [&established[2].1, &syn, &stranger].into_iter().enumerate() {
                    figures[kind][i].push(node.cost(hook, frame, PACKETS)?);
                }
            }
        }
    }
    let mut measurements = Vec::new();
    for (kind, name) in ["established flow", "first packet of a flow", "out of scope"].into_iter().enumerate()
    {
        for (i, count) in COUNTS.iter().enumerate() {
            let name = format!("{name}, {count} rules");
            measurements.push(Measurement::of(name, "ns", figures[kind][i].clone()));
        }
        let ratios = figures[kind][1].iter().zip(&figures[kind][0]).map(|(many, one)| many / one).collect();
        let ratio = Measurement::of(format!("{name}, 100000 rules to 1 rule"), "ratio", ratios);
        measurements.push(match kind {
            0 => ratio.limit(1.05),
            1 => ratio.limit(2.0),
            _ => ratio,
        });
    }
    Ok(measurements)
}
