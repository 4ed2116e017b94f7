//! The name of a lab, from which any process can determine whether its owner still lives.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Prefix of the names of all labs.
const PREFIX: &str = "bridge-lab-";

/// Identifies a lab on this machine: its owner's process id, that process's start time (so that a reused
/// process id is not taken for the owner), and a number of its own within the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LabId {
    pid: u32,
    /// In clock ticks since boot, field 22 of proc_pid_stat(5).
    start: u64,
    serial: u32,
}

impl LabId {
    /// Returns a name that no other lab has.
    pub fn unique() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        Self { pid, start: start_time(pid).unwrap_or(0), serial: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Whether this process made the lab.
    pub(super) fn is_own(self) -> bool {
        self.pid == std::process::id() && self.owner_lives()
    }

    /// Whether the process that made the lab still runs.
    pub fn owner_lives(self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// The lab that `name` (a network namespace, a directory) belongs to. `None`: to no lab.
    pub fn of(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.splitn(4, '-');
        let id = Self {
            pid: number(parts.next()?)?,
            start: number(parts.next()?)?,
            serial: number(parts.next()?)?,
        };
        Some(id)
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}-{}", self.pid, self.start, self.serial)
    }
}

/// Digits alone: `str::parse` would also take a sign.
fn number<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Start time of a process in clock ticks since boot. `None`: there is no such process, or only its corpse.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, field 2, stands in parentheses and may hold anything, parentheses too.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_back_to_its_lab() {
        let id = LabId::unique();
        assert_eq!(LabId::of(&id.to_string()), Some(id));
        assert_eq!(LabId::of(&format!("{id}-c1")), Some(id));
        assert_ne!(LabId::unique(), id);
        for other in ["bridge-lab-", "bridge-lab-1-2", "bridge-lab-1-+2-3", "bridge-lab-x-2-3", "lab-1-2-3"] {
            assert_eq!(LabId::of(other), None, "{other}");
        }
    }

    #[test]
    fn the_owner_lives_only_while_its_start_time_matches() {
        let id = LabId::unique();
        assert!(id.owner_lives());
        assert!(!LabId { start: id.start - 1, ..id }.owner_lives(), "a reused process id");
    }
}
