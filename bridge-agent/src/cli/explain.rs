//! `bridge-agent explain`: why a connection passes or does not, and the rule that would allow it.

use std::fmt::Write as _;
use std::io::BufRead as _;
use std::net::IpAddr;
use std::path::Path;

use clap::Args;

use super::{Error, Global, block_on, print, print_json, values};
use crate::api::{
    Ask,
    client::{self, Client},
};
use crate::config::{self, CgroupPath, Config, Role, leaf::Leaf as _};
use crate::explain::{
    Explanation, Nearly, Offline, ParseError, Protocol, Question, Request, RouteFacts, StageOutcome, end,
    explain, on_host,
};
use crate::interfaces::{Observer, Selection};
use crate::kernel::netlink::{Packet, Route, Way};
use crate::pool::process::{Process, ProcessError};
use crate::routes::{Comparison, Setup};

/// Explain why a connection passes or does not.
///
/// Shows each step with the fact that counts, the rules that miss the connection by one
/// criterion, and the rule that would allow it. Exit code 0, whatever the verdict.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  bridge-agent explain 192.168.31.67 10.200.1.91:8080
  bridge-agent explain pod/shop/web 192.168.31.67:502 --json
  bridge-agent explain --pid 4711 192.168.31.67:502
  bridge-agent explain --last-denied
  bridge-agent monitor --json --count 1 | bridge-agent explain -
  bridge-agent explain 192.168.31.67 172.16.0.10:443 --backend 10.200.1.91:8443")]
pub struct Explain {
    /// The end that opens it: ADDRESS[:PORT] or pod/NAMESPACE/NAME[:PORT]; or
    /// alone a line of `monitor --json`, `-` to read it from standard input
    #[arg(value_name = "FROM", required_unless_present = "last_denied")]
    from: Option<String>,
    /// The end it is opened to: as FROM, with a port where there are ports
    #[arg(value_name = "TO")]
    to: Option<String>,
    /// Explain the latest denied packet of the running agent
    #[arg(long, conflicts_with_all = ["from", "to", "backend", "source_port", "pid", "cgroup"])]
    last_denied: bool,
    /// Ask no agent: the configuration file alone
    #[arg(long, conflicts_with = "last_denied")]
    offline: bool,
    /// The protocol: tcp, udp, sctp, icmp, icmpv6, or a number
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    protocol: Protocol,
    /// The client's port; left out, any that the client may get
    #[arg(long, value_name = "PORT", value_parser = values::port)]
    source_port: Option<u16>,
    /// The end behind TO, if the node translates it (Service, hostPort)
    #[arg(long, value_name = "ADDRESS:PORT")]
    backend: Option<String>,
    /// The process that opens it: whether the port pool sees it, and the ports it
    /// may get; FROM may be left out then
    #[arg(long, value_name = "PID", conflicts_with = "cgroup", value_parser = values::number::<u32>)]
    pid: Option<u32>,
    /// The control group of that process instead, by its path below the mount
    #[arg(long, value_name = "PATH", value_parser = cgroup)]
    cgroup: Option<CgroupPath>,
    /// An address of the node itself, for NodePorts; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    local: Vec<IpAddr>,
}

fn cgroup(text: &str) -> Result<CgroupPath, String> {
    CgroupPath::parse(text).map_err(|problem| format!("{}; {}", problem.message, problem.help))
}

impl From<ProcessError> for Error {
    fn from(error: ProcessError) -> Self {
        Self::Question(error.to_string())
    }
}

impl From<ParseError> for Error {
    fn from(error: ParseError) -> Self {
        Self::Question(error.to_string())
    }
}

