//! Runs iptables-restore, and finds the rule that it refuses.

use std::process::Output;

use super::error::Error;
use super::plan::{Restore, RestoreLine};
use super::programs::{Backend, Programs};
use super::ruleset::{CHAIN_PREFIX, Family, Table};
use crate::firewall::Hits;

/// Begins the names of chains that nothing leads to, in which rules are tried one by one.
const PROBE_PREFIX: &str = "BRIDGE-P-";

/// Commits one table. The kernel takes all of it or nothing.
///
/// # Errors
/// Those of running a program, and [`Error::Refused`] with the name of the rule.
pub(super) fn restore(programs: &Programs, backend: Backend, restore: &Restore) -> Result<(), Error> {
    match commit(programs, backend, restore) {
        // x_tables takes a table in one call and does not say which rule it refused.
        Err(Error::Refused { line, reason, family, table, .. }) if line == "COMMIT" => {
            let rules: Vec<&RestoreLine> =
                restore.lines.iter().filter(|l| l.text.starts_with("-A ")).collect();
            let culprit = probe(programs, backend, restore, &rules);
            let (rule, line) = culprit.map_or_else(
                || ("bridge:all".into(), line),
                |culprit| (culprit.name.clone(), culprit.text.clone()),
            );
            Err(Error::Refused { family, table, rule, line, reason })
        }
        other => other,
    }
}

fn commit(programs: &Programs, backend: Backend, restore: &Restore) -> Result<(), Error> {
    let path = programs.tool(restore.family, backend, "-restore")?;
    let wait = programs.lock_wait.as_secs().to_string();
    let mut arguments = vec!["--noflush", "--wait", &wait];
    arguments.extend(restore.counts().then_some("--counters"));
    let output = programs.run(&path, arguments, Some(&restore.text()))?;
    if output.status.success() {
        return Ok(());
    }
    let program = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Err(explain(programs, &program, restore, &output))
}

fn explain(programs: &Programs, program: &str, restore: &Restore, output: &Output) -> Error {
    let said = String::from_utf8_lossy(&output.stderr);
    let program = program.to_owned();
    if let Some(error) = common(programs, &program, restore, &said) {
        return error;
    }
    let reason = reason(&said);
    let Some(index) = line_number(&said).and_then(|number| number.checked_sub(1)) else {
        return Error::Failed { program, status: output.status.to_string(), reason };
    };
    match restore.lines.get(index) {
        Some(line) if !line.name.is_empty() || line.text == "COMMIT" => Error::Refused {
            family: restore.family,
            table: restore.table,
            rule: line.name.clone(),
            line: line.text.clone(),
            reason,
        },
        _ => Error::Failed { program, status: output.status.to_string(), reason },
    }
}

/// Remarks of both programs about any table.
fn common(programs: &Programs, program: &str, restore: &Restore, said: &str) -> Option<Error> {
    let program = program.to_owned();
    if said.contains("xtables lock") {
        Some(Error::LockHeld { program, waited: programs.lock_wait })
    } else if said.contains("you must be root") {
        Some(Error::NotPermitted { program })
    } else if said.contains("incompatible") {
        Some(Error::Incompatible { family: restore.family, table: restore.table, program })
    } else {
        None
    }
}

/// The first `line N` or `line: N`.
fn line_number(said: &str) -> Option<usize> {
    said.match_indices("line").find_map(|(at, word)| {
        let after = said[at + word.len()..].trim_start_matches([':', ' ']);
        let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    })
}

/// Returns the complaint of the program, without its name, its usage and empty lines.
fn reason(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("Try `"));
    let lines = lines
        .map(|line| line.split_once("): ").filter(|(head, _)| head.contains(" v1.")).map_or(line, |l| l.1));
    let said = lines.filter(|line| !line.ends_with("(nf_tables):")).collect::<Vec<_>>().join("; ");
    if said.is_empty() { "no reason given".into() } else { said }
}

/// Halves the rules until the first that the kernel refuses in a chain of its own is found.
fn probe<'a>(
    programs: &Programs,
    backend: Backend,
    restore: &Restore,
    rules: &[&'a RestoreLine],
) -> Option<&'a RestoreLine> {
    if try_rules(programs, backend, restore, rules) {
        return None;
    }
    if let [only] = rules {
        return Some(only);
    }
    let (first, second) = rules.split_at(rules.len() / 2);
    probe(programs, backend, restore, first).or_else(|| probe(programs, backend, restore, second))
}

/// Whether the kernel takes these rules. No packet comes to the chains, which are removed again.
fn try_rules(programs: &Programs, backend: Backend, restore: &Restore, rules: &[&RestoreLine]) -> bool {
    let renamed = |text: &str| text.replace(CHAIN_PREFIX, PROBE_PREFIX);
    let declared = |line: &&RestoreLine| line.text.starts_with(&format!(":{CHAIN_PREFIX}"));
    let chains: Vec<String> = restore.lines.iter().filter(declared).map(|line| renamed(&line.text)).collect();
    let names = chains.iter().filter_map(|line| line[1..].split(' ').next());
    let removal = names.map(|name| format!("-X {name}"));
    let table = |body: Vec<String>| {
        let head = [format!("*{}", restore.table)].into_iter().chain(chains.clone());
        let lines = head.chain(body).chain(["COMMIT".to_owned()]);
        let lines =
            lines.map(|text| RestoreLine { text, name: String::new(), hits: Hits::default() }).collect();
        Restore { lines, last: false, ..*restore }
    };
    let rules = rules.iter().map(|line| renamed(&line.text)).collect();
    let taken = commit(programs, backend, &table(rules)).is_ok();
    if taken && let Err(error) = commit(programs, backend, &table(removal.collect())) {
        // The next plan removes them, as it does every own chain that is not wanted.
        tracing::debug!(%error, "chains of a probe remain");
    }
    taken
}

/// Reads one table; the output of `iptables-save -c`.
///
/// # Errors
/// Those of running a program.
pub(super) fn save(
    programs: &Programs,
    backend: Backend,
    family: Family,
    table: Table,
) -> Result<String, Error> {
    let path = programs.tool(family, backend, "-save")?;
    let output = programs.run(&path, ["-c", "-t", table.name()], None)?;
    let program = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let context = Restore { family, table, lines: Vec::new(), last: false };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let printed: String = stdout.lines().filter(|line| line.starts_with('#')).collect();
    if let Some(error) = common(programs, &program, &context, &(said.clone() + &printed)) {
        return Err(error);
    }
    if output.status.success() {
        Ok(stdout)
    } else {
        Err(Error::Failed { program, status: output.status.to_string(), reason: reason(&said) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_in_what_every_version_says() {
        let nft = "iptables-nft-restore v1.8.9 (nf_tables): \nline 4: RULE_APPEND failed (Invalid argument): rule in \
                   chain BRIDGE-NODEPORT\n";
        let parse = "iptables-restore v1.8.9 (legacy): Couldn't load match `bogus':No such file or directory\n\n\
                     Error occurred at line: 3\nTry `iptables-restore -h' or 'iptables-restore --help' for more.\n";
        assert_eq!(line_number(nft), Some(4));
        assert_eq!(line_number(parse), Some(3));
        assert_eq!(line_number("iptables-restore: line 6 failed\n"), Some(6));
        assert_eq!(line_number("iptables: a newline is missing"), None);
        assert_eq!(
            reason(nft),
            "line 4: RULE_APPEND failed (Invalid argument): rule in chain BRIDGE-NODEPORT"
        );
        assert_eq!(
            reason(parse),
            "Couldn't load match `bogus':No such file or directory; Error occurred at line: 3"
        );
    }
}
