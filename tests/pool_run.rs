//! The port pool of a real agent: started, killed, changed and taken down with it.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{datapath::Pins, model::PortRange, pool::programs::PROGRAMS};
use bridge_lab::{
    agent::{Agent, program},
    lab::{Host, Lab},
    pool::{end, hold, in_cgroup, line, output, ports, python, serve},
    wait::eventually,
};
use serde_json::Value;

const PORTS: PortRange = PortRange { first: 61001, last: 61040 };
const SOON: Duration = Duration::from_secs(20);

/// An agent's configuration; `pool` is what is below `portPool`.
fn config(role: &str, pool: &[&str]) -> String {
    let mut yaml =
        format!("role: {role}\nnetworks: {{pods: [10.200.0.0/16], external: [192.168.31.0/24]}}\n");
    if role == "node" {
        yaml += "enforcement: {engines: [ebpf]}\nrules:\n  - {name: from-the-pool, direction: outbound, protocol: tcp, ports: [\"1-65535\"], \
                 sourcePorts: [\"61001-61040\"], action: allow}\n";
    }
    yaml += "persistence: {save: never}\n";
    yaml + &pool.iter().map(|key| format!("  {key}\n")).fold("portPool:\n".to_owned(), |all, key| all + &key)
}

/// The control group as the configuration has it, and its directory.
fn cgroup(lab: &Lab) -> Result<(String, std::path::PathBuf)> {
    let directory = lab.cgroup("clients")?;
    let mount = bridge_agent::pool::attach::mount_point()?;
    let key = format!("transparent: {{cgroups: [/{}]}}", directory.strip_prefix(&mount)?.display());
    Ok((key, directory))
}

fn status(agent: &Agent) -> Result<Value> {
    Ok(serde_json::from_str(&agent.run(&["status", "--json"])?)?)
}

fn pool(agent: &Agent) -> Result<Value> {
    Ok(status(agent)?["agent"]["pool"].clone())
}

fn reserved(host: &Host) -> Result<String> {
    let text = host.netns.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports"))?;
    Ok(text.trim().to_owned())
}

/// What hangs on a control group, as `bpftool` sees it.
fn hooks(cgroup: &Path) -> Result<usize> {
    let output = Command::new("bpftool").args(["--json", "cgroup", "show"]).arg(cgroup).output()?;
    ensure!(output.status.success(), "{output:?}");
    let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(list.as_array().map_or(0, Vec::len))
}

/// The name of what came of one connect from the control group.
fn connect(client: &Host, cgroup: &Path, to: SocketAddr) -> Result<String> {
    let script = format!(
        "import errno, socket\ntry: print(socket.create_connection(('{}', {}), 10).getsockname()[1])\nexcept OSError as e: \
         print(errno.errorcode[e.errno])",
        to.ip(),
        to.port()
    );
    Ok(output(&client.netns, in_cgroup(cgroup, python(&script)), SOON)?.trim().to_owned())
}

#[test]
fn what_is_held_outlives_kill_and_restart_and_down_leaves_no_trace() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, clients) = cgroup(&lab)?;
    lab.b().netns.set_sysctl("ipv4/ip_local_reserved_ports", "8080")?;
    let yaml = config("node", &["ports: [\"61001-61040\"]", "bindUdp: false", "quota: 40", &transparent]);
    let mut agent = Agent::start(&lab, lab.b(), &yaml)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    ensure!(reserved(lab.b())? == "8080,61001-61040", "{}", reserved(lab.b())?);

    let mut first = hold(&clients, &lab.c1().netns, to, 15)?;
    let held = ports(&line(&mut first)?)?;
    ensure!(held.iter().all(|port| PORTS.contains(*port)), "{held:?}");
    // A lease of the agent is one of the same pool.
    let lease = agent.run(&["ports", "acquire", &to.to_string(), "--for", "1h"])?;
    let leased: u16 = lease.split(' ').next().unwrap_or_default().parse().with_context(|| lease.clone())?;
    ensure!(PORTS.contains(leased) && !held.contains(&leased), "{leased} {held:?}");
    let figures = pool(&agent)?;
    ensure!(figures["mode"] == "kernel" && figures["held"] == 16 && figures["available"] == 40, "{figures}");
    ensure!(figures["busiest"] == 16, "{figures}");
    let text = agent.run(&["status"])?;
    ensure!(
        text.contains("port pool    in the kernel, 40 ports (61001-61040), 16 held, 1 of them leased"),
        "{text}"
    );
    let elsewhere = SocketAddr::new(lab.a().v4.into(), 8081).to_string();
    agent.run(&["ports", "acquire", &elsewhere, "--for", "1h"])?;
    ensure!(pool(&agent)?["held"] == 17 && pool(&agent)?["busiest"] == 16, "{}", pool(&agent)?);

    agent.kill()?;
    let mut second = hold(&clients, &lab.c2().netns, to, 10)?;
    let more = ports(&line(&mut second)?)?;
    ensure!(more.is_disjoint(&held) && more.iter().all(|port| PORTS.contains(*port)), "{more:?} {held:?}");
    agent.restart()?;
    ensure!(pool(&agent)?["held"] == 25, "{}", pool(&agent)?);
    // All but the one that was leased: leases end with the agent, and that port rests with who had it.
    let mut third = hold(&clients, &lab.c1().netns, to, 14)?;
    let rest = ports(&line(&mut third)?)?;
    ensure!(rest.is_disjoint(&held) && rest.is_disjoint(&more), "{rest:?}");
    ensure!(connect(lab.c1(), &clients, to)? == "EADDRNOTAVAIL");

    // The agent runs: it would go on with half of it.
    let refused = lab.b().netns.output(agent.command(&["down"])).unwrap_err().to_string();
    ensure!(refused.contains("pid"), "{refused}");
    ensure!(agent.stop()?.success());
    agent.run(&["down"])?;
    ensure!(reserved(lab.b())? == "8080", "{}", reserved(lab.b())?);
    ensure!(hooks(&clients)? == 0, "{} hooks are left", hooks(&clients)?);
    ensure!(!agent.pins().exists(), "pins are left");
    for holder in [first, second, third] {
        end(holder)?;
    }
    Ok(())
}

