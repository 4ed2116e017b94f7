//! The command line.
//!
//! One file per command; code that all of them share is here.

mod apply;
mod ask;
mod bugreport;
mod check;
mod convert;
mod crds;
mod credential_plugin;
mod dial;
mod discover;
mod doctor;
mod down;
mod error;
mod exec;
mod explain;
mod export;
mod flows;
mod generate;
mod global;
pub mod kubectl;
mod monitor;
mod names;
mod nodeport_range;
mod output;
mod ports;
mod progress;
mod route_setup;
mod routes;
mod rules;
mod run;
mod status;
mod suggest;
mod table;
mod ui;
mod values;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::{
    ask::{block_on, get, nobody_keeps_routes},
    global::DEFAULT_CONFIG,
    output::{Output, print, print_diagnostics, print_json},
    values::time,
};
pub use self::{error::Error, global::Global, output::show};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent runs, 4 changes are due \
                          (routes plan --exit-code).";

/// Ends the help of each command: it does not list the options that all of them have.
const SHARED_OPTIONS: &str =
    "Options of all commands, such as --json, -o, --config and --socket: bridge-agent --help";

/// Direct, safe TCP between LAN hosts and the pods of a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(name = "bridge-agent", version, max_term_width = 80, after_help = EXIT_CODES)]
pub struct Cli {
    /// Global options.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Validate the configuration and print its effective form; needs no privilege
    Check(check::Check),
    /// Rewrite rules of older versions as today's; needs no privilege
    Convert(convert::Convert),
    /// Run the agent until SIGTERM; enforcement stays active afterwards
    Run(run::Run),
    /// Apply a configuration, and make it the configuration file; with --confirm, on trial first
    Apply(apply::Apply),
    /// Make the configuration on trial the one that counts
    Confirm(apply::Confirm),
    /// Go back from the configuration on trial to the one before it
    Revert(apply::Revert),
    /// Show the active enforcement, whether the agent runs or not; exit code 3: no agent runs
    Status(status::StatusCommand),
    /// Explain why a connection passes or does not, and the rule that would allow it
    Explain(explain::Explain),
    /// Suggest rules for connections that were denied, or would have been
    Suggest(suggest::Suggest),
    /// List the flows that are known, or forget some
    Flows(flows::Flows),
    /// List the active rules with their hits
    Rules(rules::Rules),
    /// Show verdicts on packets and route events, live
    Monitor(monitor::Monitor),
    /// Serve a page that shows flows, denied packets, rules, routes and the port pool of this node or, with --kubernetes, of
    /// every node, until Ctrl-C
    Ui(ui::Ui),
    /// List, plan, apply, withdraw or export the routes to pods
    Routes(routes::Routes),
    /// Find settings of this machine that keep bridge from working
    Doctor(doctor::Doctor),
    /// Collect all that a maintainer asks for in one file
    Bugreport(bugreport::Bugreport),
    /// Learn behind which node a pod is
    Discover(discover::Discover),
    /// Lease source ports, give them back, list them, watch them
    Ports(ports::Ports),
    /// Run a program whose connections come from ports of the pool
    Exec(exec::Exec),
    /// Show or change the range that the cluster takes NodePorts from
    NodeportRange(nodeport_range::NodeportRange),
    /// Print the custom resource definitions for Kubernetes, or write them into a directory; needs no privilege
    Crds(crds::Crds),
    /// Write man pages and shell completions, for packages
    #[command(hide = true)]
    Generate(generate::Generate),
    /// Connect standard input and output to the agent's socket, for `ui --kubernetes`
    #[command(hide = true)]
    DialStdio(dial::Dial),
    /// Run a credential plugin of the kubeconfig, with a limit of its output
    #[command(hide = true)]
    CredentialPlugin(credential_plugin::CredentialPlugin),
    /// Stop enforcing: remove every program, map, rule and route of bridge
    Down(down::Down),
}

/// Returns the command line, with the help of each sub-command reduced to its own options.
fn command() -> clap::Command {
    let mut command = Cli::command();
    // Hands the global options down.
    command.build();
    command.mut_subcommands(own_options_only)
}

fn own_options_only(command: clap::Command) -> clap::Command {
    let own = |argument: clap::Arg| if argument.is_global_set() { argument.hide(true) } else { argument };
    let help = match command.get_after_help() {
        Some(help) => format!("{help}\n\n{SHARED_OPTIONS}"),
        None => SHARED_OPTIONS.to_owned(),
    };
    command.mut_args(own).after_help(help).mut_subcommands(own_options_only)
}

impl Cli {
    /// Reads the command line; ends the process on `--help`, `--version` and wrong usage.
    #[must_use]
    pub fn read() -> Self {
        let matches = command().get_matches();
        let mut cli = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        match &cli.global.output {
            Some(Output::Json) => cli.global.json = true,
            Some(Output::Yaml) => {
                cli.global.json = true;
                output::choose_yaml();
            }
            _ => {}
        }
        cli
    }

