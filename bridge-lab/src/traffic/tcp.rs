//! TCP servers and clients.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Attempt, any, left};
use crate::lab::Netns;

/// Behaviour of a server on received data.
#[derive(Clone, Copy, Debug)]
enum Service {
    Echo,
    Sink,
}

/// A server that runs until it is dropped; then it closes its connections, too.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    state: Arc<State>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    /// A connection is removed when it ends.
    accepted: Mutex<Vec<(SocketAddr, Option<TcpStream>)>>,
    received: AtomicU64,
}

impl Server {
    /// Starts a server that sends back the data that it receives. Port 0 in `address`: a free one.
    pub fn echo(netns: &Netns, address: SocketAddr) -> io::Result<Self> {
        Self::start(netns, address, Service::Echo)
    }

    /// Receives, counts, and is silent.
    pub fn sink(netns: &Netns, address: SocketAddr) -> io::Result<Self> {
        Self::start(netns, address, Service::Sink)
    }

    fn start(netns: &Netns, address: SocketAddr, service: Service) -> io::Result<Self> {
        let socket = netns.run(|| socket(address))?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        let listener = Arc::new(TcpListener::from(socket));
        let state = Arc::new(State::default());
        let acceptor = {
            let (listener, state) = (Arc::clone(&listener), Arc::clone(&state));
            thread::spawn(move || accept(&listener, &state, service))
        };
        Ok(Self { address: listener.local_addr()?, listener, state, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whose connections the server has accepted until now, as it sees them: after address translation on the
    /// way. The kernel completes a connection before the server accepts it: a round trip makes sure it has.
    pub fn peers(&self) -> Vec<SocketAddr> {
        let accepted = self.state.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.iter().map(|(peer, _)| *peer).collect()
    }

    /// Octets received on all connections.
    pub fn received(&self) -> u64 {
        self.state.received.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Linux wakes accept() and read() with it. They fail only where the other end has closed already.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let accepted = self.state.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in accepted.iter().filter_map(|(_, stream)| stream.as_ref()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>, service: Service) {
    // The first error is the listener's shutdown.
    while let Ok((stream, peer)) = listener.accept() {
        let Ok(kept) = stream.try_clone() else { continue };
        let index = {
            let mut accepted = state.accepted.lock().unwrap_or_else(PoisonError::into_inner);
            accepted.push((peer, Some(kept)));
            accepted.len() - 1
        };
        let state = Arc::clone(state);
        thread::spawn(move || {
            serve(stream, &state, service);
            state.accepted.lock().unwrap_or_else(PoisonError::into_inner)[index].1 = None;
        });
    }
}

/// Until the client closes, resets, or the server is dropped.
fn serve(mut stream: TcpStream, state: &State, service: Service) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        state.received.fetch_add(length as u64, Ordering::Relaxed);
        if matches!(service, Service::Echo) && stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The kept clone would hold the connection open.
    let _ = stream.shutdown(Shutdown::Both);
}

fn socket(of: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(of), Type::STREAM, Some(Protocol::TCP))?;
    if of.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A client about to connect.
#[derive(Clone, Debug)]
#[must_use]
pub struct Client<'a> {
    netns: &'a Netns,
    source_port: u16,
    deadline: Duration,
}

impl<'a> Client<'a> {
    /// A client in a namespace: any source port, one second.
    pub fn new(netns: &'a Netns) -> Self {
        Self { netns, source_port: 0, deadline: Duration::from_secs(1) }
    }

    /// Binds to this source port first (with SO_REUSEADDR).
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = port;
        self
    }

    /// How long to wait for the connection.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Connects.
    ///
    /// # Errors
    /// A system call fails, with EADDRINUSE for instance. The answer of the network is in the [`Attempt`].
    pub fn connect(&self, to: SocketAddr) -> io::Result<Attempt<Connection>> {
        let socket = self.netns.run(|| socket(to))?;
        if self.source_port != 0 {
            socket.bind(&SocketAddr::new(any(to), self.source_port).into())?;
        }
        let start = Instant::now();
        let result = socket.connect_timeout(&to.into(), self.deadline);
        let elapsed = start.elapsed();
        Attempt::sort(result.map(|()| Connection { stream: socket.into(), rounds: 0 }), elapsed)
    }
}

/// An established connection of a client, held open until dropped.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    rounds: u64,
}

impl Connection {
    /// Proves that the connection works in both directions: sends fresh data to an echo server, and returns the time
    /// until it came back.
    ///
    /// # Errors
    /// It did not within `deadline`, came back changed, or the connection is closed or reset.
    pub fn round_trip(&mut self, deadline: Duration) -> io::Result<Duration> {
        self.rounds += 1;
        let question = self.rounds.to_be_bytes();
        let mut answer = [0; size_of::<u64>()];
        let start = Instant::now();
        self.stream.set_write_timeout(Some(deadline))?;
        self.stream.write_all(&question)?;
        let mut received = 0;
        while received < answer.len() {
            self.stream.set_read_timeout(Some(left(start + deadline)))?;
            match self.stream.read(&mut answer[received..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => received += length,
                // A read with a timeout also ends so when the process is stopped and continued (signal(7)).
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
                }
                Err(e) => return Err(e),
            }
        }
        if answer != question {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "another answer than sent"));
        }
        Ok(start.elapsed())
    }

    /// The stream itself.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The client's address and port.
    pub fn source(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// Resets the connection (RST instead of FIN).
    pub fn reset(self) -> io::Result<()> {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))
    }
}
