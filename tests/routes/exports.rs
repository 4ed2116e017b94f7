//! Exports are accepted, and understood, by the tools they are made for.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use bridge_agent::routes::export::{Format, export};
use bridge_agent::routes::{DesiredRoute, NextHop, Settings, Target};
use bridge_lab::netns::Ns;
use bridge_lab::routes::{own, want};
use bridge_lab::wait::until;

const DEADLINE: Duration = Duration::from_secs(20);

/// Ends with the test.
struct Daemon(Child);

impl Daemon {
    fn start(ns: &Ns, command: &mut Command) -> Self {
        Self(ns.enter(|| command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn routes() -> Vec<DesiredRoute> {
    let hop = |via: &str, dev: Option<&str>, weight| NextHop {
        via: via.parse().unwrap(),
        dev: dev.map(Into::into),
        weight,
    };
    let several = |to: &str, first: &str, second: &str| DesiredRoute {
        target: Target::Forward {
            via: vec![hop(first, None, 1), hop(second, Some("eth1"), 3)],
            backup: vec![hop(second, None, 1)],
        },
        ..want(to, first)
    };
    vec![
        want("10.200.1.0/24", "192.168.31.17"),
        want("10.200.2.91/32", "192.168.31.18"),
        want("fd00:200:1::/64", "fd31::17"),
        DesiredRoute {
            target: Target::Forward { via: vec![hop("fe80::17", Some("eth0"), 1)], backup: Vec::new() },
            ..want("fd00:200:2::5b/128", "::")
        },
        several("10.200.3.0/24", "192.168.31.17", "192.168.32.17"),
        several("fd00:200:3::/64", "fd31::17", "fd32::17"),
        DesiredRoute { target: Target::Blackhole, metric: Some(7), ..want("10.200.9.0/24", "::") },
        DesiredRoute { target: Target::Blackhole, ..want("fd00:200:9::/64", "::") },
    ]
}

fn host() -> (Ns, Ns) {
    let (host, lan) = (Ns::new(), Ns::new());
    for (index, third) in [31, 32].into_iter().enumerate() {
        let device = format!("eth{index}");
        host.link(&device, &lan, &format!("lan{index}"));
        host.address(&device, &format!("192.168.{third}.67/24"));
        host.address(&device, &format!("fd{third}::67/64"));
    }
    (host, lan)
}

#[test]
fn ip_batch_makes_the_routes_and_can_be_run_again() {
    let (host, _lan) = host();
    let mut routes = routes();
    routes.push(want("10.200.4.0/24", "fd31::17"));
    let batch = export(Format::Iproute2, &routes, &Settings::default(), None).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), batch).unwrap();
    for _ in 0..2 {
        host.run("ip", &["-batch", file.path().to_str().unwrap()]);
        let found = host.own_routes();
        for line in [
            own("10.200.1.0/24", "192.168.31.17", "eth0"),
            own("10.200.2.91/32", "192.168.31.18", "eth0"),
            own("10.200.4.0/24", "fd31::17", "eth0"),
            own("fd00:200:1::/64", "fd31::17", "eth0"),
            own("fd00:200:2::5b/128", "fe80::17", "eth0"),
            "unicast 10.200.3.0/24 via 192.168.31.17 dev eth0 weight 1 via 192.168.32.17 dev eth1 weight 3 metric 1024 table main".into(),
            "unicast fd00:200:3::/64 via fd31::17 dev eth0 weight 1 via fd32::17 dev eth1 weight 3 metric 1024 table main".into(),
            "blackhole 10.200.9.0/24 metric 7 table main".into(),
            "blackhole fd00:200:9::/64 metric 1024 table main".into(),
        ] {
            assert!(found.contains(&line), "{line} is not in {found:#?}");
        }
        assert_eq!(found.len(), 9);
    }
}

#[test]
fn bird_parses_the_export_and_makes_the_routes() {
    let text = export(Format::Bird, &routes(), &Settings::default(), None).unwrap();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("bridge.conf"), text).unwrap();
    let conf = directory.path().join("bird.conf");
    std::fs::write(
        &conf,
        "router id 192.0.2.1;\nprotocol device {}\n\
         protocol kernel { ipv4 { export where source = RTS_STATIC; }; metric 0; merge paths on; }\n\
         protocol kernel { ipv6 { export where source = RTS_STATIC; }; metric 0; merge paths on; }\n\
         include \"bridge.conf\";\n",
    )
    .unwrap();
    let checked = Command::new("bird")
        .arg("-p")
        .arg("-c")
        .arg(&conf)
        .output()
        .expect("bird is installed (apt install bird2)");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    // And it puts the meant routes into the kernel.
    let (host, _lan) = host();
    let socket = directory.path().join("bird.ctl");
    let _bird =
        Daemon::start(&host, Command::new("bird").arg("-f").arg("-c").arg(conf).arg("-s").arg(socket));
    let lines = || {
        let all = host.foreign_routes();
        all.into_iter()
            .filter(|line| line.contains("10.200.") || line.contains("fd00:200:"))
            .collect::<Vec<_>>()
    };
    let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        until("bird has made eight routes", DEADLINE, || lines().len() == 8);
    }));
    let lines = lines();
    assert!(seen.is_ok(), "{lines:#?}");
    for part in [
        "unicast 10.200.1.0/24 via 192.168.31.17 dev eth0 metric 1024",
        "unicast 10.200.3.0/24 via 192.168.31.17 dev eth0 weight 1 via 192.168.32.17 dev eth1 weight 3 metric 1024",
        "unicast fd00:200:1::/64 via fd31::17 dev eth0 metric 1024",
        "unicast fd00:200:2::5b via fe80::17 dev eth0 metric 1024",
        "blackhole 10.200.9.0/24 metric 7",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(part)), "{part} is not in {lines:#?}");
    }
}

