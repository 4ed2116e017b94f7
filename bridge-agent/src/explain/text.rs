//! The notation of connections.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::ports::one_port;
use crate::datapath::Verdict;

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    /// IP protocol.
    pub protocol: Protocol,
    /// The address that opens it.
    pub source: IpAddr,
    /// `None`: the port that the client would get.
    #[serde(default)]
    pub source_port: Option<u16>,
    /// The address that it is opened to.
    pub destination: IpAddr,
    /// 0 for a protocol without ports.
    #[serde(default)]
    pub destination_port: u16,
    /// Address and port behind the destination, if the node translates it: a Service, a hostPort.
    #[serde(default)]
    pub backend: Option<(IpAddr, u16)>,
}

const NO_NEXT_HEADER: u8 = 59;

/// An IP protocol: `tcp`, `udp`, `sctp`, `icmp`, `icmpv6`, or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(inline, transparent)]
pub struct Protocol(#[schemars(with = "String")] pub u8);

/// A text that is no connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Neither a name nor a number of a protocol.
    #[error("`{0}` is no protocol: write tcp, udp, sctp, icmp, icmpv6, or a number up to 255")]
    Protocol(String),
    /// No address.
    #[error("`{0}` is no address: write an IPv4 or IPv6 address, such as 192.168.31.67 or [fd00:31::67]:502")]
    Address(String),
    /// No port.
    #[error("`{0}` is no port: write a number from 1 to 65535, such as 192.168.31.67:502")]
    Port(String),
    /// Two ports of the client.
    #[error("the client's port is {0} in FROM, and {1} beside it: write one of them")]
    TwoPorts(u16, u16),
    /// A port is missing.
    #[error("{protocol} needs a destination port: write {destination}:PORT, such as {example}")]
    NoPort {
        /// The protocol.
        protocol: Protocol,
        /// The destination.
        destination: IpAddr,
        /// How it could be written.
        example: String,
    },
    /// A port is given to a protocol that has none.
    #[error("{0} has no ports: write the address alone")]
    NeedlessPort(Protocol),
    /// A name where only addresses are known.
    #[error(
        "`{0}` is a name, and only a running agent that follows a cluster (`kubernetes` in its configuration) knows names: write \
         the address (`kubectl get pod -o wide` has it)"
    )]
    Offline(String),
    /// A kind of name that the agent does not follow.
    #[error(
        "`{0}`: no rule of kube-proxy on this node, in iptables or nftables, has such a Service: write its address and port as TO, and \
         the pod behind it as --backend pod/NAMESPACE/NAME:PORT"
    )]
    Service(String),
    /// IPv6 without next header.
    #[error(
        "59 in IPv6 means that no header follows: bridge denies such packets, whatever the rules; write a protocol"
    )]
    NoNextHeader,
    /// A Service with several ports.
    #[error(
        "`{name}` has the ports {}: write one of them, such as {name}:{}",
        .ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        .ports.first().copied().unwrap_or_default()
    )]
    ServicePort {
        /// As it is written.
        name: String,
        /// Its ports.
        ports: BTreeSet<u16>,
    },
    /// A name in another notation.
    #[error("`{0}` is no name: write pod/NAMESPACE/NAME or service/NAMESPACE/NAME")]
    Name(String),
    /// No such pod.
    #[error(
        "this agent knows no pod `{0}` of its node: check the name (`kubectl get pods -A -o wide`), or ask the agent of \
         its node"
    )]
    UnknownPod(String),
    /// A pod with several addresses, any of which could be meant.
    #[error("`{name}` has {} addresses of this IP version ({}): write one of them", .addresses.len(), show(.addresses))]
    Ambiguous {
        name: String,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// A pod without an address of the other end's version.
    #[error("`{name}` has no address of the IP version of {other}")]
    NoAddress {
        name: String,
        /// The other end.
        other: String,
    },
    /// The addresses are of different IP versions.
    #[error("{0} and {1} are of different IP versions: a connection has one")]
    Versions(IpAddr, IpAddr),
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::datapath::protocol_name(self.0))
    }
}

impl FromStr for Protocol {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(Self(match text {
            "icmp" => 1,
            "tcp" => 6,
            "udp" => 17,
            "icmpv6" => 58,
            "sctp" => 132,
            number => {
                let parsed = number.parse::<u8>().ok().filter(|parsed| parsed.to_string() == number);
                parsed.ok_or_else(|| ParseError::Protocol(text.to_owned()))?
            }
        }))
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Protocol {
    /// Whether it has ports.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        matches!(self.0, 6 | 17 | 132)
    }
}

