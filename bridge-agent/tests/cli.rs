//! The command line as a user meets it: help, mistakes, formats, exit codes.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{fd::FromRawFd as _, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bridge-agent"));
    command.args(arguments).current_dir(ROOT).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the agent starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// Runs a command that is refused as wrong usage, and returns the first line of its complaint.
fn refused(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stderr).lines().next().unwrap_or_default().to_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)))
}

/// Runs a command whose input and error output are a terminal; returns all that the terminal shows, and the exit code.
fn on_terminal(mut command: Command, typed: &str) -> (String, Option<i32>) {
    let (mut master, mut slave) = (-1, -1);
    let nothing = std::ptr::null_mut();
    // SAFETY: openpty writes two descriptors; it may be given no name, settings and size.
    let opened =
        unsafe { libc::openpty(&raw mut master, &raw mut slave, nothing, nothing.cast(), nothing.cast()) };
    assert_eq!(opened, 0, "openpty: {}", std::io::Error::last_os_error());
    // SAFETY: both were just opened, and are owned by nothing else.
    let (mut master, slave) = unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) };
    let copy = || slave.try_clone().expect("dup");
    let mut child = command.stdin(copy()).stderr(copy()).stdout(copy()).spawn().expect("the agent starts");
    drop(command);
    drop(slave);
    master.write_all(typed.as_bytes()).expect("typed");
    let mut shown = Vec::new();
    // EIO: the last process has closed the terminal.
    while let Ok(length @ 1..) = master.read({
        let end = shown.len();
        shown.resize(end + 4096, 0);
        &mut shown[end..]
    }) {
        let end = shown.len() - 4096 + length;
        shown.truncate(end);
    }
    while shown.last() == Some(&0) {
        shown.pop();
    }
    (String::from_utf8_lossy(&shown).into_owned(), child.wait().expect("wait").code())
}

#[test]
fn the_example_of_each_path_in_the_schema_is_its_own() {
    let schema = json(&run(&["check", "--schema"]));
    let example =
        |section: &str, key: &str| schema["$defs"][section]["properties"][key]["examples"][0].clone();
    assert_eq!(example("Api", "socket"), "/run/bridge/agent.sock");
    assert_eq!(example("Discovery", "keyFile"), "/etc/bridge/discovery.key");
    assert_eq!(example("Routes", "file"), "/etc/bridge/cluster.yaml");
    assert_eq!(example("Kubernetes", "kubeconfig"), "/etc/bridge/kubeconfig");
}

#[test]
fn a_log_level_that_is_none_is_refused() {
    for level in ["loud", "bridge_agent=loud", "info,loud", ""] {
        let said = refused(&["--log-level", level, "check", "deploy/examples/host.yaml"]);
        assert!(said.contains("write error, warn, info, debug or trace"), "{level}: {said}");
    }
}

#[test]
fn a_value_that_no_flow_has_is_refused() {
    assert!(refused(&["flows", "--protocol", "tcpp"]).contains("write tcp, udp"));
    assert!(refused(&["flows", "--state", "open"]).contains("open"));
    assert!(refused(&["flows", "--port", "0"]).contains('0'));
    assert!(refused(&["monitor", "--port", "0"]).contains('0'));
    assert!(refused(&["monitor", "--verdict", "denied"]).contains("denied"));
}

#[test]
fn every_duration_has_a_unit() {
    let key = ["--key-file", "/nonexistent"];
    for arguments in [
        &["discover", "probe", "192.0.2.1:1", key[0], key[1], "--lifetime", "300"][..],
        &["discover", "probe", "192.0.2.1:1", key[0], key[1], "--every", "60"],
        &["discover", "probe", "192.0.2.1:1", key[0], key[1], "--timeout", "15"],
        &["discover", "sniff", "--port", "1", "--for", "5"],
        &["ports", "acquire", "192.0.2.1:1", "--wait", "5"],
        &["ports", "acquire", "192.0.2.1:1", "--for", "5"],
        &["apply", "-", "--confirm", "60"],
        &["status", "--watch=5"],
    ] {
        let number = arguments.last().expect("a number").trim_start_matches("--watch=");
        let said = refused(arguments);
        assert!(said.contains(&format!("say the unit: {number}s for seconds")), "{arguments:?}: {said}");
    }
}

#[test]
fn a_destination_without_a_port_is_refused_with_one_that_has_it() {
    let said = refused(&["ports", "acquire", "192.168.31.67"]);
    assert!(said.contains("192.168.31.67:443"), "{said}");
}

#[test]
fn rules_of_iptables_come_as_json() {
    let rendered = json(&run(&[
        "rules",
        "render",
        "--format",
        "iptables",
        "--json",
        "--config",
        "deploy/examples/node.yaml",
    ]));
    assert_eq!(rendered["format"], "iptables");
    assert!(rendered["text"].as_str().is_some_and(|text| text.starts_with("*")), "{rendered}");
}

