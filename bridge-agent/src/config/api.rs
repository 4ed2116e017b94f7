//! `api`: how the agent is talked to.

use std::os::unix::ffi::OsStrExt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{AbsolutePath, FileMode, Problem, SocketAddress};
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

impl Api {
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
        if self.group.as_deref() == Some("") {
            let help = "write a group such as bridge, or remove the key";
            report.error(&path.key("group"), Problem::new("the group is empty", help));
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
