//! A UDP echo server, and a client that asks it.

use std::io;
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Attempt, any, left};
use crate::lab::Netns;

/// Sends every datagram back, until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    socket: Arc<UdpSocket>,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    stop: AtomicBool,
    received: Mutex<Vec<(SocketAddr, Vec<u8>)>>,
}

impl Server {
    /// Starts the server. Port 0 in `address`: a free one.
    pub fn echo(netns: &Netns, address: SocketAddr) -> io::Result<Self> {
        let socket = netns.run(|| socket(address))?;
        socket.bind(&address.into())?;
        let socket = Arc::new(UdpSocket::from(socket));
        let state = Arc::new(State::default());
        let thread = {
            let (socket, state) = (Arc::clone(&socket), Arc::clone(&state));
            thread::spawn(move || serve(&socket, &state))
        };
        Ok(Self { address: socket.local_addr()?, socket, state, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the datagrams received so far with their senders, after address translation on the way.
    pub fn received(&self) -> Vec<(SocketAddr, Vec<u8>)> {
        self.state.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        // Answers ENOTCONN for want of a peer, and wakes the receiver all the same (inet_shutdown).
        let _ = SockRef::from(&*self.socket).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, state: &State) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let received = socket.recv_from(&mut buffer);
        if state.stop.load(Ordering::Relaxed) {
            return;
        }
        // An error is of an earlier answer that found no one.
        let Ok((length, from)) = received else { continue };
        let datagram = &buffer[..length];
        state.received.lock().unwrap_or_else(PoisonError::into_inner).push((from, datagram.to_vec()));
        let _ = socket.send_to(datagram, from);
    }
}

fn socket(of: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(of), Type::DGRAM, Some(Protocol::UDP))?;
    if of.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Sends one datagram and waits for the same one back. Source port 0: any.
///
/// # Errors
/// A system call fails. The answer of the network is in the [`Attempt`].
pub fn ask(
    netns: &Netns,
    source_port: u16,
    to: SocketAddr,
    payload: &[u8],
    deadline: Duration,
) -> io::Result<Attempt<()>> {
    let socket = netns.run(|| socket(to))?;
    socket.bind(&SocketAddr::new(any(to), source_port).into())?;
    let socket = UdpSocket::from(socket);
    let start = Instant::now();
    // Connected, it gets ICMP errors as errors.
    let result = socket
        .connect(to)
        .and_then(|()| socket.send(payload))
        .and_then(|_| await_echo(&socket, payload, start + deadline));
    Attempt::sort(result, start.elapsed())
}

fn await_echo(socket: &UdpSocket, payload: &[u8], end: Instant) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left(end)))?;
        let length = socket.recv(&mut buffer)?;
        if &buffer[..length] == payload {
            return Ok(());
        }
    }
}
