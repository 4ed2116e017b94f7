//! `bridge-agent run` on a LAN host: its routes from start to `down`, as the kernel and its own words have them.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::agent::Agent;
use bridge_lab::lab::Lab;
use bridge_lab::wait::eventually;
use serde_json::Value;

const SECONDS: Duration = Duration::from_secs(10);

fn config(routes: &str) -> String {
    format!("role: host\nnetworks: {{pods: [10.200.0.0/16, \"fd20::/16\"]}}\n{routes}")
}

/// Routes with the mark of bridge, as `ip` shows them.
fn own_routes(lab: &Lab) -> BTreeSet<String> {
    ["-4", "-6"]
        .iter()
        .flat_map(|family| {
            let text = lab.a().netns.ip(&format!("{family} route show table all proto 98")).unwrap();
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        })
        .collect()
}

#[track_caller]
fn eventually_own(lab: &Lab, beginnings: &[&str]) {
    let fits = |found: &BTreeSet<String>| {
        found.len() == beginnings.len()
            && beginnings.iter().all(|begin| found.iter().any(|line| line.starts_with(begin)))
    };
    let seen = eventually(SECONDS, || Some(own_routes(lab)).filter(fits));
    assert!(seen.is_some(), "expected {beginnings:?}, found {:#?}", own_routes(lab));
}

/// Returns the answer of the agent's API to `curl`.
fn get(lab: &Lab, agent: &Agent, path: &str) -> Result<String> {
    let mut curl = std::process::Command::new("curl");
    curl.args(["-s", "--max-time", "5", "--unix-socket"])
        .arg(agent.socket())
        .arg(format!("http://bridge{path}"));
    lab.a().netns.output(curl)
}

fn json(lab: &Lab, agent: &Agent, path: &str) -> Result<Value> {
    let text = get(lab, agent, path)?;
    serde_json::from_str(&text).with_context(|| text)
}

#[test]
fn routes_are_added_at_start_stay_after_sigterm_and_go_with_down() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let yaml = config(
        "routes: {static: [{to: 10.200.1.0/24, via: 192.168.31.17}, {to: \"fd20:1::/64\", via: \"fd31::17\"}]}",
    );
    let both = ["10.200.1.0/24 via 192.168.31.17 dev eth0", "fd20:1::/64 via fd31::17 dev eth0"];
    lab.a().netns.ip("route add 10.201.0.0/16 via 192.168.31.17 proto static")?;
    lab.a().netns.ip("route add 10.202.0.0/16 via 192.168.31.17 proto 98")?;
    let mut agent = Agent::start(&lab, lab.a(), &yaml)?;
    eventually_own(&lab, &both);

    // A running agent would restore the removed routes: the command says so, and removes none.
    for command in [&["down"][..], &["routes", "withdraw"]] {
        let error = agent.run(command).unwrap_err().to_string();
        assert!(error.contains("is running and would put the routes back"), "{error}");
    }
    eventually_own(&lab, &both);

    assert!(agent.stop()?.success());
    assert_eq!(own_routes(&lab).len(), 2, "routes outlive the agent");
    let said = agent.run(&["down"])?;
    assert!(said.contains("Withdrew 2 routes."), "{said}");
    assert_eq!(own_routes(&lab), BTreeSet::new());
    assert!(lab.a().netns.ip("route show 10.201.0.0/16")?.contains("proto static"), "not ours");
    Ok(())
}

#[test]
fn a_reload_changes_what_differs_and_a_bad_one_nothing() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let fixed = |to: &str, rest: &str| {
        config(&format!("routes: {{static: [{{to: {to}, via: 192.168.31.17}}]{rest}}}"))
    };
    let mut agent = Agent::start(&lab, lab.a(), &fixed("10.200.1.0/24", ""))?;
    eventually_own(&lab, &["10.200.1.0/24 via 192.168.31.17 dev eth0 metric 1024"]);

    // Refused for a reason that only shows when it is carried out: no key.
    let discovery = ", discovery: {listen: \"192.168.31.67:12345\", keyFile: /nonexistent/key}";
    agent.reload(&fixed("10.200.7.0/24", discovery))?;
    let last = json(&lab, &agent, "/v1/status")?["reloads"]["last"]["error"].clone();
    assert!(last.as_str().is_some_and(|error| error.contains("/nonexistent/key")), "{last}");
    eventually_own(&lab, &["10.200.1.0/24 via"]);

    // One route more: the one that is there is not touched.
    let yaml = config(
        "routes: {static: [{to: 10.200.1.0/24, via: 192.168.31.17}, {to: 10.200.2.0/24, via: 192.168.31.17}]}",
    );
    agent.reload(&yaml)?;
    eventually_own(&lab, &["10.200.1.0/24 via", "10.200.2.0/24 via"]);
    let counters = json(&lab, &agent, "/v1/status")?["routes"]["counters"].clone();
    assert_eq!((&counters["added"], &counters["deleted"]), (&2.into(), &0.into()), "{counters}");

    // Another metric for all, another table for all.
    agent.reload(&fixed("10.200.1.0/24", ", metric: 50"))?;
    eventually_own(&lab, &["10.200.1.0/24 via 192.168.31.17 dev eth0 metric 50"]);
    agent.reload(&fixed("10.200.2.0/24", ", table: 1234"))?;
    eventually_own(&lab, &["10.200.2.0/24 via 192.168.31.17 dev eth0 table 1234 metric 1024"]);
    // Without the section none is wanted.
    agent.reload(&config(""))?;
    eventually_own(&lab, &[]);
    let answer = get(&lab, &agent, "/v1/routes")?;
    assert!(answer.contains("has no `routes`"), "{answer}");
    agent.reload(&fixed("10.200.1.0/24", ""))?;
    eventually_own(&lab, &["10.200.1.0/24 via"]);
    Ok(())
}

