//! An HTTP client of hyper from a range of ports.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    ops::RangeInclusive,
    thread,
};

use bridge_client::{Connector, hyper::HttpConnector};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};

/// Answers two requests of each connection with the port of the client.
fn serve(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let port = stream.peer_addr().unwrap().port().to_string();
            for _ in 0..2 {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read(&mut byte).unwrap() == 0 {
                        break;
                    }
                    request.push(byte[0]);
                }
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{port}", port.len());
                stream.write_all(answer.as_bytes()).unwrap();
            }
        }
    });
    at
}

async fn port_seen(server: SocketAddr, ports: RangeInclusive<u16>) -> [u16; 2] {
    let connector = HttpConnector::new(Connector::ports(ports));
    let client: Client<_, Empty<&'static [u8]>> = Client::builder(TokioExecutor::new()).build(connector);
    let mut seen = [0; 2];
    for port in &mut seen {
        let answer = client.get(format!("http://{server}/").parse().unwrap()).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        *port = std::str::from_utf8(&body).unwrap().parse().unwrap();
    }
    seen
}

#[tokio::test]
async fn requests_come_from_the_range_and_reuse_their_connection() {
    for (address, ports) in [("127.0.0.1:0", 21701..=21710), ("[::1]:0", 21711..=21720)] {
        let [first, second] = port_seen(serve(address), ports.clone()).await;
        assert!(ports.contains(&first), "{first}");
        assert_eq!(first, second, "the connection is kept alive");
    }
}

#[tokio::test]
async fn a_refused_connection_is_an_error_of_the_request() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let connector = HttpConnector::new(Connector::ports(21721..=21730));
    let client: Client<_, Empty<&'static [u8]>> = Client::builder(TokioExecutor::new()).build(connector);
    let error = client.get(format!("http://{closed}/").parse().unwrap()).await.unwrap_err();
    assert!(error.is_connect(), "{error}");
}
