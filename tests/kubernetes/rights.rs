//! What the accounts of deploy/kubernetes may do in the cluster: what agents do, and no more.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User, deployed};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{
    DEADLINE, OPEN, allowing_cluster, cluster, node_config, on_host, on_node, open, policy, until,
    until_closed, until_current, until_open, until_routes,
};

const LEASE_ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/bridge-system/roles/bridge-agent";
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";

/// Verb and resource of everything that a role allows; `path` is that of the role.
fn granted(server: &ApiServer, path: &str) -> Result<BTreeSet<String>> {
    let role = server.request(User::Admin, "GET", path, None)?;
    let mut rights = BTreeSet::new();
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    for rule in role["rules"].as_array().context("a role has rules")? {
        for (group, resource) in list(&rule["apiGroups"]).iter().flat_map(|group| {
            list(&rule["resources"]).into_iter().map(move |resource| (group.clone(), resource))
        }) {
            rights.extend(list(&rule["verbs"]).iter().map(|verb| format!("{verb} {resource}.{group}")));
        }
    }
    Ok(rights)
}

#[test]
fn accounts_may_do_what_agents_do_and_no_more() -> Result<()> {
    let (lab, server) = cluster()?;
    server.install_calico()?;
    server.install_cilium()?;
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", lab.c1())?;
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
    server.apply(
        "apiVersion: bridge.lan/v1alpha1\nkind: BridgeNamespacePolicy\nmetadata: {name: tenant, namespace: shop}\nspec: {rules: [{name: r, \
         direction: inbound, protocol: icmp}]}\n",
    )?;
    // For an Event.
    server.apply(&policy("wrong", "sourcePorts: ['1-9', 5]"))?;
    // Tokens as pods get them, in the place of those that the tests usually use.
    for user in [User::Node, User::Host] {
        server.take_account_token(user)?;
    }
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let c1 = lab.c1();
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    until_open(lab.a(), c1.at(Family::V4, OPEN), &node)?;
    for (user, role) in [(User::Node, "bridge-agent"), (User::Host, "bridge-lan-host")] {
        let mut granted = granted(&server, &format!("{ROLES}/{role}"))?;
        if user == User::Node {
            granted.extend(self::granted(&server, LEASE_ROLE)?);
        }
        ensure!(granted.len() > 5, "{granted:?}");
        let done = || server.requests_of(user).unwrap_or_default();
        eventually(DEADLINE, || (done() == granted).then_some(())).with_context(|| {
            let done = done();
            let unused: Vec<_> = granted.difference(&done).collect();
            let refused: Vec<_> = done.difference(&granted).collect();
            format!("{role}: never used {unused:?}, not granted {refused:?}")
        })?;
    }
    Ok(())
}

#[test]
fn the_kubeconfig_of_lan_hosts_is_made_by_the_script() -> Result<()> {
    let (lab, server) = cluster()?;
    // The controller that makes tokens does not run here.
    server.fill_token_secret("bridge-system", "bridge-lan-host")?;
    let kubeconfig = lab.directory().join("lan-host.kubeconfig");
    std::fs::write(&kubeconfig, server.run_script(&deployed("lan-host-kubeconfig.sh"))?)?;
    let config = format!("role: host\nkubernetes: {{kubeconfig: {}}}\nroutes: {{}}\n", kubeconfig.display());
    let host = Agent::start(&lab, lab.a(), &config)?;
    until_current(&host)?;
    until_routes(&lab, &["10.200.1.0/24 via 192.168.31.17", "fd20:1::/64 via fd31::17"])?;

    // As an overlay with another namespace and a prefix has it.
    let manifest = std::fs::read_to_string(deployed("lan-host.yaml"))?;
    server.kubectl(&["delete", "-f", &deployed("lan-host.yaml")], "")?;
    server.add_namespace("edge", &json!({}))?;
    server.apply(
        &manifest.replace("bridge-system", "edge").replace("bridge-lan-host", "site-bridge-lan-host"),
    )?;
    server.fill_token_secret("edge", "site-bridge-lan-host")?;
    let text = server.run_script(&deployed("lan-host-kubeconfig.sh"))?;
    ensure!(
        text.contains("current-context: bridge") && text != std::fs::read_to_string(&kubeconfig)?,
        "{text}"
    );
    Ok(())
}

