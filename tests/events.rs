//! Events as server-sent events: ids, resume, and readers that are slow.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::UdpSocket,
    os::unix::net::{UnixDatagram, UnixStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    lab::{Family, Lab},
    wait::{eventually, patience},
};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(5);
const DENIED: u16 = 40003;

const CONFIG: &str = r#"
role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement:
  engines: [ebpf]
  onDeny: drop
  interfaces: {external: [eth0], internal: ["cali*"]}
  events: {rate: 1000000}
rules:
  - {name: api, direction: inbound, protocol: tcp, ports: [40002]}
"#;

/// A stream of server-sent events.
struct Events {
    reader: BufReader<UnixStream>,
    /// Parts of the answer until here, for the message of a failure.
    head: String,
}

#[derive(Debug, Default)]
struct Event {
    id: Option<String>,
    kind: String,
    data: Value,
}

impl Event {
    fn port(&self) -> Option<u64> {
        self.data["destinationPort"].as_u64()
    }
}

fn request(agent: &Agent, path: &str, headers: &[(&str, &str)]) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(agent.socket())?;
    stream.set_read_timeout(Some(patience(DEADLINE)))?;
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: bridge\r\n{headers}\r\n")?;
    Ok(stream)
}

impl Events {
    fn open(agent: &Agent, path: &str, last: Option<&str>) -> Result<Self> {
        let mut headers = vec![("Accept", "text/event-stream")];
        headers.extend(last.map(|id| ("Last-Event-ID", id)));
        let mut reader = BufReader::new(request(agent, path, &headers)?);
        let mut head = String::new();
        // The comment after the head shows that the reader has its position.
        while !head.ends_with(": connected\n") && !head.ends_with(":connected\n") {
            ensure!(reader.read_line(&mut head)? > 0, "no stream: {head}");
        }
        ensure!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
        Ok(Self { reader, head })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).with_context(|| format!("after {}", self.head))?;
        ensure!(line.ends_with('\n'), "the agent ended the stream");
        Ok(line.trim_end().to_owned())
    }

    /// Reads to the end of the next event that is no comment.
    fn next(&mut self) -> Result<Event> {
        let mut event = Event::default();
        loop {
            let line = self.line()?;
            match line.split_once(": ") {
                Some(("id", id)) => event.id = Some(id.to_owned()),
                Some(("event", kind)) => kind.clone_into(&mut event.kind),
                Some(("data", data)) => event.data = serde_json::from_str(data)?,
                // The end of a chunk, or its length, is no line of an event.
                None if line.is_empty() && !event.kind.is_empty() => return Ok(event),
                _ => {}
            }
        }
    }
}

fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn send(lab: &Lab, ports: impl IntoIterator<Item = u16> + Send) -> Result<()> {
    lab.a().netns.run(|| {
        let socket = UdpSocket::bind((lab.a().v4, 0))?;
        ports.into_iter().try_for_each(|port| socket.send_to(b"x", lab.c1().at(Family::V4, port)).map(drop))
    })?;
    Ok(())
}

#[test]
fn a_reader_resumes_where_it_was_cut_also_after_a_restart() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let mut events = Events::open(&agent, "/v1/events", None)?;
    send(&lab, [DENIED])?;
    let first = events.next()?;
    assert_eq!((first.kind.as_str(), first.port()), ("verdict", Some(DENIED.into())), "{first:?}");
    let id = first.id.clone().context("an event without id")?;
    drop(events);

    send(&lab, [DENIED + 1, DENIED + 2])?;
    let mut events = Events::open(&agent, "/v1/events", Some(&id))?;
    let (second, third) = (events.next()?, events.next()?);
    assert_eq!([second.port(), third.port()], [Some(u64::from(DENIED) + 1), Some(u64::from(DENIED) + 2)]);
    ensure!(first.id != second.id && second.id != third.id, "{second:?} {third:?}");

    let mut filtered = Events::open(&agent, &format!("/v1/events?last=9&port={}", DENIED + 2), None)?;
    assert_eq!(filtered.next()?.id, third.id, "a filter selects among the events that are kept");

    let mut refused = String::new();
    let headers = [("Last-Event-ID", "x"), ("Connection", "close")];
    request(&agent, "/v1/events", &headers)?.read_to_string(&mut refused)?;
    ensure!(refused.starts_with("HTTP/1.1 400") && refused.contains("\"last-event-id\""), "{refused}");

    agent.restart()?;
    ensure!(events.next().is_err(), "the stream of a killed agent goes on");
    send(&lab, [DENIED])?;
    let mut events = Events::open(&agent, "/v1/events", third.id.as_deref())?;
    assert_eq!(events.next()?.kind, "restarted");
    // An event that the killed agent had not yet taken off the ring comes again.
    while events.next()?.port() != Some(DENIED.into()) {}
    Ok(())
}

