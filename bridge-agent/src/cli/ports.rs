//! `bridge-agent ports`: leases by hand, and who holds which port.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
};

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::{Error, Global, print, print_json};

/// Source ports: lease, give back, list, watch
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
        id: u64,
    },
    /// Print every port in use, and who has it
    List,
    /// Print leases and refusals as they happen, until interrupted
    Watch,
}

#[derive(Debug, Args)]
struct Acquire {
    /// Where the ports will lead to, such as 192.168.31.67:443
    destination: SocketAddr,
    /// The protocol
    #[arg(long, value_enum, default_value_t)]
    protocol: Protocol,
    /// How many; all or none
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// How long to wait for them, such as 500ms or 5s
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time)]
    wait: u64,
    /// How long to hold them, at most 24h
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = time)]
    hold: u64,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// Milliseconds.
fn time(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[split..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("write a number and ms, s, m or h, such as 500ms".into()),
    };
    let number: u64 = text[..split].parse().map_err(|_| "write a number and a unit, such as 500ms")?;
    number.checked_mul(unit).ok_or_else(|| "that is longer than anything lasts".into())
}

impl Ports {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match &self.action {
            Action::Acquire(acquire) => acquire.run(global),
            Action::Release { id } => {
                ask(global, "DELETE", &format!("/v1/leases/{id}"), None)?;
                if global.json { print_json(&json!({ "released": id })) } else { Ok(()) }
            }
            Action::List => {
                let answer = ask(global, "GET", "/v1/leases", None)?;
                if global.json { print_json(&answer) } else { print(&table(&answer)) }
            }
            Action::Watch => watch(global),
        }
    }
}

impl Acquire {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let body = json!({
            "destination": self.destination,
            "protocol": match self.protocol { Protocol::Tcp => "tcp", Protocol::Udp => "udp" },
            "count": self.count,
            "waitMs": self.wait,
            "ttlMs": self.hold,
        });
        let answer = ask(global, "POST", "/v1/leases", Some(&body))?;
        if global.json {
            return print_json(&answer);
        }
        let line = |lease: &Value| format!("{} (lease {})\n", lease["port"], lease["id"]);
        print(&answer["leases"].as_array().into_iter().flatten().map(line).collect::<String>())
    }
}

fn table(answer: &Value) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["PORT", "DESTINATION", "KIND", "PID", "COMMAND", "CGROUP OR POD", "AGE"]);
    for port in answer["ports"].as_array().into_iter().flatten() {
        let text = |name: &str| match &port[name] {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let destination = format!("{} {}", text("protocol"), text("destination"));
        let kind = if port["id"].is_u64() { format!("lease {}", text("id")) } else { text("kind") };
        let place = if port["pod"].is_string() { format!("pod {}", text("pod")) } else { text("cgroup") };
        let age = format!("{:.1} s", port["ageMs"].as_f64().unwrap_or_default() / 1000.0);
        table.add_row([text("port"), destination, kind, text("pid"), text("command"), place, age]);
    }
    format!("{table}\n")
}

fn watch(global: &Global) -> Result<(), Error> {
    let mut reader = BufReader::new(send(global, "GET", "/v1/leases/watch", None)?);
    head(global, &mut reader)?;
    for line in reader.lines() {
        let line = line.map_err(|source| gone(global, source))?;
        print(&format!("{line}\n"))?;
    }
    Err(gone(global, io::ErrorKind::UnexpectedEof.into()))
}

/// Asks the agent, and answers with the JSON of a success.
fn ask(global: &Global, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Error> {
    let mut reader = BufReader::new(send(global, method, path, body)?);
    let status = head(global, &mut reader)?;
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(|source| gone(global, source))?;
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    if (200..300).contains(&status) {
        return Ok(answer);
    }
    let reason = answer["error"].as_str().map_or_else(|| format!("status {status}"), str::to_owned);
    Err(Error::Ports(reason))
}

/// Version 1.0: the agent ends the connection after the answer, and does not send it in chunks.
fn send(global: &Global, method: &str, path: &str, body: Option<&Value>) -> Result<UnixStream, Error> {
    let body = body.map(ToString::to_string).unwrap_or_default();
    let mut stream = UnixStream::connect(global.agent_socket()).map_err(|source| gone(global, source))?;
    let length = body.len();
    // In one write: an agent that refuses a request by its head does not wait for the rest.
    let request = format!("{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).map_err(|source| gone(global, source))?;
    Ok(stream)
}

/// Reads the head of an answer; its status.
fn head(global: &Global, reader: &mut BufReader<UnixStream>) -> Result<u16, Error> {
    let mut lines = reader.lines().map_while(Result::ok);
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    lines.find(String::is_empty);
    status.ok_or_else(|| gone(global, io::ErrorKind::InvalidData.into()))
}

fn gone(global: &Global, source: io::Error) -> Error {
    Error::Ports(format!(
        "no agent answers on {}: {source}; is it running (`systemctl status bridge-agent`), has its configuration a \
         portPool, and may this user open the socket?",
        global.agent_socket().display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit() {
        assert_eq!(time("500ms"), Ok(500));
        assert_eq!(time("2h"), Ok(7_200_000));
        for bad in ["", "5", "s", "-1s", "1.5s", "99999999999999999h"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
