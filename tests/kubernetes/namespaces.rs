//! Policies of namespaces: about the pods of their own namespace, below the policies of the cluster, and off by default.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{
    DEADLINE, OPEN, cluster, is_refused, node_config, on_host, open, policy, until_closed, until_current,
    until_open,
};

/// A policy of a namespace that has one rule for [`OPEN`], with these keys.
fn namespace_policy(namespace: &str, name: &str, keys: &str) -> String {
    format!(
        "apiVersion: bridge.lan/v1alpha1\nkind: BridgeNamespacePolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  rules:\n  - {{name: in, direction: inbound, protocol: tcp, ports: [{OPEN}]{keys}}}\n"
    )
}

/// Two pods with the same labels: the first in `shop`, the second in `test`.
fn pods() -> Result<(Lab, ApiServer)> {
    let (lab, server) = cluster()?;
    for (namespace, name, pod) in [("shop", "c1", lab.c1()), ("test", "c2", lab.c2())] {
        server.add_pod(namespace, name, &json!({"app": "api"}), "b")?;
        server.run_pod(namespace, name, pod)?;
    }
    Ok((lab, server))
}

fn agent(lab: &Lab, server: &ApiServer, on: bool) -> Result<Agent> {
    let config = node_config(server, "");
    let config =
        if on { config.replace("nodeName: b}", "nodeName: b, namespacePolicies: true}") } else { config };
    let agent = Agent::start(lab, lab.b(), &config)?;
    until_current(&agent)?;
    Ok(agent)
}

fn condition(server: &ApiServer, namespace: &str, name: &str, kind: &str) -> Option<Value> {
    let path = format!("/apis/bridge.lan/v1alpha1/namespaces/{namespace}/bridgenamespacepolicies/{name}");
    let policy = server.request(User::Admin, "GET", &path, None).ok()?;
    policy["status"]["conditions"].as_array()?.iter().find(|one| one["type"] == kind).cloned()
}

#[test]
fn a_policy_of_a_namespace_opens_its_own_pods_only_and_a_deny_of_the_cluster_wins() -> Result<()> {
    let (lab, server) = pods()?;
    let node = agent(&lab, &server, true)?;
    let _host = on_host(&lab, &server)?;
    let a = lab.a();
    let [own, foreign] = [lab.c1(), lab.c2()].map(|pod| pod.at(Family::V4, OPEN));
    let _servers = [(lab.c1(), own), (lab.c2(), foreign)].map(|(pod, at)| tcp::Server::echo(&pod.netns, at));
    until_closed(a, own, &node)?;

    // All pods of its namespace; some of them; all but some, which a foreign pod matches, too.
    for (number, keys) in [
        "",
        ", podSelector: {matchLabels: {app: api}}",
        ", podSelector: {matchExpressions: [{key: none, operator: DoesNotExist}]}",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("tenant-{number}");
        server.apply(&namespace_policy("shop", &name, keys))?;
        until_open(a, own, &node)?;
        let programmed = eventually(DEADLINE, || {
            condition(&server, "shop", &name, "Programmed").filter(|one| one["status"] == "True")
        });
        ensure!(programmed.context("Programmed")?["message"] == "1 of 1 nodes");
        ensure!(is_refused(a, foreign)?, "{keys}: a pod of another namespace is open");
        let rules = node.run(&["rules"])?;
        ensure!(rules.contains(&format!("shop.{name}.in")), "{rules}");
        server.kubectl(&["delete", "-n", "shop", "bridgenamespacepolicy", &name], "")?;
        until_closed(a, own, &node)?;
    }

    // Nor does a deny reach beyond.
    server.apply(&policy("all", "pods: [10.200.1.0/24]"))?;
    until_open(a, foreign, &node)?;
    server.apply(&namespace_policy("shop", "closed", ", action: deny"))?;
    until_closed(a, own, &node)?;
    open(a, foreign).context("a deny of another namespace")?;
    server.kubectl(&["delete", "-n", "shop", "bridgenamespacepolicy", "closed"], "")?;
    server.kubectl(&["delete", "bridgepolicy", "all"], "")?;
    until_closed(a, foreign, &node)?;

    server.apply(&namespace_policy("shop", "tenant", ""))?;
    until_open(a, own, &node)?;
    server.apply(&policy("never", "namespaceSelector: {matchLabels: {tier: gold}}, action: deny"))?;
    until_closed(a, own, &node)?;
    server.kubectl(&["delete", "bridgepolicy", "never"], "")?;
    until_open(a, own, &node)?;
    Ok(())
}

#[test]
fn policies_of_namespaces_are_off_until_the_configuration_allows_them() -> Result<()> {
    let (lab, server) = pods()?;
    let mut node = agent(&lab, &server, false)?;
    let _host = on_host(&lab, &server)?;
    let to = lab.c1().at(Family::V4, OPEN);
    let _server = tcp::Server::echo(&lab.c1().netns, to)?;
    server.apply(&namespace_policy("shop", "tenant", ""))?;
    let accepted =
        eventually(DEADLINE, || condition(&server, "shop", "tenant", "Accepted")).context("Accepted")?;
    ensure!(accepted["status"] == "False" && accepted["reason"] == "NamespacePoliciesOff", "{accepted}");
    ensure!(accepted["message"].to_string().contains("namespacePolicies: true"), "{accepted}");
    ensure!(is_refused(lab.a(), to)?, "it is open");
    let config = node_config(&server, "").replace("nodeName: b}", "nodeName: b, namespacePolicies: true}");
    node.reload(&config)?;
    until_open(lab.a(), to, &node)?;
    let accepted = eventually(DEADLINE, || {
        condition(&server, "shop", "tenant", "Accepted").filter(|one| one["status"] == "True")
    });
    accepted.context("accepted").map(drop)
}
