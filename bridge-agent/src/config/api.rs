//! `api`: how the agent is talked to.

use std::io::ErrorKind;
use std::os::unix::{ffi::OsStrExt, fs::FileTypeExt as _};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{AbsolutePath, FileMode, Problem, SocketAddress, has_leading_zero, unprintable};
use super::report::{Path, Report};

/// The unix socket when the configuration names none.
pub const DEFAULT_SOCKET: &str = "/run/bridge/agent.sock";

/// The longest path of a unix socket, in bytes: the kernel's `UNIX_PATH_MAX` less its final zero byte.
const MAX_SOCKET_PATH: usize = 107;

/// How the agent is talked to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Api {
    /// The unix socket of the HTTP API.
    #[schemars(extend("examples" = ["/run/bridge/agent.sock"]))]
    pub socket: AbsolutePath,
    /// The permission bits of the socket, in octal.
    pub mode: FileMode,
    /// The group of the socket, by name or number. Left out: the group the agent runs as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The address and port of Prometheus metrics over HTTP. Left out: none, only on the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddress>,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            socket: AbsolutePath(DEFAULT_SOCKET.into()),
            mode: FileMode(0o660),
            group: None,
            metrics: None,
        }
    }
}

/// Refuses a text that is neither the name nor the number of a group.
fn group_problem(group: &str) -> Option<Problem> {
    const HELP: &str = "write a group such as bridge, or its number, or remove the key";
    if group.is_empty() {
        return Some(Problem::new("the group is empty", HELP));
    }
    if let Some(problem) = unprintable(group) {
        return Some(problem);
    }
    let bad = |c: char| c.is_whitespace() || matches!(c, ':' | ',' | '/');
    if group.starts_with(['+', '-']) || group.contains(bad) {
        return Some(Problem::new(format!("{group:?} is not the name of a group"), HELP));
    }
    // The last one means to chown(2) that the group stays.
    let is_number = group.bytes().all(|byte| byte.is_ascii_digit());
    if is_number && (has_leading_zero(group) || !group.parse::<u32>().is_ok_and(|id| id < u32::MAX)) {
        let message = format!("`{group}` is not the number of a group");
        return Some(Problem::new(
            message,
            format!("write it without leading zeros, from 0 to {}", u32::MAX - 1),
        ));
    }
    None
}

impl Api {
    /// Finds another file in the place of the socket.
    pub(crate) fn occupied(&self) -> Option<Problem> {
        let path = &self.socket.0;
        let found = std::fs::symlink_metadata(path);
        let kind = match &found {
            Ok(found) if found.file_type().is_socket() => return None,
            Ok(found) if found.is_dir() => "a directory",
            Ok(_) => "a file that is no socket",
            Err(error) if error.kind() == ErrorKind::NotADirectory => "below a file",
            Err(_) => return None,
        };
        let message = format!("`api.socket`: {} is {kind}", path.display());
        Some(Problem::new(
            message,
            "remove that, or write the path of a socket, such as /run/bridge/agent.sock",
        ))
    }

    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let length = self.socket.0.as_os_str().as_bytes().len();
        if length > MAX_SOCKET_PATH {
            report.error(
                &path.key("socket"),
                Problem::new(
                    format!("the path of the socket has {length} bytes"),
                    format!("shorten it to {MAX_SOCKET_PATH} bytes, the capacity of a unix socket's address"),
                ),
            );
        }
        if let Some(problem) = self.group.as_deref().and_then(group_problem) {
            report.error(&path.key("group"), problem);
        }
        if self.mode.0 & 0o002 != 0 {
            report.warn(
                &path.key("mode"),
                Problem::new(
                    format!("mode {} lets every user of this machine control the agent", self.mode),
                    "write \"0660\", and `group` for those who may",
                ),
            );
        }
    }
}
