//! The events that befall the agent while the meter runs.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapInfo;
use bridge_agent::datapath::{Maps, Pins};
use serde::Serialize;
use serde_json::Value;

use super::{Meter, Reading, frames};
use crate::agent::{Agent, program};
use crate::lab::Lab;
use crate::wait::{eventually, patience};

/// Duration of the first, undisturbed measurement, which shows the losses of the lab itself.
const CALM: Duration = Duration::from_secs(1);

/// Which engines enforce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Engines {
    /// eBPF alone, with no connection tracking on the node.
    Ebpf,
    /// eBPF and iptables.
    EbpfIptables,
    /// eBPF and nftables.
    EbpfNftables,
    /// nftables alone.
    Nftables,
    /// iptables alone.
    Iptables,
}

impl Engines {
    /// Each.
    pub const ALL: [Self; 5] =
        [Self::Ebpf, Self::EbpfIptables, Self::EbpfNftables, Self::Nftables, Self::Iptables];

    /// As they are written in a configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::EbpfIptables => "ebpf, iptables",
            Self::EbpfNftables => "ebpf, nftables",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    const fn has_ebpf(self) -> bool {
        matches!(self, Self::Ebpf | Self::EbpfIptables | Self::EbpfNftables)
    }

    /// The same with the other packet filter; `None` without one.
    const fn with_other_filter(self) -> Option<Self> {
        Some(match self {
            Self::Ebpf => return None,
            Self::EbpfIptables => Self::EbpfNftables,
            Self::EbpfNftables => Self::EbpfIptables,
            Self::Nftables => Self::Iptables,
            Self::Iptables => Self::Nftables,
        })
    }
}

/// How often, how fast.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Packets of allowed flows each way in a second, and as many probes.
    pub rate: u32,
    /// How often the agent is killed and started.
    pub kills: u32,
    /// How often everything else happens.
    pub times: u32,
    /// Rules of the large policy.
    pub rules: u32,
}

/// An event, how often it was repeated, and the meter's reading.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// In words.
    #[serde(rename = "what")]
    pub event: String,
    /// See [`Engines::name`].
    pub engines: &'static str,
    /// How often.
    pub times: u32,
    /// Of all times together.
    #[serde(flatten)]
    pub reading: Reading,
}

impl Row {
    /// Both, one after the other.
    fn and(self, other: &Self) -> Self {
        Self { times: self.times + other.times, reading: self.reading.and(&other.reading), ..self }
    }

    /// Whether nothing was lost and nothing came through.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.reading.lost == 0 && self.reading.leaked == 0
    }
}

