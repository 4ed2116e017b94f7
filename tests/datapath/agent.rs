//! The agent as its operator sees it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Maps, Pins};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::{eventually, patience};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(5);
pub(crate) const ALLOWED: u16 = 40002;
pub(crate) const DENIED: u16 = 40003;

pub(crate) const CONFIG: &str = r#"
role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  engines: [ebpf]
  interfaces: {external: [eth0], internal: ["cali*"]}
rules:
  - {name: api, direction: inbound, protocol: tcp, ports: [40002]}
"#;

pub(crate) fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

/// Whether the LAN host reaches the port of the first pod.
pub(crate) fn reaches(lab: &Lab, port: u16) -> Result<bool> {
    Ok(tcp::Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, port))?.succeeded())
}

pub(crate) fn servers(lab: &Lab) -> Result<Vec<tcp::Server>> {
    let start = |port| Ok(tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, port))?);
    [ALLOWED, DENIED].into_iter().map(start).collect()
}

#[test]
fn rules_hold_are_counted_and_outlive_the_agent() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let to = lab.c1().at(Family::V4, ALLOWED);
    let attempt = tcp::Client::new(&lab.a().netns).connect(to)?;
    let mut connection = attempt.reached()?;
    connection.round_trip(SECOND)?;
    ensure!(!reaches(&lab, DENIED)?);

    let rules = json(&agent, &["rules"])?;
    assert_eq!((&rules[0]["name"], rules[0]["hits"].as_u64()), (&"api".into(), Some(1)), "{rules}");
    let flows = json(&agent, &["flows", "--port", "40002", "--state", "established"])?["flows"].take();
    assert_eq!(flows[0]["source"], lab.a().v4.to_string(), "{flows}");
    assert_eq!((&flows[0]["rule"], &flows[0]["direction"]), (&"api".into(), &"inbound".into()), "{flows}");
    assert_eq!(json(&agent, &["flows", "--address", "192.168.31.68"])?["flows"], Value::Array(vec![]));
    let status = json(&agent, &["status"])?;
    assert_eq!(status["agent"]["pid"].as_u64(), Some(agent.pid().into()), "{status}");
    let generation = status["enforcement"]["generation"].clone();

    agent.kill()?;
    connection.round_trip(SECOND).context("after kill -9 of the agent")?;
    ensure!(!reaches(&lab, DENIED)?, "nothing is enforced after kill -9");
    ensure!(reaches(&lab, ALLOWED)?);
    let dead = json(&agent, &["status"])?;
    assert_eq!(
        (&dead["running"], &dead["enforcement"]["generation"]),
        (&false.into(), &generation),
        "{dead}"
    );
    assert_eq!(json(&agent, &["rules"])?[0]["hits"], 2);
    ensure!(agent.run(&["flows"])?.contains("192.168.31.67"));

    agent.restart()?;
    connection.round_trip(SECOND).context("after the restart")?;
    let again = json(&agent, &["status"])?;
    assert_eq!(again["enforcement"]["generation"], generation, "the same policy was written again: {again}");
    assert_eq!(again["agent"]["enforcement"]["adopted"], true);
    assert_eq!(json(&agent, &["rules"])?[0]["hits"], 2, "hits were lost");
    assert_eq!(agent.stop()?.code(), Some(0));
    connection.round_trip(SECOND).context("after the agent was stopped")?;
    ensure!(!reaches(&lab, DENIED)?, "nothing is enforced after SIGTERM");
    ensure!(!agent.socket().exists(), "the socket is left");

    agent.run(&["down"])?;
    ensure!(reaches(&lab, DENIED)?, "something is enforced after `down`");
    ensure!(!agent.pins().exists());
    ensure!(agent.run(&["down"])?.contains("no eBPF enforcement to remove"));
    let nothing = json(&agent, &["status"])?;
    ensure!(nothing["running"] == false && nothing["enforcement"].is_null(), "{nothing}");
    Ok(())
}

