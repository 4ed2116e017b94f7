//! The life of a cluster under traffic: while agents, kubelet, containerd, kube-proxy and the API server end and return,
//! no packet that a policy allows is lost and none that no policy allows comes through.

use std::{
    net::{SocketAddr, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    cluster::{AGENT, Cluster, NEXT_TAG, Options, Pod},
    lab::{Family, Netns},
    traffic::{tcp, udp},
    wait::eventually,
};
use serde_json::{Value, json};

/// Port that a policy allows, in pods and on the LAN host; the next one is allowed to none.
pub(crate) const PORT: u16 = 8080;
/// Time between two datagrams of a flow: a receiver that is kept from running for a second loses none.
const PACE: Duration = Duration::from_millis(5);
/// How long an allowed connection may take, and an event.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
pub(crate) const EVENT: Duration = Duration::from_secs(120);
/// Traffic continues this long after an event, for delayed effects.
const AFTER: Duration = Duration::from_secs(1);

/// A flow in one direction and family, with the receivers of its allowed and of its denied datagrams.
pub(crate) struct Way {
    name: String,
    from: Netns,
    to: SocketAddr,
    allowed: udp::Server,
    denied: udp::Server,
    _tcp: [tcp::Server; 2],
}

impl Way {
    fn open(name: &str, from: &Netns, server: &Netns, to: SocketAddr) -> Result<Self> {
        let other = SocketAddr::new(to.ip(), to.port() + 1);
        Ok(Self {
            name: name.to_owned(),
            from: from.clone(),
            to,
            allowed: udp::Server::echo(server, to)?,
            denied: udp::Server::echo(server, other)?,
            _tcp: [tcp::Server::echo(server, to)?, tcp::Server::echo(server, other)?],
        })
    }

    /// Whether a connection to the allowed port opens.
    pub(crate) fn is_open(&self) -> Result<bool> {
        Ok(tcp::Client::new(&self.from).deadline(DEADLINE).connect(self.to)?.succeeded())
    }

    fn denied(&self) -> SocketAddr {
        SocketAddr::new(self.to.ip(), self.to.port() + 1)
    }
}

/// Counts of one way during an event.
#[derive(Debug, Default)]
struct Counts {
    datagrams: usize,
    connections: usize,
    failed: Vec<String>,
    opened: usize,
}

/// Sends numbered datagrams to both ports of a way, opens connections to both, and keeps one connection in use.
fn send(from: &Netns, to: SocketAddr, denied: SocketAddr, stop: &AtomicBool) -> Result<Counts> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
    let socket: UdpSocket = from.run(|| UdpSocket::bind(any))?;
    let mut kept = tcp::Client::new(from).deadline(DEADLINE).connect(to)?.reached()?;
    let mut counts = Counts::default();
    while !stop.load(Ordering::Relaxed) {
        socket.send_to(&counts.datagrams.to_be_bytes(), to)?;
        socket.send_to(&counts.datagrams.to_be_bytes(), denied)?;
        counts.datagrams += 1;
        if counts.datagrams.is_multiple_of(10) {
            counts.connections += 1;
            let attempt = tcp::Client::new(from).deadline(DEADLINE).connect(to)?;
            if !attempt.succeeded() {
                counts.failed.push(format!("a new connection: {attempt}"));
            }
            let probe = tcp::Client::new(from).deadline(DEADLINE / 10).connect(denied)?;
            counts.opened += usize::from(probe.succeeded());
            if let Err(error) = kept.round_trip(DEADLINE) {
                counts.failed.push(format!("the open connection: {error}"));
                kept = tcp::Client::new(from).deadline(DEADLINE).connect(to)?.reached()?;
            }
        }
        thread::sleep(PACE);
    }
    Ok(counts)
}

