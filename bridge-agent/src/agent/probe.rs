//! Who has to answer for a configuration on trial to confirm itself.

use std::{fmt, io, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{net::TcpStream, task::JoinSet};

/// How long a probe waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// `tcp://HOST:PORT`: a connection must be accepted there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Probe {
    /// A name or an address.
    host: String,
    port: u16,
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{text:?} is no probe: write tcp://HOST:PORT, such as tcp://192.168.31.67:22 or tcp://[fd31::67]:22"
            )
        };
        let (host, port) =
            text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(bad)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.strip_suffix(']').filter(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
            None => Some(host).filter(|host| !host.is_empty() && !host.contains([':', '/', ' '])),
        };
        Ok(Self { host: host.ok_or_else(bad)?.to_owned(), port })
    }
}

impl TryFrom<String> for Probe {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
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

impl Probe {
    /// Connects anew each time: a connection of before would be let through whatever the policy says.
    async fn ask(&self) -> io::Result<()> {
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        match tokio::time::timeout(PATIENCE, connecting).await {
            Ok(connected) => connected.map(drop),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {PATIENCE:?}"))),
        }
    }
}

/// Asks all of them again and again, until each has answered once. `tell` hears what became of each attempt.
pub(super) async fn all_answer(
    probes: Vec<Probe>,
    tell: impl Fn(usize, &io::Result<()>) + Clone + Send + 'static,
) {
    let mut asked = JoinSet::new();
    for (index, probe) in probes.into_iter().enumerate() {
        let tell = tell.clone();
        asked.spawn(async move {
            loop {
                let answer = probe.ask().await;
                tell(index, &answer);
                if answer.is_ok() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    while asked.join_next().await.is_some() {}
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
            "udp://x:1",
            "tcp://fd31::67:22",
            "tcp://[x]:22",
            "tcp://a/b:22",
        ] {
            let error = bad.parse::<Probe>().unwrap_err();
            assert!(error.contains("tcp://HOST:PORT"), "{error}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn whoever_answers_is_asked_no_more_and_all_have_to() {
        let there = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let late = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let probe = |address| format!("tcp://{address}").parse::<Probe>().unwrap();
        let probes = vec![probe(there.local_addr().unwrap()), probe(late)];
        let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let hears = told.clone();
        let asking =
            all_answer(probes, move |index, answer| hears.lock().unwrap().push((index, answer.is_ok())));
        let opening = async {
            while !told.lock().unwrap().contains(&(1, false)) {
                tokio::task::yield_now().await;
            }
            tokio::net::TcpListener::bind(late).await.unwrap()
        };
        let (_listener, ()) =
            tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(opening, asking) })
                .await
                .expect("all have answered");
        let told = told.lock().unwrap();
        assert_eq!(told.iter().filter(|(index, _)| *index == 0).count(), 1, "{told:?}");
        assert_eq!(told.last(), Some(&(1, true)));
    }
}
