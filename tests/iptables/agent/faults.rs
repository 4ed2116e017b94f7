//! The agent is killed at every step of a start, a reload, a teardown, a trial; disks are full; two agents are started.
//! Afterwards the next agent restores the desired state, and `down` leaves nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::iptables::Backend;
use bridge_lab::agent::Agent;
use bridge_lab::wait::eventually;

use super::node::{DEADLINE, MORE, Node, RULES, json};

/// A node where rules are saved for the boot, and the state that a healthy agent makes.
struct Healthy {
    node: Node,
    config: String,
    /// Rules in the kernel without an agent, and with one.
    bare: String,
    enforced: String,
    /// The pins.
    pins: Vec<PathBuf>,
}

/// Every file below a directory, by its path from there.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut left) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() { left.push(path) } else { found.push(path.strip_prefix(directory)?.to_owned()) }
        }
    }
    found.sort();
    Ok(found)
}

impl Healthy {
    fn new() -> Result<(Self, Agent)> {
        let node = Node::new(Backend::Nft)?;
        for name in ["rules.v4", "rules.v6"] {
            let path = node.etc().join("iptables").join(name);
            fs::create_dir_all(path.parent().context("a directory")?)?;
            fs::write(path, "# of the operator\n")?;
        }
        node.add_foreign_rules()?;
        let bare = node.dump()?;
        let config = node.config("ebpf, iptables", "", RULES);
        let agent = node.start(&config)?;
        node.holds()?;
        let (enforced, pins) = (node.dump()?, files(agent.pins())?);
        Ok((Self { node, config, bare, enforced, pins }, agent))
    }

