//! Saved rules: own chains put into the files from which the system restores its tables at boot.
//!
//! Rules of others in those files stay byte for byte; their rules in the kernel are not added (kube-proxy and container
//! engines make their chains at every boot).

pub(crate) mod file;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;

use super::error::Error;
use super::ruleset::{Family, Ruleset};
use crate::kernel::files::{self, MAX_CONFIGURATION, Ownership, read_regular_text};

/// Whether and where rules are saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saving {
    /// False (`persistence.save: never`): no file is touched.
    pub enabled: bool,
    /// The root directory; `/` but for tests and images.
    pub root: PathBuf,
}

impl Default for Saving {
    fn default() -> Self {
        Self { enabled: true, root: "/".into() }
    }
}

/// A service that restores tables at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// iptables-services of Fedora, RHEL and their kin.
    IptablesServices,
    /// netfilter-persistent (package iptables-persistent) of Debian, Ubuntu and their kin.
    NetfilterPersistent,
}

impl Service {
    const ALL: [Self; 2] = [Self::IptablesServices, Self::NetfilterPersistent];

    /// Relative to the root.
    const fn file(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::IptablesServices, Family::V4) => "etc/sysconfig/iptables",
            (Self::IptablesServices, Family::V6) => "etc/sysconfig/ip6tables",
            (Self::NetfilterPersistent, Family::V4) => "etc/iptables/rules.v4",
            (Self::NetfilterPersistent, Family::V6) => "etc/iptables/rules.v6",
        }
    }

    /// Any of these files proves that the service is installed.
    const fn traces(self) -> &'static [&'static str] {
        match self {
            Self::IptablesServices => &[
                "etc/sysconfig/iptables",
                "usr/lib/systemd/system/iptables.service",
                "usr/libexec/iptables/iptables.init",
            ],
            Self::NetfilterPersistent => &[
                "etc/iptables/rules.v4",
                "usr/sbin/netfilter-persistent",
                "usr/share/netfilter-persistent/plugins.d/15-ip4tables",
            ],
        }
    }
}

impl Saving {
    /// The services that are installed.
    #[must_use]
    pub fn services(&self) -> Vec<Service> {
        let installed =
            |service: &Service| service.traces().iter().any(|trace| self.root.join(trace).exists());
        Service::ALL.into_iter().filter(installed).collect()
    }

    /// Replaces the saved rules of bridge; returns the files that were replaced.
    ///
    /// # Errors
    /// If a file cannot be read or replaced; it is as before then.
    pub fn save(&self, rulesets: &[Ruleset]) -> Result<Vec<PathBuf>, Error> {
        let mut replaced = Vec::new();
        for service in self.places() {
            for ruleset in rulesets {
                replaced.extend(self.update(service, ruleset.family, |old| file::with(old, ruleset))?);
            }
        }
        Ok(replaced)
    }

    /// Returns the services that rules are saved for.
    pub(super) fn places(&self) -> Vec<Service> {
        if !self.enabled {
            return Vec::new();
        }
        let services = self.services();
        if services.is_empty() {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                tracing::info!(
                    "rules are not saved: neither iptables-services nor iptables-persistent is installed; until \
                     bridge-agent runs, a reboot leaves pods open"
                );
            });
        }
        services
    }

    /// Removes the rules of bridge from all saved files, also if saving is disabled.
    ///
    /// # Errors
    /// If a file cannot be read or replaced; it is as before then.
    pub fn remove(&self) -> Result<Vec<PathBuf>, Error> {
        let mut replaced = Vec::new();
        for service in Service::ALL {
            for family in Family::ALL {
                replaced.extend(self.update(service, family, file::without)?);
            }
        }
        Ok(replaced)
    }

    /// Replaces a file if its content changes; an empty one is removed if it was not there before bridge came.
    fn update(
        &self,
        service: Service,
        family: Family,
        change: impl FnOnce(&str) -> String,
    ) -> Result<Option<PathBuf>, Error> {
        let path = self.root.join(service.file(family));
        let failed = |source| Error::Save { path: path.clone(), source };
        let old = match read_regular_text(&path, MAX_CONFIGURATION) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let new = change(old.as_deref().unwrap_or(file::NEW));
        match old {
            None if new == file::NEW => return Ok(None),
            Some(old) if old == new => return Ok(None),
            Some(_) if new == file::NEW => std::fs::remove_file(&path).map_err(failed)?,
            _ => replace(&path, &new).map_err(failed)?,
        }
        Ok(Some(path))
    }
}

/// Replaces a file in one step; a link is followed.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let like = std::fs::metadata(&path).ok();
    let ownership = like.as_ref().map_or(Ownership::Private, Ownership::Like);
    files::replace_with(&path, ownership, |file| {
        file.write_all(text.as_bytes())?;
        crate::fault::point("save:written");
        Ok(())
    })
}

#[cfg(test)]
mod tests;
