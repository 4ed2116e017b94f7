//! Clients of the pool that were seen lately (pure).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// A client counts for this long after it was last seen with a destination in the pool, however soon its slots went to another
/// one; but not without its control groups.
const LATELY: Duration = Duration::from_secs(300);
/// Clients to remember: two are several.
const MOST: usize = 1024;

/// Whether there are several clients, so that each leaves ports to others.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// By their network namespace and the control group of their processes.
    seen: HashMap<(u64, u64), Instant>,
    /// Whether several pods take part by annotation: they count before they connect.
    pub(super) several_pods: bool,
}

impl Clients {
    /// Notes the network namespaces that have destinations now, each with a control group, and forgets those whose group has
    /// gone.
    pub(super) fn note(
        &mut self,
        clients: impl Iterator<Item = (u64, u64)>,
        is_gone: impl Fn(u64) -> bool,
        now: Instant,
    ) {
        self.seen.retain(|(_, group), at| now.saturating_duration_since(*at) < LATELY && !is_gone(*group));
        for client in clients {
            if self.seen.len() < MOST || self.seen.contains_key(&client) {
                self.seen.insert(client, now);
            }
        }
    }

    pub(super) fn are_several(&self) -> bool {
        let mut namespaces = self.seen.keys().map(|(netns_cookie, _)| netns_cookie);
        let first = namespaces.next();
        self.several_pods || namespaces.any(|other| Some(other) != first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_counts_for_five_minutes() {
        let (mut clients, start) = (Clients::default(), Instant::now());
        let stay = |_| false;
        clients.note([(1, 7), (2, 8)].into_iter(), stay, start);
        for seconds in [60, 299] {
            clients.note([(1, 7)].into_iter(), stay, start + Duration::from_secs(seconds));
            assert!(clients.are_several(), "after {seconds} s");
        }
        clients.note([(1, 7)].into_iter(), stay, start + LATELY);
        assert!(!clients.are_several());
        clients.note((0..1 << 20).map(|netns| (netns, 7)), stay, start + LATELY);
        assert_eq!(clients.seen.len(), MOST);
    }

    #[test]
    fn a_client_without_its_control_groups_does_not_count() {
        let (mut clients, start) = (Clients::default(), Instant::now());
        let both = [(1, 7), (2, 8), (2, 9)];
        clients.note(both.into_iter(), |_| false, start);
        clients.note([(1, 7)].into_iter(), |group| group == 8, start);
        assert!(clients.are_several(), "another container of the pod goes on");
        clients.note([(1, 7)].into_iter(), |group| group == 9, start);
        assert!(!clients.are_several());
        // Two control groups of one namespace are one client.
        clients.note([(1, 10)].into_iter(), |_| false, start);
        assert!(!clients.are_several());
    }
}