#[test]
fn a_pool_whose_pins_somebody_removes_goes_on_and_is_pinned_again() -> Result<()> {
    fn pins(below: &Path) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(below).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.flat_map(|path| if path.is_dir() { pins(&path) } else { BTreeSet::from([path]) }).collect()
    }
    let lab = Lab::builder().build()?;
    let (transparent, clients) = cgroup(&lab)?;
    let yaml = config("node", &["ports: [\"61001-61040\"]", "bindUdp: false", &transparent]);
    let mut agent = Agent::start(&lab, lab.b(), &yaml)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let mut first = hold(&clients, &lab.c1().netns, to, 15)?;
    let held = ports(&line(&mut first)?)?;
    let from_the_pool = |when: &str| {
        let port = connect(lab.c1(), &clients, to)?;
        ensure!(port.parse().is_ok_and(|port| PORTS.contains(port)), "{when}: {port}");
        Ok(())
    };
    let (all, hooked) = (pins(agent.pins()), hooks(&clients)?);
    ensure!(all.len() > 17 && hooked > 0, "{all:?}");

    fs::remove_dir_all(agent.pins())?;
    let fewer =
        eventually(Duration::from_secs(1), || hooks(&clients).is_ok_and(|now| now != hooked).then_some(()));
    ensure!(fewer.is_none(), "{} hooks of {hooked} are left", hooks(&clients)?);
    from_the_pool("without pins")?;
    eventually(SOON, || (pins(agent.pins()) == all).then_some(())).with_context(|| {
        format!("{:?}\n{}", all.difference(&pins(agent.pins())).collect::<Vec<_>>(), agent.log())
    })?;

    agent.kill()?;
    from_the_pool("without the agent")?;
    agent.restart()?;
    ensure!(pool(&agent)?["held"] == 15, "{}", pool(&agent)?);
    from_the_pool("with the next agent")?;
    let mut second = hold(&clients, &lab.c2().netns, to, 10)?;
    ensure!(ports(&line(&mut second)?)?.is_disjoint(&held));
    // A pool that is wanted no more is not kept by anything.
    agent.reload(&config("node", &[]).replace("portPool:\n", ""))?;
    eventually(SOON, || (hooks(&clients).ok()? == 0).then_some(())).context("hooks are left")?;
    ensure!(pool(&agent)?.is_null(), "{}", pool(&agent)?);
    for holder in [first, second] {
        end(holder)?;
    }
    agent.stop()?;
    agent.run(&["down"])?;
    ensure!(!agent.pins().exists(), "pins are left");
    Ok(())
}