#[test]
fn a_file_in_the_place_of_the_socket_does_not_leave_the_node_open() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let directory = lab.directory().join(&lab.b().name);
    let socket = directory.join("agent.sock");
    fs::create_dir_all(&socket)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    ensure!(reaches(&lab, ALLOWED)? && !reaches(&lab, DENIED)?, "beside a directory:\n{}", agent.log());
    let refused = agent.run(&["check"]).map_err(|error| format!("{error:#}"));
    ensure!(
        refused.as_ref().is_err_and(|said| said.contains("is a directory") && said.contains("remove that")),
        "{refused:?}"
    );
    // It listens as soon as it can.
    fs::remove_dir(&socket)?;
    eventually(patience(DEADLINE), || {
        json(&agent, &["status"]).ok().filter(|status| status["running"] == true)
    })
    .with_context(|| agent.log())?;
    agent.run(&["check"])?;

    agent.stop()?;
    agent.run(&["down"])?;
    fs::write(&socket, "of another program")?;
    agent.restart()?;
    ensure!(reaches(&lab, ALLOWED)? && !reaches(&lab, DENIED)?, "beside a file:\n{}", agent.log());
    agent.stop()?;
    ensure!(fs::read_to_string(&socket)? == "of another program", "the agent has touched the file");
    Ok(())
}

#[test]
fn a_reload_takes_effect_and_a_bad_one_changes_nothing() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    ensure!(reaches(&lab, ALLOWED)? && !reaches(&lab, DENIED)?);
    let other = format!("{CONFIG}  - {{name: more, direction: inbound, protocol: tcp, ports: [40003]}}\n");
    agent.reload(&other)?;
    ensure!(reaches(&lab, ALLOWED)? && reaches(&lab, DENIED)?);
    let rules = json(&agent, &["rules"])?;
    let hits: Vec<_> = [0, 1].map(|rule| rules[rule]["hits"].as_u64()).into();
    assert_eq!(hits, [Some(2), Some(1)], "hits of a rule that stayed were not carried over: {rules}");

    agent.reload(&CONFIG.replace("[40002]", "[\"40010-40001\"]"))?;
    ensure!(reaches(&lab, DENIED)?, "a bad configuration has changed the policy");
    let last = json(&agent, &["status"])?["agent"]["reloads"]["last"].clone();
    let error = last["error"].as_str().with_context(|| format!("{last}\n{}", agent.log()))?;
    ensure!(error.contains("agent.yaml") && error.contains("40001"), "{error}");
    assert_eq!(json(&agent, &["rules"])?[0]["hits"], 2);

    // An editor's way, and no signal.
    let new = agent.config().with_extension("swp");
    let text = fs::read_to_string(agent.config())?.replace("40010-40001", "40003-40004");
    fs::write(&new, text)?;
    fs::rename(&new, agent.config())?;
    eventually(DEADLINE, || (!reaches(&lab, ALLOWED).unwrap_or(true)).then_some(()))
        .context("the changed file was not read")?;
    ensure!(reaches(&lab, DENIED)?);
    Ok(())
}

#[test]
fn a_new_interface_is_judged_on_at_once() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let node = &lab.b().netns;
    node.ip("link add cali-new type veth peer name new-cali")?;
    let names = || crate::support::attached(node, "cali-new").ok().filter(|attached| attached.len() == 2);
    let start = std::time::Instant::now();
    eventually(DEADLINE, names).context("it was not attached to")?;
    eprintln!("attached after {:?}", start.elapsed());
    node.ip("link delete cali-new")?;
    let gone = || {
        let interfaces = json(&agent, &["status"]).ok()?["enforcement"]["interfaces"].to_string();
        (!interfaces.contains("cali-new")).then_some(())
    };
    eventually(DEADLINE, gone).context("its pin is left")?;
    Ok(())
}

