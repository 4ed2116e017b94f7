//! `bridge-agent explain` about a process and about the routes of a LAN host, compared with real connections. Needs root.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::model::PortRange;
use bridge_lab::{
    agent::Agent,
    lab::{Family, Host, Lab, Process},
    pool::{end, hold, in_cgroup, line, output, python, serve},
    traffic::tcp,
    wait::eventually,
};
use serde_json::Value;

const PORTS: PortRange = PortRange { first: 61001, last: 61004 };
const SOON: Duration = Duration::from_secs(20);

fn explain(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[&["explain", "--json"], arguments].concat())?;
    serde_json::from_str(&text).context(text)
}

fn stage<'a>(explanation: &'a Value, name: &str) -> Result<(&'a str, &'a str, &'a str)> {
    let stages = explanation["stages"].as_array().context("stages")?;
    let stage = stages.iter().find(|stage| stage["name"] == name);
    let stage = stage.with_context(|| format!("no stage {name}: {explanation:#}"))?;
    let text = |key: &str| stage[key].as_str().unwrap_or_default();
    Ok((text("outcome"), text("seen"), text("why")))
}

/// Checks outcome and text of a stage.
#[track_caller]
fn expect(explanation: &Value, name: &str, outcome: &str, parts: &[&str]) -> Result<()> {
    let (found, seen, why) = stage(explanation, name)?;
    let all = format!("{seen} ({why})");
    ensure!(
        found == outcome && parts.iter().all(|part| all.contains(part)),
        "{name}: {found}, {all}: expected {outcome}, {parts:?}\n{explanation:#}"
    );
    Ok(())
}

/// A program in a control group that waits.
fn idle(client: &Host, cgroup: &Path) -> Result<Process> {
    let mut command = in_cgroup(cgroup, python("import sys; print('ready', flush=True); sys.stdin.read()"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = client.netns.spawn_command(command)?;
    line(&mut process)?;
    Ok(process)
}

/// The source port of a connect from a control group, or the name of its error.
fn connect(client: &Host, cgroup: &Path, to: SocketAddr) -> Result<String> {
    let script = format!(
        "import errno, socket\ntry: print(socket.create_connection(('{}', {}), 2).getsockname()[1])\n\
         except socket.timeout: print('ETIMEDOUT')\nexcept OSError as e: print(errno.errorcode[e.errno])",
        to.ip(),
        to.port()
    );
    Ok(output(&client.netns, in_cgroup(cgroup, python(&script)), SOON)?.trim().to_owned())
}

struct Groups {
    hooked: PathBuf,
    other: PathBuf,
    /// The hooked one, by its path below the mount.
    path: String,
}

impl Groups {
    fn new(lab: &Lab) -> Result<Self> {
        let mount = bridge_agent::pool::attach::mount_point()?;
        let (hooked, other) = (lab.cgroup("clients")?, lab.cgroup("others")?);
        let path = format!("/{}", hooked.strip_prefix(&mount)?.display());
        Ok(Self { hooked, other, path })
    }
}

fn node(path: &str) -> String {
    format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24, 'fd20:1::/64'], external: [192.168.31.0/24, 'fd31::/64']}}\n\
         enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: ['cali*']}}}}\npersistence: {{save: never}}\n\
         portPool: {{ports: 61001-61004, bindUdp: false, destinations: [192.168.31.67/32, 'fd31::/64'], transparent: {{cgroups: \
         [{path}]}}}}\n\
         rules:\n  - {{name: pooled, direction: outbound, protocol: tcp, ports: [8443], sourcePorts: 61001-61004}}\n"
    )
}

