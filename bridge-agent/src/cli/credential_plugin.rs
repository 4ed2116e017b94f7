//! `bridge-agent credential-plugin`: runs a credential plugin of the kubeconfig for the agent, with a limit of its output.

use std::ffi::OsString;

use clap::Args;

use super::exec::leave_like;
use crate::kubernetes::plugin;

/// Run a credential plugin and pass on a limited output.
#[derive(Debug, Args)]
pub struct CredentialPlugin {
    /// The plugin and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl CredentialPlugin {
    pub(super) fn run(&self) -> ! {
        /// As a shell, for a program that cannot be started.
        const NOT_STARTED: i32 = 127;
        match plugin::run(&self.command) {
            Ok(Some(status)) => leave_like(status),
            Ok(None) => std::process::exit(plugin::TOO_MUCH.into()),
            Err(error) => {
                eprintln!("cannot run the credential plugin {}: {error}", self.command[0].display());
                std::process::exit(NOT_STARTED);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn the_agent_understands_the_command_that_it_writes_into_the_kubeconfig() {
        let cli = Cli::try_parse_from(["/proc/self/exe", plugin::COMMAND, "--", "aws", "--output", "json"])
            .unwrap();
        let Command::CredentialPlugin(CredentialPlugin { command }) = cli.command else { panic!("{cli:?}") };
        assert_eq!(command, ["aws", "--output", "json"]);
    }
}
