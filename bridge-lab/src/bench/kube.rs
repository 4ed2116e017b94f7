//! A large cluster: 5,000 nodes and 50,000 pods in a real API server, followed by the agent of a node and that of a LAN
//! host. `cargo xtask bench --kube`; filling the server takes some minutes.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

use super::agent::resident_kib;
use super::routes::{NODES, ROUTES, address, count, network};
use super::{Group, Measurement};
use crate::agent::{Agent, state_directory};
use crate::kubernetes::{ApiServer, User};
use crate::lab::{Family, Lab};
use crate::traffic::tcp;
use crate::wait::eventually;

/// Only when asked for.
pub const GROUP: Group = ("kube", measure);

const PODS: u32 = 50_000;
/// Of them on the node whose agent is measured; kubelet's own limit.
const PODS_HERE: u32 = 110;
const STARTS: usize = 3;
const CHANGES: usize = 10;
/// Requests at a time.
const AT_ONCE: usize = 64;
const DEADLINE: Duration = Duration::from_secs(120);
const PORT: u16 = 40002;
const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";

fn measure() -> Result<Vec<Measurement>> {
    let lab = Lab::builder().without_routes().build()?;
    let host = &lab.a().netns;
    host.ip("address add 10.0.0.1/16 dev eth0")?;
    host.ip("address add fd32::1/64 dev eth0 nodad")?;
    let server = ApiServer::start(&lab)?;
    server.add_node(&lab, 0)?;
    let start = Instant::now();
    lab.lan().run_async(|| fill(&server))?;
    server.run_pod("default", "pod-0", lab.c1())?;
    eprintln!("{NODES} nodes and {PODS} pods made in {:.0} s", start.elapsed().as_secs_f64());
    Ok([on_node(&lab, &server)?, on_host(&lab, &server)?].concat())
}

fn resource(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind))
}

async fn fill(server: &ApiServer) -> Result<()> {
    let file = Kubeconfig::read_from(server.kubeconfig(User::Admin))?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let nodes = Api::<DynamicObject>::all_with(client.clone(), &resource("Node"));
    let make_node = async |number: u32| {
        let networks = [network(number, false), network(number, true)];
        let name = format!("node-{number}");
        let object = json!({
            "metadata": {"name": name, "labels": labels(number)},
            "spec": {"podCIDR": networks[0], "podCIDRs": networks},
        });
        nodes.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        let addresses = [address(number, false), address(number, true)];
        let internal = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
        // As long as a kubelet makes it.
        let images: Vec<Value> = (0..50)
            .map(|image| json!({"names": [format!("registry.example/team/image-{image}@sha256:{image:064x}")], "sizeBytes": 1}))
            .collect();
        let status = json!({"status": {"addresses": internal, "images": images}});
        nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
        anyhow::Ok(())
    };
    stream::iter(0..NODES).map(make_node).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let pods = Api::<DynamicObject>::namespaced_with(client.clone(), "default", &resource("Pod"));
    let make_pod = async |number: u32| {
        let here = number < PODS_HERE;
        let node = if here { "b".to_owned() } else { format!("node-{}", number % NODES) };
        let name = format!("pod-{number}");
        let object = json!({
            "metadata": {"name": name, "labels": labels(number)},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
        });
        pods.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        if here {
            let address = format!("10.200.1.{}", 100 + number);
            let status =
                json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}});
            pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
        }
        anyhow::Ok(())
    };
    stream::iter(0..PODS).map(make_pod).buffer_unordered(AT_ONCE).try_collect::<()>().await
}

fn labels(number: u32) -> BTreeMap<String, String> {
    let label = |key: u32| (format!("example.com/label-{key}"), format!("value-{}", number % (key + 2)));
    (0..8).map(label).collect()
}

