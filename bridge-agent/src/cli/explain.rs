//! `bridge-agent explain`: why a connection passes or does not, and the rule that would allow it.

use std::fmt::Write as _;
use std::net::IpAddr;

use clap::Args;

use super::{Error, Global, print, print_json};
use crate::config;
use crate::explain::{Explanation, Nearly, Offline, ParseError, Protocol, Request, StageOutcome, explain};

/// Explain why a connection passes or does not.
///
/// Shows each step with the fact that counts, the rules that miss the connection by one
/// criterion, and the rule that would allow it. Exit code 0, whatever the verdict.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  bridge-agent explain 192.168.31.67 10.200.1.91:8080
  bridge-agent explain 10.200.1.91:61001 192.168.31.67:502 --json
  bridge-agent explain 192.168.31.67 172.16.0.10:443 --backend 10.200.1.91:8443")]
pub struct Explain {
    /// The end that opens it: ADDRESS or ADDRESS:PORT
    #[arg(value_name = "FROM")]
    from: String,
    /// The end it is opened to: ADDRESS:PORT; for ICMP, ADDRESS
    #[arg(value_name = "TO")]
    to: String,
    /// The protocol: tcp, udp, sctp, icmp, icmpv6, or a number
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    protocol: Protocol,
    /// The client's port; left out, any that the client may get
    #[arg(long, value_name = "PORT")]
    source_port: Option<u16>,
    /// The end behind TO, if the node translates it (Service, hostPort)
    #[arg(long, value_name = "ADDRESS:PORT")]
    backend: Option<String>,
    /// An address of the node itself, for NodePorts; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    local: Vec<IpAddr>,
}

impl From<ParseError> for Error {
    fn from(error: ParseError) -> Self {
        Self::Question(error.to_string())
    }
}

impl Explain {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let request = Request {
            from: self.from.clone(),
            to: self.to.clone(),
            protocol: Some(self.protocol),
            source_port: self.source_port,
            backend: self.backend.clone(),
        };
        let question = request.resolve(&|_, _| None)?;
        let config = config::load(&global.config)?.config;
        let node = Offline::new(&config, self.local.clone());
        let explanation = node.with_facts(&question, |facts| explain(facts, &question));
        if global.json {
            return print_json(&explanation);
        }
        let from = format!("by {}; the state of a node is not asked", global.config.display());
        print(&text(&explanation, &from))
    }
}

/// Returns an explanation for people.
pub(super) fn text(explanation: &Explanation, from: &str) -> String {
    let mut text = format!("{}\n  ({from})\n\n", explanation.question);
    let width = explanation.stages.iter().map(|stage| stage.name.len()).max().unwrap_or_default();
    for stage in &explanation.stages {
        let sign = match stage.outcome {
            StageOutcome::Ok => "  ",
            StageOutcome::Deny => "x ",
            StageOutcome::Unknown => "? ",
        };
        let why = if stage.why.is_empty() { String::new() } else { format!("  ({})", stage.why) };
        // A String takes any text.
        let _ = writeln!(text, "{sign}{:width$}  {}{why}", stage.name, stage.seen);
    }
    let _ = writeln!(text, "\n{}", explanation.summary);
    if !explanation.nearly.is_empty() {
        text += "\nNearly:\n";
        for Nearly { rule, criterion, has, asked } in &explanation.nearly {
            let criterion = serde_json::to_value(criterion).ok();
            let criterion = criterion.as_ref().and_then(|value| value.as_str()).unwrap_or_default();
            let _ = writeln!(text, "  {rule}: all but {criterion}, which is {has}; asked for {asked}");
        }
    }
    if let Some(remedy) = &explanation.remedy {
        let _ = writeln!(text, "\nTo allow it: {}", remedy.text);
        for (name, lines) in [("bridge.yaml", &remedy.config), ("BridgePolicy", &remedy.policy)] {
            if let Some(lines) = lines {
                let _ = writeln!(text, "\n# {name}\n{}", lines.trim_end());
            }
        }
    }
    text
}
