use super::*;
use crate::routes::SourceKind;

fn routes(yaml: &str) -> Vec<DesiredRoute> {
    let entries: Vec<crate::config::StaticRoute> = serde_saphyr::from_str(yaml).unwrap();
    crate::routes::sources::static_routes(&entries)
}

/// A pod of a node, a network with a metric and table of its own, a blackhole; both families.
fn plain() -> Vec<DesiredRoute> {
    let mut all = routes(
        r#"
        - {to: 10.200.1.0/24, via: 192.168.31.17}
        - {to: 10.200.2.0/24, via: 192.168.31.18, metric: 50, table: 100}
        - {to: 10.200.9.0/24, blackhole: true}
        - {to: "fd00:200:1::/64", via: "fd31::17"}
    "#,
    );
    all.push(DesiredRoute::forward(
        "10.200.1.91/32".parse().unwrap(),
        "192.168.31.17".parse().unwrap(),
        SourceKind::Discovery,
        "pod\nrm -rf /",
    ));
    all
}

fn several() -> Vec<DesiredRoute> {
    routes(
        r#"
        - {to: 10.200.2.0/24, via: [192.168.31.18, {via: 192.168.31.19, dev: eth1, weight: 3}], backup: 192.168.31.20}
        - {to: "fd00:200:2::/64", via: ["fd31::18", {via: "fd31::19", weight: 2}]}
    "#,
    )
}

fn text(format: Format, routes: &[DesiredRoute]) -> String {
    export(format, routes, &Settings::default(), Some("eth0"))
        .unwrap_or_else(|error| format!("error: {error}"))
}

#[test]
fn every_format_says_the_same() {
    use clap::ValueEnum;
    for format in Format::value_variants() {
        let both = match format {
            // No words for a blackhole.
            Format::Windows => text(*format, &plain()[..2]) + &text(*format, &plain()[3..]),
            Format::Routeros | Format::Ios | Format::DhcpOption121 => {
                let can = |route: &DesiredRoute| export(*format, [route], &Settings::default(), None).is_ok();
                text(*format, &plain().into_iter().filter(can).collect::<Vec<_>>())
            }
            _ => text(*format, &plain()),
        };
        assert!(!both.lines().any(|line| line.starts_with("rm ")), "{both}");
        insta::assert_snapshot!(format.to_string(), both);
    }
}

#[test]
fn several_next_hops_are_said_or_refused() {
    use clap::ValueEnum;
    let all: Vec<_> = Format::value_variants()
        .iter()
        .map(|format| format!("== {format}\n{}", text(*format, &several())))
        .collect();
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn what_a_format_cannot_say_is_an_error() {
    let mixed = routes("- {to: 10.200.1.0/24, via: 'fd31::17'}");
    assert_eq!(
        text(Format::Windows, &plain()),
        "error: windows cannot express the blackhole of 10.200.9.0/24; export it in another format, or leave it out"
    );
    for format in [
        Format::Netplan,
        Format::NetworkManager,
        Format::Windows,
        Format::Routeros,
        Format::Ios,
        Format::Frr,
        Format::Openwrt,
        Format::DhcpOption121,
    ] {
        assert!(
            text(format, &mixed).contains("cannot express the IPv6 next hop of 10.200.1.0/24"),
            "{format}"
        );
    }
    assert!(text(Format::Iproute2, &mixed).contains("via inet6 fd31::17"));
    let refused = |format| {
        let of = |route| {
            export(format, [&route], &Settings::default(), Some("lan")).err().map(|_| route.to.to_string())
        };
        plain().into_iter().filter_map(of).collect::<Vec<_>>()
    };
    assert_eq!(refused(Format::Routeros), ["10.200.2.0/24"], "another table");
    assert_eq!(refused(Format::Ios), ["10.200.2.0/24"]);
    assert_eq!(refused(Format::Frr), [""; 0]);
    assert_eq!(refused(Format::Openwrt), [""; 0]);
    assert_eq!(
        refused(Format::DhcpOption121),
        ["10.200.2.0/24", "10.200.9.0/24", "fd00:200:1::/64"],
        "another table, a blackhole, and IPv6"
    );
    let weighted = several();
    for format in [Format::Routeros, Format::Ios, Format::Frr] {
        assert!(text(format, &weighted).contains("cannot express the weights of 10.200.2.0/24"), "{format}");
    }
    // Each takes eight bytes.
    let many: Vec<_> =
        (0..32).map(|n| routes(&format!("- {{to: 10.{n}.0.0/24, via: 192.168.31.17}}")).remove(0)).collect();
    assert!(export(Format::DhcpOption121, &many[..31], &Settings::default(), None).is_ok());
    assert!(text(Format::DhcpOption121, &many).contains("the routes take 256 bytes in dhcp-option-121"));
    assert!(text(Format::DhcpOption121, &[]).lines().all(|line| line.starts_with('#')));
    let no_device = export(Format::Netplan, &plain(), &Settings::default(), None).unwrap_err();
    assert_eq!(no_device.to_string(), "netplan files name the interface; write `--dev NAME`");
}

#[test]
fn netplan_is_yaml_with_the_routes_in_it() {
    let yaml: serde_json::Value = serde_saphyr::from_str(&text(Format::Netplan, &plain()[..1])).unwrap();
    let expected = serde_json::json!([{"to": "10.200.1.0/24", "via": "192.168.31.17", "metric": 1024}]);
    assert_eq!(yaml["network"]["ethernets"]["eth0"]["routes"], expected);
}
