//! `bridge-agent explain` on a live node: each way in which a connection does not pass is found with one command. Needs
//! root.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::tcp;
use serde_json::Value;

const CONFIG: &str = r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement: {engines: [ebpf], interfaces: {external: [eth0], internal: ["cali*"]}}
persistence: {save: never}
nodePorts: {range: "30000-32767", allow: [30080]}
rules:
  - {name: api, direction: inbound, protocol: tcp, ports: [40002]}
  - {name: pooled, direction: outbound, protocol: tcp, ports: [8443], sourcePorts: 61001-61100}
"#;

fn explain(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[&["explain", "--json"], arguments].concat())?;
    serde_json::from_str(&text).context(text)
}

fn stage<'a>(explanation: &'a Value, name: &str) -> Result<&'a str> {
    let stages = explanation["stages"].as_array().context("stages")?;
    let stage = stages.iter().find(|stage| stage["name"] == name);
    stage.and_then(|stage| stage["seen"].as_str()).with_context(|| format!("no stage {name}: {explanation}"))
}

fn connects(client: &Host, from: u16, to: std::net::SocketAddr) -> Result<bool> {
    let client = tcp::Client::new(&client.netns);
    let client = if from == 0 { client } else { client.source_port(from) };
    Ok(client.connect(to)?.reached().is_ok())
}

fn iptables(node: &Host, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("iptables");
    command.args(arguments);
    node.netns.output(command).map(drop)
}

#[test]
fn the_cause_of_each_failure_is_found_with_one_command() -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let (lan, pod) = (a.ip(Family::V4).to_string(), c1.ip(Family::V4).to_string());
    let _inside = tcp::Server::echo(&c1.netns, c1.at(Family::V4, 40002))?;
    let _outside = tcp::Server::echo(&a.netns, a.at(Family::V4, 8443))?;
    let show = |arguments: &[&str]| -> Result<()> {
        println!(
            "$ bridge-agent explain {}\n{}",
            arguments.join(" "),
            agent.run(&[&["explain"], arguments].concat())?
        );
        Ok(())
    };

    // All is well.
    ensure!(connects(a, 0, c1.at(Family::V4, 40002))?);
    let good = explain(&agent, &[&lan, &format!("{pod}:40002")])?;
    assert_eq!((&good["verdict"], &good["rule"]), (&"allow".into(), &"api".into()), "{good}");
    assert!(stage(&good, "hook")?.contains("external_ingress on eth0"), "{good}");

    // No rule.
    ensure!(!connects(a, 0, c1.at(Family::V4, 40003))?);
    let to = format!("{pod}:40003");
    let denied = explain(&agent, &[&lan, &to])?;
    assert_eq!((&denied["verdict"], &denied["reason"]), (&"deny".into(), &"no_rule".into()));
    assert_eq!(
        (&denied["nearly"][0]["rule"], &denied["nearly"][0]["criterion"]),
        (&"api".into(), &"ports".into())
    );
    show(&[&lan, &to])?;
    // The same from the event.
    let last = explain(&agent, &["--last-denied"])?;
    assert!(stage(&last, "event")?.contains("no_rule"), "{last}");
    assert_eq!(last["question"]["destinationPort"], 40003);

    // No port of the pool.
    let to = format!("{lan}:8443");
    ensure!(!connects(c1, 0, a.at(Family::V4, 8443))? && connects(c1, 61001, a.at(Family::V4, 8443))?);
    let denied = explain(&agent, &[&pod, &to])?;
    assert_eq!(
        (&denied["verdict"], &denied["nearly"][0]["criterion"]),
        (&"deny".into(), &"sourcePorts".into())
    );
    assert_eq!(denied["nearly"][0]["has"], "61001-61100");
    // No port was given: none is asked for.
    assert_eq!(denied["nearly"][0]["asked"], "32768-60999");
    show(&[&pod, &to])?;

    // A NodePort that is not allowed.
    let node = format!("{}:30081", b.ip(Family::V4));
    let denied = explain(&agent, &[&lan, &node])?;
    assert_eq!((&denied["verdict"], &denied["direction"]), (&"deny".into(), &"nodeport".into()), "{denied}");
    assert!(
        denied["remedy"]["config"].as_str().is_some_and(|text| text.contains("[30080, 30081]")),
        "{denied}"
    );
    show(&[&lan, &node])?;

    // A firewall of others.
    iptables(
        b,
        &[
            "-I",
            "FORWARD",
            "-p",
            "tcp",
            "--dport",
            "40002",
            "-m",
            "comment",
            "--comment",
            "site",
            "-j",
            "DROP",
        ],
    )?;
    let to = format!("{pod}:40002");
    let dropped = explain(&agent, &[&lan, &to])?;
    assert!(stage(&dropped, "firewall")?.starts_with("filter FORWARD -p tcp"), "{dropped}");
    assert!(
        dropped["summary"].as_str().is_some_and(|text| text.contains("DROPPED by another firewall")),
        "{dropped}"
    );
    show(&[&lan, &to])?;
    iptables(b, &["-F", "FORWARD"])?;

    // A masquerade.
    iptables(
        b,
        &["-t", "nat", "-A", "POSTROUTING", "-s", "10.200.1.0/24", "-o", "eth0", "-j", "MASQUERADE"],
    )?;
    let (from, to) = (format!("{pod}:61002"), format!("{lan}:8443"));
    let masqueraded = explain(&agent, &[&from, &to])?;
    assert_eq!(masqueraded["verdict"], "allow");
    assert!(stage(&masqueraded, "masquerade")?.contains("MASQUERADE"), "{masqueraded}");
    let summary = masqueraded["summary"].as_str().unwrap_or_default();
    assert!(
        summary.contains("\nMASQUERADED: the other end sees an address of this node: nat POST"),
        "{summary}"
    );
    show(&[&from, &to])
}

