//! The agent as the DaemonSet runs it: in a container, with the capabilities and mounts of the manifest and no others.

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::pool::attach;
use bridge_lab::{
    container::{Container, Files, capabilities, daemonset},
    lab::{Family, Lab},
    pool::{output, python, serve},
    traffic::tcp::{Client, Server},
};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);
const ALLOWED: u16 = 40002;
const DENIED: u16 = 40003;

const CONFIG: &str = r#"
role: node
networks: {pods: [10.200.1.0/24, "fd20:1::/64"], external: [192.168.31.0/24, "fd31::/64"]}
enforcement: {engines: [ebpf, iptables]}
rules: [{name: in, direction: inbound, protocol: tcp, ports: [40002]}, {name: out, direction: outbound, protocol: tcp, ports: ["1-65535"]}]
persistence: {save: never}
"#;

fn start(lab: &Lab, config: &str) -> Result<Container> {
    Container::start(lab, lab.b(), &Files::OfThisMachine, daemonset()?, config)
}

/// A pool whose connections come from this control group; `more` are further keys.
fn pool(group: &Path, more: &str) -> Result<String> {
    let path = group.strip_prefix(attach::mount_point()?)?.display();
    Ok(format!("portPool: {{ports: 61001-61100, transparent: {{cgroups: [/{path}]}}{more}}}\n"))
}

#[test]
fn each_capability_is_needed_and_no_other() -> Result<()> {
    let all = capabilities(&daemonset()?);
    ensure!(all == ["BPF", "PERFMON", "NET_ADMIN", "NET_RAW"], "{all:?}");
    for without in [None].into_iter().chain(all.iter().map(Some)) {
        let lab = Lab::builder().build()?;
        // With everything that takes privileges; iptables-legacy takes more than iptables-nft.
        let config = CONFIG.replace("[ebpf, iptables]", "[ebpf, iptables], iptables: {backend: legacy}")
            + &pool(&lab.cgroup("some-pod")?, ", masquerade: true")?;
        let mut manifest = daemonset()?;
        let left: Vec<_> = all.iter().filter(|name| Some(*name) != without).collect();
        manifest["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] =
            json!(left);
        let mut container = Container::start(&lab, lab.b(), &Files::OfThisMachine, manifest, &config)?;
        match without {
            None => container.ready()?,
            Some(name) => {
                ensure!(!container.ended()?.success(), "without {name}");
                let log = container.log();
                let expected = match name.as_str() {
                    "NET_ADMIN" => "Operation not permitted",
                    "NET_RAW" => "iptables-legacy-restore failed",
                    _ => name,
                };
                ensure!(log.contains(expected), "without {name}: {log}");
            }
        }
    }
    Ok(())
}

/// The init container shows the faults of a node in its log, and keeps the agent from nothing.
#[test]
fn the_node_is_examined_before_the_agent_starts() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.b().netns.set_sysctl("ipv4/ip_forward", "0")?;
    let mut manifest = daemonset()?;
    let pod = &mut manifest["spec"]["template"]["spec"];
    pod["containers"][0] = pod["initContainers"][0].clone();
    let mut doctor = Container::start(&lab, lab.b(), &Files::OfThisMachine, manifest, CONFIG)?;
    let status = doctor.ended()?;
    let log = doctor.log();
    ensure!(status.success(), "{status}: {log}");
    for part in ["FAIL    forwarding.ip-forward", "ok      kernel.capabilities", "ok      kernel.cgroup2"] {
        ensure!(log.contains(part), "{part} is missing: {log}");
    }
    Ok(())
}

#[test]
fn ports_open_and_closed_stay_so_while_one_pod_follows_the_other() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let mut first = start(&lab, CONFIG)?;
    first.ready()?;
    let _allowed = Server::echo(&c1.netns, c1.at(Family::V4, ALLOWED))?;
    let _denied = Server::echo(&c1.netns, c1.at(Family::V4, DENIED))?;
    let look = |when: &str| -> Result<()> {
        let connect = |port| Client::new(&a.netns).deadline(SECOND).connect(c1.at(Family::V4, port));
        ensure!(connect(ALLOWED)?.succeeded(), "{when}: the allowed port");
        ensure!(connect(DENIED)?.refused(), "{when}: the denied port");
        Ok(())
    };
    look("with the first pod")?;
    let mut connection = Client::new(&a.netns).connect(c1.at(Family::V4, ALLOWED))?.reached()?;
    let status = first.stop()?;
    ensure!(status.success(), "{status}: {}", first.log());
    look("between the pods")?;
    let mut second = start(&lab, CONFIG)?;
    second.ready()?;
    look("with the second pod")?;
    second.kill()?;
    look("without any pod")?;
    connection.round_trip(SECOND).context("the connection from before")?;
    Ok(())
}

