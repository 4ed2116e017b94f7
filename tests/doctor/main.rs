//! Each check of `bridge-agent doctor` fails, in a lab, where the kernel is in the state that it warns of.

mod surroundings;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::{Agent, program},
    kubernetes::{ApiServer, User},
    lab::{Family, Host, Lab},
};
use serde_json::Value;

const NODE: &str = "role: node\nnetworks: {pods: [10.200.1.0/24, 'fd20:1::/64'], external: [192.168.31.0/24, \
                    'fd31::/64']}\nenforcement: {engines: [ebpf], interfaces: {external: [eth0], internal: ['cali*']}}\n\
                    persistence: {save: never}\n";

/// A station, and a configuration that no agent has.
struct Station<'a> {
    lab: &'a Lab,
    host: &'a Host,
    directory: tempfile::TempDir,
    config: String,
}

impl<'a> Station<'a> {
    fn new(lab: &'a Lab, host: &'a Host, config: &str) -> Result<Self> {
        Ok(Self { lab, host, directory: tempfile::tempdir()?, config: config.to_owned() })
    }

    fn node(lab: &'a Lab) -> Result<Self> {
        Self::new(lab, lab.b(), NODE)
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let config = self.directory.path().join("bridge.yaml");
        fs::write(&config, &self.config)?;
        let mut command = Command::new(program()?);
        command
            .args(["doctor", "--config"])
            .arg(config)
            .arg("--socket")
            .arg(self.directory.path().join("no.sock"));
        command.arg("--pin-root").arg(self.lab.pin_directory()?.join("doctor")).args(arguments);
        Ok(command)
    }

    /// Exit code and all findings.
    fn doctor(&self, arguments: &[&str]) -> Result<(Option<i32>, Value)> {
        let mut command = self.command(&[&["--json"], arguments].concat())?;
        let output = self.host.netns.run(|| command.output())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said = serde_json::from_str(&text)
            .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
        Ok((output.status.code(), said))
    }

    /// Outcome and facts of one check.
    fn check(&self, name: &str) -> Result<(String, String)> {
        let (code, said) = self.doctor(&[])?;
        let checks = said["checks"].as_array().context("checks")?;
        let found = checks
            .iter()
            .find(|check| check["check"] == name)
            .with_context(|| format!("no {name}: {said}"))?;
        let (outcome, seen) =
            (found["outcome"].as_str().context("outcome")?, found["seen"].as_str().context("seen")?);
        let troubled = matches!(outcome, "warn" | "fail");
        ensure!(
            !troubled || found["do"].as_str().is_some_and(|remedy| !remedy.contains('\n')),
            "no remedy: {found}"
        );
        ensure!((outcome == "fail") <= (code == Some(1)), "exit code {code:?}: {said}");
        Ok((outcome.to_owned(), seen.to_owned()))
    }

    fn expect(&self, name: &str, outcome: &str, fact: &str) -> Result<()> {
        let (found, seen) = self.check(name)?;
        ensure!(
            found == outcome && seen.contains(fact),
            "{name}: {found}, expected {outcome} with {fact:?}: {seen}"
        );
        Ok(())
    }
}

fn nft(host: &Host, ruleset: &str) -> Result<String> {
    let mut command = Command::new("nft");
    command.arg(ruleset);
    host.netns.output(command)
}

fn run(host: &Host, program: &str, arguments: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments.split(' '));
    host.netns.output(command)
}

#[test]
fn a_sound_node_passes_and_says_why_checks_were_not_run() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let (code, said) = station.doctor(&["--only", "node"])?;
    assert_eq!(code, Some(0), "{said:#}");
    assert_eq!(said["ok"], true);
    for check in said["checks"].as_array().context("checks")? {
        ensure!(
            check["outcome"] != "fail" && check["seen"].as_str().is_some_and(|seen| !seen.is_empty()),
            "{check}"
        );
        ensure!(!check["check"].as_str().unwrap_or_default().starts_with("agent"), "{check}");
    }
    let text = station.host.netns.output(station.command(&[])?)?;
    ensure!(text.contains("NOT RUN cluster: the configuration follows no cluster"), "{text}");
    ensure!(text.contains("ok      forwarding.ip-forward"), "{text}");
    station.expect("agent.running", "warn", "no agent answers")
}

