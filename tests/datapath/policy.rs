//! Writing policies and switching between them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Behaviour, Error, Published};
use bridge_agent::model::{Action, Direction, Mode, OnDeny, Policy, PortRange, Protocol, Rule};
use bridge_agent::policy::{Tables, compile};
use bridge_common::{
    filter::{
        flow::{Flow, FlowKey},
        policy::RuleHits,
    },
    protocol,
};
use bridge_lab::lab::Lab;
use bridge_lab::wait::eventually;
use serde_json::Value;

use crate::support::{BEHAVIOUR, bpftool, load, options, pins, tables};

/// Rules that differ in their LAN host and ports.
fn many(count: u32) -> Result<Tables> {
    let rule = |number: u32| -> Result<Rule> {
        let [_, _, high, low] = number.to_be_bytes();
        let first = 1024 + u16::try_from(number % 60_000)?;
        Ok(Rule {
            name: format!("rule-{number}"),
            direction: Direction::Inbound,
            external: Some(vec![format!("172.{}.{high}.{low}/32", 16 + (number >> 16)).parse()?]),
            pods: None,
            protocol: Protocol::Tcp,
            ports: vec![PortRange { first, last: first + 9 }],
            source_ports: vec![],
            action: Action::Allow,
        })
    };
    let policy = Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: vec!["10.200.1.0/24".parse()?, "fd20:1::/64".parse()?],
        external: vec!["172.16.0.0/12".parse()?],
        nodes: vec![],
        rules: (0..count).map(rule).collect::<Result<_>>()?,
        audited: Vec::new(),
        node_ports: None,
    };
    Ok(compile(&policy, &[])?)
}

#[test]
fn a_policy_of_10_000_rules_is_written_whole_and_switched_to() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut datapath = load(&lab, &options(&pins))?;
    let tables = many(10_000)?;
    datapath.publish(&tables, &BEHAVIOUR, None)?;
    let slot = datapath.maps.slot();
    let rules = datapath.maps.rule_info(slot)?;
    ensure!(rules == tables.rules, "the rules in the kernel are others");
    let settings = datapath.maps.settings(slot)?;
    assert_eq!((settings.rule_count, settings.global_sets), (10_000, tables.global_sets));
    // Another program reads the tables back.
    let dump = |table: &str| bpftool(&["map", "dump", "pinned"], &pins.table(slot, table));
    let addresses = dump("addresses4")?;
    let v4 = tables.addresses.iter().filter(|(prefix, _)| matches!(prefix, ipnet::IpNet::V4(_))).count();
    assert_eq!(addresses.as_array().map(Vec::len), Some(v4));
    assert_eq!(dump("narrows")?.as_array().map(Vec::len), Some(tables.narrows.len().max(1)));
    Ok(())
}

/// bpftool prints the values of fields by their names only if a map has type information.
fn formatted(entry: &Value) -> Result<&Value> {
    entry.get("formatted").with_context(|| format!("no type information: {entry}"))
}

#[test]
fn dumps_of_maps_show_named_fields() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut datapath = load(&lab, &options(&pins))?;
    datapath.publish(&many(3)?, &BEHAVIOUR, None)?;
    let of = |protocol| (FlowKey { protocol, ..FlowKey::default() }, Flow::default());
    datapath.maps.seed_flows(&[of(protocol::TCP), of(protocol::UDP)])?;
    let slot = datapath.maps.slot();
    let value = |path: std::path::PathBuf| -> Result<Value> {
        let dump = bpftool(&["map", "dump", "pinned"], &path)?;
        let entry = dump.get(0).with_context(|| format!("{} is empty", path.display()))?.clone();
        let formatted = formatted(&entry)?;
        let per_cpu = formatted["values"][0]["value"].clone();
        Ok(if per_cpu.is_null() { formatted["value"].clone() } else { per_cpu })
    };
    for (path, field) in [
        (pins.map("flows"), "last_seen"),
        (pins.map("other_flows"), "last_seen"),
        (pins.map("counters"), "no_rule"),
        (pins.map("audited"), "deny_rule"),
        (pins.map("settings"), "events_per_second"),
        (pins.table(slot, "addresses4"), "class"),
        (pins.table(slot, "rule_sets"), "roots"),
        (pins.table(slot, "narrows"), "references"),
        (pins.table(slot, "rule_hits"), "packets"),
        (pins.table(slot, "rule_info"), "name"),
    ] {
        let value = value(path.clone())?;
        ensure!(value.get(field).is_some(), "{}: no field {field} in {value}", path.display());
    }
    let key = bpftool(&["map", "dump", "pinned"], &pins.map("flows"))?[0]["formatted"]["key"].clone();
    ensure!(key.get("low_port").is_some(), "{key}");
    Ok(())
}

