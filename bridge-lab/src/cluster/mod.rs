//! A Kubernetes cluster of today on one machine: etcd, API server, controller manager and scheduler; on each node
//! containerd, kubelet, kube-proxy and the reference CNI plugins; bridge as its DaemonSet.
//!
//! The stations are those of the [lab](crate::lab): LAN hosts `a` and `a2`, nodes `b` and `b2`. Pods are made by kubelet;
//! tests open sockets in a pod's network namespace ([`Cluster::pod`]). All of it goes when the [`Cluster`] is dropped, or, if
//! its process was killed, when the next lab is built.

mod cilium;
mod images;
mod node;
mod pki;
mod programs;
pub mod scenes;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

pub use self::images::{AGENT, IDLE};
pub use self::node::Node;
use self::pki::Pki;
pub use self::programs::{KUBERNETES, Programs};
use crate::agent;
use crate::kubernetes::deployed;
use crate::lab::{Family, Host, Lab, Netns, Process};
use crate::wait::eventually;

/// How long the control plane, the nodes and workloads may each take to be ready on a busy machine.
const STARTING: Duration = Duration::from_secs(180);
/// The tag of the agent's image; [`NEXT_TAG`] is the same image under another name, for rolling updates.
pub const TAG: &str = "0.1.0";
/// See [`TAG`].
pub const NEXT_TAG: &str = "next";

/// The mode of kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Proxy {
    /// `--proxy-mode nftables`.
    Nftables,
    /// `--proxy-mode iptables`.
    Iptables,
}

impl Proxy {
    /// As kube-proxy names it.
    pub const fn mode(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// The CNI plugin that connects pods to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Cni {
    /// A veth pair and host routes for each pod.
    Ptp,
    /// A bridge `cni0` for all pods, as flannel and kubeadm have it.
    Bridge,
    /// Cilium's agent, native routing or its own VXLAN overlay.
    Cilium,
}

/// The shape of a cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// The Kubernetes release.
    pub version: String,
    /// Number of nodes, 1 to 9.
    pub nodes: u8,
    /// The mode of kube-proxy.
    pub proxy: Proxy,
    /// The CNI plugin.
    pub cni: Cni,
    /// Whether iptables sees bridged packets (`net.bridge.bridge-nf-call-iptables`), as kubeadm demands.
    pub bridge_netfilter: bool,
    /// Whether the CNI plugin masquerades packets that leave the pod network.
    pub masquerade: bool,
    /// Whether pods of different nodes talk through a VXLAN overlay.
    pub overlay: bool,
    /// `enforcement.engines` of the agents.
    pub engines: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            version: KUBERNETES.to_owned(),
            nodes: 2,
            proxy: Proxy::Nftables,
            cni: Cni::Bridge,
            bridge_netfilter: true,
            masquerade: false,
            overlay: false,
            engines: vec!["ebpf".into(), "iptables".into()],
        }
    }
}

/// A cluster that runs.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    programs: Programs,
    /// The folder of Cilium, if it is the CNI plugin.
    cilium: Option<PathBuf>,
    pki: Pki,
    folder: PathBuf,
    nodes: Vec<Node>,
    etcd: Option<Process>,
    server: Option<Process>,
    _controllers: Vec<Process>,
    // Dropped last: it kills every process of the cluster.
    lab: Lab,
}

/// The name of a node, counted from 0.
fn node_name(index: usize) -> String {
    format!("node{}", index + 1)
}