#[test]
fn a_running_agent_is_asked() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), NODE)?;
    let text = lab.b().netns.output(agent.command(&["doctor"]))?;
    ensure!(
        text.contains("ok      agent.ready") && text.contains("ok      engines.foreign-programs"),
        "{text}"
    );
    Ok(())
}

#[test]
fn forwarding_that_is_off_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    lab.b().netns.set_sysctl("ipv4/ip_forward", "0")?;
    station.expect("forwarding.ip-forward", "fail", "net.ipv4.ip_forward")?;
    lab.b().netns.set_sysctl("ipv4/ip_forward", "1")?;
    lab.b().netns.set_sysctl("ipv6/conf/all/forwarding", "0")?;
    station.expect("forwarding.ip-forward", "fail", "off: net.ipv6.conf.all.forwarding")?;
    lab.b().netns.set_sysctl("ipv6/conf/all/forwarding", "1")?;
    lab.b().netns.set_sysctl("ipv4/conf/eth0/forwarding", "0")?;
    station.expect("forwarding.ip-forward", "fail", "off: net.ipv4.conf.eth0.forwarding")
}

#[test]
fn a_strict_rp_filter_fails_where_answers_leave_by_another_interface() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    let netns = &lab.b().netns;
    netns.ip("link add wan1 type veth peer name wan1-peer")?;
    netns.ip("link set wan1 up")?;
    station.config = station.config.replace("external: [eth0]", "external: [eth0, wan1]");
    netns.set_sysctl("ipv4/conf/all/rp_filter", "0")?;
    netns.set_sysctl("ipv4/conf/wan1/rp_filter", "2")?;
    station.expect("forwarding.rp-filter", "ok", "")?;
    netns.set_sysctl("ipv4/conf/wan1/rp_filter", "1")?;
    station.expect("forwarding.rp-filter", "fail", "strict on wan1")?;
    // The larger of both values counts.
    netns.set_sysctl("ipv4/conf/wan1/rp_filter", "0")?;
    netns.set_sysctl("ipv4/conf/all/rp_filter", "1")?;
    station.expect("forwarding.rp-filter", "fail", "strict on wan1")
}

#[test]
fn a_forward_chain_of_another_firewall_that_drops_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let b = lab.b();
    station.expect("forwarding.policy", "ok", "")?;
    // As ufw and Docker: the policy of iptables.
    for (program, place) in [
        ("iptables-nft", "ip filter FORWARD"),
        ("ip6tables-nft", "ip6 filter FORWARD"),
        ("iptables-legacy", "iptables-legacy"),
        ("ip6tables-legacy", "ip6tables-legacy"),
    ] {
        run(b, program, "-P FORWARD DROP")?;
        station.expect("forwarding.policy", "fail", place)?;
        run(b, program, "-P FORWARD ACCEPT")?;
        run(b, program, "-A FORWARD -j DROP")?;
        station.expect("forwarding.policy", "fail", place)?;
        run(b, program, "-F FORWARD")?;
        station.expect("forwarding.policy", "ok", "")?;
    }
    // As firewalld: a chain of nf_tables that ends with a rejection.
    nft(
        b,
        "add table inet firewalld; add chain inet firewalld filter_FORWARD { type filter hook forward priority filter + 10; }; \
         add rule inet firewalld filter_FORWARD ct state established accept; \
         add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited",
    )?;
    station.expect("forwarding.policy", "fail", "inet firewalld filter_FORWARD")?;
    nft(b, "insert rule inet firewalld filter_FORWARD ip saddr 10.200.1.0/24 accept")?;
    station.expect("forwarding.policy", "warn", "accept packets of pods")?;
    nft(
        b,
        "flush chain inet firewalld filter_FORWARD; add chain inet firewalld filter_FORWARD { policy drop; }",
    )?;
    station.expect("forwarding.policy", "fail", "policy drop")?;
    nft(b, "delete table inet firewalld")?;
    for (hook, outcome) in [("prerouting", "fail"), ("postrouting", "fail"), ("output", "ok")] {
        nft(
            b,
            &format!(
                "add table inet site; add chain inet site c {{ type filter hook {hook} priority 0; policy drop; }}"
            ),
        )?;
        station.expect(
            "forwarding.policy",
            outcome,
            if outcome == "ok" { "" } else { "inet site c: policy drop" },
        )?;
        nft(b, "delete table inet site")?;
    }
    Ok(())
}

