//! `cargo xtask vm`: other kernels, in emulation, with this host's files.
//!
//! The machine sees this host's files read-only, under a layer that forgets changes, so that it runs the programs built
//! and installed here. It has no network.

mod jobs;
mod kernel;
mod table;

pub(crate) use kernel::{Kernel, needed};

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    build, cmd,
    progress::Progress,
    setup::{self, Scope},
    workspace,
};
use jobs::{Job, Outcome};

const INIT: &str = include_str!("init.sh");
const GUEST: &str = include_str!("guest.sh");
/// For the machine to start, beside its jobs.
const START: Duration = Duration::from_secs(120);

/// `cargo xtask vm`.
///
/// # Errors
/// Setup or the build fails, or a job fails on a kernel.
pub(crate) fn main(kernels: &[Kernel], write_table: bool, command: &[String]) -> Result<()> {
    if write_table && !kernels.is_empty() {
        bail!("--write is for all kernels at once: leave out --kernel");
    }
    let kernels = if kernels.is_empty() { &Kernel::ALL[..] } else { kernels };
    let ready = setup::ensure(Scope::Lab)?;
    ensure(kernels)?;
    build::objects(&ready.ebpf)?;
    if command.is_empty() { play(kernels, write_table) } else { run_command(kernels, command) }
}

/// Installs these kernels and the emulator.
///
/// # Errors
/// They cannot be had.
pub(crate) fn ensure(kernels: &[Kernel]) -> Result<()> {
    setup::programs(&setup::MACHINE)?;
    kernels.iter().try_for_each(|kernel| kernel::unpacked(*kernel).map(drop))
}

/// Runs all jobs on each kernel, and prints the results.
///
/// # Errors
/// A result is worse than docs/kernels.md documents.
pub(crate) fn play(kernels: &[Kernel], write_table: bool) -> Result<()> {
    let jobs = jobs::all()?;
    let names: Vec<_> = kernels.iter().map(|kernel| kernel.name()).collect();
    let progress = Progress::lines(format!("Linux {} in emulation", names.join(" and ")));
    // In parallel: the jobs mostly wait.
    let columns = thread::scope(|scope| {
        let machines: Vec<_> =
            kernels.iter().map(|kernel| (*kernel, scope.spawn(|| run(*kernel, &jobs)))).collect();
        let ended = machines.into_iter().map(|(kernel, machine)| {
            let outcomes = machine.join().map_err(|_| anyhow!("the thread of a machine panicked"))??;
            Ok((kernel, outcomes))
        });
        ended.collect::<Result<Vec<_>>>()
    })?;
    drop(progress);
    let table = table::render(&columns);
    println!("{table}");
    if write_table {
        table::write(&table)?;
    }
    let worse = table::worse(&table::documented()?, &columns);
    if worse.is_empty() {
        return Ok(());
    }
    for (kernel, outcomes) in &columns {
        for outcome in outcomes.iter().filter(|outcome| !outcome.ok) {
            eprintln!("on Linux {}, {}", kernel.name(), outcome.why());
        }
    }
    bail!("not as docs/kernels.md says:\n{}", worse.join("\n"));
}

fn run_command(kernels: &[Kernel], command: &[String]) -> Result<()> {
    let jobs = [Job::of_user(command)];
    let mut failed = Vec::new();
    for kernel in kernels {
        for outcome in run(*kernel, &jobs)? {
            print!("{}", outcome.output);
            eprint!("{}", outcome.errors);
            if !outcome.ok {
                failed.push(kernel.name());
            }
        }
    }
    if !failed.is_empty() {
        bail!("failed on Linux {}", failed.join(" and "));
    }
    Ok(())
}

/// Starts a kernel, runs the jobs in it, and returns the result of each.
fn run(kernel: Kernel, jobs: &[Job]) -> Result<Vec<Outcome>> {
    let unpacked = kernel::unpacked(kernel)?;
    let output = workspace::root().join("target/vm").join(kernel.name());
    drop(fs::remove_dir_all(&output));
    fs::create_dir_all(&output)?;
    let initramfs = output.join("initramfs");
    kernel::write_initramfs(&unpacked, INIT, &output.join("initramfs.d"), &initramfs)?;
    let guest = output.join("guest.sh");
    fs::write(&guest, filled_in(&unpacked.root)?)?;
    fs::write(output.join("jobs"), jobs::lines(jobs))?;
    let share = |path: &Path, tag: &str, more: &str| {
        format!("local,path={},mount_tag={tag},security_model=none,multidevs=remap{more}", path.display())
    };
    let mut machine = cmd::command("qemu-system-x86_64");
    machine
        .args([
            // Not KVM: a KVM device need not work, and a machine that hangs reports nothing.
            "-accel",
            "tcg",
            "-m",
            "3072",
            "-smp",
            "2",
            "-display",
            "none",
            "-vga",
            "none",
            "-no-reboot",
            "-nodefaults",
            "-serial",
            "stdio",
        ])
        .args(["-kernel".as_ref(), unpacked.image().as_os_str()])
        .args(["-initrd".as_ref(), initramfs.as_os_str()])
        .args(["-append", &format!("console=ttyS0 loglevel=1 panic=-1 bridge.guest={}", guest.display())])
        .args(["-virtfs", &share(Path::new("/"), "host", ",readonly=on")])
        .args(["-virtfs", &share(&output, "output", "")])
        .stdin(Stdio::null())
        .stdout(std::io::stderr());
    eprintln!("Linux {} ({}) in emulation", kernel.name(), unpacked.release);
    watch(&mut machine, START + jobs::limit(jobs))?;
    Ok(jobs.iter().map(|job| Outcome::read(job, &output)).collect())
}

fn filled_in(kernel_root: &Path) -> Result<String> {
    let path = cmd::search_path().into_string().ok().context("PATH is not UTF-8")?;
    Ok(GUEST
        .replace("@KERNEL_ROOT@", &kernel_root.to_string_lossy())
        .replace("@WORKSPACE@", &workspace::root().to_string_lossy())
        .replace("@PATH@", &path))
}

/// Runs a machine to its end, but not for longer than `limit`.
fn watch(machine: &mut Command, limit: Duration) -> Result<()> {
    let mut child = machine.spawn().context("cannot start qemu-system-x86_64")?;
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("the machine failed ({status})");
        }
        if Instant::now() > end {
            child.kill().context("end the machine")?;
            child.wait()?;
            bail!("the machine did not end in {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    }
}
