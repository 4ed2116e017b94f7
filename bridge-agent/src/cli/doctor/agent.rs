//! The running agent.

use super::{context::Context, finding::Finding};
use crate::{
    api::client::{self, Client},
    cli::{Error, block_on},
    state::Status,
};

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    const CHECK: &str = "agent.running";
    let socket = context.global.agent_socket();
    let status =
        block_on(async { Ok::<Status, Error>(Client::connect(&socket).await?.get("/v1/status").await?) });
    let status = match status {
        Ok(status) => status,
        Err(Error::Client(client::Error::NotRunning { .. })) => {
            let remedy = "changes are not followed until it runs: systemctl start bridge-agent";
            return vec![Finding::warn(CHECK, format!("no agent answers on {}", socket.display()), remedy)];
        }
        Err(error) => return vec![Finding::not_run(CHECK, error.to_string())],
    };
    let mut findings = vec![Finding::ok(CHECK, format!("pid {}, version {}", status.pid, status.version))];
    let unready = status.unready();
    findings.push(match unready.first() {
        None => Finding::ok("agent.ready", "the whole configuration is applied"),
        Some(reason) => {
            Finding::fail("agent.ready", reason, "`bridge-agent status` and the log have the details")
        }
    });
    for warning in &status.warnings {
        findings.push(Finding::warn("agent.warning", warning, "see docs/operations.md"));
    }
    findings
}