#[test]
fn a_masquerade_of_pods_towards_the_lan_is_named() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    Station::node(&lab)?.expect("forwarding.masquerade", "warn", "masquerades packets from pods")?;
    drop(lab);
    let lab = Lab::builder().build()?;
    let (station, b) = (Station::node(&lab)?, lab.b());
    station.expect("forwarding.masquerade", "ok", "")?;
    nft(b, "add table ip cni; add chain ip cni post { type nat hook postrouting priority srcnat; }")?;
    for (rule, outcome) in [
        ("ip saddr 10.200.1.0/24 masquerade", "warn"),
        ("ip saddr 10.99.0.0/16 masquerade", "ok"),
        ("ip saddr 10.200.0.0/16 ip daddr != 192.168.31.0/24 masquerade", "warn"),
        ("ip saddr 10.200.1.0/24 ip daddr 8.8.8.0/24 masquerade", "ok"),
        ("meta mark & 0x4000 == 0x4000 masquerade", "ok"),
    ] {
        nft(b, "flush chain ip cni post")?;
        nft(b, &format!("add rule ip cni post {rule}"))?;
        // A rule for IPv4 that leaves out its LAN still meets nothing of IPv6.
        let (found, seen) = station.check("forwarding.masquerade")?;
        ensure!(found == outcome || rule.contains("!="), "{rule}: {found}: {seen}");
    }
    nft(b, "flush ruleset")?;
    run(b, "iptables-nft", "-t nat -A POSTROUTING -s 10.200.0.0/16 -j MASQUERADE")?;
    station.expect("forwarding.masquerade", "warn", "ip nat POSTROUTING")
}

#[test]
fn a_lan_with_a_smaller_mtu_than_pods_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    station.expect("forwarding.mtu", "ok", "1500")?;
    lab.b().netns.ip("link set eth0 mtu 1400")?;
    station.expect("forwarding.mtu", "warn", "eth0 has MTU 1400")
}

#[test]
fn a_lan_without_a_route_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config = station.config.replace("'fd31::/64']", "'fd31::/64', 198.51.100.0/24]");
    station.expect("forwarding.networks", "fail", "no route to 198.51.100.0/24")
}

#[test]
fn rules_in_both_backends_are_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    run(lab.b(), "iptables-nft", "-A INPUT -j ACCEPT")?;
    station.expect("engines.iptables-backends", "ok", "only")?;
    run(lab.b(), "iptables-legacy", "-A INPUT -j ACCEPT")?;
    station.expect("engines.iptables-backends", "warn", "both back ends")
}

#[test]
fn a_node_without_an_interface_to_the_lan_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config = station.config.replace("external: [eth0]", "external: [lan7]");
    station.expect("engines.interfaces", "fail", "no interface leads to networks.external")
}

#[test]
fn pins_of_another_version_are_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    station.expect("engines.pins", "ok", "nothing is pinned")?;
    fs::create_dir_all(lab.pin_directory()?.join("doctor/v1/control"))?;
    station.expect("engines.pins", "warn", "another version")
}

#[test]
fn missing_capabilities_and_file_systems_fail() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let inner = station.command(&["--json", "--only", "kernel"])?;
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-perfmon", "--inh-caps=-all", "--"]).arg(inner.get_program());
    command.args(inner.get_args()).args(["--pin-root", "/tmp"]);
    // The pin root is given twice.
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let first = arguments.iter().position(|word| word == "--pin-root").context("--pin-root")?;
    let mut once = Command::new("setpriv");
    once.args(&arguments[..first]).args(&arguments[first + 2..]);
    let output = lab.b().netns.run(|| once.output())?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    assert_eq!(output.status.code(), Some(1), "{said:#}");
    let outcome =
        |name: &str| said["checks"].as_array()?.iter().find(|check| check["check"] == name).cloned();
    let capabilities = outcome("kernel.capabilities").context("capabilities")?;
    assert_eq!(capabilities["outcome"], "fail", "{capabilities}");
    ensure!(
        capabilities["seen"].as_str().is_some_and(|seen| seen.contains("CAP_BPF, CAP_PERFMON")),
        "{capabilities}"
    );
    assert_eq!(outcome("kernel.bpffs").context("bpffs")?["outcome"], "fail");
    Ok(())
}

