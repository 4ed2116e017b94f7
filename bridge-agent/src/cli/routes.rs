//! `bridge-agent routes`: desired routes and those of the kernel, without asking the running agent.

use std::fmt::Write as _;

use clap::{Args, Subcommand};

use super::export::Export;
use super::{
    Error, Global, nobody_keeps_routes,
    output::{Watch, print, print_json},
    route_setup::{setup, warn},
    table,
};
use crate::routes::{Comparison, Observed, Operation, Verdict, carry_out, withdrawal};

/// List, plan, apply, withdraw or export the routes to pods.
#[derive(Debug, Args)]
pub struct Routes {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show every route that is wanted, where it comes from, and whether the kernel has it
    List(Watch),
    /// Show the operations that are due
    Plan {
        /// Exit with 4 when an operation is due or a route is refused
        #[arg(long)]
        exit_code: bool,
    },
    /// Bring the kernel into line, once; `bridge-agent run` does it for good
    Apply {
        /// Show the operations, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove every route bridge has added, and nothing else; refused while an agent runs that would put them back
    Withdraw {
        /// Show the routes to remove, and remove nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Write the routes as commands or files for a host that cannot run the agent
    Export(Export),
}

impl Routes {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match &self.action {
            Action::List(watch) => watch.repeat(|| list(global)),
            Action::Plan { exit_code } => {
                let comparison = compare(global)?;
                show_plan(&comparison, global)?;
                let plan = &comparison.plan;
                let due = !plan.operations.is_empty() || plan.verdicts.iter().any(|v| v.refusal().is_some());
                if *exit_code && due { Err(Error::ChangesDue) } else { Ok(()) }
            }
            Action::Apply { dry_run: true } => show_plan(&compare(global)?, global),
            Action::Apply { dry_run: false } => {
                let mut comparison = compare(global)?;
                let failures = comparison.apply()?;
                show_plan(&comparison, global)?;
                partly(&failures, &comparison.observed)
            }
            Action::Withdraw { dry_run } => {
                if !dry_run {
                    nobody_keeps_routes(global)?;
                }
                let (observed, operations) = withdrawal()?;
                let failures = if *dry_run { Vec::new() } else { carry_out(&operations)? };
                show_operations(&operations, &[], &observed, global)?;
                partly(&failures, &observed)
            }
            Action::Export(export) => export.run(global),
        }
    }
}

/// Compares, with a warning if a source is missing.
fn compare(global: &Global) -> Result<Comparison, Error> {
    let comparison = Comparison::new(&setup(global)?)?;
    warn(comparison.missing.as_ref());
    Ok(comparison)
}

fn list(global: &Global) -> Result<(), Error> {
    let snapshot = compare(global)?.snapshot();
    if global.json {
        return print_json(&snapshot.rows().collect::<Vec<_>>());
    }
    let mut table = table::table(&["network", "source", "state", "route"]);
    let mut reasons = String::new();
    for row in snapshot.rows() {
        let source = if row.origin.is_empty() {
            row.source.to_string()
        } else {
            format!("{} {}", row.source, row.origin)
        };
        let state = format!("{:?}", row.state).to_lowercase();
        if let Some(reason) = row.reason {
            _ = writeln!(reasons, "{state}: {reason}");
        }
        table.add_row([row.to.to_string(), source, state, row.route]);
    }
    print(&(table::render(&table) + &reasons))
}

fn show_plan(comparison: &Comparison, global: &Global) -> Result<(), Error> {
    let refusals: Vec<_> =
        comparison.plan.verdicts.iter().filter_map(Verdict::refusal).map(ToString::to_string).collect();
    show_operations(&comparison.plan.operations, &refusals, &comparison.observed, global)
}

/// `+` added, `~` exchanged, `-` removed, `!` refused.
fn show_operations(
    operations: &[Operation],
    refusals: &[String],
    observed: &Observed,
    global: &Global,
) -> Result<(), Error> {
    let lines = operations.iter().map(|operation| operation.show(observed));
    if global.json {
        return print_json(
            &serde_json::json!({ "operations": lines.collect::<Vec<_>>(), "refused": refusals }),
        );
    }
    let mut text: String = lines.map(|line| line + "\n").collect();
    for refusal in refusals {
        _ = writeln!(text, "! {refusal}");
    }
    if text.is_empty() {
        text.push_str("Nothing to do.\n");
    }
    print(&text)
}

pub(super) fn partly(failures: &[(Operation, String)], observed: &Observed) -> Result<(), Error> {
    if failures.is_empty() {
        return Ok(());
    }
    let line = |(operation, reason): &(Operation, String)| {
        format!("the kernel refused `{}`: {reason}", operation.show(observed))
    };
    Err(Error::Partly(failures.iter().map(line).collect()))
}
