//! A probe that confirms a trial: an address that must accept a connection.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::config::ports::one_port;

/// `tcp://HOST:PORT`, which must accept a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Probe {
    /// A name or an address.
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// A text that is not a probe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a probe: write tcp://HOST:PORT, such as tcp://192.168.31.67:22 or tcp://[fd31::67]:22")]
pub struct InvalidProbe(String);

impl FromStr for Probe {
    type Err = InvalidProbe;

    fn from_str(text: &str) -> Result<Self, InvalidProbe> {
        let invalid = || InvalidProbe(text.to_owned());
        let (host, port) =
            text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(invalid)?;
        let port = one_port(port).map_err(|_| invalid())?;
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.strip_suffix(']').filter(|v6| v6.parse::<Ipv6Addr>().is_ok()),
            None => Some(host).filter(|host| !host.is_empty() && !host.contains([':', '/', ' '])),
        };
        Ok(Self { host: host.ok_or_else(invalid)?.to_owned(), port })
    }
}

impl TryFrom<String> for Probe {
    type Error = InvalidProbe;

    fn try_from(text: String) -> Result<Self, InvalidProbe> {
        text.parse()
    }
}

impl From<Probe> for String {
    fn from(probe: Probe) -> Self {
        probe.to_string()
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "tcp://[{host}]:{port}") } else { write!(f, "tcp://{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_read_and_printed_back() {
        for text in ["tcp://192.168.31.67:22", "tcp://[fd31::67]:6443", "tcp://api.example:443"] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "192.168.31.67:22",
            "tcp://:22",
            "tcp://x",
            "tcp://x:0",
            "tcp://x:65536",
            "tcp://x:022",
            "tcp://x:+22",
            "udp://x:1",
            "tcp://fd31::67:22",
            "tcp://[x]:22",
            "tcp://a/b:22",
        ] {
            let error = bad.parse::<Probe>().unwrap_err().to_string();
            assert!(error.contains("tcp://HOST:PORT"), "{error}");
        }
    }
}