/// Waits until the agent reports that the state of the cluster is applied.
fn until_current(agent: &Agent) -> Result<()> {
    let current = || {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"]).ok()?).ok()?;
        let cluster = &status["agent"]["kubernetes"];
        (cluster["current"] == true && cluster["waitingFor"] == json!([])).then_some(())
    };
    eventually(DEADLINE, current).with_context(|| agent.log())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn on_node(lab: &Lab, server: &ApiServer) -> Result<Vec<Measurement>> {
    let config = format!(
        "role: node\nnetworks: {{external: [192.168.31.0/24, 'fd31::/64']}}\n\
         enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: ['cali*']}}}}\n\
         kubernetes: {{kubeconfig: {}, nodeName: b}}\npersistence: {{save: never}}\n",
        server.kubeconfig(User::Node).display()
    );
    lab.a().netns.ip("route add 10.200.1.0/24 via 192.168.31.17")?;
    let saved = state_directory(&lab.directory().join("b/agent.sock")).join("kubernetes.json");
    let (mut sync, mut resident, mut most) = (Vec::new(), Vec::new(), Vec::new());
    let mut agent = None;
    for _ in 0..STARTS {
        drop(agent.take());
        // As at the very first start.
        drop(fs::remove_file(&saved));
        let start = Instant::now();
        let started = Agent::start(lab, lab.b(), &config)?;
        until_current(&started)?;
        sync.push(milliseconds(start));
        resident.push(resident_kib(started.pid(), "VmRSS")?);
        most.push(resident_kib(started.pid(), "VmHWM")?);
        agent = Some(started);
    }
    let agent = agent.context("it was started")?;
    let _echo = tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, PORT))?;
    let to = lab.c1().at(Family::V4, PORT);
    let connects = || tcp::Client::new(&lab.a().netns).connect(to).is_ok_and(|attempt| attempt.succeeded());
    let policy = json!({
        "apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": "bench"},
        "spec": {"rules": [{"name": "in", "direction": "inbound", "protocol": "tcp", "ports": [PORT],
                            "podSelector": {"matchLabels": labels(0)}}]},
    });
    let (mut opened, mut closed) = (Vec::new(), Vec::new());
    for _ in 0..CHANGES {
        let start = Instant::now();
        server.request(User::Admin, "POST", POLICIES, Some(&policy))?;
        eventually(DEADLINE, || connects().then_some(())).with_context(|| agent.log())?;
        opened.push(milliseconds(start));
        let start = Instant::now();
        server.request(User::Admin, "DELETE", &format!("{POLICIES}/bench"), None)?;
        eventually(DEADLINE, || (!connects()).then_some(())).with_context(|| agent.log())?;
        closed.push(milliseconds(start));
    }
    let after = resident_kib(agent.pid(), "VmRSS")?;
    // It would be in the way of the LAN host's own.
    lab.a().netns.ip("route del 10.200.1.0/24 via 192.168.31.17")?;
    let size = format!("{NODES} nodes, {PODS} pods, {PODS_HERE} here");
    Ok(vec![
        Measurement::of(format!("node: start to first sync applied, {size}"), "ms", sync).limit(5000.0),
        Measurement::of("node: resident memory after it", "KiB", resident).limit(40.0 * 1024.0),
        Measurement::of("node: most resident memory", "KiB", most).limit(40.0 * 1024.0),
        Measurement::of("node: policy made, request to first connection", "ms", opened).limit(500.0),
        Measurement::of("node: policy deleted, request to first refusal", "ms", closed).limit(500.0),
        Measurement::of("node: resident memory after all", "KiB", vec![after]).limit(40.0 * 1024.0),
    ])
}

fn on_host(lab: &Lab, server: &ApiServer) -> Result<Vec<Measurement>> {
    let kubeconfig = server.kubeconfig(User::Host);
    let config = format!("role: host\nkubernetes: {{kubeconfig: {}}}\nroutes: {{}}\n", kubeconfig.display());
    let (mut sync, mut routes, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let start = Instant::now();
        let agent = Agent::start(lab, lab.a(), &config)?;
        until_current(&agent)?;
        sync.push(milliseconds(start));
        let start = Instant::now();
        // The node of the lab itself has two, as well.
        let all = || count(lab).ok().filter(|found| *found == ROUTES + 2);
        eventually(DEADLINE, all).with_context(|| format!("{:?} routes\n{}", count(lab), agent.log()))?;
        routes.push(milliseconds(start));
        resident.push(resident_kib(agent.pid(), "VmRSS")?);
        drop(agent);
        lab.a().netns.ip("-4 route flush proto 98")?;
        lab.a().netns.ip("-6 route flush proto 98")?;
    }
    Ok(vec![
        Measurement::of(format!("LAN host: start to first sync, {NODES} nodes"), "ms", sync).limit(5000.0),
        Measurement::of(format!("LAN host: {ROUTES} routes after sync"), "ms", routes).limit(2000.0),
        Measurement::of("LAN host: resident memory", "KiB", resident).limit(40.0 * 1024.0),
    ])
}
