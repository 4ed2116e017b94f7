//! The pods that a rule selects, and verdicts while they are unknown.

use anyhow::Result;
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use serde_json::json;

use crate::support::{OPEN, cluster, is_refused, on_host, on_node, policy, until, until_closed, until_open};

#[test]
fn a_pod_is_denied_until_it_is_known_and_covered_from_then_on() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1, c2) = (lab.a(), lab.c1(), lab.c2());
    server.apply(&policy(
        "gold",
        "namespaceSelector: {matchLabels: {tier: gold}}, podSelector: {matchLabels: {app: api}}",
    ))?;
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _servers = [c1, c2].map(|pod| tcp::Server::echo(&pod.netns, pod.at(Family::V4, OPEN)));
    let (to_c1, to_c2) = (c1.at(Family::V4, OPEN), c2.at(Family::V4, OPEN));
    until_closed(a, to_c1, &node)?;

    // Made, and without an address yet: nothing is known of whose packets these are.
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.add_pod("test", "c2", &json!({"app": "api"}), "b")?;
    assert!(is_refused(a, to_c1)?, "denied by default");
    server.run_pod("shop", "c1", c1)?;
    server.run_pod("test", "c2", c2)?;
    until_open(a, to_c1, &node)?;
    until(&node, |cluster| cluster["pods"] == 2)?;
    assert!(is_refused(a, to_c2)?, "its namespace is not selected");

    // Labels change: of the namespace, then of the pod.
    server.kubectl(&["label", "namespace", "test", "tier=gold"], "")?;
    until_open(a, to_c2, &node)?;
    server.kubectl(&["label", "--overwrite", "-n", "shop", "pod", "c1", "app=web"], "")?;
    until_closed(a, to_c1, &node)?;

    // Gone: its address belongs to no pod.
    server.delete("/api/v1/namespaces/test/pods/c2")?;
    until_closed(a, to_c2, &node)
}
