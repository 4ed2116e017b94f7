//! Figures of the contract with the cluster: writes to the API server, the time to `Programmed`, many large policies.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Maps, Pins};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::Lab;
use bridge_lab::wait::{eventually, patience};
use serde_json::{Value, json};

use crate::support::{DEADLINE, cluster, node_config, on_node, until_within};

const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";
const STATUS_WRITE: &str = "patch bridgepolicies/status.bridge.lan";
/// Requests at a time.
const CLIENTS: usize = 8;
/// From the rule in the kernel to the condition that says so.
const PROGRAMMED: Duration = Duration::from_secs(1);

fn object(name: &str, rules: &[Value]) -> Value {
    json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": name}, "spec": {"rules": rules}})
}

fn rule(name: &str, port: usize, host: usize) -> Value {
    json!({
        "name": name, "direction": "inbound", "protocol": "tcp", "ports": [1 + port % 60_000],
        "external": [format!("192.168.31.{}/32", 1 + host % 250)],
    })
}

fn create(server: &ApiServer, policies: &[Value]) -> Result<()> {
    thread::scope(|scope| {
        let parts = policies.chunks(policies.len().div_ceil(CLIENTS));
        let post = |policy| server.request(User::Admin, "POST", POLICIES, Some(policy)).map(drop);
        let clients: Vec<_> = parts.map(|part| scope.spawn(move || part.iter().try_for_each(post))).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| Ok(())))
    })
}

fn memory_kib(agent: &Agent, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.and_then(|line| line.trim().strip_suffix(" kB")).context(field.to_owned())?.parse()?)
}

/// The names of the active rules in eBPF.
fn in_kernel(maps: &Maps) -> Result<Vec<String>> {
    let count = maps.active_settings()?.rule_count as usize;
    let name = |info: &bridge_common::filter::policy::RuleInfo| {
        let length = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
        String::from_utf8_lossy(&info.name[..length]).into_owned()
    };
    Ok(maps.rule_info(maps.slot())?.iter().take(count).map(name).collect())
}

fn programmed(policy: &Value) -> Option<&str> {
    let conditions = policy["status"]["conditions"].as_array()?;
    conditions.iter().find(|one| one["type"] == "Programmed")?["status"].as_str()
}

fn until_programmed(server: &ApiServer, count: usize, node: &Agent) -> Result<()> {
    let all = || {
        let list = server.request(User::Admin, "GET", POLICIES, None).ok()?;
        let items = list["items"].as_array()?;
        let done = items.iter().filter(|policy| programmed(policy) == Some("True")).count();
        (done == count).then_some(())
    };
    eventually(patience(DEADLINE * 6), all).with_context(|| node.log())
}

