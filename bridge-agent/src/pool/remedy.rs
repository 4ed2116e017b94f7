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
            "the socket is bound to a port that another connection to this destination uses: by the program, or by the connect to \
             another destination before"
        }
        Refusal::QUOTA => {
            "this network namespace keeps as many ports towards this destination, in use or used lately, as its share allows"
        }
        Refusal::TABLE_FULL => "the table of destinations and network namespaces is full",
        Refusal::BIND => "other sockets, such as listeners, have bound every port that was tried",
        Refusal::SHARE => {
            "this network namespace, or its control group, has open sockets to more destinations than its share of the table \
             holds, or keeps its share of the ports while others use the pool"
        }
        Refusal::MEMORY => "the kernel had no memory for the storage of the socket",
        Refusal::RESTING => {
            "every port that is not in use is in TIME_WAIT, since the peer does not use TCP timestamps"
        }
        Refusal::PROTOCOL => {
            "the pool serves TCP and UDP, and a socket of UDP-Lite, SCTP or DCCP would leave from any port"
        }
        Refusal::KERNEL => {
            "the kernel refused the connection after it had a port: there is no route, or the 4-tuple is in TIME_WAIT"
        }
        Refusal::LEASES => "the client of the API holds as many leases as it may, over all destinations",
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
        Refusal::TAKEN => {
            "use a socket for one destination, connect without bind, or set IP_BIND_ADDRESS_NO_PORT before a bind to port 0"
        }
        Refusal::QUOTA => "close connections, end leases that are not used, or raise portPool.quota",
        Refusal::TABLE_FULL | Refusal::SHARE => {
            "close sockets, use fewer destinations at once, or a smaller span of portPool.ports; for ports, more of them, or set \
             portPool.quota"
        }
        Refusal::BIND => {
            "`ss -tulnp` shows these sockets; close them, enlarge portPool.ports, or take their ports out of it"
        }
        Refusal::MEMORY => "raise the memory limit of the control group",
        Refusal::RESTING => {
            "enlarge portPool.ports to the connections of a minute, enable TCP timestamps on the peer, or let it close first"
        }
        Refusal::PROTOCOL => "use TCP or UDP, or set portPool.strict to false",
        Refusal::KERNEL => {
            "`ip route get` shows whether there is a route; if there is one, enlarge portPool.ports, or enable TCP timestamps \
             on the peer"
        }
        Refusal::LEASES => "end leases that are not used, or ask for shorter ones",
        _ => "wait, or enlarge portPool.ports",
    }
}

/// How many groups `status` mentions for each kind of refusal: those that were refused last.
const GROUPS: usize = 4;

/// The last refusal of each kind and group, so that one that is refused all the time does not hide others.
#[derive(Debug, Default)]
pub(super) struct Recent(BTreeMap<(u32, u64), Refused>);

#[derive(Debug)]
struct Refused {
    at: Instant,
    destination: Option<SocketAddr>,
    command: String,
    pid: u32,
}

impl Recent {
    /// `group` is the id of a control group, or stands for one.
    pub(super) fn note(
        &mut self,
        refusal: Refusal,
        group: u64,
        destination: SocketAddr,
        command: &str,
        pid: u32,
    ) {
        // The creation of a socket has no destination yet.
        let destination = (destination.port() != 0).then_some(destination);
        let refused = Refused { at: Instant::now(), destination, command: command.to_owned(), pid };
        self.0.insert((refusal.0, group), refused);
        let of_kind = self.0.range((refusal.0, 0)..=(refusal.0, u64::MAX));
        if of_kind.clone().count() > GROUPS
            && let Some(oldest) = of_kind.min_by_key(|(_, refused)| refused.at).map(|(key, _)| *key)
        {
            self.0.remove(&oldest);
        }
    }

    /// Returns one sentence for each kind of refusal, and group, within the last ten minutes.
    pub(super) fn sentences(&mut self) -> Vec<String> {
        self.0.retain(|_, refused| refused.at.elapsed() < RECENT);
        let sentence = |((code, _), refused): (&(u32, u64), &Refused)| {
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
        for code in 1..Refusal::END {
            recent.note(Refusal(code), 7, "192.0.2.1:443".parse().unwrap(), "curl", 7);
            recent.note(Refusal(code), 7, "192.0.2.2:443".parse().unwrap(), "wget", 8);
        }
        let sentences = recent.sentences();
        assert_eq!(sentences.len(), Refusal::END as usize - 1, "{sentences:#?}");
        for (code, sentence) in (1..).zip(&sentences) {
            let what = if Refusal(code) == Refusal::KERNEL { "was refused" } else { "was refused a port" };
            assert!(sentence.contains(&format!("wget (pid 8) {what} towards 192.0.2.2:443")), "{sentence}");
            assert!(sentence.contains(Refusal(code).name()) && sentence.contains("; remedy: "), "{sentence}");
        }
        let causes: std::collections::BTreeSet<_> =
            (1..Refusal::END).map(|code| cause(Refusal(code))).collect();
        assert_eq!(causes.len(), sentences.len());
    }

    #[test]
    fn a_group_that_is_refused_all_the_time_hides_no_other() {
        let mut recent = Recent::default();
        let to = "192.0.2.1:443".parse().unwrap();
        recent.note(Refusal::EXHAUSTED, 1, to, "victim", 1);
        for pid in 2..1000 {
            recent.note(Refusal::EXHAUSTED, 2, to, &format!("storm{pid}"), pid);
        }
        let sentences = recent.sentences();
        assert!(sentences.len() == 2 && sentences[0].contains("victim"), "{sentences:?}");
        for group in 3..100 {
            recent.note(Refusal::EXHAUSTED, group, to, "many", 1);
        }
        assert_eq!(recent.sentences().len(), GROUPS);
    }
}
