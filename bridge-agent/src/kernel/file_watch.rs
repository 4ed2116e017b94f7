//! Follows the content of a file that others edit: written in place, replaced by a rename as editors do, or behind a
//! symbolic link that is exchanged, as Kubernetes does with mounted ConfigMaps.
//!
//! Half a file is never read: content counts once its writer has closed the file, once it was moved to its name, or once
//! a link points to it. An empty file has no content: a writer truncates it first. A FIFO, a device or a directory in its
//! place, and a file that is too large, are reported once as an error, and the file is followed further.
//!
//! A directory that is removed, moved away or cannot be watched is looked for again and again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use sha2::{Digest, Sha256};

use super::files::{self, MAX_CONFIGURATION, is_refusal, read_regular};

/// SHA-256 of a file.
pub(crate) type Hash = [u8; 32];

/// Links that are followed, as the kernel limits it (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// Pause between two attempts to watch.
const AGAIN: Duration = Duration::from_millis(500);

/// Reports each new content of a file.
pub(crate) struct FileWatch {
    path: PathBuf,
    /// `None`: the directory cannot be watched.
    stream: Option<EventStream<[u8; 4096]>>,
    /// Time of the next attempt to watch it.
    again: Instant,
    /// The names, in each watched directory, of the file and of the links that lead to it.
    names: HashMap<WatchDescriptor, HashSet<OsString>>,
    last: Option<Hash>,
    /// The last error, if the file was refused.
    refused: Option<String>,
    /// Another program has the file open for writing.
    is_open: bool,
}

