//! Where maps and links live on when no agent runs.
//!
//! ```text
//! <root>/v<ABI_VERSION>/<map>                      one pin per map
//! <root>/v<ABI_VERSION>/policy/<slot>/<table>      the tables of each policy
//! <root>/v<ABI_VERSION>/links/<interface>-<hook>   the attached link (TCX)
//! <root>/v<ABI_VERSION>/shields/<ifindex>          the link of the shield (XDP)
//! <root>/v<ABI_VERSION>/filters/<ifindex>-<interface>-<hook>   the attached filter (clsact), as a pinned program
//! <root>/v<ABI_VERSION>/qdiscs/<ifindex>-<interface>           directory: this clsact qdisc is bridge's
//! ```
//! A BPF file system takes no dots (`bpf_lookup`, kernel/bpf/inode.c); interface names never hold colons
//! (`dev_valid_name`, net/core/dev.c): so a dot of an interface name becomes a colon.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::programs::SchedClassifier;
use bridge_common::ABI_VERSION;

use super::error::{Error, Result};
use crate::kernel::{
    bpf,
    pins::{Lock, PinRoot, entries, make_directory, remove},
};
use crate::model::Hook;

/// Where pins are by default.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf/bridge";

/// The directories that pins are in.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PinRoot,
    directory: PathBuf,
}

/// The name of a pinned attachment, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attached {
    pub(super) path: PathBuf,
    pub(super) interface: String,
    pub(super) hook: Hook,
    /// Only clsact filters have it in their name; a link knows it.
    pub(super) index: Option<u32>,
}

impl Pins {
    /// Pins under `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root = PinRoot::new(root);
        let directory = root.path().join(format!("v{ABI_VERSION}"));
        Self { root, directory }
    }

    /// The directory above those of all versions.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Makes the root, if it is missing, and refuses any file system but BPF.
    ///
    /// # Errors
    ///
    /// Those of [`PinRoot::prepare`].
    pub fn prepare_root(&self) -> Result<()> {
        Ok(self.root.prepare()?)
    }

    /// Keeps every other agent away from these pins until the lock is dropped.
    ///
    /// # Errors
    ///
    /// Those of [`PinRoot::lock`].
    pub fn lock(&self) -> Result<Lock> {
        Ok(self.root.lock()?)
    }

    /// Moves a lock to the present root.
    ///
    /// # Errors
    ///
    /// Those of [`Lock::renew`].
    pub(super) fn renew(&self, lock: &mut Lock) -> Result<()> {
        Ok(lock.renew(&self.root)?)
    }

    /// The agent that holds the lock, if one does and is in a PID namespace that we see.
    #[must_use]
    pub fn holder(&self) -> Option<u32> {
        self.root.holder()
    }

    /// The directory of this version of the ABI.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether anything is pinned.
    #[must_use]
    pub fn exist(&self) -> bool {
        self.map("control").exists()
    }

    /// Whether anything is pinned, by whichever version of bridge.
    #[must_use]
    pub fn exist_of_any_version(&self) -> bool {
        self.versions().is_ok_and(|versions| versions.iter().any(Self::exist))
    }

    /// Pin of a map.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Pin of a table of a policy.
    #[must_use]
    pub fn table(&self, slot: u32, table: &str) -> PathBuf {
        self.directory.join(format!("policy/{slot}/{table}"))
    }

    pub(super) fn links(&self) -> PathBuf {
        self.directory.join("links")
    }

    pub(super) fn shields(&self) -> PathBuf {
        self.directory.join("shields")
    }

    pub(super) fn shield(&self, index: u32) -> PathBuf {
        self.shields().join(index.to_string())
    }

    pub(super) fn filters(&self) -> PathBuf {
        self.directory.join("filters")
    }

    pub(super) fn qdiscs(&self) -> PathBuf {
        self.directory.join("qdiscs")
    }

    pub(super) fn link(&self, interface: &str, hook: Hook) -> PathBuf {
        self.links().join(format!("{}-{}", encode(interface), hook.name()))
    }

    pub(super) fn filter(&self, index: u32, interface: &str, hook: Hook) -> PathBuf {
        self.filters().join(format!("{index}-{}-{}", encode(interface), hook.name()))
    }

    pub(super) fn qdisc(&self, index: u32, interface: &str) -> PathBuf {
        self.qdiscs().join(format!("{index}-{}", encode(interface)))
    }

    /// Makes the directories of this version.
    pub(super) fn prepare_directories(&self) -> Result<()> {
        make_directory(&self.directory)?;
        for below in ["links", "shields", "filters", "qdiscs", "policy"] {
            make_directory(&self.directory.join(below))?;
        }
        (0..bridge_common::filter::control::SLOTS)
            .try_for_each(|slot| make_directory(&self.directory.join(format!("policy/{slot}"))))?;
        Ok(())
    }

    /// The pinned links of TCX.
    pub(super) fn attached_links(&self) -> Result<Vec<Attached>> {
        Ok(entries(&self.links())?.into_iter().filter_map(attached_link).collect())
    }

    /// The pinned programs that stand for clsact filters.
    pub(super) fn attached_filters(&self) -> Result<Vec<Attached>> {
        Ok(entries(&self.filters())?.into_iter().filter_map(|path| parse(path, true)).collect())
    }

    /// The clsact qdiscs that bridge has made: index and name of their interface.
    pub(super) fn made_qdiscs(&self) -> Result<Vec<(PathBuf, u32, String)>> {
        Ok(entries(&self.qdiscs())?
            .into_iter()
            .filter_map(|path| {
                let (index, interface) = path.file_name()?.to_str()?.split_once('-')?;
                let (index, interface) = (index.parse().ok()?, decode(interface));
                Some((path, index, interface))
            })
            .collect())
    }

    /// The directories of every version of the ABI that there are.
    pub(super) fn versions(&self) -> Result<Vec<Self>> {
        let is_version = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok())
        };
        Ok(entries(self.root.path())?
            .into_iter()
            .filter(|path| is_version(path))
            .map(|directory| Self { root: self.root.clone(), directory })
            .collect())
    }
}