#[test]
fn what_is_wanted_and_what_became_of_it_is_told() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let yaml = config(
        "routes: {static: [{to: 10.200.1.0/24, via: 192.168.31.17}, {to: 10.200.2.0/24, via: 192.168.77.1}]}",
    );
    let agent = Agent::start(&lab, lab.a(), &yaml)?;
    eventually_own(&lab, &["10.200.1.0/24 via"]);
    let why = "next hop 192.168.77.1 is not on-link";
    let text = agent.run(&["status"])?;
    for part in ["2 wanted: 1 installed, 1 refused", why, "next hops    1, all answer"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let status = &json(&lab, &agent, "/v1/status")?["routes"];
    assert_eq!(status["states"], serde_json::json!({"installed": 1, "refused": 1}));
    assert_eq!(status["counters"]["added"], 1);
    let list = json(&lab, &agent, "/v1/routes")?;
    assert_eq!(list["routes"][0]["state"], "installed");
    assert_eq!(list["routes"][0]["route"], "10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024");
    assert_eq!(list["routes"][1]["state"], "refused");
    assert!(list["routes"][1]["reason"].as_str().is_some_and(|reason| reason.contains(why)), "{list}");
    assert_eq!(
        list["nextHops"],
        serde_json::json!([{"address": "192.168.31.17", "dev": "eth0", "up": true}])
    );

    // Events while they happen, from the agent's own mouth, and the counts after them.
    let mut monitor = agent.command(&["monitor", "--count", "1"]);
    monitor.stdout(std::process::Stdio::piped());
    let mut monitor = lab.a().netns.spawn_command(monitor)?;
    let ended = eventually(SECONDS, || {
        // Until the monitor listens.
        lab.a().netns.ip("route del 10.200.1.0/24 proto 98").ok();
        monitor.wait(Duration::from_millis(100)).unwrap()
    });
    assert!(ended.is_some_and(|status| status.success()));
    let said = std::io::read_to_string(monitor.child().stdout.take().context("its output")?)?;
    assert!(said.contains(" route-added + 10.200.1.0/24 via 192.168.31.17 dev eth0"), "{said}");
    let metrics = get(&lab, &agent, "/metrics")?;
    for line in [
        "bridge_routes{state=\"installed\"} 1",
        "bridge_routes{state=\"refused\"} 1",
        "bridge_next_hops{state=\"up\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let repaired = metrics
        .lines()
        .find_map(|line| line.strip_prefix("bridge_route_operations_total{kind=\"repaired\"} "));
    assert!(repaired.is_some_and(|count| count.parse::<u64>().unwrap() >= 1), "{metrics}");
    Ok(())
}

#[test]
fn a_reload_changes_discovery_and_forgets_only_what_it_no_longer_believes() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    std::fs::create_dir_all(lab.directory())?;
    let key = |name: &str| -> Result<String> {
        let path = lab.directory().join(name);
        std::fs::write(&path, format!("the key of these tests: {name}"))?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        Ok(path.display().to_string())
    };
    let (first, second) = (key("first")?, key("second")?);
    let yaml = |pods: &str, port: u16, key: &str| {
        format!(
            "role: host\nnetworks: {{pods: [{pods}]}}\n\
             routes: {{discovery: {{listen: \"192.168.31.67:{port}\", keyFile: {key}}}}}"
        )
    };
    let mut agent = Agent::start(&lab, lab.a(), &yaml("10.200.0.0/16", 12345, &first))?;
    let probe = |agent: &Agent, port: u16, key: &str| {
        let to = format!("192.168.31.67:{port}");
        lab.c1().netns.output(agent.command(&[
            "discover",
            "probe",
            &to,
            "--lifetime",
            "10m",
            "--key-file",
            key,
        ]))
    };
    let output = probe(&agent, 12345, &first)?;
    assert!(output.contains("sees this pod as 192.168.31.17 and reaches it for 600 s"), "{output}");
    let there = ["10.200.1.91 via 192.168.31.17 dev eth0"];
    eventually_own(&lab, &there);

    // Another key, on the same address: the pod that is known stays.
    agent.reload(&yaml("10.200.0.0/16", 12345, &second))?;
    assert!(probe(&agent, 12345, &first).unwrap_err().to_string().contains("compare the key files"));
    probe(&agent, 12345, &second)?;
    // Another address: it is known there too.
    agent.reload(&yaml("10.200.0.0/16", 12346, &second))?;
    assert!(probe(&agent, 12345, &second).is_err(), "the listener has ended");
    eventually_own(&lab, &there);
    let counters = json(&lab, &agent, "/v1/status")?["routes"]["counters"].clone();
    assert_eq!((&counters["added"], &counters["deleted"]), (&1.into(), &0.into()), "{counters}");
    // A restart knows it as well.
    agent.restart()?;
    eventually_own(&lab, &there);
    assert_eq!(json(&lab, &agent, "/v1/status")?["routes"]["discovery"]["pods"], 1);

    // Where pods may no longer be.
    agent.reload(&yaml("10.201.0.0/16", 12346, &second))?;
    eventually_own(&lab, &[]);
    let refused = probe(&agent, 12346, &second).unwrap_err().to_string();
    assert!(refused.contains("lies in none of `networks.pods`"), "{refused}");
    // An address that is not this host's: refused, and all goes on.
    let elsewhere = yaml("10.200.0.0/16", 12346, &second).replace("31.67", "31.99");
    agent.reload(&elsewhere)?;
    let last = json(&lab, &agent, "/v1/status")?["reloads"]["last"]["error"].clone();
    assert!(last.as_str().is_some_and(|error| error.contains("cannot listen on 192.168.31.99")), "{last}");
    agent.reload(&yaml("10.200.0.0/16", 12346, &second))?;
    probe(&agent, 12346, &second)?;
    eventually_own(&lab, &there);
    // Without discovery nothing that it said is wanted.
    agent.reload(&config("routes: {}"))?;
    eventually_own(&lab, &[]);
    Ok(())
}

