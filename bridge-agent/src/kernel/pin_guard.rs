//! Descriptors of pinned objects. Removing pins, or unmounting the BPF file system, detaches nothing while an agent runs: a
//! link lives as long as its descriptor, and the agent pins it again.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    bpf,
    pins::{self, Error, Result},
};

#[derive(Debug, Default)]
pub(crate) struct PinGuard {
    objects: BTreeMap<PathBuf, OwnedFd>,
    directories: BTreeSet<PathBuf>,
}

impl PinGuard {
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

    /// Keeps the object that is pinned at `path`.
    pub(crate) fn keep_pinned(&mut self, path: PathBuf) -> Result<()> {
        let object = bpf::obj_get(&path).map_err(Error::path("opening", &path))?;
        self.keep(path, object);
        Ok(())
    }

    pub(crate) fn keep_directory(&mut self, path: &Path) {
        self.directories.insert(path.to_owned());
    }

    /// Keeps an object for the pin at `path`, in place of an earlier one.
    pub(crate) fn keep(&mut self, path: PathBuf, object: OwnedFd) {
        self.objects.insert(path, object);
    }

    /// Releases an object that is to be pinned no more.
    pub(crate) fn release(&mut self, path: &Path) -> Option<OwnedFd> {
        self.objects.remove(path)
    }

    /// Releases a directory with everything below it.
    pub(crate) fn release_all(&mut self, directory: &Path) {
        self.objects.retain(|path, _| !path.starts_with(directory));
        self.directories.retain(|path| !path.starts_with(directory));
    }

    /// Iterates over the objects of a directory.
    pub(crate) fn within(&self, directory: &Path) -> impl Iterator<Item = (&Path, BorrowedFd<'_>)> {
        self.objects
            .iter()
            .filter(move |(path, _)| path.parent() == Some(directory))
            .map(|(path, object)| (path.as_path(), object.as_fd()))
    }

    /// Restores missing pins. Returns how many.
    pub(crate) fn restore(&self) -> (usize, Result<()>) {
        let (mut restored, mut result) = (0, Ok(()));
        for directory in self.directories.iter().filter(|path| !path.exists()) {
            // Pinning into it reports the same error.
            drop(pins::make_directory(directory));
        }
        for (path, object) in self.objects.iter().filter(|(path, _)| !path.exists()) {
            match bpf::obj_pin(object.as_fd(), path) {
                Ok(()) => restored += 1,
                // One is enough: they are alike.
                Err(error) if result.is_ok() => result = Err(Error::path("pinning", path)(error)),
                Err(_) => {}
            }
        }
        (restored, result)
    }
}
