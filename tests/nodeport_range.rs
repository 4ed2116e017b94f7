//! `bridge-agent nodeport-range` on a node: files as kubelet would see them, ports as the kernel has them.

use std::{
    collections::BTreeSet,
    fs,
    net::{TcpListener, UdpSocket},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::{self, Agent},
    lab::{Lab, Netns},
};
use serde_json::Value;

const MANIFEST: &str = "\
apiVersion: v1
kind: Pod
spec:
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=192.168.31.17   # the LAN
    - --service-node-port-range=30000-32767
    - --tls-private-key-file=/etc/kubernetes/pki/apiserver.key
    image: registry.k8s.io/kube-apiserver:v1.33.1
";

const CONFIG: &str = "\
role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
nodePorts: {range: 30000-32767}
portPool: {ports: 61001-61100}
";

/// A node of a control plane.
struct Node {
    netns: Netns,
    manifests: PathBuf,
    manifest: PathBuf,
    config: PathBuf,
}

impl Node {
    fn new(lab: &Lab) -> Result<Self> {
        let directory = lab.directory();
        let manifests = directory.join("kubernetes/manifests");
        fs::create_dir_all(&manifests)?;
        let (manifest, config) = (manifests.join("kube-apiserver.yaml"), directory.join("bridge.yaml"));
        fs::write(&manifest, MANIFEST)?;
        fs::write(&config, CONFIG)?;
        let netns = lab.b().netns.clone();
        netns.set_sysctl("ipv4/ip_local_port_range", "32768 60999")?;
        Ok(Self { netns, manifests, manifest, config })
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(agent::program()?);
        command.arg("nodeport-range").args(arguments).arg("--manifest").arg(&self.manifest);
        command.arg("--config").arg(&self.config);
        // In the node's network namespace alone: the files are this machine's.
        Ok(self.netns.run(|| command.output())?)
    }

    fn text(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(0), "{arguments:?}: {errors}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_slice(&self.run(&[arguments, &["--json"]].concat())?.stdout)?)
    }

    /// Returns the refusal; the manifest must be unchanged, and nothing beside it.
    fn refusal(&self, range: &str) -> Result<String> {
        let before = fs::read_to_string(&self.manifest)?;
        let output = self.run(&["set", range])?;
        ensure!(output.status.code() == Some(1), "{range}: {output:?}");
        ensure!(fs::read_to_string(&self.manifest)? == before, "{range}: changed");
        ensure!(!self.backups().exists(), "{range}: a backup");
        Ok(String::from_utf8(output.stderr)?)
    }

    fn backups(&self) -> PathBuf {
        self.manifests.with_file_name("bridge-backup")
    }
}

fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let entry = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    fs::read_dir(directory).with_context(|| directory.display().to_string())?.map(entry).collect()
}

#[test]
fn a_range_is_shown_tried_changed_and_changed_back() -> Result<()> {
    let lab = Lab::builder().build()?;
    let node = Node::new(&lab)?;
    ensure!(node.text(&["show"])? == "30000-32767\n");
    fs::set_permissions(&node.manifest, fs::Permissions::from_mode(0o640))?;
    chown(&node.manifest, Some(1234), Some(5678))?;

    let diff = node.text(&["set", "31000-32000", "--dry-run"])?;
    let expected =
        "\n-    - --service-node-port-range=30000-32767\n+    - --service-node-port-range=31000-32000\n";
    ensure!(diff.contains(expected) && diff.contains("@@ -5,6 +5,6 @@"), "{diff}");
    ensure!(fs::read_to_string(&node.manifest)? == MANIFEST, "it was a dry run");
    ensure!(!node.backups().exists(), "it was a dry run");

    let said = node.text(&["set", "31000-32000"])?;
    let changed = MANIFEST.replace("30000-32767", "31000-32000");
    ensure!(fs::read_to_string(&node.manifest)? == changed, "{said}");
    ensure!(said.contains("nodePorts.range 30000-32767: write \"31000-32000\" there"), "{said}");
    let metadata = node.manifest.metadata()?;
    ensure!(
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()) == (0o640, 1234, 5678),
        "{metadata:?}"
    );
    // kubelet runs every file that it finds there.
    ensure!(names(&node.manifests)? == ["kube-apiserver.yaml".to_owned()].into());
    let backups = names(&node.backups())?;
    let backup = backups.first().context("no backup")?;
    ensure!(backups.len() == 1 && said.contains(backup.as_str()), "{backups:?} {said}");
    ensure!(fs::read_to_string(node.backups().join(backup))? == MANIFEST);

    // The same again changes nothing and keeps nothing.
    let again = node.json(&["set", "31000-32000"])?;
    ensure!(again["changed"] == false && again["backup"].is_null(), "{again}");
    ensure!(names(&node.backups())?.len() == 1);
    let back = node.json(&["set", "30000-32767"])?;
    ensure!(back["before"] == "31000-32000" && back["changed"] == true, "{back}");
    ensure!(fs::read_to_string(&node.manifest)? == MANIFEST);
    ensure!(names(&node.backups())?.len() == 2, "each has its own");
    let shown = node.json(&["show"])?;
    ensure!(shown["range"] == "30000-32767" && shown["set"] == true, "{shown}");
    Ok(())
}