/// Runs `event` while every way carries traffic, and fails with the name of the event if a datagram or connection that is
/// allowed was lost, or one that is not came through.
pub(crate) fn under_traffic<T>(name: &str, ways: &[Way], event: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = Arc::new(AtomicBool::new(false));
    let before: Vec<_> =
        ways.iter().map(|way| (way.allowed.received().len(), way.denied.received().len())).collect();
    let senders: Vec<JoinHandle<Result<Counts>>> = ways
        .iter()
        .map(|way| {
            let (from, to, denied, stop) = (way.from.clone(), way.to, way.denied(), Arc::clone(&stop));
            thread::spawn(move || send(&from, to, denied, &stop))
        })
        .collect();
    thread::sleep(AFTER);
    let start = Instant::now();
    let result = event();
    let took = start.elapsed();
    thread::sleep(AFTER);
    stop.store(true, Ordering::Relaxed);
    let counts: Vec<Counts> =
        senders.into_iter().map(|sender| sender.join().expect("a sender panics")).collect::<Result<_>>()?;
    let result = result.with_context(|| name.to_owned())?;
    let mut total = 0;
    for ((way, (allowed, denied)), counts) in ways.iter().zip(before).zip(counts) {
        let arrived = || way.allowed.received().len() - allowed;
        let all = eventually(DEADLINE, || (arrived() == counts.datagrams).then_some(()));
        let leaked = way.denied.received().len() - denied;
        ensure!(
            all.is_some() && leaked == 0 && counts.failed.is_empty() && counts.opened == 0,
            "{name}, {}: {} of {} datagrams arrived; leaked {leaked} datagrams and {} connections; {:?}",
            way.name,
            arrived(),
            counts.datagrams,
            counts.opened,
            counts.failed
        );
        ensure!(counts.connections > 0, "{name}, {}: no connection was tried", way.name);
        total += counts.datagrams;
    }
    println!("{name}: {:.1} s, 0 of {total} lost, 0 of {total} leaked", took.as_secs_f64());
    Ok(result)
}

pub(crate) fn policy(cluster: &Cluster) -> Value {
    let host = cluster.allowed_host();
    let rule = |direction: &str, protocol: &str| {
        json!({
            "name": format!("{direction}-{protocol}"), "direction": direction, "protocol": protocol, "ports": [PORT],
            "external": [format!("{}/32", host.v4), format!("{}/128", host.v6)],
            "podSelector": {"matchLabels": {"app": "peer"}},
        })
    };
    let rules: Vec<_> = ["inbound", "outbound"].map(|d| ["tcp", "udp"].map(|p| rule(d, p))).concat();
    json!({
        "apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": "peers"},
        "spec": {"rules": rules},
    })
}

pub(crate) fn ways(cluster: &Cluster, pod: &Pod) -> Result<Vec<Way>> {
    let host = cluster.allowed_host();
    let mut ways = Vec::new();
    for family in Family::BOTH {
        let inbound = SocketAddr::new(pod.ip(family), PORT);
        ways.push(Way::open(&format!("LAN to pod, {family:?}"), &host.netns, &pod.netns, inbound)?);
        ways.push(Way::open(
            &format!("pod to LAN, {family:?}"),
            &pod.netns,
            &host.netns,
            host.at(family, PORT),
        )?);
    }
    Ok(ways)
}

/// Restarts a program of a node, and waits until it runs again and the node is Ready.
pub(crate) fn restarted(cluster: &Cluster, index: usize, program: &str) -> Result<()> {
    let node = &cluster.nodes()[index];
    let file = node.manifests().with_file_name(format!("{program}.pid"));
    let pid = || std::fs::read_to_string(&file).unwrap_or_default();
    let before = pid();
    node.restart(program)?;
    let again = eventually(EVENT, || (pid() != before && !pid().is_empty()).then_some(()));
    again.with_context(|| format!("{program} does not return:\n{}", node.logs()))?;
    let is_ready = || {
        let node = cluster.get(&format!("node {}", node.name)).ok()?;
        let conditions = node["status"]["conditions"].as_array()?.clone();
        conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True").then_some(())
    };
    eventually(EVENT, is_ready).with_context(|| format!("the node is not Ready:\n{}", node.logs()))
}

/// Names of the agents' pods.
fn agents(cluster: &Cluster) -> Result<Vec<String>> {
    let pods =
        cluster.get("pods --namespace=bridge-system --selector=app.kubernetes.io/name=bridge-agent")?;
    let pods = pods["items"].as_array().context("a list of pods")?;
    Ok(pods.iter().filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned())).collect())
}

/// Makes pods that no policy names, tries each as soon as it runs, and deletes them.
fn churn(cluster: &Cluster, number: usize) -> Result<()> {
    let names: Vec<String> = (0..number).map(|n| format!("passing-{n}")).collect();
    let pods: Vec<Value> = names
        .iter()
        .map(|name| {
            json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "passing"}},
                "spec": {
                    "nodeName": "node1", "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "idle", "image": bridge_lab::cluster::IDLE, "imagePullPolicy": "Never"}],
                },
            })
        })
        .collect();
    cluster.apply(&pods)?;
    for name in &names {
        let pod = cluster.pod(name)?;
        // A policy names none of them.
        for family in Family::BOTH {
            let to = SocketAddr::new(pod.ip(family), PORT);
            let _server = tcp::Server::echo(&pod.netns, to)?;
            for host in [cluster.allowed_host(), cluster.stranger()] {
                let attempt = tcp::Client::new(&host.netns).deadline(DEADLINE / 10).connect(to)?;
                ensure!(!attempt.succeeded(), "{name}: {} reaches {to}", host.name);
            }
        }
    }
    cluster.kubectl(&["delete", "pods", "--selector=app=passing", "--wait"]).map(drop)
}

