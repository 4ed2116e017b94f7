//! Connecting from a range of one's own, without an agent.

use std::{
    collections::HashSet,
    net::{SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use bridge_client::{Connector, Error};

fn server() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn every_port_of_the_range_is_found_and_then_it_is_full() {
    let (_listener, server) = server();
    let ports = 21301..=21320;
    let streams: Vec<_> = (0..20).map(|_| Connector::ports(ports.clone()).connect(server).unwrap()).collect();
    let used: HashSet<u16> = streams.iter().map(|stream| stream.local_addr().unwrap().port()).collect();
    assert_eq!(used, ports.clone().collect());
    let full = Connector::ports(ports.clone()).connect(server);
    assert!(matches!(full, Err(Error::Exhausted { first: 21301, last: 21320 })), "{full:?}");
    let start = Instant::now();
    let waited = Connector::ports(ports).wait(Duration::from_millis(300)).connect(server);
    assert!(matches!(waited, Err(Error::Exhausted { .. })) && start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn a_port_that_somebody_listens_on_is_passed_over() {
    let (_listener, server) = server();
    let _foreign = TcpListener::bind("0.0.0.0:21401").unwrap();
    let stream = Connector::ports(21401..=21402).connect(server).unwrap();
    assert_eq!(stream.local_addr().unwrap().port(), 21402);
}

#[test]
fn a_refused_connection_is_not_tried_from_every_port() {
    let (listener, server) = server();
    drop(listener);
    match Connector::ports(21501..=21600).connect(server) {
        Err(Error::Io(error)) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused),
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_an_agent_the_error_says_what_to_look_at() {
    let error =
        Connector::agent_at("/nonexistent/agent.sock").connect("127.0.0.1:1".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/agent.sock"), "{error}");
    assert!(error.to_string().contains("is bridge-agent running"), "{error}");
}