#[test]
fn a_reload_changes_the_pool_under_what_is_held() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, clients) = cgroup(&lab)?;
    let (client, server) = (lab.a(), lab.c1());
    let wide = ["ports: [\"61001-61040\"]", "bindUdp: false", transparent.as_str()];
    let mut agent = Agent::start(&lab, client, &config("host", &wide))?;
    let _server = serve(&server.netns, 8080)?;
    let to = SocketAddr::new(server.v4.into(), 8080);
    let mut first = hold(&clients, &client.netns, to, 39)?;
    let held = ports(&line(&mut first)?)?;
    let free = (PORTS.first..=PORTS.last).find(|port| !held.contains(port)).context("a free port")?;

    // Fewer ports: nothing is cut, and what leaves is not given out again, not even to who had it.
    let narrow = format!("ports: [\"{free}-61050\"]");
    agent.reload(&config("host", &[&narrow, "bindUdp: false", &transparent]))?;
    ensure!(pool(&agent)?["held"] == 39, "{}", status(&agent)?);
    ensure!(pool(&agent)?["ports"] == serde_json::json!([format!("{free}-61050")]), "{}", agent.log());
    let is_new = |port: &str| port.parse::<u16>().is_ok_and(|port| (free..=61050).contains(&port));
    let port = connect(client, &clients, to)?;
    ensure!(is_new(&port), "{port}");
    end(first)?;
    let settled = || pool(&agent).ok().filter(|pool| pool["held"] == 0);
    eventually(SOON, settled).context("ports are still held")?;
    for _ in 0..60 {
        let port = connect(client, &clients, to)?;
        ensure!(is_new(&port), "{port}");
    }
    // And back again: the sweep finds what is new for a destination that is in use.
    agent.reload(&config("host", &wide))?;
    let all = || {
        let mut holder = hold(&clients, &client.netns, to, 40).ok()?;
        let seen = line(&mut holder).ok()?;
        end(holder).ok()?;
        ports(&seen).ok().filter(|seen| seen.len() == 40)
    };
    let seen = eventually(SOON, all).context("the ports did not come back")?;
    ensure!(seen == (PORTS.first..=PORTS.last).collect::<BTreeSet<_>>(), "{seen:?}");

    // An impossible change is refused, and the former settings stay active.
    let missing = "transparent: {cgroups: [/there-is-no-such-group]}";
    for (bad, why) in [
        (["ports: [\"61001-61040\"]", missing], "no control group"),
        (["ports: [\"30001-61040\"]", transparent.as_str()], "bridge-agent down"),
    ] {
        agent.reload(&config("host", &bad))?;
        let error = status(&agent)?["agent"]["reloads"]["last"]["error"].to_string();
        ensure!(error.contains(why), "{error}");
        ensure!(pool(&agent)?["ports"] == serde_json::json!(["61001-61040"]), "{}", pool(&agent)?);
        ensure!(hooks(&clients)? == PROGRAMS.len(), "{} hooks", hooks(&clients)?);
    }
    // Without its section it goes, with all that belongs to it.
    let without = config("host", &[]).replace("portPool:\n", "");
    agent.reload(&without)?;
    ensure!(pool(&agent)?.is_null() && reserved(client)?.is_empty() && hooks(&clients)? == 0);
    ensure!(agent.run(&["ports", "list"]).unwrap_err().to_string().contains("no port pool"));
    let port = connect(client, &clients, to)?;
    ensure!(!PORTS.contains(port.parse()?), "{port}");
    Ok(())
}

#[test]
fn the_pool_does_not_depend_on_how_rules_are_enforced() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, clients) = cgroup(&lab)?;
    let yaml = config("node", &["ports: [\"61001-61040\"]", "bindUdp: false", &transparent]);
    let without_ebpf = yaml.replace("engines: [ebpf]", "engines: [iptables]");
    let mut agent = Agent::start(&lab, lab.b(), &yaml)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let mut first = hold(&clients, &lab.c1().netns, to, 30)?;
    let held = ports(&line(&mut first)?)?;
    let others_get_the_rest = |agent: &Agent| -> Result<()> {
        ensure!(
            pool(agent)?["held"] == 30 && hooks(&clients)? == PROGRAMS.len(),
            "{}, {}",
            pool(agent)?,
            hooks(&clients)?
        );
        let mut second = hold(&clients, &lab.c1().netns, to, 10)?;
        ensure!(ports(&line(&mut second)?)?.is_disjoint(&held));
        end(second)?;
        eventually(SOON, || pool(agent).ok().filter(|pool| pool["held"] == 30)).context("not given back")?;
        Ok(())
    };
    // Taken down by a reload, then by a start that finds it; the pool stays.
    agent.reload(&without_ebpf)?;
    ensure!(status(&agent)?["agent"]["enforcement"].is_null());
    others_get_the_rest(&agent)?;
    agent.reload(&yaml)?;
    agent.stop()?;
    fs::write(
        agent.config(),
        fs::read_to_string(agent.config())?.replace("engines: [ebpf]", "engines: [iptables]"),
    )?;
    agent.restart()?;
    others_get_the_rest(&agent)?;
    ensure!(agent.stop()?.success());
    agent.run(&["down"])?;
    ensure!(hooks(&clients)? == 0 && !agent.pins().exists());
    end(first)
}

