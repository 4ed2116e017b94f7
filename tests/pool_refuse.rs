//! Refusals are never silent: each one has a counter, an event and a sentence in `status` with the remedy.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    lab::{Host, Lab},
    pool::{in_cgroup, line, output, python, serve},
    wait::eventually,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

const PRELUDE: &str = r"
import errno, socket
def tcp(to, source=None, port=8080):
    s = socket.socket()
    s.settimeout(10)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if source is not None: s.bind(('', source))
    s.connect((to, port))
    return s
def many(n, f):
    held = []
    for _ in range(n):
        try: held.append(f())
        except OSError as e: print(errno.errorcode[e.errno]); return held
    print('none')
    return held
";

/// A reason, the client, the program that provokes it, and the error that it sees.
struct Case<'a> {
    reason: &'static str,
    client: &'a Host,
    hooked: bool,
    script: String,
    error: &'static str,
}

#[test]
fn each_refusal_has_a_counter_an_event_and_a_sentence() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    let cgroup = lab.cgroup("clients")?;
    let mount = bridge_agent::pool::attach::mount_point()?;
    let yaml = |more: &str| {
        format!(
            "role: node\nnetworks: {{pods: [10.200.0.0/16], external: [192.168.31.0/24]}}\nenforcement: {{engines: [ebpf]}}\n\
             rules:\n  - {{name: pool, direction: outbound, protocol: tcp, ports: [\"1-65535\"], sourcePorts: [\"61001-61016\"]}}\n\
             persistence: {{save: never}}\nportPool:\n  ports: [\"61001-61016\"]\n  transparent: {{cgroups: [/{}]}}\n{more}",
            cgroup.strip_prefix(&mount).unwrap_or(&cgroup).display()
        )
    };
    let mut agent = Agent::start(&lab, lab.b(), &yaml(""))?;
    let _servers = [serve(&lab.a().netns, 8080)?, serve(&lab.a2().netns, 8080)?];
    lab.a2().netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    let (a, a2) = (lab.a().v4, lab.a2().v4);
    for pod in lab.pods() {
        pod.netns.ip("route add unreachable 192.168.31.250")?;
    }
    let closed_first = format!(
        "def closed():\n    s = tcp('{a2}')\n    s.shutdown(socket.SHUT_WR)\n    s.recv(1)\n    s.close()\nmany(30, closed)"
    );
    let foreign = "others = []\nfor p in range(61001, 61017):\n    s = socket.socket(); s.bind(('', p)); others.append(s)\n\
                   import os, sys\nopen(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n";
    let case = |reason, client, script: String, error| Case { reason, client, hooked: true, script, error };
    let cases = [
        case("exhausted", lab.c1(), format!("many(17, lambda: tcp('{a}'))"), "EADDRNOTAVAIL"),
        case("outside", lab.c1(), format!("many(1, lambda: tcp('{a}', 40000))"), "EADDRNOTAVAIL"),
        // While it is the only pod: else it has no more than its share.
        case("resting", lab.c1(), closed_first, "EADDRNOTAVAIL"),
        // Warm with the first pod.
        case("taken", lab.c2(), format!("many(1, lambda: tcp('{a}', 61001))"), "EADDRNOTAVAIL"),
        case("kernel", lab.c1(), "many(1, lambda: tcp('192.168.31.250'))".into(), "EHOSTUNREACH"),
        case(
            "protocol",
            lab.c1(),
            "many(1, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136))".into(),
            "EPROTONOSUPPORT",
        ),
        Case {
            reason: "bind",
            client: lab.c2(),
            hooked: false,
            script: format!("{foreign}many(1, lambda: tcp('{a}', None, 8081))"),
            error: "EADDRNOTAVAIL",
        },
    ];
    for (case, json) in cases.iter().zip([false, true].into_iter().cycle()) {
        refuse(&agent, lab.b(), &cgroup, case, json)?;
    }
    // Without room for options the kernel gives a socket no storage.
    let room = fs::read_to_string("/proc/sys/net/core/optmem_max")?;
    lab.c2().netns.set_sysctl("core/optmem_max", "1")?;
    let memory = case("memory", lab.c2(), format!("many(1, lambda: tcp('{a}'))"), "EADDRNOTAVAIL");
    refuse(&agent, lab.b(), &cgroup, &memory, true)?;
    lab.c2().netns.set_sysctl("core/optmem_max", room.trim())?;
    // Two of 16 ports are for sockets without a destination, and one is left to others; the next socket has a port of the kernel's choice.
    let unconnected = format!(
        "def udp():\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.bind(('', 0))\n    s.sendto(b'x', ('{a}', 53))\n    \
         return s\nmany(3, udp)"
    );
    refuse(&agent, lab.b(), &cgroup, &case("share", lab.c1(), unconnected, "EADDRNOTAVAIL"), false)?;
    agent.reload(&yaml("  quota: 4\n"))?;
    let udp = format!(
        "def udp():\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.connect(('{a}', 53))\n    return s\n\
         many(5, udp)"
    );
    refuse(&agent, lab.b(), &cgroup, &case("quota", lab.c2(), udp, "EADDRNOTAVAIL"), true)?;
    // All of them stay in sight.
    let text = agent.run(&["status"])?;
    for case in &cases {
        ensure!(text.contains(&format!("({})", case.reason)), "{}: {text}", case.reason);
    }
    Ok(())
}

