//! A node: containerd, kubelet and kube-proxy in the network namespace of a station of the lab, and in a mount
//! namespace of their own, so that two nodes of one kernel share neither pins nor sockets nor locks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Cni, Options, cilium, images, pki::Pki, programs::Programs};
use crate::lab::{Family, Host, Lab, Process, cgroup_hierarchies};

/// How long containerd may take to listen, in tenths of a second.
const CONTAINERD_TRIES: u32 = 300;
/// The interface of the overlay on each node, and the port of its packets (as flannel has them).
const OVERLAY: (&str, u16) = ("vxlan0", 8472);

/// A node that runs.
#[derive(Debug)]
pub struct Node {
    /// The name in the cluster.
    pub name: String,
    /// The station of the lab.
    pub host: Host,
    /// Files of this node.
    folder: PathBuf,
    programs: Programs,
    /// The shell in the node's mount namespace; its children are the node's programs.
    process: Process,
}

/// Everything that the files of a node are written from.
pub(super) struct Plan<'a> {
    pub(super) lab: &'a Lab,
    pub(super) programs: &'a Programs,
    /// The folder of Cilium, if it is the CNI plugin.
    pub(super) cilium: Option<&'a Path>,
    pub(super) pki: &'a Pki,
    pub(super) options: &'a Options,
    /// The folder of the cluster.
    pub(super) folder: &'a Path,
}

impl Node {
    /// Starts node number `index`, counted from 0.
    pub(super) fn start(plan: &Plan<'_>, index: usize) -> Result<Self> {
        let host = plan.lab.nodes()[index].clone();
        let name = super::node_name(index);
        let folder = plan.folder.join(&name);
        for part in ["cni/conf", "manifests", "run-bridge", "var-lib-bridge", "log"] {
            fs::create_dir_all(folder.join(part))?;
        }
        for controller in cgroup_hierarchies() {
            let group = controller.join(cgroup_name(plan.lab, &name));
            fs::create_dir_all(&group).with_context(|| group.display().to_string())?;
            // Version 1 of cpuset starts with no processor and no memory.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(all) = fs::read(controller.join(file)) {
                    fs::write(group.join(file), all).with_context(|| group.display().to_string())?;
                }
            }
        }
        network(plan, index, &host)?;
        if let Some(cni) = cni(plan, index, &folder) {
            fs::write(folder.join("cni/conf/10-pods.conflist"), cni.to_string())?;
        }
        fs::write(folder.join("containerd.toml"), containerd(plan, &folder))?;
        fs::write(folder.join("kubelet.yaml"), kubelet(plan, &name, &folder).to_string())?;
        let script = script(plan, &name, &host, &folder);
        let script_file = folder.join("start.sh");
        fs::write(&script_file, script)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-eu"]).arg(&script_file);
        let log = fs::File::create(folder.join("log/start"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let process = host.netns.spawn_command(command)?;
        Ok(Self { name, host, folder, programs: plan.programs.clone(), process })
    }

    /// Runs `ctr` in the namespace of kubelet's containers.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.programs.path("ctr"));
        command.arg("--address").arg(self.folder.join("containerd.sock")).args(["--namespace", "k8s.io"]);
        command.args(arguments);
        self.host.netns.output(command)
    }

    /// Returns the process id of a running container.
    pub fn process_of(&self, container: &str) -> Result<u32> {
        let tasks = self.ctr(&["tasks", "list"])?;
        let line = tasks.lines().find(|line| line.starts_with(container));
        let pid = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|word| word.parse().ok());
        pid.with_context(|| format!("no task of container {container} on {}", self.name))
    }

    /// Kills one of the node's programs (`kubelet`, `containerd`, `kube-proxy`, `cilium-agent`); its loop starts it again.
    pub fn restart(&self, program: &str) -> Result<()> {
        let file = self.folder.join(format!("{program}.pid"));
        let pid: i32 = fs::read_to_string(&file).context("read a process id")?.trim().parse()?;
        let pid = rustix::process::Pid::from_raw(pid).context("a process id")?;
        Ok(rustix::process::kill_process(pid, Signal::TERM)?)
    }

    /// Sets the mode that kube-proxy has when it starts next.
    pub fn set_proxy(&self, mode: &str) -> Result<()> {
        Ok(fs::write(self.folder.join("proxy-mode"), mode)?)
    }

    /// The folder of static pods.
    pub fn manifests(&self) -> PathBuf {
        self.folder.join("manifests")
    }

    /// Returns the last lines of every log of the node.
    pub fn logs(&self) -> String {
        super::tails(&self.folder.join("log"))
    }

    /// Returns a command that runs in the node's mount and network namespaces.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.process.id().to_string(), "--mount", "--net", program]);
        command
    }

    /// Returns a path as programs outside the node's mount namespace see a file below its `/run/bridge`.
    pub fn agent_socket(&self) -> PathBuf {
        self.folder.join("run-bridge/agent.sock")
    }

    /// Whether the programs of the node run.
    pub(super) fn is_alive(&mut self) -> bool {
        self.process.wait(Duration::ZERO).is_ok_and(|status| status.is_none())
    }
}

