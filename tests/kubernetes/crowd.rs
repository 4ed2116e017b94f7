//! Many policies of many authors, a tenth of them hostile: the others take effect at once, in both engines, always. Read
//! back from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Maps, Pins};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::{eventually, patience};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::support::{DEADLINE, cluster, is_refused, node_config, open, until_current};

const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";
/// One policy in this number is hostile.
const HOSTILE: usize = 10;
/// From the answer of the API server until both engines have the change.
const LIMIT: Duration = Duration::from_secs(1);
/// Requests at a time.
const CLIENTS: usize = 8;
/// Ports that no random policy names.
const PROBED: u16 = 60_001;

/// The policies that must be active, each with the names of its rules.
type Expected = BTreeMap<String, BTreeSet<String>>;

fn object(name: &str, rules: &Value) -> Value {
    json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": name}, "spec": {"rules": rules}})
}

/// A policy as a tenant writes it: a few rules.
fn good(dice: &mut StdRng, name: &str, version: usize) -> (Value, BTreeSet<String>) {
    let mut names = BTreeSet::new();
    let rules: Vec<Value> = (0..dice.random_range(1..=3))
        .map(|number| {
            let rule = format!("r{version}-{number}");
            names.insert(format!("{name}.{rule}"));
            let mut ports: Vec<u16> =
                (0..dice.random_range(1..=4)).map(|_| dice.random_range(1..=60_000)).collect();
            ports.sort_unstable();
            ports.dedup();
            let protocol = ["tcp", "udp", "sctp"][dice.random_range(0..3)];
            let mut rule = json!({
                "name": rule,
                "direction": if dice.random() { "inbound" } else { "outbound" },
                "protocol": protocol,
                "ports": ports,
            });
            if dice.random() {
                let host = |dice: &mut StdRng| format!("192.168.31.{}/32", dice.random_range(100..250));
                rule["external"] = (0..dice.random_range(1..=3))
                    .map(|_| host(dice))
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .collect();
            }
            match dice.random_range(0..3) {
                0 => rule["pods"] = json!(["10.200.1.0/24"]),
                1 => rule["podSelector"] = json!({"matchLabels": {"app": "api"}}),
                _ => {}
            }
            if dice.random_range(0..4) == 0 {
                rule["action"] = "deny".into();
            }
            rule
        })
        .collect();
    (object(name, &json!(rules)), names)
}

/// A policy that the schema takes, and that costs as much as its author can make it.
fn hostile(dice: &mut StdRng, name: &str) -> Value {
    let offset: u16 = dice.random_range(1..100);
    let ports = |count: u16| (0..count).map(|port| offset + port * 7).collect::<Vec<_>>();
    let nets =
        |base: &str, count: usize| (0..count).map(|n| format!("{base}.{}/32", n + 1)).collect::<Vec<_>>();
    let rule = |number: usize, ports: &[u16], sources: &[u16], networks: usize| {
        let mut rule =
            json!({"name": format!("h{number}"), "direction": "inbound", "protocol": "tcp", "ports": ports});
        if !sources.is_empty() {
            rule["sourcePorts"] = json!(sources);
        }
        if networks > 0 {
            rule["external"] = json!(nets("192.168.31", networks));
            rule["pods"] = json!(nets("10.200.1", networks));
        }
        rule
    };
    let rules: Vec<Value> = match dice.random_range(0..5) {
        // Each pair of lists of ports is an iptables rule for each pair of addresses.
        0 => (0..4).map(|number| rule(number, &ports(60), &ports(60), 40)).collect(),
        // Ports and source ports that overlap in ever more ways.
        1 => (0..300)
            .map(|number| {
                let shifted: Vec<u16> = ports(60)
                    .into_iter()
                    .map(|port| port * 3 + 11 * u16::try_from(number).unwrap_or(0))
                    .collect();
                rule(number, &shifted, &shifted, 0)
            })
            .collect(),
        // Just within the budget of one policy.
        2 => (0..60).map(|number| rule(number, &ports(60), &ports(60), 4)).collect(),
        // Many pairs of addresses, and many rules.
        3 => (0..100).map(|number| rule(number, &[offset], &[], 40)).collect(),
        // Accepted by the server, and wrong: the ports overlap.
        _ => vec![json!({"name": "h", "direction": "inbound", "protocol": "tcp", "ports": ["1-100", 50]})],
    };
    object(name, &json!(rules))
}