/// Without eBPF the rules in the kernel have the verdict: `explain` walks them, and real packets go the same way.
#[test]
fn the_rules_of_each_packet_filter_are_walked() -> Result<()> {
    for engine in ["iptables", "nftables"] {
        let lab = Lab::builder().conntrack().build()?;
        let config = CONFIG.replace("[ebpf]", &format!("[{engine}]"));
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
        for family in Family::BOTH {
            let lan = a.ip(family).to_string();
            let _servers = [40002, 40003].map(|port| tcp::Server::echo(&c1.netns, c1.at(family, port)));
            let node = std::net::SocketAddr::new(b.ip(family), 30081);
            for (to, passes, by) in [
                (c1.at(family, 40002), true, "api"),
                (c1.at(family, 40003), false, "no-rule"),
                (node, false, "nodeport-denied"),
            ] {
                let explained = explain(&agent, &[&lan, &to.to_string()])?;
                assert_eq!(explained["verdict"], if passes { "allow" } else { "deny" }, "{explained}");
                let seen = stage(&explained, engine)?;
                let word = if passes { "passes" } else { "denied" };
                assert!(seen.starts_with(word) && seen.ends_with(by), "{seen}: {explained}");
                assert!(stage(&explained, "hook")?.contains("no hook of eBPF"), "{explained}");
                if to.port() != 30081 {
                    assert_eq!(connects(a, 0, to)?, passes, "{engine} {to}");
                }
            }
        }
        // From a port outside the pool no rule allows it; from one inside, it does.
        let (pod, to) = (c1.ip(Family::V4), a.at(Family::V4, 8443));
        for (port, passes) in [(40000, false), (61001, true)] {
            let explained = explain(&agent, &[&format!("{pod}:{port}"), &to.to_string()])?;
            assert!(
                stage(&explained, engine)?.starts_with(if passes { "passes" } else { "denied" }),
                "{explained}"
            );
        }
    }
    Ok(())
}

