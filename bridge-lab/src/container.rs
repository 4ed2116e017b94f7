//! The agent in a container on a node of the lab, with exactly the privileges of `deploy/kubernetes/daemonset.yaml`: an OCI
//! bundle is made from that manifest and run by crun, as a container runtime of a cluster does.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    agent,
    lab::{Host, Lab, Process},
    pool::in_cgroup,
    wait::eventually,
};

/// How long the agent may take to be ready.
const DEADLINE: Duration = Duration::from_secs(15);
/// Paths of /proc that containerd and CRI-O make read-only in an unprivileged container.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const MASKED: [&str; 4] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"];

/// The files of a container.
#[derive(Clone, Debug)]
pub enum Files {
    /// The programs of this machine, with the agent that was built here.
    OfThisMachine,
    /// The root directory of an image.
    OfImage(PathBuf),
}

/// A container of the DaemonSet.
#[derive(Debug)]
pub struct Container {
    name: String,
    /// `kubectl get daemonset -o json`, so to say.
    manifest: Value,
    directory: PathBuf,
    pins: PathBuf,
    node: Host,
    process: Process,
}

/// The DaemonSet as it lies in `deploy`.
pub fn daemonset() -> Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/daemonset.yaml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
}

/// The capabilities that it adds.
pub fn capabilities(daemonset: &Value) -> Vec<String> {
    let added = &container(daemonset)["securityContext"]["capabilities"]["add"];
    added.as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect()
}

fn container(daemonset: &Value) -> &Value {
    &daemonset["spec"]["template"]["spec"]["containers"][0]
}

impl Container {
    /// Starts a container on a node; `config` is the content of the ConfigMap. It need not become ready.
    ///
    /// A second one on the same node has the same directories of the host, as the next pod of a DaemonSet.
    ///
    /// # Errors
    /// crun is missing, or refuses the bundle.
    pub fn start(lab: &Lab, node: &Host, files: &Files, manifest: Value, config: &str) -> Result<Self> {
        Self::start_with(lab, node, files, manifest, config, |_| {})
    }

    /// As [`Container::start`], after `adapt` has changed the specification.
    ///
    /// # Errors
    /// As there.
    pub fn start_with(
        lab: &Lab,
        node: &Host,
        files: &Files,
        manifest: Value,
        config: &str,
        adapt: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        let directory = lab.directory().join(&node.name);
        let pins = lab.pin_directory()?.join(&node.name);
        for name in ["etc", "run", "state"] {
            fs::create_dir_all(directory.join(name))?;
        }
        fs::create_dir_all(&pins)?;
        fs::write(directory.join("etc/bridge.yaml"), config)?;
        fs::write(directory.join("xtables.lock"), "")?;
        let number = fs::read_dir(&directory)?.count();
        let name = format!("{}-{number}", node.netns.name());
        let bundle = directory.join(format!("bundle-{number}"));
        let mut spec = specification(lab, &directory, &pins, node, files, &manifest, &bundle)?;
        adapt(&mut spec);
        fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(&spec)?)?;
        let log = fs::File::options().create(true).append(true).open(directory.join("log"))?;
        // crun takes either version of control groups, not both at once; and a pod is in a group of its own, seen from which
        // the root is far above.
        let hierarchy = lab.cgroup("pod-of-agent")?;
        let script = "mount --make-rprivate /; \
             test -d /sys/fs/cgroup/unified && mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup; \
             exec crun --root \"$1\" --cgroup-manager=disabled run --bundle \"$2\" \"$3\"";
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(directory.join("state"))
            .arg(&bundle)
            .arg(&name);
        command.stdout(log.try_clone()?).stderr(log);
        let process = node.netns.spawn_command(in_cgroup(&hierarchy, command))?;
        Ok(Self { name, manifest, directory, pins, node: node.clone(), process })
    }

    /// Waits until its readiness probe says so.
    ///
    /// # Errors
    /// It ends before, or is not ready in time; with its log.
    pub fn ready(&mut self) -> Result<()> {
        let mut ended = None;
        let ready = eventually(DEADLINE, || {
            ended = self.process.wait(Duration::ZERO).ok().flatten();
            (ended.is_some() || self.probe().is_ok_and(|output| output.status.success())).then_some(())
        });
        match (ended, ready) {
            (None, Some(())) => Ok(()),
            (Some(status), _) => bail!("the container ended ({status}):\n{}", self.log()),
            (None, None) => bail!("not ready in {DEADLINE:?}: {:?}\n{}", self.probe(), self.log()),
        }
    }

    /// Runs the command of the readiness probe in the container.
    pub fn probe(&self) -> Result<Output> {
        let probe = &container(&self.manifest)["readinessProbe"]["exec"]["command"];
        let words: Vec<&str> = probe.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        ensure!(!words.is_empty(), "the DaemonSet has no readiness probe");
        self.exec(&words)
    }

    /// Runs a command in the container, as `kubectl exec` does.
    pub fn exec(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.crun("exec");
        command.arg(&self.name).args(words);
        command.output().context("start crun (is it installed?)")
    }

    /// SIGTERM to the agent, and waits until it has ended, no longer than the DaemonSet has it.
    ///
    /// # Errors
    /// It had to be killed in a cluster.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let grace = &self.manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"];
        let grace = Duration::from_secs(grace.as_u64().context("no grace period")?);
        self.signal(Signal::TERM)?;
        self.process.wait(grace)?.with_context(|| format!("did not end in {grace:?}:\n{}", self.log()))
    }

    /// `kill -9` of the agent.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.process.wait(DEADLINE)?.context("still there").map(drop)
    }

    /// Process id of the agent, as this machine counts.
    pub fn pid(&self) -> Result<u32> {
        let output = self.crun("state").arg(&self.name).output()?;
        let state: Value = serde_json::from_slice(&output.stdout).context("there is no such container")?;
        Ok(u32::try_from(state["pid"].as_u64().context("no pid")?)?)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid()?.cast_signed()).context("no process")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Waits until the agent has ended by itself.
    ///
    /// # Errors
    /// It has not.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        self.process.wait(DEADLINE)?.with_context(|| format!("still there:\n{}", self.log()))
    }

    /// All that agents on this node have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// The directory of the host that is /sys/fs/bpf in the container.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// The node.
    pub fn node(&self) -> &Host {
        &self.node
    }

    fn crun(&self, subcommand: &str) -> Command {
        // It wants to know which version of control groups there is, and refuses both at once.
        let script = "test -d /sys/fs/cgroup/unified && mount --make-rprivate / && \
             mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup; exec crun --cgroup-manager=disabled --root \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(self.directory.join("state")).arg(subcommand);
        command
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.signal(Signal::KILL);
    }
}

