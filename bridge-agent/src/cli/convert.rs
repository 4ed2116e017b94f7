//! `bridge-agent convert`: rewrites rules of older versions.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{Error, Global, check::read, output::to_stderr, print, print_json};
use crate::config::{self, Conversion};

/// Rewrite rules of older versions as today's, without privileges.
///
/// Reads a configuration file, or manifests with BridgePolicies, and prints them with the meaning that they had. Comments
/// stay. Each change is named on standard error. What could mean two things is refused.
#[derive(Debug, Args)]
pub struct Convert {
    /// Exit code 1 if anything is to be changed; print the changes only
    #[arg(long)]
    check: bool,
    /// The file to convert, `-` for standard input [default: the file of --config]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Convert {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let path = self.file.as_deref().unwrap_or(&global.config);
        let (text, name): (String, &Path) = read(path)?;
        let Conversion { text, changes } = config::convert(&text, name)?;
        if global.json {
            let changes: Vec<_> = changes
                .iter()
                .map(|change| serde_json::json!({ "line": change.line, "message": change.message }))
                .collect();
            let text = (!self.check).then_some(text);
            print_json(&serde_json::json!({ "ok": true, "changes": changes, "text": text }))?;
        } else {
            for change in &changes {
                to_stderr(&format!("{}:{}: {}\n", name.display(), change.line, change.message))?;
            }
            if !self.check {
                print(&text)?;
            }
        }
        if self.check && !changes.is_empty() { Err(Error::Silent) } else { Ok(()) }
    }
}
