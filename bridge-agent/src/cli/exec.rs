//! `bridge-agent exec`: runs a program whose connections come from ports of the pool, without its knowing.
//!
//! The program gets a control group of its own, with the hooks of the pool on it. Signals are passed on to it, and it
//! ends this command as it ends itself: with its exit code, or by the same signal.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
};

use clap::Args;
use ipnet::IpNet;

use super::{Error, Global, values};
use crate::{
    datapath::object,
    model::{PortRange, parse_ranges},
    pool::{
        KernelPool, Layout, Settings, attach, checks, hooks::EXEC_PREFIX, kernel, layout::Occupied, pins,
    },
};

/// Run a program whose connections come from ports of the pool
#[derive(Debug, Args)]
pub struct Exec {
    /// Networks that the program reaches from ports of the pool; left out: those of the running agent
    #[arg(long, value_name = "NETWORK", value_parser = values::network)]
    destination: Vec<IpNet>,
    /// Without an agent: the ports, such as 61001-61100; needs --destination
    #[arg(long, value_name = "RANGES", requires = "destination", value_parser = ranges)]
    ports: Option<Ranges>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Clone, Debug)]
struct Ranges(Vec<PortRange>);

fn ranges(text: &str) -> Result<Ranges, String> {
    let ranges = parse_ranges(text);
    let fine = ranges.iter().all(|range| 0 < range.first && range.first <= range.last);
    if fine && !ranges.is_empty() && ranges.len() == text.split(',').count() {
        Ok(Ranges(ranges))
    } else {
        Err("write ports and ranges of ports, such as 61001-61100,62000".into())
    }
}

/// The cgroup to remove at the end.
struct Group {
    directory: PathBuf,
    links: PathBuf,
    /// A pool that was made for this one program.
    own: Option<PathBuf>,
}