impl FileWatch {
    /// Starts watching, inside a tokio runtime. Open it before the file is read: then no change is missed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut watch = Self::unopened(path)?;
        watch.start()?;
        watch.take_note();
        Ok(watch)
    }

    /// As [`open`](Self::open), but a file that cannot be watched yet is watched later.
    pub(crate) fn follow(path: &Path) -> io::Result<Self> {
        let mut watch = Self::unopened(path)?;
        if let Err(error) = watch.start() {
            watch.lose(&error);
        }
        watch.take_note();
        Ok(watch)
    }

    fn unopened(path: &Path) -> io::Result<Self> {
        let (path, names) = (std::path::absolute(path)?, HashMap::new());
        let again = Instant::now();
        Ok(Self { path, stream: None, again, names, last: None, refused: None, is_open: false })
    }

    /// Begins to watch the directory of the file.
    fn start(&mut self) -> io::Result<()> {
        self.is_open = false;
        self.names.clear();
        self.stream = Some(Inotify::init()?.into_event_stream([0; 4096])?);
        let directory = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        if let Err(error) = self.add(&directory) {
            self.stream = None;
            return Err(error);
        }
        self.watch_names();
        Ok(())
    }

    /// Has the directory watched again later.
    fn lose(&mut self, error: &io::Error) {
        let file = self.path.display();
        tracing::warn!(%error, %file, "cannot watch a file; see fs.inotify.max_user_instances; the agent tries again");
        self.stream = None;
        self.again = Instant::now();
    }

    /// Marks the present content as known.
    pub(crate) fn take_note(&mut self) {
        self.refused = self.refusal().map(|error| error.to_string());
        self.last = hash(&self.path);
    }

    /// Marks the content with this hash as known.
    pub(crate) fn expect(&mut self, hash: Hash) {
        self.last = Some(hash);
    }

    /// Waits until the file has another content than the last known one, and returns it. Cancel safe.
    ///
    /// # Errors
    /// The file is refused: [`is_refusal`]. Call this again: the next content is returned, even if it is the last known one.
    pub(crate) async fn changed(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let mut is_complete = match &mut self.stream {
                Some(stream) => {
                    let event = stream.next().await;
                    self.take_next(event)
                }
                None => {
                    tokio::time::sleep_until(self.again.into()).await;
                    self.again = Instant::now() + AGAIN;
                    let started = self.start().is_ok();
                    if started {
                        tracing::info!(file = %self.path.display(), "the file is watched again");
                    }
                    started
                }
            };
            while is_complete {
                // Links may lead elsewhere now. Watch first: what happens after this is not missed.
                self.watch_names();
                is_complete |= self.take_pending();
                if let Some(error) = self.refuse() {
                    return Err(error);
                }
                if self.is_open {
                    break;
                }
                let Some(content) = self.read() else { break };
                // A writer that began meanwhile has announced itself.
                is_complete = self.take_pending();
                if self.is_open || is_complete {
                    continue;
                }
                let new = hash_of(&content);
                self.refused = None;
                if self.last.replace(new) != Some(new) {
                    return Ok(content);
                }
            }
        }
    }

    /// Returns the error for a file that cannot be read because of its type or size.
    fn refusal(&self) -> Option<io::Error> {
        files::check(&self.path, MAX_CONFIGURATION).err().filter(is_refusal)
    }

    /// Returns [`refusal`](Self::refusal), unless it was the last one. The
    /// file need not be closed: others write to a device all the time.
    fn refuse(&mut self) -> Option<io::Error> {
        let error = self.refusal()?;
        let text = error.to_string();
        self.last = None;
        (self.refused.replace(text.clone()) != Some(text)).then_some(error)
    }

    /// Returns the content, if the file did not change while it was read, and is not empty.
    fn read(&self) -> Option<Vec<u8>> {
        let state = |metadata: Metadata| {
            (metadata.dev(), metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec())
        };
        let before = fs::metadata(&self.path).map(state).ok()?;
        let content = read_regular(&self.path, MAX_CONFIGURATION).ok()?;
        let after = fs::metadata(&self.path).map(state).ok()?;
        (before == after && !content.is_empty()).then_some(content)
    }

    fn take_pending(&mut self) -> bool {
        let mut is_complete = false;
        while let Some(event) = self.stream.as_mut().and_then(|stream| stream.next().now_or_never()) {
            is_complete |= self.take_next(event);
        }
        is_complete
    }

    /// Takes what the kernel has sent, and returns whether the content may be another and complete.
    fn take_next(&mut self, event: Option<io::Result<EventOwned>>) -> bool {
        match event {
            Some(Ok(event)) => self.take(event),
            Some(Err(error)) => {
                self.lose(&error);
                false
            }
            None => {
                self.lose(&io::ErrorKind::UnexpectedEof.into());
                false
            }
        }
    }

    /// Takes an event into account, and returns whether the content may be another and complete.
    fn take(&mut self, event: EventOwned) -> bool {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            self.is_open = false;
            return true;
        }
        let gone = EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF;
        if event.mask.intersects(gone) && self.names.contains_key(&event.wd) {
            let text = "its directory was removed or moved away";
            self.lose(&io::Error::new(io::ErrorKind::NotFound, text));
            return false;
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
            // A new file is closed later; a symbolic or a hard link, a FIFO or a device causes no other event.
            let is_link = |metadata: Metadata| !metadata.is_file() || metadata.nlink() > 1;
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
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::EXCL_UNLINK
            | WatchMask::ONLYDIR;
        let stream = self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        stream.watches().add(directory, mask)
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
        let Some(stream) = self.stream.as_ref().filter(|_| !names.is_empty()) else { return };
        let mut watches = stream.watches();
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
    let content = read_regular(path, MAX_CONFIGURATION).ok()?;
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
    async fn a_fifo_or_a_device_is_reported_once_and_the_next_file_is_noticed() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let (file, new) = (directory.path().join("bridge.yaml"), directory.path().join("new"));
        fs::write(&file, "good").unwrap();
        let mut watch = FileWatch::open(&file).unwrap();
        let fifo = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let zero = |path: &Path| symlink("/dev/zero", path).unwrap();
        let is_large = |path: &Path| File::create(path).unwrap().set_len(MAX_CONFIGURATION + 1).unwrap();
        type Maker<'a> = &'a dyn Fn(&Path);
        let makers: [(Maker<'_>, &str); 3] =
            [(&fifo, "a FIFO"), (&zero, "a device"), (&is_large, "larger than")];
        for (make, text) in makers {
            for moved in [true, false] {
                if moved {
                    make(&new);
                    fs::rename(&new, &file).unwrap();
                } else {
                    fs::remove_file(&file).unwrap();
                    make(&file);
                }
                let refused = tokio::time::timeout(Duration::from_secs(5), watch.changed()).await;
                let error = refused.expect("the file is refused").unwrap_err().to_string();
                assert!(error.contains(text), "{error}");
                fs::remove_file(&file).unwrap();
                make(&file);
                assert!(is_quiet(&mut watch).await, "the same error is not reported again");
                fs::write(&new, "good").unwrap();
                fs::rename(&new, &file).unwrap();
                assert_eq!(next(&mut watch).await, "good", "the file of before, moved in");
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_directory_that_is_replaced_or_comes_later_is_followed() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("etc");
        let file = directory.join("bridge.yaml");
        let mut watch = FileWatch::follow(&file).unwrap();
        assert!(is_quiet(&mut watch).await, "there is no directory");
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "1").unwrap();
        assert_eq!(next(&mut watch).await, "1", "the directory came later");
        fs::remove_dir_all(&directory).unwrap();
        assert!(is_quiet(&mut watch).await, "removed");
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "2").unwrap();
        assert_eq!(next(&mut watch).await, "2", "removed and made again");
        let other = parent.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("bridge.yaml"), "3").unwrap();
        fs::rename(&directory, parent.path().join("old")).unwrap();
        fs::rename(&other, &directory).unwrap();
        assert_eq!(next(&mut watch).await, "3", "another directory took its place");
        fs::write(&file, "4").unwrap();
        assert_eq!(next(&mut watch).await, "4", "it is watched as before");
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
