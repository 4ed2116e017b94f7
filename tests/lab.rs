//! The lab has the shape that was asked for, and leaves nothing behind.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bridge_lab::agent::sibling;
use bridge_lab::lab::{Family, Lab, LabId, NodePort, all};
use bridge_lab::traffic::{icmp, tcp, udp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::Capture;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn everybody_reaches_everybody_in_both_families() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    let everybody = [lab.a(), lab.a2(), lab.b(), lab.c1(), lab.c2()];
    for family in Family::BOTH {
        for from in everybody {
            for to in everybody.iter().filter(|to| to.name != from.name) {
                let attempt = icmp::echo(&from.netns, to.ip(family), SECOND)?;
                assert!(attempt.succeeded(), "{} to {}: {attempt}", from.name, to.ip(family));
            }
        }
    }
    Ok(())
}

#[test]
fn addresses_are_those_of_the_design() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    for (host, v4, v6) in [
        (lab.a(), "192.168.31.67", "fd31::67"),
        (lab.a2(), "192.168.31.68", "fd31::68"),
        (lab.b(), "192.168.31.17", "fd31::17"),
        (lab.c1(), "10.200.1.91", "fd20:1::91"),
        (lab.c2(), "10.200.1.92", "fd20:1::92"),
    ] {
        assert_eq!((host.v4.to_string(), host.v6.to_string()), (v4.into(), v6.into()));
        let seen = host.netns.ip(&format!("-brief address show dev {}", host.interface))?;
        assert!(
            seen.contains(&format!("{v4}/")) && seen.contains(&format!("{v6}/")),
            "{}: {seen}",
            host.name
        );
        let link = host.netns.ip("-oneline link show dev eth0")?;
        let mac = host.mac.map(|byte| format!("{byte:02x}")).join(":");
        assert!(link.contains(&mac), "{mac} not in {link}");
    }
    assert_eq!(lab.c1().peer_interface, "cali0000ac8015b");
    let node_side = lab.b().netns.ip("-brief address show")?;
    assert!(node_side.contains("10.200.1.1/32") && node_side.contains("fd20:1::1/128"), "{node_side}");
    Ok(())
}

#[test]
fn tcp_and_udp_pass_in_both_directions() -> Result<()> {
    let lab = Lab::builder().build()?;
    for family in Family::BOTH {
        for (client, server) in [(lab.a(), lab.c1()), (lab.c1(), lab.a())] {
            let echo = tcp::Server::echo(&server.netns, server.at(family, 40002))?;
            let connect = tcp::Client::new(&client.netns).source_port(61001);
            let mut connection = connect.connect(echo.address())?.reached()?;
            connection.round_trip(SECOND)?;
            assert_eq!(echo.peers(), [client.at(family, 61001)], "no address translation");
            assert_eq!(echo.received(), 8);

            let echo = udp::Server::echo(&server.netns, server.at(family, 40002))?;
            let attempt = udp::ask(&client.netns, 61001, echo.address(), b"question", SECOND)?;
            assert!(attempt.succeeded(), "{attempt}");
            assert_eq!(echo.received(), [(client.at(family, 61001), b"question".to_vec())]);
        }
    }
    Ok(())
}

#[test]
fn refusal_silence_and_no_route_are_told_apart() -> Result<()> {
    let lab = Lab::builder().build()?;
    let short = Duration::from_millis(100);
    let to_closed_port = lab.c1().at(Family::V4, 40002);
    let client = tcp::Client::new(&lab.a().netns).deadline(short);
    assert!(client.connect(to_closed_port)?.refused());
    assert!(udp::ask(&lab.a().netns, 0, to_closed_port, b"?", short)?.refused());

    let nowhere = "203.0.113.1:80".parse()?;
    assert!(client.connect(nowhere)?.unreachable());
    assert!(udp::ask(&lab.a().netns, 0, nowhere, b"?", short)?.unreachable());
    assert!(icmp::echo(&lab.a().netns, nowhere.ip(), short)?.unreachable());

    lab.c1().netns.ip("route add blackhole 192.168.31.0/24")?;
    let silent = client.connect(to_closed_port)?;
    // poll(2) counts whole milliseconds.
    assert!(silent.timed_out() && silent.elapsed + Duration::from_millis(1) >= short, "{silent}");
    assert!(udp::ask(&lab.a().netns, 0, to_closed_port, b"?", short)?.timed_out());
    assert!(icmp::echo(&lab.a().netns, lab.c1().ip(Family::V4), short)?.timed_out());
    Ok(())
}

#[test]
fn a_held_connection_knows_that_it_was_cut() -> Result<()> {
    let lab = Lab::builder().build()?;
    let echo = tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, 40002))?;
    let mut connection = tcp::Client::new(&lab.a().netns).connect(echo.address())?.reached()?;
    connection.round_trip(SECOND)?;
    lab.c1().netns.ip("route add blackhole 192.168.31.0/24")?;
    let cut = connection.round_trip(Duration::from_millis(100)).map_err(|e| e.kind());
    assert_eq!(cut, Err(std::io::ErrorKind::TimedOut));
    Ok(())
}

