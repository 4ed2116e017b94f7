//! Programs that connect, and the control groups they do it in.

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    lab::{Netns, Process},
    wait::patience,
};

/// Puts a command into a control group.
pub fn in_cgroup(cgroup: &Path, mut command: Command) -> Command {
    let processes = cgroup.join("cgroup.procs");
    // SAFETY: between fork and exec it opens and writes one file; the path was made before.
    unsafe { command.pre_exec(move || fs::write(&processes, "0")) };
    command
}

/// Begins every script.
const PRELUDE: &str = r"
import errno
def code(f):
    try:
        f()
        return 'connected'
    except OSError as e:
        return errno.errorcode[e.errno]
";

/// A python3 command; the script may call `code(f)`, which returns `connected` or the name of the error of `f()`.
pub fn python(script: &str) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", &format!("{PRELUDE}{script}")]);
    command
}

/// Runs a command to its end in a namespace, with a deadline, and returns its output.
pub fn output(netns: &Netns, mut command: Command, deadline: Duration) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    finish(netns.spawn_command(command)?, deadline)
}

/// Waits for a program whose standard output is a pipe that cannot fill up, and returns its output.
pub fn finish(mut process: Process, deadline: Duration) -> Result<String> {
    let status = process.wait(patience(deadline))?.context("the program did not end in time")?;
    let mut text = String::new();
    process.child().stdout.take().context("a pipe")?.read_to_string(&mut text)?;
    ensure!(status.success(), "{status}: {text}");
    Ok(text)
}

/// Accepts TCP for ever, and closes when the client does.
pub fn serve(netns: &Netns, port: u16) -> Result<Process> {
    let mut command = python(&format!(
        r"
import selectors, socket
sel = selectors.DefaultSelector()
sel.register(socket.create_server(('', {port}), backlog=4096), selectors.EVENT_READ, 1)
print('ready', flush=True)
while True:
    for key, _ in sel.select():
        s = key.fileobj
        if key.data: sel.register(s.accept()[0], selectors.EVENT_READ, 0)
        else:
            try: data = s.recv(4096)
            except OSError: data = b''
            if not data: sel.unregister(s); s.close()
"
    ));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    process.child().stdout.as_mut().context("a pipe")?.read_exact(&mut [0; 6])?;
    Ok(process)
}

/// Opens `count` connections in the hooked group, prints the results, and keeps them until its standard input ends.
pub fn hold(cgroup: &Path, netns: &Netns, to: SocketAddr, count: u32) -> Result<Process> {
    let script = format!(
        r"
import socket, sys
s = []
try:
    for _ in range({count}):
        c = socket.socket(); c.settimeout(10); c.connect(('{}', {})); s.append(c)
    print('all', *[c.getsockname()[1] for c in s], flush=True)
except OSError as e: print(e.errno, flush=True)
sys.stdin.read()
",
        to.ip(),
        to.port()
    );
    let mut command = in_cgroup(cgroup, python(&script));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(netns.spawn_command(command)?)
}

/// The next line that a program prints; its standard output is a pipe.
pub fn line(process: &mut Process) -> Result<String> {
    let mut text = Vec::new();
    let stdout = process.child().stdout.as_mut().context("a pipe")?;
    let mut byte = [0];
    while stdout.read(&mut byte)? == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    Ok(String::from_utf8(text)?)
}

/// The ports in the line of a [`hold`] that could open all its connections.
pub fn ports(line: &str) -> Result<BTreeSet<u16>> {
    let ports = line.strip_prefix("all ").with_context(|| line.to_owned())?;
    Ok(ports.split(' ').map(str::parse).collect::<Result<_, _>>()?)
}

/// Ends the standard input of a program, and waits for it.
pub fn end(mut process: Process) -> Result<()> {
    drop(process.child().stdin.take());
    finish(process, Duration::from_secs(20)).map(drop)
}
