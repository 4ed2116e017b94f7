use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use super::*;
use crate::{
    datapath::FlowCounts,
    routes::{NextHopStatus, State as RouteState},
    state::{AttachedInterface, DiscoveryStatus, DivergenceStatus, Enforcement, FirewallStatus},
};

fn rule(index: u32, hits: u64) -> RuleCount {
    let (name, direction) = (format!("rule-{index}"), "inbound".to_owned());
    RuleCount {
        index,
        name,
        direction,
        action: "allow".into(),
        mode: crate::model::Mode::Enforce,
        hits,
        bytes: 0,
    }
}

/// A scrape of an agent that has every part.
fn whole() -> Scrape {
    let reason = |denies| ReasonCount {
        direction: "inbound".into(),
        reason: "no_rule".into(),
        denies,
        packets: 1,
        bytes: 74,
        audited_packets: 0,
        audited_bytes: 0,
    };
    let named = |name: &str| BTreeMap::from([(name.to_owned(), 1)]);
    let interface = AttachedInterface { role: "external".into(), ..AttachedInterface::default() };
    let divergence =
        DivergenceStatus { denied_by_iptables: named("bridge:no_rule"), ..DivergenceStatus::default() };
    let hop = NextHopStatus { address: [192, 168, 31, 17].into(), dev: "eth0".into(), up: true };
    let status = Status {
        version: "0.1.0".into(),
        enforcement: Some(Enforcement { interfaces: vec![interface], ..Enforcement::default() }),
        firewall: Some(FirewallStatus { divergence: Some(divergence), ..FirewallStatus::default() }),
        routes: Some(RoutesStatus {
            states: BTreeMap::from([(RouteState::Installed, 1)]),
            next_hops: 1,
            next_hops_down: vec![hop],
            counters: named("added"),
            discovery: Some(DiscoveryStatus { counters: named("accepted"), ..DiscoveryStatus::default() }),
            ..RoutesStatus::default()
        }),
        pool: Some(Summary { mode: "kernel".into(), ..Summary::default() }),
        kubernetes: Some(KubernetesStatus {
            objects: BTreeMap::from([("nodes".to_owned(), 1)]),
            ..KubernetesStatus::default()
        }),
        flows: Some(FlowCounts {
            established: 1,
            established_capacity: 1,
            half_open: 1,
            half_open_capacity: 1,
        }),
        suppressed_events: Some(0),
        reloads: crate::state::Reloads {
            last: Some(Reload { time: "2026-01-02T03:04:05.000000Z".into(), error: None }),
            ..crate::state::Reloads::default()
        },
        ..Status::default()
    };
    Scrape {
        status,
        reasons: vec![reason(true), reason(false)],
        rules: vec![rule(0, 1)],
        outcomes: vec![OutcomeCount {
            direction: "inbound".into(),
            outcome: "forwarded".into(),
            packets: 1,
            bytes: 74,
        }],
        shielded: Some(1),
        fills: vec![Fill { map: "flows", entries: 1, capacity: 1 }],
        ..Scrape::default()
    }
}

fn encoded(scrape: Scrape) -> String {
    let mut registry = Registry::default();
    let apply_time = Shared::new(Status::default()).0.apply_time;
    register(&mut registry, scrape, apply_time, Process::read());
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    text
}

/// A family of metrics: its help text, its type, and the names of its labels.
#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    labels: Vec<String>,
}

fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(help)) => {
                name.clone_into(&mut current);
                help.trim_end_matches('.').clone_into(&mut families.entry(current.clone()).or_default().help);
            }
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                kind.clone_into(&mut families.entry(name.to_owned()).or_default().kind);
            }
            (Some(sample), ..) if !sample.starts_with('#') => {
                let Some((_, labels)) = sample.split_once('{') else { continue };
                let family = families.get_mut(&current).unwrap();
                for label in labels.split("\",").filter_map(|label| Some(label.split_once('=')?.0)) {
                    if label != "le" && !family.labels.iter().any(|known| known == label) {
                        family.labels.push(label.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    families
}

/// The name that a query uses.
fn queried(name: &str, kind: &str) -> String {
    match kind {
        "counter" => format!("{name}_total"),
        "info" => format!("{name}_info"),
        _ => name.to_owned(),
    }
}

#[test]
fn docs_metrics_lists_every_metric() {
    let mut page = String::from(
        "# Metrics\n\n`GET /metrics` on the agent's socket, and on `api.metrics` where that is configured. This page is \
         generated from the\nregistry: `BLESS=1 cargo test -p bridge-agent --lib docs_metrics`. Alerts and a dashboard are \
         in\n[deploy/monitoring](../deploy/monitoring).\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    let (with_iptables, mut with_nftables) = (encoded(whole()), whole());
    with_nftables.status.firewall.as_mut().unwrap().engine = "nftables".into();
    let families = families(&(with_iptables + &encoded(with_nftables)));
    for (name, Family { help, kind, labels }) in &families {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, labels) = (queried(name, kind), labels.join(", "));
        writeln!(page, "| `{name}` | {kind} | {labels} | {help} |").unwrap();
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    assert_eq!(std::fs::read_to_string(file).unwrap(), page, "run this test with BLESS=1");
}

#[test]
fn names_follow_the_conventions() {
    for (name, Family { help, kind, .. }) in families(&encoded(whole())) {
        assert!(name.starts_with("bridge_") || name.starts_with("process_"), "{name}");
        assert!(!help.is_empty() && !kind.is_empty(), "{name} has no help or type");
        assert!(!name.ends_with("_total") && !name.contains("left"), "{name}");
        if name.contains("seconds") || name.contains("_duration") {
            assert!(name.ends_with("_seconds"), "{name}: the unit comes last");
        }
    }
}

#[test]
fn rules_without_hits_have_no_series_and_the_others_a_bounded_number() {
    let (kept, omitted) = most_hit((0..3000).map(|index| rule(index, u64::from(index % 3))).collect());
    assert_eq!((kept.len(), omitted), (MAX_RULES, 1000));
    assert!(kept.iter().all(|rule| rule.hits == 2), "a rule with few hits displaced one with more");
    assert!(kept.is_sorted_by_key(|rule| rule.index));
    let (kept, omitted) = most_hit(vec![rule(0, 0), rule(1, 5)]);
    assert_eq!((kept.len(), kept[0].index, omitted), (1, 1, 0));
    let scrape = Scrape { rules: kept, rules_omitted: 7, ..Scrape::default() };
    let text = encoded(scrape);
    assert!(text.contains("\nbridge_rule_hits_omitted 7\n"), "{text}");
}

#[test]
fn the_last_reload_is_a_time_and_a_result() {
    let mut scrape = whole();
    assert!(encoded(whole()).contains("\nbridge_config_last_reload_timestamp_seconds 1767323045\n"));
    scrape.status.reloads.last.as_mut().unwrap().error = Some("line 3".into());
    assert!(encoded(scrape).contains("\nbridge_config_last_reload_successful 0\n"));
    let none = encoded(Scrape::default());
    assert!(!none.contains("last_reload"), "an agent that never reloaded reports a reload: {none}");
}
