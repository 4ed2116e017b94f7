//! `bridge-agent explain` and `check --expect` on configuration files: no privilege, no node.

use std::{
    path::Path,
    process::{Command, Output},
};

const NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/node.yaml");
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/cases.yaml");

fn agent(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bridge-agent"));
    // No agent answers there.
    command.args(["--socket", "/nonexistent/agent.sock"]).args(arguments).output().expect("it starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns standard error of a run that must fail with one line.
fn complaint(arguments: &[&str]) -> String {
    let output = agent(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stdout(&output));
    let text = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn a_denied_connection_is_explained_with_the_rule_that_would_allow_it() {
    let output = agent(&["explain", "--config", NODE, "192.168.31.67", "10.200.1.91:8080"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = stdout(&output);
    for part in [
        "tcp 192.168.31.67 -> 10.200.1.91:8080",
        "192.168.31.67 is a LAN host",
        "10.200.1.91 is a pod",
        "external_ingress",
        "no rule matches",
        "DENIED (no_rule",
        "devices-to-api: all but ports, which is 40002, 60001-60100; asked for 8080",
        "name: inbound-tcp-8080",
        "kind: BridgePolicy",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    let output = agent(&["explain", "--json", "--config", NODE, "192.168.31.67", "10.200.1.91:40002"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&value["verdict"], &value["rule"]), (&"allow".into(), &"devices-to-api".into()));
    assert_eq!(value["remedy"], serde_json::Value::Null);
}

#[test]
fn the_example_of_cases_is_as_expected() {
    let output = agent(&["check", "--config", NODE, "--expect", CASES]);
    assert!(output.status.success(), "{}", stdout(&output));
    assert!(stdout(&output).contains("10 cases are as expected"), "{}", stdout(&output));
}

#[test]
fn cases_that_differ_are_a_table_and_exit_code_1() {
    let directory = tempfile::tempdir().expect("a directory");
    let changed =
        std::fs::read_to_string(NODE).expect("the example").replace("ports: [40002,", "ports: [40003,");
    let file = directory.path().join("bridge.yaml");
    std::fs::write(&file, changed).expect("written");
    let file = file.to_str().expect("UTF-8");
    let output = agent(&["check", file, "--expect", CASES]);
    assert_eq!(output.status.code(), Some(1));
    let table = stdout(&output);
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(rows.len(), 3, "{table}");
    assert!(rows[0].starts_with("CASE"), "{table}");
    for part in
        ["the device reaches the API", "allow by devices-to-api", "deny", "no_rule; nearly devices-to-api"]
    {
        assert!(rows[1].contains(part), "{part} is missing in {table}");
    }
    let output = agent(&["check", file, "--expect", CASES, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON value");
    assert_eq!((&value["ok"], &value["cases"]), (&false.into(), &10.into()));
    assert_eq!(value["differences"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_wrong_rule_differs_although_the_verdict_is_right() {
    let text =
        "version: 1\ncases:\n- {from: 192.168.31.67, to: '10.200.1.91:40002', expect: allow, rule: ping}\n";
    let output = with_cases(text, |path| agent(&["check", NODE, "--expect", path]));
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("allow by ping"), "{}", stdout(&output));
    assert!(stdout(&output).contains("allow by devices-to-api"), "{}", stdout(&output));
}

fn with_cases<T>(text: &str, with: impl FnOnce(&str) -> T) -> T {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cases.yaml");
    std::fs::write(&path, text).expect("written");
    with(Path::new(&path).to_str().expect("UTF-8"))
}

#[test]
fn bad_input_is_one_line_with_a_remedy() {
    for (from, to, part) in [
        ("192.168.31.67", "10.200.1.91:0", "from 1 to 65535"),
        ("192.168.31.67", "10.200.1.91", "10.200.1.91:PORT"),
        ("192.168.31.67", "pod/default/api:80", "write the address"),
        ("service/default/api", "10.200.1.91:80", "--backend"),
        ("nowhere", "10.200.1.91:80", "write an IPv4 or IPv6 address"),
    ] {
        let text = complaint(&["explain", "--config", NODE, from, to]);
        assert!(text.contains(part), "{text}");
    }
    for (cases, part) in [
        ("version: 2\nprobes: []\n", "write `version: 1`"),
        ("version: 1\ncases: []\n", "write a case"),
        ("version: 1\ncases: [{from: a, to: b, expect: maybe}]\n", "docs/operations.md"),
        ("version: 1\ncases: [{name: n, from: 1.2.3.4, to: '1.2.3.5:0', expect: deny}]\n", "case 1 (n)"),
    ] {
        let text = with_cases(cases, |path| complaint(&["check", NODE, "--expect", path]));
        assert!(text.contains(part), "{text}");
    }
}

/// Runs a command that must fail with one line, or with the usage that clap adds to it, and returns the first line.
fn refused(arguments: &[&str], code: i32) -> String {
    let output = agent(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stdout(&output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines = text.lines().take_while(|line| !line.is_empty()).count();
    assert_eq!(lines, 1, "{arguments:?}: {text}");
    text.lines().next().unwrap_or_default().to_owned()
}

/// Wrong ports, processes, names and files are one line with the remedy, in every command that takes them.
#[test]
fn bad_input_of_each_command_is_one_line_with_the_remedy() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let key = file("key", "0123456789abcdef0123456789abcdef");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
    let cluster = file("cluster.yaml", "version: 9\nnodes: []\n");
    let host = file("host.yaml", &format!("role: host\nroutes: {{file: {cluster}}}\n"));
    let pods = "10.200.1.91:80";
    for (arguments, code, part) in [
        // A port of 0.
        (
            &["explain", "--config", NODE, "--source-port", "0", "192.168.31.67", pods][..],
            2,
            "from 1 to 65535",
        ),
        (
            &["explain", "--config", NODE, "192.168.31.67", "172.16.0.10:443", "--backend", "10.200.1.91:0"],
            1,
            "from 1 to 65535",
        ),
        (&["ports", "acquire", "192.168.31.67:0"], 2, "from 1 to 65535"),
        (&["flows", "--port", "0"], 2, "from 1 to 65535"),
        (&["monitor", "--port", "0"], 2, "from 1 to 65535"),
        (&["discover", "probe", "192.0.2.1:0", "--key-file", &key], 1, "from 1 to 65535"),
        (&["discover", "sniff", "--port", "0"], 2, "from 1 to 65535"),
        (
            &["apply", "--confirm", "60s", "--probe", "tcp://192.0.2.1:0", NODE],
            2,
            "such as tcp://192.168.31.67:22",
        ),
        (&["nodeport-range", "set", "--manifest", "/nonexistent", "0-5"], 2, "ports from 1 to 65535"),
        // Names.
        (&["explain", "--config", NODE, "pod/shop/none", "192.168.31.67:80"], 1, "write the address"),
        (&["explain", "--config", NODE, "pod/none", "192.168.31.67:80"], 1, "pod/NAMESPACE/NAME"),
        (&["explain", "--config", NODE, "10.200.1.1,10.200.1.2", "192.168.31.67:80"], 1, "write one of them"),
        (&["explain", "--config", NODE, "--pid", "4194304", "192.168.31.67:80"], 1, "pgrep"),
        (&["explain", "--config", NODE, "--pid", "0", "192.168.31.67:80"], 2, "1 or more"),
        (
            &["explain", "--config", NODE, "--cgroup", "pods", "10.200.1.1", "192.168.31.67:80"],
            2,
            "/kubepods.slice",
        ),
        // Lines of monitor, and times.
        (&["explain", "--config", NODE, "no event"], 1, "a line of `bridge-agent monitor --json`"),
        (
            &["explain", "--config", NODE, r#"{"verdict": "drop"}"#],
            1,
            "a line of `bridge-agent monitor --json`",
        ),
        (&["suggest", "--since", "yesterday"], 2, "such as 30s"),
        // Files of another version.
        (&["--config", &host, "routes", "plan"], 1, "docs/routes.md"),
        (&["--config", &host, "routes", "export", "--format", "iproute2"], 1, "docs/routes.md"),
    ] {
        let text = refused(arguments, code);
        assert!(text.contains(part), "{arguments:?}: {text}");
    }
    let policy = file(
        "policy.yaml",
        "apiVersion: bridge.lan/v9\nkind: BridgePolicy\nmetadata: {name: x}\nspec: {rules: [{name: a, direction: inbound, \
         protocol: tcp, ports: [1]}]}\n",
    );
    let output = agent(&["check", &policy]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("bridge.lan/v9") && text.contains("write `apiVersion: bridge.lan/v1alpha1`"),
        "{text}"
    );
}

/// Without an agent, the file says whether a process gets a port of the pool.
#[test]
fn a_process_is_explained_by_the_file_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("bridge.yaml");
    let text = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\nportPool: {ports: 61001-61100, \
                transparent: {cgroups: [/kubepods]}}\nrules: [{name: pooled, direction: outbound, protocol: tcp, ports: [502], \
                sourcePorts: 61001-61100}]\n";
    std::fs::write(&file, text).expect("written");
    let file = file.to_str().expect("UTF-8");
    for (group, verdict, part) in [
        ("/kubepods/pod1", "allow", "is hooked by the control group /kubepods"),
        ("/system.slice", "deny", "start it with `bridge-agent exec`"),
    ] {
        let output = agent(&[
            "explain",
            "--config",
            file,
            "--json",
            "--cgroup",
            group,
            "10.200.1.91",
            "192.168.31.67:502",
        ]);
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let stages = value["stages"].as_array().expect("stages");
        let pool = stages.iter().find(|stage| stage["name"] == "pool").expect("a stage of the pool");
        assert_eq!(value["verdict"], verdict, "{value:#}");
        assert!(pool["why"].as_str().is_some_and(|why| why.contains(part)), "{pool}");
    }
}