#[test]
fn a_pool_that_cannot_be_fails_the_start_and_leaves_nothing() -> Result<()> {
    let lab = Lab::builder().build()?;
    let ports = "ports: [\"61001-61040\"]";
    for (bad, why) in [
        ("transparent: {cgroups: [/there-is-no-such-group]}", "there is no control group"),
        ("exclude: [\"61002-61040\"]", "no port is left in the pool"),
    ] {
        // The one port that is left belongs to another program.
        lab.b().netns.set_sysctl("ipv4/ip_local_reserved_ports", "61001")?;
        let error = Agent::start(&lab, lab.b(), &config("node", &[ports, bad])).unwrap_err().to_string();
        ensure!(error.contains(why), "{error}");
        ensure!(reserved(lab.b())? == "61001", "{}", reserved(lab.b())?);
        let pins = lab.pin_directory()?.join(&lab.b().name);
        let left: Vec<_> =
            fs::read_dir(&pins).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        ensure!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

/// Runs an agent that ends with an error, and returns that and its log.
fn fails_to_start(lab: &Lab, pins: &Path) -> Result<String> {
    let (file, socket) = (lab.directory().join("second.yaml"), lab.directory().join("second.sock"));
    let yaml = config("node", &["ports: [\"61001-61040\"]"]);
    fs::write(&file, format!("{yaml}api: {{socket: {}}}\n", socket.display()))?;
    let mut agent = Command::new(program()?);
    agent.args(["run", "--config"]).arg(&file).arg("--pin-root").arg(pins);
    Ok(lab.b().netns.output(agent).unwrap_err().to_string())
}

/// Whether a pool is pinned below `root`.
fn has_pool(root: &Path) -> Result<bool> {
    let names = fs::read_dir(root)
        .context("the pins")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.into_iter().any(|name| name.starts_with("pool-")))
}

#[test]
fn an_agent_beside_another_one_begins_no_pool() -> Result<()> {
    let lab = Lab::builder().build()?;
    let first = Agent::start(&lab, lab.b(), &config("node", &[]).replace("portPool:\n", ""))?;
    let error = fails_to_start(&lab, first.pins())?;
    ensure!(error.contains(&format!("an agent (pid {}) already works", first.pid())), "{error}");
    ensure!(!error.contains("is left"), "{error}");
    ensure!(reserved(lab.b())?.is_empty(), "{}", reserved(lab.b())?);
    ensure!(pool(&first)?.is_null());
    ensure!(!has_pool(first.pins())?);
    Ok(())
}

#[test]
fn a_start_that_fails_after_the_pool_has_begun_takes_it_away() -> Result<()> {
    let lab = Lab::builder().build()?;
    let root = lab.pin_directory()?.join("foreign");
    // The packet path, which comes after the pool, meets a map that is none of its own.
    let foreign = Pins::new(&root).map("settings");
    fs::create_dir_all(foreign.parent().context("a folder")?)?;
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "create"]).arg(&foreign);
    bpftool.args(["type", "hash", "key", "4", "value", "8", "entries", "3", "name", "settings"]);
    ensure!(bpftool.status()?.success());
    let error = fails_to_start(&lab, &root)?;
    ensure!(error.contains("its map type is 1, expected 2"), "{error}");
    ensure!(error.contains("port pool withdrawn") && !error.contains("is left"), "{error}");
    ensure!(reserved(lab.b())?.is_empty(), "{}", reserved(lab.b())?);
    let left: Vec<_> =
        fs::read_dir(&root)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    ensure!(!left.iter().any(|name| name.starts_with("pool-")), "{left:?}");
    Ok(())
}

