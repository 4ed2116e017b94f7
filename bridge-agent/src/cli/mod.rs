//! The command line.
//!
//! One file per command; code that all of them share is here.

mod apply;
mod check;
mod crds;
mod discover;
mod doctor;
mod down;
mod exec;
mod explain;
mod export;
mod flows;
mod generate;
pub mod kubectl;
mod monitor;
mod nodeport_range;
mod output;
mod ports;
mod progress;
mod routes;
mod rules;
mod run;
mod status;
mod table;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use annotate_snippets::Level;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use serde::Deserialize;

use self::output::{Output, print, print_diagnostics, print_json, renderer, to_stderr};
use crate::api::client::{self, Client};
use crate::config::{ConfigErrors, DEFAULT_SOCKET, Diagnostics, TimeSpan, leaf::Leaf as _};
use crate::datapath::{self, Pins};
use crate::kernel::state_directory::StateDirectory;
use crate::state::Status;
use crate::{agent, api, log};

/// Default path of the configuration.
const DEFAULT_CONFIG: &str = "/etc/bridge/bridge.yaml";

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent runs, 4 changes are due \
                          (routes plan --exit-code).";

/// Ends the help of each command: it does not list the options that all of them have.
const SHARED_OPTIONS: &str =
    "Options of all commands, such as --json, -o, --config and --socket: bridge-agent --help";

/// Exit code of `status` when no agent runs, as that of systemctl.
const NOT_RUNNING: u8 = 3;
/// Exit code of `routes plan --exit-code` when the kernel differs.
const CHANGES_DUE: u8 = 4;

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

/// Options that all commands share.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Format of the result: json, yaml, or wide for every column
    #[arg(short, id = "format-of-result", global = true, value_name = "FORMAT", value_parser = output::output,
        conflicts_with = "json")]
    pub output: Option<Output>,
    /// The configuration file; `-` is standard input
    #[arg(long, short, global = true, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    pub config: PathBuf,
    /// The unix socket of the running agent; left out, that of the configuration, or /run/bridge/agent.sock
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The directory of state across restarts; left out, $STATE_DIRECTORY, or a directory of the socket's agent below /var/lib/bridge
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
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

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Validate the configuration and print its effective form; needs no privilege
    Check(check::Check),
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
    /// List the flows that are known, or forget some
    Flows(flows::Flows),
    /// List the active rules with their hits
    Rules(rules::Rules),
    /// Show verdicts on packets and route events, live
    Monitor(monitor::Monitor),
    /// List, plan, apply, withdraw or export the routes to pods
    Routes(routes::Routes),
    /// Find settings of this machine that keep bridge from working
    Doctor(doctor::Doctor),
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
    command.mut_args(own).after_help(SHARED_OPTIONS).mut_subcommands(own_options_only)
}

impl Global {
    /// Whether tables have every column.
    const fn wide(&self) -> bool {
        matches!(self.output, Some(Output::Wide))
    }

    /// Where maps are pinned.
    fn pins(&self) -> Pins {
        Pins::new(&self.pin_root)
    }

    /// The state directory: as given, else as the service manager names it (systemd.exec(5)), else that of the agent with this
    /// socket.
    fn state_directory(&self) -> StateDirectory {
        let named = || std::env::var("STATE_DIRECTORY").ok().filter(|value| !value.is_empty());
        match (&self.state_dir, named()) {
            (Some(directory), _) => StateDirectory::new(directory),
            (None, Some(named)) => StateDirectory::new(named.split(':').next().unwrap_or_default()),
            (None, None) => StateDirectory::of_socket(&self.agent_socket(), Path::new(DEFAULT_SOCKET)),
        }
    }

    /// The socket of the agent: as given, else as the agent that has the same configuration has it.
    fn agent_socket(&self) -> PathBuf {
        self.socket
            .clone()
            .or_else(|| configured_socket(&self.config))
            .unwrap_or_else(|| DEFAULT_SOCKET.into())
    }
}