#[test]
fn without_routes_lan_hosts_do_not_reach_pods() -> Result<()> {
    let lab = Lab::builder().without_routes().build()?;
    for family in Family::BOTH {
        assert!(icmp::echo(&lab.a().netns, lab.c1().ip(family), SECOND)?.unreachable());
        assert!(icmp::echo(&lab.a().netns, lab.b().ip(family), SECOND)?.succeeded());
    }
    Ok(())
}

#[test]
fn masquerade_shows_the_node_s_address_to_the_lan_only() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    for family in Family::BOTH {
        for (server, seen) in [(lab.a(), lab.b().ip(family)), (lab.c2(), lab.c1().ip(family))] {
            let sink = tcp::Server::sink(&server.netns, server.at(family, 0))?;
            tcp::Client::new(&lab.c1().netns).connect(sink.address())?.reached()?;
            let peers = eventually(SECOND, || Some(sink.peers()).filter(|peers| !peers.is_empty()));
            assert_eq!(peers.context("no datagram arrived")?[0].ip(), seen);
        }
    }
    Ok(())
}

#[test]
fn a_node_port_leads_to_its_pod_and_keeps_the_client_s_address() -> Result<()> {
    let lab = Lab::builder().node_port(NodePort { port: 30080, pod: 1, pod_port: 8080 }).build()?;
    for family in Family::BOTH {
        let echo = tcp::Server::echo(&lab.c2().netns, lab.c2().at(family, 8080))?;
        let client = tcp::Client::new(&lab.a().netns).source_port(61001);
        let mut connection = client.connect(lab.b().at(family, 30080))?.reached()?;
        connection.round_trip(SECOND)?;
        assert_eq!(echo.peers(), [lab.a().at(family, 61001)]);
    }
    Ok(())
}

#[test]
fn connections_are_tracked_only_when_asked_for() -> Result<()> {
    for tracked in [false, true] {
        let builder = Lab::builder();
        let lab = if tracked { builder.conntrack() } else { builder }.build()?;
        let echo = tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, 40002))?;
        tcp::Client::new(&lab.a().netns).connect(echo.address())?.reached()?;
        let mut list = Command::new("conntrack");
        list.args(["--dump", "--proto", "tcp", "--dport", "40002"]);
        assert_eq!(lab.b().netns.output(list)?.contains("192.168.31.67"), tracked);
    }
    Ok(())
}

#[test]
fn pods_of_two_nodes_reach_each_other() -> Result<()> {
    let lab = Lab::builder().nodes(2).pods(3).build()?;
    assert_eq!((lab.nodes().len(), lab.pods().len()), (2, 6));
    assert_eq!(lab.pods()[5].v4.to_string(), "10.200.2.93");
    for family in Family::BOTH {
        assert!(icmp::echo(&lab.c1().netns, lab.pods()[5].ip(family), SECOND)?.succeeded());
        assert!(icmp::echo(&lab.a().netns, lab.pods()[5].ip(family), SECOND)?.succeeded());
        assert!(lab.pod_network(1, family).contains(&lab.pods()[5].ip(family)));
    }
    Ok(())
}

/// A kernel either has VLAN interfaces, and then frames are tagged, or the lab names the missing feature.
#[test]
fn on_a_vlan_frames_are_tagged() -> Result<()> {
    let lab = match Lab::builder().vlan(31).build() {
        Ok(lab) => lab,
        Err(e) => {
            ensure!(format!("{e:#}").contains("CONFIG_VLAN_8021Q"), "{e:#}");
            return Ok(());
        }
    };
    let mut capture = Capture::start(&lab.b().netns, "eth0")?;
    assert!(icmp::echo(&lab.a().netns, lab.c1().ip(Family::V4), SECOND)?.succeeded());
    let to_pod = Some((lab.a().ip(Family::V4), lab.c1().ip(Family::V4)));
    let frame = capture.find(SECOND, |frame| frame.addresses() == to_pod)?.context("no such frame")?;
    assert_eq!(frame.headers().context("headers")?.vlan_ids()[0].value(), 31);
    Ok(())
}

#[test]
fn offloads_can_be_turned_off() -> Result<()> {
    for off in [false, true] {
        let builder = Lab::builder();
        let lab = if off { builder.without_offloads() } else { builder }.build()?;
        let mut features = Command::new("ethtool");
        features.args(["--show-features", &lab.c1().peer_interface]);
        let features = lab.b().netns.output(features)?;
        for feature in ["tx-checksumming", "tcp-segmentation-offload", "generic-segmentation-offload"] {
            assert_eq!(features.contains(&format!("{feature}: off")), off, "{feature}");
        }
    }
    Ok(())
}

