//! The number of rules that iptables can apply and read back in time. Pure.

use super::error::Error;
use super::render;
use super::ruleset::Family;
use crate::model::Policy;
use crate::policy::budget;

/// The most rules of a family: each change writes all of them and reads them back, and reading takes the kernel a time that
/// grows with the square of their number: 0.5 s for 10,000, 18 s for 50,000.
pub const MAX_LINES: usize = 20_000;

/// Checks the size of a policy before anything is rendered: one rule with many ports and source ports takes a rule for each
/// pair of fifteen.
///
/// # Errors
/// [`Error::TooManyRules`], with the figure and the rule to change.
pub fn check(policy: &Policy) -> Result<(), Error> {
    for family in Family::ALL {
        let lines = render::line_count(policy, family);
        if lines > MAX_LINES {
            let most = policy.rules.iter().max_by_key(|rule| budget::lines(rule));
            let rule = most.map(|rule| rule.name.clone()).unwrap_or_default();
            return Err(Error::TooManyRules { program: family.program(), lines, limit: MAX_LINES, rule });
        }
    }
    Ok(())
}