#[test]
fn nothing_is_lost_and_nothing_leaks_while_the_parts_of_a_cluster_come_and_go() -> Result<()> {
    let mut cluster = Cluster::up(Options::default())?;
    cluster.install_bridge(None)?;
    let pod = cluster.make_pod("peer", 0, &json!({"app": "peer"}), &json!({}))?;
    cluster.apply_policies(&[policy(&cluster)])?;
    let ways = ways(&cluster, &pod)?;
    let reaches = || {
        let all = ways.iter().all(|way| way.is_open().unwrap_or_default());
        all.then_some(())
    };
    eventually(EVENT, reaches).context("the policy does not reach the pod's node")?;

    under_traffic("agent pods deleted", &ways, || {
        let old = agents(&cluster)?;
        let arguments = ["delete", "pods", "--namespace=bridge-system", "--wait=false"];
        cluster.kubectl(&[&arguments[..], &old.iter().map(String::as_str).collect::<Vec<_>>()].concat())?;
        let replaced = || agents(&cluster).ok()?.iter().all(|name| !old.contains(name)).then_some(());
        eventually(EVENT, replaced).context("the old pods stay")?;
        cluster.wait_for_bridge()
    })?;
    under_traffic("rolling update to another tag", &ways, || {
        let image = format!("bridge-agent={AGENT}:{NEXT_TAG}");
        cluster.kubectl(&["set", "image", "--namespace=bridge-system", "daemonset/bridge-agent", &image])?;
        cluster.wait_for_bridge()
    })?;
    for program in ["kubelet", "containerd"] {
        under_traffic(&format!("{program} restarted"), &ways, || {
            restarted(&cluster, 0, program)?;
            cluster.wait_for_bridge()
        })?;
    }
    under_traffic("kube-proxy switched to iptables", &ways, || {
        cluster.nodes()[0].set_proxy("iptables")?;
        restarted(&cluster, 0, "kube-proxy")?;
        let node = &cluster.nodes()[0];
        let written = || {
            let rules = node.host.netns.output(Command::new("iptables-save")).ok()?;
            rules.contains("KUBE-POSTROUTING").then_some(())
        };
        eventually(EVENT, written).with_context(|| format!("no rules:\n{}", node.logs()))
    })?;
    let away = Duration::from_secs(10);
    under_traffic("API server and etcd away", &ways, || {
        cluster.stop_control_plane();
        thread::sleep(away);
        cluster.start_etcd()?;
        cluster.start_server()
    })?;
    cluster.wait_for_bridge()?;
    churn(&cluster, 12)?;

    // A label that changes opens and closes.
    let connects = |way: &Way| -> Option<bool> {
        Some(tcp::Client::new(&way.from).deadline(DEADLINE / 10).connect(way.to).ok()?.succeeded())
    };
    for (label, open) in [("app=nothing", false), ("app=peer", true)] {
        cluster.kubectl(&["label", "--overwrite", "pod", "peer", label])?;
        let settled = || ways.iter().all(|way| connects(way) == Some(open)).then_some(());
        eventually(EVENT, settled).with_context(|| format!("label {label}, and open is not {open}"))?;
    }
    Ok(())
}

#[test]
fn a_load_balancer_finds_the_health_check_port_that_is_allowed() -> Result<()> {
    const RANGE: &str = "30000-32767";
    let (allowed, denied) = (32_100_u16, 32_101_u16);
    let cluster = Cluster::up(Options { nodes: 1, ..Options::default() })?;
    let mut config: Value = serde_json::from_str(&cluster.config())?;
    config["nodePorts"] = json!({"range": RANGE, "allow": [allowed]});
    cluster.install_bridge(Some(&config.to_string()))?;
    let service = |name: &str, port: u16| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port,
                "selector": {"app": "none"}, "ports": [{"port": 80}],
            },
        })
    };
    cluster.apply(&[service("known", allowed), service("unknown", denied)])?;
    let node = cluster.lab().b();
    let connects = |from: &Netns, port: u16| {
        tcp::Client::new(from)
            .deadline(DEADLINE / 10)
            .connect(node.at(Family::V4, port))
            .is_ok_and(|a| a.succeeded())
    };
    let listens = || (connects(&node.netns, allowed) && connects(&node.netns, denied)).then_some(());
    eventually(EVENT, listens).context("kube-proxy does not listen for health checks")?;
    for host in [cluster.allowed_host(), cluster.stranger()] {
        ensure!(connects(&host.netns, allowed), "{}: the port of `nodePorts.allow` is closed", host.name);
        ensure!(!connects(&host.netns, denied), "{}: another port is open", host.name);
    }
    Ok(())
}
