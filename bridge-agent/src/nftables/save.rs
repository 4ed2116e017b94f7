//! Saved rules: a file of bridge's own, which a unit of bridge's own loads at boot. The distribution's nftables.conf is never
//! touched.

use std::io;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::ruleset::Ruleset;
use super::script;
use crate::kernel::files::{self, MAX_CONFIGURATION, Ownership, read_regular_text};

/// Relative to the root, as the unit names it.
const FILE: &str = "etc/bridge/rules.nft";
/// The unit, wherever a package or an administrator has put it.
const UNITS: [&str; 3] = [
    "etc/systemd/system/bridge-nftables.service",
    "usr/lib/systemd/system/bridge-nftables.service",
    "lib/systemd/system/bridge-nftables.service",
];

/// Whether and where rules are saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saving {
    /// False (`persistence.save: never`): the file is not touched.
    pub enabled: bool,
    /// The root directory; `/` but for tests and images.
    pub root: PathBuf,
}

impl Default for Saving {
    fn default() -> Self {
        Self { enabled: true, root: "/".into() }
    }
}

impl Saving {
    /// The file of saved rules.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.root.join(FILE)
    }

    /// Replaces the saved rules; returns the file if it has changed.
    ///
    /// # Errors
    /// If the file cannot be read or replaced; it is as before then.
    pub fn save(&self, rules: &Ruleset) -> Result<Option<PathBuf>, Error> {
        if !self.enabled {
            return Ok(None);
        }
        if !UNITS.iter().any(|unit| self.root.join(unit).exists()) {
            tracing::info!(
                "rules are not saved: bridge-nftables.service is not installed; until bridge-agent runs, a reboot leaves \
                 pods open"
            );
            return Ok(None);
        }
        let path = self.file();
        let text = format!("#!/usr/sbin/nft -f\n# Written by bridge-agent.\n{}", script::full(rules));
        let failed = |source| Error::Save { path: path.clone(), source };
        if read(&path).map_err(failed)?.as_deref() == Some(&text) {
            return Ok(None);
        }
        files::replace(&path, Ownership::Private, text.as_bytes()).map_err(failed)?;
        Ok(Some(path))
    }

    /// Removes the file, also if saving is disabled.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        let path = self.file();
        // A file system that is read-only, as in a container, refuses the removal of a file that is not there.
        if std::fs::symlink_metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Save { path, source }),
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> io::Result<Option<String>> {
    match read_regular_text(path, MAX_CONFIGURATION) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