#[test]
fn a_policy_in_force_is_programmed_within_a_second() -> Result<()> {
    let (lab, server) = cluster()?;
    let node = on_node(&lab, &server)?;
    let others: Vec<Value> = (0..100).map(|n| object(&format!("other-{n}"), &[rule("r", n, n)])).collect();
    create(&server, &others)?;
    until_programmed(&server, others.len(), &node)?;
    let maps = Maps::open(&Pins::new(node.pins()))?;
    let mut times = Vec::new();
    for number in 0..10 {
        let name = format!("new-{number}");
        create(&server, &[object(&name, &[rule("r", number, number)])])?;
        let rule = format!("{name}.r");
        eventually(DEADLINE, || in_kernel(&maps).ok()?.contains(&rule).then_some(()))
            .with_context(|| node.log())?;
        let start = Instant::now();
        let path = format!("{POLICIES}/{name}");
        let is_programmed = || {
            let policy = server.request(User::Admin, "GET", &path, None).ok()?;
            (programmed(&policy)? == "True").then_some(())
        };
        eventually(DEADLINE, is_programmed).with_context(|| node.log())?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!("programmed after {:?} (median), {:?} (most)", times[times.len() / 2], times[times.len() - 1]);
    ensure!(times[times.len() / 2] < patience(PROGRAMMED), "{times:?}");
    Ok(())
}

/// `BRIDGE_AGENT=target/release/bridge-agent cargo test -p bridge-tests --test kubernetes a_thousand_policies_cost -- --ignored
/// --nocapture`
#[test]
#[ignore = "measures for two minutes"]
fn a_thousand_policies_cost_less_than_a_status_write_each_and_minute() -> Result<()> {
    const COUNT: usize = 1000;
    const TIME: Duration = Duration::from_secs(120);
    let lab = Lab::builder().nodes(2).without_routes().build()?;
    let server = ApiServer::start(&lab)?;
    let mut nodes = Vec::new();
    for (number, host) in lab.nodes().iter().enumerate() {
        server.add_node(&lab, u8::try_from(number)?)?;
        let config = node_config(&server, "").replace("nodeName: b}", &format!("nodeName: {}}}", host.name));
        nodes.push(Agent::start(&lab, host, &config)?);
    }
    let policies: Vec<Value> = (0..COUNT).map(|n| object(&format!("p-{n}"), &[rule("r", n, n)])).collect();
    let before = server.count_requests(User::Node, STATUS_WRITE)?;
    let start = Instant::now();
    create(&server, &policies)?;
    let created = start.elapsed();
    until_programmed(&server, COUNT, &nodes[0])?;
    let first = server.count_requests(User::Node, STATUS_WRITE)? - before;
    println!(
        "{COUNT} policies created in {created:?}, all programmed after {:?}, {first} writes",
        start.elapsed()
    );

    // An agent of another version that judges all of them otherwise, and says so again whenever that has changed.
    let before = server.count_requests(User::Node, STATUS_WRITE)?;
    let other = json!({"status": {"conditions": [{
        "type": "Accepted", "status": "False", "observedGeneration": 1, "reason": "Invalid", "message": "of another version",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}});
    let end = Instant::now() + TIME;
    let written: usize = thread::scope(|scope| {
        let clients: Vec<_> = policies
            .chunks(COUNT.div_ceil(4))
            .map(|part| {
                let (server, other) = (&server, &other);
                scope.spawn(move || {
                    let mut written = 0;
                    while Instant::now() < end {
                        for policy in part.iter().take_while(|_| Instant::now() < end) {
                            let name = policy["metadata"]["name"].as_str().unwrap_or_default();
                            let path = format!("{POLICIES}/{name}/status");
                            written +=
                                usize::from(server.request(User::Admin, "PATCH", &path, Some(other)).is_ok());
                        }
                    }
                    written
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap_or(0)).sum()
    });
    let writes = server.count_requests(User::Node, STATUS_WRITE)? - before;
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let rate = writes as f64 / COUNT as f64 / (TIME.as_secs_f64() / 60.0);
    println!(
        "{writes} writes of two agents in {TIME:?}, {rate:.2} a policy and minute, against {written} of another writer"
    );
    ensure!(written > COUNT, "{written}");
    ensure!(rate <= 1.0, "{rate}");
    Ok(())
}

/// `BRIDGE_AGENT=target/release/bridge-agent cargo test -p bridge-tests --test kubernetes fifty_thousand -- --ignored
/// --nocapture`
#[test]
#[ignore = "measures; of use with a release build of the agent only"]
fn fifty_thousand_rules_in_four_hundred_policies_take_two_seconds_and_138_mb() -> Result<()> {
    const POLICIES_OF_RULES: (usize, usize) = (400, 125);
    let (lab, server) = cluster()?;
    let (count, each) = POLICIES_OF_RULES;
    let policies: Vec<Value> = (0..count)
        .map(|policy| {
            let rules: Vec<Value> =
                (0..each).map(|number| rule(&format!("r{number}"), policy * each + number, number)).collect();
            object(&format!("p-{policy}"), &rules)
        })
        .collect();
    create(&server, &policies)?;
    // Once to have the API server read its definitions.
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let start = Instant::now();
        let mut node = Agent::start(&lab, lab.b(), &node_config(&server, ""))?;
        let maps = Maps::open(&Pins::new(node.pins()))?;
        eventually(DEADLINE, || (in_kernel(&maps).ok()?.len() == count * each).then_some(()))
            .with_context(|| node.log())?;
        times.push(start.elapsed());
        until_within(DEADLINE, &node, |cluster| cluster["current"] == true)?;
        memory.push((memory_kib(&node, "VmHWM")?, memory_kib(&node, "VmRSS")?));
        node.stop()?;
        drop(fs::remove_dir_all(node.state_directory()));
        node.run(&["down"])?;
    }
    println!(
        "{count} policies, {} rules: active {times:?} after the start; KiB at most, later {memory:?}",
        count * each
    );
    times.sort_unstable();
    ensure!(times[times.len() / 2] <= patience(Duration::from_secs(2)), "{times:?}");
    ensure!(memory.iter().all(|(most, _)| *most <= 138 * 1000), "{memory:?}");
    Ok(())
}
