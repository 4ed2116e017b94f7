//! How long bridge insists on the first place of a chain.

use std::time::{Duration, Instant};

/// Another program that insists on the first place keeps it for this long, after [`PATIENCE`] repairs in a row.
const TRUCE: Duration = Duration::from_secs(30);
const PATIENCE: u32 = 5;

/// Keeps two programs that both put their jump first from doing nothing else.
#[derive(Debug, Default)]
pub(super) struct Peace {
    last: Option<Instant>,
    in_a_row: u32,
}

impl Peace {
    /// Whether `drift` is repaired now.
    pub(super) fn may_repair(&mut self, drift: &str, now: Instant) -> bool {
        if !drift.ends_with("no longer first") {
            return true;
        }
        let since = self.last.map(|last| now.saturating_duration_since(last));
        match since {
            Some(since) if since < TRUCE && self.in_a_row >= PATIENCE => return false,
            Some(since) if since < TRUCE => self.in_a_row += 1,
            _ => self.in_a_row = 1,
        }
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_insists_on_being_first_is_let_win_for_a_while() {
        let mut peace = Peace::default();
        let start = Instant::now();
        let drift = "IPv4 table filter, chain FORWARD: the jump to bridge is no longer first";
        for round in 0..PATIENCE {
            assert!(peace.may_repair(drift, start + Duration::from_secs(u64::from(round))));
        }
        assert!(!peace.may_repair(drift, start + Duration::from_secs(6)));
        assert!(peace.may_repair("IPv4 table filter: chain BRIDGE-FORWARD was removed", start));
        assert!(peace.may_repair(drift, start + Duration::from_secs(6) + TRUCE));
    }
}
