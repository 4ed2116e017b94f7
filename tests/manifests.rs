//! `deploy/kubernetes` as an operator applies it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes")
}

/// The objects of a file.
fn objects(name: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(folder().join(name)).with_context(|| name.to_owned())?;
    serde_saphyr::from_multiple(&text).with_context(|| name.to_owned())
}

fn texts(list: &Value) -> BTreeSet<String> {
    list.as_array().into_iter().flatten().filter_map(|text| Some(text.as_str()?.to_owned())).collect()
}

#[test]
fn every_manifest_is_in_the_kustomization_and_in_the_namespace() -> Result<()> {
    let kustomization = objects("kustomization.yaml")?.remove(0);
    let listed = texts(&kustomization["resources"]);
    let names = |below: &str| -> Result<Vec<String>> {
        let entries = fs::read_dir(folder().join(below))?;
        entries.map(|entry| Ok(format!("{below}{}", entry?.file_name().to_string_lossy()))).collect()
    };
    let mut there: BTreeSet<String> = names("")?.into_iter().chain(names("crds/")?).collect();
    for other in
        ["kustomization.yaml", "agent.yaml", "crds", "components", "examples", "lan-host-kubeconfig.sh"]
    {
        there.remove(other);
    }
    ensure!(listed == there, "{listed:?} {there:?}");
    for name in &listed {
        for object in objects(name)? {
            let kind = object["kind"].as_str().context("kind")?;
            let cluster_wide = kind.starts_with("C") && kind != "ConfigMap"
                || kind == "Namespace"
                || kind.starts_with("ValidatingAdmissionPolicy");
            let namespace = object["metadata"]["namespace"].as_str();
            ensure!((namespace == Some("bridge-system")) != cluster_wide, "{name}: {kind} in {namespace:?}");
        }
    }
    Ok(())
}

#[test]
fn the_configuration_of_the_config_map_is_valid_as_it_is_and_with_all_it_suggests() -> Result<()> {
    let text = fs::read_to_string(folder().join("agent.yaml"))?;
    // What is commented out is YAML, too.
    let suggestion = |line: &str| {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let is_yaml =
            bare.starts_with("nodePorts:") || bare.starts_with("portPool:") || bare.starts_with("  ports:");
        if is_yaml { format!("{bare}\n") } else { format!("{line}\n") }
    };
    let all: String = text.lines().map(suggestion).collect();
    ensure!(all.contains("\nportPool:\n  ports:") && all.contains("\nnodePorts:"), "{all}");
    let directory = tempfile::tempdir()?;
    for text in [text, all] {
        let path = directory.path().join("bridge.yaml");
        fs::write(&path, &text)?;
        let output =
            Command::new(agent::program()?).args(["check", "--json", "--config"]).arg(&path).output()?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(
            output.status.success() && said["diagnostics"].as_array().is_some_and(Vec::is_empty),
            "{said:#}"
        );
    }
    Ok(())
}

#[test]
fn the_daemon_set_runs_everywhere_and_before_everything_else() -> Result<()> {
    let daemonset = objects("daemonset.yaml")?.remove(0);
    let pod = &daemonset["spec"]["template"]["spec"];
    ensure!(pod["tolerations"] == serde_json::json!([{ "operator": "Exists" }]), "every taint");
    ensure!(pod["priorityClassName"] == "system-node-critical" && pod["hostNetwork"] == true);
    let container = &pod["containers"][0];
    ensure!(container["startupProbe"]["exec"] == container["readinessProbe"]["exec"]);
    ensure!(container["resources"]["requests"]["memory"].is_string());
    // kubectl warns about the annotation since Kubernetes 1.30.
    ensure!(container["securityContext"]["appArmorProfile"] == serde_json::json!({ "type": "Unconfined" }));
    let annotations = daemonset["spec"]["template"]["metadata"]["annotations"].to_string();
    ensure!(!annotations.contains("apparmor"), "{annotations}");
    ensure!(container["securityContext"]["capabilities"]["drop"] == serde_json::json!(["ALL"]));
    let mounted: BTreeSet<_> = container["volumeMounts"]
        .as_array()
        .context("mounts")?
        .iter()
        .map(|m| m["name"].to_string())
        .collect();
    let volumes: BTreeSet<_> =
        pod["volumes"].as_array().context("volumes")?.iter().map(|v| v["name"].to_string()).collect();
    ensure!(mounted == volumes, "{mounted:?} {volumes:?}");
    let doctor = &pod["initContainers"][0];
    ensure!(doctor["args"] == serde_json::json!(["doctor", "--only", "node", "--report"]), "{doctor}");
    ensure!(
        doctor["image"] == container["image"] && pod["initContainers"].as_array().map(Vec::len) == Some(1)
    );
    ensure!(
        doctor["securityContext"] == container["securityContext"],
        "it examines the privileges of the agent"
    );
    Ok(())
}
