//! `cargo xtask vm`: other kernels, in emulation, with this host's files.
//!
//! The machine sees the files of this host read-only, under a layer that forgets what is changed, so that it runs what was
//! built here with the programs that are installed here. It has no network.

mod jobs;
mod kernel;
mod table;

pub(crate) use kernel::Kernel;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    build, cmd,
    setup::{self, Scope},
    workspace,
};
use jobs::{Job, Outcome};

const INIT: &str = include_str!("init.sh");
const GUEST: &str = include_str!("guest.sh");
/// For the machine to start, beside its job.
const START: Duration = Duration::from_secs(120);

/// `cargo xtask vm`.
///
/// # Errors
/// Setup or the build fails, or the job fails on a kernel.
pub(crate) fn main(kernels: &[Kernel], write_table: bool, command: &[String]) -> Result<()> {
    let kernels = if kernels.is_empty() { &Kernel::ALL[..] } else { kernels };
    let ready = setup::ensure(Scope::Machine)?;
    build::objects(&ready.ebpf)?;
    let job = if command.is_empty() { jobs::scenes()? } else { Job::of_user(command) };
    let mut columns = Vec::new();
    for kernel in kernels {
        let outcome = run(*kernel, &job)?;
        if !command.is_empty() {
            print!("{}", outcome.output);
            eprint!("{}", outcome.errors);
        }
        columns.push((*kernel, outcome));
    }
    let failed: Vec<_> = columns
        .iter()
        .filter(|(_, outcome)| !outcome.ok)
        .map(|(kernel, outcome)| format!("on Linux {}:\n{}", kernel.name(), outcome.why()))
        .collect();
    if command.is_empty() {
        let table = table::render(&columns);
        println!("{table}");
        if write_table {
            table::write(&table)?;
        }
    }
    if !failed.is_empty() {
        bail!("failed:\n{}", failed.join("\n"));
    }
    Ok(())
}

/// Starts a kernel, has it do the job, and returns what came of it.
fn run(kernel: Kernel, job: &Job) -> Result<Outcome> {
    let unpacked = kernel::unpacked(kernel)?;
    let output = workspace::root().join("target/vm").join(kernel.name());
    drop(fs::remove_dir_all(&output));
    fs::create_dir_all(&output)?;
    let initramfs = output.join("initramfs");
    kernel::write_initramfs(&unpacked, INIT, &output.join("initramfs.d"), &initramfs)?;
    let guest = output.join("guest.sh");
    fs::write(&guest, filled_in(&unpacked.root)?)?;
    fs::write(output.join("jobs"), job.line())?;
    let share = |path: &Path, tag: &str, more: &str| {
        format!("local,path={},mount_tag={tag},security_model=none,multidevs=remap{more}", path.display())
    };
    let mut machine = cmd::command("qemu-system-x86_64");
    machine
        .args([
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
    watch(&mut machine, START + job.limit)?;
    Ok(Outcome::read(job, &output))
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