#[test]
fn a_pool_that_others_use_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    station.config += "portPool: {ports: [61001-61100], destinations: [192.168.31.0/24]}\n";
    let netns = &lab.b().netns;
    netns.set_sysctl("ipv4/ip_local_port_range", "32768 60999")?;
    station.expect("ports.settings", "ok", "")?;
    netns.set_sysctl("ipv4/ip_local_port_range", "32768 61050")?;
    station.expect("ports.ephemeral", "warn", "50 ports")?;
    netns.set_sysctl("ipv4/ip_local_port_range", "32768 60999")?;
    netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    station.expect("ports.timestamps", "warn", "tcp_timestamps is 0")?;
    station.expect("ports.listeners", "ok", "")?;
    let _listener = netns.run(|| TcpListener::bind("0.0.0.0:61007"))?;
    station.expect("ports.listeners", "warn", "61007")
}

#[test]
fn a_pool_in_the_node_port_range_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    let pool =
        |ports: &str| format!("{NODE}portPool: {{ports: [{ports}], destinations: [192.168.31.0/24]}}\n");
    station.config = pool("61001-61100");
    station.expect("ports.node-ports", "ok", "30000-32767")?;
    station.config = pool("32760-32800");
    station.expect("ports.node-ports", "warn", "8 ports of the pool")
}

#[test]
fn a_held_xtables_lock_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    let lock = station.directory.path().join("xtables.lock");
    let outcome = || -> Result<String> {
        let mut command = station.command(&["--json", "--only", "engines"])?;
        command.env("XTABLES_LOCKFILE", &lock);
        let output = station.host.netns.run(|| command.output())?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        let checks = said["checks"].as_array().context("checks")?;
        let found =
            checks.iter().find(|check| check["check"] == "engines.xtables-lock").context("no check")?;
        Ok(found["outcome"].as_str().context("outcome")?.to_owned())
    };
    let file = fs::File::create(&lock)?;
    assert_eq!(outcome()?, "ok");
    file.lock()?;
    assert_eq!(outcome()?, "warn");
    Ok(())
}

#[test]
fn a_network_of_the_lan_among_the_pods_fails() -> Result<()> {
    let lab = Lab::builder().build()?;
    let station = Station::node(&lab)?;
    station.expect("forwarding.overlap", "ok", "")?;
    lab.b().netns.ip("addr add 10.200.1.200/26 dev eth0")?;
    station.expect("forwarding.overlap", "fail", "10.200.1.192/26")
}

#[test]
fn a_next_hop_that_does_not_answer_fails() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let config = |via: &str| format!("role: host\nroutes: {{static: [{{to: 10.200.1.0/24, via: {via}}}]}}\n");
    let station = Station::new(&lab, lab.a(), &config("192.168.31.17"))?;
    station.expect("host.next-hops", "ok", "1 next hops answer")?;
    let station = Station::new(&lab, lab.a(), &config("192.168.31.250"))?;
    station.expect("host.next-hops", "fail", "192.168.31.250")
}

#[test]
fn routes_of_a_host_that_are_refused_or_due_are_named() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let config = |via: &str| format!("role: host\nroutes: {{static: [{{to: 10.200.1.0/24, via: {via}}}]}}\n");
    let station = Station::new(&lab, lab.a(), &config("192.168.31.17"))?;
    station.expect("host.routes", "warn", "1 changes are due")?;
    lab.a().netns.ip("route add 10.200.1.0/24 via 192.168.31.17 proto 98 metric 1024")?;
    station.expect("host.routes", "ok", "")?;
    let station = Station::new(&lab, lab.a(), &config("172.16.5.5"))?;
    station.expect("host.routes", "fail", "not on-link")
}

