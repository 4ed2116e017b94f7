//! Follows the content of a file that others edit: written in place, replaced by a rename as editors do, or behind a
//! symbolic link that is exchanged, as Kubernetes does with mounted ConfigMaps.
//!
//! Half a file is never read: content counts once its writer has closed the file, once it was moved to its name, or once
//! a link points to it. An empty file has no content: a writer truncates it first.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use sha2::{Digest, Sha256};

/// SHA-256 of a file.
pub(crate) type Hash = [u8; 32];

/// Links that are followed, as the kernel limits it (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// Reports each new content of a file.
pub(crate) struct FileWatch {
    path: PathBuf,
    stream: EventStream<[u8; 4096]>,
    /// The names, in each watched directory, of the file and of the links that lead to it.
    names: HashMap<WatchDescriptor, HashSet<OsString>>,
    last: Option<Hash>,
    /// Another program has the file open for writing.
    is_open: bool,
}

impl FileWatch {
    /// Starts watching, inside a tokio runtime. Open it before the file is read: then no change is missed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let stream = Inotify::init()?.into_event_stream([0; 4096])?;
        let last = hash(&path);
        let mut watch = Self { path, stream, names: HashMap::new(), last, is_open: false };
        let directory = watch.path.parent().unwrap_or(Path::new("/")).to_owned();
        watch.add(&directory)?;
        watch.watch_names();
        Ok(watch)
    }

    /// Marks the present content as known.
    pub(crate) fn take_note(&mut self) {
        self.last = hash(&self.path);
    }

    /// Marks the content with this hash as known.
    pub(crate) fn expect(&mut self, hash: Hash) {
        self.last = Some(hash);
    }

    /// Waits until the file has another content than the last known one, and returns it. Cancel safe.
    pub(crate) async fn changed(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let event = self.stream.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
            let mut is_complete = self.take(event);
            while is_complete {
                // Links may lead elsewhere now. Watch first: what happens after this is not missed.
                self.watch_names();
                is_complete |= self.take_pending()?;
                if self.is_open {
                    break;
                }
                let Some(content) = self.read() else { break };
                // A writer that began meanwhile has announced itself.
                is_complete = self.take_pending()?;
                if self.is_open || is_complete {
                    continue;
                }
                let new = hash_of(&content);
                if self.last.replace(new) != Some(new) {
                    return Ok(content);
                }
            }
        }
    }

    /// Returns the content, if the file did not change while it was read, and is not empty.
    fn read(&self) -> Option<Vec<u8>> {
        let state = |metadata: Metadata| {
            (metadata.dev(), metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec())
        };
        let before = fs::metadata(&self.path).map(state).ok()?;
        let content = fs::read(&self.path).ok()?;
        let after = fs::metadata(&self.path).map(state).ok()?;
        (before == after && !content.is_empty()).then_some(content)
    }

    fn take_pending(&mut self) -> io::Result<bool> {
        let mut is_complete = false;
        while let Some(event) = self.stream.next().now_or_never() {
            is_complete |= self.take(event.ok_or(io::ErrorKind::UnexpectedEof)??);
        }
        Ok(is_complete)
    }

    /// Takes an event into account, and returns whether the content may be another and complete.
    fn take(&mut self, event: EventOwned) -> bool {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            self.is_open = false;
            return true;
        }
        let Some(name) = event.name else { return false };
        if !self.names.get(&event.wd).is_some_and(|names| names.contains(&name)) {
            return false;
        }
        if event.mask.contains(EventMask::MODIFY) {
            self.is_open = true;
            return false;
        }
        if event.mask.contains(EventMask::CREATE) {
            // A new file is closed later; a symbolic or a hard link causes no other event.
            let is_link =
                |metadata: Metadata| metadata.is_symlink() || metadata.is_dir() || metadata.nlink() > 1;
            let directory = self.directory_of(&event.wd, &name);
            return directory.is_some_and(|path| fs::symlink_metadata(path).is_ok_and(is_link));
        }
        self.is_open = false;
        true
    }

    /// Returns the path of a watched name, as it is found on the way to the file.
    fn directory_of(&mut self, descriptor: &WatchDescriptor, name: &OsStr) -> Option<PathBuf> {
        for (directory, candidate) in steps(&self.path) {
            if candidate == name && self.add(&directory).is_ok_and(|found| found == *descriptor) {
                return Some(directory.join(candidate));
            }
        }
        None
    }

    fn add(&mut self, directory: &Path) -> io::Result<WatchDescriptor> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::EXCL_UNLINK
            | WatchMask::ONLYDIR;
        self.stream.watches().add(directory, mask)
    }

    /// Watches the directory of the file and those of the links that lead to it. The file itself may be replaced any time.
    fn watch_names(&mut self) {
        let mut names: HashMap<_, HashSet<_>> = HashMap::new();
        for (directory, name) in steps(&self.path) {
            match self.add(&directory) {
                Ok(descriptor) => _ = names.entry(descriptor).or_default().insert(name),
                Err(error) => {
                    tracing::debug!(%error, directory = %directory.display(), "cannot watch a directory");
                }
            }
        }
        if names.is_empty() {
            return;
        }
        let mut watches = self.stream.watches();
        for (descriptor, _) in std::mem::replace(&mut self.names, names) {
            if !self.names.contains_key(&descriptor) {
                // Fails for a directory that was removed.
                drop(watches.remove(descriptor));
            }
        }
    }
}

