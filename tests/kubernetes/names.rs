//! Names of 10,000 pods: the memory that the agent takes for them stays within its documented bound.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::Lab;
use bridge_lab::wait::eventually;
use serde_json::{Map, Value, json};

const PODS: u32 = 10_000;
/// The bound of docs/operations.md, in KiB of the agent's own memory.
const BOUND: u64 = 10 * 1024;
const DEADLINE: Duration = Duration::from_secs(60);

/// Returns the map below a value that has this key.
fn map_with<'a>(value: &'a mut Value, key: &str) -> Option<&'a mut Map<String, Value>> {
    match value {
        Value::Object(map) => {
            if map.contains_key(key) {
                return Some(map);
            }
            map.values_mut().find_map(|inner| map_with(inner, key))
        }
        Value::Array(list) => list.iter_mut().find_map(|inner| map_with(inner, key)),
        _ => None,
    }
}

/// KiB of memory that only the agent has.
fn own_memory(agent: &Agent) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn names(lab: &Lab, agent: &Agent) -> Result<usize> {
    let mut curl = std::process::Command::new("curl");
    curl.args(["-s", "--max-time", "20", "--unix-socket"]).arg(agent.socket()).arg("http://bridge/v1/names");
    let answer: Value = serde_json::from_str(&lab.b().netns.output(curl)?)?;
    Ok(answer["pods"].as_object().context("pods")?.len())
}

#[test]
fn names_of_ten_thousand_pods_stay_within_their_bound() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut server = ApiServer::start(&lab)?;
    server.add_node(&lab, 0)?;
    server.add_namespace("shop", &json!({}))?;
    server.add_pod("shop", "warehouse-0", &json!({"app": "warehouse"}), "b")?;
    server.run_pod("shop", "warehouse-0", lab.c1())?;
    let config = format!(
        "role: node\nnetworks: {{external: [192.168.31.0/24], pods: [10.200.0.0/16]}}\nenforcement: {{engines: [ebpf], interfaces: \
         {{external: [eth0], internal: ['cali*']}}}}\nkubernetes: {{kubeconfig: {}, nodeName: b}}\npersistence: {{save: never}}\n",
        server.kubeconfig(User::Node).display()
    );
    let mut agent = Agent::start(&lab, lab.b(), &config)?;
    let file = agent.state_directory().join("kubernetes.json");
    let read = || serde_json::from_str::<Value>(&std::fs::read_to_string(&file).ok()?).ok();
    let has_pod = |saved: &Value| map_with(&mut saved.clone(), "shop/warehouse-0").is_some();
    let mut saved = eventually(DEADLINE, || read().filter(has_pod)).context("the cluster is not saved")?;
    ensure!(names(&lab, &agent)? > 0);
    let before = own_memory(&agent)?;

    // The same state with as many pods, for a start without the API server.
    agent.kill()?;
    server.stop_server();
    let pods = map_with(&mut saved, "shop/warehouse-0").context("pods")?;
    let one = pods["shop/warehouse-0"].clone();
    for number in 1..PODS {
        let [.., high, low] = number.to_be_bytes();
        let mut pod = one.clone();
        let addresses = pod["addresses"].as_array_mut().context("addresses")?;
        *addresses =
            vec![json!(format!("10.200.{}.{low}", 100 + high)), json!(format!("fd20:1::{number:x}"))];
        pods.insert(format!("shop/warehouse-of-the-east-{number}"), pod);
    }
    std::fs::write(&file, saved.to_string())?;
    agent.restart()?;
    let count = usize::try_from(PODS)?;
    eventually(DEADLINE, || names(&lab, &agent).ok().filter(|found| *found >= count))
        .with_context(|| format!("{:?}\n{}", names(&lab, &agent), agent.log()))?;
    for _ in 0..20 {
        names(&lab, &agent)?;
    }
    let after = own_memory(&agent)?;
    println!("own memory of the agent: {before} KiB with a pod, {after} KiB with {PODS} pods and 20 answers");
    ensure!(after < before + BOUND, "{before} KiB with a pod, {after} KiB with {PODS}");
    Ok(())
}