impl Explain {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let ask = self.ask()?;
        let socket = global.agent_socket();
        let live = if self.offline { None } else { block_on(live(&socket, &ask))? };
        let (explanation, origin) = match live {
            Some(explanation) => (explanation, format!("by the agent on {}", socket.display())),
            None => (self.of_file(&ask, global)?, {
                format!("by {}, without a running agent", global.config.display())
            }),
        };
        if global.json {
            return print_json(&explanation);
        }
        print(&text(&explanation, &origin))
    }

    /// Reads the arguments.
    fn ask(&self) -> Result<Ask, Error> {
        let process = self.pid.map(Process::of).transpose()?;
        let (from, to) = match (&self.from, &self.to, &process) {
            (Some(from), Some(to), _) => (from.clone(), to.clone()),
            (Some(to), None, Some(process)) => (addresses(process, to)?, to.clone()),
            (Some(_), None, None) if self.cgroup.is_some() => {
                return Err(Error::Question(
                    "--cgroup needs FROM and TO: a control group has no address".to_owned(),
                ));
            }
            (Some(line), None, None) => return event(line),
            _ => return Ok(Ask { last_denied: true, ..Ask::default() }),
        };
        let cgroup = self.cgroup.as_ref().map(|group| group.as_str().to_owned());
        let connection = Request {
            protocol: Some(self.protocol),
            source_port: self.source_port,
            backend: self.backend.clone(),
            cgroup: process.as_ref().map(|process| process.cgroup.clone()).or(cgroup),
            process: process.map(|process| format!("pid {} ({})", process.pid, process.command)),
            ..Request::new(from, to)
        };
        Ok(Ask { connection: Some(connection), ..Ask::default() })
    }

    /// Compares the routes of a LAN host with the kernel, without its agent.
    fn on_host(
        &self,
        config: &Config,
        host: &Offline,
        question: &Question,
        global: &Global,
    ) -> Result<Explanation, Error> {
        let snapshot = match &config.routes {
            None => None,
            Some(_) => {
                let setup = Setup::offline(config, &global.state_directory().boot())?;
                Some(Comparison::new(&setup)?.snapshot())
            }
        };
        let read = |source| Error::Process { action: "the addresses of this host cannot be read", source };
        let observed = Observer::open()
            .and_then(|mut observer| observer.snapshot(&Selection::default()))
            .map_err(read)?;
        let local: Vec<IpAddr> = observed.addresses.iter().chain(&self.local).copied().collect();
        let ways = |to: IpAddr| {
            let kernel = Route::open().and_then(|mut route| route.way(to, &Packet::default()));
            RouteFacts::new(to, snapshot.as_ref(), kernel)
        };
        Ok(on_host(question, &local, host.pool_facts(), &ways))
    }

    fn of_file(&self, ask: &Ask, global: &Global) -> Result<Explanation, Error> {
        let request = match (&ask.connection, &ask.event) {
            (Some(request), _) => request.clone(),
            (None, Some(event)) => Request::of_event(event)?,
            (None, None) => {
                let text = format!(
                    "no agent answers on {}, and only a running agent knows the latest denied packet: start it, or name \
                     its --socket",
                    global.agent_socket().display()
                );
                return Err(Error::Question(text));
            }
        };
        let question = request.resolve(&())?;
        let config = config::load(&global.config)?.config;
        let node = Offline::new(&config, self.local.clone()).with_client_of(&request);
        let mut explanation = match config.role {
            Role::Node => node.with_facts(&question, |facts| explain(facts, &question)),
            Role::Host => self.on_host(&config, &node, &question, global)?,
        };
        if let Some(event) = &ask.event {
            explanation.note_event(event);
        }
        Ok(explanation)
    }
}

/// Returns the addresses that a process connects from, with commas between them. On this host: the one that the kernel takes.
fn addresses(process: &Process, to: &str) -> Result<String, Error> {
    if let (true, Ok((to, _))) = (process.is_here, end(to))
        && let Ok(Way { source: Some(source), .. }) =
            Route::open().and_then(|mut route| route.way(to, &Packet::default()))
    {
        return Ok(source.to_string());
    }
    if process.addresses.is_empty() {
        let text = format!("process {} has no address that others can reach: write FROM and TO", process.pid);
        return Err(Error::Question(text));
    }
    let each: Vec<String> = process.addresses.iter().map(ToString::to_string).collect();
    Ok(each.join(","))
}

/// Reads a line of `monitor --json`.
fn event(line: &str) -> Result<Ask, Error> {
    let mut text = line.to_owned();
    if line == "-" {
        text.clear();
        let read = std::io::stdin().lock().read_line(&mut text);
        read.map_err(|source| Error::Stream { action: "cannot read standard input", source })?;
    }
    let text = text.trim();
    let help = "write FROM and TO, or a line of `bridge-agent monitor --json`";
    let event = serde_json::from_str(text).map_err(|error| {
        Error::Question(match text {
            "" => format!("standard input has no event: {help}"),
            one if !one.starts_with('{') => {
                format!("`{one}` is one end of a connection, or no event: {help}")
            }
            _ => format!("`{text}` is no event ({error}): {help}"),
        })
    })?;
    Ok(Ask { event: Some(event), ..Ask::default() })
}

/// Asks the agent; `None`: none runs, or this user may not ask it.
async fn live(socket: &Path, ask: &Ask) -> Result<Option<Explanation>, Error> {
    match Client::connect(socket).await {
        Ok(mut client) => Ok(Some(client.post("/v1/explain", ask).await?)),
        Err(client::Error::NotRunning { .. }) => Ok(None),
        Err(error) => Err(error.into()),
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