/// A pod whose connects are refused all the time: the one refusal of another pod has its event and its sentence.
#[test]
fn a_storm_of_refusals_hides_no_refusal_of_another_pod() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (storms, victims) = (lab.cgroup("storms")?, lab.cgroup("victims")?);
    let mount = bridge_agent::pool::attach::mount_point()?;
    let below = |group: &Path| format!("/{}", group.strip_prefix(&mount).unwrap_or(group).display());
    let yaml = format!(
        "role: node\nnetworks: {{pods: [10.200.0.0/16], external: [192.168.31.0/24]}}\nenforcement: {{engines: [ebpf]}}\n\
         rules:\n  - {{name: pool, direction: outbound, protocol: tcp, ports: [\"1-65535\"], sourcePorts: [\"61001-61016\"]}}\n\
         persistence: {{save: never}}\nportPool:\n  ports: [\"61001-61016\"]\n  transparent: {{cgroups: [\"{}\", \"{}\"]}}\n",
        below(&storms),
        below(&victims)
    );
    let agent = Agent::start(&lab, lab.b(), &yaml)?;
    let to = lab.a().v4;
    // A name that a terminal would act on.
    let outside = |name: &str| {
        format!(
            "{PRELUDE}open('/proc/self/comm', 'w').write('{name}')\ndef outside():\n    try: tcp('{to}', 40000)\n    except OSError: pass\n"
        )
    };
    let storm = format!("{}print('ready', flush=True)\nwhile True: outside()", outside("storm\\x1b[31m"));
    let mut running = Vec::new();
    for _ in 0..2 {
        let mut command = in_cgroup(&storms, python(&storm));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        running.push(lab.c1().netns.spawn_command(command)?);
        ensure!(line(running.last_mut().context("a storm")?)? == "ready");
    }
    let victim = format!("{}outside()", outside("victim"));
    output(&lab.c2().netns, in_cgroup(&victims, python(&victim)), SOON)?;
    let text = eventually(SOON, || agent.run(&["status"]).ok().filter(|text| text.contains("victim (pid ")));
    let text = text.context("no sentence about the victim")?;
    ensure!(text.contains("storm?[31m (pid ") && !text.contains("\u{1b}[31m (pid"), "{text}");
    drop(running);
    Ok(())
}

/// Provokes a refusal and finds its traces, of which the events are asked for as JSON or as sentences.
fn refuse(agent: &Agent, node: &Host, cgroup: &Path, case: &Case<'_>, json: bool) -> Result<()> {
    let Case { reason, client, hooked, script, error } = case;
    let metric = || -> Result<u64> {
        let (text, name) =
            (agent.metrics()?, format!("bridge_pool_refusals_total{{by=\"hook\",reason=\"{reason}\"}} "));
        let value = text.lines().find_map(|line| line.strip_prefix(&name)).context(reason.to_owned())?;
        Ok(value.parse()?)
    };
    let before = metric()?;
    let arguments: &[&str] = if json { &["ports", "watch", "--json"] } else { &["ports", "watch"] };
    let mut watch = agent.command(arguments);
    watch.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut watch = node.netns.spawn_command(watch)?;
    let events: Arc<Mutex<Vec<String>>> = Arc::default();
    let pipe = BufReader::new(watch.child().stdout.take().context("a pipe")?);
    let seen = Arc::clone(&events);
    std::thread::spawn(move || {
        for line in pipe.lines().map_while(Result::ok) {
            seen.lock().expect("a lock").push(line);
        }
    });
    let command = || {
        let mut command = python(&format!("{PRELUDE}{script}"));
        command.arg(cgroup);
        if *hooked { in_cgroup(cgroup, command) } else { command }
    };
    // A watcher that has not subscribed yet sees nothing: try again until it has.
    let event = || {
        let text = output(&client.netns, command(), SOON).ok()?;
        (text.trim() == *error).then_some(())?;
        let event = || {
            let events = events.lock().expect("a lock");
            events.iter().any(|line| line.contains(reason) && line.contains("python3")).then_some(())
        };
        eventually(Duration::from_secs(2), event)
    };
    eventually(SOON, event).with_context(|| format!("{reason}: no event in {:?}", events.lock().unwrap()))?;
    watch.kill()?;
    // JSON is for those who ask for it.
    let is_object = |line: &String| serde_json::from_str::<Value>(line).is_ok_and(|event| event.is_object());
    let lines = events.lock().expect("a lock").clone();
    ensure!(lines.iter().all(|line| is_object(line) == json), "{lines:?}");
    ensure!(metric()? > before, "{reason} is not counted");
    let text = agent.run(&["status"])?;
    let sentence = text.lines().find(|line| line.contains(&format!("({reason})"))).unwrap_or_default();
    ensure!(sentence.contains("python3") && sentence.contains("; remedy: "), "{reason}: {text}");
    let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    ensure!(status["agent"]["pool"]["counters"]["refusals"][reason].as_u64() > Some(0), "{status}");
    Ok(())
}
