//! Requests of the pool's clients, and the answers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bridge_common::pool::Refusal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{owner::Owner, remedy};
use crate::kernel::netlink::Namespace;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RFC 9293.
    #[default]
    Tcp,
    /// RFC 768, connected sockets.
    Udp,
}

/// The process at the other end of the socket.
#[derive(Clone, Debug)]
pub struct Client {
    /// Number of its connection to the agent.
    pub connection: u64,
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// `SO_NETNS_COOKIE` of its network namespace, on Linux 5.14 and later.
    pub netns: Option<u64>,
    /// That namespace, unless it is the agent's own.
    pub namespace: Option<Arc<Namespace>>,
}

/// A request for ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Where the client will connect to.
    pub destination: SocketAddr,
    /// With which protocol.
    pub transport: Transport,
    /// How many ports; all or none.
    pub count: u32,
    /// How long to wait for them.
    pub wait: Duration,
    /// How long to hold them; `None`: as long as the client's connection to the agent.
    pub time: Option<Duration>,
}

/// A port that a client holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeasedPort {
    /// For [`Service::release`].
    pub id: u64,
    /// The port to bind, with SO_REUSEADDR.
    pub port: u16,
    /// The only destination it is good for.
    pub destination: SocketAddr,
    /// The only protocol it is good for.
    pub protocol: Transport,
    /// Milliseconds left; left out: as long as the connection to the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
}

/// A port in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holding {
    /// `lease`: from this API. `socket`: a connection.
    pub kind: &'static str,
    /// Of a lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The source port.
    pub port: u16,
    /// Where it leads to; left out for an unconnected UDP socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<SocketAddr>,
    /// TCP or UDP.
    pub protocol: Transport,
    /// Its holder.
    #[serde(flatten)]
    pub owner: Owner,
    /// Since when, in milliseconds.
    pub age_ms: u64,
}

/// A line of `GET /v1/leases/watch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum PoolEvent {
    /// A lease began.
    Acquired {
        /// The lease.
        lease: LeasedPort,
        /// Its holder.
        pid: u32,
    },
    /// A lease ended.
    Released {
        /// The lease.
        id: u64,
        port: u16,
        reason: &'static str,
    },
    /// A program was refused a port.
    Refused {
        /// See [`Refusal::name`].
        reason: &'static str,
        /// The destination of the connect or the request.
        destination: SocketAddr,
        /// TCP or UDP.
        protocol: Transport,
        /// The process.
        pid: u32,
        /// Its user.
        uid: u32,
        command: String,
    },
}

/// The reason of a refused request.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ServiceError {
    #[error(
        "{destination} is not a destination of the pool ({networks}); add it to portPool.destinations, or connect without the pool"
    )]
    NotADestination {
        /// The requested destination.
        destination: SocketAddr,
        /// The networks of the pool.
        networks: String,
    },
    #[error("{count} ports are asked for, the pool has {available}")]
    TooMany {
        /// Asked for.
        count: u32,
        /// In the pool.
        available: u32,
    },
    #[error(
        "the network namespace of the client cannot be found out: this kernel is older than 5.14 (SO_NETNS_COOKIE)"
    )]
    Stranger,
    #[error("no port for this destination: {}; {}", remedy::cause(*.0), remedy::remedy(*.0))]
    Refused(Refusal),
    /// The client would hold more than its share of leases.
    #[error(
        "this client holds {held} leases, and {count} more would be above its share of {limit}; end leases that are not \
         used, or ask for shorter ones"
    )]
    Share {
        /// Leases that it holds.
        held: usize,
        /// Leases that it asks for.
        count: u32,
        /// The most that one client may hold.
        limit: usize,
    },
    #[error("there is no lease {0}; it may have ended with its time or its connection")]
    NoLease(u64),
    #[error("lease {0} belongs to another user, pod or network namespace")]
    NotYours(u64),
}
