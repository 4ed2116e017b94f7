//! A credential plugin of the kubeconfig, whose output is limited.
//!
//! The client collects the output of a plugin without a limit. So it runs this program in its place, which runs the plugin
//! and passes its output on once the plugin has ended. It adopts the plugin's daemons, so that none outlives it.

use std::{
    ffi::OsString,
    io::{self, Read, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use kube::config::Kubeconfig;
use rustix::process::{getpid, getppid, set_child_subreaper};

use super::thread::{kill_children, kill_family};

/// Name of the hidden command.
pub(crate) const COMMAND: &str = "credential-plugin";
/// Exit code for a plugin that was killed for its output.
pub(crate) const TOO_MUCH: u8 = 121;
/// Limit of standard output and standard error together, in bytes.
pub(super) const MAX_OUTPUT: usize = 1024 * 1024;

/// Has every plugin of a kubeconfig run through this program.
pub(super) fn limit_plugins(file: &mut Kubeconfig) {
    for user in file.auth_infos.iter_mut().filter_map(|entry| entry.auth_info.as_mut()) {
        let Some(exec) = &mut user.exec else { continue };
        let Some(command) = exec.command.replace("/proc/self/exe".to_owned()) else {
            exec.command = None;
            continue;
        };
        let own = exec.args.take().unwrap_or_default();
        exec.args = Some([COMMAND.to_owned(), "--".to_owned(), command].into_iter().chain(own).collect());
    }
}

/// Runs a plugin and passes its output on. Returns `None` if it was killed for its output, of which nothing is passed on.
///
/// # Errors
/// The plugin cannot be started, or the output not be passed on.
pub(crate) fn run(command: &[OsString]) -> io::Result<Option<ExitStatus>> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    // A daemon leaves its session, its process group and its parent; it becomes a child of this process then.
    set_child_subreaper(Some(getpid()))?;
    end_with_parent()?;
    let mut plugin = Command::new(program);
    let output = collect(plugin.args(arguments), MAX_OUTPUT);
    kill_children();
    let Some(output) = output? else {
        eprintln!(
            "the credential plugin {} wrote more than {MAX_OUTPUT} bytes, and was killed",
            program.display()
        );
        return Ok(None);
    };
    io::stderr().write_all(&output.stderr)?;
    io::stdout().write_all(&output.stdout)?;
    io::stdout().flush()?;
    Ok(Some(output.status))
}

/// Ends this process and the plugin once the agent has ended.
fn end_with_parent() -> io::Result<()> {
    const LOOK: Duration = Duration::from_millis(250);
    let parent = getppid();
    let watch = move || {
        while getppid() == parent {
            thread::sleep(LOOK);
        }
        kill_children();
        std::process::exit(1);
    };
    thread::Builder::new().name("agent".to_owned()).spawn(watch).map(drop)
}

fn collect(command: &mut Command, limit: usize) -> io::Result<Option<std::process::Output>> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let written = AtomicUsize::new(0);
    let result = gather(&mut child, &written, limit);
    if result.is_err() {
        kill_family(child.id());
    }
    let status = child.wait()?;
    let (stdout, stderr) = result?;
    let is_within = written.load(Ordering::Relaxed) <= limit;
    Ok(is_within.then_some(std::process::Output { status, stdout, stderr }))
}

/// Reads both streams to their ends, and kills the child with its descendants beyond the limit.
fn gather(child: &mut Child, written: &AtomicUsize, limit: usize) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let pid = child.id();
    let read = |from: Option<&mut (dyn Read + Send)>| {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        let Some(from) = from else { return Ok(bytes) };
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(size) => {
                    if written.fetch_add(size, Ordering::Relaxed) + size > limit {
                        kill_family(pid);
                        return Ok(bytes);
                    }
                    bytes.extend_from_slice(&buffer[..size]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    };
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let errors = scope.spawn(|| read(stderr.as_mut().map(|stderr| stderr as _)));
        let output = read(stdout.as_mut().map(|stdout| stdout as _));
        let errors = errors.join().unwrap_or_else(|_| Err(io::Error::other("the reader has panicked")));
        Ok((output?, errors?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> io::Result<Option<std::process::Output>> {
        collect(Command::new("sh").args(["-c", script]), 100_000)
    }

    #[test]
    fn a_plugin_that_writes_without_end_is_killed_with_its_children() {
        for script in [
            "exec yes",
            "yes >&2",
            "yes & yes >&2 & wait",
            "head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2",
        ] {
            assert_eq!(shell(script).unwrap(), None, "{script}");
        }
    }

    #[test]
    fn the_output_and_the_end_of_a_plugin_are_passed_on() {
        let output = shell("echo out; echo err >&2; exit 3").unwrap().unwrap();
        assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.status.code(), Some(3));
        collect(&mut Command::new("/missing/plugin"), 1).unwrap_err();
    }

    #[test]
    fn every_plugin_of_a_kubeconfig_runs_through_the_agent() {
        let text = "apiVersion: v1\nkind: Config\nusers:\n\
                    - {name: a, user: {exec: {apiVersion: v1, command: aws, args: [eks, get-token]}}}\n\
                    - {name: b, user: {exec: {apiVersion: v1, command: gke}}}\n\
                    - {name: c, user: {token: x}}\n";
        let mut file = Kubeconfig::from_yaml(text).unwrap();
        limit_plugins(&mut file);
        let lines: Vec<String> = file
            .auth_infos
            .iter()
            .filter_map(|entry| entry.auth_info.as_ref()?.exec.as_ref())
            .map(|exec| {
                format!("{} {}", exec.command.as_deref().unwrap(), exec.args.as_ref().unwrap().join(" "))
            })
            .collect();
        assert_eq!(
            lines,
            [
                "/proc/self/exe credential-plugin -- aws eks get-token",
                "/proc/self/exe credential-plugin -- gke"
            ]
        );
    }
}