/// The port and the verdict that `explain` names for a process are those that its connect has.
#[test]
fn the_port_of_a_process_is_explained_as_its_connect_has_it() -> Result<()> {
    let lab = Lab::builder().build()?;
    let groups = Groups::new(&lab)?;
    let agent = Agent::start(&lab, lab.b(), &node(&groups.path))?;
    let (a, c1) = (lab.a(), lab.c1());
    let _server = serve(&a.netns, 8443)?;
    let to = a.at(Family::V4, 8443);
    let inside = idle(c1, &groups.hooked)?;
    let outside = idle(c1, &groups.other)?;

    // Hooked: FROM is known from the process.
    let hooked = explain(&agent, &["--pid", &inside.id().to_string(), &to.to_string()])?;
    assert_eq!((&hooked["verdict"], &hooked["rule"]), (&"allow".into(), &"pooled".into()), "{hooked:#}");
    assert_eq!(hooked["question"]["source"], c1.v4.to_string());
    expect(
        &hooked,
        "pool",
        "ok",
        &["one of 61001-61004", "4 of 4 are free", "(python", "is hooked", &groups.path],
    )?;
    expect(&hooked, "source port", "ok", &["61001-61004"])?;
    let port: u16 = connect(c1, &groups.hooked, to)?.parse()?;
    ensure!(PORTS.contains(port), "{port}");
    let v6 = explain(&agent, &["--pid", &inside.id().to_string(), &a.at(Family::V6, 8443).to_string()])?;
    assert_eq!(
        (&v6["verdict"], v6["question"]["source"].as_str()),
        (&"allow".into(), Some(&*c1.v6.to_string()))
    );

    // A port that the program binds itself, outside the pool: `strict` refuses the connect.
    let bound =
        explain(&agent, &["--pid", &inside.id().to_string(), "--source-port", "40000", &to.to_string()])?;
    expect(&bound, "pool", "deny", &["40000 is no port of the pool", "portPool.strict"])?;
    let script = format!(
        "import errno, socket\ns = socket.socket(); s.bind(('', 40000))\ntry: s.connect(('{}', {})); print('connected')\n\
         except OSError as e: print(errno.errorcode[e.errno])",
        to.ip(),
        to.port()
    );
    let real = output(&c1.netns, in_cgroup(&groups.hooked, python(&script)), SOON)?;
    ensure!(real.trim() == "EADDRNOTAVAIL", "{real}");

    // Not hooked: any port, so no rule allows it.
    let other = explain(&agent, &["--pid", &outside.id().to_string(), &to.to_string()])?;
    assert_eq!(
        (&other["verdict"], &other["nearly"][0]["criterion"]),
        (&"deny".into(), &"sourcePorts".into())
    );
    expect(&other, "pool", "ok", &["no port of the pool", "is not hooked", "bridge-agent exec"])?;
    expect(&other, "source port", "ok", &["32768-60999"])?;
    ensure!(connect(c1, &groups.other, to)?.parse::<u16>().is_err(), "the rule wants a port of the pool");
    // The same by control group, with a child of the hooked one.
    std::fs::create_dir(groups.hooked.join("below"))?;
    let pod = c1.v4.to_string();
    let below = format!("{}/below", groups.path);
    let by_group = explain(&agent, &["--cgroup", &below, &pod, &to.to_string()])?;
    assert_eq!(by_group["verdict"], "allow");
    expect(&by_group, "pool", "ok", &["is hooked by the control group", &groups.path])?;

    // Another destination, and another protocol, are not the pool's.
    let elsewhere = explain(&agent, &["--cgroup", &below, &pod, "192.168.31.17:8443"])?;
    expect(&elsewhere, "pool", "ok", &["192.168.31.17 is no destination of the pool", "192.168.31.67/32"])?;
    let sctp = explain(&agent, &["--cgroup", &below, "--protocol", "sctp", &pod, &to.to_string()])?;
    expect(&sctp, "pool", "ok", &["TCP and UDP, not sctp"])?;

    // Every port is in use: the connect is refused, and so it is explained.
    let mut full = hold(&groups.hooked, &c1.netns, to, 4)?;
    ensure!(line(&mut full)?.starts_with("all"));
    let refused = explain(&agent, &["--pid", &inside.id().to_string(), &to.to_string()])?;
    expect(&refused, "pool", "deny", &["0 of 4 are free", "EADDRNOTAVAIL"])?;
    ensure!(
        refused["summary"].as_str().is_some_and(|text| text.contains("REFUSED by the port pool")),
        "{refused:#}"
    );
    assert_eq!(connect(c1, &groups.hooked, to)?, "EADDRNOTAVAIL");
    end(full)?;

    // `-o wide` adds columns to each table, and `--watch` shows a table as it changes.
    let mut kept = hold(&groups.hooked, &c1.netns, to, 1)?;
    ensure!(line(&mut kept)?.starts_with("all"));
    for (command, column) in
        [(&["rules"][..], "INDEX"), (&["ports", "list"], "LEASE"), (&["flows"], "GENERATION")]
    {
        let header = |more: &[&str]| -> Result<String> {
            let text = agent.run(&[command, more].concat())?;
            Ok(text.lines().next().unwrap_or_default().to_owned())
        };
        let (plain, wide) = (header(&[])?, header(&["-o", "wide"])?);
        ensure!(!plain.contains(column) && wide.contains(column), "{command:?}: {plain} | {wide}");
    }
    end(kept)?;
    let mut watch = agent.command(&["ports", "list", "--watch=100ms"]);
    watch.stdout(Stdio::piped());
    let mut watch = lab.b().netns.spawn_command(watch)?;
    ensure!(line(&mut watch)?.starts_with("PORT"));
    let mut kept = hold(&groups.hooked, &c1.netns, to, 1)?;
    ensure!(line(&mut kept)?.starts_with("all"));
    let shown = eventually(SOON, || line(&mut watch).ok().filter(|row| row.contains(&to.to_string())));
    ensure!(shown.is_some(), "the table does not change");
    end(kept)?;
    drop(watch);

    // Bad input: one line, and the remedy.
    for (arguments, part) in [
        (&["--pid", "4194304", "192.168.31.67:8443"][..], "pgrep"),
        (&["--cgroup", "/none", &pod, "192.168.31.67:8443"], "there is no control group"),
        (&["--cgroup", "/none", "192.168.31.67:8443"], "needs FROM and TO"),
    ] {
        let error = agent.run(&[&["explain"], arguments].concat()).unwrap_err().to_string();
        ensure!(error.contains(part), "{arguments:?}: {error}");
    }
    end(inside)?;
    end(outside)
}