impl Cluster {
    /// Brings the control plane and all nodes up, without bridge.
    ///
    /// # Errors
    /// A program is missing, or does not become ready; with the ends of the logs.
    pub fn up(options: Options) -> Result<Self> {
        let programs = Programs::find(&options.version)?;
        let cilium = (options.cni == Cni::Cilium).then(programs::cilium).transpose()?;
        let lab = Lab::builder().second_host().nodes(options.nodes).pods(0).build()?;
        let folder = lab.directory().join("cluster");
        fs::create_dir_all(folder.join("images"))?;
        fs::create_dir_all(folder.join("log"))?;
        images::create(&folder.join("images"), &agent::program()?, &[TAG, NEXT_TAG])?;
        let pki = Pki::create(folder.join("pki"), lab.nodes())?;
        let mut this = Self {
            options,
            programs,
            cilium,
            pki,
            folder,
            nodes: Vec::new(),
            etcd: None,
            server: None,
            _controllers: Vec::new(),
            lab,
        };
        this.start_etcd()?;
        this.start_server()?;
        this.start_controllers()?;
        for index in 0..this.lab.nodes().len() {
            this.start_node(index)?;
        }
        this.wait_for_nodes()?;
        Ok(this)
    }

    /// Starts etcd, on the first node's loopback.
    pub fn start_etcd(&mut self) -> Result<()> {
        let data = self.folder.join("etcd").display().to_string();
        let arguments = [
            "--data-dir",
            &data,
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
        ];
        self.etcd = Some(self.start("etcd", &arguments)?);
        Ok(())
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_server(&mut self) -> Result<()> {
        let at = |name: &str| self.pki.path(name).display().to_string();
        let address = self.lab.b().v4;
        let arguments = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            "--secure-port=6443".to_owned(),
            format!("--advertise-address={address}"),
            format!("--tls-cert-file={}", at("apiserver.crt")),
            format!("--tls-private-key-file={}", at("apiserver.key")),
            format!("--client-ca-file={}", at("ca.crt")),
            "--service-cluster-ip-range=10.96.0.0/16,fd96::/112".to_owned(),
            format!("--service-account-key-file={}", at("sa.pub")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--kubelet-client-certificate={}", at("admin.crt")),
            format!("--kubelet-client-key={}", at("admin.key")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged".to_owned(),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        self.server = Some(self.start("kube-apiserver", &arguments)?);
        let ready = eventually(STARTING, || self.kubectl(&["get", "--raw", "/readyz"]).ok());
        ready.map(drop).with_context(|| format!("the API server does not become ready:\n{}", self.logs()))
    }

    /// Kills the API server and etcd; the data of etcd stays.
    pub fn stop_control_plane(&mut self) {
        self.server = None;
        self.etcd = None;
    }

    fn start_controllers(&mut self) -> Result<()> {
        let kubeconfigs = |user: &str| {
            let file = self.pki.kubeconfig(user).display().to_string();
            ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
                .map(|flag| format!("--{flag}={file}"))
                .to_vec()
        };
        let mut manager = kubeconfigs("kcm");
        manager.extend([
            format!("--service-account-private-key-file={}", self.pki.path("sa.key").display()),
            format!("--root-ca-file={}", self.pki.path("ca.crt").display()),
            "--use-service-account-credentials".to_owned(),
            "--leader-elect=false".to_owned(),
        ]);
        let mut scheduler = kubeconfigs("scheduler");
        scheduler.push("--leader-elect=false".to_owned());
        self._controllers =
            vec![self.start("kube-controller-manager", &manager)?, self.start("kube-scheduler", &scheduler)?];
        if let Some(cilium) = &self.cilium {
            let operator = cilium.join("bin/cilium-operator");
            let arguments = cilium::operator(&self.pki.kubeconfig("admin"));
            self._controllers.push(self.start_program(&operator, "cilium-operator", &arguments)?);
        }
        let binding = ["create", "clusterrolebinding", "kube-proxy", "--clusterrole=system:node-proxier"];
        self.kubectl(&[&binding[..], &["--user=system:kube-proxy"]].concat()).map(drop)
    }

    /// Starts a node that does not run.
    pub fn start_node(&mut self, index: usize) -> Result<()> {
        let plan = node::Plan {
            lab: &self.lab,
            programs: &self.programs,
            cilium: self.cilium.as_deref(),
            pki: &self.pki,
            options: &self.options,
            folder: &self.folder,
        };
        let node = Node::start(&plan, index)?;
        self.nodes.push(node);
        Ok(())
    }

    /// Sets the pod networks of every node, and waits until it is Ready.
    fn wait_for_nodes(&mut self) -> Result<()> {
        let wanted = self.nodes.len();
        let mut without_networks: Vec<usize> = (0..wanted).collect();
        let mut dead = None;
        eventually(STARTING, || {
            dead = self.nodes.iter_mut().find_map(|node| (!node.is_alive()).then(|| node.name.clone()));
            // kubelet registers the node. Cilium's agent, which makes it Ready, waits for the networks.
            without_networks.retain(|index| self.set_pod_networks(*index).is_err());
            let nodes = self.get("nodes").ok()?;
            let ready = nodes["items"].as_array()?.iter().filter(|node| condition(node, "Ready")).count();
            (ready == wanted && without_networks.is_empty() || dead.is_some()).then_some(())
        })
        .with_context(|| format!("not every node becomes Ready:\n{}", self.logs()))?;
        if let Some(name) = dead {
            bail!("{name} ended:\n{}", self.logs());
        }
        Ok(())
    }

    fn set_pod_networks(&self, index: usize) -> Result<()> {
        let number = u8::try_from(index)?;
        let networks = Family::BOTH.map(|family| self.lab.pod_network(number, family).to_string());
        let patch = json!({"spec": {"podCIDR": networks[0], "podCIDRs": networks}}).to_string();
        self.kubectl(&["patch", "node", &node_name(index), "--patch", &patch]).map(drop)
    }

    /// Installs bridge by `kubectl apply -k` of an overlay over `deploy/kubernetes`, and waits until each agent is ready.
    /// `config` replaces the configuration of the agents; without it they have that of [`Self::config`].
    ///
    /// # Errors
    /// The API server refuses an object, or an agent does not become ready.
    pub fn install_bridge(&self, config: Option<&str>) -> Result<()> {
        let overlay = self.folder.join("bridge");
        fs::create_dir_all(&overlay)?;
        // kustomize takes no absolute path for a base.
        let base = overlay.join("base");
        if base.exists() {
            fs::remove_dir_all(&base)?;
        }
        copy_tree(Path::new(&deployed("")), &base)?;
        let own = self.config();
        fs::write(overlay.join("agent.yaml"), config.unwrap_or(&own))?;
        let kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "bridge-system",
            "resources": ["base"],
            "configMapGenerator": [
                {"name": "bridge-agent", "behavior": "replace", "files": ["bridge.yaml=agent.yaml"]},
            ],
            "generatorOptions": {"disableNameSuffixHash": true},
            "images": [{"name": AGENT, "newTag": TAG}],
        });
        fs::write(overlay.join("kustomization.yaml"), kustomization.to_string())?;
        self.kubectl(&["apply", "--kustomize", &overlay.display().to_string()])?;
        self.wait_for_bridge()
    }

    /// Changes the engines of the running agents, by their ConfigMap, and waits until each node has these and no other.
    ///
    /// # Errors
    /// An agent does not follow.
    pub fn set_engines(&self, engines: &[&str]) -> Result<()> {
        self.install_bridge(Some(&self.config_with(engines)))?;
        let mut seen = Value::Null;
        let follow = || {
            seen = self.get("bridgenodes").ok()?;
            let nodes = seen["items"].as_array()?;
            let follows =
                |node: &Value| node["status"]["engines"] == json!(engines) && condition(node, "Ready");
            (nodes.len() == self.nodes.len() && nodes.iter().all(follows)).then_some(())
        };
        eventually(STARTING, follow).with_context(|| format!("engines {engines:?}: {seen:#}"))?;
        self.wait_until_current()
    }

    /// Waits until the DaemonSet is rolled out.
    pub fn wait_for_bridge(&self) -> Result<()> {
        let arguments =
            ["rollout", "status", "daemonset/bridge-agent", "--timeout=180s", "--namespace=bridge-system"];
        self.kubectl(&arguments).map(drop).with_context(|| {
            let selected = ["--namespace=bridge-system", "--selector=app.kubernetes.io/name=bridge-agent"];
            let described =
                self.kubectl(&[&["describe", "pods"], &selected[..]].concat()).unwrap_or_default();
            let log = self.kubectl(&[&["logs", "--tail=30"], &selected[..]].concat()).unwrap_or_default();
            format!("bridge does not become ready:\n{described}\n{log}")
        })
    }

    /// The configuration of the agents: `deploy/kubernetes/agent.yaml` with the LAN of the lab in both families and the
    /// engines of the options.
    pub fn config(&self) -> String {
        self.config_with(&self.options.engines)
    }

    fn config_with(&self, engines: &[impl Serialize]) -> String {
        let lan = Family::BOTH.map(|family| self.lab.lan_network(family).to_string());
        json!({
            "role": "node", "kubernetes": {}, "networks": {"external": lan},
            "enforcement": {"mode": "enforce", "engines": engines},
            "persistence": {"save": "never"},
        })
        .to_string()
    }

    /// Runs `kubectl` as an administrator.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// Runs `kubectl apply` on these objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.kubectl_with(&["apply", "--filename=-"], &list.to_string()).map(drop)
    }