#[test]
fn static_routes_of_the_example_need_no_other_file() {
    let host = ["--config", "deploy/examples/host.yaml", "routes"];
    for more in [&["export", "--format", "iproute2"][..], &["plan"], &["list"]] {
        let output = run(&[&host, more].concat());
        assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
        assert!(text(&output.stdout).contains("10.200.1.0/24"), "{more:?}: {}", text(&output.stdout));
        assert!(text(&output.stderr).contains("cluster.yaml"), "the missing source is named");
    }
}

#[test]
fn routes_that_are_due_have_an_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let (due, none) = (directory.path().join("due.yaml"), directory.path().join("none.yaml"));
    fs::write(&due, "role: host\nroutes: {static: [{to: 198.51.100.0/24, blackhole: true}]}\n").unwrap();
    fs::write(&none, "role: host\nroutes: {static: []}\n").unwrap();
    let code = |file: &Path, more: &[&str]| {
        let output = run(&[&["--config", file.to_str().unwrap(), "routes", "plan"], more].concat());
        (output.status.code(), text(&output.stdout).to_owned(), text(&output.stderr).to_owned())
    };
    let (with, plan, error) = code(&due, &["--exit-code"]);
    assert_eq!(with, Some(4), "{plan}{error}");
    assert!(plan.contains("198.51.100.0/24"), "{plan}");
    assert_eq!(error, "");
    assert_eq!(code(&due, &[]).0, Some(0));
    assert_eq!(code(&none, &["--exit-code"]).0, Some(0));
}

/// Every Markdown file of the project.
fn pages() -> Vec<PathBuf> {
    let below = |directory: &str| fs::read_dir(Path::new(ROOT).join(directory)).expect("a directory");
    let files = [".", "docs", "deploy/helm/bridge"].into_iter().filter(|d| Path::new(ROOT).join(d).is_dir());
    let files = files.flat_map(below).map(|entry| entry.expect("an entry").path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

#[test]
fn the_kernel_floor_is_the_same_everywhere() {
    let mut stated = 0;
    let sources = [PathBuf::from(ROOT).join("bridge-agent/src/datapath/error.rs")];
    for path in pages().into_iter().chain(sources) {
        let page = fs::read_to_string(&path).unwrap().replace('\n', " ");
        for (place, _) in page.match_indices("Linux ") {
            let (version, rest) = page[place + 6..].split_once(' ').unwrap_or_default();
            // "6.6 or later attaches by TCX" is a feature, no floor.
            if (rest.starts_with("or later") || rest.starts_with("and later")) && !rest.contains("attaches") {
                assert_eq!(version, "6.1", "{}: {rest:.60}", path.display());
                stated += 1;
            }
        }
        assert!(!page.contains("the floor of bridge is"), "{}", path.display());
    }
    assert!(stated >= 3, "README, docs/operations.md and SECURITY.md state it");
}

#[test]
fn pages_name_the_pins_of_this_version() {
    let pins = bridge_agent::datapath::Pins::new("/sys/fs/bpf/bridge");
    let mut named = 0;
    for path in pages() {
        let page = fs::read_to_string(&path).unwrap();
        for (place, _) in page.match_indices("/sys/fs/bpf/bridge/v") {
            let pin = page[place..].split(|c: char| !c.is_ascii_alphanumeric() && c != '/').next().unwrap();
            // `v<ABI_VERSION>` stands for any.
            if !pin.ends_with("/v") {
                assert!(Path::new(pin).starts_with(pins.directory()), "{}: {pin}", path.display());
                named += 1;
            }
        }
    }
    assert!(named >= 2, "docs/demo.md and docs/operations.md name pins");
}

#[test]
fn a_rule_that_a_deny_shadows_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bridge.yaml");
    let rules = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\nrules:\n\
                 - {name: web, direction: inbound, protocol: tcp, ports: [443]}\n\
                 - {name: ssh, direction: inbound, protocol: tcp, ports: [22]}\n\
                 - {name: all, direction: inbound, protocol: any, action: deny}\n";
    fs::write(&file, rules).unwrap();
    let output = run(&["check", file.to_str().unwrap()]);
    for shadowed in ["`web` never matches", "`ssh` never matches"] {
        assert!(text(&output.stderr).contains(shadowed), "{}", text(&output.stderr));
    }
}

#[test]
fn a_bridge_policy_is_checked_as_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policy.yaml");
    let policy = "apiVersion: bridge.dev/v1alpha1\nkind: BridgePolicy\nmetadata: {name: devices}\nspec:\n  rules:\n  \
                  - {name: modbus, direction: outbound, protocol: tcp, ports: [502], external: [192.168.31.0/24]}\n";
    let group = fs::read_to_string(Path::new(ROOT).join("docs/kubernetes.md")).unwrap();
    let version = group.lines().find(|line| line.starts_with("apiVersion: bridge")).unwrap_or_default();
    let policy = policy.replace("apiVersion: bridge.dev/v1alpha1", version);
    fs::write(&file, policy).unwrap();
    let output = run(&["check", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("BridgePolicy devices: 1 rules"), "{}", text(&output.stdout));
}

#[test]
fn every_declared_dependency_is_used() {
    for package in ["bridge-agent", "bridge-client", "bridge-common", "bridge-lab", "xtask", "tests"] {
        let directory = Path::new(ROOT).join(package);
        let manifest = fs::read_to_string(directory.join("Cargo.toml")).unwrap();
        let mut source = String::new();
        collect(&directory, &mut source);
        let mut section = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section.contains("dependencies")
                && let Some(name) = line
                    .split(['.', ' ', '='])
                    .next()
                    .filter(|name| !name.is_empty() && !name.starts_with('#'))
            {
                let name = name.replace('-', "_");
                assert!(source.contains(&name), "{package} declares {name} and does not use it");
            }
        }
    }
}

