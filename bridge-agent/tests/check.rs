//! `bridge-agent check` as a user runs it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/node.yaml");

const WRONG: &str = "role: node
networks:
  pods: [10.200.1.0/24]
  external: [192.168.31.0/24]
rules:
  - name: api
    direction: inbound
    protocol: tcp
    ports: [\"60100-60001\"]
    port: 80
";

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bridge-agent"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str], input: &str) -> Output {
    let mut child = agent(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent starts");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

#[test]
fn what_it_prints_is_the_same_configuration_with_every_default() {
    let printed = run(&["check", "--config", EXAMPLE], "");
    assert_eq!(printed.status.code(), Some(0), "{}", stderr(&printed));
    assert_eq!(stderr(&printed), "");
    assert!(stdout(&printed).contains("4 rules, 3 allow and 1 deny"), "{}", stdout(&printed));
    // The example leaves both sides of this rule out.
    let rule =
        "- name: ping\n  direction: outbound\n  external: [192.168.31.0/24]\n  pods: [10.200.1.0/24]\n";
    assert!(stdout(&printed).contains(rule), "{}", stdout(&printed));

    let again = run(&["check", "--config", "-"], stdout(&printed));
    let body = |output| stdout(output).split_once('\n').unwrap().1.to_owned();
    assert_eq!(body(&again), body(&printed));
}

#[test]
fn mistakes_are_shown_with_line_and_remedy_and_exit_code_1() {
    let output = run(&["check", "--config", "-"], WRONG);
    assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""));
    let shown = stderr(&output);
    for expected in ["--> <stdin>:9:13", "write \"60001-60100\"", "--> <stdin>:10:5", "did you mean `ports`?"]
    {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
}

#[test]
fn warnings_do_not_fail() {
    let text = "role: host\nnetworks: {pods: [10.200.1.0/24]}\nportPool: {ports: 1000-1100}\n";
    let output = run(&["check", "--config", "-"], text);
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("warning: 1000-1100 has ports below 1024"), "{}", stderr(&output));
    let output = run(&["check", "--config", "-", "--json"], text);
    assert_eq!(json(&output)["diagnostics"][0]["severity"], "warning");
    assert_eq!(json(&output)["ok"], true);
}

#[test]
fn json_for_machines() {
    let output = run(&["--json", "check", "--config", EXAMPLE], "");
    assert_eq!(json(&output)["config"]["rules"][0]["name"], "devices-to-api");

    let output = run(&["--json", "check", "--config", "-"], WRONG);
    assert_eq!((output.status.code(), stderr(&output)), (Some(1), ""));
    let first = &json(&output)["diagnostics"][0];
    assert_eq!((&first["line"], &first["column"]), (&Value::from(9), &Value::from(13)));
    assert_eq!(first["text"], "\"60100-60001\"");
    assert_eq!(first["path"], "rules[0].ports[0]");
    assert_eq!(first["help"], "write \"60001-60100\"");
}

#[test]
fn a_missing_file_says_what_to_do() {
    let output = run(&["check", "--config", "/nonexistent/bridge.yaml"], "");
    assert_eq!(output.status.code(), Some(1));
    let shown = stderr(&output);
    assert!(shown.contains("/nonexistent/bridge.yaml") && shown.contains("--config FILE"), "{shown}");
}

#[test]
fn the_schema_needs_no_configuration() {
    let output = run(&["check", "--schema", "--config", "/nonexistent"], "");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(json(&output)["properties"]["role"]["$ref"], "#/$defs/Role");
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in
        [&["chekc"][..], &["check", "--jsn"], &["--log-level", "bridge_agent=loud", "check"], &[]]
    {
        let output = run(arguments, "");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(!stderr(&output).is_empty());
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = agent(&["check", "--schema"]).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

const MANIFESTS: &str = "apiVersion: v1
kind: Namespace
metadata: {name: bridge-system}
---
apiVersion: bridge.lan/v1alpha1
kind: BridgePolicy
metadata: {name: devices}
spec:
  rules:
  - name: to-api
    direction: inbound
    podSelector: {matchLabels: {app: api}}
    protocol: tcp
    ports: [40002]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: bridge-agent}
data:
  bridge.yaml: |
    role: node
    networks: {external: [192.168.31.0/24]}
    kubernetes: {}
";

#[test]
fn policies_in_the_output_of_kustomize_are_checked() {
    let output = run(&["check", "-"], MANIFESTS);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let expected = "<stdin> is valid:\n  BridgePolicy devices: 1 rules\n  bridge.yaml in ConfigMap bridge-agent\n  \
                    1 objects of other kinds, not checked\n";
    assert_eq!(stdout(&output), expected);
    let said = json(&run(&["check", "--json", "-"], MANIFESTS));
    assert_eq!(said["policies"], serde_json::json!([{ "name": "devices", "rules": 1 }]), "{said}");

    // As JSON, and as a list.
    let list = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{\"apiVersion\": \"bridge.lan/v1alpha1\", \"kind\": \"BridgePolicy\",
        \"metadata\": {\"name\": \"p\"}, \"spec\": {\"rules\": [{\"name\": \"r\", \"direction\": \"inbound\", \"protocol\": \"icmp\"}]}}]}";
    let output = run(&["check", "-"], list);
    assert!(stdout(&output).contains("BridgePolicy p: 1 rules"), "{}", stderr(&output));
}

#[test]
fn mistakes_in_manifests_are_shown_with_their_lines() {
    for (from, to, place, message) in [
        ("ports: [40002]", "port: [40002]", "<stdin>:14:5", "did you mean `ports`?"),
        ("ports: [40002]", "ports:", "<stdin>:14:10", "`ports` has no value"),
        ("    ports: [40002]\n", "", "<stdin>:10:5", "has no `ports`"),
        ("ports: [40002]", "ports: ['010']", "<stdin>:14:13", "leading zero"),
        ("matchLabels: {app: api}", "matchLabel: {app: api}", "<stdin>:12:19", "did you mean `matchLabels`?"),
        ("spec:\n", "mode: audit\nspec:\n", "<stdin>:8:1", "unknown key `mode`"),
        (
            "external: [192.168.31.0/24]",
            "external: [192.168.31.1]",
            "ConfigMap bridge-agent, bridge.yaml:2:23",
            "prefix",
        ),
    ] {
        let text = MANIFESTS.replace(from, to);
        assert_ne!(text, MANIFESTS, "{from}");
        let output = run(&["check", "-"], &text);
        assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""), "{to}");
        for expected in [place, message] {
            assert!(stderr(&output).contains(expected), "{to}: {expected}: {}", stderr(&output));
        }
    }
    let none = run(&["check", "-"], "apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n");
    assert_eq!(none.status.code(), Some(1));
    assert!(stderr(&none).contains("none of these 1 objects is a BridgePolicy"), "{}", stderr(&none));
}
