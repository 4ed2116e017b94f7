//! A program of its own that connects, in one of several ways, and reports the time: a socket belongs to the
//! control group and the network namespace of the process that makes it.
//!
//! A command a line on standard input, an answer a line on standard output: `fill N` opens connections until it has so
//! many, `time N` opens N more one after the other and then closes those, `refused N` tries N times in vain; both answer the
//! median.

use std::io::{self, BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rand::RngExt as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// How a source port is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Method {
    /// By the kernel in `connect`, or by the hook of the pool.
    Connect,
    /// By the kernel, from the range that option IP_LOCAL_PORT_RANGE names.
    Range,
    /// At random; another one if it is bound already.
    Random,
    /// At random with SO_REUSEADDR; another one if the destination is connected to from it already.
    RandomReuse,
}

/// The task.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) method: Method,
    pub(super) to: SocketAddr,
    pub(super) first: u16,
    pub(super) last: u16,
}

/// Runs until standard input ends.
pub(super) fn run(job: Job) -> Result<()> {
    // As many descriptors as may be: one for each connection.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    let mut held = Vec::new();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (command, count) = line.split_once(' ').context("a command and a number")?;
        let count: usize = count.parse()?;
        let answer = match command {
            "fill" => {
                while held.len() < count {
                    held.push(job.hold(held.len())?);
                }
                0.0
            }
            "time" => {
                let open = (0..count).map(|_| job.connect()).collect::<Result<Vec<_>>>()?;
                for (_, socket) in &open {
                    // Ended at once, without TIME_WAIT.
                    socket.set_linger(Some(Duration::ZERO))?;
                }
                median(open.into_iter().map(|(took, _)| took).collect())
            }
            "refused" => median((0..count).map(|_| job.refused()).collect::<Result<_>>()?),
            _ => bail!("{line}?"),
        };
        println!("{answer}");
        io::stdout().flush()?;
    }
    Ok(())
}

/// In microseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

impl Job {
    /// Returns the time until a refusal for want of a port.
    fn refused(&self) -> Result<Duration> {
        let socket = self.socket()?;
        let start = Instant::now();
        match socket.connect(&self.to.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(start.elapsed()),
            other => bail!("not EADDRNOTAVAIL but {other:?}"),
        }
    }

    fn socket(&self) -> Result<Socket> {
        const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        match self.method {
            Method::Range => {
                let range = u32::from(self.last) << 16 | u32::from(self.first);
                // SAFETY: a pointer to four bytes and their length.
                let result = unsafe {
                    libc::setsockopt(
                        std::os::fd::AsRawFd::as_raw_fd(&socket),
                        libc::IPPROTO_IP,
                        IP_LOCAL_PORT_RANGE,
                        (&raw const range).cast(),
                        4,
                    )
                };
                ensure!(result == 0, "IP_LOCAL_PORT_RANGE: {}", io::Error::last_os_error());
            }
            Method::RandomReuse => socket.set_reuse_address(true)?,
            Method::Connect | Method::Random => {}
        }
        Ok(socket)
    }

    /// A connection, and how long it took from the socket to it.
    fn connect(&self) -> Result<(Duration, Socket)> {
        let mut socket = self.socket()?;
        let start = Instant::now();
        loop {
            if matches!(self.method, Method::Random | Method::RandomReuse)
                && let Err(error) = bind(&socket, rand::rng().random_range(self.first..=self.last))
            {
                ensure!(error.raw_os_error() == Some(libc::EADDRINUSE), error);
                continue;
            }
            match socket.connect(&self.to.into()) {
                Ok(()) => return Ok((start.elapsed(), socket)),
                Err(error)
                    if self.method == Method::RandomReuse
                        && error.raw_os_error() == Some(libc::EADDRNOTAVAIL) =>
                {
                    // It stays bound.
                    socket = self.socket()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One more connection to be kept; random ones from one port after the other, which is sooner done.
    fn hold(&self, index: usize) -> Result<Socket> {
        if !matches!(self.method, Method::Random | Method::RandomReuse) {
            return Ok(self.connect()?.1);
        }
        let socket = self.socket()?;
        bind(&socket, self.first + u16::try_from(index)?)?;
        socket.connect(&self.to.into())?;
        Ok(socket)
    }
}

fn bind(socket: &Socket, port: u16) -> io::Result<()> {
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())
}
