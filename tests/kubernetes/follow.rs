//! The whole way: objects in the API server, packets between a LAN host and a pod.

use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::kubernetes::ApiServer;
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use serde_json::json;

use crate::support::{
    OPEN, cluster, is_refused, on_host, on_node, policy, until_closed, until_open, until_routes,
};

fn new_node(server: &ApiServer) -> Result<()> {
    server.add_node_as("b2", &["192.168.31.18".into(), "fd31::18".into()], &["10.200.2.0/24".into()])
}

#[test]
fn a_policy_opens_a_port_and_its_deletion_closes_it_for_new_connections() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    let node = on_node(&lab, &server)?;
    let host = on_host(&lab, &server)?;

    // The LAN host's routes come from the watch: of nodes that were there, that come, that go.
    let first = ["10.200.1.0/24 via 192.168.31.17", "fd20:1::/64 via fd31::17"];
    until_routes(&lab, &first)?;
    new_node(&server)?;
    until_routes(&lab, &[first[0], first[1], "10.200.2.0/24 via 192.168.31.18"])?;
    server.delete("/api/v1/nodes/b2")?;
    until_routes(&lab, &first)?;

    let servers = Family::BOTH.map(|family| tcp::Server::echo(&c1.netns, c1.at(family, OPEN)));
    for family in Family::BOTH {
        assert!(is_refused(a, c1.at(family, OPEN))?, "nothing allows it yet, {family:?}");
    }
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
    let mut open = Vec::new();
    for family in Family::BOTH {
        open.push(until_open(a, c1.at(family, OPEN), &node)?);
    }
    assert!(is_refused(a, lab.c2().at(Family::V4, OPEN))?, "the other pod is not selected");

    server.kubectl(&["delete", "bridgepolicy", "devices"], "")?;
    for family in Family::BOTH {
        until_closed(a, c1.at(family, OPEN), &node)?;
    }
    for connection in &mut open {
        connection.round_trip(Duration::from_secs(5)).context("the established connection continues")?;
    }
    // And once more: the same name is another policy.
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;

    // A change of its rules is followed, too.
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: other}}"))?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)?;
    drop((servers, host));
    Ok(())
}
