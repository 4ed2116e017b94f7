//! The wall clock jumps under a running agent: nothing that is timed changes. Only in a machine whose clock may be set,
//! as `cargo xtask vm` starts them.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    lab::{Family, Lab},
    traffic::tcp::{Client, Server},
    wait::{eventually, patience},
};
use rustix::time::{ClockId, Timespec, clock_settime};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(30);
const ALLOWED: u16 = 40002;
const DENIED: u16 = 40003;
const DAY: i64 = 86_400;

const CONFIG: &str = "role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
enforcement: {engines: [ebpf, iptables], iptables: {backend: nft}}
rules: [{name: in, direction: inbound, protocol: tcp, ports: [40002]}]
portPool: {ports: 61001-61010}
persistence: {save: never}
";

/// The machine's clock; set right when it is dropped.
struct Clock {
    started: Instant,
    right: Duration,
}

impl Clock {
    fn of_a_machine_of_its_own() -> Result<Self> {
        let line = fs::read_to_string("/proc/cmdline")?;
        ensure!(line.contains("bridge.guest="), "the clock of this machine is not to be set");
        Ok(Self { started: Instant::now(), right: SystemTime::now().duration_since(UNIX_EPOCH)? })
    }

    /// Sets the clock `ahead` seconds ahead of the right time.
    fn set(&self, ahead: i64) -> Result<()> {
        let now = self.right + self.started.elapsed();
        let seconds = i64::try_from(now.as_secs())? + ahead;
        let time = Timespec { tv_sec: seconds, tv_nsec: now.subsec_nanos().into() };
        clock_settime(ClockId::Realtime, time).context("set the clock")
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            eprintln!("{error:#}");
        }
    }
}

fn status(agent: &Agent) -> Result<Value> {
    Ok(serde_json::from_str::<Value>(&agent.run(&["status", "--json"])?)?["agent"].take())
}

#[test]
#[ignore = "sets the clock of the machine: `cargo xtask vm` runs it"]
fn jumps_of_the_wall_clock_change_nothing() -> Result<()> {
    let clock = Clock::of_a_machine_of_its_own()?;
    let lab = Lab::builder().pods(1).conntrack().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let _allowed = Server::echo(&c1.netns, c1.at(Family::V4, ALLOWED))?;
    let _denied = Server::echo(&c1.netns, c1.at(Family::V4, DENIED))?;
    let connect =
        |port| Client::new(&a.netns).deadline(patience(SECOND * 5)).connect(c1.at(Family::V4, port));
    let mut held = connect(ALLOWED)?.reached()?;
    let to = SocketAddr::new(a.v4.into(), 8080);
    agent.run(&["ports", "acquire", &to.to_string(), "--for", "1h"])?;

    for ahead in [400 * DAY, -400 * DAY, 10 * 365 * DAY, 0] {
        clock.set(ahead)?;
        held.round_trip(patience(SECOND * 5)).with_context(|| format!("established, {ahead} s ahead"))?;
        ensure!(connect(ALLOWED)?.succeeded(), "the allowed port, {ahead} s ahead");
        ensure!(connect(DENIED)?.refused(), "the denied port, {ahead} s ahead");
        ensure!(
            status(&agent)?["pool"]["held"] == 1,
            "the lease, {ahead} s ahead: {}",
            status(&agent)?["pool"]
        );
        agent.reload(CONFIG)?;
    }
    // A restart takes the lease of a client that has gone back, and nothing else.
    clock.set(400 * DAY)?;
    agent.restart()?;
    clock.set(-400 * DAY)?;
    held.round_trip(patience(SECOND * 5)).context("established, after a restart under another clock")?;

    let candidate = lab.directory().join("try.yaml");
    let more = CONFIG.replace("[40002]", "[40002, 40003]");
    fs::write(&candidate, format!("{more}api: {{socket: {}}}\n", agent.socket().display()))?;
    // Neither over before its time nor after it.
    for ahead in [2 * DAY, -2 * DAY] {
        clock.set(0)?;
        let begun = Instant::now();
        agent.run(&["apply", &candidate.to_string_lossy(), "--confirm", "8s"])?;
        clock.set(ahead)?;
        let left = status(&agent)?["trial"]["secondsLeft"].as_u64().unwrap_or_default();
        ensure!((1..=8).contains(&left), "{left} s left, {ahead} s ahead");
        ensure!(connect(DENIED)?.succeeded() || begun.elapsed() > SECOND * 8, "over before its time");
        eventually(patience(SOON), || connect(DENIED).is_ok_and(|attempt| attempt.refused()).then_some(()))
            .context("it does not end")?;
        let took = begun.elapsed();
        ensure!(took > SECOND * 7, "over after {took:?}, {ahead} s ahead");
        eventually(patience(SOON), || {
            status(&agent).is_ok_and(|status| status["trial"].is_null()).then_some(())
        })
        .with_context(|| {
            format!("the agent does not follow, {ahead} s ahead: {:?}\n{}", status(&agent), agent.log())
        })?;
    }
    held.round_trip(patience(SECOND * 5)).context("established, in the end")?;
    Ok(())
}