#[test]
fn what_has_ports_of_the_range_is_named_with_a_remedy() -> Result<()> {
    let lab = Lab::builder().build()?;
    let node = Node::new(&lab)?;
    let refused = |range: &str, expected: &[&str]| -> Result<()> {
        let said = node.refusal(range)?;
        for expected in expected {
            ensure!(said.contains(expected), "{range}: {expected} is not in {said}");
        }
        Ok(())
    };
    refused("61000-61001", &["61001 are in portPool.ports", "choose a range outside the pool"])?;
    refused("30000-32768", &["32768 are in net.ipv4.ip_local_port_range", "ip_local_reserved_ports=32768"])?;
    let held = |range: &str, protocol: &str, port: u16| {
        let pid = std::process::id();
        refused(
            range,
            &[&format!("{protocol} 127.0.0.1:{port} ("), &format!("pid {pid})"), "have it listen elsewhere"],
        )
    };
    let tcp = node.netns.run(|| TcpListener::bind("127.0.0.1:31000"))?;
    held("30000-32767", "TCP", 31000)?;
    held("31000-32767", "TCP", 31000)?;
    drop(tcp);
    let udp = node.netns.run(|| UdpSocket::bind("127.0.0.1:31000"))?;
    held("30000-31000", "UDP", 31000)?;
    node.text(&["set", "31001-32000", "--dry-run"])?;
    drop(udp);
    // Reserved ports go only to programs that ask for them.
    node.netns.set_sysctl("ipv4/ip_local_reserved_ports", "32768-33000")?;
    node.text(&["set", "30000-33000", "--dry-run"])?;

    let usage = node.run(&["set", "32767-30000"])?;
    let said = String::from_utf8(usage.stderr)?;
    ensure!(usage.status.code() == Some(2) && said.contains("write \"30000-32767\""), "{said}");
    fs::write(&node.config, "role: none\n")?;
    ensure!(node.refusal("31000-32000")?.contains("role"), "an unknown pool is no free pool");
    fs::remove_file(&node.config)?;
    ensure!(node.refusal("31000-32000")?.contains("--config FILE"));
    Ok(())
}

#[test]
fn a_backup_never_goes_where_kubelet_would_run_it() -> Result<()> {
    let lab = Lab::builder().build()?;
    let node = Node::new(&lab)?;
    let linked = lab.directory().join("elsewhere");
    std::os::unix::fs::symlink(&node.manifests, &linked)?;
    for directory in [node.manifests.as_path(), &node.manifests.join("../manifests"), &linked] {
        let output = node.run(&["set", "31000-32000", "--backup-dir", &directory.display().to_string()])?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && said.contains("second kube-apiserver"), "{said}");
        ensure!(names(&node.manifests)? == ["kube-apiserver.yaml".to_owned()].into());
    }
    // A link to the manifest stays one.
    let real = lab.directory().join("real.yaml");
    fs::rename(&node.manifest, &real)?;
    std::os::unix::fs::symlink(&real, &node.manifest)?;
    node.text(&["set", "31000-32000"])?;
    ensure!(node.manifest.is_symlink() && fs::read_to_string(&real)?.contains("31000-32000"));
    Ok(())
}

#[test]
fn the_agent_warns_of_overlaps_when_it_starts_and_when_it_reloads() -> Result<()> {
    let lab = Lab::builder().build()?;
    let netns = &lab.b().netns;
    netns.set_sysctl("ipv4/ip_local_port_range", "32768 60999")?;
    let config = |range: &str| CONFIG.replace("30000-32767", range);
    let mut agent = Agent::start(&lab, lab.b(), &config("30000-32768"))?;
    let warnings = |agent: &Agent| -> Result<Vec<String>> {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
        let list = status["agent"]["warnings"].as_array().context("no warnings")?.clone();
        Ok(list.iter().map(|warning| warning.as_str().unwrap_or_default().to_owned()).collect())
    };
    let said = warnings(&agent)?;
    ensure!(said.len() == 1 && said[0].contains("32768 are in net.ipv4.ip_local_port_range"), "{said:?}");
    ensure!(agent.run(&["status"])?.contains(&said[0]), "for people, too");
    ensure!(agent.log().contains("32768 are in net.ipv4.ip_local_port_range"), "{}", agent.log());
    agent.reload(&config("30000-32767"))?;
    ensure!(warnings(&agent)?.is_empty());
    agent.reload(&config("61100-61200"))?;
    let said = warnings(&agent)?;
    ensure!(said.len() == 1 && said[0].contains("61100 are in portPool.ports"), "{said:?}");
    Ok(())
}