#[test]
fn hits_are_carried_over_by_name_and_an_unchanged_policy_is_left_alone() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut datapath = load(&lab, &options(&pins))?;
    datapath.publish(&tables(["one", "two", "three"]), &BEHAVIOUR, None)?;
    // As if CPU 0 had counted: index 0 * 3 + rule.
    let hits = |rule: u32, packets: u64| {
        let path = pins.table(datapath_slot(&pins)?, "rule_hits");
        let value: Vec<String> = [packets, packets * 100]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .map(|byte| byte.to_string())
            .collect();
        let key: Vec<String> = rule.to_le_bytes().iter().map(ToString::to_string).collect();
        let mut bpftool = std::process::Command::new("bpftool");
        bpftool.args(["map", "update", "pinned"]).arg(path).arg("key").args(key).arg("value").args(value);
        ensure!(bpftool.status()?.success());
        anyhow::Ok(())
    };
    hits(0, 5)?;
    hits(2, 7)?;
    let switched = datapath.publish(&tables(["three", "new", "one"]), &BEHAVIOUR, None)?;
    assert!(matches!(switched, Published::Switched { generation: 2, .. }));
    let expected = [(7, 700), (0, 0), (5, 500)].map(|(packets, bytes)| RuleHits { packets, bytes });
    assert_eq!(datapath.maps.rule_hits(datapath.maps.slot())?, expected);
    // Again, with migrated counts and new ones.
    hits(0, 1)?;
    datapath.publish(&tables(["one", "three"]), &BEHAVIOUR, None)?;
    let expected = [(5, 500), (8, 800)].map(|(packets, bytes)| RuleHits { packets, bytes });
    assert_eq!(datapath.maps.rule_hits(datapath.maps.slot())?, expected);

    drop(datapath);
    let mut again = load(&lab, &options(&pins))?;
    let unchanged = again.publish(&tables(["one", "three"]), &BEHAVIOUR, None)?;
    assert_eq!(unchanged, Published::Unchanged { generation: 3 });
    assert_eq!(again.maps.rule_hits(again.maps.slot())?, expected);
    let audit = Behaviour { audit: true, ..BEHAVIOUR };
    assert_eq!(again.publish(&tables(["one", "three"]), &audit, None)?.generation(), 4);
    assert_eq!(again.maps.active_settings()?.audit, 1);
    assert_eq!(again.maps.rule_hits(again.maps.slot())?, expected, "hits depend on the mode");
    Ok(())
}

fn datapath_slot(pins: &bridge_agent::datapath::Pins) -> Result<u32> {
    Ok(bridge_agent::datapath::Maps::open(pins)?.slot())
}

#[test]
fn a_policy_on_trial_takes_itself_back_unless_it_is_confirmed() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut datapath = load(&lab, &options(&pins))?;
    datapath.publish(&tables(["good"]), &BEHAVIOUR, None)?;
    let long = Some(Duration::from_secs(600));
    datapath.publish(&tables(["trial"]), &BEHAVIOUR, long)?;
    assert_eq!(datapath.maps.active_settings()?.generation, 2);
    let error = datapath.publish(&tables(["other"]), &BEHAVIOUR, None).unwrap_err();
    assert!(matches!(error, Error::Unconfirmed), "{error}");
    datapath.confirm()?;
    datapath.publish(&tables(["other"]), &BEHAVIOUR, Some(Duration::from_millis(50)))?;
    let back = || (datapath.maps.active_settings().ok()?.generation == 2).then_some(());
    eventually(Duration::from_secs(5), back).context("it did not take itself back")?;
    assert!(matches!(datapath.confirm(), Err(Error::NoTrial)));
    assert_eq!(datapath.publish(&tables(["next"]), &BEHAVIOUR, None)?.generation(), 4);
    assert_eq!(datapath.maps.active_settings()?.generation, 4);
    Ok(())
}

#[test]
fn both_policies_of_a_trial_can_be_replaced_while_it_goes_on() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut datapath = load(&lab, &options(&pins))?;
    let other = Behaviour { reject: !BEHAVIOUR.reject, ..BEHAVIOUR };
    let names = |datapath: &bridge_agent::datapath::Datapath| -> Result<Vec<String>> {
        Ok(datapath.maps.rule_counts()?.into_iter().map(|count| count.name).collect())
    };
    let (good, trial) = (tables(["good"]), tables(["trial"]));
    assert!(matches!(datapath.replace_trial((&trial, &BEHAVIOUR), (&good, &BEHAVIOUR)), Err(Error::NoTrial)));
    datapath.publish(&good, &BEHAVIOUR, None)?;
    datapath.publish(&trial, &BEHAVIOUR, Some(Duration::from_secs(3)))?;
    let deadline = datapath.maps.trial()?.context("a trial")?.deadline;
    // Each in turn, and both at once, more often than there are slots.
    for number in 0..5 {
        let (name, before) = (format!("trial-{number}"), format!("good-{number}"));
        let (trial, good) = (tables([name.as_str()]), tables([before.as_str()]));
        let published = datapath.replace_trial((&trial, &BEHAVIOUR), (&good, &BEHAVIOUR))?;
        assert!(matches!(published, Published::Switched { .. }));
        let published = datapath.replace_trial((&trial, &BEHAVIOUR), (&good, &other))?;
        assert!(matches!(published, Published::Unchanged { .. }), "only the former one is another");
        assert_eq!(names(&datapath)?, [name]);
        assert_eq!(datapath.maps.trial()?.context("it goes on")?.deadline, deadline);
    }
    eventually(Duration::from_secs(10), || datapath.maps.trial().ok()?.is_none().then_some(()))
        .context("its time is over")?;
    assert_eq!(names(&datapath)?, ["good-4"]);
    assert_eq!(datapath.maps.active_settings()?.reject, u32::from(other.reject));
    assert!(matches!(datapath.replace_trial((&trial, &BEHAVIOUR), (&good, &other)), Err(Error::NoTrial)));
    Ok(())
}