    /// The agent as it is killed at `place`.
    fn faulty(&self, place: &str) -> Result<PathBuf> {
        let path = self.node.lab.directory().join("faulty");
        let script = format!(
            "#!/bin/sh\nexport BRIDGE_FAULT={place}\nexec {} \"$@\"\n",
            self.node.lab.directory().join("bridge-agent").display()
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// The desired state is there, in both engines and on disk, and nothing else.
    fn is_healthy(&self, agent: &Agent, place: &str) -> Result<()> {
        self.node.holds().with_context(|| place.to_owned())?;
        assert_eq!(
            self.node.dump()?.replace(":table-was-absent", ""),
            self.enforced.replace(":table-was-absent", ""),
            "{place}"
        );
        assert_eq!(files(agent.pins())?, self.pins, "{place}");
        ensure!(self.saved()?.contains("devices"), "{place}: not saved");
        self.leaves_nothing_stale(agent, place)
    }

    fn saved(&self) -> Result<String> {
        Ok(fs::read_to_string(self.node.etc().join("iptables/rules.v4"))?)
    }

    fn leaves_nothing_stale(&self, agent: &Agent, place: &str) -> Result<()> {
        let directory = agent.config().parent().context("a directory")?;
        let names = [files(&self.node.etc().join("iptables"))?, files(directory)?].concat();
        let stale = names.iter().find(|name| {
            let name = name.to_string_lossy();
            ["trial", "candidate", "bridge-new"].iter().any(|trace| name.contains(trace))
        });
        ensure!(stale.is_none(), "{place}: {stale:?} is left");
        Ok(())
    }

    fn is_bare(&self, agent: &Agent, place: &str) -> Result<()> {
        self.node.is_open().with_context(|| place.to_owned())?;
        assert_eq!(self.node.dump()?, self.bare, "{place}");
        ensure!(!agent.pins().exists() || files(agent.pins())?.is_empty(), "{place}: pins are left");
        assert_eq!(self.saved()?, "# of the operator\n", "{place}");
        self.leaves_nothing_stale(agent, place)
    }
}

#[test]
fn killed_at_any_step_of_a_start_the_next_start_is_as_the_first() -> Result<()> {
    let (healthy, mut agent) = Healthy::new()?;
    for place in [
        "load:directories",
        "load:maps",
        "load:programs",
        "publish:filled",
        "publish:outer",
        "publish:installed",
        "publish:switched",
        "publish:outer@2",
        "publish:switched@2",
        "start:lenient",
        "start:enforcing",
        "attach:step",
        "attach:step@3",
        "iptables:restore",
        "iptables:restore@2",
        "save:written",
    ] {
        agent.stop()?;
        agent.run(&["down"])?;
        healthy.is_bare(&agent, place)?;
        let program = agent.replace_program(healthy.faulty(place)?);
        let error =
            format!("{:#}", agent.restart().err().with_context(|| format!("{place} was not reached"))?);
        ensure!(error.contains("signal: 9"), "{place}: {error}");
        agent.replace_program(program);
        agent.restart().with_context(|| place.to_owned())?;
        healthy.is_healthy(&agent, place)?;
    }
    Ok(())
}

#[test]
fn killed_at_any_step_of_a_reload_the_next_start_finishes_it() -> Result<()> {
    let (healthy, mut agent) = Healthy::new()?;
    let more = healthy.node.config("ebpf, iptables", "", &format!("{RULES}{MORE}"));
    for place in [
        "reload:iptables",
        "publish:filled",
        "publish:outer",
        "publish:installed",
        "publish:switched",
        "save:written",
    ] {
        let program = agent.replace_program(healthy.faulty(place)?);
        agent.restart().with_context(|| format!("{place}: not before the reload"))?;
        let error =
            format!("{:#}", agent.reload(&more).err().with_context(|| format!("{place} was not reached"))?);
        ensure!(error.contains("signal: 9"), "{place}: {error}");
        agent.replace_program(program);
        agent.restart()?;
        healthy.node.is_open().with_context(|| place.to_owned())?;
        ensure!(healthy.saved()?.contains("more"), "{place}: not saved");
        healthy.leaves_nothing_stale(&agent, place)?;
        agent.reload(&healthy.config)?;
        healthy.is_healthy(&agent, place)?;
    }
    Ok(())
}

#[test]
fn killed_at_any_step_of_down_the_next_down_finishes_it() -> Result<()> {
    let (healthy, mut agent) = Healthy::new()?;
    for place in [
        "down:detach",
        "down:detach@2",
        "down:maps",
        "iptables:teardown",
        "iptables:teardown@3",
        "save:written",
    ] {
        agent.stop()?;
        let program = agent.replace_program(healthy.faulty(place)?);
        let error =
            format!("{:#}", agent.run(&["down"]).err().with_context(|| format!("{place} was not reached"))?);
        ensure!(error.contains("signal: 9"), "{place}: {error}");
        agent.replace_program(program);
        agent.run(&["down"])?;
        healthy.is_bare(&agent, place)?;
        agent.restart()?;
        healthy.is_healthy(&agent, place)?;
    }
    Ok(())
}

#[test]
fn killed_at_any_step_of_a_trial_one_configuration_counts() -> Result<()> {
    let (healthy, mut agent) = Healthy::new()?;
    let candidate = healthy.node.lab.directory().join("try.yaml");
    let api = format!("api: {{socket: {}}}\n", agent.socket().display());
    let text = healthy.node.config("ebpf, iptables", "", &format!("{RULES}{MORE}")) + &api;
    fs::write(&candidate, text)?;
    let candidate = candidate.to_string_lossy().into_owned();
    for (place, counts) in [
        ("trial:staged", false),
        ("trial:in-force", false),
        ("trial:confirmed", false),
        ("trial:committed", true),
    ] {
        let program = agent.replace_program(healthy.faulty(place)?);
        agent.restart()?;
        agent.replace_program(program);
        let ended =
            agent.run(&["apply", &candidate, "--confirm", "600s"]).and_then(|_| agent.run(&["confirm"]));
        ensure!(ended.is_err(), "{place} was not reached");
        agent.restart()?;
        if counts {
            healthy.node.is_open().with_context(|| place.to_owned())?;
            agent.reload(&healthy.config)?;
        }
        healthy.is_healthy(&agent, place)?;
        ensure!(json(&agent, &["status"])?["agent"]["trial"].is_null(), "{place}");
    }
    Ok(())
}

/// Unmounts when it is dropped.
struct Disk(PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

#[test]
fn a_disk_that_is_full_or_read_only_keeps_what_was_saved_and_the_rules_are_in_force() -> Result<()> {
    let (healthy, mut agent) = Healthy::new()?;
    // The directory is on a disk of its own.
    let place = healthy.node.lab.directory().join("disk");
    let saved = healthy.node.etc().join("iptables");
    fs::create_dir(&place)?;
    let mount = |options: &str| {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&place).status()?;
        ensure!(status.success(), "mount: {status}");
        anyhow::Ok(())
    };
    mount("size=32k")?;
    let disk = Disk(place.clone());
    for name in files(&saved)? {
        fs::copy(saved.join(&name), place.join(&name))?;
    }
    fs::remove_dir_all(&saved)?;
    std::os::unix::fs::symlink(&place, &saved)?;
    // It reads the mounts when it starts.
    agent.restart()?;
    let before = healthy.saved()?;
    ensure!(before.contains("devices"));
    let more = healthy.node.config("ebpf, iptables", "", &format!("{RULES}{MORE}"));

    let error = fs::write(place.join("filler"), vec![0; 64 << 10]).err().context("it is not full")?;
    ensure!(error.kind() == std::io::ErrorKind::StorageFull, "{error}");
    for fault in ["full", "read-only"] {
        agent.reload(&more)?;
        healthy.node.is_open().with_context(|| fault.to_owned())?;
        assert_eq!(healthy.saved()?, before, "{fault}");
        let reported = |log: &str| {
            log.lines().filter(|line| line.contains("ERROR") && line.contains("rules.v4")).count()
        };
        ensure!(reported(&agent.log()) > 0, "{fault}: not a word:\n{}", agent.log());
        healthy.leaves_nothing_stale(&agent, fault)?;
        agent.reload(&healthy.config)?;
        healthy.node.holds()?;
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&place).status()?;
        ensure!(status.success(), "remount: {status}");
    }
    let status = Command::new("mount").args(["-o", "remount,rw"]).arg(&place).status()?;
    ensure!(status.success(), "remount: {status}");
    agent.reload(&more)?;
    assert_eq!(healthy.saved()?, before, "there is room already");
    fs::remove_file(place.join("filler"))?;
    // Without another change.
    let saved = || healthy.saved().ok().filter(|saved| saved.contains("more"));
    eventually(DEADLINE, saved).context("not saved when there was room again")?;
    drop(agent);
    drop(disk);
    Ok(())
}

#[test]
fn a_second_agent_is_refused_names_the_first_and_touches_nothing() -> Result<()> {
    let (healthy, agent) = Healthy::new()?;
    let other = healthy.node.lab.directory().join("other.yaml");
    let socket = healthy.node.lab.directory().join("other.sock");
    let first = agent.pid().to_string();
    for (engines, socket, complaint) in [
        ("ebpf, iptables", socket.as_path(), "keeps the rules of the packet filter"),
        ("ebpf", socket.as_path(), "already works on"),
        ("ebpf", agent.socket(), "already answers on"),
    ] {
        let config = healthy.node.config(engines, "", &format!("{RULES}{MORE}"));
        fs::write(&other, format!("{config}api: {{socket: {}}}\n", socket.display()))?;
        let mut second = Command::new(agent.command(&[]).get_program());
        second.args(["run", "--config"]).arg(&other).arg("--pin-root").arg(agent.pins());
        let error =
            format!("{:#}", healthy.node.lab.b().netns.output(second).err().context("it was not refused")?);
        ensure!(error.contains(complaint) && error.contains(&first), "{error}");
        healthy.is_healthy(&agent, complaint)?;
    }
    assert_eq!(json(&agent, &["status"])?["agent"]["firewall"]["repairs"], 0);
    Ok(())
}