/// The name of a node's control group in every hierarchy.
fn cgroup_name(lab: &Lab, node: &str) -> String {
    format!("{}-kube-{node}", lab.id())
}

/// Prepares sysctls, the default route and the overlay of a node.
fn network(plan: &Plan<'_>, index: usize, host: &Host) -> Result<()> {
    let set = |path: &str, value: &str| host.netns.set_sysctl(path, value);
    set("ipv4/ip_forward", "1")?;
    set("ipv6/conf/all/forwarding", "1")?;
    let nf = if plan.options.bridge_netfilter { "1" } else { "0" };
    for file in ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"] {
        set(file, nf)?;
    }
    host.netns.ip("route replace default via 192.168.31.1 dev eth0 onlink")?;
    if !plan.options.overlay || plan.options.cni == Cni::Cilium {
        return Ok(());
    }
    let (device, port) = OVERLAY;
    let v4 = host.v4;
    host.netns
        .ip(&format!("link add {device} type vxlan id 1 local {v4} dev eth0 dstport {port} nolearning"))?;
    host.netns.ip(&format!("link set {device} address {} up", overlay_mac(index)))?;
    // The first address of the node's pod network, as flannel has it: what the node masquerades leaves with it.
    host.netns.ip(&format!("address add 10.200.{}.0/32 dev {device}", index + 1))?;
    host.netns.ip(&format!("address add fd20:{}::/128 dev {device} nodad", index + 1))?;
    for (other, peer) in plan.lab.nodes().iter().enumerate().filter(|(other, _)| *other != index) {
        let mac = overlay_mac(other);
        let mut fdb = Command::new("bridge");
        fdb.args(["fdb", "append", &mac, "dev", device, "dst", &peer.v4.to_string()]);
        host.netns.output(fdb)?;
        let number = u8::try_from(other)?;
        for (family, gateway) in
            [(Family::V4, format!("10.200.{}.0", other + 1)), (Family::V6, format!("fd20:{}::", other + 1))]
        {
            let network = plan.lab.pod_network(number, family);
            host.netns.ip(&format!("neigh replace {gateway} lladdr {mac} dev {device} nud permanent"))?;
            // The kernel takes no gateway that a route leads to by another device.
            host.netns.ip(&format!("route delete {network}"))?;
            host.netns.ip(&format!("route replace {network} via {gateway} dev {device} onlink"))?;
        }
    }
    Ok(())
}

fn overlay_mac(index: usize) -> String {
    format!("02:bb:00:00:00:{:02x}", index + 1)
}

/// The configuration of the CNI plugins, unless the plugin's own agent writes it.
fn cni(plan: &Plan<'_>, index: usize, folder: &Path) -> Option<Value> {
    let plugin = match plan.options.cni {
        Cni::Ptp => "ptp",
        Cni::Bridge => "bridge",
        Cni::Cilium => return None,
    };
    let number = u8::try_from(index).unwrap_or(u8::MAX);
    let range = |family| json!([{"subnet": plan.lab.pod_network(number, family).to_string()}]);
    let mut main = json!({
        "type": plugin, "ipMasq": plan.options.masquerade,
        "ipam": {
            "type": "host-local", "dataDir": folder.join("cni/ipam"),
            "ranges": [range(Family::V4), range(Family::V6)],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    });
    if plan.options.cni == Cni::Bridge {
        main["bridge"] = json!("cni0");
        main["isGateway"] = json!(true);
        main["hairpinMode"] = json!(true);
    }
    let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    Some(json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [main, ports]}))
}

