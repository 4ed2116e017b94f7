//! Words of the kernel that get lost: everything is read again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use bridge_agent::routes::Settings;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Lab, Netns};
use bridge_lab::netns::{Ns, SECONDS};
use bridge_lab::routes::{self, eventually_own, own, want};
use bridge_lab::wait::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// `ip -batch` with these lines; some may fail.
fn batch(netns: &Netns, lines: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), lines)?;
    netns.ip(&format!("-force -batch {}", file.path().display()))?;
    Ok(())
}

/// Says that it is over.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An agent that does not read its events for a while (ENOBUFS) does not know of a deletion, and yet puts the route
/// back: long before it would look by itself.
#[test]
fn a_deletion_whose_event_was_dropped_is_repaired() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let host = &lab.a().netns;
    let agent = Agent::start(
        &lab,
        lab.a(),
        "role: host\nroutes: {static: [{to: 10.200.1.0/24, via: 192.168.31.17}]}",
    )?;
    let there = || host.ip("route show proto 98").unwrap().contains("10.200.1.0/24 via 192.168.31.17");
    until("the route is there", SECONDS, there);
    let overruns = || -> Result<u64> {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
        Ok(status["agent"]["routes"]["counters"]["overruns"].as_u64().expect("a count"))
    };
    assert_eq!(overruns()?, 0);

    let pid = Pid::from_raw(agent.pid().cast_signed()).expect("a process id");
    kill_process(pid, Signal::STOP)?;
    // None of these matters to it, and all of them are sent.
    let noise: String = (0..10_000)
        .map(|i| format!("route add 172.16.{}.{}/32 dev lo table 77\n", i / 256, i % 256))
        .collect();
    let made = batch(host, &noise).and_then(|()| host.ip("route del 10.200.1.0/24 proto 98"));
    let gone = !there();
    kill_process(pid, Signal::CONT)?;
    made?;
    assert!(gone);
    until("the route is back", SECONDS, there);
    assert!(overruns()? > 0);
    Ok(())
}

/// Addresses that change all the time make the kernel say of each dump that it is not consistent. Nothing is planned
/// by such a dump, and once it is quiet the table is as planned.
#[test]
fn dumps_that_were_interrupted_are_read_again() {
    let (host, lan) = (Ns::new(), Ns::new());
    host.link("eth0", &lan, "lan0");
    host.address("eth0", "192.168.31.67/24");
    let agent =
        routes::Agent::with_static(&host, Settings::default(), vec![want("10.200.1.0/24", "192.168.31.17")]);
    let planned = [own("10.200.1.0/24", "192.168.31.17", "eth0")];
    eventually_own(&host, &planned);
    // A dump of this many addresses takes several datagrams, between which others change.
    let address = |i: u32| format!("172.20.{}.{}/32 dev lo", i / 256, i % 256);
    let (stable, moving) = (0..4000, 4000..6000);
    let lines: String = stable.map(|i| format!("address add {}\n", address(i))).collect();
    let churn: String =
        moving.flat_map(|i| ["add", "del"].map(|verb| format!("address {verb} {}\n", address(i)))).collect();
    let directory = tempfile::tempdir().unwrap();
    for (name, lines) in [("stable", &lines), ("churn", &churn)] {
        std::fs::write(directory.path().join(name), lines).unwrap();
    }
    let run = move |ns: &Ns, path: std::path::PathBuf| {
        ns.ip(&format!("-force -batch {}", path.display()));
    };
    run(&host, directory.path().join("stable"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let churning = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                run(&host, directory.path().join("churn"));
            }
        });
        // Also if the test fails here.
        let end = End(&done);
        until("dumps are interrupted", Duration::from_secs(20), || {
            agent.counters.interrupted.load(Ordering::Relaxed) > 0
        });
        host.ip("route del 10.200.1.0/24 proto 98");
        drop(end);
        churning.join().unwrap();
    });
    eventually_own(&host, &planned);
}
