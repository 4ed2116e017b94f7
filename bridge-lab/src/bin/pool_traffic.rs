//! Connections that come and go in every way there is: `pool_traffic serve ADDRESS`, `pool_traffic report ADDRESS`,
//! `pool_traffic churn JSON`. A program of its own, since a socket belongs to the control group of the process that makes it.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail};
use bridge_lab::pool::{Churn, Churned, Served};
use rand::{RngExt as _, SeedableRng as _};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Ways to end a connection, which the client requests after its first three bytes (the way, and its own port).
mod end {
    pub(crate) const CLIENT_CLOSES: u8 = 0;
    pub(crate) const SERVER_CLOSES: u8 = 1;
    pub(crate) const SERVER_RESETS: u8 = 2;
    pub(crate) const CLIENT_RESETS: u8 = 3;
    pub(crate) const CLIENT_HALF_CLOSES: u8 = 4;
    pub(crate) const SERVER_HALF_CLOSES: u8 = 5;
    pub(crate) const REPORT: u8 = 255;
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let line = match arguments[1..] {
        ["serve", address] => return serve(address.parse()?),
        ["report", address] => return report(address.parse()?),
        ["churn", order] => serde_json::to_string(&churn(&serde_json::from_str(order)?)?)?,
        _ => bail!("serve ADDRESS | report ADDRESS | churn JSON"),
    };
    println!("{line}");
    Ok(())
}

fn serve(address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(4096)?;
        println!("listening");
        let counters: Arc<(AtomicU64, AtomicU64)> = Arc::default();
        loop {
            let (stream, peer) = listener.accept().await?;
            let counters = Arc::clone(&counters);
            tokio::spawn(async move {
                // Clients that vanish half-way are the subject of the test.
                let _ = one(stream, peer, &counters).await;
            });
        }
    })
}

async fn one(
    mut stream: tokio::net::TcpStream,
    peer: SocketAddr,
    counters: &(AtomicU64, AtomicU64),
) -> io::Result<()> {
    let mut hello = [0; 3];
    stream.read_exact(&mut hello).await?;
    if hello[0] == end::REPORT {
        let served = Served {
            accepted: counters.0.load(Ordering::SeqCst),
            translated: counters.1.load(Ordering::SeqCst),
        };
        return stream.write_all(serde_json::to_string(&served)?.as_bytes()).await;
    }
    counters.0.fetch_add(1, Ordering::SeqCst);
    if u16::from_be_bytes([hello[1], hello[2]]) != peer.port() {
        counters.1.fetch_add(1, Ordering::SeqCst);
    }
    stream.write_all(b"k").await?;
    let mut rest = Vec::new();
    match hello[0] {
        end::SERVER_CLOSES => {}
        end::SERVER_RESETS => SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
        end::SERVER_HALF_CLOSES => {
            stream.shutdown().await?;
            stream.read_to_end(&mut rest).await?;
        }
        end::CLIENT_HALF_CLOSES => {
            stream.read_to_end(&mut rest).await?;
            stream.write_all(b"!").await?;
        }
        _ => drop(stream.read_to_end(&mut rest).await?),
    }
    Ok(())
}

fn report(address: SocketAddr) -> Result<()> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.write_all(&[end::REPORT, 0, 0])?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    println!("{text}");
    Ok(())
}

fn churn(order: &Churn) -> Result<Churned> {
    let mut random = rand::rngs::SmallRng::seed_from_u64(order.seed);
    let mut seen = Churned::default();
    let mut open = VecDeque::new();
    let allowed = |port: u16| (order.first..=order.last).contains(&port);
    for _ in 0..order.count {
        let target = match random.random_range(0..20) {
            0 => order.refused,
            1 => order.unreachable,
            2 => order.silent,
            _ => order.server,
        };
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        let patience = Duration::from_micros(200);
        let result = if target == order.silent {
            socket.connect_timeout(&target.into(), patience)
        } else {
            let first = socket.connect(&target.into());
            // Now and then once more with the very same socket: it keeps its port, towards another destination.
            if target == order.refused && first.is_err() && random.random() {
                seen.again += 1;
                socket.connect(&order.server.into())
            } else {
                first
            }
        };
        seen.attempts += 1;
        if let Some(port) = socket.local_addr()?.as_socket_ipv4().map(|a| a.port())
            && port != 0
            && !allowed(port)
        {
            seen.outside += 1;
        }
        match result {
            Ok(()) => {
                seen.connected += 1;
                if let Some(socket) = converse(socket, &mut random, &mut seen) {
                    open.push_back(socket);
                }
                if open.len() > order.hold {
                    open.pop_front();
                }
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EADDRNOTAVAIL) => {
                    seen.exhausted += 1;
                    open.pop_front();
                }
                Some(libc::ECONNREFUSED) => seen.refused += 1,
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => seen.unreachable += 1,
                _ if error.kind() == io::ErrorKind::TimedOut => seen.silent += 1,
                code => *seen.other.entry(code.unwrap_or(0)).or_default() += 1,
            },
        }
    }
    Ok(seen)
}

/// Says hello and ends the connection in some way, or returns it to be kept for a while.
fn converse(socket: Socket, random: &mut impl rand::Rng, seen: &mut Churned) -> Option<Socket> {
    let port = socket.local_addr().ok()?.as_socket_ipv4()?.port().to_be_bytes();
    let how = random.random_range(0..6);
    let mut stream = std::net::TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let greeted = stream.write_all(&[how, port[0], port[1]]).and_then(|()| stream.read_exact(&mut [0]));
    if greeted.is_err() && how != end::SERVER_RESETS {
        seen.broken += 1;
        return None;
    }
    match how {
        end::CLIENT_CLOSES if random.random() => return Some(stream.into()),
        end::CLIENT_RESETS => SockRef::from(&stream).set_linger(Some(Duration::ZERO)).ok()?,
        end::CLIENT_HALF_CLOSES => {
            stream.shutdown(Shutdown::Write).ok()?;
            stream.read_to_end(&mut Vec::new()).ok()?;
        }
        end::SERVER_CLOSES | end::SERVER_HALF_CLOSES => drop(stream.read_to_end(&mut Vec::new()).ok()?),
        _ => {}
    }
    None
}
