//! `bridge-agent bugreport`: one archive with all that a maintainer asks for.

mod redact;

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};

use self::redact::Redactor;
use super::{
    Error, Global, block_on, doctor, get,
    output::{Output, print, print_json},
};
use crate::{
    api::client::Client,
    config,
    datapath::{FlowFilter, Maps},
    iptables::Programs,
};

/// Flows in the report.
const MAX_FLOWS: usize = 1000;
/// Events in the report.
const MAX_EVENTS: usize = 100;
/// Time without a further event after which they are complete.
const EVENTS_PAUSE: Duration = Duration::from_millis(300);
/// Largest output of one command, in bytes.
const MAX_OUTPUT: usize = 4 << 20;

/// Commands whose output is in the report: its file, the program and its arguments.
const COMMANDS: [(&str, &str, &[&str]); 13] = [
    ("links.txt", "ip", &["-details", "-statistics", "link"]),
    ("addresses.txt", "ip", &["address"]),
    ("routes.txt", "ip", &["-details", "route", "show", "table", "all"]),
    ("routes6.txt", "ip", &["-6", "-details", "route", "show", "table", "all"]),
    ("rules.txt", "ip", &["rule"]),
    ("neighbours.txt", "ip", &["neighbour"]),
    ("nft.txt", "nft", &["list", "ruleset"]),
    ("iptables.txt", "iptables-save", &["-c"]),
    ("ip6tables.txt", "ip6tables-save", &["-c"]),
    ("bpf-programs.txt", "bpftool", &["prog", "show"]),
    ("bpf-net.txt", "bpftool", &["net", "show"]),
    ("sysctl.txt", "sysctl", &["net.ipv4", "net.netfilter"]),
    ("log.txt", "journalctl", &["--unit=bridge-agent", "--lines=1000", "--no-pager"]),
];

/// Collect status, configuration, rules, routes, events and doctor in one file.
///
/// Works with and without a running agent. Tokens and keys are never in it; with --redact, no address and no name either.
#[derive(Debug, Args)]
pub struct Bugreport {
    /// Replace each address, host and pod by a pseudonym, the same everywhere in the report
    #[arg(long)]
    redact: bool,
}

/// The files of the report, in their order.
struct Report(Vec<(&'static str, String)>);

impl Report {
    fn add(&mut self, name: &'static str, content: &Value) {
        let text = serde_json::to_string_pretty(content).unwrap_or_else(|error| error.to_string());
        self.0.push((name, text + "\n"));
    }

    /// Adds a result, or the reason why there is none.
    fn add_result(&mut self, name: &'static str, content: Result<Value, String>) {
        self.add(name, &content.unwrap_or_else(|error| json!({ "missing": error })));
    }
}

impl Bugreport {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let path = match &global.output {
            Some(Output::File(path)) => path.clone(),
            _ => PathBuf::from("bridge-report.tar.gz"),
        };
        let mut report = collect(global);
        let mut redactor = Redactor::new(self.redact).map_err(failed(&path))?;
        for (_, text) in &report.0 {
            redactor.learn(text);
        }
        for (_, text) in &mut report.0 {
            *text = redactor.redact(text);
        }
        write(&path, &report).map_err(failed(&path))?;
        let files = report.0.len();
        if global.json {
            return print_json(&json!({ "ok": true, "file": path, "files": files, "redacted": self.redact }));
        }
        let advice = if self.redact { "" } else { "; it has addresses and names, --redact replaces them" };
        print(&format!("wrote {files} files into {}{advice}\n", path.display()))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    |source| Error::Named { action: "cannot write", path: path.to_owned(), source }
}

fn collect(global: &Global) -> Report {
    let mut report = Report(Vec::new());
    report.add("versions.json", &versions());
    report.add_result("status.json", ask(global, "/v1/status"));
    report.0.push((
        "config.yaml",
        std::fs::read_to_string(&global.config).unwrap_or_else(|error| error.to_string()),
    ));
    let effective = config::load(&global.config).map(|loaded| loaded.config.effective().to_yaml());
    if let Ok(Ok(yaml)) = effective {
        report.0.push(("config-effective.yaml", yaml));
    }
    report.add_result("maps.json", maps(global));
    report.add_result("rules.json", ask(global, "/v1/rules"));
    report.add_result("routes.json", ask(global, "/v1/routes"));
    report.add_result("names.json", ask(global, "/v1/names"));
    report.add_result("leases.json", ask(global, "/v1/leases"));
    report.add_result("pool.json", ask(global, "/v1/pool"));
    report.add_result("events.json", events(global));
    report.add("doctor.json", &json!(doctor::examine_all(global)));
    for (name, program, arguments) in COMMANDS {
        report.0.push((name, output(program, arguments)));
    }
    report
}

fn versions() -> Value {
    let uname = rustix::system::uname();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "kernel": uname.release().to_string_lossy(),
        "machine": uname.machine().to_string_lossy(),
        "host": uname.nodename().to_string_lossy(),
        "iptables": output("iptables", &["--version"]).trim(),
        "nft": output("nft", &["--version"]).trim(),
        "ip": output("ip", &["-V"]).trim(),
    })
}

/// Asks the agent.
fn ask(global: &Global, path: &str) -> Result<Value, String> {
    get(global, path).map_err(|error: Error| error.to_string())
}

/// The last events that the agent has kept.
fn events(global: &Global) -> Result<Value, String> {
    let mut events = Vec::new();
    let read = block_on(async {
        let mut client = Client::connect(&global.agent_socket()).await?;
        let path = format!("/v1/events?last={MAX_EVENTS}");
        let lines = client.lines(&path, |line| {
            events.extend(serde_json::from_slice::<Value>(line).ok());
            Ok::<_, Error>(events.len() < MAX_EVENTS)
        });
        // The stream goes on with new events.
        tokio::time::timeout(EVENTS_PAUSE, lines).await.unwrap_or(Ok(()))
    });
    read.map_err(|error: Error| error.to_string())?;
    Ok(events.into())
}

/// A summary of the pinned maps.
fn maps(global: &Global) -> Result<Value, String> {
    let read = || -> crate::datapath::Result<Value> {
        let maps = Maps::open(&global.pins())?;
        let settings = maps.active_settings()?;
        let mut flows = Vec::new();
        maps.for_each_flow(&FlowFilter::default(), |flow| {
            if flows.len() < MAX_FLOWS {
                flows.push(flow);
            }
        })?;
        Ok(json!({
            "generation": settings.generation,
            "audit": settings.audit != 0,
            "interfaces": maps.attached_interfaces()?,
            "flowCounts": maps.count_flows()?,
            "counters": maps.reason_counts()?,
            "outcomes": maps.outcome_counts()?,
            "rules": maps.rule_counts()?,
            "flows": flows,
        }))
    };
    read().map_err(|error| error.to_string())
}

/// Output of a program with its errors; the reason where it cannot be run.
fn output(program: &str, arguments: &[&str]) -> String {
    let Some(path) = Programs::default().find(program) else {
        return format!("{program} is not installed\n");
    };
    match Command::new(path).args(arguments).stdin(Stdio::null()).output() {
        Err(error) => format!("{program} cannot be run: {error}\n"),
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text += &String::from_utf8_lossy(&output.stderr);
            let end = (0..=MAX_OUTPUT.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or(0));
            text
        }
    }
}

/// Writes the archive, readable by its owner only.
fn write(path: &Path, report: &Report) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    for (name, text) in &report.0 {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len().try_into().unwrap_or(u64::MAX));
        header.set_mode(0o600);
        archive.append_data(&mut header, Path::new("bridge-report").join(name), text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.flush()
}
