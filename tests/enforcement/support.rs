//! Helpers of the tests of enforcement.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use bridge_agent::datapath::Pins;
use bridge_common::filter::flow::{Flow, FlowKey};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host};
use bridge_lab::traffic::tcp;
use bridge_lab::wire::{Capture, Frame};
use serde_json::Value;

/// For effects that are immediate, on a busy machine.
pub(crate) const SECOND: Duration = Duration::from_secs(1);
/// For effects that take the agent or the kernel some time.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// How long it takes until silence counts as silence.
pub(crate) const SILENCE: Duration = Duration::from_millis(300);

/// A port that LAN hosts may connect to, where a test opens one.
pub(crate) const INBOUND: u16 = 40002;
/// A port that pods may connect to, where a test opens one.
pub(crate) const OUTBOUND: u16 = 8443;
/// A port that no rule names.
pub(crate) const DENIED: u16 = 40003;

/// [`INBOUND`] and [`OUTBOUND`], for TCP and UDP.
pub(crate) const USUAL_RULES: &str = "\
rules:
  - {name: in-tcp, direction: inbound, protocol: tcp, ports: [40002]}
  - {name: in-udp, direction: inbound, protocol: udp, ports: [40002]}
  - {name: out-tcp, direction: outbound, protocol: tcp, ports: [8443]}
  - {name: out-udp, direction: outbound, protocol: udp, ports: [8443]}
";

/// A configuration for the node of a lab: `enforcement` are keys of that section, `rest` is further sections.
pub(crate) fn config(enforcement: &str, rest: &str) -> String {
    format!(
        r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: ["cali*"]}}, {enforcement}}}
persistence: {{save: never}}
{rest}"#
    )
}

/// Returns the JSON output of a command of the agent.
pub(crate) fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

/// The entry of the pinned table of established flows for packets between these two.
pub(crate) fn flow(agent: &Agent, one: SocketAddr, other: SocketAddr, protocol: u8) -> Result<Option<Flow>> {
    let ends = |end: SocketAddr| (end.ip().into(), end.port().to_be_bytes());
    let ((one, one_port), (other, other_port)) = (ends(one), ends(other));
    let (key, _) = FlowKey::new(&one, one_port, &other, other_port, protocol);
    let table = if protocol == 6 { "flows" } else { "other_flows" };
    let path = Pins::new(agent.pins()).map(table);
    let map = Map::LruHashMap(MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?);
    match HashMap::<_, FlowKey, Flow>::try_from(map)?.get(&key, 0) {
        Ok(flow) => Ok(Some(flow)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Connects, has a round trip with the echo server there, and keeps the connection.
pub(crate) fn open(client: &Host, to: SocketAddr) -> Result<tcp::Connection> {
    let mut connection = tcp::Client::new(&client.netns)
        .connect(to)?
        .reached()
        .with_context(|| format!("{} to {to}", client.name))?;
    connection.round_trip(SECOND).with_context(|| format!("{} to {to}", client.name))?;
    Ok(connection)
}

/// Everything that a host has seen until now: a datagram is sent to it by the node itself, which no agent judges,
/// and when it is there, so is everything that was on its way before.
pub(crate) fn seen_until_now(
    capture: &mut Capture,
    node: &Host,
    host: &Host,
    family: Family,
) -> Result<Vec<Frame>> {
    const DISCARD: u16 = 9;
    let to = host.at(family, DISCARD);
    // No server listens there: the answer is a refusal, or none in time.
    bridge_lab::traffic::udp::ask(&node.netns, 0, to, b"last", SILENCE)?;
    Ok(capture
        .until(DEADLINE, |frame| !frame.outgoing && frame.endpoints().is_some_and(|(_, at)| at == to))?)
}
