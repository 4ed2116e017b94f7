//! A thread of the cluster's own: a credential plugin, which the client runs and waits for, keeps nothing else waiting.

use std::{
    collections::HashMap,
    convert::Infallible,
    fs, io, thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitOptions, kill_process};
use tokio::sync::oneshot;

/// Name of the thread, and of the threads of its runtime. At most 15 characters (proc(5)).
const NAME: &str = "cluster";
/// A plugin that takes longer is killed.
pub(super) const PLUGIN_DEADLINE: Duration = Duration::from_secs(10);
/// A process that forks while it is stopped is found in this number of passes.
const PASSES: usize = 100;
/// Pause between two looks at the plugins.
const LOOK: Duration = Duration::from_millis(250);

/// Runs until it is dropped.
#[derive(Debug)]
pub(super) struct ClusterThread {
    stop: Option<oneshot::Sender<Infallible>>,
}

impl ClusterThread {
    /// Polls `work` in a thread of its own, until it ends or this is dropped. Child processes of the thread have `deadline`.
    pub(super) fn start(work: impl Future + Send + 'static, deadline: Duration) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().thread_name(NAME).enable_all().build()?;
        let (stop, mut stopped) = oneshot::channel::<Infallible>();
        let (end, ended) = std::sync::mpsc::channel::<Infallible>();
        thread::Builder::new().name(NAME.to_owned()).spawn(move || {
            // Dropped at the end of this thread: the other one ends then.
            let _end = end;
            runtime.block_on(async {
                tokio::select! {
                    _ = &mut stopped => {}
                    _ = work => {}
                }
            });
            runtime.shutdown_background();
        })?;
        thread::Builder::new().name("cluster-plugins".to_owned()).spawn(move || {
            let mut seen = HashMap::new();
            while matches!(ended.recv_timeout(LOOK), Err(std::sync::mpsc::RecvTimeoutError::Timeout)) {
                end_overdue(&mut seen, deadline);
            }
        })?;
        Ok(Self { stop: Some(stop) })
    }
}

impl Drop for ClusterThread {
    fn drop(&mut self) {
        // Does not wait for the thread: a plugin may keep it for as long as the deadline.
        drop(self.stop.take());
    }
}

/// Kills the children of the cluster's threads that are older than `deadline`, with all their descendants: one of these could
/// keep the pipe open that the client reads.
fn end_overdue(seen: &mut HashMap<u32, Instant>, deadline: Duration) {
    let children = plugins();
    seen.retain(|pid, _| children.contains(pid));
    for pid in children {
        let since = *seen.entry(pid).or_insert_with(Instant::now);
        if since.elapsed() >= deadline {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let command = command.trim_end();
            tracing::warn!(
                pid,
                command,
                ?deadline,
                "the agent kills a credential plugin that does not answer"
            );
            kill_family(pid);
        }
    }
}

/// Kills a process with all its descendants.
pub(super) fn kill_family(pid: u32) {
    family(pid).into_iter().for_each(kill);
}

fn kill(pid: u32) {
    if let Some(pid) = pid.try_into().ok().and_then(Pid::from_raw) {
        // It may have ended meanwhile.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// The children of the threads of that name.
fn plugins() -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let of_cluster = tasks.filter(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == NAME)
    });
    of_cluster.flat_map(|task| numbers(&task.path().join("children"))).collect()
}

/// Kills the children of this process with all their descendants.
pub(super) fn kill_children() {
    for _ in 0..PASSES {
        let children = children(std::process::id());
        if children.is_empty() {
            return;
        }
        children.into_iter().for_each(kill_family);
        // Those that have ended are children until they are waited for.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
}

/// A process and all its descendants. Each is stopped before its children are listed, so that it starts no more of them; a
/// stop may take effect a little later, in a process that is just starting another one.
fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    for _ in 0..PASSES {
        let (before, mut next, mut stopped) = (family.len(), 0, true);
        while let Some(pid) = family.get(next).copied() {
            if let Some(pid) = pid.try_into().ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::STOP);
            }
            stopped &= is_stopped(pid);
            let more = children(pid).into_iter().filter(|pid| !family.contains(pid));
            family.extend(more.collect::<Vec<_>>());
            next += 1;
        }
        if stopped && family.len() == before {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    family
}

/// Whether a process runs no code: it is stopped, or has ended.
fn is_stopped(pid: u32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the state may have any characters.
    let state = text.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_none_or(|state| state.starts_with(['T', 't', 'Z', 'X']))
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.flat_map(|task| numbers(&task.path().join("children"))).collect()
}

fn numbers(file: &std::path::Path) -> Vec<u32> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc};

    use super::*;

    /// Longer than this test waits for anything.
    const PLUGIN: &str = "sleep 300 & sleep 300";

    #[test]
    fn a_plugin_that_hangs_is_killed_with_its_children() {
        let (send, receive) = mpsc::channel();
        let work = async move {
            let output = Command::new("sh").args(["-c", PLUGIN]).output();
            send.send(output.map(|output| output.status.success())).unwrap();
        };
        let start = Instant::now();
        let _thread = ClusterThread::start(work, Duration::from_millis(300)).unwrap();
        let answered = receive.recv_timeout(Duration::from_secs(20)).expect("the plugin is killed");
        assert!(!answered.unwrap());
        assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    }

    #[test]
    fn a_plugin_keeps_neither_the_caller_nor_the_end_of_the_thread_waiting() {
        let start = Instant::now();
        let work = async { drop(Command::new("sleep").arg("300").output()) };
        let thread = ClusterThread::start(work, Duration::from_secs(5)).unwrap();
        drop(thread);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        let deadline = Instant::now() + Duration::from_secs(20);
        thread::sleep(LOOK);
        while !plugins().is_empty() {
            assert!(Instant::now() < deadline, "the plugin outlives its deadline");
            thread::sleep(LOOK);
        }
    }
}
