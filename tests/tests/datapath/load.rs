//! Loading, pinning, adopting.

use anyhow::Result;
use bridge_agent::datapath::{Error, Maps};
use bridge_tests::lab::Lab;

use crate::support::{BEHAVIOUR, load, options, pins, tables};

#[test]
fn a_policy_is_in_force_after_publishing_and_after_a_restart() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let mut first = load(&lab, &options(&pins))?;
    assert!(first.is_first_start()? && !first.adopted());
    let published = first.publish(&tables(["one", "two"]), &BEHAVIOUR, None)?;
    eprintln!("{published:?}");
    assert_eq!(published.generation(), 1);
    let published = first.publish(&tables(["one"]), &BEHAVIOUR, None)?;
    eprintln!("{published:?}");
    drop(first);
    let again = load(&lab, &options(&pins))?;
    assert!(!again.is_first_start()? && again.adopted());
    let maps = Maps::open(&pins)?;
    assert_eq!(maps.settings_in_force()?.generation, 2);
    assert_eq!(maps.rule_info(maps.slot())?.len(), 1);
    Ok(())
}

#[test]
fn a_second_agent_is_refused_and_told_the_pid_of_the_first() -> Result<()> {
    let lab = Lab::builder().pods(0).build()?;
    let pins = pins(&lab)?;
    let _first = load(&lab, &options(&pins))?;
    let error = load(&lab, &options(&pins)).unwrap_err();
    assert!(matches!(error, Error::Locked { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
    Ok(())
}
