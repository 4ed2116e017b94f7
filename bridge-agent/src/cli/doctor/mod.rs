//! `bridge-agent doctor`: finds settings of this machine that keep bridge from working, without a running agent.

mod agent;
mod cluster;
mod context;
mod engines;
mod finding;
mod forwarding;
mod host;
mod kernel;
mod netfilter;
mod ports;
mod routing;

use std::fmt::Write as _;

use clap::{Args, ValueEnum};

use self::context::Context;
pub(super) use self::finding::{Finding, Outcome};
use super::{
    Error, Global,
    output::{print, print_json},
    progress,
};
use crate::config::{self, Config, Role};

/// Find settings of this machine that keep bridge from working.
///
/// Needs no running agent; as root it sees everything. Exit code 1: a check failed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Only these checks; `node` is kernel, forwarding, engines and ports
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Scope>,
    /// Exit code 0 whatever is found: for a container whose log is read, and that
    /// must not keep the agent from starting
    #[arg(long)]
    report: bool,
}

/// A group of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scope {
    /// Everything but the cluster, the routes of a LAN host and the agent.
    Node,
    /// eBPF, file systems, capabilities.
    Kernel,
    /// Settings and rules that drop or change forwarded packets.
    Forwarding,
    /// Back ends of iptables, programs of others, pins, interfaces.
    Engines,
    /// The port pool.
    Ports,
    /// The API server.
    Cluster,
    /// Routes of a LAN host.
    Host,
    /// The running agent.
    Agent,
}

/// Runs the checks of a scope.
type Group = fn(&Context<'_>) -> Vec<Finding>;

impl Doctor {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let findings = examine(global, |scope| self.wants(scope));
        progress::end();
        if global.json {
            print_json(&serde_json::json!({ "ok": !failed(&findings), "checks": findings }))?;
        } else {
            print(&text(&findings))?;
        }
        if failed(&findings) && !self.report { Err(Error::Silent) } else { Ok(()) }
    }

    fn wants(&self, scope: Scope) -> bool {
        const NODE: [Scope; 4] = [Scope::Kernel, Scope::Forwarding, Scope::Engines, Scope::Ports];
        let all = self.only.is_empty();
        all || self.only.contains(&scope) || self.only.contains(&Scope::Node) && NODE.contains(&scope)
    }
}

fn failed(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.outcome == Outcome::Fail)
}

/// Runs every check.
pub(super) fn examine_all(global: &Global) -> Vec<Finding> {
    examine(global, |_| true)
}

fn examine(global: &Global, wants: impl Fn(Scope) -> bool) -> Vec<Finding> {
    let (config, finding) = configuration(global);
    let context = Context::new(global, config);
    let mut findings = vec![finding];
    let groups: [(Scope, Group); 7] = [
        (Scope::Kernel, kernel::check),
        (Scope::Forwarding, forwarding::check),
        (Scope::Engines, engines::check),
        (Scope::Ports, ports::check),
        (Scope::Host, host::check),
        (Scope::Cluster, cluster::check),
        (Scope::Agent, agent::check),
    ];
    for (scope, check) in groups {
        if wants(scope) {
            findings.extend(check(&context));
        }
    }
    findings
}

fn configuration(global: &Global) -> (Option<Config>, Finding) {
    const CHECK: &str = "config";
    let path = global.config.display();
    match config::load(&global.config) {
        Ok(loaded) => {
            let role = if loaded.config.role == Role::Node { "node" } else { "host" };
            let found = format!("{path} is valid, role {role}");
            (Some(loaded.config), Finding::ok(CHECK, found))
        }
        Err(_) if !global.config.exists() => {
            let reason = format!("there is no {path}; checks that depend on it are not run");
            (None, Finding::not_run(CHECK, reason))
        }
        Err(errors) => {
            let count = errors.0.list.len();
            let remedy = format!("`bridge-agent check {path}` shows the errors with their lines");
            (None, Finding::fail(CHECK, format!("{path} has {count} errors"), remedy))
        }
    }
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { check, outcome, seen, remedy } in findings {
        // Writing to a string does not fail.
        _ = writeln!(text, "{:7} {check}: {seen}", outcome.shown());
        if let Some(remedy) = remedy {
            _ = writeln!(text, "        do: {remedy}");
        }
    }
    let count = |wanted| findings.iter().filter(|finding| finding.outcome == wanted).count();
    _ = writeln!(
        text,
        "{} ok, {} warn, {} failed, {} not run",
        count(Outcome::Ok),
        count(Outcome::Warn),
        count(Outcome::Fail),
        count(Outcome::NotRun)
    );
    text
}