#[test]
fn frr_loads_the_export_and_makes_the_routes() {
    let equal = |to: &str, vias: [&str; 2]| DesiredRoute {
        target: Target::Forward {
            via: vias.map(|via| NextHop::new(via.parse().unwrap())).to_vec(),
            backup: Vec::new(),
        },
        ..want(to, vias[0])
    };
    let mut routes = routes();
    // FRR has no weights.
    routes.retain(|route| !matches!(&route.target, Target::Forward { via, .. } if via.len() > 1));
    routes.push(equal("10.200.3.0/24", ["192.168.31.17", "192.168.32.17"]));
    routes.push(equal("fd00:200:3::/64", ["fd31::17", "fd32::17"]));
    routes.push(DesiredRoute { table: Some(100), ..want("10.200.4.0/24", "192.168.31.18") });
    let text = export(Format::Frr, &routes, &Settings::default(), None).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path();
    // Debian's FRR runs as a user of its own.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(folder.join("bridge.conf"), text).unwrap();
    let (host, _lan) = host();
    let start = |name: &str| {
        let mut daemon = Command::new(Path::new("/usr/lib/frr").join(name));
        daemon
            .args(["-u", "frr", "-g", "frr", "-f", "/dev/null", "--log", "stdout", "--vty_socket"])
            .arg(folder);
        daemon.arg("-i").arg(folder.join(format!("{name}.pid"))).arg("-z").arg(folder.join("zserv.api"));
        let daemon = Daemon::start(&host, &mut daemon);
        until("FRR listens", DEADLINE, || folder.join(format!("{name}.vty")).exists());
        daemon
    };
    let _daemons = ["zebra", "staticd"].map(start);
    let vtysh = |arguments: &[&str]| {
        host.run("vtysh", &[&["--vty_socket", folder.to_str().unwrap()][..], arguments].concat())
    };
    vtysh(&["-f", folder.join("bridge.conf").to_str().unwrap()]);
    let lines = || {
        let all = host.foreign_routes();
        let of_pods = |line: &String| line.contains("10.200.") || line.contains("fd00:200:");
        all.into_iter().filter(of_pods).collect::<Vec<_>>()
    };
    let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        until("FRR has made every route", DEADLINE, || lines().len() == routes.len());
    }));
    let lines = lines();
    assert!(seen.is_ok(), "{lines:#?}\n{}", vtysh(&["-c", "show running-config"]));
    for part in [
        "unicast 10.200.1.0/24 via 192.168.31.17 dev eth0 ",
        "unicast 10.200.2.91 via 192.168.31.18 dev eth0 ",
        "unicast 10.200.3.0/24 via 192.168.31.17 dev eth0 weight 1 via 192.168.32.17 dev eth1 weight 1 ",
        "unicast 10.200.4.0/24 via 192.168.31.18 dev eth0 ",
        "blackhole 10.200.9.0/24 ",
        "unicast fd00:200:1::/64 via fd31::17 dev eth0 ",
        "unicast fd00:200:2::5b via fe80::17 dev eth0 ",
        "unicast fd00:200:3::/64 via fd31::17 dev eth0 weight 1 via fd32::17 dev eth1 weight 1 ",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(part)), "{part} is not in {lines:#?}");
    }
}

#[test]
fn a_dhcp_client_gets_the_routes_from_dnsmasq_in_words_and_in_bytes() {
    let mut routes: Vec<_> = ["10.200.1.0/24", "10.200.2.91/32", "10.192.0.0/11", "10.204.6.0/23"]
        .map(|to| want(to, "192.168.31.17"))
        .to_vec();
    routes.push(want("172.16.0.0/12", "192.168.31.18"));
    let text = export(Format::DhcpOption121, &routes, &Settings::default(), None).unwrap();
    let option = text.lines().find(|line| line.starts_with("dhcp-option=")).unwrap();
    let bytes = text.lines().last().unwrap().trim_start_matches("# ");
    let expected: Vec<_> = option.split_once(",").unwrap().1.split(',').collect();
    for option in [option, &format!("dhcp-option=121,{bytes}")] {
        let (client, server) = (Ns::new(), Ns::new());
        client.link("eth0", &server, "lan");
        server.address("lan", "192.168.31.1/24");
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        fs::write(
            file("dnsmasq.conf"),
            format!("port=0\ninterface=lan\ndhcp-range=192.168.31.100,192.168.31.120\n{option}\n"),
        )
        .unwrap();
        fs::write(
            file("script"),
            "#!/bin/sh\n[ \"$1\" != bound ] || echo \"$staticroutes\" >\"$0.routes\"\n",
        )
        .unwrap();
        fs::set_permissions(file("script"), fs::Permissions::from_mode(0o755)).unwrap();
        let mut dnsmasq = Command::new("dnsmasq");
        dnsmasq.args(["--keep-in-foreground", "--user=root", "--log-facility=-", "--no-ping"]);
        for (option, name) in
            [("conf-file", "dnsmasq.conf"), ("dhcp-leasefile", "leases"), ("pid-file", "pid")]
        {
            dnsmasq.arg(format!("--{option}={}", file(name).display()));
        }
        let _dnsmasq = Daemon::start(&server, &mut dnsmasq);
        let script = file("script").display().to_string();
        let udhcpc =
            ["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "20", "-T", "1", "-O", "staticroutes", "-s"];
        client.run("busybox", &[&udhcpc[..], &[&script]].concat());
        let received = fs::read_to_string(file("script.routes")).unwrap();
        assert_eq!(received.split_whitespace().collect::<Vec<_>>(), expected, "{option}");
    }
}
