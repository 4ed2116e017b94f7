//! Routes of a LAN host.

use super::{Context, Finding};
use crate::routes::{Comparison, Setup, Verdict};

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    const CHECK: &str = "host.routes";
    let Some(config) = context.config.as_ref().filter(|config| config.routes.is_some()) else {
        return vec![Finding::not_run(CHECK, "no routes are configured")];
    };
    let state = context.global.state_directory().boot();
    let compared = Setup::offline(config, &state).and_then(|setup| Comparison::new(&setup));
    let comparison = match compared {
        Ok(comparison) => comparison,
        Err(error) => return vec![Finding::not_run(CHECK, error.to_string())],
    };
    let refusals: Vec<String> =
        comparison.plan.verdicts.iter().filter_map(Verdict::refusal).map(ToString::to_string).collect();
    let mut findings = Vec::new();
    if let Some(missing) = &comparison.missing {
        let remedy = "its routes stay unknown until the file is there";
        findings.push(Finding::warn("host.routes-file", missing.to_string(), remedy));
    }
    findings.push(match (refusals.first(), comparison.plan.operations.len()) {
        (Some(refusal), _) => {
            let (seen, remedy) = refusal.rsplit_once("; ").unwrap_or((refusal, "see `bridge-agent routes plan`"));
            Finding::fail(CHECK, format!("{} routes are refused: {seen}", refusals.len()), remedy)
        }
        (None, 0) => Finding::ok(CHECK, "every wanted route is in the kernel"),
        (None, due) => Finding::warn(
            CHECK,
            format!("{due} changes are due, see `bridge-agent routes plan`"),
            "LAN traffic to these pods takes another way: start the agent, or run `bridge-agent routes apply`",
        ),
    });
    findings
}
