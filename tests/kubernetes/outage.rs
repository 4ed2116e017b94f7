//! The API server goes, comes back, has forgotten, or knows us no more.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::User;
use bridge_lab::lab::{Family, Host};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::support::{
    DEADLINE, EVERY_POD, OPEN, allowing_cluster, cluster, cluster_status, is_refused, node_config, on_host,
    on_node, open, policy, until, until_closed, until_current, until_metrics, until_open, until_within,
};

/// A number in the metrics.
fn metric(agent: &Agent, name: &str) -> Result<u64> {
    let text = agent.metrics()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.with_context(|| format!("no {name} in\n{text}"))
}

#[test]
fn what_is_in_force_stays_while_the_api_server_is_away() -> Result<()> {
    let (lab, mut server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
    let mut node = on_node(&lab, &server)?;
    let mut host = on_host(&lab, &server)?;
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    let (allowed, denied) = (c1.at(Family::V4, OPEN), c1.at(Family::V4, OPEN + 1));
    let mut long = until_open(a, allowed, &node)?;

    until_metrics(
        &node,
        &[
            "bridge_kubernetes_connected 1",
            "bridge_kubernetes_disconnected_seconds 0",
            "bridge_kubernetes_current 1",
            "bridge_kubernetes_objects{resource=\"nodes\"} 1",
            "bridge_kubernetes_objects{resource=\"pods\"} 1",
            "bridge_kubernetes_objects{resource=\"bridgepolicies\"} 1",
        ],
    )?;
    server.stop_server();
    for agent in [&node, &host] {
        let cluster = until(agent, |cluster| cluster["connected"] == false)?;
        assert!(cluster["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{cluster}");
        assert!(cluster["failing"].as_object().is_some_and(|failing| !failing.is_empty()), "{cluster}");
        let said = agent.run(&["status"])?;
        assert!(said.contains("UNREACHABLE, enforcement stays active, since 2"), "{said}");
        until_metrics(agent, &["bridge_kubernetes_connected 0"])?;
    }
    let seconds = || metric(&node, "bridge_kubernetes_disconnected_seconds");
    let first = seconds()?;
    eventually(DEADLINE, || seconds().ok().filter(|now| *now > first + 1)).context("it counts")?;
    open(a, allowed).context("enforcement and routes stay")?;
    assert!(is_refused(a, denied)?);

    // Also over restarts: of that cluster nothing can be heard now.
    node.restart()?;
    host.restart()?;
    open(a, allowed).context("after a restart without an API server")?;
    assert!(is_refused(a, denied)?);
    long.round_trip(Duration::from_secs(5))?;
    until(&node, |cluster| {
        cluster["waitingFor"] != json!([]) && cluster["policies"][0]["name"] == "devices"
    })?;

    server.start_server()?;
    until(&node, |cluster| cluster["connected"] == true && cluster["waitingFor"] == json!([]))?;
    until(&host, |cluster| cluster["connected"] == true)?;
    server.kubectl(&["delete", "bridgepolicy", "devices"], "")?;
    until_closed(a, allowed, &node)
}

#[test]
fn who_has_fallen_behind_lists_anew_and_misses_nothing() -> Result<()> {
    let (lab, mut server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    server.apply(&policy("old", EVERY_POD))?;
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _servers = [OPEN, OPEN + 1].map(|port| tcp::Server::echo(&c1.netns, c1.at(Family::V4, port)));
    until_open(a, c1.at(Family::V4, OPEN), &node)?;

    // While the agent sleeps, one policy goes, another comes, and etcd forgets how it was: the watch cannot go on (410).
    let pid = Pid::from_raw(node.pid().cast_signed()).context("a process id")?;
    kill_process(pid, Signal::STOP)?;
    server.kubectl(&["delete", "bridgepolicy", "old"], "")?;
    server.apply(&policy("new", EVERY_POD).replace(&OPEN.to_string(), &(OPEN + 1).to_string()))?;
    server.compact()?;
    server.stop_server();
    server.start_server()?;
    kill_process(pid, Signal::CONT)?;
    until_open(a, c1.at(Family::V4, OPEN + 1), &node)?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)
}

#[test]
fn a_new_token_is_read_when_the_old_one_is_refused() -> Result<()> {
    let (lab, mut server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let node = on_node(&lab, &server)?;
    let _host = on_host(&lab, &server)?;
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)?;
    server.rotate(User::Node)?;
    until(&node, |cluster| cluster["connected"] == false)?;
    server.start_server()?;
    until(&node, |cluster| cluster["connected"] == true)?;
    server.apply(&policy("all", "pods: [10.200.1.0/24]"))?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;
    until_current(&node).map(drop)
}

#[test]
fn a_token_may_end_with_a_newline_and_one_inside_is_refused_in_one_line() -> Result<()> {
    let (lab, server) = cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let kubeconfig = fs::read_to_string(server.kubeconfig(User::Node))?;
    let (_, rest) = kubeconfig.split_once("tokenFile: ").context("a token file")?;
    let file = rest.split('}').next().unwrap_or_default();
    let token = fs::read_to_string(file)?;
    fs::write(file, "Zm9v\nYmFy\n")?;
    server.apply(&policy("devices", "pods: [10.200.1.0/24]"))?;
    let mut node = Agent::start(&lab, lab.b(), &node_config(&server, ""))?;
    let _host = on_host(&lab, &server)?;
    let _echo = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    let refusal = format!("cannot use the token file {file}: it has characters that no token has");
    let status = until(&node, |cluster| cluster["failing"]["connection"].is_string())?;
    assert!(status["failing"]["connection"].as_str().is_some_and(|text| text.contains(&refusal)), "{status}");
    // Over several attempts.
    std::thread::sleep(Duration::from_secs(12));
    let log = node.log();
    assert_eq!(log.lines().filter(|line| line.contains(file)).count(), 1, "{log}");
    assert!(log.lines().any(|line| line.contains(&refusal)) && !log.contains("Zm9v"), "{log}");
    assert!(open(a, c1.at(Family::V4, OPEN)).is_err(), "the cluster is not known");

    fs::write(file, format!("{token}\n"))?;
    until(&node, |cluster| cluster["connected"] == true)?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;
    fs::write(file, format!(" {token}\r\n\n"))?;
    node.restart()?;
    until(&node, |cluster| cluster["connected"] == true).map(drop)
}

#[test]
fn a_server_that_does_not_know_a_definition_is_believed_after_a_minute() -> Result<()> {
    let (lab, server, mut node, _others) = allowing_cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let saved = node.state_directory().join("kubernetes.json");
    eventually(DEADLINE, || fs::read_to_string(&saved).ok().filter(|text| text.contains("devices")))
        .context("the known state is saved")?;

    // As a server is that has just started; the agent has not seen the policy go.
    node.kill()?;
    server.kubectl(&["delete", "crd", "bridgepolicies.bridge.lan"], "")?;
    node.restart()?;
    let status = until(&node, |cluster| cluster["connected"] == false)?;
    assert!(status["failing"]["bridgepolicies"].is_string(), "{status}");
    open(a, c1.at(Family::V4, OPEN)).context("the known state stays")?;
    // It was no mistake.
    until_within(Duration::from_secs(90), &node, |cluster| cluster["connected"] == true)?;
    until_closed(a, c1.at(Family::V4, OPEN), &node)
}

/// Counts the TCP connection attempts that arrive at a pod.
fn count_arrivals(pod: &Host) -> Result<()> {
    let mut command = std::process::Command::new("iptables");
    command.args(["-A", "INPUT", "-p", "tcp", "--syn"]);
    pod.netns.output(command).map(drop)
}

fn arrivals(pod: &Host) -> Result<u64> {
    let mut command = std::process::Command::new("iptables");
    command.args(["-nvxL", "INPUT"]);
    let listed = pod.netns.output(command)?;
    let line = listed.lines().nth(2).with_context(|| listed.clone())?;
    Ok(line.split_whitespace().next().context("a counter")?.parse()?)
}

#[test]
fn a_first_boot_without_an_api_server_is_closed_until_it_answers() -> Result<()> {
    for engines in ["ebpf", "iptables", "nftables", "ebpf, iptables", "ebpf, nftables"] {
        let (lab, mut server) = cluster()?;
        let (a, c1) = (lab.a(), lab.c1());
        a.netns.ip("route add 10.200.0.0/16 via 192.168.31.17")?;
        server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
        server.run_pod("shop", "c1", c1)?;
        server.apply(&policy("devices", "podSelector: {matchLabels: {app: api}}"))?;
        server.stop_server();
        let allowed = c1.at(Family::V4, OPEN);
        let _echo = tcp::Server::echo(&c1.netns, allowed)?;
        open(a, allowed).context("without an agent, everything is open")?;
        count_arrivals(c1)?;
        let config = node_config(&server, "").replace("engines: [ebpf]", &format!("engines: [{engines}]"));
        let node = Agent::start(&lab, lab.b(), &config)?;
        assert!(open(a, allowed).is_err(), "{engines}: open");
        assert_eq!(arrivals(c1)?, 0, "{engines}: a stranger's SYN arrives");
        let ready = node.command(&["status", "--ready"]).output()?;
        assert!(!ready.status.success(), "{engines}: ready");
        let status = cluster_status(&node)?;
        assert!(status["remarks"].to_string().contains("the cluster is not known yet"), "{status}");

        // A pod that starts meanwhile.
        c1.netns.ip("address add 10.200.9.9/32 dev lo")?;
        let way = lab.b().netns.ip("route get 10.200.1.91")?;
        let interface =
            way.split_whitespace().skip_while(|word| *word != "dev").nth(1).context(way.clone())?;
        lab.b().netns.ip(&format!("route add 10.200.9.9/32 dev {interface}"))?;
        let late = std::net::SocketAddr::new("10.200.9.9".parse()?, OPEN);
        let _late = tcp::Server::echo(&c1.netns, late)?;
        until_closed(a, late, &node)?;

        server.start_server()?;
        until_current(&node)?;
        until_open(a, allowed, &node)?;
        let status = cluster_status(&node)?;
        assert!(!status["remarks"].to_string().contains("not known yet"), "{status}");
        assert!(is_refused(a, c1.at(Family::V4, OPEN + 1))?);
    }
    Ok(())
}

#[test]
fn a_reboot_without_an_api_server_enforces_the_cluster_as_last_known() -> Result<()> {
    let (lab, mut server, mut node, _others) = allowing_cluster()?;
    let (a, c1) = (lab.a(), lab.c1());
    let saved = node.state_directory().join("kubernetes.json");
    eventually(DEADLINE, || fs::read_to_string(&saved).ok().filter(|text| text.contains("devices")))
        .context("the known state is saved")?;
    // As a reboot does: nothing is left in the kernel.
    node.kill()?;
    fs::remove_dir_all(node.pins())?;
    fs::create_dir_all(node.pins())?;
    server.stop_server();
    let denied = c1.at(Family::V4, OPEN + 1);
    let _echo = tcp::Server::echo(&c1.netns, denied)?;
    // The kernel detaches what is no longer pinned in its own time.
    eventually(DEADLINE, || open(a, denied).ok()).context("something is still enforced")?;
    node.restart()?;
    open(a, c1.at(Family::V4, OPEN)).context("the policy of before")?;
    assert!(is_refused(a, denied)?);
    Ok(())
}

#[test]
fn a_cluster_that_could_not_be_saved_is_saved_later() -> Result<()> {
    let (lab, server) = cluster()?;
    let state = bridge_lab::agent::state_directory(&lab.directory().join("b/agent.sock"));
    let saved = state.join("kubernetes.json");
    let node = Agent::start(&lab, lab.b(), &node_config(&server, ""))?;
    until_current(&node)?;
    eventually(DEADLINE, || saved.exists().then_some(())).context("saved")?;
    // Nothing can take the place of a directory with a file in it.
    fs::remove_file(&saved)?;
    fs::create_dir(&saved)?;
    fs::write(saved.join("file"), "")?;
    server.apply(&policy("devices", EVERY_POD))?;
    eventually(DEADLINE, || node.log().contains("cannot save the cluster").then_some(()))
        .with_context(|| node.log())?;
    fs::remove_dir_all(&saved)?;
    // Without another change of the cluster.
    eventually(DEADLINE, || fs::read_to_string(&saved).ok().filter(|text| text.contains("devices")))
        .with_context(|| node.log())?;
    Ok(())
}
