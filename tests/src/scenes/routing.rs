//! Before there is an agent: who reaches whom by routes alone.

use std::time::Duration;

use anyhow::Result;

use super::{Scene, Seen, Stage};
use crate::lab::{Family, Host};
use crate::traffic::{Attempt, tcp};

/// In their order.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "no route: LAN host connects to the pod",
        expected: "unreachable at once, IPv4 and IPv6",
        run: no_route,
    },
    Scene {
        name: "route added, no agent: LAN host connects to the pod",
        expected: "reached, IPv4 and IPv6",
        run: route_added,
    },
    Scene {
        name: "no agent, the other direction: pod connects to the LAN host",
        expected: "reached, IPv4 and IPv6",
        run: other_direction,
    },
];

const PORT: u16 = 40002;

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

fn route_added(stage: &mut Stage) -> Result<Seen> {
    stage.lab.add_routes(stage.lab.a())?;
    connect(stage.lab.a(), stage.lab.c1(), Attempt::succeeded)
}

fn other_direction(stage: &mut Stage) -> Result<Seen> {
    connect(stage.lab.c1(), stage.lab.a(), Attempt::succeeded)
}