#[test]
fn an_expired_token_and_an_unreachable_server_fail() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    // {"exp":1000000000}
    let kubeconfig = station.directory.path().join("kubeconfig");
    let token = "e30.eyJleHAiOjEwMDAwMDAwMDB9.c2ln";
    fs::write(&kubeconfig, kubeconfig_of("http://192.168.31.17:1", token))?;
    station.config += &format!("kubernetes: {{kubeconfig: {}, nodeName: b}}\n", kubeconfig.display());
    station.expect("cluster.token", "fail", "expired")?;
    station.expect("cluster.api", "fail", "192.168.31.17:1")
}

fn kubeconfig_of(server: &str, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{{name: x, cluster: {{server: '{server}'}}}}]\n\
         users: [{{name: x, user: {{token: {token}}}}}]\ncontexts: [{{name: x, context: {{cluster: x, user: x}}}}]\n"
    )
}

#[test]
fn a_clock_that_differs_is_named() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut station = Station::node(&lab)?;
    // A server on the LAN whose clock stands in 2001.
    let at = lab.a().at(Family::V4, 8001);
    let listener = lab.a().netns.run(|| TcpListener::bind(at))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = stream;
            let mut request = [0; 4096];
            let body = r#"{"gitVersion":"v1.36.1","allowed":true,"groups":[],"kind":"APIGroupList","status":{"allowed":true},"spec":{}}"#;
            while stream.read(&mut request).is_ok_and(|length| length > 0) {
                let head = format!(
                    "HTTP/1.1 200 OK\r\nDate: Sun, 09 Sep 2001 01:46:40 GMT\r\nContent-Type: application/json\r\n\
                     Content-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                if stream.write_all(head.as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    let kubeconfig = station.directory.path().join("kubeconfig");
    fs::write(&kubeconfig, kubeconfig_of(&format!("http://{at}"), "opaque"))?;
    station.config += &format!("kubernetes: {{kubeconfig: {}, nodeName: b}}\n", kubeconfig.display());
    station.expect("cluster.clock", "warn", "the clocks differ by -")
}

#[test]
fn rights_and_definitions_that_are_missing_fail() -> Result<()> {
    let lab = Lab::builder().build()?;
    let server = ApiServer::start(&lab)?;
    let mut station = Station::node(&lab)?;
    let with = |user| {
        format!("{NODE}kubernetes: {{kubeconfig: {}, nodeName: b}}\n", server.kubeconfig(user).display())
    };
    station.config = with(User::Node);
    station.expect("cluster.api", "ok", "version v1")?;
    station.expect("cluster.rights", "ok", "")?;
    station.expect("cluster.definitions", "ok", "")?;
    server.kubectl(&["delete", "clusterrolebinding", "bridge-agent"], "")?;
    station.expect("cluster.rights", "fail", "list pods")?;
    server.kubectl(&["delete", "crd", "bridgenodes.bridge.lan"], "")?;
    station.config = with(User::Admin);
    station.expect("cluster.definitions", "fail", "bridgenodes")
}

/// All checks together take five seconds at most, also where servers, next hops and agents do not answer.
#[test]
fn a_machine_where_nothing_answers_is_examined_in_five_seconds() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    let config = "role: host\nnetworks: {pods: [10.200.0.0/16]}\nroutes: {static: [{to: 10.200.1.0/24, via: 192.168.31.250}]}\n";
    let mut station = Station::new(&lab, lab.a(), config)?;
    let kubeconfig = station.directory.path().join("kubeconfig");
    fs::write(&kubeconfig, kubeconfig_of("https://192.168.31.251:6443", "e30.e30.c2ln"))?;
    station.config += &format!("kubernetes: {{kubeconfig: {}}}\n", kubeconfig.display());
    let begin = std::time::Instant::now();
    let (code, said) = station.doctor(&[])?;
    let took = begin.elapsed();
    assert_eq!(code, Some(1), "{said:#}");
    ensure!(took < bridge_lab::wait::patience(std::time::Duration::from_secs(5)), "{took:?}: {said:#}");
    Ok(())
}