/// Returns a role without the right to a resource.
fn without(role: &Value, resource: &str) -> Value {
    let mut rules = role["rules"].clone();
    for rule in rules.as_array_mut().into_iter().flatten() {
        if let Some(resources) = rule["resources"].as_array_mut() {
            resources.retain(|one| one != resource);
        }
    }
    let rules: Vec<&Value> =
        rules.as_array().into_iter().flatten().filter(|rule| rule["resources"] != json!([])).collect();
    json!({"rules": rules})
}

#[test]
fn a_resource_that_is_refused_stops_no_other() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1, c2) = (lab.a(), lab.c1(), lab.c2());
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    let mut node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _servers = [c1, c2].map(|pod| tcp::Server::echo(&pod.netns, pod.at(Family::V4, OPEN)));
    until_open(a, c1.at(Family::V4, OPEN), &node)?;
    let saved = node.state_directory().join("kubernetes.json");
    eventually(DEADLINE, || std::fs::read_to_string(&saved).ok().filter(|text| text.contains("devices")))
        .context("the known state is saved")?;
    let path = format!("{ROLES}/bridge-agent");
    let role = server.request(User::Admin, "GET", &path, None)?;
    server.request(User::Admin, "PATCH", &path, Some(&without(&role, "bridgepolicies")))?;
    node.restart()?;
    until(&node, |cluster| cluster["failing"]["bridgepolicies"].is_string())?;
    // The policy is the last known one; its pods are the present ones.
    server.add_pod("shop", "c2", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c2", c2)?;
    until_open(a, c2.at(Family::V4, OPEN), &node)?;
    server.delete("/api/v1/namespaces/shop/pods/c1")?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)
}

