//! Attaching, adopting, detaching.

use anyhow::{Context as _, Result, ensure};
use bridge_agent::datapath::{Action, Change, Datapath, Displacement, Mechanism, Role, Target, down};
use bridge_lab::lab::{Lab, Netns};

use crate::support::{BEHAVIOUR, attached, bpftool, json, load, options, pins, tables, target};

/// The interface towards the LAN, and the one towards the first pod.
fn targets(lab: &Lab) -> Result<Vec<Target>> {
    let pod_side = &lab.c1().peer_interface;
    Ok(vec![target(lab.b(), "eth0", Role::External)?, target(lab.b(), pod_side, Role::Internal)?])
}

fn attach(lab: &Lab, datapath: &mut Datapath, targets: &[Target]) -> Result<Vec<Change>> {
    let (changes, result) = lab.b().netns.run(|| datapath.attach(targets));
    result?;
    Ok(changes)
}

fn actions(changes: &[Change]) -> Vec<Action> {
    changes.iter().map(|change| change.action).collect()
}

fn names(netns: &Netns, interface: &str) -> Result<Vec<String>> {
    Ok(attached(netns, interface)?.into_iter().map(|(kind, name, _)| format!("{kind} {name}")).collect())
}

#[test]
fn programs_are_attached_where_the_role_says_and_adopted_without_a_gap() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let (pins, node) = (pins(&lab)?, &lab.b().netns);
    let pod_side = &lab.c1().peer_interface;
    let targets = targets(&lab)?;
    let mut first = load(&lab, &options(&pins))?;
    first.publish(&tables([]), &BEHAVIOUR, None)?;
    assert_eq!(actions(&attach(&lab, &mut first, &targets)?), [Action::Attached; 4]);
    assert_eq!(names(node, "eth0")?, ["tcx/ingress external_ingress", "tcx/egress external_egress"]);
    assert_eq!(names(node, pod_side)?, ["tcx/ingress internal_ingress", "tcx/egress internal_egress"]);
    assert_eq!(actions(&attach(&lab, &mut first, &targets)?), []);

    let before = attached(node, "eth0")?;
    let links_before =
        bpftool(&["link", "show", "pinned"], &pins.directory().join("links/eth0-external_ingress"))?;
    drop(first);
    assert_eq!(attached(node, "eth0")?, before, "enforcement ended with the agent");
    let mut second = load(&lab, &options(&pins))?;
    assert_eq!(actions(&attach(&lab, &mut second, &targets)?), [Action::Replaced; 4]);
    let after = attached(node, "eth0")?;
    assert_eq!(after.len(), 2);
    assert_ne!(after[0].2, before[0].2, "the program of the old agent is still there");
    let links_after =
        bpftool(&["link", "show", "pinned"], &pins.directory().join("links/eth0-external_ingress"))?;
    assert_eq!(links_after["id"], links_before["id"], "the link was not updated but made again");

    attach(&lab, &mut second, &targets[..1])?;
    assert_eq!(names(node, "eth0")?, ["tcx/ingress external_ingress", "tcx/egress external_egress"]);
    assert_eq!(names(node, pod_side)?, Vec::<String>::new());
    let known = bpftool(&["map", "dump", "pinned"], &pins.map("interfaces"))?;
    assert_eq!(known.as_array().map(Vec::len), Some(1), "{known}");
    Ok(())
}

#[test]
fn ours_runs_before_what_was_there() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let (own, other) = (pins(&lab)?, bridge_agent::datapath::Pins::new(lab.pin_directory()?.join("other")));
    let targets = targets(&lab)?;
    let mut others = load(&lab, &options(&other))?;
    attach(&lab, &mut others, &targets[..1])?;
    let theirs = attached(&lab.b().netns, "eth0")?[0].2;
    let mut ours = load(&lab, &options(&own))?;
    attach(&lab, &mut ours, &targets[..1])?;
    let ingress =
        attached(&lab.b().netns, "eth0")?.into_iter().filter(|(kind, ..)| kind.ends_with("ingress"));
    let ids: Vec<u64> = ingress.map(|(_, _, id)| id).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[1], theirs);
    Ok(())
}

