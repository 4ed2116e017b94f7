//! Children of a lab die with a killed owner, at once; the rest of the lab goes when the next one is built.
//!
//! Alone in its file: a lab built by a test beside it would clean up before this one can look.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::lab::{Lab, LabId, all};
use bridge_lab::wait::eventually;

const SECOND: Duration = Duration::from_secs(1);
/// Set in the owner, which is this test itself in a process of its own.
const DOOMED: &str = "BRIDGE_TEST_DOOMED";

#[test]
fn a_killed_owner_leaves_no_child_and_its_lab_goes_with_the_next() -> Result<()> {
    if std::env::var_os(DOOMED).is_some() {
        return own_a_doomed_lab();
    }
    let mut owner = Command::new(std::env::current_exe()?);
    let mut owner = owner.arg("--nocapture").env(DOOMED, "1").stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(owner.stdout.take().context("a pipe")?);
    let line =
        output.lines().map_while(Result::ok).find_map(|l| Some(l.split_once("doomed: ")?.1.to_owned()));
    let line = line.context("the owner did not get as far as a lab")?;
    let [id, child, pins, cgroup] = line.split(' ').collect::<Vec<_>>()[..] else {
        anyhow::bail!("not four words: {line}");
    };
    let id = LabId::of(id).context("a lab's name")?;
    let traces = [pins, cgroup].map(Path::new);
    assert!(all().contains(&id) && traces.iter().all(|trace| trace.exists()));
    // Its environment, which contains the lab's mark, is there only a moment after exec.
    let environment = format!("/proc/{child}/environ");
    let runs = || std::fs::read(&environment).is_ok_and(|environment| !environment.is_empty());
    eventually(SECOND, || runs().then_some(())).context("the child does not run")?;

    owner.kill()?;
    owner.wait()?;
    eventually(SECOND, || (!runs()).then_some(())).context("the child outlives its lab's owner")?;
    let next = Lab::builder().build()?;
    assert!(all().contains(&next.id()), "a living owner's lab stays");
    assert!(!all().contains(&id) && traces.iter().all(|trace| !trace.exists()));
    Ok(())
}

/// Until it is killed.
fn own_a_doomed_lab() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut sleep = Command::new("sleep");
    sleep.arg("60").stdout(Stdio::null());
    let mut child = lab.c1().netns.spawn_command(sleep)?;
    let (pins, cgroup) = (lab.pin_directory()?, lab.cgroup("c1")?);
    std::fs::create_dir_all(&pins)?;
    println!("doomed: {} {} {} {}", lab.id(), child.id(), pins.display(), cgroup.display());
    child.wait(Duration::from_secs(60))?;
    Ok(())
}