/// Rules may distinguish ports of which the client gets any: then each packet filter is asked for each interval.
#[test]
fn each_packet_filter_is_asked_for_each_interval_of_source_ports() -> Result<()> {
    for engine in ["iptables", "nftables"] {
        let lab = Lab::builder().conntrack().build()?;
        let config =
            CONFIG.replace("[ebpf]", &format!("[ebpf, {engine}]")).replace("61001-61100", "40000-40100");
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let (a, c1) = (lab.a(), lab.c1());
        let to = a.at(Family::V4, 8443);
        let _server = tcp::Server::echo(&a.netns, to)?;
        ensure!(connects(c1, 40100, to)? && !connects(c1, 40101, to)?);
        let explained = explain(&agent, &[&c1.ip(Family::V4).to_string(), &to.to_string()])?;
        assert_eq!(explained["verdict"], "depends", "{explained}");
        let seen = stage(&explained, engine)?;
        ensure!(
            seen.contains("32768-39999: denied by") && seen.contains("40000-40100: passes by pooled"),
            "{seen}"
        );
        assert_eq!(explained["summary"], "DEPENDS on the source port: allowed from 40000-40100");
    }
    Ok(())
}

/// What stops a connection beside bridge: hooks of others, answers, and rules of routing. Each breaks a real connection.
#[test]
fn other_hooks_answers_and_rules_of_routing_are_followed() -> Result<()> {
    const NO_WAY: &str = "\nNOT FORWARDED to";
    const DROPPED: &str = "\nDROPPED by another firewall: ";
    let lab = Lab::builder().conntrack().build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let run = |script: &str| -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-ec", script]);
        b.netns.output(command).map(drop).with_context(|| script.to_owned())
    };
    let servers = Family::BOTH.map(|family| tcp::Server::echo(&c1.netns, c1.at(family, 40002)));
    ensure!(servers.iter().all(Result::is_ok), "no server");
    let nft = |family: &str, device: &str, hook: &str, rule: &str| {
        format!(
            "nft 'add table {family} f; add chain {family} f c {{ type filter hook {hook} {device} priority 0; }}; add rule {family} f c {rule}'"
        )
    };
    let [no_nft, no_iptables] =
        ["nft delete table FAMILY f", "iptables -F; iptables -t raw -F; iptables -t mangle -F"];
    let flush = |family: &str| no_nft.replace("FAMILY", family);
    let route = |rule: &str, before: &str| {
        (Family::V4, format!("{before} ip rule add {rule}"), format!("ip rule del {rule}; {no_iptables}"))
    };
    let drop = "tcp dport 40002 drop";
    let from = format!("from {} to {} blackhole", c1.ip(Family::V4), a.ip(Family::V4));
    let mark = "iptables -t mangle -A PREROUTING -p tcp --dport 40002 -j MARK --set-mark 9;";
    let untracked = "iptables -t raw -A PREROUTING -p tcp --dport 40002 -j CT --notrack; iptables -A FORWARD -m conntrack \
                     --ctstate UNTRACKED -j DROP";
    let stateless = "iptables -A FORWARD -p tcp --sport 40002 -j DROP";
    for ((family, broken, mended), expected) in [
        ((Family::V4, nft("inet", "", "postrouting", drop), flush("inet")), DROPPED),
        ((Family::V6, nft("ip6", "", "postrouting", drop), flush("ip6")), DROPPED),
        ((Family::V4, untracked.to_owned(), no_iptables.to_owned()), DROPPED),
        (
            (Family::V4, stateless.to_owned(), no_iptables.to_owned()),
            "\nDROPPED by another firewall, on the way back: ",
        ),
        (route("ipproto tcp dport 40002 blackhole", ""), NO_WAY),
        (route("fwmark 9 blackhole", mark), NO_WAY),
        (route(&from, ""), "\nNO WAY BACK to"),
        (
            (
                Family::V6,
                "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding".to_owned(),
                "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding".to_owned(),
            ),
            NO_WAY,
        ),
    ] {
        let to = c1.at(family, 40002);
        let question = [a.ip(family).to_string(), to.to_string()];
        let question: Vec<&str> = question.iter().map(String::as_str).collect();
        run(&broken)?;
        let (passes, explained) = (connects(a, 0, to)?, explain(&agent, &question)?);
        run(&mended)?;
        ensure!(!passes, "{broken}: it passes");
        let summary = explained["summary"].as_str().unwrap_or_default();
        ensure!(summary.contains(expected), "{broken}: {explained}");
    }
    // nft shows no device of such a chain before version 1.0.7: the rule is named.
    let (to, lan) = (c1.at(Family::V4, 40002), a.ip(Family::V4).to_string());
    run(&nft("netdev", "device eth0", "ingress", drop))?;
    let (passes, explained) = (connects(a, 0, to)?, explain(&agent, &[&lan, &to.to_string()])?);
    run(&flush("netdev"))?;
    ensure!(
        !passes && stage(&explained, "firewall")?.contains("netdev f c: tcp dport 40002 drop"),
        "{explained}"
    );
    // Chains of the other family, and of a hook that the packet does not come to, are none of its business.
    for (family, hook) in [("ip6", "forward"), ("bridge", "forward"), ("inet", "output")] {
        run(&nft(family, "", hook, "drop"))?;
        let (passes, explained) = (connects(a, 0, to)?, explain(&agent, &[&lan, &to.to_string()])?);
        run(&flush(family))?;
        ensure!(passes, "{family} {hook}");
        assert_eq!(explained["summary"], "ALLOWED by rule api", "{family} {hook}: {explained}");
    }
    Ok(())
}