#[test]
fn labs_live_side_by_side_in_one_process() -> Result<()> {
    let labs = [Lab::builder().build()?, Lab::builder().build()?];
    let servers =
        labs.each_ref().map(|lab| tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, 40002)));
    for (lab, server) in labs.iter().zip(servers) {
        let server = server?;
        let client = tcp::Client::new(&lab.a().netns).source_port(61001);
        client.connect(server.address())?.reached()?.round_trip(SECOND)?;
        assert_eq!(server.peers().len(), 1, "each its own");
    }
    Ok(())
}

#[test]
fn a_panic_leaves_nothing_behind() -> Result<()> {
    let (sender, id) = std::sync::mpsc::channel();
    let panicked = std::thread::spawn(move || {
        let lab = Lab::builder().build().expect("a lab");
        let _child = lab.c1().netns.spawn_command(sleeper()).expect("a child");
        sender.send(lab.id()).expect("a receiver");
        lab.c1().netns.run(|| panic!("on purpose"))
    });
    assert!(panicked.join().is_err());
    assert_traceless(id.recv()?)
}

#[test]
fn children_run_in_the_namespace_and_die_with_the_lab() -> Result<()> {
    let lab = Lab::builder().build()?;
    let id = lab.id();
    let mut shell = Command::new("sh");
    // A child that has a child of its own.
    shell.args(["-c", "sleep 60 >&2 & ip -brief address show dev eth0; echo $!; wait"]);
    shell.stdout(Stdio::piped());
    let mut child = lab.c1().netns.spawn_command(shell)?;
    let mut lines = BufReader::new(child.child().stdout.take().context("a pipe")?).lines();
    assert!(lines.next().context("a line")??.contains("10.200.1.91"));
    let grandchild: u32 = lines.next().context("a line")??.parse()?;
    // Even a handle that is never dropped does not keep it alive.
    std::mem::forget(child);
    eventually(SECOND, || runs(grandchild).then_some(())).context("the grandchild does not run")?;
    drop(lab);
    assert!(!runs(grandchild));
    assert_traceless(id)
}

fn lab_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(sibling("lab").expect("`cargo xtask test` builds it"));
    command.args(arguments);
    command
}

#[test]
fn lab_up_stays_until_it_is_told_to_end() -> Result<()> {
    let (mut up, _output, id) = lab_up()?;
    assert!(all().contains(&id));
    let pid = rustix::process::Pid::from_child(&up);
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    assert!(up.wait()?.success());
    assert_traceless(id)
}

#[test]
fn lab_clean_removes_the_lab_of_a_killed_owner() -> Result<()> {
    let (mut up, _output, id) = lab_up()?;
    up.kill()?;
    up.wait()?;
    ensure!(lab_command(&["clean"]).status()?.success());
    assert_traceless(id)
}

#[test]
fn every_scene_comes_out_and_is_one_json_object() -> Result<()> {
    for arguments in [["--once", "--json"].as_slice(), &["run", "--json", "--once"]] {
        let output = lab_command(arguments).output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(output.status.success(), "{text}");
        ensure!(text.lines().count() > 2, "{text}");
        for line in text.lines() {
            let scene: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line)?;
            assert_eq!(scene.keys().collect::<Vec<_>>(), ["expected", "name", "ok", "seen"]);
            assert_eq!(scene["ok"], true, "{line}");
        }
    }
    Ok(())
}

/// `lab up`; its output, which has to stay open for as long as it may print; the id of its lab.
fn lab_up() -> Result<(Child, BufReader<ChildStdout>, LabId)> {
    let mut child = lab_command(&["up"]).stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("a pipe")?);
    let mut line = String::new();
    while output.read_line(&mut line)? > 0 {
        if let Some(id) = line.split(' ').find_map(LabId::of) {
            return Ok((child, output, id));
        }
        line.clear();
    }
    bail!("lab up ended without naming its lab")
}

fn sleeper() -> Command {
    let mut sleep = Command::new("sleep");
    sleep.arg("60");
    sleep
}

fn runs(pid: u32) -> bool {
    // A process that has ended and was not collected yet has a directory, but no environment.
    std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| !environment.is_empty())
}

fn assert_traceless(id: LabId) -> Result<()> {
    ensure!(!all().contains(&id), "{id} left a trace");
    let namespaces = Command::new("ip").args(["netns", "list"]).output()?.stdout;
    ensure!(!String::from_utf8_lossy(&namespaces).contains(&id.to_string()), "ip netns lists {id}");
    let interfaces = std::fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = interfaces.filter(|name| name.to_string_lossy().starts_with("cali")).collect();
    ensure!(left.is_empty(), "{left:?} were left outside of the lab");
    ensure!(!Path::new("/run/bridge-lab").join(id.to_string()).exists(), "a directory was left");
    Ok(())
}
