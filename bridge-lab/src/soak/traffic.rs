//! Connections: those that stand, new ones, those from the port pool, and those that no rule allows.

use std::{
    io::Read as _,
    path::Path,
    process::Stdio,
    sync::{Mutex, PoisonError},
    thread::Scope,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::Course;
use crate::{
    lab::{Family, Host, Lab, Netns, Process},
    pool::{finish, in_cgroup, python},
    traffic::tcp::{Client, Connection, Server},
};

pub(super) const HELD: &str = "a connection that stands answers";
pub(super) const INBOUND: &str = "a LAN host connects to a pod";
pub(super) const OUTBOUND: &str = "a pod connects to a LAN host";
pub(super) const POOL: &str = "a pod connects from the port pool";
pub(super) const DENIED: &str = "traffic that no rule allows is denied";

/// Connections that stand, each way.
const STANDING: usize = 8;
/// Ports in pods that rules allow, and one that none does; then those in the LAN.
pub(super) const IN: [u16; 2] = [40002, 40004];
const IN_DENIED: u16 = 40003;
pub(super) const OUT: [u16; 2] = [8443, 8444];
const OUT_DENIED: u16 = 8446;

const PATIENCE: Duration = Duration::from_secs(10);
/// Where nothing comes back.
const IMPATIENCE: Duration = Duration::from_millis(300);

/// Answers the first octets of each connection with themselves, and closes.
const SERVER: &str = r"
import selectors, socket, sys
sel = selectors.DefaultSelector()
for port in map(int, sys.argv[1:]):
    sel.register(socket.create_server(('', port), backlog=4096), selectors.EVENT_READ, True)
print('ready', flush=True)
while True:
    for key, _ in sel.select():
        s = key.fileobj
        if key.data: sel.register(s.accept()[0], selectors.EVENT_READ, False)
        else:
            sel.unregister(s)
            try: s.sendall(s.recv(64))
            except OSError: pass
            s.close()
";

/// Connects until its standard input ends, and reports the results.
const POOLED: &str = r"
import json, select, socket, sys
done = outside = failed = 0
why = ''
while not select.select([sys.stdin], [], [], 0.02)[0]:
    s = socket.socket()
    s.settimeout(10)
    try:
        s.connect((sys.argv[1], int(sys.argv[2])))
        port = s.getsockname()[1]
        if not 61001 <= port <= 61499:
            outside += 1
            why = why or 'port %d' % port
        s.sendall(b'x')
        if s.recv(1) != b'x': raise OSError('no answer')
        done += 1
    except OSError as error:
        failed += 1
        why = why or repr(error)
    s.close()
print(json.dumps(dict(done=done, outside=outside, failed=failed, why=why)))
";

#[derive(Debug, Deserialize)]
struct Pooled {
    done: u64,
    outside: u64,
    failed: u64,
    why: String,
}

/// Servers and those who use them.
#[derive(Debug)]
pub(super) struct Stand {
    echoes: [Server; 2],
    _servers: [Process; 2],
    pooled: Mutex<Option<Process>>,
}

fn serve(netns: &Netns, ports: &[u16]) -> Result<Process> {
    let mut command = python(SERVER);
    command.args(ports.iter().map(ToString::to_string)).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    process.child().stdout.as_mut().context("a pipe")?.read_exact(&mut [0; 6])?;
    Ok(process)
}

impl Stand {
    pub(super) fn new(lab: &Lab) -> Result<Self> {
        let (a, c1) = (lab.a(), lab.c1());
        let echo = |host: &Host, port| Server::echo(&host.netns, host.at(Family::V4, port));
        Ok(Self {
            echoes: [echo(c1, IN[0])?, echo(a, OUT[0])?],
            _servers: [serve(&c1.netns, &[IN[1], IN_DENIED])?, serve(&a.netns, &[OUT[1], OUT_DENIED])?],
            pooled: Mutex::new(None),
        })
    }

    /// Begins to connect from the port pool, which must be there by now.
    pub(super) fn connect_from_pool(&self, lab: &Lab, cgroup: &Path) -> Result<()> {
        let mut command = in_cgroup(cgroup, python(POOLED));
        command.args([lab.a().v4.to_string(), OUT[1].to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let process = lab.c1().netns.spawn_command(command)?;
        *self.pooled.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }

    pub(super) fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        lab: &'scope Lab,
        course: &'scope Course,
    ) {
        let (a, c1) = (lab.a(), lab.c1());
        scope.spawn(move || match self.held(lab) {
            Ok(mut held) => course.repeat(HELD, Duration::from_millis(500), || {
                held.iter_mut().try_for_each(|one| one.round_trip(PATIENCE).map(drop).map_err(Into::into))
            }),
            Err(error) => course.count(HELD, 0, Err(error)),
        });
        let pause = Duration::from_millis(20);
        scope.spawn(move || course.repeat(INBOUND, pause, || connect(a, c1, IN[1])));
        scope.spawn(move || course.repeat(OUTBOUND, pause, || connect(c1, a, OUT[1])));
        let pause = Duration::from_millis(100);
        scope.spawn(move || course.repeat(DENIED, pause, || denied(a, c1, IN_DENIED)));
        scope.spawn(move || course.repeat(DENIED, pause, || denied(c1, a, OUT_DENIED)));
        scope.spawn(move || {
            while course.pause(Duration::from_secs(1)) {}
            let pooled = self.pooled.lock().unwrap_or_else(PoisonError::into_inner).take();
            let result = pooled.context("it was not started").and_then(end);
            let done = result.as_ref().map_or(0, |pooled| pooled.done);
            course.count(
                POOL,
                done,
                result.and_then(|pooled| {
                    let Pooled { outside, failed, why, .. } = pooled;
                    ensure!(
                        failed + outside == 0,
                        "{failed} failed ({why}), {outside} from outside the pool"
                    );
                    Ok(())
                }),
            );
        });
    }

    fn held(&self, lab: &Lab) -> Result<Vec<Connection>> {
        let mut held = Vec::new();
        for (server, client) in self.echoes.iter().zip([lab.a(), lab.c1()]) {
            for _ in 0..STANDING {
                held.push(Client::new(&client.netns).connect(server.address())?.reached()?);
            }
        }
        Ok(held)
    }
}

fn end(mut process: Process) -> Result<Pooled> {
    drop(process.child().stdin.take());
    Ok(serde_json::from_str(&finish(process, PATIENCE * 3)?)?)
}

fn connect(from: &Host, to: &Host, port: u16) -> Result<()> {
    let client = Client::new(&from.netns).deadline(PATIENCE);
    client.connect(to.at(Family::V4, port))?.reached()?.round_trip(PATIENCE)?;
    Ok(())
}

fn denied(from: &Host, to: &Host, port: u16) -> Result<()> {
    let attempt = Client::new(&from.netns).deadline(IMPATIENCE).connect(to.at(Family::V4, port))?;
    ensure!(!attempt.succeeded(), "{} reached port {port} of {}", from.name, to.name);
    Ok(())
}