#[test]
fn addresses_that_come_later_are_bound_later_and_a_removed_socket_comes_back() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let key = lab.directory().join("key");
    std::fs::write(&key, "the key of the tests, long enough\n")?;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
    let discovery = format!("{{listen: \"192.168.31.99:12345\", keyFile: {}}}", key.display());
    let yaml = config(&format!(
        "routes: {{static: [{{to: 10.200.1.0/24, via: 192.168.31.17}}], discovery: {discovery}}}\napi: {{metrics: \"192.168.31.99:9469\"}}\n"
    ));
    // Neither keeps the agent from starting, nor anything else from being done.
    let agent = Agent::start(&lab, lab.a(), &yaml)?;
    eventually_own(&lab, &["10.200.1.0/24 via 192.168.31.17"]);
    let failure = json(&lab, &agent, "/v1/status")?["routes"]["discovery"]["failure"].clone();
    assert!(failure.as_str().is_some_and(|text| text.contains("192.168.31.99:12345")), "{failure}");
    let said = agent.run(&["status"])?;
    assert!(said.contains("NOT LISTENING"), "{said}");

    lab.a().netns.ip("address add 192.168.31.99/24 dev eth0")?;
    let connects = |port: u16| {
        let netns = &lab.b().netns;
        netns.run(|| std::net::TcpStream::connect(("192.168.31.99", port)).is_ok())
    };
    for port in [12345, 9469] {
        assert!(eventually(SECONDS, || connects(port).then_some(())).is_some(), "{port}:\n{}", agent.log());
    }
    let failure = json(&lab, &agent, "/v1/status")?["routes"]["discovery"]["failure"].clone();
    assert!(failure.is_null(), "{failure}");

    for remove_directory in [false, true] {
        let directory = agent.socket().parent().context("a directory")?.to_owned();
        if remove_directory {
            std::fs::rename(&directory, directory.with_extension("old"))?;
        } else {
            std::fs::remove_file(agent.socket())?;
        }
        let answers = || json(&lab, &agent, "/v1/status").ok();
        assert!(eventually(SECONDS, answers).is_some(), "{remove_directory}:\n{}", agent.log());
    }
    Ok(())
}
