//! Tells when a file has other content, however it got it: written in place, replaced by a rename as editors do, or
//! behind a symbolic link that points elsewhere now, as Kubernetes does with mounted ConfigMaps.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use sha2::{Digest, Sha256};

/// SHA-256 of a file.
pub(super) type Hash = [u8; 32];

/// See the module.
pub(super) struct FileWatch {
    path: PathBuf,
    stream: EventStream<[u8; 4096]>,
    watched: BTreeSet<PathBuf>,
    last: Option<Hash>,
}

impl FileWatch {
    /// Watches from now on, inside a tokio runtime. Open it before the file is read: then nothing is missed.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let stream = Inotify::init()?.into_event_stream([0; 4096])?;
        let last = hash(&path);
        let mut watch = Self { path, stream, watched: BTreeSet::new(), last };
        watch.watch_directories()?;
        Ok(watch)
    }

    /// Watches the directories of the name and of what it stands for: the file itself may be gone any moment.
    fn watch_directories(&mut self) -> io::Result<()> {
        let real = self.path.canonicalize().ok();
        for directory in
            [Some(self.path.as_path()), real.as_deref()].into_iter().flatten().filter_map(Path::parent)
        {
            if self.watched.insert(directory.to_owned()) {
                let mask =
                    WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE | WatchMask::DELETE;
                self.stream.watches().add(directory, mask)?;
            }
        }
        Ok(())
    }

    /// The content of now is known, and is no longer a change.
    pub(super) fn take_note(&mut self) {
        self.last = hash(&self.path);
    }

    /// What has this hash is known, and is no longer a change.
    pub(super) fn expect(&mut self, hash: Hash) {
        self.last = Some(hash);
    }

    /// Waits until the file has other content than at the last call, or when it was opened. That it is not there, or
    /// is empty because somebody is about to write it, is no content. May be cancelled.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        loop {
            match self.stream.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            let new = hash(&self.path);
            self.watch_directories()?;
            if new.is_some() && new != self.last {
                self.last = new;
                return Ok(());
            }
        }
    }
}

/// Of what is in the file; `None` if there is nothing.
pub(super) fn hash(path: &Path) -> Option<Hash> {
    let content = std::fs::read(path).ok()?;
    (!content.is_empty()).then(|| hash_of(&content))
}

pub(super) fn hash_of(content: &[u8]) -> Hash {
    Sha256::digest(content).into()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Duration};

    use super::*;

    async fn is_noticed(watch: &mut FileWatch) -> bool {
        tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.is_ok()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_way_to_change_a_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bridge.yaml");
        fs::write(&file, "1").unwrap();
        let mut watch = FileWatch::open(&file).unwrap();
        fs::write(&file, "2").unwrap();
        assert!(is_noticed(&mut watch).await, "written in place");
        let new = directory.path().join("new");
        fs::write(&new, "3").unwrap();
        fs::rename(&new, &file).unwrap();
        assert!(is_noticed(&mut watch).await, "renamed over");
        fs::rename(&file, directory.path().join("bridge.yaml~")).unwrap();
        fs::write(&file, "4").unwrap();
        assert!(is_noticed(&mut watch).await, "moved away and written anew");
        // The same content is no change, and neither is another file.
        fs::write(&file, "4").unwrap();
        fs::write(directory.path().join("other"), "x").unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(100), watch.changed()).await;
        assert!(quiet.is_err(), "nothing has changed");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_link_that_points_elsewhere_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        for (version, content) in [("..1", "1"), ("..2", "2")] {
            fs::create_dir(directory.path().join(version)).unwrap();
            fs::write(directory.path().join(version).join("bridge.yaml"), content).unwrap();
        }
        symlink("..1", directory.path().join("..data")).unwrap();
        let file = directory.path().join("bridge.yaml");
        symlink("..data/bridge.yaml", &file).unwrap();
        let mut watch = FileWatch::open(&file).unwrap();
        symlink("..2", directory.path().join("..new")).unwrap();
        fs::rename(directory.path().join("..new"), directory.path().join("..data")).unwrap();
        assert!(is_noticed(&mut watch).await);
    }
}
