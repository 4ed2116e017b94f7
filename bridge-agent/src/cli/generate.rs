//! `bridge-agent generate`: man pages and shell completions, for packages, and the description of the API.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use clap::{Args, Command};
use clap_complete::Shell;

use super::{Error, Global, print, print_json};

/// Write man pages and shell completions into a directory, or print the description of the API; needs no privilege
#[derive(Debug, Args)]
pub struct Generate {
    /// The directory; it is created
    #[arg(long, value_name = "DIR", required_unless_present = "openapi")]
    directory: Option<PathBuf>,
    /// Print the OpenAPI document of the API instead
    #[arg(long, conflicts_with = "directory")]
    openapi: bool,
}

impl Generate {
    pub(super) fn run(&self, global: &Global, command: fn() -> Command) -> Result<(), Error> {
        let Some(directory) = &self.directory else { return print_json(&crate::api::document()) };
        write_all(directory, command)
            .map_err(|source| Error::Process { action: "cannot write man pages and completions", source })?;
        if global.json {
            return print_json(&serde_json::json!({ "ok": true, "directory": directory }));
        }
        print(&format!("wrote man pages and completions into {}\n", directory.display()))
    }
}

/// Writes, for `command`, `man/*.1`, one page a command, and `completions/{bash,zsh,fish}/*` below `directory`.
fn write_all(directory: &Path, command: fn() -> Command) -> io::Result<()> {
    let man = directory.join("man");
    fs::create_dir_all(&man)?;
    clap_mangen::generate_to(command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let folder = directory.join("completions").join(shell.to_string());
        fs::create_dir_all(&folder)?;
        let file = match shell {
            Shell::Bash => "bridge-agent",
            Shell::Zsh => "_bridge-agent",
            _ => "bridge-agent.fish",
        };
        clap_complete::generate(shell, &mut command(), "bridge-agent", &mut File::create(folder.join(file))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_command_has_a_man_page_and_is_completed() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path(), Cli::command).unwrap();
        let bash = fs::read_to_string(directory.path().join("completions/bash/bridge-agent")).unwrap();
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = command.get_name();
            let page = directory.path().join(format!("man/bridge-agent-{name}.1"));
            assert!(fs::read_to_string(page).unwrap().contains(".SH SYNOPSIS"), "{name}");
            assert!(bash.contains(name), "{name}");
        }
        let run = fs::read_to_string(directory.path().join("man/bridge-agent-run.1")).unwrap();
        for unit in ["netfilter\\-persistent", "bridge\\-nftables.service"] {
            assert!(run.contains(unit), "{run}");
        }
    }
}