fn encode(interface: &str) -> String {
    interface.replace('.', ":")
}

fn decode(name: &str) -> String {
    name.replace(':', ".")
}

/// The link that is pinned at `path`, by its name.
pub(super) fn attached_link(path: PathBuf) -> Option<Attached> {
    parse(path, false)
}

fn parse(path: PathBuf, with_index: bool) -> Option<Attached> {
    let name = path.file_name()?.to_str()?;
    let (interface, hook) = name.rsplit_once('-')?;
    let hook = Hook::from_name(hook)?;
    let (index, interface) = if with_index {
        let (index, interface) = interface.split_once('-')?;
        (Some(index.parse().ok()?), interface)
    } else {
        (None, interface)
    };
    let interface = decode(interface);
    Some(Attached { path, interface, hook, index })
}

/// Returns the id of the program that is pinned at `path`.
pub(super) fn pinned_program(path: &Path) -> Option<u32> {
    Some(SchedClassifier::from_pin(path).ok()?.info().ok()?.id())
}

/// Detaches a pinned link, if its interface still exists, and removes the pin. `kept`: a descriptor of the link.
pub(super) fn detach(path: &Path, kept: Option<OwnedFd>) -> Result<()> {
    match kept.map_or_else(|| bpf::obj_get(path), Ok).and_then(|link| bpf::link_detach(link.as_fd())) {
        // ENOLINK: nothing left to detach from; EOPNOTSUPP: removing the pin will do.
        Err(error)
            if !matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT | libc::EOPNOTSUPP)) =>
        {
            Err(Error::path("detaching", path)(error))
        }
        _ => Ok(remove(path)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_attachments_come_back() {
        let pins = Pins::new("/x");
        for interface in ["eth0", "eth0.100", "br-lan", "cali0-1.2", "1-2"] {
            for hook in Hook::ALL {
                let link = parse(pins.link(interface, hook), false).unwrap();
                assert_eq!((link.interface.as_str(), link.hook, link.index), (interface, hook, None));
                let filter = parse(pins.filter(7, interface, hook), true).unwrap();
                assert_eq!(
                    (filter.interface.as_str(), filter.hook, filter.index),
                    (interface, hook, Some(7))
                );
                assert!(!link.path.file_name().unwrap().to_str().unwrap().contains('.'));
            }
        }
    }
}