/// The queue of the agent's socket is one for all clients: connections that a client may not have must not stay in it.
#[test]
fn a_lease_does_not_wait_for_a_pod_that_sends_half_requests() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, clients) = cgroup(&lab)?;
    let agent = Agent::start(&lab, lab.b(), &config("node", &["ports: [\"61001-61040\"]", &transparent]))?;
    // From a new network namespace every 100 connections.
    let script = format!(
        "import ctypes, itertools, resource, socket\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\nheld = []\n\
         for n in itertools.count():\n    if n % 100 == 0: assert ctypes.CDLL(None).unshare(0x40000000) == 0\n    \
         s = socket.socket(socket.AF_UNIX)\n    s.setblocking(False)\n    \
         code(lambda: (s.connect('{socket}'), s.send(b'POST /v1/leases HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 99\\r\\n\\r\\n{{')))\n    \
         held.append(s)\n    if n == 3000: print('ready', flush=True)\n    if n > 2000: held.pop(0).close()",
        socket = agent.socket().display()
    );
    let mut command = in_cgroup(&clients, python(&script));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut storm = lab.c1().netns.spawn_command(command)?;
    ensure!(line(&mut storm)? == "ready");
    let body = r#"{"destination":"192.168.31.67:443"}"#;
    let script = format!(
        "import json, socket, time\ntimes = []\nfor _ in range(10):\n    start = time.monotonic()\n    s = socket.socket(socket.AF_UNIX)\n    \
         s.connect('{}')\n    s.sendall(b'POST /v1/leases HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: {}\\r\\n\\r\\n{body}')\n    \
         assert s.recv(4096).startswith(b'HTTP/1.1 201')\n    times.append(time.monotonic() - start)\n    s.close()\nprint(json.dumps(times))",
        agent.socket().display(),
        body.len()
    );
    let mut times: Vec<f64> = serde_json::from_str(&output(&lab.c2().netns, python(&script), SOON * 3)?)?;
    storm.kill()?;
    times.sort_by(f64::total_cmp);
    ensure!(times[times.len() / 2] < 1.0, "leases take {times:.3?} s");
    Ok(())
}

#[test]
fn the_masquerade_table_comes_and_goes_with_its_key() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, _) = cgroup(&lab)?;
    let ports = "ports: [\"61001-61040\"]";
    let table = || {
        let mut nft = Command::new("nft");
        nft.args(["list", "ruleset"]).stdout(Stdio::piped());
        lab.b().netns.output(nft)
    };
    let mut agent = Agent::start(&lab, lab.b(), &config("node", &[ports, &transparent, "masquerade: true"]))?;
    ensure!(table()?.contains("masquerade to :61001-61040"), "{}", table()?);
    agent.reload(&config("node", &[ports, &transparent]))?;
    ensure!(!table()?.contains("masquerade"), "{}", table()?);
    agent.reload(&config("node", &[ports, &transparent, "masquerade: true"]))?;
    agent.stop()?;
    agent.run(&["down"])?;
    ensure!(!table()?.contains("masquerade"), "{}", table()?);
    Ok(())
}

#[test]
fn the_masquerade_table_is_put_back_within_a_second() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (transparent, _) = cgroup(&lab)?;
    let nft = |arguments: &[&str]| {
        let mut nft = Command::new("nft");
        nft.args(arguments).stdout(Stdio::piped());
        lab.b().netns.output(nft)
    };
    let table = || nft(&["list", "table", "inet", "bridge-pool"]);
    let masquerade = ["ports: [\"61001-61040\"]", transparent.as_str(), "masquerade: true"];
    let mut agent = Agent::start(&lab, lab.b(), &config("node", &masquerade))?;
    let whole = table()?;
    let damages: [(&str, &[&str]); 5] = [
        ("every table", &["flush", "ruleset"]),
        ("the table", &["delete", "table", "inet", "bridge-pool"]),
        ("its rules", &["flush", "chain", "inet", "bridge-pool", "postrouting"]),
        ("a rule before the others", &["insert", "rule", "inet", "bridge-pool", "postrouting", "accept"]),
        ("its effect", &["add", "table", "inet", "bridge-pool", "{ flags dormant; }"]),
    ];
    for (repairs, (damage, arguments)) in (1..).zip(damages) {
        nft(arguments)?;
        ensure!(table().ok().as_ref() != Some(&whole), "{damage} is as before");
        eventually(Duration::from_secs(1), || (table().ok()? == whole).then_some(()))
            .with_context(|| format!("{damage}: {:?}", table()))?;
        let counted = eventually(SOON, || (pool(&agent).ok()?["masqueradeRepairs"] == repairs).then_some(()));
        counted.with_context(|| format!("{damage}: {}", pool(&agent).unwrap_or_default()))?;
    }
    ensure!(agent.metrics()?.contains("bridge_pool_masquerade_repairs_total 5"), "{}", agent.metrics()?);
    // A table of another program is none of its business, and neither is its own after the key is gone.
    nft(&["add", "table", "inet", "other"])?;
    agent.reload(&config("node", &masquerade[..2]))?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(table().is_err() && pool(&agent)?["masqueradeRepairs"] == 5, "{}", pool(&agent)?);
    Ok(())
}