/// Hooks that are gone are not believed in, whatever the configuration says.
#[test]
fn the_kernel_is_asked_whether_a_control_group_is_hooked() -> Result<()> {
    let lab = Lab::builder().build()?;
    let groups = Groups::new(&lab)?;
    let agent = Agent::start(&lab, lab.b(), &node(&groups.path).replace(&groups.path, "/"))?;
    let ask =
        |path: &str| explain(&agent, &["--cgroup", path, &lab.c1().v4.to_string(), "192.168.31.67:8443"]);
    expect(&ask(&groups.path)?, "pool", "ok", &["one of", "hooked by the control group /"])?;
    let mut detached = 0;
    for entry in std::fs::read_dir(bridge_agent::pool::pins::directory(agent.pins()))? {
        let link = entry?.path().join("pool_connect4");
        if link.exists() {
            let done = std::process::Command::new("bpftool")
                .args(["link", "detach", "pinned"])
                .arg(&link)
                .output()?;
            ensure!(done.status.success(), "{done:?}");
            detached += 1;
        }
    }
    ensure!(detached > 0, "no link is pinned");
    expect(&ask(&groups.path)?, "pool", "ok", &["no port of the pool", "is not hooked"])
}

/// A connection that no program sees passes, whatever the rules say.
#[test]
fn without_an_attached_program_nothing_is_denied() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let to = c1.at(Family::V4, 8080);
    let _server = serve(&c1.netns, 8080)?;
    let config = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\nenforcement: {engines: [ebpf], \
                  interfaces: {external: [lan7], internal: ['none*']}}\npersistence: {save: never}\n";
    let mut agent = Agent::start(&lab, lab.b(), config)?;
    for (interfaces, verdict) in [("none*", "unjudged"), ("cali*", "deny")] {
        agent.reload(&config.replace("none*", interfaces))?;
        let found = explain(&agent, &[&a.v4.to_string(), &to.to_string()])?;
        ensure!(found["verdict"] == verdict, "{interfaces}: {found:#}");
        ensure!(reaches(a, to)? == (verdict == "unjudged"), "{interfaces}");
    }
    Ok(())
}

fn host(routes: &str) -> String {
    format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16, 'fd20::/16']}}\nroutes:\n  health: {{interval: 200ms}}\n{routes}"
    )
}

fn reaches(client: &Host, to: SocketAddr) -> Result<bool> {
    Ok(tcp::Client::new(&client.netns).deadline(Duration::from_secs(1)).connect(to)?.reached().is_ok())
}

