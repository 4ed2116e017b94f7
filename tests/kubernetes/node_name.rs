//! A node whose name in the cluster comes from its surroundings, and is none.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use bridge_lab::agent::{Agent, program};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use serde_json::Value;

use crate::support::{
    EVERY_POD, OPEN, cluster, node_config, on_host, policy, until, until_current, until_open,
};

/// Returns a program that runs the agent with a host name of its own, after `before`.
fn wrapped(lab: &Lab, host_name: &str, before: &str) -> Result<PathBuf> {
    let path = lab.directory().join("bridge-agent");
    let agent = program()?;
    let script = format!(
        "#!/bin/sh\n{before}\nexec unshare --uts sh -ec 'printf %s \"{host_name}\" > /proc/sys/kernel/hostname; exec {} \"$@\"' sh \"$@\"\n",
        agent.display()
    );
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Waits until the agent names the fault and the remedy, and follows nothing.
fn until_refused(agent: &Agent, origin: &str) -> Result<()> {
    let says = |cluster: &Value| {
        let reason = cluster["failing"]["connection"].as_str().unwrap_or_default();
        reason.contains(origin) && reason.contains("nodeName: NAME") && cluster["known"] == false
    };
    until(agent, says)?;
    ensure!(agent.run(&["status"])?.contains(origin), "{}", agent.run(&["status"])?);
    ensure!(agent.run(&["status", "--ready"]).is_err(), "it is ready");
    Ok(())
}

#[test]
fn a_node_without_a_valid_name_is_closed_until_it_has_one() -> Result<()> {
    let (lab, server) = cluster()?;
    let c1 = lab.c1();
    server.add_pod("shop", "c1", &serde_json::json!({}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    server.apply(&policy("all", EVERY_POD))?;
    let _host = on_host(&lab, &server)?;
    let to = c1.at(Family::V4, OPEN);
    let _echo = tcp::Server::echo(&c1.netns, to)?;
    let named = node_config(&server, "");
    let config = named.replace(", nodeName: b", "");
    ensure!(config != named, "{config}");
    let closed = || -> Result<()> {
        ensure!(!tcp::Client::new(&lab.a().netns).connect(to)?.succeeded(), "the pod is reached");
        Ok(())
    };

    // A host name that becomes one.
    let agent = Agent::start_program(wrapped(&lab, "not_b", "unset NODE_NAME")?, &lab, lab.b(), &config)?;
    until_refused(&agent, "by the host name")?;
    closed()?;
    let mut rename = Command::new("nsenter");
    rename.args([
        &format!("--uts=/proc/{}/ns/uts", agent.pid()),
        "sh",
        "-c",
        "printf b > /proc/sys/kernel/hostname",
    ]);
    ensure!(rename.status()?.success(), "the host name cannot be changed");
    until_current(&agent)?;
    until_open(lab.a(), to, &agent)?;
    drop(agent);

    // A variable cannot change; the configuration can.
    let program = wrapped(&lab, "b", "export NODE_NAME='Node B'")?;
    let mut check = Command::new(&program);
    let file = lab.directory().join("check.yaml");
    std::fs::write(&file, &config)?;
    let checked = check.arg("check").arg(&file).output()?;
    let said = String::from_utf8_lossy(&checked.stderr);
    ensure!(!checked.status.success() && said.contains("by the variable NODE_NAME"), "{said}");
    ensure!(said.contains("nodeName: NAME"), "{said}");
    let mut agent = Agent::start_program(program, &lab, lab.b(), &config)?;
    until_refused(&agent, "by the variable NODE_NAME")?;
    closed()?;
    agent.reload(&named)?;
    until_current(&agent)?;
    until_open(lab.a(), to, &agent).map(drop)
}
