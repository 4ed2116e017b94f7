//! Exports are accepted, and understood, by the tools they are made for.

use std::process::Command;

use bridge_agent::routes::export::{Format, export};
use bridge_agent::routes::{DesiredRoute, NextHop, Settings, Target};
use bridge_lab::netns::Ns;
use bridge_lab::routes::{own, want};

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
    let mut bird = host.enter(move || {
        Command::new("bird").arg("-f").arg("-c").arg(conf).arg("-s").arg(socket).spawn().unwrap()
    });
    let lines = || {
        let all = host.foreign_routes();
        all.into_iter()
            .filter(|line| line.contains("10.200.") || line.contains("fd00:200:"))
            .collect::<Vec<_>>()
    };
    let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bridge_lab::wait::until("bird has made eight routes", std::time::Duration::from_secs(20), || {
            lines().len() == 8
        });
    }));
    let lines = lines();
    bird.kill().unwrap();
    bird.wait().unwrap();
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
