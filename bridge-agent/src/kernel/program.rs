//! Other programs, run to their end within a limit.

use std::{
    io::{self, Seek, Write},
    os::fd::AsFd,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::mpsc,
    time::Duration,
};

use rustix::{
    fs::MemfdFlags,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// Why a program gave no output.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It could not be started, or its output could not be read.
    #[error(transparent)]
    Run(#[from] io::Error),
    /// It was killed after the limit.
    #[error("the program was killed after {} s", .0.as_secs())]
    Hung(Duration),
}

/// The directories in which programs are looked for: a service's `PATH` often lacks those of root's programs.
pub(crate) fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).collect()
}

/// Runs `command` in the network namespace of this thread, with `input` as its standard input, and kills it after `limit`.
pub(crate) fn run(mut command: Command, input: Option<&str>, limit: Duration) -> Result<Output, Error> {
    command.env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(match input {
        Some(input) => file_of(input)?,
        None => Stdio::null(),
    });
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())).transpose().map_err(io::Error::from)?;

    let (ended, wait) = mpsc::channel::<()>();
    let killer = std::thread::spawn(move || {
        let late = matches!(wait.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout));
        if let (true, Some(pidfd)) = (late, pidfd) {
            return pidfd_send_signal(pidfd.as_fd(), Signal::KILL).is_ok();
        }
        false
    });
    let output = child.wait_with_output();
    drop(ended);
    if killer.join().unwrap_or(false) {
        return Err(Error::Hung(limit));
    }
    Ok(output?)
}

/// An input that need not be fed while output is read.
fn file_of(input: &str) -> io::Result<Stdio> {
    let mut file = std::fs::File::from(rustix::fs::memfd_create("bridge-input", MemfdFlags::CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_reads_its_input_and_ends_in_time() {
        let output = run(Command::new("cat"), Some("text"), Duration::from_secs(10)).unwrap();
        assert_eq!(output.stdout, b"text");
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        assert!(matches!(run(sleep, None, Duration::from_millis(50)), Err(Error::Hung(_))));
    }
}