#[test]
fn a_renamed_interface_stays_judged() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let node = &lab.b().netns;
    ensure!(reaches(&lab, ALLOWED)? && !reaches(&lab, DENIED)?);
    let before = crate::support::attached(node, "eth0")?;
    // As udev does; IPv4 addresses stay.
    node.ip("link set eth0 down")?;
    node.ip("link set eth0 name lan0")?;
    node.ip("link set lan0 up")?;
    let remark = || {
        let status = json(&agent, &["status"]).ok()?.to_string();
        (status.contains("eth0 was renamed to lan0") && status.contains("\"lan0\"")).then_some(())
    };
    eventually(DEADLINE, remark).with_context(|| agent.log())?;
    assert_eq!(crate::support::attached(node, "lan0")?, before);
    eventually(DEADLINE, || reaches(&lab, ALLOWED).ok().filter(|reached| *reached)).context("allowed")?;
    ensure!(!reaches(&lab, DENIED)?, "open after it was renamed:\n{}", agent.log());
    ensure!(agent.run(&["status", "--ready"]).is_ok());
    // Another interface with the configured name takes its place.
    node.ip("link add eth0 type veth peer name eth0-peer")?;
    let moved = || crate::support::attached(node, "eth0").ok().filter(|attached| !attached.is_empty());
    eventually(DEADLINE, moved).with_context(|| agent.log())?;
    Ok(())
}

#[test]
fn interfaces_are_found_from_the_routes() -> Result<()> {
    let lab = Lab::builder().pods(2).build()?;
    let named = "  interfaces: {external: [eth0], internal: [\"cali*\"]}\n";
    let agent = Agent::start(&lab, lab.b(), &CONFIG.replace(named, ""))?;
    let status = json(&agent, &["status"])?;
    let mut found: Vec<(String, String)> = status["agent"]["enforcement"]["interfaces"]
        .as_array()
        .context("interfaces")?
        .iter()
        .map(|interface| (interface["name"].to_string(), interface["role"].to_string()))
        .collect();
    found.sort();
    let quoted = |name: &str, role: &str| (format!("{name:?}"), format!("{role:?}"));
    let mut expected = vec![
        quoted(&lab.c1().peer_interface, "internal"),
        quoted(&lab.c2().peer_interface, "internal"),
        quoted("eth0", "external"),
    ];
    expected.sort();
    assert_eq!(found, expected, "{status}");
    Ok(())
}

#[test]
fn monitor_shows_what_was_denied_with_and_without_an_agent() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    for alive in [true, false] {
        let mut command = agent.command(&["monitor", "--json", "--count", "1", "--port", "40003"]);
        command.stdout(Stdio::piped());
        let mut monitor = lab.b().netns.spawn_command(command)?;
        let stdout = monitor.child().stdout.take().context("a pipe")?;
        // The listener may take a moment to start, so connect until it has seen one.
        let ended = eventually(Duration::from_secs(20), || {
            reaches(&lab, DENIED).ok()?;
            monitor.wait(Duration::from_millis(50)).ok()?
        });
        assert_eq!(ended.context("it has seen nothing")?.code(), Some(0));
        let line = BufReader::new(stdout).lines().next().context("a line")??;
        let verdict: Value = serde_json::from_str(&line)?;
        assert_eq!(
            (&verdict["verdict"], &verdict["reason"]),
            (&"reject".into(), &"no_rule".into()),
            "{line}"
        );
        assert_eq!(verdict["source"], lab.a().v4.to_string());
        assert_eq!((&verdict["destinationPort"], &verdict["interface"]), (&DENIED.into(), &"eth0".into()));
        if alive {
            agent.kill()?;
        }
    }
    Ok(())
}

#[test]
fn a_second_agent_is_refused() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let error = agent.run(&["run"]).unwrap_err().to_string();
    ensure!(error.contains("exit status: 1") && error.contains(&format!("pid {}", agent.pid())), "{error}");
    let error = agent.run(&["down"]).unwrap_err().to_string();
    ensure!(error.contains(&format!("pid {}", agent.pid())), "{error}");
    ensure!(!reaches(&lab, DENIED)?, "the refused ones have changed something");
    Ok(())
}

