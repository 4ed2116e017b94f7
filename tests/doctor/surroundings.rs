//! Checks of the surroundings of an agent: conntrack, next hops, the CNI, other programs, the cluster.

use super::*;

#[test]
fn a_full_conntrack_table_is_named() -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let station = Station::node(&lab)?;
    let netns = &lab.b().netns;
    station.expect("forwarding.conntrack", "ok", "entries")?;
    // Since Linux 6.15 each network namespace has its own limit.
    if netns.set_sysctl("netfilter/nf_conntrack_max", "20").is_err() {
        println!("NOT RUN: this kernel lets only the first network namespace set nf_conntrack_max");
        return Ok(());
    }
    for port in 1..=19 {
        let entry = format!(
            "-I -p udp -s 192.0.2.1 -d 192.0.2.2 --sport {port} --dport 9 --timeout 60 -u SEEN_REPLY"
        );
        run(lab.b(), "conntrack", &entry)?;
    }
    let (outcome, seen) = station.check("forwarding.conntrack")?;
    ensure!(outcome == "fail" || outcome == "warn", "{outcome}: {seen}");
    Ok(())
}

#[test]
fn an_ipv6_next_hop_that_does_not_answer_fails() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let config =
        |via: &str| format!("role: host\nroutes: {{static: [{{to: 'fd20:1::/64', via: '{via}'}}]}}\n");
    let station = Station::new(&lab, lab.a(), &config("fd31::17"))?;
    station.expect("host.next-hops", "ok", "1 next hops answer")?;
    let station = Station::new(&lab, lab.a(), &config("fd31::250"))?;
    station.expect("host.next-hops", "fail", "fd31::250")?;
    // One that has answered once, and is gone: the memory of the kernel is no answer.
    let station = Station::new(&lab, lab.a(), &config("fd31::17"))?;
    lab.b().netns.ip("link set eth0 down")?;
    station.expect("host.next-hops", "fail", "fd31::17")
}

#[test]
fn pods_without_a_way_back_are_named() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let config = "role: host\nnetworks: {pods: [10.200.0.0/16, 'fd20::/16']}\nroutes: {static: [{to: 10.200.1.0/24, via: \
                  192.168.31.17}, {to: 'fd20:1::/64', via: 'fd31::17'}]}\n";
    let station = Station::new(&lab, lab.a(), config)?;
    station.expect("host.way-back", "fail", "no route to 10.200.0.0/16, fd20::/16")?;
    lab.a().netns.ip("route add default via 192.168.31.1")?;
    station.expect("host.way-back", "warn", "leave by the default route")?;
    lab.a().netns.ip("route add 10.200.1.0/24 via 192.168.31.17 proto 98")?;
    station.expect("host.way-back", "fail", "no route to fd20::/16")?;
    lab.a().netns.ip("route add fd20:1::/64 via fd31::17 proto 98")?;
    station.expect("host.way-back", "ok", "")
}

#[test]
fn a_node_that_is_taken_for_a_lan_host_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config = station.config.replace("[10.200.1.0/24, 'fd20:1::/64']", "[10.200.0.0/16, 'fd20::/16']");
    station.expect("forwarding.nodes", "ok", "0 gateways")?;
    lab.b().netns.ip("route add 10.200.2.0/24 via 192.168.31.18")?;
    lab.b().netns.ip("route add fd20:2::/64 via fd31::18")?;
    station.expect("forwarding.nodes", "fail", "192.168.31.18, fd31::18")?;
    station.config = station.config.replace("networks: {", "networks: {nodes: [192.168.31.18, 'fd31::18'], ");
    station.expect("forwarding.nodes", "ok", "2 gateways")
}

#[test]
fn a_cni_that_masquerades_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let directory = station.directory.path().join("net.d");
    let outcome = |text: Option<&str>| -> Result<(String, String)> {
        fs::create_dir_all(&directory)?;
        if let Some(text) = text {
            fs::write(directory.join("10-net.conflist"), text)?;
        }
        let mut command = station.command(&["--json", "--only", "cluster"])?;
        command.env("NETCONFPATH", &directory);
        let output = station.host.netns.run(|| command.output())?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        let checks = said["checks"].as_array().context("checks")?;
        let found = checks.iter().find(|check| check["check"] == "cluster.cni").context("no check")?;
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        Ok((text("outcome"), text("seen")))
    };
    assert_eq!(outcome(None)?.0, "not-run");
    let plain =
        r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp","ipMasq":false},{"type":"portmap"}]}"#;
    let (found, seen) = outcome(Some(plain))?;
    ensure!(found == "ok" && seen.contains("ptp, portmap"), "{found}: {seen}");
    let (found, seen) = outcome(Some(&plain.replace("false", "true")))?;
    ensure!(found == "warn" && seen.contains("ptp has ipMasq"), "{found}: {seen}");
    Ok(())
}

