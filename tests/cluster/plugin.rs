//! The Helm chart in a cluster, and `kubectl bridge` over its nodes: `cargo xtask dist --test`.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent,
    cluster::{AGENT, Cluster, Options, TAG},
    lab::Family,
    traffic::tcp,
    wait::eventually,
};
use serde_json::{Value, json};

const PORT: u16 = 8080;
const DEADLINE: Duration = Duration::from_secs(60);
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/bridge");
const LEASE_CLIENT: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/examples/lease-client.yaml");

/// Programs of a user of the cluster, in its network.
struct User<'a> {
    cluster: &'a Cluster,
    helm: PathBuf,
    folder: tempfile::TempDir,
}

impl User<'_> {
    fn command(&self, program: &Path, arguments: &[&str]) -> Result<Command> {
        let (kubeconfig, kubectl) = self.cluster.access();
        let mut path = vec![self.folder.path().to_owned(), kubectl.parent().context("kubectl")?.to_owned()];
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let mut command = Command::new(program);
        command.args(arguments).env("KUBECONFIG", kubeconfig).env("PATH", env::join_paths(path)?);
        command.env("HOME", self.folder.path()).stdin(Stdio::null());
        Ok(command)
    }

    fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.lab().b().netns.output(self.command(&self.helm, arguments)?)
    }

    /// Runs `kubectl bridge` with these words.
    fn bridge(&self, words: &str) -> Result<Output> {
        let arguments: Vec<_> = ["bridge"].into_iter().chain(words.split_whitespace()).collect();
        let mut command = self.command(&self.cluster.access().1, &arguments)?;
        Ok(self.cluster.lab().b().netns.run(|| command.output())?)
    }

    /// As [`Self::bridge`], which must succeed; returns its lines as words.
    fn table(&self, words: &str) -> Result<Vec<Vec<String>>> {
        let output = self.bridge(words)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{words}: {text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect())
    }
}

fn policy(cluster: &Cluster) -> Value {
    let host = cluster.allowed_host();
    let external = [format!("{}/32", host.v4), format!("{}/128", host.v6)];
    json!({
        "apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": "peers"},
        "spec": {"rules": [{
            "name": "in", "direction": "inbound", "protocol": "tcp", "ports": [PORT], "external": external,
            "podSelector": {"matchLabels": {"app": "peer"}},
        }]},
    })
}

