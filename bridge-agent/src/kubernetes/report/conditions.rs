//! Conditions, as the API conventions have them.

use super::super::resources::{ACCEPTED, Condition, PROGRAMMED};
use crate::kernel::clock;

/// The longest message that the schema of a condition takes.
const MAX_MESSAGE: usize = 4096;

/// Builds a condition. The time of its last transition is kept if `before` has the same status.
pub(super) fn condition(
    before: &[Condition],
    kind: &str,
    status: &str,
    generation: i64,
    reason: &str,
    message: &str,
) -> Condition {
    let former = before.iter().find(|condition| condition.kind == kind && condition.status == status);
    Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        observed_generation: generation,
        reason: reason.to_owned(),
        message: message[..message.floor_char_boundary(MAX_MESSAGE)].to_owned(),
        last_transition_time: former.map_or_else(now, |former| former.last_transition_time.clone()),
    }
}

/// `True` or `False`.
pub(super) const fn truth(of: bool) -> &'static str {
    if of { "True" } else { "False" }
}

/// The current time to the second, as `metav1.Time` has it.
pub(super) fn now() -> String {
    let time = clock::wall_clock();
    format!("{}Z", time.split('.').next().unwrap_or_default())
}

/// Whether two lists have the same conditions of this agent, times apart.
pub(super) fn same(some: &[Condition], others: &[Condition]) -> bool {
    [ACCEPTED, PROGRAMMED].iter().all(|kind| {
        let find = |list: &'_ [Condition]| {
            let found = list.iter().find(|condition| condition.kind == *kind);
            found.map(|one| {
                (one.status.clone(), one.observed_generation, one.reason.clone(), one.message.clone())
            })
        };
        find(some) == find(others)
    })
}