    /// Name of a command that ends by itself, for its progress line.
    const fn task(&self) -> Option<&'static str> {
        match self.command {
            Command::Apply(_) => Some("apply"),
            Command::Confirm(_) => Some("confirm"),
            Command::Revert(_) => Some("revert"),
            Command::Check(_) => Some("check"),
            Command::Status(_) => Some("status"),
            Command::Flows(_) => Some("flows"),
            Command::Rules(_) => Some("rules"),
            Command::Routes(_) => Some("routes"),
            Command::Ports(_) => Some("ports"),
            Command::Doctor(_) => Some("doctor"),
            Command::Bugreport(_) => Some("bugreport"),
            Command::Down(_) => Some("down"),
            _ => None,
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Whatever made it fail, to be shown by [`show`].
    pub fn run(&self) -> Result<(), Error> {
        if let Some(task) = self.task() {
            progress::start(task);
        }
        let result = self.dispatch();
        progress::end();
        result
    }

    fn dispatch(&self) -> Result<(), Error> {
        match &self.command {
            Command::Check(command) => command.run(&self.global),
            Command::Convert(command) => command.run(&self.global),
            Command::Run(command) => command.run(&self.global),
            Command::Apply(command) => command.run(&self.global),
            Command::Confirm(command) => command.run(&self.global),
            Command::Revert(command) => command.run(&self.global),
            Command::Status(command) => command.run(&self.global),
            Command::Explain(command) => command.run(&self.global),
            Command::Suggest(command) => command.run(&self.global),
            Command::Flows(command) => command.run(&self.global),
            Command::Rules(command) => command.run(&self.global),
            Command::Monitor(command) => command.run(&self.global),
            Command::Ui(command) => command.run(&self.global),
            Command::Routes(command) => command.run(&self.global),
            Command::Doctor(command) => command.run(&self.global),
            Command::Bugreport(command) => command.run(&self.global),
            Command::Discover(command) => command.run(&self.global),
            Command::Crds(command) => command.run(&self.global),
            Command::Generate(command) => command.run(&self.global, Self::command),
            Command::DialStdio(command) => command.run(&self.global),
            Command::CredentialPlugin(command) => command.run(),
            Command::Down(command) => command.run(&self.global),
            Command::NodeportRange(command) => command.run(&self.global),
            Command::Ports(command) => command.run(&self.global),
            Command::Exec(command) => command.run(&self.global),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{global::configured_socket, *};
    use crate::config::DEFAULT_SOCKET;

    /// Visits a command and all below it.
    fn each(command: &mut clap::Command, visit: &mut impl FnMut(&mut clap::Command)) {
        visit(command);
        for below in command.get_subcommands_mut() {
            each(below, visit);
        }
    }

    #[test]
    fn every_help_fits_80_columns_and_lists_only_own_options() {
        let mut commands = 0;
        each(&mut command(), &mut |command| {
            commands += 1;
            let name = command.get_bin_name().unwrap_or("bridge-agent").to_owned();
            for help in [command.render_help().to_string(), command.render_long_help().to_string()] {
                for line in help.lines() {
                    assert!(line.chars().count() <= 80, "{name} --help: {line:?}");
                }
                assert!(!help.contains("EXEC_PREFIX"), "{name}: a constant's name");
                assert_eq!(help.contains("--pin-root"), name == "bridge-agent", "{name}: {help}");
            }
        });
        assert!(commands > 25, "only {commands} commands were looked at");
    }

    #[test]
    fn hidden_options_still_work_after_the_command() {
        let matches = command()
            .try_get_matches_from(["bridge-agent", "routes", "list", "--json", "--pin-root", "/x"])
            .unwrap();
        let cli = Cli::from_arg_matches(&matches).unwrap();
        assert!(cli.global.json);
        assert_eq!(cli.global.pin_root, PathBuf::from("/x"));
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_socket_is_found_in_what_is_no_yaml() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bridge.yaml");
        let socket = |text: &str| {
            std::fs::write(&file, text).unwrap();
            configured_socket(&file)
        };
        let found = Some(PathBuf::from("/run/other.sock"));
        for api in ["api: {socket: /run/other.sock}", "api:\n  # here\n\n  socket: /run/other.sock\n"] {
            for text in [api.to_owned(), format!("rules: [\n{api}"), format!("{api}\nrules:\n\t- [")] {
                assert_eq!(socket(&text), found, "{text}");
            }
        }
        assert_eq!(socket("rules: [\n"), None);
        assert_eq!(socket("rules: [\napi:\nsocket: /run/other.sock"), None);
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
    fn the_socket_is_found_in_a_configuration_that_is_not_valid() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bridge.yaml");
        for (text, expected) in [
            ("role: nobody\napi: {socket: /x.sock, mode: 7}\n", "/x.sock"),
            ("role: node\n", DEFAULT_SOCKET),
            ("role: [", DEFAULT_SOCKET),
        ] {
            std::fs::write(&file, text).unwrap();
            let arguments = ["bridge-agent", "--config", file.to_str().unwrap(), "status"];
            let cli = Cli::try_parse_from(arguments).unwrap();
            assert_eq!(cli.global.agent_socket(), PathBuf::from(expected), "{text}");
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