/// A Service is judged by the endpoints that the node's own nat rules lead to.
#[test]
fn a_service_is_followed_to_its_endpoints() -> Result<()> {
    const RULES: &str = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-SEP-A - [0:0]\n:KUBE-SEP-B - [0:0]\n\
        -A PREROUTING -j KUBE-SERVICES\n-A KUBE-SERVICES -d 172.16.0.10/32 -p tcp -m comment --comment \
        \"plant/plc:modbus cluster IP\" -m tcp --dport 502 -j KUBE-SVC-A\n\
        -A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n-A KUBE-SVC-A -j KUBE-SEP-B\n\
        -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination LAN:8443\n\
        -A KUBE-SEP-B -p tcp -m tcp -j DNAT --to-destination LAN:SECOND\nCOMMIT\n";
    let lab = Lab::builder().conntrack().build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let (lan, pod) = (a.ip(Family::V4).to_string(), c1.ip(Family::V4).to_string());
    let load = |second: &str| -> Result<()> {
        let rules = RULES.replace("LAN", &lan).replace("SECOND", second);
        let file = agent.config().with_file_name("nat.rules");
        std::fs::write(&file, rules)?;
        let mut restore = Command::new("iptables-restore");
        restore.arg(&file);
        b.netns.output(restore).map(drop)
    };
    load("8443")?;
    let _server = tcp::Server::echo(&a.netns, a.at(Family::V4, 8443))?;
    let service = "172.16.0.10:502".parse()?;
    let ask = |port: u16| explain(&agent, &[&format!("{pod}:{port}"), "service/plant/plc"]);
    let allowed = ask(61001)?;
    assert_eq!((&allowed["verdict"], &allowed["rule"]), (&"allow".into(), &"pooled".into()), "{allowed}");
    assert_eq!(stage(&allowed, "service")?, format!("{lan}:8443"));
    ensure!(connects(c1, 61001, service)?);
    let denied = ask(40000)?;
    assert_eq!(denied["verdict"], "deny", "{denied}");
    ensure!(!connects(c1, 40000, service)?);

    // An endpoint that no rule allows: which one is chosen decides.
    load("9443")?;
    let depends = ask(61002)?;
    assert_eq!(depends["verdict"], "depends", "{depends}");
    let summary = depends["summary"].as_str().unwrap_or_default();
    assert!(summary.contains(":8443 allow by pooled") && summary.contains(":9443 deny"), "{summary}");
    let error = agent.run(&["explain", &pod, "service/plant/none"]).unwrap_err().to_string();
    assert!(error.contains("no rule of kube-proxy"), "{error}");
    Ok(())
}

