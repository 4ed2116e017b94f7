//! Pods that take part in the transparent pool because they say so, by an annotation.
//!
//! The cluster names the pods; the names of control groups, which kubelet makes before a container of the pod starts,
//! lead to their processes. A hook on the pod's group covers everything below it, also later groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask, Watches};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{attach, backend::Backend, hooks::Hooked, owner, service::Service, tables::lock};

/// The annotation of a pod.
pub const ANNOTATION: &str = "bridge.lan/port-pool";
/// Its value: connections of the pod to destinations of the pool leave from ports of the pool, without its knowing.
pub const TRANSPARENT: &str = "transparent";
/// A static pod's control group has the value of this annotation as its UID.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// UIDs of this node's pods that take part, as in the names of their control groups; `None`: the cluster has not spoken yet,
/// so those that an earlier agent has hooked stay so.
pub type OptedIn = Option<BTreeSet<String>>;

/// Time to wait after a failure, and between two polls where the kernel sends no notification.
const AGAIN: Duration = Duration::from_secs(1);
/// How deep pods are: kubelet's own root, kubepods, quality of service, pod.
const DEEPEST: usize = 5;

/// The UID by which the control group of a pod is named, if the pod takes part.
#[must_use]
pub fn opted_in(uid: &str, annotations: &BTreeMap<String, String>) -> Option<String> {
    let uid = annotations.get(CONFIG_HASH).map_or(uid, String::as_str);
    (annotations.get(ANNOTATION).is_some_and(|value| value == TRANSPARENT)).then(|| uid.to_owned())
}

/// Role of a directory of the hierarchy, by its name.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A pod's, with this UID.
    Pod(String),
    /// Pods may be below.
    Branch,
    /// Neither.
    Other,
}

/// By the names that kubelet gives (pkg/kubelet/cm/pod_container_manager_linux.go), with either driver: `kubepods/burstable/pod<uid>`,
/// and `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`; pods of the class Guaranteed
/// are directly below `kubepods`. kubelet may have a root of its own around it, such as `kubelet.slice`.
fn kind(name: &str) -> Kind {
    match owner::pod_of(name) {
        Some(uid) => Kind::Pod(uid),
        None if name.contains("kube") || matches!(name, "burstable" | "besteffort") => Kind::Branch,
        None => Kind::Other,
    }
}

/// Every pod's control group below `root`, by UID. `enter` is called for each directory before it is read.
fn scan(root: &Path, mut enter: impl FnMut(&Path)) -> BTreeMap<String, PathBuf> {
    let mut pods = BTreeMap::new();
    let mut open = vec![(root.to_owned(), 0)];
    while let Some((directory, depth)) = open.pop() {
        enter(&directory);
        // A directory that has vanished meanwhile has no pods.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match kind(&entry.file_name().to_string_lossy()) {
                Kind::Pod(uid) => _ = pods.insert(uid, entry.path()),
                Kind::Branch if depth < DEEPEST => open.push((entry.path(), depth + 1)),
                Kind::Branch | Kind::Other => {}
            }
        }
    }
    pods
}

/// Reports that a directory that may hold pods has changed.
struct Watch {
    stream: EventStream<[u8; 4096]>,
    watches: Watches,
}

impl Watch {
    fn open() -> io::Result<Self> {
        let stream = Inotify::init()?.into_event_stream([0; 4096])?;
        Ok(Self { watches: stream.watches(), stream })
    }