fn create(server: &ApiServer, policy: &Value) -> Result<()> {
    server.request(User::Admin, "POST", POLICIES, Some(policy)).map(drop)
}

fn replace(server: &ApiServer, policy: &Value) -> Result<()> {
    let path = format!("{POLICIES}/{}", policy["metadata"]["name"].as_str().unwrap_or_default());
    server.request(User::Admin, "PATCH", &path, Some(policy)).map(drop)
}

/// The names of rules that the kernel enforces: in the active table of eBPF, and in iptables.
fn in_kernel(lab: &Lab, maps: &Maps) -> Result<[BTreeSet<String>; 2]> {
    let ebpf = maps.rule_info(maps.slot())?;
    let name = |info: &bridge_common::filter::policy::RuleInfo| {
        let length = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
        String::from_utf8_lossy(&info.name[..length]).into_owned()
    };
    let count = maps.active_settings()?.rule_count as usize;
    let ebpf = ebpf.iter().take(count).map(name).collect();
    let mut iptables = BTreeSet::new();
    let mut save = Command::new("iptables-save");
    save.args(["-t", "filter"]);
    for line in lab.b().netns.output(save)?.lines().filter(|line| line.starts_with("-A BRIDGE-")) {
        let comment = line.split_once("--comment ").map(|(_, rest)| rest.trim_start_matches('"'));
        let name = comment.and_then(|rest| rest.split(['"', ' ']).next()).unwrap_or_default();
        if !name.starts_with("bridge:") {
            iptables.insert(name.to_owned());
        }
    }
    Ok([ebpf, iptables])
}

/// Returns the first difference between the kernel and the policies of honest authors.
fn difference(found: &[BTreeSet<String>; 2], expected: &Expected) -> Option<String> {
    let wanted: BTreeSet<&String> = expected.values().flatten().collect();
    for (engine, found) in ["eBPF", "iptables"].iter().zip(found) {
        let found: BTreeSet<&String> = found.iter().filter(|name| name.starts_with("good")).collect();
        if let Some(missing) = wanted.difference(&found).next() {
            return Some(format!("{engine} lacks {missing}"));
        }
        if let Some(more) = found.difference(&wanted).next() {
            return Some(format!("{engine} still has {more}"));
        }
    }
    None
}

/// Waits until both engines have exactly the expected rules, and returns the time since `start`.
fn until_in_kernel(
    (lab, maps, node): (&Lab, &Maps, &Agent),
    expected: &Expected,
    start: Instant,
) -> Result<Duration> {
    let mut last = String::new();
    eventually(patience(DEADLINE * 2), || {
        let begun = start.elapsed();
        match in_kernel(lab, maps).map(|found| difference(&found, expected)) {
            Ok(None) => return Some(begun),
            Ok(Some(difference)) => last = difference,
            Err(error) => last = format!("{error:#}"),
        }
        None
    })
    .with_context(|| format!("{last}\n{}", tail(&node.log())))
}

fn tail(log: &str) -> String {
    log.lines().rev().take(40).map(|line| line.chars().take(300).collect::<String>() + "\n").collect()
}

#[test]
fn hostile_policies_keep_no_other_from_taking_effect() -> Result<()> {
    let times = crowd(100, 20)?;
    ensure!(times.iter().all(|time| *time < patience(DEADLINE)), "{times:?}");
    Ok(())
}

