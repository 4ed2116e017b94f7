//! Options that all commands share, and the places that they name.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

use super::output::{self, Output};
use crate::{
    config::DEFAULT_SOCKET,
    datapath::{DEFAULT_ROOT, Pins},
    kernel::state_directory::StateDirectory,
    log,
};

/// Default path of the configuration.
pub(super) const DEFAULT_CONFIG: &str = "/etc/bridge/bridge.yaml";

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
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_ROOT)]
    pub pin_root: PathBuf,
    /// How log lines are written to standard error
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: log::Format,
    /// The least level that is logged: error, warn, info, debug or trace; or target=level,...
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

impl Global {
    /// Whether tables have every column.
    pub(super) const fn wide(&self) -> bool {
        matches!(self.output, Some(Output::Wide))
    }

    /// Where maps are pinned.
    pub(super) fn pins(&self) -> Pins {
        Pins::new(&self.pin_root)
    }

    /// The state directory: as given, else as the service manager names it (systemd.exec(5)), else that of the agent with this
    /// socket.
    pub(super) fn state_directory(&self) -> StateDirectory {
        let named = || std::env::var("STATE_DIRECTORY").ok().filter(|value| !value.is_empty());
        match (&self.state_dir, named()) {
            (Some(directory), _) => StateDirectory::new(directory),
            (None, Some(named)) => StateDirectory::new(named.split(':').next().unwrap_or_default()),
            (None, None) => StateDirectory::of_socket(&self.agent_socket(), Path::new(DEFAULT_SOCKET)),
        }
    }

    /// The socket of the agent: as given, else as the agent that has the same configuration has it.
    pub(super) fn agent_socket(&self) -> PathBuf {
        self.socket
            .clone()
            .or_else(|| configured_socket(&self.config))
            .unwrap_or_else(|| DEFAULT_SOCKET.into())
    }
}

/// `api.socket` of a configuration, which need not be valid beside that: when it is not, one wants to ask the agent.
pub(super) fn configured_socket(path: &Path) -> Option<PathBuf> {
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
