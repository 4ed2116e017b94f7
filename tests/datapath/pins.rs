//! Another program removes the pins of a running agent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::{eventually, patience};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::agent::{ALLOWED, CONFIG, DENIED, json, reaches, servers};

const SECOND: Duration = Duration::from_secs(1);
/// The agent looks twice in a second.
const SOON: Duration = Duration::from_secs(5);

/// Every pin and directory below, by path.
fn tree(root: &Path, into: &mut BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    for path in fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()) {
        tree(&path, into);
        into.insert(path);
    }
    into.clone()
}

fn pins(agent: &Agent) -> BTreeSet<PathBuf> {
    tree(agent.pins(), &mut BTreeSet::new())
}

/// Waits until the pins are these again, and the agent has nothing to say about them any more.
fn until_back(agent: &Agent, before: &BTreeSet<PathBuf>) -> Result<()> {
    eventually(patience(SOON), || (pins(agent) == *before).then_some(())).with_context(|| {
        format!("missing: {:?}\n{}", before.difference(&pins(agent)).collect::<Vec<_>>(), agent.log())
    })?;
    eventually(patience(SOON), || remarks(agent).ok().filter(|text| !text.contains("pins")))
        .map(drop)
        .context("remarks")
}

fn remarks(agent: &Agent) -> Result<String> {
    Ok(json(agent, &["status"])?["agent"]["enforcement"]["remarks"].to_string())
}

/// Allowed traffic continues, and denied traffic is denied.
fn enforced(lab: &Lab, connection: &mut tcp::Connection, when: &str) -> Result<()> {
    connection.round_trip(SECOND * 5).with_context(|| format!("{when}: the connection"))?;
    ensure!(reaches(lab, ALLOWED)?, "{when}: the allowed port is closed");
    ensure!(!reaches(lab, DENIED)?, "{when}: the denied port is open");
    Ok(())
}

/// As [`enforced`], and nothing that is denied passes for as long as it may take until the kernel has cleaned up behind a link.
fn stays_enforced(lab: &Lab, connection: &mut tcp::Connection, when: &str) -> Result<()> {
    let open = eventually(SECOND, || reaches(lab, DENIED).is_ok_and(|open| open).then_some(()));
    ensure!(open.is_none(), "{when}: the denied port is open");
    enforced(lab, connection, when)
}

/// Nothing is lost by pins that were there once more, when the agent dies and is started again.
fn outlives_the_agent(lab: &Lab, agent: &mut Agent, connection: &mut tcp::Connection) -> Result<()> {
    agent.kill()?;
    stays_enforced(lab, connection, "without the agent")?;
    agent.restart()?;
    let status = json(agent, &["status"])?;
    assert_eq!(status["agent"]["enforcement"]["adopted"], true, "{status}");
    enforced(lab, connection, "with the next agent")
}

#[test]
fn pins_that_somebody_removes_come_back_and_nothing_is_let_through_meanwhile() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let to = lab.c1().at(Family::V4, ALLOWED);
    let mut connection = tcp::Client::new(&lab.a().netns).connect(to)?.reached()?;
    enforced(&lab, &mut connection, "before")?;
    let all = pins(&agent);
    let links: Vec<&PathBuf> =
        all.iter().filter(|path| path.parent().is_some_and(|at| at.ends_with("links"))).collect();
    ensure!(!links.is_empty(), "{all:?}");

    for link in links {
        fs::remove_file(link)?;
    }
    stays_enforced(&lab, &mut connection, "without links")?;
    until_back(&agent, &all)?;

    fs::remove_dir_all(agent.pins())?;
    stays_enforced(&lab, &mut connection, "without pins")?;
    until_back(&agent, &all)?;
    let enforcement = &json(&agent, &["status"])?["agent"]["enforcement"];
    ensure!(enforcement["pinsRestored"].as_u64() > Some(20), "{enforcement}");
    let error = agent.run(&["run"]).unwrap_err().to_string();
    ensure!(error.contains(&format!("pid {}", agent.pid())), "a second agent: {error}");

    // A change made while they are missing is pinned as well.
    fs::remove_dir_all(agent.pins())?;
    let more = "  - {name: more, direction: inbound, protocol: tcp, ports: [40009]}\n";
    agent.reload(&format!("{CONFIG}{more}"))?;
    let reloads = &json(&agent, &["status"])?["agent"]["reloads"];
    ensure!(reloads["failed"] == 0, "{reloads}");
    outlives_the_agent(&lab, &mut agent, &mut connection)?;
    let rules = json(&agent, &["rules"])?.to_string();
    ensure!(rules.contains("more"), "{rules}");
    agent.stop()?;
    agent.run(&["down"])?;
    assert_eq!(pins(&agent), BTreeSet::new());
    ensure!(reaches(&lab, DENIED)?, "something is still attached");
    Ok(())
}

/// A file system that is there until it is dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(kind: &str, at: &'a Path) -> Result<Self> {
        mount(kind, at, kind, MountFlags::empty(), None).with_context(|| format!("mount {kind}"))?;
        Ok(Self(at))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_bpf_file_system_that_is_unmounted_takes_nothing_away_while_the_agent_lives() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let place = lab.pin_directory()?;
    fs::create_dir_all(&place)?;
    let _below = Mounted::new("tmpfs", &place)?;
    let mounted = Mounted::new("bpf", &place)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    ensure!(agent.pins().starts_with(&place));
    let to = lab.c1().at(Family::V4, ALLOWED);
    let mut connection = tcp::Client::new(&lab.a().netns).connect(to)?.reached()?;
    let all = pins(&agent);

    drop(mounted);
    let said =
        eventually(patience(SOON), || remarks(&agent).ok().filter(|text| text.contains("mount -t bpf")));
    said.with_context(|| format!("it says nothing of it: {:?}", remarks(&agent)))?;
    stays_enforced(&lab, &mut connection, "unmounted")?;
    // An interface that comes meanwhile is judged on, too.
    let b = &lab.b().netns;
    b.ip("link add calilate type veth peer name late")?;
    b.ip("link set calilate up")?;
    let attached = || {
        let status = json(&agent, &["status"]).ok()?;
        status["agent"]["enforcement"]["interfaces"].to_string().contains("calilate").then_some(())
    };
    eventually(patience(SOON), attached).context("the interface that came late")?;
    b.ip("link del calilate")?;
    agent.reload(&CONFIG.replace("40002", "40003"))?;
    let reloads = &json(&agent, &["status"])?["agent"]["reloads"]["last"];
    ensure!(reloads["error"].as_str().is_some_and(|error| error.contains("mount -t bpf")), "{reloads}");
    enforced(&lab, &mut connection, "after a reload that was refused")?;

    let _mounted = Mounted::new("bpf", &place)?;
    until_back(&agent, &all)?;
    agent.reload(CONFIG)?;
    outlives_the_agent(&lab, &mut agent, &mut connection)?;
    agent.stop()?;
    agent.run(&["down"])?;
    Ok(())
}
