//! Child processes of a lab: they die with their handle, with the lab, and with the owner.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, kill_process, pidfd_open, pidfd_send_signal,
    set_parent_process_death_signal,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::id::LabId;
use crate::wait::eventually;

/// In the environment of every process of a lab, and of those it starts: whose they are.
const MARK: &str = "BRIDGE_LAB";

/// A running child process; dropping the handle kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Kills the process and collects its status.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    /// Waits for the process to end by itself; `None` if it still runs when `deadline` has passed.
    pub fn wait(&mut self, deadline: Duration) -> io::Result<Option<ExitStatus>> {
        eventually(deadline, || self.child.try_wait().transpose()).transpose()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if the process has ended and been collected already.
        let _ = self.kill();
    }
}

/// Starts `command` for `lab` in the network namespace behind `netns`.
pub(super) fn spawn(mut command: Command, lab: LabId, netns: Arc<File>) -> io::Result<Process> {
    command.env(MARK, lab.to_string());
    let owner = Pid::from_raw(std::process::id().cast_signed());
    let inside = move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The owner may have died before the signal was asked for.
        if getppid() == owner { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: between fork and exec the closure makes system calls on values it owns and nothing else: it
    // takes no lock and allocates nothing (a simple io::Error is built without).
    unsafe { command.pre_exec(inside) };
    Ok(Process { child: on_lasting_thread(command)? })
}

/// The parent death signal comes when the *thread* that forked ends, so all forking is left to a thread that
/// lasts as long as the process.
fn on_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static ORDERS: OnceLock<Sender<Order>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                // The caller waits for the reply: it cannot have gone.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, result) = channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    orders.send((command, reply)).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

/// Kills every process with the mark of `lab`, also those that its children started; returns how many still ran when
/// `deadline` had passed.
pub(super) fn kill_all(lab: LabId, deadline: Duration) -> usize {
    let mut left = 0;
    eventually(deadline, || {
        left = marked(lab).into_iter().filter(|pid| kill_marked(*pid, lab)).count();
        (left == 0).then_some(())
    });
    left
}

/// The processes that bear the mark of `lab`. A process that has ended, collected or not, has no environment.
fn marked(lab: LabId) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| bears_mark(*pid, lab))
        .collect()
}

fn bears_mark(pid: Pid, lab: LabId) -> bool {
    let mark = format!("{MARK}={lab}");
    fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()))
        .is_ok_and(|environment| environment.split(|b| *b == 0).any(|entry| entry == mark.as_bytes()))
}

/// Returns whether there was such a process to kill.
fn kill_marked(pid: Pid, lab: LabId) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // Looked at again now that the descriptor holds on to this very process: the id may have been reused.
    bears_mark(pid, lab) && pidfd_send_signal(&process, Signal::KILL).is_ok()
}