#[test]
fn a_program_that_others_detach_or_precede_is_put_first_again() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let (own, other) = (pins(&lab)?, bridge_agent::datapath::Pins::new(lab.pin_directory()?.join("other")));
    let node = &lab.b().netns;
    let targets = [target(lab.b(), "eth0", Role::External)?];
    let mut ours = load(&lab, &options(&own))?;
    attach(&lab, &mut ours, &targets)?;
    let displaced = |ours: &mut Datapath| -> Result<Vec<Displacement>> {
        let displaced = node.run(|| ours.displaced(&targets))?;
        Ok(displaced.into_iter().map(|displaced| displaced.how).collect())
    };
    assert_eq!(displaced(&mut ours)?, []);
    let first = |at: usize| -> Result<u64> { Ok(attached(node, "eth0")?[at].2) };
    let (ingress, egress) = (first(0)?, first(1)?);

    let link = own.directory().join("links/eth0-external_ingress");
    let status =
        std::process::Command::new("bpftool").args(["link", "detach", "pinned"]).arg(&link).status()?;
    ensure!(status.success(), "bpftool: {status}");
    assert_eq!(displaced(&mut ours)?, [Displacement::Missing]);
    attach(&lab, &mut ours, &targets)?;
    assert_eq!(displaced(&mut ours)?, []);
    assert_eq!(first(0)?, ingress);

    let mut others = load(&lab, &options(&other))?;
    attach(&lab, &mut others, &targets)?;
    assert_ne!(first(0)?, ingress, "the others are not the first ones");
    assert_eq!(displaced(&mut ours)?, [Displacement::Behind; 2]);
    node.run(|| -> Result<()> {
        let found = ours.displaced(&targets)?;
        Ok(ours.give_way(&found)?)
    })?;
    attach(&lab, &mut ours, &targets)?;
    assert_eq!(displaced(&mut ours)?, []);
    // Two at each hook, ingress first.
    assert_eq!((first(0)?, first(2)?), (ingress, egress));
    Ok(())
}

#[test]
fn a_recreated_interface_is_attached_afresh_and_a_renamed_one_keeps_its_link() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let (pins, node) = (pins(&lab)?, &lab.b().netns);
    let mut datapath = load(&lab, &options(&pins))?;
    for attempt in 0..2 {
        node.ip("link add extra.7 type veth peer name extra7")?;
        let targets = [target(lab.b(), "extra.7", Role::External)?];
        let changes = attach(&lab, &mut datapath, &targets)?;
        assert!(actions(&changes).contains(&Action::Attached), "attempt {attempt}: {changes:?}");
        assert_eq!(names(node, "extra.7")?, ["tcx/ingress external_ingress", "tcx/egress external_egress"]);
        if attempt == 0 {
            node.ip("link delete extra.7")?;
        }
    }
    let before = attached(node, "extra.7")?;
    node.ip("link set extra.7 name renamed")?;
    let targets = [target(lab.b(), "renamed", Role::External)?];
    assert_eq!(actions(&attach(&lab, &mut datapath, &targets)?), [Action::Renamed; 2]);
    assert_eq!(attached(node, "renamed")?, before);
    node.ip("link delete renamed")?;
    assert_eq!(actions(&attach(&lab, &mut datapath, &[])?), [Action::Removed; 2]);
    assert_eq!(std::fs::read_dir(pins.directory().join("links"))?.count(), 0, "a stale pin");
    Ok(())
}

#[test]
fn clsact_takes_the_place_of_tcx() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let (pins, node) = (pins(&lab)?, &lab.b().netns);
    let pod_side = &lab.c1().peer_interface;
    let options = { bridge_agent::datapath::Options { mechanism: Mechanism::Clsact, ..options(&pins) } };
    let targets = targets(&lab)?;
    let mut first = load(&lab, &options)?;
    assert!(!first.uses_tcx());
    assert_eq!(actions(&attach(&lab, &mut first, &targets)?), [Action::Attached; 4]);
    assert_eq!(names(node, "eth0")?, ["clsact/ingress external_ingress", "clsact/egress external_egress"]);
    let before = attached(node, pod_side)?;
    assert_eq!(before.len(), 2);
    drop(first);
    assert_eq!(attached(node, pod_side)?, before, "enforcement ended with the agent");
    let mut second = load(&lab, &options)?;
    assert_eq!(actions(&attach(&lab, &mut second, &targets)?), [Action::Replaced; 4]);
    let after = attached(node, pod_side)?;
    assert_eq!(after.len(), 2, "{after:?}");
    assert_ne!(after[0].2, before[0].2, "the program of the old agent is still there");
    assert_eq!(actions(&attach(&lab, &mut second, &targets)?), []);
    let displaced = |second: &mut Datapath| -> Result<Vec<Displacement>> {
        let displaced = node.run(|| second.displaced(&targets))?;
        Ok(displaced.into_iter().map(|displaced| displaced.how).collect())
    };
    assert_eq!(displaced(&mut second)?, []);

    // Another program removes the qdisc.
    node.output({
        let mut tc = std::process::Command::new("tc");
        tc.args(["qdisc", "delete", "dev", "eth0", "clsact"]);
        tc
    })?;
    assert_eq!(displaced(&mut second)?, [Displacement::Missing; 2]);
    assert_eq!(actions(&attach(&lab, &mut second, &targets)?), [Action::Attached; 2]);
    assert_eq!(displaced(&mut second)?, []);
    attach(&lab, &mut second, &targets[..1])?;
    assert_eq!(names(node, pod_side)?, Vec::<String>::new());
    drop(second);
    let (removed, result) = node.run(|| down(&pins, &|_| false));
    result?;
    assert_eq!(removed.attachments, 2);
    let qdiscs = json(node, &["tc", "-json", "qdisc", "show"])?.to_string();
    ensure!(!qdiscs.contains("clsact"), "{qdiscs}");
    Ok(())
}