/// A child that an agent has forked, before exec, has all open files of the agent.
#[test]
fn a_child_of_an_agent_that_was_killed_keeps_no_other_from_starting() -> Result<()> {
    const KILLED: &str = "
import fcntl, os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
fcntl.flock(os.open(sys.argv[2], os.O_RDONLY), fcntl.LOCK_EX)
if os.fork() == 0: time.sleep(0.3)
";
    let lab = Lab::builder().pods(1).build()?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    agent.stop()?;
    let mut killed = Command::new("python3");
    killed.args(["-c", KILLED]).arg(agent.socket()).arg(agent.pins());
    ensure!(killed.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success());
    agent.restart()?;
    ensure!(!reaches(&lab, DENIED)?);
    Ok(())
}

#[test]
fn metrics_and_the_api_tell_what_the_kernel_counted() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let _servers = servers(&lab)?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    ensure!(reaches(&lab, ALLOWED)? && !reaches(&lab, DENIED)?);
    let get = |path: &str, method: &str| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail-with-body", "--max-time", "5", "--request", method, "--unix-socket"]);
        curl.arg(agent.socket()).arg(format!("http://bridge{path}"));
        lab.b().netns.output(curl)
    };
    let metrics = get("/metrics", "GET")?;
    for line in [
        r#"bridge_packets_total{direction="inbound",reason="no_rule",verdict="deny"} 1"#,
        r#"bridge_rule_hits_total{rule="api",direction="inbound",action="allow"} 1"#,
        r#"bridge_interfaces{role="external"} 1"#,
        "bridge_audit_mode 0",
    ] {
        ensure!(metrics.lines().any(|other| other == line), "{line} is not in\n{metrics}");
    }
    let flows: Value = serde_json::from_str(&get("/v1/flows?port=40002", "GET")?)?;
    assert_eq!(flows["total"], 1, "{flows}");
    get("/v1/reload", "POST")?;
    assert_eq!(json(&agent, &["status"])?["agent"]["reloads"]["succeeded"], 1);
    fs::write(agent.config(), "role: none")?;
    let error = get("/v1/reload", "POST").unwrap_err();
    ensure!(!reaches(&lab, DENIED)?, "{error}");
    Ok(())
}

