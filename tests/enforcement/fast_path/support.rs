//! Helpers of the tests of the fast path.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Maps, Pins};
use bridge_common::filter::fast_path::Outcome;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Host, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;

use crate::support::{DEADLINE, INBOUND, OUTBOUND, SECOND, open};

/// Client, server, and the port that it may connect to, for each direction.
pub(crate) fn directions(lab: &Lab) -> [(&Host, &Host, u16); 2] {
    [(lab.a(), lab.c1(), INBOUND), (lab.c1(), lab.a(), OUTBOUND)]
}

/// Packets of established flows so far, in all directions, that fared so.
pub(crate) fn packets(agent: &Agent, outcome: Outcome) -> Result<u64> {
    let counts = Maps::open(&Pins::new(agent.pins()))?.outcome_counts()?;
    Ok(counts.iter().filter(|count| count.outcome == outcome.name()).map(|count| count.packets).sum())
}

/// Every outcome so far, for those who read of a failure.
pub(crate) fn outcomes(agent: &Agent) -> String {
    let counts =
        Maps::open(&Pins::new(agent.pins())).and_then(|maps| maps.outcome_counts()).unwrap_or_default();
    let seen = counts.iter().filter(|count| count.packets > 0);
    seen.map(|count| format!("{} {}: {}\n", count.direction, count.outcome, count.packets)).collect()
}

/// Round trips until both their packets take the fast path.
pub(crate) fn speed_up(agent: &Agent, connection: &mut tcp::Connection) -> Result<()> {
    let fast = || {
        let before = packets(agent, Outcome::forwarded).ok()?;
        connection.round_trip(SECOND).ok()?;
        (packets(agent, Outcome::forwarded).ok()? >= before + 2).then_some(())
    };
    eventually(DEADLINE, fast).with_context(|| format!("the fast path was not taken:\n{}", outcomes(agent)))
}

/// Connects, and has round trips until both their packets take the fast path.
pub(crate) fn open_fast(agent: &Agent, client: &Host, to: SocketAddr) -> Result<tcp::Connection> {
    let mut connection = open(client, to)?;
    speed_up(agent, &mut connection)?;
    Ok(connection)
}

/// Round trips of which no packet takes the fast path.
pub(crate) fn stay_slow(agent: &Agent, connection: &mut tcp::Connection, rounds: usize) -> Result<()> {
    let before = packets(agent, Outcome::forwarded)?;
    for _ in 0..rounds {
        connection.round_trip(SECOND)?;
    }
    let forwarded = packets(agent, Outcome::forwarded)? - before;
    ensure!(forwarded == 0, "{forwarded} packets took the fast path:\n{}", outcomes(agent));
    Ok(())
}

/// A UDP socket of a client, to an echo server.
pub(crate) fn ask_by_udp(client: &Host, to: SocketAddr) -> Result<UdpSocket> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = client.netns.run(|| UdpSocket::bind(any))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(SECOND))?;
    Ok(socket)
}

/// Sends a datagram and takes in its echo.
pub(crate) fn round_trip(socket: &UdpSocket, payload: &[u8]) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    socket.send(payload)?;
    let length = socket.recv(&mut buffer).context("no echo")?;
    ensure!(buffer[..length] == *payload, "the echo differs");
    Ok(())
}

/// As long as the agent's permission may outlive it, and some time more.
pub(crate) const LEASE: Duration = Duration::from_secs(5);
