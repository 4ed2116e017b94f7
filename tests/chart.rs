//! The Helm chart makes the objects of kustomize for each choice that it has: `cargo xtask dist --test`.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::kubernetes::Assets;
use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const CONFIG: &str =
    "role: node\nnetworks: {external: [192.168.77.0/24]}\nkubernetes: {}\npersistence: {save: never}\n";

/// A choice: lines of an overlay, and the values of the chart that mean the same.
struct Choice {
    overlay: &'static str,
    values: &'static [&'static str],
}

const CHOICES: [Choice; 5] = [
    Choice { overlay: "namespace: elsewhere\n", values: &["namespace=elsewhere"] },
    Choice { overlay: "namePrefix: my-\n", values: &["namePrefix=my-"] },
    Choice {
        overlay: "images: [{name: localhost/bridge-agent, newName: registry.example/bridge, newTag: v2}]\n",
        values: &["image.name=registry.example/bridge", "image.tag=v2"],
    },
    Choice {
        overlay: "components: [../../deploy/kubernetes/components/own-node]\n",
        values: &["ownNode=true"],
    },
    Choice {
        overlay: "configMapGenerator:\n  - {name: bridge-agent, namespace: bridge-system, behavior: replace, files: [bridge.yaml]}\n\
                  generatorOptions: {disableNameSuffixHash: true}\n",
        values: &["config=FILE"],
    },
];

fn helm(arguments: &[&str]) -> Result<Command> {
    let program = env::var_os("BRIDGE_HELM").map(PathBuf::from);
    let mut helm = Command::new(program.context("BRIDGE_HELM is unset: run `cargo xtask dist --test`")?);
    helm.args(arguments).current_dir(ROOT);
    Ok(helm)
}

/// Returns a command that renders the chart as for a cluster that it supports; a helm built from its module names an old one.
fn template() -> Result<Command> {
    helm(&["template", "bridge", "deploy/helm/bridge", "--include-crds", "--kube-version", "1.31.0"])
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{command:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

/// Writes 1.0 as 1: kustomize does, helm copies definitions as they are.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        Value::Number(number) => {
            let whole = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0);
            if let Some(whole) = whole.and_then(|whole| format!("{whole:.0}").parse::<i64>().ok()) {
                *value = whole.into();
            }
        }
        _ => {}
    }
}

/// Reads objects by kind and name.
fn objects(yaml: &str) -> Result<BTreeMap<(String, String), Value>> {
    let list: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    let mut objects = BTreeMap::new();
    for mut object in list.into_iter().filter(|object| !object.is_null()) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
        // kustomize does not know that these kinds have no namespace; the API server ignores it.
        if kind.starts_with("ValidatingAdmissionPolicy") {
            object["metadata"].as_object_mut().context("metadata")?.remove("namespace");
        }
        whole_numbers(&mut object);
        ensure!(objects.insert((kind.clone(), name.clone()), object).is_none(), "{kind} {name} twice");
    }
    Ok(objects)
}

/// Compares both for these choices; returns the number of objects.
fn compare(choices: &[&Choice]) -> Result<usize> {
    let target = Path::new(ROOT).join("target");
    fs::create_dir_all(&target)?;
    let overlay = tempfile::tempdir_in(&target)?;
    let lines: String = choices.iter().map(|choice| choice.overlay).collect();
    fs::write(overlay.path().join("bridge.yaml"), CONFIG)?;
    fs::write(
        overlay.path().join("kustomization.yaml"),
        format!("resources: [../../deploy/kubernetes]\n{lines}"),
    )?;
    let kubectl = Assets::find()?.kubectl;
    let kustomize = output(Command::new(kubectl).arg("kustomize").arg(overlay.path()))?;
    let mut template = template()?;
    for value in choices.iter().flat_map(|choice| choice.values) {
        if *value == "config=FILE" {
            template
                .arg("--set-file")
                .arg(format!("config={}", overlay.path().join("bridge.yaml").display()));
        } else {
            template.arg("--set").arg(value);
        }
    }
    let (kustomize, chart) = (objects(&kustomize)?, objects(&output(&mut template)?)?);
    for (key, object) in &kustomize {
        let other = chart.get(key).with_context(|| format!("the chart has no {key:?}; with {lines}"))?;
        ensure!(object == other, "{key:?}, kustomize:\n{object:#}\nthe chart:\n{other:#}");
    }
    ensure!(chart.len() == kustomize.len(), "{:?}\n{:?}", chart.keys(), kustomize.keys());
    Ok(chart.len())
}

#[test]
#[ignore = "needs helm: cargo xtask dist --test"]
fn the_chart_makes_the_objects_of_kustomize_for_each_choice_and_all_together() -> Result<()> {
    let plain = compare(&[])?;
    for choice in &CHOICES {
        let more = compare(&[choice])? - plain;
        ensure!(more == if choice.overlay.starts_with("components") { 2 } else { 0 }, "{}", choice.overlay);
    }
    compare(&CHOICES.iter().collect::<Vec<_>>())?;
    Ok(())
}

#[test]
#[ignore = "needs helm: cargo xtask dist --test"]
fn the_chart_passes_lint_and_its_schema_refuses_other_values() -> Result<()> {
    output(&mut helm(&["lint", "--strict", "deploy/helm/bridge"])?)?;
    for value in ["nameprefix=x", "image.tag=a b", "ownNode=perhaps", "namespace=Upper"] {
        let refused = output(template()?.args(["--set", value]));
        let refused = refused.err().with_context(|| format!("{value} is accepted"))?.to_string();
        ensure!(refused.contains("don't meet the specifications of the schema"), "{refused}");
    }
    Ok(())
}
