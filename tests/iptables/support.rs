//! Namespaces, commands and policies that the tests share.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bridge_agent::iptables::save::Saving;
use bridge_agent::iptables::{Backend, Config, Iptables, Programs};
use bridge_agent::model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule};
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub(crate) const BACKENDS: [Backend; 2] = [Backend::Nft, Backend::Legacy];

/// Runs `work` on a thread with a network namespace of its own, once for each back end. Namespace and tables go with
/// the thread; the xtables lock is one for this test alone, since the real one is shared by the whole host.
pub(crate) fn on_both(work: impl Fn(&Host) + Sync) {
    for backend in BACKENDS {
        eprintln!("back end: {}", backend.name());
        alone(|| work(&Host::new(backend)));
    }
}

/// Runs `work` on a thread with a network namespace of its own.
pub(crate) fn alone(work: impl FnOnce() + Send) {
    let inside = || {
        // SAFETY: CLONE_NEWNET leaves the file descriptors, memory and signal handlers of the process shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("make a network namespace: is this root?");
        work();
    };
    thread::scope(|scope| scope.spawn(inside).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// A host as the driver sees it: a back end, a lock, a root directory for saved rules.
pub(crate) struct Host {
    pub(crate) backend: Backend,
    directory: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new(backend: Backend) -> Self {
        Self { backend, directory: tempfile::tempdir().expect("make a temporary directory") }
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.directory.path().join("xtables.lock")
    }

    /// Where saved rules are looked for.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            programs: Programs {
                lock_wait: Duration::from_secs(5),
                lock_file: Some(self.lock_file()),
                ..Programs::default()
            },
            backend: Some(self.backend),
            saving: Saving { enabled: true, root: self.root() },
            ..Config::default()
        }
    }

    pub(crate) fn firewall(&self) -> Iptables {
        Iptables::new(self.config()).expect("a driver")
    }

    /// Runs `iptables-BACKEND ARGUMENTS`, `ip6tables-BACKEND ...`; the words are split at blanks.
    pub(crate) fn run(&self, line: &str) -> String {
        self.feed(line, "")
    }

    /// The same, with `input`.
    pub(crate) fn feed(&self, line: &str, input: &str) -> String {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        let (base, tool) = match program.split_once('-') {
            Some((base, tool)) => (base, format!("-{tool}")),
            None => (program, String::new()),
        };
        let path = self.directory.path().join("input");
        std::fs::write(&path, input).expect("write the input");
        let mut command = Command::new(format!("{base}-{}{tool}", self.backend.name()));
        command.args(words).env("XTABLES_LOCKFILE", self.lock_file());
        let output = command.stdin(std::fs::File::open(&path).expect("open the input")).output();
        let output = output.unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Every table of both families, without remarks (they bear the time) and with counters at zero.
    pub(crate) fn dump(&self) -> String {
        let all = self.run("iptables-save") + &self.run("ip6tables-save");
        all.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| match (line.starts_with(':'), line.rsplit_once(" [")) {
                (true, Some((declaration, _))) => format!("{declaration} [0:0]\n"),
                _ => format!("{line}\n"),
            })
            .collect()
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("make directories");
        std::fs::write(path, text).expect("write a file");
    }

    pub(crate) fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.root().join(path)).expect("read a file")
    }
}

/// Rules that an operator may have in the tables.
pub(crate) const FOREIGN: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
                                  :MINE - [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n\
                                  -A FORWARD -m comment --comment \"not for BRIDGE-x\" -j MINE\n\
                                  -A MINE -s 198.51.100.0/24 -j ACCEPT\nCOMMIT\n";

/// The policy of the documentation, with both families and NodePorts.
pub(crate) fn policy() -> Policy {
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: nets(&["10.200.1.0/24", "fd00:200:1::/64"]),
        external: nets(&["192.168.31.0/24", "fd00:31::/64"]),
        nodes: nets(&["192.168.31.17/32", "10.200.1.1/32", "fd00:31::17/128", "fd00:200:1::1/128"]),
        rules: vec![
            rule("devices-to-api", Direction::Inbound, Protocol::Tcp, &[(40002, 40002), (60001, 60100)]),
            rule("dns", Direction::Outbound, Protocol::Any, &[(53, 53)]),
            rule("ping", Direction::Inbound, Protocol::Icmp, &[]),
        ],
        audited: Vec::new(),
        node_ports: Some(NodePorts {
            range: PortRange { first: 30000, last: 32767 },
            allow: ranges(&[(30080, 30080), (31000, 31100)]),
        }),
    }
}

pub(crate) fn rule(name: &str, direction: Direction, protocol: Protocol, ports: &[(u16, u16)]) -> Rule {
    Rule {
        name: name.into(),
        direction,
        external: None,
        pods: None,
        protocol,
        ports: ranges(ports),
        source_ports: Vec::new(),
        action: Action::Allow,
    }
}

pub(crate) fn ranges(ports: &[(u16, u16)]) -> Vec<PortRange> {
    ports.iter().map(|(first, last)| PortRange { first: *first, last: *last }).collect()
}

pub(crate) fn nets<N: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<N> {
    texts.iter().map(|text| text.parse().expect("a prefix")).collect()
}

/// Polls until `done` holds; how long that took.
pub(crate) fn eventually(description: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {description}");
        thread::sleep(Duration::from_millis(10));
    }
    begun.elapsed()
}

/// Directories with links to just these programs.
pub(crate) fn only(directory: &Path, programs: &[&str]) -> Vec<PathBuf> {
    for program in programs {
        let real = Programs::default().find(program).unwrap_or_else(|| panic!("{program} is not installed"));
        std::os::unix::fs::symlink(real, directory.join(program)).expect("make a link");
    }
    vec![directory.to_owned()]
}
