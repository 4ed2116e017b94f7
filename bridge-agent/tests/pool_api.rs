//! The lease API over its unix socket, with ports from the agent's own memory: its answers conform to
//! docs/openapi.json, a lease ends when it should, and no input does harm.

mod openapi;
mod server;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    sync::Arc,
    time::{Duration, Instant},
};

use bridge_agent::{
    api::{self, Server},
    config::{self, leaf::FileMode},
    model::PortRange,
    pool::{Layout, Settings, backend::Backend, layout::Occupied, run, service::Service},
    state::{Request, Shared, Status},
};
use openapi::documented;
use proptest::prelude::*;
use serde_json::{Value, json};
use server::{Served, serve};

struct Agent {
    served: Served,
    service: Arc<Service>,
    shared: Shared,
    /// The end that a run loop has.
    _requests: tokio::sync::mpsc::Receiver<Request>,
}

impl Agent {
    fn start(ports: PortRange, quota: Option<u32>) -> Self {
        let settings = Settings {
            ports: vec![ports],
            destinations: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            quota,
            bind_udp: false,
            ..Settings::default()
        };
        let layout = Layout::plan(&settings, &Occupied::default()).unwrap();
        let service = Service::new(Backend::userspace(layout, Duration::ZERO), settings.destinations);
        let (shared, requests) = Shared::new(Status::default());
        shared.set_pool(Some(Arc::clone(&service)));
        let served = serve(&access(0o600), shared.clone(), run::expire(Arc::clone(&service)));
        Self { served, service, shared, _requests: requests }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.served.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// Sends one request on a connection of its own.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        ask(&mut self.connect(), method, path, body)
    }

    fn leases(&self) -> usize {
        self.service.list().unwrap().len()
    }

    fn becomes_empty(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.leases() > 0 {
            assert!(Instant::now() < deadline, "{} leases are left", self.leases());
            std::thread::yield_now();
        }
    }
}

fn access(mode: u32) -> config::Api {
    config::Api { mode: FileMode(mode), ..config::Api::default() }
}

/// Sends a request and reads its answer; the connection stays open.
fn ask(stream: &mut UnixStream, method: &str, path: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    // In one write: an agent that refuses a request by its head does not wait for the rest.
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let value = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    documented(method, path, status, &value);
    (status, value)
}

const TO: &str = r#"{"destination":"192.0.2.1:443"}"#;

fn range(first: u16, last: u16) -> PortRange {
    PortRange { first, last }
}

#[test]
fn a_lease_ends_with_its_connection() {
    let agent = Agent::start(range(61001, 61002), None);
    let mut connection = agent.connect();
    let (status, answer) = ask(&mut connection, "POST", "/v1/leases", TO);
    assert_eq!(status, 201, "{answer}");
    assert!((61001..=61002).contains(&answer["leases"][0]["port"].as_u64().unwrap()));
    let (_, list) = agent.ask("GET", "/v1/leases", "");
    assert_eq!(list["ports"][0]["pid"], std::process::id());
    assert_eq!(list["ports"][0]["kind"], "lease");
    assert_eq!(agent.leases(), 1);
    drop(connection);
    agent.becomes_empty();
}

#[test]
fn a_lease_with_a_time_outlives_its_connection_and_not_its_time() {
    let agent = Agent::start(range(61001, 61001), None);
    let start = Instant::now();
    let (status, answer) = agent.ask("POST", "/v1/leases", r#"{"destination":"192.0.2.1:443","ttlMs":400}"#);
    assert_eq!(status, 201, "{answer}");
    let (status, full) = agent.ask("POST", "/v1/leases", TO);
    assert_eq!((status, full["code"].as_str()), (409, Some("exhausted")), "{full}");
    agent.becomes_empty();
    assert!(start.elapsed() >= Duration::from_millis(400));
}

#[test]
fn a_release_frees_the_port_for_whoever_waits() {
    let agent = Agent::start(range(61001, 61001), None);
    let mut holder = agent.connect();
    let id = ask(&mut holder, "POST", "/v1/leases", TO).1["leases"][0]["id"].as_u64().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let mut connection = agent.connect();
            ask(&mut connection, "POST", "/v1/leases", r#"{"destination":"192.0.2.1:443","waitMs":5000}"#)
        });
        let start = Instant::now();
        assert_eq!(agent.ask("DELETE", &format!("/v1/leases/{id}"), "").0, 204);
        assert_eq!(waiter.join().unwrap().0, 201);
        assert!(start.elapsed() < Duration::from_secs(4));
    });
    assert_eq!(agent.ask("DELETE", &format!("/v1/leases/{id}"), "").0, 404);
    agent.becomes_empty();
}

