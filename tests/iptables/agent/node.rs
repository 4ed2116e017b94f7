//! A lab whose node has an xtables lock, an `/etc` and, if wanted, programs of its own, and the agent on it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::iptables::Backend;
use bridge_lab::agent::{Agent, program};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::{Attempt, tcp};
use serde_json::Value;

use crate::support::FOREIGN;

pub(crate) const ALLOWED: u16 = 40002;
pub(crate) const DENIED: u16 = 40003;
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Rules for [`ALLOWED`], one for each direction.
pub(crate) const RULES: &str = "\
rules:
  - {name: api, direction: inbound, protocol: tcp, ports: [40002]}
  - {name: devices, direction: outbound, protocol: tcp, ports: [40002]}
";
/// One more, for [`DENIED`].
pub(crate) const MORE: &str = "  - {name: more, direction: inbound, protocol: tcp, ports: [40003]}\n";

pub(crate) struct Node {
    pub(crate) backend: Backend,
    pub(crate) lab: Lab,
}

/// How the agent is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// As root.
    Root,
    /// As root who may neither mount nor call bpf(2), with no BPF file system in sight.
    WithoutBpf,
}

impl Node {
    pub(crate) fn new(backend: Backend) -> Result<Self> {
        Self::with_privilege(backend, Privilege::Root)
    }

    pub(crate) fn with_privilege(backend: Backend, privilege: Privilege) -> Result<Self> {
        eprintln!("back end: {}", backend.name());
        let node = Self { backend, lab: Lab::builder().pods(1).build()? };
        fs::create_dir_all(node.programs())?;
        let etc = node.etc();
        let copied = Command::new("cp").args(["-a", "/etc"]).arg(&etc).status()?;
        ensure!(copied.success(), "copy /etc: {copied}");
        let (no_bpf, drop) = match privilege {
            Privilege::Root => ("", ""),
            Privilege::WithoutBpf => (
                "mount -t tmpfs none /sys/fs/bpf; ",
                "setpriv --bounding-set=-sys_admin,-bpf,-perfmon,-sys_module ",
            ),
        };
        // Mounts of its own: /etc is the copy, for this process and its children alone.
        let script = format!(
            "#!/bin/sh\nexport XTABLES_LOCKFILE={lock} PATH={programs}:$PATH\nexec unshare --mount sh -ec \
             'mount --bind {etc} /etc; {no_bpf}exec {drop}{agent} \"$@\"' sh \"$@\"\n",
            lock = node.lock_file().display(),
            programs = node.programs().display(),
            etc = etc.display(),
            agent = program()?.display(),
        );
        fs::write(node.wrapper(), script)?;
        fs::set_permissions(node.wrapper(), fs::Permissions::from_mode(0o755))?;
        Ok(node)
    }

    pub(crate) fn start(&self, config: &str) -> Result<Agent> {
        Agent::start_program(self.wrapper(), &self.lab, self.lab.b(), config)
    }

    fn wrapper(&self) -> PathBuf {
        self.lab.directory().join("bridge-agent")
    }

    /// Comes first in the agent's PATH.
    pub(crate) fn programs(&self) -> PathBuf {
        self.lab.directory().join("programs")
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.lab.directory().join("xtables.lock")
    }

    pub(crate) fn etc(&self) -> PathBuf {
        self.lab.directory().join("etc")
    }

    /// A configuration: `engines` as in a list, `enforcement` further keys of that section.
    pub(crate) fn config(&self, engines: &str, enforcement: &str, rest: &str) -> String {
        let backend = self.backend.name();
        format!(
            r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  engines: [{engines}]
  interfaces: {{external: [eth0], internal: ["cali*"]}}
  iptables: {{backend: {backend}, lockWait: 1s}}
{enforcement}{rest}"#
        )
    }

    /// Runs `iptables-BACKEND ARGUMENTS` or `ip6tables-BACKEND ARGUMENTS` on the node; the words are split at blanks.
    pub(crate) fn run(&self, line: &str) -> Result<String> {
        self.lab.b().netns.output(self.command(line)?)
    }