#[test]
fn pods_that_run_down_instead_leave_nothing_on_the_node() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let config = format!("{CONFIG}{}", pool(&lab.cgroup("some-pod")?, ", masquerade: true")?);
    let mut agent = start(&lab, &config)?;
    agent.ready()?;
    let _server = Server::echo(&c1.netns, c1.at(Family::V4, DENIED))?;
    let connect = || Client::new(&a.netns).deadline(SECOND).connect(c1.at(Family::V4, DENIED));
    ensure!(connect()?.refused());
    agent.stop()?;
    // As docs/operations.md has it, twice: a DaemonSet starts what has ended again.
    let mut manifest = daemonset()?;
    manifest["spec"]["template"]["spec"]["containers"][0]["args"] = json!(["down"]);
    for _ in 0..2 {
        let mut down = Container::start(&lab, lab.b(), &Files::OfThisMachine, manifest.clone(), &config)?;
        ensure!(down.ended()?.success(), "{}", down.log());
    }
    ensure!(connect()?.succeeded(), "{}", agent.log());
    let rules = lab.b().netns.output(Command::new("iptables-save"))?;
    ensure!(!rules.contains("BRIDGE"), "{rules}");
    let pins: Vec<_> = fs::read_dir(agent.pins())?.flatten().map(|entry| entry.path()).collect();
    ensure!(pins.is_empty(), "{pins:?}");
    let reserved = lab.b().netns.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports"))?;
    ensure!(reserved.trim().is_empty(), "{reserved}");
    Ok(())
}

#[test]
fn a_pod_is_ready_when_it_enforces_and_not_before() -> Result<()> {
    let lab = Lab::builder().build()?;
    // No interface leads to this LAN: nothing would be judged.
    let nowhere = CONFIG.replace("[192.168.31.0/24, \"fd31::/64\"]", "[198.51.100.0/24]");
    lab.b().netns.ip("route add unreachable 198.51.100.0/24")?;
    let mut container = start(&lab, &nowhere)?;
    let probe = bridge_lab::wait::eventually(Duration::from_secs(10), || {
        let probe = container.probe().ok()?;
        String::from_utf8_lossy(&probe.stderr).contains("not ready").then_some(probe)
    });
    let probe = probe.with_context(|| container.log())?;
    let said = String::from_utf8_lossy(&probe.stderr).into_owned();
    ensure!(!probe.status.success() && said.contains("no interface to networks.external"), "{said}");
    container.stop()?;
    drop(container);
    let mut container = start(&lab, CONFIG)?;
    container.ready()?;
    let probe = container.exec(&["bridge-agent", "status", "--ready", "--json"])?;
    let said: Value = serde_json::from_slice(&probe.stdout)?;
    ensure!(said == json!({ "ok": true, "ready": true }), "{said}");
    Ok(())
}

#[test]
fn tcp_takes_the_fast_path_in_the_container_as_on_a_host() -> Result<()> {
    const BE_LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
    let lab = Lab::builder().conntrack().build()?;
    lab.b().netns.run(|| fs::write(BE_LIBERAL, "0"))?;
    let mut container = start(&lab, CONFIG)?;
    container.ready()?;
    let probe = container.exec(&["bridge-agent", "status", "--json"])?;
    let status: Value = serde_json::from_slice(&probe.stdout)?;
    let fast_path = &status["agent"]["enforcement"]["fastPath"];
    ensure!(fast_path["protocols"] == json!(["tcp", "udp"]), "{fast_path} {}", container.log());
    let seconds = |name: &str| -> Result<u64> {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
        Ok(lab.b().netns.run(|| fs::read_to_string(path))?.trim().parse()?)
    };
    ensure!(lab.b().netns.run(|| fs::read_to_string(BE_LIBERAL))?.trim() == "1");
    ensure!(
        seconds("unacknowledged")? >= seconds("established")?,
        "the agent left the timeouts as they were"
    );
    Ok(())
}

#[test]
fn the_pool_reaches_control_groups_and_sysctls_of_the_host() -> Result<()> {
    let lab = Lab::builder().build()?;
    // Not below the group that the agent's own pod is in.
    let group = lab.cgroup("some-pod")?;
    let mut container = start(&lab, &format!("{CONFIG}{}", pool(&group, "")?))?;
    container.ready()?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let script = format!(
        "import socket; print(socket.create_connection(('{}', {}), 10).getsockname()[1])",
        to.ip(),
        to.port()
    );
    let command = bridge_lab::pool::in_cgroup(&group, python(&script));
    let port: u16 = output(&lab.c1().netns, command, Duration::from_secs(10))?.trim().parse()?;
    ensure!((61001..=61100).contains(&port), "{port}: {}", container.log());
    let reserved = lab.b().netns.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports"))?;
    ensure!(reserved.trim() == "61001-61100", "{reserved}");
    Ok(())
}