#[test]
fn denied_packets_are_lines_of_the_system_log() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let path = lab.directory().join("log.sock");
    let log = UnixDatagram::bind(&path)?;
    log.set_read_timeout(Some(patience(DEADLINE)))?;
    let line = || -> Result<String> {
        let mut buffer = [0; 2048];
        let length = log.recv(&mut buffer).context("no line of the system log")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    };
    let syslog = format!("  syslog: {{socket: {}, rate: 5}}\nrules:", path.display());
    let mut agent = Agent::start(&lab, lab.b(), &CONFIG.replace("rules:", &syslog))?;
    send(&lab, [DENIED])?;
    let first = line()?;
    let (source, destination) = (lab.a().v4, lab.c1().at(Family::V4, DENIED));
    for part in [
        format!(
            "<28>bridge-agent[{}]: verdict=drop reason=no_rule direction=inbound protocol=udp ",
            agent.pid()
        ),
        format!(" source={source} sourcePort="),
        format!(" destination={} destinationPort={DENIED} interface=eth0 ", destination.ip()),
    ] {
        ensure!(first.contains(&part), "no {part:?} in {first}");
    }
    // Of a flood, a few lines a second, and the number of the others.
    let start = Instant::now();
    send(&lab, std::iter::repeat_n(DENIED, 500))?;
    let (mut lines, mut suppressed) = (0, 0_u64);
    log.set_read_timeout(Some(Duration::from_millis(200)))?;
    while lines + suppressed < 500 {
        // The number comes with the next line.
        send(&lab, [DENIED])?;
        if let Ok(next) = line() {
            lines += 1;
            suppressed +=
                next.rsplit_once(" suppressed=").map_or(Ok(0), |(_, count)| count.parse::<u64>())?;
        }
        ensure!(start.elapsed() < patience(Duration::from_secs(20)), "{lines} lines, {suppressed} left out");
    }
    let most = 5 * (start.elapsed().as_secs() + 2);
    ensure!(lines <= most, "{lines} lines in {:?}", start.elapsed());
    // Without the section, none.
    agent.reload(CONFIG)?;
    log.set_nonblocking(true)?;
    while line().is_ok() {}
    let mut events = Events::open(&agent, "/v1/events", None)?;
    send(&lab, [DENIED + 7])?;
    assert_eq!(events.next()?.port(), Some(u64::from(DENIED) + 7));
    ensure!(line().is_err(), "the agent writes to a log that is no longer configured");
    Ok(())
}

#[test]
fn a_client_that_takes_no_byte_is_disconnected_and_counted() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let agent = Agent::start(&lab, lab.b(), CONFIG)?;
    let stalled = (0..16)
        .map(|_| request(&agent, "/v1/events", &[("Accept", "text/event-stream")]))
        .collect::<Result<Vec<_>>>()?;
    let mut live = Events::open(&agent, &format!("/v1/events?port={DENIED}"), None)?;
    let before = resident_kib(agent.pid())?;
    let counted = |name: &str| -> Result<u64> {
        let metrics = agent.metrics()?;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("{name} in {metrics}"))?.parse()?)
    };
    let mut slowest = Duration::ZERO;
    let cut = eventually(patience(Duration::from_secs(60)), || {
        send(&lab, std::iter::repeat_n(DENIED + 1, 2000)).ok()?;
        let start = Instant::now();
        agent.run(&["status", "--ready"]).ok()?;
        slowest = slowest.max(start.elapsed());
        (counted("bridge_api_stalled_clients_total").ok()? >= 16).then_some(())
    });
    ensure!(cut.is_some(), "stalled clients stay: {}", agent.metrics()?);
    ensure!(counted("bridge_events_missed_total")? > 0, "{}", agent.metrics()?);
    let grown = resident_kib(agent.pid())?.saturating_sub(before);
    ensure!(grown < 8 * 1024, "stalled clients hold {grown} KiB");
    send(&lab, [DENIED])?;
    while live.next()?.kind == "missed" {}
    drop(stalled);
    Ok(())
}
