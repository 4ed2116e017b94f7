//! What agents write into the cluster, and what the API server itself refuses.

use anyhow::{Context as _, Result};
use bridge_lab::kubernetes::{ApiServer, User, deployed};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{DEADLINE, OPEN, cluster, on_host, on_node, policy, until, until_metrics, until_open};

const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";

/// The condition `Accepted` of the current generation of a policy.
fn condition(server: &ApiServer, name: &str) -> Result<Value> {
    condition_of(server, name, "Accepted")
}

/// A condition of the current generation of a policy.
fn condition_of(server: &ApiServer, name: &str, kind: &str) -> Result<Value> {
    let current = || {
        let policy = server.request(User::Admin, "GET", &format!("{POLICIES}/{name}"), None).ok()?;
        let list = policy["status"]["conditions"].as_array()?.clone();
        let condition = list.into_iter().find(|condition| condition["type"] == kind)?;
        (condition["observedGeneration"] == policy["metadata"]["generation"]).then_some(condition)
    };
    eventually(DEADLINE, current).with_context(|| format!("no condition {kind} of {name}"))
}

#[test]
fn a_policy_that_is_not_valid_is_told_so_and_the_others_stay_in_force() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    // The schema cannot see that two ranges overlap.
    server.apply(&policy("bad", "sourcePorts: ['1-9', 5]"))?;
    server.apply(&policy("good", "external: [192.168.31.0/24]"))?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;
    let said = condition(&server, "bad")?;
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("Invalid")), "{said}");
    let message = "spec.rules[0].sourcePorts[1]: 5 overlaps 1-9 in the same list; write \"1-9\" for both, or make them disjoint";
    assert_eq!(said["message"], message);
    assert_eq!(condition(&server, "good")?["status"], "True");
    let remarks = until(&node, |cluster| cluster["remarks"] != json!([]))?["remarks"].to_string();
    assert!(remarks.contains("policy bad is refused"), "{remarks}");
    until_metrics(&node, &["bridge_kubernetes_invalid_policies 1"])?;

    // Mended, it is accepted.
    server.apply(&policy("bad", "sourcePorts: ['1-9']"))?;
    eventually(DEADLINE, || condition(&server, "bad").ok().filter(|said| said["status"] == "True"))
        .context("the mended policy is accepted")?;
    until_metrics(&node, &["bridge_kubernetes_invalid_policies 0"])?;

    // All of it for people, too.
    let wanted = "enforce   [\"ebpf\"]   True    True      2          0";
    let shown = || server.kubectl(&["get", "bridgenodes"], "").ok().filter(|text| text.contains(wanted));
    eventually(DEADLINE, shown)
        .with_context(|| server.kubectl(&["get", "bridgenodes", "-o", "yaml"], "").unwrap_or_default())?;
    let nodes = server.request(User::Admin, "GET", "/apis/bridge.lan/v1alpha1/bridgenodes/b", None)?;
    assert_eq!(nodes["metadata"]["ownerReferences"][0]["kind"], "Node", "it goes with its node");
    assert_eq!(nodes["status"]["engines"], json!(["ebpf"]));
    assert_eq!(
        (&nodes["status"]["policyCount"], &nodes["status"]["refusedPolicies"]),
        (&json!(2), &json!([]))
    );
    assert!(nodes["status"]["interfaces"].as_array().is_some_and(|list| list.contains(&json!("eth0"))));
    for name in ["bad", "good"] {
        let programmed =
            || condition_of(&server, name, "Programmed").ok().filter(|said| said["status"] == "True");
        eventually(DEADLINE, programmed).with_context(|| format!("{name} is not programmed"))?;
    }
    let text = server.kubectl(&["get", "bridgepolicies"], "")?;
    let rows = ["bad    True       True         1 of 1 nodes", "good   True       True         1 of 1 nodes"];
    assert!(rows.iter().all(|row| text.contains(row)), "{text}");
    Ok(())
}

#[test]
fn the_api_server_takes_every_manifest() -> Result<()> {
    let lab = bridge_lab::lab::Lab::builder().build()?;
    let server = ApiServer::start(&lab)?;
    let list = std::fs::read_to_string(deployed("kustomization.yaml"))?;
    let files = list.lines().filter_map(|line| line.trim().strip_prefix("- "));
    // And a component.
    let files: Vec<&str> =
        files.filter(|file| file.ends_with(".yaml")).chain(["components/own-node/policy.yaml"]).collect();
    assert!(files.len() >= 8, "{files:?}");
    for file in files {
        server.kubectl(&["apply", "-f", &deployed(file)], "").context(file.to_owned())?;
    }
    let made =
        server.kubectl(&["-n", "bridge-system", "get", "daemonset,serviceaccount", "-o", "name"], "")?;
    assert!(
        made.contains("daemonset.apps/bridge-agent") && made.contains("serviceaccount/bridge-agent"),
        "{made}"
    );
    Ok(())
}