/// Reads one end of a connection: `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`.
///
/// # Errors
/// The text is none of these, or the port is 0.
pub fn end(text: &str) -> Result<(IpAddr, Option<u16>), ParseError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address, None));
    }
    let (address, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, "")) => (address, None),
        Some((address, port)) => (address, Some(port.strip_prefix(':').unwrap_or(port))),
        None => text.rsplit_once(':').map_or((text, None), |(address, port)| (address, Some(port))),
    };
    let address = address.parse().map_err(|_| ParseError::Address(text.to_owned()))?;
    Ok((address, port.map(number).transpose()?))
}

fn number(port: &str) -> Result<u16, ParseError> {
    one_port(port).map_err(|_| ParseError::Port(port.to_owned()))
}

impl Question {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// See [`ParseError`].
    pub fn check(self) -> Result<Self, ParseError> {
        let Self { protocol, source, source_port, destination, destination_port, backend } = self;
        for other in std::iter::once(destination).chain(backend.map(|(address, _)| address)) {
            if source.is_ipv4() != other.is_ipv4() {
                return Err(ParseError::Versions(source, other));
            }
        }
        let version_of_icmp = matches!((protocol.0, source), (1, IpAddr::V6(_)) | (58, IpAddr::V4(_)));
        if version_of_icmp {
            // ICMP of the other version is the one that is meant.
            return Self { protocol: Protocol(if source.is_ipv4() { 1 } else { 58 }), ..self }.check();
        }
        if protocol.0 == NO_NEXT_HEADER && source.is_ipv6() {
            return Err(ParseError::NoNextHeader);
        }
        if protocol.has_ports() && destination_port == 0 {
            let example = match destination {
                IpAddr::V4(address) => format!("{address}:502"),
                IpAddr::V6(address) => format!("[{address}]:502"),
            };
            return Err(ParseError::NoPort { protocol, destination, example });
        }
        if !protocol.has_ports() && (destination_port != 0 || source_port.is_some()) {
            return Err(ParseError::NeedlessPort(protocol));
        }
        Ok(self)
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |address: IpAddr| match address {
            IpAddr::V6(address) if self.protocol.has_ports() => format!("[{address}]"),
            address => address.to_string(),
        };
        write!(f, "{} {}", self.protocol, host(self.source))?;
        if let Some(port) = self.source_port {
            write!(f, ":{port}")?;
        }
        write!(f, " -> {}", host(self.destination))?;
        if self.protocol.has_ports() {
            write!(f, ":{}", self.destination_port)?;
        }
        if let Some((address, port)) = self.backend {
            write!(f, " -> {}", host(address))?;
            if self.protocol.has_ports() {
                write!(f, ":{port}")?;
            }
        }
        Ok(())
    }
}

fn show(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A connection in words: each end is `ADDRESS[:PORT]` or `pod/NAMESPACE/NAME[:PORT]`, or several addresses of one host with commas
/// between them, of which the one of the other end's IP version counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(rename = "Connection")]
pub struct Request {
    /// The end that opens it.
    pub from: String,
    /// The end that it is opened to.
    pub to: String,
    /// Left out: TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// See [`Question::source_port`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// See [`Question::backend`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// The control group of the process that opens it, by its path below the cgroup2 mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The process that opens it, for people; counts only beside `cgroup`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
}

impl Request {
    /// A TCP connection between two ends.
    #[must_use]
    pub fn new(from: impl Into<String>, to: impl Into<String>) -> Self {
        let (from, to) = (from.into(), to.into());
        Self { from, to, protocol: None, source_port: None, backend: None, cgroup: None, process: None }
    }

    /// The process that opens it, for people; `None`: it is not named.
    #[must_use]
    pub fn client(&self) -> Option<String> {
        let group = self.cgroup.as_ref()?;
        Some(self.process.clone().unwrap_or_else(|| format!("the control group {group}")))
    }
}

/// Names that are known.
pub trait Directory {
    /// Returns the addresses of a pod; `None`: pods are not known.
    fn pod(&self, namespace: &str, name: &str) -> Option<Vec<IpAddr>>;
    /// Returns addresses and ports of a Service; `None`: Services are not known.
    fn service(&self, namespace: &str, name: &str) -> Option<Vec<(IpAddr, u16)>>;
}

/// Knows no names.
impl Directory for () {
    fn pod(&self, _: &str, _: &str) -> Option<Vec<IpAddr>> {
        None
    }

    fn service(&self, _: &str, _: &str) -> Option<Vec<(IpAddr, u16)>> {
        None
    }
}

/// One end before its name is resolved.
struct End<'a> {
    text: &'a str,
    addresses: Vec<IpAddr>,
    port: Option<u16>,
}

