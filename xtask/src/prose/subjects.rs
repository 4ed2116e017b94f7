//! Checks commit subjects.

use anyhow::{Result, bail};

use crate::{cmd, workspace};

/// Longer subjects are cut off by `git log --oneline` in a terminal of 80 columns.
const MAX_SUBJECT: usize = 72;

/// Checks the commits of this branch that main does not have; on main itself, the last one.
pub(crate) fn check() -> Result<()> {
    let log = |arguments: &[&str]| {
        let mut git = cmd::command("git");
        git.args(["log", "--no-merges", "--format=%s"]).args(arguments).current_dir(workspace::root());
        cmd::output(&mut git)
    };
    let branch = log(&["origin/main..HEAD"]).or_else(|_| log(&["main..HEAD"]));
    let subjects = match branch {
        Ok(subjects) if !subjects.is_empty() => subjects,
        _ => log(&["-1"])?,
    };
    let faults: Vec<String> = subjects.lines().filter_map(fault).collect();
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

fn fault(subject: &str) -> Option<String> {
    if subject.chars().count() > MAX_SUBJECT {
        return Some(format!("more than {MAX_SUBJECT} characters: {subject}"));
    }
    match subject.split_once(": ") {
        Some((area, text)) if !area.is_empty() && !text.is_empty() && !area.contains(". ") => None,
        _ => Some(format!("no area (`area: change`): {subject}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_has_an_area_and_at_most_72_characters() {
        assert_eq!(fault("pool: free warm ports in batches"), None);
        assert_eq!(fault("README, docs: state the kernel floor once"), None);
        assert!(fault("Free warm ports in batches").is_some());
        assert!(fault(": free warm ports").is_some());
        assert!(fault(&format!("pool: {}", "x".repeat(66))).is_none());
        assert!(fault(&format!("pool: {}", "x".repeat(67))).is_some());
    }
}