/// Returns every symbolic link on the way to a file, and the file itself, as directory and name.
fn steps(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut ahead: VecDeque<OsString> = components(path).collect();
    let mut directory = PathBuf::from("/");
    let mut steps = Vec::new();
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        if name == ".." {
            directory.pop();
            continue;
        }
        let here = directory.join(&name);
        match fs::read_link(&here) {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                steps.push((directory.clone(), name));
                if target.is_absolute() {
                    directory = PathBuf::from("/");
                }
                for name in components(&target).collect::<Vec<_>>().into_iter().rev() {
                    ahead.push_front(name);
                }
            }
            _ if ahead.is_empty() => steps.push((directory.clone(), name)),
            _ => directory = here,
        }
    }
    steps
}

fn components(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    })
}

/// Returns the hash of a file; `None` if it is empty or cannot be read.
pub(crate) fn hash(path: &Path) -> Option<Hash> {
    let content = fs::read(path).ok()?;
    (!content.is_empty()).then(|| hash_of(&content))
}

pub(crate) fn hash_of(content: &[u8]) -> Hash {
    Sha256::digest(content).into()
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::unix::fs::symlink, time::Duration};

    use super::*;

    /// Returns the next content within five seconds.
    async fn next(watch: &mut FileWatch) -> String {
        let content = tokio::time::timeout(Duration::from_secs(5), watch.changed()).await;
        String::from_utf8(content.expect("a change is noticed").unwrap()).unwrap()
    }

    async fn is_quiet(watch: &mut FileWatch) -> bool {
        tokio::time::timeout(Duration::from_millis(100), watch.changed()).await.is_err()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_way_to_change_a_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bridge.yaml");
        fs::write(&file, "1").unwrap();
        let mut watch = FileWatch::open(&file).unwrap();
        fs::write(&file, "2").unwrap();
        assert_eq!(next(&mut watch).await, "2", "written in place");
        let new = directory.path().join("new");
        fs::write(&new, "3").unwrap();
        fs::rename(&new, &file).unwrap();
        assert_eq!(next(&mut watch).await, "3", "renamed over");
        fs::rename(&file, directory.path().join("bridge.yaml~")).unwrap();
        fs::write(&file, "4").unwrap();
        assert_eq!(next(&mut watch).await, "4", "moved away and created");
        fs::write(&new, "5").unwrap();
        fs::remove_file(&file).unwrap();
        fs::hard_link(&new, &file).unwrap();
        assert_eq!(next(&mut watch).await, "5", "hard link");
        fs::remove_file(&file).unwrap();
        fs::write(&new, "6").unwrap();
        symlink("new", &file).unwrap();
        assert_eq!(next(&mut watch).await, "6", "symbolic link");
        fs::write(&new, "7").unwrap();
        assert_eq!(next(&mut watch).await, "7", "written behind the link");
        // The same content is no change, and neither is another file.
        fs::write(&file, "7").unwrap();
        fs::write(directory.path().join("other"), "x").unwrap();
        assert!(is_quiet(&mut watch).await, "nothing has changed");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn half_a_file_is_never_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bridge.yaml");
        fs::write(&path, "whole").unwrap();
        let mut watch = FileWatch::open(&path).unwrap();
        let mut file = File::create(&path).unwrap();
        assert!(is_quiet(&mut watch).await, "truncated");
        file.write_all(b"ha").unwrap();
        file.sync_all().unwrap();
        // An event in its directory that concerns another file changes nothing.
        fs::write(directory.path().join("other"), "x").unwrap();
        assert!(is_quiet(&mut watch).await, "half written");
        file.write_all(b"lf").unwrap();
        drop(file);
        assert_eq!(next(&mut watch).await, "half");
        // Removed and created: CREATE comes first.
        fs::remove_file(&path).unwrap();
        let mut file = File::create(&path).unwrap();
        file.write_all(b"ne").unwrap();
        assert!(is_quiet(&mut watch).await, "created and half written");
        file.write_all(b"w").unwrap();
        drop(file);
        assert_eq!(next(&mut watch).await, "new");
        // The last word counts, also after quick writes.
        for number in 0..200 {
            fs::write(&path, format!("{number:04}").repeat(10_000)).unwrap();
        }
        loop {
            let content = next(&mut watch).await;
            assert_eq!(content.len(), 40_000);
            assert_eq!(content[..4].repeat(10_000), content);
            if content.starts_with("0199") {
                break;
            }
        }
    }

    #[test]
    fn a_writer_in_another_thread_is_never_read_half() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bridge.yaml");
        let chunk = |number: usize| format!("{number:04}").repeat(1_000);
        fs::write(&path, chunk(0)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let mut watch = FileWatch::open(&path).unwrap();
        let last = 500;
        let writer = std::thread::spawn({
            let path = path.clone();
            move || {
                for number in 1..=last {
                    let mut file = File::create(&path).unwrap();
                    for part in chunk(number).as_bytes().chunks(500) {
                        file.write_all(part).unwrap();
                    }
                }
            }
        });
        runtime.block_on(async {
            loop {
                let content = next(&mut watch).await;
                assert_eq!(content.len(), 4_000);
                if content == chunk(last) {
                    break;
                }
            }
        });
        writer.join().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_link_that_is_exchanged_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        for version in ["..1", "..2", "..3"] {
            fs::create_dir(directory.path().join(version)).unwrap();
            fs::write(directory.path().join(version).join("bridge.yaml"), version).unwrap();
        }
        symlink("..1", directory.path().join("..data")).unwrap();
        let file = directory.path().join("bridge.yaml");
        symlink("..data/bridge.yaml", &file).unwrap();
        let mut watch = FileWatch::open(&file).unwrap();
        for version in ["..2", "..3"] {
            symlink(version, directory.path().join("..new")).unwrap();
            fs::rename(directory.path().join("..new"), directory.path().join("..data")).unwrap();
            assert_eq!(next(&mut watch).await, version);
        }
        fs::write(directory.path().join("..3/bridge.yaml"), "in place").unwrap();
        assert_eq!(next(&mut watch).await, "in place");
    }
}