#[test]
fn a_full_pool_answers_at_once_or_after_the_wait_and_keeps_nothing() {
    let agent = Agent::start(range(61001, 61003), None);
    let mut holder = agent.connect();
    let two = r#"{"destination":"192.0.2.1:443","count":2}"#;
    assert_eq!(ask(&mut holder, "POST", "/v1/leases", two).0, 201);
    let start = Instant::now();
    assert_eq!(agent.ask("POST", "/v1/leases", two).0, 409, "all or none");
    assert!(start.elapsed() < Duration::from_millis(200));
    assert_eq!(agent.leases(), 2);
    let waiting = r#"{"destination":"192.0.2.1:443","count":2,"waitMs":300}"#;
    let start = Instant::now();
    assert_eq!(agent.ask("POST", "/v1/leases", waiting).0, 409);
    assert!(start.elapsed() >= Duration::from_millis(300));
    // Towards another destination, and with another protocol, the same ports are free.
    let udp = r#"{"destination":"192.0.2.1:443","protocol":"udp","count":3,"ttlMs":60000}"#;
    assert_eq!(agent.ask("POST", "/v1/leases", udp).0, 201);
    let v6 = r#"{"destination":"[2001:db8::1]:443","count":3,"ttlMs":60000}"#;
    assert_eq!(agent.ask("POST", "/v1/leases", v6).0, 201);
    // A v4-mapped address is the IPv4 address.
    let mapped = r#"{"destination":"[::ffff:192.0.2.1]:443","count":2}"#;
    assert_eq!(agent.ask("POST", "/v1/leases", mapped).0, 409);
}