impl Exec {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let status = self.hooked(global).map_err(Error::Exec)?;
        leave_like(status)
    }

    fn hooked(&self, global: &Global) -> Result<ExitStatus, String> {
        let mount = attach::mount_point().map_err(|error| error.to_string())?;
        sweep(&mount, &global.pin_root);
        let (mut pool, own) = self.pool(&global.pin_root)?;
        let base = own.clone().unwrap_or_else(|| global.pin_root.clone());
        let name = format!("{EXEC_PREFIX}{}", std::process::id());
        let directory = mount.join(&name);
        let mut group = Group { directory: directory.clone(), links: PathBuf::new(), own };
        fs::create_dir(&directory).map_err(|error| {
            format!("cannot make the control group {}: {error}; run as root", directory.display())
        })?;
        group.links = links_of(&base, &directory).unwrap_or_default();
        pool.attach(&mount, Path::new(&name)).map_err(|error| error.to_string())?;
        // The hooks are pinned: they stay with the program, should this process be killed.
        drop(pool);
        let child = self.spawn(&directory)?;
        wait(child).map_err(|error| format!("cannot wait for the program: {error}"))
    }

    fn pool(&self, pin_root: &Path) -> Result<(KernelPool, Option<PathBuf>), String> {
        let failed = |error: kernel::KernelPoolError| error.to_string();
        if let Some(Ranges(ports)) = &self.ports {
            let settings = Settings {
                ports: ports.clone(),
                destinations: self.destination.clone(),
                ..Settings::default()
            };
            let occupied = Occupied { node_ports: None, reserved: checks::reserved().ranges() };
            let layout = Layout::plan(&settings, &occupied).map_err(|error| error.to_string())?;
            let own = pin_root.join(format!("{}{}", pins::EXEC_PREFIX, std::process::id()));
            let mut pool = KernelPool::load(object::POOL, &own, layout).map_err(failed)?;
            pool.set_networks(&self.destination).map_err(failed)?;
            return Ok((pool, Some(own)));
        }
        let share = self.destination.is_empty();
        let pool = KernelPool::join(object::POOL, pin_root, share).map_err(failed)?;
        let Some(mut pool) = pool else {
            return Err(format!(
                "no pool is pinned below {}; start the agent with a portPool in its configuration, or give --ports and \
                 --destination",
                pin_root.display()
            ));
        };
        if !share {
            pool.set_networks(&self.destination).map_err(failed)?;
        }
        Ok((pool, None))
    }

    fn spawn(&self, group: &Path) -> Result<Child, String> {
        let processes = group.join("cgroup.procs");
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        block_signals(true).map_err(|error| error.to_string())?;
        let enter = move || {
            fs::write(&processes, "0")?;
            block_signals(false)
        };
        // SAFETY: between fork and exec it opens, writes and closes a file, and sets the signal mask. The path was made
        // before; the path's conversion may allocate, which is safe here since this process has one thread.
        unsafe { command.pre_exec(enter) };
        command.spawn().map_err(|error| format!("cannot run {}: {error}", self.command[0].display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A program that went to the background is still in there: then its hooks have to stay. The next `exec` looks.
        if fs::remove_dir(&self.directory).is_ok() {
            let _ = fs::remove_dir_all(&self.links);
            if let Some(own) = &self.own {
                let _ = fs::remove_dir_all(own);
            }
        }
    }
}

fn links_of(base: &Path, group: &Path) -> io::Result<PathBuf> {
    Ok(pins::directory(base).join(format!("cgroup-{}", fs::metadata(group)?.ino())))
}

/// Removes the leftovers of programs that ended after their `exec`.
fn sweep(mount: &Path, pin_root: &Path) {
    for entry in fs::read_dir(mount).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(EXEC_PREFIX)) else { continue };
        let own = pin_root.join(format!("{}{pid}", pins::EXEC_PREFIX));
        let links = [links_of(pin_root, &entry.path()), links_of(&own, &entry.path())];
        // A group whose `exec` is about to use it has a process that lives.
        if !Path::new("/proc").join(pid).exists() && fs::remove_dir(entry.path()).is_ok() {
            for links in links.into_iter().flatten() {
                let _ = fs::remove_dir_all(links);
            }
            let _ = fs::remove_dir_all(own);
        }
    }
}

fn every_signal() -> libc::sigset_t {
    // SAFETY: sigfillset makes the set that it is given the address of.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        set
    }
}

fn block_signals(block: bool) -> io::Result<()> {
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: a complete set, and nowhere to write the old one to.
    match unsafe { libc::sigprocmask(how, &every_signal(), std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for the program to end, and passes signals on to it.
fn wait(mut child: Child) -> io::Result<ExitStatus> {
    let pid = child.id().cast_signed();
    loop {
        // SAFETY: sigwaitinfo writes one siginfo_t, for which all zeros is a value.
        let (signal, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::sigwaitinfo(&every_signal(), &raw mut info), info)
        };
        if signal == libc::SIGCHLD {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
        } else if signal > 0 && info.si_code != libc::SI_KERNEL {
            // The program has already received signals of the terminal (SI_KERNEL).
            // SAFETY: the child has not been waited for: the id is its own.
            unsafe { libc::kill(pid, signal) };
        }
    }
}

/// Ends this process as the program ended.
pub(super) fn leave_like(status: ExitStatus) -> ! {
    if let Some(signal) = status.signal() {
        // SAFETY: the signal gets its default action, is let through and sent to this process.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        // No core file of this process in the place of the program's.
        let _ = block_signals(false);
        std::process::exit(128 + signal);
    }
    std::process::exit(status.code().unwrap_or(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_before_anything_is_done() {
        assert_eq!(ranges("61001-61100,62000").unwrap().0.len(), 2);
        for bad in ["", "x", "1-", "5-4", "0", "70000", "1,,2"] {
            assert!(ranges(bad).is_err(), "{bad}");
        }
    }
}
