//! Descriptors of what is pinned. Somebody who removes pins, or unmounts the BPF file system, takes nothing away from an
//! agent that runs: a link lives as long as there is a descriptor of it, and is pinned again.

use crate::kernel::bpf;
use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    error::{Error, Result},
    pins,
};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    objects: BTreeMap<PathBuf, OwnedFd>,
    directories: BTreeSet<PathBuf>,
}

impl Kept {
    /// Keeps everything that is below a directory, and the directory.
    pub(crate) fn keep_all(&mut self, directory: &Path) -> Result<()> {
        self.keep_directory(directory);
        for path in pins::entries(directory)? {
            if path.is_dir() {
                self.keep_all(&path)?;
            } else {
                self.keep_pinned(path)?;
            }
        }
        Ok(())
    }

    /// Keeps what is pinned at `path` now.
    pub(crate) fn keep_pinned(&mut self, path: PathBuf) -> Result<()> {
        let object = bpf::obj_get(&path).map_err(Error::path("opening", &path))?;
        self.keep(path, object);
        Ok(())
    }

    pub(crate) fn keep_directory(&mut self, path: &Path) {
        self.directories.insert(path.to_owned());
    }

    /// Keeps what is pinned at `path`, or is to be, in the place of what was there.
    pub(crate) fn keep(&mut self, path: PathBuf, object: OwnedFd) {
        self.objects.insert(path, object);
    }

    /// Lets go of what is not to be pinned any more.
    pub(crate) fn forget(&mut self, path: &Path) -> Option<OwnedFd> {
        self.objects.remove(path)
    }

    /// Lets go of a directory, with all that is below.
    pub(crate) fn forget_all(&mut self, directory: &Path) {
        self.objects.retain(|path, _| !path.starts_with(directory));
        self.directories.retain(|path| !path.starts_with(directory));
    }

    /// What is pinned in a directory, or is to be.
    pub(crate) fn within(&self, directory: &Path) -> impl Iterator<Item = (&Path, BorrowedFd<'_>)> {
        self.objects
            .iter()
            .filter(move |(path, _)| path.parent() == Some(directory))
            .map(|(path, object)| (path.as_path(), object.as_fd()))
    }

    /// Pins again what is not there any more. Returns how many those were.
    pub(crate) fn restore(&self) -> (usize, Result<()>) {
        let (mut restored, mut errors) = (0, Vec::new());
        for directory in self.directories.iter().filter(|path| !path.exists()) {
            // The same error comes with whatever is to be in it.
            drop(pins::make_directory(directory));
        }
        for (path, object) in self.objects.iter().filter(|(path, _)| !path.exists()) {
            match bpf::obj_pin(object.as_fd(), path) {
                Ok(()) => restored += 1,
                Err(error) => errors.push(Error::path("pinning", path)(error)),
            }
        }
        // One tells it all.
        errors.truncate(1);
        (restored, Error::collect(errors))
    }
}