#[test]
fn a_quota_is_not_exhaustion() {
    let agent = Agent::start(range(61001, 61010), Some(2));
    let (status, answer) = agent.ask("POST", "/v1/leases", r#"{"destination":"192.0.2.1:443","count":3}"#);
    assert_eq!((status, answer["code"].as_str()), (429, Some("quota")), "{answer}");
    assert_eq!(agent.leases(), 0);
}

#[test]
fn one_client_has_a_share_of_the_leases_over_all_destinations() {
    let agent = Agent::start(range(61001, 64000), None);
    let acquire = |to: u32, count: u32| {
        let body = format!(r#"{{"destination":"192.0.2.{to}:443","count":{count},"ttlMs":86400000}}"#);
        agent.ask("POST", "/v1/leases", &body)
    };
    for to in 1..=4 {
        assert_eq!(acquire(to, 256).0, 201);
    }
    assert_eq!(agent.leases(), 1024);
    let (status, answer) = acquire(9, 1);
    assert_eq!((status, answer["code"].as_str()), (429, Some("share")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("1024"), "{answer}");
    let (_, pool) = agent.ask("GET", "/v1/pool", "");
    assert_eq!((&pool["leases"]["refusals"]["leases"], &pool["leases"]["held"]), (&json!(1), &json!(1024)));
    let warning = pool["warnings"][0].as_str().unwrap();
    assert!(warning.contains("192.0.2.9:443") && warning.contains("remedy: "), "{warning}");

    let id = agent.service.list().unwrap()[0].id.unwrap();
    assert_eq!(agent.ask("DELETE", &format!("/v1/leases/{id}"), "").0, 204);
    // Requests at the same time share one rest.
    let together: Vec<u16> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || acquire(10 + n, 1).0)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(together.iter().filter(|status| **status == 201).count(), 1, "{together:?}");
    assert_eq!(agent.leases(), 1024);
}

#[test]
fn what_happens_can_be_watched() {
    let agent = Agent::start(range(61001, 61001), None);
    let mut watcher = agent.connect();
    write!(watcher, "GET /v1/leases/watch HTTP/1.0\r\n\r\n").unwrap();
    let mut lines = BufReader::new(watcher).lines().map(Result::unwrap);
    lines.by_ref().find(String::is_empty).unwrap();
    let mut connection = agent.connect();
    ask(&mut connection, "POST", "/v1/leases", TO);
    agent.ask("POST", "/v1/leases", TO);
    drop(connection);
    let seen: Vec<Value> = lines.take(3).map(|line| serde_json::from_str(&line).unwrap()).collect();
    assert_eq!(seen[0]["event"], "acquired");
    assert_eq!(seen[0]["lease"]["port"], 61001);
    assert_eq!((&seen[1]["event"], &seen[1]["reason"]), (&json!("refused"), &json!("exhausted")));
    assert_eq!((&seen[2]["event"], &seen[2]["reason"]), (&json!("released"), &json!("connection closed")));
}

#[test]
fn malformed_requests_get_a_reason() {
    let agent = Agent::start(range(61001, 61010), None);
    let cases = [
        ("{", "request"),
        ("", "request"),
        ("null", "request"),
        ("[]", "request"),
        (r#"{"destination":"192.0.2.1"}"#, "request"),
        (r#"{"destination":"host.example:443"}"#, "request"),
        (r#"{"destination":"192.0.2.1:0"}"#, "request"),
        (r#"{"destination":"198.51.100.1:443"}"#, "destination"),
        (r#"{"destination":"192.0.2.1:443","count":0}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","count":-1}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","count":11}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","count":4294967296}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","waitMs":60001}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","ttlMs":0}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","ttlMs":86400001}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","protocol":"sctp"}"#, "request"),
        (r#"{"destination":"192.0.2.1:443","weight":1}"#, "request"),
    ];
    for (body, code) in cases {
        let (status, answer) = agent.ask("POST", "/v1/leases", body);
        assert_eq!((status, answer["code"].as_str()), (400, Some(code)), "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().len() > 20, "{answer}");
    }
    assert_eq!(agent.ask("DELETE", "/v1/leases/x", "").0, 400);
    assert_eq!(agent.ask("DELETE", "/v1/leases/18446744073709551616", "").0, 400);
    assert_eq!(agent.ask("POST", "/v1/leases", &" ".repeat(api::MAX_LEASE_BODY + 1)).0, 413);
    assert_eq!(agent.leases(), 0);
}

#[test]
fn the_socket_has_its_permissions_and_only_one_agent() {
    let agent = Agent::start(range(61001, 61010), None);
    let mode = std::fs::metadata(&agent.served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Server::bind(&agent.served.socket, &access(0o660));
    assert!(matches!(second, Err(api::Error::InUse { .. })), "{second:?}");
    let file = agent.served.socket.with_extension("txt");
    std::fs::write(&file, "precious").unwrap();
    // It is served once the file has gone.
    assert!(Server::bind(&file, &access(0o660)).is_ok());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

/// Requests that look right from afar.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        Just("GET"),
        Just("POST"),
        Just("DELETE"),
        Just("PUT"),
        "[A-Z]{0,9}".prop_map(|m| &*m.leak())
    ];
    let path = prop_oneof![
        Just("/v1/leases".to_owned()),
        Just("/v1/pool".to_owned()),
        any::<u64>().prop_map(|id| format!("/v1/leases/{id}")),
        "/[ -~]{0,40}",
    ];
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        r#"\{"destination":"[0-9.:\[\]a-f]{0,30}","(count|ttlMs|waitMs)":-?[0-9]{1,3}\}"#
            .prop_map(String::into_bytes),
        r#"\{"destination":"192.0.2.1:443","(count|ttlMs)":[0-9]{1,2}\}"#.prop_map(String::into_bytes),
    ];
    let whole = (method, path, body, -3..3_i64).prop_map(|(method, path, body, lie)| {
        let length = (body.len() as i64 + lie).max(0);
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n").into_bytes();
        request.extend(body);
        request
    });
    prop_oneof![4 => whole, 1 => prop::collection::vec(any::<u8>(), 0..300)]
}

#[test]
fn whatever_is_thrown_at_it_the_agent_goes_on_and_leaks_nothing() {
    let agent = Agent::start(range(61001, 61010), None);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(1500));
    runner
        .run(&hostile(), |request| {
            let mut stream = agent.connect();
            // It may hang up in the middle of nonsense.
            let _ = stream.write_all(&request);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let text = String::from_utf8_lossy(&answer);
            prop_assert!(!text.contains("HTTP/1.1 5"), "{}", text);
            Ok(())
        })
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while agent.leases() > 0 && Instant::now() < deadline {
        // Leases with a time of up to 99 ms.
        std::thread::yield_now();
    }
    assert_eq!(agent.leases(), 0);
    let mut all = agent.connect();
    let ten = r#"{"destination":"192.0.2.77:443","count":10}"#;
    assert_eq!(ask(&mut all, "POST", "/v1/leases", ten).0, 201, "all ten ports are there");
}

#[test]
fn the_pool_tells_its_figures() {
    let agent = Agent::start(range(61001, 61002), None);
    let mut connection = agent.connect();
    let two = r#"{"destination":"192.0.2.1:443","count":2}"#;
    assert_eq!(ask(&mut connection, "POST", "/v1/leases", two).0, 201);
    assert_eq!(agent.ask("POST", "/v1/leases", TO).0, 409);
    let id = agent.service.list().unwrap()[0].id.unwrap();
    assert_eq!(agent.ask("DELETE", &format!("/v1/leases/{id}"), "").0, 204);
    let (_, pool) = agent.ask("GET", "/v1/pool", "");
    assert_eq!((&pool["mode"], &pool["available"]), (&json!("userspace"), &json!(2)));
    assert_eq!((&pool["held"], &pool["warm"]), (&json!(1), &json!(1)));
    let leases = &pool["leases"];
    assert_eq!(
        (&leases["held"], &leases["acquired"], &leases["released"]),
        (&json!(1), &json!(2), &json!(1))
    );
    assert_eq!(leases["refusals"]["exhausted"], 1);
    let mut stream = agent.connect();
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).unwrap();
    for line in [
        "bridge_pool_ports{state=\"held\"} 1",
        "bridge_pool_claims_total{by=\"agent\"} 2",
        "bridge_pool_releases_total{by=\"agent\"} 1",
        "bridge_pool_refusals_total{by=\"agent\",reason=\"exhausted\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn without_a_pool_every_path_of_it_says_so() {
    let agent = Agent::start(range(61001, 61010), None);
    agent.shared.set_pool(None);
    for (method, path, body) in [
        ("POST", "/v1/leases", TO),
        ("GET", "/v1/leases", ""),
        ("DELETE", "/v1/leases/1", ""),
        ("GET", "/v1/leases/watch", ""),
        ("GET", "/v1/pool", ""),
    ] {
        let (status, answer) = agent.ask(method, path, body);
        assert_eq!((status, answer["code"].as_str()), (404, Some("no-pool")), "{method} {path}");
    }
}

#[test]
fn every_documented_path_is_there() {
    let agent = Agent::start(range(61001, 61010), None);
    assert_eq!(agent.ask("GET", "/v1/pool", "").0, 200);
    assert_eq!(agent.ask("GET", "/v1/leases", "").0, 200);
    assert_eq!(agent.ask("DELETE", "/v1/leases/999", "").0, 404);
}
