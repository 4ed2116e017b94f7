//! What agents write into the cluster, and what the API server itself refuses.

use anyhow::{Context as _, Result};
use bridge_lab::kubernetes::{ApiServer, User, deployed};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{DEADLINE, OPEN, cluster, on_host, on_node, policy, until, until_metrics, until_open};

const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";

/// The condition of a policy, when it speaks of its present generation.
fn condition(server: &ApiServer, name: &str) -> Result<Value> {
    let current = || {
        let policy = server.request(User::Admin, "GET", &format!("{POLICIES}/{name}"), None).ok()?;
        let condition = policy["status"]["conditions"][0].clone();
        (condition["observedGeneration"] == policy["metadata"]["generation"]).then_some(condition)
    };
    eventually(DEADLINE, current).with_context(|| format!("no condition of {name}"))
}

#[test]
fn a_policy_that_is_not_valid_is_told_so_and_the_others_stay_in_force() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    // What the schema cannot say: that a range has its ends in order.
    server.apply(&policy("bad", "sourcePorts: ['9-1']"))?;
    server.apply(&policy("good", "external: [192.168.31.0/24]"))?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;
    let said = condition(&server, "bad")?;
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("Invalid")), "{said}");
    let message = "spec.rules[0].sourcePorts[0]: port range `9-1` ends before it begins; write \"1-9\"";
    assert_eq!(said["message"], message);
    assert_eq!(condition(&server, "good")?["status"], "True");
    let remarks = until(&node, |cluster| cluster["remarks"] != json!([]))?["remarks"].to_string();
    assert!(remarks.contains("policy bad is not valid"), "{remarks}");
    until_metrics(&node, &["bridge_kubernetes_invalid_policies 1"])?;

    // Mended, it is accepted.
    server.apply(&policy("bad", "sourcePorts: ['1-9']"))?;
    eventually(DEADLINE, || condition(&server, "bad").ok().filter(|said| said["status"] == "True"))
        .context("the mended policy is accepted")?;
    until_metrics(&node, &["bridge_kubernetes_invalid_policies 0"])?;

    // All of it for people, too.
    let wanted = "enforce   ebpf      true      2          0";
    let shown = || server.kubectl(&["get", "bridgenodes"], "").ok().filter(|text| text.contains(wanted));
    eventually(DEADLINE, shown)
        .with_context(|| server.kubectl(&["get", "bridgenodes", "-o", "yaml"], "").unwrap_or_default())?;
    let nodes = server.request(User::Admin, "GET", "/apis/bridge.lan/v1alpha1/bridgenodes/b", None)?;
    assert_eq!(nodes["metadata"]["ownerReferences"][0]["kind"], "Node", "it goes with its node");
    let policies =
        json!([{"name": "bad", "observedGeneration": 2}, {"name": "good", "observedGeneration": 1}]);
    assert_eq!(nodes["status"]["policies"], policies);
    assert!(nodes["status"]["interfaces"].as_array().is_some_and(|list| list.contains(&json!("eth0"))));
    let text = server.kubectl(&["get", "bridgepolicies"], "")?;
    assert!(text.contains("bad    True       2") && text.contains("good   True       1"), "{text}");
    Ok(())
}

#[test]
fn the_api_server_refuses_what_the_schema_can_say() -> Result<()> {
    let lab = bridge_lab::lab::Lab::builder().build()?;
    let server = ApiServer::start(&lab)?;
    for (rule, complaint) in [
        ("direction: sideways, protocol: tcp", "Unsupported value: \"sideways\""),
        ("protocol: tcp", "spec.rules.direction: Required value"),
        ("direction: inbound, protocol: tcp, ports: [0]", "greater than or equal to 1"),
        ("direction: inbound, protocol: tcp, ports: [65536]", "less than or equal to 65535"),
        ("direction: inbound, protocol: tcp, ports: ['80:90']", "should match"),
        ("direction: inbound, protocol: tcp, external: [192.168.31.300/24]", "must be of type cidr"),
    ] {
        let yaml = format!(
            "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {{name: p}}\nspec: {{rules: [{{name: r, {rule}}}]}}\n"
        );
        // By the server itself, not by the client that knows its schema.
        let apply = ["apply", "--validate=false", "-f", "-"];
        let error = server.kubectl(&apply, &yaml).expect_err("it is refused").to_string();
        assert!(error.contains(complaint), "{rule}: {error}");
    }
    // Every form that is right is taken.
    let yaml = "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {name: p}\nspec: {rules: [{name: r, direction: inbound, \
                protocol: tcp, ports: [80, '8000-8100', '443'], external: [192.168.31.0/24, 'fd31::/64'], \
                podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}]}}]}\n";
    server.apply(yaml)?;
    let policy = server.request(User::Admin, "GET", &format!("{POLICIES}/p"), None)?;
    assert_eq!(policy["spec"]["rules"][0]["action"], "allow", "the default is filled in");
    Ok(())
}

#[test]
fn the_api_server_takes_every_manifest() -> Result<()> {
    let lab = bridge_lab::lab::Lab::builder().build()?;
    let server = ApiServer::start(&lab)?;
    let list = std::fs::read_to_string(deployed("kustomization.yaml"))?;
    let files = list.lines().filter_map(|line| line.trim().strip_prefix("- "));
    // And one that is applied by hand.
    let files: Vec<&str> =
        files.filter(|file| file.ends_with(".yaml")).chain(["lan-host-token.yaml"]).collect();
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        // What is newer than this server, it leaves out; what is wrong, it refuses.
        server.kubectl(&["apply", "--validate=false", "-f", &deployed(file)], "").context(file.to_owned())?;
    }
    let made =
        server.kubectl(&["-n", "bridge-system", "get", "daemonset,serviceaccount", "-o", "name"], "")?;
    assert!(
        made.contains("daemonset.apps/bridge-agent") && made.contains("serviceaccount/bridge-agent"),
        "{made}"
    );
    Ok(())
}