/// On a LAN host each way in which a pod is not reached is a stage, live and offline, and real connections agree.
#[test]
fn the_routes_of_a_lan_host_are_explained() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let (a, c1) = (lab.a(), lab.c1());
    let to = c1.at(Family::V4, 8080);
    let _server = tcp::Server::echo(&c1.netns, to)?;
    let good = "  static: [{to: 10.200.1.0/24, via: 192.168.31.17}]\n";
    let mut agent = Agent::start(&lab, a, &host(good))?;
    let (lan, pod) = (a.v4.to_string(), c1.v4.to_string());
    let ask =
        |agent: &Agent, more: &[&str]| explain(agent, &[&[lan.as_str(), &to.to_string()][..], more].concat());
    let back = |agent: &Agent| explain(agent, &[pod.as_str(), &format!("{lan}:502")]);
    let installed = eventually(SOON, || {
        let found = ask(&agent, &[]).ok()?;
        expect(&found, "next hop", "ok", &["192.168.31.17 answers"]).ok()?;
        Some(found)
    });
    let found = installed.context("no healthy next hop")?;
    expect(&found, "route", "ok", &["10.200.1.0/24 via 192.168.31.17", "installed", "wanted by static"])?;
    expect(
        &found,
        "kernel route",
        "ok",
        &["via 192.168.31.17 dev eth0", "the next hop of the wanted route"],
    )?;
    ensure!(found["summary"].as_str().is_some_and(|text| text.contains("NOT JUDGED here")), "{found:#}");
    ensure!(reaches(a, to)?);
    expect(&back(&agent)?, "way back: kernel route", "ok", &["via 192.168.31.17 dev eth0"])?;
    expect(&ask(&agent, &["--offline"])?, "next hop", "unknown", &["doctor --only host"])?;

    // A more specific route of another program leads elsewhere.
    a.netns.ip("route add 10.200.1.91/32 via 192.168.31.99")?;
    for more in [&[][..], &["--offline"]] {
        let found = ask(&agent, more)?;
        expect(&found, "kernel route", "deny", &["via 192.168.31.99", "another route comes first"])?;
        ensure!(found["summary"].as_str().is_some_and(|text| text.starts_with("NO WAY to")), "{found:#}");
    }
    let found = back(&agent)?;
    ensure!(found["summary"].as_str().is_some_and(|text| text.starts_with("NO WAY BACK to")), "{found:#}");
    ensure!(!reaches(a, to)?);
    a.netns.ip("route del 10.200.1.91/32 via 192.168.31.99")?;

    // The next hop does not answer.
    agent.reload(&host("  static: [{to: 10.200.1.0/24, via: 192.168.31.250}]\n"))?;
    let down = eventually(SOON, || {
        let found = ask(&agent, &[]).ok()?;
        expect(&found, "next hop", "deny", &["192.168.31.250 does not answer"]).ok()?;
        Some(found)
    });
    down.with_context(|| format!("{:#}", ask(&agent, &[]).unwrap_or_default()))?;
    ensure!(!reaches(a, to)?);

    // Refused: not on-link.
    agent.reload(&host("  static: [{to: 10.200.1.0/24, via: 172.16.5.5}]\n"))?;
    let refused = eventually(SOON, || {
        let found = ask(&agent, &[]).ok()?;
        expect(&found, "route", "deny", &["refused", "not on-link"]).ok()
    });
    refused.with_context(|| format!("{:#}", ask(&agent, &[]).unwrap_or_default()))?;

    // No route at all: the remedy.
    agent.reload(&host("  static: []\n"))?;
    let none = ask(&agent, &[])?;
    expect(&none, "route", "unknown", &["bridge wants no route to 10.200.1.91"])?;
    expect(&none, "kernel route", "deny", &["no route in the kernel's tables"])?;
    ensure!(
        none["remedy"]["config"].as_str().is_some_and(|text| text.contains("10.200.1.91/32")),
        "{none:#}"
    );
    ensure!(!reaches(a, to)?);

    // Two other hosts.
    let strangers = explain(&agent, &["192.168.31.99", &to.to_string()])?;
    ensure!(
        strangers["summary"]
            .as_str()
            .is_some_and(|text| text.contains("neither end is an address of this host")),
        "{strangers:#}"
    );
    Ok(())
}

/// A program of a LAN host: its port of the pool.
#[test]
fn a_program_of_a_lan_host_gets_its_port_explained() -> Result<()> {
    let lab = Lab::builder().build()?;
    let groups = Groups::new(&lab)?;
    let config = format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16]}}\npersistence: {{save: never}}\nportPool: {{ports: 61001-61004, transparent: \
         {{cgroups: [{}]}}}}\n",
        groups.path
    );
    let (a, c1) = (lab.a(), lab.c1());
    let agent = Agent::start(&lab, a, &config)?;
    let _server = serve(&c1.netns, 8080)?;
    let to = c1.at(Family::V4, 8080);
    let (inside, outside) = (idle(a, &groups.hooked)?, idle(a, &groups.other)?);
    let ask = |process: &Process| explain(&agent, &["--pid", &process.id().to_string(), &to.to_string()]);
    let found = ask(&inside)?;
    expect(&found, "pool", "ok", &["one of 61001-61004", "is hooked"])?;
    assert_eq!(found["question"]["source"], a.v4.to_string());
    let port: u16 = connect(a, &groups.hooked, to)?.parse()?;
    ensure!(PORTS.contains(port), "{port}");
    expect(&ask(&outside)?, "pool", "ok", &["no port of the pool", "is not hooked"])?;
    let port: u16 = connect(a, &groups.other, to)?.parse()?;
    ensure!(!PORTS.contains(port), "{port}");
    // Offline, the file alone says it.
    let offline = explain(&agent, &["--offline", "--pid", &inside.id().to_string(), &to.to_string()])?;
    expect(&offline, "pool", "ok", &["one of 61001-61004", &groups.path])?;
    // Without a process it stays open.
    let open = explain(&agent, &[&a.v4.to_string(), &to.to_string()])?;
    expect(&open, "pool", "unknown", &["--pid or --cgroup"])?;
    end(inside)?;
    end(outside)
}