#[test]
fn another_version_stands_beside_the_one_that_enforces_until_that_goes() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let (pins, node) = (pins(&lab)?, &lab.b().netns);
    let targets = targets(&lab)?;
    let options = bridge_agent::datapath::Options { mechanism: Mechanism::Clsact, ..options(&pins) };
    let mut old = load(&lab, &options)?;
    old.publish(&tables(["old"]), &BEHAVIOUR, None)?;
    attach(&lab, &mut old, &targets)?;
    let ingress = || -> Result<Vec<_>> {
        let found = attached(node, "eth0")?.into_iter();
        Ok(found.filter(|(kind, ..)| kind.ends_with("ingress")).collect())
    };
    let before = ingress()?;
    drop(old);
    std::fs::rename(pins.directory(), bridge_lab::gap::runs::other_directory(&pins))?;

    let mut new = load(&lab, &options)?;
    new.publish(&tables(["new"]), &BEHAVIOUR, None)?;
    assert_eq!(actions(&attach(&lab, &mut new, &targets)?), [Action::Attached; 4]);
    let both = ingress()?;
    ensure!(both.len() == 2 && both[1] == before[0], "{both:?}, and before {before:?}");
    assert_eq!(actions(&attach(&lab, &mut new, &targets)?), []);
    assert_eq!(node.run(|| new.remove_other_versions())?, 4);
    assert_eq!(ingress()?, both[..1]);
    drop(new);
    let (removed, result) = node.run(|| down(&pins, &|_| false));
    result?;
    assert_eq!(removed.attachments, 4);
    let qdiscs = json(node, &["tc", "-json", "qdisc", "show"])?.to_string();
    ensure!(!qdiscs.contains("clsact"), "{qdiscs}");
    Ok(())
}

#[test]
fn down_leaves_nothing_and_may_be_repeated() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let (pins, node) = (pins(&lab)?, &lab.b().netns);
    let mut datapath = load(&lab, &options(&pins))?;
    datapath.publish(&tables(["one"]), &BEHAVIOUR, None)?;
    attach(&lab, &mut datapath, &targets(&lab)?)?;
    let id = |value: serde_json::Value| value["id"].as_u64().context("an id");
    let map = id(bpftool(&["map", "show", "pinned"], &pins.map("flows"))?)?;
    let table = id(bpftool(&["map", "show", "pinned"], &pins.table(1, "rule_hits"))?)?;
    let link =
        id(bpftool(&["link", "show", "pinned"], &pins.directory().join("links/eth0-external_ingress"))?)?;
    let program = attached(node, "eth0")?[0].2;

    let error = node.run(|| down(&pins, &|_| false)).1.unwrap_err().to_string();
    ensure!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    drop(datapath);
    let maps = std::fs::read_dir(pins.directory())?.flatten().filter(|entry| !entry.path().is_dir()).count();
    let (removed, result) = node.run(|| down(&pins, &|_| false));
    result?;
    assert_eq!((removed.attachments, removed.maps), (4, maps), "{removed:?}");
    assert_eq!(names(node, "eth0")?, Vec::<String>::new());
    ensure!(!pins.root().exists());
    for (kind, id) in [("map", map), ("map", table), ("link", link), ("prog", program)] {
        let gone =
            || bpftool(&[kind, "show", "id"], std::path::Path::new(&id.to_string())).is_err().then_some(());
        bridge_lab::wait::eventually(std::time::Duration::from_secs(5), gone)
            .with_context(|| format!("{kind} {id} is still there"))?;
    }
    let (removed, result) = node.run(|| down(&pins, &|_| false));
    result?;
    assert_eq!(removed, Default::default());
    Ok(())
}
