//! Real clients and servers on real sockets, and the results of their attempts.

pub mod icmp;
pub mod tcp;
pub mod udp;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use socket2::Domain;

/// Result of an attempt to reach a peer, and the time that it took.
#[derive(Debug)]
pub struct Attempt<T> {
    /// From the first packet to the result.
    pub elapsed: Duration,
    /// The result.
    pub outcome: Outcome<T>,
}

/// See [`Attempt`].
#[derive(Debug)]
pub enum Outcome<T> {
    /// It came through.
    Reached(T),
    /// ECONNREFUSED: a TCP RST, or ICMP port unreachable.
    Refused,
    /// Nothing came back in time.
    TimedOut,
    /// There is no route, or a router on the way reported so.
    Unreachable(Errno),
}

impl<T> Attempt<T> {
    /// Sorts the result of a system call. Errors that say nothing about the network are errors.
    fn sort(result: io::Result<T>, elapsed: Duration) -> io::Result<Self> {
        let outcome = match result {
            Ok(reached) => Outcome::Reached(reached),
            // EAGAIN is how a receive timeout shows; a connect timeout of socket2 has no errno.
            Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Outcome::TimedOut
            }
            Err(e) => match Errno::from_io_error(&e) {
                Some(Errno::CONNREFUSED) => Outcome::Refused,
                // EACCES: ICMPv6 administratively prohibited. EPROTO: other ICMP destination unreachable codes.
                Some(errno @ (Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS | Errno::PROTO)) => {
                    Outcome::Unreachable(errno)
                }
                _ => return Err(e),
            },
        };
        Ok(Self { elapsed, outcome })
    }

    /// Whether it came through.
    pub fn succeeded(&self) -> bool {
        matches!(self.outcome, Outcome::Reached(_))
    }

    /// Whether it was refused.
    pub fn refused(&self) -> bool {
        matches!(self.outcome, Outcome::Refused)
    }

    /// Whether nothing came back.
    pub fn timed_out(&self) -> bool {
        matches!(self.outcome, Outcome::TimedOut)
    }

    /// Whether there was no way there.
    pub fn unreachable(&self) -> bool {
        matches!(self.outcome, Outcome::Unreachable(_))
    }

    /// Returns the peer's answer.
    ///
    /// # Errors
    /// The attempt, if it did not come through.
    pub fn reached(self) -> Result<T, Attempt<()>> {
        match self.split() {
            (Some(reached), _) => Ok(reached),
            (None, attempt) => Err(attempt),
        }
    }

    /// Returns the peer's answer, if there was one, and the attempt without it.
    pub fn split(self) -> (Option<T>, Attempt<()>) {
        let (reached, outcome) = match self.outcome {
            Outcome::Reached(reached) => (Some(reached), Outcome::Reached(())),
            Outcome::Refused => (None, Outcome::Refused),
            Outcome::TimedOut => (None, Outcome::TimedOut),
            Outcome::Unreachable(errno) => (None, Outcome::Unreachable(errno)),
        };
        (reached, Attempt { elapsed: self.elapsed, outcome })
    }
}

impl std::error::Error for Attempt<()> {}

impl<T> fmt::Display for Attempt<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.elapsed.as_secs_f64() * 1e3;
        match &self.outcome {
            Outcome::Reached(_) => write!(f, "reached in {milliseconds:.1} ms"),
            Outcome::Refused => write!(f, "refused after {milliseconds:.1} ms"),
            Outcome::TimedOut => write!(f, "no answer in {milliseconds:.0} ms"),
            Outcome::Unreachable(errno) => {
                write!(f, "{} after {milliseconds:.1} ms", io::Error::from(*errno).kind())
            }
        }
    }
}

/// The unspecified address of the family of `of`.
fn any(of: SocketAddr) -> IpAddr {
    if of.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Returns the time left until `end`; never zero, which as a socket timeout would mean for ever.
fn left(end: std::time::Instant) -> Duration {
    end.saturating_duration_since(std::time::Instant::now()).max(Duration::from_micros(1))
}

fn domain(of: IpAddr) -> Domain {
    if of.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}