/// A request during a reload is answered at once, with the active state; and gets a port of the pool.
#[test]
fn nobody_waits_for_a_reload_of_ten_thousand_rules() -> Result<()> {
    /// So much longer than without a reload, an answer may take.
    const AT_ONCE: Duration = Duration::from_millis(200);
    let lab = Lab::builder().pods(1).build()?;
    let policies = ["allow", "deny"].map(|action| {
        let rules = (0..10_000).map(|rule| {
            let (address, port) = (rule % 256, 1024 + rule / 256);
            format!(
                "  - {{name: r{rule}, direction: inbound, external: [192.168.31.{address}/32], protocol: tcp, \
                 ports: [{port}], action: {action}}}\n"
            )
        });
        let pool = "portPool: {ports: [\"61001-61004\"], destinations: [192.168.31.0/24]}\n";
        format!("{CONFIG}{}{pool}", rules.collect::<String>())
    });
    let mut agent = Agent::start(&lab, lab.b(), &policies[0])?;
    let socket = agent.socket().to_owned();
    // Those whose time is over must make room for others in time.
    let lease = r#"{"destination": "192.168.31.67:443", "ttlMs": 1}"#;
    let questions: [(&[&str], &str); 4] = [
        (&["http://bridge/metrics"], "bridge_policy_generation "),
        (&["http://bridge/v1/status"], r#""abiVersion""#),
        (&["http://bridge/v1/rules"], r#""r9999""#),
        (&["http://bridge/v1/leases", "--data", lease], r#""port""#),
    ];
    let answer = |question: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "30", "--write-out", "\n%{time_total}", "--unix-socket"]);
        curl.arg(&socket).args(question);
        let text = lab.b().netns.output(curl)?;
        let (answer, seconds) = text.rsplit_once('\n').context("no time")?;
        anyhow::Ok((answer.to_owned(), Duration::from_secs_f64(seconds.parse()?)))
    };
    let ask = || {
        questions.map(|(question, expected)| {
            let (answer, took) = answer(question)?;
            ensure!(answer.contains(expected), "{question:?}: no {expected} in\n{answer}");
            Ok((took, question[0]))
        })
    };
    let mut undisturbed = Duration::ZERO;
    for answer in (0..3).flat_map(|_| ask()) {
        undisturbed = undisturbed.max(answer?.0);
    }
    let reloading = AtomicBool::new(true);
    let (answers, waits, reloads) = thread::scope(|scope| {
        // A client can also wait for the reload.
        let waiting = scope.spawn(|| {
            let mut waits = Vec::new();
            while reloading.load(Ordering::Relaxed) {
                waits.push(answer(&["http://bridge/v1/settled"])?.1);
            }
            anyhow::Ok(waits)
        });
        let asking = scope.spawn(|| {
            let mut answers = Vec::new();
            while reloading.load(Ordering::Relaxed) {
                answers.extend(ask());
            }
            answers.into_iter().collect::<Result<Vec<_>>>()
        });
        let reloads: Result<Vec<_>> = policies
            .iter()
            .cycle()
            .skip(1)
            .take(4)
            .map(|policy| {
                let start = Instant::now();
                agent.reload(policy)?;
                Ok(start.elapsed())
            })
            .collect();
        reloading.store(false, Ordering::Relaxed);
        (asking.join().expect("it does not panic"), waiting.join().expect("nor does this"), reloads)
    });
    let (mut answers, waits, reloads) = (answers?, waits?, reloads?);
    answers.sort();
    let (slowest, median) = (*answers.last().context("no answer came")?, answers[answers.len() / 2]);
    println!(
        "{} answers during reloads of {reloads:?}: median {median:?}, slowest {slowest:?}; without, up to {undisturbed:?}",
        answers.len()
    );
    ensure!(answers.len() >= 4 * reloads.len(), "{answers:?} are too few");
    let quickest = *reloads.iter().min().context("no reload")?;
    ensure!(quickest > AT_ONCE * 2, "{reloads:?}: no client could have waited");
    // On a busy processor some answers are late; but none waits for a reload.
    ensure!(median.0 < undisturbed + patience(AT_ONCE), "{median:?}; without reloads {undisturbed:?}");
    ensure!(slowest.0 < undisturbed + quickest / 2, "{slowest:?} beside reloads of {reloads:?}");
    ensure!(waits.iter().max() > Some(&(quickest / 2)), "{waits:?} beside reloads of {reloads:?}");
    let reloads = &json(&agent, &["status"])?["agent"]["reloads"];
    ensure!(reloads["failed"] == 0 && reloads["succeeded"].as_u64() >= Some(4), "{reloads}");
    Ok(())
}

/// Flows that have expired make room, though no packet of theirs comes.
#[test]
fn the_agent_removes_flows_that_have_expired() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let engines = "engines: [ebpf]\n  timeouts: {tcpHandshake: 1s, tcpReset: 1s}";
    let agent = Agent::start(&lab, lab.b(), &CONFIG.replace("engines: [ebpf]", engines))?;
    let maps = Maps::open(&Pins::new(agent.pins()))?;
    let waiting = || -> Result<u64> {
        let fills = maps.fill()?;
        Ok(fills.iter().find(|fill| fill.map == "half_open").context("a table of flows")?.entries)
    };
    // There is no server.
    ensure!(!reaches(&lab, ALLOWED)?);
    ensure!(waiting()? > 0, "the attempt left no flow");
    let removed = || waiting().is_ok_and(|entries| entries == 0).then_some(());
    eventually(SECOND * 25, removed).context("the flow is still there")?;
    Ok(())
}
