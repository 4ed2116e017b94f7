//! `bridge-agent ports`: leases by hand, and who holds which port.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{
    Error, Global, block_on,
    names::NoNames,
    output::{Watch, print, print_json, reader_left},
    table, time, values,
};
use crate::api::client::{self, Client};

/// Lease source ports, give them back, list them, watch them.
#[derive(Debug, Args)]
pub struct Ports {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Lease ports towards a destination, and print them
    Acquire(Acquire),
    /// Give a lease back
    Release {
        /// The number that `acquire` and `list` print
        #[arg(value_parser = values::number::<u64>)]
        id: u64,
    },
    /// Print every port in use, and who has it
    List(List),
    /// Print leases and refusals as they happen, until interrupted
    Watch,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    names: NoNames,
}

#[derive(Debug, Args)]
struct Acquire {
    /// Where the ports will lead to, such as 192.168.31.67:443
    #[arg(value_parser = destination)]
    destination: SocketAddr,
    /// The protocol
    #[arg(long, value_enum, default_value_t)]
    protocol: Protocol,
    /// How many; all or none
    #[arg(long, default_value_t = 1, value_parser = values::number::<u32>)]
    count: u32,
    /// How long to wait for them, such as 500ms or 5s
    #[arg(long, value_name = "TIME", value_parser = time)]
    wait: Option<Duration>,
    /// How long to hold them, at most 24h
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = time)]
    hold: Duration,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// Reads an address and a port.
fn destination(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => {
            Err(format!("the port is missing: write for example {}", SocketAddr::new(address, 443)))
        }
        Err(_) => values::socket_address(text),
    }
}

/// Milliseconds, as the API takes them.
fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Ports {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match &self.action {
            Action::Acquire(acquire) => acquire.run(global),
            Action::Release { id } => {
                ask(global, async |client| client.delete(&format!("/v1/leases/{id}")).await)?;
                if global.json {
                    print_json(&json!({ "released": id }))
                } else {
                    print(&format!("Released lease {id}.\n"))
                }
            }
            Action::List(list) => list.watch.repeat(|| {
                let mut answer: Value = ask(global, async |client| client.get("/v1/leases").await)?;
                let names = list.names.names(global);
                for port in answer["ports"].as_array_mut().into_iter().flatten() {
                    let named = names.annotate(port).map_err(|error| Error::Format(error.to_string()))?;
                    *port = named;
                    let pod = port["pod"].as_str().and_then(|uid| names.pod(uid)).map(str::to_owned);
                    if let (Some(pod), Some(fields)) = (pod, port.as_object_mut()) {
                        fields.insert("podName".to_owned(), pod.into());
                    }
                }
                if global.json { print_json(&answer) } else { print(&table(&answer, global.wide())) }
            }),
            Action::Watch => block_on(watch(global)),
        }
    }
}

impl Acquire {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let body = json!({
            "destination": self.destination,
            "protocol": match self.protocol { Protocol::Tcp => "tcp", Protocol::Udp => "udp" },
            "count": self.count,
            "waitMs": self.wait.map_or(0, milliseconds),
            "ttlMs": milliseconds(self.hold),
        });
        let answer: Value = ask(global, async |client| client.post("/v1/leases", &body).await)?;
        if global.json {
            return print_json(&answer);
        }
        let line = |lease: &Value| format!("{} (lease {})\n", lease["port"], lease["id"]);
        print(&answer["leases"].as_array().into_iter().flatten().map(line).collect::<String>())
    }
}

fn table(answer: &Value, wide: bool) -> String {
    let mut columns = vec!["port", "destination", "kind", "pid", "command", "cgroup or pod", "age"];
    if wide {
        columns.extend(["uid", "lease", "cgroup"]);
    }
    let mut table = table::table(&columns);
    for port in answer["ports"].as_array().into_iter().flatten() {
        let text = |name: &str| match &port[name] {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let named = port["destinationName"].as_str().map(|name| format!(" ({name})")).unwrap_or_default();
        let destination = format!("{} {}{named}", text("protocol"), text("destination"));
        let kind = if port["id"].is_u64() { format!("lease {}", text("id")) } else { text("kind") };
        let place = match (&port["podName"], &port["pod"]) {
            (Value::String(name), _) => format!("pod {name}"),
            (_, Value::String(uid)) => format!("pod {uid}"),
            _ => text("cgroup"),
        };
        let age = format!("{:.1} s", port["ageMs"].as_f64().unwrap_or_default() / 1000.0);
        let mut row = vec![text("port"), destination, kind, text("pid"), text("command"), place, age];
        if wide {
            row.extend([text("uid"), text("id"), text("cgroup")]);
        }
        table.add_row(row);
    }
    table::render(&table)
}

async fn watch(global: &Global) -> Result<(), Error> {
    let mut client = Client::connect(&global.agent_socket()).await?;
    client
        .lines("/v1/leases/watch", |line| {
            let line = String::from_utf8_lossy(line);
            match (global.json, serde_json::from_str::<Value>(&line)) {
                (false, Ok(event)) => print(&format!("{}\n", sentence(&event)))?,
                _ => print(&format!("{line}\n"))?,
            }
            Ok::<_, Error>(!reader_left())
        })
        .await
}

/// A change of a lease for people: its kind, then its fields.
fn sentence(event: &Value) -> String {
    let mut text = event["event"].as_str().unwrap_or("event").to_owned();
    for (name, value) in event.as_object().into_iter().flatten().filter(|(name, _)| *name != "event") {
        text += &match value {
            Value::String(value) => format!(" {name}={value}"),
            Value::Null => continue,
            value => format!(" {name}={value}"),
        };
    }
    text
}

/// Asks the agent once.
fn ask<T>(
    global: &Global,
    question: impl AsyncFnOnce(&mut Client) -> Result<T, client::Error>,
) -> Result<T, Error> {
    block_on(async { Ok(question(&mut Client::connect(&global.agent_socket()).await?).await?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_without_a_port_is_refused_with_one_that_has_it() {
        assert_eq!(destination("192.168.31.67:443"), Ok("192.168.31.67:443".parse().unwrap()));
        for (wrong, right) in [
            ("192.168.31.67", "192.168.31.67:443"),
            ("fd31::67", "[fd31::67]:443"),
            ("192.168.31.67:0", "has port 0"),
            ("192.168.31.67:0443", "192.168.31.67:443"),
            ("plc.example:502", "write ADDRESS:PORT"),
            ("", "write ADDRESS:PORT"),
        ] {
            let said = destination(wrong).unwrap_err();
            assert!(said.contains(right), "{wrong}: {said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }

    #[test]
    fn a_change_of_a_lease_reads_as_a_line() {
        let event = json!({ "event": "acquired", "id": 7, "port": 61001, "pod": null, "destination": "192.168.31.67:443" });
        assert_eq!(sentence(&event), "acquired destination=192.168.31.67:443 id=7 port=61001");
    }
}
