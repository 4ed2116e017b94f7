//! A credential plugin that hangs keeps the agent neither from a reload nor from its end.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The agent has to end within this time after SIGTERM.
const TIME_TO_END: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);

const KUBECONFIG: &str = r#"
apiVersion: v1
kind: Config
current-context: lab
clusters: [{name: lab, cluster: {server: "https://192.0.2.1:6443", insecure-skip-tls-verify: true}}]
contexts: [{name: lab, context: {cluster: lab, user: u}}]
users: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: sleep, args: ["300"], interactiveMode: Never}}}]
"#;

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Starts an agent in a network namespace of its own.
fn start(directory: &Path) -> Agent {
    let (config, kubeconfig) = (directory.join("bridge.yaml"), directory.join("kubeconfig"));
    fs::write(&kubeconfig, KUBECONFIG).unwrap();
    let text = format!(
        "role: host\nroutes: {{}}\nkubernetes: {{kubeconfig: {}}}\napi: {{socket: {}}}\n",
        kubeconfig.display(),
        directory.join("agent.sock").display()
    );
    fs::write(&config, text).unwrap();
    let program = std::env::var("BRIDGE_AGENT").unwrap_or(env!("CARGO_BIN_EXE_bridge-agent").to_owned());
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", &program, "run", "--config"]).arg(config);
    command.env("STATE_DIRECTORY", directory.join("state")).env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::null()).stderr(fs::File::create(directory.join("log")).unwrap());
    Agent(command.spawn().unwrap())
}

fn eventually(directory: &Path, description: &str, mut condition: impl FnMut(&str) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
        if condition(&log) {
            return;
        }
        assert!(Instant::now() < deadline, "{description}:\n{log}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(agent: &Agent, name: &str) {
    let pid = agent.0.id().to_string();
    assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
}

#[test]
fn a_hanging_credential_plugin_delays_neither_a_reload_nor_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut agent = start(directory);
    eventually(directory, "the agent is ready", |log| log.contains("\"ready\"") || log.contains(" ready"));
    let plugin = |pid: u32| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        children.collect::<String>().trim().to_owned()
    };
    let pid = agent.0.id();
    eventually(directory, "the plugin runs", |_| !plugin(pid).is_empty());
    signal(&agent, "HUP");
    eventually(directory, "a reload goes on", |log| log.contains("reload"));
    signal(&agent, "TERM");
    let start = Instant::now();
    while agent.0.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < TIME_TO_END, "the agent runs {TIME_TO_END:?} after SIGTERM");
        thread::sleep(Duration::from_millis(10));
    }
}