    /// The same, with input.
    pub(crate) fn feed(&self, line: &str, input: &str) -> Result<()> {
        let path = self.lab.directory().join("input");
        fs::write(&path, input)?;
        let mut command = self.command(line)?;
        command.stdin(Stdio::from(fs::File::open(&path)?));
        self.lab.b().netns.output(command).map(drop)
    }

    fn command(&self, line: &str) -> Result<Command> {
        let mut words = line.split_whitespace();
        let program = words.next().context("a program")?;
        let (base, tool) = program
            .split_once('-')
            .map_or((program, String::new()), |(base, tool)| (base, format!("-{tool}")));
        let mut command = Command::new(format!("{base}-{}{tool}", self.backend.name()));
        command.args(words).env("XTABLES_LOCKFILE", self.lock_file());
        Ok(command)
    }

    /// Puts rules of others into every table that bridge uses, of both families.
    pub(crate) fn add_foreign_rules(&self) -> Result<()> {
        let mangle = "*mangle\n-A PREROUTING -p tcp -m tcp --dport 22 -j MARK --set-xmark 0x1/0x1\nCOMMIT\n";
        let raw = "*raw\n-A PREROUTING -p tcp -m tcp --dport 23 -j DROP\nCOMMIT\n";
        let mangle = raw.to_owned() + mangle;
        // It would hold up the traffic of the tests.
        let filter = FOREIGN.replace(":FORWARD DROP", ":FORWARD ACCEPT");
        self.feed("iptables-restore", &(filter.clone() + &mangle))?;
        self.feed("ip6tables-restore", &(filter.replace("198.51.100.0/24", "2001:db8::/32") + &mangle))
    }

    /// All tables of both families as `iptables-save` prints them, without its remarks (they bear the time) and with
    /// counters at zero.
    pub(crate) fn dump(&self) -> Result<String> {
        let all = self.run("iptables-save")? + &self.run("ip6tables-save")?;
        let lines = all.lines().filter(|line| !line.starts_with('#'));
        Ok(lines
            .map(|line| match (line.starts_with(':'), line.rsplit_once(" [")) {
                (true, Some((declaration, _))) => format!("{declaration} [0:0]\n"),
                _ => format!("{line}\n"),
            })
            .collect())
    }

    /// Returns the result of the LAN host's connection to a port of the pod with a listener.
    pub(crate) fn connect(&self, family: Family, port: u16) -> Result<Attempt<()>> {
        let c1 = self.lab.c1();
        let server = tcp::Server::echo(&c1.netns, c1.at(family, port))?;
        self.attempt(server.address())
    }

    fn attempt(&self, to: SocketAddr) -> Result<Attempt<()>> {
        Ok(tcp::Client::new(&self.lab.a().netns).connect(to)?.split().1)
    }

    /// The allowed port is reached and the denied one refused, in both families.
    pub(crate) fn holds(&self) -> Result<()> {
        for family in Family::BOTH {
            let (allowed, denied) = (self.connect(family, ALLOWED)?, self.connect(family, DENIED)?);
            ensure!(allowed.succeeded() && denied.refused(), "{family:?}: {allowed}; {denied}");
        }
        Ok(())
    }

    /// Nothing is refused, in both families.
    pub(crate) fn is_open(&self) -> Result<()> {
        for family in Family::BOTH {
            let denied = self.connect(family, DENIED)?;
            ensure!(denied.succeeded(), "{family:?}: {denied}");
        }
        Ok(())
    }
}

/// What a command of the agent says as JSON.
pub(crate) fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

/// What the iptables engine says of itself.
pub(crate) fn firewall(agent: &Agent) -> Result<Value> {
    Ok(json(agent, &["status"])?["agent"]["firewall"].clone())
}

/// Jumps without the note of what they found, which a restart cannot find again.
pub(crate) fn plain(dump: &str) -> String {
    dump.replace(":table-was-absent", "")
}
