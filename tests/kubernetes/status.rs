//! Conditions, events and budgets: each object costs its author something, and others nothing.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{
    DEADLINE, OPEN, allowing_cluster, cluster, on_host, on_node, policy, until, until_closed, until_current,
    until_open,
};

const NODE: &str = "/apis/bridge.lan/v1alpha1/bridgenodes/b";
const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";
const STATUS_WRITE: &str = "patch bridgepolicies/status.bridge.lan";

/// A condition of an object, if it has one.
fn condition(server: &ApiServer, path: &str, kind: &str) -> Option<Value> {
    let object = server.request(User::Admin, "GET", path, None).ok()?;
    object["status"]["conditions"].as_array()?.iter().find(|one| one["type"] == kind).cloned()
}

#[track_caller]
fn until_condition(
    server: &ApiServer,
    path: &str,
    kind: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<Value> {
    eventually(DEADLINE, || condition(server, path, kind).filter(&holds))
        .with_context(|| format!("{kind} of {path}: {:?}", condition(server, path, kind)))
}

#[test]
fn a_deleted_bridge_node_comes_back_and_conditions_of_others_stay() -> Result<()> {
    let (_lab, server, node, _others) = allowing_cluster()?;
    for kind in ["Ready", "Current", "DatapathHealthy"] {
        until_condition(&server, NODE, kind, |condition| condition["status"] == "True")
            .with_context(|| node.log())?;
    }
    let before = server.request(User::Admin, "GET", NODE, None)?;
    ensure!(before["status"]["heartbeatTime"].as_str().is_some_and(|time| time.ends_with('Z')), "{before:#}");
    server.delete(NODE)?;
    let again = eventually(DEADLINE, || {
        let object = server.request(User::Admin, "GET", NODE, None).ok()?;
        (object["status"]["policyCount"] == 1).then_some(object)
    });
    ensure!(again.context("it comes back")?["metadata"]["uid"] != before["metadata"]["uid"]);

    // Another controller has a condition of its own in the policy.
    let path = format!("{POLICIES}/devices");
    until_condition(&server, &path, "Programmed", |condition| condition["status"] == "True")?;
    let audited = json!({"type": "Audited", "status": "True", "reason": "ByHand", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let policy = server.request(User::Admin, "GET", &path, None)?;
    let mut conditions = policy["status"]["conditions"].as_array().context("conditions")?.clone();
    conditions.push(audited);
    server.request(
        User::Admin,
        "PATCH",
        &format!("{path}/status"),
        Some(&json!({"status": {"conditions": conditions}})),
    )?;
    server.kubectl(
        &[
            "patch",
            "bridgepolicy",
            "devices",
            "--type=json",
            "-p",
            r#"[{"op": "replace", "path": "/spec/rules/0/ports", "value": [40003]}]"#,
        ],
        "",
    )?;
    let generation =
        |condition: &Value| condition["observedGeneration"] == 2 && condition["status"] == "True";
    until_condition(&server, &path, "Programmed", generation)?;
    ensure!(condition(&server, &path, "Audited").is_some(), "the condition of another controller is gone");
    let fields =
        server.kubectl(&["get", "bridgepolicy", "devices", "-o", "yaml", "--show-managed-fields"], "")?;
    ensure!(fields.contains("manager: bridge-agent\n    operation: Apply"), "{fields}");
    Ok(())
}

#[test]
fn an_agent_does_not_fight_over_a_condition() -> Result<()> {
    let (_lab, server, node, _others) = allowing_cluster()?;
    let path = format!("{POLICIES}/devices");
    until_condition(&server, &path, "Programmed", |condition| condition["status"] == "True")?;
    let before = server.count_requests(User::Node, STATUS_WRITE)?;
    // As an agent of version 0.1 that thinks otherwise would do.
    let other = json!({"status": {"conditions": [{
        "type": "Accepted", "status": "False", "observedGeneration": 1, "reason": "Invalid", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}});
    let end = Instant::now() + Duration::from_secs(12);
    let mut written = 0;
    while Instant::now() < end {
        server.request(User::Admin, "PATCH", &format!("{path}/status"), Some(&other))?;
        written += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    let answers = server.count_requests(User::Node, STATUS_WRITE)? - before;
    ensure!(written > 20 && answers <= 1, "{answers} answers to {written} writes:\n{}", node.log());
    Ok(())
}

/// A policy that the schema takes, and that needs 64,000 iptables rules.
fn expensive(name: &str) -> String {
    let list = |count: u16, item: &dyn Fn(u16) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    let ports = list(60, &|index| (index * 2 + 1).to_string());
    let external = list(40, &|index| format!("192.168.31.{}/32", index * 2 + 1));
    let pods = list(40, &|index| format!("10.200.1.{}/32", index * 2 + 1));
    format!(
        "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {{name: {name}}}\nspec:\n  rules:\n  - {{name: all, \
         direction: inbound, protocol: tcp, ports: [{ports}], sourcePorts: [{ports}], external: [{external}], pods: [{pods}]}}\n"
    )
}

#[test]
fn a_policy_over_its_budget_costs_the_others_nothing() -> Result<()> {
    let (lab, server, mut node, _others) = allowing_cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let (first, second) = (c1.at(Family::V4, OPEN), c1.at(Family::V4, OPEN + 1));
    let _server = tcp::Server::echo(&c1.netns, second)?;
    server.apply(&expensive("greedy"))?;
    let path = format!("{POLICIES}/greedy");
    let refused =
        until_condition(&server, &path, "Programmed", |condition| condition["reason"] == "RefusedByNode")
            .with_context(|| node.log())?;
    let message = refused["message"].as_str().unwrap_or_default();
    ensure!(message.contains("iptables rules, and 20000 are allowed"), "{message}");
    let object = server.request(User::Admin, "GET", NODE, None)?;
    ensure!(object["status"]["refusedPolicies"][0]["name"] == "greedy", "{object:#}");

    // Others come, go and deny.
    let start = Instant::now();
    server.apply(
        &policy("more", "external: [192.168.31.0/24]").replace(&OPEN.to_string(), &(OPEN + 1).to_string()),
    )?;
    until_open(a, second, &node)?;
    ensure!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    let deny =
        policy("deny", "external: [192.168.31.0/24]").replace("protocol: tcp", "action: deny, protocol: tcp");
    server.apply(&deny)?;
    until_closed(a, first, &node)?;
    server.kubectl(&["delete", "bridgepolicy", "more"], "")?;
    until_closed(a, second, &node)?;
    server.kubectl(&["delete", "bridgepolicy", "deny"], "")?;
    until_open(a, first, &node)?;
    node.run(&["status", "--ready"])?;

    // A restart has the same policies.
    node.restart()?;
    until_current(&node)?;
    until_open(a, first, &node)?;
    // One line for each generation, without the text of the object.
    let log = node.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("refuses a policy")).collect();
    ensure!(lines.len() <= 2 && lines.iter().all(|line| line.len() < 1000), "{lines:?}");
    Ok(())
}

#[test]
fn no_refused_policy_is_called_programmed_however_many_there_are() -> Result<()> {
    // A BridgeNode lists ten.
    const REFUSED: usize = 25;
    let (lab, server) = cluster()?;
    let node = on_node(&lab, &server)?;
    for number in 0..REFUSED {
        server.apply(&expensive(&format!("greedy-{number}")))?;
        if number % 5 == 0 {
            server.apply(&policy(&format!("good-{number}"), "pods: [10.200.1.0/24]"))?;
        }
    }
    for number in 0..REFUSED {
        let path = format!("{POLICIES}/greedy-{number}");
        until_condition(&server, &path, "Programmed", |one| one["reason"] == "RefusedByNode")
            .with_context(|| node.log())?;
        if number % 5 == 0 {
            let path = format!("{POLICIES}/good-{number}");
            until_condition(&server, &path, "Programmed", |one| one["status"] == "True")?;
        }
    }
    let object = server.request(User::Admin, "GET", NODE, None)?;
    let listed = object["status"]["refusedPolicies"].as_array().map_or(0, Vec::len);
    ensure!(listed == 10 && object["status"]["refusedCount"] == REFUSED, "{object:#}");
    // The author hears of it, too.
    let events = server.kubectl(&["get", "events", "-n", "default"], "")?;
    ensure!(events.contains("bridgepolicy/greedy-0") && events.contains("PolicyRejected"), "{events}");
    // Fewer again.
    for number in 5..REFUSED {
        server.delete(&format!("{POLICIES}/greedy-{number}"))?;
    }
    eventually(DEADLINE, || {
        let object = server.request(User::Admin, "GET", NODE, None).ok()?;
        (object["status"]["refusedCount"] == 5 && object["status"]["refusedSet"].is_null()).then_some(())
    })
    .with_context(|| node.log())?;
    let path = format!("{POLICIES}/greedy-0");
    until_condition(&server, &path, "Programmed", |one| one["reason"] == "RefusedByNode").map(drop)
}

#[test]
fn a_rejected_policy_is_an_event_and_a_line_in_the_log() -> Result<()> {
    let (lab, server) = cluster()?;
    let node = on_node(&lab, &server)?;
    let mut rules = String::new();
    for number in 0..500 {
        writeln!(rules, "  - {{name: r{number}, direction: inbound, protocol: tcp, ports: ['80-90', 85]}}")?;
    }
    let yaml = format!(
        "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {{name: wrong}}\nspec:\n  rules:\n{rules}"
    );
    server.apply(&yaml)?;
    let accepted = |condition: &Value| condition["status"] == "False";
    let said = until_condition(&server, &format!("{POLICIES}/wrong"), "Accepted", accepted)?;
    let message = said["message"].as_str().unwrap_or_default();
    ensure!(message.contains("85 overlaps 80-90") && message.contains("and 495 more"), "{message}");
    let event = || {
        let text = server.kubectl(&["get", "events", "-n", "default"], "").ok()?;
        text.contains("PolicyRejected").then_some(text)
    };
    let text = eventually(DEADLINE, event).with_context(|| node.log())?;
    ensure!(text.contains("bridgepolicy/wrong"), "{text}");
    until(&node, |cluster| cluster["invalidPolicies"] == 1)?;
    let log = node.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("wrong")).collect();
    ensure!(lines.len() == 1 && lines[0].len() < 4000, "{lines:?}");
    Ok(())
}

fn make_ghost(server: &ApiServer) -> Result<()> {
    let ghost = json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgeNode", "metadata": {"name": "ghost"}, "spec": {}});
    server.request(User::Admin, "POST", "/apis/bridge.lan/v1alpha1/bridgenodes", Some(&ghost)).map(drop)
}

#[test]
fn a_policy_that_is_made_again_is_not_taken_for_the_one_before() -> Result<()> {
    let (lab, server) = cluster()?;
    let node = on_node(&lab, &server)?;
    let path = format!("{POLICIES}/again");
    let object = |port: u16| {
        json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": "again"}, "spec": {"rules": [
            {"name": "in", "direction": "inbound", "protocol": "tcp", "ports": [port], "pods": ["10.200.1.0/24"]}]}})
    };
    server.request(User::Admin, "POST", POLICIES, Some(&object(80)))?;
    let programmed = |condition: &Value| condition["status"] == "True";
    until_condition(&server, &path, "Programmed", programmed).with_context(|| node.log())?;
    // Another node has the policy, too, and its agent ends.
    make_ghost(&server)?;
    server.add_node_as("ghost", &["192.168.31.99".to_owned()], &["10.200.9.0/24".to_owned()])?;
    let hash = server.request(User::Admin, "GET", NODE, None)?["status"]["policyHash"].clone();
    let status = json!({"status": {"policyHash": hash, "version": "0", "heartbeatTime": "2026-01-01T00:00:00Z", "mode": "enforce",
        "conditions": [], "engines": [], "policyGeneration": 1, "policyCount": 1, "refusedCount": 0, "refusedPolicies": [],
        "interfaces": [], "pods": 0, "errorCount": 0, "errors": [], "remarks": []}});
    let ghost = "/apis/bridge.lan/v1alpha1/bridgenodes/ghost/status";
    server.request(User::Admin, "PATCH", ghost, Some(&status))?;
    // Faster than the agent notices, and with the same generation.
    server.delete(&path)?;
    server.request(User::Admin, "POST", POLICIES, Some(&object(81)))?;
    let pending = |condition: &Value| condition["message"] == "1 of 2 nodes; not yet on ghost";
    until_condition(&server, &path, "Programmed", pending).with_context(|| node.log())?;
    Ok(())
}

