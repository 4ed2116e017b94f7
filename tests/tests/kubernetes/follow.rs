//! The whole way: objects in the API server, packets between a LAN host and a pod.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_tests::kubernetes::ApiServer;
use bridge_tests::lab::{Family, Lab};
use bridge_tests::traffic::tcp;
use bridge_tests::wait::eventually;
use serde_json::json;

use crate::support::{
    DEADLINE, OPEN, cluster, is_refused, on_host, on_node, policy, until_closed, until_current, until_open,
};

/// Network and next hop of each route with the mark of bridge.
fn routes(lab: &Lab) -> BTreeSet<String> {
    let of = |family: &str| lab.a().netns.ip(&format!("{family} route show proto 98")).unwrap_or_default();
    let text = of("-4") + &of("-6");
    text.lines().filter_map(|line| line.split(" dev ").next()).map(str::to_owned).collect()
}

#[track_caller]
fn until_routes(lab: &Lab, wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = wanted.iter().map(ToString::to_string).collect();
    eventually(DEADLINE, || (routes(lab) == wanted).then_some(()))
        .with_context(|| format!("wanted {wanted:?}, found {:?}", routes(lab)))
}

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
        connection.round_trip(Duration::from_secs(5)).context("what was established goes on")?;
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

#[test]
fn pod_networks_are_calicos_where_it_gives_out_blocks() -> Result<()> {
    let (lab, server) = cluster()?;
    let host = on_host(&lab, &server)?;
    let of_node = ["10.200.1.0/24 via 192.168.31.17", "fd20:1::/64 via fd31::17"];
    until_routes(&lab, &of_node)?;
    // As Calico's own definition, with as much of its schema as is used here.
    let definition = |plural: &str, kind: &str| {
        format!(
            "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {{name: {plural}.crd.projectcalico.org}}\n\
             spec:\n  group: crd.projectcalico.org\n  scope: Cluster\n  names: {{kind: {kind}, listKind: {kind}List, plural: {plural}, singular: {}}}\n  \
             versions:\n  - name: v1\n    served: true\n    storage: true\n    schema: {{openAPIV3Schema: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}\n---\n",
            kind.to_lowercase()
        )
    };
    server
        .apply(&(definition("ipamblocks", "IPAMBlock") + &definition("blockaffinities", "BlockAffinity")))?;
    server.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"], "")?;
    let block = "apiVersion: crd.projectcalico.org/v1\nkind: BlockAffinity\nmetadata: {name: b-10-50-1-0-26}\n\
                 spec: {cidr: 10.50.1.0/26, node: b, state: confirmed, deleted: 'false'}\n---\n\
                 apiVersion: crd.projectcalico.org/v1\nkind: IPAMBlock\nmetadata: {name: 10-50-1-0-26}\n\
                 spec: {cidr: 10.50.1.0/26, affinity: 'host:b', deleted: false, allocations: [], attributes: []}\n";
    server.apply(block)?;
    // An agent that looks later: one that runs looks again within a minute.
    drop(host);
    let host = on_host(&lab, &server)?;
    until_routes(&lab, &["10.50.1.0/26 via 192.168.31.17"])?;
    assert_eq!(until_current(&host)?["podNetworksFrom"], "calico");
    server.kubectl(&["delete", "blockaffinity,ipamblock", "--all"], "")?;
    until_routes(&lab, &of_node)
}
