//! A lab whose node has an `/etc` of its own, and the agent on it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::{Agent, program};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::{Attempt, tcp};
use bridge_lab::wait::eventually;
use serde_json::Value;

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
    pub(crate) lab: Lab,
}

impl Node {
    pub(crate) fn new() -> Result<Self> {
        let node = Self { lab: Lab::builder().pods(1).build()? };
        let copied = Command::new("cp").args(["-a", "/etc"]).arg(node.etc()).status()?;
        ensure!(copied.success(), "copy /etc: {copied}");
        // Mounts of its own: /etc is the copy, for this process and its children alone.
        let script = format!(
            "#!/bin/sh\nexec unshare --mount sh -ec 'mount --bind {etc} /etc; exec {agent} \"$@\"' sh \"$@\"\n",
            etc = node.etc().display(),
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

    pub(crate) fn etc(&self) -> PathBuf {
        self.lab.directory().join("etc")
    }

    /// Runs a program on the node; the words are split at blanks.
    pub(crate) fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().context("a program")?);
        command.args(words);
        self.lab.b().netns.output(command)
    }

    /// Loads a script of nft.
    pub(crate) fn load(&self, script: &str) -> Result<()> {
        let path = self.lab.directory().join("script.nft");
        fs::write(&path, script)?;
        self.run(&format!("nft -f {}", path.display())).map(drop)
    }

    /// The rules of everybody without counters.
    pub(crate) fn dump(&self) -> Result<String> {
        self.run("nft --stateless list ruleset")
    }

    pub(crate) fn has_table(&self) -> Result<bool> {
        Ok(self.dump()?.contains("table inet bridge-agent {"))
    }

    /// Whether bridge's table has a chain of this name; quickly, also of large tables.
    pub(crate) fn has_chain(&self, name: &str) -> bool {
        self.run(&format!("nft list chain inet bridge-agent {name}")).is_ok()
    }

    /// Returns the result of the LAN host's connection to a port of the pod with a listener.
    pub(crate) fn connect(&self, family: Family, port: u16) -> Result<Attempt<()>> {
        let c1 = self.lab.c1();
        let server = tcp::Server::echo(&c1.netns, c1.at(family, port))?;
        Ok(tcp::Client::new(&self.lab.a().netns).connect(server.address())?.split().1)
    }

    /// The allowed port is reached and the denied one refused, in both families.
    pub(crate) fn holds(&self) -> Result<()> {
        for family in Family::BOTH {
            let (allowed, denied) = (self.connect(family, ALLOWED)?, self.connect(family, DENIED)?);
            ensure!(allowed.succeeded() && denied.refused(), "{family:?}: {allowed}; {denied}");
        }
        Ok(())
    }

    /// Waits until both verdicts are as in [`Self::holds`].
    pub(crate) fn settles(&self, agent: &Agent) -> Result<()> {
        let holds = eventually(DEADLINE, || self.holds().ok());
        ensure!(holds.is_some(), "{:?}\n{}\n{}", self.holds(), agent.log(), self.dump()?);
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

/// A configuration with these engines.
pub(crate) fn config(engines: &str, rest: &str) -> String {
    format!(
        r#"role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  engines: [{engines}]
  interfaces: {{external: [eth0], internal: ["cali*"]}}
  iptables: {{backend: nft}}
{rest}"#
    )
}

/// What a command of the agent prints as JSON.
pub(crate) fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.run(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

/// The packet filter in the status.
pub(crate) fn firewall(agent: &Agent) -> Result<Value> {
    Ok(json(agent, &["status"])?["agent"]["firewall"].clone())
}

/// Packets that a rule matched in nftables.
pub(crate) fn hits(agent: &Agent, rule: &str) -> Result<u64> {
    let rules = json(agent, &["rules"])?;
    let mut all = rules.as_array().into_iter().flatten();
    let found = all.find(|row| row["name"] == rule).with_context(|| format!("no {rule} in {rules}"))?;
    found["nftables"]["packets"].as_u64().with_context(|| format!("no count in {found}"))
}
