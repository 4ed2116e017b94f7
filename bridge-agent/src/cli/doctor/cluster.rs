//! The API server of the cluster.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{context::Context, finding::Finding};
use crate::{
    cli::{Error, block_on},
    kubernetes::examine::{self, Examination},
};

/// Difference of clocks that certificates and tokens survive, in seconds.
const MAX_SKEW: i64 = 30;

/// The directory of CNI configurations, unless `NETCONFPATH` names another, as cnitool(1) finds it.
const CNI: &str = "/etc/cni/net.d";

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    let mut all = Vec::new();
    if context.node().is_some() {
        all.push(cni(&env::var_os("NETCONFPATH").map_or_else(|| PathBuf::from(CNI), PathBuf::from)));
    }
    let Some(section) = context.config.as_ref().and_then(|config| config.kubernetes.as_ref()) else {
        all.push(Finding::not_run("cluster", "the configuration follows no cluster"));
        return all;
    };
    let found = block_on(async { Ok::<_, Error>(examine::examine(section).await) });
    match found {
        Ok(found) => all.extend(findings(&found)),
        Err(error) => all.push(Finding::not_run("cluster", error.to_string())),
    }
    all
}

/// Reads the configuration of the CNI that the container runtime uses: the first by name.
fn cni(directory: &Path) -> Finding {
    const CHECK: &str = "cluster.cni";
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_one = |path: &PathBuf| {
        path.extension().is_some_and(|end| ["conf", "conflist", "json"].iter().any(|known| end == *known))
    };
    let Some(file) = entries.filter(is_one).min() else {
        return Finding::not_run(CHECK, format!("no CNI configuration is in {}", directory.display()));
    };
    let text = fs::read_to_string(&file).unwrap_or_default();
    let shown = file.display();
    let Ok(found) = serde_json::from_str::<Value>(&text) else {
        return Finding::not_run(CHECK, format!("{shown} is no JSON"));
    };
    let plugins = found["plugins"].as_array().map_or_else(|| std::slice::from_ref(&found), Vec::as_slice);
    let kind = |plugin: &Value| plugin["type"].as_str().unwrap_or("unknown").to_owned();
    let names = plugins.iter().map(kind).collect::<Vec<_>>().join(", ");
    match plugins.iter().find(|plugin| plugin["ipMasq"] == true) {
        None => Finding::ok(CHECK, format!("{shown}: {names}")),
        Some(plugin) => Finding::warn(
            CHECK,
            format!("{shown}: the plugin {} has ipMasq", kind(plugin)),
            "LAN hosts see the node's address instead of the pod's: set ipMasq to false, and masquerade packets to other \
             networks than networks.external by a rule of your own",
        ),
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
