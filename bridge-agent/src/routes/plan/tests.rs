use proptest::prelude::*;

use super::*;
use crate::routes::model::{Address, KernelHop, Link, NextHop, SourceKind, TABLE_LOCAL, TABLE_MAIN, Target};

/// A LAN host as in the design: eth0 192.168.31.67/24 and fd31::67/64, a second LAN on eth1, eth2 down.
fn host() -> Observed {
    let mut host = Observed { v4_via_v6: true, ..Observed::default() };
    for (index, name, up) in [(1, "lo", true), (2, "eth0", true), (3, "eth1", true), (4, "eth2", false)] {
        host.links.insert(index, Link { name: name.into(), up });
    }
    for (ifindex, net) in [
        (1, "127.0.0.1/8"),
        (2, "192.168.31.67/24"),
        (2, "fd31::67/64"),
        (3, "192.168.32.67/24"),
        (4, "192.168.33.67/24"),
    ] {
        host.addresses.push(Address { ifindex, net: net.parse().unwrap() });
    }
    host.routes = vec![
        kernel("local", "127.0.0.0/8", None, 1, TABLE_LOCAL, 0),
        kernel("local", "192.168.31.67/32", None, 2, TABLE_LOCAL, 0),
        kernel("broadcast", "192.168.31.255/32", None, 2, TABLE_LOCAL, 0),
        kernel("kernel", "192.168.31.0/24", None, 2, TABLE_MAIN, 0),
        kernel("kernel", "192.168.32.0/24", None, 3, TABLE_MAIN, 0),
        kernel("kernel", "fd31::/64", None, 2, TABLE_MAIN, 256),
        kernel("kernel", "fe80::/64", None, 2, TABLE_MAIN, 256),
        kernel("dhcp", "0.0.0.0/0", Some("192.168.31.1"), 2, TABLE_MAIN, 100),
    ];
    host
}

fn kernel(
    protocol_name: &str,
    to: &str,
    via: Option<&str>,
    ifindex: u32,
    table: u32,
    metric: u32,
) -> KernelRoute {
    let (kind, protocol) = match protocol_name {
        "local" => (RouteKind::Local, 2),
        "broadcast" => (RouteKind::Broadcast, 2),
        "kernel" => (RouteKind::Unicast, 2),
        "dhcp" => (RouteKind::Unicast, 16),
        "static" => (RouteKind::Unicast, 4),
        "own" => (RouteKind::Unicast, PROTOCOL),
        "own blackhole" => (RouteKind::Blackhole, PROTOCOL),
        other => panic!("{other}"),
    };
    let hops = match kind {
        RouteKind::Blackhole => Vec::new(),
        _ => vec![KernelHop { via: via.map(|via| via.parse().unwrap()), ifindex, weight: 1 }],
    };
    let key = RouteKey { table, to: to.parse().unwrap(), tos: 0, metric };
    KernelRoute { key, protocol, kind, hops, altered: false }
}

fn own(to: &str, via: &str, ifindex: u32) -> KernelRoute {
    kernel("own", to, Some(via), ifindex, TABLE_MAIN, 1024)
}

fn want(to: &str, via: &[&str]) -> DesiredRoute {
    let via = via.iter().map(|via| NextHop::new(via.parse().unwrap())).collect();
    DesiredRoute {
        to: to.parse().unwrap(),
        target: Target::Forward { via, backup: Vec::new() },
        metric: None,
        table: None,
        source: SourceKind::Static,
        origin: String::new(),
    }
}

/// Plan and verdicts as `routes plan` shows them.
fn shown(desired: &[DesiredRoute], observed: &Observed, settings: &Settings) -> String {
    let plan = plan(desired, observed, settings, false);
    let mut text: Vec<String> = plan.operations.iter().map(|operation| operation.show(observed)).collect();
    for (route, verdict) in desired.iter().zip(&plan.verdicts) {
        match verdict {
            Verdict::Refused(refusal) => text.push(format!("! {refusal}")),
            Verdict::Installed { partly: Some(refusal), .. } => text.push(format!("? {refusal}")),
            Verdict::Installed { partly: None, .. } => {}
            Verdict::Down => text.push(format!("down {}", route.to)),
        }
    }
    text.join("\n")
}