#[test]
fn a_pool_without_a_cgroup2_mount_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config += "portPool: {ports: [61001-61100], destinations: [192.168.31.0/24]}\n";
    station.expect("kernel.cgroup2", "ok", "mounted on")?;
    // A mount namespace of its own, without any.
    let inner = station.command(&["--json", "--only", "kernel"])?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "umount -a -l -t cgroup2 && exec \"$0\" \"$@\""]);
    command.arg(inner.get_program()).args(inner.get_args());
    let output = station.host.netns.run(|| command.output())?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let found = said["checks"].as_array().context("checks")?;
    let found = found.iter().find(|check| check["check"] == "kernel.cgroup2").context("cgroup2")?;
    ensure!(found["outcome"] == "fail" && output.status.code() == Some(1), "{found}");
    Ok(())
}

#[test]
fn a_program_of_another_before_bridges_own_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut agent = Agent::start(&lab, lab.b(), NODE)?;
    // A running agent moves its own programs to the front again.
    agent.kill()?;
    let text = || lab.b().netns.output_with(agent.command(&["doctor", "--only", "engines"]), &[1]);
    ensure!(text()?.contains("ok      engines.foreign-programs"), "{}", text()?);
    ensure!(text()?.contains("LAN: eth0 (by name)"), "{}", text()?);
    let mut object =
        aya::Ebpf::load(&fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/generate"))?)?;
    let program: &mut aya::programs::SchedClassifier =
        object.program_mut("reference").context("reference")?.try_into()?;
    program.load()?;
    let order = aya::programs::LinkOrder::first();
    let options = aya::programs::tc::TcAttachOptions::TcxOrder(order);
    lab.b()
        .netns
        .run(|| program.attach_with_options("eth0", aya::programs::TcAttachType::Ingress, options))?;
    ensure!(
        text()?.contains("warn    engines.foreign-programs: programs of others are first: 1 on eth0"),
        "{}",
        text()?
    );
    Ok(())
}

#[test]
fn an_agent_that_is_not_ready_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut agent = Agent::start(&lab, lab.b(), NODE)?;
    ensure!(agent.run(&["doctor", "--only", "agent"])?.contains("ok      agent.ready"));
    agent.reload(&NODE.replace("external: [eth0]", "external: [lan7]"))?;
    let text = lab.b().netns.output_with(agent.command(&["doctor", "--only", "agent"]), &[1])?;
    ensure!(text.contains("FAIL    agent.ready") && text.contains("networks.external"), "{text}");
    // For a container whose log is read, it is a report alone.
    let report = agent.run(&["doctor", "--only", "agent", "--report"])?;
    ensure!(report.contains("FAIL    agent.ready"), "{report}");
    Ok(())
}

#[test]
fn definitions_in_another_version_fail() -> Result<()> {
    let lab = Lab::builder().build()?;
    let server = ApiServer::start(&lab)?;
    let mut station = Station::node(&lab)?;
    let kubeconfig = server.kubeconfig(User::Admin);
    station.config = format!("{NODE}kubernetes: {{kubeconfig: {}, nodeName: b}}\n", kubeconfig.display());
    for name in ["bridgepolicies", "bridgenamespacepolicies", "bridgenodes"] {
        let text = server.kubectl(&["get", "crd", &format!("{name}.bridge.lan"), "-o", "json"], "")?;
        let mut object: Value = serde_json::from_str(&text)?;
        object["spec"]["versions"][0]["name"] = "v9".into();
        for part in ["status", "metadata"] {
            let kept = object["metadata"]["name"].clone();
            object[part] = serde_json::json!({});
            if part == "metadata" {
                object[part]["name"] = format!("{name}.bridge.lan").into();
            }
            drop(kept);
        }
        server.kubectl(&["delete", "crd", &format!("{name}.bridge.lan")], "")?;
        server.apply(&object.to_string())?;
    }
    let found = bridge_lab::wait::eventually(std::time::Duration::from_secs(20), || {
        station.expect("cluster.definitions", "fail", "in version v1alpha1 (served: v9)").ok()
    });
    ensure!(found.is_some(), "{:?}", station.check("cluster.definitions")?);
    Ok(())
}

#[test]
fn routes_that_lead_to_no_pod_fail() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config = NODE.replace(", internal: ['cali*']", "");
    station.expect("engines.interfaces", "ok", "(route fd20:1::91/128)")?;
    lab.b().netns.ip("link add plugin_host type veth peer name plugin_net")?;
    lab.b().netns.ip("link set plugin_host up")?;
    lab.b().netns.ip("route add 10.200.1.128/25 dev plugin_host")?;
    station.expect("engines.interfaces", "fail", "routes to pods lead to plugin_host")
}

