//! `enforcement.syslog`: denied packets as lines of the system log.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{AbsolutePath, Problem};
use super::report::{Path, Report};

/// Denied packets as lines of the system log, for a SIEM. journald and syslogd read the same socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Syslog {
    /// The unix datagram socket of the system log.
    pub socket: AbsolutePath,
    /// Maximum number of lines per second; the next line says how many were left out.
    #[schemars(range(min = 1, max = 10_000))]
    pub rate: u32,
}

impl Default for Syslog {
    fn default() -> Self {
        Self { socket: AbsolutePath("/dev/log".into()), rate: 10 }
    }
}

impl Syslog {
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        if !(1..=10_000).contains(&self.rate) {
            let help = "write a number between 1 and 10000, or remove `syslog`";
            report.error(&path.key("rate"), Problem::new(format!("{} lines per second", self.rate), help));
        }
    }
}
