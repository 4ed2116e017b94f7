//! `cargo xtask mediation`.

use std::process::ExitCode;

use anyhow::Result;
use bridge_lab::mediation::{ATTEMPTS, Row, Setting};
use clap::Parser;
use comfy_table::{Table, presets};

/// Try every known way past the default deny, in a lab, with each engine and both; exit code 1 if one does not hold
#[derive(Parser)]
#[command(bin_name = "cargo xtask mediation")]
struct Arguments {
    /// Only attempts whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Only this setting of `enforcement.engines`
    #[arg(long)]
    engines: Option<String>,
    /// Print the packets that came through and the traffic that was cut
    #[arg(long)]
    verbose: bool,
}

fn main() -> Result<ExitCode> {
    let Arguments { only, engines, verbose } = Arguments::parse();
    let wanted: Vec<_> = Setting::ENGINES
        .into_iter()
        .filter(|setting| engines.as_deref().is_none_or(|wanted| wanted == *setting))
        .collect();
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["attempt", "rp_filter"].into_iter().chain(wanted.iter().copied()));
    let mut holds = true;
    for attempt in ATTEMPTS.iter().filter(|attempt| attempt.name.contains(&only)) {
        for &rp_filter in attempt.rp_filters {
            let mut cells = vec![attempt.name.to_owned(), rp_filter.to_string()];
            for &engines in &wanted {
                let played = attempt.play(Setting { engines, rp_filter });
                holds &= played.as_ref().is_ok_and(Row::holds);
                let verdict = match &played {
                    Ok(row) if row.holds() => "held",
                    Ok(row) if row.came_through.is_empty() => "held, legitimate traffic cut",
                    Ok(_) => "not held",
                    Err(_) => "not played",
                };
                eprintln!("{} [{engines}, rp_filter {rp_filter}]: {verdict}", attempt.name);
                match played {
                    Ok(row) if verbose && !row.holds() => eprintln!("{row:#?}"),
                    Err(error) => eprintln!("{error:#}"),
                    Ok(_) => {}
                }
                cells.push(verdict.into());
            }
            table.add_row(cells);
        }
    }
    println!("{table}");
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
