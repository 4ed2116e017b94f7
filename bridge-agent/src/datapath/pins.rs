//! Where maps and links live on when no agent runs.
//!
//! ```text
//! <root>/v<ABI_VERSION>/<map>                      one pin per map
//! <root>/v<ABI_VERSION>/policy/<slot>/<table>      the tables of each policy
//! <root>/v<ABI_VERSION>/links/<interface>-<hook>   the attached link (TCX)
//! <root>/v<ABI_VERSION>/filters/<ifindex>-<interface>-<hook>   the attached filter (clsact), as a pinned program
//! <root>/v<ABI_VERSION>/qdiscs/<ifindex>-<interface>           directory: this clsact qdisc is bridge's
//! ```
//! A BPF file system takes no dots (`bpf_lookup`, kernel/bpf/inode.c); interface names never hold colons
//! (`dev_valid_name`, net/core/dev.c): so a dot of an interface name becomes a colon.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::programs::SchedClassifier;
use bridge_common::ABI_VERSION;
use rustix::fs::FlockOperation;

use super::{
    error::{Error, Result},
    hook::Hook,
};
use crate::kernel::bpf;

/// Where pins are by default.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf/bridge";

/// The directories that pins are in.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    directory: PathBuf,
}

/// Held by the one agent that works on a pin root.
#[derive(Debug)]
pub struct Lock {
    directory: File,
}

impl Lock {
    /// Moves the lock to the present root of the pins, which is made if it is missing, unless the lock is held on it
    /// already.
    ///
    /// # Errors
    ///
    /// Those of [`Pins::prepare_root`] and [`Pins::lock`]; the lock stays on the former root then.
    pub(crate) fn renew(&mut self, pins: &Pins) -> Result<()> {
        let place = |of: io::Result<fs::Metadata>| of.map(|of| (of.dev(), of.ino())).ok();
        let held = place(self.directory.metadata());
        if held.is_none() || held != place(fs::metadata(&pins.root)) {
            pins.prepare_root()?;
            *self = pins.lock()?;
        }
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough while a child between fork and exec has the descriptor too.
        if let Err(error) = rustix::fs::flock(&self.directory, FlockOperation::Unlock) {
            tracing::warn!(%error, "the lock on the pins cannot be given back");
        }
    }
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
        let root = root.into();
        let directory = root.join(format!("v{ABI_VERSION}"));
        Self { root, directory }
    }

    /// The directory above those of all versions.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
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

    /// Makes the root, if it is missing, and refuses any file system but BPF.
    ///
    /// # Errors
    ///
    /// [`Error::NotBpffs`], [`Error::DotInPath`], [`Error::Path`].
    pub fn prepare_root(&self) -> Result<()> {
        let parent = self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let system = rustix::fs::statfs(parent)
            .map_err(|error| Error::path("looking at the file system of", parent)(error.into()))?;
        if system.f_type != libc::BPF_FS_MAGIC {
            let mount_point =
                if self.root.starts_with("/sys/fs/bpf") { Path::new("/sys/fs/bpf") } else { parent }
                    .to_owned();
            return Err(Error::NotBpffs { path: self.root.clone(), mount_point });
        }
        let below = self.root.strip_prefix(parent).unwrap_or(&self.root);
        if below.to_string_lossy().contains('.') {
            return Err(Error::DotInPath(self.root.clone()));
        }
        make_directory(&self.root)
    }

    /// Makes the directories of this version.
    pub(super) fn prepare_directories(&self) -> Result<()> {
        make_directory(&self.directory)?;
        for below in ["links", "filters", "qdiscs", "policy"] {
            make_directory(&self.directory.join(below))?;
        }
        (0..bridge_common::filter::control::SLOTS)
            .try_for_each(|slot| make_directory(&self.directory.join(format!("policy/{slot}"))))
    }

    /// Keeps every other agent away from these pins until the lock is dropped. The lock is on the directory itself, so
    /// that it ends with its holder, however that ends.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] with the process id of the holder.
    pub fn lock(&self) -> Result<Lock> {
        /// A child between fork and exec has the lock, too, for so long at the most, also of an agent that has been killed.
        const EXEC: Duration = Duration::from_secs(5);
        let end = Instant::now() + EXEC;
        loop {
            let directory = File::open(&self.root).map_err(Error::path("opening", &self.root))?;
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let pid = holder(&directory);
                    if pid.is_some_and(|pid| !is_alive(pid)) && Instant::now() < end {
                        thread::sleep(Duration::from_millis(10));
                        continue;
                    }
                    return Err(Error::Locked { pid, path: self.root.clone() });
                }
                Err(error) => return Err(Error::path("locking", &self.root)(error.into())),
            }
            // The former holder may have removed the directory that we hold now.
            let held = directory.metadata().map_err(Error::path("looking at", &self.root))?.ino();
            match fs::metadata(&self.root) {
                Ok(named) if named.ino() == held => return Ok(Lock { directory }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => make_directory(&self.root)?,
                Err(error) => return Err(Error::path("looking at", &self.root)(error)),
            }
        }
    }

    /// The agent that holds the lock, if one does and is in a PID namespace that we see.
    #[must_use]
    pub fn holder(&self) -> Option<u32> {
        holder(&File::open(&self.root).ok()?)
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
        Ok(entries(&self.root)?
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

/// Returns the entries of a directory, in order of name; none if it is missing.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = match fs::read_dir(directory) {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::path("reading", directory)(error)),
    };
    let mut paths = read
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Error::path("reading", directory))?;
    paths.sort();
    Ok(paths)
}