#[test]
fn a_line_of_monitor_and_a_known_flow_are_explained() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let (a, c1) = (lab.a(), lab.c1());
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V6, 40002))?;
    let connection = tcp::Client::new(&a.netns).connect(c1.at(Family::V6, 40002))?.reached()?;
    let (from, to) = (connection.source()?.to_string(), c1.at(Family::V6, 40002).to_string());
    let known = explain(&agent, &[&from, &to])?;
    assert!(stage(&known, "flow")?.starts_with("known"), "{known}");

    let line = format!(
        r#"{{"time":"2026-01-01T00:00:00Z","verdict":"drop","reason":"not_syn","direction":"inbound","protocol":"tcp","source":"{}","sourcePort":1000,"destination":"{}","destinationPort":40002,"rule":null,"interface":"eth0","length":60,"detail":16,"generation":1,"suppressed":0}}"#,
        a.ip(Family::V6),
        c1.ip(Family::V6)
    );
    let explained = explain(&agent, &[&line])?;
    let summary = explained["summary"].as_str().unwrap_or_default();
    assert!(
        summary.contains("was not judged by rules") && summary.contains("ALLOWED by rule api"),
        "{summary}"
    );
    // No rule allows such a packet.
    let elsewhere = explain(&agent, &[&line.replace("40002", "40003")])?;
    assert_eq!((elsewhere["verdict"].as_str(), &elsewhere["remedy"]), (Some("deny"), &Value::Null));
    // The same on standard input.
    let mut command = agent.command(&["explain", "--json", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    std::io::Write::write_all(&mut child.stdin.take().context("stdin")?, line.as_bytes())?;
    let output = child.wait_with_output()?;
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout)?["summary"], explained["summary"]);

    // A pod that no cluster knows.
    let error = agent.run(&["explain", "pod/shop/web", "192.168.31.67:8443"]).unwrap_err().to_string();
    assert!(error.contains("write the address"), "{error}");
    Ok(())
}

/// Audit mode, traffic, `suggest`, `apply --confirm`, enforce: all that was seen passes, and no neighbour of it.
#[test]
fn suggested_rules_allow_exactly_the_traffic_that_was_seen() -> Result<()> {
    let lab = Lab::builder().build()?;
    // No event is sent: the classes that the kernel counts are complete all the same, and outlive the agent.
    let audit = CONFIG.replace("engines: [ebpf]", "mode: audit, events: {rate: 0}, engines: [ebpf]");
    let mut agent = Agent::start(&lab, lab.b(), &audit)?;
    let (a, c1, c2) = (lab.a(), lab.c1(), lab.c2());
    let mut servers = Vec::new();
    for family in Family::BOTH {
        for port in [5001, 5002, 5003] {
            for pod in [c1, c2] {
                servers.push(tcp::Server::echo(&pod.netns, pod.at(family, port))?);
            }
            servers.push(tcp::Server::echo(&a.netns, a.at(family, port))?);
        }
    }
    let seen = |check: &dyn Fn(&Host, std::net::SocketAddr) -> Result<bool>| -> Result<bool> {
        let mut all = true;
        for family in Family::BOTH {
            all &= check(a, c1.at(family, 5001))? && check(a, c1.at(family, 5002))?;
            all &= check(c2, a.at(family, 5003))?;
        }
        Ok(all)
    };
    let passes = |from: &Host, to| connects(from, 0, to);
    ensure!(seen(&passes)?, "audit mode lets all pass");
    agent.kill()?;
    agent.restart()?;
    let answer: Value = serde_json::from_str(&agent.run(&["suggest", "--json"])?)?;
    let rules = answer["rules"].as_array().context("rules")?;
    let pairs: u64 = rules.iter().filter_map(|one| one["pairs"].as_u64()).sum();
    assert_eq!((pairs, &answer["evicted"]), (6, &0.into()), "{answer}");
    // Events are limited to 0 a second, so each was kept back, and no connection is missing for it.
    ensure!(answer["suppressedEvents"].as_u64().is_some_and(|count| count >= 6), "{answer}");
    let text = agent.run(&["suggest"])?;
    println!("{text}");
    let rules = text.split_once("rules:\n").context("rules")?.1;
    let file = agent.config().with_file_name("enforced.yaml");
    std::fs::write(&file, format!("{CONFIG}{rules}"))?;
    agent.run(&["apply", "--confirm", "60s", file.to_str().context("a path")?])?;
    agent.run(&["confirm"])?;
    agent.run(&["flows", "--delete"])?;
    ensure!(seen(&passes)?, "a connection that was seen does not pass");
    for family in Family::BOTH {
        for (from, to) in [
            (a, c1.at(family, 5003)),
            (a, c2.at(family, 5001)),
            (c2, a.at(family, 5002)),
            (c1, a.at(family, 5003)),
        ] {
            ensure!(!passes(from, to)?, "{} reaches {to}", from.name);
        }
    }
    Ok(())
}