    /// Adding a directory twice has no effect; the kernel forgets a removed one.
    fn add(&mut self, directory: &Path) -> io::Result<()> {
        let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::ONLYDIR;
        match self.watches.add(directory, mask) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Hooks the control groups of pods that take part as they appear, and unhooks those of pods that do no more, for as long as it
/// is polled. `root`: below which they are; `None`: the whole hierarchy.
pub async fn keep(service: Arc<Service>, mut opted: watch::Receiver<OptedIn>, root: Option<PathBuf>) {
    let mut watch = Watch::open().inspect_err(|error| warn!(%error, "control groups are polled every second, since inotify cannot watch them; see fs.inotify.max_user_instances")).ok();
    let mut said = None;
    loop {
        let wanted = opted.borrow_and_update().clone();
        let mut again = false;
        if let Some(wanted) = wanted {
            match look(&service, &wanted, root.as_deref(), watch.as_mut()).await {
                Ok(failures) => {
                    again = !failures.is_empty() || (watch.is_none() && !wanted.is_empty());
                    for failure in &failures {
                        warn!("a pod's connections do not come from the port pool yet: {failure}");
                    }
                    said = None;
                }
                Err(error) => {
                    again = true;
                    let error = error.to_string();
                    if !wanted.is_empty() && said.as_ref() != Some(&error) {
                        warn!("pods cannot take part in the port pool: {error}");
                        said = Some(error);
                    }
                }
            }
        }
        tokio::select! {
            changed = opted.changed() => if changed.is_err() {
                // The sender is dropped: the last message holds.
                return;
            },
            () = event(watch.as_mut()) => {}
            () = tokio::time::sleep(AGAIN), if again => {}
        }
    }
}

/// Waits for a change of a directory that is watched. May be cancelled.
async fn event(watch: Option<&mut Watch>) {
    match watch {
        // An overflow is an event like any other: everything is looked at again.
        Some(watch) => _ = watch.stream.next().await,
        None => std::future::pending().await,
    }
}

/// Updates the hooks to the wanted pods; returns those that could not be hooked, with the reason.
async fn look(
    service: &Arc<Service>,
    wanted: &BTreeSet<String>,
    root: Option<&Path>,
    mut watch: Option<&mut Watch>,
) -> Result<Vec<String>, attach::CgroupError> {
    let mount = attach::mount_point()?;
    let mut failures = Vec::new();
    let mut groups = BTreeMap::new();
    if !wanted.is_empty() {
        groups = scan(root.unwrap_or(&mount), |directory| {
            let added = watch.as_mut().map_or(Ok(()), |watch| watch.add(directory));
            failures.extend(added.err().map(|error| format!("{}: {error}", directory.display())));
        });
        groups.retain(|uid, _| wanted.contains(uid));
    }
    let waiting = wanted.len() - groups.len();
    let service = Arc::clone(service);
    let hooked = tokio::task::spawn_blocking(move || {
        let Backend::Kernel(pool) = service.backend() else { return Hooked::default() };
        let hooked = lock(pool).set_pods(&groups);
        service.set_pods(hooked.hooked, waiting);
        hooked
    });
    match hooked.await {
        Ok(Hooked { added, removed, hooked, failures: more }) => {
            failures.extend(more);
            if added + removed > 0 {
                info!(added, removed, hooked, waiting, "pods that take part in the port pool");
            } else {
                debug!(hooked, waiting, "pods that take part in the port pool");
            }
        }
        Err(error) => failures.push(error.to_string()),
    }
    Ok(failures)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "1f0c3e9a-7a2b-4c5d-8e9f-0a1b2c3d4e5f";

    #[test]
    fn pods_of_both_drivers_and_every_class_are_found() {
        let root = tempfile::tempdir().unwrap();
        let uid = |n: usize| UID.replace("1f0c", &format!("1f0{n}"));
        let low = |n| uid(n).replace('-', "_");
        let hash = "0123456789abcdef0123456789abcdef";
        let paths = [
            format!("kubepods/pod{}", uid(0)),
            format!("kubepods/burstable/pod{}", uid(1)),
            format!("kubepods/besteffort/pod{}", uid(2)),
            format!("kubepods.slice/kubepods-pod{}.slice", low(3)),
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice", low(4)),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{}.slice",
                low(5)
            ),
            format!("kubelet/kubepods/besteffort/pod{}", uid(6)),
            format!("kubepods/burstable/pod{hash}"),
        ];
        for path in &paths {
            // A container; a pod's group is not entered.
            fs::create_dir_all(root.path().join(path).join("cri-containerd-0123.scope")).unwrap();
        }
        for other in ["system.slice/x.service", "user.slice/kubepods", "kubepods/burstable/podman-1"] {
            fs::create_dir_all(root.path().join(other)).unwrap();
        }
        fs::write(root.path().join("kubepods/cgroup.procs"), "").unwrap();
        let mut entered = BTreeSet::new();
        let found = scan(root.path(), |path| _ = entered.insert(path.to_owned()));
        let expected = paths
            .iter()
            .enumerate()
            .map(|(n, path)| (if n == 7 { hash.to_owned() } else { uid(n) }, root.path().join(path)));
        assert_eq!(found, expected.collect());
        assert!(!entered.iter().any(|path| path.to_string_lossy().contains("/pod")), "{entered:?}");
        assert!(!entered.contains(&root.path().join("user.slice")));
    }

    #[test]
    fn only_the_right_value_of_the_annotation_takes_part() {
        let with = |pairs: &[(&str, &str)]| {
            let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            opted_in(UID, &map)
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[(ANNOTATION, "off")]), None);
        assert_eq!(with(&[(ANNOTATION, TRANSPARENT)]).as_deref(), Some(UID));
        // kubelet names the group of a static pod by the hash of its manifest.
        assert_eq!(with(&[(ANNOTATION, TRANSPARENT), (CONFIG_HASH, "ab")]).as_deref(), Some("ab"));
        assert_eq!(with(&[(CONFIG_HASH, "ab")]), None);
    }
}