    /// Returns the result of `kubectl get` as JSON; `selection` is split at spaces.
    pub fn get(&self, selection: &str) -> Result<Value> {
        let mut arguments = vec!["get", "--output=json"];
        arguments.extend(selection.split_whitespace());
        Ok(serde_json::from_str(&self.kubectl(&arguments)?)?)
    }

    fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(self.programs.path("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.pki.kubeconfig("admin"))
            .args(arguments)
            .env("HOME", &self.folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.lab.b().netns.run(|| {
            let mut child = command.spawn()?;
            let mut pipe = child.stdin.take().context("its standard input")?;
            pipe.write_all(input.as_bytes())?;
            drop(pipe);
            anyhow::Ok(child.wait_with_output()?)
        })?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", arguments.join(" "), error.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Makes a pod that idles on node `index` with these labels, and waits until it is Running.
    pub fn make_pod(&self, name: &str, index: usize, labels: &Value, spec: &Value) -> Result<Pod> {
        self.apply(&[idle_pod(name, index, labels, spec)])?;
        self.pod(name)
    }

    /// Finds a pod of the default namespace and waits until it is Running.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let running = || {
            let pod = self.get(&format!("pod {name}")).ok()?;
            (pod["status"]["phase"] == "Running" && condition(&pod, "Ready")).then_some(pod)
        };
        let pod = eventually(STARTING, running).with_context(|| {
            let described = self.kubectl(&["describe", "pod", name]).unwrap_or_default();
            format!("pod {name} does not run:\n{described}")
        })?;
        let node = pod["spec"]["nodeName"].as_str().context("a pod that runs has a node")?;
        let node = self.nodes.iter().find(|other| other.name == node).context("an unknown node")?;
        let container = pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default();
        let container = container.strip_prefix("containerd://").context("a pod that runs has a container")?;
        let process = node.process_of(container)?;
        let netns = self.lab.netns_of(process, name)?;
        let addresses = pod["status"]["podIPs"].as_array().context("a pod that runs has addresses")?;
        let addresses: Vec<IpAddr> =
            addresses.iter().filter_map(|address| address["ip"].as_str()?.parse().ok()).collect();
        Ok(Pod { name: name.to_owned(), node: node.name.clone(), netns, addresses })
    }

    /// Applies BridgePolicies and waits until every node has them.
    pub fn apply_policies(&self, policies: &[Value]) -> Result<()> {
        self.apply(policies)?;
        self.wait_until_current()
    }

    /// Waits until the agent of each node enforces every policy that the API server has now.
    pub fn wait_until_current(&self) -> Result<()> {
        let accepted = || {
            let policies = self.get("bridgepolicies").ok()?;
            let current = |policy: &Value| {
                let generation = &policy["metadata"]["generation"];
                let conditions = policy["status"]["conditions"].as_array();
                conditions.is_some_and(|all| {
                    all.iter()
                        .any(|one| one["type"] == "Accepted" && one["observedGeneration"] == *generation)
                })
            };
            policies["items"].as_array()?.iter().all(current).then_some(())
        };
        eventually(Duration::from_secs(30), accepted)
            .context("a policy has no condition of its generation")?;
        for node in &self.nodes {
            self.settled(node)?;
        }
        Ok(())
    }

    /// Waits until the agent of `node` has finished its current work.
    fn settled(&self, node: &Node) -> Result<()> {
        let mut curl = Command::new("curl");
        curl.args(["-sSf", "--max-time", "20", "--unix-socket"]).arg(node.agent_socket());
        node.host.netns.output({
            curl.arg("http://localhost/v1/settled");
            curl
        })?;
        Ok(())
    }

    /// The stations.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The LAN host that test policies allow.
    pub fn allowed_host(&self) -> &Host {
        self.lab.a()
    }

    /// The LAN host that no policy allows.
    pub fn stranger(&self) -> &Host {
        self.lab.a2()
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The shape of the cluster.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The kubeconfig of an administrator, and the program to use it with.
    pub fn access(&self) -> (PathBuf, PathBuf) {
        (self.pki.kubeconfig("admin"), self.programs.path("kubectl"))
    }

    /// Returns the last lines of every log.
    pub fn logs(&self) -> String {
        let nodes: String = self.nodes.iter().map(Node::logs).collect();
        tails(&self.folder.join("log")) + &nodes
    }

    /// Starts a program of the control plane on the first node; its output goes to a log.
    fn start(&self, name: &str, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Result<Process> {
        self.start_program(&self.programs.path(name), name, arguments)
    }

    fn start_program(
        &self,
        program: &Path,
        name: &str,
        arguments: &[impl AsRef<std::ffi::OsStr>],
    ) -> Result<Process> {
        let log = File::options().create(true).append(true).open(self.folder.join("log").join(name))?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.pki).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        self.lab.b().netns.spawn_command(command).with_context(|| format!("start {name}"))
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    /// The name of its node.
    pub node: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its addresses, one of each family.
    pub addresses: Vec<IpAddr>,
}

impl Pod {
    /// Its address of a family.
    ///
    /// # Panics
    /// It has none.
    pub fn ip(&self, family: Family) -> IpAddr {
        let matches = |address: &&IpAddr| address.is_ipv4() == (family == Family::V4);
        *self.addresses.iter().find(matches).expect("an address of each family")
    }
}

/// A pod that idles; `spec` is merged over its specification.
fn idle_pod(name: &str, node: usize, labels: &Value, spec: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
        "spec": {
            "nodeName": node_name(node), "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "idle", "image": IDLE, "imagePullPolicy": "Never"}],
        },
    });
    if let (Some(target), Some(source)) = (pod["spec"].as_object_mut(), spec.as_object()) {
        for (key, value) in source {
            target.insert(key.clone(), value.clone());
        }
    }
    pod
}

/// Whether a condition of an object is true.
fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|one| one["type"] == kind && one["status"] == "True"))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp").arg("-r").arg(from).arg(to).output().context("start cp")?;
    ensure!(output.status.success(), "cp: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Returns the last lines of each file of a folder.
fn tails(folder: &Path) -> String {
    const LINES: usize = 8;
    let mut text = String::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let content = fs::read(entry.path()).unwrap_or_default();
        let content = String::from_utf8_lossy(&content);
        let lines: Vec<_> = content.lines().collect();
        let last = &lines[lines.len().saturating_sub(LINES)..];
        writeln!(text, "--- {}\n{}", entry.path().display(), last.join("\n")).expect("writing to a string");
    }
    text
}
