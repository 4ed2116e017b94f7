//! `names`: names of LAN hosts and networks, for tables, events and logs.

use std::collections::BTreeMap;

use super::leaf::{Leaf as _, Problem};
use super::network::HostOrNetwork;
use super::report::{Path, Report};

/// Most names.
const MAX_NAMES: usize = 10_000;
/// Longest name, in bytes: that of a domain name (RFC 1035).
const MAX_LENGTH: usize = 253;

/// Checks that each key is an address or a network, and each value a name.
pub(super) fn check(names: &BTreeMap<String, String>, path: &Path<'_>, report: &mut Report<'_>) {
    if names.len() > MAX_NAMES {
        let problem = format!("{} names are more than {MAX_NAMES}", names.len());
        report.error(path, Problem::new(problem, "name networks instead of single hosts"));
        return;
    }
    let mut seen = BTreeMap::new();
    for (key, name) in names {
        let path = path.key(key);
        match HostOrNetwork::parse(key) {
            Err(problem) => report.error(&path, problem),
            Ok(host) => {
                if let Some(other) = seen.insert(host.net(), key) {
                    let problem = format!("`{key}` and `{other}` are the same address");
                    report.error(&path, Problem::new(problem, "keep one of both"));
                }
            }
        }
        if !is_name(name) {
            let help = format!("write 1 to {MAX_LENGTH} letters, digits or - _ . /, such as plc-7");
            report.error(&path, Problem::new(format!("`{name}` is no name"), help));
        }
    }
}

fn is_name(name: &str) -> bool {
    let fine = |letter: char| letter.is_alphanumeric() || matches!(letter, '-' | '_' | '.' | '/');
    !name.is_empty() && name.len() <= MAX_LENGTH && name.chars().all(fine)
}
