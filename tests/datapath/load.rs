//! Loading, pinning, adopting.

use std::{path::Path, process::Command};

use anyhow::{Result, ensure};
use aya::maps::{Array, Map, MapData};
use bridge_agent::{
    datapath::{Error, Maps, Options},
    kernel::pins,
};
use bridge_common::filter::{control::Settings, flow_filter::BITS};
use bridge_lab::lab::Lab;

use crate::support::{BEHAVIOUR, bpftool, load, options, pins, tables};

#[test]
fn a_policy_is_in_force_after_publishing_and_after_a_restart() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut first = load(&lab, &options(&pins))?;
    assert!(first.is_unseeded(false)? && !first.adopted());
    let published = first.publish(&tables(["one", "two"]), &BEHAVIOUR, None)?;
    eprintln!("{published:?}");
    assert_eq!(published.generation(), 1);
    let published = first.publish(&tables(["one"]), &BEHAVIOUR, None)?;
    eprintln!("{published:?}");
    drop(first);
    let again = load(&lab, &options(&pins))?;
    assert!(!again.is_unseeded(false)? && again.adopted());
    let maps = Maps::open(&pins)?;
    assert_eq!(maps.active_settings()?.generation, 2);
    assert_eq!(maps.rule_info(maps.slot())?.len(), 1);
    Ok(())
}

/// Without its bits the flows in the tables would be denied.
#[test]
fn a_lost_filter_of_known_flows_is_replaced_by_one_that_takes_all_for_known() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let bits = || -> Result<u32> {
        let map = Map::from_map_data(MapData::from_pin(pins.map("flow_filter"))?)?;
        let halves: Array<MapData, [u64; 2]> = Array::try_from(map)?;
        let words: Vec<[u64; 2]> = halves.iter().collect::<Result<_, _>>()?;
        Ok(words.into_iter().flatten().map(u64::count_ones).sum())
    };
    drop(load(&lab, &options(&pins))?);
    drop(load(&lab, &options(&pins))?);
    assert_eq!(bits()?, 0);
    std::fs::remove_file(pins.map("flow_filter"))?;
    drop(load(&lab, &options(&pins))?);
    assert_eq!(bits()?, 2 * BITS);
    Ok(())
}

#[test]
fn a_second_agent_is_refused_and_told_the_pid_of_the_first() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let _first = load(&lab, &options(&pins))?;
    let error = load(&lab, &options(&pins)).unwrap_err();
    assert!(
        matches!(error, Error::Pins(pins::Error::Locked { pid: Some(pid), .. }) if pid == std::process::id()),
        "{error}"
    );
    Ok(())
}

/// Pins a map of another program, named `settings`.
fn pin_foreign(path: &Path, kind: &str, key: &str, value: &str, entries: &str) -> Result<()> {
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "create"]).arg(path);
    bpftool.args(["type", kind, "key", key, "value", value, "entries", entries, "name", "settings"]);
    ensure!(bpftool.status()?.success());
    Ok(())
}

#[test]
fn a_foreign_pin_is_refused_and_nothing_is_changed() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    drop(load(&lab, &options(&pins))?);
    let path = pins.map("settings");
    let others = |kind: &str, key: &str, value: &str, entries: &str| {
        std::fs::remove_file(&path)?;
        pin_foreign(&path, kind, key, value, entries)
    };
    let size = size_of::<Settings>();
    let (own, shorter) = (size.to_string(), (size - 1).to_string());
    let differs = format!("its value size is {shorter}, expected {own}");
    for (kind, key, value, entries, expected) in [
        ("hash", "4", &own, "3", "its map type is 1, expected 2"),
        ("array", "4", &shorter, "3", &differs),
        ("array", "4", &own, "2", "its size is 2, expected 3"),
    ] {
        others(kind, key, value, entries)?;
        let before = bpftool(&["map", "show", "pinned"], &path)?;
        let error = load(&lab, &options(&pins)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::ForeignPin { .. }) && text.contains(expected), "{text}");
        assert!(text.contains("bridge-agent down"), "no remedy: {text}");
        assert_eq!(bpftool(&["map", "show", "pinned"], &path)?["id"], before["id"], "the pin was replaced");
    }
    // A link is not a map, and its info would pass for one.
    std::fs::remove_file(&path)?;
    std::fs::create_dir(&path)?;
    let text = load(&lab, &options(&pins)).unwrap_err().to_string();
    assert!(text.contains("settings"), "{text}");
    Ok(())
}

#[test]
fn a_first_start_that_meets_a_foreign_pin_leaves_it_and_nothing_else() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let path = pins.map("settings");
    std::fs::create_dir_all(pins.directory())?;
    pin_foreign(&path, "hash", "4", "8", "3")?;
    let before = bpftool(&["map", "show", "pinned"], &path)?;
    let error = load(&lab, &options(&pins)).unwrap_err();
    assert!(matches!(error, Error::ForeignPin { .. }), "{error}");
    assert_eq!(bpftool(&["map", "show", "pinned"], &path)?["id"], before["id"], "the pin was replaced");
    let left = std::fs::read_dir(pins.directory())?.map(|entry| anyhow::Ok(entry?.path()));
    assert_eq!(left.collect::<Result<Vec<_>>>()?, [path]);
    Ok(())
}

#[test]
fn a_start_that_fails_leaves_nothing() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let absurd = Options { flows: u32::MAX, ..options(&pins) };
    let error = load(&lab, &absurd).unwrap_err().to_string();
    // Whichever of the tables of flows is made first.
    assert!(["flows", "overflow"].iter().any(|table| error.contains(table)), "{error}");
    assert!(!pins.directory().exists(), "maps are left");
    load(&lab, &options(&pins))?;
    Ok(())
}

#[test]
fn a_table_that_is_pinned_keeps_its_size_and_its_flows() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    drop(load(&lab, &options(&pins))?);
    let larger = Options { flows: 8192, ..options(&pins) };
    let datapath = load(&lab, &larger)?;
    // Half as many of other protocols than TCP, a sixteenth beyond the shares.
    assert_eq!(datapath.maps.count_flows()?.established_capacity, 4096 + 2048 + 256);
    Ok(())
}