/// Appends all Rust code below a directory.
fn collect(directory: &Path, source: &mut String) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, source);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            source.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn a_command_that_writes_files_names_them() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().to_str().unwrap();
    for arguments in [["crds", "--directory", to], ["generate", "--directory", to]] {
        let output = run(&arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains(to), "{arguments:?}: {}", text(&output.stdout));
    }
}

#[test]
fn a_terminal_is_asked_before_down() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let pins = directory.path().join("pins");
    let down = |more: &[&str]| {
        let mut command = command(&["down", "--socket"]);
        command.arg(&socket).arg("--pin-root").arg(&pins).args(more);
        command
    };
    let (shown, code) = on_terminal(down(&[]), "n\n");
    assert!(shown.contains("[y/N]") && shown.contains("nothing was done"), "{shown}");
    assert_eq!(code, Some(1), "{shown}");
    let (shown, code) = on_terminal(down(&["--dry-run"]), "");
    assert!(!shown.contains("[y/N]"), "{shown}");
    assert_eq!(code, Some(0), "{shown}");
}

#[test]
fn colour_is_for_terminals_without_no_color() {
    let wrong = || command(&["check", "/nonexistent/bridge.yaml"]);
    let (coloured, _) = on_terminal(wrong(), "");
    assert!(coloured.contains("\x1b["), "{coloured:?}");
    let mut plain = wrong();
    plain.env("NO_COLOR", "1");
    let (plain, _) = on_terminal(plain, "");
    assert!(plain.contains("error") && !plain.contains("\x1b["), "{plain:?}");
    assert!(!text(&wrong().output().unwrap().stderr).contains('\x1b'));
}

#[test]
fn a_slow_command_shows_its_progress_on_a_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // An agent that takes long to answer, and then breaks off.
    let slow = std::thread::spawn(move || {
        let accepted = listener.accept().unwrap();
        std::thread::sleep(Duration::from_millis(2500));
        drop(accepted);
    });
    let mut status = command(&["status", "--ready", "--socket"]);
    status.arg(&socket);
    let (shown, code) = on_terminal(status, "");
    assert!(shown.contains("status: 2 s"), "{shown:?}");
    assert!(
        shown.contains("\r\x1b[K\x1b[") || shown.contains("\r\x1b[Kerror"),
        "erased before the error: {shown:?}"
    );
    assert_eq!(code, Some(1));
    slow.join().unwrap();
}

#[test]
fn no_agent_is_exit_code_3() {
    let directory = tempfile::tempdir().unwrap();
    let at =
        ["--socket", directory.path().to_str().unwrap(), "--pin-root", directory.path().to_str().unwrap()];
    let missing = directory.path().join("agent.sock");
    let at = [at[0], missing.to_str().unwrap(), at[2], at[3]];
    for arguments in [&["status"][..], &["status", "--ready"], &["ports", "list"], &["confirm"]] {
        let output = run(&[arguments, &at].concat());
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {}", text(&output.stderr));
    }
    let output = run(&[&["status", "--json"][..], &at].concat());
    assert_eq!(json(&output)["running"], false);
}

#[test]
fn results_come_as_yaml() {
    let output = run(&["check", "deploy/examples/node.yaml", "-o", "yaml"]);
    let yaml = text(&output.stdout);
    assert!(yaml.starts_with("---\n") && yaml.contains("\nok: true\n"), "{}", text(&output.stdout));
    assert!(refused(&["check", "-o", "yml"]).contains("json, yaml or wide"));
}
