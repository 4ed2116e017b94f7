//! The cause of each refusal and its remedy, in sentences for an operator.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use bridge_common::pool::Refusal;

/// `status` mentions a refusal for this long.
const RECENT: Duration = Duration::from_secs(600);

/// Returns the cause of a refusal.
#[must_use]
pub fn cause(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::EXHAUSTED => {
            "every port of the pool is in use towards this destination, or another network namespace used it less than \
             four minutes ago"
        }
        Refusal::OUTSIDE => "the program bound its socket to a port outside the pool",
        Refusal::TAKEN => {
            "the program bound its socket to a port that another connection to this destination uses"
        }
        Refusal::QUOTA => "this network namespace has as many ports as its share allows",
        Refusal::TABLE_FULL => "the table of destinations and network namespaces is full",
        Refusal::BIND => "sockets outside the pool have bound every port that was tried",
        Refusal::SHARE => {
            "this network namespace has open sockets to more destinations than its share of the table holds"
        }
        Refusal::MEMORY => "the kernel had no memory for the storage of the socket",
        Refusal::RESTING => "every free port is in TIME_WAIT, since the peer does not use TCP timestamps",
        Refusal::PROTOCOL => {
            "the pool serves TCP and UDP, and a socket of UDP-Lite would leave from any port"
        }
        Refusal::KERNEL => {
            "the kernel refused the connection after it had a port: there is no route, or the 4-tuple is in TIME_WAIT"
        }
        _ => "the pool has no usable port towards this destination",
    }
}

/// Returns the remedy for a refusal.
#[must_use]
pub fn remedy(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::EXHAUSTED => "close connections, or enlarge portPool.ports",
        Refusal::OUTSIDE => {
            "connect without bind, or set IP_BIND_ADDRESS_NO_PORT before a bind to port 0, or set portPool.strict to false"
        }
        Refusal::TAKEN => "connect without bind, or set IP_BIND_ADDRESS_NO_PORT before a bind to port 0",
        Refusal::QUOTA => "close connections, end leases that are not used, or raise portPool.quota",
        Refusal::TABLE_FULL | Refusal::SHARE => {
            "close sockets, use fewer destinations at once, or a smaller span of portPool.ports"
        }
        Refusal::BIND => "`ss -tulnp` shows these sockets; take their ports out of portPool.ports",
        Refusal::MEMORY => "raise the memory limit of the control group",
        Refusal::RESTING => {
            "enlarge portPool.ports to the connections of a minute, enable TCP timestamps on the peer, or let it close first"
        }
        Refusal::PROTOCOL => "use UDP, or set portPool.strict to false",
        Refusal::KERNEL => {
            "`ip route get` shows whether there is a route; if there is one, enlarge portPool.ports, or enable TCP timestamps \
             on the peer"
        }
        _ => "wait, or enlarge portPool.ports",
    }
}

/// The last refusal of each kind.
#[derive(Debug, Default)]
pub(super) struct Recent(BTreeMap<u32, Refused>);

#[derive(Debug)]
struct Refused {
    at: Instant,
    destination: Option<SocketAddr>,
    command: String,
    pid: u32,
}

impl Recent {
    pub(super) fn note(&mut self, refusal: Refusal, destination: SocketAddr, command: &str, pid: u32) {
        // The creation of a socket has no destination yet.
        let destination = (destination.port() != 0).then_some(destination);
        let refused = Refused { at: Instant::now(), destination, command: command.to_owned(), pid };
        self.0.insert(refusal.0, refused);
    }

    /// Returns one sentence for each kind of refusal within the last ten minutes.
    pub(super) fn sentences(&mut self) -> Vec<String> {
        self.0.retain(|_, refused| refused.at.elapsed() < RECENT);
        let sentence = |(code, refused): (&u32, &Refused)| {
            let refusal = Refusal(*code);
            let Refused { at, destination, command, pid } = refused;
            let to = destination.map(|to| format!(" towards {to}")).unwrap_or_default();
            let refused = if refusal == Refusal::KERNEL { "was refused" } else { "was refused a port" };
            format!(
                "{} s ago {command} (pid {pid}) {refused}{to} ({}): {}; remedy: {}",
                at.elapsed().as_secs(),
                refusal.name(),
                cause(refusal),
                remedy(refusal)
            )
        };
        self.0.iter().map(sentence).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_refusal_has_a_sentence_of_its_own() {
        let mut recent = Recent::default();
        for code in 1..Refusal::COUNT {
            recent.note(Refusal(code), "192.0.2.1:443".parse().unwrap(), "curl", 7);
            recent.note(Refusal(code), "192.0.2.2:443".parse().unwrap(), "wget", 8);
        }
        let sentences = recent.sentences();
        assert_eq!(sentences.len(), Refusal::COUNT as usize - 1, "{sentences:#?}");
        for (code, sentence) in (1..).zip(&sentences) {
            let what = if Refusal(code) == Refusal::KERNEL { "was refused" } else { "was refused a port" };
            assert!(sentence.contains(&format!("wget (pid 8) {what} towards 192.0.2.2:443")), "{sentence}");
            assert!(sentence.contains(Refusal(code).name()) && sentence.contains("; remedy: "), "{sentence}");
        }
        let causes: std::collections::BTreeSet<_> =
            (1..Refusal::COUNT).map(|code| cause(Refusal(code))).collect();
        assert_eq!(causes.len(), sentences.len());
    }
}
