//! Clients that are slow, idle or many cost other clients nothing.

mod server;

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bridge_agent::{
    config,
    model::PortRange,
    pool::{
        Layout, Settings,
        backend::Backend,
        layout::Occupied,
        service::{Client, LeaseRequest, Service, ServiceError, Transport},
    },
    state::{Request, Shared, Status},
};
use server::{Served, serve};

/// The agent answers other clients within this time.
const AT_ONCE: Duration = Duration::from_millis(100);
/// More than the agent serves at a time.
const MANY: usize = 2000;

struct Agent {
    served: Served,
    service: Arc<Service>,
    _requests: tokio::sync::mpsc::Receiver<Request>,
}

impl Agent {
    fn start() -> Self {
        bridge_agent::kernel::memory::raise_descriptor_limit();
        let settings = Settings {
            ports: vec![PortRange { first: 40001, last: 60000 }],
            destinations: vec!["192.0.2.0/24".parse().unwrap()],
            bind_udp: false,
            ..Settings::default()
        };
        let layout = Layout::plan(&settings, &Occupied::default()).unwrap();
        let service = Service::new(Backend::userspace(layout, Duration::ZERO), settings.destinations);
        let (shared, requests) = Shared::new(Status::default());
        shared.set_pool(Some(Arc::clone(&service)));
        let served = serve(&config::Api::default(), shared, async {});
        Self { served, service, _requests: requests }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.served.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends a request on a connection of its own, and returns the whole answer.
    fn get(&self, path: &str) -> String {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Asserts that the status is answered at once, in the best of a few attempts: this machine has other work.
    fn answers_at_once(&self, what: &str) {
        let attempt = || {
            let start = Instant::now();
            assert!(self.get("/v1/status").starts_with("HTTP/1.0 200"), "{what}");
            start.elapsed()
        };
        let fastest = (0..5).map(|_| attempt()).min().unwrap();
        assert!(fastest < AT_ONCE, "{what}: {fastest:?}");
    }

    /// Holds many ports for several clients, so that their list is large: one client has a share only.
    fn hold_ports(&self) {
        const CLIENTS: u64 = 15;
        let request = LeaseRequest {
            destination: "192.0.2.1:443".parse().unwrap(),
            transport: Transport::Tcp,
            count: 1_000,
            wait: Duration::ZERO,
            time: Some(Duration::from_secs(600)),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for netns in 1..=CLIENTS {
            let client = Client {
                connection: 0,
                pid: std::process::id(),
                uid: 0,
                netns: Some(netns),
                namespace: None,
            };
            runtime.block_on(self.service.acquire(&client, &request)).unwrap();
        }
    }
}

/// Whether the agent has closed the connection.
fn is_closed(stream: &UnixStream) -> bool {
    let mut byte = [0];
    stream.set_nonblocking(true).unwrap();
    matches!((&*stream).read(&mut byte), Ok(0)) || (&*stream).write(b"x").is_err()
}

fn eventually(within: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn idle_connections_keep_no_other_client_out() {
    let agent = Agent::start();
    let mut holder = agent.connect();
    let body = r#"{"destination":"192.0.2.1:443"}"#;
    write!(holder, "POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    eventually(Duration::from_secs(10), "a lease", || agent.service.list().unwrap().len() == 1);
    let idle: Vec<_> = (0..MANY).map(|_| agent.connect()).collect();
    agent.answers_at_once("with idle connections");
    let open = idle.iter().filter(|stream| !is_closed(stream)).count();
    assert!(open < 1000, "the agent keeps {open} idle connections");
    assert_eq!(agent.service.list().unwrap().len(), 1, "a connection with a lease is not idle");
}

#[test]
fn half_sent_requests_keep_no_other_client_out() {
    let agent = Agent::start();
    for half in ["GET /v1/st", "POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"] {
        let connections: Vec<_> = (0..MANY).map(|_| agent.connect()).collect();
        for mut connection in &connections {
            // The agent may have closed it for another one.
            drop(connection.write_all(half.as_bytes()));
        }
        agent.answers_at_once(half);
        drop(connections);
    }
}

#[test]
fn a_request_that_does_not_arrive_is_given_up() {
    let agent = Agent::start();
    let (mut head, mut body) = (agent.connect(), agent.connect());
    head.write_all(b"GET /v1/status HTTP/1.1\r\nHo").unwrap();
    body.write_all(b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{").unwrap();
    let mut answer = String::new();
    body.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    eventually(Duration::from_secs(30), "half a head is given up", || is_closed(&head));
}

#[test]
fn clients_that_do_not_read_keep_neither_memory_nor_other_clients() {
    let agent = Agent::start();
    agent.hold_ports();
    let whole = agent.get("/v1/leases").len();
    assert!(whole > 1 << 20, "the list has {whole} bytes only");
    let before = resident();
    let slow: Vec<_> = (0..60)
        .map(|_| {
            let mut stream = agent.connect();
            stream.write_all(b"GET /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            stream
        })
        .collect();
    agent.answers_at_once("with slow readers");
    thread::sleep(Duration::from_secs(2));
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 << 20, "60 slow readers cost {grown} bytes");
    agent.answers_at_once("with slow readers");
    // Each slow reader loses its turn, and the others get the answer that the agent is busy.
    eventually(Duration::from_secs(60), "a reader gets its answer", || {
        agent.get("/v1/leases").len() > 1 << 20
    });
    drop(slow);
}

fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn many_namespaces_of_a_pod_leave_leases_to_others() {
    let agent = Agent::start();
    let client = |pid, netns| Client { connection: 0, pid, uid: 0, netns: Some(netns), namespace: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let acquire = |client: &Client, host: u64| {
        let request = LeaseRequest {
            destination: format!("192.0.2.{host}:443").parse().unwrap(),
            transport: Transport::Tcp,
            count: 1_000,
            wait: Duration::ZERO,
            time: Some(Duration::from_secs(600)),
        };
        runtime.block_on(agent.service.acquire(client, &request))
    };
    // Namespaces of one process, each with a client's full share.
    let own = std::process::id();
    let granted = (1..=64).filter(|netns| acquire(&client(own, *netns), *netns).is_ok()).count();
    assert_eq!(granted, 49, "three quarters of 65,536");
    assert!(matches!(acquire(&client(own, 100), 100), Err(ServiceError::Share { limit: 49_152, .. })));
    // No process has this number: it is in no control group.
    acquire(&client(u32::MAX, 101), 101).expect("another pod has its share");
}

#[test]
fn a_lease_is_ended_by_its_owner_only() {
    let agent = Agent::start();
    let client = |uid, netns| Client {
        connection: 0,
        pid: std::process::id(),
        uid,
        netns: Some(netns),
        namespace: None,
    };
    let wish = LeaseRequest {
        destination: "192.0.2.1:443".parse().unwrap(),
        transport: Transport::Tcp,
        count: 1,
        wait: Duration::ZERO,
        time: Some(Duration::from_secs(60)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for uid in [0, 1000] {
        let lease = runtime.block_on(agent.service.acquire(&client(uid, 7), &wish)).unwrap();
        let id = lease[0].id;
        for other in [client(uid, 8), client(uid + 1, 7)] {
            assert_eq!(
                agent.service.release(&other, false, id),
                Err(ServiceError::NotYours(id)),
                "{other:?}"
            );
        }
        agent.service.release(&client(uid, 7), false, id).unwrap();
    }
    let lease = runtime.block_on(agent.service.acquire(&client(1000, 7), &wish)).unwrap();
    agent.service.release(&client(0, 1), true, lease[0].id).expect("an operator may end any lease");
}