#[test]
fn a_policy_is_programmed_when_every_node_has_it() -> Result<()> {
    let (lab, server) = cluster()?;
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let path = format!("{POLICIES}/devices");
    // A report that belongs to no node.
    make_ghost(&server)?;
    server.apply(&policy("alone", "pods: [10.200.1.0/24]"))?;
    let done = |condition: &Value| condition["message"] == "1 of 1 nodes";
    until_condition(&server, &format!("{POLICIES}/alone"), "Programmed", done).with_context(|| node.log())?;
    // A node whose agent has gone.
    server.add_node_as("ghost", &["192.168.31.99".to_owned()], &["10.200.9.0/24".to_owned()])?;
    until(&node, |cluster| cluster["nodes"] == 2)?;
    server.apply(&policy("devices", "pods: [10.200.1.0/24]"))?;
    let pending = |condition: &Value| condition["message"] == "1 of 2 nodes; not yet on ghost";
    let said = until_condition(&server, &path, "Programmed", pending).with_context(|| node.log())?;
    ensure!((&said["status"], &said["reason"]) == (&json!("False"), &json!("Pending")), "{said}");
    server.delete("/apis/bridge.lan/v1alpha1/bridgenodes/ghost")?;
    server.kubectl(&["wait", "--for=condition=Programmed", "--timeout=30s", "bridgepolicy/devices"], "")?;

    // With the watch running, a change is programmed at once.
    let start = Instant::now();
    server.apply(&policy("next", "pods: [10.200.1.0/24]"))?;
    server.kubectl(&["wait", "--for=condition=Programmed", "--timeout=30s", "bridgepolicy/next"], "")?;
    ensure!(start.elapsed() < Duration::from_secs(4), "two runs of kubectl included: {:?}", start.elapsed());
    Ok(())
}