fn plain(desired: &[DesiredRoute], observed: &Observed) -> String {
    shown(desired, observed, &Settings::default())
}

#[test]
fn adds_segments_and_single_pods_of_both_families() {
    let desired = [
        want("10.200.1.0/24", &["192.168.31.17"]),
        want("10.200.2.91/32", &["192.168.32.18"]),
        want("fd00:200:1::/64", &["fd31::17"]),
        want("fd00:200:2::5b/128", &["fd31::18"]),
    ];
    insta::assert_snapshot!(plain(&desired, &host()), @r"
    + 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024
    + 10.200.2.91/32 via 192.168.32.18 dev eth1 proto 98 metric 1024
    + fd00:200:1::/64 via fd31::17 dev eth0 proto 98 metric 1024
    + fd00:200:2::5b/128 via fd31::18 dev eth0 proto 98 metric 1024
    ");
}

#[test]
fn what_is_there_already_is_left_alone() {
    let mut observed = host();
    observed.routes.push(own("10.200.1.0/24", "192.168.31.17", 2));
    assert_eq!(plain(&[want("10.200.1.0/24", &["192.168.31.17"])], &observed), "");
}

#[test]
fn a_changed_next_hop_is_replaced_and_the_unwanted_deleted_last() {
    let mut observed = host();
    observed.routes.push(own("10.200.0.0/24", "192.168.31.16", 2));
    observed.routes.push(own("10.200.1.0/24", "192.168.31.17", 2));
    let desired = [want("10.200.1.0/24", &["192.168.31.18"]), want("10.200.2.0/24", &["192.168.31.19"])];
    insta::assert_snapshot!(plain(&desired, &observed), @r"
    ~ 10.200.1.0/24 via 192.168.31.18 dev eth0 proto 98 metric 1024  (was 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024)
    + 10.200.2.0/24 via 192.168.31.19 dev eth0 proto 98 metric 1024
    - 10.200.0.0/24 via 192.168.31.16 dev eth0 proto 98 metric 1024
    ");
}

#[test]
fn a_changed_metric_adds_before_it_deletes() {
    let mut observed = host();
    observed.routes.push(own("10.200.1.0/24", "192.168.31.17", 2));
    let settings = Settings { metric: 50, ..Settings::default() };
    insta::assert_snapshot!(shown(&[want("10.200.1.0/24", &["192.168.31.17"])], &observed, &settings), @r"
    + 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 50
    - 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024
    ");
}

#[test]
fn a_route_somebody_altered_is_put_right() {
    let mut observed = host();
    observed.routes.push(KernelRoute { altered: true, ..own("10.200.1.0/24", "192.168.31.17", 2) });
    insta::assert_snapshot!(plain(&[want("10.200.1.0/24", &["192.168.31.17"])], &observed), @"~ 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024  (was 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024)");
}

#[test]
fn multipath_table_and_metric_are_configurable() {
    let mut route = want("10.200.1.0/24", &["192.168.31.17", "192.168.32.18"]);
    let Target::Forward { via, .. } = &mut route.target else { unreachable!() };
    via[1].weight = 3;
    route.table = Some(100);
    route.metric = Some(7);
    insta::assert_snapshot!(plain(&[route], &host()), @"+ 10.200.1.0/24 nexthop via 192.168.31.17 dev eth0 weight 1 nexthop via 192.168.32.18 dev eth1 weight 3 proto 98 table 100 metric 7");
}

#[test]
fn a_next_hop_that_is_down_yields_to_the_other_and_then_to_the_backup() {
    let mut route = want("10.200.1.0/24", &["192.168.31.17", "192.168.31.18"]);
    let Target::Forward { backup, .. } = &mut route.target else { unreachable!() };
    backup.push(NextHop::new("192.168.32.19".parse().unwrap()));
    let mut observed = host();
    let mut lines = Vec::new();
    for (down, ifindex) in [("192.168.31.17", 2), ("192.168.31.18", 2), ("192.168.32.19", 3)] {
        observed.down.insert((down.parse().unwrap(), ifindex));
        lines.push(plain(std::slice::from_ref(&route), &observed));
    }
    insta::assert_snapshot!(lines.join("\n"), @r"
    + 10.200.1.0/24 via 192.168.31.18 dev eth0 proto 98 metric 1024
    + 10.200.1.0/24 via 192.168.32.19 dev eth1 proto 98 metric 1024
    down 10.200.1.0/24
    ");
    let blackhole = Settings { on_withdraw: OnWithdraw::Blackhole, ..Settings::default() };
    insta::assert_snapshot!(shown(&[route], &observed, &blackhole), @r"
    + blackhole 10.200.1.0/24 proto 98 metric 1024
    down 10.200.1.0/24
    ");
}

#[test]
fn a_blackhole_stands_for_a_withdrawn_node_until_something_covers_it() {
    let blackhole = Settings { on_withdraw: OnWithdraw::Blackhole, ..Settings::default() };
    let mut observed = host();
    observed.routes.push(own("10.200.1.0/24", "192.168.31.17", 2));
    insta::assert_snapshot!(shown(&[], &observed, &blackhole), @"~ blackhole 10.200.1.0/24 proto 98 metric 1024  (was 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024)");

    observed.routes.pop();
    observed.routes.push(kernel("own blackhole", "10.200.1.0/24", None, 0, TABLE_MAIN, 1024));
    assert_eq!(shown(&[], &observed, &blackhole), "");
    insta::assert_snapshot!(shown(&[want("10.200.0.0/16", &["192.168.31.17"])], &observed, &blackhole), @r"
    + 10.200.0.0/16 via 192.168.31.17 dev eth0 proto 98 metric 1024
    - blackhole 10.200.1.0/24 proto 98 metric 1024
    ");
    // Without the wish for it, it is removed like any other unwanted route.
    assert_eq!(plain(&[], &observed), "- blackhole 10.200.1.0/24 proto 98 metric 1024");
}

#[test]
fn nothing_is_taken_away_while_a_source_is_silent() {
    let mut observed = host();
    observed.routes.push(own("10.200.1.0/24", "192.168.31.17", 2));
    assert_eq!(plan::<DesiredRoute>(&[], &observed, &Settings::default(), true).operations, []);
    // A refused route is removed nevertheless.
    observed.routes.push(kernel("static", "10.200.1.0/28", Some("192.168.31.1"), 2, TABLE_MAIN, 0));
    let refused = plan(&[want("10.200.1.0/24", &["192.168.31.17"])], &observed, &Settings::default(), true);
    assert!(matches!(refused.operations.as_slice(), [Operation::Delete(_)]), "{refused:?}");
}

#[test]
fn every_refusal_names_both_sides_and_a_remedy() {
    let mut observed = host();
    observed.routes.push(kernel("static", "10.96.0.0/12", Some("192.168.31.1"), 2, TABLE_MAIN, 0));
    observed.routes.push(kernel("static", "10.201.7.0/24", Some("192.168.31.1"), 2, TABLE_MAIN, 0));
    observed.routes.push(kernel("static", "192.168.31.128/28", Some("192.168.31.1"), 2, TABLE_MAIN, 0));
    observed.v4_via_v6 = false;
    observed.links.insert(9, Link { name: "wg0".into(), up: true });
    let with_dev = |route: &mut DesiredRoute, dev: &str| {
        let Target::Forward { via, .. } = &mut route.target else { unreachable!() };
        via[0].dev = Some(dev.into());
    };
    let mut wrong_device = want("10.200.2.0/24", &["192.168.31.17"]);
    with_dev(&mut wrong_device, "wg0");
    let mut missing_device = want("10.200.3.0/24", &["192.168.31.17"]);
    with_dev(&mut missing_device, "eth9");
    let desired = [
        want("0.0.0.0/0", &["192.168.31.17"]),
        want("::/0", &["fd31::17"]),
        want("192.168.31.128/25", &["192.168.32.17"]),
        want("192.168.0.0/16", &["192.168.32.17"]),
        want("10.100.1.0/24", &["192.168.31.17"]),
        want("10.201.0.0/16", &["192.168.31.17"]),
        want("10.96.0.0/12", &["192.168.31.17"]),
        want("127.0.1.0/24", &["192.168.31.17"]),
        want("ff02::/64", &["fd31::17"]),
        want("10.200.4.0/24", &["172.16.0.1"]),
        want("10.200.5.0/24", &["192.168.33.17"]),
        want("10.200.6.0/24", &["192.168.31.130"]),
        want("10.200.7.0/24", &["192.168.31.67"]),
        want("10.200.8.0/24", &["192.168.31.255"]),
        want("10.200.9.0/24", &["fd31::17"]),
        want("fd00:200::/64", &["192.168.31.17"]),
        want("fd00:201::/64", &["fe80::17"]),
        want("10.200.10.0/24", &["10.200.10.1"]),
        want("10.200.11.0/24", &[]),
        wrong_device,
        missing_device,
    ];
    insta::assert_snapshot!(plain(&desired, &observed));
}

#[test]
fn a_foreign_network_may_be_narrowed_where_the_operator_says_so() {
    let mut observed = host();
    observed.routes.push(kernel("static", "10.0.0.0/8", Some("192.168.31.1"), 2, TABLE_MAIN, 0));
    let settings = Settings { allow_inside: vec!["10.0.0.0/8".parse().unwrap()], ..Settings::default() };
    let desired = [want("10.200.1.0/24", &["192.168.31.17"]), want("10.0.0.0/8", &["192.168.31.17"])];
    insta::assert_snapshot!(shown(&desired, &observed, &settings), @r"
    + 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024
    ! 10.0.0.0/8 via 192.168.31.17 (static) overlaps `10.0.0.0/8 via 192.168.31.1 dev eth0 proto static`, which bridge did not make; remove one of the two
    ");
}

#[test]
fn foreign_routes_of_other_tables_do_not_matter_but_connected_ones_do() {
    let mut observed = host();
    observed.routes.push(kernel("static", "10.200.1.0/24", Some("192.168.31.1"), 2, 77, 0));
    assert!(plain(&[want("10.200.1.0/24", &["192.168.31.17"])], &observed).starts_with("+ "));
    let settings = Settings { table: 100, ..Settings::default() };
    assert!(shown(&[want("192.168.32.0/25", &["192.168.31.17"])], &observed, &settings).starts_with("! "));
}

#[test]
fn one_unusable_next_hop_of_two_is_left_out_and_named() {
    insta::assert_snapshot!(plain(&[want("10.200.1.0/24", &["192.168.31.17", "192.168.33.18"])], &host()), @r"
    + 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024
    ? 10.200.1.0/24 via 192.168.31.17 via 192.168.33.18 (static): next hop 192.168.33.18 is not on-link: interface eth2 (192.168.33.67/24) is down; write a next hop that shares a network with this host
    ");
}

#[test]
fn withdraw_takes_own_routes_and_nothing_else() {
    let mut observed = host();
    let mine =
        [own("10.200.1.0/24", "192.168.31.17", 2), kernel("own blackhole", "10.9.0.0/24", None, 0, 100, 3)];
    observed.routes.extend(mine.clone());
    assert_eq!(withdraw(&observed), mine.map(|route| Operation::Delete(Arc::new(route))));
}

/// Applies operations as the kernel does (IPv4 rules: one key may have several routes, `replace` changes the first).
fn apply(observed: &mut Observed, operations: &[Operation]) {
    for operation in operations {
        match operation {
            Operation::Add(route) => {
                assert!(!observed.routes.iter().any(|there| there.key == route.key), "EEXIST: {route:?}");
                observed.routes.push((**route).clone());
            }
            Operation::Replace { old, new } => {
                assert_eq!(old.key, new.key);
                let first = observed.routes.iter_mut().find(|there| there.key == new.key).expect("ENOENT");
                assert_eq!(*first, **old, "a foreign or unknown route would be replaced");
                *first = (**new).clone();
            }
            Operation::Delete(route) => {
                let place = observed.routes.iter().position(|there| *there == **route).expect("ESRCH");
                assert!(observed.routes.remove(place).is_own());
            }
        }
    }
}

fn any_route() -> impl Strategy<Value = (String, String)> {
    // Few networks and next hops, so that everything meets everything.
    (
        prop_oneof![0u8..4, 30u8..34],
        22u8..=26,
        prop::sample::select(vec!["31.17", "31.18", "32.19", "33.20", "31.67", "99.1"]),
    )
        .prop_map(|(third, len, via)| {
            let base = if third < 4 { format!("10.200.{third}.0") } else { format!("192.168.{third}.0") };
            let net: ipnet::IpNet = format!("{base}/{len}").parse().unwrap();
            (net.trunc().to_string(), format!("192.168.{via}"))
        })
}

proptest! {
    #[test]
    fn applying_a_plan_leaves_nothing_to_plan_and_every_foreign_route_as_it_was(
        wanted in prop::collection::btree_map(any_route().prop_map(|(to, _)| to), prop::collection::vec(any_route().prop_map(|(_, via)| via), 1..3), 0..8),
        own_routes in prop::collection::vec((any_route(), 0u32..3, any::<bool>()), 0..8),
        foreign in prop::collection::vec((any_route(), 0u32..3), 0..4),
        down in prop::collection::vec(any_route().prop_map(|(_, via)| via), 0..3),
        blackhole in any::<bool>(),
    ) {
        let desired: Vec<_> = wanted.iter().map(|(to, via)| want(to, &via.iter().map(String::as_str).collect::<Vec<_>>())).collect();
        let mut observed = host();
        for ((to, via), metric) in &foreign {
            observed.routes.push(kernel("static", to, Some(via), 2, TABLE_MAIN, [0, 1024, 7][*metric as usize]));
        }
        for ((to, via), metric, altered) in &own_routes {
            let mut route = kernel("own", to, Some(via), 2, TABLE_MAIN, [1024, 7, 50][*metric as usize]);
            route.altered = *altered;
            observed.routes.push(route);
        }
        observed.down = down.iter().map(|via| (via.parse().unwrap(), if via.contains(".32.") { 3 } else { 2 })).collect();
        let settings = Settings { on_withdraw: if blackhole { OnWithdraw::Blackhole } else { OnWithdraw::Remove }, ..Settings::default() };
        let foreign_before: Vec<_> = observed.routes.iter().filter(|route| !route.is_own()).cloned().collect();

        let first = plan(&desired, &observed, &settings, false);
        apply(&mut observed, &first.operations);

        let foreign_after: Vec<_> = observed.routes.iter().filter(|route| !route.is_own()).cloned().collect();
        prop_assert_eq!(foreign_before, foreign_after);
        let second = plan(&desired, &observed, &settings, false);
        prop_assert_eq!(&second.operations, &[]);
        prop_assert_eq!(&first.verdicts, &second.verdicts);

        // No route of ours overlaps foreign ones, except the default route.
        for mine in observed.routes.iter().filter(|route| route.is_own()) {
            for other in observed.routes.iter().filter(|route| !route.is_own() && route.key.to.prefix_len() > 0) {
                let (mine, other) = (mine.key.to, other.key.to);
                prop_assert!(!mine.contains(&other) && !other.contains(&mine), "{} and {}", mine, other);
            }
        }
        // An installed route exists; a refused one does not.
        for (desired, verdict) in desired.iter().zip(&second.verdicts) {
            let there = observed.routes.iter().any(|route| route.is_own() && route.key.to == desired.to && route.kind == RouteKind::Unicast);
            prop_assert_eq!(there, matches!(verdict, Verdict::Installed { .. }));
        }

        let left = withdraw(&observed);
        apply(&mut observed, &left);
        prop_assert!(observed.routes.iter().all(|route| !route.is_own()));
    }
}