pub(super) fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::path("making", path))
}

/// Removes a pin; that it is not there is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::path("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a directory of pins with all that is in it, and goes on after errors.
pub(super) fn remove_tree(path: &Path, errors: &mut Vec<Error>) {
    remove_tree_except(path, &|_| false, errors);
}

/// As [`remove_tree`], but keeps the entries of the directory that `stays` selects; then the directory stays, too.
pub(super) fn remove_tree_except(path: &Path, stays: &dyn Fn(&Path) -> bool, errors: &mut Vec<Error>) {
    let mut empty = true;
    match entries(path) {
        Ok(below) => {
            for path in below {
                if stays(&path) {
                    empty = false;
                } else if path.is_dir() {
                    remove_tree(&path, errors);
                } else if let Err(error) = remove(&path) {
                    errors.push(error);
                }
            }
        }
        Err(error) => errors.push(error),
    }
    if !empty {
        return;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            errors.push(Error::path("removing", path)(error))
        }
        _ => {}
    }
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
        _ => remove(path),
    }
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Who has the lock on an open directory, from /proc/locks (proc_pid_locks(5)).
fn holder(directory: &File) -> Option<u32> {
    let metadata = directory.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let file = format!("{:02x}:{:02x}:{inode}", rustix::fs::major(device), rustix::fs::minor(device));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let is_lock = fields.nth(1)? == "FLOCK";
        let pid = fields.nth(2)?.parse().ok()?;
        (is_lock && fields.next()? == file).then_some(pid)
    })
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

    #[test]
    fn a_directory_outside_of_a_bpf_file_system_is_refused_with_the_command_that_mounts_one() {
        let directory = tempfile::tempdir().unwrap();
        let error = Pins::new(directory.path().join("bridge")).prepare_root().unwrap_err();
        assert!(matches!(error, Error::NotBpffs { .. }));
        assert!(
            error.to_string().contains(&format!("mount -t bpf bpf {}", directory.path().display())),
            "{error}"
        );
    }

    #[test]
    fn a_second_lock_is_refused_and_names_the_holder() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::new(directory.path());
        let lock = pins.lock().unwrap();
        let error = pins.lock().unwrap_err();
        assert!(
            matches!(error, Error::Locked { pid: Some(pid), .. } if pid == std::process::id()),
            "{error}"
        );
        drop(lock);
        pins.lock().unwrap();
    }
}
