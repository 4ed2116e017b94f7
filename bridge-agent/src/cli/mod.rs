//! The command line.
//!
//! One file per command; what all of them share is here.

mod check;
mod exec;
mod ports;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use annotate_snippets::{Level, Renderer};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::config::{ConfigErrors, DEFAULT_SOCKET, Diagnostics};
use crate::log;

/// Direct, safe TCP between LAN hosts and the pods of a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(name = "bridge-agent", version, after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.")]
pub struct Cli {
    /// What all commands share.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What all commands share.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// The configuration file; `-` is standard input
    #[arg(long, short, global = true, value_name = "FILE", default_value = "/etc/bridge/bridge.yaml")]
    pub config: PathBuf,
    /// The unix socket of the running agent
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// The directory of pinned maps and links, on a BPF file system
    #[arg(long, global = true, value_name = "DIR", default_value = "/sys/fs/bpf/bridge")]
    pub pin_root: PathBuf,
    /// How log lines are written to standard error
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: log::Format,
    /// The least level that is logged: error, warn, info, debug or trace; or target=level,...
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Validate the configuration and print what it comes to; needs no privilege
    Check(check::Check),
    /// Lease source ports, give them back, list them, watch them
    Ports(ports::Ports),
    /// Run a program whose connections come from ports of the pool
    Exec(exec::Exec),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// Standard output or input failed.
    #[error("{what}: {source}")]
    Stream {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The agent did not do it.
    #[error("{0}")]
    Ports(String),
    /// The program could not be run as asked.
    #[error("{0}")]
    Exec(String),
    /// A value could not be written in the wanted format.
    #[error("cannot write the result: {0}")]
    Format(String),
}

impl Cli {
    /// Does what was asked for.
    ///
    /// # Errors
    /// Whatever made it fail, to be shown by [`Error::show`].
    pub fn run(&self) -> Result<(), Error> {
        match &self.command {
            Command::Check(command) => command.run(&self.global),
            Command::Ports(command) => command.run(&self.global),
            Command::Exec(command) => command.run(&self.global),
        }
    }
}

impl Error {
    /// What the user can do about it, where the message does not say so itself.
    fn help(&self) -> Option<&'static str> {
        match self {
            Self::Config(_) | Self::Format(_) | Self::Ports(_) | Self::Exec(_) => None,
            Self::Stream { .. } => Some("check what standard input and output are connected to"),
        }
    }

    /// Shows the error: for people on standard error, with `--json` as an object on standard output.
    pub fn show(&self, global: &Global) {
        // Where neither stream can be written to, the exit code is all that is left.
        let _ = if global.json { print_json(&self.to_json()) } else { self.print() };
    }

    fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Config(ConfigErrors(Diagnostics { list, left_off })) => {
                serde_json::json!({ "ok": false, "diagnostics": list, "leftOff": left_off })
            }
            other => serde_json::json!({ "ok": false, "error": other.to_string(), "help": other.help() }),
        }
    }

    fn print(&self) -> Result<(), Error> {
        match self {
            Self::Config(errors) => print_diagnostics(&errors.0),
            other => {
                let message = other.to_string();
                let title = Level::ERROR.primary_title(&message);
                let group = match other.help() {
                    Some(help) => title.element(Level::HELP.message(help)),
                    None => annotate_snippets::Group::with_title(title),
                };
                to_stderr(&format!("{}\n", renderer().render(&[group])))
            }
        }
    }
}

/// With colours where they are seen.
fn renderer() -> Renderer {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if colours { Renderer::styled() } else { Renderer::plain() }
}

/// Shows findings in a configuration to people.
fn print_diagnostics(diagnostics: &Diagnostics) -> Result<(), Error> {
    to_stderr(&diagnostics.render(&renderer()))
}

fn to_stderr(text: &str) -> Result<(), Error> {
    let written = io::stderr().lock().write_all(text.as_bytes());
    written.map_err(|source| Error::Stream { what: "cannot write to standard error", source })
}

/// Prints a result as JSON.
fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::Format(error.to_string()))?;
    print(&format!("{text}\n"))
}

/// Prints a result. A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::Stream { what: "cannot write to standard output", source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for arguments in
            [&["bridge-agent"][..], &["bridge-agent", "chekc"], &["bridge-agent", "check", "--jsn"]]
        {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn shared_options_go_before_and_after_the_command() {
        for arguments in [["bridge-agent", "--json", "check"], ["bridge-agent", "check", "--json"]] {
            let cli = Cli::try_parse_from(arguments).unwrap();
            assert!(cli.global.json);
            assert_eq!(cli.global.config, PathBuf::from("/etc/bridge/bridge.yaml"));
            assert_eq!(cli.global.pin_root, PathBuf::from("/sys/fs/bpf/bridge"));
        }
    }
}