fn containerd(plan: &Plan<'_>, folder: &Path) -> String {
    let (folder, bin) = (folder.display(), plan.programs.folder().display());
    let cilium = plan.cilium.map(|cilium| format!(", \"{}/bin\"", cilium.display())).unwrap_or_default();
    format!(
        r#"version = 3
root = "{folder}/containerd"
state = "{folder}/containerd-run"
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/containerd.sock.ttrpc"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{bin}"{cilium}]
  conf_dir = "{folder}/cni/conf"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{bin}/runc"
  SystemdCgroup = false
"#,
        pause = images::PAUSE
    )
}

fn kubelet(plan: &Plan<'_>, name: &str, folder: &Path) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": plan.pki.path("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDomain": "cluster.local", "clusterDNS": ["10.96.0.10"],
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{}", cgroup_name(plan.lab, name)),
        "failCgroupV1": false, "failSwapOn": false, "cgroupsPerQOS": true, "enforceNodeAllocatable": [],
        "containerRuntimeEndpoint": format!("unix://{}/containerd.sock", folder.display()),
        "staticPodPath": folder.join("manifests"),
        "tlsCertFile": plan.pki.path(&format!("{name}.crt")), "tlsPrivateKeyFile": plan.pki.path(&format!("{name}.key")),
        "resolvConf": "/dev/null", "podLogsDir": folder.join("pod-logs"), "oomScoreAdj": 0,
        "evictionHard": {"imagefs.available": "1%", "nodefs.available": "1%", "memory.available": "50Mi"},
        // ConfigMaps reach the containers within seconds instead of a minute.
        "syncFrequency": "2s", "configMapAndSecretChangeDetectionStrategy": "Watch",
    })
}

/// The script that runs as the node: mounts of its own, then each program in a loop that starts it again when it ends.
fn script(plan: &Plan<'_>, name: &str, host: &Host, folder: &Path) -> String {
    let bin = plan.programs.folder().display();
    let (images, folder_text) = (plan.folder.join("images"), folder.display());
    let kubeconfig = |user: &str| plan.pki.kubeconfig(user).display().to_string();
    let pods = "10.200.0.0/16,fd20::/16";
    let admin = plan.pki.kubeconfig("admin");
    let cilium = plan.cilium.map(|cilium| cilium::script(cilium, folder, name, &admin, plan.options));
    format!(
        r#"mount --make-rshared /
mkdir -p /run/bridge /var/lib/bridge /run/containerd /var/lib/cni {folder_text}/run-containerd {folder_text}/var-lib-cni
mount --bind {folder_text}/run-containerd /run/containerd
mount --bind {folder_text}/var-lib-cni /var/lib/cni
umount /sys/fs/bpf 2>/dev/null || true
mount -t bpf bpf /sys/fs/bpf
mount --bind {folder_text}/run-bridge /run/bridge
mount --bind {folder_text}/var-lib-bridge /var/lib/bridge
touch {folder_text}/xtables.lock /run/xtables.lock
mount --bind {folder_text}/xtables.lock /run/xtables.lock
export PATH={bin}:$PATH
echo {proxy} >{folder_text}/proxy-mode
forever() {{
    name=$1; shift
    while :; do
        "$@" >>{folder_text}/log/$name 2>&1 &
        echo $! >{folder_text}/$name.pid
        wait $! || true
        sleep 0.2
    done
}}
forever containerd containerd --config {folder_text}/containerd.toml &
for i in $(seq {CONTAINERD_TRIES}); do ctr --address {folder_text}/containerd.sock version >/dev/null 2>&1 && break; sleep 0.1; done
for image in {images}/*.tar; do ctr --address {folder_text}/containerd.sock --namespace k8s.io images import --local "$image"; done >{folder_text}/log/images 2>&1
proxy() {{
    exec kube-proxy --kubeconfig {proxy_config} --hostname-override {name} --proxy-mode "$(cat {folder_text}/proxy-mode)" \
        --cluster-cidr {pods} --conntrack-max-per-core 0 --healthz-bind-address 127.0.0.1:10256
}}
forever kube-proxy proxy &
{cilium}forever kubelet kubelet --config {folder_text}/kubelet.yaml --kubeconfig {node_config} --hostname-override {name} \
    --node-ip {v4},{v6} --root-dir {folder_text}/kubelet --cert-dir {folder_text}/certificates &
wait
"#,
        cilium = cilium.unwrap_or_default(),
        images = images.display(),
        proxy = plan.options.proxy.mode(),
        proxy_config = kubeconfig("proxy"),
        node_config = kubeconfig(name),
        v4 = host.v4,
        v6 = host.v6,
    )
}
