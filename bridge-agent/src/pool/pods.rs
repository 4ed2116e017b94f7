//! Pods that take part in the transparent pool because they say so, by an annotation.
//!
//! The cluster names the pods; the names of control groups, which kubelet makes before a container of the pod starts,
//! lead to their processes. A hook on the pod's group covers everything below it, also later groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
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
/// Maximum depth of `kubepods`: kubelet may have a root of several levels, below that of a container (kind).
const MAX_DEPTH: usize = 6;
/// How long a pod may be without a control group before the agent reports it: kubelet makes the group when it starts the pod.
const PATIENCE: Duration = Duration::from_secs(30);

/// The UID by which the control group of a pod is named, if the pod takes part.
#[must_use]
pub fn opted_in(uid: &str, annotations: &BTreeMap<String, String>) -> Option<String> {
    let uid = annotations.get(CONFIG_HASH).map_or(uid, String::as_str);
    (annotations.get(ANNOTATION).is_some_and(|value| value == TRANSPARENT)).then(|| uid.to_owned())
}

/// The meaning of a directory of the hierarchy, by its name and place.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A pod's, with this UID.
    Pod(String),
    /// `kubepods`, or a class of quality of service below it: only pods and classes are below.
    Pods,
    /// `kubepods` may be below.
    Branch,
    /// None of these.
    Other,
}

/// Classifies by the names that kubelet gives (pkg/kubelet/cm/pod_container_manager_linux.go), with either driver:
/// `kubepods/burstable/pod<uid>`, and `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`; pods
/// of the class Guaranteed are directly below `kubepods`. The directory above `kubepods` has any name (`cgroupRoot`), so
/// every group is entered that is no unit or session of systemd. `inside`: the parent is a [`Kind::Pods`].
fn kind(name: &str, inside: bool) -> Kind {
    const CLASSES: [&str; 2] = ["burstable", "besteffort"];
    const UNITS: [&str; 6] = [".service", ".scope", ".mount", ".socket", ".swap", ".automount"];
    let slice = name.strip_suffix(".slice");
    let last = slice.map_or(name, |slice| slice.rsplit('-').next().unwrap_or(slice));
    if inside {
        return match owner::pod_of(name) {
            Some(uid) => Kind::Pod(uid),
            None if CLASSES.contains(&last) => Kind::Pods,
            None => Kind::Other,
        };
    }
    if last == "kubepods" {
        return Kind::Pods;
    }
    if name == "user.slice" || UNITS.iter().any(|unit| name.ends_with(unit)) {
        Kind::Other
    } else {
        Kind::Branch
    }
}

