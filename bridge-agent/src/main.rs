//! The `bridge-agent` command.

use std::path::Path;
use std::process::ExitCode;

use bridge_agent::cli::{Cli, kubectl, show};
use bridge_agent::log;

/// As clap's own exit code for wrong usage.
const WRONG_USAGE: u8 = 2;

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_stem().is_some_and(|name| name == kubectl::NAME) {
        return kubectl::main();
    }
    let cli = Cli::read();
    if let Err(error) = log::init(cli.global.log_format, &cli.global.log_level) {
        eprintln!("error: {error}");
        return ExitCode::from(WRONG_USAGE);
    }
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            show(&error, cli.global.json);
            ExitCode::from(error.exit_code())
        }
    }
}