/// A configuration under which the meter's flows may be opened and its probes may not pass, with `more` rules beside, none of
/// which says anything about either.
#[must_use]
pub fn configuration(engines: Engines, more: u32) -> String {
    let mut yaml = format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24, 100.64.0.0/10]}}\n\
         enforcement:\n  engines: [{}]\n  onDeny: drop\n  iptables: {{backend: nft}}\n  \
         interfaces: {{external: [eth0], internal: [\"cali*\"]}}\n\
         persistence: {{save: never}}\n{}",
        engines.name(),
        frames::RULES
    );
    for rule in 0..more {
        let (address, port) = (std::net::Ipv4Addr::from(0x6440_0000 + rule), 1024 + rule * 7919 % 60_000);
        // Writing to a string does not fail.
        let _ = writeln!(
            yaml,
            "  - {{name: device-{rule}, direction: inbound, external: [{address}/32], protocol: tcp, ports: [{port}]}}"
        );
    }
    yaml
}

/// A node with the agent on it, and the meter.
#[derive(Debug)]
struct Bench {
    engines: Engines,
    effort: Effort,
    // Before the lab: it works in it.
    meter: Meter,
    agent: Agent,
    lab: Lab,
}

impl Bench {
    fn new(engines: Engines, effort: Effort) -> Result<Self> {
        let lab = Lab::builder().pods(1).build()?;
        let agent = Agent::start(&lab, lab.b(), &configuration(engines, 0))?;
        let meter = Meter::start(&lab, effort.rate)?;
        Ok(Self { engines, effort, meter, agent, lab })
    }

    fn row(
        &mut self,
        event: &str,
        times: u32,
        mut work: impl FnMut(&mut Agent, &Lab) -> Result<()>,
    ) -> Result<Row> {
        let (mut reading, agent, lab) = (Reading::default(), &mut self.agent, &self.lab);
        for _ in 0..times {
            reading = reading.and(&self.meter.while_doing(|_| work(agent, lab))?.1);
        }
        Ok(Row { event: event.to_owned(), engines: self.engines.name(), times, reading })
    }
}

/// Runs every event; `show` is called with each row as it is measured.
///
/// # Errors
/// The lab or the agent fails; not that packets are lost.
pub fn all(engines: Engines, effort: Effort, mut show: impl FnMut(&Row)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut add = |row: Row| {
        show(&row);
        rows.push(row);
    };
    let mut bench = Bench::new(engines, effort)?;
    let Effort { kills, times, rules, .. } = bench.effort;
    add(bench.row("nothing", 1, |_, _| wait(CALM))?);
    add(bench.row("kill -9 and start", kills, |agent, _| agent.restart())?);
    if engines.has_ebpf() {
        add(bench.row("upgrade, other programs", times, other_programs)?);
        add(bench.row("upgrade, other ABI version", times, other_version)?);
    }
    add(bench.row(&format!("reload of {rules} rules"), times, |agent, _| {
        agent.reload(&configuration(engines, rules))?;
        agent.reload(&configuration(engines, 0))
    })?);
    add(bench.row("trial that is confirmed, trial that expires", times, |agent, lab| {
        trial(agent, lab, engines, rules, true)?;
        trial(agent, lab, engines, rules, false)
    })?);
    if engines.has_ebpf() {
        shield(&mut bench)?.into_iter().for_each(&mut add);
    }
    if let Some(other) = engines.with_other_filter() {
        let event = format!("change to {} and back", other.name());
        add(bench.row(&event, times, |agent, _| {
            change(agent, other, rules)?;
            change(agent, engines, 0)
        })?);
    }
    add(down(&mut bench)?);
    drop(bench);
    if engines == Engines::Ebpf {
        for next in Engines::ALL.into_iter().filter(|next| *next != engines) {
            add(first_filter(next, effort)?);
        }
    }
    add(first_start(engines, effort)?);
    Ok(rows)
}

fn wait(time: Duration) -> Result<()> {
    eventually(time, || None::<()>);
    Ok(())
}

/// The shield is attached and detached by reloads, and the agent is killed and started while it is attached.
fn shield(bench: &mut Bench) -> Result<[Row; 3]> {
    let (engines, Effort { times, kills, .. }) = (bench.engines, bench.effort);
    let off = configuration(engines, 0);
    // Every denied packet is dropped by the driver: none is left to the hook to be answered or reported.
    let auto = off.replace("onDeny: drop", "onDeny: drop\n  xdp: auto\n  events: {rate: 0}");
    let is = |agent: &Agent, state: &str| -> Result<()> {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
        let interfaces = status["agent"]["enforcement"]["interfaces"].as_array();
        let mut states = interfaces.into_iter().flatten().filter_map(|one| one["xdp"].as_str());
        ensure!(states.any(|other| other == state), "no interface is {state}: {status}\n{}", agent.log());
        Ok(())
    };
    let attach = |bench: &mut Bench| {
        bench.row("reload that attaches the shield", 1, |agent, _| {
            agent.reload(&auto)?;
            is(agent, "native")
        })
    };
    let detach = |bench: &mut Bench| {
        bench.row("reload that detaches the shield", 1, |agent, _| {
            agent.reload(&off)?;
            is(agent, "off (enforcement.xdp is off)")
        })
    };
    let mut attached = attach(bench)?;
    let killed = bench.row("kill -9 and start behind the shield", kills, |agent, _| {
        agent.restart()?;
        is(agent, "native")
    })?;
    let dropped = Maps::open(&Pins::new(bench.agent.pins()))?.shielded()?.packets;
    ensure!(dropped > 0, "the shield dropped nothing");
    let mut detached = detach(bench)?;
    for _ in 1..times {
        attached = attached.and(&attach(bench)?);
        detached = detached.and(&detach(bench)?);
    }
    Ok([attached, killed, detached])
}

/// Replaces the packet filter by a reload.
fn change(agent: &mut Agent, engines: Engines, rules: u32) -> Result<()> {
    agent.reload(&configuration(engines, rules))?;
    let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    let engine = status["agent"]["firewall"]["engine"].as_str();
    ensure!(engine.is_some_and(|engine| engines.name().ends_with(engine)), "{status}\n{}", agent.log());
    Ok(())
}

/// A packet filter beside or instead of eBPF, on a node that tracked no connections when they were opened.
fn first_filter(next: Engines, effort: Effort) -> Result<Row> {
    let mut bench = Bench::new(Engines::Ebpf, effort)?;
    let event = format!("change to {} and back", next.name());
    bench.row(&event, 1, |agent, _| {
        change(agent, next, effort.rules.min(1_000))?;
        wait(CALM)?;
        agent.reload(&configuration(Engines::Ebpf, 0))
    })
}

/// Applies a configuration with more rules on trial, and confirms it, or waits until the former one is active again.
fn trial(agent: &mut Agent, lab: &Lab, engines: Engines, rules: u32, confirmed: bool) -> Result<()> {
    let candidate = lab.directory().join("trial.yaml");
    let api = format!("api: {{socket: {}}}\n", agent.socket().display());
    fs::write(&candidate, configuration(engines, rules) + &api)?;
    agent.run(&["apply", &candidate.to_string_lossy(), "--confirm", if confirmed { "10m" } else { "1s" }])?;
    if confirmed {
        agent.run(&["confirm"])?;
    }
    let over = || -> Option<()> {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"]).ok()?).ok()?;
        let (trial, last) = (&status["agent"]["trial"], &status["agent"]["lastTrial"]["outcome"]);
        (trial.is_null() && last == if confirmed { "confirmed" } else { "expired" }).then_some(())
    };
    let over = eventually(patience(Duration::from_secs(60)), over);
    ensure!(over.is_some(), "the trial does not end: {}\n{}", agent.run(&["status"])?, agent.log());
    if confirmed {
        agent.reload(&configuration(engines, 0))?;
    }
    Ok(())
}

/// Lengths of the program at the first hook, as the verifier has left it, loaded with this map. Other agents of this machine
/// have other maps.
fn lengths(flows: u32) -> Result<Vec<u64>> {
    let output =
        Command::new("bpftool").args(["--json", "prog", "show"]).output().context("start bpftool")?;
    ensure!(output.status.success(), "bpftool: {}", String::from_utf8_lossy(&output.stderr));
    let programs: Value = serde_json::from_slice(&output.stdout)?;
    let uses = |maps: &Value| maps.as_array().is_some_and(|maps| maps.contains(&Value::from(flows)));
    let named = |name: &Value| name.as_str().is_some_and(|name| name.starts_with("external_ingre"));
    let programs = programs.as_array().into_iter().flatten();
    let programs = programs.filter(|program| named(&program["name"]) && uses(&program["map_ids"]));
    Ok(programs.filter_map(|program| program["bytes_xlated"].as_u64()).collect())
}

/// Killed, and started from a binary whose programs are other ones: those that write a debug log.
fn other_programs(agent: &mut Agent, lab: &Lab) -> Result<()> {
    let path = lab.directory().join("other-programs");
    if !path.exists() {
        let script =
            format!("#!/bin/sh\nexec {} \"$@\" --log-level info,enforce=debug\n", program()?.display());
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let flows = MapInfo::from_pin(Pins::new(agent.pins()).map("flows"))?.id();
    let before = lengths(flows)?;
    let usual = agent.replace_program(path);
    agent.restart()?;
    let after = lengths(flows)?;
    ensure!(
        after.iter().any(|length| !before.contains(length)),
        "the programs are the same: {before:?}, {after:?}"
    );
    agent.replace_program(usual);
    agent.restart()
}

/// Kills the agent, and starts it as if the pins were of another ABI version: an agent recognises that by the name of
/// the directory alone.
fn other_version(agent: &mut Agent, _: &Lab) -> Result<()> {
    agent.kill()?;
    let pins = Pins::new(agent.pins());
    let other = other_directory(&pins);
    fs::rename(pins.directory(), &other).context("rename the directory of pins")?;
    agent.restart()?;
    ensure!(!other.exists(), "the other version was not removed:\n{}", agent.log());
    Ok(())
}

/// An upgrade from another binary to this one.
///
/// # Errors
/// The lab or an agent fails; not that packets are lost.
pub fn upgrade(from: &Path, engines: Engines, effort: Effort) -> Result<Row> {
    let lab = Lab::builder().pods(1).build()?;
    let mut agent = Agent::start_program(from.to_owned(), &lab, lab.b(), &configuration(engines, 0))?;
    let mut meter = Meter::start(&lab, effort.rate)?;
    agent.replace_program(program()?);
    let ((), reading) = meter.while_doing(|_| agent.restart())?;
    Ok(Row { event: "upgrade from the program given".to_owned(), engines: engines.name(), times: 1, reading })
}

/// Where another version of the ABI would have its pins.
#[must_use]
pub fn other_directory(pins: &Pins) -> PathBuf {
    pins.root().join(format!("v{}", bridge_common::ABI_VERSION + 1000))
}

/// `bridge-agent down` after the agent has been stopped. Nothing is denied afterwards: probes count until then.
fn down(bench: &mut Bench) -> Result<Row> {
    let agent = &mut bench.agent;
    let before = bench.meter.mark();
    wait(Duration::from_millis(100))?;
    agent.stop()?;
    let until = bench.meter.mark();
    let ((), mut reading) = bench.meter.while_doing(|_| agent.run(&["down"]).map(drop))?;
    let denied = bench.meter.read(before, until)?;
    ensure!(reading.leaked > 0, "`down` has left something that denies");
    (reading.probes, reading.leaked) = (denied.probes, denied.leaked);
    reading.lost += denied.lost;
    reading.sent += denied.sent;
    Ok(Row { event: "stop and down".to_owned(), engines: bench.engines.name(), times: 1, reading })
}

/// The first start on a node where connections stand already: probes count from when the agent says that it is ready.
fn first_start(engines: Engines, effort: Effort) -> Result<Row> {
    let mut sum = Reading::default();
    for _ in 0..effort.times {
        let lab = Lab::builder().pods(1).conntrack().build()?;
        let mut meter = Meter::start(&lab, effort.rate)?;
        let ((agent, ready), mut reading) = meter.while_doing(|meter| {
            let agent = Agent::start(&lab, lab.b(), &configuration(engines, 0))?;
            Ok((agent, meter.mark()))
        })?;
        ensure!(reading.leaked > 0, "something was denied before the first start");
        wait(CALM)?;
        let enforced = meter.read(ready, meter.mark())?;
        (reading.probes, reading.leaked) = (enforced.probes, enforced.leaked);
        reading.lost += enforced.lost;
        reading.sent += enforced.sent;
        sum = sum.and(&reading);
        drop(meter);
        drop(agent);
    }
    Ok(Row {
        event: "first start on a live node".to_owned(),
        engines: engines.name(),
        times: effort.times,
        reading: sum,
    })
}