/// `api.socket` of a configuration, which need not be valid beside that: when it is not, one wants to ask the agent.
fn configured_socket(path: &Path) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Sketch {
        api: Option<ApiSketch>,
    }
    #[derive(Deserialize)]
    struct ApiSketch {
        socket: Option<PathBuf>,
    }
    let text = std::fs::read_to_string(path).ok()?;
    let socket = |text: &str| serde_saphyr::from_str::<Sketch>(text).ok()?.api?.socket;
    socket(&text).or_else(|| socket(&section(&text, "api:")))
}

/// The lines of a section, of a text that as a whole may be no YAML.
fn section(text: &str, key: &str) -> String {
    let from_key = text.lines().skip_while(|line| !line.starts_with(key));
    let belongs =
        |(index, line): &(usize, &str)| *index == 0 || line.starts_with([' ', '#']) || line.is_empty();
    from_key.enumerate().take_while(belongs).map(|(_, line)| format!("{line}\n")).collect()
}

/// Refuses to go on if an agent runs that would put back the routes that are about to be removed.
fn nobody_keeps_routes(global: &Global) -> Result<(), Error> {
    block_on(async {
        match Client::connect(&global.agent_socket()).await {
            Ok(mut agent) => match agent.get::<Status>("/v1/status").await? {
                Status { routes: Some(_), pid, .. } => Err(Error::AgentKeepsRoutes(pid)),
                _ => Ok(()),
            },
            Err(client::Error::NotRunning { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
}

/// Reads a duration of an option.
fn time(text: &str) -> Result<Duration, String> {
    TimeSpan::parse(text)
        .map(TimeSpan::duration)
        .map_err(|problem| format!("{}; {}", problem.message, problem.help))
}

/// Waits for the answer of an agent.
fn block_on<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let failed = |source| Error::Process { action: "cannot start the runtime", source };
    runtime.map_err(failed)?.block_on(work)
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The nftables rules could not be read or removed.
    #[error(transparent)]
    Nftables(#[from] crate::nftables::Error),
    /// The iptables rules could not be read or removed.
    #[error(transparent)]
    Iptables(#[from] crate::iptables::Error),
    /// Standard output or input failed.
    #[error("{action}: {source}")]
    Stream {
        /// The action that failed.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// This process cannot run as it should.
    #[error("{action}: {source}")]
    Process {
        /// The action that failed.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The agent could not start, or ended.
    #[error(transparent)]
    Agent(#[from] agent::Error),
    /// The API could not be served.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// The packet path is not as it should be.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The agent did not answer.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// Routes.
    #[error(transparent)]
    Routes(#[from] crate::routes::Error),
    /// Routes that cannot be said in a format.
    #[error(transparent)]
    Export(#[from] crate::routes::export::ExportError),
    /// The agent has no routes of the cluster yet.
    #[error("the agent has not read the routes of the cluster yet; `bridge-agent status` names the reason")]
    NoClusterRoutes,
    /// Standard input cannot be followed.
    #[error(
        "--watch follows a configuration file, and standard input is none; write it to a file and name that by --config"
    )]
    WatchesStandardInput,
    /// It would undo the removal.
    #[error(
        "the agent (pid {0}) is running and would put the routes back; stop it before (`systemctl stop bridge-agent`)"
    )]
    AgentKeepsRoutes(u32),
    /// Discovery of pods.
    #[error(transparent)]
    Discover(#[from] discover::Failure),
    /// The kernel refused a part.
    #[error("{}", .0.join("\n"))]
    Partly(Vec<String>),
    /// Something of the port pool could not be removed.
    #[error(transparent)]
    Pool(#[from] crate::pool::run::StopError),
    /// A part of the configuration is not applied.
    #[error("not ready: {}", .0.join("\n"))]
    NotReady(Vec<String>),
    /// The range of NodePorts.
    #[error(transparent)]
    NodeportRange(#[from] crate::nodeport_range::Error),
    /// The program could not be run as asked.
    #[error("{0}")]
    Exec(String),
    /// The user did not confirm it.
    #[error("nothing was done")]
    NotDone,
    /// `status` has printed its report: no agent runs.
    #[error("no agent runs")]
    NoAgent,
    /// `routes plan --exit-code` has printed its operations.
    #[error("changes are due")]
    ChangesDue,
    /// Probes did not answer.
    #[error("not confirmed in time, the former configuration is active: {0}")]
    NotConfirmed(String),
    /// A connection that cannot be explained.
    #[error("{0}")]
    Question(String),
    /// Verdicts are not as a file of cases expects.
    #[error("{differing} of {all} cases differ")]
    Expectations {
        /// How many differ.
        differing: usize,
        /// How many there are.
        all: usize,
    },
    /// It failed, and the result on standard output says so.
    #[error("failed")]
    Silent,
    /// A value could not be written in the wanted format.
    #[error("cannot write the result: {0}")]
    Format(String),
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
            Command::Down(_) => Some("down"),
            _ => None,
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Whatever made it fail, to be shown by [`Error::show`].
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
            Command::Run(command) => command.run(&self.global),
            Command::Apply(command) => command.run(&self.global),
            Command::Confirm(command) => command.run(&self.global),
            Command::Revert(command) => command.run(&self.global),
            Command::Status(command) => command.run(&self.global),
            Command::Explain(command) => command.run(&self.global),
            Command::Flows(command) => command.run(&self.global),
            Command::Rules(command) => command.run(&self.global),
            Command::Monitor(command) => command.run(&self.global),
            Command::Routes(command) => command.run(&self.global),
            Command::Doctor(command) => command.run(&self.global),
            Command::Discover(command) => command.run(&self.global),
            Command::Crds(command) => command.run(&self.global),
            Command::Generate(command) => command.run(&self.global),
            Command::Down(command) => command.run(&self.global),
            Command::NodeportRange(command) => command.run(&self.global),
            Command::Ports(command) => command.run(&self.global),
            Command::Exec(command) => command.run(&self.global),
        }
    }
}

impl Error {
    /// Returns a remedy, where the message does not name one.
    fn help(&self) -> Option<&'static str> {
        match self {
            // These say so.
            Self::Config(_)
            | Self::Iptables(_)
            | Self::Nftables(_)
            | Self::Process { .. }
            | Self::Agent(_)
            | Self::Api(_)
            | Self::Datapath(_)
            | Self::Client(_)
            | Self::Routes(_)
            | Self::Export(_)
            | Self::NoClusterRoutes
            | Self::WatchesStandardInput
            | Self::AgentKeepsRoutes(_)
            | Self::Discover(_)
            | Self::Partly(_)
            | Self::Pool(_)
            | Self::NodeportRange(_)
            | Self::NotReady(_)
            | Self::NotDone
            | Self::NoAgent
            | Self::ChangesDue
            | Self::Exec(_)
            | Self::Question(_)
            | Self::Silent
            | Self::Format(_) => None,
            Self::Expectations { .. } => {
                Some("change the rules or the cases; `bridge-agent explain` has the steps")
            }
            Self::NotConfirmed(_) => {
                Some("check that these answer, and that the configuration lets this node reach them")
            }
            Self::Stream { .. } => Some("check the ends of standard input and output"),
        }
    }

    /// Exit code of the process.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoAgent | Self::Client(client::Error::NotRunning { .. }) => NOT_RUNNING,
            Self::ChangesDue => CHANGES_DUE,
            _ => 1,
        }
    }

    /// Shows the error: for people on standard error, with `--json` as an object on standard output.
    pub fn show(&self, global: &Global) {
        if matches!(self, Self::Silent | Self::NoAgent | Self::ChangesDue) {
            // The result is printed already.
            return;
        }
        // Where neither stream can be written to, the exit code is all that is left.
        let _ = if global.json { print_json(&self.to_json()) } else { self.print() };
    }

    fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Config(ConfigErrors(Diagnostics { list, left_off }))
            | Self::Agent(agent::Error::Config(ConfigErrors(Diagnostics { list, left_off }))) => {
                serde_json::json!({ "ok": false, "diagnostics": list, "leftOff": left_off })
            }
            other => serde_json::json!({ "ok": false, "error": other.to_string(), "help": other.help() }),
        }
    }

    fn print(&self) -> Result<(), Error> {
        match self {
            Self::Config(errors) | Self::Agent(agent::Error::Config(errors)) => print_diagnostics(&errors.0),
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

#[cfg(test)]
mod tests {
    use super::*;

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