/// Every pod's control group below `root`, by UID. `enter` is called for each directory before it is read.
fn scan(root: &Path, mut enter: impl FnMut(&Path)) -> BTreeMap<String, PathBuf> {
    let mut pods = BTreeMap::new();
    let mut open = vec![(root.to_owned(), 1, false)];
    while let Some((directory, depth, inside)) = open.pop() {
        enter(&directory);
        // A directory that was removed in the meantime has no pods.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match kind(&entry.file_name().to_string_lossy(), inside) {
                Kind::Pod(uid) => _ = pods.insert(uid, entry.path()),
                Kind::Pods => open.push((entry.path(), depth + 1, true)),
                Kind::Branch if depth < MAX_DEPTH => open.push((entry.path(), depth + 1, false)),
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
    let mut missing = Missing::default();
    loop {
        let wanted = opted.borrow_and_update().clone();
        let mut again = false;
        if let Some(wanted) = wanted {
            match look(&service, &wanted, root.as_deref(), watch.as_mut()).await {
                Ok(Looked { failures, without_group }) => {
                    for uid in missing.update(without_group, Instant::now()) {
                        warn!(
                            %uid,
                            below = root.as_deref().map(tracing::field::debug),
                            "a pod with the annotation has no control group after {PATIENCE:?}, so its connections do not come from the \
                             port pool; the agent looks for `kubepods` up to {MAX_DEPTH} levels deep"
                        );
                    }
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
            () = tokio::time::sleep(PATIENCE), if missing.is_expecting() => {}
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

/// Pods that take part and have no control group yet.
#[derive(Default)]
struct Missing {
    /// Since when, and whether it was reported, by UID.
    since: BTreeMap<String, (Instant, bool)>,
}

impl Missing {
    /// Replaces the pods, and returns those that have been missing for [`PATIENCE`], each once.
    fn update(&mut self, missing: BTreeSet<String>, now: Instant) -> Vec<String> {
        self.since.retain(|uid, _| missing.contains(uid));
        for uid in missing {
            self.since.entry(uid).or_insert((now, false));
        }
        let overdue = self.since.iter_mut().filter(|(_, (since, said))| !said && now >= *since + PATIENCE);
        overdue
            .map(|(uid, (_, said))| {
                *said = true;
                uid.clone()
            })
            .collect()
    }

    /// Whether a pod is missing that was not reported.
    fn is_expecting(&self) -> bool {
        self.since.values().any(|(_, said)| !said)
    }
}

/// Result of [`look`].
struct Looked {
    /// Groups that could not be hooked, with the reason.
    failures: Vec<String>,
    /// UIDs of pods whose group was not found.
    without_group: BTreeSet<String>,
}

/// Hooks the groups of the wanted pods, and unhooks all others.
async fn look(
    service: &Arc<Service>,
    wanted: &BTreeSet<String>,
    root: Option<&Path>,
    mut watch: Option<&mut Watch>,
) -> Result<Looked, attach::CgroupError> {
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
    let without_group: BTreeSet<String> =
        wanted.iter().filter(|uid| !groups.contains_key(*uid)).cloned().collect();
    let waiting = without_group.len();
    let hooking = Arc::clone(service);
    let hooked = tokio::task::spawn_blocking(move || {
        let service = hooking;
        let Backend::Kernel(pool, _) = service.backend() else { return Hooked::default() };
        let mut pool = lock(pool);
        let mut hooked = pool.set_pods(&groups);
        let others = pool.set_several_pods(hooked.hooked > 1);
        drop(pool);
        hooked.failures.extend(others.err().map(|error| error.to_string()));
        service.set_pods(hooked.hooked, waiting);
        hooked
    });
    match hooked.await {
        Ok(Hooked { added, removed, hooked, failures: more }) => {
            failures.extend(more);
            if removed > 0 {
                // A pod that has ended keeps ports from no one.
                service.sweep_soon();
            }
            if added + removed > 0 {
                info!(added, removed, hooked, waiting, "pods that take part in the port pool");
            } else {
                debug!(hooked, waiting, "pods that take part in the port pool");
            }
        }
        Err(error) => failures.push(error.to_string()),
    }
    Ok(Looked { failures, without_group })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "1f0c3e9a-7a2b-4c5d-8e9f-0a1b2c3d4e5f";

    #[test]
    fn pods_of_both_drivers_and_every_class_are_found() {
        let root = tempfile::tempdir().unwrap();
        let uid = |n: usize| UID.replace("1f0c", &format!("1f0{n:x}"));
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
            // `cgroupRoot: /machines/left`, and kind's node in a container.
            format!("machines/left/kubepods/burstable/pod{}", uid(8)),
            format!(
                "docker/0123abcd/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{}.slice",
                low(9)
            ),
            format!("nodes.slice/nodes-a.slice/nodes-a-kubepods.slice/nodes-a-kubepods-pod{}.slice", low(10)),
        ];
        for path in &paths {
            // A container; a pod's group is not entered.
            fs::create_dir_all(root.path().join(path).join("cri-containerd-0123.scope")).unwrap();
        }
        for other in [
            "system.slice/x.service/kubepods",
            "user.slice/kubepods",
            "kubepods/burstable/podman-1",
            "kubepods/mine",
        ] {
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
        for skipped in
            ["user.slice", "system.slice/x.service", "kubepods/mine", "kubepods/burstable/podman-1"]
        {
            assert!(!entered.contains(&root.path().join(skipped)), "{skipped}");
        }
    }

    #[test]
    fn a_pod_without_a_control_group_is_reported_once_after_a_while() {
        let pods = |uids: &[&str]| uids.iter().map(|uid| (*uid).to_owned()).collect::<BTreeSet<_>>();
        let start = Instant::now();
        let mut missing = Missing::default();
        assert!(missing.update(pods(&["a"]), start).is_empty() && missing.is_expecting());
        assert!(missing.update(pods(&["a", "b"]), start + PATIENCE / 2).is_empty());
        assert_eq!(missing.update(pods(&["a", "b"]), start + PATIENCE), ["a"]);
        assert!(missing.is_expecting(), "b is to come");
        // `b` has got its group, `a` was reported.
        assert!(missing.update(pods(&["a"]), start + PATIENCE * 3).is_empty() && !missing.is_expecting());
        // Gone and back: it may take as long again.
        missing.update(pods(&[]), start + PATIENCE * 3);
        assert!(missing.update(pods(&["a"]), start + PATIENCE * 3).is_empty());
        assert_eq!(missing.update(pods(&["a"]), start + PATIENCE * 4), ["a"]);
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
