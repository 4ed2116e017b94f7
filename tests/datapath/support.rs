//! Helpers of the tests of the packet path.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use bridge_agent::datapath::{Behaviour, Datapath, Hook, Mechanism, Options, Pins, Role, Target};
use bridge_agent::policy::Tables;
use bridge_common::filter::policy::{AddressInfo, RuleInfo, RuleSet, side};
use bridge_lab::lab::{Host, Lab, Netns};
use serde_json::Value;

/// Pins of a lab's own.
pub(crate) fn pins(lab: &Lab) -> Result<Pins> {
    Ok(Pins::new(lab.pin_directory()?.join("test")))
}

pub(crate) fn options(pins: &Pins) -> Options {
    Options { pins: pins.clone(), flows: 4096, half_open: 1024, mechanism: Mechanism::Best, debug: false }
}

/// Loads in the network namespace of the node.
pub(crate) fn load(lab: &Lab, options: &Options) -> bridge_agent::datapath::Result<Datapath> {
    lab.b().netns.run(|| Datapath::load(options))
}

pub(crate) const BEHAVIOUR: Behaviour = Behaviour {
    timeouts: [1; 13],
    audit: false,
    reject: true,
    events_per_second: 10,
    answers_per_second: 10,
    report_allowed: false,
};

/// Tables with rules of these names, which match nothing.
pub(crate) fn tables<'a>(names: impl IntoIterator<Item = &'a str>) -> Tables {
    let rules: Vec<RuleInfo> = names
        .into_iter()
        .map(|text| {
            let mut name = [0; 64];
            name[..text.len()].copy_from_slice(text.as_bytes());
            RuleInfo { name, direction: 0, deny: 0, audit: 0 }
        })
        .collect();
    let network = "10.200.1.0/24".parse().expect("a network");
    Tables {
        addresses: vec![(network, AddressInfo { class: 1, side: side::POD, sets: [0, 0], origin: 0 })],
        rule_sets: vec![RuleSet::default()],
        rule_count: u32::try_from(rules.len()).expect("few rules"),
        rules,
        ..Tables::default()
    }
}

/// An interface of the node, as a target.
pub(crate) fn target(host: &Host, interface: &str, role: Role) -> Result<Target> {
    let index = index(&host.netns, interface)?;
    Ok(Target {
        index,
        name: interface.to_owned(),
        role,
        link_header: 14,
        fast_path: 0,
        upper: 0,
        tunnel: false,
    })
}

pub(crate) fn index(netns: &Netns, interface: &str) -> Result<u32> {
    let links: Value = serde_json::from_str(&netns.ip(&format!("-json link show dev {interface}"))?)?;
    links[0]["ifindex"].as_u64().and_then(|index| u32::try_from(index).ok()).context("an index")
}

/// Runs a command in the namespace that makes JSON.
pub(crate) fn json(netns: &Netns, command: &[&str]) -> Result<Value> {
    let mut run = Command::new(command[0]);
    run.args(&command[1..]);
    Ok(serde_json::from_str(&netns.output(run)?)?)
}

/// Returns the description of a pin by `bpftool`.
pub(crate) fn bpftool(arguments: &[&str], path: &Path) -> Result<Value> {
    let output = Command::new("bpftool").arg("--json").args(arguments).arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "bpftool {arguments:?} {}: {text}", path.display());
    serde_json::from_str(&text).with_context(|| text.into_owned())
}

/// Returns kind, name and program id of the programs attached to an interface, in the order in which they run.
pub(crate) fn attached(netns: &Netns, interface: &str) -> Result<Vec<(String, String, u64)>> {
    let mut found = Vec::new();
    // bpftool 7.1 does not know TCX.
    for (direction, kind) in [(TcAttachType::Ingress, "tcx/ingress"), (TcAttachType::Egress, "tcx/egress")] {
        let (_, programs) = netns.run(|| SchedClassifier::query_tcx(interface, direction))?;
        for program in programs {
            // The kernel keeps 15 bytes of the name of a program.
            let known = program.name_as_str().context("a name")?;
            let name = Hook::ALL.into_iter().find(|hook| hook.name().starts_with(known)).map(Hook::name);
            let name = name.unwrap_or(known).to_owned();
            found.push((kind.to_owned(), name, program.id().into()));
        }
    }
    let answer = json(netns, &["bpftool", "--json", "net", "show", "dev", interface])?;
    for entry in answer[0]["tc"].as_array().into_iter().flatten() {
        let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        found.push((text("kind"), text("name"), entry["id"].as_u64().unwrap_or_default()));
    }
    Ok(found)
}