/// `BRIDGE_AGENT=target/release/bridge-agent cargo test -p bridge-tests --test kubernetes a_thousand_policies -- --ignored
/// --nocapture`
#[test]
#[ignore = "measures; of use with a release build of the agent only"]
fn a_thousand_policies_a_tenth_hostile_take_effect_within_a_second() -> Result<()> {
    let times = crowd(1000, 60)?;
    ensure!(times.iter().all(|time| *time <= patience(LIMIT)), "{times:?}");
    Ok(())
}

/// Creates `count` policies, of which a tenth is hostile, and makes `changes`, each along with a hostile one. Returns the
/// time that each took until both engines had it, ascending; in between, all honest policies are active.
fn crowd(count: usize, changes: usize) -> Result<Vec<Duration>> {
    let (lab, server) = cluster()?;
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", lab.c1())?;
    lab.a().netns.ip("route add 10.200.1.0/24 via 192.168.31.17")?;
    let config = node_config(&server, "").replace("engines: [ebpf]", "engines: [ebpf, iptables]");
    let node = Agent::start(&lab, lab.b(), &config)?;
    until_current(&node)?;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut expected = Expected::new();
    let policies: Vec<Value> = (0..count)
        .map(|number| {
            if number % HOSTILE == 0 {
                return hostile(&mut dice, &format!("evil{number}"));
            }
            let name = format!("good{number}");
            let (policy, names) = good(&mut dice, &name, 0);
            expected.insert(name, names);
            policy
        })
        .collect();
    let start = Instant::now();
    let created: Result<()> = thread::scope(|scope| {
        let parts = policies.chunks(policies.len().div_ceil(CLIENTS));
        let clients: Vec<_> = parts
            .map(|part| scope.spawn(|| part.iter().try_for_each(|policy| create(&server, policy))))
            .collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| Ok(())))
    });
    created?;
    println!("{count} policies created in {:?}", start.elapsed());
    let maps = Maps::open(&Pins::new(node.pins()))?;
    let all = (&lab, &maps, &node);
    let took = until_in_kernel(all, &expected, Instant::now())?;
    println!("the last one active {took:?} after the answer; {} rules", expected.values().flatten().count());

    let to = lab.c1().at(Family::V4, PROBED);
    let _echo = tcp::Server::echo(&lab.c1().netns, to)?;
    let probe = json!([{"name": "in", "direction": "inbound", "protocol": "tcp", "ports": [PROBED]}]);
    let mut times = Vec::new();
    for change in 1..=changes {
        // A hostile change comes along with every one.
        let evil = format!("evil{}", dice.random_range(0..count / HOSTILE) * HOSTILE);
        replace(&server, &hostile(&mut dice, &evil))?;
        let name = format!("good{}", dice.random_range(0..count));
        if change % 20 == 0 {
            // By packets, too.
            create(&server, &object("probe", &probe))?;
            let start = Instant::now();
            eventually(DEADLINE, || open(lab.a(), to).ok()).with_context(|| tail(&node.log()))?;
            times.push(start.elapsed());
            server.delete(&format!("{POLICIES}/probe"))?;
            let start = Instant::now();
            eventually(DEADLINE, || is_refused(lab.a(), to).ok().filter(|refused| *refused))
                .with_context(|| tail(&node.log()))?;
            times.push(start.elapsed());
            continue;
        }
        if expected.contains_key(&name) && dice.random_range(0..3) == 0 {
            server.delete(&format!("{POLICIES}/{name}"))?;
            expected.remove(&name);
        } else {
            let (policy, names) = good(&mut dice, &name, change);
            if expected.insert(name, names).is_some() {
                replace(&server, &policy)?;
            } else {
                create(&server, &policy)?;
            }
        }
        times.push(until_in_kernel(all, &expected, Instant::now())?);
    }
    times.sort_unstable();
    let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{} changes active after {median:?} (median), {most:?} (most)", times.len());
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid()))?;
    let memory = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!("memory of the agent: {memory}");
    until_current(&node)?;
    ensure!(node.run(&["status", "--ready"]).is_ok(), "{}", tail(&node.log()));
    Ok(times)
}