impl<'a> End<'a> {
    fn read(text: &'a str, names: &dyn Directory) -> Result<Self, ParseError> {
        let Some((kind, rest)) = text.split_once('/') else {
            let (address, port) = match text.split_once(',') {
                None => end(text)?,
                Some(_) => {
                    let each = text.split(',').map(|one| one.trim().parse::<IpAddr>());
                    let addresses = each.collect::<Result<_, _>>();
                    let addresses = addresses.map_err(|_| ParseError::Address(text.to_owned()))?;
                    return Ok(Self { text, addresses, port: None });
                }
            };
            return Ok(Self { text, addresses: vec![address], port });
        };
        let (name, port) = rest.split_once(':').map_or((rest, None), |(name, port)| (name, Some(port)));
        let (namespace, object) = name.split_once('/').ok_or_else(|| ParseError::Name(text.to_owned()))?;
        let mut port = port.map(number).transpose()?;
        let addresses = match kind {
            "pod" | "pods" => {
                let known = names.pod(namespace, object);
                let addresses = known.ok_or_else(|| ParseError::Offline(text.to_owned()))?;
                if addresses.is_empty() {
                    return Err(ParseError::UnknownPod(name.to_owned()));
                }
                addresses
            }
            "service" | "services" | "svc" => {
                let known = names.service(namespace, object).filter(|known| !known.is_empty());
                let known = known.ok_or_else(|| ParseError::Service(text.to_owned()))?;
                let ports: BTreeSet<u16> = known.iter().map(|(_, port)| *port).collect();
                if port.is_none() && ports.len() > 1 {
                    return Err(ParseError::ServicePort { name: text.to_owned(), ports });
                }
                port = port.or_else(|| ports.first().copied());
                let addresses: BTreeSet<IpAddr> = known.iter().map(|(address, _)| *address).collect();
                addresses.into_iter().collect()
            }
            _ => return Err(ParseError::Name(text.to_owned())),
        };
        Ok(Self { text, addresses, port })
    }

    /// Returns the one address that fits to the other end.
    fn resolve(&self, other: &Self) -> Result<IpAddr, ParseError> {
        let fits =
            |address: &&IpAddr| other.addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4());
        let fitting: Vec<IpAddr> = self.addresses.iter().filter(fits).copied().collect();
        match (fitting.as_slice(), self.addresses.as_slice()) {
            ([one], _) => Ok(*one),
            // Both are written as addresses; the check of the question has the message.
            ([], [one]) if self.text.find('/').is_none() => Ok(*one),
            ([], _) => {
                Err(ParseError::NoAddress { name: self.text.to_owned(), other: other.text.to_owned() })
            }
            _ => Err(ParseError::Ambiguous { name: self.text.to_owned(), addresses: fitting }),
        }
    }
}

impl Request {
    /// Returns the connection that the packet of an event belongs to, from the packet's source.
    ///
    /// # Errors
    /// The event names no protocol.
    pub fn of_event(event: &Verdict) -> Result<Self, ParseError> {
        let protocol: Protocol = event.protocol.parse()?;
        let end = |address: IpAddr, port: u16| match protocol.has_ports() && port != 0 {
            true => SocketAddr::new(address, port).to_string(),
            false => address.to_string(),
        };
        let (from, to) =
            (end(event.source, event.source_port), end(event.destination, event.destination_port));
        Ok(Self { protocol: Some(protocol), ..Self::new(from, to) })
    }

    /// Resolves names and checks that the parts fit together.
    ///
    /// # Errors
    /// See [`ParseError`].
    pub fn resolve(&self, names: &dyn Directory) -> Result<Question, ParseError> {
        let protocol = self.protocol.unwrap_or(Protocol(6));
        let (from, to) = (End::read(&self.from, names)?, End::read(&self.to, names)?);
        if self.source_port == Some(0) {
            return Err(ParseError::Port("0".to_owned()));
        }
        if let (Some(written), Some(other)) =
            (from.port, self.source_port.filter(|port| Some(*port) != from.port))
        {
            return Err(ParseError::TwoPorts(written, other));
        }
        let backend = self.backend.as_deref().map(|text| End::read(text, names)).transpose()?;
        let backend = match &backend {
            Some(backend) => Some((backend.resolve(&to)?, backend.port.or(to.port).unwrap_or_default())),
            None => None,
        };
        let question = Question {
            protocol,
            source: from.resolve(&to)?,
            source_port: self.source_port.or(from.port),
            destination: to.resolve(&from)?,
            destination_port: to.port.unwrap_or_default(),
            backend,
        };
        question.check()
    }
}