#[test]
fn a_bridge_past_iptables_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let netns = &lab.b().netns;
    let mut station = Station::node(&lab)?;
    station.config = NODE.replace("'cali*'", "'cali*', cni0");
    netns.ip("link add cni0 type bridge")?;
    netns.ip("link add veth0 type veth peer name veth1")?;
    netns.ip("link set veth0 master cni0")?;
    netns.set_sysctl("bridge/bridge-nf-call-iptables", "1")?;
    station.expect("forwarding.br-netfilter", "ok", "bridge-nf-call-iptables is 1")?;
    netns.set_sysctl("bridge/bridge-nf-call-iptables", "0")?;
    station.expect("forwarding.br-netfilter", "warn", "bridge-nf-call-iptables is 0")?;
    // Without pods at ports of a bridge it does not matter.
    station.config = NODE.to_owned();
    station.expect("forwarding.br-netfilter", "ok", "bridge-nf-call-iptables is 0")
}

#[test]
fn a_masquerade_with_random_ports_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config += "portPool: {ports: [61001-61100], destinations: [192.168.31.0/24]}\n";
    station.expect("ports.settings", "ok", "no port of the pool")?;
    nft(
        lab.b(),
        "table ip other { chain post { type nat hook postrouting priority srcnat; ip saddr 10.200.1.0/24 masquerade \
                  fully-random; }; }",
    )?;
    station.expect("ports.masquerade", "warn", "fully-random")?;
    // The pool's own rule comes before.
    station.config = station.config.replace("portPool: {", "portPool: {masquerade: true, ");
    station.expect("ports.settings", "ok", "no port of the pool")
}

/// Rules of routing that other programs add before those of Linux, and routes that refuse single hosts. Each breaks a connection
/// that passes otherwise.
#[test]
fn rules_of_routing_and_refused_routes_are_named() -> Result<()> {
    const RULES: &str = "forwarding.policy-routing";
    const ROUTES: &str = "forwarding.refused-routes";
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let netns = &lab.b().netns;
    let ip = |commands: &[&str]| commands.iter().try_for_each(|command| netns.ip(command).map(drop));
    station.expect(RULES, "ok", "0 rules")?;
    station.expect(ROUTES, "ok", "no route refuses")?;
    // A table that leads where the main one does, one that is about others, and one without a route to them are none.
    ip(&[
        "route add 192.168.31.0/24 dev eth0 table 99",
        "rule add from 10.200.1.0/24 lookup 99",
        "rule add to 172.16.0.0/12 blackhole",
        "rule add to 10.200.1.0/24 lookup 98",
    ])?;
    station.expect(RULES, "ok", "2 rules")?;
    for (family, rule, outcome, fact) in [
        ("-4", "from 10.200.1.91 prohibit", "fail", "prohibit) refuses packets to 10.200.1.0/24"),
        ("-4", "from 10.200.1.0/24 lookup 97", "fail", "the route 192.168.31.0/24 dev lo of table 97"),
        ("-4", "fwmark 7 lookup 97", "warn", "fwmark 0x7 lookup 97"),
        ("-4", "iif eth0 lookup 96", "fail", "the route blackhole 0.0.0.0/0 of table 96"),
        (
            "-6",
            "to fd20:1::91 unreachable",
            "fail",
            "to fd20:1::91/128 unreachable) refuses packets to fd20:1::/64",
        ),
    ] {
        ip(&["route replace 192.168.31.0/24 dev lo table 97", "route replace blackhole default table 96"])?;
        netns.ip(&format!("{family} rule add {rule}"))?;
        let found = station.check(RULES)?;
        netns.ip(&format!("{family} rule del {rule}"))?;
        ensure!(found.0 == outcome && found.1.contains(fact), "{rule}: {found:?}");
    }
    // A block of pods is no single pod.
    for (route, outcome, fact) in [
        ("blackhole 10.200.1.64/26", "ok", ""),
        ("blackhole 10.200.1.192/26 proto bird", "ok", ""),
        ("blackhole 10.200.1.128/26", "fail", "blackhole 10.200.1.128/26"),
        ("unreachable 10.200.1.93", "fail", "unreachable 10.200.1.93/32"),
        ("prohibit fd20:1::93", "fail", "prohibit fd20:1::93/128"),
        ("blackhole 192.168.31.67", "fail", "blackhole 192.168.31.67/32"),
    ] {
        netns.ip(&format!("route add {route}"))?;
        let found = station.check(ROUTES)?;
        netns.ip(&format!("route del {route}"))?;
        ensure!(found.0 == outcome && found.1.contains(fact), "{route}: {found:?}");
    }
    Ok(())
}
