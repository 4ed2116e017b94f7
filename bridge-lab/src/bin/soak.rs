//! `cargo xtask soak`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use bridge_lab::soak;
use clap::Parser;
use comfy_table::{Table, presets};

/// Run agents, reloads, kills and traffic together for long; exit code 1 if anything fails or is left behind
#[derive(Parser)]
#[command(bin_name = "cargo xtask soak")]
struct Arguments {
    /// For so long
    #[arg(long, default_value_t = 20)]
    minutes: u64,
    /// Duration in seconds
    #[arg(long, conflicts_with = "minutes")]
    seconds: Option<u64>,
}

fn main() -> Result<ExitCode> {
    let Arguments { minutes, seconds } = Arguments::parse();
    let outcome = soak::run(Duration::from_secs(seconds.unwrap_or(minutes * 60)))?;
    let mut done = Table::new();
    done.load_preset(presets::ASCII_MARKDOWN).set_header(["work", "times", "failed"]);
    for (work, tally) in &outcome.work {
        done.add_row([(*work).to_owned(), tally.done.to_string(), tally.failed.to_string()]);
    }
    let mut left = Table::new();
    left.load_preset(presets::ASCII_MARKDOWN).set_header(["object", "before", "after", ""]);
    for finding in &outcome.findings {
        let [before, after] = &finding.figures;
        left.add_row([finding.subject.as_str(), before, after, if finding.ok { "ok" } else { "LEFT" }]);
    }
    println!("{done}\n\n{left}");
    for (work, tally) in outcome.work.iter().filter(|(_, tally)| tally.failed > 0) {
        println!("{work}, the first failure: {}", tally.why.as_deref().unwrap_or_default());
    }
    Ok(if outcome.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