#[test]
fn an_agent_with_the_role_of_an_older_version_follows_all_that_it_may() -> Result<()> {
    const RESOURCE: &str = "bridgenamespacepolicies";
    let (lab, server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let path = format!("{ROLES}/bridge-agent");
    let role = server.request(User::Admin, "GET", &path, None)?;
    let older = without(&without(&role, RESOURCE), &format!("{RESOURCE}/status"));
    server.request(User::Admin, "PATCH", &path, Some(&older))?;
    let to = c1.at(Family::V4, OPEN);
    let _echo = tcp::Server::echo(&c1.netns, to)?;
    // Where policies of namespaces are off, the right to them is not needed.
    let mut node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let status = until_current(&node)?;
    ensure!(status["connected"] == true && status["failing"] == json!({}), "{status}");
    until_closed(a, to, &node)?;
    server.apply(&policy("devices", "pods: [10.200.1.0/24]"))?;
    until_open(a, to, &node)?;
    // Where they are on, everything else is followed, and the right and its manifest are named.
    let on = node_config(&server, "").replace("nodeName: b}", "nodeName: b, namespacePolicies: true}");
    node.reload(&on)?;
    let status = until(&node, |cluster| cluster["failing"][RESOURCE].is_string())?;
    let reason = status["failing"][RESOURCE].to_string();
    ensure!(reason.contains("list and watch bridgenamespacepolicies.bridge.lan"), "{reason}");
    ensure!(reason.contains("apply deploy/kubernetes/rbac.yaml"), "{reason}");
    ensure!(status["failing"].as_object().is_some_and(|failing| failing.len() == 1), "{status}");
    ensure!(status["current"] == false, "{status}");
    server.kubectl(&["delete", "bridgepolicy", "devices"], "")?;
    until_closed(a, to, &node)?;
    server.apply(&policy("again", "pods: [10.200.1.0/24]"))?;
    until_open(a, to, &node)?;
    let ready = node.command(&["status", "--ready"]).output()?;
    let said = String::from_utf8_lossy(&ready.stderr).into_owned();
    ensure!(!ready.status.success() && said.contains("rbac.yaml"), "{said}");
    server.request(User::Admin, "PATCH", &path, Some(&json!({"rules": role["rules"]})))?;
    until(&node, |cluster| cluster["connected"] == true)?;
    until_current(&node).map(drop)
}

#[test]
fn a_right_that_is_taken_away_is_told_and_leaves_in_force_what_was() -> Result<()> {
    let (lab, server, mut node, _others) = allowing_cluster()?;
    let (a, c1) = (lab.a(), lab.c1());

    let path = format!("{ROLES}/bridge-agent");
    let role = server.request(User::Admin, "GET", &path, None)?;
    server.request(User::Admin, "PATCH", &path, Some(&without(&role, "bridgepolicies")))?;
    // An open watch continues; a new connection is refused.
    node.restart()?;
    let status = until(&node, |cluster| cluster["connected"] == false)?;
    let reason = status["failing"]["bridgepolicies"].to_string();
    ensure!(reason.contains("the right to list and watch bridgepolicies.bridge.lan"), "{status}");
    ensure!(
        reason.contains("is forbidden") && reason.contains("apply deploy/kubernetes/rbac.yaml"),
        "{status}"
    );
    ensure!(status["current"] == false, "a policy may have come: {status}");
    let report = || {
        let node =
            server.request(User::Admin, "GET", "/apis/bridge.lan/v1alpha1/bridgenodes/b", None).ok()?;
        let conditions = node["status"]["conditions"].as_array()?.clone();
        let current = conditions.into_iter().find(|one| one["type"] == "Current")?;
        (current["status"] == "False" && node["status"]["errorCount"] != 0).then_some(current)
    };
    let current = eventually(DEADLINE, report).context("the BridgeNode says it")?;
    ensure!(current["reason"] == "WatchRefused" || current["reason"] == "NotListed", "{current}");
    open(a, c1.at(Family::V4, OPEN)).context("not being allowed to see a policy is not its being gone")?;

    server.request(User::Admin, "PATCH", &path, Some(&json!({"rules": role["rules"]})))?;
    until(&node, |cluster| cluster["connected"] == true)?;
    until_current(&node)?;
    server.kubectl(&["delete", "bridgepolicy", "devices"], "")?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)
}

#[test]
fn with_own_node_an_agent_writes_the_object_of_no_other_node() -> Result<()> {
    const NODES: &str = "/apis/bridge.lan/v1alpha1/bridgenodes";
    let (lab, server) = cluster()?;
    server.add_node_as("other", &["192.168.31.18".to_owned()], &["10.200.2.0/24".to_owned()])?;
    server.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: agent, namespace: bridge-system}\nspec: {nodeName: b, \
         serviceAccountName: bridge-agent, containers: [{name: c, image: none}]}\n",
    )?;
    server.take_pod_token(User::Node, "agent")?;
    let write = |name: &str| {
        let object = json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgeNode", "metadata": {"name": name}, "spec": {}});
        let error = server.request(User::Node, "POST", NODES, Some(&object)).err();
        server.request(User::Admin, "DELETE", &format!("{NODES}/{name}"), None).ok();
        error.map(|error| format!("{error:#}"))
    };
    let said = write("other");
    ensure!(said.is_none(), "without the component, any: {said:?}");
    server.kubectl(&["apply", "-f", &deployed("components/own-node/policy.yaml")], "")?;
    // The API server takes some time to read it.
    let said = eventually(DEADLINE, || write("other")).context("the object of another node is taken")?;
    ensure!(
        said.contains("an agent may write the BridgeNode of its own node only, not that of other"),
        "{said}"
    );
    let own = write("b");
    ensure!(own.is_none(), "{own:?}");
    // The agent works with it.
    let node = on_node(&lab, &server)?;
    let written = || {
        let object = server.request(User::Admin, "GET", &format!("{NODES}/b"), None).ok()?;
        object["status"]["heartbeatTime"].is_string().then_some(())
    };
    eventually(DEADLINE, written).with_context(|| node.log())?;
    Ok(())
}
