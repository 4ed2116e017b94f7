//! The API server of the cluster.

use super::{Context, Finding};
use crate::{
    cli::{Error, block_on},
    kubernetes::examine::{self, Examination},
};

/// Difference of clocks that certificates and tokens survive, in seconds.
const MAX_SKEW: i64 = 30;

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    let Some(section) = context.config.as_ref().and_then(|config| config.kubernetes.as_ref()) else {
        return vec![Finding::not_run("cluster", "the configuration follows no cluster")];
    };
    let found = block_on(async { Ok::<_, Error>(examine::examine(section).await) });
    match found {
        Ok(found) => findings(&found),
        Err(error) => vec![Finding::not_run("cluster", error.to_string())],
    }
}

fn findings(found: &Examination) -> Vec<Finding> {
    let Examination { server, token_left, answer, .. } = found;
    let mut findings = Vec::new();
    findings.push(match token_left {
        None => Finding::not_run("cluster.token", "the credentials have no token that names its end"),
        Some(left) if *left <= 0 => Finding::fail(
            "cluster.token",
            format!("the token expired {} s ago", -left),
            "the API server refuses the agent: renew the kubeconfig (deploy/kubernetes/lan-host-kubeconfig.sh), or restart the \
             pod",
        ),
        Some(left) => Finding::ok("cluster.token", format!("the token is valid for {left} s more")),
    });
    let server = server.as_deref().unwrap_or("the API server");
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            findings.push(Finding::fail(
                "cluster.api",
                format!("{server}: {error}"),
                "policies and pods are not followed: check address, certificates and token of the kubeconfig",
            ));
            return findings;
        }
    };
    findings.push(Finding::ok("cluster.api", format!("{server} answers, version {}", answer.version)));
    findings.push(match answer.skew {
        None => Finding::not_run("cluster.clock", "the answer has no date"),
        Some(skew) if skew.abs() > MAX_SKEW => Finding::warn(
            "cluster.clock",
            format!("the clocks differ by {skew} s"),
            "tokens and certificates seem expired or not yet valid: synchronise the clock (chronyc makestep, timedatectl)",
        ),
        Some(skew) => Finding::ok("cluster.clock", format!("the clocks differ by {skew} s")),
    });
    findings.push(match &answer.denied {
        Err(error) => Finding::not_run("cluster.rights", error),
        Ok(denied) if denied.is_empty() => {
            Finding::ok("cluster.rights", "the agent may do all that it needs")
        }
        Ok(denied) => Finding::fail(
            "cluster.rights",
            format!("denied: {}", denied.join(", ")),
            "apply deploy/kubernetes/rbac.yaml, or bind its roles to this user",
        ),
    });
    findings.push(match &answer.missing_definitions {
        Err(error) => Finding::not_run("cluster.definitions", error),
        Ok(missing) if missing.is_empty() => {
            Finding::ok("cluster.definitions", "bridgepolicies and bridgenodes are defined")
        }
        Ok(missing) => Finding::fail(
            "cluster.definitions",
            format!("not defined: {}", missing.join(", ")),
            "no BridgePolicy can exist: bridge-agent crds | kubectl apply --server-side -f -",
        ),
    });
    findings
}