/// The OCI runtime specification of the container (config.json).
fn specification(
    lab: &Lab,
    directory: &Path,
    pins: &Path,
    node: &Host,
    files: &Files,
    manifest: &Value,
    bundle: &Path,
) -> Result<Value> {
    let pod = &manifest["spec"]["template"]["spec"];
    let container = container(manifest);
    let security = &container["securityContext"];
    ensure!(pod["hostNetwork"] == true && security["privileged"] != true, "another container than this one");
    let capabilities: Vec<_> = capabilities(manifest).iter().map(|name| format!("CAP_{name}")).collect();
    let bind = |source: &Path, destination: &str, mode: &str| json!({ "destination": destination, "source": source, "type": "bind", "options": ["rbind", mode] });
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }),
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] }),
    ];
    let root = match files {
        Files::OfImage(root) => root.clone(),
        Files::OfThisMachine => {
            let root = bundle.join("rootfs");
            for name in ["usr", "etc/alternatives", "proc", "sys", "dev"] {
                fs::create_dir_all(root.join(name))?;
            }
            for name in ["bin", "sbin", "lib", "lib64"] {
                symlink(format!("usr/{name}"), root.join(name))?;
            }
            mounts.push(bind(Path::new("/usr"), "/usr", "ro"));
            mounts.push(bind(Path::new("/etc/alternatives"), "/etc/alternatives", "ro"));
            let program = agent::program()?;
            mounts.push(bind(program.parent().context("a directory")?, "/usr/local/bin", "ro"));
            root
        }
    };
    fs::create_dir_all(bundle)?;
    let empty = Vec::new();
    for mount in container["volumeMounts"].as_array().unwrap_or(&empty) {
        let volumes = pod["volumes"].as_array().unwrap_or(&empty);
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let volume = volume.with_context(|| format!("there is no volume {}", mount["name"]))?;
        let source = match volume["hostPath"]["path"].as_str() {
            _ if volume["configMap"].is_object() => directory.join("etc"),
            Some("/run/bridge") => directory.join("run"),
            Some("/var/lib/bridge") => {
                let state = directory.join("state");
                fs::create_dir_all(&state)?;
                state
            }
            Some("/sys/fs/bpf") => pins.to_owned(),
            Some("/run/xtables.lock") => directory.join("xtables.lock"),
            Some(path) => path.into(),
            None => bail!("a volume that the lab does not know: {volume}"),
        };
        let path = mount["mountPath"].as_str().context("mountPath")?;
        let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
        mounts.push(bind(&source, path, mode));
        if matches!(files, Files::OfThisMachine) {
            // crun creates the mount point in the root directory, which is private to this container.
            let place = bundle.join("rootfs").join(path.trim_start_matches('/'));
            fs::create_dir_all(place.parent().context("a parent")?)?;
        }
    }
    let mut arguments = vec![json!("bridge-agent")];
    arguments.extend(container["args"].as_array().unwrap_or(&empty).iter().cloned());
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": security["runAsUser"], "gid": 0 },
            "args": arguments,
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                // By which the lab knows its processes.
                format!("BRIDGE_LAB={}", lab.id()),
                format!("NODE_NAME={}", node.name),
            ],
            "cwd": "/",
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        },
        "root": { "path": root, "readonly": security["readOnlyRootFilesystem"] == true },
        "mounts": mounts,
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" },
                { "type": "network", "path": Path::new("/run/netns").join(node.netns.name()) },
            ],
            "readonlyPaths": READ_ONLY,
            "maskedPaths": MASKED,
        },
    }))
}