#[test]
#[ignore = "needs helm: cargo xtask dist --test"]
fn the_chart_enforces_and_the_plugin_shows_every_node() -> Result<()> {
    let helm = env::var_os("BRIDGE_HELM").context("BRIDGE_HELM is unset: run `cargo xtask dist --test`")?;
    let cluster = Cluster::up(Options::default())?;
    let user = User { cluster: &cluster, helm: helm.into(), folder: tempfile::tempdir()? };
    let config = user.folder.path().join("bridge.yaml");
    let mut value: Value = serde_json::from_str(&cluster.config())?;
    value["portPool"] = json!({"ports": ["61001-61100"]});
    fs::write(&config, value.to_string())?;
    let (image, tag) = (format!("image.name={AGENT}"), format!("image.tag={TAG}"));
    let file = format!("config={}", config.display());
    let values = ["--set", &image, "--set", &tag, "--set-file", &file];
    user.helm(&[&["install", "bridge", CHART], &values[..]].concat())?;
    cluster.wait_for_bridge()?;

    // One pod on each node, and a connection to each: allowed at one port, refused at the other.
    cluster.apply_policies(&[policy(&cluster)])?;
    let host = &cluster.allowed_host().netns;
    let mut kept = Vec::new();
    for index in 0..2 {
        let pod = cluster.make_pod(&format!("peer{index}"), index, &json!({"app": "peer"}), &json!({}))?;
        let at = SocketAddr::new(pod.ip(Family::V4), PORT);
        let server = tcp::Server::echo(&pod.netns, at)?;
        let open =
            || tcp::Client::new(host).deadline(Duration::from_secs(2)).connect(at).ok()?.reached().ok();
        let mut connection = eventually(DEADLINE, open).with_context(|| format!("{at} stays closed"))?;
        connection.round_trip(Duration::from_secs(5))?;
        kept.push((pod, server, connection));
    }

    symlink(agent::program()?, user.folder.path().join("kubectl-bridge"))?;
    let nodes: Vec<&str> = kept.iter().map(|(pod, ..)| pod.node.as_str()).collect();
    let status = user.table("status")?;
    ensure!(status[0][0] == "NODE" && status.len() == 3, "{status:?}");
    for (row, node) in status[1..].iter().zip(&nodes) {
        ensure!(row[..4] == [*node, env!("CARGO_PKG_VERSION"), "yes", "enforce"], "{status:?}");
    }
    let flows = user.table("flows --port 8080 --state established")?;
    ensure!(flows[0][..3] == ["NODE", "PROTO", "SOURCE"], "{flows:?}");
    for (pod, ..) in &kept {
        let to = SocketAddr::new(pod.ip(Family::V4), PORT).to_string();
        let row = flows.iter().find(|row| row[3] == to).with_context(|| format!("{to}: {flows:?}"))?;
        ensure!(row[0] == pod.node, "{flows:?}");
    }
    let one = user.table(&format!("--node {} flows --port 8080", nodes[1]))?;
    ensure!(one.len() > 1 && one[1..].iter().all(|row| row[0] == nodes[1]), "{one:?}");
    let json: Value = serde_json::from_slice(&user.bridge("flows --port 8080 --json")?.stdout)?;
    // An object of each node, as its agent answers.
    let of_node = json.as_array().context("an array")?.iter().find(|answer| answer["node"] == nodes[0]);
    let named = of_node.and_then(|answer| answer["flows"].as_array()).with_context(|| json.to_string())?;
    ensure!(named.iter().any(|flow| flow["sourcePort"].is_u64()), "{json}");

    // Events arrive while they happen, under the name of the node.
    let mut monitor =
        user.command(&cluster.access().1, &["bridge", "monitor", "--port", "8081", "--count", "1"])?;
    monitor.stdout(Stdio::piped());
    let mut monitor = host_process(&cluster, monitor)?;
    let lines = BufReader::new(monitor.child().stdout.take().context("no output")?).lines();
    let refused = std::thread::scope(|scope| {
        let line = scope.spawn(|| lines.map_while(Result::ok).take(2).collect::<Vec<_>>());
        let ended = eventually(DEADLINE, || {
            for (pod, ..) in &kept {
                let at = SocketAddr::new(pod.ip(Family::V4), PORT + 1);
                drop(tcp::Client::new(host).deadline(Duration::from_millis(300)).connect(at));
            }
            line.is_finished().then_some(())
        });
        drop(monitor.kill());
        ensure!(ended.is_some(), "no event of each node");
        line.join().map_err(|_| anyhow::anyhow!("the reader panicked"))
    })?;
    for (pod, ..) in &kept {
        let to = format!("-> {}:8081", pod.ip(Family::V4));
        ensure!(refused.iter().any(|line| line.starts_with(&pod.node) && line.contains(&to)), "{refused:?}");
    }

    // Why one was refused, the rule that would allow it, and the checks of its node.
    let said = |words: &str| -> Result<String> {
        let output = user.bridge(words)?;
        Ok([output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat())
    };
    let (pod, source) = (&kept[0].0, cluster.allowed_host().v4);
    for to in [pod.ip(Family::V4).to_string(), "pod/default/peer0".into()] {
        let why = said(&format!("--node {} explain {source} {to}:8081", pod.node))?;
        ensure!(why.contains("DENIED (no_rule") && why.contains("ports: [8081]"), "{why}");
    }
    let rules = said(&format!("--node {} suggest --include-denied", pod.node))?;
    ensure!(rules.contains("8081") && rules.contains(&source.to_string()), "{rules}");
    let health = said("doctor")?;
    ensure!(nodes.iter().all(|node| health.contains(node)) && health.contains("forwarding"), "{health}");

    // A command that fails on the nodes names each, and fails.
    let failed = user.bridge("flows --state nonsense")?;
    let errors = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(!failed.status.success(), "{errors}");
    ensure!(
        nodes.iter().all(|node| errors.contains(&format!("{node}: error: invalid value 'nonsense'"))),
        "{errors}"
    );
    let nowhere = user.bridge("--node elsewhere status")?;
    ensure!(String::from_utf8_lossy(&nowhere.stderr).contains("no agent runs in namespace bridge-system"));

    lease_in_a_restricted_namespace(&cluster)?;

    // An upgrade with another value leaves the connections open, and so does the removal.
    user.helm(&[&["upgrade", "bridge", CHART, "--set", "ownNode=true"], &values[..]].concat())?;
    cluster.wait_for_bridge()?;
    cluster.get("validatingadmissionpolicy bridge-own-node")?;
    user.helm(&["uninstall", "bridge", "--wait"])?;
    for (_, _, connection) in &mut kept {
        connection.round_trip(Duration::from_secs(5))?;
    }
    ensure!(
        cluster.get("daemonset bridge-agent --namespace=bridge-system").is_err(),
        "the DaemonSet is there"
    );
    Ok(())
}

/// Starts a command in the network of the control plane.
fn host_process(cluster: &Cluster, command: Command) -> Result<bridge_lab::lab::Process> {
    Ok(cluster.lab().b().netns.spawn_command(command)?)
}

/// The example of a lease client gets a port of its node's pool, and cannot operate the agent.
fn lease_in_a_restricted_namespace(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["apply", "--filename", LEASE_CLIENT])?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/lease-client",
        "--namespace=shop",
        "--timeout=120s",
    ])?;
    let run = |command: &str| {
        let exec = ["exec", "lease-client", "--namespace=shop", "--", "bridge-agent"];
        cluster.kubectl(&[&exec[..], &command.split(' ').collect::<Vec<_>>()].concat())
    };
    let lease: Value = serde_json::from_str(&run("ports acquire 192.168.31.67:443 --for 60s --json")?)?;
    let port = lease["leases"][0]["port"].as_u64();
    ensure!(port.is_some_and(|port| (61001..=61100).contains(&port)), "{lease}");
    let refused = run("revert").err().context("a pod operates the agent")?.to_string();
    ensure!(refused.contains("only root"), "{refused}");
    // The namespace is restricted indeed.
    let direct = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "direct", "namespace": "shop"},
        "spec": {
            "containers": [{"name": "client", "image": AGENT}],
            "volumes": [{"name": "bridge", "hostPath": {"path": "/run/bridge"}}],
        },
    });
    let violation = cluster.apply(&[direct]).err().context("hostPath is allowed")?.to_string();
    ensure!(violation.contains("violates PodSecurity \"restricted"), "{violation}");
    Ok(())
}
